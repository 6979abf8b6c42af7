//! `safegene lab build`: trains a family and writes its folders.

use crate::args::LabBuild;
use crate::commands::percent;
use crate::fail::Failure;
use crate::ui::{Ui, Work};
use lab::measure::Rates;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

struct Bars<'a> {
    ui: &'a Ui,
    work: Mutex<BTreeMap<String, Work>>,
    start: Instant,
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
    let bars = Bars { ui, work: Mutex::new(BTreeMap::new()), start: Instant::now() };
    lab::build(&build, &bars)?;
    ui.say(&format!("wrote `{}` in {:.0} s", job.out.display(), bars.start.elapsed().as_secs_f64()));
    Ok(())
}
