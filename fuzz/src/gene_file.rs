//! `gene.json` beside the weights of a small gene.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::Path;

use checkpoint::Checkpoint;
use gene::{
    Class, Family, Gene, GeneManifest, GeneWriter, MANIFEST_FILE, ManifestParts, Module, RestDelta, Source,
    Sources, check_family, fingerprint_of,
};
use serde_json::{Map, json};
use tempfile::TempDir;

use crate::memory::bounded;
use crate::{EMBED, INPUT_BYTES_MAX, NORM, Q, UP, folder, model, put, save, save_json};

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Rank 3 in one module, rank 2 in the other, a whole norm, two rows of the embedding.
fn fill(dir: &Path) {
    let model_dir = dir.join("model");
    save(&model_dir, "model.safetensors", &model());
    save_json(&model_dir, "config.json", &json!({"model_type": "qwen2", "num_hidden_layers": 2}));
    let ramp = |count: u64| (0..count).map(|n| 0.125 + n as f32 * 0.25).collect::<Vec<f32>>();
    let mut writer = GeneWriter::create(&dir.join("gene"), false).unwrap();
    for (name, layer, shape, rank) in [(Q, 0, [4, 6], 3), (UP, 1, [5, 6], 2)] {
        let (class, energy) = (Class::LowRank, 1.5);
        let module = Module {
            name: name.into(),
            layer,
            shape,
            class,
            rank: rank as usize,
            energy,
            residual: 0.1,
            noise_floor: 0.01,
            ..Module::default()
        };
        writer.low_rank(module, &ramp(shape[0] * rank), &ramp(rank * shape[1])).unwrap();
    }
    writer.full(NORM, Some(1), &[6], &ramp(6)).unwrap();
    writer.row_patch(EMBED, None, [8, 6], &[1, 7], &ramp(12)).unwrap();
    let source = |name: &str| Source { name: name.into(), content: "blake3:00".into(), ..Source::default() };
    let target = Checkpoint::open(&model_dir, None).unwrap();
    let parts = ManifestParts {
        family: Family {
            model_type: "qwen2".into(),
            fingerprint: fingerprint_of(&target).unwrap(),
            extra: Map::new(),
        },
        tool: "0.1.0".into(),
        options: Map::from_iter([("rank".to_owned(), json!(3))]),
        sources: Sources { aligned: source("aligned"), degraded: source("degraded"), ..Sources::default() },
        energy: 12.5,
        captured: 0.9,
        captured_upper_bound: 0.95,
        noise_floor: 0.01,
        extra: Map::new(),
    };
    writer.finish(parts).unwrap();
}

/// The bytes of `gene.json`.
///
/// An accepted gene's modules and rest are exactly the stored ones and can be read; what it does not hold is an ordinary
/// error; its manifest is the same once written and read again.
pub fn gene_manifest(bytes: &[u8]) -> bool {
    if bytes.len() > INPUT_BYTES_MAX {
        return false;
    }
    DIR.with(|dir| {
        let dir = dir.get_or_init(|| folder(fill)).path();
        let gene_dir = dir.join("gene");
        put(&gene_dir.join(MANIFEST_FILE), bytes);
        let Ok(gene) = bounded(bytes.len(), || Gene::open(&gene_dir)) else { return false };
        bounded(bytes.len(), || check(&gene));
        let target = Checkpoint::open(&dir.join("model"), None).unwrap();
        if let Ok(()) = bounded(bytes.len(), || check_family(&gene, &target)) {
            assert_eq!(gene.manifest().family.model_type, "qwen2");
        }
        true
    })
}

fn check(gene: &Gene) {
    let manifest = gene.manifest();
    let text = serde_json::to_vec(manifest).unwrap();
    let again: GeneManifest = serde_json::from_slice(&text).unwrap();
    assert_eq!(&again, manifest);

    let mut held = BTreeSet::new();
    let mut low_rank = Vec::new();
    for module in gene.modules() {
        assert_eq!(gene.module(&module.name), Some(module));
        assert!(module.energy >= 0.0 && module.residual >= 0.0 && module.noise_floor >= 0.0);
        if module.class == Class::LowRank {
            let f = gene.factors(&module.name).unwrap();
            assert_eq!(([f.rows as u64, f.cols as u64], f.rank, f.scale), (module.shape, module.rank, 1.0));
            assert_eq!((f.b.len(), f.a.len()), (f.rows * f.rank, f.rank * f.cols));
            low_rank.push(module.name.as_str());
            held.insert(module.layer);
        } else {
            gene.factors(&module.name).unwrap_err();
        }
    }
    low_rank.sort();
    // A gene without a low-rank module does not look at the factors beside it.
    assert!(low_rank == [Q, UP] || low_rank.is_empty(), "{low_rank:?}");
    for entry in gene.rest() {
        match (entry.class, gene.rest_delta(&entry.name)) {
            (Class::Full, Ok(RestDelta::Full(values))) => {
                assert_eq!(values.len() as u64, entry.shape.iter().product::<u64>());
            }
            (Class::RowPatch, Ok(RestDelta::Rows { rows, delta })) => {
                assert!(rows.is_sorted_by(|a, b| a < b) && rows.iter().all(|&row| row < entry.shape[0]));
                assert_eq!(delta.len() as u64, rows.len() as u64 * entry.shape[1]);
            }
            (Class::RowPatch, Err(error)) => {
                // Row numbers are values, and looked at when they are read.
                assert!(entry.shape[0] < 8, "{error}");
            }
            (Class::LeftOut, Err(_)) => continue,
            (class, found) => panic!("`{}` is {class:?}: {found:?}", entry.name),
        }
        held.extend(entry.layer);
    }
    assert_eq!(gene.layers(), held.into_iter().collect::<Vec<_>>());
    gene.factors("no.such.module").unwrap_err();
    gene.rest_delta("no.such.tensor").unwrap_err();
}
