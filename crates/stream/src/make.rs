//! A gene from what the journals hold: all tensors there, ranks cut to a budget, totals summed in the order of names.
//!
//! Not here: finding factors; that is `extract`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{Checkpoint, CheckpointError, FolderWriter, Role, module_of};
use gene::{Class, Family, GeneWriter, Given, ManifestParts, Module, Source, Sources};
use kernels::{DeltaStats, Engine};
use lowrank::{Certificate, LowRank, NOISE_RELIABLE};
use serde_json::{Map, Value, json};

use crate::budget;
use crate::difference::{Difference, Sides, pair_on, terms};
use crate::extract::{
    COMMON_ROWS, Extract, ExtractReport, NOISE_RELIABLE_KEY, Ranks, Record, UPPER_BOUND, Work, ZERO_FRACTION,
    report,
};
use crate::flow::{Limits, flow};
use crate::pairing::Pair;
use crate::parts::{self, Segments};
use crate::pool::{Pool, buffers_of};
use crate::{Result, StreamError};

/// Sums over all tensors, in squared norms.
#[derive(Default)]
struct Totals {
    energy: f64,
    missed: f64,
    best: f64,
    noise: f64,
    differs: bool,
}

impl Totals {
    fn add(&mut self, record: &Record) {
        self.energy += record.energy;
        self.missed += record.residual * record.energy;
        self.best += record.best * record.energy;
        self.noise += record.noise * record.energy;
        self.differs |= record.class != Class::Unchanged;
    }

    fn share(&self, part: f64) -> f64 {
        // Nothing but buffers of no number format, or whole rows of zeros, has no energy: all of nothing is held.
        if self.energy > 0.0 { (part / self.energy).clamp(0.0, 1.0) } else { 1.0 }
    }
}

/// Makes the gene from what the workers left.
pub(crate) fn make_gene<E: Engine>(
    engine: &E,
    job: &Extract,
    work: &Work,
    pairs: &[Pair],
) -> Result<ExtractReport> {
    let folder = FolderWriter::resume(&job.out, job.force)?;
    folder.clear()?;
    let found = parts::read_all::<Work, Record>(&folder.work()?)?;
    let mut records: BTreeMap<String, (Record, Arc<File>)> = BTreeMap::new();
    if let Some((same, all)) = found
        && same == *work
    {
        records.extend(all.into_iter().map(|(record, part)| (record.tensor.clone(), (record, part))));
    }
    let missing: Vec<&Pair> = pairs.iter().filter(|pair| !records.contains_key(&pair.name)).collect();
    if let Some(first) = missing.first() {
        let (missing, of) = (missing.len() as u64, pairs.len() as u64);
        return Err(StreamError::Incomplete { missing, of, example: first.name.clone() });
    }
    if !records.values().any(|(record, _)| record.class != Class::Unchanged) {
        folder.discard();
        return Err(StreamError::NothingDiffers {
            aligned: job.aligned.dir().to_path_buf(),
            degraded: job.degraded.dir().to_path_buf(),
        });
    }
    let mut shorter: BTreeMap<String, Pairs> = BTreeMap::new();
    if let Ranks::Budget { bytes, .. } = job.ranks {
        shorter = cut_to_budget(engine, job, pairs, &mut records, bytes)?;
    }
    let mut totals = Totals::default();
    let mut common_rows = Map::new();
    let mut digests: [BTreeMap<String, u128>; 2] = Default::default();
    let mut writer = GeneWriter::in_folder(folder)?;
    for pair in pairs {
        let Some((record, part)) = records.get(&pair.name) else { continue };
        totals.add(record);
        for (known, unit, hex) in
            [(0, &pair.aligned, &record.aligned_digest), (1, &pair.degraded, &record.degraded_digest)]
        {
            if let Some(digest) = hex.as_ref().and_then(|hex| u128::from_str_radix(hex, 16).ok()) {
                digests[known].insert(unit.tensor.clone(), digest);
            }
        }
        let given = |segments: &Segments| Given {
            file: part.clone(),
            segments: segments.iter().map(|(start, bytes, _)| (*start, *bytes)).collect(),
        };
        let (name, shape) = (&record.tensor, &record.shape);
        match record.class {
            Class::Unchanged => writer.class_only(name, record.layer, shape, record.class, 0.0)?,
            Class::LeftOut => writer.class_only(name, record.layer, shape, record.class, record.energy)?,
            Class::Full => writer.full_given(name, shape, given(&record.values), record.energy)?,
            Class::RowPatch => {
                let mut index = vec![0u8; record.rows.iter().map(|(_, bytes, _)| *bytes as usize).sum()];
                read_parts(part, &record.rows, &mut index)?;
                let rows: Vec<u64> =
                    index.as_chunks::<8>().0.iter().map(|row| u64::from_le_bytes(*row)).collect();
                if let Some(common) = record.common_rows {
                    common_rows.insert(name.clone(), json!(common));
                }
                let shape = [shape[0], shape[1]];
                writer.row_patch_given(name, shape, &rows, given(&record.values), record.energy)?;
            }
            Class::LowRank => {
                let module = module(pair, record)?;
                match shorter.get(name) {
                    Some((b, a)) => writer.low_rank(module, b, a)?,
                    None => writer.low_rank_given(module, given(&record.b), given(&record.a))?,
                }
            }
        }
    }
    let mut extra = Map::new();
    extra.insert(NOISE_RELIABLE_KEY.to_owned(), json!(totals.share(totals.noise) < NOISE_RELIABLE));
    if !common_rows.is_empty() {
        extra.insert(COMMON_ROWS.to_owned(), Value::Object(common_rows));
    }
    let manifest = writer.finish(ManifestParts {
        family: Family {
            model_type: job.aligned.config().model_type.clone(),
            fingerprint: gene::fingerprint_of(&job.aligned)?,
            extra: Map::new(),
        },
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        options: work.options.clone(),
        sources: Sources {
            aligned: source(&job.aligned, &digests[0])?,
            degraded: source(&job.degraded, &digests[1])?,
            extra: Map::new(),
        },
        energy: totals.energy,
        captured: totals.share(totals.energy - totals.missed),
        captured_upper_bound: totals.share(totals.best),
        noise_floor: totals.share(totals.noise),
        extra,
    })?;
    Ok(report(&manifest, false, 0))
}

fn module(pair: &Pair, record: &Record) -> Result<Module> {
    let (Role::Linear { layer }, Some(name)) = (pair.role, module_of(&pair.name)) else {
        return Err(StreamError::NotLinear { tensor: pair.name.clone() });
    };
    let mut extra = Map::new();
    extra.insert(UPPER_BOUND.to_owned(), json!(record.best));
    extra.insert(ZERO_FRACTION.to_owned(), json!(record.zeros));
    extra.insert(NOISE_RELIABLE_KEY.to_owned(), json!(record.noise < NOISE_RELIABLE));
    Ok(Module {
        name: name.to_owned(),
        layer,
        shape: [record.shape[0], record.shape[1]],
        class: Class::LowRank,
        rank: record.rank,
        energy: record.energy,
        residual: record.residual,
        noise_floor: record.noise,
        extra,
    })
}

/// Both factors, B and A.
type Pairs = (Vec<f32>, Vec<f32>);

/// Cuts all ranks to a budget, and certifies what was cut by a pass over its weights. Returns the factors of what was.
fn cut_to_budget<E: Engine>(
    engine: &E,
    job: &Extract,
    pairs: &[Pair],
    records: &mut BTreeMap<String, (Record, Arc<File>)>,
    budget_bytes: u64,
) -> Result<BTreeMap<String, Pairs>> {
    let offers: Vec<budget::Offer<'_>> = records
        .values()
        .filter(|(record, _)| record.class == Class::LowRank)
        .map(|(record, _)| budget::Offer {
            name: &record.tensor,
            bytes_per_rank: 4 * record.shape.iter().sum::<u64>(),
            singular: &record.singular,
        })
        .collect();
    let ranks: BTreeMap<String, usize> = budget::ranks(&offers, budget_bytes)
        .into_iter()
        .map(|(name, rank)| (name.to_owned(), rank))
        .collect();
    let buffers = buffers_of(engine);
    let pool = Pool::new(&buffers);
    let sides = Sides::new(&job.aligned, &job.degraded, &pool)?;
    let todo: Vec<&Pair> = pairs
        .iter()
        .filter(|pair| ranks.get(&pair.name).is_some_and(|&rank| rank < records[&pair.name].0.rank))
        .collect();
    let limits = Limits::new(engine, job.memory_bytes, &job.stop);
    let mut shorter = BTreeMap::new();
    let mut certified: Vec<(String, usize, Option<Certificate>)> = Vec::new();
    let before = &*records;
    flow(
        &todo,
        &limits,
        |pair| pair.bytes().saturating_mul(2),
        |pair| sides.read(pair),
        |pair, difference| {
            let (record, part) = &before[&pair.name];
            let rank = ranks[&pair.name];
            if rank == 0 {
                return Ok((rank, None));
            }
            let low_rank = stored_factors(record, part)?.truncated(rank);
            let certificate = match &difference {
                Difference::Products(products, _) => lowrank::certify_factors(&terms(products), &low_rank),
                Difference::Dense(both) => {
                    let on = pair_on(engine, &pair.name, both)?;
                    let elements = record.shape.iter().product();
                    // The sums of the first pass; how many elements are equal is kept as a share.
                    let stats = DeltaStats {
                        sumsq: record.energy,
                        ulp_sumsq: record.noise * record.energy * 12.0,
                        max_abs: 0.0,
                        nonzero: elements,
                        elements,
                    };
                    lowrank::certify(engine, &on, &stats, &low_rank)
                }
            };
            let at = |source| StreamError::LowRank { tensor: pair.name.clone(), source };
            Ok((rank, Some((certificate.map_err(at)?, low_rank))))
        },
        |pair, (rank, found)| {
            let certificate = found.map(|(certificate, low_rank)| {
                shorter.insert(pair.name.clone(), (low_rank.b, low_rank.a));
                certificate
            });
            certified.push((pair.name.clone(), rank, certificate));
            Ok(())
        },
    )?;
    for (name, rank, certificate) in certified {
        let Some((record, _)) = records.get_mut(&name) else { continue };
        record.rank = rank;
        match certificate {
            None => (record.class, record.residual, record.best) = (Class::LeftOut, 1.0, 0.0),
            Some(found) => (record.residual, record.best) = (found.residual, found.captured_upper_bound),
        }
    }
    Ok(shorter)
}

/// The factors that a record names.
fn stored_factors(record: &Record, part: &File) -> Result<LowRank> {
    let read = |segments: &Segments| -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; segments.iter().map(|(_, bytes, _)| *bytes as usize).sum()];
        read_parts(part, segments, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    };
    Ok(LowRank {
        b: read(&record.b)?,
        a: read(&record.a)?,
        rows: record.shape[0] as usize,
        cols: record.shape[1] as usize,
        rank: record.rank,
        singular: record.singular.clone(),
        outside_sumsq: record.outside,
        best_sumsq_upper: 0.0,
    })
}

fn read_parts(part: &File, segments: &Segments, out: &mut [u8]) -> Result<()> {
    let mut at = 0;
    for &(start, bytes, _) in segments {
        let to = at + bytes as usize;
        part.read_exact_at(&mut out[at..to], start).map_err(|source| CheckpointError::Io {
            action: "read",
            path: PathBuf::from("part file"),
            source,
        })?;
        at = to;
    }
    Ok(())
}

fn source(side: &Checkpoint, digests: &BTreeMap<String, u128>) -> Result<Source> {
    let dir = side.dir();
    let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let name = name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Source { name, revision: None, content: side.content_from(digests)?, extra: Map::new() })
}
