//! `safegene assemble`: the shares of several workers into one gene, or one merged model.

use crate::args::Assemble;
use crate::commands::{extract::show, fuse};
use crate::device::{Device, on_device};
use crate::fail::Failure;
use crate::ui::Ui;
use checkpoint::PartialFolder;
use gene::Gene;
use stream::Assembled;

pub(super) fn run(job: &Assemble, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let made = || Gene::open(&job.out).is_ok() || job.out.join(stream::RECORD_FILE).is_file();
    if !job.force && PartialFolder::find_work(&job.out)?.is_none() && made() {
        ui.say(&format!("`{}` is there already, and nothing unfinished is beside it", job.out.display()));
        return Ok(());
    }
    let made = on_device!(device, |engine| stream::assemble(engine, &job.out, memory_bytes, job.force))
        .map_err(|e| Failure::from(e).context(format!("cannot assemble `{}`", job.out.display())))?;
    match made {
        Assembled::Gene(report) => show(&job.out, device, &report, job.json, ui),
        Assembled::Model(report) => fuse::show(&report, job.json, ui),
    }
    Ok(())
}
