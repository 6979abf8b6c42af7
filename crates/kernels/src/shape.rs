//! Rows and columns of a row-major matrix, with checked element counts.

use std::fmt;

use crate::{Dtype, KernelError, Result};

/// The shape of a row-major matrix; a vector of n elements is 1 x n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows, for weights the outputs.
    pub rows: usize,
    /// Columns, for weights the inputs.
    pub cols: usize,
}

impl Shape {
    /// The element count.
    pub fn len(self) -> Result<usize> {
        self.rows.checked_mul(self.cols).ok_or(KernelError::ShapeOverflow { shape: self })
    }

    /// Whether there is no element.
    pub fn is_empty(self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// The byte count in `dtype`.
    pub fn bytes(self, dtype: Dtype) -> Result<usize> {
        self.len()?.checked_mul(dtype.bytes()).ok_or(KernelError::ShapeOverflow { shape: self })
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Shape {
        Shape { rows: self.cols, cols: self.rows }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.rows, self.cols)
    }
}
