//! Tools that come once, and again when the list of them changes: virtual environments of Python, for one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run_visibly;

/// A virtual environment in `dir` with what the file `requirements` lists; gives its Python.
pub(crate) fn install(requirements: &Path, dir: &Path, pip_options: &[&str]) -> Result<PathBuf> {
    let python = dir.join("bin/python");
    once(requirements, &dir.with_extension("stamp"), || {
        run_visibly("make a virtual environment", Command::new("python3").args(["-m", "venv", "--clear"]).arg(dir))?;
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]).args(pip_options);
        run_visibly("install Python packages", pip.arg("--requirement").arg(requirements))
    })?;
    Ok(python)
}

/// Do `work` unless it was done for this very `list`, of which `stamp` is a copy.
pub(crate) fn once(list: &Path, stamp: &Path, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let wanted = fs::read(list).with_context(|| format!("cannot read {}", list.display()))?;
    if fs::read(stamp).is_ok_and(|done| done == wanted) {
        return Ok(());
    }
    work()?;
    fs::write(stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

#[cfg(test)]
mod tests {
    use std::env;

    use anyhow::bail;

    use super::*;

    #[test]
    fn what_a_list_asks_for_is_done_once_and_again_when_the_list_changes() {
        let folder = env::temp_dir().join(format!("moge-xtask-once-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (list, stamp) = (folder.join("list"), folder.join("stamp"));
        let mut num_times = 0;
        for (text, expected) in [("one", 1), ("one", 1), ("two", 2)] {
            fs::write(&list, text).unwrap();
            let failed = once(&list, &stamp, || bail!("no network"));
            assert_eq!(failed.is_err(), num_times < expected, "{text}: what failed counts as not done");
            once(&list, &stamp, || {
                num_times += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(num_times, expected);
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
