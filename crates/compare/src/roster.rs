//! How a method makes a target safe again, and what it was given.
//!
//! Weight-only rivals write folders, as they do for anybody, and are read back; what is trained or calibrated hangs on the
//! target as attachments. Seconds are those of the whole recovery: the look whether the target is safe already, scores of layers
//! and choosing among settings included, the curve that is only drawn left out.

use crate::error::CompareError;
use crate::ground::{Ground, Held, Roots};
use crate::plan::{Entry, Recipe, Way};
use crate::tuning::Meter;
use checkpoint::Checkpoint;
use distill::select::{Keep, Score};
use distill::{Aim, Freedom, Frozen, GeneAttachments, Limits, Shots};
use lab::measure::Rates;
use lab::train::{self, Lora};
use lab::{Kind, Tune, Tuned, Tuner};
use rand::seq::SliceRandom;
use recover::knob::choose;
use recover::{Inputs, Settings, few_shot};
use report::{Label, TradeOff};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use transformer::{Attachments, Model, Openings, Row, WeightSource};

/// A target that a method works on.
#[derive(Debug)]
pub struct Patient<'a> {
    /// How it came about.
    pub tune: Tune,
    /// Its folder.
    pub folder: PathBuf,
    /// Opened.
    pub held: Held<'a>,
    /// Whether the trade-off of safety and KL is drawn, where the plan has one.
    pub curve: bool,
}

/// What a method makes of a target.
#[derive(Debug)]
pub enum Made {
    /// Something added to it.
    Added(Attachments),
    /// A model of its own.
    Own(Box<Model>),
}

/// What came of it.
#[derive(Debug)]
pub struct Applied {
    /// The safer target.
    pub made: Made,
    /// Seconds; `None` where nothing was done.
    pub seconds: Option<f64>,
    /// What the method was given.
    pub given: String,
    /// Coefficients by layer.
    pub coefficients: Option<BTreeMap<u32, f64>>,
    /// Loss against the limit.
    pub tradeoff: Option<Vec<TradeOff>>,
}

/// Limits of the trade-off that is drawn.
const TRADE_OFF: [f64; 6] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05];

/// So many shots for a target, as tokens, with whole refusals. Draw `k` takes those after the first `k` times as many; a
/// comparison's is 0.
pub fn whole_shots_of(
    roots: &Roots,
    tune: Tune,
    n: report::Shots,
    draw: usize,
) -> Result<Shots, CompareError> {
    let task = tune.task().map(|t| format!("shots-{}", t.name())).unwrap_or_default();
    let rows = |split: &str, n: u32| roots.rows(split, draw * n as usize, n as usize);
    Ok(Shots {
        safety: rows("shots-safety", n.safety)?,
        task: rows(&task, n.task)?,
        benign: rows("shots-benign", n.benign)?,
    })
}

/// [`whole_shots_of`], safety shots cut to how their refusal opens.
pub fn shots_of(roots: &Roots, tune: Tune, n: report::Shots, draw: usize) -> Result<Shots, CompareError> {
    let mut shots = whole_shots_of(roots, tune, n, draw)?;
    roots.family.chat.cut_to_openings(&mut shots.safety, &Openings::default())?;
    Ok(shots)
}

/// How the few-shot LoRA of a comparison is trained.
pub fn few_shot_options(recipe: &Recipe, seed: u64) -> few_shot::Options {
    few_shot::Options {
        max_kl: recipe.max_kl,
        delta: recipe.delta_whole,
        seed,
        rank: recipe.rank,
        ..Default::default()
    }
}

/// What calibration may spend. Targets that are safe already have been left out before, for every method alike.
pub(crate) fn calibration_limits(recipe: &Recipe, freedom: Freedom) -> Limits {
    Limits {
        max_kl: recipe.max_kl,
        c_max: recipe.c_max,
        price: recipe.price,
        kl_price: recipe.kl_price,
        delta: recipe.delta,
        leave: 0.0,
        freedom,
        ..Limits::default()
    }
}

/// One way on one target.
pub fn apply(
    ground: &Ground<'_>,
    patient: &Patient<'_>,
    entry: &Entry,
    recipe: &Recipe,
    scratch: &Path,
) -> Result<Option<Applied>, CompareError> {
    let work = Work {
        ground,
        patient,
        target: patient.held.frozen(),
        n: entry.shots,
        shots: shots_of(ground.roots, patient.tune, entry.shots, 0)?,
        recipe,
        scratch,
        pad: ground.roots.family.chat.end(),
        clock: Instant::now(),
    };
    if !work.shots.safety.is_empty() {
        let meter = Meter::new(&work.target, &work.shots, work.pad)?;
        let loss = meter.of(work.target.model, &work.target.own)?.loss;
        if loss <= recipe.leave {
            let given = format!("left as it is: its safety loss is {loss:.4}");
            let mut applied = work.plain(Made::Added(Attachments::none()), given);
            applied.seconds = Some(work.clock.elapsed().as_secs_f64());
            return Ok(Some(applied));
        }
    }
    let mut applied = match (entry.method, entry.label) {
        (Way::FineTuned, _) => {
            let made = Made::Added(Attachments::none());
            return Ok(Some(Applied {
                made,
                seconds: None,
                given: String::new(),
                coefficients: None,
                tradeoff: None,
            }));
        }
        (Way::Gene, Label::Zero) => work.at_one(&ground.gene)?,
        (Way::SvdGene, Label::Zero) => work.at_one(&ground.svd)?,
        (Way::FreshGene, Label::Zero) => work.at_one(&ground.fresh)?,
        (Way::Gene, _) => {
            // The curve is drawn for the main targets only.
            let is_main =
                patient.curve && matches!(patient.tune, Tune::Target { percent: 1, kind: Kind::Lora, .. });
            let main = is_main && [entry.shots.safety, entry.shots.task, entry.shots.benign] == recipe.shots;
            work.calibrated(&ground.gene, Freedom::PerLayer, main, "")?
        }
        (Way::SvdGene, _) => work.calibrated(&ground.svd, Freedom::PerLayer, false, "")?,
        (Way::FreshGene, _) => work.calibrated(&ground.fresh, Freedom::PerLayer, false, "")?,
        (Way::GlobalScalar, _) => {
            work.calibrated(&ground.gene, Freedom::OneForAll, false, "one coefficient; ")?
        }
        (Way::LeastKl, _) => {
            let limits = Limits { aim: Aim::LeastKl, ..calibration_limits(recipe, Freedom::PerLayer) };
            work.calibrated_within(&ground.gene, &limits, false, "least KL; ")?
        }
        (Way::Selected, _) => {
            let keep = Keep::Top(ground.gene.layers().len().div_ceil(2));
            let (shots, refusal) = (&work.shots, &ground.roots.refusal);
            let scores = distill::select::scores(
                &work.target,
                &ground.gene,
                &shots.safety,
                &shots.benign,
                (refusal, work.pad),
            )?;
            let layers = distill::select::choose(&scores, Score::Price, keep)?;
            work.calibrated(
                &ground.gene.only(&layers),
                Freedom::PerLayer,
                false,
                &format!("layers {layers:?}; "),
            )?
        }
        (Way::RandomLayers, _) => {
            let mut layers = ground.gene.layers().to_vec();
            layers.shuffle(&mut lab::language::rng(
                ground.seed,
                &format!("random layers {}", patient.tune.name()),
            ));
            layers.truncate(layers.len().div_ceil(2));
            layers.sort_unstable();
            work.calibrated(
                &ground.gene.only(&layers),
                Freedom::PerLayer,
                false,
                &format!("layers {layers:?}; "),
            )?
        }
        (Way::FewShot, _) => work.few_shot()?,
        (Way::SafeDelta, _) => work.safe_delta()?,
        (Way::Lox, _) => work.retrained(
            "lox",
            &ground.roots.hardened.1,
            "trained again from W_a + 1.25 SVD_6(W_a − W_base)",
        )?,
        (Way::SaLora, _) => work.retrained(
            "salora",
            &ground.roots.model,
            "trained again, rank 16, 32 safety directions of 128 safety rows, 128 task rows",
        )?,
        (way, _) => match work.rival(way)? {
            Some(applied) => applied,
            None => return Ok(None),
        },
    };
    if applied.seconds.is_none() && !matches!(entry.method, Way::Lox | Way::SaLora) {
        applied.seconds = Some(work.clock.elapsed().as_secs_f64());
    }
    Ok(Some(applied))
}

struct Work<'a> {
    ground: &'a Ground<'a>,
    patient: &'a Patient<'a>,
    target: Frozen<'a>,
    n: report::Shots,
    shots: Shots,
    recipe: &'a Recipe,
    scratch: &'a Path,
    pad: u32,
    clock: Instant,
}

impl Work<'_> {
    fn plain(&self, made: Made, given: String) -> Applied {
        Applied { made, seconds: None, given, coefficients: None, tradeoff: None }
    }

    fn at_one(&self, gene: &GeneAttachments) -> Result<Applied, CompareError> {
        let ones = gene.layers().iter().map(|&l| (l, 1.0)).collect();
        Ok(self.plain(Made::Added(gene.at(&ones)?), "c = 1".into()))
    }

    fn calibrated(
        &self,
        gene: &GeneAttachments,
        freedom: Freedom,
        trade_off: bool,
        given: &str,
    ) -> Result<Applied, CompareError> {
        self.calibrated_within(gene, &calibration_limits(self.recipe, freedom), trade_off, given)
    }

    fn calibrated_within(
        &self,
        gene: &GeneAttachments,
        limits: &Limits,
        trade_off: bool,
        given: &str,
    ) -> Result<Applied, CompareError> {
        let r = self.recipe;
        let found = distill::calibrate(&self.target, gene, &self.shots, limits, self.pad)?;
        let seconds = self.clock.elapsed().as_secs_f64();
        let tradeoff = if trade_off {
            let points = distill::trade_off(&self.target, gene, &self.shots, limits, &TRADE_OFF, self.pad)?;
            let point = |p: distill::TradeOff| TradeOff {
                max_kl: p.max_kl,
                loss: p.loss,
                kl: p.kl_task.max(p.kl_benign.unwrap_or(0.0)),
            };
            Some(points.into_iter().map(point).collect())
        } else {
            None
        };
        let swapped = if found.raises_safety_loss() { "makes refusals less likely at c = 1; " } else { "" };
        let given = format!(
            "{given}{swapped}KL limit {}, delta {}, {} evaluations; loss {:.4} to {:.4}",
            r.max_kl, r.delta, found.gradients, found.loss_before, found.loss
        );
        Ok(Applied {
            made: Made::Added(gene.at(&found.coefficients)?),
            seconds: Some(seconds),
            given,
            coefficients: Some(found.coefficients),
            tradeoff,
        })
    }

    fn few_shot(&self) -> Result<Applied, CompareError> {
        use few_shot::{RATES, best_rate};
        // It learns whole refusals: taught openings only, it went further from the target on dev.
        let Shots { safety, task, benign } = whole_shots_of(self.ground.roots, self.patient.tune, self.n, 0)?;
        let shots = few_shot::Shots { safety, task, benign };
        let options = few_shot_options(self.recipe, self.ground.seed);
        let few_shot::Options { max_kl, delta, .. } = options;
        let (model, own) = (self.target.model, &self.target.own);
        let (found, _) = best_rate(model, own, &shots, &RATES, &options, self.pad, &mut |_| true)?;
        let given = format!(
            "rank {}, KL limit {max_kl}, delta {delta}, rates 3e-4 and 1e-3, took {:.0e} after {} steps; loss {:.4} to {:.4}",
            self.recipe.rank,
            found.report.rate,
            found.report.step,
            found.report.loss_before,
            found.report.reached.loss
        );
        Ok(self.plain(Made::Added(recover::lora::ModuleFactors::attachments(&found.factors)?), given))
    }

    fn retrained(&self, kind: &str, shared: &Model, given: &str) -> Result<Applied, CompareError> {
        let roots = self.ground.roots;
        let folder = roots.seed_folder(self.ground.seed).join(kind).join(self.patient.tune.name());
        let model = match Held::open(&folder, shared)? {
            Held::Own(model) => model,
            Held::Shared(_) => Box::new(Model::open(&Checkpoint::open(&folder, None)?)?),
        };
        Ok(self.plain(Made::Own(model), given.into()))
    }

    fn inputs(&self) -> Inputs {
        let (roots, seed) = (self.ground.roots, self.ground.seed);
        let at = |name: &str| Some(roots.seed_folder(seed).join(name));
        Inputs {
            target: self.patient.folder.clone(),
            aligned: Some(roots.folder.join("aligned")),
            base: Some(roots.folder.join("base")),
            degraded: at("degraded-mild"),
            safety_adapter: at("safety"),
            ..Inputs::default()
        }
    }

    /// The larger of the two divergences that the calibrated gene spends on the shots.
    fn spent_by_the_gene(&self) -> Result<f64, CompareError> {
        let limits = calibration_limits(self.recipe, Freedom::PerLayer);
        let found = distill::calibrate(&self.target, &self.ground.gene, &self.shots, &limits, self.pad)?;
        Ok(found.kl_task.max(found.kl_benign.unwrap_or(0.0)))
    }

    /// Tries settings of a weight-only method and takes one by [`choose`], within a limit on KL.
    fn tuned(
        &self,
        method: &str,
        grid: Vec<(String, Settings)>,
        max_kl: f64,
    ) -> Result<Applied, CompareError> {
        let meter = Meter::new(&self.target, &self.shots, self.pad)?;
        let (inputs, none) = (self.inputs(), Attachments::none());
        let (mut models, mut measured) = (Vec::new(), Vec::new());
        for (i, (_, settings)) in grid.iter().enumerate() {
            let out = self.scratch.join(format!("{method}-{i}"));
            recover_into(method, settings, &inputs, &out)?;
            let model = Model::open(&Checkpoint::open(&out, None)?)?;
            let _ = std::fs::remove_dir_all(&out);
            measured.push(meter.of(&model, &none)?);
            models.push(model);
        }
        let best = choose(&measured, max_kl, self.recipe.delta).unwrap_or(0);
        let m = measured[best];
        let given = format!(
            "{} of {} tried; loss {:.4}, KL {:.4} and {:.4} on the shots",
            grid[best].0,
            grid.len(),
            m.loss,
            m.kl_task,
            m.kl_benign.unwrap_or(0.0)
        );
        Ok(self.plain(Made::Own(Box::new(models.swap_remove(best))), given))
    }

    /// `None` where the method is not defined for the target: those of LoRA updates on a whole model.
    fn rival(&self, way: Way) -> Result<Option<Applied>, CompareError> {
        let d = Settings::default;
        let numbers =
            |name: &str, values: &[f64], set: &dyn Fn(f64) -> Settings| -> Vec<(String, Settings)> {
                values.iter().map(|&v| (format!("{name} = {v}"), set(v))).collect()
            };
        const MODULES: [usize; 8] = [5, 10, 15, 20, 25, 30, 36, 42];
        let of_modules = |variant: &str| -> Vec<(String, Settings)> {
            let all = self.ground.roots.family.architecture.modules().len()
                * self.ground.roots.family.architecture.layers;
            let set = |k: usize| Settings { modules: Some(k), variant: Some(variant.into()), ..d() };
            let mut ks: Vec<usize> = MODULES.iter().map(|&k| k.min(all)).collect();
            ks.dedup();
            ks.into_iter().map(|k| (format!("K = {k}"), set(k))).collect()
        };
        let (method, grid) = match way {
            Way::Resta | Way::RestaEqualKl => {
                let gammas = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
                ("resta", numbers("gamma", &gammas, &|v| Settings { gamma: Some(v), ..d() }))
            }
            Way::WiseFt => {
                let lambdas = [0.98, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0];
                ("wise-ft", numbers("lambda", &lambdas, &|v| Settings { lambda: Some(v), ..d() }))
            }
            Way::LowRankRestore => {
                let gammas = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5];
                let set = |v| Settings { gamma: Some(v), rank: Some(self.recipe.rank), ..d() };
                ("low-rank-restore", numbers("gamma", &gammas, &set))
            }
            Way::SafeLora => ("safelora", of_modules("published")),
            Way::SafeLoraOrthonormal => ("safelora", of_modules("orthonormal")),
            Way::SafeLoraDrop => ("safelora", of_modules("drop")),
            Way::SafeMerge => {
                let mut grid = Vec::new();
                for tau in [0.35, 0.5, 0.7, 0.9, 1.0] {
                    for weight in [0.2, 0.5, 0.8] {
                        let settings = Settings { tau: Some(tau), weight: Some(weight), ..d() };
                        grid.push((format!("tau = {tau}, w = {weight}"), settings));
                    }
                }
                ("safemerge", grid)
            }
            _ => return Ok(None),
        };
        if way == Way::RestaEqualKl {
            let max_kl = self.spent_by_the_gene()?;
            let applied = self.tuned(method, grid, max_kl)?;
            return Ok(Some(Applied {
                given: format!("KL limit {max_kl:.5}; {}", applied.given),
                ..applied
            }));
        }
        Ok(Some(self.tuned(method, grid, self.recipe.max_kl)?))
    }

    fn safe_delta(&self) -> Result<Applied, CompareError> {
        use recover::safe_delta::{Options, safe_delta};
        let roots = self.ground.roots;
        let rows = roots.rows("distill-safety", 0, 128)?;
        let none = Attachments::none();
        let grams = recover::gram::grams(
            &roots.model,
            &none,
            "safety",
            &rows,
            self.pad,
            recover::gram::Positions::All,
            &|_, _| true,
        )?;
        let target = Checkpoint::open(&self.patient.folder, None)?;
        let meter = Meter::new(&self.target, &self.shots, self.pad)?;
        let a = &roots.family.architecture;
        let (mut models, mut measured) = (Vec::new(), Vec::new());
        let shares = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9];
        for s in shares {
            let mut weights = roots.aligned.clone();
            for (name, slot) in &mut weights.0 {
                slot.1 = target.read(name)?.1;
            }
            for (layer, kind) in grams.modules() {
                let name = format!("{}.weight", kind.module(layer));
                let Some(gram) = grams.get(layer, kind) else { continue };
                let (Some(aligned), Some(slot)) = (roots.aligned.0.get(&name), weights.0.get_mut(&name))
                else {
                    continue;
                };
                let options = Options { s, ..Options::default() };
                let (w, _) = safe_delta(&name, &aligned.1, &slot.1, slot.0[0], gram, &options)?;
                slot.1 = w;
            }
            let model = Model::new(a.clone(), &weights)?;
            measured.push(meter.of(&model, &none)?);
            models.push(model);
        }
        let best = choose(&measured, self.recipe.max_kl, self.recipe.delta).unwrap_or(0);
        let given = format!(
            "128 safety rows; s = {} of {} tried; loss {:.4}, KL {:.4} and {:.4} on the shots",
            shares[best],
            shares.len(),
            measured[best].loss,
            measured[best].kl_task,
            measured[best].kl_benign.unwrap_or(0.0)
        );
        Ok(self.plain(Made::Own(Box::new(models.swap_remove(best))), given))
    }
}

/// Runs a weight-only method into a folder.
pub fn recover_into(
    method: &str,
    settings: &Settings,
    inputs: &Inputs,
    out: &Path,
) -> Result<(), CompareError> {
    let method = (recover::by_name(method)?.build)(settings)?;
    let (engine, stop) = (kernels::CpuEngine::new(), AtomicBool::new(false));
    let job = recover::Job {
        out,
        form: recover::Form::Merged,
        force: true,
        memory_bytes: 1 << 30,
        algebra: &engine,
        stop: &stop,
        progress: &stream::NoProgress,
    };
    recover::recover(method.as_ref(), inputs, &job)?;
    Ok(())
}

/// A target trained as SaLoRA does, on the rows and until the end of the plain one; merged, as its halves nearly cancel.
pub fn train_salora(roots: &Roots, tuner: &Tuner<'_>, tune: Tune) -> Result<(Tuned, Rates), CompareError> {
    let pad = roots.family.chat.end();
    let task = tune.task().map(|t| format!("train-{}", t.name())).unwrap_or_default();
    let (safety, task) = (roots.rows("distill-safety", 0, 128)?, roots.rows(&task, 0, 128)?);
    let starts =
        recover::salora::prepare(&roots.model, &safety, &task, pad, &recover::salora::Settings::default())?;
    let schedule = recover::lora::Schedule {
        steps: lab::tune::TUNE.steps,
        rows: lab::tune::TUNE.rows,
        rate: lab::tune::TUNE.rate,
    };
    let (mut rows, mut done) = (tuner.rows(tune), tuner.done(tune));
    let mut next = || -> Result<Row, CompareError> { Ok(rows()?) };
    let mut stop = |step: usize, loss: f32, at: &Attachments| -> Result<bool, CompareError> {
        Ok(done(step, loss, &roots.model, at)?)
    };
    let factors = recover::salora::train(&roots.model, &starts, schedule, pad, &mut next, &mut stop)?;
    let mut weights = roots.aligned.clone();
    for f in factors {
        let lora = Lora { rank: f.rank, alpha: f.rank as f64, modules: vec![(f.layer, f.kind, f.b, f.a)] };
        weights = train::merge(&weights, &lora);
    }
    let model = Model::new(roots.family.architecture.clone(), &weights)?;
    let rates = roots.family.measure(&model, &Attachments::none(), "dev", tune.task())?;
    tuner.progress.finished(&format!("salora {}", tune.name()), &rates);
    Ok((Tuned::Whole(weights), rates))
}
