//! `safegene verify`: a gene against itself, and against the checkpoints it came from.

use crate::args::Verify;
use crate::commands::extract::{Streaming, open};
use crate::device::{Device, on_device};
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use gene::Gene;
use std::sync::Arc;

pub(super) fn run(job: &Verify, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    // Opening holds the manifest against the files beside it.
    let gene = Gene::open(&job.gene)?;
    let (Some(aligned), Some(degraded)) = (&job.aligned, &job.degraded) else {
        for module in gene.modules().iter().filter(|module| module.rank > 0) {
            gene.factors(&module.name)?;
        }
        for entry in gene.rest().iter().filter(|entry| entry.class != gene::Class::LeftOut) {
            gene.rest_delta(&entry.name)?;
        }
        if job.json {
            ui.data(&serde_json::json!({"schema": 1, "content": gene.content(), "faults": []}).to_string());
        }
        let rest = match gene.manifest().extra.contains_key("distilled") {
            true => "",
            false => "; its numbers need --aligned and --degraded",
        };
        ui.say(&format!("`{}` agrees with itself{rest}", job.gene.display()));
        return Ok(());
    };
    if gene.manifest().extra.contains_key("distilled") {
        return Err(Failure::usage(
            format!(
                "`{}` was distilled: its factors are the difference of no two checkpoints",
                job.gene.display()
            ),
            "leave --aligned and --degraded away; `inspect` says what it reached on held-out rows",
        ));
    }
    let streaming = Streaming::new(ui);
    let (aligned, degraded) = (Arc::new(open(aligned, &job.base)?), Arc::new(open(degraded, &job.base)?));
    let report = on_device!(device, |engine| {
        stream::verify(engine, &gene, &aligned, &degraded, memory_bytes, &streaming)
    });
    streaming.finish();
    let report =
        report.map_err(|e| Failure::from(e).context(format!("cannot verify `{}`", job.gene.display())))?;
    if job.json {
        ui.data(
            &serde_json::json!({"schema": 1, "content": gene.content(), "tensors": report.tensors,
                "modules": report.modules, "faults": report.faults})
            .to_string(),
        );
    }
    if report.faults.is_empty() {
        let (tensors, modules) = (report.tensors, report.modules);
        ui.say(&format!("`{}` is what it says: {tensors} tensors, {modules} residuals", job.gene.display()));
        return Ok(());
    }
    Err(Failure {
        code: Code::No,
        message: format!("`{}` is not what it says", job.gene.display()),
        causes: report.faults.iter().take(20).map(|fault| checkpoint::printable(fault)).collect(),
        hint: Some("extract it again, or look for the checkpoints it came from".into()),
    })
}
