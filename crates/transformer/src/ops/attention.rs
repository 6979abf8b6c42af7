//! Causal softmax attention: grouped key heads, padding in front, a sliding window.

use super::simd::{BLOCK, axpy, dot, exp, row_times, sum, transposed_in_blocks, wide};
use super::{own, read, view};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

struct Attention {
    starts: Arc<Vec<u32>>,
    window: usize,
}

#[derive(Clone, Copy)]
struct Dims {
    t: usize,
    s: usize,
    h: usize,
    g: usize,
    d: usize,
}

impl Dims {
    fn of(q: &Shape, k: &Shape) -> Result<(usize, Self)> {
        let (b, t, h, d) = q.dims4()?;
        let (bk, s, g, dk) = k.dims4()?;
        if b != bk || d != dk || g == 0 || h % g != 0 || s < t {
            bail!("attention: q {q:?} does not fit k {k:?}");
        }
        Ok((b, Self { t, s, h, g, d }))
    }

    /// Rows of head `head` gathered as `[len, d]` from `[len, heads, d]`.
    #[inline(always)]
    fn gather(x: &[f32], heads: usize, head: usize, d: usize) -> Vec<f32> {
        let mut out = vec![0f32; x.len() / heads];
        for (out, row) in out.chunks_exact_mut(d).zip(x.chunks_exact(heads * d)) {
            out.copy_from_slice(&row[head * d..(head + 1) * d]);
        }
        out
    }

    /// Places for all keys in whole blocks.
    fn width(&self) -> usize {
        self.s.next_multiple_of(BLOCK)
    }

    /// The keys that query `i` sees: the `window` last ones, itself included, but none before `start`.
    #[inline(always)]
    fn seen(&self, i: usize, start: usize, window: usize) -> Range<usize> {
        let last = self.s - self.t + i;
        // A padding row sees itself, so that nothing divides by zero; nobody reads it.
        start.max((last + 1).saturating_sub(window)).min(last)..last + 1
    }

    /// Softmax weights of query `q` over the keys `seen`, written there to `p`; what `p` holds elsewhere is nothing.
    #[inline(always)]
    fn weights(&self, q: &[f32], kt: &[f32], seen: &Range<usize>, p: &mut [f32]) {
        row_times(p, q, kt, seen.start, seen.end);
        let seen = &mut p[seen.clone()];
        let scale = 1.0 / (self.d as f32).sqrt();
        let max = seen.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)) * scale;
        for p in seen.iter_mut() {
            *p = exp(*p * scale - max);
        }
        let sum = sum(seen);
        for p in seen.iter_mut() {
            *p /= sum;
        }
    }

    /// One row of the batch.
    #[inline(always)]
    fn forward(&self, out: &mut [f32], (q, k, v): (&[f32], &[f32], &[f32]), start: usize, window: usize) {
        let mut p = vec![0f32; self.width()];
        for group in 0..self.g {
            let kt = transposed_in_blocks(&Self::gather(k, self.g, group, self.d), self.d);
            let vs = Self::gather(v, self.g, group, self.d);
            for head in group * (self.h / self.g)..(group + 1) * (self.h / self.g) {
                for i in 0..self.t {
                    let at = (i * self.h + head) * self.d;
                    let seen = self.seen(i, start, window);
                    self.weights(&q[at..at + self.d], &kt, &seen, &mut p);
                    let o = &mut out[at..at + self.d];
                    for (p, v) in p[seen.clone()].iter().zip(vs[seen.start * self.d..].chunks_exact(self.d)) {
                        axpy(o, *p, v);
                    }
                }
            }
        }
    }

    /// Gradients of one row of the batch, added to `dq`, `dk` and `dv`.
    #[inline(always)]
    fn backward(
        &self,
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
        (q, k, v, g): (&[f32], &[f32], &[f32], &[f32]),
        start: usize,
        window: usize,
    ) {
        let d = self.d;
        let scale = 1.0 / (d as f32).sqrt();
        let mut p = vec![0f32; self.width()];
        let mut dp = vec![0f32; self.width()];
        for group in 0..self.g {
            let kh = Self::gather(k, self.g, group, d);
            let kt = transposed_in_blocks(&kh, d);
            let vt = transposed_in_blocks(&Self::gather(v, self.g, group, d), d);
            for head in group * (self.h / self.g)..(group + 1) * (self.h / self.g) {
                for i in 0..self.t {
                    let at = (i * self.h + head) * d;
                    let (qi, gi) = (&q[at..at + d], &g[at..at + d]);
                    let seen = self.seen(i, start, window);
                    self.weights(qi, &kt, &seen, &mut p);
                    row_times(&mut dp, gi, &vt, seen.start, seen.end);
                    let mean = dot(&p[seen.clone()], &dp[seen.clone()]);
                    for j in seen {
                        let row = (j * self.g + group) * d;
                        axpy(&mut dv[row..row + d], p[j], gi);
                        let ds = p[j] * (dp[j] - mean) * scale;
                        axpy(&mut dk[row..row + d], ds, qi);
                        axpy(&mut dq[at..at + d], ds, &kh[j * d..(j + 1) * d]);
                    }
                }
            }
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention-with-backward"
    }
    fn cpu_fwd(
        &self,
        sq: &CpuStorage,
        lq: &Layout,
        sk: &CpuStorage,
        lk: &Layout,
        sv: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (view(sq, lq)?, view(sk, lk)?, view(sv, lv)?);
        let (_, n) = Dims::of(lq.shape(), lk.shape())?;
        let mut out = vec![0f32; q.len()];
        let (qrow, krow) = (n.t * n.h * n.d, n.s * n.g * n.d);
        out.par_chunks_mut(qrow).enumerate().for_each(|(b, out)| {
            let start = self.starts.get(b).map_or(0, |&s| s as usize);
            let keys = b * krow..(b + 1) * krow;
            let row = (&q[b * qrow..(b + 1) * qrow], &k[keys.clone()], &v[keys]);
            wide(
                #[inline(always)]
                || n.forward(out, row, start, self.window),
            );
        });
        Ok(own(out, lq.shape()))
    }
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, n) = Dims::of(q.shape(), k.shape())?;
        let grad = grad.contiguous()?;
        let (qs, ks, vs, gs) = (read(q), read(k), read(v), read(&grad));
        let (qs, ks, vs, gs) = (qs.values()?, ks.values()?, vs.values()?, gs.values()?);
        let (mut dq, mut dk, mut dv) = (vec![0f32; qs.len()], vec![0f32; ks.len()], vec![0f32; vs.len()]);
        let (qrow, krow) = (n.t * n.h * n.d, n.s * n.g * n.d);
        dq.par_chunks_mut(qrow)
            .zip(dk.par_chunks_mut(krow))
            .zip(dv.par_chunks_mut(krow))
            .enumerate()
            .for_each(|(b, ((dq, dk), dv))| {
                let start = self.starts.get(b).map_or(0, |&s| s as usize);
                let (queries, keys) = (b * qrow..(b + 1) * qrow, b * krow..(b + 1) * krow);
                let row = (&qs[queries.clone()], &ks[keys.clone()], &vs[keys], &gs[queries]);
                wide(
                    #[inline(always)]
                    || n.backward((dq, dk, dv), row, start, self.window),
                );
            });
        let dev = q.device();
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), dev)?),
            Some(Tensor::from_vec(dk, k.shape(), dev)?),
            Some(Tensor::from_vec(dv, v.shape(), dev)?),
        ))
    }
}

/// Causal softmax attention with grouped key heads. The queries are the last `t` of `s` positions; keys
/// before `starts[b]` are padding and not seen. With a `window` a query sees that many positions, its own included.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    starts: &Arc<Vec<u32>>,
    window: Option<usize>,
) -> Result<Tensor> {
    let op = Attention { starts: starts.clone(), window: window.unwrap_or(usize::MAX).max(1) };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
    use crate::ops::values;
    use candle_core::Device;

    #[test]
    fn attention_gradient_with_grouped_heads_padding_past_and_window() {
        let starts = Arc::new(vec![0, 2]);
        for window in [None, Some(1), Some(2), Some(4), Some(9)] {
            check(&[&[2, 3, 4, 2], &[2, 5, 2, 2], &[2, 5, 2, 2]], |t| {
                attention(&t[0], &t[1], &t[2], &starts, window)
            });
        }
    }

    #[test]
    fn attention_over_several_blocks_of_keys_is_its_formula_in_f64() {
        // 37 keys are three blocks, the last not full; one row begins in the second.
        let (t, s, h, g, d) = (20, 37, 2, 1, 4);
        let starts = [0u32, 18];
        for window in [None, Some(3), Some(17)] {
            let shapes = [[2, t, h, d], [2, s, g, d], [2, s, g, d]];
            let made = |i: usize| {
                Tensor::from_vec(noise(shapes[i].iter().product(), 40 + i as u32), &shapes[i], &Device::Cpu)
                    .unwrap()
            };
            let (q, k, v) = (made(0), made(1), made(2));
            let got = values(&attention(&q, &k, &v, &Arc::new(starts.to_vec()), window).unwrap()).unwrap();
            let [q, k, v] =
                [q, k, v].map(|x| values(&x).unwrap().into_iter().map(f64::from).collect::<Vec<_>>());
            for (b, start) in starts.iter().enumerate() {
                for i in 0..t {
                    let last = s - t + i;
                    let seen = (last + 1).saturating_sub(window.unwrap_or(s));
                    // A padding row sees itself.
                    let first = (*start as usize).max(seen).min(last);
                    for head in 0..h {
                        let q = &q[((b * t + i) * h + head) * d..][..d];
                        let score = |j: usize| {
                            let k = &k[(b * s + j) * d..][..d];
                            (q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp()
                        };
                        let sum: f64 = (first..=last).map(score).sum();
                        for c in 0..d {
                            let want: f64 =
                                (first..=last).map(|j| score(j) / sum * v[(b * s + j) * d + c]).sum();
                            let found = f64::from(got[((b * t + i) * h + head) * d + c]);
                            assert!(
                                (found - want).abs() < 1e-5,
                                "{window:?}, {b}, {i}, {head}, {c}: {found} against {want}"
                            );
                        }
                    }
                }
            }
            let starts = Arc::new(starts.to_vec());
            check(&[&[2, 20, 2, 4], &[2, 37, 1, 4], &[2, 37, 1, 4]], |x| {
                attention(&x[0], &x[1], &x[2], &starts, window)
            });
        }
    }

    /// Outputs of four positions, two wide, with what is added to the keys; the first position is padding.
    fn attended(window: Option<usize>, added: &[(usize, f32)]) -> Vec<f32> {
        let x = |seed| Tensor::from_vec(noise(8, seed), &[1, 4, 1, 2], &Device::Cpu).unwrap();
        let mut k = noise(8, 2);
        for (i, d) in added {
            k[*i] += d;
        }
        let k = Tensor::from_vec(k, &[1, 4, 1, 2], &Device::Cpu).unwrap();
        values(&attention(&x(1), &k, &x(3), &Arc::new(vec![1]), window).unwrap()).unwrap()
    }

    #[test]
    fn attention_does_not_see_the_future_or_the_padding() {
        let plain = attended(None, &[]);
        // Padding, and position 3.
        let other = attended(None, &[(0, 5.0), (6, 5.0)]);
        assert_eq!(plain[2..6], other[2..6]);
        assert_ne!(plain[6..8], other[6..8]);
    }

    #[test]
    fn attention_sees_as_many_positions_as_the_window_has() {
        // Position 1 is in the window of 2 of position 2, and no longer in that of position 3.
        let (plain, other) = (attended(Some(2), &[]), attended(Some(2), &[(2, 5.0)]));
        assert_ne!(plain[4..6], other[4..6]);
        assert_eq!(plain[6..8], other[6..8]);
        assert_ne!(attended(Some(3), &[])[6..8], attended(Some(3), &[(2, 5.0)])[6..8]);
        // A window that holds everything is none; one of 1 holds the position itself, whose value it is.
        assert_eq!(attended(Some(4), &[]), attended(None, &[]));
        assert_eq!(attended(Some(1), &[])[2..], noise(8, 3)[2..]);
    }
}
