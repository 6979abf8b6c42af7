//! The difference of one pair of tensors: nothing, factors, or two sides ready to be subtracted.
//!
//! Where both checkpoints stand on the same base, a module that only adapters touch is a difference of low-rank
//! products and its dense form is never made. Otherwise stored weights are subtracted as they are, and adapted ones as
//! the f32 sum that the adapter stands for. Weights that are not finite are refused either way.
//!
//! What is read whole is hashed while it is in memory.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{Checkpoint, CheckpointError, Factors, Role, Unit, module_of};
use kernels::{Dtype, Engine, KernelError, RowReader, Scales, Shape, Side, Unreadable, Weights};
use lowrank::Term;
use xxhash_rust::xxh3::Xxh3;

use crate::pairing::{Pair, bytes, file_of, float, unit_shape, unsupported};
use crate::pool::{Buffer, Pool};
use crate::{Result, StreamError};

/// Bytes that are read and hashed together.
const HASHED_BYTES: u64 = 256 << 10;

/// Two checkpoints to be subtracted.
pub(crate) struct Sides<'a> {
    pub(crate) aligned: &'a Checkpoint,
    pub(crate) degraded: &'a Checkpoint,
    same_base: bool,
    pool: &'a Pool<'a>,
}

/// One side's weights, ready to be subtracted.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) weights: Weights,
    /// The bytes, if they are in memory.
    held: Option<Arc<Buffer>>,
    dtype: Dtype,
    scales: Option<Scales>,
    file: PathBuf,
    /// The xxh3_128 of the whole stored tensor, where it was read.
    pub(crate) digest: Option<u128>,
    /// Why a reader could not go on.
    reader: Option<Arc<UnitReader>>,
}

/// What a pair of tensors differs by.
pub(crate) enum Difference {
    /// The sum of these products, the degraded ones with negative scale; nothing if there are none.
    Products(Vec<Factors>, Box<Stored>),
    /// Two sides of the same shape.
    Dense(Box<[Stored; 2]>),
}

/// Reads rows of a unit each time it is asked.
struct UnitReader {
    side: SideRef,
    unit: Unit,
    error: Mutex<Option<CheckpointError>>,
}

/// A checkpoint that outlives the work: the streams keep it for as long as their engines run.
type SideRef = Arc<Checkpoint>;

impl RowReader for UnitReader {
    fn read(&self, first_row: usize, out: &mut [u8]) -> std::result::Result<(), Unreadable> {
        let row_bytes = (self.unit.cols() * self.unit.dtype.bits() / 8).max(1);
        let rows = first_row as u64..first_row as u64 + out.len() as u64 / row_bytes;
        self.side.read_unit(&self.unit, rows, out).map_err(|error| {
            *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            Unreadable
        })
    }
}

impl<'a> Sides<'a> {
    /// Looks at what the two stand on; reads their bases only if an adapter stands on a base in another folder.
    pub(crate) fn new(
        aligned: &'a Checkpoint,
        degraded: &'a Checkpoint,
        pool: &'a Pool<'a>,
    ) -> Result<Sides<'a>> {
        let adapted = aligned.adapter().is_some() || degraded.adapter().is_some();
        let same_base =
            adapted && (same_folder(aligned, degraded) || base_content(aligned)? == base_content(degraded)?);
        Ok(Sides { aligned, degraded, same_base, pool })
    }

    /// Reads one pair.
    pub(crate) fn read(&self, pair: &Pair) -> Result<Difference> {
        if self.cancels(pair) {
            let products = self.products(pair)?;
            if products.is_empty() || matches!(pair.role, Role::Linear { .. }) {
                // The base cancels, but what is not finite in it is refused all the same.
                let base = stored(self.degraded, &pair.degraded, false, self.pool)?;
                return Ok(Difference::Products(products, Box::new(base)));
            }
        }
        let aligned = stored(self.aligned, &pair.aligned, true, self.pool)?;
        Ok(Difference::Dense(Box::new([aligned, stored(self.degraded, &pair.degraded, true, self.pool)?])))
    }

    /// The same with rows that are read when they are needed, for what does not fit in memory. `None` for what an
    /// adapter changes, which is made as a whole.
    pub(crate) fn streamed(&self, pair: &Pair, arcs: &[SideRef; 2]) -> Result<Option<Difference>> {
        if self.cancels(pair)
            || adapted(self.aligned, &pair.aligned)
            || adapted(self.degraded, &pair.degraded)
        {
            return Ok(None);
        }
        let aligned = read_in_place(&arcs[0], &pair.aligned)?;
        Ok(Some(Difference::Dense(Box::new([aligned, read_in_place(&arcs[1], &pair.degraded)?]))))
    }

    fn cancels(&self, pair: &Pair) -> bool {
        self.same_base && !saved(self.aligned, &pair.aligned) && !saved(self.degraded, &pair.degraded)
    }

    fn products(&self, pair: &Pair) -> Result<Vec<Factors>> {
        let mut products: Vec<Factors> = Vec::new();
        if let Some(module) = module_of(&pair.aligned.tensor) {
            products.extend(self.aligned.factors(module)?);
        }
        let Some(module) = module_of(&pair.degraded.tensor) else { return Ok(products) };
        if let Some(mut factors) = self.degraded.factors(module)? {
            factors.scale = -factors.scale;
            products.push(factors);
        }
        Ok(products)
    }
}

impl Stored {
    /// Whether two sides in memory are the same bytes of the same meaning.
    pub(crate) fn same_as(&self, other: &Stored) -> bool {
        self.dtype == other.dtype
            && self.scales == other.scales
            && self
                .held
                .as_ref()
                .zip(other.held.as_ref())
                .is_some_and(|(a, b)| (**a).as_ref() == (**b).as_ref())
    }

    /// Values in f32.
    pub(crate) fn of_f32(values: &[f32], shape: Shape, dir: &Path) -> Result<Stored> {
        let held = Arc::new(Buffer::own(bytemuck::cast_slice(values).to_vec()));
        let weights = Weights::held(held.clone(), Dtype::F32, shape);
        let weights = weights.map_err(|source| StreamError::kernel("", dir, source))?;
        let (dtype, file) = (Dtype::F32, dir.to_path_buf());
        Ok(Stored { weights, held: Some(held), dtype, scales: None, file, digest: None, reader: None })
    }

    /// The first rows of what is in memory.
    pub(crate) fn first_rows(&self, rows: usize, cols: usize) -> Result<Stored> {
        if self.weights.shape().rows == rows {
            return Ok(self.clone());
        }
        let bytes =
            self.held.as_ref().map_or(&[][..], |held| &(**held).as_ref()[..rows * cols * self.dtype.bytes()]);
        let held = Arc::new(Buffer::own(bytes.to_vec()));
        let weights =
            with_scales(Weights::held(held.clone(), self.dtype, Shape { rows, cols }), &self.scales)
                .map_err(|source| StreamError::kernel("", &self.file, source))?;
        Ok(Stored { weights, held: Some(held), ..self.clone() })
    }

    /// The values of the rows from `rows` on, in f32, every one finite.
    pub(crate) fn values_from(&self, rows: usize, cols: usize, name: &str) -> Result<Vec<f32>> {
        let at = rows * cols;
        let bytes = self.held.as_ref().map_or(&[][..], |held| &(**held).as_ref()[at * self.dtype.bytes()..]);
        let values: Vec<f32> = (0..bytes.len() / self.dtype.bytes())
            .map(|i| kernels::reference::widen(bytes, self.dtype, i) as f32)
            .collect();
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(index) => Err(StreamError::NonFinite {
                tensor: name.to_owned(),
                file: self.file.clone(),
                index: (at + index) as u64,
            }),
        }
    }

    /// Refuses what is not finite.
    pub(crate) fn check_finite(&self, name: &str) -> Result<()> {
        self.check_finite_from(name, 0)
    }

    /// The same for a block that begins with this element.
    pub(crate) fn check_finite_from(&self, name: &str, first: u64) -> Result<()> {
        match self.held.as_ref().and_then(|held| first_non_finite((**held).as_ref(), self.dtype)) {
            None => Ok(()),
            Some(index) => Err(StreamError::NonFinite {
                tensor: name.to_owned(),
                file: self.file.clone(),
                index: first + index,
            }),
        }
    }
}

/// Products as the terms of a sum.
pub(crate) fn terms(products: &[Factors]) -> Vec<Term<'_>> {
    products
        .iter()
        .map(|f| Term { b: &f.b, a: &f.a, rows: f.rows, cols: f.cols, rank: f.rank, scale: f.scale })
        .collect()
}

/// Both sides on an engine.
pub(crate) fn pair_on<E: Engine>(engine: &E, name: &str, sides: &[Stored; 2]) -> Result<E::Pair> {
    let [aligned, degraded] = sides;
    engine
        .pair(aligned.weights.clone(), degraded.weights.clone())
        .map_err(|source| located(name, sides, source))
}

/// An engine's error about a pair, with its file, or the reason why a reader failed.
pub(crate) fn located(name: &str, sides: &[Stored; 2], source: KernelError) -> StreamError {
    let side = match source {
        KernelError::NonFinite { side: Side::Aligned, .. }
        | KernelError::Unread { side: Side::Aligned, .. } => &sides[0],
        _ => &sides[1],
    };
    if let (KernelError::Unread { .. }, Some(reader)) = (&source, &side.reader)
        && let Some(error) = reader.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    {
        return error.into();
    }
    StreamError::kernel(name, &side.file, source)
}

/// The weights that a checkpoint stands for: as stored, or in f32 where an adapter is added and asked for.
fn stored(side: &Checkpoint, unit: &Unit, with_adapter: bool, pool: &Pool<'_>) -> Result<Stored> {
    let shape = unit_shape(unit);
    if with_adapter && adapted(side, unit) {
        return Stored::of_f32(&side.read_f32(&unit.tensor)?, shape, side.dir());
    }
    let mut buffer = pool.take(bytes(unit) as usize);
    let digest = read_hashed(side, unit, buffer.as_mut())?;
    let held = Arc::new(buffer);
    let (dtype, scales, file) = meaning(side, unit)?;
    let weights = Weights::held(held.clone(), dtype, shape);
    let weights =
        with_scales(weights, &scales).map_err(|source| StreamError::kernel(&unit.name, &file, source))?;
    Ok(Stored { weights, held: Some(held), dtype, scales, file, digest, reader: None })
}

/// Fills `into` with all rows of a unit; the digest if that is a whole stored tensor. Some rows at a time, so that they are
/// still in the second cache when they are hashed.
fn read_hashed(side: &Checkpoint, unit: &Unit, into: &mut [u8]) -> Result<Option<u128>> {
    let row_bytes = unit.cols() * unit.dtype.bits() / 8;
    if !whole(side, unit) || row_bytes == 0 {
        side.read_unit(unit, 0..unit.rows(), into)?;
        return Ok(whole(side, unit).then(|| Xxh3::new().digest128()));
    }
    let step = (HASHED_BYTES / row_bytes).max(1);
    let mut hash = Xxh3::new();
    for (at, part) in into.chunks_mut((step * row_bytes) as usize).enumerate() {
        let first = at as u64 * step;
        side.read_unit(unit, first..(first + step).min(unit.rows()), part)?;
        hash.update(part);
    }
    Ok(Some(hash.digest128()))
}

fn read_in_place(side: &SideRef, unit: &Unit) -> Result<Stored> {
    let (dtype, scales, file) = meaning(side, unit)?;
    let reader = Arc::new(UnitReader { side: side.clone(), unit: unit.clone(), error: Mutex::new(None) });
    let weights = Weights::read(reader.clone(), dtype, unit_shape(unit));
    let weights =
        with_scales(weights, &scales).map_err(|source| StreamError::kernel(&unit.name, &file, source))?;
    Ok(Stored { weights, held: None, dtype, scales, file, digest: None, reader: Some(reader) })
}

fn with_scales(weights: kernels::Result<Weights>, scales: &Option<Scales>) -> kernels::Result<Weights> {
    match scales {
        None => weights,
        Some(scales) => weights?.scaled(scales.clone()),
    }
}

fn meaning(side: &Checkpoint, unit: &Unit) -> Result<(Dtype, Option<Scales>, PathBuf)> {
    let dtype = float(unit.dtype).ok_or_else(|| unsupported(side, unit))?;
    Ok((dtype, scales_of(side, unit)?, file_of(side, unit)))
}

/// The scales of a unit.
pub(crate) fn scales_of(side: &Checkpoint, unit: &Unit) -> Result<Option<Scales>> {
    let Some(scale) = &unit.scale else { return Ok(None) };
    Ok(Some(Scales {
        grid: side.read_scales(unit)?,
        grid_cols: scale.grid[1] as usize,
        block: scale.block.map(|side| side as usize),
        origin: [scale.row as usize, scale.col as usize],
    }))
}

/// Whether a unit is a whole stored tensor of the base.
fn whole(side: &Checkpoint, unit: &Unit) -> bool {
    let stored = side.shards().get(&unit.tensor);
    unit.slice.start == 0
        && unit.slice.col_stride == 1
        && stored.is_some_and(|info| info.bytes == bytes(unit))
        && !saved(side, unit)
}

/// Rows of a tensor, read one block after the other and hashed on the way.
pub(crate) struct Blocks<'a> {
    side: &'a Checkpoint,
    unit: &'a Unit,
    row_bytes: u64,
    hash: Option<Xxh3>,
    pool: &'a Pool<'a>,
}

impl<'a> Blocks<'a> {
    pub(crate) fn new(sides: &Sides<'a>, side: &'a Checkpoint, unit: &'a Unit) -> Blocks<'a> {
        let hash = whole(side, unit).then(Xxh3::new);
        let row_bytes = unit.cols() * unit.dtype.bits() / 8;
        Blocks { side, unit, row_bytes, hash, pool: sides.pool }
    }

    /// The next `count` rows, which begin at `first`.
    pub(crate) fn next(&mut self, first: u64, count: u64) -> Result<Buffer> {
        let mut buffer = self.pool.take((count * self.row_bytes) as usize);
        self.side.read_unit(self.unit, first..first + count, buffer.as_mut())?;
        if let Some(hash) = &mut self.hash {
            hash.update(buffer.as_ref());
        }
        Ok(buffer)
    }

    /// The digest of the whole tensor, if all of it was read.
    pub(crate) fn digest(self) -> Option<u128> {
        self.hash.map(|hash| hash.digest128())
    }
}

/// A block of one side on its own.
pub(crate) fn block(side: &Checkpoint, unit: &Unit, bytes: Buffer, shape: Shape) -> Result<Stored> {
    let (dtype, scales, file) = meaning(side, unit)?;
    let held = Arc::new(bytes);
    let weights = Weights::held(held.clone(), dtype, shape);
    let weights = weights.map_err(|source| StreamError::kernel(&unit.name, &file, source))?;
    Ok(Stored { weights, held: Some(held), dtype, scales, file, digest: None, reader: None })
}

/// Whether an adapter adds to a unit.
pub(crate) fn adapted(side: &Checkpoint, unit: &Unit) -> bool {
    module_of(&unit.tensor)
        .zip(side.adapter())
        .is_some_and(|(module, adapter)| adapter.modules().contains_key(module))
}

fn saved(side: &Checkpoint, unit: &Unit) -> bool {
    side.adapter().is_some_and(|adapter| adapter.saved().contains_key(&unit.tensor))
}

/// The flat index of the first NaN or Inf, by its exponent bits.
pub(crate) fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<u64> {
    fn find<const N: usize>(bytes: &[u8], bad: impl Fn(&[u8; N]) -> bool) -> Option<u64> {
        // Blocks are looked at without branches; only one that holds something bad is searched.
        let (elements, _) = bytes.as_chunks::<N>();
        let block =
            elements.chunks(1024).position(|block| block.iter().fold(false, |any, x| any | bad(x)))?;
        let rest = elements[block * 1024..].iter().position(&bad)?;
        Some((block * 1024 + rest) as u64)
    }
    match dtype {
        Dtype::F64 => find::<8>(bytes, |x| u64::from_le_bytes(*x) & 0x7ff0 << 48 == 0x7ff0 << 48),
        Dtype::F32 => find::<4>(bytes, |x| u32::from_le_bytes(*x) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::Bf16 => find::<2>(bytes, |x| u16::from_le_bytes(*x) & 0x7f80 == 0x7f80),
        Dtype::F16 => find::<2>(bytes, |x| u16::from_le_bytes(*x) & 0x7c00 == 0x7c00),
        Dtype::F8E4M3 => find::<1>(bytes, |x| x[0] & 0x7f == 0x7f),
        Dtype::F8E5M2 => find::<1>(bytes, |x| x[0] & 0x7c == 0x7c),
    }
}

fn same_folder(a: &Checkpoint, b: &Checkpoint) -> bool {
    match (a.base_dir().canonicalize(), b.base_dir().canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

fn base_content(side: &Checkpoint) -> Result<String> {
    match side.adapter() {
        None => Ok(side.content()?),
        Some(_) => Ok(Checkpoint::open(side.base_dir(), None)?.content()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_non_finite_in_every_format() {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for at in [2, 1500] {
                    let mut values = vec![-65504.0; at];
                    values.extend([bad, 1.0, bad]);
                    let bytes: Vec<u8> =
                        values.iter().flat_map(|&x| kernels::reference::round(x, dtype)).collect();
                    assert_eq!(first_non_finite(&bytes, dtype), Some(at as u64), "{dtype:?} {bad}");
                    assert_eq!(first_non_finite(&bytes[..at * dtype.bytes()], dtype), None);
                }
            }
        }
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2] {
            for bits in 0..=u8::MAX {
                let bad = !kernels::reference::widen(&[bits], dtype, 0).is_finite();
                assert_eq!(first_non_finite(&[0, bits], dtype), bad.then_some(1), "{dtype:?} {bits:#04x}");
            }
        }
    }
}
