//! Why an operation was refused: what was needed, what was found, and where.
//!
//! Not here: names of tensors and files; the callers know them and add them.

use std::fmt;

use crate::{Dtype, Shape};

/// The result of an operation of an engine.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Which operand of an operation is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The checkpoint that still refuses.
    Aligned,
    /// The checkpoint that lost its safety.
    Degraded,
    /// The weights that something is added to.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Aligned => "aligned",
            Side::Degraded => "degraded",
            Side::Target => "target",
        })
    }
}

/// Why an operation was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// An operand does not have the length that its shape asks for.
    #[error("{what} of shape {shape} needs {need}, found {found}")]
    Length {
        /// The operand and its unit.
        what: &'static str,
        /// The shape it was given.
        shape: Shape,
        /// What the shape asks for.
        need: usize,
        /// What was handed over.
        found: usize,
    },
    /// The element or byte count of a shape does not fit in the address space.
    #[error("shape {shape} has too many elements")]
    ShapeOverflow {
        /// The shape.
        shape: Shape,
    },
    /// Two operands do not fit together.
    #[error("{what}: shapes {left} and {right} do not fit")]
    ShapeMismatch {
        /// The operation.
        what: &'static str,
        /// The first operand.
        left: Shape,
        /// The second operand.
        right: Shape,
    },
    /// A number format that is read only.
    #[error("{what}: weights are not written as {dtype:?}")]
    NotWritten {
        /// The operation.
        what: &'static str,
        /// The format.
        dtype: Dtype,
    },
    /// Rows could not be read; their reader knows why.
    #[error("rows from {first_row} on of the {side} weights could not be read")]
    Unread {
        /// The operand.
        side: Side,
        /// The first of them.
        first_row: usize,
    },
    /// A weight is NaN or infinite.
    #[error("element {index} of the {side} weights is not finite")]
    NonFinite {
        /// The operand.
        side: Side,
        /// The flat index of the first such element.
        index: u64,
    },
    /// A finite result does not fit its number format.
    #[error("{what}: element {index} is too large for its number format")]
    Overflow {
        /// The operation.
        what: &'static str,
        /// The flat index of the first such element.
        index: u64,
    },
    /// A call of the device's driver failed.
    #[error("the CUDA call `{call}` failed: {message}")]
    Device {
        /// The call.
        call: &'static str,
        /// The driver's number for what happened.
        code: u32,
        /// What the driver says about it.
        message: String,
    },
    /// The device has not enough memory, even for the smallest part of an operand.
    #[error("the device needs {need_bytes} bytes more memory and has {free_bytes} free")]
    DeviceMemory {
        /// What was asked for.
        need_bytes: u64,
        /// What the driver says is free.
        free_bytes: u64,
    },
}
