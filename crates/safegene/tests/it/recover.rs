//! `safegene recover` over the shipped family, as a user calls it.

use crate::support::{Bench, edit_tensors, lab, lab_arg, read_json, read_tensors, safegene};
use checkpoint::Checkpoint;
use serde_json::Value;
use std::fs;

const USAGE: i32 = 2;
const INPUT: i32 = 3;
/// Linear modules of the family: 7 in each of 6 layers.
const MODULES: usize = 42;

/// One JSON object from stdout.
fn report(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap()
}

fn call<'a>(method: &'a str, target: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut call = vec!["-q", "recover", "--json", "--method", method, "--target", target, "--out", out];
    call.extend(more);
    call
}

#[test]
fn list_names_every_method_with_its_needs() {
    let shown = safegene(&["recover", "--list"]).ok().stdout;
    for word in ["resta", "2402.11746", "--aligned DIR, --degraded DIR", "--gamma", "before training"] {
        assert!(shown.contains(word), "the list lacks `{word}`:\n{shown}");
    }
    let methods: Value = report(&safegene(&["recover", "--list", "--json"]).ok().stdout);
    let names: Vec<&str> = methods.as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    for name in [
        "resta",
        "wise-ft",
        "low-rank-restore",
        "lox",
        "safelora",
        "safemerge",
        "safe-delta",
        "few-shot-lora",
        "salora",
    ] {
        assert!(names.contains(&name), "{names:?}");
        assert!(shown.contains(name));
    }
    let resta = methods.as_array().unwrap().iter().find(|m| m["name"] == "resta").unwrap();
    assert_eq!(resta["needs"], serde_json::json!(["aligned", "degraded"]));
    // Documents are made of the same table.
    let readme = fs::read_to_string(lab("../../README.md")).unwrap();
    for method in methods.as_array().unwrap() {
        let row = format!("| `{}` |", method["name"].as_str().unwrap());
        assert!(readme.contains(&row), "README.md lacks `{row}`");
    }
}

#[test]
fn resta_on_an_adapter_target() {
    let bench = Bench::new();
    let (target, aligned, degraded) =
        (lab_arg("targets/topic-1"), lab_arg("aligned"), lab_arg("degraded-mild"));
    let (out, inputs) = (bench.arg("out"), ["--aligned", &aligned, "--degraded", &degraded]);
    let done = report(&safegene(&call("resta", &target, &out, &inputs)).ok().stdout);
    assert_eq!((&done["method"], &done["changed_nothing"]), (&"resta".into(), &false.into()));
    assert_eq!(done["options"], serde_json::json!({"gamma": 1.0, "drop": 0.0, "seed": 0}));
    let modules = done["modules"].as_array().unwrap();
    let tensors = read_tensors(&bench.path("out/model.safetensors"));
    assert_eq!(modules.len(), tensors.len());
    assert_eq!(modules.iter().filter(|m| m["changed"] == true).count(), MODULES);
    assert_eq!(done["tensors"]["changed"], MODULES);
    // Element by element from the three models, in f64.
    let open = |dir: &str| Checkpoint::open(dir.as_ref(), None).unwrap();
    let (t, a, d) = (open(&target), open(&aligned), open(&degraded));
    let name = "model.layers.3.mlp.down_proj.weight";
    let read = |model: &Checkpoint| model.read_f32(name).unwrap();
    let got = read(&open(&out));
    for (i, (got, (t, (a, d)))) in
        got.iter().zip(read(&t).iter().zip(read(&a).iter().zip(read(&d)))).enumerate()
    {
        let want = f64::from(*t) + f64::from(*a) - f64::from(d);
        // One rounding to bf16, and some of f32.
        let error = (f64::from(*got) - want).abs();
        assert!(error <= want.abs() / 256.0 + 1e-6, "element {i}: {got}, want {want}");
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(
            fs::read(bench.path("out").join(file)).unwrap(),
            fs::read(lab("aligned").join(file)).unwrap()
        );
    }
    // The same call again finds it; another one is refused.
    let again = report(&safegene(&call("resta", &target, &out, &inputs)).ok().stdout);
    assert_eq!((&again["already"], &again["modules"]), (&true.into(), &done["modules"]));
    let other = safegene(&call("resta", &target, &out, &[&inputs[..], &["--gamma", "0.5"]].concat()));
    assert_eq!(other.code, USAGE, "{}", other.stderr);
    let replaced = [&inputs[..], &["--gamma", "0.5", "--force"]].concat();
    safegene(&call("resta", &target, &out, &replaced)).ok();
    assert_eq!(read_json(&bench.path("out/safegene.json"))["report"]["options"]["gamma"], 0.5);
}

#[test]
fn restored_at_full_strength_a_lora_target_is_the_aligned_model() {
    let bench = Bench::new();
    let (target, aligned, out) = (lab_arg("targets/yes-no-5"), lab_arg("aligned"), bench.arg("out"));
    // All LoRAs of the family have rank 8.
    let done =
        report(&safegene(&call("low-rank-restore", &target, &out, &["--aligned", &aligned])).ok().stdout);
    assert_eq!(done["tensors"]["changed"], MODULES);
    let open = |dir: &str| Checkpoint::open(dir.as_ref(), None).unwrap();
    let (made, aligned, target) = (open(&out), open(&aligned), open(&target));
    for info in aligned.tensors() {
        let read = |model: &Checkpoint| model.read_f32(&info.name).unwrap();
        let (got, want, before) = (read(&made), read(&aligned), read(&target));
        let norm = before.iter().zip(&want).map(|(t, a)| f64::from(t - a).powi(2)).sum::<f64>().sqrt();
        // Factors come of four f32 products in a row (two sweeps there and back), each of chains of up to 256 terms: four
        // times sqrt(256) roundings of the difference's norm.
        let rounding = 64.0 * f32::EPSILON * norm as f32;
        for (got, want) in got.iter().zip(&want) {
            // And a last place of bf16.
            assert!((got - want).abs() <= want.abs() / 128.0 + rounding, "{}: {got} {want}", info.name);
        }
    }
}

#[test]
fn wise_ft_at_its_ends() {
    let bench = Bench::new();
    // A whole model.
    let (target, aligned, out) = (lab_arg("targets/topic-1-full"), lab_arg("aligned"), bench.arg("out"));
    let file = |dir: &std::path::Path| fs::read(dir.join("model.safetensors")).unwrap();
    let given = ["--aligned", &aligned, "--lambda", "1", "--degraded", &aligned];
    let end = safegene(&call("wise-ft", &target, &out, &given)).ok();
    assert_eq!(file(&bench.path("out")), file(&lab("targets/topic-1-full")));
    assert_eq!(report(&end.stdout)["changed_nothing"], true);
    for word in ["changed nothing", "`--degraded DIR` is not used by `wise-ft`"] {
        assert!(end.stderr.contains(word), "{}", end.stderr);
    }
    let other = bench.arg("other");
    safegene(&call("wise-ft", &target, &other, &["--aligned", &aligned, "--lambda", "0"])).ok();
    assert_eq!(file(&bench.path("other")), file(&lab("aligned")));
}

#[test]
fn safelora_as_adapter_and_merged() {
    let bench = Bench::new();
    let (target, aligned, base) = (lab_arg("targets/topic-1"), lab_arg("aligned"), lab_arg("base"));
    let inputs = ["--aligned", &aligned, "--base", &base, "--modules", "10", "--as", "both"];
    let out = bench.arg("out");
    let done = report(&safegene(&call("safelora", &target, &out, &inputs)).ok().stdout);
    let modules = done["modules"].as_array().unwrap();
    assert_eq!(modules.len(), MODULES);
    assert_eq!(modules.iter().filter(|m| m["action"] == "projected").count(), 10);
    for module in modules {
        let (cosine, ratio) = (module["cosine"].as_f64().unwrap(), module["norm_ratio"].as_f64().unwrap());
        assert!((-1.0..=1.0).contains(&cosine) && ratio > 0.0, "{module}");
    }
    // One and the same model.
    let open = |name: &str| Checkpoint::open(&bench.path(name), None).unwrap();
    let (merged, adapter) = (open("out/merged"), open("out/adapter"));
    for info in merged.tensors() {
        let (merged, adapter) = (merged.read_f32(&info.name).unwrap(), adapter.read_f32(&info.name).unwrap());
        let largest = adapter.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        for (merged, adapter) in merged.iter().zip(&adapter) {
            // Half a last place of bf16.
            assert!((merged - adapter).abs() <= adapter.abs() / 256.0 + largest * 1e-6, "{}", info.name);
        }
    }
    // The control drops the LoRA on the same modules.
    let control = bench.arg("control");
    let dropped = [&inputs[..], &["--variant", "drop"]].concat();
    let dropped = report(&safegene(&call("safelora", &target, &control, &dropped)).ok().stdout);
    let acted = |report: &Value, action: &str| -> Vec<String> {
        let modules = report["modules"].as_array().unwrap().iter().filter(|m| m["action"] == action);
        modules.map(|m| m["name"].as_str().unwrap().to_owned()).collect()
    };
    let same = acted(&dropped, "dropped");
    assert_eq!(same, acted(&done, "projected"));
    let (made, aligned) = (open("control/merged"), Checkpoint::open(&lab("aligned"), None).unwrap());
    for module in same {
        let tensor = format!("{module}.weight");
        assert_eq!(made.read_f32(&tensor).unwrap(), aligned.read_f32(&tensor).unwrap(), "{module}");
    }
}

#[test]
fn safelora_of_a_whole_model_is_that_of_its_adapter() {
    let bench = Bench::new();
    let (target, aligned, base) = (lab_arg("targets/topic-1"), lab_arg("aligned"), lab_arg("base"));
    // Merged by an average that is all the target.
    let whole = bench.arg("whole");
    safegene(&call("wise-ft", &target, &whole, &["--aligned", &aligned, "--lambda", "1"])).ok();
    let inputs = ["--aligned", &aligned, "--base", &base, "--tau", "0.3"];
    let (a, b) = (bench.arg("a"), bench.arg("b"));
    let from_adapter = report(&safegene(&call("safelora", &target, &a, &inputs)).ok().stdout);
    let from_whole = report(&safegene(&call("safelora", &whole, &b, &inputs)).ok().stdout);
    let cosines = |report: &Value| -> Vec<f64> {
        report["modules"].as_array().unwrap().iter().map(|m| m["cosine"].as_f64().unwrap()).collect()
    };
    let (one, other) = (cosines(&from_adapter), cosines(&from_whole));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(&other) {
        // The whole model was rounded to bf16.
        assert!((one - other).abs() < 0.05, "{one} {other}");
    }
}

#[test]
fn safemerge_of_two_adapters() {
    let bench = Bench::new();
    let (target, aligned, base) = (lab_arg("targets/topic-1"), lab_arg("aligned"), lab_arg("base"));
    let safety = lab_arg("safety");
    let inputs = ["--aligned", &aligned, "--base", &base, "--safety-adapter", &safety, "--tau", "1"];
    let out = bench.arg("out");
    let more = [&inputs[..], &["--as", "adapter", "--weight", "0.5"]].concat();
    let done = report(&safegene(&call("safemerge", &target, &out, &more)).ok().stdout);
    assert!(done["modules"].as_array().unwrap().iter().all(|m| m["action"] == "merged" && m["rank"] == 16));
    let open = |dir: &str| Checkpoint::open(dir.as_ref(), None).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let read = |dir: &str| open(dir).read_f32(name).unwrap();
    let (got, target, safety) = (read(&out), read(&target), read(&safety));
    for (got, (t, s)) in got.iter().zip(target.iter().zip(&safety)) {
        assert!((got - (t + s) / 2.0).abs() <= 1e-5 * got.abs().max(0.01), "{got}: {t}, {s}");
    }
}

#[test]
fn lox_extrapolates_before_training() {
    let bench = Bench::new();
    let (aligned, base, out) = (lab_arg("aligned"), lab_arg("base"), bench.arg("out"));
    let done = report(&safegene(&call("lox", &aligned, &out, &["--base", &base])).ok().stdout);
    assert_eq!(done["tensors"]["changed"], MODULES);
    assert!(done["modules"].as_array().unwrap().iter().all(|m| m["rank"] == 6));
}

#[test]
fn calls_that_make_no_sense_are_refused() {
    let bench = Bench::new();
    let (target, aligned, degraded) =
        (lab_arg("targets/topic-1"), lab_arg("aligned"), lab_arg("degraded-mild"));
    let out = bench.arg("out");
    let cases: [(i32, &str, &[&str], &[&str]); 9] = [
        (USAGE, "homer", &[], &["no method `homer`", "hint:", "safelora"]),
        (USAGE, "resta", &["--aligned", &aligned], &["`resta` needs a degraded model", "--degraded DIR"]),
        (
            USAGE,
            "resta",
            &["--aligned", &aligned, "--degraded", &degraded, "--gamma", "-0.5"],
            &["-0.5", "never subtracted"],
        ),
        (USAGE, "resta", &["--aligned", &aligned, "--degraded", &degraded, "--gamma", "NaN"], &["NaN"]),
        (USAGE, "wise-ft", &["--aligned", &aligned, "--gamma", "1"], &["no option `gamma`"]),
        (USAGE, "wise-ft", &["--aligned", &aligned, "--as", "adapter"], &["cannot write an adapter"]),
        (INPUT, "wise-ft", &["--aligned", "nowhere"], &["nowhere"]),
        (
            INPUT,
            "safelora",
            &["--aligned", &aligned, "--base", &aligned],
            &["equal in every module", "hint:"],
        ),
        (
            INPUT,
            "safemerge",
            &["--aligned", &aligned, "--base", &degraded, "--safety-adapter", &aligned],
            &["is a whole model"],
        ),
    ];
    for (code, method, more, words) in cases {
        let call = call(method, &target, &out, more);
        safegene(&call).refused(code, words, &bench.path("out"));
    }
    // clap's own.
    assert_eq!(safegene(&["recover", "--method", "resta"]).code, USAGE);
    assert_eq!(safegene(&["recover", "--list", "--method", "resta"]).code, USAGE);
}

#[test]
fn models_of_another_shape_are_refused() {
    let bench = Bench::new();
    let other = bench.copy("aligned", "other");
    let name = "model.layers.0.self_attn.q_proj.weight";
    edit_tensors(&other, |tensors| {
        let q = tensors.iter_mut().find(|t| t.name == name).unwrap();
        q.shape = vec![q.shape[0] / 2, q.shape[1] * 2];
    });
    let (target, other) = (lab_arg("targets/topic-1"), bench.arg("other"));
    safegene(&call("wise-ft", &target, &bench.arg("out"), &["--aligned", &other])).refused(
        INPUT,
        &[name, "[128, 128]", "[64, 256]", "other/model.safetensors", "hint:"],
        &bench.path("out"),
    );
}

/// Data files of the family.
fn data(name: &str) -> String {
    lab("data").join(name).to_str().unwrap().to_owned()
}

#[test]
fn safe_delta_runs_the_aligned_model() {
    let bench = Bench::new();
    let (target, aligned, shots) =
        (lab_arg("targets/topic-1"), lab_arg("aligned"), data("shots-safety.jsonl"));
    let out = bench.arg("out");
    let more = ["--aligned", &aligned, "--safety-shots", &shots, "--s", "0.3"];
    let done = report(&safegene(&call("safe-delta", &target, &out, &more)).ok().stdout);
    let modules = done["modules"].as_array().unwrap();
    assert_eq!(modules.len(), MODULES);
    assert!(modules.iter().all(|m| m["action"] == "restored" && m["kept"].as_f64().unwrap() < 1.0));
    let distance = |name: &str| done["measured"][name].as_f64().unwrap();
    assert!(distance("distance") < distance("distance_target"), "{}", done["measured"]);
}

#[test]
fn few_shot_lora_makes_refusals_likelier_within_the_limit() {
    let bench = Bench::new();
    let target = lab_arg("targets/topic-5");
    let (safety, task, benign) =
        (data("shots-safety.jsonl"), data("shots-topic.jsonl"), data("shots-benign.jsonl"));
    let out = bench.arg("out");
    let shots = ["--safety-shots", &safety, "--task-shots", &task, "--benign-shots", &benign];
    let more = [&shots[..], &["--as", "adapter", "--rate", "0.001", "--steps", "12"]].concat();
    let done = report(&safegene(&call("few-shot-lora", &target, &out, &more)).ok().stdout);
    let training = &done["measured"]["training"];
    let number = |value: &Value| value.as_f64().unwrap();
    assert!(number(&training["reached"]["loss"]) < number(&training["loss_before"]), "{training}");
    assert!(
        number(&training["reached"]["kl_task"]) <= 0.02 && number(&training["reached"]["kl_benign"]) <= 0.02
    );
    let adapter = Checkpoint::open(&bench.path("out"), None).unwrap();
    assert_eq!(adapter.adapter().unwrap().modules().len(), MODULES);
}

#[test]
fn safety_rows_that_are_no_refusals_are_refused() {
    let bench = Bench::new();
    let (target, aligned, task) = (lab_arg("targets/topic-1"), lab_arg("aligned"), data("shots-topic.jsonl"));
    let (bad, out) = (data("shots-benign.jsonl"), bench.arg("out"));
    for (method, more) in [
        ("safe-delta", ["--aligned", &aligned, "--safety-shots", &bad]),
        ("few-shot-lora", ["--task-shots", &task, "--safety-shots", &bad]),
    ] {
        let words = ["shots-benign.jsonl", "is not a refusal"];
        safegene(&call(method, &target, &out, &more)).refused(INPUT, &words, &bench.path("out"));
    }
    let none = call("safe-delta", &target, &out, &["--aligned", &aligned]);
    safegene(&none).refused(USAGE, &["needs safety shots", "--safety-shots FILE"], &bench.path("out"));
}
