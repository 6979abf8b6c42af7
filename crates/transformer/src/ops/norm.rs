//! RMS norm (arXiv 1910.07467).

use super::simd::{dot, wide};
use super::{ROWS, own, read, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

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
            wide(
                #[inline(always)]
                || forward(out, x, w, self.eps),
            );
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
        let g = g.contiguous()?;
        let (xs, ws, gs) = (read(x), read(w), read(&g));
        let (xs, ws, gs) = (xs.values()?, ws.values()?, gs.values()?);
        let mut dx = vec![0f32; xs.len()];
        // A frozen norm asks for nothing.
        let mut dw = w.track_op().then(|| vec![0f32; ws.len()]);
        wide(
            #[inline(always)]
            || backward(&mut dx, dw.as_deref_mut(), (xs, ws, gs), self.eps),
        );
        let dw = dw.map(|dw| Tensor::from_vec(dw, w.shape(), w.device())).transpose()?;
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), dw))
    }
}

#[inline(always)]
fn forward(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    for (out, x) in out.chunks_mut(w.len()).zip(x.chunks(w.len())) {
        let r = inverse_rms(x, eps);
        for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
            *o = x * r * w;
        }
    }
}

/// `dx`, and `dw` if asked for, of input, weight and the output's gradient.
#[inline(always)]
fn backward(dx: &mut [f32], mut dw: Option<&mut [f32]>, (x, w, g): (&[f32], &[f32], &[f32]), eps: f32) {
    let d = w.len();
    let mut gw = vec![0f32; d];
    for ((dx, x), g) in dx.chunks_mut(d).zip(x.chunks(d)).zip(g.chunks(d)) {
        let r = inverse_rms(x, eps);
        for ((gw, &g), &w) in gw.iter_mut().zip(g).zip(w) {
            *gw = g * w;
        }
        let k = dot(&gw, x) * r * r * r / d as f32;
        for ((dx, &gw), &x) in dx.iter_mut().zip(&gw).zip(x) {
            *dx = gw * r - x * k;
        }
        if let Some(dw) = dw.as_deref_mut() {
            for ((dw, &g), &x) in dw.iter_mut().zip(g).zip(x) {
                *dw += g * x * r;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `w · x / sqrt(mean(x²) + eps)` over the last dimension (arXiv 1910.07467).
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op2(w, RmsNorm { eps: eps as f32 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
    use crate::ops::values;
    use candle_core::Device;

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
}
