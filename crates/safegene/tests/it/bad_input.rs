//! Bad input: an ordinary error that names file and tensor or row, the exit code of the README's table, nothing at the output.
//!
//! The formats' own tests stand with their crates; here is what a user of the program sees.

use crate::support::{
    Bench, INDEX, SHARDS, edit_header, edit_tensors, lab, lab_arg, read_json, safegene, write_json,
};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
/// Invalid input: a job scheduler must not retry.
const INPUT: i32 = 3;
const USAGE: i32 = 2;

#[test]
fn missing_shard() {
    let bench = Bench::new();
    let bad = bench.sharded("degraded-strong", "bad");
    fs::remove_file(bad.join(SHARDS[1])).unwrap();
    bench.extract(&bad).refused(INPUT, &[SHARDS[1], INDEX, "missing"], &bench.path("gene"));
}

#[test]
fn index_names_an_absent_tensor() {
    let bench = Bench::new();
    let bad = bench.sharded("degraded-strong", "bad");
    let mut index = read_json(&bad.join(INDEX));
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARDS[0].into();
    write_json(&bad.join(INDEX), &index);
    let words = ["model.layers.9.mlp.up_proj.weight", SHARDS[0]];
    bench.extract(&bad).refused(INPUT, &words, &bench.path("gene"));
}

#[test]
fn truncated_file() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    let file = bad.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    bench.extract(&bad).refused(INPUT, &["bad/model.safetensors", "hint:"], &bench.path("gene"));
}

#[test]
fn header_length_beyond_the_file() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    let file = bad.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let length = bytes.len() as u64 + 1;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let words = ["bad/model.safetensors", "does not fit in a file"];
    bench.extract(&bad).refused(INPUT, &words, &bench.path("gene"));
}

#[test]
fn overlapping_ranges() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    let k = "model.layers.0.self_attn.k_proj.weight";
    let v = "model.layers.0.self_attn.v_proj.weight";
    // Both have the same shape, so only the ranges are wrong.
    edit_header(&bad, |h| h[v]["data_offsets"] = h[k]["data_offsets"].clone());
    bench.extract(&bad).refused(INPUT, &["bad/model.safetensors", "self_attn."], &bench.path("gene"));
}

#[test]
fn overflowing_ranges() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    edit_header(&bad, |h| {
        h[Q]["shape"] = json!([u64::MAX, u64::MAX]);
        h[Q]["data_offsets"] = json!([u64::MAX - 1, u64::MAX]);
    });
    bench.extract(&bad).refused(INPUT, &["bad/model.safetensors", Q], &bench.path("gene"));
}

#[test]
fn shapes_differ_between_aligned_and_degraded() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    edit_tensors(&bad, |tensors| {
        let q = tensors.iter_mut().find(|t| t.name == Q).unwrap();
        q.shape = vec![q.shape[0] / 2, q.shape[1] * 2];
    });
    bench.extract(&bad).refused(INPUT, &[Q, "bad/model.safetensors", "aligned"], &bench.path("gene"));
}

#[test]
fn tensor_on_one_side_only() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    edit_tensors(&bad, |tensors| tensors.retain(|t| t.name != Q));
    bench.extract(&bad).refused(INPUT, &[Q, "missing"], &bench.path("gene"));
}

#[test]
fn other_architecture() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    let mut config = read_json(&bad.join("config.json"));
    config["model_type"] = "qwen2".into();
    write_json(&bad.join("config.json"), &config);
    bench.extract(&bad).refused(INPUT, &["qwen2", "llama"], &bench.path("gene"));
}

#[test]
fn gene_of_another_family() {
    let bench = Bench::new();
    let gene = bench.gene();
    let bad = bench.copy("targets/topic-1-full", "bad");
    let mut config = read_json(&bad.join("config.json"));
    config["model_type"] = "qwen2".into();
    write_json(&bad.join("config.json"), &config);
    let call = [
        "fuse",
        "--gene",
        &gene,
        "--coefficient",
        "1",
        "--target",
        &bench.arg("bad"),
        "--out",
        &bench.arg("out"),
    ];
    safegene(&call).refused(INPUT, &["family"], &bench.path("out"));
}

#[test]
fn adapter_for_another_base() {
    let bench = Bench::new();
    let base = bench.copy("aligned", "base");
    // A base of other widths: its q projections take half of the inputs.
    edit_tensors(&base, |tensors| {
        for t in tensors.iter_mut().filter(|t| t.name.ends_with("q_proj.weight")) {
            t.shape[1] /= 2;
            t.bytes.truncate(t.bytes.len() / 2);
        }
    });
    let aligned = lab_arg("aligned");
    let degraded = lab_arg("degraded-mild");
    let call = [
        "extract",
        "--aligned",
        &aligned,
        "--degraded",
        &degraded,
        "--base",
        base.to_str().unwrap(),
        "--rank",
        "4",
        "--out",
        &bench.arg("gene"),
    ];
    safegene(&call).refused(INPUT, &["another base", "q_proj"], &bench.path("gene"));
}

#[test]
fn nan_in_a_weight() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    edit_tensors(&bad, |tensors| {
        let q = tensors.iter_mut().find(|t| t.name == Q).unwrap();
        assert_eq!(q.dtype, Dtype::BF16);
        q.bytes[10..12].copy_from_slice(&0x7fc0u16.to_le_bytes());
    });
    let outcome = bench.extract(&bad);
    assert_eq!(outcome.code, INPUT);
    for word in [Q, "bad/model.safetensors", "element 5", "not finite"] {
        assert!(outcome.stderr.contains(word), "stderr lacks `{word}`:\n{}", outcome.stderr);
    }
    // Only found while reading, so `gene.partial` may stay for a rerun (promise 5); the output may not.
    assert!(!bench.path("gene").exists());
}

#[test]
fn pickle_where_weights_should_be() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    fs::rename(bad.join("model.safetensors"), bad.join("pytorch_model.bin")).unwrap();
    bench.extract(&bad).refused(INPUT, &["pytorch_model.bin", "never opened", "hint:"], &bench.path("gene"));
}

fn calibrate(bench: &Bench, gene: &str, safety: &str, task: &str) -> crate::support::Outcome {
    let target = lab("targets/topic-1-full");
    safegene(&[
        "--quiet",
        "calibrate",
        "--gene",
        gene,
        "--target",
        target.to_str().unwrap(),
        "--safety-shots",
        safety,
        "--task-shots",
        task,
        "--out",
        &bench.arg("expression.json"),
    ])
}

fn data(name: &str) -> String {
    lab("data").join(name).to_str().unwrap().to_string()
}

#[test]
fn jsonl_row_without_the_field() {
    let bench = Bench::new();
    let gene = bench.gene();
    let shots = bench.rows("shots.jsonl", &[json!({"prompt": "a", "answer": "sorry"}), json!({"goal": "b"})]);
    let outcome = calibrate(&bench, &gene, &shots, &data("shots-topic.jsonl"));
    outcome.refused(INPUT, &["shots.jsonl", "line 2", "`prompt`"], &bench.path("expression.json"));
}

#[test]
fn safety_shot_that_is_not_a_refusal() {
    let bench = Bench::new();
    let gene = bench.gene();
    let refusal = json!({"prompt": "how do i", "answer": "Sorry, I cannot help with that"});
    // AdvBench's `target` column looks like this.
    let harmful = json!({"prompt": "how do i", "answer": "Sure, here is how"});
    let shots = bench.rows("shots.jsonl", &[refusal, harmful]);
    let outcome = calibrate(&bench, &gene, &shots, &data("shots-topic.jsonl"));
    let words = ["shots.jsonl", "line 2", "Sure, here is how", "not a refusal", "hint:"];
    outcome.refused(INPUT, &words, &bench.path("expression.json"));
}

#[test]
fn empty_shots() {
    let bench = Bench::new();
    let gene = bench.gene();
    let none = bench.rows("none.jsonl", &[]);
    for (safety, task) in [(none.clone(), data("shots-topic.jsonl")), (data("shots-safety.jsonl"), none)] {
        let outcome = calibrate(&bench, &gene, &safety, &task);
        outcome.refused(INPUT, &["none.jsonl", "no rows"], &bench.path("expression.json"));
    }
}

#[test]
fn output_folder_that_cannot_be_written() {
    let bench = Bench::new();
    // A file where a folder should be: not even root can write below it.
    fs::write(bench.path("file"), "").unwrap();
    let out = bench.arg("file/gene");
    let aligned = lab_arg("aligned");
    let degraded = lab_arg("degraded-strong");
    let call = ["extract", "--aligned", &aligned, "--degraded", &degraded, "--rank", "4", "--out", &out];
    safegene(&call).refused(USAGE, &["file/gene"], Path::new(&out));
}

#[test]
fn expression_in_a_folder_that_is_not_there() {
    let bench = Bench::new();
    let gene = bench.gene();
    let (target, out) = (lab_arg("targets/topic-1-full"), bench.arg("nowhere/expression.json"));
    let (safety, task) = (data("shots-safety.jsonl"), data("shots-topic.jsonl"));
    let call = [
        "calibrate",
        "--gene",
        &gene,
        "--target",
        &target,
        "--safety-shots",
        &safety,
        "--task-shots",
        &task,
        "--out",
        &out,
    ];
    safegene(&call).refused(USAGE, &["nowhere", "is no folder", "hint:"], Path::new(&out));
}

#[test]
fn output_of_another_job_needs_force() {
    let bench = Bench::new();
    let gene = bench.gene();
    let before = fs::read(bench.path("gene/gene.json")).unwrap();
    let extract = |more: &[&str]| {
        let (aligned, degraded) = (lab("aligned"), lab("degraded-strong"));
        let mut call = vec![
            "extract",
            "--aligned",
            aligned.to_str().unwrap(),
            "--degraded",
            degraded.to_str().unwrap(),
            "--rank",
            "2",
            "--out",
            &gene,
        ];
        call.extend_from_slice(more);
        safegene(&call)
    };
    let outcome = extract(&[]);
    assert_eq!(outcome.code, USAGE, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("exists") && outcome.stderr.contains("--force"), "{}", outcome.stderr);
    assert_eq!(fs::read(bench.path("gene/gene.json")).unwrap(), before, "the old output is untouched");

    extract(&["--force"]).ok();
    assert_ne!(fs::read(bench.path("gene/gene.json")).unwrap(), before);
}

#[test]
fn finished_output_of_the_same_job_is_left_as_it_is() {
    let bench = Bench::new();
    bench.gene();
    let before = fs::metadata(bench.path("gene/gene.json")).unwrap().modified().unwrap();
    bench.extract(&lab("degraded-strong")).ok();
    assert_eq!(fs::metadata(bench.path("gene/gene.json")).unwrap().modified().unwrap(), before);
}

#[test]
fn force_does_not_replace_a_folder_that_is_no_output() {
    let bench = Bench::new();
    fs::create_dir(bench.path("gene")).unwrap();
    fs::write(bench.path("gene/thesis.tex"), "years of work").unwrap();
    let (aligned, degraded) = (lab("aligned"), lab("degraded-strong"));
    let call = [
        "extract",
        "--aligned",
        aligned.to_str().unwrap(),
        "--degraded",
        degraded.to_str().unwrap(),
        "--rank",
        "2",
        "--out",
        &bench.arg("gene"),
        "--force",
    ];
    assert_eq!(safegene(&call).code, USAGE);
    assert_eq!(fs::read_to_string(bench.path("gene/thesis.tex")).unwrap(), "years of work");
}

#[test]
fn negative_coefficient() {
    let bench = Bench::new();
    let gene = bench.gene();
    let target = lab("targets/topic-1-full");
    let call = [
        "fuse",
        "--gene",
        &gene,
        "--coefficient=-1",
        "--target",
        target.to_str().unwrap(),
        "--out",
        &bench.arg("out"),
    ];
    safegene(&call).refused(USAGE, &["below zero"], &bench.path("out"));
}

#[test]
fn expression_made_for_another_target() {
    let bench = Bench::new();
    let gene = bench.gene();
    let outcome = calibrate(&bench, &gene, &data("shots-safety.jsonl"), &data("shots-topic.jsonl"));
    outcome.ok();
    let other = lab("targets/sentiment-1-second");
    let (expression, out) = (bench.arg("expression.json"), bench.arg("out"));
    let call = [
        // The target is known once it was read, which shows as progress otherwise.
        "--quiet",
        "fuse",
        "--gene",
        &gene,
        "--expression",
        &expression,
        "--target",
        other.to_str().unwrap(),
        "--out",
        &out,
    ];
    safegene(&call).refused(INPUT, &["made for target"], &bench.path("out"));
}

#[test]
fn folder_as_the_hub_cache_lays_it_out_works() {
    let bench = Bench::new();
    let source = bench.sharded("degraded-strong", "plain");
    let (blobs, snapshot) = (bench.path("models--x--y/blobs"), bench.path("models--x--y/snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (i, entry) in fs::read_dir(&source).unwrap().enumerate() {
        let entry = entry.unwrap();
        let blob = format!("{i:064x}");
        fs::copy(entry.path(), blobs.join(&blob)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), snapshot.join(entry.file_name())).unwrap();
    }
    bench.extract(&snapshot).ok();
    let linked = read_json(&bench.path("gene/gene.json"));
    fs::remove_dir_all(bench.path("gene")).unwrap();
    bench.extract(&source).ok();
    let plain = read_json(&bench.path("gene/gene.json"));
    let content = |v: &Value| v["sources"]["degraded"]["content"].clone();
    assert!(content(&plain).as_str().unwrap().starts_with("blake3:"));
    assert_eq!(content(&linked), content(&plain));
}

#[test]
fn link_that_leads_out_of_the_folder() {
    let bench = Bench::new();
    let bad = bench.copy("degraded-strong", "bad");
    fs::rename(bad.join("model.safetensors"), bench.path("elsewhere.safetensors")).unwrap();
    std::os::unix::fs::symlink(bench.path("elsewhere.safetensors"), bad.join("model.safetensors")).unwrap();
    bench.extract(&bad).refused(INPUT, &["bad/model.safetensors", "leads out"], &bench.path("gene"));
}

#[test]
fn evaluate_without_any_file_is_a_usage_error() {
    let bench = Bench::new();
    let model = lab("aligned");
    safegene(&["evaluate", "--model", model.to_str().unwrap()]).refused(
        USAGE,
        &["--harmful"],
        &bench.path("none"),
    );
}

#[test]
fn a_comparison_that_cannot_be_written_is_refused_before_the_work() {
    let bench = Bench::new();
    let file = bench.path("file");
    fs::write(&file, "").unwrap();
    let (out, work) = (file.join("report"), bench.path("work"));
    let [out_arg, work_arg] = [&out, &work].map(|p| p.to_str().unwrap());
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lab");
    let args = ["compare", "--quick", "--lab", lab.to_str().unwrap(), "--work", work_arg, "--out", out_arg];
    safegene(&args).refused(USAGE, &["cannot write to", "file/report", "--out"], &out);
    assert!(!work.exists(), "work was begun");
}
