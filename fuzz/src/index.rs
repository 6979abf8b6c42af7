//! `model.safetensors.index.json` beside two small shards.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{Checkpoint, INDEX_FILE};
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;

use crate::memory::bounded;
use crate::{INPUT_BYTES_MAX, folder, model, put, save, save_json};

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Two shards, one that is left from another save, one below a folder, and weights outside of the model's folder.
fn fill(dir: &Path) {
    let model_dir = dir.join("model");
    let tensors = model();
    let (first, second) = tensors.split_at(2);
    save(&model_dir, "model-00001-of-00002.safetensors", first);
    save(&model_dir, "model-00002-of-00002.safetensors", second);
    save(&model_dir, "stale.safetensors", &tensors[..1]);
    save(&model_dir.join("sub"), "whole.safetensors", &tensors);
    save(dir, "outside.safetensors", &tensors);
    save_json(&model_dir, "config.json", &json!({"model_type": "qwen2", "num_hidden_layers": 2}));
}

/// What an index says; whatever else is in it is not looked at, and need not be text.
#[derive(Deserialize)]
struct Named {
    weight_map: BTreeMap<String, String>,
}

/// The bytes of `model.safetensors.index.json`.
///
/// An accepted index names the tensors of the model and no others, each once, in files below the folder; every tensor is
/// the one that was written.
pub fn index(bytes: &[u8]) -> bool {
    if bytes.len() > INPUT_BYTES_MAX {
        return false;
    }
    DIR.with(|dir| {
        let dir = dir.get_or_init(|| folder(fill)).path().join("model");
        put(&dir.join(INDEX_FILE), bytes);
        let Ok(opened) = bounded(bytes.len(), || Checkpoint::open(&dir, None)) else { return false };
        let named: Named = serde_json::from_slice(bytes).unwrap();
        let found: Vec<&String> = opened.tensors().iter().map(|info| &info.name).collect();
        assert_eq!(named.weight_map.keys().collect::<Vec<_>>(), found);
        let home = dir.canonicalize().unwrap();
        for ((name, dtype, shape), data) in model() {
            let Some(info) = opened.shards().get(&name) else { continue };
            assert_eq!(info.file, dir.join(&named.weight_map[&name]));
            assert!(info.file.canonicalize().unwrap().starts_with(&home), "{}", info.file.display());
            assert_eq!((info.dtype, &info.shape), (dtype, &shape), "{name}");
            assert!(opened.shards().read(info).unwrap() == data, "{name}");
        }
        opened.units().unwrap();
        true
    })
}
