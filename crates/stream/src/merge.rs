//! Weights with something added, tensor by tensor into files like the target's own.
//!
//! The output has the target's files with their headers byte for byte, unless 8-bit weights are dequantized: those become
//! bf16, and their scales go. Whatever is added to a tensor (adapters' products, genes' factors, exact differences) is
//! summed in f32 first and rounded once. What nothing is added to keeps its bytes, shared with the target where the file
//! system can. Blocks of rows go through side by side; sums are added in the order of the blocks.
//!
//! A finished tensor is reported with the xxh3 of what was written, so that a later run can tell whether it is there.
//!
//! Not here: what is to be added (the plan's), and the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};

use checkpoint::{
    Checkpoint, Dtype as FileDtype, Factors, PlacedShard, TensorInfo, TensorSpec, Unit, module_of,
    safetensors_header,
};
use kernels::{AddStats, Dtype, Engine, Scales, Shape, Weights};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::difference::{first_non_finite, scales_of};
use crate::flow::{Limits, Stages, flow};
use crate::pairing::float;
use crate::pool::{Buffer, Pool, buffers_of};
use crate::{Progress, Result, StreamError};

/// Bytes of a block of rows.
const BLOCK_BYTES: u64 = 16 << 20;
/// One, so that the blocks of a tensor are read, and hashed, in their order.
const READERS: usize = 1;
/// Bytes that are written before they are sent to the disk: the disk works while the rest is computed.
const FLUSH_BYTES: u64 = 64 << 20;

/// What is to be added to one unit of the target.
pub(crate) enum Addition {
    /// The coefficient of a product of factors.
    Product(f32, Factors),
    /// The coefficient of a whole difference, in the order of the elements.
    Dense(f32, Vec<f32>),
}

/// Says what is to be added to a unit of the target.
pub(crate) trait Plan: Sync {
    /// Whether anything is.
    fn changes(&self, unit: &str) -> bool;

    /// In the order in which it is added.
    fn additions(&self, unit: &str) -> Result<Vec<Addition>>;
}

/// What a merge did to a tensor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Merged {
    pub(crate) tensor: String,
    /// The xxh3_128 of the target's tensor, in hexadecimal.
    pub(crate) digest: String,
    /// Place in the output's file, length and xxh3 of each block that was written.
    pub(crate) written: Vec<(u64, u64, u64)>,
    /// Elements that are others than without the plan.
    pub(crate) elements_changed: u64,
    /// Sums over all that was added, adapters included.
    pub(crate) intended_sumsq: f64,
    pub(crate) realised_sumsq: f64,
}

/// A file of the output.
pub(crate) struct OutFile<'a> {
    /// The target's.
    pub(crate) source: &'a Path,
    pub(crate) name: String,
    /// Its header, if that is not the target's, and the length of its data.
    header: Option<(Vec<u8>, u64)>,
    pub(crate) tensors: Vec<OutTensor<'a>>,
}

/// A tensor of the output.
pub(crate) struct OutTensor<'a> {
    pub(crate) info: &'a TensorInfo,
    dtype: FileDtype,
    offset: u64,
}

impl OutFile<'_> {
    /// Bytes that are read for it.
    pub(crate) fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.info.bytes).sum()
    }

    /// Bytes of its tensors.
    pub(crate) fn data_bytes(&self) -> u64 {
        match &self.header {
            None => self.bytes(),
            Some((_, data_bytes)) => *data_bytes,
        }
    }

    /// Opens it in a folder, or goes on with what is there.
    pub(crate) fn open(&self, dir: &Path) -> Result<PlacedShard> {
        let path = dir.join(&self.name);
        Ok(match &self.header {
            None => PlacedShard::like(self.source, &path)?,
            Some((header, data_bytes)) => PlacedShard::with_header(&path, header, *data_bytes)?,
        })
    }
}

/// The files of the output of a target.
pub(crate) fn out_files(target: &Checkpoint, dequantize: bool) -> Result<Vec<OutFile<'_>>> {
    let shards = target.shards();
    let scale_tensors: BTreeSet<String> = target.scale_tensors()?.into_iter().collect();
    let scaled: BTreeSet<String> =
        target.units()?.into_iter().filter(|unit| unit.scale.is_some()).map(|unit| unit.tensor).collect();
    let mut files = Vec::new();
    for source in shards.files() {
        let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let infos = shards.in_file(source);
        let in_8_bits = |info: &TensorInfo| scaled.contains(&info.name) || scale_tensors.contains(&info.name);
        if let Some(info) = infos.iter().find(|info| in_8_bits(info))
            && !dequantize
        {
            return Err(StreamError::ScaledTarget { tensor: info.name.clone(), file: source.clone() });
        }
        if !infos.iter().any(|info| in_8_bits(info)) {
            let tensor = |info| OutTensor { info, dtype: info.dtype, offset: info.offset };
            let tensors = infos.into_iter().map(tensor).collect();
            files.push(OutFile { source, name, header: None, tensors });
            continue;
        }
        let mut tensors: Vec<OutTensor<'_>> = infos
            .into_iter()
            .filter(|info| !scale_tensors.contains(&info.name))
            .map(|info| {
                let dtype = if scaled.contains(&info.name) { FileDtype::Bf16 } else { info.dtype };
                OutTensor { info, dtype, offset: 0 }
            })
            .collect();
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .map(|tensor| (tensor.info.name.clone(), tensor.dtype, tensor.info.shape.clone()))
            .collect();
        let header = safetensors_header(shards.metadata(), &specs)
            .map_err(|problem| StreamError::Layout { file: source.clone(), problem })?;
        let mut offset = header.len() as u64;
        for tensor in &mut tensors {
            tensor.offset = offset;
            offset += tensor.dtype.bytes_of(&tensor.info.shape).unwrap_or(0);
        }
        let data_bytes = offset - header.len() as u64;
        files.push(OutFile { source, name, header: Some((header, data_bytes)), tensors });
    }
    Ok(files)
}

/// Some rows of a stored tensor, or all of it.
struct Block<'a> {
    info: &'a TensorInfo,
    to: FileDtype,
    file: usize,
    /// Where it goes in that file.
    offset: u64,
    /// Bytes of the tensor.
    start: u64,
    bytes: u64,
    /// Units of which some rows lie in it; only a whole tensor may have several.
    units: Vec<&'a Unit>,
}

/// A tensor of which not all blocks are there yet.
struct Unfinished {
    left: u64,
    blocks: BTreeMap<u64, (u64, u64, u64, Sums)>,
}

/// Writes the tensors of `files` but for `done` into `dir` with the additions of `plan`, and hands each to `keep`.
pub(crate) fn merge<E: Engine>(
    engine: &E,
    target: &Checkpoint,
    files: &[&OutFile<'_>],
    done: &BTreeSet<String>,
    plan: &impl Plan,
    dir: &Path,
    limits: &Limits<'_>,
    progress: &dyn Progress,
    mut keep: impl FnMut(Merged) -> Result<()>,
) -> Result<Stages> {
    let units = target.units()?;
    let mut of_tensor: BTreeMap<&str, Vec<&Unit>> = BTreeMap::new();
    for unit in &units {
        of_tensor.entry(&unit.tensor).or_default().push(unit);
    }
    let mut placed: Vec<PlacedShard> = Vec::new();
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let mut unfinished: BTreeMap<&str, Unfinished> = BTreeMap::new();
    for (at, file) in files.iter().enumerate() {
        placed.push(file.open(dir)?);
        for tensor in file.tensors.iter().filter(|tensor| !done.contains(&tensor.info.name)) {
            let units = of_tensor.get(tensor.info.name.as_str()).cloned().unwrap_or_default();
            let before = blocks.len();
            cut(target, tensor, at, units, &mut blocks);
            let left = (blocks.len() - before) as u64;
            unfinished.insert(&tensor.info.name, Unfinished { left, blocks: BTreeMap::new() });
        }
    }
    progress.stage("merging", blocks.iter().map(|block| block.bytes).sum());
    let buffers = buffers_of(engine);
    let pool = Pool::new(&buffers);
    let merge = Merge { engine, target, plan, hashes: Mutex::default(), pool: &pool };
    let limits = Limits { readers: READERS, ..*limits };
    let (written, to_flush) = channel::<usize>();
    let (placed, merge) = (&placed, &merge);
    std::thread::scope(|threads| {
        let flusher = threads.spawn(move || -> Result<()> {
            // Whatever has come meanwhile is one flush.
            while let Ok(first) = to_flush.recv() {
                let mut files: BTreeSet<usize> = to_flush.try_iter().collect();
                files.insert(first);
                files.into_iter().try_for_each(|file| placed[file].flush())?;
            }
            Ok(())
        });
        let mut since = 0;
        let flowed = flow(
            &blocks,
            &limits,
            |block| block.bytes.saturating_mul(if block.to == block.info.dtype { 3 } else { 12 }),
            |block| merge.read(block),
            |block, bytes| merge.block(block, bytes),
            |block, (bytes, kept, sums)| {
                // By one thread: a file takes one write at a time anyway.
                let file = &placed[block.file];
                let bytes = bytes.as_ref();
                if kept {
                    file.keep_at(block.offset, bytes)?
                } else {
                    file.write_at(block.offset, bytes)?
                };
                since += bytes.len() as u64;
                if since >= FLUSH_BYTES {
                    since = 0;
                    // The flusher is gone only after an error, which comes up at the end.
                    let _ = written.send(block.file);
                }
                progress.advance(block.bytes, &block.info.name);
                let Some(tensor) = unfinished.get_mut(block.info.name.as_str()) else { return Ok(()) };
                let check = xxh3_64(bytes);
                tensor.blocks.insert(block.start, (block.offset, bytes.len() as u64, check, sums));
                tensor.left -= 1;
                if tensor.left == 0 { keep(merge.finished(&block.info.name, tensor)) } else { Ok(()) }
            },
        );
        drop(written);
        let flushed = flusher.join().unwrap_or(Ok(()));
        let stages = flowed?;
        flushed?;
        Ok(stages)
    })
}

/// Cuts a tensor into blocks of rows, unless something about it asks for all of it at once.
fn cut<'a>(
    target: &Checkpoint,
    tensor: &OutTensor<'a>,
    file: usize,
    units: Vec<&'a Unit>,
    blocks: &mut Vec<Block<'a>>,
) {
    let &OutTensor { info, dtype: to, offset } = tensor;
    let saved = target.adapter().is_some_and(|adapter| adapter.saved().contains_key(&info.name));
    let plain = match units[..] {
        [unit] => unit.slice.col_stride == 1 && unit.slice.start == 0 && unit.shape == info.shape && !saved,
        _ => false,
    };
    let row_bytes = info.shape.first().filter(|rows| **rows > 0).map_or(0, |rows| info.bytes / rows);
    if !plain || info.shape.len() < 2 || row_bytes == 0 || info.bytes <= BLOCK_BYTES {
        blocks.push(Block { info, to, file, offset, start: 0, bytes: info.bytes, units });
        return;
    }
    let step = (BLOCK_BYTES / row_bytes).max(1) * row_bytes;
    let mut start = 0;
    while start < info.bytes {
        let bytes = step.min(info.bytes - start);
        // Both formats have whole bytes.
        let offset = offset + start / (info.dtype.bits() / 8) * (to.bits() / 8);
        blocks.push(Block { info, to, file, offset, start, bytes, units: units.clone() });
        start += bytes;
    }
}

struct Merge<'a, E, P> {
    engine: &'a E,
    target: &'a Checkpoint,
    plan: &'a P,
    /// Of the base's tensors, as far as they were read.
    hashes: Mutex<BTreeMap<String, Xxh3>>,
    pool: &'a Pool<'a>,
}

impl<E: Engine, P: Plan> Merge<'_, E, P> {
    /// The bytes of a block, in the dtype of the base: an adapter's saved copy in another one is rounded when it is
    /// added to.
    fn read(&self, block: &Block<'_>) -> Result<Buffer> {
        if self.target.adapter().is_some_and(|adapter| adapter.saved().contains_key(&block.info.name)) {
            return Ok(Buffer::own(self.target.read_stored(&block.info.name)?.1));
        }
        let mut bytes = self.pool.take(block.bytes as usize);
        self.target.shards().read_at(block.info, block.start, bytes.as_mut())?;
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        match hashes.get_mut(&block.info.name) {
            Some(hash) => hash.update(bytes.as_ref()),
            None => hashes.entry(block.info.name.clone()).or_default().update(bytes.as_ref()),
        }
        Ok(bytes)
    }

    /// A tensor of which all blocks are there.
    fn finished(&self, name: &str, tensor: &Unfinished) -> Merged {
        let hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = hashes.get(name).map_or(String::new(), |hash| format!("{:032x}", hash.digest128()));
        let mut merged = Merged { tensor: name.to_owned(), digest, ..Merged::default() };
        for (offset, bytes, check, sums) in tensor.blocks.values() {
            merged.written.push((*offset, *bytes, *check));
            merged.elements_changed += sums.changed;
            merged.intended_sumsq += sums.intended;
            merged.realised_sumsq += sums.realised;
        }
        merged
    }

    /// The new bytes of a block, whether they are the old ones, and its sums.
    fn block(&self, block: &Block<'_>, bytes: Buffer) -> Result<(Buffer, bool, Sums)> {
        let info = block.info;
        let saved = self.target.adapter().and_then(|adapter| adapter.saved().get(&info.name));
        let stored = saved.unwrap_or(info);
        let adapter = match module_of(&info.name) {
            Some(module) => self.target.factors(module)?,
            None => None,
        };
        let first = (block.start * info.elements()).checked_div(info.bytes).unwrap_or(0);
        let changes = block.units.iter().any(|unit| self.plan.changes(&unit.name));
        if adapter.is_none() && !changes && stored.dtype == block.to {
            if let Some(index) = float(stored.dtype).and_then(|dtype| first_non_finite(bytes.as_ref(), dtype))
            {
                let (tensor, file) = (info.name.clone(), stored.file.clone());
                return Err(StreamError::NonFinite { tensor, file, index: first + index });
            }
            return Ok((bytes, saved.is_none(), Sums::default()));
        }
        let unsupported = |info: &TensorInfo, dtype| StreamError::UnsupportedDtype {
            tensor: info.name.clone(),
            file: info.file.clone(),
            dtype,
        };
        let from = float(stored.dtype).ok_or_else(|| unsupported(stored, stored.dtype))?;
        let to = float(block.to).ok_or_else(|| unsupported(info, block.to))?;
        // Else units are taken out of their tensor, and put where they came from.
        let whole = matches!(block.units[..], [unit] if unit.slice.start == 0 && unit.slice.col_stride == 1);
        let mut out = Buffer::own(match (whole, from == to) {
            (true, _) => Vec::new(),
            (false, true) => bytes.as_ref().to_vec(),
            (false, false) => vec![0; bytes.as_ref().len() / from.bytes() * to.bytes()],
        });
        let mut sums = Sums::default();
        let mut bytes = bytes;
        for unit in &block.units {
            let part = self.unit(
                block,
                unit,
                (from, to),
                adapter.as_ref(),
                (whole, first),
                (&mut bytes, &mut out),
                &stored.file,
            )?;
            sums.changed += part.changed;
            sums.intended += part.intended;
            sums.realised += part.realised;
        }
        Ok((out, false, sums))
    }

    /// Adds to one unit of a block.
    fn unit(
        &self,
        block: &Block<'_>,
        unit: &Unit,
        (from, to): (Dtype, Dtype),
        adapter: Option<&Factors>,
        (whole, first): (bool, u64),
        (bytes, out): (&mut Buffer, &mut Buffer),
        file: &Path,
    ) -> Result<Sums> {
        let additions = self.plan.additions(&unit.name)?;
        let at = |source| StreamError::kernel(&unit.name, file, source);
        let cols = unit.cols() as usize;
        let part = block.bytes < block.info.bytes;
        let rows = match part {
            true => block.bytes as usize / (cols * from.bytes()).max(1),
            false => unit.rows() as usize,
        };
        let shape = Shape { rows, cols };
        let first_row = if cols > 0 && part { first as usize / cols } else { 0 };
        let scales = scales_of(self.target, unit)?
            .map(|scales| Scales { origin: [scales.origin[0] + first_row, scales.origin[1]], ..scales });
        let sum = Sum { engine: self.engine, from, to, shape, first_row, adapter, scales };
        let empty = Buffer::own(Vec::new());
        let old = match whole {
            true => std::mem::replace(bytes, empty),
            false => Buffer::own(gather(bytes.as_ref(), unit, from.bytes())),
        };
        // What an adapter or another format changes anyway does not count.
        let before = match (adapter, additions.is_empty()) {
            (_, true) => None,
            (None, false) if from == to => None,
            _ => Some(sum.add(Buffer::own(old.as_ref().to_vec()), &[]).map_err(at)?.0),
        };
        let (new, stats) = sum.add(old, &additions).map_err(at)?;
        let changed = match &before {
            Some(before) => differing(new.as_ref(), before.as_ref(), to.bytes()),
            None if !additions.is_empty() => stats.changed,
            None => 0,
        };
        if whole {
            *out = new;
        } else {
            scatter(new.as_ref(), unit, to.bytes(), out.as_mut());
        }
        Ok(Sums { changed, intended: stats.intended_sumsq, realised: stats.realised_sumsq })
    }
}

/// Sums over a block.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    changed: u64,
    intended: f64,
    realised: f64,
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

/// `weights + adapter + additions` for some rows, rounded once to the format they go to.
struct Sum<'a, E> {
    engine: &'a E,
    from: Dtype,
    to: Dtype,
    shape: Shape,
    first_row: usize,
    adapter: Option<&'a Factors>,
    scales: Option<Scales>,
}

impl<E: Engine> Sum<'_, E> {
    fn add(&self, bytes: Buffer, additions: &[Addition]) -> kernels::Result<(Buffer, AddStats)> {
        let Sum { engine, from, to, shape, .. } = *self;
        if from == to {
            return self.add_in(bytes, to, additions);
        }
        // Another format: the sum in f32 as always, then that one rounding.
        let flat = Shape { rows: 1, cols: shape.len()? };
        let stored = Weights::copied(bytes.as_ref(), from, shape)?;
        let stored = if let Some(scales) = &self.scales { stored.scaled(scales.clone())? } else { stored };
        let zero = Weights::copied(&vec![0; shape.bytes(Dtype::Bf16)?], Dtype::Bf16, shape)?;
        let wide = engine.read(&engine.delta(&engine.pair(stored, zero)?)?.0)?;
        let (sum, stats) =
            self.add_in(Buffer::own(bytemuck::cast_slice(&wide).to_vec()), Dtype::F32, additions)?;
        Ok((Buffer::own(engine.pack(&engine.matrix(&floats(sum.as_ref()), flat)?, to)?), stats))
    }

    /// Adds in one format: low-rank terms in one chain; where there is a dense one, as rows of one element each after the
    /// sum of the others.
    fn add_in(
        &self,
        mut bytes: Buffer,
        dtype: Dtype,
        additions: &[Addition],
    ) -> kernels::Result<(Buffer, AddStats)> {
        let Sum { engine, shape, .. } = *self;
        let mut products: Vec<(f32, E::Matrix, E::Matrix)> = Vec::new();
        let mut dense: Vec<(f32, &[f32])> = Vec::new();
        let own = self.adapter.iter().map(|factors| (1.0, *factors));
        let given = additions.iter().filter_map(|addition| match addition {
            Addition::Product(c, factors) => Some((*c, factors)),
            Addition::Dense(..) => None,
        });
        for (c, factors) in own.chain(given) {
            let rank = factors.rank;
            let b = &factors.b[self.first_row * rank..(self.first_row + shape.rows) * rank];
            let b = engine.matrix(b, Shape { rows: shape.rows, cols: rank })?;
            let a = engine.matrix(&factors.a, Shape { rows: rank, cols: factors.cols })?;
            products.push((c * factors.scale as f32, b, a));
        }
        for addition in additions {
            if let Addition::Dense(c, delta) = addition {
                let start = self.first_row * shape.cols;
                dense.push((*c, &delta[start..start + shape.len()?]));
            }
        }
        let terms: Vec<_> = products.iter().map(|(c, b, a)| (*c, b, a)).collect();
        if dense.is_empty() {
            let stats = engine.add_low_rank(bytes.as_mut(), dtype, shape, &terms)?;
            return Ok((bytes, stats));
        }
        // A difference is a product of rank 1 with the number 1, as one row.
        let flat = Shape { rows: 1, cols: shape.len()? };
        let one = engine.matrix(&[1.0], Shape { rows: 1, cols: 1 })?;
        let mut whole: Vec<(f32, E::Matrix)> = Vec::new();
        if !terms.is_empty() {
            let mut sum = vec![0; shape.bytes(Dtype::F32)?];
            engine.add_low_rank(&mut sum, Dtype::F32, shape, &terms)?;
            whole.push((1.0, engine.matrix(&floats(&sum), flat)?));
        }
        for (c, delta) in dense {
            whole.push((c, engine.matrix(delta, flat)?));
        }
        let terms: Vec<_> = whole.iter().map(|(c, delta)| (*c, &one, delta)).collect();
        let stats = engine.add_low_rank(bytes.as_mut(), dtype, flat, &terms)?;
        Ok((bytes, stats))
    }
}

/// Whether a file holds what was written of a tensor.
pub(crate) fn is_there(file: &PlacedShard, merged: &Merged) -> bool {
    merged.written.iter().all(|&(offset, bytes, check)| {
        let mut found = vec![0u8; bytes as usize];
        file.read_at(offset, &mut found).is_ok() && xxh3_64(&found) == check
    })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}
