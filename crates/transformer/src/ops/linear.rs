//! Linear modules: by a frozen weight, which gets no gradient, with or without something of low rank added; by a weight
//! that is trained.
//!
//! Each is one op. As a graph of products, scalings and sums a step of the lab's LoRAs took a fifth longer, in passes over
//! memory between the products (`benches/src/bin/steps.rs` times steps).

use super::{own, read, view};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use gemm::{Parallelism, gemm};
use std::sync::OnceLock;

/// A matrix in a slice, as it lies there or transposed.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major.
    fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        if data.len() != rows * cols {
            bail!("{} values are no matrix [{rows}, {cols}]", data.len());
        }
        Ok(Self { data, rows, cols, row_stride: cols, col_stride: 1 })
    }

    fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// `factor · self · other`, row-major.
    fn times(self, other: Matrix<'_>, factor: f32) -> Result<Vec<f32>> {
        let n = self.rows * other.cols;
        let mut out = Vec::<f32>::with_capacity(n);
        self.into(other, factor, false, &mut out)?;
        // SAFETY: `into` wrote the first n elements, for which there is room.
        unsafe { out.set_len(n) };
        Ok(out)
    }

    /// `out += factor · self · other`.
    fn add_to(self, other: Matrix<'_>, factor: f32, out: &mut Vec<f32>) -> Result<()> {
        self.into(other, factor, true, out)
    }

    /// The product into the memory of `out`: added to its elements, or over whatever is there.
    fn into(self, other: Matrix<'_>, factor: f32, add: bool, out: &mut Vec<f32>) -> Result<()> {
        let n = self.rows * other.cols;
        let fits = if add { out.len() == n } else { out.capacity() >= n };
        if self.cols != other.rows || !fits {
            bail!("[{}, {}] does not fit [{}, {}]", self.rows, self.cols, other.rows, other.cols);
        }
        let threads = rayon::current_num_threads();
        let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
        // SAFETY: both operands are matrices by `Matrix::new`, so all reads lie inside their slices; `out`, borrowed by nobody
        // else, has room for rows x cols elements, which are initialised where they are read (when added to) by the check
        // above; without adding, all are written and none is read.
        unsafe {
            gemm(
                self.rows,
                other.cols,
                self.cols,
                out.as_mut_ptr(),
                1,
                other.cols as isize,
                add,
                self.data.as_ptr(),
                self.col_stride as isize,
                self.row_stride as isize,
                other.data.as_ptr(),
                other.col_stride as isize,
                other.row_stride as isize,
                1f32,
                factor,
                false,
                false,
                false,
                parallelism,
            );
        }
        Ok(())
    }
}

/// A weight `[out, in]` and a bias `[out]` that get no gradient.
pub type Weight<'a> = (&'a Tensor, Option<&'a Tensor>);

struct Frozen {
    w: Tensor,
    bias: Option<Tensor>,
}

impl Frozen {
    /// Whatever the layout of the weight.
    fn new((w, bias): Weight<'_>) -> Result<Self> {
        let bias = bias.map(|b| b.detach().contiguous()).transpose()?;
        Ok(Self { w: w.detach().contiguous()?, bias })
    }

    /// `x Wᵀ + bias`.
    fn forward(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let (out, into) = self.w.dims2()?;
        let w = read(&self.w);
        let (x, w) = (Matrix::new(x, n, into)?, Matrix::new(w.values()?, out, into)?);
        let Some(bias) = &self.bias else { return x.times(w.t(), 1.0) };
        let bias = read(bias);
        let bias = Matrix::new(bias.values()?, 1, out)?;
        let mut y = bias.data.repeat(n);
        x.add_to(w.t(), 1.0, &mut y)?;
        Ok(y)
    }

    /// `g W`.
    fn back(&self, g: &[f32], n: usize) -> Result<Vec<f32>> {
        let (out, into) = self.w.dims2()?;
        let w = read(&self.w);
        Matrix::new(g, n, out)?.times(Matrix::new(w.values()?, out, into)?, 1.0)
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = l.shape().dims2()?.0;
        Ok(own(self.forward(view(s, l)?, n)?, (n, self.w.dims2()?.0)))
    }
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let back = self.back(read(&grad).values()?, x.dims2()?.0)?;
        Ok(Some(Tensor::from_vec(back, x.shape(), x.device())?))
    }
}

/// `x Wᵀ + bias` with no gradient for either.
pub fn frozen_linear(x: &Tensor, weight: Weight<'_>) -> Result<Tensor> {
    let (x, op) = (x.contiguous()?, Frozen::new(weight)?);
    if x.track_op() { x.apply_op1(op) } else { x.apply_op1_no_bwd(&op) }
}

/// `x Wᵀ + bias + s (x Aᵀ) Bᵀ`, or the last term alone.
struct LowRank {
    frozen: Option<Frozen>,
    scale: f32,
    /// `x Aᵀ` of the forward pass: rank columns.
    narrow: OnceLock<Vec<f32>>,
}

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "low-rank-linear"
    }
    fn cpu_fwd(
        &self,
        sx: &CpuStorage,
        lx: &Layout,
        sa: &CpuStorage,
        la: &Layout,
        sb: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, into) = lx.shape().dims2()?;
        let ((rank, _), (out, _)) = (la.shape().dims2()?, lb.shape().dims2()?);
        let x = view(sx, lx)?;
        let (a, b) = (Matrix::new(view(sa, la)?, rank, into)?, Matrix::new(view(sb, lb)?, out, rank)?);
        let narrow = Matrix::new(x, n, into)?.times(a.t(), 1.0)?;
        let thin = Matrix::new(&narrow, n, rank)?;
        let y = match &self.frozen {
            Some(frozen) => {
                let mut y = frozen.forward(x, n)?;
                if y.len() != n * out {
                    bail!("low-rank-linear: factors of {out} outputs do not fit the weight");
                }
                thin.add_to(b.t(), self.scale, &mut y)?;
                y
            }
            None => thin.times(b.t(), self.scale)?,
        };
        let _ = self.narrow.set(narrow);
        Ok(own(y, (n, out)))
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((n, into), (out, rank)) = (x.dims2()?, b.dims2()?);
        let Some(narrow) = self.narrow.get() else { bail!("low-rank-linear: backward before forward") };
        let grad = grad.contiguous()?;
        let (xs, held_a, held_b, gs) = (read(x), read(a), read(b), read(&grad));
        let g = Matrix::new(gs.values()?, n, out)?;
        let back = g.times(Matrix::new(held_b.values()?, out, rank)?, self.scale)?;
        let back = Matrix::new(&back, n, rank)?;
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let dx = if x.track_op() {
            let a = Matrix::new(held_a.values()?, rank, into)?;
            let dx = match &self.frozen {
                Some(frozen) => {
                    let mut dx = frozen.back(g.data, n)?;
                    back.add_to(a, 1.0, &mut dx)?;
                    dx
                }
                None => back.times(a, 1.0)?,
            };
            Some(tensor(dx, x)?)
        } else {
            None
        };
        let da = match a.track_op() {
            true => Some(tensor(back.t().times(Matrix::new(xs.values()?, n, into)?, 1.0)?, a)?),
            false => None,
        };
        let db = match b.track_op() {
            true => Some(tensor(g.t().times(Matrix::new(narrow, n, rank)?, self.scale)?, b)?),
            false => None,
        };
        Ok((dx, da, db))
    }
}

/// `x Wᵀ + bias + s (x Aᵀ) Bᵀ`, or the last term alone; a gradient reaches `x`, `A`, `B` and `s` where they ask for one.
/// `A [rank, in]`, `B [out, rank]`, `s [1]`.
pub fn low_rank_linear(
    x: &Tensor,
    weight: Option<Weight<'_>>,
    (a, b, s): (&Tensor, &Tensor, &Tensor),
) -> Result<Tensor> {
    // A scale that is a variable goes into B, whose gradient brings its own.
    let (b, scale) = match s.track_op() {
        true => (b.broadcast_mul(s)?, 1.0),
        false => (b.clone(), read(s).values()?[0]),
    };
    let op = LowRank { frozen: weight.map(Frozen::new).transpose()?, scale, narrow: OnceLock::new() };
    x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)
}

/// `x Wᵀ` by a weight that is trained.
struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "trained-linear"
    }
    fn cpu_fwd(
        &self,
        sx: &CpuStorage,
        lx: &Layout,
        sw: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((n, into), (out, _)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let (x, w) = (Matrix::new(view(sx, lx)?, n, into)?, Matrix::new(view(sw, lw)?, out, into)?);
        Ok(own(x.times(w.t(), 1.0)?, (n, out)))
    }
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((n, into), out) = (x.dims2()?, w.dims2()?.0);
        let grad = grad.contiguous()?;
        let (xs, ws, gs) = (read(x), read(w), read(&grad));
        let g = Matrix::new(gs.values()?, n, out)?;
        let dx = g.times(Matrix::new(ws.values()?, out, into)?, 1.0)?;
        let dw = g.t().times(Matrix::new(xs.values()?, n, into)?, 1.0)?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dx, x)?), Some(tensor(dw, w)?)))
    }
}

/// `x Wᵀ` with gradients for both.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&w.contiguous()?, Linear)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
    use crate::ops::values;
    use candle_core::{Device, Var};

    #[test]
    fn frozen_linear_gives_no_gradient_to_its_weight() {
        let dev = &Device::Cpu;
        let w = Var::from_tensor(&Tensor::from_vec(noise(12, 1), &[4, 3], dev).unwrap()).unwrap();
        let x = Var::from_tensor(&Tensor::from_vec(noise(6, 2), &[2, 3], dev).unwrap()).unwrap();
        let y = frozen_linear(x.as_tensor(), (w.as_tensor(), None)).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some());
        assert!(grads.get(&w).is_none());
        check(&[&[2, 3]], |t| frozen_linear(&t[0], (w.as_tensor(), None)));
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
                pool.install(|| values(&frozen_linear(&xt, (w, None)).unwrap()).unwrap())
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
            let weighted = (frozen_linear(var.as_tensor(), (&wt, None)).unwrap()
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
        assert!(frozen_linear(&x, (&w, None)).is_err(), "a weight of another width is refused");
    }

    /// `[x, W, bias, A, B, s]` of small sizes that are no multiple of anything.
    fn parts() -> [Tensor; 6] {
        let shapes: [&[usize]; 6] = [&[5, 7], &[3, 7], &[3], &[2, 7], &[3, 2], &[1]];
        let tensor = |(i, shape): (usize, &[usize])| {
            let n = shape.iter().product();
            Tensor::from_vec(noise(n, 20 + i as u32), shape, &Device::Cpu).unwrap()
        };
        let mut i = 0;
        shapes.map(|shape| {
            i += 1;
            tensor((i, shape))
        })
    }

    #[test]
    fn low_rank_linear_is_its_formula_in_f64() {
        let parts = parts();
        let [x, w, offset, a, b, s] = &parts;
        let [xs, ws, cs, fa, fb, fs] =
            parts.each_ref().map(|t| values(t).unwrap().into_iter().map(f64::from).collect::<Vec<_>>());
        for (weight, bias) in [(true, true), (true, false), (false, false)] {
            let got = low_rank_linear(x, weight.then_some((w, bias.then_some(offset))), (a, b, s));
            let got = values(&got.unwrap()).unwrap();
            for n in 0..5 {
                for o in 0..3 {
                    let product = |row: &[f64]| (0..7).map(|k| xs[n * 7 + k] * row[k]).sum::<f64>();
                    let low: f64 = (0..2).map(|r| product(&fa[r * 7..]) * fb[o * 2 + r]).sum();
                    let whole = if weight { product(&ws[o * 7..]) } else { 0.0 };
                    let want = whole + if bias { cs[o] } else { 0.0 } + fs[0] * low;
                    let found = f64::from(got[n * 3 + o]);
                    assert!((found - want).abs() < 1e-5, "{n}, {o}: {found} against {want}");
                }
            }
        }
    }

    #[test]
    fn low_rank_linear_brings_gradients_to_input_factors_and_scale() {
        let [x, w, bias, a, b, s] = &parts();
        for weight in [None, Some((w, None)), Some((w, Some(bias)))] {
            check(&[&[5, 7], &[2, 7], &[3, 2]], |t| low_rank_linear(&t[0], weight, (&t[1], &t[2], s)));
            check(&[&[5, 7], &[1]], |t| low_rank_linear(&t[0], weight, (a, b, &t[1])));
            check(&[&[2, 7], &[3, 2], &[1]], |t| low_rank_linear(x, weight, (&t[0], &t[1], &t[2])));
        }
        let frozen = Var::from_tensor(w).unwrap();
        let x = Var::from_tensor(x).unwrap();
        let y = low_rank_linear(x.as_tensor(), Some((frozen.as_tensor(), None)), (a, b, s)).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&frozen).is_none());
    }

    #[test]
    fn no_rows_and_no_rank_are_sizes_like_others() {
        let [x, w, bias, a, b, s] = &parts();
        let none = x.narrow(0, 0, 0).unwrap().contiguous().unwrap();
        let y = low_rank_linear(&none, Some((w, Some(bias))), (a, b, s)).unwrap();
        assert_eq!(y.dims(), [0, 3]);
        let thin = |t: &Tensor, dim| t.narrow(dim, 0, 0).unwrap().contiguous().unwrap();
        let y = low_rank_linear(x, Some((w, Some(bias))), (&thin(a, 0), &thin(b, 1), s)).unwrap();
        assert_eq!(values(&y).unwrap(), values(&frozen_linear(x, (w, Some(bias))).unwrap()).unwrap());
    }

    #[test]
    fn factors_that_do_not_fit_are_refused() {
        let [x, w, _, a, b, s] = &parts();
        let short = b.narrow(0, 0, 2).unwrap();
        assert!(low_rank_linear(x, Some((w, None)), (a, &short, s)).is_err());
        assert!(low_rank_linear(x, None, (b, b, s)).is_err());
        assert!(low_rank_linear(x, None, (a, &b.t().unwrap(), s)).is_err());
    }

    #[test]
    fn linear_brings_gradients_to_input_and_weight() {
        check(&[&[5, 7], &[3, 7]], |t| linear(&t[0], &t[1]));
        let [x, w, ..] = &parts();
        let (got, want) = (linear(x, w).unwrap(), frozen_linear(x, (w, None)).unwrap());
        assert_eq!(values(&got).unwrap(), values(&want).unwrap());
    }
}
