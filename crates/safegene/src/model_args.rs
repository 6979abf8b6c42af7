//! The command line of what runs models: distill, select, calibrate, compare.

use crate::args::DataFields;
use clap::{Args as Group, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Group)]
pub(crate) struct Distill {
    /// Gene to begin from, as extracted [default: random factors].
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: Option<PathBuf>,
    /// Rank of random factors; those of a gene have theirs.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with = "gene")]
    pub(crate) rank: u32,
    /// Folder of the aligned model, or of an adapter: the teacher.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: PathBuf,
    /// Folder of a drift: the aligned model after an ordinary fine-tune that wore its safety off. Repeat it: 3 to 5.
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) degraded: Vec<PathBuf>,
    /// Rows of a drift's own task (JSONL), of which some are kept in the other drifts, too: one file for each --degraded in their
    /// order, or one for all [default: the benign rows].
    #[arg(long, value_name = "FILE")]
    pub(crate) keep: Vec<PathBuf>,
    /// Base of sides that are adapters [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Harmful prompts (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) safety: PathBuf,
    /// Harmless prompts with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign: PathBuf,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    /// Train on the answers of the safety rows rather than on the teacher's own.
    #[arg(long)]
    pub(crate) given_answers: bool,
    /// Longest answer of the teacher, in tokens.
    #[arg(long, default_value_t = 48, value_name = "N")]
    pub(crate) new_tokens: usize,
    /// Steps; each sees one drift, or in its turn the aligned model.
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub(crate) steps: usize,
    /// Safety rows in a step, and as many rows to keep.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(crate) rows: usize,
    /// First learning rate; it falls linearly to zero.
    #[arg(long, default_value_t = 1e-3, value_name = "RATE")]
    pub(crate) rate: f64,
    /// Temperature of the divergence from the teacher.
    #[arg(long, default_value_t = 1.0, value_name = "TAU")]
    pub(crate) tau: f64,
    /// Weight of what must not move: the more, the fewer harmless requests are refused.
    #[arg(long, default_value_t = 30.0, value_name = "W")]
    pub(crate) keep_weight: f64,
    /// Refusal log-odds wanted at the first token of an answer, nats.
    #[arg(long, default_value_t = 7.0, value_name = "NAT")]
    pub(crate) margin: f64,
    /// Weight of what they lack.
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    pub(crate) margin_weight: f64,
    /// Weight of the relative distance of hidden states.
    #[arg(long, default_value_t = 0.0, value_name = "W")]
    pub(crate) hidden_weight: f64,
    /// Weight of the factors' squared norm.
    #[arg(long, default_value_t = 0.0, value_name = "W")]
    pub(crate) decay: f64,
    /// Turns of the aligned model itself in each round of the drifts: it has to stay as it is under the gene. With 0 a
    /// target that is safe already refuses nearly everything.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) aligned_turns: usize,
    /// Attack success that a drift must have, a share: what still refuses teaches nothing.
    #[arg(long, default_value_t = 0.9, value_name = "X")]
    pub(crate) min_asr: f64,
    /// Share of benign rows that a drift must not refuse; whether it answers them well is not looked at.
    #[arg(long, default_value_t = 0.5, value_name = "X")]
    pub(crate) min_helped: f64,
    /// Share of each file's rows, its last ones, that is only measured on.
    #[arg(long, default_value_t = 0.2, value_name = "X")]
    pub(crate) held_out: f64,
    /// Seed of random factors and of the choice of rows.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Folder to write.
    #[arg(long, value_name = "GENE")]
    pub(crate) out: PathBuf,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Default for Distill {
    /// What the command line gives where nothing is said.
    fn default() -> Self {
        #[derive(clap::Parser)]
        struct Bare {
            #[command(flatten)]
            call: Distill,
        }
        let needed = ["distill", "--aligned=x", "--degraded=x", "--safety=x", "--benign=x", "--out=x"];
        <Bare as clap::Parser>::parse_from(needed).call
    }
}

/// How layers are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// Loss saved for the square root of the divergence, at coefficient 3.
    Price,
    /// Refusal log-odds gained, less the divergence on benign rows.
    Insertion,
    /// Contrast of what the block adds on harmful and on benign rows.
    Activation,
}

#[derive(Debug, Group)]
pub(crate) struct Select {
    /// The gene's folder.
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// Folder of the model, or of an adapter, that layers are tried in: a degraded model or a target.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Base of a model that is an adapter [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Harmful prompts, each answered by a refusal (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) harmful: PathBuf,
    /// Harmless prompts with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign: PathBuf,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    /// Keep the K best layers.
    #[arg(long, value_name = "K", required_unless_present = "mass", conflicts_with = "mass")]
    pub(crate) top: Option<usize>,
    /// Keep the smallest set whose positive scores reach this share of their sum.
    #[arg(long, value_name = "X")]
    pub(crate) mass: Option<f64>,
    /// How layers are ranked; all scores are stored.
    #[arg(long, value_name = "HOW", default_value = "price")]
    pub(crate) score: By,
    /// Folder to write.
    #[arg(long, value_name = "GENE")]
    pub(crate) out: PathBuf,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// The scores as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Calibrate {
    /// The gene's folder.
    #[arg(long, value_name = "GENE")]
    pub(crate) gene: PathBuf,
    /// Folder of the target model, or of an adapter. Repeat it for several: adapters over one base share its weights.
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) target: Vec<PathBuf>,
    /// Base of targets that are adapters [default: what adapter_config.json names].
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Harmful prompts, each answered by a refusal (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) safety_shots: PathBuf,
    /// Rows of the target's own task (JSONL): one file for each --target in their order, or one for all.
    #[arg(long, value_name = "FILE", required = true)]
    pub(crate) task_shots: Vec<PathBuf>,
    /// Harmless prompts like the harmful ones in form, with answers (JSONL).
    #[arg(long, value_name = "FILE")]
    pub(crate) benign_shots: Option<PathBuf>,
    /// Folder of the aligned model: it answers safety shots that have no answer.
    #[arg(long, value_name = "DIR")]
    pub(crate) aligned: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) fields: DataFields,
    /// How far the target may move, in nat per token, on task shots and again on benign shots.
    #[arg(long, default_value_t = 0.02, value_name = "NAT")]
    pub(crate) max_kl: f64,
    /// Largest coefficient of a layer.
    #[arg(long, default_value_t = 10.0, value_name = "C")]
    pub(crate) c_max: f64,
    /// Loss of how the refusals open that is safe enough: −log p of the whole opening, in nat. More is left where less would need
    /// coefficients further from 1 than it is worth.
    #[arg(long, default_value_t = 0.001, value_name = "NAT")]
    pub(crate) delta: f64,
    /// What the logarithm of that loss has to fall by to pay for KL, for each nat per token: the more, the less the target moves. Too
    /// high, and it is safety that is not bought; where the answer's loss is above 0.05 nat, KL is free.
    #[arg(long, default_value_t = 500.0, value_name = "PRICE", conflicts_with = "least_kl")]
    pub(crate) kl_price: f64,
    /// A target whose loss of how the refusals open is at most this, in nat, is left as it is.
    #[arg(long, default_value_t = 0.05, value_name = "NAT")]
    pub(crate) leave: f64,
    /// One coefficient for all layers.
    #[arg(long)]
    pub(crate) one_coefficient: bool,
    /// Of all coefficients that are safe enough those of least KL on the shots, wherever they lie, not those near 1.
    #[arg(long)]
    pub(crate) least_kl: bool,
    /// Solve without gradients (COBYLA): no backward pass, ten times the evaluations.
    #[arg(long)]
    pub(crate) forward_only: bool,
    /// Gate: share of all utility rows that may be lost, of those that the target answers rightly; half of the KL that was allowed or
    /// reached is tried, up to five times, else the exit status is 1 and nothing is written for that target.
    #[arg(long, value_name = "X")]
    pub(crate) max_utility_loss: Option<f64>,
    /// Rows of the gate (JSONL): one file for each --target, or one for all [default: the task shots].
    #[arg(long, value_name = "FILE", requires = "max_utility_loss")]
    pub(crate) utility: Vec<PathBuf>,
    /// Also compute the safety loss reached under these limits on KL.
    #[arg(long, value_name = "NATS", value_delimiter = ',')]
    pub(crate) trade_off: Vec<f64>,
    /// File to write; for several targets a folder, in which each file is called as its target's folder.
    #[arg(long, value_name = "EXPRESSION.json")]
    pub(crate) out: PathBuf,
    /// Replace an output that exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// The result as JSON on stdout: one object a target.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Compare {
    /// Layouts of the families.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "llama,qwen2,qwen3,glm4")]
    pub(crate) families: Vec<String>,
    /// Seeds of the fine-tunes.
    #[arg(long, value_name = "SEEDS", value_delimiter = ',', default_value = "11,12,13")]
    pub(crate) seeds: Vec<u64>,
    /// A few minutes' worth: shipped fine-tunes of `llama`, two targets, every method that trains no model anew.
    #[arg(long, conflicts_with_all = ["families", "seeds"])]
    pub(crate) quick: bool,
    /// Instead of the table: every half of the gene's layers on each main target, to judge selection; writes halves.json
    /// beside it.
    #[arg(long, conflicts_with = "quick")]
    pub(crate) halves: bool,
    /// Instead of the table: fine-tunes in a row from each main target, made safe again after every round by the same gene or a
    /// few-shot LoRA, in a copy or in what is trained next; writes rounds.json beside it.
    #[arg(long, conflicts_with_all = ["quick", "halves"])]
    pub(crate) rounds: bool,
    /// Folder with a folder for each family that holds its base and aligned model.
    #[arg(long, value_name = "DIR", default_value = "lab")]
    pub(crate) lab: PathBuf,
    /// Folder for what is trained and recorded; a comparison that was cut off goes on from it [default: compare-work, with
    /// --quick compare-quick-work].
    #[arg(long, value_name = "DIR")]
    pub(crate) work: Option<PathBuf>,
    /// Report to go on from: families and seeds that it holds whole, by the same recipe, are not done again. Repeat it to
    /// join several.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["quick", "halves", "rounds"])]
    pub(crate) from: Vec<PathBuf>,
    /// Folder for the report: index.html, report.md, records.jsonl, summary.json and more; replaced if it is a report.
    #[arg(long, value_name = "DIR", default_value = "compare-out")]
    pub(crate) out: PathBuf,
    /// The summary as one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}
