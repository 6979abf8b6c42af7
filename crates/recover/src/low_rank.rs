//! Differences cut to a rank: the nearest thing in existing tools to a gene, and an extrapolation of alignment.
//!
//! `low-rank-restore` brings back the strongest directions of what fine-tuning changed:
//!
//! ```text
//! W = W_t + γ SVD_k(W_a − W_t)                k = 8, γ = 1
//! ```
//!
//! for every tensor of floats; SVD_k of a vector, and of a matrix whose shorter side is at most k, is all of it. So with
//! k large enough and γ = 1 the result is the aligned model. It has no source: `mergekit-extract-lora` does the first half.
//!
//! LoX (arXiv 2506.15606) comes before fine-tuning: the target is the aligned model, and models are trained from the result.
//!
//! ```text
//! W = W_a + coef SVD_k(W_a − W_base)          k = 6, coef = 1.25
//! ```
//!
//! for the linear modules of the layers; norms, biases, embeddings and head stay as they are.
//!
//! Departures of both: the factors come from the streaming factorisation of `lowrank`, whose residual exceeds that of
//! the exact SVD by some tenths of a percent, in f32 products.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use checkpoint::{Factors, Role, Unit};
use serde_json::{Map, Value, json};

use crate::error::{RecoverError, Result};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Recipe, rewrite};
use crate::settings::{Settings, Taking};
use crate::side::{Scope, Side, Step, add_products, is_weight, key_of};

/// The entry of the restoration.
pub(crate) static RESTORE: MethodInfo = MethodInfo {
    name: "low-rank-restore",
    title: "low-rank restore",
    paper: None,
    formula: "θ_t + γ SVD_k(θ_a − θ_t)",
    when: When::AfterTraining,
    needs: &[Need::Aligned],
    optional: &[],
    options: &[
        OptionInfo { name: "rank", default: "8", help: "k, 1 to 4096" },
        OptionInfo { name: "gamma", default: "1", help: "how much is restored, 0 or more" },
        OptionInfo { name: "seed", default: "0", help: "of the factorisation's sketch" },
    ],
    deviations: "a control of our own; vectors are restored whole, factors are those of a streaming factorisation",
    build: |settings| Ok(Box::new(LowRankRestore::new(settings)?)),
};

/// The entry of LoX.
pub(crate) static LOX: MethodInfo = MethodInfo {
    name: "lox",
    title: "LoX",
    paper: Some("2506.15606"),
    formula: "θ_a + coef SVD_k(θ_a − θ_base); --target is θ_a, and models are trained from the result",
    when: When::BeforeTraining,
    needs: &[Need::Base],
    optional: &[],
    options: &[
        OptionInfo { name: "rank", default: "6", help: "k, 1 to 4096" },
        OptionInfo {
            name: "coefficient",
            default: "1.25",
            help: "how far alignment is extrapolated, 0 or more",
        },
        OptionInfo { name: "seed", default: "0", help: "of the factorisation's sketch" },
    ],
    deviations: "linear modules of the layers only; factors are those of a streaming factorisation",
    build: |settings| Ok(Box::new(Lox::new(settings)?)),
};

/// The strongest directions of what fine-tuning changed, brought back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankRestore {
    /// The rank.
    pub rank: usize,
    /// How much is restored, 0 or more.
    pub gamma: f64,
    /// The sketch's seed.
    pub seed: u64,
}

/// Alignment extrapolated along its strongest directions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lox {
    /// The rank.
    pub rank: usize,
    /// How far, 0 or more.
    pub coefficient: f64,
    /// The sketch's seed.
    pub seed: u64,
}

impl LowRankRestore {
    fn new(settings: &Settings) -> Result<LowRankRestore> {
        let mut taking = Taking::new(RESTORE.name, settings);
        let (rank, gamma, seed) =
            (taking.left.rank.take(), taking.left.gamma.take(), taking.left.seed.take());
        let rank = taking.count("rank", rank, 8)?;
        let gamma = taking.number("gamma", gamma, 1.0, "a number of 0 or more", |x| x >= 0.0)?;
        taking.finish()?;
        Ok(LowRankRestore { rank, gamma, seed: seed.unwrap_or(0) })
    }
}

impl Lox {
    fn new(settings: &Settings) -> Result<Lox> {
        let mut taking = Taking::new(LOX.name, settings);
        let (rank, coefficient, seed) =
            (taking.left.rank.take(), taking.left.coefficient.take(), taking.left.seed.take());
        let rank = taking.count("rank", rank, 6)?;
        let coefficient =
            taking.number("coefficient", coefficient, 1.25, "a number of 0 or more", |x| x >= 0.0)?;
        taking.finish()?;
        Ok(Lox { rank, coefficient, seed: seed.unwrap_or(0) })
    }
}

impl Method for LowRankRestore {
    fn info(&self) -> &'static MethodInfo {
        &RESTORE
    }

    fn options(&self) -> Map<String, Value> {
        let options = [("rank", json!(self.rank)), ("gamma", json!(self.gamma)), ("seed", json!(self.seed))];
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: RESTORE.name, of_model: false });
        }
        models.target.check_family(models.aligned()?, Scope::All)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let cut = Cut {
            one: models.aligned()?,
            other: &models.target,
            target: &models.target,
            linear_only: false,
            rank: self.rank,
            seed: self.seed,
            coefficient: self.gamma,
            job,
            found: Mutex::default(),
        };
        cut.write(outputs)
    }
}

impl Method for Lox {
    fn info(&self) -> &'static MethodInfo {
        &LOX
    }

    fn options(&self) -> Map<String, Value> {
        let options = [
            ("rank", json!(self.rank)),
            ("coefficient", json!(self.coefficient)),
            ("seed", json!(self.seed)),
        ];
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: LOX.name, of_model: false });
        }
        models.target.check_family(models.base()?, Scope::Linear)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let cut = Cut {
            one: &models.target,
            other: models.base()?,
            target: &models.target,
            linear_only: true,
            rank: self.rank,
            seed: self.seed,
            coefficient: self.coefficient,
            job,
            found: Mutex::default(),
        };
        cut.write(outputs)
    }
}

/// The target with `coefficient * SVD_k(one - other)` added.
struct Cut<'a> {
    one: &'a Side,
    other: &'a Side,
    target: &'a Side,
    linear_only: bool,
    rank: usize,
    seed: u64,
    coefficient: f64,
    job: &'a Job<'a>,
    /// Rank, and share of the difference's norm, of what was factored.
    found: Mutex<BTreeMap<String, (usize, f64)>>,
}

impl Cut<'_> {
    fn write(&self, outputs: &Outputs) -> Result<Outcome> {
        let Some(writer) = &outputs.merged else { return Ok(Outcome::default()) };
        let rewritten = rewrite(self.target, self, writer, self.job)?;
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let reports = self.target.weights().filter(|unit| self.touches(unit)).map(|unit| {
            let (rank, share) = found.get(&unit.name).copied().unzip();
            let of = ModuleReport::of(unit);
            (unit.name.clone(), ModuleReport { action: Action::Added, rank, norm_ratio: share, ..of })
        });
        Ok(rewritten.outcome(reports.collect()))
    }

    fn touches(&self, unit: &Unit) -> bool {
        is_weight(unit) && (!self.linear_only || matches!(unit.role, Role::Linear { .. }))
    }

    /// Factors of a unit's difference; `None` where there is none.
    fn factors(&self, unit: &Unit) -> Result<Option<Factors>> {
        let step = Step::new(self.one, self.other, &unit.name)?;
        let difference = step.difference(self.job, 0)?;
        let found = self.job.algebra.factor(difference, key_of(&unit.name), self.rank, self.seed);
        let Some((low_rank, sumsq)) = found.map_err(|error| step.factor_error(error))? else {
            return Ok(None);
        };
        let captured: f64 = low_rank.singular.iter().map(|value| value * value).sum();
        let share = (low_rank.rank, (captured / sumsq).sqrt().min(1.0));
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(unit.name.clone(), share);
        let lowrank::LowRank { b, a, rows, cols, rank, .. } = low_rank;
        Ok(Some(Factors { b, a, rows, cols, rank, scale: self.coefficient }))
    }
}

impl Recipe for Cut<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        if !self.touches(unit) {
            return Ok(None);
        }
        if unit.rows().min(unit.cols()) <= self.rank as u64 {
            let (one, other) = (self.one.rows_of(&unit.name)?, self.other.rows_of(&unit.name)?);
            let coefficient = self.coefficient as f32;
            let restores = std::ptr::eq(self.other, self.target) && coefficient == 1.0;
            return Ok(Some(Box::new(move |rows, target| {
                let one = one.values(rows.clone())?;
                if restores {
                    return Ok(one);
                }
                let other = other.values(rows)?;
                let sides = target.iter().zip(one.iter().zip(&other));
                Ok(sides.map(|(&t, (&one, &other))| t + coefficient * (one - other)).collect())
            })));
        }
        // What does not differ was looked at all the same.
        let (factors, cols) = (Vec::from_iter(self.factors(unit)?), unit.cols());
        Ok(Some(Box::new(move |rows, target| {
            let mut new = target.to_vec();
            add_products(&factors, rows.start, cols, &mut new);
            Ok(new)
        })))
    }

    fn is_heavy(&self) -> bool {
        true
    }
}
