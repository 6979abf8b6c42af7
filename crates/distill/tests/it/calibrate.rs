//! Three layers, three coefficients: few enough to try every combination on a grid.

use candle_core::{Device, Tensor};
use distill::{
    Aim, Calibration, CalibrationError, Freedom, Frozen, GeneAttachments, Goal, Limits, Shots, Solver,
    calibrate, check_safety_shots, layer_effects, trade_off,
};
use serde_json::json;
use std::collections::BTreeMap;
use transformer::{
    AnswerBatch, Architecture, Attachments, Model, ModelError, ModuleKind, Openings, Row, WeightSource,
};

struct Noise(Architecture);

/// xorshift: fixed values, no dependency.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
        })
        .collect()
}

impl WeightSource for Noise {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let shape = self.0.shape(name).unwrap();
        let n = shape.iter().product();
        let seed = name.bytes().fold(7, |s: u64, b| s.wrapping_mul(31) + u64::from(b));
        let lift = if shape.len() == 1 { 1.0 } else { 0.0 };
        Ok((shape, noise(n, seed).iter().map(|x| x + lift).collect()))
    }
}

pub(crate) fn model() -> Model {
    let a = Architecture::from_config(&json!({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "tie_word_embeddings": false
    }))
    .unwrap();
    Model::new(a.clone(), &Noise(a)).unwrap()
}

/// Rank 2 on the output projections of each layer; `sign` -1 is the gene of swapped inputs.
pub(crate) fn gene(sign: f32) -> GeneAttachments {
    let mut modules = Vec::new();
    for layer in 0..3 {
        for (i, (kind, inn)) in [(ModuleKind::O, 16), (ModuleKind::Down, 24)].into_iter().enumerate() {
            let seed = 1000 + 10 * layer as u64 + i as u64;
            let b: Vec<f32> = noise(32, seed).iter().map(|x| sign * x).collect();
            let b = Tensor::from_vec(b, (16, 2), &Device::Cpu).unwrap();
            let a = Tensor::from_vec(noise(2 * inn, seed + 5), (2, inn), &Device::Cpu).unwrap();
            modules.push((layer, kind, b, a));
        }
    }
    GeneAttachments::from_factors(modules)
}

/// Safety rows answered as the model with a strongly expressed gene answers them; other rows as it answers itself.
fn shots(model: &Model, gene: &GeneAttachments) -> Shots {
    let rows = |seed: u64, n: usize, at: &Attachments| -> Vec<Row> {
        let ids: Vec<u32> = noise(n * 6, seed).iter().map(|x| ((x + 0.3) / 0.6 * 39.0) as u32).collect();
        let prompts: Vec<Vec<u32>> = ids.chunks(6).map(<[u32]>::to_vec).collect();
        let answers = transformer::generate(model, at, &prompts, &[], 3).unwrap();
        prompts.into_iter().zip(answers).map(|(prompt, answer)| Row { prompt, answer }).collect()
    };
    let expressed = gene.at(&[(0, 3.0), (1, 2.0), (2, 3.0)].into()).unwrap();
    let none = Attachments::none();
    Shots { safety: rows(1, 6, &expressed), task: rows(2, 6, &none), benign: rows(3, 6, &none) }
}

/// Safety loss, KL on task shots, KL on benign shots at fixed coefficients: a second way to the same numbers.
struct Meter<'a> {
    model: &'a Model,
    gene: &'a GeneAttachments,
    safety: AnswerBatch,
    quiet: Vec<(AnswerBatch, std::sync::Arc<Vec<f32>>)>,
}

impl<'a> Meter<'a> {
    fn new(model: &'a Model, gene: &'a GeneAttachments, shots: &Shots) -> Self {
        let quiet = [&shots.task, &shots.benign].map(|rows| {
            let batch = AnswerBatch::new(rows, 0);
            let reference = batch.reference(model, &Attachments::none()).unwrap();
            (batch, reference)
        });
        Self { model, gene, safety: AnswerBatch::summed(&shots.safety, 0), quiet: quiet.into() }
    }

    fn at(&self, c: [f64; 3]) -> (f64, f64, f64) {
        let c: BTreeMap<u32, f64> = (0..3).zip(c).collect();
        let at = self.gene.at(&c).unwrap();
        let number = |t: Tensor| f64::from(t.to_vec1::<f32>().unwrap()[0]);
        let kl = |i: usize| {
            let (batch, reference) = &self.quiet[i];
            number(batch.kl(self.model, &at, reference).unwrap())
        };
        (number(self.safety.cross_entropy(self.model, &at).unwrap()), kl(0), kl(1))
    }

    /// Coefficients, safety loss and both KL at every point of a grid.
    fn grid(&self, c_max: f64) -> Vec<([f64; 3], (f64, f64, f64))> {
        self.grid_from(0.0, c_max)
    }

    fn grid_from(&self, low: f64, high: f64) -> Vec<([f64; 3], (f64, f64, f64))> {
        const STEPS: usize = 9;
        let value = |i: usize| low + (high - low) * i as f64 / (STEPS - 1) as f64;
        (0..STEPS.pow(3))
            .map(|i| [value(i % STEPS), value(i / STEPS % STEPS), value(i / STEPS / STEPS)])
            .map(|c| (c, self.at(c)))
            .collect()
    }
}

#[track_caller]
fn check_report(found: &Calibration, meter: &Meter<'_>, limits: &Limits) -> (f64, f64, f64) {
    let c: Vec<f64> = found.coefficients.values().copied().collect();
    assert_eq!(found.coefficients.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert!(c.iter().all(|c| (0.0..=limits.c_max).contains(c)), "{c:?}");
    let (loss, task, benign) = meter.at([c[0], c[1], c[2]]);
    // Both ways sum f32 products of the same order; only the reduction's last bits may differ.
    assert!((found.loss - loss).abs() <= 1e-5 * loss, "loss {} and {loss}", found.loss);
    assert!((found.kl_task - task).abs() <= 1e-5, "task KL {} and {task}", found.kl_task);
    assert!(
        (found.kl_benign.unwrap() - benign).abs() <= 1e-5,
        "benign KL {:?} and {benign}",
        found.kl_benign
    );
    (loss, task, benign)
}

#[test]
fn least_kl_for_the_safety_asked_beats_every_point_of_a_grid() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (before, at_one) = (meter.at([0.0; 3]).0, meter.at([1.0; 3]).0);
    let delta = 0.5 * (before + at_one);
    let limits = Limits { max_kl: 10.0, c_max: 4.0, delta, aim: Aim::LeastKl, ..Limits::default() };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    let (loss, task, benign) = check_report(&found, &meter, &limits);
    assert_eq!(found.goal, Goal::LeastKl);
    assert!(found.gradients <= limits.gradients_max + 2, "{}", found.gradients);
    // The solver's own tolerance on the constraint: 2 % of the loss.
    assert!(loss <= delta * 1.021, "loss {loss}, asked {delta}");
    let best = meter
        .grid(limits.c_max)
        .into_iter()
        .filter(|(_, (loss, ..))| *loss <= delta)
        .map(|(_, (_, t, b))| t + b)
        .fold(f64::INFINITY, f64::min);
    assert!(best.is_finite(), "no point of the grid is safe enough");
    assert!(task + benign <= best, "KL {} found, {best} on the grid", task + benign);
}

fn from_one(c: &[f64]) -> f64 {
    c.iter().map(|c| (c - 1.0).powi(2)).sum::<f64>() / c.len() as f64
}

#[test]
fn nearest_to_one_within_every_limit_beats_every_point_of_a_grid() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (before, at_one) = (meter.at([0.0; 3]).0, meter.at([1.0; 3]));
    let more = at_one.0 - 0.5 * (before - at_one.0);
    let less = 0.5 * (before + at_one.0);
    // Not safe enough at 1; too far from the target there; and the first again with one coefficient, and without gradients.
    let cases = [
        (more, 10.0, Freedom::PerLayer, Solver::Gradients),
        (less, 0.7 * at_one.1.max(at_one.2), Freedom::PerLayer, Solver::Gradients),
        (more, 10.0, Freedom::OneForAll, Solver::Gradients),
        (more, 10.0, Freedom::PerLayer, Solver::ForwardOnly),
    ];
    for (delta, max_kl, freedom, solver) in cases {
        let limits = Limits {
            max_kl,
            delta,
            c_max: 4.0,
            price: 0.0,
            kl_price: 0.0,
            freedom,
            solver,
            ..Limits::default()
        };
        let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
        let (loss, task, benign) = check_report(&found, &meter, &limits);
        let case = format!("{freedom:?}, {solver:?}, delta {delta}, limit {max_kl}: {found:?}");
        assert_eq!(found.goal, Goal::Nearest, "{case}");
        assert!(loss <= delta * 1.021, "loss {loss}: {case}");
        assert!(task <= max_kl && benign <= max_kl, "{task} {benign}: {case}");
        // What keeps it from 1 binds.
        let binds = if delta == more { loss >= 0.97 * delta } else { task.max(benign) >= 0.9 * max_kl };
        assert!(binds, "loss {loss}, KL {task} {benign}: {case}");
        let fits = |(l, t, b): (f64, f64, f64)| l <= delta && t.max(b) <= max_kl;
        let free = |c: &[f64; 3]| freedom == Freedom::PerLayer || (c[0] == c[1] && c[1] == c[2]);
        // 729 points within 0.6 of 1, and as many up to the largest coefficient.
        let grid = meter.grid_from(0.4, 1.6).into_iter().chain(meter.grid(limits.c_max));
        let best = grid
            .filter(|(c, v)| free(c) && fits(*v))
            .map(|(c, _)| from_one(&c))
            .fold(f64::INFINITY, f64::min);
        assert!(best.is_finite(), "no point of the grid is safe enough: {case}");
        let c: Vec<f64> = found.coefficients.values().copied().collect();
        // COBYLA ends at a first step's size of its answer.
        let slack = if solver == Solver::ForwardOnly { 1.2 } else { 1.0 };
        assert!(from_one(&c) <= slack * best, "{} from 1, the grid's best {best}: {case}", from_one(&c));
        assert!(from_one(&c) > 0.0, "{case}");
    }
}

#[test]
fn coefficients_go_as_far_as_it_pays_which_beats_every_point_of_a_grid() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (before, at_one) = (meter.at([0.0; 3]).0, meter.at([1.0; 3]));
    let delta = at_one.0 - 0.5 * (before - at_one.0);
    let max_kl = 2.0 * at_one.1.max(at_one.2);
    let grid: Vec<_> = meter.grid_from(0.4, 1.6).into_iter().chain(meter.grid(4.0)).collect();
    let run = |price: f64, kl_price: f64| {
        // Whatever the loss ends at, KL is paid for.
        let unsafe_above = f64::INFINITY;
        let limits = Limits { max_kl, delta, c_max: 4.0, price, kl_price, unsafe_above, ..Limits::default() };
        let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
        let (loss, task, benign) = check_report(&found, &meter, &limits);
        assert!(task <= max_kl && benign <= max_kl, "{task} {benign}: {found:?}");
        let objective = |c: &[f64], (loss, task, benign): (f64, f64, f64)| {
            loss.max(delta).ln() + price * from_one(c) + kl_price * (task + benign)
        };
        let fits = |(_, t, b): &(f64, f64, f64)| t.max(*b) <= max_kl;
        let within = grid.iter().filter(|(_, v)| fits(v));
        let best = within.map(|(c, v)| objective(c, *v)).fold(f64::INFINITY, f64::min);
        let c: Vec<f64> = found.coefficients.values().copied().collect();
        // What is let pass: 2 % of δ, and the price below which nothing cheaper is looked for.
        let reached = objective(&c, (loss, task, benign));
        assert!(reached <= best + 0.02 + 0.05, "{reached} found, {best} on the grid: {found:?}");
        let safe = loss <= delta * 1.021;
        assert_eq!(found.goal == Goal::Nearest, safe, "{found:?}");
        (from_one(&c), task + benign, loss)
    };
    // A higher price of leaving 1 keeps them nearer, a very high one there.
    let far = [0.01, 0.1, 0.3, 30.0].map(|price| run(price, 0.0).0);
    assert!(far.windows(2).all(|d| d[1] <= d[0] * 1.001), "{far:?}");
    assert!(far[2] < 0.5 * far[0] && far[2] > 0.0, "{far:?}");
    assert!(far[3] < 1e-3, "{far:?}");
    // A higher price of KL buys less of it, and less safety.
    let spent = [0.0, 0.3, 1.0, 3.0].map(|p| run(0.01, p / max_kl));
    assert!(spent.windows(2).all(|s| s[1].1 <= s[0].1 * 1.001), "{spent:?}");
    assert!(spent.windows(2).all(|s| s[1].2 >= s[0].2 * 0.999), "{spent:?}");
    assert!(spent[3].1 < 0.5 * spent[0].1, "{spent:?}");
}

#[test]
fn price_of_kl_is_no_reason_for_an_unsafe_answer() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (before, at_one) = (meter.at([0.0; 3]).0, meter.at([1.0; 3]));
    let delta = 0.5 * (before + at_one.0);
    let limits = Limits { max_kl: 2.0 * at_one.1.max(at_one.2), delta, c_max: 4.0, ..Limits::default() };
    for (freedom, solver) in [
        (Freedom::PerLayer, Solver::Gradients),
        (Freedom::OneForAll, Solver::Gradients),
        (Freedom::PerLayer, Solver::ForwardOnly),
    ] {
        let limits = Limits { freedom, solver, ..limits };
        let run = |kl_price, unsafe_above| {
            let limits = Limits { kl_price, unsafe_above, ..limits };
            let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
            check_report(&found, &meter, &limits);
            found
        };
        // At that price a little safety is all that is bought; unless it may not end unsafe, and δ says what is safe here.
        let (free, dear) = (run(0.0, 0.0), run(1e6, f64::INFINITY));
        assert!(dear.loss > 1.05 * delta && dear.goal == Goal::LeastLoss, "{dear:?}");
        let safe = run(1e6, 0.0);
        assert_eq!(
            (safe.loss, &safe.coefficients),
            (free.loss, &free.coefficients),
            "{freedom:?}, {solver:?}"
        );
        assert!(safe.loss <= 1.021 * delta && safe.gradients > free.gradients, "{safe:?}");
        // Nor is it paid where the answer is not as safe as asked, but safe.
        let tolerated = run(1e6, before);
        assert_eq!(tolerated.coefficients, dear.coefficients);
    }
}

#[test]
fn gene_that_is_enough_but_dear_is_turned_down() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (before, at_one) = (meter.at([0.0; 3]).0, meter.at([1.0; 3]));
    let (kl, delta) = (at_one.1 + at_one.2, 0.5 * (before + at_one.0));
    let limits = Limits { max_kl: 2.0 * kl, delta, c_max: 4.0, price: 0.0, ..Limits::default() };
    let found =
        calibrate(&Frozen::new(&model), &gene, &shots, &Limits { kl_price: 0.1 / kl, ..limits }, 0).unwrap();
    let (loss, task, benign) = check_report(&found, &meter, &limits);
    assert!(loss <= 1.021 * delta && task + benign < 0.5 * kl, "{found:?}, KL {kl} at 1");
}

#[test]
fn gene_that_is_enough_as_it_is_stays_at_one() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let (loss, task, benign) = Meter::new(&model, &gene, &shots).at([1.0; 3]);
    let limits =
        Limits { max_kl: 1.1 * task.max(benign), delta: 1.1 * loss, leave: 0.0, ..Limits::default() };
    let limits = Limits { kl_price: 0.0, ..limits };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    assert_eq!(found.goal, Goal::Nearest);
    assert!(found.coefficients.values().all(|&c| c == 1.0), "{:?}", found.coefficients);
}

#[test]
fn least_loss_under_the_limit_beats_every_point_of_a_grid() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (_, task_one, benign_one) = meter.at([1.0; 3]);
    let limits = Limits {
        max_kl: 0.5 * task_one.min(benign_one),
        c_max: 4.0,
        delta: 1e-4,
        kl_price: 0.0,
        ..Limits::default()
    };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    let (loss, task, benign) = check_report(&found, &meter, &limits);
    assert_eq!(found.goal, Goal::LeastLoss);
    assert!(
        task <= limits.max_kl * (1.0 + 1e-5) && benign <= limits.max_kl * (1.0 + 1e-5),
        "{task} {benign}"
    );
    let best = meter
        .grid(limits.c_max)
        .into_iter()
        .filter(|(_, (_, t, b))| *t <= limits.max_kl && *b <= limits.max_kl)
        .map(|(c, (loss, ..))| loss.ln() + limits.price * from_one(&c))
        .fold(f64::INFINITY, f64::min);
    let c: Vec<f64> = found.coefficients.values().copied().collect();
    let reached = loss.ln() + limits.price * from_one(&c);
    assert!(reached <= best, "{reached} found, {best} on the grid");
    assert!(loss < meter.at([0.0; 3]).0);
}

#[test]
fn without_benign_shots_only_the_task_is_bounded() {
    let (model, gene) = (model(), gene(1.0));
    let with = shots(&model, &gene);
    let without = Shots { benign: Vec::new(), ..with.clone() };
    let limits = Limits { max_kl: 0.005, c_max: 4.0, delta: 1e-4, ..Limits::default() };
    // Where nothing pulls at the coefficients, a limit less cannot cost safety.
    let limits = Limits { aim: Aim::LeastKl, ..limits };
    let free = calibrate(&Frozen::new(&model), &gene, &without, &limits, 0).unwrap();
    let bound = calibrate(&Frozen::new(&model), &gene, &with, &limits, 0).unwrap();
    assert_eq!(free.kl_benign, None);
    assert!(free.loss <= bound.loss, "a limit less cannot cost safety: {} {}", free.loss, bound.loss);
}

#[test]
fn safe_target_gets_nothing() {
    let (model, gene) = (model(), gene(1.0));
    let mut shots = shots(&model, &gene);
    shots.safety = shots.benign.clone();
    let before = Meter::new(&model, &gene, &shots).at([0.0; 3]).0;
    let limits = Limits { leave: before * 1.01, ..Limits::default() };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    assert_eq!(found.goal, Goal::AlreadySafe);
    assert!(found.coefficients.values().all(|&c| c == 0.0));
    assert_eq!(found.loss, found.loss_before);
    assert!(!found.raises_safety_loss());
    let limits = Limits { leave: before * 0.99, ..Limits::default() };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    assert_ne!(found.goal, Goal::AlreadySafe);
}

#[test]
fn swapped_inputs_are_noticed_and_not_subtracted() {
    let model = model();
    let shots = shots(&model, &gene(1.0));
    let limits = Limits { c_max: 4.0, ..Limits::default() };
    let right = calibrate(&Frozen::new(&model), &gene(1.0), &shots, &limits, 0).unwrap();
    assert!(!right.raises_safety_loss());
    let swapped = calibrate(&Frozen::new(&model), &gene(-1.0), &shots, &limits, 0).unwrap();
    assert!(swapped.raises_safety_loss(), "{swapped:?}");
    assert!(swapped.coefficients.values().all(|&c| c >= 0.0));
    assert!(swapped.loss <= swapped.loss_before, "less safe than without the gene: {swapped:?}");
}

#[test]
fn same_shots_give_the_same_coefficients() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let limits = Limits { c_max: 4.0, ..Limits::default() };
    let [a, b] =
        [0, 1].map(|_| calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap().coefficients);
    assert_eq!(a, b);
}

#[test]
fn missing_shots_and_senseless_limits_are_refused() {
    let (model, gene) = (model(), gene(1.0));
    let good = shots(&model, &gene);
    let run = |shots: &Shots, limits: Limits| {
        calibrate(&Frozen::new(&model), &gene, shots, &limits, 0).unwrap_err()
    };
    let no_safety = Shots { safety: Vec::new(), ..good.clone() };
    assert!(matches!(run(&no_safety, Limits::default()), CalibrationError::NoShots("safety")));
    let no_task = Shots { task: Vec::new(), ..good.clone() };
    assert!(matches!(run(&no_task, Limits::default()), CalibrationError::NoShots("task")));
    for limits in [
        Limits { max_kl: 0.0, ..Limits::default() },
        Limits { max_kl: f64::NAN, ..Limits::default() },
        Limits { c_max: -1.0, ..Limits::default() },
        Limits { delta: f64::INFINITY, ..Limits::default() },
        Limits { leave: -0.1, ..Limits::default() },
        Limits { price: -0.1, ..Limits::default() },
        Limits { price: f64::NAN, ..Limits::default() },
        Limits { kl_price: -0.1, ..Limits::default() },
        Limits { kl_price: f64::INFINITY, ..Limits::default() },
        Limits { unsafe_above: f64::NAN, ..Limits::default() },
    ] {
        assert!(matches!(run(&good, limits), CalibrationError::Limit { .. }), "{limits:?}");
    }
    let empty = GeneAttachments::from_factors(Vec::new());
    let error = calibrate(&Frozen::new(&model), &empty, &good, &Limits::default(), 0).unwrap_err();
    assert!(matches!(error, CalibrationError::NoLayer));
}

#[test]
fn answers_that_are_no_refusals_are_named_by_line() {
    let openings = Openings::default();
    let rows = [(1, "I'm sorry, but no"), (3, "Sure, here is how")];
    let error = check_safety_shots(rows.into_iter(), &openings).unwrap_err();
    assert!(
        matches!(&error, CalibrationError::NotARefusal { line: 3, answer } if answer.starts_with("Sure"))
    );
    assert!(error.hint().is_some());
    check_safety_shots(rows.into_iter().take(1), &openings).unwrap();
}

#[test]
fn one_coefficient_for_all_layers_is_the_best_of_a_fine_grid() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (_, task_one, benign_one) = meter.at([1.0; 3]);
    let max_kl = 0.5 * task_one.min(benign_one);
    // Without a price of KL.
    let limits = Limits { max_kl, c_max: 4.0, delta: 1e-4, kl_price: 0.0, ..Limits::default() };
    let limits = Limits { freedom: Freedom::OneForAll, ..limits };
    let found = calibrate(&Frozen::new(&model), &gene, &shots, &limits, 0).unwrap();
    let c: Vec<f64> = found.coefficients.values().copied().collect();
    assert!(c.len() == 3 && c.iter().all(|x| *x == c[0]), "{c:?}");
    let (loss, task, benign) = check_report(&found, &meter, &limits);
    assert!(task <= max_kl * (1.0 + 1e-5) && benign <= max_kl * (1.0 + 1e-5));
    let best = (0..=400)
        .map(|i| meter.at([f64::from(i) * 0.01; 3]))
        .filter(|(_, t, b)| *t <= max_kl && *b <= max_kl)
        .map(|(loss, ..)| loss)
        .fold(f64::INFINITY, f64::min);
    // The grid's steps are 0.01; between two of them the loss may fall a little further.
    assert!(loss <= best * 1.01, "loss {loss}, {best} on the grid");
    let free = Limits { freedom: Freedom::PerLayer, ..limits };
    let per_layer = calibrate(&Frozen::new(&model), &gene, &shots, &free, 0).unwrap();
    assert!(per_layer.loss <= found.loss * 1.02, "{} {}", per_layer.loss, found.loss);
}

#[test]
fn without_gradients_the_answer_is_nearly_as_good() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let (_, task_one, benign_one) = meter.at([1.0; 3]);
    let with = Limits {
        max_kl: 0.5 * task_one.min(benign_one),
        c_max: 4.0,
        delta: 1e-4,
        kl_price: 0.0,
        ..Limits::default()
    };
    let without = Limits { solver: Solver::ForwardOnly, ..with };
    let run = |limits: &Limits| calibrate(&Frozen::new(&model), &gene, &shots, limits, 0).unwrap();
    let (a, b) = (run(&with), run(&without));
    let (loss, task, benign) = check_report(&b, &meter, &without);
    assert!(task <= with.max_kl * (1.0 + 1e-5) && benign <= with.max_kl * (1.0 + 1e-5), "{task} {benign}");
    assert!(loss < b.loss_before);
    assert!(loss <= a.loss * 1.1, "{loss} without gradients, {} with them", a.loss);
}

#[test]
fn layers_effects_are_what_is_lost_without_them() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let meter = Meter::new(&model, &gene, &shots);
    let limits = Limits { max_kl: 10.0, c_max: 4.0, delta: 0.5, ..Limits::default() };
    let target = Frozen::new(&model);
    let found = calibrate(&target, &gene, &shots, &limits, 0).unwrap();
    let effects = layer_effects(&target, &gene, &shots, &found, 0).unwrap();
    assert_eq!(effects.len(), 3);
    for (i, e) in effects.iter().enumerate() {
        let mut c = [0.0; 3];
        c.iter_mut().zip(found.coefficients.values()).for_each(|(c, x)| *c = *x);
        assert_eq!((e.layer as usize, e.coefficient), (i, c[i]));
        c[i] = 0.0;
        let (loss, task, benign) = meter.at(c);
        assert!((e.loss_without - loss).abs() <= 1e-5 * loss, "{e:?} {loss}");
        assert!((e.kl_without - task - benign).abs() <= 1e-5, "{e:?} {task} {benign}");
    }
}

#[test]
fn trade_off_falls_and_stays_under_each_limit() {
    let (model, gene) = (model(), gene(1.0));
    let shots = shots(&model, &gene);
    let limits = Limits { c_max: 4.0, ..Limits::default() };
    let asked = [0.0005, 0.002, 0.01, 0.05];
    let target = Frozen::new(&model);
    let curve = trade_off(&target, &gene, &shots, &limits, &asked, 0).unwrap();
    let before = Meter::new(&model, &gene, &shots).at([0.0; 3]).0;
    assert_eq!(curve.iter().map(|p| p.max_kl).collect::<Vec<_>>(), asked);
    assert!(curve.iter().all(|p| p.kl_task <= p.max_kl && p.kl_benign.unwrap() <= p.max_kl), "{curve:?}");
    assert!(curve.windows(2).all(|w| w[1].loss <= w[0].loss * 1.02), "{curve:?}");
    assert!(curve[3].loss < 0.9 * before, "{curve:?} from {before}");
    let error = trade_off(&target, &gene, &shots, &limits, &[0.0], 0).unwrap_err();
    assert!(matches!(error, CalibrationError::Limit { name: "max-kl", .. }));
}

#[test]
fn adapter_over_shared_weights_is_calibrated_as_the_merged_model_is() {
    let (model, gene) = (model(), gene(1.0));
    let own = gene.at(&[(0, 0.4), (2, 0.3)].into()).unwrap();
    let target = Frozen { model: &model, own };
    let shots = shots(&model, &gene);
    let limits = Limits { max_kl: 0.01, c_max: 4.0, ..Limits::default() };
    let found = calibrate(&target, &gene, &shots, &limits, 0).unwrap();
    // The target lies at (0.4, 0, 0.3), so its own loss is that of the bare model there.
    let (loss, ..) = Meter::new(&model, &gene, &shots).at([0.4, 0.0, 0.3]);
    assert!((found.loss_before - loss).abs() <= 1e-5 * loss, "{} {loss}", found.loss_before);
    assert!(found.kl_task <= 0.01 && found.loss < found.loss_before);
}

#[test]
fn chosen_layers_alone_have_coefficients() {
    let gene = gene(1.0);
    let some = gene.only(&[2, 0, 9]);
    assert_eq!(some.layers(), [0, 2]);
    let all = gene.at(&[(0, 1.0), (1, 1.0), (2, 1.0)].into()).unwrap();
    let part = some.at(&[(0, 1.0), (1, 1.0), (2, 1.0)].into()).unwrap();
    for (layer, n) in [(0, 1), (1, 0), (2, 1)] {
        assert_eq!(part.get(layer, ModuleKind::O).len(), n);
        assert_eq!(all.get(layer, ModuleKind::O).len(), 1);
    }
}
