//! A gene from factors that were trained or chosen, rather than found as the difference of two checkpoints.
//!
//! Such a gene is what it is: its energy is that of its own factors, and nothing of it is missing.
//!
//! Not here: where factors come from.

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{Checkpoint, Role, module_of};
use serde_json::Map;

use crate::error::{GeneError, Result};
use crate::family::fingerprint_of;
use crate::manifest::{Class, Family, GeneManifest, LayerEntry, ManifestParts, Module, Sources};
use crate::read::{Gene, RestDelta};
use crate::write::GeneWriter;

/// Factors of one module, row-major: `b` is [out, rank], `a` is [rank, in].
#[derive(Clone, Debug, PartialEq)]
pub struct MadeFactors {
    /// Path without `.weight`.
    pub module: String,
    /// Inner side.
    pub rank: usize,
    /// [out, rank].
    pub b: Vec<f32>,
    /// [rank, in].
    pub a: Vec<f32>,
}

/// `‖B A‖_F²`, by the Gram matrices of both factors.
fn energy(f: &MadeFactors) -> f64 {
    let (r, cols) = (f.rank, f.a.len() / f.rank.max(1));
    let mut sum = 0.0;
    for i in 0..r {
        for j in 0..r {
            let of_b: f64 = f.b.chunks(r).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
            let (x, y) = (&f.a[i * cols..(i + 1) * cols], &f.a[j * cols..(j + 1) * cols]);
            let of_a: f64 = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            sum += of_b * of_a;
        }
    }
    sum.max(0.0)
}

/// What a made gene says of itself.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Version of the tool.
    pub tool: String,
    /// Options that shaped the result.
    pub options: Map<String, serde_json::Value>,
    /// Where it came from.
    pub sources: Sources,
    /// Further keys of the manifest.
    pub extra: Map<String, serde_json::Value>,
}

/// Writes a gene for models of the family of `base`. Factors of a module that `base` does not have are an error.
pub fn write_made(
    out: &Path,
    force: bool,
    base: &Checkpoint,
    factors: Vec<MadeFactors>,
    origin: Origin,
) -> Result<GeneManifest> {
    let mut writer = GeneWriter::create(out, force)?;
    let mut by_module: BTreeMap<String, MadeFactors> =
        factors.into_iter().map(|f| (f.module.clone(), f)).collect();
    let mut total = 0.0;
    for unit in base.units()? {
        let layer = unit.role.layer();
        let module = match (unit.role, &unit.shape[..]) {
            (Role::Linear { layer }, &[out, into]) => {
                module_of(&unit.name).map(|m| (m.to_owned(), layer, [out, into]))
            }
            _ => None,
        };
        let found = module.and_then(|(name, layer, shape)| Some((by_module.remove(&name)?, layer, shape)));
        let Some((f, layer, shape)) = found else {
            writer.class_only(&unit.name, layer, &unit.shape, Class::Unchanged, 0.0)?;
            continue;
        };
        let energy = energy(&f);
        total += energy;
        let name = f.module.clone();
        let module =
            Module { name, layer, shape, class: Class::LowRank, rank: f.rank, energy, ..Module::default() };
        writer.low_rank(module, &f.b, &f.a)?;
    }
    if let Some(name) = by_module.into_keys().next() {
        return Err(GeneError::part(&name, "the base has no such module"));
    }
    let model_type = base.config().model_type.clone();
    writer.finish(ManifestParts {
        family: Family { model_type, fingerprint: fingerprint_of(base)?, extra: Map::new() },
        tool: origin.tool,
        options: origin.options,
        sources: origin.sources,
        energy: total,
        captured: 1.0,
        captured_upper_bound: 1.0,
        noise_floor: 0.0,
        extra: origin.extra,
    })
}

/// Writes `gene` with the values of some layers only; `layers` says of every layer what it scored and whether it stays.
/// What is dropped counts as left out, and its energy as lost.
pub fn write_selected(
    out: &Path,
    force: bool,
    gene: &Gene,
    layers: Vec<LayerEntry>,
    extra: Map<String, serde_json::Value>,
) -> Result<GeneManifest> {
    let manifest = gene.manifest();
    let stays = |layer: Option<u32>| match layer {
        Some(layer) => layers.iter().any(|l| l.layer == layer && l.selected),
        None => true,
    };
    let mut writer = GeneWriter::create(out, force)?;
    let mut lost = 0.0;
    for module in gene.modules() {
        let tensor = format!("{}.weight", module.name);
        match module.class {
            Class::LowRank if stays(Some(module.layer)) => {
                let f = gene.factors(&module.name)?;
                writer.low_rank(module.clone(), &f.b, &f.a)?;
            }
            Class::LowRank => {
                lost += module.energy * (1.0 - module.residual).max(0.0);
                writer.class_only(
                    &tensor,
                    Some(module.layer),
                    &module.shape,
                    Class::LeftOut,
                    module.energy,
                )?;
            }
            // A linear module that is kept whole stands in the rest, too.
            Class::Full => {}
            class => writer.class_only(&tensor, Some(module.layer), &module.shape, class, module.energy)?,
        }
    }
    let mut listed = std::collections::BTreeSet::new();
    for entry in gene.rest() {
        listed.insert(entry.name.as_str());
        let kept = stays(entry.layer) && entry.class != Class::LeftOut;
        if !kept {
            lost += if entry.class == Class::LeftOut { 0.0 } else { entry.energy };
            writer.class_only(&entry.name, entry.layer, &entry.shape, Class::LeftOut, entry.energy)?;
            continue;
        }
        match (gene.rest_delta(&entry.name)?, &entry.shape[..]) {
            (RestDelta::Full(delta), shape) => writer.full(&entry.name, entry.layer, shape, &delta)?,
            (RestDelta::Rows { rows, delta }, &[height, width]) => {
                writer.row_patch(&entry.name, entry.layer, [height, width], &rows, &delta)?;
            }
            (RestDelta::Rows { .. }, _) => return Err(GeneError::part(&entry.name, "rows of no matrix")),
        }
    }
    // Tensors that were equal and are no modules are only counted.
    let modules = gene.modules().iter().filter(|m| m.class == Class::Unchanged).count() as u64;
    let unchanged = manifest.classes.get(&Class::Unchanged).copied().unwrap_or(0);
    writer.count_unchanged(unchanged.saturating_sub(modules));
    writer.keep_layers(layers);
    let captured = if manifest.energy > 0.0 { manifest.captured - lost / manifest.energy } else { 0.0 };
    let mut all = manifest.extra.clone();
    all.extend(extra);
    writer.finish(ManifestParts {
        family: manifest.family.clone(),
        tool: manifest.tool.clone(),
        options: manifest.options.clone(),
        sources: manifest.sources.clone(),
        energy: manifest.energy,
        captured: captured.max(0.0),
        captured_upper_bound: manifest.captured_upper_bound,
        noise_floor: manifest.noise_floor,
        extra: all,
    })
}
