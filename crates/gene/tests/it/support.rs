//! A model of two layers and genes that fit it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use gene::{Class, Family, Gene, GeneWriter, ManifestParts, Module, Source, Sources, fingerprint_of};
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

pub(crate) const Q0: &str = "model.layers.0.self_attn.q_proj";
pub(crate) const UP0: &str = "model.layers.0.mlp.up_proj";
pub(crate) const Q1: &str = "model.layers.1.self_attn.q_proj";
pub(crate) const UP1: &str = "model.layers.1.mlp.up_proj";
pub(crate) const NORM1: &str = "model.layers.1.input_layernorm.weight";
pub(crate) const EMBED: &str = "model.embed_tokens.weight";

pub(crate) const Q_SHAPE: [u64; 2] = [4, 6];
pub(crate) const UP_SHAPE: [u64; 2] = [5, 6];

pub(crate) fn ramp(count: u64, start: f32) -> Vec<f32> {
    (0..count).map(|n| start + n as f32 * 0.25).collect()
}

pub(crate) fn tensor(name: &str, shape: &[u64], start: f32) -> (TensorSpec, Vec<u8>) {
    let values = ramp(shape.iter().product(), start);
    ((name.to_owned(), Dtype::F32, shape.to_vec()), pack_f32(&values, Dtype::F32).unwrap())
}

pub(crate) fn save(dir: &Path, file: &str, tensors: &[(TensorSpec, Vec<u8>)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), safetensors_bytes(&default_metadata(), tensors).unwrap()).unwrap();
}

pub(crate) fn save_json(dir: &Path, file: &str, value: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), format!("{value:#}")).unwrap();
}

pub(crate) fn model_tensors() -> Vec<(TensorSpec, Vec<u8>)> {
    let mut tensors = vec![tensor(EMBED, &[8, 6], 0.0), tensor("model.norm.weight", &[6], 1.0)];
    for layer in 0..2 {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        tensors.push(tensor(&name("self_attn.q_proj.weight"), &Q_SHAPE, -2.0));
        tensors.push(tensor(&name("mlp.up_proj.weight"), &UP_SHAPE, -3.0));
        tensors.push(tensor(&name("input_layernorm.weight"), &[6], 1.0));
    }
    tensors
}

pub(crate) fn save_model(dir: &Path, model_type: &str, tensors: &[(TensorSpec, Vec<u8>)]) {
    save(dir, "model.safetensors", tensors);
    save_json(dir, "config.json", &json!({"model_type": model_type, "num_hidden_layers": 2}));
}

/// A folder with `model/` and whatever a test adds.
pub(crate) struct Bench {
    pub(crate) root: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let root = tempdir().unwrap();
        save_model(&root.path().join("model"), "qwen2", &model_tensors());
        Bench { root }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn model(&self) -> Checkpoint {
        Checkpoint::open(&self.path("model"), None).unwrap()
    }

    pub(crate) fn parts(&self) -> ManifestParts {
        let source =
            |name: &str| Source { name: name.into(), content: "blake3:00".into(), ..Source::default() };
        ManifestParts {
            family: Family {
                model_type: "qwen2".into(),
                fingerprint: fingerprint_of(&self.model()).unwrap(),
                extra: Map::new(),
            },
            tool: "0.1.0".into(),
            options: Map::from_iter([("rank".to_owned(), json!(3))]),
            sources: Sources {
                aligned: source("aligned"),
                degraded: source("degraded"),
                ..Sources::default()
            },
            energy: 12.5,
            captured: 0.9,
            captured_upper_bound: 0.95,
            noise_floor: 0.01,
            extra: Map::new(),
        }
    }

    /// Rank 3 in q0, rank 2 in up1, a full norm in layer 1, two rows of the embedding, the others unchanged or left out.
    pub(crate) fn save_gene(&self, name: &str) -> Gene {
        let mut writer = GeneWriter::create(&self.path(name), false).unwrap();
        fill(&mut writer);
        writer.finish(self.parts()).unwrap();
        Gene::open(&self.path(name)).unwrap()
    }

    /// Factors only.
    pub(crate) fn save_plain_gene(&self, name: &str) -> Gene {
        let mut writer = GeneWriter::create(&self.path(name), false).unwrap();
        low_rank(&mut writer, Q0, 0, Q_SHAPE, 3);
        low_rank(&mut writer, UP1, 1, UP_SHAPE, 2);
        writer.finish(self.parts()).unwrap();
        Gene::open(&self.path(name)).unwrap()
    }
}

pub(crate) fn module(name: &str, layer: u32, shape: [u64; 2], rank: usize) -> Module {
    Module {
        name: name.into(),
        layer,
        shape,
        class: Class::LowRank,
        rank,
        energy: 1.5,
        residual: 0.1,
        noise_floor: 0.01,
        ..Module::default()
    }
}

/// B and A of a module of [`Bench::save_gene`].
pub(crate) fn factors(shape: [u64; 2], rank: usize) -> (Vec<f32>, Vec<f32>) {
    (ramp(shape[0] * rank as u64, 0.125), ramp(rank as u64 * shape[1], -1.0))
}

pub(crate) fn low_rank(writer: &mut GeneWriter, name: &str, layer: u32, shape: [u64; 2], rank: usize) {
    let (b, a) = factors(shape, rank);
    writer.low_rank(module(name, layer, shape, rank), &b, &a).unwrap();
}

pub(crate) fn fill(writer: &mut GeneWriter) {
    low_rank(writer, Q0, 0, Q_SHAPE, 3);
    low_rank(writer, UP1, 1, UP_SHAPE, 2);
    writer
        .class_only("model.layers.0.mlp.up_proj.weight", Some(0), &UP_SHAPE, Class::Unchanged, 0.0)
        .unwrap();
    writer
        .class_only("model.layers.1.self_attn.q_proj.weight", Some(1), &Q_SHAPE, Class::LeftOut, 0.5)
        .unwrap();
    writer.full(NORM1, Some(1), &[6], &ramp(6, 0.5)).unwrap();
    writer.class_only("model.layers.0.input_layernorm.weight", Some(0), &[6], Class::Unchanged, 0.0).unwrap();
    writer.row_patch(EMBED, None, [8, 6], &[1, 7], &ramp(12, 2.0)).unwrap();
    writer.class_only("model.norm.weight", None, &[6], Class::LeftOut, 0.25).unwrap();
}

/// `weight + scale * B A`, slow and in `f64`.
pub(crate) fn with_product(
    weight: &[f64],
    (b, a): &(Vec<f32>, Vec<f32>),
    rank: usize,
    scale: f64,
) -> Vec<f64> {
    let cols = a.len() / rank;
    (0..weight.len())
        .map(|at| {
            let (row, col) = (at / cols, at % cols);
            let sum: f64 =
                (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * cols + col])).sum();
            weight[at] + scale * sum
        })
        .collect()
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let err = (f64::from(got) - want).abs();
        // Partial sums stay below 2^7 and fewer than 16 roundings are made.
        assert!(err <= 128.0 * 16.0 * f64::from(f32::EPSILON) / 2.0, "{at}: got {got}, want {want}");
    }
}

pub(crate) fn coefficients(list: &[(u32, f64)]) -> BTreeMap<u32, f64> {
    list.iter().copied().collect()
}

pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}
