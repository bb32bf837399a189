//! Errors of loading and rendering a chat template.

use thiserror::Error;

use crate::{Architecture, TokenizerError};

/// Why a chat template cannot be loaded or rendered.
#[derive(Debug, Error)]
pub enum ChatTemplateError {
    /// A file cannot be read, or is damaged.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// The checkpoint brings no template and none is known for its network.
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
    /// `chat_template` in `tokenizer_config.json` is not what it should be.
    #[error("{file}: chat_template: {problem}")]
    Field {
        /// The file's path.
        file: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// The template is not Jinja.
    #[error("{file}: line {line}: {problem}")]
    Syntax {
        /// The file's path.
        file: String,
        /// The line in the template.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A message is no object with a role, or its content is none.
    #[error("messages[{index}]: {problem}")]
    Message {
        /// Which message, from 0.
        index: usize,
        /// What was found and what is allowed.
        problem: &'static str,
    },
    /// The template called `raise_exception`: it does not accept these messages.
    #[error("{file}: the chat template refuses the messages: {message}")]
    Raised {
        /// The file's path.
        file: String,
        /// What the template says.
        message: String,
    },
    /// The template loops for ever, or makes far more text than its input justifies.
    #[error("{file}: the chat template does too much work; allowed: {fuel} units of fuel for this input")]
    TooMuchWork {
        /// The file's path.
        file: String,
        /// Steps that were allowed; 64 bytes of text count as one.
        fuel: u64,
    },
    /// The template takes too long.
    #[error("{file}: the chat template takes longer than {seconds} s")]
    TooSlow {
        /// The file's path.
        file: String,
        /// Seconds that were allowed.
        seconds: u64,
    },
    /// There is no thread to run the template on.
    #[error("{file}: the chat template cannot run: {source}")]
    Thread {
        /// The file's path.
        file: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The template engine has a defect that this template meets.
    #[error("{file}: the template engine panicked")]
    Panicked {
        /// The file's path.
        file: String,
    },
    /// The template fails with these messages.
    #[error("{file}: line {line}: {problem}")]
    Render {
        /// The file's path.
        file: String,
        /// The line in the template.
        line: usize,
        /// What went wrong there.
        problem: String,
    },
}
