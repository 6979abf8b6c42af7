//! Safe Delta on model folders: the aligned model is run on the safety rows, then the target is rewritten module by module.
//!
//! Inputs are measured on the first `samples` safety shots (128 in the paper), prompt and answer, in the aligned model with
//! its own tokenizer. The Gram matrices of all modules are held at once, `in²` numbers of eight bytes for each of the four
//! things that the modules of a layer read; the model itself, four bytes a weight, is gone by then.
//!
//! Only linear modules of the layers change. What fine-tuning made of norms, biases and embeddings stays, as with all other
//! methods here; the authors' code starts from the aligned model, so there it is lost.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use checkpoint::{Role, Unit, module_of};
use serde_json::{Map, Value, json};
use transformer::{Attachments, ModuleKind};

use super::{Budget, Options, Report, Variant, safe_delta};
use crate::added::check_writable;
use crate::error::{RecoverError, Result};
use crate::gram::{Gram, Grams, Positions, grams};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs, Shot};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Recipe, rewrite};
use crate::run_error::RunError;
use crate::running::{Running, check_runs};
use crate::settings::{Settings, Taking};
use crate::side::{Scope, Side};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "safe-delta",
    title: "Safe Delta",
    paper: Some("2505.12038"),
    formula: "W_a + M ∘ (W_t − W_a) + compensation; M keeps what is cheapest by ΔW_ij² / [H⁻¹]_jj, H = 2/N Σ x xᵀ on safety shots",
    when: When::AfterTraining,
    needs: &[Need::Aligned, Need::SafetyShots],
    optional: &[],
    options: &[
        OptionInfo { name: "s", default: "0.1", help: "scale of the budget, 0 or more" },
        OptionInfo {
            name: "variant",
            default: "exact",
            help: "exact, or published (costs by the Cholesky factor of H⁻¹, ordered by it, in blocks of columns)",
        },
        OptionInfo {
            name: "budget",
            default: "share",
            help: "of exact: share (s times the cost of keeping all) or step (the published budget without its blocks)",
        },
        OptionInfo {
            name: "damping",
            default: "0.01",
            help: "added to the diagonal of H, as a share of its mean, 0 or more",
        },
        OptionInfo { name: "samples", default: "128", help: "safety shots that are used, the first of them" },
    ],
    deviations: "sorted by exact cost under a budget that is a share of the whole (published: as the authors' code); norms, biases and embeddings stay fine-tuned",
    build: |settings| Ok(Box::new(SafeDelta::new(settings)?)),
};

/// The fine-tuned entries that are cheapest on safety rows, the others the aligned model's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SafeDelta {
    /// How much stays, and how.
    pub options: Options,
    /// Safety shots that are used, the first of them.
    pub samples: usize,
}

impl SafeDelta {
    fn new(settings: &Settings) -> Result<SafeDelta> {
        let mut taking = Taking::new(INFO.name, settings);
        let variant = match taking.left.variant.take().as_deref() {
            None | Some("exact") => Variant::Exact,
            Some("published") => Variant::Published,
            Some(other) => return Err(taking.refuse("variant", other, "exact or published")),
        };
        let mut budget = Budget::Share;
        if variant == Variant::Exact {
            budget = match taking.left.budget.take().as_deref() {
                None | Some("share") => Budget::Share,
                Some("step") => Budget::Step,
                Some(other) => return Err(taking.refuse("budget", other, "share or step")),
            };
        }
        let (s, damping) = (taking.left.s.take(), taking.left.damping.take());
        let not_negative = "a number of 0 or more";
        let s = taking.number("s", s, 0.1, not_negative, |x| x >= 0.0)?;
        let damping = taking.number("damping", damping, 0.01, not_negative, |x| x >= 0.0)?;
        let samples = taking.left.samples.take();
        let samples = taking.many("samples", samples, 128)?;
        taking.finish()?;
        Ok(SafeDelta { options: Options { variant, s, budget, damping }, samples })
    }

    fn shots<'a>(&self, models: &'a Models) -> &'a [Shot] {
        let safety = &models.shots.safety;
        &safety[..safety.len().min(self.samples)]
    }
}

impl Method for SafeDelta {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let Options { variant, s, budget, damping } = self.options;
        let mut options = Map::from_iter([
            ("s".to_owned(), json!(s)),
            ("variant".to_owned(), json!(variant)),
            ("damping".to_owned(), json!(damping)),
            ("samples".to_owned(), json!(self.samples)),
        ]);
        if variant == Variant::Exact {
            options.insert("budget".to_owned(), json!(budget));
        }
        options
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: INFO.name, of_model: false });
        }
        models.target.check_family(models.aligned()?, Scope::Linear)?;
        check_writable(&models.target, form)?;
        check_runs(models.aligned()?, &[self.shots(models)])
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let Some(writer) = &outputs.merged else { return Ok(Outcome::default()) };
        let aligned = models.aligned()?;
        job.progress.stage("measuring", 0);
        let (running, none) = (Running::open(aligned)?, Attachments::none());
        let rows = running.rows(self.shots(models))?;
        job.check_stop()?;
        let all = &|_, _| true;
        let measured = grams(&running.model, &none, "safety", &rows, running.pad(), Positions::All, all);
        let grams = running.named(measured)?;
        drop(running);
        job.check_stop()?;
        let found = Mutex::default();
        let recipe =
            Affordable { options: self.options, aligned, target: &models.target, grams: &grams, job, found };
        let rewritten = rewrite(&models.target, &recipe, writer, job)?;
        let found = recipe.found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let report = |unit: &String, report: &Report| -> Option<(String, ModuleReport)> {
            let of = ModuleReport::of(models.target.units().get(unit)?);
            let all_stay = report.kept == report.moved && self.options.variant == Variant::Exact;
            let action = if all_stay { Action::Kept } else { Action::Restored };
            let kept = (report.moved > 0).then(|| report.kept as f64 / report.moved as f64);
            Some((unit.clone(), ModuleReport { action, kept, ..of }))
        };
        let mut outcome = rewritten.outcome(found.iter().filter_map(|(unit, r)| report(unit, r)).collect());
        let sum = |number: fn(&Report) -> f64| found.values().map(number).sum::<f64>();
        let (before, after) = (sum(|r| r.distance_target), sum(|r| r.distance));
        outcome.measured = Map::from_iter([
            ("safety_rows".to_owned(), json!(rows.len())),
            ("moved".to_owned(), json!(found.values().map(|r| r.moved).sum::<usize>())),
            ("kept".to_owned(), json!(found.values().map(|r| r.kept).sum::<usize>())),
            ("distance_target".to_owned(), json!(before)),
            ("distance".to_owned(), json!(after)),
        ]);
        outcome.notes = vec![
            format!(
                "on {} safety shots the modules' outputs were {before:.3e} away from the aligned model's, now {after:.3e}",
                rows.len()
            ),
            "what is no linear module of a layer keeps the target's values".to_owned(),
        ];
        if rows.len() < 128 {
            outcome.notes.push(format!("the source measures 128 safety rows, here there are {}", rows.len()));
        }
        Ok(outcome)
    }
}

/// The target with the entries that can be afforded.
struct Affordable<'a> {
    options: Options,
    aligned: &'a Side,
    target: &'a Side,
    grams: &'a Grams,
    job: &'a Job<'a>,
    found: Mutex<BTreeMap<String, Report>>,
}

impl Affordable<'_> {
    fn gram(&self, unit: &Unit) -> Option<&Gram> {
        let Role::Linear { .. } = unit.role else { return None };
        let (layer, kind) = ModuleKind::parse(module_of(&unit.name)?)?;
        self.grams.get(layer, kind)
    }
}

impl Recipe for Affordable<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        let Some(gram) = self.gram(unit) else { return Ok(None) };
        let (rows, cols) = (unit.rows(), unit.cols());
        // Both sides and the result in f32, a difference in f64, an order of costs; H, its factors and their inverse.
        let need =
            rows.saturating_mul(cols).saturating_mul(40).saturating_add(cols.saturating_mul(cols * 40));
        self.job.check_memory(&unit.name, need)?;
        let (aligned, target) = (self.aligned.rows_of(&unit.name)?, self.target.rows_of(&unit.name)?);
        let (aligned, target) = (aligned.values(aligned.all())?, target.values(target.all())?);
        let module = module_of(&unit.name).unwrap_or(&unit.name);
        let made = safe_delta(module, &aligned, &target, rows as usize, gram, &self.options);
        let at = |source: RunError| RecoverError::run(self.aligned.checkpoint().dir(), source);
        let (new, report) = made.map_err(at)?;
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(unit.name.clone(), report);
        Ok(Some(Box::new(move |rows, _| {
            Ok(new[(rows.start * cols) as usize..(rows.end * cols) as usize].to_vec())
        })))
    }

    fn is_heavy(&self) -> bool {
        true
    }
}
