//! `silu(gate) · up` (arXiv 2002.05202), of two operands or of the halves of one.

use super::simd::{exp, wide};
use super::{own, read, view};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Elements per unit of parallel work.
const PART: usize = 1 << 14;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn forward(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g * sigmoid(g) * u;
    }
}

/// Gradients `dg` and `du` for the gate and the other operand, `d` being that for the product.
#[inline(always)]
fn backward((dg, du): (&mut [f32], &mut [f32]), gate: &[f32], up: &[f32], d: &[f32]) {
    for ((((dg, du), &g), &u), &d) in dg.iter_mut().zip(du).zip(gate).zip(up).zip(d) {
        let s = sigmoid(g);
        *dg = d * u * s * (1.0 + g * (1.0 - s));
        *du = d * g * s;
    }
}

struct Swiglu;

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
        out.par_chunks_mut(PART).zip(g.par_chunks(PART)).zip(u.par_chunks(PART)).for_each(|((out, g), u)| {
            wide(
                #[inline(always)]
                || forward(out, g, u),
            );
        });
        Ok(own(out, lg.shape()))
    }
    fn bwd(
        &self,
        g: &Tensor,
        u: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (gs, us, ds) = (read(g), read(u), read(&grad));
        let (gs, us, ds) = (gs.values()?, us.values()?, ds.values()?);
        let (mut dg, mut du) = (vec![0f32; gs.len()], vec![0f32; us.len()]);
        dg.par_chunks_mut(PART)
            .zip(du.par_chunks_mut(PART))
            .zip(gs.par_chunks(PART))
            .zip(us.par_chunks(PART))
            .zip(ds.par_chunks(PART))
            .for_each(|((((dg, du), g), u), d)| {
                wide(
                    #[inline(always)]
                    || backward((dg, du), g, u, d),
                );
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
            wide(
                #[inline(always)]
                || forward(out, g, u),
            );
        });
        Ok(own(out, (n, f)))
    }
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let both = x.dim(1)?;
        let f = both / 2;
        let grad = grad.contiguous()?;
        let (xs, ds) = (read(x), read(&grad));
        let (xs, ds) = (xs.values()?, ds.values()?);
        let mut dx = vec![0f32; xs.len()];
        dx.par_chunks_mut(both).zip(xs.par_chunks(both)).zip(ds.par_chunks(f)).for_each(|((dx, x), d)| {
            let ((g, u), halves) = (x.split_at(f), dx.split_at_mut(f));
            wide(
                #[inline(always)]
                || backward(halves, g, u, d),
            );
        });
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// `silu(gate) · up` of the two halves of each row, gate first.
pub fn swiglu_fused(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.contiguous()?.apply_op1(SwigluFused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
    use crate::ops::values;
    use candle_core::Device;

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
}
