//! The command line of `bench train`.

use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, bail};

use super::{ENGINES, Engine, MAX_STEPS, MODELS, Model};

/// What the user asked for.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) models: Vec<&'static Model>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) num_threads: usize,
    pub(crate) num_rounds: usize,
    /// Of each round; the first one warms up.
    pub(crate) num_steps: usize,
    /// A Python that has PyTorch.
    pub(crate) python: Option<PathBuf>,
    /// Reports to write, in Markdown.
    pub(crate) out: Vec<PathBuf>,
}

pub(crate) fn print_options() {
    println!("Options of `train`:");
    println!(
        "  --model PRESET     only this model: {}",
        MODELS.iter().map(|model| model.preset).collect::<Vec<_>>().join(", ")
    );
    println!(
        "  --dtype TYPE       only products of this type: f32 or bf16; processors without bf16 are very slow at it"
    );
    println!("  --threads N        of both programs [default: as many as the machine offers]");
    println!("  --rounds N         [default: 3]");
    println!("  --steps N          of every round, from 2 to {MAX_STEPS}; the first one is not counted [default: 5]");
    println!("  --python PROGRAM   a Python that has PyTorch; else one is installed in target/train, of several GB");
    println!("  --peer-only        measure PyTorch alone");
    println!("  --out FILE         write a report in Markdown; may be repeated");
}

impl Options {
    pub(crate) fn parse(words: &[String]) -> Result<Options> {
        let mut options = Options {
            models: MODELS.iter().collect(),
            engines: ENGINES.to_vec(),
            num_threads: thread::available_parallelism().map_or(1, usize::from),
            num_rounds: 3,
            num_steps: 5,
            python: None,
            out: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word.as_str() {
                "--model" => {
                    let preset = value()?;
                    options.models.retain(|model| model.preset == preset);
                    if options.models.is_empty() {
                        bail!("--model: `{preset}` is none; `cargo xtask bench help` lists them");
                    }
                }
                "--threads" => options.num_threads = number(word, value()?, 1, usize::MAX)?,
                "--rounds" => options.num_rounds = number(word, value()?, 1, usize::MAX)?,
                "--steps" => options.num_steps = number(word, value()?, 2, MAX_STEPS)?,
                "--python" => options.python = Some(PathBuf::from(value()?)),
                "--dtype" => {
                    let dtype = value()?;
                    options.engines.retain(|engine| engine.dtype() == dtype);
                    if options.engines.is_empty() {
                        bail!("--dtype: `{dtype}` is neither f32 nor bf16");
                    }
                }
                "--peer-only" => options.engines.retain(|engine| !engine.is_ours()),
                "--out" => options.out.push(PathBuf::from(value()?)),
                other => bail!("no option is called `{other}`; `cargo xtask bench help` lists them"),
            }
        }
        Ok(options)
    }
}

fn number(option: &str, text: &str, least: usize, most: usize) -> Result<usize> {
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ if most == usize::MAX => bail!("{option}: `{text}` is not a number from {least} on"),
        _ => bail!("{option}: `{text}` is not a number from {least} to {most}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Engine, Options};

    fn parse(line: &str) -> anyhow::Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn every_option_sets_its_own_value() {
        let options = parse("--model train-104m --threads 3 --rounds 4 --steps 6 --python p --out o").unwrap();
        assert_eq!(options.models.iter().map(|model| model.preset).collect::<Vec<_>>(), ["train-104m"]);
        assert_eq!((options.num_threads, options.num_rounds, options.num_steps), (3, 4, 6));
        assert!(options.python.is_some_and(|python| python.ends_with("p")));
        assert_eq!(options.out.len(), 1);
        assert_eq!(parse("").unwrap().models.len(), 2);
        assert_eq!(parse("--dtype bf16").unwrap().engines, [Engine::PyTorch("bf16"), Engine::Moge("bf16")]);
        assert_eq!(parse("--peer-only --dtype f32").unwrap().engines, [Engine::PyTorch("f32")]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (line, message) in [
            ("--threads 0", "--threads: `0` is not a number from 1 on"),
            ("--steps 1", "--steps: `1` is not a number from 2 to 64"),
            ("--model vast", "--model: `vast` is none; `cargo xtask bench help` lists them"),
            ("--dtype f16", "--dtype: `f16` is neither f32 nor bf16"),
            ("--out", "--out needs a value"),
            ("--fast", "no option is called `--fast`; `cargo xtask bench help` lists them"),
        ] {
            assert_eq!(parse(line).unwrap_err().to_string(), message);
        }
    }
}
