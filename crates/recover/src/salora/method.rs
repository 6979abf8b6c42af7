//! SaLoRA on model folders: the aligned model, which is the target here, is trained on rows of a task.
//!
//! `recover` cannot train an existing fine-tune again, so this is a method for the time of training: give it the aligned
//! model and the rows that a fine-tune would be made of. Directions of safety come from the first `samples` safety shots, those of
//! the task from the first `samples` task rows; training passes over all task rows in an order of the seed.
//!
//! The adapter has rank `2r` and is f32, because its halves nearly cancel; a loader that rounds it to a narrow format loses the
//! cancellation, and `--as merged` does not.

use serde_json::{Map, Value, json};

use super::{Settings as Sizes, Start, prepare, train};
use crate::added::{check_writable, write_added};
use crate::error::Result;
use crate::lora::{Random, Schedule};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs, Shot};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::run_error::RunError;
use crate::running::{Running, check_runs};
use crate::settings::{Settings, Taking};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "salora",
    title: "SaLoRA",
    paper: Some("2501.01765"),
    formula: "W_a x + C (B A − B₀ A₀) x, C = I − V_s V_sᵀ; --target is θ_a, and B A are trained on the task shots",
    when: When::AtTraining,
    needs: &[Need::SafetyShots, Need::TaskShots],
    optional: &[],
    options: &[
        OptionInfo { name: "rank", default: "16", help: "r, 1 to 4096; the adapter has rank 2r" },
        OptionInfo {
            name: "safety-rank",
            default: "32",
            help: "directions of safety that are kept out of, and of the task to begin with, 1 to 4096",
        },
        OptionInfo {
            name: "samples",
            default: "128",
            help: "safety and task rows that give the directions, the first of them",
        },
        OptionInfo { name: "steps", default: "600", help: "optimiser steps, 1 to 1000000" },
        OptionInfo { name: "rows", default: "32", help: "rows of a step, 1 to 4096" },
        OptionInfo { name: "rate", default: "0.0005", help: "largest learning rate, above 0" },
        OptionInfo { name: "seed", default: "0", help: "of the order of rows" },
    ],
    deviations: "trains the aligned model anew, a fine-tune that exists is left out; all linear modules of the layers instead of q and v; the schedule is ours; exported for the stock θ_a as [C B, −C B₀] [A; A₀]",
    build: |settings| Ok(Box::new(SaLora::new(settings)?)),
};

/// A LoRA of the aligned model that cannot write into the directions of safety.
#[derive(Debug, Clone, PartialEq)]
pub struct SaLora {
    /// Ranks and modules.
    pub sizes: Sizes,
    /// How long and how fast.
    pub schedule: Schedule,
    /// Rows of each kind that give the directions, the first of them.
    pub samples: usize,
    /// Of the order of rows.
    pub seed: u64,
}

impl SaLora {
    fn new(settings: &Settings) -> Result<SaLora> {
        let mut taking = Taking::new(INFO.name, settings);
        let default = Sizes::default();
        let (rank, safety_rank) = (taking.left.rank.take(), taking.left.safety_rank.take());
        let rank = taking.count("rank", rank, default.rank)?;
        let safety_rank = taking.count("safety-rank", safety_rank, default.safety_rank)?;
        let (samples, steps, rows) =
            (taking.left.samples.take(), taking.left.steps.take(), taking.left.rows.take());
        let samples = taking.many("samples", samples, 128)?;
        let steps = taking.many("steps", steps, 600)?;
        let rows = taking.count("rows", rows, 32)?;
        let rate = taking.left.rate.take();
        let rate = taking.number("rate", rate, 5e-4, "a number above 0", |x| x > 0.0)?;
        let seed = taking.left.seed.take().unwrap_or(0);
        taking.finish()?;
        let sizes = Sizes { rank, safety_rank, task_rank: safety_rank, ..default };
        Ok(SaLora { sizes, schedule: Schedule { steps, rows, rate }, samples, seed })
    }

    fn first<'a>(&self, rows: &'a [Shot]) -> &'a [Shot] {
        &rows[..rows.len().min(self.samples)]
    }
}

impl Method for SaLora {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let options = [
            ("rank", json!(self.sizes.rank)),
            ("safety-rank", json!(self.sizes.safety_rank)),
            ("samples", json!(self.samples)),
            ("steps", json!(self.schedule.steps)),
            ("rows", json!(self.schedule.rows)),
            ("rate", json!(self.schedule.rate)),
            ("seed", json!(self.seed)),
        ];
        options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        check_writable(&models.target, form)?;
        check_runs(&models.target, &[self.first(&models.shots.safety), &models.shots.task])
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        job.progress.stage("measuring", 0);
        let running = Running::open(&models.target)?;
        let safety = running.rows(self.first(&models.shots.safety))?;
        let task = running.rows(&models.shots.task)?;
        job.check_stop()?;
        let first = &task[..task.len().min(self.samples)];
        let starts = running.named(prepare(&running.model, &safety, first, running.pad(), &self.sizes))?;
        job.check_stop()?;
        job.progress.stage("training", 0);
        let (mut order, mut at) = (Order::new(task.len(), self.seed), Vec::new());
        let mut next = || Ok(task[order.next()].clone());
        let mut heard =
            |_: usize, loss: f32, _: &transformer::Attachments| -> std::result::Result<bool, RunError> {
                at.push(loss);
                if job.check_stop().is_ok() { Ok(false) } else { Err(RunError::Stopped) }
            };
        let trained = train(&running.model, &starts, self.schedule, running.pad(), &mut next, &mut heard);
        let factors = running.named(trained)?;
        drop(running);
        let mut outcome = write_added(&models.target, factors, outputs, job)?;
        // A tenth of the steps, at least one, at each end.
        let tenth = at.len().div_ceil(10);
        let mean = |some: &[f32]| some.iter().map(|&x| f64::from(x)).sum::<f64>() / some.len().max(1) as f64;
        let (begin, end) = (mean(&at[..tenth]), mean(&at[at.len() - tenth..]));
        let shut = starts.iter().filter(|start| start.free() == 0).count();
        outcome.measured = Map::from_iter([
            ("loss_begin".to_owned(), json!(begin)),
            ("loss_end".to_owned(), json!(end)),
            ("safety_rows".to_owned(), json!(safety.len())),
            ("task_rows".to_owned(), json!(task.len())),
            ("modules_without_free_directions".to_owned(), json!(shut)),
        ]);
        outcome.notes = vec![format!(
            "trained on {} rows: loss {begin:.4} in the first tenth of {} steps, {end:.4} in the last",
            task.len(),
            at.len()
        )];
        if shut > 0 {
            let directions = starts.iter().map(|start: &Start| start.safety.rank()).max().unwrap_or(0);
            outcome.notes.push(format!(
                "{shut} modules have no more than {directions} outputs, all of which are safety's, and are not trained"
            ));
        }
        Ok(outcome)
    }
}

/// Positions of rows, each once before any comes again, every pass in an order of its own.
struct Order {
    left: Vec<usize>,
    count: usize,
    random: Random,
}

impl Order {
    /// Of `count` rows, which is above zero.
    fn new(count: usize, seed: u64) -> Order {
        Order { left: Vec::new(), count, random: Random::new(seed, "order of rows") }
    }

    fn next(&mut self) -> usize {
        if self.left.is_empty() {
            self.left = (0..self.count).collect();
        }
        let at = self.random.below(self.left.len());
        self.left.swap_remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once_a_pass_in_an_order_of_the_seed() {
        let passes = |seed| -> Vec<Vec<usize>> {
            let mut order = Order::new(9, seed);
            (0..2).map(|_| (0..9).map(|_| order.next()).collect()).collect()
        };
        for pass in passes(1) {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..9).collect::<Vec<_>>());
        }
        assert_eq!(passes(1), passes(1));
        assert_ne!(passes(1)[0], passes(1)[1]);
        assert_ne!(passes(1), passes(2));
    }
}
