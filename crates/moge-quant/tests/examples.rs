//! The example programs run.

#[path = "../examples/quantize.rs"]
mod quantize;

#[test]
fn the_example_runs() {
    quantize::main();
}
