//! The example programs run.

#[path = "../examples/quantized_product.rs"]
mod quantized_product;

#[test]
fn the_example_runs() {
    quantized_product::main();
}
