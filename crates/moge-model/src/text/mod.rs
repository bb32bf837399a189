//! Text and tokens: tokenizers, chat templates, and a checkpoint's defaults for sampling.

pub(crate) mod chat_template;
pub(crate) mod generation_config;
pub mod tokenizer;
