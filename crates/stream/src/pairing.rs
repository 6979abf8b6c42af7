//! The tensors of two checkpoints side by side, from their headers alone.
//!
//! Everything that headers can show to be wrong is refused here, before an output is begun: another architecture, a
//! tensor on one side only, shapes that differ, number formats that cannot be subtracted. An embedding or head may
//! differ in its row count.
//!
//! Not here: values.

use checkpoint::{Checkpoint, Role, TensorInfo, role};
use kernels::{Dtype, Shape};

use crate::{Result, StreamError};

/// One tensor of both checkpoints.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) aligned: TensorInfo,
    pub(crate) degraded: TensorInfo,
}

impl Pair {
    /// Whether both sides have the same row count (and then the same shape).
    pub(crate) fn same_rows(&self) -> bool {
        self.aligned.shape == self.degraded.shape
    }

    /// Bytes of both sides.
    pub(crate) fn bytes(&self) -> u64 {
        self.aligned.bytes.saturating_add(self.degraded.bytes)
    }
}

/// Pairs the tensors of two checkpoints by name, sorted.
pub(crate) fn pairs(aligned: &Checkpoint, degraded: &Checkpoint) -> Result<Vec<Pair>> {
    let (a, d) = (aligned.config(), degraded.config());
    if a.model_type != d.model_type || a.layers != d.layers {
        return Err(StreamError::OtherArchitecture {
            aligned: aligned.dir().to_path_buf(),
            aligned_kind: format!("{} with {} layers", checkpoint::printable(&a.model_type), a.layers),
            degraded: degraded.dir().to_path_buf(),
            degraded_kind: format!("{} with {} layers", checkpoint::printable(&d.model_type), d.layers),
        });
    }
    one_sided(aligned, degraded)?;
    one_sided(degraded, aligned)?;
    let mut pairs = Vec::with_capacity(aligned.tensors().len());
    for info in aligned.tensors() {
        let Some(other) = degraded.shards().get(&info.name) else { continue };
        pairs.push(pair(info, other)?);
    }
    Ok(pairs)
}

fn one_sided(holder: &Checkpoint, other: &Checkpoint) -> Result<()> {
    match holder.tensors().iter().find(|info| other.shards().get(&info.name).is_none()) {
        None => Ok(()),
        Some(info) => Err(StreamError::OneSided {
            tensor: info.name.clone(),
            file: info.file.clone(),
            missing_from: other.dir().to_path_buf(),
        }),
    }
}

fn pair(aligned: &TensorInfo, degraded: &TensorInfo) -> Result<Pair> {
    let role = role(&aligned.name, &aligned.shape);
    let rows_may_differ = matches!(role, Role::Embedding | Role::Head)
        && aligned.shape.len() == 2
        && degraded.shape.len() == 2
        && aligned.shape[1] == degraded.shape[1];
    if aligned.shape != degraded.shape && !rows_may_differ {
        return Err(StreamError::OtherShape {
            tensor: aligned.name.clone(),
            aligned: aligned.shape.clone(),
            aligned_file: aligned.file.clone(),
            degraded: degraded.shape.clone(),
            degraded_file: degraded.file.clone(),
        });
    }
    if role != Role::Buffer {
        for info in [aligned, degraded] {
            if float(info.dtype).is_none() && (narrow(info.dtype) || aligned.dtype != degraded.dtype) {
                return Err(unsupported(info));
            }
        }
    }
    Ok(Pair { name: aligned.name.clone(), role, aligned: aligned.clone(), degraded: degraded.clone() })
}

/// Formats whose values mean nothing without another tensor's scales, even where both sides are equal.
fn narrow(dtype: checkpoint::Dtype) -> bool {
    dtype.name().starts_with(['F', 'C']) && float(dtype).is_none()
}

pub(crate) fn unsupported(info: &TensorInfo) -> StreamError {
    StreamError::UnsupportedDtype { tensor: info.name.clone(), file: info.file.clone(), dtype: info.dtype }
}

/// The engine's number format of a stored dtype, if it computes with it.
pub(crate) fn float(dtype: checkpoint::Dtype) -> Option<Dtype> {
    match dtype {
        checkpoint::Dtype::F64 => Some(Dtype::F64),
        checkpoint::Dtype::F32 => Some(Dtype::F32),
        checkpoint::Dtype::F16 => Some(Dtype::F16),
        checkpoint::Dtype::Bf16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// A tensor as a matrix: the last side is the columns, a vector is one row.
pub(crate) fn matrix_shape(shape: &[u64]) -> Shape {
    // Shapes were checked against byte ranges that were read, so the products fit.
    let side = |sides: &[u64]| sides.iter().fold(1usize, |n, &side| n.saturating_mul(side as usize));
    match shape.split_last() {
        Some((cols, rows)) => Shape { rows: side(rows), cols: *cols as usize },
        None => Shape { rows: 1, cols: 1 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrix_shape_of_any_number_of_sides() {
        let cases: [(&[u64], usize, usize); 5] =
            [(&[], 1, 1), (&[5], 1, 5), (&[2, 3], 2, 3), (&[2, 3, 4], 6, 4), (&[0, 3], 0, 3)];
        for (shape, rows, cols) in cases {
            assert_eq!(matrix_shape(shape), Shape { rows, cols }, "{shape:?}");
        }
    }

    #[test]
    fn formats_that_need_scales_are_narrow() {
        for dtype in checkpoint::Dtype::ALL {
            let want = ["C64", "F4", "F6_", "F8_"].iter().any(|start| dtype.name().starts_with(start));
            assert_eq!(narrow(*dtype), want, "{dtype}");
        }
    }
}
