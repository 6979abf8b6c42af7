//! Which coefficients a target needs.
//!
//! That one scalar a layer is tuned in each target on a few examples is SafeGene's (arXiv 2606.06519); the two problems
//! below, their limits and the solver are our own definitions, because no source states any.
//!
//! With `L` the loss of the wanted refusals on the safety shots and `KL` how far the target moves on the task shots and
//! on the benign shots (nat per token, each averaged over its own tokens):
//!
//! 1. the least `KL_task + KL_benign` such that `L ≤ δ`, if that needs no more than the limit ε on each;
//! 2. else the least `L` such that `KL_task ≤ ε` and `KL_benign ≤ ε`.
//!
//! `0 ≤ c_l ≤ c_max` always. The solver is [`crate::sqp`] with exact gradients, on `log L`; what ends above the limit
//! is scaled back towards zero by bisection.

use crate::gene::GeneAttachments;
use crate::sqp::{self, Point, Settings};
use candle_core::{Device, Var};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use transformer::{AnswerBatch, Attachments, Model, ModelError, Openings, Row};

/// Why no coefficients were found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// A model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The gene could not be read.
    #[error(transparent)]
    Gene(#[from] gene::GeneError),
    /// A kind of shots is empty.
    #[error("there are no {0} shots")]
    NoShots(&'static str),
    /// A safety shot teaches something else than refusing.
    #[error("safety shot at line {line}: the answer `{answer}` is not a refusal")]
    NotARefusal {
        /// Line of the shots' file.
        line: usize,
        /// The answer's opening.
        answer: String,
    },
    /// The gene has no layer to express.
    #[error("the gene has no layer with a low-rank module")]
    NoLayer,
    /// A limit makes no sense.
    #[error("`{name}` is {value}; it must be {need}")]
    Limit {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        need: &'static str,
    },
    /// The loss is not finite.
    #[error("the loss on the {0} shots is not finite; are the target's weights sound?")]
    NotFinite(&'static str),
}

impl From<candle_core::Error> for CalibrationError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.into())
    }
}

impl CalibrationError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotARefusal { .. } => Some(
                "training on it would teach the harm; replace the answer by a refusal, or name your model's openings with --refusals"
                    .into(),
            ),
            Self::Model(e) => e.hint(),
            Self::Gene(e) => e.hint(),
            _ => None,
        }
    }
}

/// Token rows to calibrate on.
#[derive(Debug, Clone, Default)]
pub struct Shots {
    /// Harmful prompts, each with a refusal.
    pub safety: Vec<Row>,
    /// Rows of the target's task.
    pub task: Vec<Row>,
    /// Harmless requests like the harmful ones in form; may be empty, at the price of over-refusal.
    pub benign: Vec<Row>,
}

/// What may be spent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// ε: limit on KL, nat per token, on the task shots and again on the benign shots.
    pub max_kl: f64,
    /// Largest coefficient.
    pub c_max: f64,
    /// δ: safety loss that is enough, nat per token.
    pub delta: f64,
    /// Evaluations with gradients in each of the two problems.
    pub gradients_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_kl: 0.02, c_max: 10.0, delta: 0.003, gradients_max: 24 }
    }
}

impl Limits {
    fn check(&self) -> Result<(), CalibrationError> {
        let positive = |name, value: f64| {
            if value > 0.0 && value.is_finite() {
                Ok(())
            } else {
                Err(CalibrationError::Limit { name, value, need: "a positive number" })
            }
        };
        positive("max-kl", self.max_kl)?;
        positive("c-max", self.c_max)?;
        positive("delta", self.delta)
    }
}

/// Which of the two problems gave the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// The target was safe already: nothing is expressed.
    AlreadySafe,
    /// The safety asked for, at the least KL.
    LeastKl,
    /// The safety asked for costs more than the limit: as safe as the limit allows.
    LeastLoss,
}

/// Coefficients and what they do on the shots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Calibration {
    /// One coefficient a layer.
    pub coefficients: BTreeMap<u32, f64>,
    /// Which problem gave them.
    pub goal: Goal,
    /// Safety loss without the gene, nat per token.
    pub loss_before: f64,
    /// Safety loss at coefficient 1 everywhere.
    pub loss_at_one: f64,
    /// Safety loss as calibrated.
    pub loss: f64,
    /// KL on the task shots, nat per token.
    pub kl_task: f64,
    /// KL on the benign shots; null without benign shots.
    pub kl_benign: Option<f64>,
    /// Gradients used.
    pub gradients: usize,
}

impl Calibration {
    /// Adding the gene makes the refusals *less* likely: the aligned and the degraded side may have been swapped.
    pub fn raises_safety_loss(&self) -> bool {
        // Of a target that refuses already nothing can be said: its loss is next to zero, and any addition raises it.
        self.goal != Goal::AlreadySafe && self.loss_at_one > self.loss_before
    }
}

/// Refuses safety shots whose answer is not a refusal; `rows` are (line, answer).
pub fn check_safety_shots<'a>(
    rows: impl Iterator<Item = (usize, &'a str)>,
    openings: &Openings,
) -> Result<(), CalibrationError> {
    for (line, answer) in rows {
        if !openings.refuses(answer) {
            return Err(CalibrationError::NotARefusal { line, answer: answer.chars().take(80).collect() });
        }
    }
    Ok(())
}

struct Set {
    batch: AnswerBatch,
    reference: Arc<Vec<f32>>,
}

struct Problem<'a> {
    model: &'a Model,
    gene: &'a GeneAttachments,
    safety: AnswerBatch,
    task: Set,
    benign: Option<Set>,
}

/// Loss and divergences at one point, with gradients.
struct Values {
    loss: (f64, Vec<f64>),
    task: (f64, Vec<f64>),
    benign: (f64, Vec<f64>),
}

impl Problem<'_> {
    fn values(&self, c: &[f64]) -> Result<Values, CalibrationError> {
        let mut vars = Vec::new();
        let mut scales = BTreeMap::new();
        for (&layer, &c) in self.gene.layers().iter().zip(c) {
            let var = Var::from_slice(&[c as f32], 1, &Device::Cpu)?;
            scales.insert(layer, var.as_tensor().clone());
            vars.push(var);
        }
        let attachments = self.gene.attach(&scales);
        let measure = |y: candle_core::Tensor, what| -> Result<(f64, Vec<f64>), CalibrationError> {
            let value = f64::from(y.to_vec1::<f32>()?[0]);
            if !value.is_finite() {
                return Err(CalibrationError::NotFinite(what));
            }
            let grads = y.backward()?;
            let mut slope = Vec::with_capacity(vars.len());
            for var in &vars {
                let g = match grads.get(var) {
                    Some(g) => f64::from(g.flatten_all()?.to_vec1::<f32>()?[0]),
                    None => 0.0,
                };
                slope.push(g);
            }
            Ok((value.max(0.0), slope))
        };
        let loss = measure(self.safety.cross_entropy(self.model, &attachments)?, "safety")?;
        let task = measure(self.task.batch.kl(self.model, &attachments, &self.task.reference)?, "task")?;
        let benign = match &self.benign {
            Some(set) => measure(set.batch.kl(self.model, &attachments, &set.reference)?, "benign")?,
            None => (0.0, vec![0.0; vars.len()]),
        };
        Ok(Values { loss, task, benign })
    }

    /// `log L` with its gradient; the floor keeps the logarithm finite for a perfect refusal.
    fn log_loss(v: &Values) -> (f64, Vec<f64>) {
        let l = v.loss.0.max(1e-9);
        (l.ln(), v.loss.1.iter().map(|g| g / l).collect())
    }
}

/// Finds the coefficients of `gene` in `model`.
pub fn calibrate(
    model: &Model,
    gene: &GeneAttachments,
    shots: &Shots,
    limits: &Limits,
    pad: u32,
) -> Result<Calibration, CalibrationError> {
    limits.check()?;
    for (rows, what) in [(&shots.safety, "safety"), (&shots.task, "task")] {
        if rows.is_empty() {
            return Err(CalibrationError::NoShots(what));
        }
    }
    let n = gene.layers().len();
    if n == 0 {
        return Err(CalibrationError::NoLayer);
    }
    let none = Attachments::none();
    let set = |rows: &[Row]| -> Result<Set, CalibrationError> {
        let batch = AnswerBatch::new(rows, pad);
        let reference = batch.reference(model, &none)?;
        Ok(Set { batch, reference })
    };
    let problem = Problem {
        model,
        gene,
        safety: AnswerBatch::new(&shots.safety, pad),
        task: set(&shots.task)?,
        benign: if shots.benign.is_empty() { None } else { Some(set(&shots.benign)?) },
    };
    let (eps, log_delta) = (limits.max_kl, limits.delta.ln());
    let settings = Settings {
        low: 0.0,
        high: limits.c_max,
        radius: 2.0,
        evaluations_max: limits.gradients_max,
        feasible: 0.02,
        progress: 1e-3,
    };

    let zero = problem.values(&vec![0.0; n])?;
    let one = problem.values(&vec![1.0f64.min(limits.c_max); n])?;
    let mut gradients = 2;
    let result = |c: &[f64], v: &Values, goal, gradients| Calibration {
        coefficients: gene.layers().iter().copied().zip(c.iter().copied()).collect(),
        goal,
        loss_before: zero.loss.0,
        loss_at_one: one.loss.0,
        loss: v.loss.0,
        kl_task: v.task.0,
        kl_benign: problem.benign.as_ref().map(|_| v.benign.0),
        gradients,
    };
    if zero.loss.0 <= limits.delta {
        return Ok(result(&vec![0.0; n], &zero, Goal::AlreadySafe, gradients));
    }

    // 1. The least KL for the safety asked.
    let least_kl = |x: &[f64], v: &Values| {
        let (l, dl) = Problem::log_loss(v);
        Point {
            x: x.to_vec(),
            f: v.task.0 + v.benign.0,
            df: v.task.1.iter().zip(&v.benign.1).map(|(a, b)| a + b).collect(),
            h: vec![l - log_delta],
            dh: vec![dl],
        }
    };
    let start = vec![1.0f64.min(limits.c_max); n];
    let evaluate = |x: &[f64]| problem.values(x).map(|v| least_kl(x, &v));
    let (best, used) = sqp::minimise(least_kl(&start, &one), &settings, evaluate)?;
    gradients += used;
    let at_best = problem.values(&best.x)?;
    if best.violation() <= settings.feasible && at_best.task.0 <= eps && at_best.benign.0 <= eps {
        return Ok(result(&best.x, &at_best, Goal::LeastKl, gradients));
    }

    // 2. The least loss under the limit; constraints are in units of ε.
    let least_loss = |x: &[f64], v: &Values| {
        let (f, df) = Problem::log_loss(v);
        let bound =
            |(value, slope): &(f64, Vec<f64>)| (value / eps - 1.0, slope.iter().map(|g| g / eps).collect());
        let (h, dh) = [&v.task, &v.benign].into_iter().map(bound).unzip();
        Point { x: x.to_vec(), f, df, h, dh }
    };
    // Start where the limit is about met on the way to the first problem's answer: KL grows with the square.
    let over = (at_best.task.0.max(at_best.benign.0) / eps).max(1.0).sqrt();
    let start: Vec<f64> = best.x.iter().map(|x| x / over).collect();
    let first = problem.values(&start)?;
    let evaluate = |x: &[f64]| problem.values(x).map(|v| least_loss(x, &v));
    let settings = Settings { radius: 1.0, ..settings };
    let (best, used) = sqp::minimise(least_loss(&start, &first), &settings, evaluate)?;
    gradients += used + 1;
    let mut c = best.x;
    let mut v = problem.values(&c)?;
    if v.task.0 > eps || v.benign.0 > eps {
        let (mut low, mut high) = (0.0, 1.0);
        let at = |t: f64| -> Vec<f64> { c.iter().map(|x| x * t).collect() };
        let mut held = (at(0.0), problem.values(&at(0.0))?);
        for _ in 0..8 {
            let mid = 0.5 * (low + high);
            let point = problem.values(&at(mid))?;
            gradients += 1;
            if point.task.0 <= eps && point.benign.0 <= eps {
                low = mid;
                held = (at(mid), point);
            } else {
                high = mid;
            }
        }
        (c, v) = held;
    }
    Ok(result(&c, &v, Goal::LeastLoss, gradients))
}
