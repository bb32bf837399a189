//! `moge synth`: write a random checkpoint.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use indicatif::DecimalBytes;
use moge_kernels::Dtype;
use moge_model::Architecture;
use moge_model::synth::{Preset, SynthConfig, SynthMlp, presets, write_checkpoint};

use crate::interrupt::Interrupt;
use crate::{output, progress};

/// Room left for tokenizer files and headers when free disk space is checked, as a part of the weights and in bytes.
const OTHER_FILES_PART: u64 = 100;
const OTHER_FILES_BYTES: u64 = 1_000_000;

/// Write a random checkpoint in the official layout, with a small tokenizer
///
/// Weights have mean zero and are scaled so that activations stay of order one and experts are chosen about equally
/// often. The same arguments give the same bytes on every machine.
#[derive(Debug, Args)]
#[command(after_help = preset_help())]
pub(crate) struct SynthArgs {
    /// Directory to write; made if missing, must be empty
    dir: PathBuf,
    /// Architecture; may be left out where the preset's name tells
    #[arg(long, value_enum, required_unless_present = "preset")]
    arch: Option<ArchitectureName>,
    /// Named sizes (see below), which the other options change one by one
    #[arg(long, value_name = "NAME", default_value = "tiny")]
    preset: String,
    /// Number of layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    q_heads: Option<usize>,
    /// Key/value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Width of a head
    #[arg(long, value_name = "N")]
    head_dim: Option<usize>,
    /// Inner width of a dense MLP
    #[arg(long, value_name = "N")]
    intermediate: Option<usize>,
    /// Routed experts of a layer
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Expert groups; divides the number of experts
    #[arg(long, value_name = "N")]
    expert_groups: Option<usize>,
    /// Experts that one token uses; a multiple of the number of expert groups
    #[arg(long, value_name = "N")]
    experts_per_token: Option<usize>,
    /// Inner width of a routed expert
    #[arg(long, value_name = "N")]
    expert_intermediate: Option<usize>,
    /// Inner width of the shared expert
    #[arg(long, value_name = "N")]
    shared_intermediate: Option<usize>,
    /// Entries of the vocabulary
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Longest sequence, in tokens
    #[arg(long, value_name = "N")]
    max_position: Option<usize>,
    /// Type of the weights
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeName,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ArchitectureName {
    PanguProMoe,
    PanguEmbedded,
    Qwen3,
    Qwen3Moe,
    Glm4,
    Llama,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeName {
    F32,
    F16,
    Bf16,
}

/// Write the checkpoint that `args` describe.
pub(crate) fn run(args: &SynthArgs) -> Result<()> {
    let config = args.config()?;
    let weight_bytes = config.weight_bytes()?;
    check_free_space(&args.dir, weight_bytes)?;
    let interrupt = Interrupt::install()?;
    if !args.dir.exists() {
        // Only what we make is ours to remove.
        interrupt.remove_on_exit(&args.dir);
    }
    let bar = progress::bytes("writing");
    write_checkpoint(&args.dir, &config, &mut |written, total| progress::set(&bar, written, total))?;
    bar.finish_and_clear();
    let num_parameters = weight_bytes / config.dtype.size_bytes() as u64;
    let (dir, size) = (args.dir.display(), DecimalBytes(weight_bytes));
    output::print_line(format_args!("{dir}: {num_parameters} parameters, {size}"))
}

impl SynthArgs {
    /// The preset with the changes that the options ask for.
    fn config(&self) -> Result<SynthConfig> {
        let mut config = find_preset(self.arch.map(ArchitectureName::architecture), &self.preset)?.config;
        config.mlp = self.mlp(config.mlp)?;
        for (option, size) in [
            (self.layers, &mut config.num_layers),
            (self.hidden, &mut config.hidden_size),
            (self.q_heads, &mut config.num_q_heads),
            (self.kv_heads, &mut config.num_kv_heads),
            (self.head_dim, &mut config.head_dim),
            (self.vocab, &mut config.vocab_size),
            (self.max_position, &mut config.max_position_embeddings),
        ] {
            *size = option.unwrap_or(*size);
        }
        config.dtype = match self.dtype {
            DtypeName::F32 => Dtype::F32,
            DtypeName::F16 => Dtype::F16,
            DtypeName::Bf16 => Dtype::Bf16,
        };
        config.seed = self.seed;
        Ok(config)
    }

    fn mlp(&self, preset: SynthMlp) -> Result<SynthMlp> {
        let routed_options = [
            ("--experts", self.experts),
            ("--expert-groups", self.expert_groups),
            ("--experts-per-token", self.experts_per_token),
            ("--expert-intermediate", self.expert_intermediate),
            ("--shared-intermediate", self.shared_intermediate),
        ];
        match preset {
            SynthMlp::Dense { intermediate_size } => {
                if let Some((name, _)) = routed_options.into_iter().find(|(_, option)| option.is_some()) {
                    bail!("{name}: this architecture has no routed experts; --intermediate sets its inner width");
                }
                Ok(SynthMlp::Dense { intermediate_size: self.intermediate.unwrap_or(intermediate_size) })
            }
            SynthMlp::Experts {
                num_experts,
                num_expert_groups,
                experts_per_token,
                expert_intermediate_size,
                shared_intermediate_size,
            } => {
                if self.intermediate.is_some() {
                    bail!("--intermediate: this architecture has --expert-intermediate and --shared-intermediate");
                }
                if shared_intermediate_size.is_none() && self.shared_intermediate.is_some() {
                    bail!("--shared-intermediate: this architecture has no shared expert");
                }
                Ok(SynthMlp::Experts {
                    num_experts: self.experts.unwrap_or(num_experts),
                    num_expert_groups: self.expert_groups.unwrap_or(num_expert_groups),
                    experts_per_token: self.experts_per_token.unwrap_or(experts_per_token),
                    expert_intermediate_size: self.expert_intermediate.unwrap_or(expert_intermediate_size),
                    shared_intermediate_size: self.shared_intermediate.or(shared_intermediate_size),
                })
            }
        }
    }
}

impl ArchitectureName {
    fn architecture(self) -> Architecture {
        match self {
            ArchitectureName::PanguProMoe => Architecture::PanguProMoe,
            ArchitectureName::PanguEmbedded => Architecture::PanguEmbedded,
            ArchitectureName::Qwen3 => Architecture::Qwen3,
            ArchitectureName::Qwen3Moe => Architecture::Qwen3Moe,
            ArchitectureName::Glm4 => Architecture::Glm4,
            ArchitectureName::Llama => Architecture::Llama,
        }
    }

    /// As the command line spells it.
    fn of(architecture: Architecture) -> String {
        let same = |name: &&ArchitectureName| name.architecture() == architecture;
        let value = ArchitectureName::value_variants().iter().find(same).and_then(ArchitectureName::to_possible_value);
        value.map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// The preset called `name`, of `architecture` or of the only one that has it.
pub(crate) fn find_preset(architecture: Option<Architecture>, name: &str) -> Result<&'static Preset> {
    let fits = |preset: &&Preset| architecture.is_none_or(|wanted| preset.config.architecture == wanted);
    let found: Vec<&Preset> = presets().filter(fits).filter(|preset| preset.name == name).collect();
    match found[..] {
        [preset] => Ok(preset),
        [] => bail!("--preset {name}: unknown; moge synth --help lists the presets of every architecture"),
        _ => bail!("--preset {name}: several architectures have it; add --arch"),
    }
}

/// The table of presets under the help text.
fn preset_help() -> String {
    let row = |preset: &Preset| {
        let architecture = ArchitectureName::of(preset.config.architecture);
        format!("  {architecture:15} {:18} {}\n", preset.name, preset.about)
    };
    format!("Presets:\n{}", presets().map(row).collect::<String>())
}

/// Refuse to begin what the disk cannot hold. Where the system does not say how much is free, the writing will tell.
pub(crate) fn check_free_space(dir: &Path, weight_bytes: u64) -> Result<()> {
    let needed_bytes = weight_bytes.saturating_add(weight_bytes / OTHER_FILES_PART).saturating_add(OTHER_FILES_BYTES);
    let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    match free_bytes(existing) {
        Some(free) if free < needed_bytes => {
            bail!("{}: {} needed, {} free", dir.display(), DecimalBytes(needed_bytes), DecimalBytes(free))
        }
        _ => Ok(()),
    }
}

/// Bytes free to this user on the disk of `path`.
fn free_bytes(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct TestCli {
        #[command(flatten)]
        args: SynthArgs,
    }

    fn config(options: &str) -> Result<SynthConfig> {
        let words = ["synth", "out"].into_iter().chain(options.split_whitespace());
        TestCli::try_parse_from(words)?.args.config()
    }

    #[test]
    fn every_option_changes_its_own_size() {
        let changed = config(
            "--arch pangu-pro-moe --layers 2 --hidden 30 --q-heads 15 --kv-heads 5 --head-dim 14 --experts 21 \
             --expert-groups 3 --experts-per-token 9 --expert-intermediate 17 --shared-intermediate 19 --vocab 600 \
             --max-position 99 --dtype f16 --seed 11",
        );
        let mlp = SynthMlp::Experts {
            num_experts: 21,
            num_expert_groups: 3,
            experts_per_token: 9,
            expert_intermediate_size: 17,
            shared_intermediate_size: Some(19),
        };
        let expected = SynthConfig {
            architecture: Architecture::PanguProMoe,
            num_layers: 2,
            hidden_size: 30,
            num_q_heads: 15,
            num_kv_heads: 5,
            head_dim: 14,
            mlp,
            vocab_size: 600,
            max_position_embeddings: 99,
            tie_word_embeddings: false,
            attention_bias: false,
            dtype: Dtype::F16,
            seed: 11,
        };
        assert_eq!(changed.unwrap(), expected);
        let dense = config("--arch glm4 --intermediate 23").unwrap();
        assert_eq!(dense.mlp, SynthMlp::Dense { intermediate_size: 23 });
    }

    #[test]
    fn every_preset_can_be_named() {
        for preset in presets() {
            let architecture = ArchitectureName::of(preset.config.architecture);
            let found = config(&format!("--arch {architecture} --preset {}", preset.name)).unwrap();
            assert_eq!(found, preset.config);
        }
        assert_eq!(config("--preset qwen3-32b").unwrap().num_layers, 64);
    }

    #[test]
    fn options_that_do_not_fit_are_refused_by_name() {
        for (options, message) in [
            ("", "--arch"),
            ("--preset tiny", "--preset tiny: several architectures"),
            ("--preset vast", "--preset vast: unknown"),
            ("--arch qwen3 --preset glm-z1-32b", "--preset glm-z1-32b: unknown"),
            ("--arch qwen3 --experts 8", "--experts: this architecture has no routed experts"),
            (
                "--arch qwen3-moe --shared-intermediate 8",
                "--shared-intermediate: this architecture has no shared expert",
            ),
            ("--arch pangu-pro-moe --intermediate 8", "--intermediate: this architecture has"),
        ] {
            let error = config(options).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
    }

    #[test]
    fn more_than_the_disk_holds_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        check_free_space(&dir.path().join("new/checkpoint"), 1).unwrap();
        let error = check_free_space(dir.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("needed") && error.contains("free"), "{error}");
    }
}
