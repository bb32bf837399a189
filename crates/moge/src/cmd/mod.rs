//! One file per subcommand: its arguments, and what it does with them.

pub(crate) mod inspect;
pub(crate) mod synth;
