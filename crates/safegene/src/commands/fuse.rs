//! `safegene fuse`: a target with the gene expressed in it.

use crate::args::{Form, Fuse};
use crate::commands::extract::Streaming;
use crate::commands::{peak_rss_bytes, stop_on_signals, warn_if_fused, worker_of_environment};
use crate::device::{Device, on_device};
use crate::fail::Failure;
use crate::ui::Ui;
use checkpoint::Checkpoint;
use gene::{Expression, Gene};
use std::collections::BTreeMap;

pub(super) fn run(job: &Fuse, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let worker = match job.worker {
        Some(worker) => worker,
        // An adapter is not made in shares: a task of an array that writes one means all of it.
        None if job.r#as != Form::Merged => stream::Worker::ALL,
        None => worker_of_environment()?.unwrap_or(stream::Worker::ALL),
    };
    let target = Checkpoint::open(&job.target, job.base.as_deref())?;
    let (genes, target_content) = genes(job, &target, ui)?;
    let expresses_nothing =
        genes.iter().all(|one| one.coefficients.values().all(|&c| c == 0.0)) && job.outside.is_none();
    let work = stream::Fuse {
        genes,
        target,
        target_content,
        out: job.out.clone(),
        form: match job.r#as {
            Form::Merged => stream::Form::Merged,
            Form::Adapter => stream::Form::Adapter,
            Form::Both => stream::Form::Both,
        },
        outside: job.outside.map(|c| c as f32),
        drop_rest: job.drop_rest,
        dequantize: job.dequantize,
        force: job.force,
        memory_bytes,
        worker,
        stop: stop_on_signals(),
    };
    let streaming = Streaming::new(ui);
    let result = on_device!(device, |engine| stream::fuse(engine, &work, &streaming));
    streaming.finish();
    let report = result
        .map_err(|e| Failure::from(e).context(format!("cannot fuse into `{}`", job.target.display())))?;
    show(&report, job.json, ui);
    if report.partial {
        ui.say(&format!(
            "share {} of {} is done in {:.1} s; when all are, `safegene assemble {}`",
            worker.index,
            worker.of,
            report.wall_s,
            job.out.display()
        ));
    } else if expresses_nothing {
        ui.say("  every coefficient is 0: the output is the target as it was");
    }
    Ok(())
}

/// The genes with their coefficients, and the content that these were made for.
fn genes(
    job: &Fuse,
    target: &Checkpoint,
    ui: &Ui,
) -> Result<(Vec<stream::Expressed>, Option<String>), Failure> {
    let count = job.gene.len();
    let given = job.expression.len().max(job.coefficient.len());
    if given != count && !(job.coefficient.len() == 1 && job.expression.is_empty()) {
        let message = format!("{count} genes, but {given} of --expression or --coefficient");
        return Err(Failure::usage(message, "give one for each gene, in the same order"));
    }
    let (mut genes, mut made_for) = (Vec::new(), None);
    for (at, dir) in job.gene.iter().enumerate() {
        let gene = Gene::open(dir)?;
        gene::check_family(&gene, target)?;
        warn_if_fused(&gene, target, ui);
        let coefficients: BTreeMap<u32, f64> = match job.expression.get(at) {
            Some(path) => {
                let expression = Expression::read(path)?;
                if let Err(e) = expression.check_gene(gene.content()) {
                    if !job.force {
                        return Err(e.into());
                    }
                    ui.warn(&e.to_string());
                }
                // Held against the target by the fuse: its content is known once it was read.
                if made_for.as_ref().is_some_and(|other| *other != expression.target) {
                    let message = "the expressions were made for different targets".to_owned();
                    if !job.force {
                        return Err(Failure::usage(message, "calibrate each gene for this target"));
                    }
                    ui.warn(&message);
                }
                made_for = Some(expression.target.clone());
                expression.coefficients
            }
            None => {
                let c = job.coefficient.get(at).or(job.coefficient.first()).copied().unwrap_or(1.0);
                gene.layers().into_iter().map(|layer| (layer, c)).collect()
            }
        };
        gene::check_coefficients(&coefficients)?;
        genes.push(stream::Expressed { gene, coefficients });
    }
    Ok((genes, made_for))
}

/// What was fused, for machines and for people.
pub(super) fn show(report: &stream::FuseReport, json: bool, ui: &Ui) {
    if json {
        ui.data(
            &serde_json::json!({"schema": 1, "outputs": report.outputs, "already": report.already,
                "partial": report.partial, "resumed": report.resumed, "code": report.code, "other_target": report.other_target,
                "tensors_changed": report.tensors_changed, "elements_changed": report.elements_changed,
                "intended_sumsq": report.intended_sumsq, "realised_sumsq": report.realised_sumsq,
                "adapter_modules": report.adapter_modules, "dropped": report.dropped, "stages": report.stages,
                "wall_s": report.wall_s, "peak_rss_bytes": peak_rss_bytes()})
            .to_string(),
        );
    }
    for out in &report.outputs {
        if report.already {
            ui.say(&format!("`{}` is there already, made from the same inputs", out.display()));
        } else {
            ui.say(&format!("wrote `{}`", out.display()));
        }
    }
    if !report.already && report.tensors_changed > 0 {
        ui.say(&format!(
            "  {} elements of {} tensors changed; {:.3e} of {:.3e} (squared norm) survived rounding; {:.1} s",
            report.elements_changed,
            report.tensors_changed,
            report.realised_sumsq,
            report.intended_sumsq,
            report.wall_s
        ));
    }
    if report.other_target {
        ui.warn("the coefficients were made for another target");
    }
    if report.resumed > 0 {
        ui.say(&format!("  {} tensors were finished by an earlier run", report.resumed));
    }
    for name in &report.code {
        ui.warn(&format!("`{}` is code that runs when the model is loaded", checkpoint::printable(name)));
    }
    for name in &report.dropped {
        ui.warn(&format!("left out `{}`", checkpoint::printable(name)));
    }
}
