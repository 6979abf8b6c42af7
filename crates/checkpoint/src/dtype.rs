//! The element types of safetensors.
//!
//! All that the format defines are recognised, so that a header is judged by what it says and not by what this workspace
//! computes with. Which of them can be widened to `f32` is decided in `values`.

use std::fmt;

macro_rules! dtypes {
    ($($variant:ident, $name:literal, $bits:literal, $doc:literal;)*) => {
        /// Element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Dtype {
            $(#[doc = $doc] $variant,)*
        }

        impl Dtype {
            /// Every dtype of the format.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// The name as headers spell it, `BF16`.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bits of one element; 4 and 6 exist.
            pub fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits,)* }
            }

            /// The dtype that a header names so.
            pub fn from_name(name: &str) -> Option<Dtype> {
                match name { $($name => Some(Dtype::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    F64, "F64", 64, "IEEE double.";
    F32, "F32", 32, "IEEE single.";
    F16, "F16", 16, "IEEE half.";
    Bf16, "BF16", 16, "Upper half of an `f32`.";
    I64, "I64", 64, "Signed, 64 bits.";
    I32, "I32", 32, "Signed, 32 bits.";
    I16, "I16", 16, "Signed, 16 bits.";
    I8, "I8", 8, "Signed, 8 bits.";
    U64, "U64", 64, "Unsigned, 64 bits.";
    U32, "U32", 32, "Unsigned, 32 bits.";
    U16, "U16", 16, "Unsigned, 16 bits.";
    U8, "U8", 8, "Unsigned, 8 bits.";
    Bool, "BOOL", 8, "One byte per truth value.";
    C64, "C64", 64, "Complex of two `f32`.";
    F8E4M3, "F8_E4M3", 8, "8-bit float, 4 exponent bits.";
    F8E5M2, "F8_E5M2", 8, "8-bit float, 5 exponent bits.";
    F8E8M0, "F8_E8M0", 8, "8-bit power of two, used as a block scale.";
    F8E4M3Fnuz, "F8_E4M3FNUZ", 8, "8-bit float, 4 exponent bits, one zero, no infinities.";
    F8E5M2Fnuz, "F8_E5M2FNUZ", 8, "8-bit float, 5 exponent bits, one zero, no infinities.";
    F4, "F4", 4, "4-bit float, two in a byte.";
    F6E2M3, "F6_E2M3", 6, "6-bit float, 2 exponent bits.";
    F6E3M2, "F6_E3M2", 6, "6-bit float, 3 exponent bits.";
}

impl Dtype {
    /// Bytes that a tensor of this shape takes; `None` if that overflows or is no whole number.
    pub fn bytes_of(self, shape: &[u64]) -> Option<u64> {
        let elements = elements(shape)?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Product of a shape, 1 for a scalar; `None` on overflow.
///
/// Overflow is judged from left to right, as the reference reader does: `[2^40, 2^40, 0]` is refused although it is empty.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &side| product.checked_mul(side))
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for &dtype in Dtype::ALL {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn bytes_of_scalars_empties_and_half_bytes() {
        assert_eq!(Dtype::F32.bytes_of(&[]), Some(4));
        assert_eq!(Dtype::F32.bytes_of(&[3, 0]), Some(0));
        assert_eq!(Dtype::F4.bytes_of(&[3]), None);
        assert_eq!(Dtype::F4.bytes_of(&[4]), Some(2));
        assert_eq!(Dtype::U8.bytes_of(&[1 << 40, 1 << 40]), None);
        assert_eq!(Dtype::F64.bytes_of(&[1 << 62]), None);
    }
}
