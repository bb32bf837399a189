//! One training step after another: gradients over the batches of a step, clipping, AdamW.

use std::ops::Range;
use std::time::Instant;

use moge_kernels::{Accumulate, AdamW, adamw, f32_flops_per_s, sum_of_squares, sum_of_squares_scratch_len};
use moge_model::{Cpu, ModelConfig};
use thiserror::Error;

use crate::batch::TokenBatch;
use crate::config::{LossConfig, OptimizerConfig, RunConfig};
use crate::data::{DataError, DataLoader};
use crate::metrics::StepMetrics;
use crate::network::{Batch, LossScales, Losses, TrainNetwork, Workspace};
use crate::params::Layout;
use crate::schedule::Schedule;

/// All that a training step changes, the place in the data excepted.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Parameters, as [`Layout`] says.
    pub params: Vec<f32>,
    /// Means of the gradients.
    pub m: Vec<f32>,
    /// Means of the squared gradients.
    pub v: Vec<f32>,
}

impl TrainState {
    /// The state before the first step, with these parameters.
    pub fn new(params: Vec<f32>) -> TrainState {
        let zeros = vec![0.0; params.len()];
        TrainState { step: 0, tokens: 0, params, m: zeros.clone(), v: zeros }
    }
}

/// Why a step failed.
#[derive(Debug, Error)]
pub enum TrainError {
    /// There is no data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// What it computed is infinite or no number; with it the parameters would be lost.
    #[error("the {what} is {value}; the step was not kept")]
    NotFinite {
        /// What is not finite.
        what: &'static str,
        /// What it is.
        value: f64,
    },
}

/// What a step lost, and how large its gradient was.
#[derive(Clone, Debug, PartialEq)]
pub struct StepLosses {
    /// Mean cross-entropy of the rows that have a target, in nats.
    pub loss: f64,
    /// Auxiliary balance loss, its coefficient included.
    pub aux_loss: f64,
    /// Router z-loss, its coefficient included.
    pub z_loss: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Rows that each routed expert got, `[routed layer][expert]`.
    pub expert_load: Vec<Vec<u64>>,
}

impl StepLosses {
    /// Name and value of the first that is infinite or no number: with it the parameters would be lost.
    pub fn non_finite(&self) -> Option<(&'static str, f64)> {
        let watched = [
            ("loss", self.loss),
            ("auxiliary loss", self.aux_loss),
            ("z-loss", self.z_loss),
            ("gradient norm", self.grad_norm),
        ];
        watched.into_iter().find(|(_, value)| !value.is_finite())
    }
}

/// Gradients and AdamW for one network.
#[derive(Debug)]
pub struct Optimizer {
    network: TrainNetwork,
    work: Workspace,
    /// Runs of parameters, and whether weight decay takes them.
    decay_runs: Vec<(Range<usize>, bool)>,
    grads: Vec<f32>,
    partials: Vec<f64>,
    loss: LossConfig,
    config: OptimizerConfig,
}

impl Optimizer {
    /// Memory for steps over batches of at most `max_rows`.
    pub fn new(network: TrainNetwork, work: Workspace, loss: LossConfig, config: OptimizerConfig) -> Optimizer {
        let layout = Layout::new(network.config());
        let partials = vec![0.0; sum_of_squares_scratch_len(layout.len)];
        let decay_runs = layout.decay_runs(config.decay_norms_and_biases);
        Optimizer { network, work, decay_runs, grads: vec![0.0; layout.len], partials, loss, config }
    }

    /// The network.
    pub fn network(&self) -> &TrainNetwork {
        &self.network
    }

    /// One step on `cpu` over `batches`, which are one batch cut for memory's sake: the cross-entropy is the mean over the targets of
    /// all, the routers' losses are means over batches, by their rows. `state` stays as it is if a loss or the norm of the
    /// gradient is not finite.
    ///
    /// # Panics
    /// If a batch has more rows than the workspace, a token outside the vocabulary, or `state` is that of another network.
    pub fn step(
        &mut self,
        cpu: &Cpu,
        state: &mut TrainState,
        batches: &[TokenBatch],
        learning_rate: f64,
    ) -> StepLosses {
        let losses = self.gradients(cpu, &state.params, batches);
        if losses.non_finite().is_some() {
            return losses;
        }
        state.step += 1;
        state.tokens += batches.iter().map(|batch| batch.num_rows() as u64).sum::<u64>();
        let OptimizerConfig { beta1, beta2, eps, weight_decay, clip, .. } = self.config;
        let num_steps = i32::try_from(state.step).unwrap_or(i32::MAX);
        let step = AdamW {
            lr: learning_rate,
            beta1,
            beta2,
            eps,
            weight_decay,
            bias_correction1: 1.0 - beta1.powi(num_steps),
            bias_correction2: 1.0 - beta2.powi(num_steps),
            // As torch.nn.utils.clip_grad_norm_ does.
            grad_scale: (clip / (losses.grad_norm + 1e-6)).min(1.0),
        };
        for (run, decays) in &self.decay_runs {
            let step = if *decays { step } else { AdamW { weight_decay: 0.0, ..step } };
            let [params, m, v] =
                [&mut state.params, &mut state.m, &mut state.v].map(|numbers| &mut numbers[run.clone()]);
            adamw(cpu, step, params, &self.grads[run.clone()], m, v);
        }
        losses
    }

    /// Norm of the first of weights and moments that has a number which is infinite or none: an update went too far.
    fn non_finite_norm(&mut self, cpu: &Cpu, state: &TrainState) -> Option<(&'static str, f64)> {
        let TrainState { params, m, v, .. } = state;
        let watched = [("norm of the weights", params), ("norm of AdamW's m", m), ("norm of AdamW's v", v)];
        let norms = watched.map(|(what, x)| (what, sum_of_squares(cpu, x, &mut self.partials).sqrt()));
        norms.into_iter().find(|(_, norm)| !norm.is_finite())
    }

    /// Losses and gradients over `batches`.
    fn gradients(&mut self, cpu: &Cpu, params: &[f32], batches: &[TokenBatch]) -> StepLosses {
        let num_targets = batches.iter().map(TokenBatch::num_targets).sum::<usize>().max(1) as f64;
        let num_rows = batches.iter().map(TokenBatch::num_rows).sum::<usize>() as f64;
        let mut sum = Losses::default();
        let mut store = Accumulate::Set;
        for rows in batches {
            let share = rows.num_rows() as f64 / num_rows;
            let scales = LossScales {
                cross_entropy: (1.0 / num_targets) as f32,
                aux: (self.loss.aux * share) as f32,
                z: (self.loss.z * share) as f32,
            };
            let batch = Batch { rows, forced_experts: None, row_weights: None };
            let tensors = (params, (&mut self.grads[..], store));
            let losses = self.network.forward_backward(cpu, tensors, batch, scales, &mut self.work);
            sum.cross_entropy += losses.cross_entropy;
            sum.routing.aux += losses.routing.aux * share;
            sum.routing.z += losses.routing.z * share;
            add_load(&mut sum.expert_load, losses.expert_load);
            store = Accumulate::Add;
        }
        StepLosses {
            loss: sum.cross_entropy / num_targets,
            aux_loss: sum.routing.aux * self.loss.aux,
            z_loss: sum.routing.z * self.loss.z,
            grad_norm: sum_of_squares(cpu, &self.grads, &mut self.partials).sqrt(),
            expert_load: sum.expert_load,
        }
    }
}

fn add_load(sum: &mut Vec<Vec<u64>>, load: Vec<Vec<u64>>) {
    if sum.is_empty() {
        *sum = load;
        return;
    }
    for (sum, load) in sum.iter_mut().flatten().zip(load.iter().flatten()) {
        *sum += load;
    }
}

/// The steps of a run.
#[derive(Debug)]
pub struct Trainer {
    layout: Layout,
    optimizer: Optimizer,
    state: TrainState,
    run: RunConfig,
    schedule: Schedule,
    /// What the machine was measured to reach, FLOP/s.
    peak: f64,
}

impl Trainer {
    /// The steps of `run` from `state` on.
    pub fn new(model: &ModelConfig, run: &RunConfig, cpu: &Cpu, state: TrainState) -> Trainer {
        let work = Workspace::new(cpu, model, run.compute.dtype, run.max_rows(), run.compute.recompute);
        Trainer {
            layout: Layout::new(model),
            peak: f32_flops_per_s(cpu),
            optimizer: Optimizer::new(TrainNetwork::new(model), work, run.loss, run.optimizer),
            state,
            run: run.clone(),
            schedule: run.schedule(),
        }
    }

    /// Do the next step on `cpu`, which has no more threads than the one that it was made for.
    ///
    /// # Errors
    /// If there is no data, or something that the step computed is not finite; parameters and moments are as before then.
    ///
    /// # Panics
    /// If all steps are done.
    pub fn step(&mut self, cpu: &Cpu, data: &mut DataLoader) -> Result<StepMetrics, TrainError> {
        let start = Instant::now();
        let phase = &self.run.phases[self.schedule.phase_of(self.state.step)];
        let learning_rate = self.schedule.learning_rate(self.state.step);
        let num_sequences = phase.micro_batch_tokens / phase.sequence_length;
        let batches = (0..phase.batch_tokens / phase.micro_batch_tokens)
            .map(|_| data.next_batch(&phase.mixture, num_sequences, phase.sequence_length))
            .collect::<Result<Vec<_>, DataError>>()?;
        let losses = self.optimizer.step(cpu, &mut self.state, &batches, learning_rate);
        if let Some((what, value)) = losses.non_finite() {
            return Err(TrainError::NotFinite { what, value });
        }
        let seconds = start.elapsed().as_secs_f64();
        let tokens_per_s = phase.batch_tokens as f64 / seconds;
        let flops_per_s = tokens_per_s * self.optimizer.network().ops_per_token() as f64;
        Ok(StepMetrics {
            step: self.state.step,
            phase: phase.name.clone(),
            tokens: self.state.tokens,
            loss: losses.loss,
            aux_loss: losses.aux_loss,
            z_loss: losses.z_loss,
            learning_rate,
            grad_norm: losses.grad_norm,
            seconds,
            tokens_per_s,
            flops_per_s,
            peak_share: flops_per_s / self.peak,
            expert_load: losses.expert_load,
        })
    }

    /// Refuse a state that no run can go on from.
    ///
    /// # Errors
    /// If a weight or moment is infinite or no number.
    pub fn check_state(&mut self, cpu: &Cpu) -> Result<(), TrainError> {
        match self.optimizer.non_finite_norm(cpu, &self.state) {
            Some((what, value)) => Err(TrainError::NotFinite { what, value }),
            None => Ok(()),
        }
    }

    /// Parameters and moments.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Where each tensor lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

#[cfg(test)]
mod tests {
    use moge_kernels::{Cpu, Isa, Precision};
    use safetensors::SafeTensors;

    use super::{Optimizer, TrainState};
    use crate::config::{LossConfig, OptimizerConfig};
    use crate::network::tests::{Golden, integers, token_batch};
    use crate::network::{TrainNetwork, Workspace};

    #[test]
    fn twenty_steps_lose_what_they_lose_in_pytorch() {
        let golden = Golden::load("pangu-pro-moe-k2");
        let run = golden.json("run.json");
        let bytes = std::fs::read(golden.dir.join("run.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let [tokens, targets, offsets] =
            ["tokens", "targets", "piece_offsets"].map(|name| integers(tensors.tensor(name).unwrap().data()));
        let num_rows = *offsets.last().unwrap() as usize;
        let number = |name: &str| run[name].as_f64().unwrap();
        let cpu = Cpu::new(Isa::select().unwrap(), 2);
        let work = Workspace::new(&cpu, &golden.config, Precision::F32, num_rows, false);
        let loss = LossConfig { aux: number("aux_coefficient"), z: number("z_coefficient") };
        let config = OptimizerConfig {
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            // As torch.optim.AdamW does with one group of parameters.
            decay_norms_and_biases: true,
            clip: number("clip"),
        };
        let mut optimizer = Optimizer::new(TrainNetwork::new(&golden.config), work, loss, config);
        let mut state = TrainState::new(golden.params);
        let steps = run["steps"].as_array().unwrap();
        assert_eq!(steps.len(), 20);
        for ((expected, tokens), targets) in steps.iter().zip(tokens.chunks(num_rows)).zip(targets.chunks(num_rows)) {
            let batch = token_batch(tokens, targets, &offsets);
            let learning_rate = expected["learning_rate"].as_f64().unwrap();
            let losses = optimizer.step(&cpu, &mut state, &[batch], learning_rate);
            for (name, found) in [
                ("cross_entropy", losses.loss),
                ("aux_loss", losses.aux_loss),
                ("z_loss", losses.z_loss),
                ("grad_norm", losses.grad_norm),
            ] {
                let expected = expected[name].as_f64().unwrap();
                assert!((found - expected).abs() <= 1e-3, "step {}: {name} {found} for {expected}", state.step);
            }
        }
    }

    #[test]
    fn a_step_spares_norms_and_biases_from_weight_decay_unless_asked() {
        let golden = Golden::load("pangu-pro-moe-k2");
        let cpu = Cpu::new(Isa::select().unwrap(), 2);
        let batch = token_batch(&[5, 6, 7, 8], &[6, 7, 8, 9], &[0, 4]);
        let loss = LossConfig { aux: 0.0, z: 0.0 };
        let after_step = |weight_decay, decay_norms_and_biases| {
            let config = OptimizerConfig {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay,
                decay_norms_and_biases,
                clip: f64::INFINITY,
            };
            let work = Workspace::new(&cpu, &golden.config, Precision::F32, 4, false);
            let mut optimizer = Optimizer::new(TrainNetwork::new(&golden.config), work, loss, config);
            let mut state = TrainState::new(golden.params.clone());
            optimizer.step(&cpu, &mut state, std::slice::from_ref(&batch), 0.01);
            state.params
        };
        let (none, matrices, all) = (after_step(0.0, true), after_step(0.5, false), after_step(0.5, true));
        for (run, is_matrix) in golden.layout.decay_runs(false) {
            let expected = if is_matrix { &all } else { &none };
            assert!(matrices[run.clone()] == expected[run.clone()]);
            assert!(none[run.clone()] != all[run], "the decay shows");
        }
    }
}
