//! `safegene fuse`: a target with the gene expressed in it.

use crate::args::{Form, Fuse};
use crate::commands::extract::Streaming;
use crate::commands::{peak_rss_bytes, stop_on_signals};
use crate::fail::Failure;
use crate::ui::Ui;
use checkpoint::Checkpoint;
use gene::{Expression, Gene};
use std::collections::BTreeMap;

pub(super) fn run(job: &Fuse, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let gene = Gene::open(&job.gene)?;
    let target = Checkpoint::open(&job.target, job.base.as_deref())?;
    gene::check_family(&gene, &target)?;
    let coefficients: BTreeMap<u32, f64> = match (&job.expression, job.coefficient) {
        (Some(path), _) => {
            let expression = Expression::read(path)?;
            if let Err(e) = expression.check_made_for(gene.content(), &target.content()?) {
                if !job.force {
                    return Err(e.into());
                }
                ui.warn(&e.to_string());
            }
            expression.coefficients
        }
        (None, c) => gene.layers().into_iter().map(|layer| (layer, c.unwrap_or(1.0))).collect(),
    };
    gene::check_coefficients(&coefficients)?;
    let expresses_nothing = coefficients.values().all(|&c| c == 0.0) && job.outside.is_none();
    let work = stream::Fuse {
        gene,
        coefficients,
        target,
        out: job.out.clone(),
        form: match job.r#as {
            Form::Merged => stream::Form::Merged,
            Form::Adapter => stream::Form::Adapter,
            Form::Both => stream::Form::Both,
        },
        outside: job.outside.map(|c| c as f32),
        drop_rest: job.drop_rest,
        force: job.force,
        memory_bytes,
        stop: stop_on_signals(),
    };
    let streaming = Streaming::new(ui);
    let result = stream::fuse(&kernels::CpuEngine::new(), &work, &streaming);
    streaming.finish();
    let report = result
        .map_err(|e| Failure::from(e).context(format!("cannot fuse into `{}`", job.target.display())))?;
    if job.json {
        ui.data(
            &serde_json::json!({"schema": 1, "outputs": report.outputs, "already": report.already,
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
    if expresses_nothing {
        ui.say("  every coefficient is 0: the output is the target as it was");
    }
    for name in &report.dropped {
        ui.warn(&format!("left out `{}`", checkpoint::printable(name)));
    }
    Ok(())
}
