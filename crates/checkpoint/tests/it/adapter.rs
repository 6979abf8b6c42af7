//! Adapters over a base: values, and every way in which they do not fit.

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, CheckpointError, Dtype};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::support::*;

const Q: &str = "model.layers.0.self_attn.q_proj";
const Q_WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";

fn key(module: &str, ending: &str) -> String {
    format!("base_model.model.{module}.{ending}")
}

/// Factors of q_proj, rank 2 over [4, 6].
fn q_factors() -> Vec<Tensor> {
    vec![
        tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 6], &ramp(12, -1.0)),
        tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[4, 2], &ramp(8, 0.5)),
    ]
}

fn save_adapter(dir: &Path, config: &Value, tensors: &[Tensor]) {
    let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "../base"});
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    save_json(dir, "adapter_config.json", &all);
    save(dir, "adapter_model.safetensors", tensors);
}

/// `base/` and `adapter/` side by side.
fn pair(config: Value, tensors: &[Tensor]) -> (TempDir, PathBuf) {
    let root = tempdir().unwrap();
    save_model(&root.path().join("base"));
    let adapter = root.path().join("adapter");
    save_adapter(&adapter, &config, tensors);
    (root, adapter)
}

/// `weight + scale * B A`, slow and in `f64`.
fn with_product(weight: &[f32], b: &[f32], a: &[f32], rank: usize, cols: usize, scale: f64) -> Vec<f64> {
    (0..weight.len())
        .map(|at| {
            let (row, col) = (at / cols, at % cols);
            let sum: f64 =
                (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * cols + col])).sum();
            f64::from(weight[at]) + scale * sum
        })
        .collect()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let err = (f64::from(got) - want).abs();
        // All values are below 2^6 and a handful of roundings are made.
        assert!(err <= 64.0 * 8.0 * f64::from(f32::EPSILON), "{at}: got {got}, want {want}");
    }
}

#[test]
fn effective_weight_is_base_plus_scaled_product() {
    for (config, scale) in [
        (json!({}), 1.5),
        (json!({"use_rslora": true}), 3.0 / 2f64.sqrt()),
        (json!({"alpha_pattern": {"q_proj": 8}}), 4.0),
        (json!({"r": 16, "rank_pattern": {"^model\\.layers\\.0\\.self_attn\\.q_proj": 2}}), 1.5),
    ] {
        let (_root, adapter) = pair(config, &q_factors());
        let model = Checkpoint::open(&adapter, None).unwrap();
        let factors = model.factors(Q).unwrap().unwrap();
        assert_eq!((factors.rows, factors.cols, factors.rank, factors.scale), (4, 6, 2, scale));
        let want = with_product(&ramp(24, -2.0), &ramp(8, 0.5), &ramp(12, -1.0), 2, 6, scale);
        assert_close(&model.read_f32(Q_WEIGHT).unwrap(), &want);
        assert_eq!(model.read_f32("lm_head.weight").unwrap(), ramp(48, -3.0));
        assert!(model.factors("lm_head").unwrap().is_none());
        assert_eq!(model.read_base(Q_WEIGHT).unwrap().1, model_tensors()[3].1);
    }
}

#[test]
fn embedding_factors_are_transposed() {
    let embed = "model.embed_tokens";
    let (a, b) = (ramp(16, -1.0), ramp(12, 0.5));
    let (_root, adapter) = pair(
        json!({}),
        &[
            tensor(&key(embed, "lora_embedding_A"), Dtype::F32, &[2, 8], &a),
            tensor(&key(embed, "lora_embedding_B"), Dtype::F32, &[6, 2], &b),
        ],
    );
    let model = Checkpoint::open(&adapter, None).unwrap();
    // delta[v, h] = scale * sum_k B[h, k] A[k, v]
    let base = ramp(48, 1.0);
    let want: Vec<f64> = (0..48)
        .map(|at| {
            let (token, hidden) = (at / 6, at % 6);
            let sum: f64 = (0..2).map(|k| f64::from(b[hidden * 2 + k]) * f64::from(a[k * 8 + token])).sum();
            f64::from(base[at]) + 1.5 * sum
        })
        .collect();
    assert_close(&model.read_f32("model.embed_tokens.weight").unwrap(), &want);
}

#[test]
fn fan_in_fan_out_counts_for_conv1d_families_only() {
    let (a, b) = (ramp(8, -1.0), ramp(12, 0.5));
    let tensors = [
        tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 4], &a),
        tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[6, 2], &b),
    ];
    let (root, adapter) = pair(json!({"fan_in_fan_out": true}), &tensors);
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::AdapterOtherBase { .. })));
    save_json(&root.path().join("base"), "config.json", &json!({"model_type": "gpt2", "n_layer": 1}));
    let model = Checkpoint::open(&adapter, None).unwrap();
    let base = ramp(24, -2.0);
    let want: Vec<f64> = (0..24)
        .map(|at| {
            let (input, output) = (at / 6, at % 6);
            let sum: f64 = (0..2).map(|k| f64::from(b[output * 2 + k]) * f64::from(a[k * 4 + input])).sum();
            f64::from(base[at]) + 1.5 * sum
        })
        .collect();
    assert_close(&model.read_f32(Q_WEIGHT).unwrap(), &want);
}

#[test]
fn saved_copy_takes_the_place_of_the_base() {
    let mut tensors = q_factors();
    tensors.push(tensor("base_model.model.lm_head.weight", Dtype::F32, &[8, 6], &ramp(48, 7.0)));
    let (_root, adapter) = pair(json!({"modules_to_save": ["lm_head"]}), &tensors);
    let model = Checkpoint::open(&adapter, None).unwrap();
    assert_eq!(model.read_f32("lm_head.weight").unwrap(), ramp(48, 7.0));
    assert_eq!(model.read_stored("lm_head.weight").unwrap().0.dtype, Dtype::F32);
    assert_eq!(model.read_base("lm_head.weight").unwrap().0.dtype, Dtype::Bf16);
    assert_eq!(model.adapter().unwrap().saved().len(), 1);
}

#[test]
fn content_from_digests_of_the_base_is_the_adapters_content() {
    let (_root, adapter) = pair(json!({}), &q_factors());
    let open = || Checkpoint::open(&adapter, None).unwrap();
    let digests = model_tensors()
        .into_iter()
        .map(|((name, ..), bytes)| (name, xxhash_rust::xxh3::xxh3_128(&bytes)))
        .collect();
    assert_eq!(open().content_from(&digests).unwrap(), open().content().unwrap());
}

#[test]
fn base_is_found_by_argument_then_by_path_from_the_adapter() {
    let (root, adapter) = pair(json!({"base_model_name_or_path": "org/name-on-the-hub"}), &q_factors());
    let base = root.path().join("base");
    match Checkpoint::open(&adapter, None) {
        Err(CheckpointError::NoBase { base, .. }) => assert_eq!(base, "org/name-on-the-hub"),
        other => panic!("{other:?}"),
    }
    assert_eq!(Checkpoint::open(&adapter, Some(&base)).unwrap().base_dir(), base);
    assert!(matches!(
        Checkpoint::open(&adapter, Some(&root.path().join("none"))),
        Err(CheckpointError::NoBase { .. })
    ));
    save_adapter(&adapter, &json!({}), &q_factors());
    assert_eq!(Checkpoint::open(&adapter, None).unwrap().dir(), adapter);
    save_adapter(&adapter, &json!({"base_model_name_or_path": null}), &q_factors());
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::NoBase { .. })));
}

#[test]
fn base_that_is_an_adapter() {
    let (_root, adapter) = pair(json!({"base_model_name_or_path": "."}), &q_factors());
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::BaseIsAdapter { .. })));
}

#[track_caller]
fn assert_other_base(tensors: &[Tensor], tensor: &str) {
    let (root, adapter) = pair(json!({}), tensors);
    match Checkpoint::open(&adapter, None) {
        Err(error @ CheckpointError::AdapterOtherBase { .. }) => {
            let message = error.to_string();
            let folders =
                [adapter.display().to_string(), root.path().join("adapter/../base").display().to_string()];
            for part in folders.iter().map(String::as_str).chain([tensor]) {
                assert!(message.contains(part), "{message} lacks {part}");
            }
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn adapter_for_another_base_missing_module() {
    let other = "model.layers.7.self_attn.q_proj";
    assert_other_base(
        &[
            tensor(&key(other, "lora_A.weight"), Dtype::F32, &[2, 6], &ramp(12, 0.0)),
            tensor(&key(other, "lora_B.weight"), Dtype::F32, &[4, 2], &ramp(8, 0.0)),
        ],
        "model.layers.7.self_attn.q_proj.weight",
    );
}

#[test]
fn adapter_for_another_base_wrong_shape() {
    assert_other_base(
        &[
            tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 6], &ramp(12, 0.0)),
            tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[5, 2], &ramp(10, 0.0)),
        ],
        Q_WEIGHT,
    );
    assert_other_base(
        &[
            tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 4], &ramp(8, 0.0)),
            tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[6, 2], &ramp(12, 0.0)),
        ],
        Q_WEIGHT,
    );
}

#[test]
fn saved_copy_of_another_size_or_of_no_tensor() {
    let mut tensors = q_factors();
    tensors.push(tensor("base_model.model.lm_head.weight", Dtype::F32, &[9, 6], &ramp(54, 7.0)));
    assert_other_base(&tensors, "lm_head.weight");
    tensors.pop();
    tensors.push(tensor("base_model.model.score.weight", Dtype::F32, &[2, 6], &ramp(12, 7.0)));
    assert_other_base(&tensors, "score.weight");
}

#[test]
fn factor_without_its_other_half() {
    for keep in 0..2 {
        let (_root, adapter) = pair(json!({}), &q_factors()[keep..=keep]);
        assert!(
            matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::AdapterTensor { .. })),
            "{keep}"
        );
    }
}

#[test]
fn factor_of_another_rank_than_the_config_says() {
    let (_root, adapter) = pair(json!({"r": 4}), &q_factors());
    match Checkpoint::open(&adapter, None) {
        Err(CheckpointError::AdapterTensor { tensor, what, .. }) => {
            assert_eq!(tensor, key(Q, "lora_A.weight"));
            assert_eq!(what, "its rank is 2, the config says 4");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn factor_that_is_no_matrix() {
    let mut tensors = q_factors();
    tensors[0].0.2 = vec![12];
    let (_root, adapter) = pair(json!({}), &tensors);
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::AdapterTensor { .. })));
}

#[test]
fn dora_and_bias_tensors_are_refused_even_if_the_config_hides_them() {
    for ending in ["lora_magnitude_vector", "lora_B.bias", "lora_A.default.weight"] {
        let mut tensors = q_factors();
        tensors.push(tensor(&key(Q, ending), Dtype::F32, &[4], &ramp(4, 1.0)));
        let (_root, adapter) = pair(json!({}), &tensors);
        match Checkpoint::open(&adapter, None) {
            Err(CheckpointError::AdapterTensor { tensor, .. }) => assert_eq!(tensor, key(Q, ending)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn dora_and_bias_adapters_are_refused_by_config() {
    for config in [json!({"use_dora": true}), json!({"bias": "lora_only"})] {
        let (_root, adapter) = pair(config, &q_factors());
        let error = Checkpoint::open(&adapter, None).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::UnsupportedAdapter { file, .. } if file.ends_with("adapter_config.json"))
        );
        assert!(error.hint().is_some());
    }
}

#[test]
fn nan_in_a_factor_names_the_factor() {
    let mut tensors = q_factors();
    let mut values = ramp(8, 0.5);
    values[5] = f32::NAN;
    tensors[1] = tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[4, 2], &values);
    let (_root, adapter) = pair(json!({}), &tensors);
    match Checkpoint::open(&adapter, None).unwrap().read_f32(Q_WEIGHT) {
        Err(CheckpointError::NonFinite { tensor, file, index }) => {
            assert_eq!((tensor, index), (key(Q, "lora_B.weight"), 5));
            assert!(file.ends_with("adapter_model.safetensors"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sum_that_overflows_is_refused() {
    let tensors = [
        tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 6], &[3e38; 12]),
        tensor(&key(Q, "lora_B.weight"), Dtype::F32, &[4, 2], &[3e38; 8]),
    ];
    let (_root, adapter) = pair(json!({}), &tensors);
    assert!(matches!(
        Checkpoint::open(&adapter, None).unwrap().read_f32(Q_WEIGHT),
        Err(CheckpointError::NonFinite { tensor, index: 0, .. }) if tensor == Q_WEIGHT
    ));
}

#[test]
fn adapter_with_pickled_weights_or_none() {
    let (_root, adapter) = pair(json!({}), &q_factors());
    fs::rename(adapter.join("adapter_model.safetensors"), adapter.join("adapter_model.bin")).unwrap();
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::PickleOnly { .. })));
    fs::remove_file(adapter.join("adapter_model.bin")).unwrap();
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::NoWeights { .. })));
}

#[test]
fn folder_that_is_a_model_and_an_adapter() {
    let (_root, adapter) = pair(json!({}), &q_factors());
    save_model(&adapter);
    assert!(matches!(Checkpoint::open(&adapter, None), Err(CheckpointError::Ambiguous { .. })));
}

#[test]
fn content_of_an_adapter_covers_base_factors_and_alpha() {
    let mut seen = std::collections::HashSet::new();
    let (root, adapter) = pair(json!({}), &q_factors());
    let content = || Checkpoint::open(&adapter, None).unwrap().content().unwrap();
    let first = content();
    assert_eq!(first, content());
    assert!(seen.insert(first));
    save_adapter(&adapter, &json!({"lora_alpha": 4}), &q_factors());
    assert!(seen.insert(content()));
    let mut tensors = q_factors();
    tensors[0] = tensor(&key(Q, "lora_A.weight"), Dtype::F32, &[2, 6], &ramp(12, -2.0));
    save_adapter(&adapter, &json!({}), &tensors);
    assert!(seen.insert(content()));
    let base = root.path().join("base");
    assert!(seen.insert(Checkpoint::open(&base, None).unwrap().content().unwrap()));
    let mut model = model_tensors();
    model[0].1[3] ^= 1;
    save(&base, "model.safetensors", &model);
    assert!(seen.insert(content()));
}
