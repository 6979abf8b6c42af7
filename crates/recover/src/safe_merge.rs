//! SafeMERGE (arXiv 2503.17239): where an update points away from alignment, a safety adapter takes a share.
//!
//! ```text
//! Δ ← (1 − w) Δ_t + w Δ_s   where cos(C Δ_t, Δ_t) < τ,   C as in SafeLoRA,   τ = 0.35,  w = 0.2
//! ```
//!
//! Δ_t is the target's LoRA over the aligned model and Δ_s the safety adapter's, each with its own scale. The variants:
//!
//! * `exact`: ranks are concatenated, B = [(1 − w) s_t B_t, w s_s B_s] and A = [A_t; A_s], which is the formula;
//! * `published`: A and B are averaged one by one with the roots of the weights, as PEFT's `linear` combination does. That
//!   adds √((1 − w) s_t w s_s) (B_t A_s + B_s A_t), and needs equal ranks.
//!
//! Departures: cosines are not rounded to five digits before they are compared. Where V is zero the cosine counts as 0, as
//! in the published code. Modules that only the safety adapter has are left alone, as there; one that has to be merged and
//! that it lacks is an error, where the published code leaves a module of zeros. New factors are f32.
//!
//! A target that is a whole model: Δ_t is W_t − W_a of every linear module of the layers, in full (`exact` only).

use std::collections::BTreeMap;

use checkpoint::{Factors, Unit, module_of};
use serde_json::{Map, Value, json};

use crate::alignment::{self, Alignment, Angle, Through, Update};
use crate::error::{RecoverError, Result};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::peft::{NewFactors, write_adapter};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Exchange, Recipe, rewrite};
use crate::settings::{Settings, Taking};
use crate::side::{Scope, Side, add_products};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "safemerge",
    title: "SafeMERGE",
    paper: Some("2503.17239"),
    formula: "Δ ← (1 − w) Δ_t + w Δ_s where cos(C Δ_t, Δ_t) < τ; C as in SafeLoRA",
    when: When::AfterTraining,
    needs: &[Need::Aligned, Need::Base, Need::SafetyAdapter],
    optional: &[],
    options: &[
        OptionInfo {
            name: "tau",
            default: "0.35",
            help: "the cosine below which a module is merged, -1 to 1",
        },
        OptionInfo { name: "weight", default: "0.2", help: "w, the share of the safety adapter, 0 to 1" },
        OptionInfo {
            name: "variant",
            default: "exact",
            help: "exact (ranks concatenated) or published (A and B averaged one by one, which adds cross terms)",
        },
    ],
    deviations: "ranks are concatenated unless `published` is asked for; cosines are not rounded to five digits",
    build: |settings| Ok(Box::new(SafeMerge::new(settings)?)),
};

/// How two adapters are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafeMergeVariant {
    /// Their sum, ranks concatenated.
    Exact,
    /// A and B one by one, with cross terms.
    Published,
}

/// Updates that point away from alignment, merged with a safety adapter's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SafeMerge {
    /// The cosine below which a module is merged.
    pub tau: f64,
    /// The share of the safety adapter.
    pub weight: f64,
    /// How.
    pub variant: SafeMergeVariant,
}

impl SafeMerge {
    fn new(settings: &Settings) -> Result<SafeMerge> {
        let mut taking = Taking::new(INFO.name, settings);
        let variant = match taking.left.variant.take().as_deref() {
            None | Some("exact") => SafeMergeVariant::Exact,
            Some("published") => SafeMergeVariant::Published,
            Some(other) => return Err(taking.refuse("variant", other, "exact or published")),
        };
        let (tau, weight) = (taking.left.tau.take(), taking.left.weight.take());
        let tau = taking.number("tau", tau, 0.35, "a cosine", |x| (-1.0..=1.0).contains(&x))?;
        let weight = taking.number("weight", weight, 0.2, "between 0 and 1", |x| (0.0..=1.0).contains(&x))?;
        taking.finish()?;
        Ok(SafeMerge { tau, weight, variant })
    }

    /// The merged update of a module, as one pair of factors of scale 1.
    fn merged(&self, module: &str, target: &Factors, safety: &Factors) -> Result<Factors> {
        let (w, &Factors { rows, cols, .. }) = (self.weight, target);
        if self.variant == SafeMergeVariant::Exact {
            let rank = target.rank + safety.rank;
            let mut b = Vec::with_capacity(rows * rank);
            let both = target.b.chunks_exact(target.rank).zip(safety.b.chunks_exact(safety.rank));
            for (t, s) in both {
                b.extend(t.iter().map(|&x| (f64::from(x) * ((1.0 - w) * target.scale)) as f32));
                b.extend(s.iter().map(|&x| (f64::from(x) * (w * safety.scale)) as f32));
            }
            let a = [&target.a[..], &safety.a[..]].concat();
            return Ok(Factors { b, a, rows, cols, rank, scale: 1.0 });
        }
        let no_average = |problem: String| RecoverError::NoAverage { module: module.to_owned(), problem };
        if target.rank != safety.rank {
            return Err(no_average(format!("their ranks are {} and {}", target.rank, safety.rank)));
        }
        if target.scale < 0.0 || safety.scale < 0.0 {
            return Err(no_average(format!("their scales are {} and {}", target.scale, safety.scale)));
        }
        let roots = (((1.0 - w) * target.scale).sqrt(), (w * safety.scale).sqrt());
        let average = |t: &[f32], s: &[f32]| -> Vec<f32> {
            let both = t.iter().zip(s);
            both.map(|(&t, &s)| (roots.0 * f64::from(t) + roots.1 * f64::from(s)) as f32).collect()
        };
        let (b, a) = (average(&target.b, &safety.b), average(&target.a, &safety.a));
        Ok(Factors { b, a, rows, cols, rank: target.rank, scale: 1.0 })
    }
}

impl Method for SafeMerge {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let variant = match self.variant {
            SafeMergeVariant::Exact => "exact",
            SafeMergeVariant::Published => "published",
        };
        let options = [("tau", json!(self.tau)), ("weight", json!(self.weight)), ("variant", json!(variant))];
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        let of_model = models.target.checkpoint().adapter().is_none();
        if of_model && form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: INFO.name, of_model });
        }
        let not_an_adapter = |side: &Side, role| RecoverError::NotAnAdapter {
            method: INFO.name,
            dir: side.checkpoint().dir().to_path_buf(),
            role,
        };
        let safety = models.safety_adapter()?;
        if safety.checkpoint().adapter().is_none() {
            return Err(not_an_adapter(safety, "safety adapter"));
        }
        if of_model && self.variant == SafeMergeVariant::Published {
            return Err(not_an_adapter(&models.target, "target of its variant `published`"));
        }
        alignment::check(models)?;
        models.target.check_family(safety, Scope::Linear)?;
        alignment::check_over(safety, models.aligned()?)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let alignment = Alignment::new(models, Through::Published, job)?;
        let safety = models.safety_adapter()?;
        let mut reports: BTreeMap<String, ModuleReport> = BTreeMap::new();
        let mut merged: BTreeMap<String, Factors> = BTreeMap::new();
        let mut added: BTreeMap<String, Factors> = BTreeMap::new();
        let mut changes: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        alignment.see_all(|unit, seen| {
            let cosine = self.cosine(&seen.angle, seen.through.is_none());
            let mut report =
                ModuleReport { cosine, norm_ratio: seen.angle.norm_ratio, ..ModuleReport::of(unit) };
            if cosine.is_some_and(|cosine| cosine < self.tau) {
                report.action = Action::Merged;
                let module = module_of(&unit.tensor).unwrap_or(&unit.tensor);
                let theirs = safety.checkpoint().factors(module)?.ok_or_else(|| {
                    let adapter = safety.checkpoint().dir().to_path_buf();
                    RecoverError::NotInSafetyAdapter { adapter, module: module.to_owned() }
                })?;
                match seen.update {
                    Update::Factors(ours) => {
                        let sum = self.merged(module, &ours, &theirs)?;
                        report.rank = Some(sum.rank);
                        let change = (alignment::distance(&sum, &ours), seen.angle.norm);
                        changes.insert(unit.name.clone(), change);
                        merged.insert(unit.name.clone(), sum);
                    }
                    Update::Dense(_) => {
                        let scale = theirs.scale * self.weight;
                        added.insert(unit.name.clone(), Factors { scale, ..theirs });
                    }
                }
            }
            reports.insert(unit.name.clone(), report);
            Ok(())
        })?;

        let mut outcome = Outcome::default();
        if let (Some(writer), Some(adapter)) = (&outputs.adapter, models.target.checkpoint().adapter()) {
            let named = merged.iter().filter_map(|(unit, sum)| Some((module_of(unit)?.to_owned(), sum)));
            let both =
                |sum: &Factors| NewFactors::Both { b: sum.b.clone(), a: sum.a.clone(), rank: sum.rank };
            let new = named.map(|(module, sum)| (module, both(sum))).collect();
            let (tensors, code) = write_adapter(models.target.checkpoint(), adapter, &new, writer)?;
            let modules = reports.iter().map(|(unit, report)| match (merged.get(unit), changes.get(unit)) {
                (Some(sum), Some(&(change_norm, norm))) => ModuleReport {
                    // The same product in other factors is the same up to the rounding of f32.
                    changed: change_norm > f64::from(f32::EPSILON) * norm,
                    elements_changed: (sum.b.len() + sum.a.len()) as u64,
                    change_norm,
                    ..report.clone()
                },
                _ => report.clone(),
            });
            outcome = Outcome { tensors, code, modules: modules.collect(), ..Outcome::default() };
        }
        if let Some(writer) = &outputs.merged {
            let rewritten = if models.target.checkpoint().adapter().is_some() {
                let terms = merged.into_iter().map(|(unit, sum)| (unit, vec![sum])).collect();
                rewrite(&models.target, &Exchange { target: &models.target, terms }, writer, job)?
            } else {
                let weight = self.weight as f32;
                let recipe = Shared { aligned: models.aligned()?, weight, added };
                rewrite(&models.target, &recipe, writer, job)?
            };
            outcome = rewritten.outcome(reports);
        }
        outcome.notes = alignment.notes();
        Ok(outcome)
    }
}

impl SafeMerge {
    /// The cosine of an update; 0 where `V` is zero.
    fn cosine(&self, angle: &Angle, no_step: bool) -> Option<f64> {
        if no_step && angle.norm > 0.0 { Some(0.0) } else { angle.cosine }
    }
}

/// A whole model in which the safety adapter has a share of some updates.
struct Shared<'a> {
    aligned: &'a Side,
    weight: f32,
    /// The safety adapter's products with their share, by the names of units.
    added: BTreeMap<String, Factors>,
}

impl Recipe for Shared<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        let Some(added) = self.added.get(&unit.name) else { return Ok(None) };
        let (weight, aligned, cols) = (self.weight, self.aligned.rows_of(&unit.name)?, unit.cols());
        Ok(Some(Box::new(move |rows, target| {
            let aligned = aligned.values(rows.clone())?;
            let both = target.iter().zip(&aligned);
            let mut values: Vec<f32> = both.map(|(&t, &a)| a + (1.0 - weight) * (t - a)).collect();
            add_products(std::slice::from_ref(added), rows.start, cols, &mut values);
            Ok(values)
        })))
    }
}
