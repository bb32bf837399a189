//! The command line of `bench peers`.

use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, bail};

use super::cases::{Case, Settings, all_cases};

/// What the user asked for.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) cases: Vec<Case>,
    pub(crate) settings: Settings,
    pub(crate) num_repetitions: usize,
    /// Measure llama.cpp alone.
    pub(crate) peer_only: bool,
    /// Reports to write: JSON if the name ends in `.json`, else Markdown.
    pub(crate) out: Vec<PathBuf>,
}

/// Longest sequence of the cases that `--quick` runs.
const QUICK_MAX_POSITION: u32 = 1024;

pub(crate) fn print_options() {
    println!("Options of `peers`:");
    println!("  --model PRESET     only this model");
    println!("  --cases TEXT,..    only cases whose name holds one of these texts");
    println!("  --threads N        of both engines [default: as many as the machine offers]");
    println!("  --repetitions N    [default: 3]");
    println!("  --quick            one repetition, 16 decoded tokens, no long contexts");
    println!("  --peer-only        measure llama.cpp alone");
    println!("  --out FILE         write a report, JSON or Markdown by the name's ending; may be repeated");
    println!("\nCases of `peers`:");
    all_cases().iter().for_each(|case| println!("  {}", case.name()));
    println!("\nAn interrupted run goes on where it stopped. What it fetches and makes is in target/peers.");
}

impl Options {
    pub(crate) fn parse(words: &[String]) -> Result<Options> {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let mut options = Options {
            cases: all_cases(),
            settings: Settings { num_threads: threads, num_steps: 64 },
            num_repetitions: 3,
            peer_only: false,
            out: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word.as_str() {
                "--model" => {
                    let preset = value()?;
                    options.keep(preset, |case| case.model.preset == preset)?;
                }
                "--cases" => {
                    let texts = value()?;
                    options.keep(texts, |case| texts.split(',').any(|text| case.name().contains(text)))?;
                }
                "--threads" => options.settings.num_threads = positive(word, value()?)?,
                "--repetitions" => options.num_repetitions = positive(word, value()?)?,
                "--out" => options.out.push(PathBuf::from(value()?)),
                "--peer-only" => options.peer_only = true,
                "--quick" => {
                    options.num_repetitions = 1;
                    options.settings.num_steps = 16;
                    options.keep(word, |case| case.work.max_position(16) <= QUICK_MAX_POSITION)?;
                }
                other => bail!("no option is called `{other}`; `cargo xtask bench help` lists them"),
            }
        }
        Ok(options)
    }

    /// Keep the cases that fit, and refuse to be left with none.
    fn keep(&mut self, asked: &str, fits: impl Fn(&Case) -> bool) -> Result<()> {
        self.cases.retain(fits);
        if self.cases.is_empty() {
            bail!("no case fits `{asked}`; `cargo xtask bench help` lists them");
        }
        Ok(())
    }
}

fn positive(option: &str, text: &str) -> Result<usize> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => bail!("{option}: `{text}` is not a number from 1 on"),
    }
}

#[cfg(test)]
mod tests {
    use super::Options;

    fn parse(line: &str) -> anyhow::Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_string).collect::<Vec<_>>())
    }

    fn names(options: &Options) -> Vec<String> {
        options.cases.iter().map(|case| case.name()).collect()
    }

    #[test]
    fn options_choose_among_the_cases() {
        let options = parse("--model qwen3-0.6b --cases prefill,b8 --threads 3 --repetitions 5 --out a.md").unwrap();
        assert_eq!(names(&options), ["qwen3-0.6b/w4a8/prefill-512", "qwen3-0.6b/w4a8/decode-b8-c128"]);
        assert_eq!((options.settings.num_threads, options.num_repetitions, options.out.len()), (3, 5, 1));
        let quick = parse("--quick --cases pangu-pro-moe-4l/w4a8").unwrap();
        assert_eq!(quick.cases.len(), 4, "{:?}", names(&quick));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (line, message) in [
            ("--threads 0", "--threads: `0` is not a number from 1 on"),
            ("--repetitions many", "--repetitions: `many` is not a number from 1 on"),
            ("--out", "--out needs a value"),
            ("--cases b9", "no case fits `b9`; `cargo xtask bench help` lists them"),
            ("--fast", "no option is called `--fast`; `cargo xtask bench help` lists them"),
        ] {
            assert_eq!(parse(line).unwrap_err().to_string(), message);
        }
    }
}
