//! Every input of the corpus, and changes of them, through every target: what a fuzzer found stays found.
//!
//! Files named `valid-…` have to be accepted, `hostile-…` refused; the others were found by fuzzing.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fuzz::{Random, TARGETS, Target, mutated, repaired_header};

/// Changed inputs of each target: a few seconds in all.
const MUTATIONS: usize = 2000;

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut inputs: Vec<(String, Vec<u8>)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

/// Runs a target; a panic names the input.
#[track_caller]
fn run(target: Target, what: &str, input: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(input)))
        .unwrap_or_else(|_| panic!("{what} breaks a promise: b\"{}\"", input.escape_ascii()))
}

#[track_caller]
fn check(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(known, _)| *known == name).unwrap();
    let inputs = corpus(name);
    let mut accepted: Vec<&[u8]> = Vec::new();
    for (file, input) in &inputs {
        let found = run(target, file, input);
        assert!(found || !file.starts_with("valid-"), "{file} was refused");
        assert!(!found || !file.starts_with("hostile-"), "{file} was accepted");
        accepted.extend(found.then_some(input.as_slice()));
    }
    let bytes: usize = inputs.iter().map(|(_, input)| input.len()).sum();
    assert!(inputs.len() <= 70 && bytes <= 200_000, "{} files, {bytes} bytes", inputs.len());

    let mut random = Random(name.len() as u64);
    let (mut changed, mut kept) = (0, 0);
    while changed < MUTATIONS {
        let other = inputs[random.below(inputs.len())].1.as_slice();
        // Mostly what is accepted, so that a change gets far.
        let one = if random.below(4) > 0 { accepted[random.below(accepted.len())] } else { other };
        let mut input = mutated(one, other, &mut random);
        if name == "header" && random.below(4) > 0 {
            input = repaired_header(input);
        }
        kept += usize::from(run(target, &format!("change {changed}"), &input));
        changed += 1;
    }
    // Changes that are all refused, or all accepted, would test one branch only. Most changes of an index are a name that
    // is not there.
    assert!(kept > MUTATIONS / 400 && kept < MUTATIONS, "{kept} of {MUTATIONS} accepted");
}

#[test]
fn header_survives_its_corpus_and_changes_of_it() {
    check("header");
}

#[test]
fn index_survives_its_corpus_and_changes_of_it() {
    check("index");
}

#[test]
fn adapter_config_survives_its_corpus_and_changes_of_it() {
    check("adapter_config");
}

#[test]
fn gene_manifest_survives_its_corpus_and_changes_of_it() {
    check("gene_manifest");
}

#[test]
fn data_rows_survives_its_corpus_and_changes_of_it() {
    check("data_rows");
}

#[test]
fn folders_of_the_corpus_are_the_targets() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut folders: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    folders.sort();
    let mut targets = TARGETS.map(|(name, _)| name.to_owned());
    targets.sort();
    assert_eq!(folders, targets);
}
