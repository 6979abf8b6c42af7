//! The operations that an engine offers.
//!
//! Operands are handles that stay where the engine keeps them; what comes back to the host is small (l x l matrices,
//! sums) or is asked for by name (`read`, `pack`, the fused weights). Matrices are f32 and row-major.
//!
//! A call may queue its work; whatever comes back to the host is complete when the call returns.

use crate::{Dtype, KernelError, Result, Shape, Weights};

/// What one pass over a pair of weights finds out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeltaStats {
    /// Sum of the squared differences.
    pub sumsq: f64,
    /// Sum of the squared units in the last place of the degraded weights, in their own format.
    pub ulp_sumsq: f64,
    /// The largest difference in absolute value.
    pub max_abs: f32,
    /// Elements that differ.
    pub nonzero: u64,
    /// Elements.
    pub elements: u64,
}

/// What an addition to weights did to them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AddStats {
    /// Elements whose stored value is another one now.
    pub changed: u64,
    /// Sum of the squares of what was to be added.
    pub intended_sumsq: f64,
    /// Sum of the squares of what was added once rounded.
    pub realised_sumsq: f64,
}

/// Memory of the host that an engine takes weights from.
pub trait HostBytes: AsRef<[u8]> + AsMut<[u8]> + Send + Sync {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> HostBytes for T {}

/// Such memory, owned.
pub type HostBuffer = Box<dyn HostBytes>;

/// What an engine wants of whoever feeds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Threads that may call at once to good effect.
    pub callers: usize,
    /// Threads that read for it.
    pub readers: usize,
    /// Bytes of weights under way at most, if the engine's own memory is the limit.
    pub bytes: Option<u64>,
}

/// Arithmetic on weights, on one kind of device.
pub trait Engine: Send + Sync {
    /// A difference of stored weights, `D`, which need not exist as a matrix.
    type Pair: Send + Sync;
    /// An f32 matrix, row-major.
    type Matrix: Send + Sync;

    /// What people call this engine.
    fn name(&self) -> String;

    /// What it wants of whoever feeds it.
    fn demand(&self) -> Demand;

    /// Memory of the host from which weights get to the engine fastest, with anything in it; nothing where any memory is as
    /// good, or none is to be had.
    fn buffer(&self, len: usize) -> Option<HostBuffer> {
        let _ = len;
        None
    }

    /// Takes two sides of equal shape over.
    fn pair(&self, aligned: Weights, degraded: Weights) -> Result<Self::Pair>;

    /// The shape of a difference.
    fn pair_shape(&self, pair: &Self::Pair) -> Shape;

    /// Takes a matrix over; the length is checked against `shape`.
    fn matrix(&self, data: &[f32], shape: Shape) -> Result<Self::Matrix>;

    /// Hands a matrix back.
    fn read(&self, matrix: &Self::Matrix) -> Result<Vec<f32>>;

    /// The shape of a matrix.
    fn shape(&self, matrix: &Self::Matrix) -> Shape;

    /// Matrices of equal row counts side by side.
    fn beside(&self, matrices: &[&Self::Matrix]) -> Result<Self::Matrix>;

    /// `D` as a matrix, `aligned - degraded` rounded once to f32, and its sums. A NaN or Inf on either side is an error.
    fn delta(&self, pair: &Self::Pair) -> Result<(Self::Matrix, DeltaStats)>;

    /// The sums alone.
    fn stats(&self, pair: &Self::Pair) -> Result<DeltaStats>;

    /// The random integers of [`sketch_entry`](crate::sketch_entry); neither side of `shape` may pass `u32::MAX`.
    fn sketch(&self, shape: Shape, seed: u64, key: u64) -> Result<Self::Matrix>;

    /// `D^T Q`, in f32.
    fn back(&self, pair: &Self::Pair, q: &Self::Matrix) -> Result<Self::Matrix>;

    /// `Y = D Z` and `D^T Y`, in f32, in one read of the weights. With `stats`, the sums too, and a NaN or Inf is an
    /// error; without, weights are taken to be finite.
    fn sweep(
        &self,
        pair: &Self::Pair,
        z: &Self::Matrix,
        stats: Option<&mut DeltaStats>,
    ) -> Result<(Self::Matrix, Self::Matrix)>;

    /// `A B`, or `A^T B`, in f32.
    fn gemm(&self, a: &Self::Matrix, a_transposed: bool, b: &Self::Matrix) -> Result<Self::Matrix>;

    /// `Y^T Y` with products and sums in f64, row-major; exactly symmetric.
    fn gram(&self, y: &Self::Matrix) -> Result<Vec<f64>>;

    /// `Y W` with products and sums in f64, rounded once to f32; `w` is row-major with `cols` columns.
    fn apply_right(&self, y: &Self::Matrix, w: &[f64], cols: usize) -> Result<Self::Matrix>;

    /// The sum of the squares of `D - B A`, in f64. An element is the chain `s = fma(-B[i,k], A[k,j], s)` over ascending
    /// `k`, from `D[i,j]`: in f32, unless its roundings may add more than 1e-6 of the result, in which case in f64.
    fn residual(&self, pair: &Self::Pair, b: &Self::Matrix, a: &Self::Matrix) -> Result<f64>;

    /// Adds `c_1 B_1 A_1 + c_2 B_2 A_2 + ...` to stored weights in place, with one rounding to their format.
    ///
    /// An element becomes `round(f32(w) + s)`, where `s` is the chain `s = fma(c B[i,k], A[k,j], s)` from 0 over
    /// ascending `k` through all terms, and `c B[i,k]` is rounded once to f32 (f64 weights are added in f64). Where `s`
    /// is 0 the stored bits are kept. Bit for bit the same on every engine. A sum beyond the format's range is an error,
    /// and then the weights are worth nothing.
    fn add_low_rank(
        &self,
        w: &mut [u8],
        dtype: Dtype,
        shape: Shape,
        terms: &[(f32, &Self::Matrix, &Self::Matrix)],
    ) -> Result<AddStats>;

    /// A matrix in `dtype`, little-endian, rounded to nearest even. A value beyond the range is an error.
    fn pack(&self, matrix: &Self::Matrix, dtype: Dtype) -> Result<Vec<u8>>;
}

/// Refuses factors that do not make a product of this shape.
pub(crate) fn check_factors(what: &'static str, shape: Shape, b: Shape, a: Shape) -> Result<()> {
    if b.cols != a.rows {
        return Err(KernelError::ShapeMismatch { what, left: b, right: a });
    }
    same_shape(what, shape, Shape { rows: b.rows, cols: a.cols })
}

/// Refuses operands of different shapes.
pub(crate) fn same_shape(what: &'static str, left: Shape, right: Shape) -> Result<()> {
    if left == right { Ok(()) } else { Err(KernelError::ShapeMismatch { what, left, right }) }
}

/// Whether a residual of f32 chains is good enough, from the squared norms of the factors and of what was found.
///
/// No step of a chain is larger than all its products and its end together; each rounds by half an epsilon of that or less,
/// one way as often as the other, so the squares of the errors add to the result and nothing else does.
pub(crate) fn f32_chains_do(found: f64, rank: usize, b_sumsq: f64, a_sumsq: f64) -> bool {
    let largest = b_sumsq * a_sumsq + found;
    let error = rank as f64 * (f64::from(f32::EPSILON) / 2.0).powi(2) * largest;
    error <= RESIDUAL_ERROR * found
}

/// The share of a residual that roundings of its f32 elements may add.
const RESIDUAL_ERROR: f64 = 1e-6;
