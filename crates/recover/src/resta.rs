//! RESTA (arXiv 2402.11746): task arithmetic with a safety vector, optionally after DARE on what the task taught.
//!
//! ```text
//! W = W_t + γ (W_a − W_d)
//! W = W_a + m ⊙ (W_t − W_a) / (1 − p) + γ (W_a − W_d)      with DARE; m is 0 with probability p, else 1
//! ```
//!
//! for every tensor of floats. The source takes the degraded model to be the aligned one after fine-tuning on harmful
//! data, as we do. γ is tuned there; the default 1 is the plain formula, and below 0 it would subtract safety.
//!
//! Departures: which elements DARE drops depends on the seed, the tensor's name and the element's index only (a word of
//! Philox4x32-10), so it does not depend on threads or on how a folder is laid out. Buffers and integers keep the target's
//! bytes.

use checkpoint::Unit;
use kernels::philox4x32_10;
use serde_json::{Map, Value, json};

use crate::error::{RecoverError, Result};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Recipe, rewrite};
use crate::settings::{Settings, Taking};
use crate::side::{Scope, Side, is_weight, key_of};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "resta",
    title: "RESTA",
    paper: Some("2402.11746"),
    formula: "θ_t + γ (θ_a − θ_d)",
    when: When::AfterTraining,
    needs: &[Need::Aligned, Need::Degraded],
    optional: &[],
    options: &[
        OptionInfo { name: "gamma", default: "1", help: "how strongly safety is added, 0 or more" },
        OptionInfo {
            name: "drop",
            default: "0",
            help: "DARE: the probability with which an element of θ_t − θ_a is dropped, below 1; the rest is rescaled",
        },
        OptionInfo { name: "seed", default: "0", help: "which elements DARE drops" },
    ],
    deviations: "DARE's mask depends on seed, tensor name and element only",
    build: |settings| Ok(Box::new(Resta::new(settings)?)),
};

/// The safety vector added to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resta {
    /// How strongly, 0 or more.
    pub gamma: f64,
    /// The probability with which an element of the task's change is dropped, below 1; 0 is without DARE.
    pub drop: f64,
    /// Which elements are.
    pub seed: u64,
}

impl Resta {
    fn new(settings: &Settings) -> Result<Resta> {
        let mut taking = Taking::new(INFO.name, settings);
        let (gamma, drop, seed) =
            (taking.left.gamma.take(), taking.left.drop.take(), taking.left.seed.take());
        let gamma = taking.number("gamma", gamma, 1.0, "a number of 0 or more", |x| x >= 0.0)?;
        let drop = taking
            .number("drop", drop, 0.0, "a probability of 0 or more, below 1", |x| (0.0..1.0).contains(&x))?;
        taking.finish()?;
        Ok(Resta { gamma, drop, seed: seed.unwrap_or(0) })
    }
}

impl Method for Resta {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let options = [("gamma", json!(self.gamma)), ("drop", json!(self.drop)), ("seed", json!(self.seed))];
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: INFO.name, of_model: false });
        }
        models.target.check_family(models.aligned()?, Scope::All)?;
        models.target.check_family(models.degraded()?, Scope::All)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let Some(writer) = &outputs.merged else { return Ok(Outcome::default()) };
        let sum = Sum { method: *self, aligned: models.aligned()?, degraded: models.degraded()? };
        let rewritten = rewrite(&models.target, &sum, writer, job)?;
        let report = |unit| ModuleReport { action: Action::Added, ..ModuleReport::of(unit) };
        let modules = models.target.weights().map(|unit| (unit.name.clone(), report(unit))).collect();
        Ok(rewritten.outcome(modules))
    }
}

struct Sum<'a> {
    method: Resta,
    aligned: &'a Side,
    degraded: &'a Side,
}

impl Recipe for Sum<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        if !is_weight(unit) {
            return Ok(None);
        }
        let (aligned, degraded) = (self.aligned.rows_of(&unit.name)?, self.degraded.rows_of(&unit.name)?);
        let dare = (self.method.drop > 0.0).then(|| Dare::new(&self.method, &unit.name));
        let (gamma, cols) = (self.method.gamma as f32, unit.cols());
        Ok(Some(Box::new(move |rows, target| {
            let first = rows.start * cols;
            let (aligned, degraded) = (aligned.values(rows.clone())?, degraded.values(rows)?);
            let sides = target.iter().zip(aligned.iter().zip(&degraded));
            Ok(sides
                .enumerate()
                .map(|(i, (&t, (&a, &d)))| {
                    let task = dare.as_ref().map_or(t, |dare| dare.of(first + i as u64, a, t));
                    task + gamma * (a - d)
                })
                .collect())
        })))
    }
}

/// Drops elements of a task's change and rescales the others.
struct Dare {
    /// Words below this are dropped, of 2^32.
    below: f64,
    rescale: f32,
    key: [u32; 2],
    seed: [u32; 2],
}

impl Dare {
    fn new(method: &Resta, tensor: &str) -> Dare {
        let key = key_of(tensor);
        Dare {
            below: method.drop * 2f64.powi(32),
            rescale: (1.0 / (1.0 - method.drop)) as f32,
            key: [key as u32, (key >> 32) as u32],
            seed: [method.seed as u32, (method.seed >> 32) as u32],
        }
    }

    /// The target's element with its change dropped or rescaled.
    fn of(&self, index: u64, aligned: f32, target: f32) -> f32 {
        let block = index / 4;
        let words = philox4x32_10([block as u32, (block >> 32) as u32, self.key[0], self.key[1]], self.seed);
        if f64::from(words[(index % 4) as usize]) < self.below {
            aligned
        } else {
            aligned + (target - aligned) * self.rescale
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dare_keeps_the_mean_of_a_change() {
        let n = 100_000u64;
        for drop in [0.1, 0.5, 0.9] {
            let dare = Dare::new(&Resta { gamma: 0.0, drop, seed: 3 }, "model.layers.0.mlp.up_proj.weight");
            let values: Vec<f64> = (0..n).map(|i| f64::from(dare.of(i, 2.0, 3.0)) - 2.0).collect();
            // Each is 0 with probability p, else 1 / (1 - p): mean 1, variance p / (1 - p).
            let error = 5.0 * (drop / (1.0 - drop) / n as f64).sqrt();
            let mean = values.iter().sum::<f64>() / n as f64;
            assert!((mean - 1.0).abs() < error, "{drop}: {mean}");
            let kept = 1.0 / (1.0 - drop);
            assert!(values.iter().all(|&x| x == 0.0 || (x - kept).abs() < 1e-5), "{drop}");
        }
    }

    #[test]
    fn dare_depends_on_seed_and_name() {
        let mask = |seed, name: &str| -> Vec<bool> {
            let dare = Dare::new(&Resta { gamma: 0.0, drop: 0.5, seed }, name);
            (0..64).map(|i| dare.of(i, 0.0, 1.0) == 0.0).collect()
        };
        assert_eq!(mask(1, "a"), mask(1, "a"));
        assert_ne!(mask(1, "a"), mask(2, "a"));
        assert_ne!(mask(1, "a"), mask(1, "b"));
    }
}
