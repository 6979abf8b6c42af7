//! Layouts and number formats of the inputs: experts in stacks and one by one, 8-bit weights with block scales.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use gene::Gene;
use kernels::{CpuEngine, reference};
use serde_json::{Value, json};
use stream::{Becomes, Extract, ExtractReport, Fuse, NoProgress, Ranks, StreamError, extract, fuse, plan};
use tempfile::tempdir;

use crate::folders::{names, noise, open, sumsq, to_bf16};

const EXPERTS: usize = 3;
const INNER: usize = 20;
const HIDDEN: usize = 32;

pub(crate) fn write(dir: &Path, config: Value, tensors: &[(TensorSpec, Vec<u8>)]) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors_bytes(&default_metadata(), tensors).unwrap())
        .unwrap();
    dir.to_path_buf()
}

pub(crate) fn bf16(name: &str, shape: &[usize], values: &[f32]) -> (TensorSpec, Vec<u8>) {
    let shape = shape.iter().map(|&side| side as u64).collect();
    ((name.to_owned(), Dtype::Bf16, shape), pack_f32(values, Dtype::Bf16).unwrap())
}

/// Values of expert matrices by projection, exact in bf16.
fn experts(seed: u32, change: f32) -> Vec<[Vec<f32>; 3]> {
    let values = |at: u32, n| -> Vec<f32> {
        let change = noise(seed + 50 + at, n).into_iter().map(|x| change * x);
        noise(at, n).iter().zip(change).map(|(x, change)| to_bf16(x + change)).collect()
    };
    (0..EXPERTS as u32).map(|e| [0, 1, 2].map(|p| values(10 * e + p, INNER * HIDDEN))).collect()
}

fn config() -> Value {
    json!({"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": HIDDEN, "num_experts": EXPERTS,
        "moe_intermediate_size": INNER, "tie_word_embeddings": true})
}

fn one_by_one(dir: &Path, experts: &[[Vec<f32>; 3]]) -> PathBuf {
    let mut tensors = Vec::new();
    for (e, [gate, up, down]) in experts.iter().enumerate() {
        let name = |projection| format!("model.layers.0.mlp.experts.{e}.{projection}_proj.weight");
        tensors.push(bf16(&name("gate"), &[INNER, HIDDEN], gate));
        tensors.push(bf16(&name("up"), &[INNER, HIDDEN], up));
        tensors.push(bf16(&name("down"), &[HIDDEN, INNER], down));
    }
    write(dir, config(), &tensors)
}

fn stacked(dir: &Path, experts: &[[Vec<f32>; 3]]) -> PathBuf {
    let gate_up: Vec<f32> = experts.iter().flat_map(|[gate, up, _]| [gate, up]).flatten().copied().collect();
    let down: Vec<f32> = experts.iter().flat_map(|[.., down]| down).copied().collect();
    let name = |projection| format!("model.layers.0.mlp.experts.{projection}_proj");
    let tensors = [
        bf16(&name("gate_up"), &[EXPERTS, 2 * INNER, HIDDEN], &gate_up),
        bf16(&name("down"), &[EXPERTS, HIDDEN, INNER], &down),
    ];
    write(dir, config(), &tensors)
}

fn run(aligned: &Path, degraded: &Path, out: &Path) -> ExtractReport {
    let job = Extract::new(open(aligned), open(degraded), Ranks::Fixed(4), out);
    extract(&CpuEngine::new(), &job, &NoProgress).unwrap()
}

/// The files of a gene but `gene.json`, whose sources differ.
pub(crate) fn factors(gene: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = names(gene).into_iter().filter(|name| name.ends_with(".safetensors"));
    names.map(|name| (name.clone(), fs::read(gene.join(name)).unwrap())).collect()
}

#[test]
fn stacked_experts_and_single_ones_give_the_identical_gene() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (a, d) = (experts(1, 0.05), experts(2, 0.05));
    let sides = [
        one_by_one(&path("a1"), &a),
        stacked(&path("a2"), &a),
        one_by_one(&path("d1"), &d),
        stacked(&path("d2"), &d),
    ];
    let first = run(&sides[0], &sides[2], &path("gene"));
    assert_eq!(first.modules.len(), 3 * EXPERTS);
    assert!(first.modules.iter().all(|module| module.rank == 4), "{:?}", first.modules);
    let want = factors(&path("gene"));
    for (n, (a, d)) in [(0, 3), (1, 2), (1, 3)].into_iter().enumerate() {
        let out = path(&format!("gene-{n}"));
        let report = run(&sides[a], &sides[d], &out);
        assert_eq!(report.modules, first.modules);
        assert!(factors(&out) == want, "sides {a} and {d}");
    }
    let differing = plan(&open(&sides[0]), &open(&sides[3]), Ranks::Fixed(4)).unwrap();
    assert!(differing.tensors.iter().all(|t| t.becomes == Becomes::Factors && t.differs.is_some()));
    assert_eq!(differing.stored_tensors, [9, 2]);
}

#[test]
fn gene_of_experts_fuses_into_stacks_and_into_single_ones() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (a, d) = (experts(1, 0.05), experts(2, 0.05));
    let (aligned, single, stacks) =
        (one_by_one(&path("a"), &a), one_by_one(&path("d1"), &d), stacked(&path("d2"), &d));
    run(&aligned, &single, &path("gene"));
    let mut changed = Vec::new();
    for (target, out) in [(&single, path("out1")), (&stacks, path("out2"))] {
        let gene = Gene::open(&path("gene")).unwrap();
        let coefficients = gene.layers().into_iter().map(|layer| (layer, 1.5)).collect();
        let job = Fuse::new(gene, coefficients, open(target), &out);
        changed.push(fuse(&CpuEngine::new(), &job, &NoProgress).unwrap().elements_changed);
    }
    assert!(changed[0] > 1000 && changed[0] == changed[1], "{changed:?}");
    let (one, other) = (open(&path("out1")), open(&path("out2")));
    let units = one.units().unwrap();
    assert_eq!(units.len(), 3 * EXPERTS);
    for (unit, same) in units.iter().zip(other.units().unwrap()) {
        let read = |model: &checkpoint::Checkpoint, unit: &checkpoint::Unit| {
            let mut bytes = vec![0u8; 2 * INNER * HIDDEN];
            model.read_unit(unit, 0..unit.rows(), &mut bytes).unwrap();
            bytes
        };
        assert_eq!(unit.name, same.name);
        assert!(read(&one, unit) == read(&other, &same), "{}", unit.name);
    }
    assert_eq!(names(&path("out2")), ["config.json", "model.safetensors", "safegene.json"]);
}

#[test]
fn scaled_8_bit_weights_are_subtracted_as_what_they_stand_for() {
    let dir = tempdir().unwrap();
    let (rows, cols, block) = (70usize, 50usize, 32usize);
    let name = "model.layers.0.self_attn.q_proj.weight";
    let grid = [rows.div_ceil(block), cols.div_ceil(block)];
    let side = |folder: &str, seed: u32| -> (PathBuf, Vec<f64>) {
        let codes: Vec<u8> =
            noise(seed, rows * cols).iter().map(|x| (x.to_bits() >> 12) as u8 & 0xf7).collect();
        let scales: Vec<f32> =
            noise(seed + 1, grid[0] * grid[1]).iter().map(|x| x.abs() / 64.0 + 0.001).collect();
        let value = |i: usize| {
            let scale = scales[i / cols / block * grid[1] + i % cols / block];
            f64::from(reference::widen(&codes, kernels::Dtype::F8E4M3, i) as f32 * scale)
        };
        let values = (0..rows * cols).map(value).collect();
        let shape = |sides: &[usize]| sides.iter().map(|&side| side as u64).collect::<Vec<u64>>();
        let tensors = [
            ((format!("{name}_scale_inv"), Dtype::F32, shape(&grid)), pack_f32(&scales, Dtype::F32).unwrap()),
            ((name.to_owned(), Dtype::F8E4M3, shape(&[rows, cols])), codes),
        ];
        let config = json!({"model_type": "deepseek_v3", "num_hidden_layers": 1,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}});
        (write(&dir.path().join(folder), config, &tensors), values)
    };
    let ((a, a_values), (d, d_values)) = (side("a", 1), side("d", 5));
    let report = run(&a, &d, &dir.path().join("gene"));
    let difference: Vec<f64> =
        a_values.iter().zip(&d_values).map(|(a, d)| f64::from((a - d) as f32)).collect();
    assert_eq!(report.modules.len(), 1);
    assert!((report.energy - sumsq(&difference)).abs() <= 1e-12 * report.energy);
    assert!(report.noise_floor > 0.0);

    // Into the degraded side: refused as it is, and as bf16 one rounding away from the exact sum.
    let gene = || Gene::open(&dir.path().join("gene")).unwrap();
    let job = |out: &str| Fuse::new(gene(), [(0, 1.0)].into(), open(&d), &dir.path().join(out));
    let error = fuse(&CpuEngine::new(), &job("out"), &NoProgress).unwrap_err();
    assert!(matches!(error, StreamError::ScaledTarget { .. }), "{error}");
    assert!(!dir.path().join("out.partial").exists());
    let job = Fuse { dequantize: true, ..job("out") };
    let fused = fuse(&CpuEngine::new(), &job, &NoProgress).unwrap();
    let out = open(&job.out);
    let stored: Vec<&str> = out.tensors().iter().map(|info| info.name.as_str()).collect();
    assert_eq!((stored, out.tensors()[0].dtype), (vec![name], Dtype::Bf16));
    assert!(out.config().raw.get("quantization_config").is_none());
    assert_eq!(out.config().raw["model_type"], "deepseek_v3");
    let factors = gene().factors(name.strip_suffix(".weight").unwrap()).unwrap();
    let mut changed = 0;
    for (i, got) in out.read_f32(name).unwrap().into_iter().enumerate() {
        let (row, col) = (i / cols, i % cols);
        let chain = (0..factors.rank)
            .fold(0.0f32, |s, k| factors.b[row * factors.rank + k].mul_add(factors.a[k * cols + col], s));
        assert_eq!(got, to_bf16(d_values[i] as f32 + chain), "element {i}");
        changed += u64::from(got != to_bf16(d_values[i] as f32));
    }
    assert_eq!(fused.elements_changed, changed);
}
