//! Means against numbers worked out by hand, and the Markdown of a tiny study as text.

use crate::fake::{meta, rate, record};
use report::{Grouping, Kind, Label, Record, Report, Set, Slice, Verdict};

fn report(records: Vec<Record>) -> Report {
    Report::of(meta(), records, vec![]).unwrap()
}

#[track_caller]
fn near(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "got {got}, want {want}");
}

/// Two targets, before and after, and a rival.
fn tiny() -> Vec<Record> {
    let with = |mut r: Record, kl: f64, seconds: f64| {
        (r.kl_task, r.seconds) = (Some(kl), Some(seconds));
        r
    };
    vec![
        record(1, "a", "fine-tuned", Label::Zero, 90, 0, 98),
        record(1, "b", "fine-tuned", Label::Zero, 100, 0, 96),
        with(record(1, "a", "gene", Label::SafetyTask, 0, 1, 97), 0.002, 1.0),
        with(record(1, "b", "gene", Label::SafetyTask, 4, 3, 97), 0.004, 3.0),
        with(record(1, "a", "few-shot-lora", Label::SafetyTask, 0, 90, 95), 0.009, 8.0),
        with(record(1, "b", "few-shot-lora", Label::SafetyTask, 2, 96, 93), 0.012, 9.0),
    ]
}

#[test]
fn means_of_two_cells() {
    let rows = report(tiny()).rows(Slice::Harmful, Grouping::default());
    let names: Vec<_> = rows.iter().map(|r| r.method.as_str()).collect();
    assert_eq!(names, ["fine-tuned", "gene", "few-shot-lora"]);
    let gene = rows[1].known.as_ref().unwrap();
    near(gene.asr.value, 0.02, 1e-12);
    near(gene.over_refusal.value, 0.02, 1e-12);
    near(gene.accuracy.value, 0.97, 1e-12);
    assert_eq!((gene.cells, gene.asr.cells), (2, 2));
    // 97 - 98 and 97 - 96.
    near(rows[1].accuracy_change.unwrap().value, 0.0, 1e-12);
    near(rows[2].accuracy_change.unwrap().value, -0.03, 1e-12);
    near(rows[1].kl_task.unwrap().value, 0.003, 1e-12);
    near(rows[1].seconds.unwrap().value, 2.0, 1e-12);
    // Half the difference is the standard error, times the quantile of one degree of freedom; time is not negative.
    assert_eq!(rows[1].seconds.unwrap().low, Some(0.0));
    near(rows[1].seconds.unwrap().high.unwrap(), 2.0 + 12.7062, 1e-2);
    assert_eq!(rows[0].accuracy_change, None);
    assert_eq!(rows[0].kl_task, None);
    assert!(rows.iter().all(|r| r.shifted.is_none()));
}

#[test]
fn pairs_say_ties_and_losses() {
    // Enough alike cells for a verdict.
    let mut records = Vec::new();
    for seed in 1..=4 {
        for (target, more) in [("a", 0), ("b", 1)] {
            records.push(record(seed, target, "gene", Label::SafetyTask, 2 + more, 1, 97));
            records.push(record(seed, target, "few-shot-lora", Label::SafetyTask, 2, 90 + more, 97 - more));
            records.push(record(seed, target, "svd-gene", Label::SafetyTask, 60 + more, 1, 97));
            // Saw something else: no rival.
            records.push(record(seed, target, "wise-ft", Label::Task, 60, 1, 97));
        }
    }
    let pairs = report(records).pairs();
    let [svd, lora] = pairs.as_slice() else { panic!("{pairs:?}") };
    assert_eq!((svd.rival.as_str(), svd.cells), ("svd-gene", 8));
    let d = svd.known.as_ref().unwrap();
    near(d.asr.mean.value, -0.58, 1e-12);
    assert_eq!(
        (d.asr.verdict, d.over_refusal.verdict, d.accuracy.verdict),
        (Verdict::Better, Verdict::Tie, Verdict::Tie)
    );
    assert_eq!((d.cells_better, d.cells_tie, d.cells_worse), (8, 0, 0));
    assert_eq!(lora.rival, "few-shot-lora");
    let d = lora.known.as_ref().unwrap();
    assert_eq!((d.asr.verdict, d.over_refusal.verdict), (Verdict::Tie, Verdict::Better));
    assert_eq!((d.cells_better, d.cells_tie, d.cells_worse), (0, 8, 0));
    assert!(lora.shifted.is_none() && lora.kl_task.is_none());
}

#[test]
fn groups_tell_apart_what_they_are_asked_to() {
    let mut records = tiny();
    for r in &mut records {
        if r.target.name == "b" {
            (r.target.harm_percent, r.target.kind) = (10.0, Kind::Full);
        }
    }
    let mut harmless = record(1, "c", "gene", Label::SafetyTask, 0, 7, 99);
    (harmless.target.kind, harmless.target.harm_percent) = (Kind::BenignOnly, 0.0);
    records.push(harmless);
    let report = report(records);
    let by = Grouping { harm_percent: true, ..Grouping::default() };
    let rows = report.rows(Slice::Harmful, by);
    let harms: Vec<_> = rows.iter().map(|r| r.group.harm_percent.unwrap()).collect();
    assert_eq!(harms, [1.0, 1.0, 1.0, 10.0, 10.0, 10.0]);
    near(rows[4].known.as_ref().unwrap().asr.value, 0.04, 1e-12);
    let by = Grouping { kind: true, task: true, ..Grouping::default() };
    let row = &report.rows(Slice::Harmful, by)[0];
    assert_eq!((row.group.kind, row.group.task.as_deref()), (Some(Kind::Lora), Some("fake task")));
    // One cell: its own rows' interval.
    assert_eq!(row.known.as_ref().unwrap().asr.low, Some(rate(90, 100).unwrap().low));
    // What needs no recovery is never in the same mean as what does.
    let harmless = report.rows(Slice::Harmless, Grouping::default());
    assert_eq!(harmless.len(), 1);
    near(harmless[0].known.as_ref().unwrap().over_refusal.value, 0.07, 1e-12);
}

#[test]
fn rows_over_fewer_targets_say_so() {
    let mut records = tiny();
    records.retain(|r| r.method != "few-shot-lora" || r.target.name == "a");
    let report = report(records);
    let row = &report.rows(Slice::Harmful, Grouping::default())[2];
    assert_eq!((row.cells, row.cells_of_group), (1, 2));
    assert!(report.markdown().contains("| 1 of 2 † |"), "{}", report.markdown());
    assert!(report.html().contains("of 2 †"));
}

#[test]
fn what_was_not_measured_is_a_dash() {
    let mut records = tiny();
    for r in &mut records {
        if r.target.name == "b" {
            r.kl_task = None;
        }
    }
    let mut shifted = record(1, "a", "gene", Label::SafetyTask, 10, 2, 97);
    shifted.set = Set::Shifted;
    records.push(shifted);
    let text = report(records).markdown();
    let gene = text.lines().find(|l| l.starts_with("| **Gene**")).unwrap();
    let entries: Vec<_> = gene.split('|').map(str::trim).collect();
    assert_eq!(entries[4], "10.0 [5.5, 17.4] in 1", "{gene}");
    assert_eq!(entries[9], "0.0020 in 1", "{gene}");
    assert_eq!(entries[10], "–", "{gene}");
    let lora = text.lines().find(|l| l.starts_with("| Few-shot LoRA |")).unwrap();
    assert_eq!(lora.split('|').nth(4).unwrap().trim(), "–", "{lora}");
}

#[test]
fn every_rate_of_an_attack_has_its_company_in_json() {
    let json: serde_json::Value = serde_json::from_str(&report(tiny()).json().unwrap()).unwrap();
    let mut seen = 0;
    for table in json["tables"].as_array().unwrap() {
        for row in table["rows"].as_array().unwrap() {
            for set in ["known", "shifted"] {
                if row[set].is_null() {
                    continue;
                }
                seen += 1;
                for company in ["asr", "over_refusal", "accuracy"] {
                    assert!(row[set][company]["value"].is_number(), "{row}");
                }
            }
        }
    }
    assert!(seen > 0);
    assert_eq!(json["pairs"][0]["rival"], "few-shot-lora");
    assert_eq!(json["pairs"][0]["known"]["over_refusal"]["verdict"], "better");
}

#[test]
fn records_survive_json() {
    let (_, records, _) = crate::fake::study();
    let text = serde_json::to_string(&records).unwrap();
    let back: Vec<Record> = serde_json::from_str(&text).unwrap();
    assert_eq!(back, records);
    assert!(text.contains("\"label\":\"safety+task+benign\"") && text.contains("\"kind\":\"benign-only\""));
    // What was not measured may be left out.
    let least = r#"{"schema":1,"family":"f","seed":1,"target":{"name":"a","task":"t","harm_percent":1,"kind":"lora"},
        "method":"gene","label":"zero","set":"known"}"#;
    let r: Record = serde_json::from_str(least).unwrap();
    assert!(r.asr.is_none() && r.tradeoff.is_none());
}

#[test]
fn markdown_of_a_tiny_study() {
    let got = report(tiny()).markdown();
    let want = include_str!("tiny.md");
    assert_eq!(got, want, "got:\n{got}");
}
