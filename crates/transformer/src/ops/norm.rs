//! RMS norm (arXiv 1910.07467).

use super::{ROWS, own, values, view};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
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
