//! What a recovered folder looks like: whole or not at all, its files the target's, a record of what it was made from.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use checkpoint::{Checkpoint, CheckpointError, Dtype, TensorSpec, pack_f32};
use kernels::CpuEngine;
use recover::{Form, Inputs, Job, RecoverError, Settings, by_name};
use serde_json::json;
use stream::NoProgress;

use crate::support::{Bench, EMBED, NORM, Q, inputs, named, noise, save, save_json, weight};

/// A target in two files with an index, and its aligned model in one.
fn sharded(bench: &Bench) -> Inputs {
    let tensors = |seed: u64| {
        [
            named(EMBED, &[8, 6], &noise(48, seed)),
            named(NORM, &[6], &noise(6, seed + 1)),
            named(&weight(Q), &[4, 6], &noise(24, seed + 2)),
        ]
    };
    let aligned = bench.model("aligned", Dtype::Bf16, &tensors(1));
    let target = bench.model("target", Dtype::Bf16, &tensors(10));
    fs::remove_file(target.join("model.safetensors")).unwrap();
    let mut map = BTreeMap::new();
    let all = tensors(10);
    let (first, second) = all.split_at(1);
    for (file, part) in
        [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)]
    {
        let stored: Vec<(TensorSpec, Vec<u8>)> = part
            .iter()
            .map(|(name, shape, values)| {
                ((name.clone(), Dtype::Bf16, shape.clone()), pack_f32(values, Dtype::Bf16).unwrap())
            })
            .collect();
        save(&target, file, &stored);
        map.extend(part.iter().map(|(name, ..)| (name.clone(), file)));
    }
    // An index with numbers that nothing here would write.
    save_json(
        &target,
        "model.safetensors.index.json",
        &json!({"metadata": {"total_size": 7}, "weight_map": map}),
    );
    fs::write(target.join("modeling.py"), "pass").unwrap();
    fs::write(target.join("pytorch_model.bin"), "pickle").unwrap();
    Inputs { aligned: Some(aligned), ..inputs(&target) }
}

#[test]
fn files_headers_and_index_are_the_targets() {
    let bench = Bench::new();
    let inputs = sharded(&bench);
    let report = bench.run("wise-ft", &Settings::default(), &inputs).unwrap();
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(bench.path(dir)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let mut want = names("target");
    want.retain(|name| name != "pytorch_model.bin");
    want.push("safegene.json".to_owned());
    want.sort();
    assert_eq!(names("out"), want);
    let read = |dir: &str, name: &str| fs::read(bench.path(dir).join(name)).unwrap();
    for name in ["model.safetensors.index.json", "config.json", "tokenizer.json", "modeling.py"] {
        assert_eq!(read("out", name), read("target", name), "{name}");
    }
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let (old, new) = (read("target", name), read("out", name));
        let header = 8 + u64::from_le_bytes(old[..8].try_into().unwrap()) as usize;
        assert_eq!((old.len(), &old[..header]), (new.len(), &new[..header]));
        assert_ne!(old, new);
    }
    assert_eq!(report.code, ["modeling.py"]);
    assert_eq!((report.tensors.changed, report.modules.len()), (3, 3));
}

#[test]
fn same_output_is_left_as_it_is_and_another_is_refused() {
    let bench = Bench::new();
    let inputs = sharded(&bench);
    let half = Settings { lambda: Some(0.5), ..Settings::default() };
    let first = bench.run("wise-ft", &half, &inputs).unwrap();
    let modified =
        || fs::metadata(bench.path("out/model-00001-of-00002.safetensors")).unwrap().modified().unwrap();
    let before = modified();
    let again = bench.run("wise-ft", &half, &inputs).unwrap();
    assert!(!first.already && again.already);
    assert_eq!((&again.modules, again.tensors, modified()), (&first.modules, first.tensors, before));
    // Other options, another method, another input.
    let other = Settings { lambda: Some(0.25), ..Settings::default() };
    let exists = |result: recover::Result<recover::Report>| {
        matches!(result, Err(RecoverError::Checkpoint(CheckpointError::OutputExists { .. })))
    };
    assert!(exists(bench.run("wise-ft", &other, &inputs)));
    assert!(exists(bench.run("low-rank-restore", &Settings::default(), &inputs)));
    let swapped =
        Inputs { target: inputs.aligned.clone().unwrap(), aligned: Some(inputs.target.clone()), ..inputs };
    assert!(exists(bench.run("wise-ft", &half, &swapped)));
}

#[test]
fn record_says_what_it_was_made_from() {
    let bench = Bench::new();
    let inputs = sharded(&bench);
    bench.run("wise-ft", &Settings::default(), &inputs).unwrap();
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.path("out/safegene.json")).unwrap()).unwrap();
    assert_eq!(record["command"], "recover");
    assert_eq!(record["report"]["method"], "wise-ft");
    assert_eq!(record["report"]["paper"], "2109.01903");
    assert_eq!(record["report"]["options"], json!({"lambda": 0.5}));
    let content = |dir: &PathBuf| Checkpoint::open(dir, None).unwrap().content().unwrap();
    assert_eq!(record["sources"]["target"], content(&inputs.target));
    assert_eq!(record["sources"]["aligned"], content(inputs.aligned.as_ref().unwrap()));
}

#[test]
fn interrupted_recovery_leaves_nothing() {
    let bench = Bench::new();
    let inputs = sharded(&bench);
    let method = (by_name("wise-ft").unwrap().build)(&Settings::default()).unwrap();
    let out = bench.path("out");
    let job = Job {
        out: &out,
        form: Form::Merged,
        force: false,
        memory_bytes: 1 << 30,
        algebra: &CpuEngine::new(),
        stop: &AtomicBool::new(true),
        progress: &NoProgress,
    };
    let error = recover::recover(&*method, &inputs, &job).unwrap_err();
    assert!(matches!(error, RecoverError::Interrupted), "{error}");
    assert!(!out.exists() && !bench.path("out.partial").exists());
}

#[test]
fn stacked_experts_are_changed_in_place() {
    // [E, in, out] with gate the even columns of gate_up, and [E, out, in] with gate the first rows. Two experts, hidden 3,
    // intermediate 2.
    for (model_type, gate_up_shape, down_shape) in
        [("gpt_oss", [2, 3, 4], [2, 2, 3]), ("qwen3_moe", [2, 4, 3], [2, 3, 2])]
    {
        let bench = Bench::new();
        let (gate_up, down) =
            ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj");
        let model = |name: &str, seed: u64| {
            let tensors = [
                named(down, &down_shape, &noise(12, seed)),
                named(gate_up, &gate_up_shape, &noise(24, seed + 1)),
            ];
            let dir = bench.model(name, Dtype::F32, &tensors);
            let config = json!({"model_type": model_type, "num_hidden_layers": 1, "hidden_size": 3});
            save_json(&dir, "config.json", &config);
            dir
        };
        let inputs = Inputs { aligned: Some(model("aligned", 1)), ..inputs(&model("target", 11)) };
        let settings = Settings { lambda: Some(0.25), ..Settings::default() };
        let report = bench.run("wise-ft", &settings, &inputs).unwrap();
        assert_eq!(report.modules.len(), 6, "gate, up and down of two experts");
        assert_eq!(report.tensors.changed, 2);
        for tensor in [gate_up, down] {
            let (a, t, got) = (
                bench.values("aligned", tensor),
                bench.values("target", tensor),
                bench.values("out", tensor),
            );
            for (index, (got, (a, t))) in got.iter().zip(a.iter().zip(&t)).enumerate() {
                assert_eq!(*got, 0.75 * a + 0.25 * t, "{model_type}, {tensor} {index}");
            }
        }
    }
}

#[test]
fn blocks_and_threads_do_not_matter() {
    // More than one block of rows, and rows that do not divide it.
    let bench = Bench::new();
    let (rows, cols) = (1031, 600);
    let shape = [rows as u64, cols as u64];
    let (aligned, target) = (noise(rows * cols, 1), noise(rows * cols, 2));
    let inputs = Inputs {
        aligned: Some(bench.one("aligned", shape, &aligned)),
        ..inputs(&bench.one("target", shape, &target))
    };
    let run = |threads: usize, out: &str| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bench.run_as("wise-ft", &Settings::default(), &inputs, Form::Merged, out)).unwrap()
    };
    let (one, four) = (run(1, "one"), run(4, "four"));
    assert_eq!((one.modules, one.change_norm), (four.modules, four.change_norm));
    let got = bench.values("one", &weight(Q));
    assert_eq!(got, bench.values("four", &weight(Q)));
    for (index, (got, (a, t))) in got.iter().zip(aligned.iter().zip(&target)).enumerate() {
        assert_eq!(*got, 0.5 * a + 0.5 * t, "{index}");
    }
}
