//! What a row of logits says: cross entropy, divergence from a reference, log-odds of a set of tokens.

use super::{own, read, values, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::Arc;

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
        let xs = read(x);
        let xs = xs.values()?;
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
    use crate::ops::testing::{check, noise};
    use candle_core::Device;

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
}
