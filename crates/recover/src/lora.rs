//! What the trained methods share: factors of a module, a schedule, a random start.

use crate::run_error::RunError;
use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use transformer::{Attachment, Attachments, Model, ModuleKind};

pub use transformer::ModuleFactors;

/// How long and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Optimiser steps.
    pub steps: usize,
    /// Rows a step.
    pub rows: usize,
    /// Largest learning rate; a rise over a twentieth of the steps (at most 100), then linear to zero.
    pub rate: f64,
}

impl Schedule {
    /// Learning rate of one step, counted from 0.
    pub fn rate_at(&self, step: usize) -> f64 {
        let warm = (self.steps / 20).clamp(1, 100);
        let rise = ((step + 1) as f64 / warm as f64).min(1.0);
        self.rate * rise * (1.0 - step as f64 / self.steps as f64)
    }

    pub(crate) fn check(&self) -> Result<(), RunError> {
        RunError::check_positive("steps", self.steps as f64)?;
        RunError::check_positive("rows", self.rows as f64)?;
        RunError::check_positive("rate", self.rate)
    }
}

/// Numbers from a seed: SplitMix64, and Box-Muller for the normal distribution. The same on every machine up to the
/// last bit of `ln` and `cos`.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of one seed and one name, so that a draw depends on neither order nor number of others.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a of the name.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ hash)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number below `n`, which is above zero; the bias of the remainder is below `n / 2^64`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

/// A LoRA that is being trained: `A` normal with deviation `1/√in`, `B` zero, as arXiv 2106.09685 starts.
#[derive(Debug)]
pub(crate) struct Trained {
    rank: usize,
    scale: f32,
    slots: Vec<(usize, ModuleKind, Var, Var)>,
    attachments: Attachments,
}

impl Trained {
    pub(crate) fn new(
        model: &Model,
        modules: &[ModuleKind],
        rank: usize,
        alpha: f64,
        seed: u64,
        base: &Attachments,
    ) -> Result<Self, RunError> {
        let dev = &Device::Cpu;
        let scale = (alpha / rank as f64) as f32;
        let scales = Tensor::from_slice(&[scale], 1, dev)?;
        let (mut slots, mut attachments) = (Vec::new(), base.clone());
        for layer in 0..model.architecture().layers {
            for m in model.architecture().modules().into_iter().filter(|m| modules.contains(&m.kind)) {
                let (kind, out, inn) = (m.kind, m.out, m.into);
                let mut random = Random::new(seed, &kind.module(layer));
                let std = 1.0 / (inn as f32).sqrt();
                let init: Vec<f32> = (0..rank * inn).map(|_| random.normal() * std).collect();
                let a = Var::from_tensor(&Tensor::from_vec(init, (rank, inn), dev)?)?;
                let b = Var::zeros((out, rank), DType::F32, dev)?;
                let at =
                    Attachment { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: scales.clone() };
                attachments.add(layer, kind, at);
                slots.push((layer, kind, a, b));
            }
        }
        if slots.is_empty() {
            return Err(RunError::NoModule);
        }
        Ok(Self { rank, scale, slots, attachments })
    }

    pub(crate) fn vars(&self) -> Vec<Var> {
        self.slots.iter().flat_map(|(_, _, a, b)| [a.clone(), b.clone()]).collect()
    }

    /// The base's attachments and the LoRA's, as variables.
    pub(crate) fn attachments(&self) -> &Attachments {
        &self.attachments
    }

    /// The values now, the scale folded into `B`.
    pub(crate) fn factors(&self) -> Result<Vec<ModuleFactors>, RunError> {
        let values = |v: &Var| v.flatten_all()?.to_vec1::<f32>();
        self.slots
            .iter()
            .map(|(layer, kind, a, b)| {
                let b = values(b)?.into_iter().map(|x| x * self.scale).collect();
                Ok(ModuleFactors { layer: *layer, kind: *kind, rank: self.rank, b, a: values(a)? })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_rises_and_falls_to_zero() {
        let s = Schedule { steps: 100, rows: 1, rate: 1.0 };
        // Five steps of rise: 1/5 of the rate, then 1 − step/100 of it.
        assert!((s.rate_at(0) - 0.2).abs() < 1e-12);
        assert!((s.rate_at(4) - 0.96).abs() < 1e-12);
        assert!((s.rate_at(99) - 0.01).abs() < 1e-12);
        assert!(matches!(
            Schedule { rate: f64::NAN, ..s }.check(),
            Err(RunError::Setting { name: "rate", .. })
        ));
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_deviation_one() {
        let mut r = Random::new(1, "x");
        let x: Vec<f64> = (0..20_000).map(|_| f64::from(r.normal())).collect();
        let mean = x.iter().sum::<f64>() / 2e4;
        let square = x.iter().map(|x| x * x).sum::<f64>() / 2e4;
        // Five deviations of the mean of 20,000 draws: 0.035; of their squares 0.05.
        assert!(mean.abs() < 0.035 && (square - 1.0).abs() < 0.05, "{mean} {square}");
        assert_ne!(Random::new(1, "x").next(), Random::new(1, "y").next());
        assert_ne!(Random::new(1, "x").next(), Random::new(2, "x").next());
    }
}
