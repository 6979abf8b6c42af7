//! Causal softmax attention: grouped key heads, padding in front, a sliding window.

use super::{own, values, view};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
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
    fn gather(x: &[f32], heads: usize, head: usize, d: usize) -> Vec<f32> {
        x.chunks(heads * d).flat_map(|row| row[head * d..(head + 1) * d].iter().copied()).collect()
    }

    /// `[len, d]` -> `[d, len]`.
    fn transpose(x: &[f32], d: usize) -> Vec<f32> {
        let n = x.len() / d;
        let mut out = vec![0f32; x.len()];
        for (i, row) in x.chunks(d).enumerate() {
            for (j, v) in row.iter().enumerate() {
                out[j * n + i] = *v;
            }
        }
        out
    }

    /// The keys that query `i` sees: the `window` last ones, itself included, but none before `start`.
    fn seen(&self, i: usize, start: usize, window: usize) -> std::ops::RangeInclusive<usize> {
        let last = self.s - self.t + i;
        // A padding row sees itself, so that nothing divides by zero; nobody reads it.
        start.max((last + 1).saturating_sub(window)).min(last)..=last
    }

    /// Softmax weights of query `q` over the keys `seen`, written to `p` (zero elsewhere).
    fn weights(
        &self,
        q: &[f32],
        kt: &[f32],
        seen: std::ops::RangeInclusive<usize>,
        p: &mut [f32],
    ) -> std::ops::Range<usize> {
        let (from, last) = seen.into_inner();
        p.fill(0.0);
        let seen = &mut p[from..=last];
        for (c, &qc) in q.iter().enumerate() {
            for (p, k) in seen.iter_mut().zip(&kt[c * self.s + from..=c * self.s + last]) {
                *p += qc * k;
            }
        }
        let scale = 1.0 / (self.d as f32).sqrt();
        let max = seen.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)) * scale;
        let mut sum = 0f32;
        for p in seen.iter_mut() {
            *p = (*p * scale - max).exp();
            sum += *p;
        }
        for p in seen.iter_mut() {
            *p /= sum;
        }
        from..last + 1
    }
}

fn axpy(out: &mut [f32], a: f32, x: &[f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o += a * x;
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
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
            let q = &q[b * qrow..(b + 1) * qrow];
            let mut p = vec![0f32; n.s];
            for group in 0..n.g {
                let kt = Dims::transpose(&Dims::gather(&k[b * krow..(b + 1) * krow], n.g, group, n.d), n.d);
                let vs = Dims::gather(&v[b * krow..(b + 1) * krow], n.g, group, n.d);
                for head in group * (n.h / n.g)..(group + 1) * (n.h / n.g) {
                    for i in 0..n.t {
                        let at = (i * n.h + head) * n.d;
                        let seen = n.weights(&q[at..at + n.d], &kt, n.seen(i, start, self.window), &mut p);
                        let o = &mut out[at..at + n.d];
                        for j in seen {
                            axpy(o, p[j], &vs[j * n.d..(j + 1) * n.d]);
                        }
                    }
                }
            }
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
        let (qs, ks, vs, gs) = (values(q)?, values(k)?, values(v)?, values(grad)?);
        let (mut dq, mut dk, mut dv) = (vec![0f32; qs.len()], vec![0f32; ks.len()], vec![0f32; vs.len()]);
        let (qrow, krow) = (n.t * n.h * n.d, n.s * n.g * n.d);
        let scale = 1.0 / (n.d as f32).sqrt();
        dq.par_chunks_mut(qrow)
            .zip(dk.par_chunks_mut(krow))
            .zip(dv.par_chunks_mut(krow))
            .enumerate()
            .for_each(|(b, ((dq, dk), dv))| {
                let start = self.starts.get(b).map_or(0, |&s| s as usize);
                let (q, g) = (&qs[b * qrow..(b + 1) * qrow], &gs[b * qrow..(b + 1) * qrow]);
                let mut p = vec![0f32; n.s];
                let mut dp = vec![0f32; n.s];
                for group in 0..n.g {
                    let kh = Dims::gather(&ks[b * krow..(b + 1) * krow], n.g, group, n.d);
                    let vh = Dims::gather(&vs[b * krow..(b + 1) * krow], n.g, group, n.d);
                    let (kt, vt) = (Dims::transpose(&kh, n.d), Dims::transpose(&vh, n.d));
                    for head in group * (n.h / n.g)..(group + 1) * (n.h / n.g) {
                        for i in 0..n.t {
                            let at = (i * n.h + head) * n.d;
                            let (qi, gi) = (&q[at..at + n.d], &g[at..at + n.d]);
                            let seen = n.weights(qi, &kt, n.seen(i, start, self.window), &mut p);
                            let (from, to) = (seen.start, seen.end);
                            dp[from..to].fill(0.0);
                            for (c, &gc) in gi.iter().enumerate() {
                                axpy(&mut dp[from..to], gc, &vt[c * n.s + from..c * n.s + to]);
                            }
                            let mean = dot(&p[from..to], &dp[from..to]);
                            for j in seen {
                                let row = (j * n.g + group) * n.d;
                                axpy(&mut dv[row..row + n.d], p[j], gi);
                                let ds = p[j] * (dp[j] - mean) * scale;
                                axpy(&mut dk[row..row + n.d], ds, qi);
                                axpy(&mut dq[at..at + n.d], ds, &kh[j * n.d..(j + 1) * n.d]);
                            }
                        }
                    }
                }
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
