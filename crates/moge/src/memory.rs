//! How much memory there is, and what a run needs: asked before anything large is loaded.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};
use indicatif::DecimalBytes;
use moge_train::TrainMemory;

/// What a run will hold in memory. A config may ask for more than 64 bits can count; sums stop there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// The checkpoint's files.
    pub(crate) weight_bytes: u64,
    /// Copies of tensors that are not aligned for their type in the files. They never page.
    pub(crate) copied_bytes: u64,
    /// Keys and values.
    pub(crate) kv_bytes: u64,
    /// Scratch memory of a step.
    pub(crate) workspace_bytes: u64,
}

impl MemoryPlan {
    fn total_bytes(self) -> u64 {
        let parts = [self.weight_bytes, self.copied_bytes, self.kv_bytes, self.workspace_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    /// What must be in memory at once.
    fn resident(self, weights_may_page: bool) -> MemoryPlan {
        if weights_may_page { MemoryPlan { weight_bytes: 0, ..self } } else { self }
    }

    /// What the plan leaves of `available_bytes`.
    pub(crate) fn left_bytes(self, available_bytes: u64, weights_may_page: bool) -> u64 {
        available_bytes.saturating_sub(self.resident(weights_may_page).total_bytes())
    }

    /// Refuse a plan that does not fit into `available_bytes`. With `weights_may_page`, mapped weights that do not fit
    /// are read from disk again and again; the rest must fit all the same.
    pub(crate) fn check(self, available_bytes: u64, weights_may_page: bool) -> Result<()> {
        let resident = self.resident(weights_may_page);
        if resident.total_bytes() <= available_bytes {
            return Ok(());
        }
        let advice = if self.weight_bytes > available_bytes && !weights_may_page {
            "the weights alone do not fit; --allow-paging runs mapped ones from disk, slowly".to_owned()
        } else {
            let left = available_bytes.saturating_sub(resident.weight_bytes.saturating_add(self.copied_bytes));
            format!("{} would be left for KV cache and workspace", DecimalBytes(left))
        };
        bail!("not enough memory: {self} needed, {} available; {advice}", DecimalBytes(available_bytes))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemoryPlan { weight_bytes, copied_bytes, kv_bytes, workspace_bytes } = *self;
        let total = DecimalBytes(self.total_bytes());
        let (weights, kv, workspace) =
            (DecimalBytes(weight_bytes), DecimalBytes(kv_bytes), DecimalBytes(workspace_bytes));
        write!(f, "{total} (weights {weights}")?;
        if copied_bytes > 0 {
            write!(f, " + copies of unaligned weights {}", DecimalBytes(copied_bytes))?;
        }
        write!(f, " + KV cache {kv} + workspace {workspace})")
    }
}

/// Refuse a training that does not fit into `available_bytes`.
pub(crate) fn check_training(plan: TrainMemory, available_bytes: u64) -> Result<()> {
    if plan.total_bytes() <= available_bytes {
        return Ok(());
    }
    let [total, state, activations, scratch, available] =
        [plan.total_bytes(), plan.state_bytes, plan.activation_bytes, plan.scratch_bytes, available_bytes]
            .map(DecimalBytes);
    bail!(
        "not enough memory: {total} (parameters, gradients and moments {state} + activations {activations} + scratch \
         {scratch}) needed, {available} available; fewer compute.micro_batch_tokens or compute.recompute = true need less \
         for activations"
    )
}

/// Memory that can be had without swapping, within the limits of the control groups we are in. `None` where the system
/// does not tell.
pub(crate) fn available_bytes() -> Option<u64> {
    let system = mem_available(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok();
    let limit = groups.and_then(|groups| control_group_bytes(&groups, Path::new("/sys/fs/cgroup")));
    Some(limit.map_or(system, |limit| system.min(limit)))
}

/// `MemAvailable` in the text of `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes that the control groups (version 2) leave, by the text of `/proc/self/cgroup` and the folder where the groups
/// are mounted. Page cache counts as free, as it does in `MemAvailable`.
fn control_group_bytes(groups: &str, root: &Path) -> Option<u64> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let leaf = root.join(own);
    let levels = leaf.ancestors().take_while(|dir| dir.starts_with(root));
    levels.filter_map(control_group_level).min()
}

fn control_group_level(dir: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).ok()?;
    let file_cache: u64 = stat.lines().find_map(|line| line.strip_prefix("file "))?.parse().ok()?;
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(file_cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_does_not_fit_says_what_is_needed_and_what_is_there() {
        let plan = MemoryPlan {
            weight_bytes: 12_000_000_000,
            copied_bytes: 0,
            kv_bytes: 3_000_000_000,
            workspace_bytes: 70_000_000,
        };
        plan.check(15_070_000_000, false).unwrap();
        let error = plan.check(15_000_000_000, false).unwrap_err().to_string();
        let expected = "not enough memory: 15.07 GB (weights 12.00 GB + KV cache 3.00 GB + workspace 70.00 MB) needed, \
                        15.00 GB available; 3.00 GB would be left for KV cache and workspace";
        assert_eq!(error, expected);
        assert!(plan.check(5_000_000_000, false).unwrap_err().to_string().contains("--allow-paging"));
        plan.check(5_000_000_000, true).unwrap();
        assert_eq!(plan.left_bytes(15_100_000_000, false), 30_000_000);
        assert_eq!(plan.left_bytes(15_100_000_000, true), 12_030_000_000);
        plan.check(2_000_000_000, true).unwrap_err();
    }

    #[test]
    fn a_training_that_does_not_fit_says_what_would_need_less() {
        let plan = TrainMemory { state_bytes: 16_000_000, activation_bytes: 3_000_000, scratch_bytes: 500_000 };
        check_training(plan, 19_500_000).unwrap();
        let error = check_training(plan, 19_000_000).unwrap_err().to_string();
        assert!(error.contains("19.50 MB") && error.contains("activations 3.00 MB"), "{error}");
        assert!(error.contains("compute.recompute"), "{error}");
    }

    #[test]
    fn available_memory_is_read_in_kib_or_not_at_all() {
        let meminfo =
            "MemTotal:       24689764 kB\nMemFree:         1000000 kB\nMemAvailable:   23456789 kB\nBuffers: 7 kB\n";
        assert_eq!(mem_available(meminfo), Some(23_456_789 * 1024));
        for unreadable in ["", "MemFree: 5 kB\n", "MemAvailable: 5 MB\n", "MemAvailable: 18446744073709551615 kB\n"] {
            assert_eq!(mem_available(unreadable), None, "{unreadable}");
        }
    }

    #[test]
    fn the_tightest_control_group_above_us_limits_memory_and_page_cache_counts_as_free() {
        let folder = tempfile::tempdir().unwrap();
        let group = |path: &str, max: &str, current: u64, file_cache: u64| {
            let dir = folder.path().join(path);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("memory.max"), format!("{max}\n")).unwrap();
            std::fs::write(dir.join("memory.current"), format!("{current}\n")).unwrap();
            std::fs::write(dir.join("memory.stat"), format!("anon 5\nfile {file_cache}\nkernel 3\n")).unwrap();
        };
        group("a", "9000", 5000, 1000);
        group("a/b", "max", 4000, 900);
        group("a/b/c", "7000", 1500, 300);
        group("other", "1", 1, 0);
        let left = |groups: &str| control_group_bytes(groups, folder.path());
        assert_eq!(left("0::/a/b/c\n"), Some(5000), "the group `a` leaves less than `c`");
        assert_eq!(left("1:memory:/x\n0::/a\n"), Some(5000));
        assert_eq!(left("0::/a/b/c/d\n"), Some(5000), "a group without limit of its own");
        assert_eq!(left("0::/\n"), None);
        assert_eq!(left("1:memory:/a\n"), None, "version 1");
    }
}
