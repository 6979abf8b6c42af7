//! Inputs and options that are refused: by name of tensor and file, with a hint, and nothing is left.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use checkpoint::{CheckpointError, Dtype};
use kernels::CpuEngine;
use recover::{Form, Inputs, Job, METHODS, Need, RecoverError, Settings, Shots, by_name};
use stream::NoProgress;

use crate::decoder::shots;
use crate::support::{Bench, K, NORM, Q, inputs, named, save_json, weight};

const SHAPE: [u64; 2] = [2, 2];
const W: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

/// A target, and every other input that any method could ask for.
fn all(bench: &Bench) -> Inputs {
    let aligned = bench.one("aligned", SHAPE, &W);
    let target = bench.adapter("target", &aligned, 1.0, &[(Q, 1, &[1.0, 1.0], &[1.0, 2.0])]);
    let safety = bench.adapter("safety", &aligned, 1.0, &[(Q, 1, &[1.0, 0.0], &[1.0, 2.0])]);
    Inputs {
        aligned: Some(aligned),
        base: Some(bench.one("base", SHAPE, &[1.0, 2.0, 0.0, 0.0])),
        degraded: Some(bench.one("degraded", SHAPE, &[0.0; 4])),
        safety_adapter: Some(safety),
        shots: Shots { safety: shots(1, 2), task: shots(2, 2), benign: shots(3, 2) },
        ..inputs(&target)
    }
}

#[track_caller]
fn refused(bench: &Bench, method: &str, inputs: &Inputs, words: &[&str]) -> RecoverError {
    let error = bench.run(method, &Settings::default(), inputs).unwrap_err();
    let mut text = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    for word in words {
        assert!(text.contains(word), "`{text}` lacks `{word}`");
    }
    assert!(!bench.path("out").exists() && !bench.path("out.partial").exists());
    error
}

#[test]
fn whatever_a_method_needs_is_asked_for() {
    for method in METHODS {
        for need in method.needs {
            let bench = Bench::new();
            let mut inputs = all(&bench);
            match need {
                Need::Aligned => inputs.aligned = None,
                Need::Base => inputs.base = None,
                Need::Degraded => inputs.degraded = None,
                Need::SafetyAdapter => inputs.safety_adapter = None,
                Need::SafetyShots => inputs.shots.safety.clear(),
                Need::TaskShots => inputs.shots.task.clear(),
                Need::BenignShots => inputs.shots.benign.clear(),
            }
            let error = refused(&bench, method.name, &inputs, &[method.name, &need.to_string()]);
            assert_eq!(error.hint().unwrap(), format!("give {}", need.argument()));
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let some = Settings::default;
    for (method, settings) in [
        ("resta", Settings { gamma: Some(-0.5), ..some() }),
        ("resta", Settings { gamma: Some(f64::NAN), ..some() }),
        ("resta", Settings { gamma: Some(f64::INFINITY), ..some() }),
        ("resta", Settings { drop: Some(1.0), ..some() }),
        ("resta", Settings { drop: Some(-0.1), ..some() }),
        ("wise-ft", Settings { lambda: Some(1.5), ..some() }),
        ("wise-ft", Settings { lambda: Some(-0.5), ..some() }),
        ("low-rank-restore", Settings { gamma: Some(-1.0), ..some() }),
        ("low-rank-restore", Settings { rank: Some(0), ..some() }),
        ("low-rank-restore", Settings { rank: Some(5000), ..some() }),
        ("lox", Settings { coefficient: Some(-1.25), ..some() }),
        ("safelora", Settings { tau: Some(1.5), ..some() }),
        ("safelora", Settings { modules: Some(0), ..some() }),
        ("safelora", Settings { tau: Some(0.5), modules: Some(3), ..some() }),
        ("safelora", Settings { variant: Some("exact".into()), ..some() }),
        ("safemerge", Settings { weight: Some(-0.2), ..some() }),
        ("safemerge", Settings { weight: Some(1.2), ..some() }),
        ("safemerge", Settings { variant: Some("drop".into()), ..some() }),
        ("safe-delta", Settings { s: Some(-0.1), ..some() }),
        ("safe-delta", Settings { damping: Some(f64::NAN), ..some() }),
        ("safe-delta", Settings { samples: Some(0), ..some() }),
        ("safe-delta", Settings { budget: Some("all".into()), ..some() }),
        ("safe-delta", Settings { variant: Some("drop".into()), ..some() }),
        ("salora", Settings { safety_rank: Some(0), ..some() }),
        ("salora", Settings { rows: Some(0), ..some() }),
        ("salora", Settings { rate: Some(f64::INFINITY), ..some() }),
        ("few-shot-lora", Settings { rate: Some(0.0), ..some() }),
        ("few-shot-lora", Settings { max_kl: Some(0.0), ..some() }),
        ("few-shot-lora", Settings { delta: Some(-1.0), ..some() }),
        ("few-shot-lora", Settings { steps: Some(0), ..some() }),
        ("few-shot-lora", Settings { rank: Some(0), ..some() }),
    ] {
        let result = (by_name(method).unwrap().build)(&settings);
        assert!(matches!(result, Err(RecoverError::Option { .. })), "{method} {settings:?}: {result:?}");
    }
    let error = (by_name("resta").unwrap().build)(&Settings { gamma: Some(-1.0), ..some() }).unwrap_err();
    assert_eq!(error.to_string(), "`gamma` of `resta` is -1, which is not a number of 0 or more");
    assert_eq!(error.hint().unwrap(), "safety is only ever added, never subtracted");
}

#[test]
fn options_of_other_methods_are_refused() {
    let given = |method: &str, settings: &Settings| (by_name(method).unwrap().build)(settings).unwrap_err();
    let error = given("wise-ft", &Settings { gamma: Some(1.0), ..Settings::default() });
    assert_eq!(error.to_string(), "`wise-ft` has no option `gamma`");
    // A rank belongs to one of its variants only.
    let error = given("safelora", &Settings { rank: Some(4), ..Settings::default() });
    assert!(matches!(error, RecoverError::UnusedOption { option: "rank", .. }), "{error}");
    // So does a budget.
    let (variant, budget) = (Some("published".into()), Some("share".into()));
    let error = given("safe-delta", &Settings { variant, budget, ..Settings::default() });
    assert_eq!(error.to_string(), "`safe-delta` has no option `budget`");
    let error = given("wise-ft", &Settings { max_kl: Some(0.1), ..Settings::default() });
    assert_eq!(error.to_string(), "`wise-ft` has no option `max-kl`");
}

#[test]
fn another_architecture_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let other = serde_json::json!({"model_type": "qwen2", "num_hidden_layers": 1});
    save_json(&bench.path("degraded"), "config.json", &other);
    refused(&bench, "resta", &inputs, &["llama with 1 layers", "qwen2 with 1 layers", "degraded"]);
}

#[test]
fn another_shape_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    bench.one("base", [3, 2], &[0.0; 6]);
    for method in ["safelora", "safemerge"] {
        refused(&bench, method, &inputs, &["q_proj", "[2, 2]", "[3, 2]", "base/model.safetensors"]);
    }
    let target = bench.one("whole", SHAPE, &W);
    refused(&bench, "lox", &Inputs { target, ..inputs }, &["q_proj", "[3, 2]"]);
}

#[test]
fn tensor_of_one_side_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let tensors = [named(&weight(Q), &SHAPE, &W), named(NORM, &[2], &[1.0, 1.0])];
    bench.model("degraded", Dtype::F32, &tensors);
    refused(&bench, "resta", &inputs, &[NORM, "degraded/model.safetensors", "target"]);
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    for (bad, value) in [("aligned", f32::NAN), ("degraded", f32::INFINITY)] {
        let bench = Bench::new();
        let inputs = all(&bench);
        bench.one(bad, SHAPE, &[1.0, 2.0, value, 4.0]);
        refused(&bench, "resta", &inputs, &["q_proj", bad, "element 2"]);
    }
    // Also in what a method does not touch.
    let bench = Bench::new();
    let tensors = |norm: f32| [named(NORM, &[2], &[1.0, norm]), named(&weight(Q), &SHAPE, &W)];
    let inputs = Inputs {
        base: Some(bench.model("base", Dtype::F32, &tensors(1.0))),
        ..inputs(&bench.model("aligned", Dtype::F32, &tensors(f32::NAN)))
    };
    refused(&bench, "lox", &inputs, &[NORM, "aligned/model.safetensors", "element 1"]);
}

#[test]
fn value_beyond_the_format_is_refused() {
    let bench = Bench::new();
    let model =
        |name: &str, value: f32| bench.model(name, Dtype::F16, &[named(&weight(Q), &[1, 2], &[1.0, value])]);
    let inputs = Inputs {
        aligned: Some(model("aligned", 60000.0)),
        degraded: Some(model("degraded", -60000.0)),
        ..inputs(&model("target", 1.0))
    };
    let error = refused(&bench, "resta", &inputs, &["q_proj", "element 1", "F16"]);
    assert!(error.hint().unwrap().contains("smaller coefficient"));
}

#[test]
fn adapter_without_a_base_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let config = bench.path("target/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap().replace("../aligned", "someone/somewhere");
    fs::write(&config, text).unwrap();
    // The aligned model is what a LoRA is over, unless it says otherwise.
    bench.run("wise-ft", &Settings::default(), &inputs).unwrap();
    fs::remove_dir_all(bench.path("out")).unwrap();
    let error = refused(&bench, "lox", &Inputs { aligned: None, ..inputs }, &["someone/somewhere", "target"]);
    assert!(matches!(error, RecoverError::Checkpoint(CheckpointError::NoBase { .. })));
}

#[test]
fn adapter_over_another_model_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let other = bench.one("other", SHAPE, &[9.0; 4]);
    let moved = |name: &str, over: &Path| bench.adapter(name, over, 1.0, &[(Q, 1, &[1.0, 1.0], &[1.0, 2.0])]);
    let target = moved("elsewhere", &other);
    let error =
        refused(&bench, "safelora", &Inputs { target, ..inputs.clone() }, &["elsewhere", "other", "aligned"]);
    assert!(matches!(error, RecoverError::OtherBase { .. }));
    let safety = Some(moved("safety-elsewhere", &other));
    refused(&bench, "safemerge", &Inputs { safety_adapter: safety, ..inputs.clone() }, &["safety-elsewhere"]);
    // A copy of the aligned model is as good as itself.
    let copy = bench.one("copy", SHAPE, &W);
    let inputs = Inputs { target: moved("over-copy", &copy), ..inputs };
    bench.run("safelora", &Settings::default(), &inputs).unwrap();
}

#[test]
fn safety_adapter_has_to_be_one_and_to_hold_the_module() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let whole = Inputs { safety_adapter: inputs.degraded.clone(), ..inputs.clone() };
    let error = refused(&bench, "safemerge", &whole, &["degraded", "safety adapter"]);
    assert!(matches!(error, RecoverError::NotAnAdapter { .. }));

    let bench = Bench::new();
    let tensors = |values: &[f32]| [named(&weight(K), &SHAPE, values), named(&weight(Q), &SHAPE, values)];
    let aligned = bench.model("aligned", Dtype::F32, &tensors(&W));
    // V has one direction, e₂, so an update along e₁ is opposed.
    let base = bench.model("base", Dtype::F32, &tensors(&[1.0, 2.0, 3.0, 0.0]));
    let target = bench.adapter("target", &aligned, 1.0, &[(Q, 1, &[1.0, 0.1], &[1.0, 2.0])]);
    let safety = bench.adapter("safety", &aligned, 1.0, &[(K, 1, &[1.0, 1.0], &[1.0, 2.0])]);
    let inputs = Inputs {
        aligned: Some(aligned),
        base: Some(base),
        safety_adapter: Some(safety),
        ..crate::support::inputs(&target)
    };
    let error = refused(&bench, "safemerge", &inputs, &["safety", Q]);
    assert!(matches!(error, RecoverError::NotInSafetyAdapter { .. }));
}

#[test]
fn published_average_needs_equal_ranks() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let lora: (&str, u64, &[f32], &[f32]) = (Q, 2, &[1.0, 0.0, 0.0, 1.0], &[1.0, 2.0, 0.0, 1.0]);
    let safety = bench.adapter("wider", &bench.path("aligned"), 2.0, &[lora]);
    let inputs = Inputs { safety_adapter: Some(safety), ..inputs };
    let published = Settings { variant: Some("published".into()), tau: Some(1.0), ..Settings::default() };
    let error = bench.run("safemerge", &published, &inputs).unwrap_err();
    assert!(error.to_string().contains("ranks are 1 and 2"), "{error}");
    assert!(!bench.path("out").exists() && !bench.path("out.partial").exists());
    // Concatenated they may differ.
    bench.run("safemerge", &Settings { variant: None, ..published }, &inputs).unwrap();
}

#[test]
fn adapters_are_written_only_where_that_can_be() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let as_adapter = |method: &str, inputs: &Inputs| {
        bench.run_as(method, &Settings::default(), inputs, Form::Adapter, "out").unwrap_err()
    };
    for method in ["resta", "wise-ft", "low-rank-restore", "lox"] {
        let error = as_adapter(method, &inputs);
        assert!(matches!(error, RecoverError::NoAdapter { of_model: false, .. }), "{method}: {error}");
    }
    let whole = Inputs { target: bench.one("whole", SHAPE, &[1.0, 1.0, 1.0, 1.0]), ..inputs };
    for method in ["safelora", "safemerge"] {
        let error = as_adapter(method, &whole);
        assert!(matches!(error, RecoverError::NoAdapter { of_model: true, .. }), "{method}: {error}");
    }
    assert!(!bench.path("out").exists() && !bench.path("out.partial").exists());
}

#[test]
fn aligned_and_base_that_are_one_model_are_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let inputs = Inputs { base: inputs.aligned.clone(), ..inputs };
    for method in ["safelora", "safemerge"] {
        let error = refused(&bench, method, &inputs, &["equal in every module", "aligned"]);
        assert_eq!(error.hint().unwrap(), "`--base` is the model before it was aligned");
    }
}

#[test]
fn target_in_eight_bits_is_refused() {
    let bench = Bench::new();
    let scaled = |name: &str| {
        let dir = bench.model(name, Dtype::F32, &[]);
        let spec = |name: &str, dtype, shape: &[u64]| (name.to_owned(), dtype, shape.to_vec());
        let scale = [(0.5f32).to_le_bytes().to_vec()].concat();
        let tensors = [
            (spec(&weight(Q), Dtype::F8E4M3, &SHAPE), vec![0x38, 0x40, 0x38, 0x40]),
            (spec(&format!("{}_scale", weight(Q)), Dtype::F32, &[1]), scale),
        ];
        crate::support::save(&dir, "model.safetensors", &tensors);
        dir
    };
    let target = scaled("eight");
    let aligned = bench.one("aligned", SHAPE, &W);
    let inputs = Inputs { aligned: Some(aligned), ..inputs(&target) };
    let error = refused(&bench, "wise-ft", &inputs, &["q_proj", "eight/model.safetensors", "written"]);
    assert!(error.hint().unwrap().contains("bf16"));
    // As the other side it is read with its scale: codes 1 and 2, halved.
    let inputs = Inputs { target: bench.one("target", SHAPE, &W), aligned: Some(target), ..inputs };
    bench.run("wise-ft", &Settings { lambda: Some(0.0), ..Settings::default() }, &inputs).unwrap();
    assert_eq!(bench.out(), [0.5, 1.0, 0.5, 1.0]);
}

#[test]
fn update_larger_than_the_memory_is_refused() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let method = (by_name("safelora").unwrap().build)(&Settings::default()).unwrap();
    let out = bench.path("out");
    let run = |target: &Path, memory_bytes| {
        let job = Job {
            out: &out,
            form: Form::Merged,
            force: false,
            memory_bytes,
            algebra: &CpuEngine::new(),
            stop: &AtomicBool::new(false),
            progress: &NoProgress,
        };
        recover::recover(&*method, &Inputs { target: target.to_path_buf(), ..inputs.clone() }, &job)
    };
    // Of a whole model the update and what C makes of it have to fit, four f32 each, and two columns of the update with
    // all that becomes of them, sixteen.
    let whole = bench.one("whole", SHAPE, &[1.0, 2.0, 5.0, 6.0]);
    let error = run(&whole, 95).unwrap_err();
    assert!(matches!(error, RecoverError::Memory { need_bytes: 96, limit_bytes: 95, .. }), "{error}");
    assert!(!out.exists() && !bench.path("out.partial").exists());
    // Stored sides are read when they are needed.
    let small = run(&whole, 96).unwrap();
    fs::remove_dir_all(&out).unwrap();
    let large = run(&whole, 1 << 30).unwrap();
    assert_eq!(small.modules, large.modules);
    fs::remove_dir_all(&out).unwrap();
    run(&inputs.target, 1).unwrap();
}

#[test]
fn weights_that_an_engine_finds_not_finite_are_named() {
    for method in ["safelora", "low-rank-restore"] {
        for memory_bytes in [1 << 30, 96] {
            let bench = Bench::new();
            let inputs = all(&bench);
            bench.one("aligned", SHAPE, &[1.0, 2.0, 3.0, f32::NAN]);
            // The target's own base is a copy without it.
            let base = bench.one("copy", SHAPE, &W);
            let target = bench.adapter("target", &base, 1.0, &[(Q, 1, &[1.0, 1.0], &[1.0, 2.0])]);
            // Of SafeLoRA the adapter has to be over the very aligned model; a whole model is its own.
            let target = if method == "safelora" { base } else { target };
            bench.one("copy", SHAPE, &[1.0, 2.0, 5.0, 6.0]);
            let inputs = Inputs { target, ..inputs };
            let settings = match method {
                "safelora" => Settings::default(),
                _ => Settings { rank: Some(1), ..Settings::default() },
            };
            let method = (by_name(method).unwrap().build)(&settings).unwrap();
            let out = bench.path("out");
            let job = Job {
                out: &out,
                form: Form::Merged,
                force: false,
                memory_bytes,
                algebra: &CpuEngine::new(),
                stop: &AtomicBool::new(false),
                progress: &NoProgress,
            };
            let error = recover::recover(&*method, &inputs, &job).unwrap_err();
            let RecoverError::NonFinite { file, index: 3, .. } = &error else { panic!("{error}") };
            assert!(file.ends_with("aligned/model.safetensors"), "{error}");
        }
    }
}

#[test]
fn both_outputs_go_into_a_folder_of_their_own() {
    let bench = Bench::new();
    let inputs = all(&bench);
    fs::create_dir(bench.path("out")).unwrap();
    fs::write(bench.path("out/mine"), "text").unwrap();
    let error = bench.run_as("safelora", &Settings::default(), &inputs, Form::Both, "out").unwrap_err();
    assert!(matches!(error, RecoverError::Checkpoint(CheckpointError::OutputExists { .. })), "{error}");
    fs::remove_file(bench.path("out/mine")).unwrap();
    bench.run_as("safelora", &Settings::default(), &inputs, Form::Both, "out").unwrap();
}
