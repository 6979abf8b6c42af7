//! Panels of the difference: a few rows of both sides widened, scaled and subtracted, and their sums.
//!
//! An element is `aligned - degraded` in f32 of the widened (and scaled) values, in f64 where a side is f64, rounded
//! once. Rows are summed in eight interleaved parts, panel by panel.

use super::LaneSum;
use crate::weights::{Weights, blame};
use crate::{DeltaStats, Dtype, KernelError, Result, Shape, Side};

/// Elements widened at a time; the buffers stay in the first cache.
const CHUNK: usize = 1024;

/// Two sides of equal shape.
#[derive(Debug, Clone)]
pub struct CpuPair {
    pub(super) aligned: Weights,
    pub(super) degraded: Weights,
    pub(super) shape: Shape,
}

/// Buffers that panels of one thread use again.
#[derive(Default)]
pub(super) struct Buffers {
    aligned: Vec<u8>,
    degraded: Vec<u8>,
    a: Vec<f32>,
    d: Vec<f32>,
    power: Vec<f32>,
}

/// Sums over the panels of one group, in order.
#[derive(Default)]
pub(super) struct Sums {
    sumsq: LaneSum,
    ulp_sumsq: LaneSum,
    max_abs: f32,
    nonzero: u64,
    elements: u64,
}

impl Sums {
    pub(super) fn stats(&self) -> DeltaStats {
        DeltaStats {
            sumsq: self.sumsq.total(),
            ulp_sumsq: self.ulp_sumsq.total(),
            max_abs: self.max_abs,
            nonzero: self.nonzero,
            elements: self.elements,
        }
    }
}

/// Adds the sums of a later part.
pub(super) fn add_stats(sum: &mut DeltaStats, part: &DeltaStats) {
    sum.sumsq += part.sumsq;
    sum.ulp_sumsq += part.ulp_sumsq;
    sum.max_abs = sum.max_abs.max(part.max_abs);
    sum.nonzero += part.nonzero;
    sum.elements += part.elements;
}

impl CpuPair {
    /// Writes rows `first..first + count` of the difference to `out`, `ld` elements apart.
    #[inline(always)]
    pub(super) fn panel(
        &self,
        first: usize,
        count: usize,
        (out, ld): (&mut [f32], usize),
        buffers: &mut Buffers,
        mut sums: Option<&mut Sums>,
    ) -> Result<()> {
        let cols = self.shape.cols;
        let Buffers { aligned, degraded, a, d, power } = buffers;
        let aligned = self.aligned.rows(Side::Aligned, first, count, aligned)?;
        let degraded = self.degraded.rows(Side::Degraded, first, count, degraded)?;
        let (a_size, d_size) = (self.aligned.dtype.bytes(), self.degraded.dtype.bytes());
        let plain =
            [&self.aligned, &self.degraded].iter().all(|w| w.dtype == Dtype::Bf16 && w.scales.is_none());
        for row in 0..count {
            let a_row = &aligned[row * cols * a_size..][..cols * a_size];
            let d_row = &degraded[row * cols * d_size..][..cols * d_size];
            let out = &mut out[row * ld..][..cols];
            if plain {
                match sums.as_deref_mut() {
                    None => bf16_row(a_row, d_row, out),
                    Some(sums) => {
                        if !bf16_row_sums(a_row, d_row, out, sums) {
                            return Err(self.culprit((first + row, 0), out));
                        }
                    }
                }
                continue;
            }
            a.resize(CHUNK, 0.0);
            d.resize(CHUNK, 0.0);
            power.resize(CHUNK, 0.0);
            for start in (0..cols).step_by(CHUNK) {
                let len = CHUNK.min(cols - start);
                let a_bytes = &a_row[start * a_size..][..len * a_size];
                let d_bytes = &d_row[start * d_size..][..len * d_size];
                let at = (first + row, start);
                let out = &mut out[start..][..len];
                self.chunk(
                    at,
                    a_bytes,
                    d_bytes,
                    out,
                    (&mut a[..len], &mut d[..len], &mut power[..len]),
                    sums.as_deref_mut(),
                )?;
            }
        }
        if let Some(sums) = sums {
            sums.elements += (count * cols) as u64;
        }
        Ok(())
    }

    /// A part of one row, at (row, column).
    #[inline(always)]
    fn chunk(
        &self,
        at: (usize, usize),
        a_bytes: &[u8],
        d_bytes: &[u8],
        out: &mut [f32],
        (a, d, power): (&mut [f32], &mut [f32], &mut [f32]),
        sums: Option<&mut Sums>,
    ) -> Result<()> {
        let len = out.len();
        let (a_type, d_type) = (self.aligned.dtype, self.degraded.dtype);
        let mut nonzero = 0u64;
        let mut ulp = LaneSum::default();
        if a_type == Dtype::F64 || d_type == Dtype::F64 {
            let mut wide = ([0.0f64; CHUNK], [0.0f64; CHUNK]);
            let (a, d) = (&mut wide.0[..len], &mut wide.1[..len]);
            a_type.widen_f64(a_bytes, a);
            d_type.widen_f64(d_bytes, d);
            scale(&self.aligned, at, a, |x, s| x * f64::from(s));
            scale(&self.degraded, at, d, |x, s| x * f64::from(s));
            for i in 0..len {
                out[i] = (a[i] - d[i]) as f32;
                nonzero += u64::from(a[i] != d[i]);
            }
            if sums.is_some() {
                for (i, &x) in d.iter().enumerate() {
                    ulp.0[i % 8] += d_type.ulp_squared(x);
                }
            }
        } else {
            a_type.widen(a_bytes, a);
            d_type.widen(d_bytes, d);
            if sums.is_some() {
                powers(d_type, d, power);
                // The unit of a scaled value is that of its 8 bits, scaled.
                scale(&self.degraded, at, power, |x, s| x * s);
                ulp.squares(power);
                let (_, fraction) = d_type.exponents();
                let unit = f64::from_bits((1023 - 2 * fraction as u64) << 52);
                ulp.0.iter_mut().for_each(|sum| *sum *= unit);
            }
            scale(&self.aligned, at, a, |x, s| x * s);
            scale(&self.degraded, at, d, |x, s| x * s);
            for i in 0..len {
                out[i] = a[i] - d[i];
            }
            if sums.is_some() {
                nonzero = (0..len).map(|i| u32::from(a[i] != d[i])).sum::<u32>().into();
            }
        }
        let Some(sums) = sums else { return Ok(()) };
        let out = &*out;
        let mut sumsq = LaneSum::default();
        sumsq.squares(out);
        // Sizes are ordered as their bits are, and integers have a maximum that vectors can take.
        let max = out.iter().fold(sums.max_abs.to_bits(), |max, x| max.max(x.to_bits() & 0x7fff_ffff));
        sums.max_abs = f32::from_bits(max);
        sums.nonzero += nonzero;
        sums.sumsq.add(&sumsq);
        sums.ulp_sumsq.add(&ulp);
        // A finite f32 has a finite square in f64, so the sum tells whether any difference is not finite.
        if sumsq.0.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(self.culprit(at, out)) }
    }

    /// Names the first element of `out`, a part of one row from (row, column) on, that is not finite.
    #[cold]
    fn culprit(&self, (row, col): (usize, usize), out: &[f32]) -> KernelError {
        let at = out.iter().position(|x| !x.is_finite()).unwrap_or(0);
        blame(&self.aligned, &self.degraded, (row * self.shape.cols + col + at) as u64)
    }
}

#[inline(always)]
fn bf16_row(a: &[u8], d: &[u8], out: &mut [f32]) {
    let wide = |x: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
    for ((out, a), d) in out.iter_mut().zip(a.as_chunks::<2>().0).zip(d.as_chunks::<2>().0) {
        *out = wide(a) - wide(d);
    }
}

/// The same with sums; says whether all is finite.
#[inline(always)]
fn bf16_row_sums(a: &[u8], d: &[u8], out: &mut [f32], sums: &mut Sums) -> bool {
    const BLOCK: usize = 256;
    let (lowest, fraction) = Dtype::Bf16.exponents();
    let lowest = ((lowest + 127) as u32) << 23;
    let (mut sumsq, mut ulp) = (LaneSum::default(), LaneSum::default());
    let (mut nonzero, mut max) = (0u32, sums.max_abs.to_bits());
    let mut power = [0.0f32; BLOCK];
    // Loops of one kind each, which vector units can follow, over blocks that stay in the first cache.
    for ((a, d), out) in a.chunks(2 * BLOCK).zip(d.chunks(2 * BLOCK)).zip(out.chunks_mut(BLOCK)) {
        let power = &mut power[..out.len()];
        bf16_row(a, d, out);
        for (power, d) in power.iter_mut().zip(d.as_chunks::<2>().0) {
            let d = u32::from(u16::from_le_bytes(*d)) << 16;
            *power = f32::from_bits((d & 0x7f80_0000).max(lowest));
        }
        for &x in out.iter() {
            nonzero += u32::from(x != 0.0);
            // Sizes are ordered as their bits are, and integers have a maximum that vectors can take.
            max = max.max(x.to_bits() & 0x7fff_ffff);
        }
        sumsq.squares(out);
        ulp.squares(power);
    }
    let unit = f64::from_bits((1023 - 2 * fraction as u64) << 52);
    ulp.0.iter_mut().for_each(|sum| *sum *= unit);
    sums.nonzero += u64::from(nonzero);
    sums.max_abs = f32::from_bits(max);
    sums.sumsq.add(&sumsq);
    sums.ulp_sumsq.add(&ulp);
    // A finite f32 has a finite square in f64, so the sum tells whether any difference is not finite.
    sumsq.0.iter().all(|x| x.is_finite())
}

/// The powers of two at the head of f32 values that came from `dtype`, at least that of its lowest normal number: the
/// unit in the last place is this times a power that depends on `dtype` only.
#[inline(always)]
fn powers(dtype: Dtype, values: &[f32], out: &mut [f32]) {
    let lowest = ((dtype.exponents().0 + 127) as u32) << 23;
    for (out, x) in out.iter_mut().zip(values) {
        *out = f32::from_bits((x.to_bits() & 0x7f80_0000).max(lowest));
    }
}

#[inline(always)]
fn scale<T: Copy>(
    weights: &Weights,
    (row, col): (usize, usize),
    values: &mut [T],
    times: impl Fn(T, f32) -> T,
) {
    let Some(scales) = &weights.scales else { return };
    let mut at = 0;
    while at < values.len() {
        let run = scales.run(col + at).min(values.len() - at);
        let scale = scales.at(row, col + at);
        for x in &mut values[at..at + run] {
            *x = times(*x, scale);
        }
        at += run;
    }
}
