//! `safegene lab build`: trains a family and writes its folders.

use crate::args::LabBuild;
use crate::commands::percent;
use crate::fail::Failure;
use crate::ui::{Ui, Work};
use lab::measure::Rates;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

/// A bar for each job under way, and a line for each that is over.
pub(super) struct Bars<'a> {
    ui: &'a Ui,
    work: Mutex<BTreeMap<String, Work>>,
    stage: Mutex<Option<Work>>,
    start: Instant,
}

impl<'a> Bars<'a> {
    pub(super) fn new(ui: &'a Ui) -> Self {
        Self { ui, work: Mutex::new(BTreeMap::new()), stage: Mutex::new(None), start: Instant::now() }
    }
}

impl compare::Progress for Bars<'_> {
    fn stage(&self, name: &str, parts: usize) {
        self.ui.say(&format!("{:6.0} s  {name}: {parts} parts", self.start.elapsed().as_secs_f64()));
        if let Ok(mut stage) = self.stage.lock() {
            if let Some(old) = stage.take() {
                old.finish();
            }
            *stage = Some(self.ui.work(name, parts as u64, false));
        }
    }

    fn part(&self, name: &str) {
        if let Ok(stage) = self.stage.lock()
            && let Some(bar) = stage.as_ref()
        {
            bar.advance(1, name);
        }
    }
}

impl std::fmt::Debug for Bars<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bars").finish_non_exhaustive()
    }
}

impl lab::Progress for Bars<'_> {
    fn step(&self, job: &str, _done: usize, total: usize, note: &str) {
        if let Ok(mut work) = self.work.lock() {
            work.entry(job.to_string())
                .or_insert_with(|| self.ui.work(job, total as u64, false))
                .advance(1, note);
        }
    }

    fn finished(&self, job: &str, r: &Rates) {
        if let Ok(mut work) = self.work.lock()
            && let Some(bar) = work.remove(job)
        {
            bar.finish();
        }
        let accuracy = r.accuracy.map(|a| format!(", accuracy {}", percent(a))).unwrap_or_default();
        self.ui.say(&format!(
            "{:6.0} s  {job:18} ASR {} (true recipe {}), over-refusal {}, helped {}{accuracy}",
            self.start.elapsed().as_secs_f64(),
            percent(r.asr),
            percent(r.asr_precise),
            percent(r.over_refusal),
            percent(r.helped)
        ));
    }
}

pub(super) fn run(job: &LabBuild, threads: usize, ui: &Ui) -> Result<(), Failure> {
    if job.out.exists() {
        return Err(Failure::usage(
            format!("output `{}` exists", job.out.display()),
            "the lab does not replace a family; remove the folder or name another",
        ));
    }
    let build = lab::build::Build {
        family: job.family.clone(),
        seed: job.seed,
        out: job.out.clone(),
        roots_only: job.roots_only,
        threads,
    };
    let bars = Bars::new(ui);
    lab::build(&build, &bars)?;
    ui.say(&format!("wrote `{}` in {:.0} s", job.out.display(), bars.start.elapsed().as_secs_f64()));
    Ok(())
}
