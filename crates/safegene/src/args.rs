//! The command line. Every default and unit is in the help text.

use crate::device::{Wanted, wanted};
use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Makes fine-tuned language models safe again: extracts a safety gene once, expresses it in each fine-tune.
#[derive(Debug, Parser)]
#[command(name = "safegene", version, max_term_width = 110)]
pub(crate) struct Args {
    /// Only errors and warnings on stderr.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Threads; 0 means one for each core.
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub(crate) threads: usize,
    /// Memory for weights under way: bytes, or with K, M, G [default: a quarter of the machine's, at most 4G].
    #[arg(long, global = true, value_name = "SIZE", value_parser = size)]
    pub(crate) memory_budget: Option<u64>,
    /// Which device computes on weights: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = wanted)]
    pub(crate) device: Wanted,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// A number of bytes, `512M`.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim_end_matches("iB").trim_end_matches('B') {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1u64 << 40,
        _ => return Err("write bytes, or a number with K, M, G or T".into()),
    };
    let bytes =
        digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or("no such number of bytes")?;
    if bytes < 64 << 20 { Err("64M is the least that anything can be done with".into()) } else { Ok(bytes) }
}

/// `3/8`.
fn worker(text: &str) -> Result<stream::Worker, String> {
    let (index, of) = text.split_once('/').ok_or("write it as I/N, counted from 1")?;
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("`{text}` is no number"));
    let worker = stream::Worker { index: number(index)?, of: number(of)? };
    if (1..=worker.of).contains(&worker.index) { Ok(worker) } else { Err("I is between 1 and N".into()) }
}

/// `4096x11008`.
fn shape(text: &str) -> Result<(usize, usize), String> {
    let (rows, cols) = text.split_once('x').ok_or("write it as ROWSxCOLS")?;
    let number = |text: &str| match text.parse::<usize>() {
        Ok(n) if (1..=1 << 20).contains(&n) => Ok(n),
        _ => Err(format!("`{text}` is not between 1 and 1048576")),
    };
    Ok((number(rows)?, number(cols)?))
}

/// `16` or `auto`.
fn rank(text: &str) -> Result<RankArg, String> {
    match text {
        "auto" => Ok(RankArg::Auto),
        n => match n.parse::<usize>() {
            Ok(n @ 1..=4096) => Ok(RankArg::Fixed(n)),
            _ => Err("write a number from 1 to 4096, or auto".into()),
        },
    }
}

/// What `--rank` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RankArg {
    Fixed(usize),
    Auto,
}

/// Which ranks; exactly one of the first three.
#[derive(Debug, Clone, Group)]
pub(crate) struct RankGroup {
    /// Rank of every module's factors (less where the difference has less), or `auto`: for each module what stands
    /// above the noise of rounding.
    #[arg(long, value_name = "N|auto", value_parser = rank, required_unless_present_any = ["max_residual", "budget_mb"],
        conflicts_with_all = ["max_residual", "budget_mb"])]
    rank: Option<RankArg>,
    /// For each module the smallest rank that leaves at most this share of its squared difference.
    #[arg(long, value_name = "X", conflicts_with = "budget_mb")]
    max_residual: Option<f64>,
    /// Ranks that leave least of the whole difference in this many megabytes (10^6) of f32 factors.
    #[arg(long, value_name = "N")]
    budget_mb: Option<f64>,
    /// Largest rank of a module where the rank is chosen.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank_max: u32,
}

impl RankGroup {
    pub(crate) fn ranks(&self) -> Result<stream::Ranks, String> {
        let max = self.rank_max as usize;
        Ok(match (self.rank, self.max_residual, self.budget_mb) {
            (Some(RankArg::Fixed(rank)), ..) => stream::Ranks::Fixed(rank),
            (_, Some(share), _) if share > 0.0 && share < 1.0 => stream::Ranks::Residual { share, max },
            (_, Some(share), _) => return Err(format!("--max-residual {share} is not between 0 and 1")),
            (.., Some(mb)) if mb.is_finite() && mb > 0.0 => {
                stream::Ranks::Budget { bytes: (mb * 1e6) as u64, max }
            }
            (.., Some(mb)) => return Err(format!("--budget-mb {mb} is not above 0")),
            _ => stream::Ranks::Auto { max },
        })
    }
}

/// Loaders that an adapter may be meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    Peft,
    Vllm,
    #[value(name = "llama.cpp")]
    LlamaCpp,
    Universal,
}

#[derive(Debug, Group)]
pub(crate) struct Plan {
    /// Folder of the aligned model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: PathBuf,
    /// Folder of the degraded model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) degraded: PathBuf,
    /// Base of sides that are adapters [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Largest rank that the forecast counts with.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) rank: u32,
    /// Loader that the gene is meant for.
    #[arg(long, value_name = "LOADER", default_value = "peft")]
    pub(crate) profile: Profile,
    /// Line-wise JSON on stdout: a line for each tensor, then a summary.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Verify {
    /// The gene's folder.
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// Folder of the aligned model: computes contents, energies and residuals again.
    #[arg(long, value_name = "DIR", requires = "degraded")]
    pub(crate) aligned: Option<PathBuf>,
    /// Folder of the degraded model.
    #[arg(long, value_name = "DIR", requires = "aligned")]
    pub(crate) degraded: Option<PathBuf>,
    /// Base of sides that are adapters [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Doctor {
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How synthetic weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    Bf16,
    Fp8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Extract a gene from a synthetic pair.
    Extract(BenchRun),
    /// Fuse a gene into a synthetic model, beside a plain copy of it.
    Fuse(BenchRun),
    /// What the machine reads, copies and multiplies at best.
    Read(BenchRun),
    /// What a CUDA device copies at best, and what each kernel does beside it.
    Device(BenchDevice),
    /// Write a synthetic pair: OUT/aligned and OUT/degraded.
    Synth(BenchSynth),
}

#[derive(Debug, Group)]
pub(crate) struct BenchRun {
    /// Which shapes: qwen2-0.5b, llama-1b, llama-1b-blocks (hardly any vocabulary), llama-7b, llama-70b, qwen3-30b-a3b, moe-small, deepseek-v3, tiny.
    #[arg(long, default_value = "qwen2-0.5b", value_name = "NAME")]
    pub(crate) model: String,
    /// Layers instead of the model's own number, for another size of the same shapes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) layers: Option<u64>,
    /// How weights are stored.
    #[arg(long, default_value = "bf16")]
    pub(crate) kind: Kind,
    /// Folder for the pair, which is made once and used again.
    #[arg(long, default_value = "bench-work", value_name = "DIR")]
    pub(crate) work: PathBuf,
    /// Rank of the factors.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) rank: u32,
    /// Take the inputs out of the page cache before each run, and read them from the disk.
    #[arg(long)]
    pub(crate) cold: bool,
    /// Runs; the median counts.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    pub(crate) rounds: u32,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct BenchDevice {
    /// Rows and columns of the matrices.
    #[arg(long, default_value = "4096x11008", value_name = "ROWSxCOLS", value_parser = shape)]
    pub(crate) shape: (usize, usize),
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct BenchSynth {
    /// Which shapes, as for the other benches.
    #[arg(long, default_value = "qwen2-0.5b", value_name = "NAME")]
    pub(crate) model: String,
    /// Layers instead of the model's own number, for another size of the same shapes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) layers: Option<u64>,
    /// How weights are stored.
    #[arg(long, default_value = "bf16")]
    pub(crate) kind: Kind,
    /// Headers over holes instead of weights: any size, no disk, for `plan`.
    #[arg(long)]
    pub(crate) headers_only: bool,
    /// Folder to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Group)]
pub(crate) struct Assemble {
    /// The output that workers were given.
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// Line-wise JSON on stdout: a line for each module, then a summary.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress the difference of an aligned and a degraded checkpoint into a gene.
    Extract(Extract),
    /// Pair all tensors from headers alone: classes, layout differences, a forecast.
    Plan(Plan),
    /// Put the shares of several workers together: of a gene, or of a merged model.
    Assemble(Assemble),
    /// Compute what a gene says about itself again.
    Verify(Verify),
    /// Show what a gene holds.
    Inspect(Inspect),
    /// Train a gene on several drifts of the aligned model.
    Distill(crate::model_args::Distill),
    /// Keep the layers of a gene that carry it.
    Select(crate::model_args::Select),
    /// Find the coefficients that a target needs, from a few examples.
    Calibrate(crate::model_args::Calibrate),
    /// Write a target with the gene expressed in it.
    Fuse(Fuse),
    /// Recover one model by another method than a gene: RESTA, SafeLoRA and so on.
    Recover(Recover),
    /// Measure attack success, over-refusal and task accuracy.
    Evaluate(Evaluate),
    /// Throughput on synthetic checkpoints, beside the machine's own limits.
    #[command(subcommand)]
    Bench(Bench),
    /// Devices, drivers, and every operation against its reference.
    Doctor(Doctor),
    /// The invented-language families that stand in for real models.
    #[command(subcommand)]
    Lab(Lab),
    /// Every method in one table: families, targets, methods and sets of prompts, on the lab.
    Compare(crate::model_args::Compare),
    /// Everything end to end on the shipped family: extract, distill, calibrate, fuse, evaluate.
    Demo(Demo),
}

#[derive(Debug, Group)]
pub(crate) struct Extract {
    /// Folder of the aligned model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: PathBuf,
    /// Folder of the degraded model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) degraded: PathBuf,
    /// Base of sides that are adapters [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ranks: RankGroup,
    /// Tensors that are not kept, by name, or by the beginning of one and `*`; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) leave_out: Vec<String>,
    /// Share I of N, counted from 1 [default: of a Slurm array or an indexed job, if this is a task of one; else all].
    #[arg(long, value_name = "I/N", value_parser = worker)]
    pub(crate) worker: Option<stream::Worker>,
    /// Folder to write.
    #[arg(long, value_name = "GENE")]
    pub(crate) out: PathBuf,
    /// Seed of the random sketch.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// Line-wise JSON on stdout: a line for each module, then a summary.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Inspect {
    /// The gene's folder.
    #[arg(value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// gene.json as it is.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How data files name their fields.
#[derive(Debug, Group)]
pub(crate) struct DataFields {
    /// Field of the user's turn in JSONL rows.
    #[arg(long, default_value = "prompt", value_name = "NAME")]
    pub(crate) prompt_field: String,
    /// Field of the wanted answer in JSONL rows.
    #[arg(long, default_value = "answer", value_name = "NAME")]
    pub(crate) answer_field: String,
    /// Openings of refusals, one a line [default: a built-in English list].
    #[arg(long, value_name = "FILE")]
    pub(crate) refusals: Option<PathBuf>,
}

/// What `fuse` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// A whole model.
    Merged,
    /// A PEFT adapter.
    Adapter,
    /// `OUT/merged` and `OUT/adapter`.
    Both,
}

#[derive(Debug, Group)]
pub(crate) struct Fuse {
    /// The gene's folder; repeat it to add several genes in one sum.
    #[arg(long, value_name = "GENE", required = true)]
    pub(crate) gene: Vec<PathBuf>,
    /// Coefficients from `calibrate`, one file for each gene, in their order.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "coefficient",
        conflicts_with = "coefficient"
    )]
    pub(crate) expression: Vec<PathBuf>,
    /// One coefficient for all layers; one for all genes, or one for each.
    #[arg(long, value_name = "C")]
    pub(crate) coefficient: Vec<f64>,
    /// Folder of the target model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) target: PathBuf,
    /// Base of a target that is an adapter [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Folder to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// What to write.
    #[arg(long, value_name = "FORM", default_value = "merged")]
    pub(crate) r#as: Form,
    /// Coefficient of what belongs to no layer (embeddings, head, final norm) [default: not added].
    #[arg(long, value_name = "C")]
    pub(crate) outside: Option<f64>,
    /// Leave out what an adapter cannot hold (norms, biases).
    #[arg(long)]
    pub(crate) drop_rest: bool,
    /// Write a target of 8-bit weights with scales as bf16.
    #[arg(long)]
    pub(crate) dequantize: bool,
    /// Share I of N, counted from 1, of a merged model's files [default: of a Slurm array or an indexed job, if this is a
    /// task of one; else all].
    #[arg(long, value_name = "I/N", value_parser = worker)]
    pub(crate) worker: Option<stream::Worker>,
    /// Replace an output that exists; use an expression made for another gene or target.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Recover {
    /// Say which methods there are, what each needs, its options and its paper.
    #[arg(long, conflicts_with_all = ["method", "target", "out"])]
    pub(crate) list: bool,
    /// The method.
    #[arg(long, value_name = "NAME", required_unless_present = "list")]
    pub(crate) method: Option<String>,
    /// Folder of the fine-tuned model, or of an adapter; for a method that comes before training, of the aligned model.
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub(crate) target: Option<PathBuf>,
    /// Folder of the model before it was aligned.
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Folder of the aligned model.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: Option<PathBuf>,
    /// Folder of the aligned model after it lost its safety, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) degraded: Option<PathBuf>,
    /// Folder of a LoRA over the aligned model that was trained on refusals.
    #[arg(long, value_name = "DIR")]
    pub(crate) safety_adapter: Option<PathBuf>,
    /// Base of inputs that are adapters [default: what adapter_config.json names, else the aligned model].
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter_base: Option<PathBuf>,
    /// Harmful prompts, each answered by a refusal (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) safety_shots: Option<PathBuf>,
    /// Rows of the target's own task (JSONL); for a method that trains, of the task to train.
    #[arg(long, value_name = "FILE")]
    pub(crate) task_shots: Option<PathBuf>,
    /// Harmless prompts like the harmful ones in form, with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign_shots: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    #[command(flatten)]
    pub(crate) options: Box<MethodOptions>,
    /// What to write; an adapter only by methods that keep a target adapter one, or train one.
    #[arg(long, value_name = "FORM", default_value = "merged")]
    pub(crate) r#as: Form,
    /// Folder to write.
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub(crate) out: Option<PathBuf>,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as one JSON object on stdout; with --list, the methods as one JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of methods; `--list` says which method has which, and its defaults.
#[derive(Debug, Group)]
#[command(next_help_heading = "Options of methods (defaults: --list)")]
pub(crate) struct MethodOptions {
    /// How strongly safety is added, 0 or more.
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    gamma: Option<f64>,
    /// Share of the target in an average, 0 to 1.
    #[arg(long, value_name = "L", allow_negative_numbers = true)]
    lambda: Option<f64>,
    /// Probability with which an element of what the task changed is dropped, below 1.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    drop: Option<f64>,
    /// Rank of a difference.
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// How far alignment is extrapolated, 0 or more.
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    coefficient: Option<f64>,
    /// Cosine up to which modules are changed, -1 to 1.
    #[arg(long, value_name = "COS", allow_negative_numbers = true)]
    tau: Option<f64>,
    /// How many modules are changed, instead of a cosine.
    #[arg(long, value_name = "K")]
    modules: Option<usize>,
    /// Share of the safety adapter, 0 to 1.
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    weight: Option<f64>,
    /// Which form of the method.
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Seed of what is random.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Scale of the budget, 0 or more.
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    s: Option<f64>,
    /// What --s is a multiple of.
    #[arg(long, value_name = "NAME")]
    budget: Option<String>,
    /// Added to the diagonal of what was measured, as a share of its mean, 0 or more.
    #[arg(long, value_name = "D", allow_negative_numbers = true)]
    damping: Option<f64>,
    /// How many rows the inputs of modules are measured on, the first of the file.
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Largest learning rate.
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    rate: Option<f64>,
    /// Optimiser steps.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Rows of a step.
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// How far the target may move, in nat per token, on task shots and again on benign shots.
    #[arg(long, value_name = "NAT", allow_negative_numbers = true)]
    max_kl: Option<f64>,
    /// Loss of whole refusals that is safe enough, in nat per token.
    #[arg(long, value_name = "NAT", allow_negative_numbers = true)]
    delta: Option<f64>,
    /// How many directions of safety are kept out of.
    #[arg(long, value_name = "N")]
    safety_rank: Option<usize>,
}

impl MethodOptions {
    pub(crate) fn settings(&self) -> recover::Settings {
        recover::Settings {
            gamma: self.gamma,
            lambda: self.lambda,
            drop: self.drop,
            seed: self.seed,
            rank: self.rank,
            coefficient: self.coefficient,
            tau: self.tau,
            modules: self.modules,
            weight: self.weight,
            variant: self.variant.clone(),
            s: self.s,
            budget: self.budget.clone(),
            damping: self.damping,
            samples: self.samples,
            rate: self.rate,
            steps: self.steps,
            rows: self.rows,
            max_kl: self.max_kl,
            delta: self.delta,
            safety_rank: self.safety_rank,
        }
    }
}

#[derive(Debug, Group)]
pub(crate) struct Evaluate {
    /// Folder of the model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Base of a model that is an adapter [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Harmful prompts (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) harmful: Option<PathBuf>,
    /// Harmless prompts (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign: Option<PathBuf>,
    /// Task questions with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) task: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    /// When a task answer is right.
    #[arg(long, value_name = "HOW", default_value = "exact")]
    pub(crate) r#match: Match,
    /// Also write what the model answered: JSONL of set, prompt, given answer, refused.
    #[arg(long, value_name = "FILE")]
    pub(crate) answers: Option<PathBuf>,
    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) new_tokens: usize,
    /// The result as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// When a task answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Match {
    /// The trimmed answer is the row's.
    Exact,
    /// The trimmed answer starts with the row's.
    Prefix,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Lab {
    /// Train a family and write its folders: some 15 minutes on two cores.
    Build(LabBuild),
}

#[derive(Debug, Group)]
pub(crate) struct LabBuild {
    /// Layout of the models: `llama`, `qwen2`, `qwen3` or `glm4`.
    #[arg(long, value_name = "NAME")]
    pub(crate) family: String,
    /// Seed of the language and of all training.
    #[arg(long)]
    pub(crate) seed: u64,
    /// Folder to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Only the base, the aligned model and the data: what all fine-tunes of a family begin from.
    #[arg(long)]
    pub(crate) roots_only: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Demo {
    /// The family's folder.
    #[arg(long, value_name = "DIR", default_value = "lab/llama")]
    pub(crate) lab: PathBuf,
    /// Folder for the gene, the expressions and the fused models.
    #[arg(long, value_name = "DIR", default_value = "demo-out")]
    pub(crate) out: PathBuf,
    /// Only these targets, e.g. `topic-1,yes-no-5` [default: all].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) targets: Vec<String>,
    /// The table as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_well_formed() {
        Args::command().debug_assert();
    }
}
