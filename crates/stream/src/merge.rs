//! A model folder's weights written again with something added, file by file as they were laid out.
//!
//! Dtypes, file names and the order inside each file stay the target's. Whatever is added to a tensor (an adapter's
//! product, the gene's factors, an exact difference) is summed in f32 first and rounded once. What nothing is added to
//! keeps its bytes.
//!
//! Not here: what is to be added; that is the plan's.

use std::collections::BTreeMap;

use checkpoint::{Checkpoint, Factors, FolderWriter, INDEX_FILE, TensorInfo, TensorSpec, module_of};
use kernels::{AddStats, Dtype, Engine, Shape};

use crate::pairing::{float, matrix_shape, unsupported};
use crate::{Progress, Result, StreamError};

/// What is to be added to one tensor.
pub(crate) enum Addition {
    /// The coefficient of a product of factors.
    Product(f32, Factors),
    /// The coefficient of a whole difference, in the order of the elements.
    Dense(f32, Vec<f32>),
}

/// Says what is to be added to a tensor of the target, if anything.
pub(crate) trait Plan {
    fn addition(&self, tensor: &str) -> Result<Option<Addition>>;
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

/// Writes the weights of `target` with the additions of `plan`, and the index if there is one.
pub(crate) fn merge<E: Engine>(
    engine: &E,
    target: &Checkpoint,
    plan: &impl Plan,
    writer: &FolderWriter,
    progress: &dyn Progress,
) -> Result<Merged> {
    let shards = target.shards();
    progress.stage("merging", target.tensors().iter().map(|info| info.bytes).sum());
    let mut total = Merged::default();
    for file in shards.files() {
        let mut tensors = shards.in_file(file);
        tensors.sort_by_key(|info| (info.offset, info.bytes));
        let specs: Vec<TensorSpec> =
            tensors.iter().map(|info| (info.name.clone(), info.dtype, info.shape.clone())).collect();
        let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let mut shard = writer.shard(&name, shards.metadata(), &specs)?;
        for info in tensors {
            let (bytes, done) = tensor(engine, target, plan, info)?;
            shard.write(&info.name, &bytes)?;
            total.tensors_changed += done.tensors_changed;
            total.elements_changed += done.elements_changed;
            total.intended_sumsq += done.intended_sumsq;
            total.realised_sumsq += done.realised_sumsq;
            progress.advance(info.bytes, &info.name);
        }
        shard.finish()?;
    }
    // The same files with the same tensors: the index stays true.
    if let Some(index) =
        checkpoint::read_json::<BTreeMap<String, serde_json::Value>>(shards.dir(), INDEX_FILE)?
    {
        let mut text = serde_json::to_vec_pretty(&index).unwrap_or_default();
        text.push(b'\n');
        writer.file(INDEX_FILE, &text)?;
    }
    Ok(total)
}

/// The bytes of one tensor with everything added, in its own dtype.
fn tensor<E: Engine>(
    engine: &E,
    target: &Checkpoint,
    plan: &impl Plan,
    info: &TensorInfo,
) -> Result<(Vec<u8>, Merged)> {
    let (stored, bytes) = target.read_stored(&info.name)?;
    let adapter = match module_of(&info.name) {
        Some(module) => target.factors(module)?,
        None => None,
    };
    let addition = plan.addition(&info.name)?;
    if adapter.is_none() && addition.is_none() && stored.dtype == info.dtype {
        if let Some(index) = float(stored.dtype).and_then(|dtype| first_non_finite(&bytes, dtype)) {
            return Err(StreamError::NonFinite { tensor: info.name.clone(), file: stored.file, index });
        }
        return Ok((bytes, Merged::default()));
    }
    let at = |source| StreamError::kernel(&info.name, &stored.file, source);
    let (Some(from), Some(to)) = (float(stored.dtype), float(info.dtype)) else {
        return Err(unsupported(if float(info.dtype).is_none() { info } else { &stored }));
    };
    let weights = Weights { bytes: &bytes, from, to, shape: matrix_shape(&info.shape) };
    let (out, stats) = add(engine, &weights, adapter.as_ref(), addition.as_ref()).map_err(at)?;
    let elements_changed = match (&adapter, &addition) {
        (_, None) => 0,
        (None, Some(_)) if from == to => stats.changed,
        _ => differing(&out, &add(engine, &weights, adapter.as_ref(), None).map_err(at)?.0, to.bytes()),
    };
    let merged = Merged {
        tensors_changed: u64::from(elements_changed > 0),
        elements_changed,
        intended_sumsq: stats.intended_sumsq,
        realised_sumsq: stats.realised_sumsq,
    };
    Ok((out, merged))
}

/// The flat index of the first NaN or Inf, by its exponent bits.
fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<u64> {
    let size = dtype.bytes();
    // The exponent lies in the last two bytes of every format.
    let exponent = match dtype {
        Dtype::F64 => 0x7ff0,
        Dtype::F32 | Dtype::Bf16 => 0x7f80,
        Dtype::F16 => 0x7c00,
    };
    let at = bytes
        .chunks_exact(size)
        .position(|x| u16::from_le_bytes([x[size - 2], x[size - 1]]) & exponent == exponent);
    at.map(|index| index as u64)
}

fn differing(a: &[u8], b: &[u8], size: usize) -> u64 {
    a.chunks(size).zip(b.chunks(size)).filter(|(a, b)| a != b).count() as u64
}

/// Stored weights and the format that they go to.
struct Weights<'a> {
    bytes: &'a [u8],
    from: Dtype,
    to: Dtype,
    shape: Shape,
}

/// `weights + adapter + addition`, rounded once to the format they go to.
fn add<E: Engine>(
    engine: &E,
    weights: &Weights<'_>,
    adapter: Option<&Factors>,
    addition: Option<&Addition>,
) -> kernels::Result<(Vec<u8>, AddStats)> {
    let Weights { bytes, from, to, shape } = *weights;
    if from != to {
        // A saved copy in another format: the sum in f32 as always, then that one rounding.
        let flat = Shape { rows: 1, cols: shape.len()? };
        let zero = engine.raw(&vec![0; shape.bytes(from)?], from, flat)?;
        let wide = engine.read(&engine.delta(&engine.raw(bytes, from, flat)?, &zero)?.0)?;
        let weights = Weights { bytes: bytemuck::cast_slice(&wide), from: Dtype::F32, to: Dtype::F32, shape };
        let (sum, stats) = add(engine, &weights, adapter, addition)?;
        return Ok((engine.pack(&engine.matrix(&floats(&sum), flat)?, to)?, stats));
    }
    let product = |factors: &Factors| -> kernels::Result<(E::Matrix, E::Matrix)> {
        let b = engine.matrix(&factors.b, Shape { rows: factors.rows, cols: factors.rank })?;
        Ok((b, engine.matrix(&factors.a, Shape { rows: factors.rank, cols: factors.cols })?))
    };
    let adapter = adapter.map(|factors| Ok((factors.scale as f32, product(factors)?))).transpose()?;
    let mut terms: Vec<_> = adapter.iter().map(|(scale, (b, a))| (*scale, b, a)).collect();
    match addition {
        None => engine.add_low_rank(&engine.raw(bytes, to, shape)?, &terms),
        Some(Addition::Product(c, factors)) => {
            let (b, a) = product(factors)?;
            terms.push((*c * factors.scale as f32, &b, &a));
            engine.add_low_rank(&engine.raw(bytes, to, shape)?, &terms)
        }
        Some(Addition::Dense(c, delta)) => {
            // As one row: a difference is a product of rank 1 with the number 1. What an adapter adds is made dense too.
            let flat = Shape { rows: 1, cols: shape.len()? };
            let one = engine.matrix(&[1.0], Shape { rows: 1, cols: 1 })?;
            let delta = engine.matrix(delta, flat)?;
            let dense = match terms.is_empty() {
                true => None,
                false => {
                    let zero = engine.raw(&vec![0; shape.bytes(Dtype::F32)?], Dtype::F32, shape)?;
                    let (sum, _) = engine.add_low_rank(&zero, &terms)?;
                    Some(engine.matrix(&floats(&sum), flat)?)
                }
            };
            let mut terms: Vec<_> = dense.iter().map(|dense| (1.0, &one, dense)).collect();
            terms.push((*c, &one, &delta));
            engine.add_low_rank(&engine.raw(bytes, to, flat)?, &terms)
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_non_finite_in_every_format() {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let bytes: Vec<u8> = [1.0, -65504.0, bad, bad]
                    .iter()
                    .flat_map(|&x| kernels::reference::round(x, dtype))
                    .collect();
                assert_eq!(first_non_finite(&bytes, dtype), Some(2), "{dtype:?} {bad}");
                assert_eq!(first_non_finite(&bytes[..2 * dtype.bytes()], dtype), None);
            }
        }
    }
}
