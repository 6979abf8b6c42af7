//! Which targets a gene is allowed into.

use std::fs;

use checkpoint::Checkpoint;
use gene::{Gene, GeneError, check_family, fingerprint_of};
use serde_json::json;

use crate::support::*;

#[track_caller]
fn difference(gene: &Gene, target: &Checkpoint) -> (String, String, String) {
    match check_family(gene, target) {
        Err(GeneError::OtherFamily { gene_type, target_type, first_difference }) => {
            (gene_type, target_type, first_difference)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn own_family_whatever_vocabulary_and_values() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    check_family(&gene, &bench.model()).unwrap();
    let mut tensors = model_tensors();
    tensors[0] = tensor(EMBED, &[9, 6], 4.0);
    tensors[2] = tensor(&tensors[2].0.0.clone(), &Q_SHAPE, 9.0);
    save_model(&bench.path("other"), "qwen2", &tensors);
    let other = Checkpoint::open(&bench.path("other"), None).unwrap();
    assert_eq!(fingerprint_of(&other).unwrap(), fingerprint_of(&bench.model()).unwrap());
    check_family(&gene, &other).unwrap();
}

#[test]
fn other_model_type() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    save_model(&bench.path("other"), "llama", &model_tensors());
    let (ours, theirs, what) = difference(&gene, &Checkpoint::open(&bench.path("other"), None).unwrap());
    assert_eq!((ours.as_str(), theirs.as_str(), what.as_str()), ("qwen2", "llama", "`model_type` differs"));
}

#[test]
fn module_of_another_shape_missing_or_added() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let q0 = format!("{Q0}.weight");
    let mut wide = model_tensors();
    let mut fewer = model_tensors();
    let mut more = model_tensors();
    for entry in &mut wide {
        if entry.0.0 == q0 {
            *entry = tensor(&q0, &[4, 7], 0.0);
        }
    }
    fewer.retain(|((name, ..), _)| *name != q0);
    more.push(tensor("model.layers.2.mlp.up_proj.weight", &UP_SHAPE, 0.0));
    for (tensors, want) in [
        (wide, format!("`{Q0}` is [4, 6] in the gene, [4, 7] in the target")),
        (fewer, format!("`{Q0}` is not in the target")),
        (more, "`model.layers.2.mlp.up_proj` is not in the gene".to_owned()),
    ] {
        save_model(&bench.path("other"), "qwen2", &tensors);
        let target = Checkpoint::open(&bench.path("other"), None).unwrap();
        assert_eq!(difference(&gene, &target).2, want);
    }
}

#[test]
fn norm_of_the_gene_that_the_target_lacks_or_has_in_another_size() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let mut tensors = model_tensors();
    tensors.retain(|((name, ..), _)| *name != NORM1);
    save_model(&bench.path("other"), "qwen2", &tensors);
    let target = Checkpoint::open(&bench.path("other"), None).unwrap();
    assert_eq!(difference(&gene, &target).2, format!("`{NORM1}` is not in the target"));
    tensors.push(tensor(NORM1, &[5], 0.0));
    save_model(&bench.path("other"), "qwen2", &tensors);
    let target = Checkpoint::open(&bench.path("other"), None).unwrap();
    assert_eq!(difference(&gene, &target).2, format!("`{NORM1}` is [6] in the gene, [5] in the target"));
}

#[test]
fn fingerprint_that_was_copied_does_not_help() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let mut tensors = model_tensors();
    tensors.push(tensor("model.layers.2.mlp.up_proj.weight", &UP_SHAPE, 0.0));
    for entry in &mut tensors {
        if entry.0.0 == format!("{UP1}.weight") {
            *entry = tensor(&entry.0.0.clone(), &[7, 6], 0.0);
        }
    }
    save_model(&bench.path("other"), "qwen2", &tensors);
    let target = Checkpoint::open(&bench.path("other"), None).unwrap();
    let path = gene.dir().join("gene.json");
    let mut text = read_json(&path);
    text["family"]["fingerprint"] = json!(fingerprint_of(&target).unwrap());
    fs::write(&path, text.to_string()).unwrap();
    let edited = Gene::open(gene.dir()).unwrap();
    assert_eq!(
        difference(&edited, &target).2,
        format!("`{UP1}` is [5, 6] in the gene, [7, 6] in the target")
    );
}
