//! Text and tokens: tokenizers, chat templates, what a checkpoint says about sampling.

pub(crate) mod chat_template;
pub(crate) mod generation_config;
pub mod tokenizer;
