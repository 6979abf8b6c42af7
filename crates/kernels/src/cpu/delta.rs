//! The difference of two stored matrices and its sums, one read of each.

use rayon::prelude::*;

use super::{CpuMatrix, CpuRaw, LaneSum, PANEL};
use crate::{DeltaStats, Dtype, KernelError, Result, Side};

/// Elements widened at a time; the buffers stay in the first cache.
const CHUNK: usize = 1024;

/// `aligned - degraded` of equal shapes.
pub(super) fn delta(aligned: &CpuRaw, degraded: &CpuRaw) -> Result<(CpuMatrix, DeltaStats)> {
    let mut out = CpuMatrix::zeros(aligned.shape)?;
    let panel = (PANEL * aligned.shape.cols).max(1);
    let panels: Vec<DeltaStats> = out
        .data
        .par_chunks_mut(panel)
        .enumerate()
        .map(|(i, out)| panel_delta(aligned, degraded, i * panel, out))
        .collect::<Vec<Result<DeltaStats>>>()
        .into_iter()
        .collect::<Result<_>>()?;
    let mut stats = DeltaStats::default();
    for panel in panels {
        stats.sumsq += panel.sumsq;
        stats.ulp_sumsq += panel.ulp_sumsq;
        stats.max_abs = stats.max_abs.max(panel.max_abs);
        stats.nonzero += panel.nonzero;
        stats.elements += panel.elements;
    }
    Ok((out, stats))
}

fn panel_delta(aligned: &CpuRaw, degraded: &CpuRaw, start: usize, out: &mut [f32]) -> Result<DeltaStats> {
    let wide = aligned.dtype == Dtype::F64 || degraded.dtype == Dtype::F64;
    let elements = out.len() as u64;
    let (mut sumsq, mut ulp_sumsq) = (LaneSum::default(), LaneSum::default());
    let (mut max_abs, mut nonzero) = (0.0f32, 0u64);
    let (mut a, mut d) = (vec![0.0f64; CHUNK], vec![0.0f64; CHUNK]);
    let (mut a32, mut d32) = (vec![0.0f32; CHUNK], vec![0.0f32; CHUNK]);
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        let first = start + chunk * CHUNK;
        let len = out.len();
        let (a_bytes, d_bytes) = (bytes(aligned, first, len), bytes(degraded, first, len));
        if wide {
            let (a, d) = (&mut a[..len], &mut d[..len]);
            aligned.dtype.widen_f64(a_bytes, a);
            degraded.dtype.widen_f64(d_bytes, d);
            for i in 0..len {
                out[i] = (a[i] - d[i]) as f32;
                nonzero += u64::from(a[i] != d[i]);
            }
            ulp_sumsq.extend(len, |i| degraded.dtype.ulp_squared(d[i]));
        } else {
            let (a, d) = (&mut a32[..len], &mut d32[..len]);
            aligned.dtype.widen(a_bytes, a);
            degraded.dtype.widen(d_bytes, d);
            for i in 0..len {
                out[i] = a[i] - d[i];
                nonzero += u64::from(a[i] != d[i]);
            }
            ulp_sumsq.extend(len, |i| degraded.dtype.ulp_squared(f64::from(d[i])));
        }
        sumsq.extend(len, |i| f64::from(out[i]) * f64::from(out[i]));
        max_abs = out.iter().fold(max_abs, |max, x| max.max(x.abs()));
        // A finite f32 has a finite square in f64, so the sum tells whether any difference is not finite.
        if !sumsq.0.iter().all(|x| x.is_finite()) {
            return Err(culprit(aligned, degraded, first, out));
        }
    }
    Ok(DeltaStats { sumsq: sumsq.total(), ulp_sumsq: ulp_sumsq.total(), max_abs, nonzero, elements })
}

fn bytes(raw: &CpuRaw, first: usize, len: usize) -> &[u8] {
    let size = raw.dtype.bytes();
    &raw.bytes[first * size..(first + len) * size]
}

/// Names the first element whose difference is not finite.
fn culprit(aligned: &CpuRaw, degraded: &CpuRaw, first: usize, out: &[f32]) -> KernelError {
    let at = first + out.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let index = at as u64;
    for (side, raw) in [(Side::Aligned, aligned), (Side::Degraded, degraded)] {
        let mut x = [0.0];
        raw.dtype.widen_f64(bytes(raw, at, 1), &mut x);
        if !x[0].is_finite() {
            return KernelError::NonFinite { side, index };
        }
    }
    KernelError::Overflow { what: "delta", index }
}
