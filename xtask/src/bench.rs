//! `bench`: measurements, for people and never for CI. They want a machine that does nothing else.

use anyhow::{Context, Result, bail};

use crate::{cargo, peers, picture, train};

/// Run the measurement that the first word names; the other words are its own.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let Some((what, rest)) = words.split_first() else {
        print_help();
        return Ok(());
    };
    match what.as_str() {
        "peers" => peers::run(rest),
        "train" => train::run(rest),
        // A feature, because nothing else needs the crate we compare with.
        "gemm" => cargo_bench("bench --package moge-kernels --features bench-gemm-crate --bench gemm_crate", rest),
        "quant" => cargo_bench("bench --package moge-kernels --bench quant", rest),
        "picture" => picture::run(rest),
        "attention" => cargo_bench("bench --package moge-kernels --bench attention", rest),
        "help" | "-h" | "--help" => {
            print_help();
            Ok(())
        }
        other => bail!("no measurement is called `{other}`; there are peers, train, gemm, quant, attention, picture"),
    }
}

fn print_help() {
    println!("cargo xtask bench peers [OPTION..]            moge beside llama.cpp on models of the same shape");
    println!(
        "cargo xtask bench train [OPTION..]            steps of training beside eager PyTorch, from the same weights"
    );
    println!("cargo xtask bench gemm [NUM_THREADS [ISA]]    f32 and bf16 products beside the crate `gemm`");
    println!("cargo xtask bench quant [NUM_THREADS [ISA]]   products with W4A8 and W8A8 weights, by rows per expert");
    println!("cargo xtask bench attention [ARGUMENT..]      attention at contexts of 2 K, 8 K and 32 K");
    println!("cargo xtask bench picture PREFIX PEERS.json BENCH.json OUT.svg");
    println!("                                              bars of both engines' shares of the machine's limit\n");
    peers::print_options();
    println!();
    train::print_options();
}

fn cargo_bench(args: &str, rest: &[String]) -> Result<()> {
    println!("==> cargo {args} -- {}", rest.join(" "));
    let status = cargo().args(args.split(' ')).arg("--").args(rest).status().context("cannot start cargo")?;
    if !status.success() {
        bail!("cargo {args}: {status}");
    }
    Ok(())
}
