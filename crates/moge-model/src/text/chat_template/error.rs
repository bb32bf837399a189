//! Errors of loading and rendering a chat template.

use thiserror::Error;

use crate::{Architecture, TokenizerError};

/// Why a chat template cannot be loaded or rendered.
#[derive(Debug, Error)]
pub enum ChatTemplateError {
    /// A file cannot be read, or is damaged.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// The checkpoint has no template, and its architecture has no built-in one.
    #[error(
        "{dir}: no chat template: there is no chat_template.jinja and no `chat_template` in tokenizer_config.json, \
         and {architecture:?} has no built-in one"
    )]
    Missing {
        /// The directory.
        dir: String,
        /// The network.
        architecture: Architecture,
    },
    /// `chat_template` in `tokenizer_config.json` is not valid.
    #[error("{file}: chat_template: {problem}")]
    Field {
        /// The file's path.
        file: String,
        /// The value found and the values allowed.
        problem: String,
    },
    /// The template is not valid Jinja.
    #[error("{file}: line {line}: {problem}")]
    Syntax {
        /// The file's path.
        file: String,
        /// The line in the template.
        line: usize,
        /// The problem.
        problem: String,
    },
    /// A message is not an object with a role, or its content is not valid.
    #[error("messages[{index}]: {problem}")]
    Message {
        /// Index of the message.
        index: usize,
        /// The value found and the values allowed.
        problem: &'static str,
    },
    /// The template called `raise_exception`: it does not accept these messages.
    #[error("{file}: the chat template refuses the messages: {message}")]
    Raised {
        /// The file's path.
        file: String,
        /// The template's message.
        message: String,
    },
    /// The template does not terminate, or produces far more text than its input justifies.
    #[error("{file}: the chat template does too much work; allowed: {fuel} units of fuel for this input")]
    TooMuchWork {
        /// The file's path.
        file: String,
        /// Steps allowed; 64 bytes of text count as one.
        fuel: u64,
    },
    /// The template takes too long.
    #[error("{file}: the chat template takes longer than {seconds} s")]
    TooSlow {
        /// The file's path.
        file: String,
        /// Seconds allowed.
        seconds: u64,
    },
    /// The thread that renders the template cannot be started.
    #[error("{file}: the chat template cannot run: {source}")]
    Thread {
        /// The file's path.
        file: String,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The template engine panicked on this template.
    #[error("{file}: the template engine panicked")]
    Panicked {
        /// The file's path.
        file: String,
    },
    /// The template fails on these messages.
    #[error("{file}: line {line}: {problem}")]
    Render {
        /// The file's path.
        file: String,
        /// The line in the template.
        line: usize,
        /// The problem.
        problem: String,
    },
}
