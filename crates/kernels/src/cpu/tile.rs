//! The innermost loops: small tiles of a product held in registers.
//!
//! Three products over a panel of f32 differences (a few rows, in the second cache), for any vector width:
//! `forward` (`Y += D Z`, both read along the columns), `backward` (`W^T += Y^T D`, one pass over the rows) and `chain`
//! (`S = fma(B[i,k], A[k,j], S)` over ascending k). Tiles are 8 x 3, 12 x 2 vectors and 6 x 4 vectors where there are 32
//! registers, and half of that where there are 16. An element's order of additions depends on the vector width only.
//!
//! Strides (`ld`) count elements and are multiples of [`ALIGN`]; what lies between the columns and the stride is zero.

#![allow(clippy::needless_range_loop)] // plain indices: arrays of vectors are then unrolled into registers

use pulp::Simd;

/// Columns are padded to a multiple of this: two vectors of 16.
pub(super) const ALIGN: usize = 32;
/// Rows of a panel are padded to a multiple of this.
pub(super) const ROWS: usize = 8;
/// Columns that `forward` takes at a time: eight rows of them fill half of a first cache of 32 KB.
const DEPTH: usize = 512;

/// f32s that start at a cache line.
#[derive(Clone, Default)]
pub(super) struct Lines(Vec<Line>);

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Lines {
    /// Zeros, `len` of them or some more.
    pub(super) fn zeros(len: usize) -> Lines {
        Lines(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    /// Room for `len`, old contents anywhere in it.
    pub(super) fn reserve(&mut self, len: usize) {
        if self.0.len() < len.div_ceil(16) {
            self.0.resize(len.div_ceil(16), Line([0.0; 16]));
        }
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    pub(super) fn as_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// A stride for `cols` columns: aligned, and not one that puts all rows into the same places of a cache.
pub(super) fn stride(cols: usize) -> usize {
    let padded = cols.next_multiple_of(ALIGN);
    if padded.is_multiple_of(256) { padded + ALIGN } else { padded }
}

/// `Y += D Z`: `d` is `rows` x `cols` (rows a multiple of [`ROWS`], columns of [`ALIGN`]), `zt` is Z transposed, `l` x
/// `cols`, and `y` is `rows` x `l` without padding.
#[inline(always)]
pub(super) fn forward<S: Simd>(
    simd: S,
    (rows, cols, l): (usize, usize, usize),
    (d, ld): (&[f32], usize),
    (zt, ldz): (&[f32], usize),
    y: &mut [f32],
) {
    assert!(rows.is_multiple_of(ROWS) && cols.is_multiple_of(ALIGN) && cols <= ld && cols <= ldz);
    assert!(rows * ld <= d.len() && l * ldz <= zt.len() && rows * l <= y.len());
    let tall = S::REGISTER_COUNT >= 32;
    for start in (0..cols).step_by(DEPTH) {
        let depth = DEPTH.min(cols - start);
        for row in (0..rows).step_by(ROWS) {
            let mut j = 0;
            while j < l {
                let width = (l - j).min(3);
                // SAFETY: rows row..row + 8 and columns start..start + depth of `d`, rows j..j + width and the same
                // columns of `zt`, and elements (row.., j..) of `y` lie inside their slices by the asserts above.
                unsafe {
                    let d = d.as_ptr().add(row * ld + start);
                    let z = zt.as_ptr().add(j * ldz + start);
                    let y = y.as_mut_ptr().add(row * l + j);
                    match (tall, width) {
                        (true, 3) => dot::<S, 8, 3>(simd, depth, d, ld, z, ldz, y, l),
                        (true, 2) => dot::<S, 8, 2>(simd, depth, d, ld, z, ldz, y, l),
                        (true, _) => dot::<S, 8, 1>(simd, depth, d, ld, z, ldz, y, l),
                        (false, 3) => {
                            dot::<S, 4, 3>(simd, depth, d, ld, z, ldz, y, l);
                            dot::<S, 4, 3>(simd, depth, d.add(4 * ld), ld, z, ldz, y.add(4 * l), l);
                        }
                        (false, 2) => dot::<S, 8, 2>(simd, depth, d, ld, z, ldz, y, l),
                        (false, _) => dot::<S, 8, 1>(simd, depth, d, ld, z, ldz, y, l),
                    }
                }
                j += width;
            }
        }
    }
}

/// `W^T += Y^T D`: `d` and `y` as for [`forward`] but any number of rows, `wt` is `l` x `cols`.
#[inline(always)]
pub(super) fn backward<S: Simd>(
    simd: S,
    (rows, cols, l): (usize, usize, usize),
    (d, ld): (&[f32], usize),
    y: &[f32],
    (wt, ldw): (&mut [f32], usize),
) {
    assert!(cols.is_multiple_of(ALIGN) && cols <= ld && cols <= ldw);
    assert!(rows * ld <= d.len() && l * ldw <= wt.len() && rows * l <= y.len());
    assert!(ALIGN.is_multiple_of(2 * S::F32_LANES));
    for col in (0..cols).step_by(2 * S::F32_LANES) {
        let mut j = 0;
        while j < l {
            // SAFETY: columns col..col + 2 vectors of all rows of `d`, columns j..j + J of `y`, and rows j..j + J, the
            // same columns, of `wt` lie inside their slices by the asserts above.
            unsafe {
                let d = d.as_ptr().add(col);
                let y = y.as_ptr().add(j);
                let w = wt.as_mut_ptr().add(j * ldw + col);
                j += match (S::REGISTER_COUNT >= 32, l - j) {
                    (true, 12..) => outer::<S, 12>(simd, rows, d, ld, y, l, w, ldw),
                    (_, 6..) => outer::<S, 6>(simd, rows, d, ld, y, l, w, ldw),
                    (_, 4..) => outer::<S, 4>(simd, rows, d, ld, y, l, w, ldw),
                    (_, 2..) => outer::<S, 2>(simd, rows, d, ld, y, l, w, ldw),
                    _ => outer::<S, 1>(simd, rows, d, ld, y, l, w, ldw),
                };
            }
        }
    }
}

/// `S = fma(B[i,k], A[k,j], S)` over ascending k: `s` and `a` are `rows` x `cols` and `rank` x `cols`, `b` is `rows` x
/// `rank` without padding, and `T` is f32 or f64.
#[inline(always)]
pub(super) fn chain<S: Simd, T: Lane<S>>(
    simd: S,
    (rows, cols, rank): (usize, usize, usize),
    b: &[T],
    (a, lda): (&[T], usize),
    (s, lds): (&mut [T], usize),
) {
    assert!(cols.is_multiple_of(ALIGN) && cols <= lda && cols <= lds);
    // The last row may end with its columns, because a block of columns may begin anywhere in the first.
    let holds = |rows: usize, ld: usize, len: usize| rows == 0 || (rows - 1) * ld + cols <= len;
    assert!(rows * rank <= b.len() && holds(rank, lda, a.len()) && holds(rows, lds, s.len()));
    let width = 2 * T::lanes();
    assert!(ALIGN.is_multiple_of(width));
    let tall = S::REGISTER_COUNT >= 32;
    for col in (0..cols).step_by(width) {
        let mut row = 0;
        while row < rows {
            // SAFETY: rows row..row + I of `b` and of `s`, all of `a`, each at columns col..col + 2 vectors, lie inside
            // their slices by the asserts above.
            unsafe {
                let b = b.as_ptr().add(row * rank);
                let a = a.as_ptr().add(col);
                let s = s.as_mut_ptr().add(row * lds + col);
                row += match (tall, rows - row) {
                    (true, 12..) => fma::<S, T, 12>(simd, rank, b, a, lda, s, lds),
                    (_, 6..) => fma::<S, T, 6>(simd, rank, b, a, lda, s, lds),
                    (_, 3..) => fma::<S, T, 3>(simd, rank, b, a, lda, s, lds),
                    _ => fma::<S, T, 1>(simd, rank, b, a, lda, s, lds),
                };
            }
        }
    }
}

/// The numbers that [`chain`] works on.
pub(super) trait Lane<S: Simd>: Copy {
    type Vector: Copy;
    fn lanes() -> usize {
        size_of::<Self::Vector>() / size_of::<Self>()
    }
    fn splat(simd: S, x: Self) -> Self::Vector;
    fn mul_add(simd: S, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
}

impl<S: Simd> Lane<S> for f32 {
    type Vector = S::f32s;
    #[inline(always)]
    fn splat(simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }
    #[inline(always)]
    fn mul_add(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_f32s(a, b, c)
    }
}

impl<S: Simd> Lane<S> for f64 {
    type Vector = S::f64s;
    #[inline(always)]
    fn splat(simd: S, x: f64) -> S::f64s {
        simd.splat_f64s(x)
    }
    #[inline(always)]
    fn mul_add(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_f64s(a, b, c)
    }
}

/// `I` rows of `d` against `J` rows of `z`, over `depth` columns; added to `y`.
///
/// # Safety
/// `d` has `I` rows and `z` has `J` rows of `depth` readable elements, at their strides; `y` has `I` rows of `J`
/// writable ones at stride `ldy`; `depth` is a multiple of the vector width.
#[inline(always)]
unsafe fn dot<S: Simd, const I: usize, const J: usize>(
    simd: S,
    depth: usize,
    d: *const f32,
    ld: usize,
    z: *const f32,
    ldz: usize,
    y: *mut f32,
    ldy: usize,
) {
    let mut sums = [[simd.splat_f32s(0.0); J]; I];
    let mut at = 0;
    while at < depth {
        let mut right = [simd.splat_f32s(0.0); J];
        for j in 0..J {
            // SAFETY: at + one vector <= depth, inside row j.
            right[j] = unsafe { z.add(j * ldz + at).cast::<S::f32s>().read_unaligned() };
        }
        for i in 0..I {
            // SAFETY: at + one vector <= depth, inside row i.
            let left = unsafe { d.add(i * ld + at).cast::<S::f32s>().read_unaligned() };
            for j in 0..J {
                sums[i][j] = simd.mul_add_f32s(left, right[j], sums[i][j]);
            }
        }
        at += S::F32_LANES;
    }
    for i in 0..I {
        for j in 0..J {
            // SAFETY: element (i, j) of `y`.
            unsafe { *y.add(i * ldy + j) += simd.reduce_sum_f32s(sums[i][j]) };
        }
    }
}

/// `J` columns of `y` against two vectors of columns of `d`, over `rows` rows; added to `w`. Returns `J`.
///
/// # Safety
/// `d` and `y` have `rows` rows of two vectors and of `J` readable elements, at their strides; `w` has `J` rows of two
/// writable vectors at stride `ldw`.
#[inline(always)]
unsafe fn outer<S: Simd, const J: usize>(
    simd: S,
    rows: usize,
    d: *const f32,
    ld: usize,
    y: *const f32,
    ldy: usize,
    w: *mut f32,
    ldw: usize,
) -> usize {
    let mut sums = [[simd.splat_f32s(0.0); 2]; J];
    for row in 0..rows {
        // SAFETY: two vectors of row `row` of `d`.
        let right = unsafe {
            let d = d.add(row * ld).cast::<S::f32s>();
            [d.read_unaligned(), d.add(1).read_unaligned()]
        };
        for j in 0..J {
            // SAFETY: element (row, j) of `y`.
            let left = simd.splat_f32s(unsafe { *y.add(row * ldy + j) });
            for v in 0..2 {
                sums[j][v] = simd.mul_add_f32s(left, right[v], sums[j][v]);
            }
        }
    }
    for j in 0..J {
        for v in 0..2 {
            // SAFETY: vector v of row j of `w`.
            unsafe {
                let w = w.add(j * ldw).cast::<S::f32s>().add(v);
                w.write_unaligned(simd.add_f32s(w.read_unaligned(), sums[j][v]));
            }
        }
    }
    J
}

/// `I` rows of `s`, two vectors wide, through the chain over `rank`. Returns `I`.
///
/// # Safety
/// `b` has `I` rows of `rank` readable elements without padding, `a` has `rank` rows of two readable vectors at stride
/// `lda`, `s` has `I` rows of two writable vectors at stride `lds`.
#[inline(always)]
unsafe fn fma<S: Simd, T: Lane<S>, const I: usize>(
    simd: S,
    rank: usize,
    b: *const T,
    a: *const T,
    lda: usize,
    s: *mut T,
    lds: usize,
) -> usize {
    // SAFETY: two vectors of the first row of `s`.
    let mut sums = [unsafe { [s.cast::<T::Vector>().read_unaligned(); 2] }; I];
    for i in 0..I {
        for v in 0..2 {
            // SAFETY: vector v of row i of `s`.
            sums[i][v] = unsafe { s.add(i * lds).cast::<T::Vector>().add(v).read_unaligned() };
        }
    }
    for k in 0..rank {
        // SAFETY: two vectors of row k of `a`.
        let right = unsafe {
            let a = a.add(k * lda).cast::<T::Vector>();
            [a.read_unaligned(), a.add(1).read_unaligned()]
        };
        for i in 0..I {
            // SAFETY: element (i, k) of `b`.
            let left = T::splat(simd, unsafe { *b.add(i * rank + k) });
            for v in 0..2 {
                sums[i][v] = T::mul_add(simd, left, right[v], sums[i][v]);
            }
        }
    }
    for i in 0..I {
        for v in 0..2 {
            // SAFETY: vector v of row i of `s`.
            unsafe { s.add(i * lds).cast::<T::Vector>().add(v).write_unaligned(sums[i][v]) };
        }
    }
    I
}
