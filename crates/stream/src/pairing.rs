//! The tensors of two checkpoints side by side, from their headers alone.
//!
//! Both are brought to the canonical space first, so a fused and an unfused layout of one model pair up. Everything that
//! headers can show to be wrong is refused here, before an output is begun: another architecture, a tensor on one side
//! only, shapes that differ, number formats that cannot be subtracted. An embedding or head may differ in its row count.
//!
//! Not here: values.

use std::path::PathBuf;

use checkpoint::{Checkpoint, Role, Unit};
use kernels::{Dtype, Shape};

use crate::parts::Worker;
use crate::{Result, StreamError};

/// One tensor of both checkpoints.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) aligned: Unit,
    pub(crate) degraded: Unit,
    pub(crate) aligned_file: PathBuf,
    /// Where the aligned side begins in its file.
    offset: u64,
}

impl Pair {
    /// Whether both sides have the same row count (and then the same shape).
    pub(crate) fn same_rows(&self) -> bool {
        self.aligned.shape == self.degraded.shape
    }

    /// Bytes of both sides.
    pub(crate) fn bytes(&self) -> u64 {
        bytes(&self.aligned).saturating_add(bytes(&self.degraded))
    }
}

/// Bytes of a unit.
pub(crate) fn bytes(unit: &Unit) -> u64 {
    unit.dtype.bytes_of(&unit.shape).unwrap_or(0)
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
    let (aligned_units, degraded_units) = (aligned.units()?, degraded.units()?);
    one_sided((aligned, &aligned_units), (degraded, &degraded_units))?;
    one_sided((degraded, &degraded_units), (aligned, &aligned_units))?;
    // Both are sorted by name and have the same names.
    let both = aligned_units.into_iter().zip(degraded_units);
    both.map(|(a, d)| pair(aligned, degraded, a, d)).collect()
}

/// The order of the aligned files, in which a worker's share is one run.
pub(crate) fn in_file_order(mut pairs: Vec<&Pair>) -> Vec<&Pair> {
    pairs.sort_by(|a, b| (&a.aligned_file, a.offset, &a.name).cmp(&(&b.aligned_file, b.offset, &b.name)));
    pairs
}

/// One worker's share of items in an order in which neighbours lie together: runs of about the same bytes.
pub(crate) fn share_of<T>(items: Vec<T>, worker: Worker, bytes: impl Fn(&T) -> u64) -> Vec<T> {
    // An item costs something even if it is empty.
    let cost = |item: &T| u128::from(bytes(item)) + 4096;
    let total: u128 = items.iter().map(cost).sum();
    let mut before = 0u128;
    items
        .into_iter()
        .filter(|item| {
            let middle = 2 * before + cost(item);
            before += cost(item);
            let bin = middle * u128::from(worker.of) / (2 * total.max(1));
            bin.min(u128::from(worker.of) - 1) == u128::from(worker.index) - 1
        })
        .collect()
}

fn one_sided(holder: (&Checkpoint, &[Unit]), other: (&Checkpoint, &[Unit])) -> Result<()> {
    let has = |unit: &&Unit| other.1.binary_search_by(|found| found.name.cmp(&unit.name)).is_ok();
    match holder.1.iter().find(|unit| !has(unit)) {
        None => Ok(()),
        Some(unit) => Err(StreamError::OneSided {
            tensor: unit.name.clone(),
            file: file_of(holder.0, unit),
            missing_from: other.0.dir().to_path_buf(),
        }),
    }
}

/// The file that a unit's values lie in.
pub(crate) fn file_of(side: &Checkpoint, unit: &Unit) -> PathBuf {
    let saved = side.adapter().and_then(|adapter| adapter.saved().get(&unit.tensor));
    let info = saved.or_else(|| side.shards().get(&unit.tensor));
    info.map_or_else(|| side.dir().to_path_buf(), |info| info.file.clone())
}

fn pair(a_side: &Checkpoint, d_side: &Checkpoint, aligned: Unit, degraded: Unit) -> Result<Pair> {
    let role = aligned.role;
    let rows_may_differ = matches!(role, Role::Embedding | Role::Head)
        && aligned.shape.len() == 2
        && degraded.shape.len() == 2
        && aligned.shape[1] == degraded.shape[1];
    let aligned_file = file_of(a_side, &aligned);
    if aligned.shape != degraded.shape && !rows_may_differ {
        return Err(StreamError::OtherShape {
            tensor: aligned.name.clone(),
            aligned: aligned.shape.clone(),
            aligned_file,
            degraded: degraded.shape.clone(),
            degraded_file: file_of(d_side, &degraded),
        });
    }
    if role != Role::Buffer {
        for (side, unit) in [(a_side, &aligned), (d_side, &degraded)] {
            if float(unit.dtype).is_none() && (narrow(unit.dtype) || aligned.dtype != degraded.dtype) {
                return Err(unsupported(side, unit));
            }
        }
    }
    let offset = a_side.shards().get(&aligned.tensor).map_or(0, |info| info.offset)
        + aligned.slice.start * aligned.dtype.bits() / 8;
    Ok(Pair { name: aligned.name.clone(), role, aligned, degraded, aligned_file, offset })
}

/// Formats whose values mean nothing without another tensor's scales, even where both sides are equal.
fn narrow(dtype: checkpoint::Dtype) -> bool {
    dtype.name().starts_with(['F', 'C']) && float(dtype).is_none()
}

pub(crate) fn unsupported(side: &Checkpoint, unit: &Unit) -> StreamError {
    StreamError::UnsupportedDtype { tensor: unit.name.clone(), file: file_of(side, unit), dtype: unit.dtype }
}

/// The engine's number format of a stored dtype, if it computes with it.
pub(crate) fn float(dtype: checkpoint::Dtype) -> Option<Dtype> {
    match dtype {
        checkpoint::Dtype::F64 => Some(Dtype::F64),
        checkpoint::Dtype::F32 => Some(Dtype::F32),
        checkpoint::Dtype::F16 => Some(Dtype::F16),
        checkpoint::Dtype::Bf16 => Some(Dtype::Bf16),
        checkpoint::Dtype::F8E4M3 => Some(Dtype::F8E4M3),
        checkpoint::Dtype::F8E5M2 => Some(Dtype::F8E5M2),
        _ => None,
    }
}

/// A unit as it is read: rows of all but the first side.
pub(crate) fn unit_shape(unit: &Unit) -> Shape {
    Shape { rows: unit.rows() as usize, cols: unit.cols() as usize }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_without_a_reading_are_narrow() {
        for dtype in checkpoint::Dtype::ALL {
            let read = ["F8_E4M3", "F8_E5M2"].contains(&dtype.name());
            let want =
                ["C64", "F4", "F6_", "F8_"].iter().any(|start| dtype.name().starts_with(start)) && !read;
            assert_eq!(narrow(*dtype), want, "{dtype}");
        }
    }

    fn pair_of(name: &str, cols: u64) -> Pair {
        let unit = Unit {
            name: name.to_owned(),
            shape: vec![1, cols],
            role: Role::Outside,
            tensor: name.to_owned(),
            dtype: checkpoint::Dtype::Bf16,
            slice: checkpoint::Slice { start: 0, row_stride: cols, col_stride: 1 },
            scale: None,
        };
        Pair {
            name: name.to_owned(),
            role: Role::Outside,
            aligned: unit.clone(),
            degraded: unit,
            aligned_file: PathBuf::new(),
            offset: 0,
        }
    }

    #[test]
    fn shares_of_any_number_of_workers_are_all_pairs_once() {
        let pairs: Vec<Pair> =
            (0..23u64).map(|i| pair_of(&format!("t{i:02}"), (i * i * 5000) % 70_000)).collect();
        let largest: u64 = pairs.iter().map(|pair| pair.bytes() + 4096).max().unwrap();
        let total: u64 = pairs.iter().map(|pair| pair.bytes() + 4096).sum();
        for of in [1, 2, 3, 7, 40] {
            let mut names = Vec::new();
            for index in 1..=of {
                let share = share_of(in_file_order(pairs.iter().collect()), Worker { index, of }, |pair| {
                    pair.bytes()
                });
                let cost: u64 = share.iter().map(|pair| pair.bytes() + 4096).sum();
                assert!(cost <= total / u64::from(of) + largest, "worker {index} of {of}: {cost}");
                names.extend(share.iter().map(|pair| pair.name.clone()));
            }
            assert_eq!(names, pairs.iter().map(|pair| pair.name.clone()).collect::<Vec<_>>(), "{of}");
        }
    }
}
