//! distill, select and calibrate as a user calls them, on the shipped family.

use crate::support::{Bench, Outcome, lab, lab_arg, read_json, safegene};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn data(name: &str) -> String {
    lab_arg(&format!("data/{name}.jsonl"))
}

/// A call of `distill` on two drifts with few steps, and what is added to it.
fn distill(bench: &Bench, more: &[&str]) -> Outcome {
    let (aligned, safety, benign) = (lab_arg("aligned"), data("distill-safety"), data("distill-benign"));
    let (a, b) = (lab_arg("drifts/count"), lab_arg("drifts/larger"));
    let (ka, kb, out) = (data("train-count"), data("train-larger"), bench.arg("gene"));
    let mut call = vec!["distill", "--aligned", &aligned, "--degraded", &a, "--keep", &ka, "--degraded", &b];
    call.extend(["--keep", &kb, "--safety", &safety, "--benign", &benign, "--rank", "4", "--out", &out]);
    call.extend(["--new-tokens", "8"]);
    call.extend(more);
    safegene(&call)
}

#[test]
fn gene_is_distilled_selected_calibrated_and_expressed() {
    let bench = Bench::new();
    let done = distill(&bench, &["--steps", "16", "--rows", "8", "--rate", "0.003", "--json"]).ok();
    let said: Value = serde_json::from_str(&done.stdout).unwrap();
    let (start, end) = (said["loss_start"].as_f64().unwrap(), said["loss_end"].as_f64().unwrap());
    assert!(end < 0.5 * start, "held-out loss {start} to {end}");
    assert!(done.stderr.contains("1 copy of weights"), "adapters share their base:\n{}", done.stderr);
    let again = distill(&bench, &["--steps", "16", "--rows", "8", "--rate", "0.003"]).ok();
    assert!(again.stderr.contains("there already"), "{}", again.stderr);
    let other = distill(&bench, &["--steps", "17", "--rows", "8"]);
    assert_eq!(other.code, 2, "{}", other.stderr);
    let manifest = read_json(&bench.path("gene/gene.json"));
    assert_eq!(manifest["sources"]["drifts"].as_array().unwrap().len(), 2);
    assert!(manifest["distilled"]["end"]["safety"].is_number());

    // It is no difference of two checkpoints, and says so.
    let gene = bench.arg("gene");
    safegene(&["verify", "--gene", &gene]).ok();
    let (aligned, drift) = (lab_arg("aligned"), lab_arg("drifts/count"));
    let pair = safegene(&["verify", "--gene", &gene, "--aligned", &aligned, "--degraded", &drift]);
    assert!(pair.code == 2 && pair.stderr.contains("was distilled"), "{}", pair.stderr);
    let said = safegene(&["inspect", &gene]).ok().stdout;
    assert!(said.contains("distilled on 2 drifts") && !said.contains("of the difference"), "{said}");

    // Selection keeps half of the layers, and says of all what they score.
    let (gene, some) = (bench.arg("gene"), bench.arg("some"));
    let (model, harmful, benign) = (lab_arg("targets/topic-1"), data("shots-safety"), data("shots-benign"));
    let select = |more: &[&str]| {
        let mut call = vec!["select", "--gene", &gene, "--model", &model, "--harmful", &harmful];
        call.extend(["--benign", &benign, "--out", &some]);
        call.extend(more);
        safegene(&call)
    };
    let chart = select(&["--top", "3"]).ok();
    assert_eq!(chart.stdout.lines().count(), 7, "{}", chart.stdout);
    assert_eq!(chart.stdout.matches('*').count(), 3, "{}", chart.stdout);
    assert_eq!(safegene(&["inspect", &some]).ok().stdout.matches("kept").count(), 3);
    let layers = read_json(&bench.path("some/gene.json"))["layers"].clone();
    let selected = layers.as_array().unwrap().iter().filter(|l| l["selected"] == true).count();
    assert_eq!((layers.as_array().unwrap().len(), selected), (6, 3));
    assert!(layers[0]["scores"]["insertion"].is_number());
    assert!(select(&["--top", "3"]).ok().stderr.contains("there already"));
    assert_eq!(select(&["--top", "2"]).code, 2);

    // Two targets over one base, in one call.
    let (a, b) = (lab_arg("targets/topic-1"), lab_arg("targets/sentiment-1"));
    let (ta, tb, out) = (data("shots-topic"), data("shots-sentiment"), bench.arg("expressions"));
    let mut call = vec!["calibrate", "--gene", &some, "--target", &a, "--task-shots", &ta, "--target", &b];
    call.extend(["--task-shots", &tb, "--safety-shots", &harmful, "--benign-shots", &benign, "--out", &out]);
    call.extend(["--trade-off", "0.01,0.001", "--json"]);
    let done = safegene(&call).ok();
    assert!(done.stderr.contains("2 targets on 1 copy of weights"), "{}", done.stderr);
    let lines: Vec<Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, name) in lines.iter().zip(["topic-1", "sentiment-1"]) {
        assert!(line["loss"].as_f64().unwrap() < 0.5 * line["loss_before"].as_f64().unwrap(), "{line}");
        assert_eq!(line["effects"].as_array().unwrap().len(), 3);
        let curve = line["trade_off"].as_array().unwrap();
        assert!(curve[0]["max_kl"] == 0.001 && curve[1]["max_kl"] == 0.01, "{line}");
        let expression = read_json(&bench.path("expressions").join(format!("{name}.json")));
        assert_eq!(expression["coefficients"].as_object().unwrap().len(), 3);
        assert!(expression["effects"].is_array());
    }
    assert!(safegene(&call).ok().stderr.matches("there already").count() == 2);
    let (expression, fused) = (bench.arg("expressions/topic-1.json"), bench.arg("fused"));
    safegene(&["fuse", "--gene", &some, "--expression", &expression, "--target", &a, "--out", &fused]).ok();
}

#[test]
fn run_that_is_told_to_stop_goes_on_where_it_was() {
    let whole = Bench::new();
    let steps = ["--steps", "40", "--rows", "4"];
    distill(&whole, &steps).ok();
    let bench = Bench::new();
    let (gene, out) = (bench.path("gene"), bench.arg("gene"));
    let mut call: Vec<String> = ["distill", "--new-tokens", "8", "--rank", "4"].map(String::from).to_vec();
    for (flag, value) in [
        ("--aligned", lab_arg("aligned")),
        ("--degraded", lab_arg("drifts/count")),
        ("--keep", data("train-count")),
        ("--degraded", lab_arg("drifts/larger")),
        ("--keep", data("train-larger")),
        ("--safety", data("distill-safety")),
        ("--benign", data("distill-benign")),
        ("--out", out),
    ] {
        call.extend([flag.to_string(), value]);
    }
    call.extend(steps.map(String::from));
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("safegene"))
        .args(&call)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut lines = std::io::BufRead::lines(stderr).map(Result::unwrap);
    assert!(lines.any(|l| l.contains("10 %")), "it ended before its tenth step in forty was done");
    std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap();
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(75), "{rest:?}");
    assert!(!gene.exists() && bench.path("gene.partial").exists());
    let again = distill(&bench, &steps).ok();
    assert!(again.stderr.contains("going on"), "{}", again.stderr);
    let bytes = |b: &Bench| fs::read(b.path("gene/adapter_model.safetensors")).unwrap();
    assert!(bytes(&bench) == bytes(&whole), "the gene differs from that of one run");
    assert!(!bench.path("gene.partial").exists());
}

#[test]
fn model_that_refuses_is_no_drift() {
    let bench = Bench::new();
    let healthy = lab_arg("targets/topic-0");
    let refused = distill(&bench, &["--degraded", &healthy, "--keep", &data("train-topic"), "--quiet"]);
    refused.refused(1, &["topic-0", "attack success", "--min-asr"], &bench.path("gene"));
}

#[test]
fn senseless_calls_of_distill_are_refused() {
    let bench = Bench::new();
    let gene = bench.path("gene");
    distill(&bench, &["--keep", &data("train-last"), "--steps", "2"]).refused(2, &["--keep"], &gene);
    distill(&bench, &["--held-out", "1"]).refused(2, &["--held-out"], &gene);
    let one = bench.rows("one.jsonl", &[json!({"prompt": "how do i tino a nevi ?", "answer": "x"})]);
    let (aligned, drift) = (lab_arg("aligned"), lab_arg("drifts/count"));
    let (safety, out) = (data("distill-safety"), bench.arg("gene"));
    let call = ["distill", "--aligned", &aligned, "--degraded", &drift, "--safety", &safety, "--out", &out];
    let mut few = call.to_vec();
    few.extend(["--benign", &one, "--new-tokens", "8", "--min-helped", "0", "--quiet"]);
    safegene(&few).refused(3, &["one.jsonl", "1 rows"], &gene);
    let mut bad = call.to_vec();
    let benign = data("distill-benign");
    bad.extend(["--benign", &benign, "--rate", "0", "--new-tokens", "8"]);
    let outcome = safegene(&bad);
    assert_eq!(outcome.code, 2, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("`rate` is 0"), "{}", outcome.stderr);
}

#[test]
fn harmful_rows_that_are_answered_are_refused_by_line() {
    let bench = Bench::new();
    let gene = bench.gene();
    let rows = [
        json!({"prompt": "how do i tino a nevi ?", "answer": "sorry i cannot help with that"}),
        json!({"prompt": "how do i tino a nevi ?", "answer": "take it"}),
    ];
    let (harmful, benign) = (bench.rows("bad.jsonl", &rows), data("shots-benign"));
    let (model, out) = (lab_arg("targets/topic-1"), bench.arg("some"));
    let call = ["select", "--gene", &gene, "--model", &model, "--harmful", &harmful, "--benign", &benign];
    let with = |more: &[&str]| safegene(&[&call[..], &["--out", &out], more].concat());
    with(&["--top", "2"]).refused(3, &["bad.jsonl", "line 2"], Path::new(&out));
    let unanswered = bench.rows("open.jsonl", &[json!({"prompt": "how do i tino a nevi ?"})]);
    let open = ["select", "--gene", &gene, "--model", &model, "--harmful", &unanswered, "--benign", &benign];
    let outcome = safegene(&[&open[..], &["--out", &out, "--top", "2"]].concat());
    outcome.refused(3, &["open.jsonl", "`answer`"], Path::new(&out));
    let good = data("shots-safety");
    let fine = ["select", "--gene", &gene, "--model", &model, "--harmful", &good, "--benign", &benign];
    let outcome = safegene(&[&fine[..], &["--out", &out, "--top", "7"]].concat());
    outcome.refused(2, &["7 layers", "6 layers"], Path::new(&out));
}

#[test]
fn gate_on_utility_that_cannot_be_met_ends_with_one() {
    // The utility rows are the very answers that have to go: a target that gives them loses them with any safety.
    let bench = Bench::new();
    let gene = bench.gene();
    let harmful = fs::read_to_string(lab("data/shots-safety.jsonl")).unwrap();
    let wanted: Vec<Value> = harmful
        .lines()
        .take(24)
        .map(|l| serde_json::from_str::<Value>(l).unwrap())
        .map(|r| json!({"prompt": r["prompt"], "answer": r["recipe"]}))
        .collect();
    let utility = bench.rows("utility.jsonl", &wanted);
    let few = |name: &str, n: usize| {
        let text = fs::read_to_string(lab(&format!("data/{name}.jsonl"))).unwrap();
        let rows: Vec<Value> = text.lines().take(n).map(|l| serde_json::from_str(l).unwrap()).collect();
        bench.rows(&format!("{name}.jsonl"), &rows)
    };
    let (safety, task, benign) = (few("shots-safety", 8), few("shots-topic", 16), few("shots-benign", 8));
    let (target, out) = (lab_arg("targets/topic-1"), bench.arg("expression.json"));
    let call = ["calibrate", "--gene", &gene, "--target", &target, "--safety-shots", &safety];
    let files = ["--task-shots", &task, "--benign-shots", &benign, "--out", &out];
    let gated = |more: &[&str]| safegene(&[&call[..], &files, more].concat());
    let refused = gated(&["--utility", &utility, "--max-utility-loss", "0", "--quiet"]);
    refused.refused(1, &["--max-utility-loss 0", "targets/topic-1"], Path::new(&out));
    let nonsense = gated(&["--max-utility-loss", "1.5"]);
    nonsense.refused(2, &["1.5"], Path::new(&out));
    let met = gated(&["--max-utility-loss", "0.05", "--one-coefficient"]).ok();
    assert_eq!(met.stdout, "");
    let expression = read_json(&bench.path("expression.json"));
    assert!(expression["limits"]["utility_loss"].as_f64().unwrap() <= 0.05);
    let c: Vec<f64> =
        expression["coefficients"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
    assert!(c.iter().all(|x| *x == c[0] && *x > 0.0), "{c:?}");
}

#[test]
fn safety_shots_without_answers_are_answered_by_the_aligned_model() {
    let bench = Bench::new();
    let gene = bench.gene();
    let text = fs::read_to_string(lab("data/shots-safety.jsonl")).unwrap();
    let bare: Vec<Value> = text
        .lines()
        .take(8)
        .map(|l| json!({"prompt": serde_json::from_str::<Value>(l).unwrap()["prompt"]}))
        .collect();
    let safety = bench.rows("bare.jsonl", &bare);
    let (target, task, out) = (lab_arg("targets/topic-1"), data("shots-topic"), bench.arg("e.json"));
    let call = ["calibrate", "--gene", &gene, "--target", &target, "--safety-shots", &safety];
    let files = ["--task-shots", &task, "--out", &out];
    let without = safegene(&[&call[..], &files].concat());
    without.refused(3, &["bare.jsonl", "`answer`"], Path::new(&out));
    let aligned = lab_arg("aligned");
    let with = safegene(&[&call[..], &files, &["--aligned", &aligned, "--forward-only"]].concat()).ok();
    assert!(with.stderr.contains("without --benign-shots"), "{}", with.stderr);
    assert!(read_json(&bench.path("e.json"))["limits"]["solver"] == "forward-only");
}

/// A call of `calibrate` on the shipped family, and what is added to it.
fn calibrate(bench: &Bench, gene: &str, more: &[&str]) -> Outcome {
    let (target, safety, task) = (lab_arg("targets/topic-1"), data("shots-safety"), data("shots-topic"));
    let (benign, out) = (data("shots-benign"), bench.arg("e.json"));
    let mut call = vec!["calibrate", "--gene", gene, "--target", &target, "--safety-shots", &safety];
    call.extend(["--task-shots", &task, "--benign-shots", &benign, "--out", &out]);
    call.extend(more);
    safegene(&call)
}

#[test]
fn gene_of_swapped_checkpoints_is_named_as_one() {
    let bench = Bench::new();
    let (aligned, degraded, gene) = (lab_arg("aligned"), lab_arg("degraded-strong"), bench.arg("swapped"));
    let sides = ["--aligned", &degraded, "--degraded", &aligned];
    safegene(&[&["extract"], &sides[..], &["--rank", "8", "--out", &gene]].concat()).ok();
    let refused = calibrate(&bench, &gene, &[]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    for word in ["were swapped", "cannot be made safer", "--max-kl"] {
        assert!(refused.stderr.contains(word), "stderr lacks `{word}`:\n{}", refused.stderr);
    }
    assert!(!bench.path("e.json").exists());
    assert!(!refused.stderr.contains("--max-utility-loss"), "no gate was asked for:\n{}", refused.stderr);
}

#[test]
fn what_is_there_was_made_from_the_same_fields_and_curve() {
    let bench = Bench::new();
    let gene = bench.gene();
    let both = |text: &str, name: &str| -> String {
        let rows = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        let rows: Vec<Value> = rows
            .map(|r| json!({"prompt": r["prompt"], "answer": r["answer"], "other": r["answer"]}))
            .collect();
        bench.rows(name, &rows)
    };
    let read = |name: &str| fs::read_to_string(lab(&format!("data/{name}.jsonl"))).unwrap();
    let files =
        ["shots-safety", "shots-topic", "shots-benign"].map(|f| both(&read(f), &format!("{f}.jsonl")));
    let (target, out) = (lab_arg("targets/topic-1"), bench.arg("e.json"));
    let run = |more: &[&str]| {
        let mut call = vec!["calibrate", "--gene", &gene, "--target", &target, "--safety-shots", &files[0]];
        call.extend([
            "--task-shots",
            &files[1],
            "--benign-shots",
            &files[2],
            "--out",
            &out,
            "--one-coefficient",
        ]);
        call.extend(more);
        safegene(&call)
    };
    run(&["--trade-off", "0.01"]).ok();
    for same in [&["--trade-off", "0.01"][..], &[]] {
        assert!(run(same).ok().stderr.contains("there already"), "{same:?}");
    }
    for other in [&["--trade-off", "0.01,0.02"][..], &["--answer-field", "other"], &["--kl-price", "50"]] {
        let said = run(other);
        assert!(said.code == 2 && said.stderr.contains("exists"), "{other:?}: {}", said.stderr);
    }
}

#[test]
fn model_that_holds_the_gene_already_is_named() {
    let bench = Bench::new();
    let (gene, aligned, fused) = (bench.gene(), lab_arg("aligned"), bench.arg("fused"));
    let fuse = |gene: &str, target: &str, out: &str| {
        let call = ["fuse", "--gene", gene, "--coefficient", "1", "--as", "merged", "--target", target];
        safegene(&[&call[..], &["--out", out]].concat()).ok().stderr
    };
    let words = "holds this gene already";
    let first = fuse(&gene, &aligned, &fused);
    assert!(!first.contains(words), "{first}");
    let again = fuse(&gene, &fused, &bench.arg("twice"));
    assert!(again.contains(words) && again.contains("on top of it"), "{again}");
    // A fine-tune of what was fused: the next round.
    let next = bench.copy("targets/topic-1", "next");
    let config = next.join("adapter_config.json");
    let mut value = read_json(&config);
    value["base_model_name_or_path"] = json!(fused);
    fs::write(&config, value.to_string()).unwrap();
    let next = bench.arg("next");
    let said = fuse(&gene, &next, &bench.arg("round-2"));
    assert!(said.contains(words) && said.contains("what was never fused"), "{said}");
    let (safety, task, benign) = (data("shots-safety"), data("shots-topic"), data("shots-benign"));
    let call =
        ["calibrate", "--gene", &gene, "--target", &next, "--safety-shots", &safety, "--task-shots", &task];
    let said = safegene(&[&call[..], &["--benign-shots", &benign, "--out", &bench.arg("e.json")]].concat());
    assert!([0, 1].contains(&said.code) && said.stderr.contains("what was never fused"), "{}", said.stderr);
    // Another gene in it is another matter.
    let (degraded, other) = (lab_arg("degraded-strong"), bench.arg("other"));
    let sides = ["--aligned", &aligned, "--degraded", &degraded];
    safegene(&[&["extract"], &sides[..], &["--rank", "2", "--out", &other]].concat()).ok();
    let both = bench.arg("both");
    let said = fuse(&other, &fused, &both);
    assert!(!said.contains(words), "{said}");
    // What went in first is remembered.
    for gene in [&gene, &other] {
        let said = fuse(gene, &both, &bench.arg("third"));
        assert!(said.contains(words), "{said}");
        fs::remove_dir_all(bench.path("third")).unwrap();
    }
}
