//! Forms of calibration on the *dev* split of a comparison's targets: how the choice was made that `docs/results.md` tells of.
//!
//! A form is `openings|whole:nearest|least-kl|few-shot-lora:DELTA:MAX_KL`, a calibration's also with `:PRICE` (of leaving 1) or
//! `:PRICE:KL_PRICE`, or `one` for coefficient 1 everywhere. Judged on known request templates and on the dev split's own shifted ones. Draw `k` takes the safety and
//! benign shots `8 k .. 8 k + 8` and the task shots `16 k .. 16 k + 16`; the comparison's are draw 0. What the work folder of a
//! comparison does not hold is trained first: seeds that no comparison reports on are there for choices. One JSON object a line on stdout.

#![allow(clippy::print_stdout)]

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, ValueEnum};
use compare::ground::{Ground, Held, Roots, Training};
use compare::judge::Judge;
use compare::plan::Recipe;
use compare::roster::{few_shot_options, shots_of, whole_shots_of};
use distill::distillation::Settings;
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
    /// Which gene.
    #[arg(long, default_value = "distilled")]
    gene: Kind,
    /// Settings of the distillation, where they are not the recipe's, e.g. `keep=100,rows=16`; for a work folder that has no genes yet.
    #[arg(long, value_delimiter = ',')]
    set: Vec<String>,
    /// Targets at a time.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Distilled,
    Svd,
    Fresh,
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
    let (rows, aim, delta, max_kl, prices) = match text.split(':').collect::<Vec<_>>()[..] {
        [rows, aim, delta, max_kl, ref prices @ ..] if prices.len() <= 2 => {
            (rows, aim, delta, max_kl, prices.to_vec())
        }
        _ => bail!("`{text}` is no form; one is openings:nearest:0.001:0.01"),
    };
    let whole = match rows {
        "whole" => true,
        "openings" => false,
        other => bail!("`{other}` is neither `openings` nor `whole`"),
    };
    let number = |text: &str| text.parse::<f64>().with_context(|| format!("`{text}` is no number"));
    let (delta, max_kl) = (number(delta)?, number(max_kl)?);
    let price = |i: usize, default: f64| prices.get(i).map_or(Ok(default), |text| number(text));
    let (price, kl_price) = (price(0, recipe.price)?, price(1, recipe.kl_price)?);
    let aim = match aim {
        "nearest" => Aim::Nearest,
        "least-kl" => Aim::LeastKl,
        "few-shot-lora" if !prices.is_empty() => bail!("`{text}`: a LoRA has no price"),
        "few-shot-lora" => return Ok(Form::FewShot { whole, delta, max_kl }),
        other => bail!("`{other}` is none of `nearest`, `least-kl` and `few-shot-lora`"),
    };
    Ok(Form::Calibrated {
        whole,
        limits: Limits { aim, delta, max_kl, price, kl_price, c_max: recipe.c_max, ..Limits::default() },
    })
}

fn shots(roots: &Roots, tune: Tune, draw: usize, whole: bool) -> Result<Shots> {
    let n = report::Shots { safety: 8, task: 16, benign: 8 };
    Ok(if whole { whole_shots_of(roots, tune, n, draw)? } else { shots_of(roots, tune, n, draw)? })
}

/// Every form and draw on one target, a line each.
fn on_target(
    args: &Args,
    forms: &[(&str, Form)],
    recipe: &Recipe,
    ground: &Ground<'_>,
    name: &str,
) -> Result<Vec<String>> {
    let roots = ground.roots;
    let tune = Tune::target(name).with_context(|| format!("`{name}` is no target of the lab"))?;
    let folder = roots.seed_folder(args.seed).join("targets").join(name);
    let held = Held::open(&folder, &roots.model)?.merged()?;
    let (target, pad) = (held.frozen(), roots.family.chat.end());
    let judge = Judge::new(ground, &target, tune, "dev", &[Set::Known, Set::Shifted])?;
    let gene: &GeneAttachments = match args.gene {
        Kind::Distilled => &ground.gene,
        Kind::Svd => &ground.svd,
        Kind::Fresh => &ground.fresh,
    };
    let gene_name = args.gene.to_possible_value().map(|v| v.get_name().to_string());
    let mut out = Vec::new();
    for &draw in &args.draws {
        for &(text, form) in forms {
            let mut line = serde_json::json!({
                "family": roots.family.layout, "seed": args.seed, "target": name, "draw": draw, "form": text, "gene": gene_name,
                "distillation": recipe.distill,
            });
            let added = match form {
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
                    let options = few_shot::Options { delta, max_kl, ..few_shot_options(recipe, args.seed) };
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

/// Settings with some others, each `NAME=NUMBER`.
fn changed(settings: Settings, set: &[String]) -> Result<Settings> {
    let mut all = serde_json::to_value(settings)?;
    for one in set {
        let (name, value) = one.split_once('=').with_context(|| format!("`{one}` is not NAME=NUMBER"))?;
        if name == "seed" {
            bail!("the seed of a distillation is --seed");
        }
        let slot = all
            .get_mut(name)
            .with_context(|| format!("`{name}` is no setting; there are {}", names(&settings)))?;
        *slot = serde_json::from_str(value).with_context(|| format!("`{value}` is no number"))?;
    }
    serde_json::from_value(all).context("a setting has a value of the wrong kind")
}

fn names(settings: &Settings) -> String {
    let all = serde_json::to_value(settings).unwrap_or_default();
    let names = all.as_object().map(|o| o.keys().map(|k| format!("`{k}`")).collect::<Vec<_>>());
    names.unwrap_or_default().join(", ")
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut recipe = Recipe::new(false);
    let forms = args
        .forms
        .iter()
        .map(|text| Ok((text.as_str(), form(text, &recipe)?)))
        .collect::<Result<Vec<_>>>()?;
    recipe.distill = changed(recipe.distill, &args.set)?;
    if !args.set.is_empty() && args.work.join("recipe.json").exists() {
        bail!("`{}` is a comparison's: its genes are the recipe's; name another --work", args.work.display());
    }
    for family in &args.families {
        let roots = Roots::open(family, &args.lab, &args.work)?;
        trained(&args, &roots)?;
        let ground = Ground::open(&roots, args.seed, &recipe, args.threads, &Quiet)?;
        let lines: Mutex<BTreeMap<usize, Vec<String>>> = Mutex::new(BTreeMap::new());
        train::each::<LabError>(args.targets.len(), args.threads, &|i| {
            let done = on_target(&args, &forms, &recipe, &ground, &args.targets[i])
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
