//! The difference of one pair of tensors: nothing, factors, or a matrix on the engine.
//!
//! Where both checkpoints stand on the same base, a module that only adapters touch is a difference of low-rank
//! products and its dense form is never made. Otherwise stored weights are subtracted as they are, and adapted ones as
//! the f32 sum that the adapter stands for. Weights that are not finite are refused either way.

use std::path::PathBuf;

use checkpoint::{Checkpoint, Factors, Role, TensorInfo, module_of};
use kernels::{DeltaStats, Dtype, Engine, KernelError, Shape, Side};
use lowrank::Term;

use crate::pairing::{Pair, float, matrix_shape, unsupported};
use crate::{Result, StreamError};

/// Two checkpoints to be subtracted.
pub(crate) struct Sides<'a> {
    aligned: &'a Checkpoint,
    degraded: &'a Checkpoint,
    same_base: bool,
}

/// What a pair of tensors differs by.
pub(crate) enum Difference<M> {
    /// Equal in every element.
    Nothing,
    /// The sum of these products, the degraded ones with negative scale.
    Products(Vec<Factors>),
    /// A matrix of the rows that both sides have.
    Dense(M, DeltaStats),
    /// Not a number that can be subtracted, and not the same bytes.
    Opaque,
}

/// One side's weights, ready to be subtracted.
struct Stored {
    bytes: Vec<u8>,
    dtype: Dtype,
    file: PathBuf,
}

impl<'a> Sides<'a> {
    /// Looks at what the two stand on; reads their bases only if an adapter stands on a base in another folder.
    pub(crate) fn new(aligned: &'a Checkpoint, degraded: &'a Checkpoint) -> Result<Sides<'a>> {
        let adapted = aligned.adapter().is_some() || degraded.adapter().is_some();
        let same_base =
            adapted && (same_folder(aligned, degraded) || base_content(aligned)? == base_content(degraded)?);
        Ok(Sides { aligned, degraded, same_base })
    }

    /// The difference of one pair.
    pub(crate) fn difference<E: Engine>(&self, engine: &E, pair: &Pair) -> Result<Difference<E::Matrix>> {
        if float(pair.aligned.dtype).is_none() {
            // Only formats that are no weights come so far: they are equal or they are buffers.
            let same = self.aligned.read_base(&pair.name)?.1 == self.degraded.read_base(&pair.name)?.1;
            return match (same, pair.role) {
                (true, _) => Ok(Difference::Nothing),
                (false, Role::Buffer) => Ok(Difference::Opaque),
                (false, _) => Err(unsupported(&pair.aligned)),
            };
        }
        if self.same_base && !saved(self.aligned, &pair.name) && !saved(self.degraded, &pair.name) {
            let products = self.products(&pair.name)?;
            if products.is_empty() || matches!(pair.role, Role::Linear { .. }) {
                self.check_base(engine, &pair.degraded)?;
                return Ok(if products.is_empty() {
                    Difference::Nothing
                } else {
                    Difference::Products(products)
                });
            }
        }
        let (aligned, degraded) =
            rayon::join(|| stored(self.aligned, &pair.name), || stored(self.degraded, &pair.name));
        let (mut aligned, mut degraded) = (aligned?, degraded?);
        let shape = common_rows(pair, &mut aligned, &mut degraded);
        let found = subtract(engine, shape, &aligned, &degraded);
        let (delta, stats) = found.map_err(|source| located(&pair.name, &aligned, &degraded, source))?;
        if stats.nonzero == 0 && pair.same_rows() {
            return Ok(Difference::Nothing);
        }
        Ok(Difference::Dense(delta, stats))
    }

    /// Rows that only the aligned side has, in f32; empty if there are none.
    pub(crate) fn new_rows(&self, pair: &Pair) -> Result<Vec<f32>> {
        if pair.same_rows() {
            return Ok(Vec::new());
        }
        let cols = matrix_shape(&pair.aligned.shape).cols;
        let common = matrix_shape(&pair.degraded.shape).rows;
        let mut values = self.aligned.read_f32(&pair.name)?;
        Ok(values.split_off(values.len().min(common * cols)))
    }

    fn products(&self, name: &str) -> Result<Vec<Factors>> {
        let Some(module) = module_of(name) else { return Ok(Vec::new()) };
        let mut products: Vec<Factors> = self.aligned.factors(module)?.into_iter().collect();
        if let Some(mut factors) = self.degraded.factors(module)? {
            factors.scale = -factors.scale;
            products.push(factors);
        }
        Ok(products)
    }

    /// Reads a tensor that cancels, so that what is not finite in it is refused all the same.
    fn check_base<E: Engine>(&self, engine: &E, info: &TensorInfo) -> Result<()> {
        let Some(dtype) = float(info.dtype) else { return Ok(()) };
        let (info, bytes) = self.degraded.read_base(&info.name)?;
        let side = Stored { bytes, dtype, file: info.file.clone() };
        subtract(engine, matrix_shape(&info.shape), &side, &side)
            .map_err(|source| located(&info.name, &side, &side, source))?;
        Ok(())
    }
}

/// Products as the terms of a sum.
pub(crate) fn terms(products: &[Factors]) -> Vec<Term<'_>> {
    products
        .iter()
        .map(|f| Term { b: &f.b, a: &f.a, rows: f.rows, cols: f.cols, rank: f.rank, scale: f.scale })
        .collect()
}

fn subtract<E: Engine>(
    engine: &E,
    shape: Shape,
    aligned: &Stored,
    degraded: &Stored,
) -> kernels::Result<(E::Matrix, DeltaStats)> {
    let aligned = engine.raw(&aligned.bytes, aligned.dtype, shape)?;
    let degraded = engine.raw(&degraded.bytes, degraded.dtype, shape)?;
    engine.delta(&aligned, &degraded)
}

/// The weights that a checkpoint stands for: as stored, or in f32 where an adapter is added.
fn stored(side: &Checkpoint, name: &str) -> Result<Stored> {
    let adapted = module_of(name)
        .zip(side.adapter())
        .is_some_and(|(module, adapter)| adapter.modules().contains_key(module));
    if adapted {
        let bytes = bytemuck::cast_slice(&side.read_f32(name)?).to_vec();
        return Ok(Stored { bytes, dtype: Dtype::F32, file: side.dir().to_path_buf() });
    }
    let (info, bytes) = side.read_stored(name)?;
    let dtype = float(info.dtype).ok_or_else(|| unsupported(&info))?;
    Ok(Stored { bytes, dtype, file: info.file })
}

/// Cuts both sides down to the rows that both have.
fn common_rows(pair: &Pair, aligned: &mut Stored, degraded: &mut Stored) -> Shape {
    let (a, d) = (matrix_shape(&pair.aligned.shape), matrix_shape(&pair.degraded.shape));
    let shape = Shape { rows: a.rows.min(d.rows), cols: a.cols };
    for side in [aligned, degraded] {
        side.bytes.truncate(shape.rows * shape.cols * side.dtype.bytes());
    }
    shape
}

fn located(tensor: &str, aligned: &Stored, degraded: &Stored, source: KernelError) -> StreamError {
    let aligned_side = matches!(source, KernelError::NonFinite { side: Side::Aligned, .. });
    StreamError::kernel(tensor, if aligned_side { &aligned.file } else { &degraded.file }, source)
}

fn saved(side: &Checkpoint, name: &str) -> bool {
    side.adapter().is_some_and(|adapter| adapter.saved().contains_key(name))
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
