//! A product by a frozen weight, which gets no gradient.

use super::{own, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use gemm::{Parallelism, gemm};

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
