//! Scales of fp8 weights: found from headers, read as `f32`.
//!
//! A value is `q * scale`, whatever `_inv` in the tensor's name says. One scale holds for a block of
//! `quantization_config.weight_block_size`, which is never inferred, or for a whole matrix where there is one scale per
//! matrix. The grid has ceil(out / block) x ceil(in / block) scales, of each expert in a stack. A scale may lie in any
//! shard. Scales are F32, BF16 (or another plain float) or F8_E8M0, finite and above zero.
//!
//! Not here: the codes themselves, which stay as stored.

use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{CheckpointError, Result};
use crate::model::Checkpoint;
use crate::shards::{ShardSet, TensorInfo};
use crate::units::{BlockScale, Unit};
use crate::values::widen_f32;

/// Endings of the scale of `X.weight`, which take the place of `.weight`.
const OF_WEIGHTS: [&str; 3] = [".weight_scale_inv", ".scale", ".weight_scale"];

/// Endings of the scale of a parameter without `.weight`, such as a stack of experts.
const OF_PARAMETERS: [&str; 5] = ["_scale_inv", ".weight_scale_inv", ".scale", "_scale", ".weight_scale"];

/// Whether codes of this dtype are read with a scale.
pub(crate) fn is_scaled(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2)
}

/// The tensors of `shards` that are named like the scale of this one.
pub(crate) fn named_scales<'a>(shards: &'a ShardSet, name: &str) -> Vec<&'a TensorInfo> {
    let (front, endings) = match name.strip_suffix(".weight") {
        Some(module) => (module, &OF_WEIGHTS[..]),
        None => (name, &OF_PARAMETERS[..]),
    };
    endings.iter().filter_map(|ending| shards.get(&format!("{front}{ending}"))).collect()
}

/// The scales of one fp8 tensor.
pub(crate) struct Scales {
    tensor: String,
    block: [u64; 2],
    grid: [u64; 2],
    /// Scales from one matrix of a stack to the next; 0 where all share one.
    stride: u64,
}

impl Scales {
    /// Finds and checks the scales of `weight`, each matrix of which is `matrix` = [rows, columns] as stored; `halves` if
    /// that is gate and up.
    pub(crate) fn find(
        model: &Checkpoint,
        weight: &TensorInfo,
        matrix: [u64; 2],
        stacked: Option<u64>,
        halves: bool,
        block: Option<[u64; 2]>,
    ) -> Result<Scales> {
        let refuse = |problem: String| scale_error(weight, problem);
        let named = named_scales(model.shards(), &weight.name);
        let scale = match named.as_slice() {
            [scale] => model.stored(&scale.name)?.1,
            [] => return Err(refuse("is missing, it would be named `…weight_scale_inv`".into())),
            [first, second, ..] => {
                return Err(refuse(format!("is given twice, by `{}` and `{}`", first.name, second.name)));
            }
        };
        if scale.dtype != Dtype::F8E8M0 && widen_f32(&[], scale.dtype).is_none() {
            return Err(CheckpointError::UnsupportedDtype {
                tensor: scale.name.clone(),
                file: scale.file.clone(),
                dtype: scale.dtype,
            });
        }
        let found = |block, grid, stride| Scales { tensor: scale.name.clone(), block, grid, stride };
        let single = scale.shape.iter().all(|&side| side == 1) && scale.shape.len() <= 1;
        // `weight_scale` is one number in the files that have it beside other modules' blocks.
        if single && (block.is_none() || !scale.name.ends_with("_inv")) {
            return Ok(found(matrix.map(|side| side.max(1)), [1, 1], 0));
        }
        let Some(block) = block else {
            // Without blocks a stack has one scale per matrix, of gate and up fused one per half.
            if stacked.is_some_and(|experts| scale.shape == [experts, 1, 1]) {
                return Ok(found(matrix, [1, 1], 1));
            }
            if halves && stacked.is_some_and(|experts| scale.shape == [experts, 2, 1]) {
                return Ok(found([matrix[0] / 2, matrix[1]], [2, 1], 2));
            }
            return Err(refuse(format!(
                "`{}` is {:?} but `quantization_config.weight_block_size` is not in config.json",
                scale.name, scale.shape
            )));
        };
        let grid = [matrix[0].div_ceil(block[0]), matrix[1].div_ceil(block[1])];
        let need: Vec<u64> = stacked.into_iter().chain(grid).collect();
        if scale.shape != need {
            return Err(refuse(format!(
                "`{}` is {:?}, blocks of {block:?} over {matrix:?} need {need:?}",
                scale.name, scale.shape
            )));
        }
        Ok(found(block, grid, grid[0] * grid[1]))
    }

    /// Whether gate and up, halves of `rows`, each scaled on its own would give the same grid as both scaled at once.
    pub(crate) fn halves_are_ambiguous(&self, rows: u64) -> bool {
        let (half, block) = (rows / 2, self.block[0]);
        !half.is_multiple_of(block) && 2 * half.div_ceil(block) == rows.div_ceil(block)
    }

    /// The scale of the matrix that begins at `row` of the `expert`-th.
    pub(crate) fn of(&self, expert: u64, row: u64) -> BlockScale {
        BlockScale {
            tensor: self.tensor.clone(),
            start: expert * self.stride,
            block: self.block,
            row,
            col: 0,
            grid: self.grid,
        }
    }
}

pub(crate) fn scale_error(weight: &TensorInfo, problem: String) -> CheckpointError {
    CheckpointError::Scale { tensor: weight.name.clone(), file: weight.file.clone(), problem }
}

impl Checkpoint {
    /// The scales of a unit, row-major over its [`BlockScale::grid`], each finite and above zero; none if it has none.
    pub fn read_scales(&self, unit: &Unit) -> Result<Vec<f32>> {
        let Some(scale) = &unit.scale else { return Ok(Vec::new()) };
        let (shards, info) = self.stored(&scale.tensor)?;
        let [rows, cols] = scale.grid;
        let range = rows
            .checked_mul(cols)
            .and_then(|count| Some((count, scale.start.checked_add(count)?)))
            .filter(|&(_, end)| end <= info.elements());
        let Some((count, _)) = range else {
            return Err(CheckpointError::UnitRange {
                unit: unit.name.clone(),
                problem: format!("its scales are not inside `{}`", scale.tensor),
            });
        };
        let size = info.dtype.bits() / 8;
        // Inside the tensor, so both fit.
        let mut bytes = vec![0u8; (count * size) as usize];
        shards.read_at(info, scale.start * size, &mut bytes)?;
        let values = match info.dtype {
            Dtype::F8E8M0 => Some(bytes.iter().map(|&exponent| power_of_two(exponent)).collect()),
            dtype => widen_f32(&bytes, dtype),
        };
        let values: Vec<f32> = values.ok_or_else(|| CheckpointError::UnsupportedDtype {
            tensor: info.name.clone(),
            file: info.file.clone(),
            dtype: info.dtype,
        })?;
        match values.iter().position(|value| !(value.is_finite() && *value > 0.0)) {
            Some(at) => Err(CheckpointError::ScaleValue {
                tensor: info.name.clone(),
                file: info.file.clone(),
                index: scale.start + at as u64,
            }),
            None => Ok(values),
        }
    }
}

/// 2^(exponent - 127); NaN for 255.
fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        255 => f32::NAN,
        // Below the normal numbers, where the exponent field is 0.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// `quantization_config.weight_block_size` of a config, if it has one.
pub(crate) fn block_size(model: &Checkpoint, config_file: &Path) -> Result<Option<[u64; 2]>> {
    let Some(value) = model.config().quantization("weight_block_size") else { return Ok(None) };
    let sides = value.as_array().map(|sides| sides.iter().map(|side| side.as_u64()).collect::<Vec<_>>());
    match sides.as_deref() {
        Some(&[Some(rows), Some(cols)]) if rows > 0 && cols > 0 => Ok(Some([rows, cols])),
        _ => Err(CheckpointError::config(
            config_file,
            format!("`quantization_config.weight_block_size` is {value}, not two sides above zero"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_at_the_ends() {
        assert_eq!(power_of_two(127), 1.0);
        assert_eq!(power_of_two(0), 2f32.powi(-127));
        assert_eq!(power_of_two(1), f32::MIN_POSITIVE);
        assert_eq!(power_of_two(254), 2f32.powi(127));
        assert!(power_of_two(255).is_nan());
    }
}
