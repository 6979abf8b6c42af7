//! Training: a whole model, or a LoRA over a frozen one.
//!
//! A whole model is trained on two halves of each batch in two threads, whose gradients are added in a fixed order;
//! a LoRA in one thread. Either way the result does not depend on the number of cores.

use crate::error::LabError;
use crate::language::rng;
use candle_core::{Device, Tensor, Var};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use transformer::optimise::{AdamW, Optimiser};
use transformer::{
    AnswerBatch, Architecture, Attachment, Attachments, LinearShape, Model, ModelError, ModuleKind, Row,
    WeightSource,
};

/// Named f32 weights held in memory: a tiny model between two stages.
#[derive(Debug, Clone, Default)]
pub struct Weights(pub BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl WeightSource for Weights {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        self.0
            .get(name)
            .cloned()
            .ok_or_else(|| ModelError::Config { key: name.into(), problem: "has no weights".into() })
    }
}

/// Draws from the normal distribution (Box-Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// Random weights are drawn when first asked for; the draw depends on the name, not on the order.
struct Random<'a> {
    architecture: &'a Architecture,
    seed: u64,
}

impl WeightSource for Random<'_> {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let a = self.architecture;
        let shape = a
            .shape(name)
            .ok_or_else(|| ModelError::Config { key: name.into(), problem: "is no weight".into() })?;
        if let [len] = shape[..] {
            // Biases do nothing at first, norms keep what they are given.
            let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
            return Ok((shape, vec![value; len]));
        }
        // Residual writes start smaller, so that depth does not raise the variance.
        let std = match name.rsplit('.').nth(1) {
            Some("o_proj" | "down_proj") => 0.06 / (2.0 * a.layers as f32).sqrt(),
            _ => 0.06,
        };
        let mut rng = rng(self.seed, name);
        let n = shape.iter().product();
        Ok((shape, (0..n).map(|_| normal(&mut rng) * std).collect()))
    }
}

/// How long and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Optimiser steps.
    pub steps: usize,
    /// Rows a step.
    pub rows: usize,
    /// Largest learning rate; a short rise, then linear to zero.
    pub rate: f64,
}

impl Schedule {
    fn rate_at(&self, step: usize) -> f64 {
        let warm = (self.steps / 20).clamp(1, 100);
        let rise = ((step + 1) as f64 / warm as f64).min(1.0);
        self.rate * rise * (1.0 - step as f64 / self.steps as f64)
    }
}

/// A pool of one thread: keeps the ops of one job on the thread that runs it.
pub fn single_thread() -> Result<rayon::ThreadPool, LabError> {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| LabError::Thread(e.to_string()))
}

/// Calls `work` for `0..n`, `threads` at a time, each call on a thread that has a pool of one for itself, so that nothing
/// depends on the number of cores. The first error wins.
pub fn each<E: From<LabError> + Send>(
    n: usize,
    threads: usize,
    work: &(dyn Fn(usize) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<E>> = Mutex::new(None);
    let stop = || failed.lock().map_or(true, |f| f.is_some());
    std::thread::scope(|s| {
        for _ in 0..threads.max(1) {
            s.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= n || stop() {
                        return;
                    }
                    let result = match single_thread() {
                        Ok(pool) => pool.install(|| work(i)),
                        Err(e) => Err(e.into()),
                    };
                    if let (Err(e), Ok(mut slot)) = (result, failed.lock()) {
                        slot.get_or_insert(e);
                    }
                }
            });
        }
    });
    match failed.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(e)) => Err(e),
        Err(_) => Err(LabError::Thread("work".into()).into()),
    }
}

/// Trains all weights on rows from `next`; starts from `start`, or from random weights of `seed`. `stop` is asked after each
/// step and may end the training early.
pub fn whole(
    architecture: &Architecture,
    start: Option<&Weights>,
    seed: u64,
    schedule: Schedule,
    pad: u32,
    next: &mut dyn FnMut() -> Result<Row, LabError>,
    stop: &mut dyn FnMut(usize, f32, &Model) -> Result<bool, LabError>,
) -> Result<Weights, LabError> {
    let random = Random { architecture, seed };
    let source: &dyn WeightSource = match start {
        Some(w) => w,
        None => &random,
    };
    let model = Model::trainable(architecture.clone(), source)?;
    let vars: Vec<Var> = model.variables().iter().map(|(_, v)| v.clone()).collect();
    let mut optimiser = Optimiser::new(vars, AdamW { weight_decay: 0.01, ..AdamW::default() });
    let pools = [single_thread()?, single_thread()?];
    let none = Attachments::none();
    for step in 0..schedule.steps {
        let rows = (0..schedule.rows).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
        let (left, right) = rows.split_at(schedule.rows / 2);
        let half = |rows: &[Row], pool: &rayon::ThreadPool| -> Result<(f32, Vec<Vec<f32>>), LabError> {
            pool.install(|| {
                let loss = AnswerBatch::new(rows, pad).cross_entropy(&model, &none)?;
                let grads = loss.backward()?;
                Ok((loss.to_vec1::<f32>()?[0], optimiser.gradients(&grads)?))
            })
        };
        let (a, b) = std::thread::scope(|s| {
            let other = s.spawn(|| half(right, &pools[1]));
            let a = half(left, &pools[0]);
            (a, other.join())
        });
        let (loss_a, mut grads) = a?;
        let (loss_b, other) = b.map_err(|_| LabError::Thread("whole model".into()))??;
        for (g, o) in grads.iter_mut().zip(&other) {
            for (g, o) in g.iter_mut().zip(o) {
                *g = (*g + o) * 0.5;
            }
        }
        optimiser.step(grads, schedule.rate_at(step))?;
        if stop(step + 1, (loss_a + loss_b) * 0.5, &model)? {
            break;
        }
    }
    let mut out = Weights::default();
    for (name, var) in model.variables() {
        out.0.insert(name.clone(), (var.dims().to_vec(), var.flatten_all()?.to_vec1::<f32>()?));
    }
    Ok(out)
}

/// A trained LoRA: `delta = (alpha / rank) · B A` for each module.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Rank of every module.
    pub rank: usize,
    /// Scale times rank.
    pub alpha: f64,
    /// Layer, module, `B [out, rank]`, `A [rank, in]`; values exact in bf16.
    pub modules: Vec<(usize, ModuleKind, Vec<f32>, Vec<f32>)>,
}

impl Lora {
    /// As attachments at scale 1.
    pub fn attachments(&self) -> Result<Attachments, LabError> {
        let mut out = Attachments::none();
        for (layer, kind, b, a) in &self.modules {
            out.add_fixed(*layer, *kind, (b, a), self.rank, (self.alpha / self.rank as f64) as f32)?;
        }
        Ok(out)
    }
}

/// Rank and alpha of every LoRA of the lab.
pub const LORA_RANK: usize = 8;
const LORA_ALPHA: f64 = 16.0;

/// Rounds to the nearest bf16.
pub fn round_bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// Trains a LoRA on every linear module of `model`. `stop` is asked after each step with the state so far and may end
/// the training early.
pub fn lora(
    model: &Model,
    seed: u64,
    schedule: Schedule,
    pad: u32,
    next: &mut dyn FnMut() -> Result<Row, LabError>,
    stop: &mut dyn FnMut(usize, f32, &Attachments) -> Result<bool, LabError>,
) -> Result<Lora, LabError> {
    let a = model.architecture();
    let mut rng = rng(seed, "lora");
    let scale = Tensor::from_slice(&[(LORA_ALPHA / LORA_RANK as f64) as f32], 1, &Device::Cpu)?;
    let mut attachments = Attachments::none();
    let mut vars = Vec::new();
    let mut slots = Vec::new();
    for layer in 0..a.layers {
        for LinearShape { kind, out, into: inn, .. } in a.modules() {
            let std = 1.0 / (inn as f32).sqrt();
            let init: Vec<f32> = (0..LORA_RANK * inn).map(|_| normal(&mut rng) * std).collect();
            let va = Var::from_tensor(&Tensor::from_vec(init, (LORA_RANK, inn), &Device::Cpu)?)?;
            let vb = Var::zeros((out, LORA_RANK), candle_core::DType::F32, &Device::Cpu)?;
            attachments.add(
                layer,
                kind,
                Attachment { a: va.as_tensor().clone(), b: vb.as_tensor().clone(), scale: scale.clone() },
            );
            vars.push(va.clone());
            vars.push(vb.clone());
            slots.push((layer, kind, va, vb));
        }
    }
    let mut optimiser = Optimiser::new(vars, AdamW::default());
    for step in 0..schedule.steps {
        let rows = (0..schedule.rows).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
        let loss = AnswerBatch::new(&rows, pad).cross_entropy(model, &attachments)?;
        let grads = optimiser.gradients(&loss.backward()?)?;
        optimiser.step(grads, schedule.rate_at(step))?;
        if stop(step + 1, loss.to_vec1::<f32>()?[0], &attachments)? {
            break;
        }
    }
    let values = |v: &Var| -> Result<Vec<f32>, LabError> {
        Ok(v.flatten_all()?.to_vec1::<f32>()?.into_iter().map(round_bf16).collect())
    };
    let modules = slots
        .into_iter()
        .map(|(layer, kind, va, vb)| Ok((layer, kind, values(&vb)?, values(&va)?)))
        .collect::<Result<Vec<_>, LabError>>()?;
    Ok(Lora { rank: LORA_RANK, alpha: LORA_ALPHA, modules })
}

/// `W + scale · B A`, formed in f32 and rounded once to bf16.
pub fn merge(weights: &Weights, lora: &Lora) -> Weights {
    let mut out = weights.clone();
    let scale = (lora.alpha / lora.rank as f64) as f32;
    for (layer, kind, b, a) in &lora.modules {
        if let Some((shape, w)) = out.0.get_mut(&format!("{}.weight", kind.module(*layer))) {
            let inn = shape[1];
            for (row, b) in w.chunks_mut(inn).zip(b.chunks(lora.rank)) {
                for (b, a) in b.iter().zip(a.chunks(inn)) {
                    for (w, a) in row.iter_mut().zip(a) {
                        *w += scale * b * a;
                    }
                }
                for w in row.iter_mut() {
                    *w = round_bf16(*w);
                }
            }
        }
    }
    out
}
