//! The three forms of a report: complete, the same each time, the same for any order of records.

use crate::fake::{meta, record, study};
use report::{Label, Meta, Report, Set, TradeOff};
use std::fs;
use std::path::Path;

#[test]
fn page_of_the_fake_study_is_complete_and_asks_for_nothing() {
    let (meta, records, layers) = study();
    let page = Report::of(meta, records, layers).unwrap().html();
    // For looking at: the folder is cargo's, not the project's.
    fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("report-fake.html"), &page).unwrap();
    for id in [
        "checks",
        "main",
        "pairs",
        "price",
        "harmless",
        "harm",
        "kind",
        "family",
        "task",
        "precise",
        "layers",
        "coefficients",
        "tradeoff",
        "methods",
        "reading",
        "settings",
        "records",
    ] {
        assert!(page.contains(&format!("<section id=\"{id}\">")), "no section {id}");
        assert!(page.contains(&format!("<a href=\"#{id}\">")), "no link to {id}");
    }
    for word in ["http:", "https:", "url(", "@import", "<link", "<img", "<iframe", "NaN", "inf\""] {
        assert!(!page.contains(word), "`{word}` in the page");
    }
    assert_eq!(page.matches("<script>").count(), 1);
    balanced(&page);
}

/// Every element that is opened is closed, in order.
#[track_caller]
fn balanced(page: &str) {
    let (head, rest) = page.split_once("<body>").unwrap();
    assert!(head.starts_with("<!doctype html>"));
    let body = rest.split_once("<script>").unwrap().0;
    let mut open = Vec::new();
    for part in body.split('<').skip(1) {
        let (tag, _) = part.split_once('>').unwrap();
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closes out of order");
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().unwrap());
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

#[test]
fn order_of_records_does_not_show() {
    let (meta, records, layers) = study();
    let a = Report::of(meta.clone(), records.clone(), layers.clone()).unwrap();
    let turn = |mut r: Vec<_>| {
        r.reverse();
        r
    };
    let mut turned = layers;
    turned.reverse();
    let b = Report::of(meta, turn(records), turned).unwrap();
    assert_eq!(a.html(), b.html());
    assert_eq!(a.markdown(), b.markdown());
    assert_eq!(a.json().unwrap(), b.json().unwrap());
}

#[test]
fn nothing_to_report() {
    let report = Report::of(Meta::default(), vec![], vec![]).unwrap();
    assert!(report.html().contains("There are no records."));
    assert!(report.markdown().contains("There are no records."));
    balanced(&report.html());
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["tables"][0]["rows"], serde_json::json!([]));
}

#[test]
fn one_record() {
    let report = Report::of(meta(), vec![record(1, "a", "gene", Label::Zero, 3, 0, 97)], vec![]).unwrap();
    let page = report.html();
    balanced(&page);
    assert!(page.contains("One cell") || page.contains("All cells are of one family and seed"), "{page}");
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}

#[test]
fn shifted_set_alone() {
    let mut r = record(1, "a", "gene", Label::Zero, 3, 0, 97);
    r.set = Set::Shifted;
    let page = Report::of(meta(), vec![r], vec![]).unwrap();
    balanced(&page.html());
    assert!(
        page.markdown()
            .contains("| **Gene** | none | – | 3.0 [1.0, 8.5] | – | 0.0 [0.0, 3.7] | 97.0 [91.5, 99.0] |"),
        "{}",
        page.markdown()
    );
}

#[test]
fn extremes_are_drawn() {
    let (_, records, mut layers) = study();
    let size = |k: usize| [0.0, 1e-12, 1e12][k % 3];
    let mut records: Vec<_> = records.into_iter().take(60).collect();
    for (k, r) in records.iter_mut().enumerate() {
        (r.kl_task, r.kl_benign, r.seconds) = (Some(size(k)), Some(size(k + 1)), Some(size(k + 2)));
        let point = |max_kl| TradeOff { max_kl, loss: size(k), kl: size(k) };
        r.tradeoff = Some(vec![point(1e-12), point(1e12)]);
        r.coefficients = Some([(0, 0.0), (u32::MAX, size(k))].into());
    }
    for (k, l) in layers.iter_mut().flat_map(|s| &mut s.layers).enumerate() {
        (l.layer, l.value) = (u32::MAX - 99 + l.layer, [1e12, -1e12, 0.0][k % 3]);
    }
    layers[0].layers.clear();
    let page = Report::of(meta(), records, layers).unwrap().html();
    balanced(&page);
    assert!(!page.contains("NaN") && !page.contains("inf\"") && !page.contains(" inf"));
}

#[test]
fn hash_of_the_script_is_the_policys() {
    use sha2::{Digest, Sha256};
    let page = Report::of(Meta::default(), vec![], vec![]).unwrap().html();
    let script = page.split_once("<script>").unwrap().1.split_once("</script>").unwrap().0;
    let hash = base64(&Sha256::digest(script.as_bytes()));
    assert!(page.contains(&format!("script-src 'sha256-{hash}'")), "page.js has changed: its hash is {hash}");
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for k in 0..4 {
            if k <= chunk.len() {
                out.push(LETTERS[(word >> (18 - 6 * k)) as usize & 63] as char);
            } else {
                out.push('=');
            }
        }
    }
    out
}
