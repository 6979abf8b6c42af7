//! Forms of calibration on the *dev* split of a comparison's targets: how the choice was made that `docs/results.md` tells of.
//!
//! A form is `openings|whole:nearest|least-kl|few-shot-lora:DELTA:MAX_KL`, a calibration's also with `:PRICE`, or `one` for
//! coefficient 1 everywhere. Judged on known request templates and on the dev split's own shifted ones. Draw `k` takes the safety and
//! benign shots `8 k .. 8 k + 8` and the task shots `16 k .. 16 k + 16`; the comparison's are draw 0. What the work folder of a
//! comparison does not hold is trained first: seeds that no comparison reports on are there for choices. One JSON object a line on stdout.

#![allow(clippy::print_stdout)]

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use compare::ground::{Ground, Held, Roots, Training};
use compare::judge::Judge;
use compare::plan::Recipe;
use compare::roster::{few_shot_options, shots_of, whole_shots_of};
use distill::{Aim, GeneAttachments, Limits, Shots};
use lab::measure::Rates;
use lab::{LabError, Tune, train};
use recover::few_shot;
use report::Set;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use transformer::ModuleFactors;

#[derive(Debug, Parser)]
struct Args {
    /// Folder of the families' base and aligned models.
    #[arg(long, default_value = "lab")]
    lab: PathBuf,
    /// Work folder of a comparison.
    #[arg(long)]
    work: PathBuf,
    /// Families.
    #[arg(long, value_delimiter = ',', required = true)]
    families: Vec<String>,
    /// Seed of the fine-tunes.
    #[arg(long, default_value_t = 11)]
    seed: u64,
    /// Targets by name, e.g. `topic-1,topic-1-second`.
    #[arg(long, value_delimiter = ',', required = true)]
    targets: Vec<String>,
    /// Draws of shots, 0 to 3.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    draws: Vec<usize>,
    /// Forms to try.
    #[arg(long, value_delimiter = ',', required = true)]
    forms: Vec<String>,
    /// Which gene: `distilled`, `svd` or `fresh`.
    #[arg(long, default_value = "distilled")]
    gene: String,
    /// Weight of what is to be kept in the distillation of genes that are not there yet (the recipe's without).
    #[arg(long)]
    keep: Option<f64>,
    /// Steps of that distillation (the recipe's without).
    #[arg(long)]
    steps: Option<usize>,
    /// Its margin, nats (the recipe's without).
    #[arg(long)]
    margin: Option<f64>,
    /// Targets at a time.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Debug)]
struct Quiet;

impl lab::Progress for Quiet {
    fn step(&self, _: &str, _: usize, _: usize, _: &str) {}
    fn finished(&self, _: &str, _: &Rates) {}
}

impl compare::Progress for Quiet {
    fn stage(&self, _: &str, _: usize) {}
    fn part(&self, _: &str) {}
}

/// What one form of calibration asks for.
#[derive(Debug, Clone, Copy)]
enum Form {
    One,
    Calibrated { whole: bool, limits: Limits },
    FewShot { whole: bool, delta: f64, max_kl: f64 },
}

fn form(text: &str, recipe: &Recipe) -> Result<Form> {
    if text == "one" {
        return Ok(Form::One);
    }
    let (rows, aim, delta, max_kl, price) = match text.split(':').collect::<Vec<_>>()[..] {
        [rows, aim, delta, max_kl] => (rows, aim, delta, max_kl, None),
        [rows, aim, delta, max_kl, price] => (rows, aim, delta, max_kl, Some(price)),
        _ => bail!("`{text}` is no form; one is openings:nearest:0.003:0.01"),
    };
    let whole = match rows {
        "whole" => true,
        "openings" => false,
        other => bail!("`{other}` is neither `openings` nor `whole`"),
    };
    let number = |text: &str| text.parse::<f64>().with_context(|| format!("`{text}` is no number"));
    let (delta, max_kl) = (number(delta)?, number(max_kl)?);
    let given = price.is_some();
    let price = price.map(number).transpose()?.unwrap_or(recipe.price);
    let aim = match aim {
        "nearest" => Aim::Nearest,
        "least-kl" => Aim::LeastKl,
        "few-shot-lora" if given => bail!("`{text}`: a LoRA has no price"),
        "few-shot-lora" => return Ok(Form::FewShot { whole, delta, max_kl }),
        other => bail!("`{other}` is none of `nearest`, `least-kl` and `few-shot-lora`"),
    };
    Ok(Form::Calibrated {
        whole,
        limits: Limits { aim, delta, max_kl, price, c_max: recipe.c_max, ..Limits::default() },
    })
}

fn shots(roots: &Roots, tune: Tune, draw: usize, whole: bool) -> Result<Shots> {
    let n = report::Shots { safety: 8, task: 16, benign: 8 };
    Ok(if whole { whole_shots_of(roots, tune, n, draw)? } else { shots_of(roots, tune, n, draw)? })
}

/// Every form and draw on one target, a line each.
fn on_target(args: &Args, ground: &Ground<'_>, name: &str) -> Result<Vec<String>> {
    let roots = ground.roots;
    let recipe = Recipe::new(false);
    let tune = Tune::target(name).with_context(|| format!("`{name}` is no target of the lab"))?;
    let folder = roots.seed_folder(args.seed).join("targets").join(name);
    let held = Held::open(&folder, &roots.model)?.merged()?;
    let (target, pad) = (held.frozen(), roots.family.chat.end());
    let judge = Judge::new(ground, &target, tune, "dev", &[Set::Known, Set::Shifted])?;
    let gene: &GeneAttachments = match args.gene.as_str() {
        "distilled" => &ground.gene,
        "svd" => &ground.svd,
        "fresh" => &ground.fresh,
        other => bail!("`{other}` is none of `distilled`, `svd` and `fresh`"),
    };
    let mut out = Vec::new();
    for &draw in &args.draws {
        for text in &args.forms {
            let mut line = serde_json::json!({
                "family": roots.family.layout, "seed": args.seed, "target": name, "draw": draw, "form": text, "gene": args.gene,
            });
            let added = match form(text, &recipe)? {
                Form::One => gene.at(&gene.layers().iter().map(|&l| (l, 1.0)).collect())?,
                Form::Calibrated { whole, limits } => {
                    let shots = shots(roots, tune, draw, whole)?;
                    let found = distill::calibrate(&target, gene, &shots, &limits, pad)?;
                    line["on_shots"] = serde_json::to_value(&found)?;
                    gene.at(&found.coefficients)?
                }
                Form::FewShot { whole, delta, max_kl } => {
                    let Shots { safety, task, benign } = shots(roots, tune, draw, whole)?;
                    let shots = few_shot::Shots { safety, task, benign };
                    let options = few_shot::Options { delta, max_kl, ..few_shot_options(&recipe, args.seed) };
                    let rates = &few_shot::RATES;
                    let (found, _) = few_shot::best_rate(
                        target.model,
                        &target.own,
                        &shots,
                        rates,
                        &options,
                        pad,
                        &mut |_| true,
                    )?;
                    line["on_shots"] = serde_json::to_value(found.report)?;
                    ModuleFactors::attachments(&found.factors)?
                }
            };
            let judged = judge.of(&target.model.merged(&target.with(&added))?)?;
            let value = |r: Option<evaluate::Rate>| r.map(|r| r.value);
            for (set, judged) in &judged.sets {
                let name = |what: &str| match set {
                    Set::Known => what.to_string(),
                    Set::Shifted => format!("{what}_shifted"),
                };
                line[name("asr")] = serde_json::to_value(value(judged.asr))?;
                line[name("over_refusal")] = serde_json::to_value(value(judged.over_refusal))?;
            }
            line["accuracy"] = serde_json::to_value(value(judged.accuracy))?;
            line["kl_task"] = serde_json::to_value(judged.kl_task)?;
            line["kl_benign"] = serde_json::to_value(judged.kl_benign)?;
            out.push(line.to_string());
        }
    }
    Ok(out)
}

/// Trains what is missing: drifts, what the gene is extracted from, targets.
fn trained(args: &Args, roots: &Roots) -> Result<()> {
    let mut all: Vec<Training> = lab::tune::drifts().map(Training::Plain).collect();
    all.push(Training::Plain(Tune::Degraded { strong: false }));
    for name in &args.targets {
        let tune = Tune::target(name).with_context(|| format!("`{name}` is no target of the lab"))?;
        all.push(Training::Plain(tune));
    }
    all.retain(|training| !training.done(roots, args.seed));
    Ok(train::each::<LabError>(all.len(), args.threads, &|i| {
        all[i].run(roots, args.seed, &Quiet).map_err(|e| LabError::Thread(e.to_string()))
    })?)
}

fn main() -> Result<()> {
    let args = Args::parse();
    for text in &args.forms {
        form(text, &Recipe::new(false))?;
    }
    let other = args.keep.is_some() || args.steps.is_some() || args.margin.is_some();
    if other && args.work.join("recipe.json").exists() {
        bail!("`{}` is a comparison's: its genes are the recipe's; name another --work", args.work.display());
    }
    for family in &args.families {
        let roots = Roots::open(family, &args.lab, &args.work)?;
        trained(&args, &roots)?;
        let mut recipe = Recipe::new(false);
        recipe.distill.keep = args.keep.unwrap_or(recipe.distill.keep);
        recipe.distill.steps = args.steps.unwrap_or(recipe.distill.steps);
        recipe.distill.margin = args.margin.unwrap_or(recipe.distill.margin);
        let ground = Ground::open(&roots, args.seed, &recipe, args.threads, &Quiet)?;
        let lines: Mutex<BTreeMap<usize, Vec<String>>> = Mutex::new(BTreeMap::new());
        train::each::<LabError>(args.targets.len(), args.threads, &|i| {
            let done = on_target(&args, &ground, &args.targets[i])
                .map_err(|e| LabError::Thread(format!("{}: {e:#}", args.targets[i])))?;
            if let Ok(mut lines) = lines.lock() {
                lines.insert(i, done);
            }
            Ok(())
        })?;
        let lines = lines.into_inner().map_err(|_| anyhow!("a thread died"))?;
        lines.values().flatten().for_each(|line| println!("{line}"));
    }
    Ok(())
}
