//! A PEFT adapter like the target's, in which some modules have other factors.
//!
//! New factors are f32 and come first in the file; what stays keeps its bytes. The config is the target's. Where ranks are
//! others now, `r` is the largest, which loaders go by, and patterns that match one path each name every module of another
//! rank or alpha. A base that is named by a path is named by its absolute one, because the adapter lies in another folder now.
//!
//! Not here: which modules, and their factors.

use std::collections::BTreeMap;

use checkpoint::{Adapter, Checkpoint, Dtype, FolderWriter, TensorSpec, default_metadata};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::report::Tensors;

/// Other factors of a module.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum NewFactors {
    /// Another B of the same rank; A and scale stay.
    B(Vec<f32>),
    /// Both others, of scale 1.
    Both { b: Vec<f32>, a: Vec<f32>, rank: usize },
}

/// Writes the adapter of a target with other factors in some modules, none of which is stored transposed.
pub(crate) fn write_adapter(
    target: &Checkpoint,
    adapter: &Adapter,
    new: &BTreeMap<String, NewFactors>,
    writer: &FolderWriter,
) -> Result<(Tensors, Vec<String>)> {
    let mut made: Vec<(TensorSpec, &[f32])> = Vec::new();
    for (name, factors) in new {
        let Some(module) = adapter.modules().get(name) else { continue };
        let [rows, cols] = module.shape();
        let (b, rank) = match factors {
            NewFactors::B(b) => (b, module.rank),
            NewFactors::Both { b, a, rank } => {
                let shape = vec![*rank as u64, cols];
                made.push(((module.a.name.clone(), Dtype::F32, shape), a));
                (b, *rank)
            }
        };
        made.push(((module.b.name.clone(), Dtype::F32, vec![rows, rank as u64]), b));
    }
    let is_new = |name: &str| made.iter().any(|((made, ..), _)| made == name);
    let kept: Vec<_> = adapter.shards().tensors().iter().filter(|info| !is_new(&info.name)).collect();
    let specs: Vec<TensorSpec> = made
        .iter()
        .map(|(spec, _)| spec.clone())
        .chain(kept.iter().map(|info| (info.name.clone(), info.dtype, info.shape.clone())))
        .collect();
    let mut metadata = default_metadata();
    metadata.extend(adapter.shards().metadata().clone());
    let mut shard = writer.shard("adapter_model.safetensors", &metadata, &specs)?;
    for ((name, ..), values) in &made {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        shard.write(name, &bytes)?;
    }
    for info in &kept {
        shard.write(&info.name, &adapter.shards().read(info)?)?;
    }
    shard.finish()?;
    let mut text = serde_json::to_vec_pretty(&config(target, adapter, new)?).unwrap_or_default();
    text.push(b'\n');
    writer.file("adapter_config.json", &text)?;
    let copied = writer.copy_support_files(adapter.dir())?;
    let tensors = Tensors { changed: made.len() as u64, same: 0, kept: kept.len() as u64 };
    Ok((tensors, copied.into_iter().filter(|name| name.ends_with(".py")).collect()))
}

fn config(target: &Checkpoint, adapter: &Adapter, new: &BTreeMap<String, NewFactors>) -> Result<Value> {
    let mut config = adapter.config().raw.clone();
    let Some(object) = config.as_object_mut() else { return Ok(config) };
    object.insert("base_model_name_or_path".to_owned(), json!(gene::base_name(target)?));
    if !new.values().any(|factors| matches!(factors, NewFactors::Both { .. })) {
        return Ok(config);
    }
    let old = adapter.config();
    let of = |name: &String| match new.get(name) {
        // A scale of 1.
        Some(NewFactors::Both { rank, .. }) if old.use_rslora => (*rank, (*rank as f64).sqrt()),
        Some(NewFactors::Both { rank, .. }) => (*rank, *rank as f64),
        _ => (old.rank_of(name), old.alpha_of(name)),
    };
    let modules: Vec<(&String, (usize, f64))> =
        adapter.modules().keys().map(|name| (name, of(name))).collect();
    let Some(&(_, (r, alpha))) = modules.iter().max_by_key(|(_, (rank, _))| *rank) else { return Ok(config) };
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (name, (rank, own_alpha)) in modules {
        let pattern = format!("^{}", gene::escaped(name));
        if rank != r {
            ranks.insert(pattern.clone(), json!(rank));
        }
        if own_alpha != alpha {
            alphas.insert(pattern, json!(own_alpha));
        }
    }
    object.insert("r".to_owned(), json!(r));
    object.insert("lora_alpha".to_owned(), json!(alpha));
    object.insert("rank_pattern".to_owned(), Value::Object(ranks));
    object.insert("alpha_pattern".to_owned(), Value::Object(alphas));
    Ok(config)
}
