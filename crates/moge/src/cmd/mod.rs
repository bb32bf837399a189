//! One file per subcommand: its arguments, and what it does with them.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod perplexity;
pub(crate) mod quantize;
pub(crate) mod serve;
pub(crate) mod synth;
pub(crate) mod tokenize;
pub(crate) mod train;
