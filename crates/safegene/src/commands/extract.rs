//! `safegene extract`: an aligned and a degraded checkpoint into a gene.

use crate::args::Extract;
use crate::commands::{bytes, peak_rss_bytes, percent, stop_on_signals, worker_of_environment};
use crate::device::{Device, on_device};
use crate::fail::Failure;
use crate::ui::{Ui, Work};
use checkpoint::Checkpoint;
use gene::Class;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Shows a stream's progress as bytes.
pub(super) struct Streaming<'a> {
    ui: &'a Ui,
    work: Mutex<Option<Work>>,
}

impl<'a> Streaming<'a> {
    pub(super) fn new(ui: &'a Ui) -> Self {
        Self { ui, work: Mutex::new(None) }
    }

    pub(super) fn finish(&self) {
        if let Ok(mut work) = self.work.lock()
            && let Some(old) = work.take()
        {
            old.finish();
        }
    }
}

impl stream::Progress for Streaming<'_> {
    fn stage(&self, name: &str, total_bytes: u64) {
        self.finish();
        if let Ok(mut work) = self.work.lock() {
            *work = Some(self.ui.work(name, total_bytes, true));
        }
    }

    fn advance(&self, bytes: u64, item: &str) {
        if let Ok(work) = self.work.lock()
            && let Some(work) = work.as_ref()
        {
            work.advance(bytes, &checkpoint::printable(item));
        }
    }
}

pub(super) fn run(job: &Extract, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let (aligned, degraded) = (&job.aligned, &job.degraded);
    let ranks =
        job.ranks.ranks().map_err(|message| Failure::usage(message, "see `safegene extract --help`"))?;
    let worker = match job.worker {
        Some(worker) => worker,
        None => worker_of_environment()?.unwrap_or(stream::Worker::ALL),
    };
    let work = stream::Extract {
        force: job.force,
        seed: job.seed,
        leave_out: job.leave_out.clone(),
        memory_bytes,
        worker,
        stop: stop_on_signals(),
        ..stream::Extract::new(open(aligned, &job.base)?, open(degraded, &job.base)?, ranks, &job.out)
    };
    let streaming = Streaming::new(ui);
    let result = on_device!(device, |engine| stream::extract(engine, &work, &streaming));
    streaming.finish();
    let report = result.map_err(|e| {
        Failure::from(e).context(format!(
            "cannot extract from `{}` and `{}`",
            aligned.display(),
            degraded.display()
        ))
    })?;
    if report.partial {
        if job.json {
            ui.data(&summary(&job.out, &device.name(), &report).to_string());
        }
        ui.say(&format!(
            "share {} of {} is done: {} in {:.1} s; when all are, `safegene assemble {}`",
            worker.index,
            worker.of,
            bytes(report.input_bytes),
            report.wall_s,
            job.out.display()
        ));
        return Ok(());
    }
    show(&job.out, device, &report, job.json, ui);
    Ok(())
}

/// A folder with the base that was given, if it is an adapter: a base belongs to the sides that are adapters.
pub(super) fn open(dir: &Path, base: &Option<PathBuf>) -> Result<Checkpoint, Failure> {
    let is_adapter = dir.join("adapter_config.json").exists();
    Ok(Checkpoint::open(dir, base.as_deref().filter(|_| is_adapter))?)
}

fn summary(out: &Path, engine: &str, report: &stream::ExtractReport) -> serde_json::Value {
    serde_json::json!({"type": "summary", "schema": 1, "out": out, "engine": engine, "already": report.already,
        "partial": report.partial, "resumed": report.resumed, "energy": report.energy, "captured": report.captured,
        "captured_upper_bound": report.captured_upper_bound, "noise_floor": report.noise_floor,
        "classes": report.classes, "wall_s": report.wall_s, "input_bytes": report.input_bytes,
        "stages": report.stages, "peak_rss_bytes": peak_rss_bytes()})
}

/// What was extracted, for machines and for people.
pub(super) fn show(out: &Path, device: &Device, report: &stream::ExtractReport, json: bool, ui: &Ui) {
    if json {
        for m in report.modules.iter().filter(|m| m.class == Class::LowRank) {
            ui.data(
                &serde_json::json!({"type": "module", "schema": 1, "name": m.name, "layer": m.layer, "shape": m.shape,
                    "rank": m.rank, "energy": m.energy, "residual": m.residual, "noise_floor": m.noise_floor,
                    "noise_floor_reliable": m.extra.get("noise_floor_reliable"),
                    "captured_upper_bound": m.extra.get("captured_upper_bound"),
                    "zero_fraction": m.extra.get("zero_fraction")})
                .to_string(),
            );
        }
        ui.data(&summary(out, &device.name(), report).to_string());
    }
    if report.already {
        ui.say(&format!("`{}` is there already, made from the same inputs and options", out.display()));
        return;
    }
    let kept: Vec<&gene::Module> = report.modules.iter().filter(|m| m.class == Class::LowRank).collect();
    let (low, high) =
        (kept.iter().map(|m| m.rank).min().unwrap_or(0), kept.iter().map(|m| m.rank).max().unwrap_or(0));
    let rank = if low == high { format!("{high}") } else { format!("{low} to {high}") };
    let worst = kept.iter().max_by(|a, b| a.residual.total_cmp(&b.residual));
    let worst = worst
        .map(|m| format!("; worst `{}` {}", checkpoint::printable(&m.name), percent(1.0 - m.residual)))
        .unwrap_or_default();
    ui.say(&format!(
        "wrote `{}`: {} modules, rank {rank}; {} of the difference held, at most {} can be, {} is rounding noise{worst}; {} in {:.1} s",
        out.display(),
        kept.len(),
        percent(report.captured),
        percent(report.captured_upper_bound),
        percent(report.noise_floor),
        bytes(report.input_bytes),
        report.wall_s
    ));
    if report.resumed > 0 {
        ui.say(&format!("  {} tensors were finished by an earlier run", report.resumed));
    }
    if report.energy > 0.0 && report.noise_floor > 0.5 {
        ui.warn("most of the difference is rounding noise: a gene of it restores little");
    }
}
