//! Rotary position embedding.

/// Which numbers of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Number `i` with number `i + rotary_dim / 2` (NeoX, Llama).
    RotateHalf,
    /// Number `2i` with number `2i + 1` (GPT-J, GLM).
    Interleaved,
}
