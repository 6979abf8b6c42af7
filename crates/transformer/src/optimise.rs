//! AdamW on f32 variables, with gradient clipping (arXiv 1711.05101).
//!
//! Moments are kept in f32; the learning rate is given at each step, so that a schedule is the caller's.

use crate::ops::simd::wide;
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

/// The optimiser's fixed settings.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this L2 norm over all variables.
    pub clip: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

/// Values and moments of all variables after some steps: enough to go on.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Moments {
    /// Steps done.
    pub step: i32,
    /// Of each variable in order: values, first moments, second moments.
    pub values: Vec<[Vec<f32>; 3]>,
}

/// Variables with their moments.
#[derive(Debug)]
pub struct Optimiser {
    settings: AdamW,
    vars: Vec<Var>,
    moments: Vec<(Vec<f32>, Vec<f32>)>,
    step: i32,
}

impl Optimiser {
    /// Fresh moments for `vars`.
    pub fn new(vars: Vec<Var>, settings: AdamW) -> Self {
        let moments = vars.iter().map(|v| (vec![0f32; v.elem_count()], vec![0f32; v.elem_count()])).collect();
        Self { settings, vars, moments, step: 0 }
    }

    /// The variables.
    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// Gradients of all variables as plain values, zeros where none arrived.
    pub fn gradients(&self, grads: &GradStore) -> Result<Vec<Vec<f32>>> {
        self.vars
            .iter()
            .map(|v| match grads.get(v) {
                Some(g) => g.flatten_all()?.to_vec1::<f32>(),
                None => Ok(vec![0f32; v.elem_count()]),
            })
            .collect()
    }

    /// Values and moments as they are.
    pub fn moments(&self) -> Result<Moments> {
        let one = |(var, (m, v)): (&Var, &(Vec<f32>, Vec<f32>))| -> Result<[Vec<f32>; 3]> {
            Ok([var.flatten_all()?.to_vec1()?, m.clone(), v.clone()])
        };
        let values = self.vars.iter().zip(&self.moments).map(one).collect::<Result<_>>()?;
        Ok(Moments { step: self.step, values })
    }

    /// Goes on from `moments`; `false`, and nothing is done, if they are those of other variables.
    pub fn restore(&mut self, moments: &Moments) -> Result<bool> {
        let fits = self.vars.len() == moments.values.len()
            && self
                .vars
                .iter()
                .zip(&moments.values)
                .all(|(var, parts)| parts.iter().all(|part| part.len() == var.elem_count()));
        if !fits {
            return Ok(false);
        }
        self.step = moments.step;
        for ((var, slot), [x, m, v]) in self.vars.iter().zip(&mut self.moments).zip(&moments.values) {
            var.set(&Tensor::from_slice(x, var.shape(), var.device())?)?;
            *slot = (m.clone(), v.clone());
        }
        Ok(true)
    }

    /// One step at `lr`; returns the gradient's L2 norm before clipping.
    pub fn step(&mut self, mut grads: Vec<Vec<f32>>, lr: f64) -> Result<f64> {
        let s = self.settings;
        self.step += 1;
        let norm = grads.iter().flatten().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        let shrink = if norm > s.clip { (s.clip / norm) as f32 } else { 1.0 };
        let (b1, b2) = (s.beta1 as f32, s.beta2 as f32);
        let c1 = (1.0 - s.beta1.powi(self.step)) as f32;
        let c2 = (1.0 - s.beta2.powi(self.step)) as f32;
        let (rate, decay, eps) = (lr as f32, (lr * s.weight_decay) as f32, s.eps as f32);
        for ((var, (m, v)), grad) in self.vars.iter().zip(&mut self.moments).zip(&mut grads) {
            let mut x = var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
            wide(
                #[inline(always)]
                || {
                    for (((x, m), v), g) in x.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(grad.iter())
                    {
                        let g = g * shrink;
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        *x -= decay * *x + rate * (*m / c1) / ((*v / c2).sqrt() + eps);
                    }
                },
            );
            var.set(&Tensor::from_vec(x, var.shape(), var.device())?)?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn first_step_moves_each_coordinate_by_the_rate() {
        // With fresh moments m/c1 = g and sqrt(v/c2) = |g|: the step is lr · sign(g).
        let var = Var::from_slice(&[1.0f32, -2.0, 0.5], 3, &Device::Cpu).unwrap();
        let mut opt = Optimiser::new(vec![var.clone()], AdamW { clip: 100.0, ..AdamW::default() });
        let norm = opt.step(vec![vec![3.0, -4.0, 0.0]], 0.1).unwrap();
        assert!((norm - 5.0).abs() < 1e-12);
        let x = var.to_vec1::<f32>().unwrap();
        for (x, want) in x.iter().zip([0.9, -1.9, 0.5]) {
            assert!((x - want).abs() < 1e-6, "{x} against {want}");
        }
    }

    #[test]
    fn converges_on_a_quadratic() {
        let var = Var::from_slice(&[5.0f32, -3.0], 2, &Device::Cpu).unwrap();
        let mut opt = Optimiser::new(vec![var.clone()], AdamW::default());
        for step in 0..400 {
            let g = var.to_vec1::<f32>().unwrap();
            opt.step(vec![g], 0.1 * (1.0 - f64::from(step) / 400.0)).unwrap();
        }
        assert!(var.to_vec1::<f32>().unwrap().iter().all(|x| x.abs() < 1e-2));
    }
}
