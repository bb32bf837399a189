//! Real clients against the real server: OpenAI's client, an evaluation harness, a fuzzer and a browser.
//!
//! The tests are Python's (`clients/python`); what is here gets them their tools and the server's binary. Tools lie in
//! `target/clients` and come once, and again when the list of them changes.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{output_of, require_program, run_visibly};
use crate::outcome::{Outcome, Tally};
use crate::venv::{self, once};
use crate::{cargo, root};

/// Where Debian puts Chromium.
const CHROMIUM: &str = "/usr/bin/chromium";

/// Get the tools, build the server, run the tests.
///
/// Tools that cannot be had are skipped, and said to be. Python is what all tests need, so that without it there is
/// none: CI, which sets the variable `CI`, does not allow that.
pub(crate) fn run() -> Result<Outcome> {
    let root = root().canonicalize().context("cannot find the repository's root")?;
    let tools = root.join("target/clients");
    fs::create_dir_all(&tools).with_context(|| format!("cannot make {}", tools.display()))?;
    match install_python(&root, &tools) {
        Err(missing) if env::var_os("CI").is_none() => return Ok(Outcome::Skipped { missing: format!("{missing:#}") }),
        result => result?,
    }
    if let Err(missing) = install_browser(&root, &tools) {
        println!("SKIPPED: the page in a browser: {missing:#}");
    }
    run_visibly("build the server", cargo().args(["build", "--package", "moge"]))?;
    let mut pytest = Command::new(tools.join("venv/bin/python"));
    pytest.args(["-m", "pytest"]).current_dir(root.join("clients/python"));
    pytest.env("MOGE", root.join("target/debug/moge"));
    // Large packages take seconds to compile: once is enough, and not beside the sources.
    pytest.env_remove("PYTHONDONTWRITEBYTECODE").env("PYTHONPYCACHEPREFIX", tools.join("pycache"));
    Ok(Outcome::Tested(Tally::of_tests(&mut pytest)?))
}

/// A virtual environment with what `requirements.txt` lists.
fn install_python(root: &Path, tools: &Path) -> Result<()> {
    require_program("python3", "the clients need Python 3.11 or newer, with its module `venv`")?;
    // The list is complete, so that there is nothing to resolve.
    venv::install(&root.join("clients/python/requirements.txt"), &tools.join("venv"), &["--no-deps"])?;
    Ok(())
}

/// The packages of the page's test, and Chromium where we may install it.
fn install_browser(root: &Path, tools: &Path) -> Result<()> {
    require_program("npm", "the page's test runs on Node.js 20 or newer")?;
    let page = root.join("clients/page");
    once(&page.join("package-lock.json"), &tools.join("npm.stamp"), || {
        let mut npm = Command::new("npm");
        run_visibly("install the page's test", npm.args(["ci", "--no-audit", "--no-fund"]).current_dir(&page))
    })?;
    if env::var_os("CHROMIUM").is_some() || Path::new(CHROMIUM).exists() {
        return Ok(());
    }
    let is_root = output_of(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if !is_root || require_program("apt-get", "it installs Chromium").is_err() {
        bail!("there is no {CHROMIUM}, and the variable CHROMIUM names no other");
    }
    run_visibly("look for packages", Command::new("apt-get").args(["update", "-qq"]))?;
    let mut apt = Command::new("apt-get");
    apt.args(["install", "-y", "-qq", "--no-install-recommends", "chromium"]).env("DEBIAN_FRONTEND", "noninteractive");
    run_visibly("install Chromium", &mut apt)
}
