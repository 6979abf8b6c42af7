//! What all methods of a family and seed share: base, aligned, fine-tunes, drifts, genes.
//!
//! ```text
//! WORK/FAMILY/base, aligned, hardened
//! WORK/FAMILY/seed-N/degraded-mild, safety, drifts/*, targets/*, lox/*, salora/*     as trained, with their dev rates
//! WORK/FAMILY/seed-N/genes/svd, distilled, fresh                                     genes
//! ```

use crate::error::CompareError;
use crate::plan::{FAMILY_SEED, Plan, Recipe, Way};
use checkpoint::Checkpoint;
use distill::distillation::{CommonRows, Drift, ModuleFactors, Parts, State, Watch, distill, fresh_factors};
use distill::select::{LayerScore, scores};
use distill::{Frozen, GeneAttachments};
use gene::{Gene, MadeFactors, Origin, Source, Sources};
use lab::measure::Rates;
use lab::splits::DataRow;
use lab::train::Weights;
use lab::{Family, Progress, Tune, Tuner};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use transformer::{Attachments, Model, ModuleKind, Openings, Row};

/// A family before any fine-tune.
#[derive(Debug)]
pub struct Roots {
    /// Language, splits, tokenizer.
    pub family: Family,
    /// The aligned weights.
    pub aligned: Weights,
    /// The same as a model.
    pub model: Model,
    /// The aligned model made harder to wear off before fine-tuning (LoX).
    pub hardened: (Weights, Model),
    /// `WORK/FAMILY`.
    pub folder: PathBuf,
    /// First tokens of refusals.
    pub refusal: Vec<u32>,
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CompareError {
    let path = path.to_path_buf();
    move |e| CompareError::File { action, path, problem: e.to_string() }
}

fn copy_folder(from: &Path, to: &Path) -> Result<(), CompareError> {
    let mut name = to.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let partial = to.with_file_name(name);
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).map_err(fail("create", &partial))?;
    for entry in fs::read_dir(from).map_err(fail("read", from))? {
        let path = entry.map_err(fail("read", from))?.path();
        let to = partial.join(path.file_name().unwrap_or_default());
        fs::copy(&path, &to).map_err(fail("write", &to))?;
    }
    fs::rename(&partial, to).map_err(fail("write", to))
}

impl Roots {
    /// Reads a family's base and aligned model from `lab/LAYOUT` into `work/LAYOUT`.
    pub fn open(layout: &str, lab: &Path, work: &Path) -> Result<Self, CompareError> {
        let family = Family::new(layout, FAMILY_SEED)?;
        let (from, folder) = (lab.join(layout), work.join(layout));
        fs::create_dir_all(&folder).map_err(fail("create", &folder))?;
        for name in ["base", "aligned"] {
            if !from.join(name).join("config.json").exists() {
                return Err(CompareError::NoRoots { family: layout.into(), folder: from });
            }
            if !folder.join(name).exists() {
                copy_folder(&from.join(name), &folder.join(name))?;
            }
            let content =
                |at: &Path| Ok::<_, CompareError>(Checkpoint::open(&at.join(name), None)?.content()?);
            if content(&from)? != content(&folder)? {
                return Err(CompareError::OtherLab { model: name, lab: from, folder });
            }
        }
        let read = |name: &str| lab::folders::read_model(&folder.join(name), &family.architecture);
        let aligned = read("aligned")?;
        let hardened_at = folder.join("hardened");
        if !hardened_at.exists() {
            let inputs = recover::Inputs {
                target: folder.join("aligned"),
                aligned: Some(folder.join("aligned")),
                base: Some(folder.join("base")),
                ..Default::default()
            };
            crate::roster::recover_into("lox", &recover::Settings::default(), &inputs, &hardened_at)?;
        }
        let hardened = read("hardened")?;
        let model = |w: &Weights| Model::new(family.architecture.clone(), w);
        let (model, hardened_model) = (model(&aligned)?, model(&hardened)?);
        let refusal = family.chat.refusal_tokens(&Openings::default())?;
        Ok(Self { family, aligned, model, hardened: (hardened, hardened_model), folder, refusal })
    }

    /// Hash of the base and the aligned weights.
    pub fn hash(&self) -> Result<String, CompareError> {
        let content =
            |name: &str| Ok::<_, CompareError>(Checkpoint::open(&self.folder.join(name), None)?.content()?);
        let both = format!("{} {}", content("base")?, content("aligned")?);
        Ok(format!("blake3:{}", blake3::hash(both.as_bytes()).to_hex()))
    }

    /// `WORK/FAMILY/seed-N`.
    pub fn seed_folder(&self, seed: u64) -> PathBuf {
        self.folder.join(format!("seed-{seed}"))
    }

    /// The rows of a split as tokens, as many as asked for.
    pub fn rows(&self, split: &str, from: usize, n: usize) -> Result<Vec<Row>, CompareError> {
        let one = |r: &DataRow| Ok(self.family.chat.row(&r.prompt, &r.answer)?);
        self.family.splits.get(split).iter().skip(from).take(n).map(one).collect()
    }
}

/// Something to be trained for a family and seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Training {
    /// From the aligned model.
    Plain(Tune),
    /// From the hardened one.
    Lox(Tune),
    /// Beside a fixed projector.
    SaLora(Tune),
}

impl Training {
    /// Its folder inside of the seed's.
    pub fn folder(self) -> String {
        match self {
            Self::Plain(tune) => tune.folder(),
            Self::Lox(tune) => format!("lox/{}", tune.name()),
            Self::SaLora(tune) => format!("salora/{}", tune.name()),
        }
    }

    /// All that a plan needs.
    pub fn all(plan: &Plan) -> Vec<Training> {
        let mut out = BTreeSet::from([Training::Plain(Tune::Degraded { strong: false })]);
        out.extend(lab::tune::drifts().map(Training::Plain));
        for cell in &plan.cells {
            out.insert(Training::Plain(cell.tune));
            for entry in &cell.entries {
                match entry.method {
                    Way::Lox => out.insert(Training::Lox(cell.tune)),
                    Way::SaLora => out.insert(Training::SaLora(cell.tune)),
                    Way::SafeMerge => out.insert(Training::Plain(Tune::Safety)),
                    _ => false,
                };
            }
        }
        out.into_iter().collect()
    }

    /// Whether it is there.
    pub fn done(self, roots: &Roots, seed: u64) -> bool {
        roots.seed_folder(seed).join(self.folder()).exists()
    }

    /// Trains and writes it.
    pub fn run(self, roots: &Roots, seed: u64, progress: &dyn Progress) -> Result<(), CompareError> {
        let family = &roots.family;
        let plain = Tuner { family, weights: &roots.aligned, model: &roots.model, seed, progress };
        let root = roots.seed_folder(seed);
        let out = root.join(self.folder());
        let up = "../".repeat(self.folder().split('/').count() + 1);
        let (tuned, rates, base) = match self {
            Self::Plain(tune) => {
                let (tuned, rates) = plain.run(tune)?;
                (tuned, rates, "aligned")
            }
            Self::Lox(tune) => {
                let (weights, model) = &roots.hardened;
                let (tuned, rates) = Tuner { weights, model, ..plain }.run(tune)?;
                (tuned, rates, "hardened")
            }
            Self::SaLora(tune) => {
                let (tuned, rates) = crate::roster::train_salora(roots, &plain, tune)?;
                (tuned, rates, "aligned")
            }
        };
        if let Some(parent) = out.parent() {
            fs::create_dir_all(parent).map_err(fail("create", parent))?;
        }
        let rates_at = rates_file(&root, &self.folder());
        if let Some(parent) = rates_at.parent() {
            fs::create_dir_all(parent).map_err(fail("create", parent))?;
        }
        let text = serde_json::to_string_pretty(&rates).unwrap_or_default() + "\n";
        fs::write(&rates_at, text).map_err(fail("write", &rates_at))?;
        Ok(lab::build::write_tuned(family, &out, &format!("{up}{base}"), &tuned)?)
    }
}

/// Takes a fine-tune of a shipped family, and its dev rates, into the work folder.
pub fn take(roots: &Roots, seed: u64, folder: &str, from: &Path, rates: &Rates) -> Result<(), CompareError> {
    let root = roots.seed_folder(seed);
    let (out, rates_at) = (root.join(folder), rates_file(&root, folder));
    if out.exists() {
        return Ok(());
    }
    for path in [&out, &rates_at] {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(fail("create", parent))?;
        }
    }
    let text = serde_json::to_string_pretty(rates).unwrap_or_default() + "\n";
    fs::write(&rates_at, text).map_err(fail("write", &rates_at))?;
    copy_folder(&from.join(folder), &out)?;
    // An adapter names its base by a path from its own folder.
    let config = out.join("adapter_config.json");
    if let Ok(text) = fs::read_to_string(&config) {
        let up = "../".repeat(folder.split('/').count() + 1);
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        value["base_model_name_or_path"] = format!("{up}aligned").into();
        fs::write(&config, format!("{value:#}\n")).map_err(fail("write", &config))?;
    }
    Ok(())
}

fn rates_file(root: &Path, folder: &str) -> PathBuf {
    root.join("rates").join(format!("{folder}.json"))
}

/// Rates on the dev split of something trained.
pub fn rates_of(roots: &Roots, seed: u64, folder: &str) -> Result<Rates, CompareError> {
    let path = rates_file(&roots.seed_folder(seed), folder);
    let text = fs::read(&path).map_err(fail("read", &path))?;
    serde_json::from_slice(&text).map_err(|e| CompareError::File {
        action: "read",
        path,
        problem: e.to_string(),
    })
}

/// A model of the work folder: an adapter over a shared model, or a whole one.
#[derive(Debug)]
pub enum Held<'a> {
    /// Over weights that others share.
    Shared(Frozen<'a>),
    /// By itself.
    Own(Box<Model>),
}

impl Held<'_> {
    /// As a frozen model.
    pub fn frozen(&self) -> Frozen<'_> {
        match self {
            Self::Shared(frozen) => frozen.clone(),
            Self::Own(model) => Frozen::new(model),
        }
    }

    /// With its adapter added to the weights: for a target that many methods are tried on.
    pub fn merged(self) -> Result<Self, CompareError> {
        match self {
            Self::Shared(frozen) => Ok(Self::Own(Box::new(frozen.model.merged(&frozen.own)?))),
            own => Ok(own),
        }
    }

    /// Opens a folder; adapters go over `shared` where they are low-rank sums.
    pub fn open<'a>(folder: &Path, shared: &'a Model) -> Result<Held<'a>, CompareError> {
        let checkpoint = Checkpoint::open(folder, None)?;
        if let Some(own) = checkpoint.adapter().map(Attachments::of_adapter).transpose()?.flatten() {
            return Ok(Held::Shared(Frozen { model: shared, own }));
        }
        Ok(Held::Own(Box::new(Model::open(&checkpoint)?)))
    }
}

/// Genes and what they came from.
#[derive(Debug)]
pub struct Ground<'a> {
    /// The family.
    pub roots: &'a Roots,
    /// The seed.
    pub seed: u64,
    /// The extracted gene.
    pub svd: GeneAttachments,
    /// Distilled from it.
    pub gene: GeneAttachments,
    /// Distilled from random factors.
    pub fresh: GeneAttachments,
    /// Scores of the distilled gene's layers in the first drift.
    pub scores: Vec<LayerScore>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

fn factors_of(gene: &Gene) -> Result<Vec<ModuleFactors>, CompareError> {
    let mut out = Vec::new();
    for module in gene.modules().iter().filter(|m| m.class == gene::Class::LowRank) {
        let f = gene.factors(&module.name)?;
        if let Some((layer, kind)) = ModuleKind::parse(&module.name) {
            out.push(ModuleFactors { layer, kind, rank: f.rank, b: f.b, a: f.a });
        }
    }
    Ok(out)
}

struct Steps<'a> {
    name: String,
    progress: &'a dyn Progress,
}

impl Watch for Steps<'_> {
    fn step(&mut self, step: usize, steps: usize, drift: &str, parts: &Parts) {
        let note = format!("{drift}: safety {:.3}, keep {:.4}", parts.safety, parts.keep);
        self.progress.step(&self.name, step, steps, &note);
    }
    fn state(
        &mut self,
        _: usize,
        _: &dyn Fn() -> Result<State, distill::distillation::DistillError>,
    ) -> Result<bool, distill::distillation::DistillError> {
        Ok(false)
    }
}

/// Where a distillation of a ground lies, and what it reached on held-out rows.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Reached {
    /// At the start.
    pub start: Parts,
    /// At the end.
    pub end: Parts,
    /// Seconds it took.
    pub seconds: f64,
}

impl<'a> Ground<'a> {
    /// Makes the genes that are not there yet, `threads` at a time; everything that a plan trains must be there.
    pub fn open(
        roots: &'a Roots,
        seed: u64,
        recipe: &Recipe,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Self, CompareError> {
        let root = roots.seed_folder(seed);
        let genes = root.join("genes");
        fs::create_dir_all(&genes).map_err(fail("create", &genes))?;
        let aligned = || Checkpoint::open(&roots.folder.join("aligned"), None);
        let svd_at = genes.join("svd");
        if !svd_at.exists() {
            let degraded = Checkpoint::open(&root.join("degraded-mild"), None)?;
            let ranks = stream::Ranks::Fixed(recipe.rank);
            let job = stream::Extract::new(aligned()?, degraded, ranks, &svd_at);
            stream::extract(&kernels::CpuEngine::new(), &job, &stream::NoProgress)?;
        }
        let svd = Gene::open(&svd_at)?;
        let mut notes = Vec::new();
        let held = drifts(roots, seed, &mut notes)?;
        let mut missing = vec![("distilled", Some(&svd)), ("fresh", None)];
        missing.retain(|(name, _)| !genes.join(name).exists());
        lab::train::each::<CompareError>(missing.len(), threads, &|i| {
            let (name, start) = missing[i];
            let start = match start {
                Some(gene) => factors_of(gene)?,
                None => fresh_factors(&roots.model, recipe.rank, seed),
            };
            let mut watch = Steps { name: format!("{} {seed} {name}", roots.family.layout), progress };
            let (factors, reached) = distilled(roots, seed, recipe, &held, start, &mut watch)?;
            write_gene(roots, &aligned()?, recipe, factors, &reached, &genes.join(name))
        })?;
        let open = |name: &str| -> Result<GeneAttachments, CompareError> {
            Ok(GeneAttachments::new(&Gene::open(&genes.join(name))?)?)
        };
        let (gene, fresh) = (open("distilled")?, open("fresh")?);
        let drift = held[0].1.frozen();
        let (mut bad, good) = (roots.rows("distill-safety", 0, 64)?, roots.rows("distill-benign", 0, 64)?);
        roots.family.chat.cut_to_openings(&mut bad, &Openings::default())?;
        let pad = roots.family.chat.end();
        let scores = scores(&drift, &gene, &bad, &good, (&roots.refusal, pad))?;
        Ok(Self { roots, seed, svd: GeneAttachments::new(&svd)?, gene, fresh, scores, notes })
    }

    /// What the distillation of a gene reached.
    pub fn reached(&self, gene: &str) -> Result<Option<Reached>, CompareError> {
        let gene = Gene::open(&self.roots.seed_folder(self.seed).join("genes").join(gene))?;
        Ok(gene.manifest().extra.get("distilled").and_then(|v| serde_json::from_value(v.clone()).ok()))
    }
}

/// The drifts that pass the gate, with their names.
fn drifts<'a>(
    roots: &'a Roots,
    seed: u64,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Held<'a>)>, CompareError> {
    let mut out = Vec::new();
    let mut failed = None;
    for tune in lab::tune::drifts() {
        let rates = rates_of(roots, seed, &tune.folder())?;
        let name = tune.name();
        let gate = |what, value, need| CompareError::Gate {
            family: roots.family.layout.clone(),
            seed,
            drift: name.clone(),
            what,
            value,
            need,
        };
        let bad = if rates.asr < 0.9 {
            Some(gate("attack success on dev", rates.asr, "at least 0.9"))
        } else if rates.helped < 0.5 {
            Some(gate("share of benign requests helped on dev", rates.helped, "at least 0.5"))
        } else {
            None
        };
        match bad {
            Some(error) => {
                notes.push(format!("left out: {error}"));
                failed = Some(error);
            }
            None => {
                let folder = roots.seed_folder(seed).join(tune.folder());
                out.push((tune.name(), Held::open(&folder, &roots.model)?));
            }
        }
    }
    match failed {
        Some(error) if out.len() < 3 => Err(error),
        _ => Ok(out),
    }
}

/// Rows of a drift's task for training; those after are held out.
const TASK_ROWS: usize = 800;
/// Rows of a drift's task that are held out.
const TASK_HELD_OUT: usize = 64;

fn distilled(
    roots: &Roots,
    seed: u64,
    recipe: &Recipe,
    held: &[(String, Held<'_>)],
    start: Vec<ModuleFactors>,
    watch: &mut dyn Watch,
) -> Result<(Vec<ModuleFactors>, Reached), CompareError> {
    let clock = std::time::Instant::now();
    let teacher = Frozen::new(&roots.model);
    let chat = &roots.family.chat;
    // What the teacher answers, not what the data say.
    let answered = |split: &str| -> Result<Vec<Row>, CompareError> {
        let mut rows = roots.rows(split, 0, usize::MAX)?;
        let prompts: Vec<Vec<u32>> = rows.iter().map(|r| r.prompt.clone()).collect();
        let answers = transformer::generate(&roots.model, &Attachments::none(), &prompts, chat.stop(), 12)?;
        for (row, mut answer) in rows.iter_mut().zip(answers) {
            answer.push(chat.end());
            row.answer = answer;
        }
        Ok(rows)
    };
    let (safety, benign) = (answered("distill-safety")?, roots.rows("distill-benign", 0, usize::MAX)?);
    // Held out: requests about nouns that no distillation sees.
    let (safety_out, benign_out) = (answered("dev-harmful")?, roots.rows("dev-benign", 0, usize::MAX)?);
    let of = |from: usize, n: usize| -> Result<Vec<Drift<'_>>, CompareError> {
        let mut drifts = Vec::new();
        for (name, held) in held {
            let task = roots.rows(&format!("train-{name}"), from, n)?;
            drifts.push(Drift { name: name.clone(), frozen: held.frozen(), task });
        }
        Ok(drifts)
    };
    let (train, out) = (of(0, TASK_ROWS)?, of(TASK_ROWS, TASK_HELD_OUT)?);
    let settings = distill::distillation::Settings { seed, ..recipe.distill };
    let done = distill(
        &teacher,
        &train,
        CommonRows { safety: &safety, benign: &benign },
        (&out, CommonRows { safety: &safety_out, benign: &benign_out }),
        start,
        &settings,
        (&roots.refusal, chat.end()),
        None,
        watch,
    )?;
    let reached = Reached { start: done.start, end: done.end, seconds: clock.elapsed().as_secs_f64() };
    Ok((done.factors, reached))
}

fn write_gene(
    roots: &Roots,
    aligned: &Checkpoint,
    recipe: &Recipe,
    factors: Vec<ModuleFactors>,
    reached: &Reached,
    out: &Path,
) -> Result<(), CompareError> {
    let factors = factors
        .into_iter()
        .map(|f| MadeFactors { module: f.kind.module(f.layer), rank: f.rank, b: f.b, a: f.a })
        .collect();
    let source = |name: &str, content: String| Source { name: name.into(), content, ..Source::default() };
    let json = |value: serde_json::Value| value.as_object().cloned().unwrap_or_default();
    let origin = Origin {
        tool: env!("CARGO_PKG_VERSION").into(),
        options: json(serde_json::to_value(recipe.distill).unwrap_or_default()),
        sources: Sources {
            aligned: source("aligned", aligned.content()?),
            degraded: source("drifts", String::new()),
            ..Sources::default()
        },
        extra: json(serde_json::json!({ "distilled": reached, "family_seed": roots.family.seed })),
    };
    gene::write_made(out, false, aligned, factors, origin)?;
    Ok(())
}
