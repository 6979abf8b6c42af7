//! Fp8 weights and their scales, as they are published and as they are not supposed to be.

use std::collections::BTreeMap;

use checkpoint::{Checkpoint, CheckpointError, Dtype, Unit};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::*;

const Q: &str = "model.layers.0.self_attn.q_proj";
const EXPERTS: &str = "model.layers.0.mlp.experts";

fn codes(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
    let count = shape.iter().product::<u64>() as usize;
    ((name.to_owned(), dtype, shape.to_vec()), (0..count).map(|at| (at % 120) as u8).collect())
}

/// q_proj of [5, 7] in blocks of [2, 4]: a grid of [3, 2].
fn weight() -> Tensor {
    codes(&format!("{Q}.weight"), Dtype::F8E4M3, &[5, 7])
}

fn blocks() -> Value {
    json!({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}})
}

fn no_blocks() -> Value {
    json!({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}})
}

fn scale(name: &str, shape: &[u64], values: &[f32]) -> Tensor {
    tensor(name, Dtype::F32, shape, values)
}

fn unit<'a>(units: &'a [Unit], name: &str) -> &'a Unit {
    units.iter().find(|unit| unit.name == name).unwrap()
}

#[test]
fn block_scales_under_each_of_their_names() {
    let values = ramp(6, 0.5);
    for name in ["weight_scale_inv", "scale", "weight_scale"] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let name = format!("{Q}.{name}");
            let (_dir, model) = folder(&blocks(), &[weight(), tensor(&name, dtype, &[3, 2], &values)]);
            let units = model.units().unwrap();
            assert_eq!(units.len(), 1);
            let scale = units[0].scale.clone().unwrap();
            assert_eq!((&scale.tensor, scale.start, scale.block, scale.grid), (&name, 0, [2, 4], [3, 2]));
            assert_eq!((scale.row, scale.col), (0, 0));
            assert_eq!((scale.at(0, 0), scale.at(1, 3), scale.at(1, 4), scale.at(4, 6)), (0, 0, 1, 5));
            assert_eq!(model.read_scales(&units[0]).unwrap(), values);
            assert_eq!(model.scale_tensors().unwrap(), [name]);
            assert_eq!(units[0].dtype, Dtype::F8E4M3);
            let mut out = vec![0; 14];
            model.read_unit(&units[0], 3..5, &mut out).unwrap();
            assert_eq!(out, weight().1[21..]);
        }
    }
}

#[test]
fn block_size_of_the_nested_text_config() {
    let config = json!({"model_type": "wrapper", "text_config": {"model_type": "deepseek_v3",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}}});
    let tensors = [weight(), scale(&format!("{Q}.weight_scale_inv"), &[3, 2], &ramp(6, 1.0))];
    assert_eq!(folder(&config, &tensors).1.units().unwrap()[0].scale.as_ref().unwrap().block, [2, 4]);
}

#[test]
fn powers_of_two_as_scales() {
    let bytes = vec![127, 128, 126, 1, 254, 0];
    let name = format!("{Q}.weight_scale_inv");
    let (_dir, model) =
        folder(&blocks(), &[weight(), ((name.clone(), Dtype::F8E8M0, vec![3, 2]), bytes.clone())]);
    let units = model.units().unwrap();
    let want = [1.0, 2.0, 0.5, 2f32.powi(-126), 2f32.powi(127), 2f32.powi(-127)];
    assert_eq!(model.read_scales(&units[0]).unwrap(), want);

    let mut nan = bytes;
    nan[3] = 255;
    let (_dir, model) = folder(&blocks(), &[weight(), ((name, Dtype::F8E8M0, vec![3, 2]), nan)]);
    assert_scale_value(&model, 3);
}

#[track_caller]
fn assert_scale_value(model: &Checkpoint, at: u64) {
    match model.read_scales(&model.units().unwrap()[0]) {
        Err(error @ CheckpointError::ScaleValue { .. }) => {
            let message = error.to_string();
            assert!(message.contains(&format!("index {at}")), "{message}");
            assert!(message.contains("q_proj.weight_scale_inv") && message.contains("model.safetensors"));
            assert!(error.hint().is_some());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn scales_that_are_no_positive_numbers() {
    for bad in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut values = ramp(6, 1.0);
        values[4] = bad;
        values[5] = bad;
        let scales = scale(&format!("{Q}.weight_scale_inv"), &[3, 2], &values);
        assert_scale_value(&folder(&blocks(), &[weight(), scales]).1, 4);
    }
}

#[test]
fn scale_in_another_shard() {
    let dir = tempdir().unwrap();
    let name = format!("{Q}.weight_scale_inv");
    let shards = [
        ("model-00001-of-00002.safetensors", scale(&name, &[3, 2], &ramp(6, 1.0))),
        ("model-00002-of-00002.safetensors", weight()),
    ];
    let mut map = BTreeMap::new();
    for (file, tensor) in shards {
        map.insert(tensor.0.0.clone(), file);
        save(dir.path(), file, &[tensor]);
    }
    save_json(dir.path(), "model.safetensors.index.json", &json!({ "weight_map": map }));
    let mut config = blocks();
    config["num_hidden_layers"] = json!(1);
    save_json(dir.path(), "config.json", &config);
    let model = Checkpoint::open(dir.path(), None).unwrap();
    let units = model.units().unwrap();
    assert_eq!((units.len(), model.read_scales(&units[0]).unwrap()), (1, ramp(6, 1.0)));
}

#[test]
fn one_scale_for_a_whole_matrix() {
    for (name, config, shape) in [
        ("weight_scale", no_blocks(), &[][..]),
        ("weight_scale", no_blocks(), &[1]),
        ("weight_scale", blocks(), &[1]),
        ("weight_scale_inv", no_blocks(), &[]),
    ] {
        let (_dir, model) = folder(&config, &[weight(), scale(&format!("{Q}.{name}"), shape, &[0.25])]);
        let units = model.units().unwrap();
        let scale = units[0].scale.as_ref().unwrap();
        assert_eq!((scale.block, scale.grid, scale.at(4, 6)), ([5, 7], [1, 1], 0));
        assert_eq!(model.read_scales(&units[0]).unwrap(), [0.25]);
    }
}

/// 2 experts, gate and up of [4, 8] each, down of [8, 4], in blocks of [2, 4].
fn stacks(gate_up: &str, down: &str) -> Vec<Tensor> {
    vec![
        codes(&format!("{EXPERTS}.gate_up_proj"), Dtype::F8E4M3, &[2, 8, 8]),
        codes(&format!("{EXPERTS}.down_proj"), Dtype::F8E4M3, &[2, 8, 4]),
        scale(&format!("{EXPERTS}.{gate_up}"), &[2, 4, 2], &ramp(16, 1.0)),
        scale(&format!("{EXPERTS}.{down}"), &[2, 4, 1], &ramp(8, 1.0)),
    ]
}

#[test]
fn scales_of_fused_experts_are_those_of_the_experts_alone() {
    let endings = ["_scale_inv", ".weight_scale_inv"];
    for ending in endings {
        let stacked = stacks(&format!("gate_up_proj{ending}"), &format!("down_proj{ending}"));
        let (_dir, fused) = folder(&blocks(), &stacked);
        // The same model with a matrix and a grid per expert.
        let mut tensors = Vec::new();
        for expert in 0..2 {
            for (n, name) in ["gate_proj", "up_proj", "down_proj"].iter().enumerate() {
                let (stack, shape, grid) = if n == 2 { (1, [8, 4], [4, 1]) } else { (0, [4, 8], [2, 2]) };
                let first = if n == 2 { expert * 32 } else { (2 * expert + n) * 32 };
                let scales = if n == 2 { expert * 4 } else { (2 * expert + n) * 4 };
                let name = format!("{EXPERTS}.{expert}.{name}.weight");
                let values = ramp(16, 1.0)[scales..scales + 4].to_vec();
                tensors.push(scale(&format!("{name}_scale_inv"), &grid, &values));
                let bytes = stacked[stack].1[first..first + 32].to_vec();
                tensors.push(((name, Dtype::F8E4M3, shape.to_vec()), bytes));
            }
        }
        let (_other, apart) = folder(&blocks(), &tensors);
        let (one, other) = (fused.units().unwrap(), apart.units().unwrap());
        assert_eq!((one.len(), fused.scale_tensors().unwrap().len()), (6, 2));
        assert_eq!((other.len(), apart.scale_tensors().unwrap().len()), (6, 6));
        for (a, b) in one.iter().zip(&other) {
            assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
            let (x, y) = (fused.read_scales(a).unwrap(), apart.read_scales(b).unwrap());
            let (p, q) = (a.scale.as_ref().unwrap(), b.scale.as_ref().unwrap());
            for o in 0..a.rows() {
                for i in 0..a.cols() {
                    assert_eq!(x[p.at(o, i) as usize], y[q.at(o, i) as usize], "{} ({o}, {i})", a.name);
                }
            }
            let bytes = |model: &Checkpoint, unit| {
                let mut out = vec![0; 32];
                model.read_unit(unit, 0..a.rows(), &mut out).unwrap();
                out
            };
            assert_eq!(bytes(&fused, a), bytes(&apart, b), "{}", a.name);
        }
        let up = unit(&one, &format!("{EXPERTS}.1.up_proj.weight")).scale.as_ref().unwrap();
        assert_eq!((up.start, up.row, up.grid), (8, 4, [4, 2]));
    }
}

#[test]
fn block_that_straddles_gate_and_up_is_read_where_the_grid_tells() {
    // Halves of 3 rows: 3 blocks of 2 over both at once, 4 if each half had blocks of its own.
    let weight = codes(&format!("{EXPERTS}.gate_up_proj"), Dtype::F8E4M3, &[1, 6, 4]);
    let name = format!("{EXPERTS}.gate_up_proj_scale_inv");
    let (_dir, model) = folder(&blocks(), &[weight.clone(), scale(&name, &[1, 3, 1], &[1.0, 2.0, 3.0])]);
    let units = model.units().unwrap();
    let up = units[1].scale.as_ref().unwrap();
    assert_eq!((up.row, up.at(0, 0), up.at(1, 0), up.at(2, 3)), (3, 1, 2, 2));
    assert_scale_error(&blocks(), &[weight, scale(&name, &[1, 4, 1], &ramp(4, 1.0))], "need [1, 3, 1]");
    // Halves of 5 rows in blocks of 3: 4 blocks either way.
    let mut config = blocks();
    config["quantization_config"]["weight_block_size"] = json!([3, 4]);
    let weight = codes(&format!("{EXPERTS}.gate_up_proj"), Dtype::F8E4M3, &[1, 10, 4]);
    assert_scale_error(&config, &[weight, scale(&name, &[1, 4, 1], &ramp(4, 1.0))], "straddle gate and up");
}

#[test]
fn one_scale_per_expert_or_for_all() {
    let weight = codes(&format!("{EXPERTS}.down_proj"), Dtype::F8E5M2, &[2, 8, 4]);
    let name = format!("{EXPERTS}.down_proj_scale_inv");
    for (shape, values, want) in [(&[2, 1, 1][..], vec![1.0, 2.0], [1.0, 2.0]), (&[], vec![3.0], [3.0, 3.0])]
    {
        let (_dir, model) = folder(&no_blocks(), &[weight.clone(), scale(&name, shape, &values)]);
        let units = model.units().unwrap();
        let got: Vec<f32> = units.iter().flat_map(|unit| model.read_scales(unit).unwrap()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn one_scale_per_half_of_gate_and_up() {
    let weight = codes(&format!("{EXPERTS}.gate_up_proj"), Dtype::F8E4M3, &[2, 8, 4]);
    let name = format!("{EXPERTS}.gate_up_proj_scale_inv");
    let tensors = [weight, scale(&name, &[2, 2, 1], &[1.0, 2.0, 3.0, 4.0])];
    let (_dir, model) = folder(&no_blocks(), &tensors);
    let got: Vec<f32> = model
        .units()
        .unwrap()
        .iter()
        .map(|unit| {
            let scale = unit.scale.as_ref().unwrap();
            assert_eq!(scale.at(0, 0), scale.at(3, 3));
            model.read_scales(unit).unwrap()[scale.at(3, 3) as usize]
        })
        .collect();
    assert_eq!(got, [1.0, 2.0, 3.0, 4.0]);
    let weight = codes(&format!("{EXPERTS}.down_proj"), Dtype::F8E4M3, &[2, 8, 4]);
    let halves = scale(&format!("{EXPERTS}.down_proj_scale_inv"), &[2, 2, 1], &ramp(4, 1.0));
    assert_scale_error(&no_blocks(), &[weight, halves], "weight_block_size");
}

#[track_caller]
fn assert_scale_error(config: &Value, tensors: &[Tensor], detail: &str) {
    let (_dir, model) = folder(config, tensors);
    for result in [model.units().map(|_| ()), model.scale_tensors().map(|_| ())] {
        match result {
            Err(error @ CheckpointError::Scale { .. }) => {
                let message = error.to_string();
                for part in [detail, "model.layers.0.", "model.safetensors"] {
                    assert!(message.contains(part), "{part}: {message}");
                }
                assert!(error.hint().unwrap().contains("weight_block_size"));
            }
            other => panic!("{detail}: {other:?}"),
        }
    }
}

#[test]
fn scales_that_do_not_fit() {
    let name = format!("{Q}.weight_scale_inv");
    let grid = |shape: &[u64]| scale(&name, shape, &ramp(shape.iter().product::<u64>() as usize, 1.0));
    assert_scale_error(&blocks(), &[weight()], "is missing");
    assert_scale_error(&no_blocks(), &[weight(), grid(&[3, 2])], "weight_block_size");
    for shape in [&[2, 3][..], &[3, 1], &[6], &[1, 3, 2], &[1, 1]] {
        assert_scale_error(&blocks(), &[weight(), grid(shape)], "over [5, 7] need [3, 2]");
        assert_scale_error(&blocks(), &[weight(), grid(shape)], &format!("is {shape:?}"));
    }
    // One scale per row is no block that the config names.
    assert_scale_error(&no_blocks(), &[weight(), grid(&[5, 1])], "is [5, 1]");
    let second = scale(&format!("{Q}.weight_scale"), &[1], &[1.0]);
    assert_scale_error(&blocks(), &[weight(), grid(&[3, 2]), second], "is given twice");
    let plain = tensor(&format!("{Q}.weight"), Dtype::Bf16, &[5, 7], &ramp(35, 0.0));
    assert_scale_error(&blocks(), &[plain, grid(&[3, 2])], "but it is BF16");
}

#[test]
fn fp8_experts_stored_as_in_out() {
    let mut config = no_blocks();
    config["model_type"] = json!("llama4_text");
    let name = "model.layers.0.feed_forward.experts.down_proj";
    let tensors = [codes(name, Dtype::F8E4M3, &[2, 4, 8]), scale(&format!("{name}_scale"), &[1], &[1.0])];
    assert_scale_error(&config, &tensors, "[in, out]");
}

#[test]
fn block_sizes_that_make_no_sense() {
    for sides in [json!([0, 4]), json!([2]), json!("128x128"), json!([2, -4]), json!([2, 4, 8])] {
        let mut config = blocks();
        config["quantization_config"]["weight_block_size"] = sides.clone();
        let (_dir, model) = folder(&config, &[weight()]);
        match model.units() {
            Err(error @ CheckpointError::Config { .. }) => {
                assert!(error.to_string().contains("weight_block_size"), "{error}");
            }
            other => panic!("{sides}: {other:?}"),
        }
    }
}

#[test]
fn scale_of_a_dtype_that_is_no_number() {
    let name = format!("{Q}.weight_scale_inv");
    let (_dir, model) = folder(&blocks(), &[weight(), codes(&name, Dtype::U8, &[3, 2])]);
    assert!(matches!(model.units(), Err(CheckpointError::UnsupportedDtype { tensor, .. }) if tensor == name));
}

#[test]
fn saved_plain_copy_of_an_fp8_weight_needs_no_scale() {
    let root = tempdir().unwrap();
    let (base, adapter) = (root.path().join("base"), root.path().join("adapter"));
    save(
        &base,
        "model.safetensors",
        &[weight(), scale(&format!("{Q}.weight_scale_inv"), &[3, 2], &ramp(6, 1.0))],
    );
    let mut config = blocks();
    config["num_hidden_layers"] = json!(1);
    save_json(&base, "config.json", &config);
    save_json(
        &adapter,
        "adapter_config.json",
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "../base"}),
    );
    let copy = tensor(&format!("base_model.model.{Q}.weight"), Dtype::Bf16, &[5, 7], &ramp(35, 0.0));
    save(&adapter, "adapter_model.safetensors", &[copy]);
    let model = Checkpoint::open(&adapter, None).unwrap();
    let units = model.units().unwrap();
    assert_eq!((units.len(), units[0].dtype, units[0].scale.is_none()), (1, Dtype::Bf16, true));
    assert_eq!(model.scale_tensors().unwrap().len(), 1);
}
