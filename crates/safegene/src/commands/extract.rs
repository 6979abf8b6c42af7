//! `safegene extract`: an aligned and a degraded checkpoint into a gene.

use crate::args::Extract;
use crate::commands::{bytes, percent};
use crate::fail::Failure;
use crate::ui::{Ui, Work};
use checkpoint::Checkpoint;
use gene::Class;
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

/// Largest resident size of this process so far, in bytes; `None` where the system does not tell.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

pub(super) fn run(job: &Extract, ui: &Ui) -> Result<(), Failure> {
    let (aligned, degraded) = (&job.aligned, &job.degraded);
    let open = |dir| Checkpoint::open(dir, job.base.as_deref().filter(|_| dir_is_adapter(dir)));
    let work = stream::Extract {
        aligned: open(aligned)?,
        degraded: open(degraded)?,
        rank: job.rank as usize,
        out: job.out.clone(),
        force: job.force,
        seed: job.seed,
    };
    let streaming = Streaming::new(ui);
    let result = stream::extract(&kernels::CpuEngine::new(), &work, &streaming);
    streaming.finish();
    let report = result.map_err(|e| {
        Failure::from(e).context(format!(
            "cannot extract from `{}` and `{}`",
            aligned.display(),
            degraded.display()
        ))
    })?;

    if job.json {
        for m in report.modules.iter().filter(|m| m.class == Class::LowRank) {
            ui.data(
                &serde_json::json!({"type": "module", "schema": 1, "name": m.name, "layer": m.layer, "shape": m.shape,
                    "rank": m.rank, "energy": m.energy, "residual": m.residual, "noise_floor": m.noise_floor})
                .to_string(),
            );
        }
        ui.data(
            &serde_json::json!({"type": "summary", "schema": 1, "out": job.out, "already": report.already,
                "energy": report.energy, "captured": report.captured,
                "captured_upper_bound": report.captured_upper_bound, "noise_floor": report.noise_floor,
                "classes": report.classes, "wall_s": report.wall_s, "input_bytes": report.input_bytes,
                "peak_rss_bytes": peak_rss_bytes()})
            .to_string(),
        );
    }
    if report.already {
        ui.say(&format!("`{}` is there already, made from the same inputs and options", job.out.display()));
        return Ok(());
    }
    let kept: Vec<&gene::Module> = report.modules.iter().filter(|m| m.class == Class::LowRank).collect();
    let rank = kept.iter().map(|m| m.rank).max().unwrap_or(0);
    let worst = kept.iter().max_by(|a, b| a.residual.total_cmp(&b.residual));
    let worst = worst
        .map(|m| format!("; worst `{}` {}", checkpoint::printable(&m.name), percent(1.0 - m.residual)))
        .unwrap_or_default();
    ui.say(&format!(
        "wrote `{}`: {} modules, rank {rank}; {} of the difference held, at most {} can be, {} is rounding noise{worst}; {} in {:.1} s",
        job.out.display(),
        kept.len(),
        percent(report.captured),
        percent(report.captured_upper_bound),
        percent(report.noise_floor),
        bytes(report.input_bytes),
        report.wall_s
    ));
    Ok(())
}

/// A base given on the command line belongs to the sides that are adapters.
fn dir_is_adapter(dir: &std::path::Path) -> bool {
    dir.join("adapter_config.json").exists()
}
