//! RESTA and WiSE-FT: every number worked out by hand.

use std::fs;

use checkpoint::Dtype;
use recover::{Action, Inputs, Settings};

use crate::support::{Bench, EMBED, NORM, Q, inputs, module, named, noise, weight};

const SHAPE: [u64; 2] = [2, 2];

/// `W_t`, `W_a`, `W_d` of one module.
fn three(bench: &Bench, target: &[f32; 4], aligned: &[f32; 4], degraded: &[f32; 4]) -> Inputs {
    Inputs {
        aligned: Some(bench.one("aligned", SHAPE, aligned)),
        degraded: Some(bench.one("degraded", SHAPE, degraded)),
        ..inputs(&bench.one("target", SHAPE, target))
    }
}

fn gamma(gamma: f64) -> Settings {
    Settings { gamma: Some(gamma), ..Settings::default() }
}

fn lambda(lambda: f64) -> Settings {
    Settings { lambda: Some(lambda), ..Settings::default() }
}

#[test]
fn resta_adds_gamma_times_the_safety_vector() {
    let bench = Bench::new();
    let inputs = three(&bench, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], &[0.5, 1.25, 1.0, 0.0]);
    let report = bench.run("resta", &gamma(0.5), &inputs).unwrap();
    // W_a − W_d = [1/2, −1/4; 0, 1], half of it on [1, 2; 3, 4].
    assert_eq!(bench.out(), [1.25, 1.875, 3.0, 4.5]);
    let q = module(&report, Q);
    assert_eq!((q.action, q.changed, q.elements_changed), (Action::Added, true, 3));
    // |[1/4, −1/8; 0, 1/2]|² = 4/64 + 1/64 + 16/64
    assert!((q.change_norm - (21f64 / 64.0).sqrt()).abs() < 1e-12);
    assert_eq!((report.tensors.changed, report.tensors.same, report.tensors.kept), (1, 0, 0));
}

#[test]
fn resta_default_is_the_plain_formula() {
    let bench = Bench::new();
    let inputs = three(&bench, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], &[0.5, 1.25, 1.0, 0.0]);
    bench.run("resta", &Settings::default(), &inputs).unwrap();
    assert_eq!(bench.out(), [1.5, 1.75, 3.0, 5.0]);
}

#[test]
fn resta_of_gamma_zero_leaves_every_byte_and_says_so() {
    let bench = Bench::new();
    let inputs = three(&bench, &[1.0, -0.0, 3e-40, 4.0], &[1.0; 4], &[0.5, 1.25, 1.0, 0.0]);
    let report = bench.run("resta", &gamma(0.0), &inputs).unwrap();
    assert!(report.changed_nothing);
    assert_eq!((report.elements_changed, report.change_norm), (0, 0.0));
    assert_eq!((report.tensors.changed, report.tensors.same, report.tensors.kept), (0, 1, 0));
    let file = |dir: &str| fs::read(bench.path(dir).join("model.safetensors")).unwrap();
    assert_eq!(file("out"), file("target"));
}

#[test]
fn resta_rounds_once() {
    let bench = Bench::new();
    let model =
        |name: &str, value: f32| bench.model(name, Dtype::Bf16, &[named(&weight(Q), &[1, 1], &[value])]);
    // 1 + 2^-8 is halfway between two bf16, and 2^-20 more is above it; rounded before it is added, 2^-8 + 2^-20 is 2^-8,
    // and the tie would go down to 1.
    let inputs = Inputs {
        aligned: Some(model("aligned", 2f32.powi(-8))),
        degraded: Some(model("degraded", -(2f32.powi(-20)))),
        ..inputs(&model("target", 1.0))
    };
    bench.run("resta", &gamma(1.0), &inputs).unwrap();
    assert_eq!(bench.out(), [1.0 + 2f32.powi(-7)]);
}

#[test]
fn dare_drops_or_rescales_each_element_of_the_task() {
    let bench = Bench::new();
    let n = 4096;
    let shape = [64, 64];
    let (aligned, task) = (noise(n, 1), noise(n, 2));
    // In quarters of 1/1024, so that sums and the factor 4 are exact.
    let quantised = |x: &f32| (x * 1024.0).round() / 1024.0;
    let aligned: Vec<f32> = aligned.iter().map(quantised).collect();
    let task: Vec<f32> = task.iter().map(quantised).map(|x| if x == 0.0 { 1.0 } else { x }).collect();
    let target: Vec<f32> = aligned.iter().zip(&task).map(|(a, t)| a + t).collect();
    let inputs = Inputs {
        aligned: Some(bench.one("aligned", shape, &aligned)),
        degraded: Some(bench.one("degraded", shape, &aligned)),
        ..inputs(&bench.one("target", shape, &target))
    };
    let settings = Settings { drop: Some(0.75), seed: Some(5), ..gamma(1.0) };
    bench.run("resta", &settings, &inputs).unwrap();
    let mut dropped = 0;
    for (index, (got, (&a, &t))) in bench.out().iter().zip(aligned.iter().zip(&task)).enumerate() {
        // 1 / (1 − 3/4) = 4.
        assert!(*got == a || *got == a + 4.0 * t, "element {index}: {got} of {a} and {t}");
        dropped += usize::from(*got == a);
    }
    // Five standard deviations, sqrt(4096 · 3/16) = 27.7.
    assert!((dropped as f64 - 3072.0).abs() < 139.0, "{dropped}");
    // Another seed drops others; the same one the same.
    let first = bench.out();
    for (seed, same) in [(5, true), (6, false)] {
        fs::remove_dir_all(bench.path("out")).unwrap();
        bench.run("resta", &Settings { seed: Some(seed), ..settings.clone() }, &inputs).unwrap();
        assert_eq!(bench.out() == first, same, "{seed}");
    }
}

#[test]
fn wise_ft_averages() {
    let bench = Bench::new();
    let inputs = three(&bench, &[1.0, 2.0, 3.0, 4.0], &[1.0, 1.0, 1.0, -2.0], &[0.0; 4]);
    let report = bench.run("wise-ft", &lambda(0.25), &inputs).unwrap();
    // 3/4 W_a + 1/4 W_t
    assert_eq!(bench.out(), [1.0, 1.25, 1.5, -0.5]);
    assert_eq!(module(&report, Q).elements_changed, 3);
}

#[test]
fn wise_ft_at_its_ends_is_one_of_the_two() {
    let bench = Bench::new();
    let (target, aligned) = (noise(6, 1), noise(6, 2));
    let model = |name: &str, values: &[f32]| {
        let tensors =
            [named(EMBED, &[1, 6], values), named(NORM, &[6], values), named(&weight(Q), &[2, 3], values)];
        bench.model(name, Dtype::Bf16, &tensors)
    };
    let inputs = Inputs { aligned: Some(model("aligned", &aligned)), ..inputs(&model("target", &target)) };
    let report = bench.run("wise-ft", &lambda(1.0), &inputs).unwrap();
    assert!(report.changed_nothing);
    let file = |dir: &str| fs::read(bench.path(dir).join("model.safetensors")).unwrap();
    assert_eq!(file("out"), file("target"));
    fs::remove_dir_all(bench.path("out")).unwrap();
    let report = bench.run("wise-ft", &lambda(0.0), &inputs).unwrap();
    assert_eq!(report.tensors.changed, 3);
    assert_eq!(file("out"), file("aligned"));
}

#[test]
fn target_that_is_an_adapter_is_merged_first() {
    let bench = Bench::new();
    let base = bench.one("aligned", SHAPE, &[1.0, 0.0, 0.0, 1.0]);
    let target = bench.adapter("target", &base, 2.0, &[(Q, 1, &[1.0, 2.0], &[3.0, 4.0])]);
    let inputs = Inputs { aligned: Some(base), ..inputs(&target) };
    // W_t = W_a + 2 [1; 2] [3, 4] = [7, 8; 12, 17]; half of the way.
    let report = bench.run("wise-ft", &lambda(0.5), &inputs).unwrap();
    assert_eq!(bench.out(), [4.0, 4.0, 6.0, 9.0]);
    assert_eq!(report.elements_changed, 4);
    // Counted from the merged target, not from its base.
    fs::remove_dir_all(bench.path("out")).unwrap();
    let report = bench.run("wise-ft", &lambda(1.0), &inputs).unwrap();
    assert_eq!(bench.out(), [7.0, 8.0, 12.0, 17.0]);
    assert!(report.changed_nothing);
}
