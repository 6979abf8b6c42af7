//! Small folders, made by hand so that they may also be wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use checkpoint::{Checkpoint, Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

pub(crate) type Tensor = (TensorSpec, Vec<u8>);

/// A tensor of these values.
pub(crate) fn tensor(name: &str, dtype: Dtype, shape: &[u64], values: &[f32]) -> Tensor {
    ((name.to_owned(), dtype, shape.to_vec()), pack_f32(values, dtype).unwrap())
}

/// Values that are exact in bf16 and differ from each other.
pub(crate) fn ramp(count: usize, start: f32) -> Vec<f32> {
    (0..count).map(|n| start + n as f32 * 0.25).collect()
}

/// A file with this header text, padded with nothing, and this many bytes of data.
pub(crate) fn raw_file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

pub(crate) fn save(dir: &Path, file: &str, tensors: &[Tensor]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), safetensors_bytes(&default_metadata(), tensors).unwrap()).unwrap();
}

pub(crate) fn save_json(dir: &Path, file: &str, value: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), value.to_string()).unwrap();
}

/// A folder with this config (a layer count is added) and these tensors in one file.
pub(crate) fn folder(config: &Value, tensors: &[Tensor]) -> (TempDir, Checkpoint) {
    let dir = tempdir().unwrap();
    let mut config = config.clone();
    config["num_hidden_layers"] = json!(1);
    save_json(dir.path(), "config.json", &config);
    save(dir.path(), "model.safetensors", tensors);
    let model = Checkpoint::open(dir.path(), None).unwrap();
    (dir, model)
}

pub(crate) fn save_config(dir: &Path) {
    save_json(
        dir,
        "config.json",
        &json!({"model_type": "llama", "num_hidden_layers": 1, "torch_dtype": "bfloat16"}),
    );
}

/// The tensors of a model of one layer: q_proj [4, 6], a norm, embeddings and head [8, 6].
pub(crate) fn model_tensors() -> Vec<Tensor> {
    vec![
        tensor("lm_head.weight", Dtype::Bf16, &[8, 6], &ramp(48, -3.0)),
        tensor("model.embed_tokens.weight", Dtype::Bf16, &[8, 6], &ramp(48, 1.0)),
        tensor("model.layers.0.input_layernorm.weight", Dtype::Bf16, &[6], &ramp(6, 1.0)),
        tensor("model.layers.0.self_attn.q_proj.weight", Dtype::Bf16, &[4, 6], &ramp(24, -2.0)),
    ]
}

pub(crate) fn save_model(dir: &Path) {
    save(dir, "model.safetensors", &model_tensors());
    save_config(dir);
}

/// The same model in two shards with an index.
pub(crate) fn save_sharded_model(dir: &Path) {
    let tensors = model_tensors();
    let (first, second) = tensors.split_at(2);
    let files = [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)];
    let mut map = BTreeMap::new();
    for (file, tensors) in files {
        save(dir, file, tensors);
        map.extend(tensors.iter().map(|((name, ..), _)| (name.clone(), file)));
    }
    save_json(
        dir,
        "model.safetensors.index.json",
        &json!({"metadata": {"total_size": 1}, "weight_map": map}),
    );
    save_config(dir);
}

/// Changes the `weight_map` of a sharded model.
pub(crate) fn edit_index(dir: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = dir.join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(index["weight_map"].as_object_mut().unwrap());
    fs::write(path, index.to_string()).unwrap();
}

pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
