//! Rotary position embedding of the front of each head (arXiv 2104.09864), in both forms.

use super::{own, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, noise};
    use crate::ops::values;
    use candle_core::Device;

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
}
