//! The example programs run.

#[path = "../examples/three_steps.rs"]
mod three_steps;

#[test]
fn the_example_runs() {
    three_steps::main();
}
