//! Small model and adapter folders with weights that are known exactly.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use half::bf16;
use kernels::philox4x32_10;
use serde_json::json;

/// Shape and values, every value exact in bf16 unless a test says otherwise.
pub(crate) type Tensors = BTreeMap<String, Values>;
type Values = (Vec<u64>, Vec<f32>);

pub(crate) const Q: [&str; 2] =
    ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"];
pub(crate) const DOWN: [&str; 2] =
    ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"];
pub(crate) const NORM: [&str; 2] =
    ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"];
pub(crate) const BIAS: [&str; 2] =
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"];
pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const FINAL: &str = "model.norm.weight";
pub(crate) const BUFFER: &str = "model.rotary_emb.inv_freq";

/// Numbers in [-1, 1), from a counter.
pub(crate) fn noise(seed: u32, n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|i| philox4x32_10([i, 0, 0, 0], [seed, 77]))
        .map(|word| word as i32 as f32 / 2.0f32.powi(31))
        .take(n)
        .collect()
}

pub(crate) fn to_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// A model of two layers.
pub(crate) fn model() -> Tensors {
    let mut shapes: Vec<(String, Vec<u64>)> =
        vec![(EMBED.into(), vec![30, 48]), (FINAL.into(), vec![48]), (BUFFER.into(), vec![6])];
    for layer in 0..2 {
        shapes.push((Q[layer].into(), vec![41, 48]));
        shapes.push((DOWN[layer].into(), vec![48, 57]));
        shapes.push((NORM[layer].into(), vec![48]));
        shapes.push((BIAS[layer].into(), vec![41]));
    }
    shapes.sort();
    let values = |seed: usize, shape: &[u64]| -> Vec<f32> {
        noise(seed as u32, shape.iter().product::<u64>() as usize).iter().map(|&x| to_bf16(x)).collect()
    };
    shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| (name, (shape.clone(), values(i, &shape))))
        .collect()
}

/// Adds 5 % of noise to tensors, in bf16.
pub(crate) fn moved(model: &Tensors, names: &[&str]) -> Tensors {
    let mut model = model.clone();
    for (i, name) in names.iter().enumerate() {
        let values = &mut model.get_mut(*name).unwrap().1;
        let change = noise(100 + i as u32, values.len());
        values.iter_mut().zip(change).for_each(|(x, change)| *x = to_bf16(*x + 0.05 * change));
    }
    model
}

/// The usual difference: both layers' linear weights and norms, one bias, two rows of the embedding.
pub(crate) fn usual(model: &Tensors) -> Tensors {
    let mut model = moved(model, &[Q[0], Q[1], DOWN[0], NORM[0], NORM[1], BIAS[1], FINAL]);
    for row in [3, 17] {
        model.get_mut(EMBED).unwrap().1[row * 48..(row + 1) * 48]
            .iter_mut()
            .for_each(|x| *x = to_bf16(*x * 1.5));
    }
    model
}

fn write(dir: &Path, file: &str, tensors: &[(&String, &Values)], dtype: Dtype) {
    let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let dtype = if name.ends_with("inv_freq") { Dtype::F32 } else { dtype };
            (((*name).clone(), dtype, shape.clone()), pack_f32(values, dtype).unwrap())
        })
        .collect();
    fs::write(dir.join(file), safetensors_bytes(&default_metadata(), &tensors).unwrap()).unwrap();
}

fn config(dir: &Path, model_type: &str, layers: usize) {
    fs::create_dir_all(dir).unwrap();
    let config = json!({"model_type": model_type, "num_hidden_layers": layers, "tie_word_embeddings": true});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
}

/// Writes a model folder, in one file.
pub(crate) fn save(dir: &Path, model: &Tensors, dtype: Dtype) -> PathBuf {
    save_as(dir, model, dtype, "qwen2", 2)
}

pub(crate) fn save_as(dir: &Path, model: &Tensors, dtype: Dtype, model_type: &str, layers: usize) -> PathBuf {
    config(dir, model_type, layers);
    write(dir, "model.safetensors", &model.iter().collect::<Vec<_>>(), dtype);
    dir.to_path_buf()
}

/// Writes a model folder in two shards with an index.
pub(crate) fn save_sharded(dir: &Path, model: &Tensors, dtype: Dtype) -> PathBuf {
    config(dir, "qwen2", 2);
    let all: Vec<_> = model.iter().collect();
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (first, second) = all.split_at(all.len() / 2);
    // Not in the order of names, as other writers do it.
    let first: Vec<_> = first.iter().rev().copied().collect();
    write(dir, files[0], &first, dtype);
    write(dir, files[1], second, dtype);
    let map: BTreeMap<&String, &str> = first
        .iter()
        .map(|(name, _)| (*name, files[0]))
        .chain(second.iter().map(|(name, _)| (*name, files[1])))
        .collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir.to_path_buf()
}

/// Factors of an adapter: module, rank, B, A.
pub(crate) struct Lora {
    pub(crate) module: &'static str,
    pub(crate) rank: usize,
    pub(crate) b: Vec<f32>,
    pub(crate) a: Vec<f32>,
}

pub(crate) fn lora(seed: u32, module: &'static str, [rows, cols]: [usize; 2], rank: usize) -> Lora {
    let small = |x: Vec<f32>| x.iter().map(|x| x * 0.1).collect();
    Lora { module, rank, b: small(noise(seed, rows * rank)), a: small(noise(seed + 1, rank * cols)) }
}

/// Writes an adapter of scale `alpha / 4` (all ranks are 4).
pub(crate) fn save_adapter(dir: &Path, base: &Path, factors: &[Lora], alpha: f64) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let config = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": alpha, "bias": "none",
        "base_model_name_or_path": base.canonicalize().unwrap(),
        "target_modules": factors.iter().map(|f| f.module).collect::<Vec<_>>(),
    });
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = Vec::new();
    for Lora { module, rank, b, a } in factors {
        for (side, values, rows) in [("lora_A", a, *rank), ("lora_B", b, b.len() / rank)] {
            let shape = vec![rows as u64, (values.len() / rows) as u64];
            let name = format!("base_model.model.{module}.{side}.weight");
            tensors.push(((name, Dtype::F32, shape), pack_f32(values, Dtype::F32).unwrap()));
        }
    }
    let bytes = safetensors_bytes(&default_metadata(), &tensors).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
    dir.to_path_buf()
}

pub(crate) fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, None).unwrap()
}

/// `B A` in f64.
pub(crate) fn product(b: &[f32], a: &[f32], rank: usize) -> Vec<f64> {
    let (rows, cols) = (b.len() / rank, a.len() / rank);
    let mut out = vec![0.0; rows * cols];
    for (at, out) in out.iter_mut().enumerate() {
        let (i, j) = (at / cols, at % cols);
        *out = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * cols + j])).sum();
    }
    out
}

pub(crate) fn sumsq(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum()
}

/// Names of what is in a folder, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
