//! Weights as they are stored: bytes in memory, or a reader of rows for what does not fit, and the scales of 8-bit
//! formats.
//!
//! Rows are the outputs of a linear module; a reader is asked for whole rows, in any order, as often as a pass over the
//! weights is made, and has to give the same bytes each time.
//!
//! Not here: files.

use std::fmt;
use std::sync::Arc;

use crate::{Dtype, KernelError, Result, Shape, Side};

/// Reads rows of weights that are not held in memory.
pub trait RowReader: Send + Sync {
    /// Fills `out` with the stored bytes of whole rows from `first_row` on. On failure the reader keeps the reason for
    /// whoever made it.
    fn read(&self, first_row: usize, out: &mut [u8]) -> std::result::Result<(), Unreadable>;
}

/// Rows could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unreadable;

/// Where the bytes are.
#[derive(Clone)]
pub enum Rows {
    /// All of them, row-major.
    Held(Arc<dyn AsRef<[u8]> + Send + Sync>),
    /// With a reader.
    Read(Arc<dyn RowReader>),
}

/// Scales of blocks of an 8-bit matrix: a value is `f32(q) * scale`, one product rounded to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    /// One for each block, row-major.
    pub grid: Vec<f32>,
    /// Blocks side by side.
    pub grid_cols: usize,
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// Where this matrix begins in the scaled one.
    pub origin: [usize; 2],
}

impl Scales {
    /// The scale of an element.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let (row, col) = (row + self.origin[0], col + self.origin[1]);
        self.grid[row / self.block[0] * self.grid_cols + col / self.block[1]]
    }

    /// Columns from `col` on that have the scale of `col`.
    pub(crate) fn run(&self, col: usize) -> usize {
        self.block[1] - (col + self.origin[1]) % self.block[1]
    }

    fn covers(&self, shape: Shape) -> bool {
        if shape.is_empty() {
            return true;
        }
        let last = |i: usize, n: usize| {
            (self.block[i] > 0)
                .then(|| self.origin[i].checked_add(n - 1).map(|at| at / self.block[i]))
                .flatten()
        };
        match (last(0, shape.rows), last(1, shape.cols)) {
            (Some(row), Some(col)) if col < self.grid_cols => row
                .checked_mul(self.grid_cols)
                .and_then(|at| at.checked_add(col))
                .is_some_and(|at| at < self.grid.len()),
            _ => false,
        }
    }
}

/// Stored weights of a matrix.
#[derive(Clone)]
pub struct Weights {
    pub(crate) rows: Rows,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Shape,
    pub(crate) scales: Option<Arc<Scales>>,
}

impl Weights {
    /// Weights in memory; the length is checked against `shape`.
    pub fn held(bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, dtype: Dtype, shape: Shape) -> Result<Weights> {
        let (need, found) = (shape.bytes(dtype)?, (*bytes).as_ref().len());
        if need != found {
            return Err(KernelError::Length { what: "bytes of weights", shape, need, found });
        }
        Ok(Weights { rows: Rows::Held(bytes), dtype, shape, scales: None })
    }

    /// A copy of these bytes.
    pub fn copied(bytes: &[u8], dtype: Dtype, shape: Shape) -> Result<Weights> {
        Self::held(Arc::new(bytes.to_vec()), dtype, shape)
    }

    /// Weights that are read as they are needed.
    pub fn read(reader: Arc<dyn RowReader>, dtype: Dtype, shape: Shape) -> Result<Weights> {
        shape.bytes(dtype)?;
        Ok(Weights { rows: Rows::Read(reader), dtype, shape, scales: None })
    }

    /// The same with scales, which have to cover the shape.
    pub fn scaled(self, scales: Scales) -> Result<Weights> {
        if !scales.covers(self.shape) {
            let need = self.shape.rows.div_ceil(scales.block[0].max(1))
                * self.shape.cols.div_ceil(scales.block[1].max(1));
            return Err(KernelError::Length {
                what: "scales",
                shape: self.shape,
                need,
                found: scales.grid.len(),
            });
        }
        Ok(Weights { scales: Some(Arc::new(scales)), ..self })
    }

    /// Rows and columns.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The bytes of `count` rows, in `buffer` if they had to be read.
    pub(crate) fn rows<'a>(
        &'a self,
        side: Side,
        first: usize,
        count: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let size = self.shape.cols * self.dtype.bytes();
        match &self.rows {
            Rows::Held(bytes) => Ok(&(**bytes).as_ref()[first * size..(first + count) * size]),
            Rows::Read(_) => {
                buffer.resize(count * size, 0);
                self.read_rows(side, first, buffer)?;
                Ok(buffer)
            }
        }
    }

    /// Fills `out` with the bytes of whole rows.
    pub(crate) fn read_rows(&self, side: Side, first: usize, out: &mut [u8]) -> Result<()> {
        match &self.rows {
            Rows::Held(bytes) => {
                let size = self.shape.cols * self.dtype.bytes();
                out.copy_from_slice(&(**bytes).as_ref()[first * size..][..out.len()]);
                Ok(())
            }
            Rows::Read(reader) => {
                reader.read(first, out).map_err(|Unreadable| KernelError::Unread { side, first_row: first })
            }
        }
    }
}

/// Says on which side the element is that makes a difference infinite or NaN.
#[cold]
pub(crate) fn blame(aligned: &Weights, degraded: &Weights, index: u64) -> KernelError {
    let cols = aligned.shape.cols.max(1) as u64;
    let (row, col) = ((index / cols) as usize, (index % cols) as usize);
    for (side, weights) in [(Side::Aligned, aligned), (Side::Degraded, degraded)] {
        let mut buffer = Vec::new();
        let bytes = match weights.rows(side, row, 1, &mut buffer) {
            Ok(bytes) => bytes,
            Err(error) => return error,
        };
        let size = weights.dtype.bytes();
        let mut x = [0.0];
        weights.dtype.widen_f64(&bytes[col * size..][..size], &mut x);
        if !x[0].is_finite() {
            return KernelError::NonFinite { side, index };
        }
    }
    KernelError::Overflow { what: "delta", index }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = if matches!(self.rows, Rows::Held(_)) { "held" } else { "read" };
        write!(f, "Weights({} {:?}, {held})", self.shape, self.dtype)
    }
}
