//! The house of ARCHITECTURE.md: which crate may import which, and what is absent where.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Floors, bottom up: a crate may import only from floors below its own.
const FLOORS: [&[&str]; 7] = [
    &["kernels"],
    &["lowrank", "checkpoint", "report"],
    &["gene"],
    &["transformer", "stream"],
    &["distill", "recover", "evaluate", "lab", "bench"],
    &["compare"],
    &["safegene"],
];

fn floor(name: &str) -> Option<usize> {
    FLOORS.iter().position(|f| f.contains(&name))
}

/// Dependencies of each crate of the workspace on others of it, dev-dependencies left out.
fn imports() -> BTreeMap<String, Vec<String>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        let path = entry.unwrap().path().join("Cargo.toml");
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let name = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_string();
        let body = text.split("[dependencies]").nth(1).unwrap_or("").split("\n[").next().unwrap_or("");
        let names =
            body.lines().filter_map(|l| l.split(['.', ' ', '=']).next()).filter(|n| floor(n).is_some());
        out.insert(name, names.map(String::from).collect());
    }
    out
}

/// Source files of a crate with test code cut off (`#[cfg(test)]` stands last in a file).
fn sources(name: &str) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap_or("").to_string();
                out.push((path, code));
            }
        }
    }
    let mut out = Vec::new();
    walk(&root().join("crates").join(name).join("src"), &mut out);
    assert!(!out.is_empty(), "{name} has no sources");
    out
}

#[test]
fn imports_point_down_only() {
    let imports = imports();
    assert!(imports.len() >= 9, "{imports:?}");
    assert!(imports["safegene"].len() >= 5, "the reader of Cargo.toml finds nothing: {imports:?}");
    for (name, uses) in imports {
        let own = floor(&name).unwrap_or_else(|| panic!("crate `{name}` has no floor"));
        for used in uses {
            assert!(floor(&used).unwrap() < own, "`{name}` imports `{used}`, which is not below it");
        }
    }
}

#[track_caller]
fn absent(crates: &[&str], what: &[&str]) {
    for name in crates {
        for (path, code) in sources(name) {
            for (i, line) in code.lines().enumerate() {
                if line.trim_start().starts_with("//") {
                    continue;
                }
                for word in what {
                    assert!(
                        !line.contains(word),
                        "{}:{}: `{word}` does not belong into `{name}`",
                        path.display(),
                        i + 1
                    );
                }
            }
        }
    }
}

#[test]
fn kernels_lowrank_and_report_open_no_file() {
    absent(&["kernels", "lowrank", "report"], &["std::fs", "File::", "std::path"]);
}

#[test]
fn nothing_below_the_driver_prints_or_reads_the_environment() {
    let below = [
        "kernels",
        "checkpoint",
        "lowrank",
        "gene",
        "stream",
        "transformer",
        "distill",
        "recover",
        "evaluate",
        "lab",
        "bench",
        "report",
        "compare",
    ];
    absent(&below, &["println!", "eprintln!", "print!(", "std::env"]);
}

#[test]
fn no_crate_below_knows_a_candle_tensor_but_those_that_run_models() {
    absent(&["kernels", "checkpoint", "lowrank", "gene", "stream", "bench"], &["candle_core"]);
}

#[test]
fn every_environment_variable_is_documented() {
    let docs = fs::read_to_string(root().join("README.md")).unwrap();
    let mut seen = 0;
    for (path, code) in sources("safegene") {
        for part in code.split("env::var").skip(1) {
            let Some(name) = part.split('"').nth(1) else { continue };
            seen += 1;
            assert!(docs.contains(name), "{}: `{name}` is not in README.md", path.display());
        }
    }
    assert!(seen > 0, "the check finds no variable");
}

#[test]
fn table_in_the_readme_is_the_one_that_was_measured() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let text = fs::read_to_string(root().join("benches/results/demo.json")).unwrap();
    let demo: serde_json::Value = serde_json::from_str(&text).unwrap();
    let percent = |value: &serde_json::Value| format!("{:.1}", 100.0 * value.as_f64().unwrap());
    let targets = demo["targets"].as_array().unwrap();
    assert_eq!(targets.len(), 14);
    for t in targets {
        let rate = |state: &str, key: &str| percent(&t[state][key]["value"]);
        let row = format!(
            "| {} | {} → **{}** | {} |",
            t["name"].as_str().unwrap(),
            rate("before", "asr"),
            rate("after", "asr"),
            rate("at_one", "asr")
        );
        assert!(readme.contains(&row), "README.md lacks `{row}`");
        let accuracy = format!("| {} → {} |\n", rate("before", "accuracy"), rate("after", "accuracy"));
        let line = readme.lines().find(|l| l.starts_with(&row)).unwrap();
        assert!(format!("{line}\n").ends_with(&accuracy), "`{line}` lacks `{accuracy}`");
    }
    let means = &demo["poisoned"];
    let row = format!(
        "| **mean, poisoned (10)** | {} → **{}** | {} |",
        percent(&means["asr_before"]),
        percent(&means["asr_after"]),
        percent(&means["asr_at_one"])
    );
    assert!(readme.contains(&row), "README.md lacks `{row}`");
    // A lab that is safe to begin with shows nothing.
    assert!(means["asr_before"].as_f64().unwrap() >= 0.9);
}
