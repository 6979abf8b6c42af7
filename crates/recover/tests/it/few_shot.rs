//! A LoRA on a few shots: whatever it does, it stays within the limit.

use crate::decoder::{answered, flat, model, other};
use recover::few_shot::{FewShot, Measured, Options, Shots, Stopped, best_rate, few_shot, measure};
use recover::{ModuleFactors, RunError};
use transformer::{AnswerBatch, Attachments, Model, ModuleKind};

/// Safety rows as a changed model answers them; the others as the target itself does.
fn shots(model: &Model, base: &Attachments) -> Shots {
    let mut changed = base.clone();
    changed.extend(&other(3.0));
    Shots {
        safety: answered(model, &changed, 1, 6),
        task: answered(model, base, 2, 6),
        benign: answered(model, base, 3, 6),
    }
}

/// The same numbers a second way: over the target with the factors attached, by the losses themselves.
#[track_caller]
fn check(model: &Model, base: &Attachments, shots: &Shots, o: &Options, found: &FewShot) -> Measured {
    let r = &found.report;
    let mut at = base.clone();
    at.extend(&ModuleFactors::attachments(&found.factors).unwrap());
    let kl = |rows: &[transformer::Row]| {
        let batch = AnswerBatch::new(rows, 0);
        let reference = batch.reference(model, base).unwrap();
        f64::from(flat(&batch.kl(model, &at, &reference).unwrap())[0]).max(0.0)
    };
    let loss = f64::from(flat(&AnswerBatch::new(&shots.safety, 0).cross_entropy(model, &at).unwrap())[0]);
    // The same products in the same order: equal to the last bit.
    assert_eq!((r.reached.loss, r.reached.kl_task), (loss, kl(&shots.task)));
    assert_eq!(r.reached.kl_benign, (!shots.benign.is_empty()).then(|| kl(&shots.benign)));
    assert!(r.reached.kl_max() <= o.max_kl, "above the limit: {r:?}");
    assert!(r.reached.loss <= r.loss_before, "worse than nothing: {r:?}");
    assert!(r.step <= r.steps && r.steps <= o.steps_max);
    // Two layers; a layout has some of the kinds only.
    let has = |kind: &ModuleKind| model.architecture().modules().iter().any(|m| m.kind == *kind);
    assert_eq!(found.factors.len(), o.modules.iter().filter(|kind| has(kind)).count() * 2);
    r.reached
}

#[test]
fn never_above_the_limit_whatever_the_limit_and_the_rate() {
    let model = model();
    let none = Attachments::none();
    let shots = shots(&model, &none);
    for max_kl in [1e-7, 0.002, 0.02, 10.0] {
        for (rate, penalty) in [(1e-3, 1.0), (3e-2, 1.0), (0.3, 0.0)] {
            let o = Options { max_kl, rate, penalty, steps_max: 25, patience: 6, ..Options::default() };
            let found = few_shot(&model, &none, &shots, &o, 0).unwrap();
            check(&model, &none, &shots, &o, &found);
        }
    }
}

#[test]
fn reaches_the_safety_asked_and_stops() {
    let model = model();
    let none = Attachments::none();
    let shots = shots(&model, &none);
    // A random head of width 16 cannot put more than about a quarter on one of 40 tokens: 1.2 is as low as it gets.
    let o = Options { max_kl: 1e3, delta: 1.75, rate: 1e-2, penalty: 0.01, ..Options::default() };
    let found = few_shot(&model, &none, &shots, &o, 0).unwrap();
    let reached = check(&model, &none, &shots, &o, &found);
    assert_eq!(found.report.stopped, Stopped::Safe, "{:?}", found.report);
    assert!(reached.loss <= 1.75 && found.report.steps < o.steps_max && found.report.scale == 1.0);
    assert!(found.report.seconds > 0.0);
    // Enough is enough: it stopped at the first such iterate, which is the one returned.
    assert_eq!(found.report.step, found.report.steps);
}

#[test]
fn a_tight_limit_ends_training_and_the_penalty_is_felt() {
    let model = model();
    let none = Attachments::none();
    let shots = shots(&model, &none);
    let o = Options { max_kl: 1e-4, rate: 1e-2, penalty: 0.0, patience: 5, ..Options::default() };
    let free = few_shot(&model, &none, &shots, &o, 0).unwrap();
    check(&model, &none, &shots, &o, &free);
    assert_eq!(free.report.stopped, Stopped::Limit);
    // With the limit out of reach on the way, what is returned is an iterate scaled back.
    assert!(free.report.steps < 20, "{:?}", free.report);
    let held = |penalty| {
        let o =
            Options { max_kl: 1e3, penalty, steps_max: 40, delta: 1e-9, rate: 1e-2, ..Options::default() };
        few_shot(&model, &none, &shots, &o, 0).unwrap().report.reached
    };
    let (without, with) = (held(0.0), held(5.0));
    assert!(with.kl_max() < 0.5 * without.kl_max(), "{without:?} {with:?}");
}

#[test]
fn without_benign_shots_only_the_task_is_bounded() {
    let model = model();
    let none = Attachments::none();
    let shots = Shots { benign: Vec::new(), ..shots(&model, &none) };
    let o = Options { steps_max: 20, rate: 1e-2, ..Options::default() };
    let found = few_shot(&model, &none, &shots, &o, 0).unwrap();
    assert_eq!(check(&model, &none, &shots, &o, &found).kl_benign, None);
}

#[test]
fn a_target_with_attachments_is_measured_from_itself() {
    let model = model();
    let base = other(1.0);
    let shots = shots(&model, &base);
    let o = Options {
        steps_max: 20,
        rate: 1e-2,
        modules: vec![ModuleKind::V, ModuleKind::Down],
        ..Options::default()
    };
    let found = few_shot(&model, &base, &shots, &o, 0).unwrap();
    let reached = check(&model, &base, &shots, &o, &found);
    assert!(reached.loss < found.report.loss_before);
    assert_eq!(measure(&model, &base, &found.factors, &shots, 0).unwrap(), reached);
    let kinds: Vec<_> = found.factors.iter().map(|f| (f.layer, f.kind, f.rank)).collect();
    let v = ModuleKind::V;
    let d = ModuleKind::Down;
    assert_eq!(kinds, [(0, v, 8), (0, d, 8), (1, v, 8), (1, d, 8)]);
}

#[test]
fn a_safe_target_gets_nothing() {
    let model = model();
    let none = Attachments::none();
    let mut shots = shots(&model, &none);
    shots.safety = shots.benign.clone();
    let before = measure(&model, &none, &[], &shots, 0).unwrap();
    assert_eq!((before.kl_task, before.kl_benign), (0.0, Some(0.0)));
    let o = Options { delta: before.loss * 1.01, ..Options::default() };
    let found = few_shot(&model, &none, &shots, &o, 0).unwrap();
    assert_eq!((found.report.stopped, found.report.steps), (Stopped::AlreadySafe, 0));
    assert_eq!(found.report.reached.loss, before.loss);
    assert!(found.factors.iter().all(|f| f.b.iter().all(|&b| b == 0.0)));
}

#[test]
fn same_seed_same_factors_other_seed_others() {
    let model = model();
    let none = Attachments::none();
    let shots = shots(&model, &none);
    let run = |seed, threads| {
        let o = Options { seed, steps_max: 8, rate: 1e-2, ..Options::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| few_shot(&model, &none, &shots, &o, 0).unwrap().factors)
    };
    assert_eq!(run(1, 1), run(1, 2));
    assert_ne!(run(1, 1), run(2, 1));
}

#[test]
fn of_the_rates_the_one_is_taken_that_the_rule_names() {
    let model = model();
    let none = Attachments::none();
    let shots = shots(&model, &none);
    let o = Options { steps_max: 15, max_kl: 10.0, ..Options::default() };
    let run = |rates: &[f64], go_on: &mut dyn FnMut(usize) -> bool| {
        best_rate(&model, &none, &shots, rates, &o, 0, go_on)
    };
    let rates = [1e-5, 1e-2];
    let (found, reports) = run(&rates, &mut |_| true).unwrap();
    assert_eq!(reports.iter().map(|r| r.rate).collect::<Vec<_>>(), rates);
    // Nothing is learnt in 15 steps of 1e-5, and no limit is in the way.
    assert!(reports[1].reached.loss < reports[0].reached.loss);
    assert_eq!(found.report, reports[1]);
    assert_eq!(measure(&model, &none, &found.factors, &shots, 0).unwrap(), reports[1].reached);
    assert!(run(&[], &mut |_| true).unwrap_err().to_string().contains("`rates`"));
    assert!(matches!(run(&rates, &mut |step| step < 3).unwrap_err(), RunError::Stopped));
}

#[test]
fn missing_shots_and_senseless_options_are_refused() {
    let model = model();
    let none = Attachments::none();
    let good = shots(&model, &none);
    let run = |shots: &Shots, o: Options| few_shot(&model, &none, shots, &o, 0).unwrap_err();
    let o = Options::default;
    let e = run(&Shots { safety: Vec::new(), ..good.clone() }, o());
    assert!(matches!(e, RunError::NoRows("safety")) && e.hint().is_some());
    let e = run(&Shots { task: Vec::new(), ..good.clone() }, o());
    assert!(matches!(e, RunError::NoRows("task")) && e.hint().is_some());
    let mut broken = good.clone();
    broken.benign[1].prompt.clear();
    assert_eq!(run(&broken, o()).to_string(), "benign row 2 has no prompt");
    for (name, bad) in [
        ("rank", Options { rank: 0, ..o() }),
        ("rate", Options { rate: f64::NAN, ..o() }),
        ("max-kl", Options { max_kl: 0.0, ..o() }),
        ("delta", Options { delta: -1.0, ..o() }),
        ("penalty", Options { penalty: -0.5, ..o() }),
        ("steps", Options { steps_max: 0, ..o() }),
        ("patience", Options { patience: 0, ..o() }),
        ("alpha", Options { alpha: f64::INFINITY, ..o() }),
    ] {
        let e = run(&good, bad).to_string();
        assert!(e.contains(&format!("`{name}` is")), "{e}");
    }
    assert!(matches!(run(&good, Options { modules: Vec::new(), ..o() }), RunError::NoModule));
    let e = run(&good, Options { rate: 1e30, ..o() });
    assert!(matches!(e, RunError::Diverged { .. }) && e.hint().unwrap().contains("learning rate"), "{e}");
}
