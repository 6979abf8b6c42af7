//! `safegene assemble`: the shares of several workers into one gene.

use crate::args::Assemble;
use crate::commands::extract::show;
use crate::fail::Failure;
use crate::ui::Ui;
use checkpoint::PartialFolder;
use gene::Gene;

pub(super) fn run(job: &Assemble, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    if !job.force && PartialFolder::find_work(&job.out)?.is_none() && Gene::open(&job.out).is_ok() {
        ui.say(&format!("`{}` is there already, and nothing unfinished is beside it", job.out.display()));
        return Ok(());
    }
    let report = stream::assemble(&kernels::CpuEngine::new(), &job.out, memory_bytes, job.force)
        .map_err(|e| Failure::from(e).context(format!("cannot assemble `{}`", job.out.display())))?;
    show(&job.out, &report, job.json, ui);
    Ok(())
}
