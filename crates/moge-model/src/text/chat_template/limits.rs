//! Limits of a template that several of its functions keep.

/// Bytes of text that cost as much as one step, the rate of the template engine.
pub(super) const BYTES_PER_FUEL: usize = 64;

/// Values nested deeper are refused, as each level is a call on the stack; what a client sends is at most 128 deep.
pub(super) const MAX_DEPTH: usize = 200;
