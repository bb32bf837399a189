//! Room on the disk.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// Left free for others.
const RESERVE_BYTES: u64 = 1_000_000_000;

/// Refuse what would fill the disk that `dir`, which exists, is on.
pub(crate) fn require(dir: &Path, bytes: u64, purpose: &str) -> Result<()> {
    let disk =
        rustix::fs::statvfs(dir).with_context(|| format!("cannot ask for the free space of {}", dir.display()))?;
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if available < bytes.saturating_add(RESERVE_BYTES) {
        bail!(
            "{}: {:.1} GB are free, and {:.1} GB are needed {purpose}; make room, or let `target` be on another disk",
            dir.display(),
            available as f64 / 1e9,
            (bytes + RESERVE_BYTES) as f64 / 1e9
        );
    }
    Ok(())
}
