//! Genes, or factors that were trained, as a PEFT adapter over a target.
//!
//! Module by module `c * B` and `A`, the layer's coefficient folded into B once in `f32`, scale 1. If the target is an
//! adapter itself, or there are several genes, the result is one adapter over the same base that holds all: ranks are
//! concatenated (the target's first), which is exact up to the rounding of each B to `f32`; what the target saved whole
//! is copied. Factors that are no gene's ([`factors_into`]) are written the same way, all of them.
//!
//! An adapter cannot hold the rest. What is lost so is reported, never hidden; whether that is acceptable is the caller's
//! decision. With every coefficient 0 all modules are written with B = 0, because loaders refuse an empty adapter.
//!
//! Not here: merging into weights, profiles for other loaders.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use checkpoint::{Adapter, Checkpoint, Dtype, Factors, FolderWriter, TensorSpec, default_metadata};

use crate::error::{GeneError, Result};
use crate::expression::check_coefficients;
use crate::family::check_family;
use crate::manifest::{ADAPTER_FILE, Class};
use crate::peft::PeftConfig;
use crate::read::Gene;
use crate::spill::f32_bytes;

/// What an adapter holds, and what it cannot hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterReport {
    /// Modules with factors.
    pub modules: usize,
    /// The largest rank.
    pub rank_max: usize,
    /// Tensors of the gene's rest that would have been changed and are not.
    pub dropped: Vec<String>,
}

/// Writes the adapter folder of a gene with these coefficients over a target.
pub fn write_adapter(
    out: &Path,
    gene: &Gene,
    coefficients: &BTreeMap<u32, f64>,
    target: &Checkpoint,
    force: bool,
) -> Result<AdapterReport> {
    check(gene, coefficients, target)?;
    let folder = FolderWriter::create(out, force)?;
    let report = adapter_into(&folder, &[(gene, coefficients)], target)?;
    folder.publish()?;
    Ok(report)
}

/// A gene and the coefficients of its layers.
pub type Expressed<'a> = (&'a Gene, &'a BTreeMap<u32, f64>);

/// Writes `adapter_config.json` and `adapter_model.safetensors` into a folder that the caller publishes.
pub fn adapter_into(
    folder: &FolderWriter,
    genes: &[Expressed<'_>],
    target: &Checkpoint,
) -> Result<AdapterReport> {
    for (gene, coefficients) in genes {
        check(gene, coefficients, target)?;
    }
    let mut report = Plan::of_genes(genes, target.adapter())?.write(folder, target)?;
    for (gene, coefficients) in genes {
        let taken = |layer: u32| coefficients.get(&layer).copied().unwrap_or(0.0) > 0.0;
        let lost = gene.rest().iter().filter(|e| e.class != Class::LeftOut && e.layer.is_none_or(taken));
        report.dropped.extend(lost.map(|entry| entry.name.clone()));
    }
    Ok(report)
}

/// The same of factors by the names of their modules, each to be added to the target with its scale.
pub fn factors_into(
    folder: &FolderWriter,
    factors: &BTreeMap<String, Factors>,
    target: &Checkpoint,
) -> Result<AdapterReport> {
    Plan::of_factors(factors, target.adapter())?.write(folder, target)
}

fn check(gene: &Gene, coefficients: &BTreeMap<u32, f64>, target: &Checkpoint) -> Result<()> {
    check_coefficients(coefficients)?;
    let layers = gene.layers();
    for (&layer, &value) in coefficients {
        if value > 0.0 && !layers.contains(&layer) {
            return Err(GeneError::UnknownLayer { layer });
        }
    }
    check_family(gene, target)
}

/// Where factors come from.
enum Source<'a> {
    /// A gene, at a coefficient.
    Gene(&'a Gene, f32),
    /// The caller.
    Given(&'a Factors),
}

/// One module of the adapter to be written.
struct Part<'a> {
    name: String,
    shape: [u64; 2],
    rank: usize,
    /// Whose factors take part, in this order.
    sources: Vec<Source<'a>>,
    /// Whether the target's own factors take part.
    target: bool,
    embedding: bool,
}

impl Part<'_> {
    /// Names of the first and the second factor.
    fn tensors(&self) -> [String; 2] {
        let endings = if self.embedding {
            ["lora_embedding_A", "lora_embedding_B"]
        } else {
            ["lora_A.weight", "lora_B.weight"]
        };
        endings.map(|ending| format!("base_model.model.{}.{ending}", self.name))
    }

    /// Both factors joined, scales folded into B.
    fn factors(&self, target: Option<&Adapter>) -> Result<Factors> {
        let mut terms: Vec<(f64, Cow<'_, Factors>)> = Vec::new();
        if self.target
            && let Some(found) = target.map(|adapter| adapter.factors(&self.name)).transpose()?.flatten()
        {
            terms.push((found.scale, Cow::Owned(found)));
        }
        for source in &self.sources {
            terms.push(match source {
                Source::Gene(gene, coefficient) => {
                    (f64::from(*coefficient), Cow::Owned(gene.factors(&self.name)?))
                }
                Source::Given(factors) => (factors.scale, Cow::Borrowed(*factors)),
            });
        }
        let [rows, cols] = self.shape.map(|side| side as usize);
        let mut b = Vec::with_capacity(rows * self.rank);
        for row in 0..rows {
            for (scale, term) in &terms {
                let values = &term.b[row * term.rank..(row + 1) * term.rank];
                // A coefficient is an f32, so for the gene's factors this is one f32 product, rounded once.
                b.extend(values.iter().map(|&value| (f64::from(value) * scale) as f32));
            }
        }
        if let Some(index) = b.iter().position(|value| !value.is_finite()) {
            return Err(GeneError::NonFinite { name: self.name.clone(), index: index as u64 });
        }
        let a = terms.iter().flat_map(|(_, term)| term.a.iter().copied()).collect();
        Ok(Factors { b, a, rows, cols, rank: self.rank, scale: 1.0 })
    }
}

struct Plan<'a> {
    /// Sorted by name.
    parts: Vec<Part<'a>>,
}

impl<'a> Plan<'a> {
    /// The target's own modules.
    fn of_target(target: Option<&Adapter>) -> Result<BTreeMap<String, Part<'a>>> {
        let mut parts = BTreeMap::new();
        for (name, module) in target.iter().flat_map(|adapter| adapter.modules()) {
            let embedding = module.a.name.ends_with(".lora_embedding_A");
            if module.transposed && !embedding {
                return Err(GeneError::NoAdapter {
                    name: name.clone(),
                    problem: "its weight is stored transposed",
                });
            }
            let (shape, rank) = (module.shape(), module.rank);
            parts.insert(
                name.clone(),
                Part { name: name.clone(), shape, rank, sources: Vec::new(), target: true, embedding },
            );
        }
        Ok(parts)
    }

    fn of_genes(genes: &[Expressed<'a>], target: Option<&Adapter>) -> Result<Plan<'a>> {
        let mut parts = Plan::of_target(target)?;
        let all_zero = genes.iter().all(|(_, coefficients)| coefficients.values().all(|&value| value == 0.0));
        let nothing_else = parts.is_empty() && all_zero;
        let modules = genes.iter().flat_map(|(gene, coefficients)| {
            gene.modules().iter().map(move |module| (*gene, *coefficients, module))
        });
        for (gene, coefficients, module) in modules.filter(|(.., module)| module.class == Class::LowRank) {
            let coefficient = coefficients.get(&module.layer).copied().unwrap_or(0.0) as f32;
            if coefficient == 0.0 && !nothing_else {
                continue;
            }
            let source = Source::Gene(gene, coefficient);
            add(&mut parts, &module.name, (module.shape, module.rank), source, target)?;
        }
        Plan::new(parts)
    }

    fn of_factors(factors: &'a BTreeMap<String, Factors>, target: Option<&Adapter>) -> Result<Plan<'a>> {
        let mut parts = Plan::of_target(target)?;
        for (name, factors) in factors {
            let Factors { b, a, rows, cols, rank, .. } = factors;
            if rows.checked_mul(*rank) != Some(b.len()) || rank.checked_mul(*cols) != Some(a.len()) {
                return Err(GeneError::part(name, "its factors do not have the sizes of its shape and rank"));
            }
            let shape = [*rows as u64, *cols as u64];
            add(&mut parts, name, (shape, *rank), Source::Given(factors), target)?;
        }
        Plan::new(parts)
    }

    fn new(parts: BTreeMap<String, Part<'a>>) -> Result<Plan<'a>> {
        let parts: Vec<Part<'_>> = parts.into_values().collect();
        if parts.is_empty() {
            return Err(GeneError::EmptyAdapter);
        }
        Ok(Plan { parts })
    }

    fn write(&self, folder: &FolderWriter, target: &Checkpoint) -> Result<AdapterReport> {
        let saved: Vec<_> =
            target.adapter().map(|adapter| adapter.saved().iter().collect()).unwrap_or_default();

        let mut specs: Vec<TensorSpec> = Vec::new();
        for part in &self.parts {
            let ([rows, cols], rank) = (part.shape, part.rank as u64);
            let [a, b] = part.tensors();
            let (a_shape, b_shape) =
                if part.embedding { ([rank, rows], [cols, rank]) } else { ([rank, cols], [rows, rank]) };
            specs.push((a, Dtype::F32, a_shape.to_vec()));
            specs.push((b, Dtype::F32, b_shape.to_vec()));
        }
        // Factors are four bytes wide and come first, so that they stay aligned whatever was saved.
        specs.extend(saved.iter().map(|(_, info)| (info.name.clone(), info.dtype, info.shape.clone())));

        let mut shard = folder.shard(ADAPTER_FILE, &default_metadata(), &specs)?;
        for part in &self.parts {
            let factors = part.factors(target.adapter())?;
            let (a, b) = if part.embedding {
                let Factors { a, b, rows, cols, rank, .. } = &factors;
                (transposed(b, *rows, *rank), transposed(a, *rank, *cols))
            } else {
                (factors.a, factors.b)
            };
            let [a_name, b_name] = part.tensors();
            for (name, values) in [(a_name, a), (b_name, b)] {
                shard.write(&name, &f32_bytes(&values))?;
            }
        }
        if let Some(adapter) = target.adapter() {
            for (_, info) in &saved {
                shard.write(&info.name, &adapter.shards().read(info)?)?;
            }
        }
        shard.finish()?;

        let ranks: Vec<(String, usize)> =
            self.parts.iter().map(|part| (part.name.clone(), part.rank)).collect();
        // Base layers of adapted embeddings are stored under their own name and are not announced.
        let whole = saved.iter().filter(|(_, info)| !info.name.contains(".base_layer."));
        let whole: BTreeSet<String> = whole
            .filter_map(|(name, _)| name.rsplit_once('.').map(|(module, _)| module.to_owned()))
            .collect();
        let whole: Vec<String> = whole.into_iter().collect();
        let base = base_name(target)?;
        let config = PeftConfig { base: &base, modules: &ranks, saved: &whole };
        folder.file("adapter_config.json", &config.to_bytes())?;
        Ok(AdapterReport {
            modules: self.parts.len(),
            rank_max: self.parts.iter().map(|part| part.rank).max().unwrap_or(0),
            dropped: Vec::new(),
        })
    }
}

/// Adds factors to the part of a module.
fn add<'a>(
    parts: &mut BTreeMap<String, Part<'a>>,
    name: &str,
    (shape, rank): ([u64; 2], usize),
    source: Source<'a>,
    target: Option<&Adapter>,
) -> Result<()> {
    if target.is_some_and(|adapter| adapter.saved().contains_key(&format!("{name}.weight"))) {
        return Err(GeneError::NoAdapter { name: name.to_owned(), problem: "the target saved it whole" });
    }
    let part = parts.entry(name.to_owned()).or_insert_with(|| Part {
        name: name.to_owned(),
        shape,
        rank: 0,
        sources: Vec::new(),
        target: false,
        embedding: false,
    });
    if part.shape != shape {
        return Err(GeneError::part(
            name,
            format!("it is {shape:?} here and {:?} in the target", part.shape),
        ));
    }
    part.rank += rank;
    part.sources.push(source);
    Ok(())
}

/// What an adapter over a target calls its base: the target's own folder; for an adapter target the name it uses, unless that is a
/// path from its folder, which would not hold from another.
pub fn base_name(target: &Checkpoint) -> Result<String> {
    if let Some(adapter) = target.adapter() {
        let named = &adapter.config().base_model_name_or_path;
        let is_path = adapter.dir().join(named).is_dir() || Path::new(named).is_dir();
        if !named.is_empty() && !is_path {
            return Ok(named.clone());
        }
    }
    let dir = target.base_dir();
    let path = fs::canonicalize(dir).map_err(GeneError::io("read", dir))?;
    Ok(path.to_string_lossy().into_owned())
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for col in 0..cols {
        out.extend((0..rows).map(|row| values[row * cols + col]));
    }
    out
}
