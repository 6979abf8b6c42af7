//! `safegene inspect`: what a gene holds.

use crate::args::Inspect;
use crate::commands::percent;
use crate::fail::Failure;
use crate::ui::Ui;
use gene::{Class, Gene};

pub(super) fn run(job: &Inspect, ui: &Ui) -> Result<(), Failure> {
    let gene = Gene::open(&job.gene)?;
    let m = gene.manifest();
    if job.json {
        let mut value = serde_json::to_value(m).unwrap_or_default();
        value["content"] = gene.content().into();
        ui.data(&format!("{value:#}"));
        return Ok(());
    }
    let name = |s: &str| checkpoint::printable(s);
    ui.data(&format!("gene      {}", gene.content()));
    ui.data(&format!("family    {}  {}", name(&m.family.model_type), name(&m.family.fingerprint)));
    ui.data(&format!("aligned   {}  {}", name(&m.sources.aligned.name), name(&m.sources.aligned.content)));
    ui.data(&format!("degraded  {}  {}", name(&m.sources.degraded.name), name(&m.sources.degraded.content)));
    match m.extra.get("distilled") {
        Some(d) => {
            let part = |at: &str, of: &str| d[at][of].as_f64().unwrap_or(f64::NAN);
            let drifts = d["drifts"].as_u64().unwrap_or(0);
            ui.data(&format!(
                "distilled on {drifts} drifts (energy {:.4e}); on held-out rows safety {:.4} -> {:.4}, keep {:.4} -> {:.4} nat per token, margin {:.3} -> {:.3} nat",
                m.energy,
                part("start", "safety"),
                part("end", "safety"),
                part("start", "keep"),
                part("end", "keep"),
                part("start", "margin"),
                part("end", "margin")
            ));
        }
        None => ui.data(&format!(
            "holds     {} of the difference (energy {:.4e}); at most {} can be held at this rank, {} is rounding noise",
            percent(m.captured),
            m.energy,
            percent(m.captured_upper_bound),
            percent(m.noise_floor)
        )),
    }
    for layer in m.layers.iter().filter(|l| l.score.is_some()) {
        let (score, kept) =
            (layer.score.unwrap_or(f64::NAN), if layer.selected { "kept" } else { "left out" });
        ui.data(&format!("score     layer {:>3}  {score:>11.4}  {kept}", layer.layer));
    }
    let classes: Vec<String> = m
        .classes
        .iter()
        .map(|(class, n)| {
            let text = serde_json::to_value(class)
                .ok()
                .and_then(|v| v.as_str().map(String::from))
                .unwrap_or_default();
            format!("{text} {n}")
        })
        .collect();
    ui.data(&format!("tensors   {}", classes.join(", ")));
    ui.data(&format!(
        "\n{:>5}  {:>7}  {:>9}  {:>10}  {:>8}  {:>8}",
        "layer", "modules", "rank", "energy", "held", "noise"
    ));
    for layer in gene.layers() {
        let modules: Vec<_> =
            gene.modules().iter().filter(|m| m.layer == layer && m.class == Class::LowRank).collect();
        let energy: f64 = modules.iter().map(|m| m.energy).sum();
        let share = |f: &dyn Fn(&gene::Module) -> f64| {
            if energy > 0.0 { modules.iter().map(|m| m.energy * f(m)).sum::<f64>() / energy } else { 0.0 }
        };
        let (low, high) = (
            modules.iter().map(|m| m.rank).min().unwrap_or(0),
            modules.iter().map(|m| m.rank).max().unwrap_or(0),
        );
        let rank = if low == high { format!("{high}") } else { format!("{low} to {high}") };
        ui.data(&format!(
            "{layer:>5}  {:>7}  {rank:>9}  {energy:>10.3e}  {:>8}  {:>8}",
            modules.len(),
            percent(1.0 - share(&|m| m.residual)),
            percent(share(&|m| m.noise_floor))
        ));
    }
    for entry in gene.rest() {
        ui.data(&format!("rest   `{}` {:?}, energy {:.3e}", name(&entry.name), entry.shape, entry.energy));
    }
    Ok(())
}
