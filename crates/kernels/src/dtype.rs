//! The number formats of weights: widening, rounding and the size of a last place.
//!
//! Rounding is to nearest, ties to even, in integer arithmetic, so that any device can repeat it bit for bit: a NaN
//! keeps its sign and its leading bits and becomes quiet, a value beyond the range becomes infinite.
//!
//! The 8-bit formats are read only: their numbers are multiplied by scales (`weights`), and rounding to them would need
//! new ones.

use half::f16;

/// A number format of weights that an engine reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
    /// 8 bits, 4 of exponent, no infinities, one NaN of each sign.
    F8E4M3,
    /// 8 bits, 5 of exponent: the upper half of binary16.
    F8E5M2,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 => 1,
        }
    }

    /// Whether engines write this format.
    pub fn is_written(self) -> bool {
        !matches!(self, Dtype::F8E4M3 | Dtype::F8E5M2)
    }

    /// Widens little-endian elements to f32; exact except for [`Dtype::F64`], which is rounded.
    #[inline(always)]
    pub(crate) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Dtype::F64 => {
                for (out, x) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *out = f64::from_le_bytes(*x) as f32;
                }
            }
            Dtype::F32 => {
                for (out, x) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*x);
                }
            }
            Dtype::F16 => {
                for (out, x) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f16_value(u16::from_le_bytes(*x));
                }
            }
            Dtype::Bf16 => {
                for (out, x) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
                }
            }
            Dtype::F8E4M3 => {
                for (out, &x) in out.iter_mut().zip(bytes) {
                    *out = e4m3_value(x);
                }
            }
            Dtype::F8E5M2 => {
                for (out, &x) in out.iter_mut().zip(bytes) {
                    *out = f16_value(u16::from(x) << 8);
                }
            }
        }
    }

    /// Widens little-endian elements to f64, always exact.
    pub(crate) fn widen_f64(self, bytes: &[u8], out: &mut [f64]) {
        if self == Dtype::F64 {
            for (out, x) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *out = f64::from_le_bytes(*x);
            }
            return;
        }
        let size = self.bytes();
        let mut wide = [0.0f32; 256];
        for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(256 * size)) {
            let wide = &mut wide[..out.len()];
            self.widen(bytes, wide);
            for (out, &x) in out.iter_mut().zip(wide.iter()) {
                *out = f64::from(x);
            }
        }
    }

    /// Exponent of the lowest normal number, and bits after the leading one.
    pub(crate) fn exponents(self) -> (i64, i64) {
        match self {
            Dtype::F64 => (-1022, 52),
            Dtype::F32 => (-126, 23),
            Dtype::F16 => (-14, 10),
            Dtype::Bf16 => (-126, 7),
            Dtype::F8E4M3 => (-6, 3),
            Dtype::F8E5M2 => (-14, 2),
        }
    }

    /// Rounds `x` to this format and writes it to the first bytes of `out`; returns the stored value widened again.
    pub(crate) fn store(self, x: f32, out: &mut [u8]) -> f32 {
        match self {
            Dtype::F64 => {
                out[..8].copy_from_slice(&f64::from(x).to_le_bytes());
                x
            }
            Dtype::F32 => {
                out[..4].copy_from_slice(&x.to_le_bytes());
                x
            }
            Dtype::F16 => {
                let bits = f16_bits(x);
                out[..2].copy_from_slice(&bits.to_le_bytes());
                f16::from_bits(bits).to_f32()
            }
            Dtype::Bf16 => {
                let bits = bf16_bits(x);
                out[..2].copy_from_slice(&bits.to_le_bytes());
                f32::from_bits(u32::from(bits) << 16)
            }
            // Refused before (`is_written`); NaN, so that a caller that forgot is found out.
            Dtype::F8E4M3 | Dtype::F8E5M2 => f32::NAN,
        }
    }

    /// The square of one unit in the last place of `x`, a value of this format.
    pub(crate) fn ulp_squared(self, x: f64) -> f64 {
        let (lowest, fraction) = self.exponents();
        let exponent = (((x.to_bits() >> 52) & 0x7ff) as i64 - 1023).max(lowest);
        // 2^(2 * exponent); below f64's own range it counts as nothing.
        let biased = 1023 + 2 * (exponent - fraction);
        if biased < 1 { 0.0 } else { f64::from_bits((biased as u64) << 52) }
    }
}

/// The value of binary16 bits: the exponent moved over, and its range made up for by an exact product.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits(); // 2^112
    let value = if magnitude >= 0x0f80_0000 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// The value of e4m3 bits.
#[inline(always)]
fn e4m3_value(bits: u8) -> f32 {
    let magnitude = u32::from(bits & 0x7f) << 20;
    let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7b80_0000)).to_bits(); // 2^120
    let value = if bits & 0x7f == 0x7f { 0x7fc0_0000 } else { finite };
    f32::from_bits(value | u32::from(bits & 0x80) << 24)
}

/// The bits of `x` rounded to bf16.
#[inline]
pub fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x0040;
    }
    // Half a unit less one, plus one when the kept part is odd: carries run into the exponent, up to infinity.
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The bits of `x` rounded to binary16.
pub fn f16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    let rounded = if magnitude > 0x7f80_0000 {
        0x7e00 | ((magnitude >> 13) & 0x3ff)
    } else if magnitude >= 0x4780_0000 {
        0x7c00 // 65536 and above
    } else if magnitude >= 0x3880_0000 {
        let rebiased = magnitude - 0x3800_0000;
        (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13
    } else if magnitude < 0x3300_0000 {
        0 // below half of the smallest denormal
    } else {
        let shift = 126 - (magnitude >> 23);
        let significand = (magnitude & 0x7f_ffff) | 0x80_0000;
        let kept = significand >> shift;
        let rest = significand & ((1 << shift) - 1);
        let half = 1 << (shift - 1);
        kept + u32::from(rest > half || (rest == half && kept & 1 == 1))
    };
    sign | rounded as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(x: f32) {
        assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "bf16 of {x:e} ({:#010x})", x.to_bits());
        assert_eq!(f16_bits(x), f16::from_f32(x).to_bits(), "f16 of {x:e} ({:#010x})", x.to_bits());
    }

    #[test]
    fn rounding_around_every_half_precision_value() {
        for high in 0..=u16::MAX {
            // bf16: the value, its tie, and both neighbours of each.
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                check(f32::from_bits(u32::from(high) << 16 | low));
            }
            let x = f16::from_bits(high).to_f32();
            if x.is_finite() {
                let tie = x.to_bits() + 0x1000;
                for bits in [x.to_bits(), tie - 1, tie, tie + 1] {
                    check(f32::from_bits(bits));
                }
            }
        }
    }

    #[test]
    fn rounding_denormals_of_f16() {
        // Every quarter of a unit up to the first normal numbers: ties, both neighbours, and the underflow to zero.
        for quarter in 0..=4 * 1030 {
            let x = quarter as f32 / 4.0 * 2.0f32.powi(-24);
            for bits in [x.to_bits().saturating_sub(1), x.to_bits(), x.to_bits() + 1] {
                check(f32::from_bits(bits));
                check(-f32::from_bits(bits));
            }
        }
    }

    #[test]
    fn rounding_limits_and_nan() {
        for x in [65504.0, 65519.996, 65520.0, 65536.0, f32::MAX, f32::INFINITY, f32::MIN_POSITIVE, 1e-45] {
            check(x);
            check(-x);
        }
        for payload in [1, 0x1fff, 0x2000, 0xffff, 0x1_0000, 0x3f_ffff, 0x40_0000, 0x7f_ffff] {
            check(f32::from_bits(0x7f80_0000 | payload));
            check(f32::from_bits(0xff80_0000 | payload));
        }
        assert_eq!(bf16_bits(f32::MAX), 0x7f80);
    }

    #[test]
    fn widening_every_half_precision_value() {
        for bits in 0..=u16::MAX {
            let (got, want) = (f16_value(bits), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{bits:#06x}: {got}");
        }
    }

    #[test]
    fn widening_every_e4m3_value() {
        for bits in 0..=u8::MAX {
            // By the definition: sign, exponent of bias 7, three bits of fraction; 0 is the exponent of denormals.
            let (exponent, fraction) = (i32::from(bits >> 3 & 15), f32::from(bits & 7) / 8.0);
            let size = match exponent {
                0 => fraction * 2.0f32.powi(-6),
                _ => (1.0 + fraction) * 2.0f32.powi(exponent - 7),
            };
            let got = e4m3_value(bits);
            match bits & 0x7f {
                0x7f => assert!(got.is_nan()),
                _ => assert_eq!(got, if bits & 0x80 == 0 { size } else { -size }, "{bits:#04x}"),
            }
        }
    }

    #[test]
    fn ulp_of_normal_and_denormal_values() {
        let cases = [
            (Dtype::Bf16, 1.0, -7),
            (Dtype::Bf16, -1.9921875, -7),
            (Dtype::Bf16, 0.0, -133),
            (Dtype::F16, 1.0, -10),
            (Dtype::F16, 2.0f64.powi(-20), -24),
            (Dtype::F32, 3.0, -22),
            (Dtype::F64, 1.0, -52),
            (Dtype::F8E4M3, 448.0, 5),
            (Dtype::F8E4M3, 0.001953125, -9),
            (Dtype::F8E5M2, 1.75, -2),
        ];
        for (dtype, x, exponent) in cases {
            assert_eq!(dtype.ulp_squared(x), 2.0f64.powi(2 * exponent), "{dtype:?} {x}");
        }
        assert_eq!(Dtype::F64.ulp_squared(0.0), 0.0);
    }
}
