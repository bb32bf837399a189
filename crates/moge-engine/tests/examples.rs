//! The example programs run.

#[path = "../examples/two_requests.rs"]
mod two_requests;

#[test]
fn the_example_runs() {
    two_requests::main();
}
