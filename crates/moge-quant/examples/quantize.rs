//! A small random checkpoint, packed in four bits, and what rounding did to its weights.
#![allow(clippy::unwrap_used, reason = "an example")]

use std::ops::ControlFlow;

use moge_kernels::Cpu;
use moge_model::synth::{SynthConfig, SynthMlp, presets, write_checkpoint};
use moge_model::{Isa, PackedFormat, QuantScheme};
use moge_quant::Job;

pub(crate) fn main() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("packed"));
    let tiny = presets().find(|preset| preset.name == "tiny").unwrap().config;
    let mlp = SynthMlp::Experts {
        num_experts: 6,
        num_expert_groups: 2,
        experts_per_token: 2,
        expert_intermediate_size: 32,
        shared_intermediate_size: Some(128),
    };
    let config = SynthConfig { hidden_size: 96, num_q_heads: 4, num_kv_heads: 1, head_dim: 16, mlp, ..tiny };
    write_checkpoint(&model, &config, &mut |_, _| ()).unwrap();
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let job = Job::open(&model, &out, &QuantScheme::uniform(PackedFormat::W4A8)).unwrap();
    let errors = job.run(&cpu, &mut |_, _| ControlFlow::Continue(())).unwrap();
    for role in &errors.roles {
        println!("{} in {}: off by {:.1} %", role.role, role.format, 100.0 * role.relative_error);
        assert!(role.relative_error < 0.1);
    }
    assert!(out.join("config.json").exists());
}
