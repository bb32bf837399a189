use std::fs;

use tempfile::TempDir;

use super::*;

const MODEL: &str = r#"{"architectures": ["PanguEmbeddedForCausalLM"], "vocab_size": 320, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32"}"#;

const SHORTEST: &str = r#"
[model]
config = "model"
[output]
dir = "out"
[data.web]
files = ["web/*.txt"]
format = "text"
[[phases]]
name = "general"
tokens = 10_000
sequence_length = 256
batch_tokens = 4096
learning_rate = [3e-4, 3e-5]
mixture = { web = 1 }
"#;

const WHOLE: &str = r#"
[model]
config = "model"
init = "start"
seed = 7
[output]
dir = "/runs/first"
checkpoint_every = 20
keep = 2
dtype = "bf16"
[compute]
dtype = "bf16"
micro_batch_tokens = 1024
recompute = true
[loss]
aux = 0
z = 1e-4
[optimizer]
beta1 = 0.8
beta2 = 0.9
eps = 1e-6
weight_decay = 0
decay_norms_and_biases = true
clip = inf
[data.web]
files = ["web/*.txt", "../more.txt"]
format = "text"
[data.code-1]
files = ["code.jsonl"]
format = "jsonl"
field = "content"
on_bad_line = "skip"
[data.old]
files = ["/old.safetensors"]
format = "tokens"
[[phases]]
name = "general"
tokens = 8193
sequence_length = 128
batch_tokens = 4096
learning_rate = [3e-4, 3e-5]
warmup_tokens = 4097
mixture = { web = 3, code-1 = 0.5 }
[[phases]]
name = "short"
tokens = 1
sequence_length = 512
batch_tokens = 512
learning_rate = [1e30, 0]
mixture = { old = 1 }
"#;

/// The directory of a model, and the run file `run.toml` beside it.
fn directory(run: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("model")).unwrap();
    fs::write(dir.path().join("model/config.json"), MODEL).unwrap();
    fs::write(dir.path().join("run.toml"), run).unwrap();
    dir
}

fn load(run: &str) -> Result<RunConfig, RunConfigError> {
    RunConfig::load(&directory(run).path().join("run.toml"))
}

#[test]
fn what_a_run_file_leaves_out_has_the_documented_defaults() {
    let run = load(SHORTEST).unwrap();
    assert_eq!((run.model.init, run.model.seed), (Init::Random, 0));
    assert_eq!((run.output.checkpoint_every, run.output.keep, run.output.dtype), (100, 3, Dtype::F32));
    assert_eq!(run.compute, ComputeConfig { dtype: Precision::F32, recompute: false });
    assert_eq!(run.loss, LossConfig { aux: 0.001, z: 0.0 });
    let optimizer = OptimizerConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decay_norms_and_biases: false,
        clip: 1.0,
    };
    assert_eq!(run.optimizer, optimizer);
    assert_eq!((run.phases[0].micro_batch_tokens, run.phases[0].warmup_steps), (4096, 0));
}

#[test]
fn all_keys_are_read_and_paths_are_seen_from_the_run_file() {
    let dir = directory(WHOLE);
    let run = RunConfig::load(&dir.path().join("run.toml")).unwrap();
    assert_eq!(run.dir(), dir.path());
    assert_eq!((run.model.config.vocab_size, run.model.seed), (320, 7));
    assert_eq!(run.model.init, Init::Checkpoint(dir.path().join("start")));
    let output = OutputConfig { dir: "/runs/first".into(), checkpoint_every: 20, keep: 2, dtype: Dtype::Bf16 };
    assert_eq!(run.output, output);
    assert_eq!(run.compute, ComputeConfig { dtype: Precision::Bf16, recompute: true });
    assert_eq!(run.loss, LossConfig { aux: 0.0, z: 1e-4 });
    let optimizer = OptimizerConfig {
        beta1: 0.8,
        beta2: 0.9,
        eps: 1e-6,
        weight_decay: 0.0,
        decay_norms_and_biases: true,
        clip: f64::INFINITY,
    };
    assert_eq!(run.optimizer, optimizer);
    let patterns = vec![dir.path().join("web/*.txt"), dir.path().join("../more.txt")];
    assert_eq!(run.sources["web"], SourceConfig { patterns, format: SourceFormat::Text });
    let jsonl = SourceFormat::Jsonl { field: "content".to_owned(), skip_bad_lines: true };
    assert_eq!(run.sources["code-1"].format, jsonl);
    let tokens = SourceConfig { patterns: vec!["/old.safetensors".into()], format: SourceFormat::Tokens };
    assert_eq!(run.sources["old"], tokens);
    let general = PhaseConfig {
        name: "general".to_owned(),
        num_steps: 3,
        sequence_length: 128,
        batch_tokens: 4096,
        micro_batch_tokens: 1024,
        learning_rate: [3e-4, 3e-5],
        warmup_steps: 2,
        mixture: BTreeMap::from([("web".to_owned(), 3.0), ("code-1".to_owned(), 0.5)]),
    };
    assert_eq!(run.phases[0], general);
    // A batch that is smaller than a micro-batch may be is one.
    assert_eq!((run.phases[1].micro_batch_tokens, run.phases[1].num_steps), (512, 1));
    assert_eq!(run.schedule().num_steps(), 4);
}

#[test]
fn values_that_cannot_be_are_refused_with_file_field_value_and_what_is_allowed() {
    for (found, instead, message) in [
        ("clip = inf", "clip = nan", "optimizer.clip: NaN is not allowed; allowed: a number above 0, or inf"),
        ("beta1 = 0.8", "beta1 = 1.0", "optimizer.beta1: 1 is not allowed; allowed: a number in [0, 1)"),
        ("eps = 1e-6", "eps = 0", "optimizer.eps: 0 is not allowed; allowed: a number of at least 1.1754944e-38"),
        ("eps = 1e-6", "eps = 1e-46", "optimizer.eps: 0.0000000000000000000000000000000000000000000001 is not allowed"),
        ("weight_decay = 0", "weight_decay = inf", "optimizer.weight_decay: inf is not allowed"),
        ("aux = 0", "aux = -1", "loss.aux: -1 is not allowed; allowed: a number from 0 on"),
        ("keep = 2", "keep = 0", "output.keep: 0 is not allowed; allowed: 1 or more"),
        ("checkpoint_every = 20", "checkpoint_every = 0", "output.checkpoint_every: 0 is not allowed"),
        ("dir = \"/runs/first\"", "dir = \"\"", "output.dir: it is empty"),
        ("code-1 = 0.5", "code-1 = 0", "phases[0].mixture.code-1: 0 is not allowed; allowed: a number above 0"),
        ("code-1 = 0.5", "code-1 = -0.5", "phases[0].mixture.code-1: -0.5 is not allowed"),
        ("code-1 = 0.5", "code-1 = nan", "phases[0].mixture.code-1: NaN is not allowed"),
        ("code-1 = 0.5", "code = 0.5", "phases[0].mixture: no source code; allowed: code-1, old, web"),
        ("{ old = 1 }", "{}", "phases[1].mixture: it is empty"),
        ("[data.old]", "[data.\"../old\"]", "data.../old: not a name"),
        ("\"code.jsonl\"", "", "data.code-1.files: it is empty"),
        ("\"code.jsonl\"", "\"*/code.jsonl\"", "data.code-1.files: \"*/code.jsonl\" is not allowed"),
        ("\"code.jsonl\"", "\"..\"", "data.code-1.files: \"..\" is not allowed"),
        (
            "format = \"text\"",
            "format = \"text\"\nfield = \"a\"",
            "data.web.field: only a source in the format \"jsonl\"",
        ),
        (
            "sequence_length = 512",
            "sequence_length = 513",
            "phases[1].sequence_length: 513 is not allowed; allowed: 1 to 512",
        ),
        ("sequence_length = 512", "sequence_length = 0", "phases[1].sequence_length: 0 is not allowed"),
        (
            "batch_tokens = 4096",
            "batch_tokens = 4100",
            "phases[0].batch_tokens: 4100 is not allowed; allowed: a multiple of sequence_length = 128",
        ),
        ("batch_tokens = 4096", "batch_tokens = 0", "phases[0].batch_tokens: 0 is not allowed"),
        (
            "batch_tokens = 4096",
            "batch_tokens = 1152",
            "compute.micro_batch_tokens: 1024 is not allowed; allowed: a multiple of phases[0].sequence_length = 128 that divides phases[0].batch_tokens = 1152",
        ),
        ("micro_batch_tokens = 1024", "micro_batch_tokens = 64", "compute.micro_batch_tokens: 64 is not allowed"),
        (
            "micro_batch_tokens = 1024",
            "micro_batch_tokens = 1048577",
            "compute.micro_batch_tokens: 1048577 is not allowed; allowed: 1 to 1048576",
        ),
        ("micro_batch_tokens = 1024", "micro_batch_tokens = 0", "compute.micro_batch_tokens: 0 is not allowed"),
        ("tokens = 8193", "tokens = 0", "phases[0].tokens: 0 is not allowed"),
        ("tokens = 8193", "tokens = 9_000_000_000_000_000_000", "phases[0].tokens: 9000000000000000000 is not allowed"),
        (
            "warmup_tokens = 4097",
            "warmup_tokens = 8193",
            "phases[0].warmup_tokens: 8193 is not allowed; allowed: at most 8192",
        ),
        ("[3e-4, 3e-5]", "[0, 3e-5]", "phases[0].learning_rate: [0.0, 3e-5] is not allowed"),
        ("[3e-4, 3e-5]", "[3e-4]", "phases[0].learning_rate: [0.0003] is not allowed"),
        ("[3e-4, 3e-5]", "[3e-4, 3e-5, 0]", "phases[0].learning_rate: [0.0003, 3e-5, 0.0] is not allowed"),
        ("init = \"start\"", "init = \"\"", "model.init: it is empty; allowed: \"random\" or a directory"),
        ("[3e-4, 3e-5]", "[3e-4, nan]", "phases[0].learning_rate: [0.0003, NaN] is not allowed"),
    ] {
        assert!(WHOLE.contains(found), "{found}");
        let error = load(&WHOLE.replacen(found, instead, 1)).unwrap_err().to_string();
        assert!(error.contains(&format!("run.toml: {message}")), "{instead}: {error}");
    }
}

#[test]
fn unknown_and_missing_keys_and_values_of_another_type_are_refused_with_their_line() {
    for (found, instead, line, message) in [
        ("keep = 2", "kep = 2", 9, "unknown field `kep`, expected one of `dir`"),
        ("[loss]", "[lost]", 15, "unknown field `lost`"),
        ("name = \"short\"", "", 44, "missing field `name`"),
        ("seed = 7", "seed = -7", 5, "seed = -7: invalid value: integer `-7`"),
        ("dtype = \"bf16\"", "dtype = \"f16\"", 10, "unknown variant `f16`, expected `f32` or `bf16`"),
        ("format = \"tokens\"", "format = \"csv\"", 35, "unknown variant `csv`"),
        ("[1e30, 0]", "1e30", 49, "learning_rate = 1e30: invalid type"),
        ("on_bad_line = \"skip\"", "on_bad_line = [", 34, "missing comma"),
    ] {
        assert!(WHOLE.contains(found), "{found}");
        let error = load(&WHOLE.replacen(found, instead, 1)).unwrap_err().to_string();
        assert!(error.contains("run.toml: ") && error.contains(message), "{instead}: {error}");
        assert!(error.contains(&format!("line {line}")), "{instead}: {error}");
    }
}

#[test]
fn a_run_file_and_a_model_that_cannot_be_read_are_named() {
    let dir = directory(SHORTEST);
    let absent = RunConfig::load(&dir.path().join("absent.toml")).unwrap_err().to_string();
    assert!(absent.contains("absent.toml: "), "{absent}");
    let directory = RunConfig::load(dir.path()).unwrap_err().to_string();
    assert!(directory.contains("not a regular file"), "{directory}");
    fs::write(dir.path().join("run.toml"), b"a = \"\xff\"").unwrap();
    let not_utf8 = RunConfig::load(&dir.path().join("run.toml")).unwrap_err().to_string();
    assert!(not_utf8.contains("run.toml: "), "{not_utf8}");
    let no_model = load(&SHORTEST.replace("\"model\"", "\"models\"")).unwrap_err().to_string();
    assert!(no_model.contains("models/config.json: "), "{no_model}");
}

#[test]
fn a_model_whose_config_is_quantised_is_refused() {
    let dir = directory(SHORTEST);
    let scheme = r#"{"quant_method": "moge", "layout_version": 1, "mlp": "w8a8", "shared_expert": "none",
        "attention": "w8a8", "lm_head": "none"}"#;
    let config = MODEL.replacen('{', &format!("{{\"quantization_config\": {scheme}, "), 1);
    fs::write(dir.path().join("model/config.json"), config).unwrap();
    let error = RunConfig::load(&dir.path().join("run.toml")).unwrap_err().to_string();
    assert!(error.contains("model.config: its weights are quantised"), "{error}");
}
