use std::fs;

use moge_model::Isa;

use super::*;
use crate::metrics::read_metrics;
use crate::testing::{Folder, SYNTH};

fn open(run: &RunConfig, num_threads: usize) -> Result<Session, SessionError> {
    Session::open(run, Cpu::new(Isa::best(), num_threads), None, &mut |_| ControlFlow::Continue(()))
}

/// Run until `last_step` is done.
fn run_until(run: &RunConfig, last_step: u64) -> Result<Outcome, SessionError> {
    open(run, 2)?.run(&mut |metrics| {
        if metrics.step == last_step { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// Bytes of the weights and of the moments after the last of 20 steps, and the losses of all steps.
fn result(folder: &Folder) -> (Vec<u8>, Vec<u8>, Vec<(u64, f64)>) {
    let dir = folder.path("out/step-00000020");
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    let mut losses = Vec::new();
    let collect = |metrics: StepMetrics| {
        losses.push((metrics.step, metrics.loss));
        Ok(())
    };
    read_metrics(&folder.path("out/metrics.jsonl"), collect).unwrap();
    (read("model.safetensors"), read("trainer/model.safetensors"), losses)
}

#[test]
fn a_run_that_is_stopped_or_loses_steps_ends_with_the_same_bits() {
    let whole = Folder::new();
    assert_eq!(run_until(&whole.run("checkpoint_every = 3", ""), u64::MAX).unwrap(), Outcome::Done);
    let folder = Folder::new();
    let run = folder.run("checkpoint_every = 3", "");
    for last_step in [1, 4, 5, 9, 16] {
        assert_eq!(run_until(&run, last_step).unwrap(), Outcome::Stopped);
        if last_step == 9 {
            // As if it had been killed before the last two checkpoints, and after the lines of metrics.
            fs::remove_dir_all(folder.path("out/step-00000009")).unwrap();
            fs::remove_dir_all(folder.path("out/step-00000006")).unwrap();
        }
    }
    assert_eq!(run_until(&run, u64::MAX).unwrap(), Outcome::Done);
    assert!(result(&folder) == result(&whole));
    assert_eq!(result(&folder).2.len(), 20);
    // As if it had been killed after its last checkpoint.
    fs::remove_file(Session::report_path(&run)).unwrap();
    assert_eq!(run_until(&run, u64::MAX).unwrap(), Outcome::Done, "there is nothing left to do");
    assert!(Session::report_path(&run).exists());
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_last_checkpoint() {
    let folder = Folder::new();
    let run = folder.run("checkpoint_every = 2", "");
    run_until(&run, 5).unwrap();
    let text = fs::read_to_string(folder.path("run.toml")).unwrap().replace("[1e-3, 1e-4]", "[1e30, 1e30]");
    fs::write(folder.path("run.toml"), text).unwrap();
    let run = RunConfig::load(&folder.path("run.toml")).unwrap();
    let mut session = open(&run, 1).unwrap();
    assert_eq!(session.changes(), ["phases[0].learning_rate: [1e30, 1e30], was [0.001, 0.0001]"]);
    let error = session.run(&mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains(" is NaN; ") || error.contains(" is inf; "), "{error}");
    let last = session.last_checkpoint().unwrap();
    assert!(error.contains(&format!("the last good checkpoint is {}", last.display())), "{error}");
    assert!(last.join("model.safetensors").exists());
    drop(session);
    assert!(open(&run, 1).unwrap().step() >= 5);
}

#[test]
fn weights_that_are_no_numbers_are_not_written() {
    let folder = Folder::new();
    folder.run("checkpoint_every = 1", "");
    let text = fs::read_to_string(folder.path("run.toml")).unwrap().replace("[1e-3, 1e-4]", "[1e300, 1e300]");
    fs::write(folder.path("run.toml"), text).unwrap();
    let run = RunConfig::load(&folder.path("run.toml")).unwrap();
    let error = run_until(&run, u64::MAX).unwrap_err().to_string();
    assert!(error.starts_with("step 1: the norm of the weights is "), "{error}");
    assert!(error.ends_with("there is no checkpoint yet") && !folder.path("out/step-00000001").exists(), "{error}");
}

#[test]
fn a_run_starts_from_the_weights_of_a_checkpoint_and_refuses_those_that_do_not_fit() {
    let folder = Folder::new();
    let run = folder.run("", "");
    let start = |init: &Path| {
        let mut run = run.clone();
        run.model.init = Init::Checkpoint(init.to_owned());
        open(&run, 1).map(|session| session.trainer.state().clone())
    };
    let state = start(&folder.path("model")).unwrap();
    let layout = Layout::new(&run.model.config);
    assert!(state == TrainState::new(load_weights(&folder.path("model"), &run.model.config, &layout).unwrap()));
    let wider = moge_model::synth::SynthConfig { hidden_size: 32, ..SYNTH };
    moge_model::synth::write_checkpoint(&folder.path("wider"), &wider, &mut |_, _| ()).unwrap();
    let error = start(&folder.path("wider")).unwrap_err().to_string();
    assert!(error.contains("wider: ") && error.contains("shape is [420, 32], should be [420, 24]"), "{error}");
}

#[test]
fn a_report_is_made_with_every_checkpoint_for_devices_that_divide_the_experts() {
    let folder = Folder::new();
    let run = folder.run("checkpoint_every = 2", "");
    run_until(&run, 2).unwrap();
    let page = fs::read_to_string(Session::report_path(&run)).unwrap();
    assert!(page.contains("general") && page.contains("Loss"), "{page}");
    let cpu = Cpu::new(Isa::best(), 1);
    let error = Session::open(&run, cpu, Some(4), &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert_eq!(error, "4 devices: they must be a divisor of the 6 experts");
}
