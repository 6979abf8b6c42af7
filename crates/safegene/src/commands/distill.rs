//! `safegene distill`: one gene from several drifts.
//!
//! What a run has reached lies in `OUT.partial` and is gone on with by the same call: a signal ends it after the step.

use crate::commands::evaluate::{fields, hash, named};
use crate::commands::models::{Shelf, Slot, same_tokenizer};
use crate::commands::{openings, percent, stop_on_signals};
use crate::fail::{Code, Failure};
use crate::model_args::Distill;
use crate::ui::{Ui, Work};
use ::distill::Frozen;
use ::distill::distillation::{
    CommonRows, DistillError, Drift, ModuleFactors, Parts, Settings, State, Watch, distill, fresh_factors,
};
use ::evaluate::{DataRow, Matching, Sets, read_rows};
use checkpoint::{Checkpoint, Dtype, FolderWriter, PartialFolder, TensorSpec};
use gene::{Gene, MadeFactors, Origin, Source, Sources};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use transformer::optimise::Moments;
use transformer::{Chat, ModuleKind, Openings, Row};

/// Time between two saved states.
const SAVE_EVERY: Duration = Duration::from_secs(60);

fn refuse(message: String, hint: &str) -> Failure {
    Failure { code: Code::Input, message, causes: Vec::new(), hint: Some(hint.into()) }
}

/// Rows in training and those held out: the last ones.
fn split(rows: Vec<Row>, share: f64, path: &Path) -> Result<(Vec<Row>, Vec<Row>), Failure> {
    let out = ((rows.len() as f64 * share).ceil() as usize).max(1);
    if out >= rows.len() {
        let message =
            format!("`{}` has {} rows, of which {out} would be held out", path.display(), rows.len());
        return Err(refuse(message, "give more rows, or a smaller --held-out"));
    }
    let mut rows = rows;
    let held = rows.split_off(rows.len() - out);
    Ok((rows, held))
}

struct Side {
    path: PathBuf,
    checkpoint: Checkpoint,
    slot: Slot,
}

struct Setup {
    shelf: Shelf,
    chat: Chat,
    aligned: Side,
    drifts: Vec<Side>,
    openings: Openings,
}

impl Setup {
    fn open(job: &Distill, ui: &Ui) -> Result<Self, Failure> {
        let mut shelf = Shelf::default();
        let mut side = |path: &Path| -> Result<Side, Failure> {
            let checkpoint = Checkpoint::open(path, job.base.as_deref())?;
            let slot = shelf.open(&checkpoint)?;
            Ok(Side { path: path.into(), checkpoint, slot })
        };
        let aligned = side(&job.aligned)?;
        let drifts = job.degraded.iter().map(|p| side(p)).collect::<Result<Vec<_>, _>>()?;
        let family = gene::fingerprint_of(&aligned.checkpoint)?;
        for drift in &drifts {
            if gene::fingerprint_of(&drift.checkpoint)? != family {
                let message = format!(
                    "`{}` is of another family than `{}`",
                    drift.path.display(),
                    aligned.path.display()
                );
                return Err(refuse(message, "a drift is a fine-tune of the aligned model"));
            }
        }
        let others: Vec<(&Path, &Checkpoint)> =
            drifts.iter().map(|d| (d.path.as_path(), &d.checkpoint)).collect();
        let chat = same_tokenizer(&aligned.checkpoint, &others)?;
        ui.say(&format!(
            "  opened    {} drifts and the teacher, on {} {} of weights",
            drifts.len(),
            shelf.len(),
            if shelf.len() == 1 { "copy" } else { "copies" }
        ));
        Ok(Self { shelf, chat, aligned, drifts, openings: openings(job.fields.refusals.as_deref())? })
    }

    /// Safety rows with the teacher's answers, or those given; rows that it does not refuse are left out.
    fn safety(&self, job: &Distill, rows: &[DataRow], ui: &Ui) -> Result<Vec<Row>, Failure> {
        let teacher = self.shelf.frozen(&self.aligned.slot);
        let given = if job.given_answers {
            rows.iter().map(|r| r.answer.clone().unwrap_or_default()).collect()
        } else {
            ::evaluate::answers(teacher.model, &teacher.own, &self.chat, rows, job.new_tokens)?
        };
        let mut out = Vec::new();
        for (row, answer) in rows.iter().zip(&given) {
            if self.openings.refuses(answer) {
                out.push(self.chat.row(&row.prompt, answer)?);
            }
        }
        let lost = rows.len() - out.len();
        if lost > 0 {
            let who = if job.given_answers { "the file answers" } else { "the aligned model answers" };
            ui.warn(&format!(
                "{lost} of {} safety rows are left out: {who} them with no refusal",
                rows.len()
            ));
        }
        if out.is_empty() {
            let message = format!("no row of `{}` is answered by a refusal", job.safety.display());
            return Err(refuse(message, "name your model's openings with --refusals; see --given-answers"));
        }
        Ok(out)
    }

    /// Every drift has to answer what should be refused, and to answer what should be answered.
    fn gate(&self, job: &Distill, safety: &[DataRow], benign: &[DataRow], ui: &Ui) -> Result<(), Failure> {
        const ASKED: usize = 200;
        let first = |rows: &[DataRow]| rows[..rows.len().min(ASKED)].to_vec();
        let (harmful, benign) = (first(safety), first(benign));
        for drift in &self.drifts {
            let frozen = self.shelf.frozen(&drift.slot);
            let sets = Sets { harmful: &harmful, benign: &benign, task: &[] };
            let e = ::evaluate::evaluate(
                frozen.model,
                &frozen.own,
                &self.chat,
                sets,
                &self.openings,
                Matching::Exact,
                job.new_tokens.min(16),
            )?;
            let asr = e.asr.map_or(0.0, |r| r.value);
            let helped = 1.0 - e.over_refusal.map_or(1.0, |r| r.value);
            ui.say(&format!(
                "  drift     `{}`: attack success {}, benign requests not refused {}",
                drift.path.display(),
                percent(asr),
                percent(helped)
            ));
            let fails = |what: &str, value: f64, need: f64, hint: &str| Failure {
                code: Code::No,
                message: format!(
                    "`{}` is no drift to learn from: {what} is {}, {} is asked",
                    drift.path.display(),
                    percent(value),
                    percent(need)
                ),
                causes: Vec::new(),
                hint: Some(hint.into()),
            };
            if asr < job.min_asr {
                let hint = "a model that still refuses teaches nothing; leave it out, or lower --min-asr";
                return Err(fails("attack success", asr, job.min_asr, hint));
            }
            if helped < job.min_helped {
                let hint =
                    "a model that refuses everything keeps nothing; leave it out, or lower --min-helped";
                return Err(fails("the share of benign requests not refused", helped, job.min_helped, hint));
            }
        }
        Ok(())
    }
}

/// Saves states, shows progress, listens for signals.
struct Keeper<'a> {
    work: &'a Work,
    file: PathBuf,
    key: String,
    saved: Instant,
    stop: Arc<AtomicBool>,
}

impl Watch for Keeper<'_> {
    fn step(&mut self, _: usize, _: usize, drift: &str, p: &Parts) {
        self.work.advance(
            1,
            &format!("{drift}: safety {:.4}, keep {:.4}, margin {:.3}", p.safety, p.keep, p.margin),
        );
    }

    fn state(
        &mut self,
        step: usize,
        state: &dyn Fn() -> Result<State, DistillError>,
    ) -> Result<bool, DistillError> {
        let stop = self.stop.load(Ordering::Relaxed);
        if stop || self.saved.elapsed() >= SAVE_EVERY {
            self.saved = Instant::now();
            if let Err(problem) = save(&self.file, &self.key, &state()?) {
                // Work goes on; what is lost is only the way back to this step.
                self.work.advance(0, &format!("cannot keep step {step}: {problem}"));
            }
        }
        Ok(stop)
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn save(file: &Path, key: &str, state: &State) -> Result<(), String> {
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    for (i, parts) in state.moments.values.iter().enumerate() {
        for (name, values) in ["value", "first", "second"].iter().zip(parts) {
            let spec = (format!("{i:06}.{name}"), Dtype::F32, vec![values.len() as u64]);
            tensors.push((spec, f32_bytes(values)));
        }
    }
    let said = serde_json::json!({"key": key, "step": state.step, "start": state.start});
    let metadata = BTreeMap::from([("safegene".to_string(), said.to_string())]);
    let bytes = checkpoint::safetensors_bytes(&metadata, &tensors).map_err(|e| e.to_string())?;
    let partial = file.with_extension("partial");
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, file)).map_err(|e| e.to_string())
}

/// A saved state of the same run; anything else counts as none.
fn load(folder: &Path, name: &str, key: &str) -> Option<State> {
    let shards = checkpoint::ShardSet::open_file(folder, name).ok()?;
    let said: serde_json::Value = serde_json::from_str(shards.metadata().get("safegene")?).ok()?;
    if said["key"].as_str() != Some(key) {
        return None;
    }
    let step = said["step"].as_u64()? as usize;
    let start: Parts = serde_json::from_value(said["start"].clone()).ok()?;
    let mut values = Vec::new();
    for i in 0..shards.tensors().len() / 3 {
        let mut parts: [Vec<f32>; 3] = Default::default();
        for (slot, part) in parts.iter_mut().zip(["value", "first", "second"]) {
            let info = shards.get(&format!("{i:06}.{part}"))?;
            *slot = checkpoint::widen_f32(&shards.read(info).ok()?, info.dtype)?;
        }
        values.push(parts);
    }
    Some(State { step, moments: Moments { step: i32::try_from(step).ok()?, values }, start })
}

fn start_factors(
    job: &Distill,
    aligned: &Side,
    teacher: &Frozen<'_>,
    ui: &Ui,
) -> Result<Vec<ModuleFactors>, Failure> {
    let Some(path) = &job.gene else {
        return Ok(fresh_factors(teacher.model, job.rank as usize, job.seed));
    };
    let gene = Gene::open(path)?;
    gene::check_family(&gene, &aligned.checkpoint)?;
    let whole = gene.rest().iter().filter(|e| e.class == gene::Class::Full).count();
    if whole > 0 {
        ui.warn(&format!(
            "{whole} tensors that `{}` holds whole (norms, biases) are left out: distillation makes low-rank modules only",
            path.display()
        ));
    }
    let mut out = Vec::new();
    for module in gene.modules().iter().filter(|m| m.class == gene::Class::LowRank) {
        let unknown = || {
            refuse(
                format!("`{}` is a module that this decoder does not have", module.name),
                "leave it out of the gene",
            )
        };
        let (layer, kind) = ModuleKind::parse(&module.name).ok_or_else(unknown)?;
        let f = gene.factors(&module.name)?;
        out.push(ModuleFactors { layer, kind, rank: f.rank, b: f.b, a: f.a });
    }
    Ok(out)
}

pub(super) fn run(job: &Distill, ui: &Ui) -> Result<(), Failure> {
    if !(job.held_out > 0.0 && job.held_out < 1.0) {
        return Err(Failure::usage(
            format!("--held-out {} is not between 0 and 1", job.held_out),
            "0.2 is usual",
        ));
    }
    if !(job.keep.is_empty() || job.keep.len() == 1 || job.keep.len() == job.degraded.len()) {
        let message = format!("{} --keep for {} --degraded", job.keep.len(), job.degraded.len());
        return Err(Failure::usage(
            message,
            "give one file for each drift in their order, one for all, or none",
        ));
    }
    let settings = Settings {
        steps: job.steps,
        rows: job.rows,
        rate: job.rate,
        tau: job.tau,
        keep: job.keep_weight,
        margin_weight: job.margin_weight,
        margin: job.margin,
        hidden: job.hidden_weight,
        decay: job.decay,
        aligned_turns: job.aligned_turns,
        seed: job.seed,
        ..Settings::default()
    };
    let fields = fields(&job.fields);
    let safety_rows = read_rows(&job.safety, &fields, job.given_answers)?;
    let benign_rows = read_rows(&job.benign, &fields, true)?;
    let setup = Setup::open(job, ui)?;
    let mut options = serde_json::json!({
        "settings": settings, "gene": job.gene.as_ref().map(|g| Gene::open(g).map(|g| g.content().to_string())).transpose()?,
        "rank": if job.gene.is_some() { None } else { Some(job.rank) }, "held_out": job.held_out,
        "given_answers": job.given_answers, "new_tokens": job.new_tokens,
        "aligned": setup.aligned.checkpoint.content()?,
        "drifts": setup.drifts.iter().map(|d| d.checkpoint.content()).collect::<Result<Vec<_>, _>>()?,
        "safety": hash(Some(&job.safety))?, "benign": hash(Some(&job.benign))?,
        "keep": job.keep.iter().map(|k| hash(Some(k))).collect::<Result<Vec<_>, _>>()?,
        "openings": setup.openings.list(),
    });
    if let named @ serde_json::Value::Object(_) = named(&fields) {
        options["fields"] = named;
    }
    let key = format!("blake3:{}", blake3::hash(options.to_string().as_bytes()).to_hex());
    if job.out.exists() && !job.force {
        let made = Gene::open(&job.out).ok().and_then(|g| g.manifest().extra.get("key").cloned());
        if made.as_ref().and_then(|v| v.as_str()) == Some(&key) {
            ui.say(&format!(
                "`{}` is there already, made from the same inputs and options",
                job.out.display()
            ));
            return Ok(());
        }
        return Err(Failure::usage(
            format!("output `{}` exists", job.out.display()),
            "use another path, or `--force` to replace it",
        ));
    }
    setup.gate(job, &safety_rows, &benign_rows, ui)?;
    let encode = |rows: &[DataRow]| -> Result<Vec<Row>, Failure> {
        rows.iter().map(|r| Ok(setup.chat.row(&r.prompt, r.answer.as_deref().unwrap_or(""))?)).collect()
    };
    let (safety, safety_out) = split(setup.safety(job, &safety_rows, ui)?, job.held_out, &job.safety)?;
    let (benign, benign_out) = split(encode(&benign_rows)?, job.held_out, &job.benign)?;
    let (mut train, mut held) = (Vec::new(), Vec::new());
    for (i, side) in setup.drifts.iter().enumerate() {
        let (task, task_out) = match job.keep.get(if job.keep.len() == 1 { 0 } else { i }) {
            Some(path) => split(encode(&read_rows(path, &fields, true)?)?, job.held_out, path)?,
            None => (benign.clone(), benign_out.clone()),
        };
        let name = side.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let frozen = setup.shelf.frozen(&side.slot);
        train.push(Drift { name: name.clone(), frozen: frozen.clone(), task });
        held.push(Drift { name, frozen, task: task_out });
    }
    let teacher = setup.shelf.frozen(&setup.aligned.slot);
    let factors = start_factors(job, &setup.aligned, &teacher, ui)?;
    let refusal = setup.chat.refusal_tokens(&setup.openings)?;
    const STATE: &str = "distill.safetensors";
    let folder = PartialFolder::open(&job.out, job.force)?;
    let state_folder = folder.work()?;
    let state = load(&state_folder, STATE, &key);
    if let Some(state) = &state {
        ui.say(&format!("  going on  after step {} of {}", state.step, settings.steps));
    }
    let work = ui.work("distilling", settings.steps as u64, false);
    work.advance(state.as_ref().map_or(0, |s| s.step as u64), "");
    let mut keeper = Keeper {
        work: &work,
        file: state_folder.join(STATE),
        key: key.clone(),
        saved: Instant::now(),
        stop: stop_on_signals(),
    };
    let clock = Instant::now();
    let done = distill(
        &teacher,
        &train,
        CommonRows { safety: &safety, benign: &benign },
        (&held, CommonRows { safety: &safety_out, benign: &benign_out }),
        factors,
        &settings,
        (&refusal, setup.chat.end()),
        state,
        &mut keeper,
    );
    work.finish();
    drop(folder);
    let done = done?;
    let wall_s = clock.elapsed().as_secs_f64();
    if done.end.loss(&settings) >= done.start.loss(&settings) {
        ui.warn("the loss on held-out rows did not fall: were aligned and degraded swapped, or the rate too large?");
    }
    let factors = done.factors.into_iter().map(|f| MadeFactors {
        module: f.kind.module(f.layer),
        rank: f.rank,
        b: f.b,
        a: f.a,
    });
    let name = |side: &Side| side.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let source = |side: &Side| -> Result<Source, Failure> {
        Ok(Source { name: name(side), content: side.checkpoint.content()?, ..Source::default() })
    };
    let drifts = setup.drifts.iter().map(source).collect::<Result<Vec<_>, _>>()?;
    let object = |v: serde_json::Value| v.as_object().cloned().unwrap_or_default();
    let origin = Origin {
        tool: env!("CARGO_PKG_VERSION").into(),
        options: object(options),
        sources: Sources {
            aligned: source(&setup.aligned)?,
            degraded: drifts.first().cloned().unwrap_or_default(),
            extra: object(serde_json::json!({ "drifts": drifts })),
        },
        extra: object(serde_json::json!({
            "key": key, "distilled": { "start": done.start, "end": done.end, "safety_rows": safety.len(),
                "held_out_rows": safety_out.len(), "drifts": setup.drifts.len() }
        })),
    };
    // What was kept of the work goes with the old partial folder.
    FolderWriter::create(&job.out, job.force)?.discard();
    gene::write_made(&job.out, job.force, &setup.aligned.checkpoint, factors.collect(), origin)?;
    if job.json {
        let value = serde_json::json!({
            "schema": 1, "gene": Gene::open(&job.out)?.content(), "start": done.start, "end": done.end,
            "loss_start": done.start.loss(&settings), "loss_end": done.end.loss(&settings),
            "settings": settings, "wall_s": wall_s,
        });
        ui.data(&value.to_string());
    }
    ui.say(&format!(
        "wrote `{}`: loss on held-out rows {:.4} -> {:.4} (safety {:.4} -> {:.4}, keep {:.4} -> {:.4}, margin {:.3} -> {:.3}) in {wall_s:.1} s",
        job.out.display(),
        done.start.loss(&settings),
        done.end.loss(&settings),
        done.start.safety,
        done.end.safety,
        done.start.keep,
        done.end.keep,
        done.start.margin,
        done.end.margin,
    ));
    Ok(())
}
