//! Stored bytes <-> `f32`.
//!
//! F64, F32, F16 and BF16 are widened (F64 is rounded to nearest even); other dtypes have no plain numeric reading here.
//! The way back rounds to nearest even. A NaN or an infinity is reported by flat index, never passed on.
//!
//! Not here: fp8 and its scales, arithmetic.

use half::{bf16, f16};

use crate::dtype::Dtype;

/// Widens little-endian elements to `f32`; `None` for a dtype without a numeric reading or a length that does not divide.
///
/// Values are passed as they are, NaN included: the reader of a model looks for them.
pub fn widen_f32(bytes: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Option<Vec<f32>> {
        let (chunks, rest) = bytes.as_chunks::<N>();
        rest.is_empty().then(|| chunks.iter().map(|&chunk| value(chunk)).collect())
    }
    match dtype {
        Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => None,
    }
}

/// Rounds `f32` to the stored dtype, little-endian; `None` for a dtype without a numeric reading.
pub fn pack_f32(values: &[f32], dtype: Dtype) -> Option<Vec<u8>> {
    Some(match dtype {
        Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Flat index of the first NaN or infinity.
pub(crate) fn first_non_finite(values: &[f32]) -> Option<u64> {
    values.iter().position(|v| !v.is_finite()).map(|index| index as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_then_widen_is_exact_for_values_of_the_dtype() {
        let values = [0.0, -1.5, 0.25, 3.0, 65280.0];
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let bytes = pack_f32(&values, dtype).unwrap();
            assert_eq!(bytes.len() as u64, dtype.bits() / 8 * 5);
            assert_eq!(widen_f32(&bytes, dtype).unwrap(), values, "{dtype}");
        }
    }

    #[test]
    fn pack_rounds_to_nearest_even() {
        // Halfway between two bf16 neighbours: 1 + 2^-8 goes to 1 (even), 1 + 3 * 2^-8 to 1 + 2^-6 (even).
        let bytes = pack_f32(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], Dtype::Bf16).unwrap();
        assert_eq!(widen_f32(&bytes, Dtype::Bf16).unwrap(), [1.0, 1.015625]);
    }

    #[test]
    fn other_dtypes_and_ragged_lengths_are_none() {
        assert_eq!(widen_f32(&[0], Dtype::F8E4M3), None);
        assert_eq!(widen_f32(&[0, 0, 0], Dtype::F16), None);
        assert_eq!(pack_f32(&[0.0], Dtype::I32), None);
    }

    #[test]
    fn first_non_finite_finds_nan_and_infinity() {
        assert_eq!(first_non_finite(&[1.0, f32::NAN, f32::INFINITY]), Some(1));
        assert_eq!(first_non_finite(&[1.0, 2.0]), None);
    }
}
