//! Runs in temporary folders, for tests.

use std::fs;
use std::path::PathBuf;

use moge_kernels::Dtype;
use moge_model::Architecture;
use moge_model::synth::{SynthConfig, SynthMlp, write_checkpoint};

use crate::config::RunConfig;

/// A network whose sizes differ from one another.
pub(crate) const SYNTH: SynthConfig = SynthConfig {
    architecture: Architecture::PanguProMoe,
    num_layers: 2,
    hidden_size: 24,
    num_q_heads: 4,
    num_kv_heads: 2,
    head_dim: 6,
    mlp: SynthMlp::Experts {
        num_experts: 6,
        num_expert_groups: 2,
        experts_per_token: 2,
        expert_intermediate_size: 10,
        shared_intermediate_size: Some(14),
    },
    vocab_size: 420,
    max_position_embeddings: 64,
    tie_word_embeddings: false,
    attention_bias: false,
    dtype: Dtype::Bf16,
    seed: 3,
};

/// A folder with a model and a text; runs go to `out`.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        write_checkpoint(&folder.path("model"), &SYNTH, &mut |_, _| ()).unwrap();
        fs::write(folder.path("a.txt"), "grouped experts share the work evenly. ".repeat(40)).unwrap();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The run with lines added to `[output]` and `[optimizer]`.
    pub(crate) fn run(&self, output: &str, optimizer: &str) -> RunConfig {
        let text = format!(
            "[model]\nconfig = 'model'\ninit = 'random'\nseed = 7\n[output]\ndir = 'out'\n{output}\n[compute]\n\
             micro_batch_tokens = 32\n[optimizer]\n{optimizer}\n[data.web]\nfiles = ['*.txt']\nformat = 'text'\n\
             [[phases]]\nname = 'general'\ntokens = 640\nsequence_length = 16\nbatch_tokens = 32\n\
             learning_rate = [1e-3, 1e-4]\nmixture = {{ web = 1 }}\n"
        );
        fs::write(self.path("run.toml"), text).unwrap();
        RunConfig::load(&self.path("run.toml")).unwrap()
    }
}
