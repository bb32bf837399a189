use moge_model::synth::SynthConfig;

use super::*;
use crate::testing::{Folder, SYNTH};

fn open(folder: &Folder, output: &str) -> Checkpoints {
    Checkpoints::open(&folder.run(output, "")).unwrap()
}

/// Names in the output directory but the lock's, sorted.
fn names(folder: &Folder) -> Vec<String> {
    let mut names = names_in(&folder.path("out")).unwrap();
    names.retain(|name| name != "lock");
    names.sort();
    names
}

fn layout() -> Layout {
    Layout::new(&SYNTH.model_config().unwrap())
}

/// A state that is different at each step, and has numbers that bf16 rounds.
fn state(step: u64) -> TrainState {
    let numbers = |scale: f32| (0..layout().len).map(|i| (i as f32 * 0.37 + step as f32).sin() * scale).collect();
    TrainState { step, tokens: 32 * step, params: numbers(0.1), m: numbers(1e-3), v: numbers(1e-7) }
}

/// A place in the data, another at each step.
fn data(step: u64) -> DataState {
    serde_json::from_value(serde_json::json!({ "seed": u64::MAX - step, "sources": [] })).unwrap()
}

fn newest(checkpoints: &Checkpoints) -> Resumed {
    checkpoints.load_newest(&layout()).unwrap().unwrap()
}

#[test]
fn what_was_saved_is_loaded_bit_by_bit_in_either_type() {
    for dtype in ["f32", "bf16"] {
        let folder = Folder::new();
        let checkpoints = open(&folder, &format!("dtype = '{dtype}'"));
        assert!(checkpoints.load_newest(&layout()).unwrap().is_none());
        for step in [3, 12] {
            checkpoints.save(&state(step), &layout(), &data(step)).unwrap();
        }
        let Resumed { dir, state: loaded, data: place, damaged, changes } = newest(&checkpoints);
        assert!(loaded == state(12) && place == data(12), "{dtype}");
        assert_eq!(dir, folder.path("out/step-00000012"));
        assert!(damaged.is_empty() && changes.is_empty(), "{damaged:?} {changes:?}");
    }
}

#[test]
fn the_engine_loads_a_checkpoint_as_it_is() {
    let folder = Folder::new();
    for (dtype, name, size) in [("f32", "float32", 4), ("bf16", "bfloat16", 2)] {
        let checkpoints = open(&folder, &format!("dtype = '{dtype}'"));
        let dir = checkpoints.save(&state(5), &layout(), &data(5)).unwrap();
        let config = ModelConfig::load(&dir).unwrap();
        assert_eq!(config, ModelConfig { dtype: config.dtype, ..SYNTH.model_config().unwrap() });
        let json: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(json["torch_dtype"], name);
        let weights = Checkpoint::open(&dir, LoadMode::Read, &|_, _| ()).unwrap();
        assert!(moge_model::tensor_problems(&config, &weights).is_empty());
        assert!(weights.tensors().all(|(_, tensor)| tensor.dtype().bitsize() == 8 * size));
        for file in ["tokenizer.model", "generation_config.json"] {
            assert_eq!(fs::read(dir.join(file)).unwrap(), fs::read(folder.path("model").join(file)).unwrap());
        }
    }
}

#[test]
fn only_the_newest_checkpoints_stay() {
    let folder = Folder::new();
    let checkpoints = open(&folder, "keep = 2");
    for step in [99, 100, 1_000, 123_456_789] {
        checkpoints.save(&state(step), &layout(), &data(step)).unwrap();
    }
    assert_eq!(names(&folder), ["step-00001000", "step-123456789"]);
    assert_eq!(newest(&checkpoints).state.step, 123_456_789);
}

#[test]
fn a_directory_of_another_with_nearly_the_same_name_is_not_counted() {
    let folder = Folder::new();
    let checkpoints = open(&folder, "keep = 2");
    fs::create_dir(folder.path("out/step-7")).unwrap();
    for step in [5, 7, 8] {
        checkpoints.save(&state(step), &layout(), &data(step)).unwrap();
    }
    assert_eq!(names(&folder), ["step-00000007", "step-00000008", "step-7"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() {
    type Damaging = fn(&Path);
    let damages: [(&str, Damaging, &str); 7] = [
        ("model.safetensors", |path| cut(path, 100), "bytes, "),
        ("model.safetensors", |path| flip(path, 5000), "its bytes are not"),
        ("trainer/model.safetensors", |path| fs::remove_file(path).unwrap(), "No such file"),
        ("trainer/state.json", |path| flip(path, 30), "its bytes are not"),
        ("trainer/checksums.json", |path| flip(path, 60), ""),
        ("trainer/checksums.json", |path| cut(path, 3), "EOF"),
        ("trainer", |path| fs::remove_dir_all(path).unwrap(), "No such file"),
    ];
    for (file, damage, expected) in damages {
        let folder = Folder::new();
        let checkpoints = open(&folder, "");
        for step in [1, 2, 3] {
            checkpoints.save(&state(step), &layout(), &data(step)).unwrap();
        }
        damage(&folder.path("out/step-00000003").join(file));
        let resumed = newest(&checkpoints);
        assert!(resumed.state == state(2) && resumed.data == data(2));
        let told = resumed.damaged[0].to_string();
        assert!(told.contains("step-00000003") && told.contains(expected), "{file}: {told}");
        assert_eq!(names(&folder), ["step-00000001", "step-00000002", "step-00000003.damaged"]);
        checkpoints.save(&state(3), &layout(), &data(3)).unwrap();
        assert!(newest(&checkpoints).state == state(3));
    }
}

#[test]
fn if_no_checkpoint_is_whole_nothing_is_touched() {
    let folder = Folder::new();
    let checkpoints = open(&folder, "");
    for step in [1, 2] {
        let dir = checkpoints.save(&state(step), &layout(), &data(step)).unwrap();
        cut(&dir.join("model.safetensors"), 1);
    }
    let error = checkpoints.load_newest(&layout()).unwrap_err().to_string();
    assert!(error.contains("no checkpoint is whole: ") && error.contains("step-00000001/model"), "{error}");
    assert_eq!(names(&folder), ["step-00000001", "step-00000002"]);
}

#[test]
fn what_a_kill_leaves_half_written_is_removed_at_the_next_start() {
    let folder = Folder::new();
    let checkpoints = open(&folder, "");
    let whole = checkpoints.save(&state(4), &layout(), &data(4)).unwrap();
    let half = folder.path("out/step-00000008.tmp");
    fs::create_dir_all(half.join("trainer")).unwrap();
    fs::write(half.join("model.safetensors.partial"), "half").unwrap();
    fs::rename(&whole, folder.path("out/step-00000002.gone.tmp")).unwrap();
    drop(checkpoints);
    let checkpoints = open(&folder, "");
    assert_eq!(names(&folder), [""; 0]);
    assert!(checkpoints.load_newest(&layout()).unwrap().is_none());
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_nothing() {
    let folder = Folder::new();
    let checkpoints = open(&folder, "");
    checkpoints.save(&state(1), &layout(), &data(1)).unwrap();
    // A file in the place of the directory.
    fs::write(folder.path("out/step-00000002.tmp"), "").unwrap();
    let error = checkpoints.save(&state(2), &layout(), &data(2)).unwrap_err().to_string();
    assert!(error.contains("step-00000002.tmp"), "{error}");
    assert_eq!(newest(&checkpoints).state.step, 1);
}

#[test]
fn a_directory_has_one_writer() {
    let folder = Folder::new();
    let run = folder.run("", "");
    let first = Checkpoints::open(&run).unwrap();
    let error = Checkpoints::open(&run).unwrap_err().to_string();
    assert!(error.contains("out: another process trains there"), "{error}");
    drop(first);
    Checkpoints::open(&run).unwrap();
}

#[test]
fn a_checkpoint_of_another_network_is_refused_with_tensor_or_field() {
    let folder = Folder::new();
    open(&folder, "").save(&state(1), &layout(), &data(1)).unwrap();
    let cases = [
        ("\"vocab_size\": 420", "\"vocab_size\": 430", "lm_head.weight is [420, 24], the run's model has [430, 24]"),
        ("\"rope_theta\": ", "\"rope_theta\": 1", "rope_theta is "),
    ];
    let path = folder.path("model/config.json");
    let original = fs::read_to_string(&path).unwrap();
    for (text, replacement, expected) in cases {
        assert!(original.contains(text), "{original}");
        fs::write(&path, original.replace(text, replacement)).unwrap();
        let run = folder.run("", "");
        let checkpoints = Checkpoints::open(&run).unwrap();
        let error = checkpoints.load_newest(&Layout::new(&run.model.config)).unwrap_err().to_string();
        assert!(error.contains("step-00000001") && error.contains(expected), "{error}");
    }
    let other = SynthConfig { hidden_size: 30, ..SYNTH }.model_config().unwrap();
    let error = load_weights(&folder.path("out/step-00000001"), &other, &Layout::new(&other)).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight: shape is [420, 24], should be [420, 30]"), "{error}");
}

#[test]
fn a_setting_that_an_older_checkpoint_lacks_is_said() {
    let now = settings(&Folder::new().run("", ""));
    let mut before = now.clone();
    before.remove("optimizer.decay_norms_and_biases").unwrap();
    assert_eq!(changes(&before, &now), ["optimizer.decay_norms_and_biases: false, was absent"]);
}

#[test]
fn another_version_and_changed_settings_are_said() {
    let folder = Folder::new();
    let dir = open(&folder, "").save(&state(1), &layout(), &data(1)).unwrap();
    let checkpoints = Checkpoints::open(&folder.run("", "clip = 0.5\nbeta2 = 0.99")).unwrap();
    assert_eq!(newest(&checkpoints).changes, ["optimizer.beta2: 0.99, was 0.95", "optimizer.clip: 0.5, was 1.0"]);
    let path = dir.join("trainer/state.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 2");
    fs::write(&path, text).unwrap();
    fs::remove_file(dir.join("trainer/checksums.json")).unwrap();
    let sums = FileSum::of_files_below(&dir).unwrap();
    write_json(&dir.join("trainer/checksums.json"), &sums).unwrap();
    let error = checkpoints.load_newest(&layout()).unwrap_err().to_string();
    assert!(error.contains("state.json: version 2; this program reads version 1"), "{error}");
}

fn cut(path: &Path, num_bytes: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - num_bytes).unwrap();
}

fn flip(path: &Path, byte: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[byte] ^= 1;
    fs::write(path, bytes).unwrap();
}
