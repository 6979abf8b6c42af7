//! Writing and reading genes.

use std::fs;

use checkpoint::{Checkpoint, CheckpointError};
use gene::{Class, Gene, GeneError, GeneWriter, Module, RestDelta};
use proptest::prelude::*;
use serde_json::json;

use crate::support::*;

#[test]
fn written_gene_opens_with_the_same_values() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    assert_eq!(
        names_in(gene.dir()),
        ["adapter_config.json", "adapter_model.safetensors", "gene.json", "rest.safetensors"]
    );
    for (name, shape, rank) in [(Q0, Q_SHAPE, 3), (UP1, UP_SHAPE, 2)] {
        let found = gene.factors(name).unwrap();
        let (b, a) = factors(shape, rank);
        assert_eq!((found.b, found.a, found.rank, found.scale), (b, a, rank, 1.0));
        assert_eq!([found.rows as u64, found.cols as u64], shape);
        assert_eq!(gene.module(name), Some(&module(name, u32::from(name == UP1), shape, rank)));
    }
    let listed: Vec<_> =
        gene.modules().iter().map(|module| (module.name.as_str(), module.class, module.rank)).collect();
    assert_eq!(
        listed,
        [
            (UP0, Class::Unchanged, 0),
            (Q0, Class::LowRank, 3),
            (UP1, Class::LowRank, 2),
            (Q1, Class::LeftOut, 0)
        ]
    );
    assert_eq!(gene.module(Q1).unwrap().residual, 1.0);
    let rest: Vec<_> =
        gene.rest().iter().map(|entry| (entry.name.as_str(), entry.class, entry.layer)).collect();
    assert_eq!(
        rest,
        [
            (EMBED, Class::RowPatch, None),
            (NORM1, Class::Full, Some(1)),
            ("model.norm.weight", Class::LeftOut, None)
        ]
    );
    assert_eq!(gene.rest_delta(NORM1).unwrap(), RestDelta::Full(ramp(6, 0.5)));
    assert_eq!(gene.rest_delta(EMBED).unwrap(), RestDelta::Rows { rows: vec![1, 7], delta: ramp(12, 2.0) });
    assert!(matches!(gene.rest_delta("model.norm.weight"), Err(GeneError::NoRest { .. })));
    assert!(matches!(gene.factors(UP0), Err(GeneError::NoFactors { .. })));
    assert_eq!(gene.layers(), [0, 1]);
    let manifest = gene.manifest();
    assert_eq!(
        serde_json::to_value(&manifest.classes).unwrap(),
        json!({"unchanged": 2, "low-rank": 2, "full": 1, "row-patch": 1, "left-out": 2})
    );
    // 0.5^2 + 0.75^2 + ... + 1.75^2
    assert_eq!(gene.rest()[1].energy, 8.6875);
    assert_eq!((manifest.schema, manifest.energy, manifest.captured), (1, 12.5, 0.9));
    assert_eq!(manifest.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn adapter_config_of_mixed_ranks() {
    let bench = Bench::new();
    bench.save_gene("gene");
    let config = read_json(&bench.path("gene/adapter_config.json"));
    assert_eq!(
        (&config["r"], &config["lora_alpha"], &config["bias"]),
        (&json!(3), &json!(3), &json!("none"))
    );
    assert_eq!((&config["peft_type"], &config["task_type"]), (&json!("LORA"), &json!("CAUSAL_LM")));
    assert_eq!(config["inference_mode"], json!(true));
    assert_eq!(config["base_model_name_or_path"], json!("degraded"));
    assert_eq!(config["target_modules"], json!([Q0, UP1]));
    assert_eq!(config["rank_pattern"], json!({"^model\\.layers\\.1\\.mlp\\.up_proj": 2}));
    assert_eq!(config["alpha_pattern"], config["rank_pattern"]);
}

#[test]
fn gene_folder_is_an_adapter_that_any_reader_opens() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let model = Checkpoint::open(gene.dir(), Some(&bench.path("model"))).unwrap();
    for (name, shape, rank, start) in [(Q0, Q_SHAPE, 3, -2.0), (UP1, UP_SHAPE, 2, -3.0)] {
        let weight = wide(&ramp(shape[0] * shape[1], start));
        let want = with_product(&weight, &factors(shape, rank), rank, 1.0);
        assert_close(&model.read_f32(&format!("{name}.weight")).unwrap(), &want);
    }
}

#[test]
fn bytes_do_not_depend_on_the_order_of_calls() {
    let bench = Bench::new();
    let one = bench.save_gene("one");
    let mut writer = GeneWriter::create(&bench.path("two"), false).unwrap();
    writer.row_patch(EMBED, None, [8, 6], &[1, 7], &ramp(12, 2.0)).unwrap();
    writer.class_only("model.norm.weight", None, &[6], Class::LeftOut, 0.25).unwrap();
    writer.full(NORM1, Some(1), &[6], &ramp(6, 0.5)).unwrap();
    low_rank(&mut writer, UP1, 1, UP_SHAPE, 2);
    writer
        .class_only("model.layers.1.self_attn.q_proj.weight", Some(1), &Q_SHAPE, Class::LeftOut, 0.5)
        .unwrap();
    writer.class_only("model.layers.0.input_layernorm.weight", Some(0), &[6], Class::Unchanged, 0.0).unwrap();
    writer
        .class_only("model.layers.0.mlp.up_proj.weight", Some(0), &UP_SHAPE, Class::Unchanged, 0.0)
        .unwrap();
    low_rank(&mut writer, Q0, 0, Q_SHAPE, 3);
    writer.finish(bench.parts()).unwrap();
    for name in names_in(one.dir()) {
        assert_eq!(
            fs::read(one.dir().join(&name)).unwrap(),
            fs::read(bench.path("two").join(&name)).unwrap(),
            "{name}"
        );
    }
    assert_eq!(one.content(), Gene::open(&bench.path("two")).unwrap().content());
}

#[test]
fn content_is_the_documented_hash_and_moves_with_any_byte() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let mut hash = blake3::Hasher::new();
    for name in ["gene.json", "adapter_model.safetensors", "rest.safetensors"] {
        let bytes = fs::read(gene.dir().join(name)).unwrap();
        hash.update(format!("{name}\0").as_bytes())
            .update(&(bytes.len() as u64).to_le_bytes())
            .update(&bytes);
    }
    assert_eq!(gene.content(), format!("blake3:{}", hash.finalize().to_hex()));

    for name in ["gene.json", "adapter_model.safetensors", "rest.safetensors"] {
        let path = gene.dir().join(name);
        let bytes = fs::read(&path).unwrap();
        let (mut opened, mut differed) = (0, 0);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            // Most changes are refused; whatever still opens is another gene.
            if let Ok(other) = Gene::open(gene.dir()) {
                opened += 1;
                differed += usize::from(other.content() != gene.content());
            }
        }
        fs::write(&path, &bytes).unwrap();
        assert!(opened > 0, "{name}");
        assert_eq!(opened, differed, "{name}");
    }
    assert_eq!(Gene::open(gene.dir()).unwrap().content(), gene.content());
}

#[test]
fn unknown_keys_are_kept() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let path = gene.dir().join("gene.json");
    let mut text = read_json(&path);
    text["future"] = json!({"a": [1]});
    text["family"]["note"] = json!("kept");
    text["modules"][0]["spectrum"] = json!([3.0, 1.0]);
    text["rest"][0]["why"] = json!("rows");
    text["layers"][0]["probe"] = json!(true);
    text["sources"]["degraded"]["license"] = json!("apache-2.0");
    fs::write(&path, text.to_string()).unwrap();
    let read = Gene::open(gene.dir()).unwrap();
    assert_eq!(serde_json::to_value(read.manifest()).unwrap(), text);
}

#[test]
fn gene_of_the_rest_alone() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    writer.full(NORM1, Some(1), &[6], &ramp(6, 0.5)).unwrap();
    writer.finish(bench.parts()).unwrap();
    let gene = Gene::open(&bench.path("gene")).unwrap();
    assert_eq!(gene.layers(), [1]);
    assert!(gene.modules().is_empty());
    assert!(matches!(gene.factors(Q0), Err(GeneError::NoFactors { .. })));
}

#[test]
fn linear_module_kept_in_full_is_listed_in_both_places() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    writer.full("model.layers.1.mlp.up_proj.weight", Some(1), &UP_SHAPE, &ramp(30, 0.0)).unwrap();
    writer.finish(bench.parts()).unwrap();
    let gene = Gene::open(&bench.path("gene")).unwrap();
    assert_eq!(gene.module(UP1).unwrap().class, Class::Full);
    assert_eq!(gene.rest_delta("model.layers.1.mlp.up_proj.weight").unwrap(), RestDelta::Full(ramp(30, 0.0)));
}

#[test]
fn gene_without_a_difference() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    writer.class_only(NORM1, Some(1), &[6], Class::Unchanged, 0.0).unwrap();
    writer.class_only("model.norm.weight", None, &[6], Class::LeftOut, 1.0).unwrap();
    assert!(matches!(writer.finish(bench.parts()), Err(GeneError::Empty)));
    assert_eq!(names_in(bench.root.path()), ["model"]);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    let (b, a) = factors(Q_SHAPE, 3);
    let good = module(Q0, 0, Q_SHAPE, 3);
    let refused = [
        writer.low_rank(good.clone(), &b[1..], &a),
        writer.low_rank(Module { rank: 2, ..good.clone() }, &b, &a),
        writer.low_rank(Module { rank: 0, ..good.clone() }, &[], &[]),
        writer.low_rank(Module { layer: 1, name: Q0.into(), ..good.clone() }, &b, &a),
        writer.low_rank(Module { class: Class::Full, name: Q1.into(), layer: 1, ..good.clone() }, &b, &a),
        writer.full(NORM1, Some(0), &[6], &ramp(6, 0.0)),
        writer.full("model.norm.weight", None, &[7], &ramp(6, 0.0)),
        writer.row_patch(EMBED, None, [8, 6], &[7, 1], &ramp(12, 0.0)),
        writer.row_patch("lm_head.weight", None, [8, 6], &[8], &ramp(6, 0.0)),
        writer.row_patch("lm_head.weight", None, [8, 6], &[], &[]),
        writer.class_only("a.weight", None, &[6], Class::Unchanged, 1.0),
        writer.class_only("b.weight", None, &[6], Class::LeftOut, f64::NAN),
        writer.class_only("c.weight", None, &[6], Class::LowRank, 0.0),
        writer.class_only("d#rows", None, &[6], Class::Unchanged, 0.0),
    ];
    for (n, result) in refused.into_iter().enumerate() {
        assert!(matches!(result, Err(GeneError::Part { .. })), "{n}: {result:?}");
    }
    assert!(matches!(writer.file("gene.json", b"{}"), Err(GeneError::Part { .. })));
}

#[test]
fn tensor_given_twice() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    low_rank(&mut writer, Q0, 0, Q_SHAPE, 3);
    let again = writer.full("model.layers.0.self_attn.q_proj.weight", Some(0), &Q_SHAPE, &ramp(24, 0.0));
    assert!(matches!(again, Err(GeneError::Part { problem, .. }) if problem.contains("twice")));
}

#[test]
fn values_that_are_not_finite_are_not_written() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    let (mut b, a) = factors(Q_SHAPE, 3);
    b[5] = f32::NAN;
    assert!(matches!(
        writer.low_rank(module(Q0, 0, Q_SHAPE, 3), &b, &a),
        Err(GeneError::NonFinite { index: 5, .. })
    ));
    let mut delta = ramp(6, 0.0);
    delta[2] = f32::INFINITY;
    assert!(matches!(writer.full(NORM1, Some(1), &[6], &delta), Err(GeneError::NonFinite { index: 2, .. })));
    let mut writer = GeneWriter::create(&bench.path("other"), false).unwrap();
    fill(&mut writer);
    let parts = gene::ManifestParts { captured: f64::NAN, ..bench.parts() };
    assert!(matches!(writer.finish(parts), Err(GeneError::Part { name, .. }) if name == "captured"));
}

#[test]
fn existing_gene_without_force() {
    let bench = Bench::new();
    bench.save_gene("gene");
    let again = GeneWriter::create(&bench.path("gene"), false);
    assert!(matches!(again, Err(GeneError::Checkpoint(CheckpointError::OutputExists { .. }))));
    let mut writer = GeneWriter::create(&bench.path("gene"), true).unwrap();
    low_rank(&mut writer, Q0, 0, Q_SHAPE, 3);
    writer.file("log.json", b"{}").unwrap();
    writer.finish(bench.parts()).unwrap();
    assert_eq!(
        names_in(&bench.path("gene")),
        ["adapter_config.json", "adapter_model.safetensors", "gene.json", "log.json"]
    );
}

#[test]
fn dropped_writer_leaves_nothing() {
    let bench = Bench::new();
    let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
    fill(&mut writer);
    drop(writer);
    assert_eq!(names_in(bench.root.path()), ["model"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn factors_of_any_ranks_read_back_exactly(ranks in prop::collection::vec(1usize..5, 4), seed in -4.0f32..4.0) {
        let bench = Bench::new();
        let mut writer = GeneWriter::create(&bench.path("gene"), false).unwrap();
        let modules = [(Q0, 0, Q_SHAPE), (UP0, 0, UP_SHAPE), (Q1, 1, Q_SHAPE), (UP1, 1, UP_SHAPE)];
        let values = |shape: [u64; 2], rank: usize| (ramp(shape[0] * rank as u64, seed), ramp(rank as u64 * shape[1], -seed));
        for ((name, layer, shape), &rank) in modules.into_iter().zip(&ranks) {
            let (b, a) = values(shape, rank);
            writer.low_rank(module(name, layer, shape, rank), &b, &a).unwrap();
        }
        writer.finish(bench.parts()).unwrap();
        let gene = Gene::open(&bench.path("gene")).unwrap();
        for ((name, _, shape), &rank) in modules.into_iter().zip(&ranks) {
            let found = gene.factors(name).unwrap();
            prop_assert_eq!((found.b, found.a), values(shape, rank));
            prop_assert_eq!((found.rank, found.scale), (rank, 1.0));
        }
        let model = Checkpoint::open(gene.dir(), Some(&bench.path("model"))).unwrap();
        prop_assert_eq!(model.adapter().unwrap().modules().len(), 4);
    }
}
