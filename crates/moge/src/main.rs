//! The `moge` binary.

fn main() {}
