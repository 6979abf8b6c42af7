//! A model folder like the target's, in which some values are others.
//!
//! Files, headers and the index are the target's, byte for byte. A recipe says which units it changes and makes the new
//! values from the old ones, in f32, block of rows by block of rows; they are rounded once to the stored format. An
//! element whose value stays keeps its bytes, and so does every tensor that the recipe does not touch. Units whose rows do
//! not lie in one piece (experts stored [in, out]) are changed as whole tensors.
//!
//! A target that is an adapter is written as its base with the adapter added: that, rounded, is what changes count from.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{
    CheckpointError, Dtype, Factors, FolderWriter, INDEX_FILE, PlacedShard, TensorInfo, Unit, module_of,
    open_inside, pack_f32, widen_f32,
};
use rayon::prelude::*;

use crate::error::{RecoverError, Result};
use crate::method::{Job, Outcome};
use crate::report::{ModuleReport, Tensors};
use crate::side::{Side, UnitRows, is_plain};

/// Stored bytes of a block of rows. A thread holds some tens of times as much, whatever the model's size.
const BLOCK_BYTES: u64 = 1 << 20;

/// Makes new values of some rows from the old ones.
pub(crate) type Change<'a> = Box<dyn Fn(Range<u64>, &[f32]) -> Result<Vec<f32>> + Send + Sync + 'a>;

/// What a method makes of the units of the target.
pub(crate) trait Recipe: Sync {
    /// How a unit changes; `None` if it is not touched.
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>>;

    /// Whether making a change takes memory and time of its own, so that units come one after the other.
    fn is_heavy(&self) -> bool {
        false
    }
}

/// The base of a target adapter with other products in some units.
pub(crate) struct Exchange<'a> {
    pub(crate) target: &'a Side,
    /// By the names of units.
    pub(crate) terms: BTreeMap<String, Vec<Factors>>,
}

impl Recipe for Exchange<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        let Some(terms) = self.terms.get(&unit.name) else { return Ok(None) };
        let rows = self.target.stored_rows_of(&unit.name)?.with(terms.clone());
        Ok(Some(Box::new(move |range, _| rows.values(range))))
    }
}

/// What became of a unit that was touched.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Changed {
    /// Elements that differ.
    pub(crate) elements: u64,
    /// The squared norm of what changed, after rounding.
    pub(crate) sumsq: f64,
}

impl Changed {
    fn add(&mut self, other: Changed) {
        self.elements += other.elements;
        self.sumsq += other.sumsq;
    }
}

/// What became of the target.
#[derive(Debug, Default)]
pub(crate) struct Rewritten {
    pub(crate) tensors: Tensors,
    /// The units that were touched.
    pub(crate) units: BTreeMap<String, Changed>,
    /// Python files in the output.
    pub(crate) code: Vec<String>,
}

impl Rewritten {
    /// What a method says of it; `modules` are by the names of their units, and take the changes from here.
    pub(crate) fn outcome(self, modules: BTreeMap<String, ModuleReport>) -> Outcome {
        let filled = modules.into_iter().map(|(unit, module)| {
            let changed = self.units.get(&unit).copied().unwrap_or_default();
            ModuleReport {
                changed: changed.elements > 0,
                elements_changed: changed.elements,
                change_norm: changed.sumsq.sqrt(),
                ..module
            }
        });
        Outcome { modules: filled.collect(), tensors: self.tensors, code: self.code, ..Outcome::default() }
    }
}

/// Writes the target into a folder with the changes of a recipe.
pub(crate) fn rewrite(
    target: &Side,
    recipe: &dyn Recipe,
    writer: &FolderWriter,
    job: &Job<'_>,
) -> Result<Rewritten> {
    let checkpoint = target.checkpoint();
    let shards = checkpoint.shards();
    let mut units: BTreeMap<&str, Vec<&Unit>> = BTreeMap::new();
    for unit in target.units().values() {
        units.entry(&unit.tensor).or_default().push(unit);
    }
    let total = shards.tensors().iter().map(|info| info.bytes).sum();
    job.progress.stage("writing", total);
    let work = writer.work()?;
    let told = Mutex::new(());
    let mut out = Rewritten::default();
    for source in shards.files() {
        let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let file = PlacedShard::like(source, &work.join(&name))?;
        let tensors = shards.in_file(source);
        let broken = AtomicBool::new(false);
        let one = |info: &&TensorInfo| {
            if broken.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let units = units.get(info.name.as_str()).map_or(&[][..], |units| &units[..]);
            let done = Tensor { target, info, units, file: &file, job }.write(recipe);
            if done.is_err() {
                broken.store(true, Ordering::Relaxed);
            }
            let _one_at_a_time = told.lock();
            job.progress.advance(info.bytes, &info.name);
            done.map(Some)
        };
        let done: Vec<Result<Option<Done>>> = match recipe.is_heavy() {
            true => tensors.iter().map(one).collect(),
            false => tensors.par_iter().map(one).collect(),
        };
        for done in done {
            let Some(done) = done? else { continue };
            match (done.touched, done.units.iter().any(|(_, changed)| changed.elements > 0)) {
                (false, _) => out.tensors.kept += 1,
                (true, true) => out.tensors.changed += 1,
                (true, false) => out.tensors.same += 1,
            }
            out.units.extend(done.units);
        }
        drop(file);
        writer.take(&name)?;
    }
    copy_index(shards.dir(), writer)?;
    let mut copied = Vec::new();
    if checkpoint.adapter().is_some() {
        // An adapter's own tokenizer and template go before its base's.
        copied = writer.copy_support_files(checkpoint.dir())?;
    }
    copied.extend(writer.copy_support_files(checkpoint.base_dir())?);
    out.code = copied.into_iter().filter(|name| name.ends_with(".py")).collect();
    Ok(out)
}

/// The index, if there is one: the files hold the same tensors, so it stays true.
fn copy_index(from: &Path, writer: &FolderWriter) -> Result<()> {
    let Some(mut file) = open_inside(from, Path::new(INDEX_FILE))? else { return Ok(()) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|source| CheckpointError::Io {
        action: "read",
        path: from.join(INDEX_FILE),
        source,
    })?;
    Ok(writer.file(INDEX_FILE, &bytes)?)
}

/// What became of a tensor.
struct Done {
    touched: bool,
    units: Vec<(String, Changed)>,
}

/// A tensor of the target, and the file that it goes to.
struct Tensor<'a> {
    target: &'a Side,
    info: &'a TensorInfo,
    units: &'a [&'a Unit],
    file: &'a PlacedShard,
    job: &'a Job<'a>,
}

impl Tensor<'_> {
    fn write(&self, recipe: &dyn Recipe) -> Result<Done> {
        let checkpoint = self.target.checkpoint();
        let mut changes = Vec::with_capacity(self.units.len());
        for unit in self.units {
            changes.push((*unit, recipe.change(unit)?));
        }
        let touched = changes.iter().any(|(_, change)| change.is_some());
        let adapter = checkpoint.adapter();
        let saved = adapter.is_some_and(|adapter| adapter.saved().contains_key(&self.info.name));
        let adapted = module_of(&self.info.name)
            .is_some_and(|module| adapter.is_some_and(|adapter| adapter.modules().contains_key(module)));
        if !touched && !saved && !adapted {
            self.keep()?;
            return Ok(Done { touched, units: Vec::new() });
        }
        let dtype = self.info.dtype;
        if !is_plain(dtype) {
            let (tensor, file) = (self.info.name.clone(), self.info.file.clone());
            return Err(RecoverError::UnsupportedDtype { tensor, file, dtype, what: "written" });
        }
        let mut done = Done { touched, units: Vec::new() };
        let in_one_piece = changes
            .iter()
            .all(|(unit, _)| unit.slice.col_stride == 1 && unit.slice.row_stride == unit.cols());
        let size = dtype.bits() / 8;
        let mut whole = if in_one_piece { Vec::new() } else { checkpoint.read_base(&self.info.name)?.1 };
        for (unit, change) in &changes {
            let rows = self.target.rows_of(&unit.name)?;
            let changed = if in_one_piece {
                self.by_blocks(&rows, change.as_ref())?
            } else {
                let (bytes, changed) = self.block(&rows, change.as_ref(), rows.all())?;
                let slice = unit.slice;
                for (i, x) in bytes.chunks_exact(size as usize).enumerate() {
                    let (row, col) = (i as u64 / unit.cols(), i as u64 % unit.cols());
                    let at = (slice.start + row * slice.row_stride + col * slice.col_stride) * size;
                    whole[at as usize..(at + size) as usize].copy_from_slice(x);
                }
                changed
            };
            if change.is_some() {
                done.units.push((unit.name.clone(), changed));
            }
        }
        if !in_one_piece {
            self.file.write_at(self.info.offset, &whole)?;
        }
        Ok(done)
    }

    /// Copies the bytes, looking for what is not finite.
    fn keep(&self) -> Result<()> {
        let size = (self.info.dtype.bits() / 8).max(1);
        let blocks: Vec<u64> = (0..self.info.bytes).step_by(BLOCK_BYTES as usize).collect();
        blocks.par_iter().try_for_each(|&start| {
            self.job.check_stop()?;
            let mut bytes = vec![0u8; BLOCK_BYTES.min(self.info.bytes - start) as usize];
            self.target.checkpoint().shards().read_at(self.info, start, &mut bytes)?;
            let values = widen_f32(&bytes, self.info.dtype).unwrap_or_default();
            if let Some(index) = values.iter().position(|x| !x.is_finite()) {
                let (tensor, file) = (self.info.name.clone(), self.info.file.clone());
                return Err(RecoverError::NonFinite { tensor, file, index: start / size + index as u64 });
            }
            Ok(self.file.keep_at(self.info.offset + start, &bytes)?)
        })
    }

    fn by_blocks(&self, rows: &UnitRows<'_>, change: Option<&Change<'_>>) -> Result<Changed> {
        let unit = rows.unit;
        let size = self.info.dtype.bits() / 8;
        let row_bytes = unit.cols() * size;
        let step = (BLOCK_BYTES / row_bytes.max(1)).max(1);
        let starts: Vec<u64> = (0..unit.rows()).step_by(step as usize).collect();
        let parts: Vec<Result<Changed>> = starts
            .par_iter()
            .map(|&start| {
                let (bytes, changed) = self.block(rows, change, start..(start + step).min(unit.rows()))?;
                let offset = self.info.offset + (unit.slice.start * size) + start * row_bytes;
                self.file.write_at(offset, &bytes)?;
                Ok(changed)
            })
            .collect();
        // In their order, so that sums do not depend on threads.
        let mut sum = Changed::default();
        for part in parts {
            sum.add(part?);
        }
        Ok(sum)
    }

    /// The new bytes of some rows.
    fn block(
        &self,
        rows: &UnitRows<'_>,
        change: Option<&Change<'_>>,
        range: Range<u64>,
    ) -> Result<(Vec<u8>, Changed)> {
        self.job.check_stop()?;
        let dtype = self.info.dtype;
        let first = range.start * rows.unit.cols();
        let (stored, old) = rows.read(range.clone())?;
        let own = rows.is_plain() && rows.unit.dtype == dtype;
        let old_bytes = if own { stored } else { packed(&rows.unit.name, &old, dtype, first)? };
        let Some(change) = change else { return Ok((old_bytes, Changed::default())) };
        let new = change(range, &old)?;
        let mut bytes = packed(&rows.unit.name, &new, dtype, first)?;
        let size = (dtype.bits() / 8) as usize;
        let mut changed = Changed::default();
        for (i, (to, from)) in bytes.chunks_exact_mut(size).zip(old_bytes.chunks_exact(size)).enumerate() {
            if new[i] == old[i] {
                // Also where one zero has a sign, or the format is finer than f32.
                to.copy_from_slice(from);
            } else if to != from {
                changed.elements += 1;
            }
        }
        if changed.elements > 0 {
            let (was, is) = (widen_f32(&old_bytes, dtype), widen_f32(&bytes, dtype));
            let both = was.iter().flatten().zip(is.iter().flatten());
            changed.sumsq = both.map(|(&was, &is)| (f64::from(is) - f64::from(was)).powi(2)).sum();
        }
        Ok((bytes, changed))
    }
}

/// Values rounded to a stored format, which has to hold them.
fn packed(tensor: &str, values: &[f32], dtype: Dtype, first: u64) -> Result<Vec<u8>> {
    let bytes = pack_f32(values, dtype).unwrap_or_default();
    let overflow = |index: usize| RecoverError::Overflow {
        tensor: tensor.to_owned(),
        index: first + index as u64,
        dtype,
    };
    let stored = widen_f32(&bytes, dtype).unwrap_or_default();
    match stored.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(overflow(index)),
        None => Ok(bytes),
    }
}
