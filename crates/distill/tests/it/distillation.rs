//! A small random teacher, drifts that are the teacher and something more, factors that learn to take it back.

use crate::calibrate::{model, noise};
use distill::Frozen;
use distill::distillation::{
    CommonRows, DistillError, Distilled, Drift, ModuleFactors, Parts, Settings, State, Unwatched, Watch,
    distill, fresh_factors,
};
use transformer::{AnswerBatch, Attachments, Batch, Model, ModuleKind, Row, Taps};

const REFUSAL: [u32; 2] = [3, 4];

/// The teacher with a common wear of rank 2 in every layer, and a small own part.
fn drift(model: &Model, own: u64) -> Attachments {
    let mut at = Attachments::none();
    for layer in 0..model.architecture().layers {
        for (i, (kind, inn)) in [(ModuleKind::O, 16), (ModuleKind::Down, 24)].into_iter().enumerate() {
            let seed = 50 + 10 * layer as u64 + i as u64;
            at.add_fixed(layer, kind, (&noise(32, seed), &noise(2 * inn, seed + 5)), 2, 6.0).unwrap();
            let seed = seed + 1000 * own;
            at.add_fixed(layer, kind, (&noise(16, seed), &noise(inn, seed + 5)), 1, 0.3).unwrap();
        }
    }
    at
}

fn rows(model: &Model, at: &Attachments, seed: u64, n: usize) -> Vec<Row> {
    let ids: Vec<u32> = noise(n * 6, seed).iter().map(|x| ((x + 0.3) / 0.6 * 39.0) as u32).collect();
    let prompts: Vec<Vec<u32>> = ids.chunks(6).map(<[u32]>::to_vec).collect();
    let answers = transformer::generate(model, at, &prompts, &[], 3).unwrap();
    prompts.into_iter().zip(answers).map(|(prompt, answer)| Row { prompt, answer }).collect()
}

struct World {
    model: Model,
    own: Vec<Attachments>,
    safety: Vec<Row>,
    benign: Vec<Row>,
    task: Vec<Vec<Row>>,
}

impl World {
    fn new() -> Self {
        let model = model();
        let own: Vec<Attachments> = (1..4).map(|i| drift(&model, i)).collect();
        let none = Attachments::none();
        let task = own.iter().enumerate().map(|(i, at)| rows(&model, at, 20 + i as u64, 24)).collect();
        let (safety, benign) = (rows(&model, &none, 1, 120), rows(&model, &own[0], 2, 24));
        Self { model, own, safety, benign, task }
    }

    fn drifts(&self, from: usize, to: usize) -> Vec<Drift<'_>> {
        let one = |(i, own): (usize, &Attachments)| Drift {
            name: format!("drift {i}"),
            frozen: Frozen { model: &self.model, own: own.clone() },
            task: self.task[i][from..to].to_vec(),
        };
        self.own.iter().enumerate().map(one).collect()
    }

    fn run(
        &self,
        settings: &Settings,
        state: Option<State>,
        watch: &mut dyn Watch,
    ) -> Result<Distilled, DistillError> {
        distill(
            &Frozen::new(&self.model),
            &self.drifts(0, 20),
            CommonRows { safety: &self.safety[..100], benign: &self.benign[..20] },
            (&self.drifts(20, 24), CommonRows { safety: &self.safety[100..], benign: &self.benign[20..] }),
            fresh_factors(&self.model, 4, 7),
            settings,
            (&REFUSAL, 0),
            state,
            watch,
        )
    }
}

fn settings() -> Settings {
    Settings { steps: 150, rows: 12, rate: 4e-3, keep: 0.05, margin: -50.0, ..Settings::default() }
}

#[test]
fn loss_on_held_out_rows_falls_by_half() {
    let world = World::new();
    let done = world.run(&settings(), None, &mut Unwatched).unwrap();
    let (start, end) = (done.start.loss(&settings()), done.end.loss(&settings()));
    assert!(start > 0.1, "nothing to learn: {start}");
    assert!(end <= 0.5 * start, "{start} to {end}");
    // Fresh factors add nothing, so nothing has moved at the start.
    assert_eq!(done.start.keep, 0.0);
}

#[test]
fn margin_raises_refusal_log_odds() {
    let world = World::new();
    // What the teacher answers is no refusal here, so its divergence alone does not raise them.
    let run = |margin_weight| {
        let with = Settings { margin: 6.0, keep: 0.0, margin_weight, ..settings() };
        world.run(&with, None, &mut Unwatched).unwrap()
    };
    let (off, on) = (run(0.0), run(1.0));
    assert!(on.end.margin < on.start.margin - 1.0, "{:?} to {:?}", on.start, on.end);
    assert!(on.end.margin < off.end.margin - 1.0, "{:?} without, {:?} with it", off.end, on.end);
}

#[test]
fn weight_of_what_is_kept_keeps_more() {
    let world = World::new();
    let run = |keep| world.run(&Settings { keep, ..settings() }, None, &mut Unwatched).unwrap().end;
    let (free, bound) = (run(0.0), run(10.0));
    assert!(bound.keep < free.keep, "{free:?} {bound:?}");
    assert!(bound.safety > free.safety, "{free:?} {bound:?}");
}

/// Which models took a turn.
#[derive(Default)]
struct Turns(Vec<String>);

impl Watch for Turns {
    fn step(&mut self, _: usize, _: usize, name: &str, _: &Parts) {
        self.0.push(name.into());
    }
    fn state(&mut self, _: usize, _: &dyn Fn() -> Result<State, DistillError>) -> Result<bool, DistillError> {
        Ok(false)
    }
}

#[test]
fn aligned_model_takes_its_turn_and_stays_as_it_is() {
    let world = World::new();
    let moved = |aligned_turns| {
        let mut turns = Turns::default();
        let done = world.run(&Settings { aligned_turns, ..settings() }, None, &mut turns).unwrap();
        let names: Vec<&str> = turns.0[..6].iter().map(String::as_str).collect();
        let third = if aligned_turns == 0 { "drift 0" } else { "aligned" };
        assert_eq!(names[..4], ["drift 0", "drift 1", "drift 2", third]);
        let batch = AnswerBatch::new(&world.benign, 0);
        let itself = batch.reference(&world.model, &Attachments::none()).unwrap();
        let gene = ModuleFactors::attachments(&done.factors).unwrap();
        let kl = batch.kl(&world.model, &gene, &itself).unwrap().to_vec1::<f32>().unwrap()[0];
        (kl, done.end.loss(&settings()) / done.start.loss(&settings()))
    };
    let ((without, _), (with, rest)) = (moved(0), moved(1));
    assert!(with < 0.8 * without, "KL of the aligned model: {with} with its turn, {without} without");
    assert!(rest < 0.7, "the drifts still learn: {rest} of the loss is left");
}

#[test]
fn hidden_states_come_nearer_if_asked() {
    let world = World::new();
    let probe = Settings { hidden: 1e-9, steps: 30, ..settings() };
    let asked = Settings { hidden: 1.0, ..probe };
    let [probe, asked] = [probe, asked].map(|s| world.run(&s, None, &mut Unwatched).unwrap());
    assert_eq!(probe.start.hidden, asked.start.hidden);
    assert!(asked.end.hidden < probe.end.hidden, "{:?} {:?}", probe.end, asked.end);
    assert!(asked.end.hidden < asked.start.hidden, "{:?} {:?}", asked.start, asked.end);
}

/// Every part of the loss at the start, where the student is the drift itself, by the formulas in f64.
#[test]
fn parts_of_the_loss_are_their_formulas() {
    let world = World::new();
    let (tau, margin) = (2.0, 6.0);
    let s = Settings { tau, margin, hidden: 1.0, steps: 1, ..settings() };
    let start = world.run(&s, None, &mut Unwatched).unwrap().start;
    let softmax = |logits: &[f32], tau: f64| -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / tau).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|x| x / sum).collect()
    };
    // Logits and block outputs of one row by itself: no padding.
    let look = |at: &Attachments, row: &Row| -> (Vec<Vec<f32>>, Vec<Vec<Vec<f32>>>) {
        let ids: Vec<u32> = row.prompt.iter().chain(&row.answer).copied().collect();
        let batch = Batch::pad_behind(&[ids], 0);
        let mut taps = Taps::default();
        let states = world.model.hidden(&batch, at, None, Some(&mut taps)).unwrap();
        let outputs = taps.inputs.iter().zip(&taps.outputs).map(|(i, o)| (i + o).unwrap().to_vec2().unwrap());
        (world.model.all_logits(&states).unwrap().to_vec2().unwrap(), outputs.collect())
    };
    let (mut safety, mut lack, mut hidden, mut positions) = (0.0, 0.0, 0.0, 0.0);
    let rows = &world.safety[100..];
    for own in &world.own {
        for row in rows {
            let ((teacher, h), (student, g)) = (look(&Attachments::none(), row), look(own, row));
            let first = row.prompt.len() - 1;
            for t in first..first + row.answer.len() {
                let (p, q) = (softmax(&teacher[t], tau), softmax(&student[t], tau));
                let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
                safety += tau * tau * kl / row.answer.len() as f64;
                positions += 1.0;
                for (h, g) in h.iter().zip(&g) {
                    let apart = h[t].iter().zip(&g[t]).map(|(h, g)| f64::from(g - h).powi(2)).sum::<f64>();
                    hidden += apart / h[t].iter().map(|h| f64::from(*h).powi(2)).sum::<f64>();
                }
            }
            let q = softmax(&student[first], 1.0);
            let refuses: f64 = REFUSAL.iter().map(|&r| q[r as usize]).sum();
            lack += (margin - (refuses / (1.0 - refuses)).ln()).max(0.0);
        }
    }
    let n = (world.own.len() * rows.len()) as f64;
    let near = |what: &str, found: f64, want: f64| {
        assert!(want > 0.01 && (found - want).abs() < 1e-4 * want, "{what}: {found}, by hand {want}");
    };
    near("safety", start.safety, safety / n);
    near("margin", start.margin, lack / n);
    near("hidden", start.hidden, hidden / positions);
    assert_eq!(start.keep, 0.0);
}

#[test]
fn decay_makes_factors_smaller() {
    let world = World::new();
    let norm = |f: &[ModuleFactors]| -> f64 {
        f.iter().flat_map(|f| f.a.iter().chain(&f.b)).map(|x| f64::from(x * x)).sum()
    };
    let run = |decay| world.run(&Settings { decay, ..settings() }, None, &mut Unwatched).unwrap().factors;
    let (free, decayed) = (run(0.0), run(0.05));
    assert!(norm(&decayed) < norm(&free), "{} {}", norm(&decayed), norm(&free));
}

/// Takes the state after some step, and ends the run there if asked.
struct Cut {
    at: usize,
    end: bool,
    state: Option<State>,
}

impl Watch for Cut {
    fn step(&mut self, _: usize, _: usize, _: &str, _: &Parts) {}
    fn state(
        &mut self,
        step: usize,
        state: &dyn Fn() -> Result<State, DistillError>,
    ) -> Result<bool, DistillError> {
        if step == self.at {
            self.state = Some(state()?);
        }
        Ok(self.end && step == self.at)
    }
}

#[test]
fn run_that_was_cut_off_ends_at_the_same_factors() {
    let world = World::new();
    let s = Settings { steps: 12, ..settings() };
    let whole = world.run(&s, None, &mut Unwatched).unwrap();
    let mut cut = Cut { at: 5, end: true, state: None };
    let error = world.run(&s, None, &mut cut).unwrap_err();
    assert!(matches!(error, DistillError::Stopped(5)), "{error}");
    let state = cut.state.unwrap();
    assert_eq!(state.step, 5);
    let rest = world.run(&s, Some(state.clone()), &mut Unwatched).unwrap();
    assert_eq!(rest.factors, whole.factors);
    assert_eq!((rest.start, rest.end), (whole.start, whole.end));
    // A state of other factors is refused.
    let mut other = state;
    other.moments.values.pop();
    assert!(matches!(world.run(&s, Some(other), &mut Unwatched), Err(DistillError::OtherState { .. })));
}

#[test]
fn thread_count_does_not_change_the_factors() {
    let world = World::new();
    let s = Settings { steps: 4, ..settings() };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| world.run(&s, None, &mut Unwatched)).unwrap().factors
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let world = World::new();
    let bad = |s: Settings| world.run(&s, None, &mut Unwatched).unwrap_err();
    for s in [
        Settings { rate: 0.0, ..settings() },
        Settings { tau: f64::NAN, ..settings() },
        Settings { keep: -1.0, ..settings() },
        Settings { margin: f64::INFINITY, ..settings() },
        Settings { own_share: 1.5, ..settings() },
        Settings { other_share: f64::NAN, ..settings() },
        Settings { own_share: 0.6, other_share: 0.5, ..settings() },
        Settings { steps: 0, ..settings() },
        Settings { aligned_turns: usize::MAX, ..settings() },
    ] {
        assert!(matches!(bad(s), DistillError::Setting { .. }), "{s:?}");
    }
    let diverges = bad(Settings { rate: 1e30, steps: 30, ..settings() });
    assert!(matches!(diverges, DistillError::NotFinite { .. }), "{diverges}");
    let teacher = Frozen::new(&world.model);
    let common = CommonRows { safety: &world.safety, benign: &world.benign };
    let call = |drifts: &[Drift<'_>], common: CommonRows<'_>, refusal: &[u32]| {
        let factors = fresh_factors(&world.model, 2, 1);
        let held = (drifts, common);
        distill(&teacher, drifts, common, held, factors, &settings(), (refusal, 0), None, &mut Unwatched)
            .unwrap_err()
    };
    let drifts = world.drifts(0, 4);
    assert!(matches!(call(&[], common, &REFUSAL), DistillError::NoDrift));
    let none = CommonRows { safety: &[], ..common };
    assert!(matches!(call(&drifts, none, &REFUSAL), DistillError::NoRows { what: "safety", .. }));
    assert!(matches!(call(&world.drifts(0, 0), common, &REFUSAL), DistillError::NoRows { what: "task", .. }));
    assert!(matches!(call(&drifts, common, &[]), DistillError::NoRefusalToken));
    assert!(matches!(call(&drifts, common, &[4_000_000]), DistillError::NoRefusalToken));
}
