//! The command line. Every default and unit is in the help text.

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
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress the difference of an aligned and a degraded checkpoint into a gene.
    Extract(Extract),
    /// Show what a gene holds.
    Inspect(Inspect),
    /// Find the coefficients that a target needs, from a few examples.
    Calibrate(Calibrate),
    /// Write a target with the gene expressed in it.
    Fuse(Fuse),
    /// Measure attack success, over-refusal and task accuracy.
    Evaluate(Evaluate),
    /// The invented-language families that stand in for real models.
    #[command(subcommand)]
    Lab(Lab),
    /// Everything end to end on the shipped family: extract, calibrate, fuse, evaluate.
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
    /// Rank of every module's factors (less where the difference has less).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) rank: u32,
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

#[derive(Debug, Group)]
pub(crate) struct Calibrate {
    /// The gene's folder.
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// Folder of the target model, or of an adapter.
    #[arg(long, value_name = "DIR")]
    pub(crate) target: PathBuf,
    /// Base of a target that is an adapter [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Harmful prompts, each answered by a refusal (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) safety_shots: PathBuf,
    /// Rows of the target's own task (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) task_shots: PathBuf,
    /// Harmless prompts like the harmful ones in form, with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign_shots: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    /// How far the target may move, in nat per token, on task shots and again on benign shots.
    #[arg(long, default_value_t = 0.02, value_name = "NAT")]
    pub(crate) max_kl: f64,
    /// Largest coefficient of a layer.
    #[arg(long, default_value_t = 10.0, value_name = "C")]
    pub(crate) c_max: f64,
    /// Loss of the refusals that is safe enough, in nat per token.
    #[arg(long, default_value_t = 0.003, value_name = "NAT")]
    pub(crate) delta: f64,
    /// File to write.
    #[arg(long, value_name = "EXPRESSION.json")]
    pub(crate) out: PathBuf,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
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
    /// The gene's folder.
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// Coefficients from `calibrate`.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "coefficient",
        conflicts_with = "coefficient"
    )]
    pub(crate) expression: Option<PathBuf>,
    /// One coefficient for all layers.
    #[arg(long, value_name = "C")]
    pub(crate) coefficient: Option<f64>,
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
    /// Replace an output that exists; use an expression made for another gene or target.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
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
    /// Layout of the models: `llama` or `qwen2`.
    #[arg(long, value_name = "NAME")]
    pub(crate) family: String,
    /// Seed of the language and of all training.
    #[arg(long)]
    pub(crate) seed: u64,
    /// Folder to write.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Start from this aligned model of the same family and seed instead of training one.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: Option<PathBuf>,
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
