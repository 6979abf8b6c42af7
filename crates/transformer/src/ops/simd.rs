//! Loops with the widest vectors that the machine has.
//!
//! The compiler turns plain loops over elements into vectors of whatever width is allowed; no sum changes its order, so the
//! bits are the same at every width.

use pulp::Arch;

/// Runs `f` as compiled for this machine. Whatever it calls must be inlined into it.
#[inline(always)]
pub(crate) fn wide<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(f)
}

/// e^x without a call, so that a loop over it becomes vectors: relative error below 2e-7 in [-87, 88], the ends of which it
/// keeps to beyond them, so that neither infinity nor a subnormal number comes of it.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of few bits, so that n times it is exact.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // The Taylor polynomial of degree 7: its remainder is below r^8 / 8! = 5e-9.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^n by its exponent's bits, which stand in the low bits of `shifted`.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

/// `Σ a b` in eight lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (ca, cb) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ca.zip(cb) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `Σ a` in eight lanes.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let chunks = a.chunks_exact(8);
    let tail: f32 = chunks.remainder().iter().sum();
    for a in chunks {
        for i in 0..8 {
            lanes[i] += a[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Columns of a matrix that [`row_times`] takes at a time.
pub(crate) const BLOCK: usize = 16;

/// `[n, d]`, transposed: blocks of [`BLOCK`] columns one after another, each `[d, BLOCK]`, the last filled up with zeros.
#[inline(always)]
pub(crate) fn transposed_in_blocks(x: &[f32], d: usize) -> Vec<f32> {
    let n = x.len() / d;
    let mut out = vec![0f32; n.next_multiple_of(BLOCK) * d];
    for (rows, block) in x.chunks(BLOCK * d).zip(out.chunks_exact_mut(BLOCK * d)) {
        for (i, row) in rows.chunks_exact(d).enumerate() {
            for (to, from) in block[i..].iter_mut().step_by(BLOCK).zip(row) {
                *to = *from;
            }
        }
    }
    out
}

/// `out[j] = Σ_c x[c] m[c, j]` for the columns `from..to` of a matrix as [`transposed_in_blocks`] gives it, each sum in the order of `c`.
/// Columns are taken in whole blocks, so that some outside of the range are written, too: `out` holds a whole number of blocks.
#[inline(always)]
pub(crate) fn row_times(out: &mut [f32], x: &[f32], m: &[f32], from: usize, to: usize) {
    for block in from / BLOCK..to.div_ceil(BLOCK) {
        let mut sums = [0f32; BLOCK];
        let columns = &m[block * BLOCK * x.len()..][..BLOCK * x.len()];
        for (x, row) in x.iter().zip(columns.chunks_exact(BLOCK)) {
            for (s, m) in sums.iter_mut().zip(row) {
                *s += x * m;
            }
        }
        out[block * BLOCK..][..BLOCK].copy_from_slice(&sums);
    }
}

/// `out += a x`.
#[inline(always)]
pub(crate) fn axpy(out: &mut [f32], a: f32, x: &[f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o += a * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_f64_to_single_precision() {
        let mut worst = 0f64;
        for i in 0..=1_750_000 {
            let x = -87.0 + 1e-4 * i as f32;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1.7e-38 && exp(1e9).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_rows_are_those_of_f64() {
        let x: Vec<f32> = (0..403).map(|i| (i as f32 * 0.37).sin()).collect();
        let y: Vec<f32> = (0..403).map(|i| (i as f32 * 0.11).cos()).collect();
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (wx, wy) = (wide(&x), wide(&y));
        assert!((f64::from(sum(&x)) - wx.iter().sum::<f64>()).abs() < 1e-4);
        let want: f64 = wx.iter().zip(&wy).map(|(x, y)| x * y).sum();
        assert!((f64::from(dot(&x, &y)) - want).abs() < 1e-4);
        // 21 rows of 5, the last block not full.
        let (mut out, m) = (vec![7f32; 32], transposed_in_blocks(&y[..105], 5));
        row_times(&mut out, &x[..5], &m, 17, 21);
        for j in 17..21 {
            let want: f64 = (0..5).map(|c| wx[c] * wy[j * 5 + c]).sum();
            assert!((f64::from(out[j]) - want).abs() < 1e-5, "column {j}");
        }
        assert_eq!(out[21..], [0f32; 11]);
        assert_eq!(out[..16], [7f32; 16]);
    }

    #[inline(always)]
    fn all(x: &[f32]) -> (u32, u32, Vec<f32>, Vec<f32>) {
        let e: Vec<f32> = x.iter().map(|&x| exp(x)).collect();
        let (mut y, mut z) = (x.to_vec(), vec![0f32; 48]);
        axpy(&mut y, 0.3, &e);
        row_times(&mut z, &x[..20], &transposed_in_blocks(&e[..960], 20), 17, 40);
        (dot(x, &e).to_bits(), sum(x).to_bits(), y, z)
    }

    #[test]
    fn bits_are_the_same_at_every_width() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
        let at_width = wide(
            #[inline(always)]
            || all(&x),
        );
        assert_eq!(all(&x), at_width);
    }
}
