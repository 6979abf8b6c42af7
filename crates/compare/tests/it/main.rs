//! The plan, the records and the splits of a comparison; the comparison itself is run by `.ci/run`.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

use compare::judge::AlignedRates;
use compare::plan::{FAMILY_SEED, Plan, Recipe, Way, check_splits};
use compare::store::{Complete, Store, has, key};
use compare::{CompareError, plan::Entry};
use lab::language::Language;
use lab::splits::Splits;
use lab::{Kind, Tune};
use report::{Label, Rate, Record, SCHEMA, Set, Shots, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

fn record(target: &str, set: Set, shots: u32) -> Record {
    let rate = |hits: u64| Some(Rate { value: hits as f64 / 100.0, low: 0.0, high: 1.0, n: 100 });
    Record {
        schema: SCHEMA,
        family: "llama".into(),
        seed: 11,
        target: Target {
            name: target.into(),
            task: "topic".into(),
            harm_percent: 1.0,
            kind: report::Kind::Lora,
        },
        method: "gene".into(),
        label: Label::SafetyTaskBenign,
        shots: Shots { safety: shots, task: 2 * shots, benign: shots },
        set,
        asr: rate(3),
        asr_precise: None,
        over_refusal: rate(0),
        helped: None,
        accuracy: rate(99),
        kl_task: Some(0.001),
        kl_benign: None,
        seconds: Some(1.0),
        given: "nothing".into(),
        coefficients: None,
        tradeoff: None,
    }
}

#[test]
fn every_entry_of_a_target_is_there_once_and_all_that_tune_see_the_same_shots() {
    for quick in [false, true] {
        let plan = Plan::new(quick);
        let mut names = BTreeSet::new();
        for cell in &plan.cells {
            assert!(names.insert(cell.tune.name()), "{} twice", cell.tune.name());
            let entries: BTreeSet<&Entry> = cell.entries.iter().collect();
            assert_eq!(entries.len(), cell.entries.len(), "{}", cell.tune.name());
            assert_eq!(
                cell.entries[0].method,
                Way::FineTuned,
                "everything is held against the target as it is"
            );
            for e in &cell.entries {
                let n = e.shots;
                let same = match e.label {
                    Label::Zero => n == Shots::default(),
                    Label::SafetyTask => [n.safety, n.task] == [8, 16] && n.benign == 0,
                    _ => n.task == 2 * n.safety && n.benign == n.safety,
                };
                assert!(same, "{} {:?}", cell.tune.name(), e);
            }
            // Whoever has a column of the main shots has it with the same shots as the gene.
            let main =
                cell.entries.iter().filter(|e| e.label == Label::SafetyTaskBenign && e.shots.safety == 8);
            assert!(main.clone().count() >= 2 && main.clone().any(|e| e.method == Way::Gene));
        }
    }
}

#[test]
fn plan_has_all_poison_levels_generations_and_kinds() {
    let cells = Plan::new(false).cells;
    let n = |percent: u32, kind: Kind| {
        let is = |t: Tune| matches!(t, Tune::Target { percent: p, kind: k, .. } if p == percent && k == kind);
        cells.iter().filter(|c| is(c.tune)).count()
    };
    assert_eq!([0, 1, 5, 10].map(|p| n(p, Kind::Lora)), [4, 4, 4, 4]);
    assert_eq!((n(1, Kind::Second), n(1, Kind::Full)), (4, 2));
    let recipe = Recipe::new(false);
    assert_eq!(recipe.shots, [8, 16, 8]);
}

#[test]
fn splits_that_share_a_test_prompt_are_refused() {
    let splits = Splits::new(&Language::new(FAMILY_SEED), FAMILY_SEED);
    let hashes = check_splits(&splits).unwrap();
    assert_eq!(hashes.len(), splits.files.len());
    let distinct: BTreeSet<&String> = hashes.values().collect();
    assert_eq!(distinct.len(), hashes.len());
    let mut leaky = splits.clone();
    let row = splits.get("test-topic")[7].clone();
    leaky.files.get_mut("shots-topic").unwrap().push(row.clone());
    match check_splits(&leaky) {
        Err(CompareError::Leak { prompt, .. }) => assert_eq!(prompt, row.prompt),
        other => panic!("{other:?}"),
    }
}

#[test]
fn records_are_found_again_and_half_a_line_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = serde_json::json!({"version": 1});
    let store = Store::open(dir.path(), &recipe).unwrap();
    store.add(vec![record("topic-1", Set::Known, 8), record("topic-1", Set::Shifted, 8)]).unwrap();
    store.add(vec![record("topic-5", Set::Known, 8)]).unwrap();
    drop(store);
    let file = dir.path().join("records.jsonl");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..text.len() - 30]).unwrap();
    let store = Store::open(dir.path(), &recipe).unwrap();
    let keys = store.keys();
    assert_eq!(keys.len(), 2);
    let shots = |n| Shots { safety: n, task: 2 * n, benign: n };
    let entry = |n| Entry { method: Way::Gene, label: Label::SafetyTaskBenign, shots: shots(n) };
    assert!(has(&keys, "llama", 11, "topic-1", &entry(8)));
    assert!(!has(&keys, "llama", 11, "topic-1", &entry(4)), "other shots are another column");
    assert!(!has(&keys, "llama", 12, "topic-1", &entry(8)));
    assert!(!has(&keys, "llama", 11, "topic-5", &entry(8)));
    // What was cut off comes again, and what is there twice counts once.
    store.add(vec![record("topic-5", Set::Known, 8)]).unwrap();
    let line = serde_json::to_string(&record("topic-5", Set::Known, 8)).unwrap();
    let text = fs::read_to_string(&file).unwrap() + &line + "\n";
    fs::write(&file, text).unwrap();
    let records = Store::open(dir.path(), &recipe).unwrap().records();
    assert_eq!(records.len(), 3);
    assert!(records.windows(2).all(|w| key(&w[0]) < key(&w[1])));
}

#[test]
fn records_of_another_recipe_are_never_mixed_in() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = |v| serde_json::json!({"version": v});
    Store::open(dir.path(), &recipe(1)).unwrap().add(vec![record("topic-1", Set::Known, 8)]).unwrap();
    let error = Store::open(dir.path(), &recipe(2)).unwrap_err();
    assert!(matches!(error, CompareError::OtherWork { .. }) && error.hint().is_some());
    assert_eq!(Store::open(dir.path(), &recipe(1)).unwrap().records().len(), 1);
}

#[test]
fn comparison_goes_on_from_reports_of_the_same_recipe_only() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = |v| serde_json::json!({"version": v});
    let at = |name: &str| dir.path().join(name);
    let plan = Plan::new(false);
    let all: Vec<String> = plan.cells.iter().map(|c| c.tune.name()).collect();
    let complete = |seed| Complete {
        family: "llama".into(),
        seed,
        roots: "blake3:0".into(),
        machine: "a machine".into(),
        // So that nothing more is asked for.
        left_out: all.clone(),
        notes: vec![format!("seed {seed}")],
        scores: Vec::new(),
        distilled: Vec::new(),
    };
    let of = |target: &str, seed| Record { seed, ..record(target, Set::Known, 8) };
    let (first, second) =
        (Store::open(&at("a"), &recipe(1)).unwrap(), Store::open(&at("b"), &recipe(1)).unwrap());
    first.add(vec![of("topic-1", 11), of("topic-5", 11), of("topic-1", 12)]).unwrap();
    first.finish(complete(11)).unwrap();
    second.add(vec![of("topic-10", 12), of("topic-10", 11)]).unwrap();
    second.finish(complete(12)).unwrap();
    let store = Store::open(&at("c"), &recipe(1)).unwrap();
    // Half of seed 12 is here, of another training.
    store.add(vec![of("topic-0", 12)]).unwrap();
    for report in ["a", "b", "a"] {
        store.take(&plan, &at(report)).unwrap();
    }
    // Each seed from the report that holds it whole and from nowhere else, and still there for whoever opens it next.
    for store in [&store, &Store::open(&at("c"), &recipe(1)).unwrap()] {
        let names: Vec<_> = store.records().into_iter().map(|r| (r.seed, r.target.name)).collect();
        let want =
            [(11, "topic-1"), (11, "topic-5"), (12, "topic-10")].map(|(seed, name)| (seed, name.to_string()));
        assert_eq!(names, want);
        assert_eq!([11, 12].map(|seed| store.complete("llama", seed).unwrap()), [complete(11), complete(12)]);
        assert!(store.is_whole(&plan, "llama", 11));
        assert_eq!((store.complete("llama", 13), store.complete("qwen2", 11)), (None, None));
    }
    let other = Store::open(&at("d"), &recipe(2)).unwrap();
    assert!(matches!(other.take(&plan, &at("a")), Err(CompareError::OtherWork { .. })));
    let error = other.take(&plan, &at("nowhere")).unwrap_err();
    assert!(error.to_string().contains("recipe.json"), "{error}");
    assert!(other.records().is_empty());
    // What says to be finished and lacks records is not taken, nor is a file with a broken line inside.
    first.finish(Complete { left_out: Vec::new(), ..complete(13) }).unwrap();
    let fresh = Store::open(&at("e"), &recipe(1)).unwrap();
    assert!(matches!(fresh.take(&plan, &at("a")), Err(CompareError::NotWhole { seed: 13, .. })));
    assert!(!first.is_whole(&plan, "llama", 13));
    let file = at("a").join("records.jsonl");
    fs::write(&file, format!("{{\n{}", fs::read_to_string(&file).unwrap())).unwrap();
    let error = fresh.take(&plan, &at("a")).unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
}

/// The same method on four targets, by ASR on known and on shifted prompts.
fn method(way: Way, label: Label, asr: [f64; 2], kl: f64, seconds: f64) -> Vec<Record> {
    let shots = match label {
        Label::Zero => Shots::default(),
        Label::SafetyTask => Shots { safety: 8, task: 16, benign: 0 },
        _ => Shots { safety: 8, task: 16, benign: 8 },
    };
    let mut out = Vec::new();
    for task in ["topic", "sentiment", "entailment", "yes-no"] {
        for (set, asr) in [Set::Known, Set::Shifted].into_iter().zip(asr) {
            let mut r = record(&format!("{task}-1"), set, 8);
            r.target.task = task.into();
            r.asr = Some(Rate { value: asr, low: asr / 2.0, high: (asr * 1.5).min(1.0), n: 288 });
            r.over_refusal = Some(Rate { value: 0.0, low: 0.0, high: 0.004, n: 288 });
            r.accuracy = Some(Rate { value: 0.99, low: 0.98, high: 1.0, n: 1000 });
            (r.method, r.label, r.shots, r.seconds) = (way.name().into(), label, shots, Some(seconds));
            (r.kl_task, r.kl_benign) = (Some(kl), Some(kl));
            out.push(r);
        }
    }
    out
}

/// What is said of each claim that is judged.
fn claims(records: Vec<Record>) -> BTreeMap<String, (Option<bool>, String)> {
    claims_beside(records, Vec::new())
}

fn claims_beside(
    records: Vec<Record>,
    aligned: Vec<AlignedRates>,
) -> BTreeMap<String, (Option<bool>, String)> {
    let report = report::Report::of(report::Meta::default(), records.clone(), Vec::new()).unwrap();
    let outcome = compare::Outcome {
        records,
        scores: Vec::new(),
        notes: Vec::new(),
        splits: BTreeMap::new(),
        distilled: Vec::new(),
        aligned,
        complete: Vec::new(),
        recipe: serde_json::Value::Null,
    };
    compare::claims::checks(&report, &outcome).into_iter().map(|c| (c.name, (c.ok, c.value))).collect()
}

#[test]
fn claims_hold_or_not_by_what_the_records_say() {
    let full = Label::SafetyTaskBenign;
    let records = |gene: [f64; 2], rival: f64, kl: f64, seconds: f64| {
        let mut out = method(Way::FineTuned, Label::Zero, [1.0, 1.0], 0.0, 0.0);
        out.extend(method(Way::Gene, Label::Zero, [0.01, 0.12], 0.002, 0.0));
        out.extend(method(Way::SvdGene, Label::Zero, [0.4, 0.5], 0.001, 0.0));
        out.extend(method(Way::Gene, full, gene, kl, seconds));
        out.extend(method(Way::FewShot, full, [0.004, 0.1], 0.004, 9.0));
        out.extend(method(Way::Resta, full, [rival, 0.2], 0.001, 2.0));
        out.extend(method(Way::RestaEqualKl, full, [1.5 * rival, 0.2], 0.001, 2.0));
        out.extend(method(Way::SafeLora, full, [0.8, 0.8], 0.001, 2.0));
        out
    };
    let said = |records: Vec<Record>, name: &str| claims(records)[name].0;
    let good = || records([0.004, 0.008], 0.02, 0.001, 1.0);
    for name in
        ["zero shots", "calibrated", "calibrated, shifted templates", "calibrated, against arithmetic"]
    {
        assert_eq!(said(good(), name), Some(true), "{name}");
    }
    assert_eq!(said(good(), "zero shots, shifted templates"), Some(false), "0.12 against 0.05");
    assert_eq!(said(good(), "distillation"), Some(true));
    assert_eq!(said(good(), "against few-shot LoRA"), Some(true));
    assert_eq!(said(good(), "re-expression"), Some(true));
    // One thing worse at a time.
    assert_eq!(said(records([0.011, 0.008], 0.05, 0.001, 1.0), "calibrated"), Some(false));
    assert_eq!(
        said(records([0.006, 0.008], 0.02, 0.001, 1.0), "calibrated, against arithmetic"),
        Some(false)
    );
    // RESTA at the gene's KL leaves half as much again: a quarter of that is another number.
    let equal = "calibrated, against arithmetic at equal KL";
    assert_eq!(said(records([0.006, 0.008], 0.02, 0.001, 1.0), equal), Some(true));
    assert_eq!(said(records([0.008, 0.008], 0.02, 0.001, 1.0), equal), Some(false));
    assert_eq!(said(records([0.004, 0.02], 0.02, 0.001, 1.0), "calibrated, shifted templates"), Some(false));
    assert_eq!(said(records([0.004, 0.008], 0.02, 0.0021, 1.0), "against few-shot LoRA"), Some(false));
    assert_eq!(said(records([0.004, 0.008], 0.02, 0.001, 3.1), "against few-shot LoRA"), Some(false));
    assert_eq!(said(records([0.004, 0.008], 0.02, 0.001, 10.1), "re-expression"), Some(false));
    let value = &claims(records([0.004, 0.008], 0.02, 0.002, 1.0))["calibrated, against arithmetic"].1;
    let spent =
        |own: &str| value.contains(own) && value.starts_with("0.40 % (") && value.contains("2.00 % of resta");
    assert!(spent("KL 0.0020)") && value.ends_with("KL 0.0010)"), "{value}");
    // Met by the value alone.
    let (ok, value) = claims(records([0.009, 0.008], 0.05, 0.001, 1.0))["calibrated"].clone();
    assert!(ok == Some(true) && value.contains("reaches above"), "{value}");
    // What the aligned models do stands beside shifted templates, and changes no verdict.
    let one = |family: &str, asr: f64| AlignedRates {
        family: family.into(),
        set: Set::Shifted,
        asr: Rate { value: asr, low: 0.0, high: 1.0, n: 288 },
        over_refusal: Rate { value: 0.02, low: 0.0, high: 1.0, n: 288 },
    };
    let known = AlignedRates { set: Set::Known, ..one("llama", 0.9) };
    let said = claims_beside(good(), vec![one("llama", 0.3), known, one("qwen2", 0.1)]);
    let (ok, value) = &said["zero shots, shifted templates"];
    let end = "; the aligned models themselves, in the mean, ASR 20.00 %, over-refusal 2.00 %";
    assert!(*ok == Some(false) && value.ends_with(end), "{value}");
    assert!(!said["zero shots"].1.contains("aligned"), "{}", said["zero shots"].1);
    // What was not measured is not judged.
    let none: Vec<Option<bool>> = claims(method(Way::FineTuned, Label::Zero, [1.0, 1.0], 0.0, 0.0))
        .into_values()
        .map(|(ok, _)| ok)
        .collect();
    assert!(none.len() >= 16 && none.iter().all(Option::is_none), "{none:?}");
}

#[test]
fn aligned_rates_are_those_of_the_labs_own_judge() {
    let dir = tempfile::tempdir().unwrap();
    let shipped = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lab");
    let mut roots = compare::ground::Roots::open("llama", &shipped, dir.path()).unwrap();
    // In place of the aligned model, which refuses whatever it should, one that refuses a part.
    let worn = checkpoint::Checkpoint::open(&shipped.join("llama/degraded-mild"), None).unwrap();
    roots.model = transformer::Model::open(&worn).unwrap();
    let (family, none) = (&roots.family, transformer::Attachments::none());
    let found = AlignedRates::of(&roots).unwrap();
    assert_eq!(found.iter().map(|a| a.set).collect::<Vec<_>>(), [Set::Known, Set::Shifted]);
    for (a, end) in found.iter().zip(["", "-shifted"]) {
        let rows = |kind: &str| family.splits.get(&format!("test-{kind}{end}"));
        let sets = (rows("harmful"), rows("benign"), [].as_slice());
        let own = lab::measure::rates(&roots.model, &none, &family.chat, sets).unwrap();
        assert_eq!((a.asr.value, a.over_refusal.value), (own.asr, own.over_refusal), "{:?}", a.set);
        assert_eq!((a.asr.n, a.over_refusal.n), (288, 288));
    }
    assert!(found.iter().all(|a| a.asr.value > 0.1 && a.asr.value < 0.9), "{found:?}");
    assert_ne!(found[0].asr.value, found[1].asr.value);
}

#[test]
fn work_folder_of_another_lab_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let shipped = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lab");
    let (lab, work) = (dir.path().join("lab"), dir.path().join("work"));
    for name in ["base", "aligned"] {
        let to = lab.join("llama").join(name);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(shipped.join("llama").join(name)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    compare::ground::Roots::open("llama", &lab, &work).unwrap();
    let (base, aligned) = (lab.join("llama/base"), lab.join("llama/aligned"));
    fs::copy(base.join("model.safetensors"), aligned.join("model.safetensors")).unwrap();
    let error = compare::ground::Roots::open("llama", &lab, &work).unwrap_err();
    assert!(matches!(error, CompareError::OtherLab { model: "aligned", .. }), "{error}");
    assert!(error.hint().unwrap().contains("another work folder"), "{:?}", error.hint());
}
