//! Weights with something added, tensor by tensor into the target's own layout.
//!
//! The output has the target's files with their headers byte for byte. Whatever is added to a tensor (an adapter's
//! product, the gene's factors, an exact difference) is summed in f32 first and rounded once. What nothing is added to
//! keeps its bytes. Blocks of rows go through side by side; sums are added in the order of the blocks.
//!
//! Not here: what is to be added; that is the plan's.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use checkpoint::{Checkpoint, Factors, FolderWriter, INDEX_FILE, PlacedShard, TensorInfo, Unit, module_of};
use kernels::{AddStats, Dtype, Engine, Shape, Weights};
use xxhash_rust::xxh3::Xxh3;

use crate::difference::first_non_finite;
use crate::flow::{Limits, Stages, flow};
use crate::pairing::float;
use crate::{Progress, Result, StreamError};

/// Bytes of a block of rows.
const BLOCK_BYTES: u64 = 16 << 20;
/// One, so that the blocks of a tensor are read, and hashed, in their order.
const READERS: usize = 1;

/// What is to be added to one unit of the target.
pub(crate) enum Addition {
    /// The coefficient of a product of factors.
    Product(f32, Factors),
    /// The coefficient of a whole difference, in the order of the elements.
    Dense(f32, Vec<f32>),
}

/// Says what is to be added to a unit of the target, if anything.
pub(crate) trait Plan: Sync {
    /// Whether anything is.
    fn changes(&self, unit: &str) -> bool;

    fn addition(&self, unit: &str) -> Result<Option<Addition>>;
}

/// What a merge did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Merged {
    /// Tensors of which an element is another one than without the plan.
    pub(crate) tensors_changed: u64,
    /// Such elements.
    pub(crate) elements_changed: u64,
    /// Sums over all that was added, adapters included.
    pub(crate) intended_sumsq: f64,
    pub(crate) realised_sumsq: f64,
}

/// Some rows of a stored tensor, or all of it.
struct Block<'a> {
    info: &'a TensorInfo,
    file: usize,
    /// Bytes of the tensor.
    start: u64,
    bytes: u64,
    /// Units of which some rows lie in it; only a whole tensor may have several.
    units: Vec<&'a Unit>,
}

/// Writes the weights of `target` with the additions of `plan`, and the index if there is one.
pub(crate) fn merge<E: Engine>(
    engine: &E,
    target: &Checkpoint,
    plan: &impl Plan,
    writer: &FolderWriter,
    limits: &Limits<'_>,
    progress: &dyn Progress,
) -> Result<(Merged, Stages, BTreeMap<String, u128>)> {
    let shards = target.shards();
    progress.stage("merging", target.tensors().iter().map(|info| info.bytes).sum());
    let units = target.units()?;
    let scale_tensors = target.scale_tensors()?;
    let mut of_tensor: BTreeMap<&str, Vec<&Unit>> = BTreeMap::new();
    for unit in &units {
        of_tensor.entry(&unit.tensor).or_default().push(unit);
    }
    let mut files: Vec<PlacedShard> = Vec::new();
    let mut blocks: Vec<Block<'_>> = Vec::new();
    for (at, file) in shards.files().iter().enumerate() {
        let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        files.push(writer.shard_like(file, &name)?);
        for info in shards.in_file(file) {
            let units = of_tensor.get(info.name.as_str()).cloned().unwrap_or_default();
            if scale_tensors.contains(&info.name) || units.iter().any(|unit| unit.scale.is_some()) {
                return Err(StreamError::ScaledTarget { tensor: info.name.clone(), file: file.clone() });
            }
            cut(target, info, at, units, &mut blocks);
        }
    }
    let merge = Merge { engine, target, plan, hashes: Mutex::default() };
    let mut done: BTreeMap<usize, Merged> = BTreeMap::new();
    let order: Vec<(usize, Block<'_>)> = blocks.into_iter().enumerate().collect();
    let limits = Limits { readers: READERS, ..*limits };
    let stages = flow(
        &order,
        &limits,
        |(_, block)| block.bytes.saturating_mul(3),
        |(_, block)| merge.read(block),
        |(_, block), bytes| merge.block(block, bytes),
        |(at, block), (bytes, found)| {
            // By one thread: a file takes one write at a time anyway.
            files[block.file].write_at(block.info.offset + block.start, &bytes)?;
            done.insert(*at, found);
            progress.advance(block.bytes, &block.info.name);
            Ok(())
        },
    )?;
    for file in files {
        file.finish()?;
    }
    let mut total = Merged::default();
    let mut changed: Option<&str> = None;
    for (at, part) in &done {
        let name = order[*at].1.info.name.as_str();
        if part.elements_changed > 0 && changed != Some(name) {
            total.tensors_changed += 1;
            changed = Some(name);
        }
        total.elements_changed += part.elements_changed;
        total.intended_sumsq += part.intended_sumsq;
        total.realised_sumsq += part.realised_sumsq;
    }
    // The same files with the same tensors: the index stays true.
    if let Some(index) =
        checkpoint::read_json::<BTreeMap<String, serde_json::Value>>(shards.dir(), INDEX_FILE)?
    {
        let mut text = serde_json::to_vec_pretty(&index).unwrap_or_default();
        text.push(b'\n');
        writer.file(INDEX_FILE, &text)?;
    }
    let hashes = merge.hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let digests = hashes.into_iter().map(|(name, hash)| (name, hash.digest128())).collect();
    Ok((total, stages, digests))
}

/// Cuts a tensor into blocks of rows, unless something about it asks for all of it at once.
fn cut<'a>(
    target: &Checkpoint,
    info: &'a TensorInfo,
    file: usize,
    units: Vec<&'a Unit>,
    blocks: &mut Vec<Block<'a>>,
) {
    let saved = target.adapter().is_some_and(|adapter| adapter.saved().contains_key(&info.name));
    let plain = match units[..] {
        [unit] => unit.slice.col_stride == 1 && unit.slice.start == 0 && unit.shape == info.shape && !saved,
        _ => false,
    };
    let row_bytes = info.shape.first().filter(|rows| **rows > 0).map_or(0, |rows| info.bytes / rows);
    if !plain || info.shape.len() < 2 || row_bytes == 0 || info.bytes <= BLOCK_BYTES {
        blocks.push(Block { info, file, start: 0, bytes: info.bytes, units });
        return;
    }
    let step = (BLOCK_BYTES / row_bytes).max(1) * row_bytes;
    let mut start = 0;
    while start < info.bytes {
        let bytes = step.min(info.bytes - start);
        blocks.push(Block { info, file, start, bytes, units: units.clone() });
        start += bytes;
    }
}

struct Merge<'a, E, P> {
    engine: &'a E,
    target: &'a Checkpoint,
    plan: &'a P,
    /// Of the base's tensors, as far as they were read.
    hashes: Mutex<BTreeMap<String, Xxh3>>,
}

impl<E: Engine, P: Plan> Merge<'_, E, P> {
    /// The bytes of a block, in the dtype of the base: an adapter's saved copy in another one is rounded when it is
    /// added to.
    fn read(&self, block: &Block<'_>) -> Result<Vec<u8>> {
        if self.target.adapter().is_some_and(|adapter| adapter.saved().contains_key(&block.info.name)) {
            return Ok(self.target.read_stored(&block.info.name)?.1);
        }
        let mut bytes = vec![0u8; block.bytes as usize];
        self.target.shards().read_at(block.info, block.start, &mut bytes)?;
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        match hashes.get_mut(&block.info.name) {
            Some(hash) => hash.update(&bytes),
            None => hashes.entry(block.info.name.clone()).or_default().update(&bytes),
        }
        Ok(bytes)
    }

    fn block(&self, block: &Block<'_>, mut bytes: Vec<u8>) -> Result<(Vec<u8>, Merged)> {
        let info = block.info;
        let saved = self.target.adapter().and_then(|adapter| adapter.saved().get(&info.name));
        let stored = saved.unwrap_or(info);
        let adapter = match module_of(&info.name) {
            Some(module) => self.target.factors(module)?,
            None => None,
        };
        let first = (block.start * info.elements()).checked_div(info.bytes).unwrap_or(0);
        let mut merged = Merged::default();
        let changes = block.units.iter().any(|unit| self.plan.changes(&unit.name));
        if adapter.is_none() && !changes && stored.dtype == info.dtype {
            if let Some(index) = float(stored.dtype).and_then(|dtype| first_non_finite(&bytes, dtype)) {
                let (tensor, file) = (info.name.clone(), stored.file.clone());
                return Err(StreamError::NonFinite { tensor, file, index: first + index });
            }
        } else {
            let unsupported = |info: &TensorInfo| StreamError::UnsupportedDtype {
                tensor: info.name.clone(),
                file: info.file.clone(),
                dtype: info.dtype,
            };
            let from = float(stored.dtype).ok_or_else(|| unsupported(stored))?;
            let to = float(info.dtype).ok_or_else(|| unsupported(info))?;
            for unit in &block.units {
                let part =
                    self.unit(block, unit, (from, to), adapter.as_ref(), first, &mut bytes, &stored.file)?;
                merged.elements_changed += part.elements_changed;
                merged.intended_sumsq += part.intended_sumsq;
                merged.realised_sumsq += part.realised_sumsq;
            }
        }
        Ok((bytes, merged))
    }

    /// Adds to one unit of a block, in place.
    fn unit(
        &self,
        block: &Block<'_>,
        unit: &Unit,
        (from, to): (Dtype, Dtype),
        adapter: Option<&Factors>,
        first: u64,
        bytes: &mut Vec<u8>,
        file: &Path,
    ) -> Result<Merged> {
        let addition = self.plan.addition(&unit.name)?;
        let at = |source| StreamError::kernel(&unit.name, file, source);
        let cols = unit.cols() as usize;
        let part = block.bytes < block.info.bytes;
        let rows = match part {
            true => block.bytes as usize / (cols * to.bytes()).max(1),
            false => unit.rows() as usize,
        };
        let shape = Shape { rows, cols };
        let first_row = if cols > 0 && part { first as usize / cols } else { 0 };
        let weights =
            Sum { engine: self.engine, from, to, shape, first_row, adapter, addition: addition.as_ref() };
        let whole = unit.slice.start == 0
            && unit.slice.col_stride == 1
            && (part || unit.shape == block.info.shape || bytes.len() == rows * cols * from.bytes());
        let old = if whole { std::mem::take(bytes) } else { gather(bytes, unit, from.bytes()) };
        // What an adapter or another format changes anyway does not count.
        let before = match (adapter, &addition) {
            (_, None) => None,
            (None, Some(_)) if from == to => None,
            _ => Some(weights.add(old.clone(), false).map_err(at)?.0),
        };
        let (new, stats) = weights.add(old, true).map_err(at)?;
        let elements_changed = match &before {
            Some(before) => differing(&new, before, to.bytes()),
            None if addition.is_some() => stats.changed,
            None => 0,
        };
        if whole {
            *bytes = new;
        } else {
            scatter(&new, unit, to.bytes(), bytes);
        }
        Ok(Merged {
            tensors_changed: 0,
            elements_changed,
            intended_sumsq: stats.intended_sumsq,
            realised_sumsq: stats.realised_sumsq,
        })
    }
}

/// The elements of a unit inside its stored tensor, row-major.
fn gather(bytes: &[u8], unit: &Unit, size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity((unit.rows() * unit.cols()) as usize * size);
    for at in places(unit) {
        out.extend_from_slice(&bytes[at * size..][..size]);
    }
    out
}

/// The way back.
fn scatter(from: &[u8], unit: &Unit, size: usize, bytes: &mut [u8]) {
    for (x, at) in from.chunks_exact(size).zip(places(unit)) {
        bytes[at * size..][..size].copy_from_slice(x);
    }
}

fn places(unit: &Unit) -> impl Iterator<Item = usize> + '_ {
    let slice = unit.slice;
    (0..unit.rows()).flat_map(move |row| {
        (0..unit.cols())
            .map(move |col| (slice.start + row * slice.row_stride + col * slice.col_stride) as usize)
    })
}

fn differing(a: &[u8], b: &[u8], size: usize) -> u64 {
    a.chunks(size).zip(b.chunks(size)).filter(|(a, b)| a != b).count() as u64
}

/// `weights + adapter + addition` for some rows, rounded once to the format they go to.
struct Sum<'a, E> {
    engine: &'a E,
    from: Dtype,
    to: Dtype,
    shape: Shape,
    first_row: usize,
    adapter: Option<&'a Factors>,
    addition: Option<&'a Addition>,
}

impl<E: Engine> Sum<'_, E> {
    /// The sum, with or without the addition of the plan.
    fn add(&self, mut bytes: Vec<u8>, with_addition: bool) -> kernels::Result<(Vec<u8>, AddStats)> {
        let Sum { engine, from, to, shape, adapter, .. } = *self;
        let addition = self.addition.filter(|_| with_addition);
        let flat = Shape { rows: 1, cols: shape.len()? };
        if from != to {
            // A saved copy in another format: the sum in f32 as always, then that one rounding.
            let zero = Weights::copied(&vec![0; shape.bytes(from)?], from, flat)?;
            let pair = engine.pair(Weights::copied(&bytes, from, flat)?, zero)?;
            let wide = engine.read(&engine.delta(&pair)?.0)?;
            let sum = Sum { from: Dtype::F32, to: Dtype::F32, addition, ..*self };
            let (sum, stats) = sum.add(bytemuck::cast_slice(&wide).to_vec(), true)?;
            return Ok((engine.pack(&engine.matrix(&floats(&sum), flat)?, to)?, stats));
        }
        let product = |factors: &Factors| -> kernels::Result<(E::Matrix, E::Matrix)> {
            let rank = factors.rank;
            let b = &factors.b[self.first_row * rank..(self.first_row + shape.rows) * rank];
            let b = engine.matrix(b, Shape { rows: shape.rows, cols: rank })?;
            Ok((b, engine.matrix(&factors.a, Shape { rows: rank, cols: factors.cols })?))
        };
        let adapter = adapter.map(|factors| Ok((factors.scale as f32, product(factors)?))).transpose()?;
        let mut terms: Vec<_> = adapter.iter().map(|(scale, (b, a))| (*scale, b, a)).collect();
        let stats = match addition {
            None => engine.add_low_rank(&mut bytes, to, shape, &terms)?,
            Some(Addition::Product(c, factors)) => {
                let (b, a) = product(factors)?;
                terms.push((*c * factors.scale as f32, &b, &a));
                engine.add_low_rank(&mut bytes, to, shape, &terms)?
            }
            Some(Addition::Dense(c, delta)) => {
                // As one row: a difference is a product of rank 1 with the number 1. What an adapter adds is made dense
                // too.
                let start = self.first_row * shape.cols;
                let one = engine.matrix(&[1.0], Shape { rows: 1, cols: 1 })?;
                let delta = engine.matrix(&delta[start..start + flat.cols], flat)?;
                let dense = match terms.is_empty() {
                    true => None,
                    false => {
                        let mut sum = vec![0; shape.bytes(Dtype::F32)?];
                        engine.add_low_rank(&mut sum, Dtype::F32, shape, &terms)?;
                        Some(engine.matrix(&floats(&sum), flat)?)
                    }
                };
                let mut terms: Vec<_> = dense.iter().map(|dense| (1.0, &one, dense)).collect();
                terms.push((*c, &one, &delta));
                engine.add_low_rank(&mut bytes, to, flat, &terms)?
            }
        };
        Ok((bytes, stats))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}
