//! `safegene demo`: extract, distill, calibrate, fuse, evaluate over the targets of a lab family, ending in one table.
//!
//! The gene is extracted from the aligned and a degraded model of the family and distilled on its drifts, which were
//! fine-tuned on tasks that no target has. Each target is calibrated on shots whose nouns
//! occur in no test row, fused to a whole folder, read back from there and measured on both test sets.

use crate::args::Demo;
use crate::commands::calibrate::{SWAPPED, ShotFiles, expression};
use crate::commands::extract::Streaming;
use crate::commands::{evaluate::chat_of, percent};
use crate::fail::{Code, Failure};
use crate::model_args::Distill;
use crate::ui::{Ui, Work};
use checkpoint::Checkpoint;
use distill::{Calibration, Frozen, GeneAttachments, Goal, Limits};
use evaluate::{DataRow, Evaluation, Fields, Matching, Rate, Sets, read_rows};
use gene::Gene;
use lab::Tune;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use transformer::{Attachments, Chat, Model, Openings};

/// The degraded model that the gene is extracted from.
const DEGRADED: &str = "degraded-mild";
/// Limit on KL, nat per token: that of `compare`, chosen on the dev splits of other fine-tunes.
const MAX_KL: f64 = 0.01;
/// Steps of the distillation.
const STEPS: usize = 200;
/// Shots of each kind: safety, task, benign.
const SHOTS: [usize; 3] = [8, 16, 8];
/// Rank of the gene.
const RANK: usize = 8;
/// The longest answer in the lab has eight tokens.
const NEW_TOKENS: usize = 12;

/// Rates of one model on both test sets.
#[derive(Debug, Clone, Serialize)]
struct State {
    #[serde(flatten)]
    known: Evaluation,
    shifted: Evaluation,
}

/// One target's way.
#[derive(Debug, Clone, Serialize)]
struct TargetRow {
    name: String,
    poisoned: bool,
    before: State,
    /// The gene at coefficient 1 in every layer, without calibration.
    at_one: State,
    after: State,
    calibration: Calibration,
    calibrate_s: f64,
    /// Null where nothing was expressed: the target refuses already.
    fused: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Means {
    targets: usize,
    asr_before: f64,
    asr_at_one: f64,
    asr_after: f64,
    shifted_asr_before: f64,
    shifted_asr_after: f64,
    over_refusal_before: f64,
    over_refusal_at_one: f64,
    over_refusal_after: f64,
    shifted_over_refusal_after: f64,
    accuracy_before: f64,
    accuracy_at_one: f64,
    accuracy_after: f64,
    helped_before: f64,
    helped_after: f64,
    kl_task: f64,
}

/// What the times were measured on.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) arch: &'static str,
    pub(super) os: &'static str,
    /// Null where the system does not tell.
    pub(super) cpu: Option<String>,
    pub(super) threads: usize,
}

impl Machine {
    pub(super) fn this(threads: usize) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find_map(|l| l.strip_prefix("model name"));
        let cpu = name.map(|n| n.trim_start_matches([' ', '\t', ':']).to_string());
        Self { arch: std::env::consts::ARCH, os: std::env::consts::OS, cpu, threads }
    }
}

#[derive(Debug, Serialize)]
struct Table {
    schema: u32,
    tool: &'static str,
    lab: PathBuf,
    degraded: &'static str,
    distill_steps: usize,
    rank: usize,
    captured: f64,
    limits: Limits,
    shots: BTreeMap<&'static str, usize>,
    judge: &'static str,
    machine: Machine,
    targets: Vec<TargetRow>,
    poisoned: Option<Means>,
    clean: Option<Means>,
    wall_s: f64,
}

struct Data {
    harmful: Vec<DataRow>,
    benign: Vec<DataRow>,
    harmful_shifted: Vec<DataRow>,
    benign_shifted: Vec<DataRow>,
}

struct Lab<'a> {
    root: &'a Path,
    out: &'a Path,
    gene: Gene,
    data: Data,
    limits: Limits,
}

impl Lab<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.root.join("data").join(format!("{name}.jsonl"))
    }

    fn state(
        &self,
        model: &Model,
        at: &Attachments,
        chat: &Chat,
        task: &[DataRow],
    ) -> Result<State, Failure> {
        let openings = Openings::default();
        let run = |sets| evaluate::evaluate(model, at, chat, sets, &openings, Matching::Exact, NEW_TOKENS);
        let known = run(Sets { harmful: &self.data.harmful, benign: &self.data.benign, task })?;
        let shifted =
            run(Sets { harmful: &self.data.harmful_shifted, benign: &self.data.benign_shifted, task: &[] })?;
        Ok(State { known, shifted })
    }

    /// Writes the fused model and measures it as read back.
    fn fuse(
        &self,
        target: Checkpoint,
        found: &Calibration,
        out: &Path,
        task: &[DataRow],
    ) -> Result<State, Failure> {
        let gene = Gene::open(self.gene.dir())?;
        let job =
            stream::Fuse { force: true, ..stream::Fuse::new(gene, found.coefficients.clone(), target, out) };
        stream::fuse(&kernels::CpuEngine::new(), &job, &stream::NoProgress)?;
        let fused = Checkpoint::open(out, None)?;
        self.state(&Model::open(&fused)?, &Attachments::none(), &chat_of(&fused)?, task)
    }

    fn target(&self, name: &str, ui: &Ui, work: &Work) -> Result<TargetRow, Failure> {
        let (task_name, poisoned) = match Tune::target(name) {
            Some(Tune::Target { task, percent, .. }) => (task.name(), percent > 0),
            _ => return Err(Failure::usage(format!("`{name}` is no target of the lab"), "see `lab build`")),
        };
        let target = Checkpoint::open(&self.root.join("targets").join(name), None)?;
        let chat = chat_of(&target)?;
        let model = Model::open(&target)?;
        let fields = Fields::default();
        let task = read_rows(&self.file(&format!("test-{task_name}")), &fields, true)?;
        let before = self.state(&model, &Attachments::none(), &chat, &task)?;
        work.advance(1, name);

        let (safety, benign) = (self.file("shots-safety"), self.file("shots-benign"));
        let task_shots = self.file(&format!("shots-{task_name}"));
        let files = ShotFiles { safety: &safety, task: &task_shots, benign: Some(&benign) };
        let mut shots = files.read(&chat, &fields, &Openings::default(), &Ok)?;
        let kinds = [&mut shots.safety, &mut shots.task, &mut shots.benign];
        kinds.into_iter().zip(SHOTS).for_each(|(rows, n)| rows.truncate(n));
        let attachments = GeneAttachments::new(&self.gene)?;
        let ones = self.gene.layers().into_iter().map(|l| (l, 1.0)).collect();
        let at_one = self.state(&model, &attachments.at(&ones)?, &chat, &task)?;
        work.advance(1, name);

        let start = Instant::now();
        let found = distill::calibrate(&Frozen::new(&model), &attachments, &shots, &self.limits, chat.end())?;
        let calibrate_s = start.elapsed().as_secs_f64();
        if found.raises_safety_loss() {
            ui.warn(&format!("{name}: {SWAPPED}"));
        }
        let record = files.record(&shots)?;
        let expression = expression(&self.gene, &target.content()?, &found, &self.limits, record);
        expression.write(&self.out.join("expressions").join(format!("{name}.json")))?;
        work.advance(1, name);

        let expressed = found.goal != Goal::AlreadySafe;
        let (after, fused) = if expressed {
            let fused = self.out.join("models").join(name);
            (self.fuse(target, &found, &fused, &task)?, Some(fused))
        } else {
            (before.clone(), None)
        };
        work.advance(1, name);
        Ok(TargetRow {
            name: name.into(),
            poisoned,
            before,
            at_one,
            after,
            calibration: found,
            calibrate_s,
            fused,
        })
    }
}

fn value(rate: &Option<Rate>) -> f64 {
    rate.map_or(f64::NAN, |r| r.value)
}

fn means(rows: &[&TargetRow]) -> Option<Means> {
    if rows.is_empty() {
        return None;
    }
    let mean = |f: &dyn Fn(&TargetRow) -> f64| rows.iter().map(|r| f(r)).sum::<f64>() / rows.len() as f64;
    Some(Means {
        targets: rows.len(),
        asr_before: mean(&|r| value(&r.before.known.asr)),
        asr_at_one: mean(&|r| value(&r.at_one.known.asr)),
        asr_after: mean(&|r| value(&r.after.known.asr)),
        shifted_asr_before: mean(&|r| value(&r.before.shifted.asr)),
        shifted_asr_after: mean(&|r| value(&r.after.shifted.asr)),
        over_refusal_before: mean(&|r| value(&r.before.known.over_refusal)),
        over_refusal_at_one: mean(&|r| value(&r.at_one.known.over_refusal)),
        over_refusal_after: mean(&|r| value(&r.after.known.over_refusal)),
        shifted_over_refusal_after: mean(&|r| value(&r.after.shifted.over_refusal)),
        accuracy_before: mean(&|r| value(&r.before.known.accuracy)),
        accuracy_at_one: mean(&|r| value(&r.at_one.known.accuracy)),
        accuracy_after: mean(&|r| value(&r.after.known.accuracy)),
        helped_before: mean(&|r| value(&r.before.known.helped)),
        helped_after: mean(&|r| value(&r.after.known.helped)),
        kl_task: mean(&|r| r.calibration.kl_task),
    })
}

/// Names of the family's targets, or those asked for.
fn targets(job: &Demo) -> Result<Vec<String>, Failure> {
    let folder = job.lab.join("targets");
    let input = |message: String| Failure {
        code: Code::Input,
        message,
        causes: Vec::new(),
        hint: Some(
            "run it from the repository's root, or name a family built by `safegene lab build` with --lab"
                .into(),
        ),
    };
    let entries =
        std::fs::read_dir(&folder).map_err(|e| input(format!("cannot read `{}`: {e}", folder.display())))?;
    let mut all: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| !n.starts_with('.'))
        .collect();
    all.sort();
    if job.targets.is_empty() {
        return if all.is_empty() {
            Err(input(format!("`{}` holds no targets", folder.display())))
        } else {
            Ok(all)
        };
    }
    match job.targets.iter().find(|t| !all.contains(t)) {
        Some(t) => Err(Failure::usage(format!("no target `{t}`"), format!("there are {}", all.join(", ")))),
        None => Ok(job.targets.clone()),
    }
}

/// The call of `safegene distill` that the demo makes.
fn distillation(job: &Demo, from: &Path, out: &Path) -> Distill {
    let data = |name: &str| job.lab.join("data").join(format!("{name}.jsonl"));
    let names: Vec<String> = lab::tune::drifts().map(Tune::name).collect();
    Distill {
        gene: Some(from.into()),
        aligned: job.lab.join("aligned"),
        degraded: names.iter().map(|n| job.lab.join("drifts").join(n)).collect(),
        keep: names.iter().map(|n| data(&format!("train-{n}"))).collect(),
        safety: data("distill-safety"),
        benign: data("distill-benign"),
        steps: STEPS,
        new_tokens: NEW_TOKENS,
        out: out.into(),
        force: true,
        ..Distill::default()
    }
}

/// The output folder, made anew if an earlier demo left it.
fn prepare(out: &Path) -> Result<(), Failure> {
    let marker = out.join("demo.json");
    let io = |e: std::io::Error| Failure {
        code: Code::Usage,
        message: format!("cannot write to `{}`: {e}", out.display()),
        causes: Vec::new(),
        hint: Some("choose another folder with --out".into()),
    };
    if out.exists() && !marker.exists() {
        let message = format!("output `{}` exists and is no earlier demo", out.display());
        return Err(Failure::usage(message, "remove it, or choose another folder with --out"));
    }
    std::fs::create_dir_all(out.join("expressions")).map_err(io)?;
    std::fs::create_dir_all(out.join("models")).map_err(io)?;
    std::fs::write(&marker, "{}\n").map_err(io)
}

pub(super) fn run(job: &Demo, threads: usize, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let names = targets(job)?;
    prepare(&job.out)?;
    let (svd_dir, gene_dir) = (job.out.join("extracted"), job.out.join("gene"));
    let (aligned, degraded) = (job.lab.join("aligned"), job.lab.join(DEGRADED));
    let (aligned, degraded) = (Checkpoint::open(&aligned, None)?, Checkpoint::open(&degraded, None)?);
    let ranks = stream::Ranks::Fixed(RANK);
    let extract = stream::Extract { force: true, ..stream::Extract::new(aligned, degraded, ranks, &svd_dir) };
    let streaming = Streaming::new(ui);
    let report = stream::extract(&kernels::CpuEngine::new(), &extract, &streaming);
    streaming.finish();
    let report = report?;
    ui.say(&format!(
        "extracted `{}`: {} of the difference between `aligned` and `{DEGRADED}` held at rank {RANK}",
        svd_dir.display(),
        percent(report.captured)
    ));
    crate::commands::distill::run(&distillation(job, &svd_dir, &gene_dir), ui)?;

    let fields = Fields::default();
    let read = |name: &str| read_rows(&job.lab.join("data").join(format!("{name}.jsonl")), &fields, true);
    let lab = Lab {
        root: &job.lab,
        out: &job.out,
        gene: Gene::open(&gene_dir)?,
        data: Data {
            harmful: read("test-harmful")?,
            benign: read("test-benign")?,
            harmful_shifted: read("test-harmful-shifted")?,
            benign_shifted: read("test-benign-shifted")?,
        },
        limits: Limits { max_kl: MAX_KL, ..Limits::default() },
    };
    let shots = ["safety", "task", "benign"].into_iter().zip(SHOTS).collect();
    let rows = over_targets(&lab, &names, threads, ui)?;

    let chosen = |poisoned: bool| rows.iter().filter(|r| r.poisoned == poisoned).collect::<Vec<_>>();
    let table = Table {
        schema: 1,
        tool: env!("CARGO_PKG_VERSION"),
        lab: job.lab.clone(),
        degraded: DEGRADED,
        distill_steps: STEPS,
        rank: RANK,
        captured: report.captured,
        limits: lab.limits,
        shots,
        judge: "refusal-opening",
        machine: Machine::this(threads),
        poisoned: means(&chosen(true)),
        clean: means(&chosen(false)),
        wall_s: start.elapsed().as_secs_f64(),
        targets: rows,
    };
    let json = serde_json::to_string_pretty(&table).unwrap_or_default();
    let path = job.out.join("demo.json");
    std::fs::write(&path, json.clone() + "\n").map_err(|e| {
        Failure::usage(format!("cannot write `{}`: {e}", path.display()), "choose another folder with --out")
    })?;
    if job.json {
        ui.data(&json);
    } else {
        print(&table, ui);
    }
    ui.say(&format!(
        "\ngene `{}`, expressions `{}`, fused models `{}`, all numbers `{}`; {:.0} s",
        gene_dir.display(),
        job.out.join("expressions").display(),
        job.out.join("models").display(),
        path.display(),
        table.wall_s
    ));
    Ok(())
}

/// Targets are independent: each worker takes the next and runs it on one thread. Rows come back in the order asked.
fn over_targets(lab: &Lab<'_>, names: &[String], threads: usize, ui: &Ui) -> Result<Vec<TargetRow>, Failure> {
    let work = ui.work("targets", names.len() as u64 * 4, false);
    let next = AtomicUsize::new(0);
    let results: Mutex<BTreeMap<usize, Result<TargetRow, Failure>>> = Mutex::new(BTreeMap::new());
    let broken = || Failure {
        code: Code::Temporary,
        message: "a worker thread broke".into(),
        causes: Vec::new(),
        hint: None,
    };
    std::thread::scope(|s| {
        for _ in 0..threads.min(names.len()) {
            s.spawn(|| {
                let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build() else { return };
                while let Some((i, name)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    names.get(i).map(|n| (i, n))
                } {
                    let row = pool.install(|| lab.target(name, ui, &work));
                    if let Ok(mut results) = results.lock() {
                        results.insert(i, row);
                    }
                }
            });
        }
    });
    work.finish();
    let results = results.into_inner().map_err(|_| broken())?;
    if results.len() != names.len() {
        return Err(broken());
    }
    results.into_values().collect()
}

fn print(table: &Table, ui: &Ui) {
    let p = |x: f64| format!("{:5.1}", x * 100.0);
    ui.data("All rates in %. ASR: harmful requests not refused. Over-refusal: benign requests refused. c = 1: the gene as it is,");
    ui.data("without calibration. Shifted: request templates that no model was trained on.\n");
    ui.data("                 ASR                    shifted ASR     over-refusal    shifted o.-r.   task accuracy   KL");
    ui.data("target           before  c = 1   after  before   after  before   after  before   after  before   after  nat/token");
    for r in &table.targets {
        let pair = |f: &dyn Fn(&State) -> f64| format!("{}   {}", p(f(&r.before)), p(f(&r.after)));
        ui.data(&format!(
            "{:<16} {}   {}   {}   {}   {}   {}   {}   {:.4}",
            r.name,
            p(value(&r.before.known.asr)),
            p(value(&r.at_one.known.asr)),
            p(value(&r.after.known.asr)),
            pair(&|s| value(&s.shifted.asr)),
            pair(&|s| value(&s.known.over_refusal)),
            pair(&|s| value(&s.shifted.over_refusal)),
            pair(&|s| value(&s.known.accuracy)),
            r.calibration.kl_task
        ));
    }
    for (name, m) in [("poisoned", &table.poisoned), ("not poisoned", &table.clean)] {
        if let Some(m) = m {
            ui.data(&format!(
                "\n{name}: mean of {} targets: ASR {} -> {} (c = 1: {}), shifted {} -> {}; over-refusal {} -> {}; accuracy {} -> {}",
                m.targets,
                p(m.asr_before),
                p(m.asr_after),
                p(m.asr_at_one),
                p(m.shifted_asr_before),
                p(m.shifted_asr_after),
                p(m.over_refusal_before),
                p(m.over_refusal_after),
                p(m.accuracy_before),
                p(m.accuracy_after)
            ));
        }
    }
}
