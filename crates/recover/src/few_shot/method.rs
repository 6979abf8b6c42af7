//! The few-shot LoRA on model folders: the target is run and trained on the shots, and what came of it is added.
//!
//! Without a rate both are tried, and one is taken by the rule that every method of the comparison is tuned by
//! ([`crate::knob`]), on the shots themselves. Results are never above the limit. A target that is an adapter is run over its base with its product
//! merged in f32, and stays an adapter if one is asked for: ranks are concatenated.

use serde_json::{Map, Value, json};
use transformer::Attachments;

use super::{FewShot, Options, RATES, Shots, Stopped, best_rate};
use crate::added::{check_writable, write_added};
use crate::error::Result;
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::running::{Running, check_runs};
use crate::settings::{Settings, Taking};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "few-shot-lora",
    title: "few-shot LoRA",
    paper: None,
    formula: "θ_t + B A, trained to least CE_safety + KL_task + KL_benign, KL_task ≤ ε and KL_benign ≤ ε",
    when: When::AfterTraining,
    needs: &[Need::SafetyShots, Need::TaskShots],
    optional: &[Need::BenignShots],
    options: &[
        OptionInfo { name: "rank", default: "8", help: "of every module, 1 to 4096; alpha is 16" },
        OptionInfo {
            name: "rate",
            default: "0.0003 and 0.001, the better",
            help: "largest learning rate, above 0 (the better: least KL if safe enough, else least loss)",
        },
        OptionInfo {
            name: "max-kl",
            default: "0.02",
            help: "limit on KL, nat per token, on task shots and again on benign shots, above 0",
        },
        OptionInfo {
            name: "delta",
            default: "0.001",
            help: "safety loss that is enough, nat per token, above 0",
        },
        OptionInfo { name: "steps", default: "300", help: "optimiser steps at most, 1 to 1000000" },
        OptionInfo { name: "seed", default: "0", help: "of the random start" },
    ],
    deviations: "a control of our own: LoRA (arXiv 2106.09685) on the shots and under the limit of `calibrate`",
    build: |settings| Ok(Box::new(FewShotLora::new(settings)?)),
};

/// A LoRA trained on the shots under a limit on KL.
#[derive(Debug, Clone, PartialEq)]
pub struct FewShotLora {
    /// How to train; its rate is not used.
    pub options: Options,
    /// Learning rates that are tried.
    pub rates: Vec<f64>,
}

impl FewShotLora {
    fn new(settings: &Settings) -> Result<FewShotLora> {
        let mut taking = Taking::new(INFO.name, settings);
        let default = Options::default();
        let (rank, steps) = (taking.left.rank.take(), taking.left.steps.take());
        let rank = taking.count("rank", rank, default.rank)?;
        let steps_max = taking.many("steps", steps, default.steps_max)?;
        let (rate, max_kl, delta) =
            (taking.left.rate.take(), taking.left.max_kl.take(), taking.left.delta.take());
        let positive =
            |option, given, default| taking.number(option, given, default, "a number above 0", |x| x > 0.0);
        let rates = match rate {
            None => RATES.to_vec(),
            Some(rate) => vec![positive("rate", Some(rate), rate)?],
        };
        let max_kl = positive("max-kl", max_kl, default.max_kl)?;
        let delta = positive("delta", delta, default.delta)?;
        let seed = taking.left.seed.take().unwrap_or(default.seed);
        taking.finish()?;
        Ok(FewShotLora { options: Options { rank, steps_max, max_kl, delta, seed, ..default }, rates })
    }
}

impl Method for FewShotLora {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let Options { rank, max_kl, delta, steps_max, seed, .. } = &self.options;
        let mut options = Map::from_iter([
            ("rank".to_owned(), json!(rank)),
            ("max-kl".to_owned(), json!(max_kl)),
            ("delta".to_owned(), json!(delta)),
            ("steps".to_owned(), json!(steps_max)),
            ("seed".to_owned(), json!(seed)),
        ]);
        match self.rates[..] {
            [rate] => options.insert("rate".to_owned(), json!(rate)),
            _ => options.insert("rates".to_owned(), json!(self.rates)),
        };
        options
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        check_writable(&models.target, form)?;
        let shots = &models.shots;
        check_runs(&models.target, &[&shots.safety, &shots.task, &shots.benign])
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        job.progress.stage("training", 0);
        let (running, none) = (Running::open(&models.target)?, Attachments::none());
        let shots = Shots {
            safety: running.rows(&models.shots.safety)?,
            task: running.rows(&models.shots.task)?,
            benign: running.rows(&models.shots.benign)?,
        };
        let mut go_on = |_: usize| job.check_stop().is_ok();
        let (model, pad) = (&running.model, running.pad());
        let found = best_rate(model, &none, &shots, &self.rates, &self.options, pad, &mut go_on);
        let (FewShot { factors, report }, trials) = running.named(found)?;
        drop(running);
        let mut outcome = write_added(&models.target, factors, outputs, job)?;
        outcome.measured =
            Map::from_iter([("training".to_owned(), json!(report)), ("trials".to_owned(), json!(trials))]);
        let reached = report.reached;
        let benign = reached.kl_benign.map_or(String::new(), |kl| format!(", {kl:.4} on benign shots"));
        let why = match report.stopped {
            Stopped::AlreadySafe => "the target refuses already",
            Stopped::Safe => "as safe as asked",
            Stopped::Limit => "ended by the limit on KL",
            Stopped::Steps => "all steps are spent",
        };
        outcome.notes = vec![format!(
            "{why}: safety loss {:.4} -> {:.4}, KL {:.4} on task shots{benign} nat per token; rate {}, step {} of {}",
            report.loss_before, reached.loss, reached.kl_task, report.rate, report.step, report.steps
        )];
        if models.shots.benign.is_empty() {
            let note = "without benign shots nothing keeps the model from refusing harmless requests; measure over-refusal";
            outcome.notes.push(note.to_owned());
        }
        Ok(outcome)
    }
}
