//! `bench peers`: moge beside llama.cpp.
//!
//! Everything lives in `target/peers`: llama.cpp, the models, and the journal of a run that is not over. All of it is
//! made where it is missing; delete it, or a part of it, to have it made again.

mod cases;
mod disk;
mod gguf;
mod llama_cpp;
mod measure;
mod model;
mod models;
mod options;
mod quant_type;
mod report;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::command::{output_of, run_visibly};
use crate::{cargo, root};

use cases::{Case, PeerConfig, Scheme, Settings};
use measure::{Journal, OURS};
use model::{PANGU_PRO_MOE_4L, QWEN3_0_6B};
use options::Options;
pub(crate) use options::print_options;
use report::Row;

/// Measure, print the table, and write the reports that the options ask for.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let options = Options::parse(words)?;
    let dir = root().join("target/peers");
    fs::create_dir_all(dir.join("models")).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    let bench = Bench::prepare(&dir, &options)?;
    let about = bench.about(&options)?;
    let mut journal = Journal::open(&dir.join("journal.jsonl"), &about)?;
    bench.measure(&options, &mut journal)?;

    let rows: Vec<Row> = options.cases.iter().filter_map(|case| Row::of(case, &journal.rates)).collect();
    print!("\n{}", report::table(&rows));
    for path in &options.out {
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let text = if is_json {
            format!("{:#}\n", report::to_json(&rows, &about))
        } else {
            report::to_markdown(&rows, &about)
        };
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    journal.close()
}

/// Both engines and their models.
struct Bench {
    llama_cpp: llama_cpp::LlamaCpp,
    /// `None`: only llama.cpp is measured.
    moge: Option<PathBuf>,
    models: PathBuf,
    settings: Settings,
}

impl Bench {
    fn prepare(dir: &Path, options: &Options) -> Result<Bench> {
        let llama_cpp = llama_cpp::prepare(dir, options.settings.num_threads)?;
        let moge = if options.peer_only { None } else { Some(build_moge()?) };
        let bench = Bench { llama_cpp, moge, models: dir.join("models"), settings: options.settings };
        // All files first, so that nothing is written while something is measured.
        for model in [&PANGU_PRO_MOE_4L, &QWEN3_0_6B] {
            let cases = options.cases.iter().filter(|case| case.model == model);
            for config in cases.clone().flat_map(Case::peer_configs) {
                models::make_gguf(&bench.models, model, config.mix)?;
            }
            if let Some(moge) = &bench.moge {
                let schemes: Vec<Scheme> = cases.map(|case| case.scheme).collect();
                models::make_ours(&bench.models, moge, model, &schemes)?;
            }
        }
        Ok(bench)
    }

    /// What the figures are of; a run with other facts is another run.
    fn about(&self, options: &Options) -> Result<Value> {
        let cases: Vec<String> = options.cases.iter().map(Case::name).collect();
        let mut about = json!({
            "llama.cpp": format!("vendored by {}", llama_cpp::PACKAGE),
            "threads": self.settings.num_threads,
            "repetitions": options.num_repetitions,
            "decoded tokens": self.settings.num_steps,
            "cases": cases.join(" "),
        });
        if let Some(moge) = &self.moge {
            let modified = fs::metadata(moge).and_then(|metadata| metadata.modified());
            let built = modified.with_context(|| format!("cannot read {}", moge.display()))?.duration_since(UNIX_EPOCH);
            about["moge built at (Unix time)"] = built.unwrap_or_default().as_secs().into();
        }
        Ok(about)
    }

    /// Every repetition of every case: llama.cpp's configurations and ours directly one after the other.
    fn measure(&self, options: &Options, journal: &mut Journal) -> Result<()> {
        for (index, case) in options.cases.iter().enumerate() {
            eprintln!("==> {} ({} of {})", case.name(), index + 1, options.cases.len());
            let mut configs = case.peer_configs();
            for repetition in 0..options.num_repetitions {
                let mut found = Vec::new();
                for &config in &configs {
                    let measure = || self.peer_rate(case, config);
                    found.push(journal.rate(&case.name(), &config.name(), repetition, measure)?);
                }
                if let Some(moge) = &self.moge {
                    journal.rate(&case.name(), OURS, repetition, || self.our_rate(case, moge))?;
                }
                if repetition == 0 {
                    let mut is_worth = measure::worth_repeating(&found).into_iter();
                    configs.retain(|_| is_worth.next() == Some(true));
                }
            }
        }
        Ok(())
    }

    fn peer_rate(&self, case: &Case, config: PeerConfig) -> Result<f64> {
        let model = models::gguf_path(&self.models, case.model, config.mix);
        let mut command = case.work.peer_command(&self.llama_cpp, config, &model, self.settings);
        case.work.read_peer(&output_of(&mut command)?)
    }

    fn our_rate(&self, case: &Case, moge: &Path) -> Result<f64> {
        let model = models::our_path(&self.models, case.model, case.scheme);
        case.work.read_ours(&output_of(&mut case.work.our_command(moge, &model, self.settings))?)
    }
}

/// The release build of the program.
pub(crate) fn build_moge() -> Result<PathBuf> {
    let mut build = cargo();
    run_visibly("build moge", build.args(["build", "--release", "--package", "moge"]))?;
    // Cargo's own `target`, wherever the user has put it, is where we are ourselves: in `debug` there.
    let own = env::current_exe().context("cannot find this program")?;
    let target = own.parent().and_then(Path::parent).context("this program is not in cargo's `target`")?;
    Ok(target.join("release").join(format!("moge{}", env::consts::EXE_SUFFIX)))
}
