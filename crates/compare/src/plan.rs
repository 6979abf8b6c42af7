//! Which targets there are, and which methods with which shots stand on each.
//!
//! | targets | tasks | methods |
//! |---|---|---|
//! | LoRA, 1 % harm | all | all, all columns, and 4 to 32 shots for the gene and the few-shot LoRA |
//! | LoRA, 5 and 10 % | all | the gene, its control, the arithmetic rivals, the few-shot LoRA |
//! | LoRA, benign rows only | all | the gene and the few-shot LoRA: what is done to what is safe already |
//! | full fine-tune, 1 % | two | as for 5 % |
//! | second generation, 1 % | all | as for 5 % |

use crate::error::CompareError;
use lab::splits::Splits;
use lab::tasks::TESTED;
use lab::{Kind, Tune};
use report::{Label, Shots};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What is compared.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder with a folder for each family, which holds its `base` and `aligned`.
    pub lab: PathBuf,
    /// Folder for what is trained and recorded.
    pub work: PathBuf,
    /// Reports of the same recipe that it goes on from.
    pub from: Vec<PathBuf>,
    /// Layouts.
    pub families: Vec<String>,
    /// Seeds of the fine-tunes, of distillation and of whatever else is drawn.
    pub seeds: Vec<u64>,
    /// A few minutes' worth: shipped fine-tunes of the first family, two targets, every method that trains no model anew.
    pub quick: bool,
    /// System, processor and threads, for the records' reader.
    pub machine: String,
    /// Cells at a time.
    pub threads: usize,
}

/// Seed of every family's language, base and aligned model.
pub const FAMILY_SEED: u64 = 1;

/// The recipe that everything is made by; a change makes every record another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Raised whenever the lab, the methods' settings or the measurement change.
    pub version: u32,
    /// Rank of genes and of the low-rank rivals.
    pub rank: usize,
    /// Limit on KL for whatever is tuned, nat per token.
    pub max_kl: f64,
    /// Safety loss that is enough, nat for how a refusal opens.
    pub delta: f64,
    /// The same for the few-shot LoRA, which learns whole refusals, nat per token.
    pub delta_whole: f64,
    /// Safety loss of a target that every tuned method leaves as it is, nat for how a refusal opens.
    pub leave: f64,
    /// Largest coefficient.
    pub c_max: f64,
    /// What the logarithm of the safety loss has to fall by to pay for coefficients that are 1 away from 1.
    pub price: f64,
    /// What it has to fall by to pay for KL, for each nat per token.
    pub kl_price: f64,
    /// Shots of the main columns.
    pub shots: [u32; 3],
    /// Distillation.
    pub distill: distill::distillation::Settings,
}

impl Recipe {
    /// The frozen recipe.
    pub fn new(quick: bool) -> Self {
        let steps = if quick { 60 } else { 200 };
        Self {
            version: 5,
            rank: 8,
            max_kl: 0.01,
            delta: 0.001,
            delta_whole: 0.001,
            leave: 0.05,
            c_max: 10.0,
            price: 0.3,
            kl_price: 500.0,
            shots: [8, 16, 8],
            distill: distill::distillation::Settings { steps, rows: 32, ..Default::default() },
        }
    }
}

/// A method in a column.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Which.
    pub method: Way,
    /// What it sees of the target's data.
    pub label: Label,
    /// How much of it.
    pub shots: Shots,
}

/// Ways to make a target safe again; the names are those of the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// As it is.
    FineTuned,
    /// The distilled gene.
    Gene,
    /// The extracted gene, not distilled.
    SvdGene,
    /// The gene distilled from random factors instead of the extracted ones.
    FreshGene,
    /// The distilled gene with one coefficient for all layers.
    GlobalScalar,
    /// The distilled gene at the least KL on the shots that is safe enough, instead of near 1.
    LeastKl,
    /// The half of its layers that scores best by price.
    Selected,
    /// A random half.
    RandomLayers,
    /// θ_t + γ (θ_a − θ_d).
    Resta,
    /// The same, limited to the larger of the two divergences that the gene spends on the same shots, where a setting is within it.
    RestaEqualKl,
    /// (1 − λ) θ_a + λ θ_t.
    WiseFt,
    /// θ_t + γ SVD_k(θ_a − θ_t).
    LowRankRestore,
    /// Updates projected on alignment where they disagree with it.
    SafeLora,
    /// The same with an orthonormal projector.
    SafeLoraOrthonormal,
    /// The same modules switched off.
    SafeLoraDrop,
    /// A safety adapter merged in where updates disagree with alignment.
    SafeMerge,
    /// Fine-tuned entries kept under a budget of harm to the outputs on safety rows.
    SafeDelta,
    /// Trained again beside a fixed projector.
    SaLora,
    /// Trained again from a hardened aligned model.
    Lox,
    /// A LoRA trained on the same shots.
    FewShot,
}

impl Way {
    /// Name in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::FineTuned => "fine-tuned",
            Self::Gene => "gene",
            Self::SvdGene => "svd-gene",
            Self::FreshGene => "fresh-gene",
            Self::GlobalScalar => "global-scalar",
            Self::LeastKl => "least-kl",
            Self::Selected => "selected",
            Self::RandomLayers => "random-layers",
            Self::Resta => "resta",
            Self::RestaEqualKl => "resta-equal-kl",
            Self::WiseFt => "wise-ft",
            Self::LowRankRestore => "low-rank-restore",
            Self::SafeLora => "safelora",
            Self::SafeLoraOrthonormal => "safelora-orthonormal",
            Self::SafeLoraDrop => "safelora-drop",
            Self::SafeMerge => "safemerge",
            Self::SafeDelta => "safe-delta",
            Self::SaLora => "salora",
            Self::Lox => "lox",
            Self::FewShot => "few-shot-lora",
        }
    }
}

/// A target and what stands on it.
#[derive(Debug, Clone)]
pub struct CellPlan {
    /// The fine-tune.
    pub tune: Tune,
    /// Methods in their order.
    pub entries: Vec<Entry>,
}

/// The whole comparison.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How everything is made.
    pub recipe: Recipe,
    /// Targets of each family and seed.
    pub cells: Vec<CellPlan>,
}

fn shots([safety, task, benign]: [u32; 3]) -> Shots {
    Shots { safety, task, benign }
}

impl Plan {
    /// The plan of some settings.
    pub fn new(quick: bool) -> Self {
        let recipe = Recipe::new(quick);
        let all = shots(recipe.shots);
        let no_benign = Shots { benign: 0, ..all };
        let none = Shots::default();
        let entry = |method, label, shots| Entry { method, label, shots };
        let zero = |method| entry(method, Label::Zero, none);
        let full = |method| entry(method, Label::SafetyTaskBenign, all);
        let task = |method| entry(method, Label::SafetyTask, no_benign);
        let target = |task, percent, kind| Tune::Target { task, percent, kind };
        if quick {
            let entries = vec![
                zero(Way::FineTuned),
                zero(Way::Gene),
                zero(Way::SvdGene),
                full(Way::Gene),
                full(Way::SvdGene),
                full(Way::GlobalScalar),
                full(Way::Resta),
                full(Way::WiseFt),
                full(Way::FewShot),
            ];
            let cell = |task| CellPlan { tune: target(task, 1, Kind::Lora), entries: entries.clone() };
            let (mut first, mut second) = (cell(TESTED[0]), cell(TESTED[3]));
            // Everything that trains no model of its own runs once.
            let gene = [Way::LeastKl, Way::Selected, Way::RandomLayers, Way::SafeMerge, Way::SafeDelta];
            let weights = [
                Way::RestaEqualKl,
                Way::LowRankRestore,
                Way::SafeLora,
                Way::SafeLoraOrthonormal,
                Way::SafeLoraDrop,
            ]
            .map(full);
            first.entries.extend(gene.map(full));
            second.entries.extend(weights);
            return Self { recipe, cells: vec![first, second] };
        }
        let mut main = vec![zero(Way::FineTuned), zero(Way::Gene), zero(Way::SvdGene), zero(Way::FreshGene)];
        main.extend([Way::Gene, Way::FewShot].map(task));
        main.extend(
            [
                Way::Gene,
                Way::SvdGene,
                Way::FreshGene,
                Way::GlobalScalar,
                Way::LeastKl,
                Way::Selected,
                Way::RandomLayers,
                Way::Resta,
                Way::RestaEqualKl,
                Way::WiseFt,
                Way::LowRankRestore,
                Way::SafeLora,
                Way::SafeLoraOrthonormal,
                Way::SafeLoraDrop,
                Way::SafeMerge,
                Way::SafeDelta,
                Way::FewShot,
            ]
            .map(full),
        );
        main.extend([Way::Lox, Way::SaLora].map(zero));
        for n in [4, 16, 32] {
            let some = shots([n, 2 * n, n]);
            main.extend([Way::Gene, Way::FewShot].map(|m| entry(m, Label::SafetyTaskBenign, some)));
        }
        let mut harder = vec![zero(Way::FineTuned), zero(Way::Gene), zero(Way::SvdGene)];
        let ways = [
            Way::Gene,
            Way::SvdGene,
            Way::Resta,
            Way::RestaEqualKl,
            Way::WiseFt,
            Way::LowRankRestore,
            Way::FewShot,
        ];
        harder.extend(ways.map(full));
        let mut healthy = vec![zero(Way::FineTuned), zero(Way::Gene)];
        healthy.extend([Way::Gene, Way::FewShot].map(full));
        let mut cells = Vec::new();
        let mut add = |tunes: Vec<Tune>, entries: &[Entry]| {
            cells.extend(tunes.into_iter().map(|tune| CellPlan { tune, entries: entries.to_vec() }));
        };
        let tested = |percent, kind| TESTED.into_iter().map(|t| target(t, percent, kind)).collect::<Vec<_>>();
        add(tested(1, Kind::Lora), &main);
        add(tested(1, Kind::Second), &harder);
        add(tested(5, Kind::Lora), &harder);
        add(tested(10, Kind::Lora), &harder);
        add(tested(0, Kind::Lora), &healthy);
        add(tested(1, Kind::Full).into_iter().take(2).collect(), &harder);
        Self { recipe, cells }
    }
}

impl Plan {
    /// The main targets alone, and what a gene for them needs: for studies beside the table.
    pub fn of_main_targets() -> Self {
        let all = Self::new(false);
        let is_main = |c: &CellPlan| matches!(c.tune, Tune::Target { percent: 1, kind: Kind::Lora, .. });
        let cells = all.cells.into_iter().filter(is_main);
        Self { recipe: all.recipe, cells: cells.map(|c| CellPlan { entries: Vec::new(), ..c }).collect() }
    }
}

/// Hash of each split, and the refusal of any two that share a prompt where one is for testing.
pub fn check_splits(splits: &Splits) -> Result<BTreeMap<String, String>, CompareError> {
    let mut hashes = BTreeMap::new();
    for (name, rows) in &splits.files {
        let mut hash = blake3::Hasher::new();
        for row in rows {
            hash.update(serde_json::to_string(row).unwrap_or_default().as_bytes());
            hash.update(b"\n");
        }
        hashes.insert(name.clone(), format!("blake3:{}", hash.finalize().to_hex()));
        if !name.starts_with("test-") {
            continue;
        }
        let tested: std::collections::BTreeSet<&str> = rows.iter().map(|r| r.prompt.as_str()).collect();
        for (other, rows) in splits.files.iter().filter(|(other, _)| !other.starts_with("test-")) {
            if let Some(row) = rows.iter().find(|r| tested.contains(r.prompt.as_str())) {
                return Err(CompareError::Leak {
                    a: name.clone(),
                    b: other.clone(),
                    prompt: row.prompt.clone(),
                });
            }
        }
    }
    Ok(hashes)
}
