//! A safetensors file: its header, its values, and the units that models of several families make of it.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Header, MODEL_FILE, ShardSet, parse_header};
use safetensors::SafeTensors;
use serde_json::json;
use tempfile::TempDir;

use crate::memory::bounded;
use crate::{INPUT_BYTES_MAX, folder, put, save_json};

/// Layouts of experts and fp8 with blocks; what else a config can say counts for one or the other.
const FAMILIES: [&str; 4] = ["qwen3_moe", "gpt_oss", "qwen3_vl_moe", "mixtral"];

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

/// One folder for each family; all have the same file.
fn fill(dir: &Path) {
    let first = dir.join(FAMILIES[0]).join(MODEL_FILE);
    for (n, family) in FAMILIES.iter().enumerate() {
        let mut config = json!({"model_type": family, "num_hidden_layers": 2, "hidden_size": 4});
        if n % 2 == 0 {
            config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [2, 3]});
        }
        save_json(&dir.join(family), "config.json", &config);
        if n == 0 {
            fs::write(&first, []).unwrap();
        } else {
            fs::hard_link(&first, dir.join(family).join(MODEL_FILE)).unwrap();
        }
    }
}

/// The bytes of `model.safetensors`.
///
/// An accepted header is the same from memory and from disk; its tensors tile the file; the `safetensors` crate accepts
/// it too and sees the same; every tensor can be read. In each family the units lie inside their tensors, have as many
/// elements together as their tensor, and can be read.
pub fn header(bytes: &[u8]) -> bool {
    if bytes.len() > INPUT_BYTES_MAX {
        return false;
    }
    DIR.with(|dir| {
        let dir = dir.get_or_init(|| folder(fill)).path();
        let paths: Vec<PathBuf> = FAMILIES.iter().map(|family| dir.join(family)).collect();
        put(&paths[0].join(MODEL_FILE), bytes);
        let parsed = bounded(bytes.len(), || parse_header(bytes, bytes.len() as u64));
        let set = bounded(bytes.len(), || ShardSet::open(&paths[0]));
        assert_eq!(parsed.is_ok(), set.is_ok(), "memory and disk: {parsed:?} and {set:?}");
        let Ok(header) = parsed else { return false };
        check_header(bytes, &header, &set.unwrap());
        for path in &paths {
            bounded(bytes.len(), || check_model(path));
        }
        true
    })
}

fn check_header(bytes: &[u8], header: &Header, set: &ShardSet) {
    let mut end = 0;
    let mut names = BTreeSet::new();
    for entry in &header.entries {
        assert_eq!((entry.start, entry.dtype.bytes_of(&entry.shape)), (end, Some(entry.end - entry.start)));
        assert!(names.insert(&entry.name), "`{}` is there twice", entry.name);
        end = entry.end;
    }
    assert_eq!(header.data_offset + end, bytes.len() as u64);

    let oracle = SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(oracle.len(), header.entries.len());
    assert_eq!(set.tensors().len(), header.entries.len());
    for entry in &header.entries {
        let view = oracle.tensor(&entry.name).unwrap();
        let sides: Vec<u64> = view.shape().iter().map(|&side| side as u64).collect();
        assert_eq!(
            (sides, format!("{}", view.dtype())),
            (entry.shape.clone(), entry.dtype.name().to_owned())
        );
        let info = set.get(&entry.name).unwrap();
        assert!(set.read(info).unwrap() == view.data(), "`{}`", entry.name);
    }
}

/// Reads everything that a model folder holds.
fn check_model(dir: &Path) {
    let Ok(model) = Checkpoint::open(dir, None) else { return };
    for info in model.tensors() {
        assert_eq!(model.read_base(&info.name).unwrap().1.len() as u64, info.bytes);
        if let Ok(values) = model.read_f32(&info.name) {
            assert_eq!(values.len() as u64, info.elements());
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
    let units = model.units();
    assert_eq!(units.is_ok(), model.scale_tensors().is_ok());
    let Ok(units) = units else { return };
    assert!(units.is_sorted_by(|a, b| a.name < b.name));
    let mut elements: BTreeMap<&str, u64> = BTreeMap::new();
    for unit in &units {
        let info = model.shards().get(&unit.tensor).unwrap();
        *elements.entry(&unit.tensor).or_default() += unit.rows() * unit.cols();
        if unit.dtype.bits() % 8 == 0 {
            let mut rows = vec![0; (unit.rows() * unit.cols() * unit.dtype.bits() / 8) as usize];
            model.read_unit(unit, 0..unit.rows(), &mut rows).unwrap();
        }
        if let Ok(scales) = model.read_scales(unit) {
            let grid = unit.scale.as_ref().map_or(0, |scale| scale.grid[0] * scale.grid[1]);
            assert_eq!(scales.len() as u64, grid);
            if let Some(scale) = unit.scale.as_ref().filter(|_| unit.rows() * unit.cols() > 0) {
                assert!(scale.at(unit.rows() - 1, unit.cols() - 1) < grid, "{unit:?}");
            }
        }
        assert_eq!(info.dtype, unit.dtype);
    }
    for info in model.tensors() {
        if let Some(count) = elements.get(info.name.as_str()) {
            assert_eq!(*count, info.elements(), "units of `{}`", info.name);
        }
    }
}
