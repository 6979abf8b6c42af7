//! Low-rank restore and LoX on a difference whose singular vectors are known.
//!
//! ```text
//! D = 25 u₁ v₁ᵀ + 12.5 u₂ v₂ᵀ,   u₁ = (3, 4, 0)/5,  u₂ = (4, −3, 0)/5,  v₁ = (4, 3)/5,  v₂ = (3, −4)/5
//!   = [12, 9; 16, 12; 0, 0] + [6, −8; −4.5, 6; 0, 0]
//! ```

use std::fs;

use checkpoint::Dtype;
use recover::{Inputs, Settings};

use crate::support::{
    Bench, EMBED, NORM, Q, assert_close, assert_near, inputs, module, named, noise, weight,
};

const SHAPE: [u64; 2] = [3, 2];
const FIRST: [f32; 6] = [12.0, 9.0, 16.0, 12.0, 0.0, 0.0];
const WHOLE: [f32; 6] = [18.0, 1.0, 11.5, 18.0, 0.0, 0.0];
const START: [f32; 6] = [1.0, -1.0, 0.5, 2.0, 3.0, -4.0];

fn plus(scale: f64, step: &[f32; 6]) -> Vec<f64> {
    START.iter().zip(step).map(|(&x, &d)| f64::from(x) + scale * f64::from(d)).collect()
}

fn values(scale: f64, step: &[f32; 6]) -> Vec<f32> {
    plus(scale, step).iter().map(|&x| x as f32).collect()
}

#[test]
fn restore_adds_the_strongest_direction() {
    let bench = Bench::new();
    let inputs = Inputs {
        aligned: Some(bench.one("aligned", SHAPE, &values(1.0, &WHOLE))),
        ..inputs(&bench.one("target", SHAPE, &START))
    };
    let settings = Settings { rank: Some(1), gamma: Some(0.5), ..Settings::default() };
    let report = bench.run("low-rank-restore", &settings, &inputs).unwrap();
    assert_close(&bench.out(), &plus(0.5, &FIRST));
    let q = module(&report, Q);
    assert_eq!(q.rank, Some(1));
    // 25 / sqrt(25² + 12.5²) = 2 / sqrt 5
    assert_near(q.norm_ratio, 2.0 / 5f64.sqrt());
}

#[test]
fn restore_at_full_rank_is_the_aligned_model() {
    let bench = Bench::new();
    let model = |name: &str, seed: u64| {
        let tensors = [
            named(EMBED, &[30, 20], &noise(600, seed)),
            named(NORM, &[20], &noise(20, seed + 1)),
            named(&weight(Q), &[40, 20], &noise(800, seed + 2)),
        ];
        bench.model(name, Dtype::Bf16, &tensors)
    };
    let inputs = Inputs { aligned: Some(model("aligned", 1)), ..inputs(&model("target", 11)) };
    let file = |dir: &str| fs::read(bench.path(dir).join("model.safetensors")).unwrap();
    let settings = Settings { rank: Some(20), ..Settings::default() };
    bench.run("low-rank-restore", &settings, &inputs).unwrap();
    assert_eq!(file("out"), file("aligned"));
    // One short of it: the vector is whole all the same, the matrices are not.
    fs::remove_dir_all(bench.path("out")).unwrap();
    let settings = Settings { rank: Some(19), ..Settings::default() };
    let report = bench.run("low-rank-restore", &settings, &inputs).unwrap();
    assert_eq!(bench.values("out", NORM), bench.values("aligned", NORM));
    assert_ne!(bench.values("out", EMBED), bench.values("aligned", EMBED));
    assert_eq!(module(&report, NORM).rank, None);
    let share = module(&report, Q).norm_ratio.unwrap();
    assert!(share > 0.9 && share < 1.0, "{share}");
}

#[test]
fn restore_takes_a_lora_of_the_rank_back() {
    let bench = Bench::new();
    let base = bench.one("aligned", [30, 20], &noise(600, 1));
    let target = bench.adapter("target", &base, 4.0, &[(Q, 2, &noise(60, 2), &noise(40, 3))]);
    let want: Vec<f64> = bench.values("aligned", &weight(Q)).iter().map(|&x| f64::from(x)).collect();
    let inputs = Inputs { aligned: Some(base), ..inputs(&target) };
    let settings = Settings { rank: Some(2), ..Settings::default() };
    let report = bench.run("low-rank-restore", &settings, &inputs).unwrap();
    let largest = bench.values("target", &weight(Q)).iter().fold(0f32, |max, x| max.max(x.abs()));
    for (got, want) in bench.out().iter().zip(&want) {
        assert!((f64::from(*got) - want).abs() < 1e-6 * f64::from(largest), "{got} {want}");
    }
    assert_near(module(&report, Q).norm_ratio, 1.0);
}

#[test]
fn lox_extrapolates_the_strongest_direction() {
    let bench = Bench::new();
    let aligned = values(1.0, &WHOLE);
    let tensors = |q: &[f32], norm: &[f32]| [named(NORM, &[2], norm), named(&weight(Q), &SHAPE, q)];
    let target = bench.model("aligned", Dtype::F32, &tensors(&aligned, &[1.0, 2.0]));
    let inputs = Inputs {
        base: Some(bench.model("base", Dtype::F32, &tensors(&START, &[3.0, 3.0]))),
        ..inputs(&target)
    };
    let settings = Settings { rank: Some(1), ..Settings::default() };
    let report = bench.run("lox", &settings, &inputs).unwrap();
    let want: Vec<f64> =
        plus(1.0, &WHOLE).iter().zip(&FIRST).map(|(x, &d)| x + 1.25 * f64::from(d)).collect();
    assert_close(&bench.out(), &want);
    // Only linear modules.
    assert_eq!(bench.values("out", NORM), [1.0, 2.0]);
    assert_eq!((report.tensors.changed, report.tensors.kept), (1, 1));
    assert_eq!(report.modules.len(), 1);
}

#[test]
fn nothing_to_restore_is_said() {
    let bench = Bench::new();
    let inputs = Inputs {
        aligned: Some(bench.one("aligned", SHAPE, &START)),
        ..inputs(&bench.one("target", SHAPE, &START))
    };
    let settings = Settings { rank: Some(1), ..Settings::default() };
    let report = bench.run("low-rank-restore", &settings, &inputs).unwrap();
    assert!(report.changed_nothing);
    assert_eq!((report.tensors.same, report.tensors.changed), (1, 0));
}
