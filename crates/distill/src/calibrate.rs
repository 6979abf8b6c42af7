//! Which coefficients a target needs.
//!
//! That one scalar a layer is tuned in each target on a few examples is SafeGene's (arXiv 2606.06519); the problem
//! below, its limits and the solver are our own definitions, because no source states any.
//!
//! With `L` the loss of the wanted answers on the safety shots (nat per answer: `−log p` of all its tokens, mean over shots) and
//! `KL` how far the target moves on the task shots and on the benign shots (nat per token, each averaged over its own tokens):
//!
//! ```text
//! minimise    log max(L(c), δ) + p · mean_l (c_l − 1)² + q · (KL_task(c) + KL_benign(c))
//! subject to  KL_task(c) ≤ ε,  KL_benign(c) ≤ ε,  0 ≤ c_l ≤ c_max
//! ```
//!
//! or nothing where that makes refusals no likelier. The gene was distilled to be added once, on many rows; a handful of shots says
//! where that is not enough or too much, and little about anything else. So leaving 1 has a price `p`: the coefficients go as far
//! as the shots together make safer by it. KL has a price `q`, too: KL within the limit is not free
//! either. It chooses among safe answers only: where it ends with a loss that is not safe, the problem is solved once more without it.
//! Below δ nothing is gained. For the same reason
//! safety rows should be cut to how their refusal opens ([`transformer::Chat::opening`]): what a target says after that is its
//! wording, and a loss over all of it is spent on teaching phrases.
//!
//! The problem is solved as two smooth ones, both under the limits, of whose answers the better is taken: the least of both prices such
//! that `L ≤ δ`, where that can be had (without prices the least distance), and, unless it costs next to nothing, the least `log L` with
//! its prices. [`Aim::LeastKl`] asks for the least `KL_task + KL_benign` such that `L ≤ δ`
//! instead of the first, and only where that cannot be had within the limits for the least `L`, without prices.
//!
//! A target whose loss is small to begin with is left as it is. The solver is [`crate::sqp`] with exact gradients, on `log L`, or,
//! where gradients cost too much memory, COBYLA (Powell 1994) on values alone; what ends above the limit is scaled back
//! towards zero by bisection.

use crate::gene::{Frozen, GeneAttachments};
use crate::sqp::{self, Point, Settings};
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use transformer::{AnswerBatch, ModelError, Openings, Row};

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
    /// Harmful prompts, each with a refusal, best cut to its opening.
    pub safety: Vec<Row>,
    /// Rows of the target's task.
    pub task: Vec<Row>,
    /// Harmless requests like the harmful ones in form; may be empty, at the price of over-refusal.
    pub benign: Vec<Row>,
}

/// What may move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freedom {
    /// One coefficient for each layer.
    #[default]
    PerLayer,
    /// One coefficient for all layers: task arithmetic with the gene.
    OneForAll,
}

/// What the first problem asks for, of all coefficients that are safe enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// Those near 1 and of little KL, each as far as it makes safer.
    #[default]
    Nearest,
    /// Those of least KL on the shots. It trusts a handful of shots more than the gene, whose coefficients end far apart.
    LeastKl,
}

/// How the two problems are solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Solver {
    /// SQP with exact gradients.
    #[default]
    Gradients,
    /// COBYLA on values alone: no backward pass, more evaluations.
    ForwardOnly,
}

/// What may be spent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// ε: limit on KL, nat per token, on the task shots and again on the benign shots.
    pub max_kl: f64,
    /// Largest coefficient.
    pub c_max: f64,
    /// δ: safety loss that is enough, nat per answer.
    pub delta: f64,
    /// Safety loss of a target that is left as it is, nat per answer: one that refuses already can only lose.
    #[serde(default)]
    pub leave: f64,
    /// What `log L` has to fall by to pay for coefficients that are 1 away from 1 ([`Aim::Nearest`]). Records from before there was
    /// this price in the first of the two problems, too, do not name it and read as 0.
    #[serde(default)]
    pub price: f64,
    /// What `log L` has to fall by to pay for KL, for each nat per token of both kinds together ([`Aim::Nearest`]).
    #[serde(default)]
    pub kl_price: f64,
    /// Safety loss above which nothing counts as safe, nat per answer: where prices end above it (and above δ), KL is free.
    #[serde(default)]
    pub unsafe_above: f64,
    /// Evaluations with gradients in each of the two problems, and in each once more where KL turns out to be free; without gradients ten times as many.
    pub gradients_max: usize,
    /// What may move.
    #[serde(default)]
    pub freedom: Freedom,
    /// What is asked for.
    #[serde(default)]
    pub aim: Aim,
    /// How.
    #[serde(default)]
    pub solver: Solver,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_kl: 0.02,
            c_max: 10.0,
            delta: 0.001,
            leave: UNSAFE,
            price: PRICE,
            kl_price: KL_PRICE,
            unsafe_above: UNSAFE,
            gradients_max: 24,
            freedom: Freedom::PerLayer,
            aim: Aim::Nearest,
            solver: Solver::Gradients,
        }
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
        positive("delta", self.delta)?;
        let not_negative = |name, value: f64| match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(CalibrationError::Limit { name, value, need: "zero or more" }),
        };
        not_negative("price", self.price)?;
        not_negative("kl-price", self.kl_price)?;
        if self.unsafe_above.is_nan() || self.unsafe_above < 0.0 {
            return Err(CalibrationError::Limit {
                name: "unsafe-above",
                value: self.unsafe_above,
                need: "zero or more",
            });
        }
        not_negative("leave", self.leave)
    }
}

/// Which of the two problems gave the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// The target was safe already: nothing is expressed.
    AlreadySafe,
    /// The safety asked for, within the limits, at the least price of KL and of distance from 1, and worth it.
    Nearest,
    /// The safety asked for, within the limits, at the least KL.
    LeastKl,
    /// The safety asked for costs more than the limit, or more KL or distance from 1 than it is worth: about as safe as that allows.
    LeastLoss,
}

/// Coefficients and what they do on the shots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Calibration {
    /// One coefficient a layer.
    pub coefficients: BTreeMap<u32, f64>,
    /// Which problem gave them.
    pub goal: Goal,
    /// Safety loss without the gene, nat per answer.
    pub loss_before: f64,
    /// Safety loss at coefficient 1 everywhere.
    pub loss_at_one: f64,
    /// Safety loss as calibrated.
    pub loss: f64,
    /// KL on the task shots, nat per token.
    pub kl_task: f64,
    /// KL on the benign shots; null without benign shots.
    pub kl_benign: Option<f64>,
    /// Gradients used; evaluations where there are no gradients.
    pub gradients: usize,
}

/// How much the coefficient of one layer mattered: what is lost and saved without it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerEffect {
    /// The layer.
    pub layer: u32,
    /// Its coefficient.
    pub coefficient: f64,
    /// Safety loss with this coefficient at 0 and the others as they are, nat per answer.
    pub loss_without: f64,
    /// KL on task and benign shots then, nat per token.
    pub kl_without: f64,
}

/// A point of the trade-off: as safe as a limit allows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TradeOff {
    /// The limit, nat per token.
    pub max_kl: f64,
    /// Safety loss, nat per answer.
    pub loss: f64,
    /// KL on the task shots.
    pub kl_task: f64,
    /// KL on the benign shots; null without benign shots.
    pub kl_benign: Option<f64>,
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

/// Loss and divergences of one target as functions of the coefficients.
struct Problem<'a> {
    target: &'a Frozen<'a>,
    gene: &'a GeneAttachments,
    freedom: Freedom,
    safety: AnswerBatch,
    task: Set,
    benign: Option<Set>,
}

/// Loss and divergences at one point; gradients are empty where none were asked for.
#[derive(Debug, Clone)]
struct Values {
    loss: (f64, Vec<f64>),
    task: (f64, Vec<f64>),
    benign: (f64, Vec<f64>),
}

impl Values {
    fn within(&self, max_kl: f64) -> bool {
        self.task.0 <= max_kl && self.benign.0 <= max_kl
    }

    fn kl(&self) -> f64 {
        self.task.0 + self.benign.0
    }

    /// `log L` with its gradient; the floor keeps the logarithm finite for a perfect refusal.
    fn log_loss(&self) -> (f64, Vec<f64>) {
        let l = self.loss.0.max(1e-9);
        (l.ln(), self.loss.1.iter().map(|g| g / l).collect())
    }

    /// Constraints on KL, in units of ε.
    fn within_limit(&self, eps: f64) -> (Vec<f64>, Vec<Vec<f64>>) {
        let bound =
            |(value, slope): &(f64, Vec<f64>)| (value / eps - 1.0, slope.iter().map(|g| g / eps).collect());
        [&self.task, &self.benign].into_iter().map(bound).unzip()
    }

    /// The first problem: the least cost such that the loss is at most δ and KL at most ε.
    fn nearest(&self, x: &[f64], log_delta: f64, eps: f64, cost: &Cost) -> Point {
        let (l, dl) = self.log_loss();
        let (mut h, mut dh) = self.within_limit(eps);
        h.push(l - log_delta);
        dh.push(dl);
        let (f, df) = cost.of(x, self);
        Point { x: x.to_vec(), f, df, h, dh }
    }

    /// The first problem, of the other aim: least KL such that the loss is at most δ.
    fn least_kl(&self, x: &[f64], log_delta: f64) -> Point {
        let (l, dl) = self.log_loss();
        let df = self.task.1.iter().zip(&self.benign.1).map(|(a, b)| a + b).collect();
        Point { x: x.to_vec(), f: self.kl(), df, h: vec![l - log_delta], dh: vec![dl] }
    }

    /// The second problem: least loss, and what it costs, under the limit.
    fn least_loss(&self, x: &[f64], eps: f64, cost: &Cost) -> Point {
        let (l, dl) = self.log_loss();
        let (h, dh) = self.within_limit(eps);
        let (paid, slope) = cost.of(x, self);
        // Without gradients asked for there are none.
        let df = dl.iter().zip(&slope).map(|(a, b)| a + b).collect();
        Point { x: x.to_vec(), f: l + paid, df, h, dh }
    }
}

/// What coefficients cost, in units of `log L`.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Of being 1 away from 1.
    far: f64,
    /// Of a nat of KL.
    kl: f64,
}

impl Cost {
    /// Nothing costs anything.
    const NONE: Self = Self { far: 0.0, kl: 0.0 };

    fn is_none(&self) -> bool {
        self.far == 0.0 && self.kl == 0.0
    }

    /// `far · mean (x − 1)² + kl · (KL_task + KL_benign)` with its gradient, which is empty where none was asked for.
    fn of(&self, x: &[f64], v: &Values) -> (f64, Vec<f64>) {
        let (far, slope) = from_one(x, self.far);
        let kl = v.task.1.iter().zip(&v.benign.1).map(|(a, b)| self.kl * (a + b));
        (far + self.kl * v.kl(), slope.iter().zip(kl).map(|(a, b)| a + b).collect())
    }
}

/// The default price of leaving 1.
const PRICE: f64 = 0.3;
/// The default price of KL.
const KL_PRICE: f64 = 500.0;

/// `weight · mean (x − 1)²` with its gradient.
fn from_one(x: &[f64], weight: f64) -> (f64, Vec<f64>) {
    let weight = weight / x.len().max(1) as f64;
    let far = x.iter().map(|x| weight * (x - 1.0).powi(2)).sum();
    (far, x.iter().map(|x| 2.0 * weight * (x - 1.0)).collect())
}

impl<'a> Problem<'a> {
    fn new(
        target: &'a Frozen<'a>,
        gene: &'a GeneAttachments,
        shots: &Shots,
        freedom: Freedom,
        pad: u32,
    ) -> Result<Self, CalibrationError> {
        for (rows, what) in [(&shots.safety, "safety"), (&shots.task, "task")] {
            if rows.is_empty() {
                return Err(CalibrationError::NoShots(what));
            }
        }
        if gene.layers().is_empty() {
            return Err(CalibrationError::NoLayer);
        }
        let set = |rows: &[Row]| -> Result<Set, CalibrationError> {
            let batch = AnswerBatch::new(rows, pad);
            let reference = batch.reference(target.model, &target.own)?;
            Ok(Set { batch, reference })
        };
        Ok(Self {
            target,
            gene,
            freedom,
            safety: AnswerBatch::summed(&shots.safety, pad),
            task: set(&shots.task)?,
            benign: if shots.benign.is_empty() { None } else { Some(set(&shots.benign)?) },
        })
    }

    /// Number of coefficients that are free.
    fn len(&self) -> usize {
        match self.freedom {
            Freedom::PerLayer => self.gene.layers().len(),
            Freedom::OneForAll => 1,
        }
    }

    /// One coefficient for each layer.
    fn by_layer(&self, c: &[f64]) -> BTreeMap<u32, f64> {
        self.gene.layers().iter().copied().zip(c.iter().copied().cycle()).collect()
    }

    fn values(&self, c: &[f64], gradients: bool) -> Result<Values, CalibrationError> {
        let vars = c
            .iter()
            .map(|&c| Var::from_slice(&[c as f32], 1, &Device::Cpu))
            .collect::<Result<Vec<_>, _>>()?;
        let tensor = |var: &Var| match gradients {
            true => var.as_tensor().clone(),
            false => var.as_tensor().detach(),
        };
        let scales: Vec<Tensor> = vars.iter().map(tensor).collect();
        let scales = self.gene.layers().iter().copied().zip(scales.into_iter().cycle()).collect();
        let attachments = self.target.with(&self.gene.attach(&scales));
        let measure = |y: Tensor, what| -> Result<(f64, Vec<f64>), CalibrationError> {
            let value = f64::from(y.to_vec1::<f32>()?[0]);
            if !value.is_finite() {
                return Err(CalibrationError::NotFinite(what));
            }
            let mut slope = Vec::new();
            if gradients {
                let grads = y.backward()?;
                for var in &vars {
                    slope.push(match grads.get(var) {
                        Some(g) => f64::from(g.flatten_all()?.to_vec1::<f32>()?[0]),
                        None => 0.0,
                    });
                }
            }
            Ok((value.max(0.0), slope))
        };
        let model = self.target.model;
        let loss = measure(self.safety.cross_entropy(model, &attachments)?, "safety")?;
        let task = measure(self.task.batch.kl(model, &attachments, &self.task.reference)?, "task")?;
        let benign = match &self.benign {
            Some(set) => measure(set.batch.kl(model, &attachments, &set.reference)?, "benign")?,
            None => (0.0, vec![0.0; if gradients { vars.len() } else { 0 }]),
        };
        Ok(Values { loss, task, benign })
    }

    /// Solves one of the two problems from `start`; returns the best point, its values, and the evaluations used.
    fn solve(
        &self,
        start: &[f64],
        settings: &Settings,
        solver: Solver,
        state: &dyn Fn(&Values, &[f64]) -> Point,
    ) -> Result<(Point, Values, usize), CalibrationError> {
        let at = |x: &[f64]| self.values(x, solver == Solver::Gradients);
        let (best, used) = match solver {
            Solver::Gradients => {
                let first = state(&at(start)?, start);
                let (best, used) = sqp::minimise(first, settings, |x| at(x).map(|v| state(&v, x)))?;
                (best, used + 1)
            }
            Solver::ForwardOnly => self.forward_only(start, settings, state)?,
        };
        let values = self.values(&best.x, false)?;
        Ok((best, values, used))
    }

    /// COBYLA over values; the best point is the solver's last or the best feasible one that it saw.
    fn forward_only(
        &self,
        start: &[f64],
        settings: &Settings,
        state: &dyn Fn(&Values, &[f64]) -> Point,
    ) -> Result<(Point, usize), CalibrationError> {
        struct Seen {
            last: Option<Point>,
            best: Option<Point>,
            used: usize,
            failed: Option<CalibrationError>,
        }
        let seen = RefCell::new(Seen { last: None, best: None, used: 0, failed: None });
        let at = |x: &[f64]| -> Option<Point> {
            let x: Vec<f64> = x.iter().map(|x| x.clamp(settings.low, settings.high)).collect();
            if let Some(p) = seen.borrow().last.as_ref().filter(|p| p.x == x) {
                return Some(p.clone());
            }
            let point = self.values(&x, false).map(|v| state(&v, &x));
            let mut seen = seen.borrow_mut();
            match point {
                Ok(p) => {
                    seen.used += 1;
                    if seen.best.as_ref().is_none_or(|b| sqp::better(&p, b, settings.feasible)) {
                        seen.best = Some(p.clone());
                    }
                    seen.last = Some(p.clone());
                    Some(p)
                }
                Err(e) => {
                    seen.failed.get_or_insert(e);
                    None
                }
            }
        };
        let first = at(start);
        if let Some(p) =
            first.as_ref().filter(|p| p.violation() <= settings.feasible && p.f <= settings.enough)
        {
            return Ok((p.clone(), 1));
        }
        let constraints = first.map_or(0, |p| p.h.len());
        // After an error every value is flat, so that the solver ends soon.
        let objective = |x: &[f64], _: &mut ()| at(x).map_or(0.0, |p| p.f);
        let at = &at;
        let bound = |j: usize| move |x: &[f64], _: &mut ()| at(x).map_or(0.0, |p| -p.h[j]);
        let bounds: Vec<_> = (0..constraints).map(bound).collect();
        let bounds: Vec<&dyn cobyla::Func<()>> = bounds.iter().map(|b| b as &dyn cobyla::Func<()>).collect();
        let border = vec![(settings.low, settings.high); start.len()];
        let stop = cobyla::StopTols { ftol_rel: settings.progress, ..Default::default() };
        let size = cobyla::RhoBeg::All(settings.radius.min(0.5 * (settings.high - settings.low)));
        // What it says of its end does not matter: the best point seen counts.
        let evaluations = 10 * settings.evaluations_max;
        let _ = cobyla::minimize(objective, start, &border, &bounds, (), evaluations, size, Some(stop));
        let seen = seen.into_inner();
        match (seen.failed, seen.best) {
            (Some(e), _) => Err(e),
            (None, Some(best)) => Ok((best, seen.used)),
            (None, None) => Err(CalibrationError::NoLayer),
        }
    }

    /// The second problem, ended by scaling back to the limit.
    fn least_loss(
        &self,
        start: &[f64],
        limits: &Limits,
        max_kl: f64,
        cost: &Cost,
    ) -> Result<(Vec<f64>, Values, usize), CalibrationError> {
        let curvature = 2.0 * cost.far / start.len().max(1) as f64;
        let settings = Settings { radius: 1.0, curvature, ..settings(limits) };
        let strict = max_kl / (1.0 + settings.feasible);
        let state = |v: &Values, x: &[f64]| v.least_loss(x, strict, cost);
        let (best, mut v, mut used) = self.solve(start, &settings, limits.solver, &state)?;
        let mut c = best.x;
        if !v.within(max_kl) {
            let (mut low, mut high) = (0.0, 1.0);
            let at = |t: f64| -> Vec<f64> { c.iter().map(|x| x * t).collect() };
            let mut held = (at(0.0), self.values(&at(0.0), false)?);
            for _ in 0..8 {
                let mid = 0.5 * (low + high);
                let point = self.values(&at(mid), false)?;
                used += 1;
                if point.within(max_kl) {
                    low = mid;
                    held = (at(mid), point);
                } else {
                    high = mid;
                }
            }
            (c, v) = held;
        }
        Ok((c, v, used))
    }

    /// Coefficients under these limits and prices.
    fn solved(&self, limits: &Limits) -> Result<Calibration, CalibrationError> {
        let (eps, log_delta) = (limits.max_kl, limits.delta.ln());
        let (zeros, ones) = (vec![0.0; self.len()], vec![1.0f64.min(limits.c_max); self.len()]);
        let (zero, one) = (self.values(&zeros, false)?, self.values(&ones, false)?);
        let result = |c: &[f64], v: &Values, goal, gradients| Calibration {
            coefficients: self.by_layer(c),
            goal,
            loss_before: zero.loss.0,
            loss_at_one: one.loss.0,
            loss: v.loss.0,
            kl_task: v.task.0,
            kl_benign: self.benign.as_ref().map(|_| v.benign.0),
            gradients,
        };
        if zero.loss.0 <= limits.delta.max(limits.leave) {
            return Ok(result(&zeros, &zero, Goal::AlreadySafe, 0));
        }
        let cost = match limits.aim {
            Aim::Nearest => Cost { far: limits.price, kl: limits.kl_price },
            Aim::LeastKl => Cost::NONE,
        };
        let paid = |c: &[f64], v: &Values| cost.of(c, v).0;
        if limits.aim == Aim::Nearest
            && one.loss.0 <= limits.delta
            && one.within(eps)
            && paid(&ones, &one) <= CHEAP
        {
            return Ok(result(&ones, &one, Goal::Nearest, 0));
        }
        // 1. The safety asked, within the limits. Where nothing costs anything, the nearest to 1.
        let first_cost = if cost.is_none() { Cost { far: 1.0, kl: 0.0 } } else { cost };
        let (enough, curvature, goal) = match limits.aim {
            // A cost of a millionth is none.
            Aim::Nearest => (1e-6, 2.0 * first_cost.far / ones.len() as f64, Goal::Nearest),
            Aim::LeastKl => (NEGLIGIBLE * eps, 0.0, Goal::LeastKl),
        };
        let settings = Settings { enough, curvature, ..settings(limits) };
        // So much stricter as the solver is lax: what it ends with is within the limit itself.
        let strict = eps / (1.0 + settings.feasible);
        let state = |v: &Values, x: &[f64]| match limits.aim {
            Aim::Nearest => v.nearest(x, log_delta, strict, &first_cost),
            Aim::LeastKl => v.least_kl(x, log_delta),
        };
        let (best, at_best, first) = self.solve(&ones, &settings, limits.solver, &state)?;
        let held = best.violation() <= settings.feasible && at_best.within(eps);
        if held && paid(&best.x, &at_best) <= CHEAP {
            return Ok(result(&best.x, &at_best, goal, first));
        }
        // 2. The least loss under the limit that is worth its price, from where it is about met on the way to 1 everywhere (to the
        // first answer, where distance has no price): KL grows with the square.
        let (from, at_from) = if cost.far > 0.0 { (&ones, &one) } else { (&best.x, &at_best) };
        let over = (at_from.task.0.max(at_from.benign.0) / eps).max(1.0).sqrt();
        let start: Vec<f64> = from.iter().map(|x| x / over).collect();
        let (c, v, second) = self.least_loss(&start, limits, eps, &cost)?;
        let used = first + second;
        if held && log_delta + paid(&best.x, &at_best) <= v.loss.0.max(limits.delta).ln() + paid(&c, &v) {
            return Ok(result(&best.x, &at_best, goal, used));
        }
        // The solver's best need not be better than nothing.
        let (c, v) = if v.loss.0 < zero.loss.0 { (&c, &v) } else { (&zeros, &zero) };
        // It may be as safe as asked where the first answer was not found.
        let safe = limits.aim == Aim::Nearest && v.loss.0 <= limits.delta;
        Ok(result(c, v, if safe { Goal::Nearest } else { Goal::LeastLoss }, used))
    }
}

/// Share of the limit on KL below which less of it is not looked for.
const NEGLIGIBLE: f64 = 1e-3;

/// A safety loss above which nothing counts as safe, nat per answer.
const UNSAFE: f64 = 0.05;

/// A price that is paid without looking for something cheaper.
const CHEAP: f64 = 0.05;

/// Budget and tolerances.
fn settings(limits: &Limits) -> Settings {
    Settings {
        low: 0.0,
        high: limits.c_max,
        radius: 2.0,
        evaluations_max: limits.gradients_max,
        feasible: 0.02,
        progress: 1e-3,
        enough: f64::NEG_INFINITY,
        curvature: 0.0,
    }
}

/// Finds the coefficients of `gene` in `target`.
pub fn calibrate(
    target: &Frozen<'_>,
    gene: &GeneAttachments,
    shots: &Shots,
    limits: &Limits,
    pad: u32,
) -> Result<Calibration, CalibrationError> {
    limits.check()?;
    let problem = Problem::new(target, gene, shots, limits.freedom, pad)?;
    let found = problem.solved(limits)?;
    let safe = found.goal != Goal::LeastLoss || found.loss <= limits.unsafe_above.max(limits.delta);
    if safe || limits.kl_price == 0.0 || limits.aim == Aim::LeastKl {
        return Ok(found);
    }
    // The price of KL chooses among safe answers; it is no reason for an unsafe one.
    let free = problem.solved(&Limits { kl_price: 0.0, ..*limits })?;
    let gradients = found.gradients + free.gradients;
    Ok(Calibration { gradients, ..if free.loss < found.loss { free } else { found } })
}

/// What each layer's coefficient does on the shots: loss and KL without it.
pub fn layer_effects(
    target: &Frozen<'_>,
    gene: &GeneAttachments,
    shots: &Shots,
    found: &Calibration,
    pad: u32,
) -> Result<Vec<LayerEffect>, CalibrationError> {
    let problem = Problem::new(target, gene, shots, Freedom::PerLayer, pad)?;
    let all: Vec<f64> =
        gene.layers().iter().map(|l| found.coefficients.get(l).copied().unwrap_or(0.0)).collect();
    let mut out = Vec::new();
    for (i, &layer) in gene.layers().iter().enumerate() {
        let (mut loss, mut kl) = (found.loss, found.kl_task + found.kl_benign.unwrap_or(0.0));
        if all[i] > 0.0 {
            let mut c = all.clone();
            c[i] = 0.0;
            let v = problem.values(&c, false)?;
            (loss, kl) = (v.loss.0, v.kl());
        }
        out.push(LayerEffect { layer, coefficient: all[i], loss_without: loss, kl_without: kl });
    }
    Ok(out)
}

/// The least loss under each limit of `max_kls`, which ascend: each begins where the one before ended.
pub fn trade_off(
    target: &Frozen<'_>,
    gene: &GeneAttachments,
    shots: &Shots,
    limits: &Limits,
    max_kls: &[f64],
    pad: u32,
) -> Result<Vec<TradeOff>, CalibrationError> {
    let problem = Problem::new(target, gene, shots, limits.freedom, pad)?;
    let mut start = vec![0.5f64.min(limits.c_max); problem.len()];
    let mut out = Vec::new();
    for &max_kl in max_kls {
        Limits { max_kl, ..*limits }.check()?;
        let (c, v, _) = problem.least_loss(&start, limits, max_kl, &Cost::NONE)?;
        out.push(TradeOff {
            max_kl,
            loss: v.loss.0,
            kl_task: v.task.0,
            kl_benign: problem.benign.as_ref().map(|_| v.benign.0),
        });
        if c.iter().any(|&c| c > 0.0) {
            start = c;
        }
    }
    Ok(out)
}
