//! `moge bench` on small models: what it reports, not how fast it was.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::process::{Command, Output};

use serde_json::{Value, json};

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moge")).args(["bench", "--synthetic", "tiny"]).args(args).output().unwrap()
}

#[track_caller]
fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_positive(object: &Value, fields: &[&str]) {
    for field in fields {
        let number = object[field].as_f64().unwrap_or_else(|| panic!("{field} in {object}"));
        assert!(number.is_finite() && number > 0.0, "{field} of {object}");
    }
}

#[test]
fn the_json_report_has_every_case_with_its_rate_its_ceiling_and_the_share() {
    let args = ["--prefill", "40,700", "--prompts", "2", "--decode", "3", "--batch", "1,5", "--context", "33"];
    let more = ["--repetitions", "2", "--threads", "2", "--start", "--profile", "--format", "json"];
    let report: Value = serde_json::from_str(&stdout(bench(&[&args[..], &more].concat()))).unwrap();
    assert_eq!(report["threads"], 2);
    assert_eq!(["weights", "activations", "kv"].map(|name| &report[name]), ["bf16"; 3]);
    assert_positive(&report["ceilings"], &["memory_read_gb_s", "int8_gop_s", "bf16_gflop_s"]);
    assert_eq!(report["start"]["tokens"], 16);
    assert_positive(&report["start"], &["load_ms", "prefill_ms", "first_token_ms"]);
    let cases = report["cases"].as_array().unwrap();
    let names = ["kind", "tokens", "batch", "context", "ceiling", "repetitions"];
    let found: Vec<_> = cases.iter().map(|case| names.map(|name| case[name].clone())).collect();
    let expected = [
        [json!("prefill"), json!(40), json!(2), json!(0), json!("bf16"), json!(2)],
        [json!("prefill"), json!(700), json!(2), json!(0), json!("bf16"), json!(2)],
        [json!("decode"), json!(3), json!(1), json!(33), json!("memory"), json!(2)],
        [json!("decode"), json!(3), json!(5), json!(33), json!("memory"), json!(2)],
    ];
    assert_eq!(found, expected);
    for case in cases {
        let rates = ["tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "share_of_ceiling", "experts_hit"];
        assert_positive(case, &rates);
        let is_decode = case["kind"] == "decode";
        assert_positive(case, if is_decode { &["gb_s", "ceiling_gb_s"] } else { &["gop_s", "ceiling_gop_s"] });
        let operators = case["profile"].as_array().unwrap();
        assert!(operators.iter().any(|operator| operator["operator"] == "routed_down"));
        let sum: f64 = operators.iter().map(|operator| operator["share"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-9, "shares of a profile add up to {sum}");
    }
    // A token goes to 3 of the 12 experts of the tiny model.
    assert_eq!(cases[2]["experts_hit"], 3.0);
}

#[test]
fn a_quantised_model_is_compared_with_the_peak_of_integer_products() {
    let args = ["--prefill", "40", "--quantize", "w8a8", "--kv", "int8", "--repetitions", "1", "--format", "json"];
    let report: Value = serde_json::from_str(&stdout(bench(&args))).unwrap();
    assert_eq!((&report["weights"], &report["kv"]), (&json!("w8a8"), &json!("int8")));
    let cases = report["cases"].as_array().unwrap();
    assert_eq!((cases.len(), &cases[0]["ceiling"]), (1, &json!("int8")));
    assert_positive(&cases[0], &["gop_s", "ceiling_gop_s", "share_of_ceiling"]);
}

#[test]
fn the_table_has_a_row_for_each_case_that_is_asked_for_and_no_other() {
    let table = stdout(bench(&["--context", "0,7", "--batch", "2", "--decode", "1", "--repetitions", "1"]));
    let rows: Vec<&str> = table.lines().skip_while(|line| !line.starts_with("case")).skip(1).collect();
    assert_eq!(rows.len(), 2, "{table}");
    assert!(rows[0].starts_with("decode batch 2, context 0 ") && rows[1].starts_with("decode batch 2, context 7 "));
    assert!(table.contains("ceilings  memory "), "{table}");
    let start = stdout(bench(&["--start"]));
    assert!(start.contains("to the first token") && !start.contains("decode"), "{start}");
}

#[test]
fn nonsense_is_refused_before_anything_is_measured() {
    for (args, parts) in [
        (&["--batch", "0"][..], &["--batch", "1..="][..]),
        (&["--repetitions", "0"], &["--repetitions"]),
        (&["--prefill", "12,x"], &["--prefill"]),
        (&["--prefill", "1025"], &["prefill 1025", "at most 1024"]),
        (&["--context", "1000", "--decode", "25"], &["context 1000", "1025 tokens", "at most 1024"]),
    ] {
        let output = bench(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty() && !stderr.contains("panicked"), "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
        }
    }
}
