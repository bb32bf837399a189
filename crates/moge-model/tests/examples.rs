//! The example programs run.

#[path = "../examples/greedy.rs"]
mod greedy;

#[test]
fn the_example_runs() {
    greedy::main();
}
