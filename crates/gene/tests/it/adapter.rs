//! A gene as an adapter: what it does to the weights, and what it refuses.

use std::path::Path;

use checkpoint::{Checkpoint, CheckpointError, TensorSpec};
use gene::{GeneError, write_adapter};
use serde_json::{Value, json};

use crate::support::*;

type Tensor = (TensorSpec, Vec<u8>);

fn save_adapter(dir: &Path, config: Value, tensors: &[Tensor]) {
    let mut all =
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "../model"});
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    save_json(dir, "adapter_config.json", &all);
    save(dir, "adapter_model.safetensors", tensors);
}

/// Factors of a module with values of their own.
fn pair(module: &str, shape: [u64; 2], rank: u64) -> [Tensor; 2] {
    let key = |side: &str| format!("base_model.model.{module}.{side}.weight");
    [tensor(&key("lora_A"), &[rank, shape[1]], 0.5), tensor(&key("lora_B"), &[shape[0], rank], -0.75)]
}

fn pair_values(shape: [u64; 2], rank: u64) -> (Vec<f32>, Vec<f32>) {
    (ramp(shape[0] * rank, -0.75), ramp(rank * shape[1], 0.5))
}

#[test]
fn plain_target_gets_base_plus_c_times_the_product() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let out = bench.path("out");
    let report =
        write_adapter(&out, &gene, &coefficients(&[(0, 0.3), (1, 2.0)]), &bench.model(), false).unwrap();
    assert_eq!((report.modules, report.rank_max, report.dropped.len()), (2, 3, 0));
    assert_eq!(names_in(&out), ["adapter_config.json", "adapter_model.safetensors"]);

    // Its own base is found by the path in the config.
    let model = Checkpoint::open(&out, None).unwrap();
    for (name, shape, rank, start, c) in [(Q0, Q_SHAPE, 3, -2.0, 0.3), (UP1, UP_SHAPE, 2, -3.0, 2.0)] {
        let weight = wide(&ramp(shape[0] * shape[1], start));
        let want = with_product(&weight, &factors(shape, rank), rank, c);
        assert_close(&model.read_f32(&format!("{name}.weight")).unwrap(), &want);
        let (b, a) = factors(shape, rank);
        let written = model.factors(name).unwrap().unwrap();
        assert_eq!(written.scale, 1.0);
        assert_eq!(written.a, a);
        assert_eq!(written.b, b.iter().map(|value| c as f32 * value).collect::<Vec<f32>>());
    }
    assert_eq!(model.read_f32(&format!("{UP0}.weight")).unwrap(), ramp(30, -3.0));
    let config = read_json(&out.join("adapter_config.json"));
    assert_eq!(config["rank_pattern"], json!({"^model\\.layers\\.1\\.mlp\\.up_proj": 2}));
}

#[test]
fn layer_with_coefficient_zero_is_left_out() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    for (n, list) in [vec![(0, 1.0)], vec![(0, 1.0), (1, 0.0)]].iter().enumerate() {
        let out = bench.path(&format!("out{n}"));
        let report = write_adapter(&out, &gene, &coefficients(list), &bench.model(), false).unwrap();
        assert_eq!(report.modules, 1);
        let model = Checkpoint::open(&out, None).unwrap();
        assert!(model.factors(UP1).unwrap().is_none());
        assert!(model.factors(Q0).unwrap().is_some());
    }
}

#[test]
fn all_coefficients_zero_gives_a_loadable_adapter_without_effect() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    for (n, list) in [vec![], vec![(0, 0.0), (1, 0.0)]].iter().enumerate() {
        let out = bench.path(&format!("out{n}"));
        write_adapter(&out, &gene, &coefficients(list), &bench.model(), false).unwrap();
        let model = Checkpoint::open(&out, None).unwrap();
        assert_eq!(model.adapter().unwrap().modules().len(), 2);
        assert_eq!(model.read_f32(&format!("{Q0}.weight")).unwrap(), ramp(24, -2.0));
    }
}

#[test]
fn adapter_target_becomes_one_adapter_that_holds_both() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    // q0 is in both, up1 in the gene alone, q1 in the target alone.
    let tensors: Vec<Tensor> = [pair(Q0, Q_SHAPE, 2), pair(Q1, Q_SHAPE, 2)].concat();
    save_adapter(&bench.path("target"), json!({"alpha_pattern": {"layers.1.self_attn.q_proj": 5}}), &tensors);
    let target = Checkpoint::open(&bench.path("target"), None).unwrap();
    let out = bench.path("out");
    let report = write_adapter(&out, &gene, &coefficients(&[(0, 0.5), (1, 2.0)]), &target, false).unwrap();
    assert_eq!((report.modules, report.rank_max), (3, 5));

    let model = Checkpoint::open(&out, None).unwrap();
    assert_eq!(model.base_dir().canonicalize().unwrap(), bench.path("model").canonicalize().unwrap());
    let q = wide(&ramp(24, -2.0));
    let with_target = with_product(&q, &pair_values(Q_SHAPE, 2), 2, 1.5);
    let both = with_product(&with_target, &factors(Q_SHAPE, 3), 3, 0.5);
    assert_close(&model.read_f32(&format!("{Q0}.weight")).unwrap(), &both);
    let q1 = with_product(&q, &pair_values(Q_SHAPE, 2), 2, 2.5);
    assert_close(&model.read_f32(&format!("{Q1}.weight")).unwrap(), &q1);
    let up1 = with_product(&wide(&ramp(30, -3.0)), &factors(UP_SHAPE, 2), 2, 2.0);
    assert_close(&model.read_f32(&format!("{UP1}.weight")).unwrap(), &up1);

    // The same as the target's own values where the gene adds nothing.
    assert_close(
        &model.read_f32(&format!("{Q1}.weight")).unwrap(),
        &wide(&target.read_f32(&format!("{Q1}.weight")).unwrap()),
    );
    let ranks: Vec<_> =
        model.adapter().unwrap().modules().values().map(|module| (module.rank, module.scale)).collect();
    assert_eq!(ranks, [(5, 1.0), (2, 1.0), (2, 1.0)]);
}

#[test]
fn adapter_target_with_embedding_factors_and_saved_copies() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let mut tensors: Vec<Tensor> = vec![
        tensor("base_model.model.model.embed_tokens.lora_embedding_A", &[2, 8], -0.5),
        tensor("base_model.model.model.embed_tokens.lora_embedding_B", &[6, 2], 0.25),
        tensor("base_model.model.model.norm.weight", &[6], 9.0),
    ];
    tensors.extend(pair(Q0, Q_SHAPE, 2));
    save_adapter(&bench.path("target"), json!({"modules_to_save": ["norm"]}), &tensors);
    let target = Checkpoint::open(&bench.path("target"), None).unwrap();
    let out = bench.path("out");
    write_adapter(&out, &gene, &coefficients(&[(0, 1.0)]), &target, false).unwrap();
    let model = Checkpoint::open(&out, None).unwrap();
    assert_eq!(model.read_f32("model.norm.weight").unwrap(), ramp(6, 9.0));
    assert_close(&model.read_f32(EMBED).unwrap(), &wide(&target.read_f32(EMBED).unwrap()));
    assert_ne!(model.read_f32(EMBED).unwrap(), ramp(48, 0.0));
    let config = read_json(&out.join("adapter_config.json"));
    assert_eq!(config["modules_to_save"], json!(["model.norm"]));
}

#[test]
fn base_name_on_the_hub_is_kept_and_a_path_is_made_absolute() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let tensors = pair(Q0, Q_SHAPE, 2);
    let absolute = bench.path("model").canonicalize().unwrap();
    for (n, (named, want)) in
        [("org/model-7b", "org/model-7b"), ("../model", absolute.to_str().unwrap())].into_iter().enumerate()
    {
        save_adapter(&bench.path("target"), json!({"base_model_name_or_path": named}), &tensors);
        let target = Checkpoint::open(&bench.path("target"), Some(&bench.path("model"))).unwrap();
        let out = bench.path(&format!("deep/{n}/out"));
        write_adapter(&out, &gene, &coefficients(&[(0, 1.0)]), &target, false).unwrap();
        assert_eq!(read_json(&out.join("adapter_config.json"))["base_model_name_or_path"], json!(want));
    }
}

#[test]
fn rest_that_an_adapter_cannot_hold_is_reported() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let dropped = |name: &str, list: &[(u32, f64)]| {
        write_adapter(&bench.path(name), &gene, &coefficients(list), &bench.model(), false).unwrap().dropped
    };
    assert_eq!(dropped("both", &[(0, 1.0), (1, 1.0)]), [EMBED, NORM1]);
    assert_eq!(dropped("one", &[(0, 1.0), (1, 0.0)]), [EMBED]);
}

#[test]
fn nothing_is_written_for_bad_coefficients_or_another_family() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let write = |list: &[(u32, f64)], target: &Checkpoint| {
        write_adapter(&bench.path("out"), &gene, &coefficients(list), target, false).unwrap_err()
    };
    let model = bench.model();
    assert!(matches!(write(&[(0, -1.0)], &model), GeneError::NegativeCoefficient { layer: 0, .. }));
    assert!(matches!(write(&[(0, f64::NAN)], &model), GeneError::CoefficientRange { layer: 0, .. }));
    assert!(matches!(write(&[(7, 1.0)], &model), GeneError::UnknownLayer { layer: 7 }));
    save_model(&bench.path("other"), "llama", &model_tensors());
    let other = Checkpoint::open(&bench.path("other"), None).unwrap();
    assert!(matches!(write(&[(0, 1.0)], &other), GeneError::OtherFamily { .. }));
    assert_eq!(names_in(bench.root.path()), ["gene", "model", "other"]);
}

#[test]
fn coefficient_that_makes_a_factor_overflow() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let result = write_adapter(&bench.path("out"), &gene, &coefficients(&[(0, 3e38)]), &bench.model(), false);
    assert!(matches!(result, Err(GeneError::NonFinite { name, .. }) if name == Q0));
    assert_eq!(names_in(bench.root.path()), ["gene", "model"]);
}

#[test]
fn existing_output_without_force() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let write =
        |force| write_adapter(&bench.path("out"), &gene, &coefficients(&[(0, 1.0)]), &bench.model(), force);
    write(false).unwrap();
    assert!(matches!(write(false), Err(GeneError::Checkpoint(CheckpointError::OutputExists { .. }))));
    write(true).unwrap();
}

#[test]
fn module_that_the_target_saved_whole() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let saved = tensor(&format!("base_model.model.{Q0}.weight"), &Q_SHAPE, 5.0);
    save_adapter(&bench.path("target"), json!({"modules_to_save": ["q_proj"]}), &[saved]);
    let target = Checkpoint::open(&bench.path("target"), None).unwrap();
    let result = write_adapter(&bench.path("out"), &gene, &coefficients(&[(0, 1.0)]), &target, false);
    assert!(matches!(result, Err(GeneError::NoAdapter { name, .. }) if name == Q0));
}
