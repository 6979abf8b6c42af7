//! A gene held against the checkpoints it came from.
//!
//! Contents, the class of every tensor, energies and residuals are computed again from the files, and compared with what
//! `gene.json` says. Nothing is taken from the gene but its values.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use checkpoint::{Checkpoint, module_of};
use gene::{Class, Gene, RestDelta};
use kernels::{Engine, Shape};
use lowrank::Factor;
use xxhash_rust::xxh64::xxh64;

use crate::assemble::ranks;
use crate::difference::{Difference, Sides, pair_on, terms};
use crate::extract::{UPPER_BOUND, ZERO_FRACTION};
use crate::flow::{Limits, flow};
use crate::pairing::{Pair, float, pairs};
use crate::pool::{Pool, buffers_of};
use crate::{Progress, Result, StreamError};

/// Sums are f64 in a fixed order, so the same machine gives the same bits; another vector width another order.
const TOLERANCE: f64 = 1e-9;

/// What does not agree.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    /// Tensors looked at.
    pub tensors: u64,
    /// Modules whose residual was computed again.
    pub modules: u64,
    /// One line for each thing that does not agree, sorted.
    pub faults: Vec<String>,
}

/// Computes everything that `gene.json` says about a pair of checkpoints again.
pub fn verify<E: Engine>(
    engine: &E,
    gene: &Gene,
    aligned: &Arc<Checkpoint>,
    degraded: &Arc<Checkpoint>,
    memory_bytes: u64,
    progress: &dyn Progress,
) -> Result<VerifyReport> {
    let pairs = pairs(aligned, degraded)?;
    let manifest = gene.manifest();
    let mut faults = BTreeSet::new();
    for (name, side, said) in [
        ("aligned", aligned, &manifest.sources.aligned.content),
        ("degraded", degraded, &manifest.sources.degraded.content),
    ] {
        if side.content()? != *said {
            faults.insert(format!("{name}: the content is not the one that the gene came from"));
        }
    }
    let rest: BTreeMap<&str, _> = gene.rest().iter().map(|entry| (entry.name.as_str(), entry)).collect();
    let buffers = buffers_of(engine);
    let pool = Pool::new(&buffers);
    let sides = Sides::new(aligned, degraded, &pool)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let limits = Limits::new(engine, memory_bytes, &stop);
    progress.stage("verifying", pairs.iter().map(Pair::bytes).sum());
    let seed = manifest.options.get("seed").and_then(|seed| seed.as_u64()).unwrap_or(0);
    let how = ranks(&manifest.options).map(|ranks| Factor::new(ranks.of_module(), seed));
    let mut modules = 0;
    let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    let compared: Vec<&Pair> =
        pairs.iter().filter(|pair| pair.same_rows() && float(pair.aligned.dtype).is_some()).collect();
    flow(
        &compared,
        &limits,
        |pair| pair.bytes().saturating_mul(2),
        |pair| sides.read(pair),
        |pair, difference| {
            let module = module_of(&pair.name).and_then(|name| gene.module(name));
            let entry = rest.get(pair.name.as_str());
            let class = module.map(|m| m.class).or(entry.map(|e| e.class)).unwrap_or_default();
            let said = module.map(|m| (m.energy, m.residual)).or(entry.map(|e| (e.energy, 0.0)));
            let (energy_said, residual_said) = said.unwrap_or_default();
            let mut found = Vec::new();
            let at = |source| StreamError::LowRank { tensor: pair.name.clone(), source };
            let mut recomputed = None;
            let (energy, residual) = match &difference {
                Difference::Products(products, _) if products.is_empty() => (0.0, None),
                Difference::Products(products, _) if class == Class::LowRank => {
                    let name = module_of(&pair.name).unwrap_or(&pair.name);
                    let stored = low_rank(gene, name)?;
                    let certificate = lowrank::certify_factors(&terms(products), &stored).map_err(at)?;
                    (certificate.energy, Some(certificate.residual))
                }
                Difference::Products(..) => (energy_said, None),
                Difference::Dense(both) => {
                    let on = pair_on(engine, &pair.name, both)?;
                    let kernel = |source| crate::difference::located(&pair.name, both, source);
                    let stats = engine.stats(&on).map_err(kernel)?;
                    let residual = match class {
                        Class::LowRank => {
                            let name = module_of(&pair.name).unwrap_or(&pair.name);
                            let stored = low_rank(gene, name)?;
                            // The bound is that of the same search with the same seed, cut to the rank that was kept.
                            let key = xxh64(pair.name.as_bytes(), 0);
                            let best = match &how {
                                Some(how) => lowrank::factor(engine, &on, key, how).map_err(at)?.0,
                                None => None,
                            };
                            let best = best.map(|best| best.truncated(stored.rank).best_sumsq_upper);
                            let stored =
                                lowrank::LowRank { best_sumsq_upper: best.unwrap_or_default(), ..stored };
                            let found = lowrank::certify(engine, &on, &stats, &stored).map_err(at)?;
                            recomputed =
                                Some((found.noise_floor, found.zero_fraction, found.captured_upper_bound));
                            Some(found.residual)
                        }
                        Class::Full | Class::RowPatch => {
                            let (delta, _) = engine.delta(&on).map_err(kernel)?;
                            if !holds(gene, &pair.name, &engine.read(&delta).map_err(kernel)?)? {
                                found.push(format!(
                                    "`{}`: the difference kept is not that of the files",
                                    pair.name
                                ));
                            }
                            None
                        }
                        _ => None,
                    };
                    (stats.sumsq, residual)
                }
            };
            let off = |said: f64, is: f64| (said - is).abs() > TOLERANCE * is.abs().max(f64::MIN_POSITIVE);
            if off(energy_said, energy) {
                found.push(format!("`{}`: energy is {energy:e}, the gene says {energy_said:e}", pair.name));
            }
            if let Some(residual) = residual.filter(|&is| off(residual_said, is)) {
                found.push(format!("`{}`: residual is {residual}, the gene says {residual_said}", pair.name));
            }
            if let (Some(module), Some((noise, zeros, bound))) = (module, recomputed) {
                let said = |key: &str| module.extra.get(key).and_then(|x| x.as_f64()).unwrap_or(f64::NAN);
                // The bound comes from a search by f32 products, whose roundings are others on another engine; they grow
                // like a random walk along the longer side.
                let longer = module.shape.iter().copied().max().unwrap_or(1) as f64;
                let of_products = 2.0 * f64::from(f32::EPSILON) * longer.sqrt();
                for (what, said, is, tolerance) in [
                    ("noise floor", module.noise_floor, noise, TOLERANCE),
                    ("zero fraction", said(ZERO_FRACTION), zeros, TOLERANCE),
                    ("upper bound", said(UPPER_BOUND), bound, of_products),
                ] {
                    if said.is_nan() || (said - is).abs() > tolerance {
                        found.push(format!("`{}`: {what} is {is}, the gene says {said}", pair.name));
                    }
                }
            }
            let missed = match (class, residual) {
                (Class::Full | Class::RowPatch | Class::Unchanged, _) => 0.0,
                (_, residual) => residual.unwrap_or(1.0) * energy,
            };
            Ok((residual.is_some(), found, energy, missed))
        },
        |pair, (was_module, found, energy, missed)| {
            modules += u64::from(was_module);
            sums.insert(pair.name.clone(), (energy, missed));
            faults.extend(found);
            progress.advance(pair.bytes(), &pair.name);
            Ok(())
        },
    )?;
    // Tensors that are compared by rows only, or hold no numbers, count as the gene says.
    let others = gene.rest().iter().filter(|entry| !sums.contains_key(&entry.name));
    let whole: f64 =
        sums.values().map(|(energy, _)| energy).sum::<f64>() + others.map(|entry| entry.energy).sum::<f64>();
    let missed: f64 = sums.values().map(|(_, missed)| missed).sum();
    let captured = if whole > 0.0 { 1.0 - missed / whole } else { 1.0 };
    for (what, said, is) in
        [("energy", manifest.energy, whole), ("captured", manifest.captured, captured.clamp(0.0, 1.0))]
    {
        if (said - is).abs() > TOLERANCE * is.abs().max(f64::MIN_POSITIVE) {
            faults.insert(format!("{what} of the whole is {is}, the gene says {said}"));
        }
    }
    for module in gene.modules() {
        let name = format!("{}.weight", module.name);
        if pairs.binary_search_by(|pair| pair.name.as_str().cmp(&name)).is_err() {
            faults.insert(format!("`{name}`: it is in the gene and not in the files"));
        }
    }
    Ok(VerifyReport { tensors: pairs.len() as u64, modules, faults: faults.into_iter().collect() })
}

fn low_rank(gene: &Gene, module: &str) -> Result<lowrank::LowRank> {
    let factors = gene.factors(module)?;
    Ok(lowrank::LowRank {
        b: factors.b,
        a: factors.a,
        rows: factors.rows,
        cols: factors.cols,
        rank: factors.rank,
        singular: Vec::new(),
        outside_sumsq: 0.0,
        best_sumsq_upper: 0.0,
    })
}

/// Whether the gene's exact difference of a tensor is this one, bit for bit.
fn holds(gene: &Gene, name: &str, delta: &[f32]) -> Result<bool> {
    let same =
        |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    Ok(match gene.rest_delta(name)? {
        RestDelta::Full(kept) => same(&kept, delta),
        RestDelta::Rows { rows, delta: kept } => {
            let cols = kept.len() / rows.len().max(1);
            let shape = Shape { rows: delta.len() / cols.max(1), cols };
            let listed: BTreeMap<u64, &[f32]> = rows.iter().copied().zip(kept.chunks(cols.max(1))).collect();
            (0..shape.rows).all(|row| {
                let line = &delta[row * cols..][..cols];
                match listed.get(&(row as u64)) {
                    Some(kept) => same(kept, line),
                    None => line.iter().all(|&x| x == 0.0),
                }
            })
        }
    })
}
