//! Three steps of training a small network of grouped experts, from code.
#![allow(clippy::unwrap_used, reason = "an example")]

use moge_kernels::Precision;
use moge_model::synth::presets;
use moge_model::{Cpu, Isa};
use moge_train::{
    Layout, LossConfig, Optimizer, OptimizerConfig, TokenBatch, TrainNetwork, TrainState, Workspace, initial_weights,
};

pub(crate) fn main() {
    let preset = presets().find(|preset| preset.name == "tiny").unwrap();
    let config = preset.config.model_config().unwrap();
    let cpu = Cpu::new(Isa::select().unwrap(), 2);
    let tokens: Vec<u32> = (0..64).map(|i| 100 + i % 7).collect();
    let targets = tokens.iter().skip(1).chain([&101]).copied().collect();
    let batch = TokenBatch { offsets: vec![0, tokens.len()], tokens, targets };

    let work = Workspace::new(&cpu, &config, Precision::F32, batch.num_rows(), false);
    let loss = LossConfig { aux: 0.001, z: 0.0 };
    let adamw = OptimizerConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decay_norms_and_biases: false,
        clip: 1.0,
    };
    let mut optimizer = Optimizer::new(TrainNetwork::new(&config), work, loss, adamw);
    let mut state = TrainState::new(initial_weights(&config, &Layout::new(&config), 7));
    let losses: Vec<f64> = (0..3)
        .map(|_| optimizer.step(&cpu, &mut state, std::slice::from_ref(&batch), 0.01).loss)
        .inspect(|loss| println!("loss {loss:.3}"))
        .collect();
    assert!(losses[2] < losses[0]);
}
