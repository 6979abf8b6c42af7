//! Differentiable CPU ops that candle lacks or whose stock versions cut gradients.
//!
//! | op | inputs | gradient to |
//! |---|---|---|
//! | [`frozen_linear`] | x `[n, in]`, W `[out, in]` (a constant) | x |
//! | [`rms_norm`] | x `[n, d]`, w `[d]` | x, w |
//! | [`rope`] | x `[b, t, h, d]` | x |
//! | [`attention`] | q `[b, t, h, d]`, k and v `[b, s, g, d]`, `g` divides `h` | q, k, v |
//! | [`swiglu`] | gate, up `[n, f]` | both |
//! | [`swiglu_fused`] | gate beside up `[n, 2 f]` | it |
//! | [`cross_entropy`], [`kl`], [`log_odds`] | logits `[n, v]` | logits |
//!
//! All f32, row-major; sums inside a row are in a fixed order, so results do not depend on the thread
//! count. Each backward is checked against central differences below.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};
use gemm::{Parallelism, gemm};
use rayon::prelude::*;
use std::sync::Arc;

fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((from, to)), CpuStorage::F32(data)) => Ok(&data[from..to]),
        (None, _) => bail!("operand is not contiguous"),
        _ => bail!("operand is not f32"),
    }
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all()?.to_vec1::<f32>()
}

fn own(data: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(data), shape.into())
}

/// Rows per unit of parallel work: small enough to spread, large enough to be worth a task.
const ROWS: usize = 64;

/// `x Wᵀ`, or `x W` on the way back, by a weight that gets no gradient.
struct FrozenLinear {
    w: Tensor,
    back: bool,
}

impl FrozenLinear {
    /// Of `x` with `n` rows; no copy of either operand, as candle's own product of strided views would make.
    fn product(&self, x: &[f32], n: usize) -> Result<(CpuStorage, Shape)> {
        let (out, into) = self.w.dims2()?;
        let (depth, width) = if self.back { (out, into) } else { (into, out) };
        let (storage, layout) = self.w.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("frozen-linear runs on the CPU") };
        let w = view(storage, layout)?;
        if x.len() != n * depth || w.len() != depth * width {
            bail!("frozen-linear: {n} rows of {} do not fit a weight [{out}, {into}]", x.len() / n.max(1));
        }
        let (row, col) = if self.back { (into, 1) } else { (1, into) };
        let threads = rayon::current_num_threads();
        let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
        let mut y = Vec::<f32>::with_capacity(n * width);
        // SAFETY: x is n x depth and w is depth x width by the check above, `row` and `col` being the strides of the
        // latter, so that all reads lie inside the slices; y has room for n * width elements, borrowed by nobody else,
        // and all of them are written (read_dst is false, so none is read first) before the length says so.
        unsafe {
            gemm(
                n,
                width,
                depth,
                y.as_mut_ptr(),
                1,
                width as isize,
                false,
                x.as_ptr(),
                1,
                depth as isize,
                w.as_ptr(),
                col as isize,
                row as isize,
                0f32,
                1f32,
                false,
                false,
                false,
                parallelism,
            );
            y.set_len(n * width);
        }
        Ok(own(y, (n, width)))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.product(view(s, l)?, l.shape().dims2()?.0)
    }
    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = Self { w: self.w.clone(), back: !self.back };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

/// `x Wᵀ` with no gradient for `W`.
pub fn frozen_linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let op = FrozenLinear { w: w.detach().contiguous()?, back: false };
    if x.track_op() { x.contiguous()?.apply_op1(op) } else { x.contiguous()?.apply_op1_no_bwd(&op) }
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-with-backward"
    }
    fn cpu_fwd(
        &self,
        sx: &CpuStorage,
        lx: &Layout,
        sw: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (view(sx, lx)?, view(sw, lw)?);
        let d = w.len();
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).for_each(|(out, x)| {
            for (out, x) in out.chunks_mut(d).zip(x.chunks(d)) {
                let r = inverse_rms(x, self.eps);
                for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
                    *o = x * r * w;
                }
            }
        });
        Ok(own(out, lx.shape()))
    }
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (xs, ws, gs) = (values(x)?, values(w)?, values(g)?);
        let d = ws.len();
        let mut dx = vec![0f32; xs.len()];
        let mut dw = vec![0f32; d];
        for ((dx, x), g) in dx.chunks_mut(d).zip(xs.chunks(d)).zip(gs.chunks(d)) {
            let r = inverse_rms(x, self.eps);
            let mut dot = 0f32;
            for j in 0..d {
                dot += g[j] * ws[j] * x[j];
                dw[j] += g[j] * x[j] * r;
            }
            let k = dot * r * r * r / d as f32;
            for j in 0..d {
                dx[j] = g[j] * ws[j] * r - x[j] * k;
            }
        }
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, w.shape(), w.device())?),
        ))
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0f32; 8];
    let mut chunks = x.chunks_exact(8);
    for c in &mut chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += v * v;
        }
    }
    let sum: f32 = lanes.iter().sum::<f32>() + chunks.remainder().iter().map(|v| v * v).sum::<f32>();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `w · x / sqrt(mean(x²) + eps)` over the last dimension (arXiv 1910.07467).
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op2(w, RmsNorm { eps: eps as f32 })
}

/// Which two elements of a head are turned together, of the `2 half` at its front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeForm {
    /// `i` and `i + half`, as in Llama.
    Halves,
    /// `2 i` and `2 i + 1`, as in GLM.
    Neighbours,
}

/// Cosines and sines for positions `0..len`, `half` pairs each.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
    form: RopeForm,
}

impl RopeTable {
    /// Angles are formed in f64 and rounded once.
    pub fn new(frequencies: &[f64], len: usize, form: RopeForm) -> Self {
        let mut cos = Vec::with_capacity(len * frequencies.len());
        let mut sin = Vec::with_capacity(len * frequencies.len());
        for p in 0..len {
            for f in frequencies {
                let angle = p as f64 * f;
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        Self { cos: Arc::new(cos), sin: Arc::new(sin), half: frequencies.len(), form }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// No positions.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }
}

struct Rope {
    table: RopeTable,
    positions: Arc<Vec<u32>>,
    inverse: bool,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope-with-backward"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = view(s, l)?;
        let (b, t, h, d) = l.shape().dims4()?;
        let half = self.table.half;
        if half == 0 || 2 * half > d || self.positions.len() != b * t {
            bail!("rope: table or positions do not fit {:?}", l.shape());
        }
        // What lies behind the pairs stays as it is.
        let mut out = x.to_vec();
        for ((out, x), &p) in out.chunks_mut(h * d).zip(x.chunks(h * d)).zip(self.positions.iter()) {
            let p = p as usize;
            if p >= self.table.len() {
                bail!("rope: position {p} is past the table of {}", self.table.len());
            }
            let cos = &self.table.cos[p * half..(p + 1) * half];
            let sin = &self.table.sin[p * half..(p + 1) * half];
            let sign = if self.inverse { -1.0 } else { 1.0 };
            for (out, x) in out.chunks_mut(d).zip(x.chunks(d)) {
                match self.table.form {
                    RopeForm::Halves => {
                        let (lo, hi) = x.split_at(half);
                        let (out_lo, out_hi) = out.split_at_mut(half);
                        for i in 0..half {
                            let s = sin[i] * sign;
                            out_lo[i] = lo[i] * cos[i] - hi[i] * s;
                            out_hi[i] = hi[i] * cos[i] + lo[i] * s;
                        }
                    }
                    RopeForm::Neighbours => {
                        let pairs = out.chunks_exact_mut(2).zip(x.chunks_exact(2));
                        for ((out, x), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                            let s = sin * sign;
                            out[0] = x[0] * cos - x[1] * s;
                            out[1] = x[1] * cos + x[0] * s;
                        }
                    }
                }
            }
        }
        Ok(own(out, l.shape()))
    }
    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op =
            Rope { table: self.table.clone(), positions: self.positions.clone(), inverse: !self.inverse };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

/// Rotary embedding of the first elements of each head, as many as the table has; `positions[b * t]` row-major.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &Arc<Vec<u32>>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rope { table: table.clone(), positions: positions.clone(), inverse: false })
}

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

struct Swiglu;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu-with-backward"
    }
    fn cpu_fwd(
        &self,
        sg: &CpuStorage,
        lg: &Layout,
        su: &CpuStorage,
        lu: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (g, u) = (view(sg, lg)?, view(su, lu)?);
        let mut out = vec![0f32; g.len()];
        out.par_chunks_mut(1 << 14).zip(g.par_chunks(1 << 14)).zip(u.par_chunks(1 << 14)).for_each(
            |((out, g), u)| {
                for ((o, &g), &u) in out.iter_mut().zip(g).zip(u) {
                    *o = g * sigmoid(g) * u;
                }
            },
        );
        Ok(own(out, lg.shape()))
    }
    fn bwd(
        &self,
        g: &Tensor,
        u: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gs, us, ds) = (values(g)?, values(u)?, values(grad)?);
        let (mut dg, mut du) = (vec![0f32; gs.len()], vec![0f32; us.len()]);
        dg.par_chunks_mut(1 << 14)
            .zip(du.par_chunks_mut(1 << 14))
            .zip(gs.par_chunks(1 << 14))
            .zip(us.par_chunks(1 << 14))
            .zip(ds.par_chunks(1 << 14))
            .for_each(|((((dg, du), g), u), d)| {
                for i in 0..d.len() {
                    let s = sigmoid(g[i]);
                    dg[i] = d[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                    du[i] = d[i] * g[i] * s;
                }
            });
        Ok((
            Some(Tensor::from_vec(dg, g.shape(), g.device())?),
            Some(Tensor::from_vec(du, u.shape(), u.device())?),
        ))
    }
}

/// `silu(gate) · up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu)
}

struct SwigluFused;

impl CustomOp1 for SwigluFused {
    fn name(&self) -> &'static str {
        "swiglu-fused-with-backward"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = view(s, l)?;
        let (n, both) = l.shape().dims2()?;
        let f = both / 2;
        if both == 0 || both % 2 != 0 {
            bail!("swiglu-fused: {both} columns do not halve");
        }
        let mut out = vec![0f32; n * f];
        out.par_chunks_mut(f).zip(x.par_chunks(both)).for_each(|(out, x)| {
            let (g, u) = x.split_at(f);
            for ((o, &g), &u) in out.iter_mut().zip(g).zip(u) {
                *o = g * sigmoid(g) * u;
            }
        });
        Ok(own(out, (n, f)))
    }
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let both = x.dim(1)?;
        let f = both / 2;
        let (xs, ds) = (values(x)?, values(grad)?);
        let mut dx = vec![0f32; xs.len()];
        dx.par_chunks_mut(both).zip(xs.par_chunks(both)).zip(ds.par_chunks(f)).for_each(|((dx, x), d)| {
            let ((g, u), (dg, du)) = (x.split_at(f), dx.split_at_mut(f));
            for i in 0..f {
                let s = sigmoid(g[i]);
                dg[i] = d[i] * u[i] * s * (1.0 + g[i] * (1.0 - s));
                du[i] = d[i] * g[i] * s;
            }
        });
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// `silu(gate) · up` of the two halves of each row, gate first.
pub fn swiglu_fused(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.contiguous()?.apply_op1(SwigluFused)
}

/// Row-wise log-softmax into `out`; the sum of exponentials is in f64.
pub(crate) fn log_softmax(logits: &[f32], out: &mut [f32]) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    let log_sum = max + sum.ln() as f32;
    for (o, &x) in out.iter_mut().zip(logits) {
        *o = x - log_sum;
    }
}

/// What a row of logits is held against.
enum Reference {
    /// Target token ids.
    Tokens(Arc<Vec<u32>>),
    /// Log-probabilities `[n, v]`.
    Logp(Arc<Vec<f32>>),
}

struct Divergence {
    reference: Reference,
    weights: Arc<Vec<f32>>,
}

impl CustomOp1 for Divergence {
    fn name(&self) -> &'static str {
        "divergence-with-backward"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = view(s, l)?;
        let (n, v) = l.shape().dims2()?;
        if self.weights.len() != n {
            bail!("{} weights for {n} rows", self.weights.len());
        }
        let terms: Vec<f64> = x
            .par_chunks(v)
            .enumerate()
            .map(|(i, row)| {
                let mut logp = vec![0f32; v];
                log_softmax(row, &mut logp);
                let w = f64::from(self.weights[i]);
                match &self.reference {
                    Reference::Tokens(t) => -w * f64::from(logp[t[i] as usize]),
                    Reference::Logp(r) => {
                        let r = &r[i * v..(i + 1) * v];
                        let kl: f64 = r
                            .iter()
                            .zip(&logp)
                            .map(|(&r, &p)| f64::from(r).exp() * (f64::from(r) - f64::from(p)))
                            .sum();
                        w * kl
                    }
                }
            })
            .collect();
        // Summed in row order: the result does not depend on the thread count.
        Ok(own(vec![terms.iter().sum::<f64>() as f32], 1))
    }
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, v) = x.dims2()?;
        let g = values(grad)?[0];
        let xs = values(x)?;
        let mut dx = vec![0f32; xs.len()];
        dx.par_chunks_mut(v).zip(xs.par_chunks(v)).enumerate().for_each(|(i, (dx, x))| {
            log_softmax(x, dx);
            let w = self.weights[i] * g;
            match &self.reference {
                Reference::Tokens(t) => {
                    for d in dx.iter_mut() {
                        *d = w * d.exp();
                    }
                    dx[t[i] as usize] -= w;
                }
                Reference::Logp(r) => {
                    for (d, &r) in dx.iter_mut().zip(&r[i * v..(i + 1) * v]) {
                        *d = w * (d.exp() - r.exp());
                    }
                }
            }
        });
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// `Σ_i w_i · −log softmax(logits_i)[target_i]`, shape `[1]`, nats.
pub fn cross_entropy(logits: &Tensor, targets: Arc<Vec<u32>>, weights: Arc<Vec<f32>>) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(Divergence { reference: Reference::Tokens(targets), weights })
}

/// `Σ_i w_i · KL(reference_i ‖ softmax(logits_i))`, shape `[1]`, nats; `reference` holds log-probabilities `[n, v]`.
pub fn kl(logits: &Tensor, reference: Arc<Vec<f32>>, weights: Arc<Vec<f32>>) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(Divergence { reference: Reference::Logp(reference), weights })
}

struct LogOdds {
    inside: Arc<Vec<bool>>,
}

impl LogOdds {
    /// Logarithms of the sums of `exp` inside and outside of the set.
    fn sums(&self, row: &[f32]) -> [f64; 2] {
        let mut max = [f32::NEG_INFINITY; 2];
        for (&x, &inside) in row.iter().zip(self.inside.iter()) {
            let side = usize::from(!inside);
            max[side] = max[side].max(x);
        }
        let mut sum = [0f64; 2];
        for (&x, &inside) in row.iter().zip(self.inside.iter()) {
            let side = usize::from(!inside);
            sum[side] += f64::from(x - max[side]).exp();
        }
        [0, 1].map(|side| f64::from(max[side]) + sum[side].ln())
    }
}

impl CustomOp1 for LogOdds {
    fn name(&self) -> &'static str {
        "log-odds-with-backward"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = view(s, l)?;
        let (n, v) = l.shape().dims2()?;
        if self.inside.len() != v || !self.inside.contains(&true) || !self.inside.contains(&false) {
            bail!("the set has to be some, and not all, of {v} tokens");
        }
        let odds = x.chunks(v).map(|row| {
            let [inside, outside] = self.sums(row);
            (inside - outside) as f32
        });
        Ok(own(odds.collect(), n))
    }
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, v) = x.dims2()?;
        let (mut dx, gs) = (values(x)?, values(grad)?);
        for (row, g) in dx.chunks_mut(v).zip(gs) {
            let [inside, outside] = self.sums(row);
            for (x, &is_inside) in row.iter_mut().zip(self.inside.iter()) {
                let at = f64::from(*x);
                *x = g * if is_inside { (at - inside).exp() } else { -(at - outside).exp() } as f32;
            }
        }
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Which of `vocab` tokens are among `ids`; ids past the end are ignored.
pub fn token_set(ids: &[u32], vocab: usize) -> Arc<Vec<bool>> {
    let mut inside = vec![false; vocab];
    for &id in ids {
        if let Some(slot) = inside.get_mut(id as usize) {
            *slot = true;
        }
    }
    Arc::new(inside)
}

/// `log P(R) − log(1 − P(R))` of each row, shape `[n]`, nats; `inside[v]` says which tokens are in R.
pub fn log_odds(logits: &Tensor, inside: &Arc<Vec<bool>>) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(LogOdds { inside: inside.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                (x as f32 / u32::MAX as f32) * 2.0 - 1.0
            })
            .collect()
    }

    /// Compares the gradient of `Σ w·f(inputs)` with central differences in every coordinate.
    #[track_caller]
    fn check(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let dev = &Device::Cpu;
        let vars: Vec<Var> = shapes
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let n = s.iter().product();
                Var::from_tensor(&Tensor::from_vec(noise(n, i as u32 + 1), *s, dev).unwrap()).unwrap()
            })
            .collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors).unwrap();
        let w = Tensor::from_vec(noise(out.elem_count(), 99), out.shape(), dev).unwrap();
        let grads = (out * &w).unwrap().sum_all().unwrap().backward().unwrap();
        let value = |ts: &[Tensor]| -> f64 {
            let y = f(ts).unwrap();
            let (y, w) = (values(&y).unwrap(), values(&w).unwrap());
            y.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        for (i, var) in vars.iter().enumerate() {
            let g = values(grads.get(var).expect("a gradient reaches every input")).unwrap();
            let x = values(var.as_tensor()).unwrap();
            for j in 0..x.len() {
                let h = 1e-2f32;
                let at = |d: f32| {
                    let mut x = x.clone();
                    x[j] += d;
                    let mut ts = tensors.clone();
                    ts[i] = Tensor::from_vec(x, var.shape(), dev).unwrap();
                    value(&ts)
                };
                let want = (at(h) - at(-h)) / (2.0 * f64::from(h));
                // Truncation is O(h²) of third derivatives near 1, rounding is 1e-7 / h.
                let err = (f64::from(g[j]) - want).abs();
                assert!(err < 2e-3 * (1.0 + want.abs()), "input {i}, element {j}: {} against {want}", g[j]);
            }
        }
    }

    #[test]
    fn rms_norm_gradient() {
        check(&[&[3, 10], &[10]], |t| rms_norm(&t[0], &t[1], 1e-5));
    }

    #[test]
    fn rms_norm_of_each_head_is_that_of_its_row() {
        check(&[&[2, 3, 2, 4], &[4]], |t| rms_norm(&t[0], &t[1], 1e-5));
        let dev = &Device::Cpu;
        let x = Tensor::from_vec(noise(48, 5), (12, 4), dev).unwrap();
        let w = Tensor::from_vec(noise(4, 6), 4, dev).unwrap();
        let rows = values(&rms_norm(&x, &w, 1e-5).unwrap()).unwrap();
        let heads = rms_norm(&x.reshape((2, 3, 2, 4)).unwrap(), &w, 1e-5).unwrap();
        assert_eq!(heads.dims(), [2, 3, 2, 4]);
        assert_eq!(values(&heads).unwrap(), rows);
    }

    #[test]
    fn rope_gradient_and_length() {
        let positions = Arc::new(vec![0, 1, 8, 3]);
        for form in [RopeForm::Halves, RopeForm::Neighbours] {
            let table = RopeTable::new(&[1.0, 0.3], 9, form);
            // All of a head, and the front of one.
            for d in [4, 7] {
                check(&[&[2, 2, 3, d]], |t| rope(&t[0], &table, &positions));
                let x = Tensor::from_vec(noise(12 * d, 5), &[2, 2, 3, d], &Device::Cpu).unwrap();
                let y = rope(&x, &table, &positions).unwrap();
                let n = |t: &Tensor| values(t).unwrap().iter().map(|v| v * v).sum::<f32>();
                assert!((n(&x) - n(&y)).abs() < 1e-4 * n(&x), "a rotation keeps the length");
            }
        }
    }

    #[test]
    fn rope_turns_the_pairs_of_its_form_and_leaves_the_rest() {
        let turn = |form| {
            let table = RopeTable::new(&[1.0, 0.5], 4, form);
            let x =
                Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[1, 1, 1, 6], &Device::Cpu).unwrap();
            values(&rope(&x, &table, &Arc::new(vec![2])).unwrap()).unwrap()
        };
        let pair = |x: f32, y: f32, angle: f32| {
            (x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin())
        };
        let near = |got: Vec<f32>, want: [f32; 6]| {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert!((got - want).abs() < 1e-5, "element {i}: {got} against {want}");
            }
        };
        let (a, b) = (pair(1.0, 3.0, 2.0), pair(2.0, 4.0, 1.0));
        near(turn(RopeForm::Halves), [a.0, b.0, a.1, b.1, 5.0, 6.0]);
        let (a, b) = (pair(1.0, 2.0, 2.0), pair(3.0, 4.0, 1.0));
        near(turn(RopeForm::Neighbours), [a.0, a.1, b.0, b.1, 5.0, 6.0]);
    }

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

    #[test]
    fn swiglu_gradient() {
        check(&[&[3, 5], &[3, 5]], |t| swiglu(&t[0], &t[1]));
    }

    #[test]
    fn fused_swiglu_is_the_same_and_has_its_gradient() {
        check(&[&[3, 10]], |t| swiglu_fused(&t[0]));
        let dev = &Device::Cpu;
        let (g, u) = (noise(15, 1), noise(15, 2));
        let both = g.chunks(5).zip(u.chunks(5)).flat_map(|(g, u)| [g, u].concat()).collect::<Vec<_>>();
        let [g, u] = [g, u].map(|x| Tensor::from_vec(x, (3, 5), dev).unwrap());
        let fused = swiglu_fused(&Tensor::from_vec(both, (3, 10), dev).unwrap()).unwrap();
        assert_eq!(fused.dims(), [3, 5]);
        assert_eq!(values(&fused).unwrap(), values(&swiglu(&g, &u).unwrap()).unwrap());
        assert!(swiglu_fused(&Tensor::zeros((2, 3), candle_core::DType::F32, dev).unwrap()).is_err());
    }

    #[test]
    fn cross_entropy_gradient() {
        let (t, w) = (Arc::new(vec![1, 0, 4]), Arc::new(vec![0.5, 0.25, 1.0]));
        check(&[&[3, 5]], |x| cross_entropy(&x[0], t.clone(), w.clone()));
    }

    #[test]
    fn kl_gradient_and_zero_at_itself() {
        let x = noise(15, 7);
        let mut logp = vec![0f32; 15];
        for (o, x) in logp.chunks_mut(5).zip(x.chunks(5)) {
            log_softmax(x, o);
        }
        let (r, w) = (Arc::new(logp), Arc::new(vec![0.5, 0.25, 1.0]));
        check(&[&[3, 5]], |x| kl(&x[0], r.clone(), w.clone()));
        let same = Tensor::from_vec(x, &[3, 5], &Device::Cpu).unwrap();
        assert!(values(&kl(&same, r.clone(), w.clone()).unwrap()).unwrap()[0].abs() < 1e-6);
    }

    #[test]
    fn log_odds_gradient_and_value() {
        let inside = Arc::new(vec![false, true, false, true, false]);
        check(&[&[3, 5]], |x| log_odds(&x[0], &inside));
        // Odds of two equal tokens against three: log(2 / 3); far logits neither overflow nor vanish.
        for lift in [0.0f32, 300.0, -300.0] {
            let x = Tensor::from_vec(vec![lift; 5], (1, 5), &Device::Cpu).unwrap();
            let y = values(&log_odds(&x, &inside).unwrap()).unwrap()[0];
            assert!((y - (2f32 / 3.0).ln()).abs() < 1e-6, "{y}");
        }
        let x = Tensor::zeros((1, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(log_odds(&x, &Arc::new(vec![true; 5])).is_err());
    }

    #[test]
    fn frozen_linear_gives_no_gradient_to_its_weight() {
        let dev = &Device::Cpu;
        let w = Var::from_tensor(&Tensor::from_vec(noise(12, 1), &[4, 3], dev).unwrap()).unwrap();
        let x = Var::from_tensor(&Tensor::from_vec(noise(6, 2), &[2, 3], dev).unwrap()).unwrap();
        let y = frozen_linear(x.as_tensor(), w.as_tensor()).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some());
        assert!(grads.get(&w).is_none());
        check(&[&[2, 3]], |t| frozen_linear(&t[0], w.as_tensor()));
    }

    #[test]
    fn frozen_linear_is_the_product_in_f64_whatever_the_layout_and_the_threads() {
        let dev = &Device::Cpu;
        // The last is large enough for several threads, and deeper than one block of the product.
        for (n, into, out) in [(1, 1, 1), (5, 7, 3), (130, 33, 70), (97, 600, 71)] {
            let (x, w) = (noise(n * into, 3), noise(out * into, 4));
            let xt = Tensor::from_vec(x.clone(), (n, into), dev).unwrap();
            let wt = Tensor::from_vec(w.clone(), (out, into), dev).unwrap();
            // The same weight as a transposed view.
            let turned = wt.t().unwrap().contiguous().unwrap().t().unwrap();
            let run = |threads, w: &Tensor| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| values(&frozen_linear(&xt, w).unwrap()).unwrap())
            };
            let got = run(1, &wt);
            assert_eq!(got, run(3, &wt));
            assert_eq!(got, run(1, &turned));
            for i in 0..n {
                for j in 0..out {
                    let dot: f64 =
                        (0..into).map(|k| f64::from(x[i * into + k]) * f64::from(w[j * into + k])).sum();
                    let near = (f64::from(got[i * out + j]) - dot).abs() < 1e-4;
                    assert!(near, "{n}x{into}x{out} at {i}, {j}");
                }
            }
            // On the way back: g W.
            let var = Var::from_tensor(&xt).unwrap();
            let g = noise(n * out, 5);
            let weighted = (frozen_linear(var.as_tensor(), &wt).unwrap()
                * Tensor::from_vec(g.clone(), (n, out), dev).unwrap())
            .unwrap();
            let grads = weighted.sum_all().unwrap().backward().unwrap();
            let back = values(grads.get(&var).unwrap()).unwrap();
            for i in 0..n {
                for k in 0..into {
                    let dot: f64 =
                        (0..out).map(|j| f64::from(g[i * out + j]) * f64::from(w[j * into + k])).sum();
                    assert!(
                        (f64::from(back[i * into + k]) - dot).abs() < 1e-4,
                        "back {n}x{into}x{out} at {i}, {k}"
                    );
                }
            }
        }
        let (x, w) = (noise(6, 1), noise(8, 2));
        let (x, w) = (Tensor::from_vec(x, (2, 3), dev).unwrap(), Tensor::from_vec(w, (2, 4), dev).unwrap());
        assert!(frozen_linear(&x, &w).is_err(), "a weight of another width is refused");
    }
}
