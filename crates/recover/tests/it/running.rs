//! Methods that run a model, on folders: they do what their functions do, and write it as the others write.

use checkpoint::{Checkpoint, Dtype, pack_f32, widen_f32};
use recover::few_shot::{self, few_shot};
use recover::safe_delta::{Options, Variant, safe_delta};
use recover::{
    Action, Form, Inputs, ModuleFactors, Positions, RecoverError, Settings, Shot, Shots, grams, salora,
};
use serde_json::json;
use transformer::{Attachments, Chat, Model, Row};

use crate::decoder::{folder, product, shots};
use crate::support::{Bench, inputs, weight};

const Q1: &str = "model.layers.1.self_attn.q_proj";
const NORM1: &str = "model.layers.1.input_layernorm.weight";

fn some() -> Settings {
    Settings::default()
}

/// An aligned model, a target that moved from it, and rows.
fn all(bench: &Bench) -> Inputs {
    Inputs {
        aligned: Some(folder(bench, "aligned", 0.0, 0)),
        shots: Shots { safety: shots(1, 6), task: shots(2, 5), benign: shots(3, 4) },
        ..inputs(&folder(bench, "target", 0.2, 50))
    }
}

fn open(bench: &Bench, dir: &str) -> (Checkpoint, Model, Chat) {
    let checkpoint = Checkpoint::open(&bench.path(dir), None).unwrap();
    let (model, chat) = (Model::open(&checkpoint).unwrap(), Chat::of(&checkpoint).unwrap());
    (checkpoint, model, chat)
}

fn rows(chat: &Chat, shots: &[Shot]) -> Vec<Row> {
    shots.iter().map(|s| chat.row(&s.prompt, &s.answer).unwrap()).collect()
}

fn bf16(values: &[f32]) -> Vec<f32> {
    widen_f32(&pack_f32(values, Dtype::Bf16).unwrap(), Dtype::Bf16).unwrap()
}

#[test]
fn safe_delta_of_folders_is_its_function_module_by_module() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let (aligned, model, chat) = open(&bench, "aligned");
    let target = Checkpoint::open(&inputs.target, None).unwrap();
    let safety = rows(&chat, &inputs.shots.safety[..4]);
    let measured =
        grams(&model, &Attachments::none(), "safety", &safety, chat.end(), Positions::All, &|_, _| true);
    let grams = measured.unwrap();
    for (variant, s) in [(Variant::Exact, 0.3), (Variant::Published, 100.0)] {
        let out = format!("{variant:?}");
        let name = out.to_lowercase();
        let settings = Settings { s: Some(s), samples: Some(4), variant: Some(name), ..some() };
        let report = bench.run_as("safe-delta", &settings, &inputs, Form::Merged, &out).unwrap();
        assert_eq!(report.modules.len(), 14);
        assert_eq!(report.measured["safety_rows"], 4);
        let (mut kept, mut moved) = (0, 0);
        for (layer, kind) in grams.modules() {
            let module = kind.module(layer);
            let read = |side: &Checkpoint| side.read_f32(&weight(&module)).unwrap();
            let (a, t, gram) = (read(&aligned), read(&target), grams.get(layer, kind).unwrap());
            let options = Options { variant, s, ..Options::default() };
            let (want, one) = safe_delta(&module, &a, &t, a.len() / gram.width(), gram, &options).unwrap();
            assert_eq!(bench.values(&out, &weight(&module)), bf16(&want), "{module} {variant:?}");
            let got = crate::support::module(&report, &module);
            assert_eq!(got.kept, Some(one.kept as f64 / one.moved as f64), "{module}");
            assert_eq!((got.action, got.changed), (Action::Restored, true), "{module}");
            (kept, moved) = (kept + one.kept, moved + one.moved);
        }
        assert!(0 < kept && kept < moved);
        assert_eq!((&report.measured["kept"], &report.measured["moved"]), (&json!(kept), &json!(moved)));
        // Everything else is the target's.
        assert_eq!(report.tensors.kept, 7);
        assert_eq!(bench.values(&out, NORM1), target.read_f32(NORM1).unwrap());
    }
}

#[test]
fn safe_delta_at_its_ends_is_aligned_and_target() {
    let bench = Bench::new();
    let inputs = all(&bench);
    for (s, like) in [(0.0, "aligned"), (1.0, "target")] {
        let out = format!("like-{like}");
        let settings = Settings { s: Some(s), ..some() };
        let report = bench.run_as("safe-delta", &settings, &inputs, Form::Merged, &out).unwrap();
        assert_eq!(bench.values(&out, &weight(Q1)), bench.values(like, &weight(Q1)));
        assert_eq!(report.changed_nothing, like == "target");
        let q = crate::support::module(&report, Q1);
        assert_eq!((q.kept, q.action == Action::Kept), (Some(s), like == "target"));
    }
}

#[test]
fn few_shot_of_folders_is_its_function_in_every_form() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let (target, model, chat) = open(&bench, "target");
    let token_rows = few_shot::Shots {
        safety: rows(&chat, &inputs.shots.safety),
        task: rows(&chat, &inputs.shots.task),
        benign: rows(&chat, &inputs.shots.benign),
    };
    let options =
        few_shot::Options { rank: 3, rate: 1e-2, max_kl: 0.5, steps_max: 6, seed: 4, ..Default::default() };
    let want = few_shot(&model, &Attachments::none(), &token_rows, &options, chat.end()).unwrap();
    let settings = Settings {
        rank: Some(3),
        rate: Some(1e-2),
        max_kl: Some(0.5),
        steps: Some(6),
        seed: Some(4),
        ..some()
    };
    let report = bench.run_as("few-shot-lora", &settings, &inputs, Form::Both, "out").unwrap();
    assert_eq!(report.measured["training"]["reached"], json!(want.report.reached));
    assert!(want.report.reached.loss < want.report.loss_before, "nothing was learnt");
    assert_eq!((report.modules.len(), report.tensors.kept), (14, 7));
    let adapter = Checkpoint::open(&bench.path("out/adapter"), None).unwrap();
    for f in &want.factors {
        let module = f.kind.module(f.layer);
        let found = adapter.factors(&module).unwrap().unwrap();
        assert_eq!((found.rank, found.scale, &found.a, &found.b), (3, 1.0, &f.a, &f.b), "{module}");
        let stored = target.read_f32(&weight(&module)).unwrap();
        let merged = bench.values("out/merged", &weight(&module));
        for (i, (got, (w, x))) in merged.iter().zip(stored.iter().zip(product(f))).enumerate() {
            // One rounding to eight bits, and some of f32.
            let want = f64::from(*w) + x;
            assert!((f64::from(*got) - want).abs() <= want.abs() * 2f64.powi(-8) + 1e-6, "{module} {i}");
        }
        let one = crate::support::module(&report, &module);
        assert_eq!((one.action, one.rank), (Action::Added, Some(3)));
    }
    // The same again is found, not trained.
    assert!(bench.run_as("few-shot-lora", &settings, &inputs, Form::Both, "out").unwrap().already);
}

#[test]
fn few_shot_adapter_over_an_adapter_holds_both() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let first = bench.run_as(
        "few-shot-lora",
        &Settings { rate: Some(1e-2), steps: Some(3), max_kl: Some(0.5), rank: Some(2), ..some() },
        &inputs,
        Form::Adapter,
        "first",
    );
    let first = first.unwrap();
    assert_eq!((first.tensors.changed, first.tensors.kept, first.modules.len()), (28, 0, 14));
    assert!(first.change_norm > 0.0 && !first.changed_nothing);
    let over = Inputs { target: bench.path("first"), ..inputs };
    let settings = Settings { steps: Some(3), rank: Some(3), max_kl: Some(0.5), ..some() };
    let report = bench.run_as("few-shot-lora", &settings, &over, Form::Both, "second").unwrap();
    assert_eq!(report.measured["trials"].as_array().unwrap().len(), 2, "both rates are tried");
    let open = |dir: &str| Checkpoint::open(&bench.path(dir), None).unwrap();
    let (one, both, merged) = (open("first"), open("second/adapter"), open("second/merged"));
    let (a, b) = (one.factors(Q1).unwrap().unwrap(), both.factors(Q1).unwrap().unwrap());
    assert_eq!((a.rank, b.rank), (2, 5));
    assert_eq!(a.a[..], b.a[..a.a.len()]);
    let (x, y) = (both.read_f32(&weight(Q1)).unwrap(), merged.read_f32(&weight(Q1)).unwrap());
    for (x, y) in x.iter().zip(&y) {
        assert!((x - y).abs() <= x.abs() * 2f32.powi(-8) + 1e-6, "{x} {y}");
    }
}

#[test]
fn salora_of_folders_keeps_out_of_safety_and_learns_the_task() {
    let bench = Bench::new();
    let all = all(&bench);
    let inputs = Inputs { target: all.aligned.clone().unwrap(), ..all };
    let settings = Settings {
        rank: Some(2),
        safety_rank: Some(4),
        samples: Some(5),
        steps: Some(30),
        rows: Some(4),
        rate: Some(1e-2),
        seed: Some(3),
        ..some()
    };
    let report = bench.run_as("salora", &settings, &inputs, Form::Both, "out").unwrap();
    let number = |name: &str| report.measured[name].as_f64().unwrap();
    assert!(number("loss_end") < number("loss_begin"), "{:?}", report.measured);
    assert_eq!((number("safety_rows"), number("modules_without_free_directions")), (5.0, 0.0));
    assert_eq!((report.modules.len(), report.tensors.kept), (14, 7));
    // The directions of safety, by the function, from the same rows.
    let (_, model, chat) = open(&bench, "aligned");
    let sizes = salora::Settings { rank: 2, safety_rank: 4, task_rank: 4, ..Default::default() };
    let (safety, task) = (rows(&chat, &inputs.shots.safety[..5]), rows(&chat, &inputs.shots.task[..5]));
    let starts = salora::prepare(&model, &safety, &task, chat.end(), &sizes).unwrap();
    let adapter = Checkpoint::open(&bench.path("out/adapter"), None).unwrap();
    let mut largest = 0f64;
    for start in &starts {
        let module = start.kind.module(start.layer);
        let f = adapter.factors(&module).unwrap().unwrap();
        assert_eq!((f.rank, f.scale), (4, 1.0), "{module}");
        // A₀ is the second half of A, as it was at the start.
        assert_eq!(f.a[f.a.len() / 2..], start.a[..], "{module}");
        let factors = ModuleFactors { layer: start.layer, kind: start.kind, rank: 4, b: f.b, a: f.a };
        let dense = product(&factors);
        largest = dense.iter().fold(largest, |m, x| m.max(x.abs()));
        let inside = start.safety.within(&dense, factors.a.len() / 4);
        // V_s and C·B are in f32: orthogonal up to a few of its roundings of the factors' size.
        assert!(inside.iter().all(|x| x.abs() < 1e-5), "{module}");
        let one = crate::support::module(&report, &module);
        assert_eq!((one.action, one.rank), (Action::Added, Some(4)));
    }
    assert!(largest > 1e-2, "nothing was trained: {largest}");
    // The same call gives the same adapter, another order of rows another one.
    let again = |seed, out: &str| {
        let settings = Settings { seed: Some(seed), ..settings.clone() };
        bench.run_as("salora", &settings, &inputs, Form::Adapter, out).unwrap();
        std::fs::read(bench.path(out).join("adapter_model.safetensors")).unwrap()
    };
    let first = std::fs::read(bench.path("out/adapter/adapter_model.safetensors")).unwrap();
    assert!(first == again(3, "same") && first != again(4, "other"));
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_is_written() {
    let bench = Bench::new();
    let inputs = all(&bench);
    let refused = |method: &str, inputs: &Inputs, words: &[&str]| {
        let error = bench.run(method, &some(), inputs).unwrap_err();
        let mut text = error.to_string();
        let mut next = std::error::Error::source(&error);
        while let Some(cause) = next {
            text += &format!(": {cause}");
            next = cause.source();
        }
        assert!(words.iter().all(|word| text.contains(word)), "{method}: {text}");
        assert!(!bench.path("out").exists() && !bench.path("out.partial").exists());
        error
    };
    let silent =
        |rows: Vec<Shot>| Shots { safety: rows, task: inputs.shots.task.clone(), benign: Vec::new() };
    let row = Shot { prompt: "w1".into(), answer: String::new() };
    let mute = Inputs { shots: silent(vec![row]), ..inputs.clone() };
    refused("safe-delta", &mute, &["aligned", "the answer encodes to no token"]);
    refused("few-shot-lora", &mute, &["target", "the answer encodes to no token"]);
    refused("salora", &mute, &["target", "the answer encodes to no token"]);
    let error = bench.run_as("safe-delta", &some(), &inputs, Form::Adapter, "out").unwrap_err();
    assert!(matches!(error, RecoverError::NoAdapter { of_model: false, .. }));
    for method in ["safe-delta", "few-shot-lora"] {
        let dir = if method == "safe-delta" { "aligned" } else { "target" };
        std::fs::remove_file(bench.path(dir).join("tokenizer.json")).unwrap();
        let error = refused(method, &inputs, &[dir, "tokenizer.json"]);
        assert!(error.hint().unwrap().contains("chat template"));
    }
}

#[test]
fn training_stops_when_told_to() {
    let bench = Bench::new();
    let (_, model, chat) = {
        all(&bench);
        open(&bench, "target")
    };
    let token_rows = few_shot::Shots {
        safety: rows(&chat, &shots(1, 2)),
        task: rows(&chat, &shots(2, 2)),
        benign: Vec::new(),
    };
    let mut asked = 0;
    let mut go_on = |steps: usize| {
        asked += 1;
        steps < 2
    };
    let options = few_shot::Options::default();
    let none = Attachments::none();
    let error = few_shot::few_shot_while(&model, &none, &token_rows, &options, chat.end(), &mut go_on);
    assert!(matches!(error, Err(recover::RunError::Stopped)));
    assert_eq!(asked, 3);
}
