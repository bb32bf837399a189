use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Case, LlamaCpp, Settings, Work, all_cases};

const PREFILL: Work = Work::Prefill { tokens: 512 };
const DECODE: Work = Work::Decode { batch: 1, context: 128 };
const BATCHED: Work = Work::Decode { batch: 8, context: 128 };

/// What the programs printed, shortened in the middle.
const BENCH_PREFILL: &str = r#"{"build_number": 1, "n_threads": 2, "repack": true, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 83.743414, "samples_ts": [ 52.8449, 114.642 ]}
"#;
const BENCH_DECODE: &str = r#"{"build_number": 1, "n_threads": 2, "repack": true, "n_prompt": 0, "n_gen": 32, "n_depth": 128, "avg_ts": 38.815454, "samples_ts": [ 37.7142, 39.9167 ]}
"#;
const BATCHED_BENCH: &str = r#"0.00.008.869 W load: adding 151936 dummy tokens
{"n_kv_max": 8192, "n_threads": 2, "pp": 128, "tg": 16, "pl": 8, "n_kv": 1152, "t_pp": 1.018029, "speed_pp": 125.733162, "t_tg": 2.501072, "speed_tg": 51.178055, "speed": 72.745857}

"#;
const MOGE_BENCH: &str = r#"{"ceilings": {"memory_read_gb_s": 21.5},
 "cases": [
  {"kind": "prefill", "tokens": 512, "batch": 1, "context": 0, "tokens_per_s": 210.5, "ceiling": "int8"},
  {"kind": "decode", "tokens": 64, "batch": 1, "context": 128, "tokens_per_s": 19.25, "ceiling": "memory"},
  {"kind": "decode", "tokens": 64, "batch": 8, "context": 128, "tokens_per_s": 61.75, "ceiling": "memory"}]}"#;

fn words(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
}

#[test]
fn rates_are_read_from_what_llama_cpp_prints() {
    assert_eq!(PREFILL.read_peer(BENCH_PREFILL).unwrap(), 83.743414);
    assert_eq!(DECODE.read_peer(BENCH_DECODE).unwrap(), 38.815454);
    assert_eq!(BATCHED.read_peer(BATCHED_BENCH).unwrap(), 51.178055);
}

#[test]
fn rates_are_read_from_what_moge_bench_prints() {
    let rates = [PREFILL, DECODE, BATCHED].map(|work| work.read_ours(MOGE_BENCH).unwrap());
    assert_eq!(rates, [210.5, 19.25, 61.75]);
}

#[test]
fn an_answer_to_another_question_is_an_error_that_shows_it() {
    for (work, output) in [
        (PREFILL, BENCH_DECODE),
        (DECODE, BENCH_PREFILL),
        (BATCHED, BENCH_DECODE),
        (Work::Decode { batch: 1, context: 2048 }, BENCH_DECODE),
        (Work::Decode { batch: 32, context: 128 }, BATCHED_BENCH),
        (PREFILL, "error: failed to load model"),
    ] {
        let error = work.read_peer(output).unwrap_err();
        assert!(format!("{error:#}").contains(output), "{error:#}");
    }
    assert!(Work::Prefill { tokens: 2048 }.read_ours(MOGE_BENCH).is_err());
    assert!(PREFILL.read_ours("no JSON").is_err());
    assert!(PREFILL.read_ours(&MOGE_BENCH.replace("210.5", "null")).is_err());
}

#[test]
fn both_engines_are_told_the_same_work() {
    let engine = LlamaCpp { bench: PathBuf::from("one"), batched_bench: PathBuf::from("many") };
    let settings = Settings { num_threads: 3, num_steps: 16 };
    let [repacked, as_it_is, ..] = all_cases()[0].peer_configs()[..] else { panic!("no configurations") };
    let theirs = |work: Work, config| words(&work.peer_command(&engine, config, Path::new("M"), settings));
    let ours = |work: Work| words(&work.our_command(Path::new("moge"), Path::new("D"), settings));

    assert_eq!(theirs(PREFILL, repacked), "one --model M --threads 3 -n 0 -p 512 --repack 1 -r 1 -o jsonl");
    assert_eq!(ours(PREFILL), "moge bench --model D --threads 3 --repetitions 3 --format json --kv bf16 --prefill 512");
    assert_eq!(theirs(DECODE, as_it_is), "one --model M --threads 3 -p 0 -n 16 -d 128 --repack 0 -r 1 -o jsonl");
    assert_eq!(
        theirs(BATCHED, as_it_is),
        "many --model M --threads 3 -c 1152 -npl 8 -npp 128 -pps -ntg 16 --output-format jsonl --no-repack"
    );
    assert_eq!(
        ours(BATCHED),
        "moge bench --model D --threads 3 --repetitions 3 --format json --kv bf16 --decode 16 --batch 8 --context 128"
    );
}

#[test]
fn no_two_cases_and_no_two_configurations_of_a_case_share_a_name() {
    let mut names: Vec<String> = all_cases().iter().map(Case::name).collect();
    for case in all_cases() {
        let mut configs: Vec<String> = case.peer_configs().iter().map(|config| config.name()).collect();
        configs.sort();
        configs.dedup();
        assert_eq!(configs.len(), case.peer_configs().len());
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all_cases().len());
}
