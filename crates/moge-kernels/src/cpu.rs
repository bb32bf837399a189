//! Where kernels run: the CPU features in use and the worker pool.

/// The CPU features in use and the worker pool.
#[derive(Debug)]
pub struct Cpu {}
