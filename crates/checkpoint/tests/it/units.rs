//! One model in every layout: the same units and the same bytes.

use checkpoint::{Checkpoint, CheckpointError, Dtype, Role, Slice, Unit, widen_f32};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::*;

const EXPERTS: usize = 3;
const HIDDEN: usize = 6;
const INNER: usize = 4;
const LAYER: &str = "model.layers.0";

/// The value of (o, i) in a projection of an expert: exact in bf16 and different everywhere.
fn value(expert: usize, projection: usize, o: usize, i: usize) -> f32 {
    ((expert * 3 + projection) * HIDDEN * INNER + o * if projection == 2 { INNER } else { HIDDEN } + i) as f32
}

/// Gate, up and down of an expert as [out, in].
fn projection(expert: usize, projection: usize) -> Vec<f32> {
    let (out, into) = if projection == 2 { (HIDDEN, INNER) } else { (INNER, HIDDEN) };
    (0..out * into).map(|at| value(expert, projection, at / into, at % into)).collect()
}

fn bf16(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let shape: Vec<u64> = shape.iter().map(|&side| side as u64).collect();
    tensor(name, Dtype::Bf16, &shape, values)
}

/// One matrix per expert, under these names of gate, up and down.
fn per_expert(container: &str, names: [&str; 3]) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for expert in 0..EXPERTS {
        for (n, name) in names.iter().enumerate() {
            let shape = if n == 2 { [HIDDEN, INNER] } else { [INNER, HIDDEN] };
            let name = format!("{LAYER}.{container}.{expert}.{name}.weight");
            tensors.push(bf16(&name, &shape, &projection(expert, n)));
        }
    }
    tensors
}

/// [E, 2I, H] and [E, H, I].
fn fused_out_in(gate_up: &str, down: &str) -> Vec<Tensor> {
    let all = |projections: &[usize]| -> Vec<f32> {
        (0..EXPERTS).flat_map(|e| projections.iter().flat_map(move |&p| projection(e, p))).collect()
    };
    vec![
        bf16(&format!("{LAYER}.{gate_up}"), &[EXPERTS, 2 * INNER, HIDDEN], &all(&[0, 1])),
        bf16(&format!("{LAYER}.{down}"), &[EXPERTS, HIDDEN, INNER], &all(&[2])),
    ]
}

/// [E, H, 2I] and [E, I, H]; `place` gives projection and row of a column of the first.
fn fused_in_out(container: &str, place: fn(usize) -> (usize, usize)) -> Vec<Tensor> {
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    for expert in 0..EXPERTS {
        for i in 0..HIDDEN {
            gate_up.extend((0..2 * INNER).map(|col| {
                let (projection, o) = place(col);
                value(expert, projection, o, i)
            }));
        }
        for i in 0..INNER {
            down.extend((0..HIDDEN).map(|o| value(expert, 2, o, i)));
        }
    }
    vec![
        bf16(&format!("{LAYER}.{container}.gate_up_proj"), &[EXPERTS, HIDDEN, 2 * INNER], &gate_up),
        bf16(&format!("{LAYER}.{container}.down_proj"), &[EXPERTS, INNER, HIDDEN], &down),
    ]
}

fn halves(col: usize) -> (usize, usize) {
    (col / INNER, col % INNER)
}

fn interleaved(col: usize) -> (usize, usize) {
    (col % 2, col / 2)
}

fn config(model_type: &str) -> Value {
    json!({"model_type": model_type, "hidden_size": HIDDEN})
}

fn read(model: &Checkpoint, unit: &Unit, rows: std::ops::Range<u64>) -> Vec<u8> {
    let mut out = vec![0xa5; ((rows.end - rows.start) * unit.cols() * unit.dtype.bits() / 8) as usize];
    model.read_unit(unit, rows, &mut out).unwrap();
    out
}

/// Names, shapes and bytes of all units.
fn listing(model: &Checkpoint) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let units = model.units().unwrap();
    assert!(units.is_sorted_by(|a, b| a.name < b.name));
    units.iter().map(|u| (u.name.clone(), u.shape.clone(), read(model, u, 0..u.rows()))).collect()
}

#[test]
fn fused_and_per_expert_folders_have_the_same_units_and_bytes() {
    let ours = ["gate_proj", "up_proj", "down_proj"];
    let fused =
        |parent: &str| fused_out_in(&format!("{parent}.gate_up_proj"), &format!("{parent}.down_proj"));
    let numbered = ["w1", "w3", "w2"];
    let cases: Vec<(&str, Vec<Tensor>, Vec<Tensor>)> = vec![
        ("qwen3_moe", per_expert("mlp.experts", ours), fused("mlp.experts")),
        ("deepseek_v3", per_expert("mlp.experts", ours), fused("mlp.experts")),
        ("mixtral", per_expert("block_sparse_moe.experts", numbered), fused("mlp.experts")),
        ("mixtral", per_expert("block_sparse_moe.experts", numbered), fused("block_sparse_moe.experts")),
        ("lfm2_moe", per_expert("feed_forward.experts", numbered), fused("feed_forward.experts")),
        ("gemma4_text", per_expert("experts", ours), fused("experts")),
        (
            "granitemoe",
            fused("block_sparse_moe.experts"),
            fused_out_in("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        ),
        (
            "llama4_text",
            per_expert("feed_forward.experts", ours),
            fused_in_out("feed_forward.experts", halves),
        ),
        ("qwen3_vl_moe", per_expert("mlp.experts", ours), fused_in_out("mlp.experts", halves)),
        ("gpt_oss", per_expert("mlp.experts", ours), fused_in_out("mlp.experts", interleaved)),
    ];
    for (model_type, one, other) in cases {
        let (_one, one) = folder(&config(model_type), &one);
        let (_other, other) = folder(&config(model_type), &other);
        let (one, other) = (listing(&one), listing(&other));
        assert_eq!(one.len(), 3 * EXPERTS, "{model_type}");
        assert_eq!(one, other, "{model_type}");
        let (name, shape, bytes) = &other[1];
        assert!(name.ends_with("experts.0.gate_proj.weight"), "{model_type}: {name}");
        assert_eq!(shape, &[INNER as u64, HIDDEN as u64]);
        assert_eq!(widen_f32(bytes, Dtype::Bf16).unwrap(), projection(0, 0), "{model_type}");
    }
}

#[test]
fn model_type_of_the_text_model_decides() {
    let nested = json!({"model_type": "llama4", "hidden_size": 99,
        "text_config": {"model_type": "llama4_text", "hidden_size": HIDDEN}});
    let (_a, a) = folder(&nested, &fused_in_out("feed_forward.experts", halves));
    let (_b, b) = folder(&config("llama4_text"), &fused_in_out("feed_forward.experts", halves));
    assert_eq!(listing(&a), listing(&b));
    let wrapper = json!({"model_type": "wrapper", "text_config": {"model_type": "qwen2_moe"}});
    let (_c, c) = folder(&wrapper, &fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj"));
    assert_eq!(listing(&c).len(), 3 * EXPERTS);
}

#[test]
fn slices_of_each_layout() {
    let (e, h, i) = (EXPERTS as u64, HIDDEN as u64, INNER as u64);
    let slice = |start, row_stride, col_stride| Slice { start, row_stride, col_stride };
    let last = 2 * i * h * (e - 1);
    for (model_type, tensors, gate, up, down) in [
        (
            "qwen3_moe",
            fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            slice(last, h, 1),
            slice(last + i * h, h, 1),
            slice(last / 2, i, 1),
        ),
        (
            "qwen3_vl_moe",
            fused_in_out("mlp.experts", halves),
            slice(last, 1, 2 * i),
            slice(last + i, 1, 2 * i),
            slice(last / 2, 1, h),
        ),
        (
            "gpt_oss",
            fused_in_out("mlp.experts", interleaved),
            slice(last, 2, 2 * i),
            slice(last + 1, 2, 2 * i),
            slice(last / 2, 1, h),
        ),
    ] {
        let (_dir, model) = folder(&config(model_type), &tensors);
        let units = model.units().unwrap();
        for (projection, want) in [("gate", gate), ("up", up), ("down", down)] {
            let name = format!("{LAYER}.mlp.experts.2.{projection}_proj.weight");
            let unit = units.iter().find(|unit| unit.name == name).unwrap();
            assert_eq!(unit.slice, want, "{model_type} {projection}");
            assert_eq!(unit.role, Role::Linear { layer: 0 });
            assert!(unit.tensor.starts_with("model.layers.0.mlp.experts."));
        }
    }
}

#[test]
fn any_rows_of_any_layout() {
    for (model_type, tensors) in [
        ("qwen3_moe", fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ("qwen3_vl_moe", fused_in_out("mlp.experts", halves)),
        ("gpt_oss", fused_in_out("mlp.experts", interleaved)),
    ] {
        let (_dir, model) = folder(&config(model_type), &tensors);
        for unit in model.units().unwrap() {
            let whole = read(&model, &unit, 0..unit.rows());
            let row_bytes = (unit.cols() * 2) as usize;
            for start in 0..=unit.rows() {
                for end in start..=unit.rows() {
                    let want = &whole[start as usize * row_bytes..end as usize * row_bytes];
                    assert_eq!(read(&model, &unit, start..end), want, "{} {start}..{end}", unit.name);
                }
            }
        }
    }
}

#[test]
fn gather_of_more_than_one_buffer_in_every_element_size() {
    // One row of the stack is 2 MiB of the 4 MiB buffer in f32, so several reads are made and the last is short.
    let (hidden, inner) = (5, 1 << 18);
    let mut config = config("gpt_oss");
    config["hidden_size"] = json!(hidden);
    for dtype in [Dtype::F16, Dtype::F32, Dtype::F64] {
        let values: Vec<f32> = (0..hidden * 2 * inner).map(|at| (at % 2048) as f32).collect();
        let name = "model.layers.0.mlp.experts.gate_up_proj";
        let stack = tensor(name, dtype, &[1, hidden as u64, 2 * inner as u64], &values);
        let (_dir, model) = folder(&config, &[stack]);
        let up = &model.units().unwrap()[1];
        assert!(up.name.ends_with("0.up_proj.weight"));
        let got = widen_f32(&read(&model, up, 0..inner as u64), dtype).unwrap();
        for (at, got) in got.iter().enumerate() {
            let (o, i) = (at / hidden, at % hidden);
            assert_eq!(*got, ((i * 2 * inner + 2 * o + 1) % 2048) as f32, "{dtype} ({o}, {i})");
        }
        let few = read(&model, up, 7..9);
        assert_eq!(widen_f32(&few, dtype).unwrap(), got[7 * hidden..9 * hidden]);
    }
}

#[test]
fn plain_tensors_are_units_of_their_own() {
    let mut tensors = model_tensors();
    tensors.push(tensor("model.layers.0.linear_attn.conv1d.weight", Dtype::Bf16, &[4, 1, 3], &ramp(12, 0.0)));
    tensors.push(tensor("model.layers.0.time_mix", Dtype::Bf16, &[1, 1, 6], &ramp(6, 0.0)));
    tensors.push(tensor(
        "model.layers.0.self_attn.diagonal_decay",
        Dtype::F32,
        &[1, 2, 3, 3],
        &ramp(18, 0.0),
    ));
    tensors.push(tensor("model.scalar", Dtype::F32, &[], &[2.0]));
    tensors.push(tensor("visual.patch_embed.proj.weight", Dtype::Bf16, &[2, 3, 2, 2], &ramp(24, 0.0)));
    let (_dir, model) = folder(&json!({"model_type": "llama"}), &tensors);
    let units = model.units().unwrap();
    assert_eq!(units.len(), tensors.len());
    for unit in &units {
        let ((_, dtype, shape), bytes) = tensors.iter().find(|((name, ..), _)| *name == unit.name).unwrap();
        assert_eq!((&unit.tensor, &unit.dtype, &unit.shape), (&unit.name, dtype, shape));
        assert_eq!(unit.role, checkpoint::role(&unit.name, shape));
        assert_eq!(unit.slice, Slice { start: 0, row_stride: unit.cols(), col_stride: 1 });
        assert_eq!(&read(&model, unit, 0..unit.rows()), bytes, "{}", unit.name);
        assert!(unit.scale.is_none());
        assert!(model.read_scales(unit).unwrap().is_empty());
    }
    assert_eq!((units[0].rows(), units[0].cols()), (8, 6));
    let norm = units.iter().find(|unit| unit.shape == [6]).unwrap();
    assert_eq!((norm.rows(), norm.cols()), (1, 6));
    assert!(model.scale_tensors().unwrap().is_empty());
}

#[test]
fn gate_and_up_in_one_matrix_of_a_dense_model_is_one_module() {
    // As in GLM-4; what is taken apart are experts only.
    let name = "model.layers.0.mlp.gate_up_proj.weight";
    let fused = bf16(name, &[2 * INNER, HIDDEN], &ramp(2 * INNER * HIDDEN, 0.0));
    for model_type in ["glm", "glm4"] {
        let (_dir, model) = folder(&config(model_type), std::slice::from_ref(&fused));
        let units = model.units().unwrap();
        assert_eq!(units.len(), 1);
        let unit = &units[0];
        assert_eq!((unit.name.as_str(), unit.tensor.as_str()), (name, name));
        assert_eq!((unit.rows(), unit.cols()), (2 * INNER as u64, HIDDEN as u64));
        assert_eq!(unit.role, Role::Linear { layer: 0 });
        assert_eq!(read(&model, unit, 0..unit.rows()), fused.1);
    }
}

#[test]
fn biases_of_fused_experts_stay_as_they_are_stored() {
    let mut tensors = fused_in_out("mlp.experts", interleaved);
    let bias = "model.layers.0.mlp.experts.gate_up_proj_bias";
    tensors.push(bf16(bias, &[EXPERTS, 2 * INNER], &ramp(EXPERTS * 2 * INNER, 0.0)));
    tensors.push(bf16("model.layers.0.mlp.router.bias", &[EXPERTS], &ramp(EXPERTS, 0.0)));
    let (_dir, model) = folder(&config("gpt_oss"), &tensors);
    let units = model.units().unwrap();
    assert_eq!(units.len(), 3 * EXPERTS + 2);
    let unit = units.iter().find(|unit| unit.name == bias).unwrap();
    assert_eq!((unit.shape.as_slice(), unit.role), (&[3, 8][..], Role::LayerOther { layer: 0 }));
    assert_eq!(read(&model, unit, 0..3), tensors[2].1);
}

#[track_caller]
fn assert_layout_error(config: &Value, tensors: &[Tensor], detail: &str) {
    let (_dir, model) = folder(config, tensors);
    match model.units() {
        Err(error @ CheckpointError::Layout { .. }) => {
            let message = error.to_string();
            let model_type = config["model_type"].as_str().unwrap();
            for part in [detail, "model.safetensors", "model.layers.0.", model_type] {
                assert!(message.contains(part), "{part}: {message}");
            }
            assert!(error.hint().is_some());
        }
        other => panic!("{detail}: {other:?}"),
    }
}

#[test]
fn stacks_that_no_layout_is_known_for() {
    let fused = fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    assert_layout_error(&config("new_moe"), &fused, "mlp.experts.down_proj");
    // Known family, but a name that its table does not have.
    let named = bf16("model.layers.0.mlp.experts.w13", &[3, 8, 6], &ramp(144, 0.0));
    assert_layout_error(&config("qwen3_moe"), &[named], "no layout is known");
}

#[test]
fn stack_saved_in_the_other_orientation() {
    let fused = fused_in_out("mlp.experts", halves);
    assert_layout_error(&config("qwen3_moe"), &fused[..1], "in side of 6");
    assert_layout_error(&config("qwen3_moe"), &fused[1..], "out side of 6");
    let fused = fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    assert_layout_error(&config("gpt_oss"), &fused, "side of 6");
}

#[test]
fn family_that_is_written_in_two_layouts_is_read_in_both() {
    let (_a, a) = folder(&config("qwen3_vl_moe"), &fused_in_out("mlp.experts", halves));
    let fused = fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    let (_b, b) = folder(&config("qwen3_vl_moe"), &fused);
    assert_eq!(listing(&a), listing(&b));
    // Without the hidden size nothing tells them apart.
    assert_layout_error(&json!({"model_type": "qwen3_vl_moe"}), &fused, "fits both layouts");
}

#[test]
fn hostile_stack_of_no_elements_makes_no_units() {
    let empty = (("model.layers.0.mlp.experts.down_proj".into(), Dtype::Bf16, vec![1 << 50, 0, 6]), vec![]);
    assert_layout_error(&json!({"model_type": "qwen3_moe"}), &[empty], "above zero");
}

#[test]
fn fused_and_per_expert_in_one_folder() {
    let mut tensors = fused_out_in("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    tensors.extend(per_expert("mlp.experts", ["gate_proj", "up_proj", "down_proj"]).into_iter().take(1));
    let (_dir, model) = folder(&config("qwen3_moe"), &tensors);
    match model.units() {
        Err(CheckpointError::DuplicateTensor { tensor, first, .. }) => {
            assert_eq!(tensor, "model.layers.0.mlp.experts.0.gate_proj.weight");
            assert!(first.ends_with("model.safetensors"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn saved_copy_of_an_adapter_is_what_a_unit_reads() {
    let root = tempdir().unwrap();
    save_model(&root.path().join("base"));
    let adapter = root.path().join("adapter");
    save_json(
        &adapter,
        "adapter_config.json",
        &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "../base"}),
    );
    let copy = tensor("base_model.model.lm_head.weight", Dtype::F32, &[8, 6], &ramp(48, 7.0));
    save(&adapter, "adapter_model.safetensors", std::slice::from_ref(&copy));
    let model = Checkpoint::open(&adapter, None).unwrap();
    let units = model.units().unwrap();
    assert_eq!((units[0].name.as_str(), units[0].dtype), ("lm_head.weight", Dtype::F32));
    assert_eq!(read(&model, &units[0], 0..8), copy.1);
    assert_eq!(read(&model, &units[3], 1..3), model_tensors()[3].1[12..36]);
}

#[test]
fn rows_and_buffers_that_do_not_fit() {
    let (_dir, model) = folder(&config("qwen3_vl_moe"), &fused_in_out("mlp.experts", halves));
    let unit = model.units().unwrap().remove(1);
    let refused = |unit: &Unit, rows: std::ops::Range<u64>, bytes: usize| {
        let mut out = vec![0; bytes];
        matches!(model.read_unit(unit, rows, &mut out), Err(CheckpointError::UnitRange { .. }))
    };
    assert!(!refused(&unit, 0..2, 24));
    assert!(refused(&unit, 0..2, 23));
    assert!(refused(&unit, 0..5, 60));
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 2..1;
    assert!(refused(&unit, reversed, 12));
    assert!(refused(&unit, 0..u64::MAX, 0));
    for slice in [
        Slice { start: 140, ..unit.slice },
        Slice { start: u64::MAX, ..unit.slice },
        Slice { row_stride: u64::MAX, ..unit.slice },
    ] {
        assert!(refused(&Unit { slice, ..unit.clone() }, 0..4, 48), "{slice:?}");
    }
    assert!(refused(&Unit { dtype: Dtype::F16, ..unit.clone() }, 0..2, 24));
    let foreign = Unit { tensor: "ghost".into(), ..unit };
    let mut out = [0; 24];
    assert!(matches!(model.read_unit(&foreign, 0..2, &mut out), Err(CheckpointError::UnknownTensor { .. })));
}
