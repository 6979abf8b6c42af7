//! SafeMERGE on adapters whose sum is written down. V and the target's update are those of SafeLoRA's tests: the cosine is
//! 25/√674 = 0.963.

use checkpoint::{Checkpoint, Dtype};
use recover::{Action, Form, Inputs, Settings};

use crate::support::{
    Bench, K, Q, assert_close, assert_near, inputs, module, named, noise, product, weight, wide,
};

const SHAPE: [u64; 2] = [2, 2];
const ALIGNED: [f32; 4] = [1.0, 2.0, 3.0, 4.0];
/// W_a − [3, 0; 0, 4]
const BASE: [f32; 4] = [-2.0, 2.0, 3.0, 0.0];

/// The target's update is 2 [1; 1] [1, 2], the safety adapter's 8 [1; −1] [1, 0].
fn worked(bench: &Bench) -> Inputs {
    let aligned = bench.one("aligned", SHAPE, &ALIGNED);
    let target = bench.adapter("target", &aligned, 2.0, &[(Q, 1, &[1.0, 1.0], &[1.0, 2.0])]);
    let safety = bench.adapter("safety", &aligned, 8.0, &[(Q, 1, &[1.0, -1.0], &[1.0, 0.0])]);
    Inputs {
        aligned: Some(aligned),
        base: Some(bench.one("base", SHAPE, &BASE)),
        safety_adapter: Some(safety),
        ..inputs(&target)
    }
}

fn settings(tau: f64, variant: Option<&str>) -> Settings {
    Settings {
        tau: Some(tau),
        weight: Some(0.25),
        variant: variant.map(str::to_owned),
        ..Settings::default()
    }
}

#[test]
fn module_below_tau_is_merged_exactly() {
    let bench = Bench::new();
    let report = bench.run("safemerge", &settings(0.97, None), &worked(&bench)).unwrap();
    // 3/4 · 2 [1, 2; 1, 2] + 1/4 · 8 [1, 0; −1, 0] = [3.5, 3; −0.5, 3]
    assert_eq!(bench.out(), [4.5, 5.0, 2.5, 7.0]);
    let q = module(&report, Q);
    assert_eq!((q.action, q.rank), (Action::Merged, Some(2)));
    assert_near(q.cosine, (625.0f64 / 674.0).sqrt());
}

#[test]
fn module_above_tau_keeps_the_target() {
    let bench = Bench::new();
    let report = bench.run("safemerge", &settings(0.96, None), &worked(&bench)).unwrap();
    assert_eq!(bench.out(), [3.0, 6.0, 5.0, 8.0]);
    assert!(report.changed_nothing);
    assert_eq!(module(&report, Q).action, Action::Kept);
}

#[test]
fn published_average_has_cross_terms() {
    let bench = Bench::new();
    let report = bench.run("safemerge", &settings(0.97, Some("published")), &worked(&bench)).unwrap();
    // Roots of 3/4 · 2 = 3/2 and 1/4 · 8 = 2; beside the exact sum √3 (B_t A_s + B_s A_t) with
    // B_t A_s = [1, 0; 1, 0] and B_s A_t = [1, 2; −1, −2].
    let root = 3f64.sqrt();
    assert_close(&bench.out(), &[4.5 + 2.0 * root, 5.0 + 2.0 * root, 2.5, 7.0 - 2.0 * root]);
    assert_eq!(module(&report, Q).rank, Some(1));
}

#[test]
fn concatenation_equals_the_dense_sum() {
    let bench = Bench::new();
    let (out, into, rank) = (7, 5, 2);
    let shape = [out as u64, into as u64];
    let aligned = noise(out * into, 1);
    let factors = |seed| (noise(out * rank, seed), noise(rank * into, seed + 1));
    let ((tb, ta), (sb, sa)) = (factors(3), factors(5));
    let aligned_dir = bench.one("aligned", shape, &aligned);
    let target = bench.adapter("target", &aligned_dir, 6.0, &[(Q, rank as u64, &tb, &ta)]);
    let safety = bench.adapter("safety", &aligned_dir, 1.0, &[(Q, rank as u64, &sb, &sa)]);
    let base = bench.one("base", shape, &noise(out * into, 2));
    let inputs = Inputs {
        aligned: Some(aligned_dir),
        base: Some(base),
        safety_adapter: Some(safety),
        ..inputs(&target)
    };
    bench.run_as("safemerge", &settings(1.0, None), &inputs, Form::Both, "out").unwrap();
    let (t, s) =
        (product(&wide(&tb), &wide(&ta), out, rank, into), product(&wide(&sb), &wide(&sa), out, rank, into));
    // Scales 3 and 1/2.
    let sum = t.iter().zip(&s).map(|(t, s)| 0.75 * 3.0 * t + 0.25 * 0.5 * s);
    let want: Vec<f64> = aligned.iter().zip(sum).map(|(&a, sum)| f64::from(a) + sum).collect();
    assert_close(&bench.values("out/merged", &weight(Q)), &want);
    assert_eq!(bench.values("out/adapter", &weight(Q)), bench.values("out/merged", &weight(Q)));

    // The same target as a whole model.
    let whole: Vec<f32> = aligned.iter().zip(&t).map(|(&a, t)| (f64::from(a) + 3.0 * t) as f32).collect();
    let inputs = Inputs { target: bench.one("whole", shape, &whole), ..inputs };
    bench.run_as("safemerge", &settings(1.0, None), &inputs, Form::Merged, "dense").unwrap();
    assert_close(&bench.values("dense", &weight(Q)), &want);
}

#[test]
fn adapter_of_mixed_ranks_and_scales_is_read_back() {
    for rslora in [false, true] {
        let bench = Bench::new();
        let model = |name: &str, values: &[f32]| {
            let tensors = [named(&weight(K), &SHAPE, values), named(&weight(Q), &SHAPE, values)];
            bench.model(name, Dtype::F32, &tensors)
        };
        let aligned = model("aligned", &ALIGNED);
        // K's update is (1, 0) [1, 2], which C only scales: cosine 1, kept with its rank and scale.
        let lora: [(&str, u64, &[f32], &[f32]); 2] =
            [(K, 1, &[1.0, 0.0], &[1.0, 2.0]), (Q, 1, &[1.0, 1.0], &[1.0, 2.0])];
        let target = bench.adapter("target", &aligned, 2.0, &lora);
        let safety = bench.adapter("safety", &aligned, 8.0, &lora);
        let path = target.join("adapter_config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["use_rslora"] = rslora.into();
        // A pattern that would match both modules by its ending.
        config["alpha_pattern"] = serde_json::json!({"q_proj": 2.0});
        std::fs::write(&path, config.to_string()).unwrap();
        let inputs = Inputs {
            aligned: Some(aligned),
            base: Some(model("base", &BASE)),
            safety_adapter: Some(safety),
            ..inputs(&target)
        };
        let report = bench.run_as("safemerge", &settings(0.97, None), &inputs, Form::Adapter, "out").unwrap();
        assert_eq!(module(&report, K).action, Action::Kept);
        let q = module(&report, Q);
        assert_eq!((q.action, q.changed, q.rank), (Action::Merged, true, Some(2)));
        // 3/4 · 2 + 1/4 · 8 = 3.5 times [1; 1] [1, 2], of which 2 were there: 3/2 |[1, 2; 1, 2]|
        assert_near(Some(q.change_norm), 1.5 * 10f64.sqrt());
        assert_eq!(bench.values("out", &weight(K)), [3.0, 6.0, 3.0, 4.0]);
        assert_eq!(bench.out(), [4.5, 9.0, 6.5, 11.0]);
        let made = Checkpoint::open(&bench.path("out"), None).unwrap();
        let config = made.adapter().unwrap().config();
        assert_eq!((config.rank_of(Q), config.scale_of(Q)), (2, 1.0));
        assert_eq!((config.rank_of(K), config.scale_of(K)), (1, 2.0));
        // Loaders make room for `r`.
        assert_eq!(config.r, 2);
    }
}

#[test]
fn module_without_a_step_counts_as_opposed() {
    let bench = Bench::new();
    let model = |name: &str, q: &[f32], k: &[f32]| {
        let tensors = [named(&weight(K), &SHAPE, k), named(&weight(Q), &SHAPE, q)];
        bench.model(name, Dtype::F32, &tensors)
    };
    let aligned = model("aligned", &ALIGNED, &ALIGNED);
    let lora = |b: &'static [f32]| -> [(&'static str, u64, &'static [f32], &'static [f32]); 2] {
        [(K, 1, b, &[1.0, 2.0]), (Q, 1, b, &[1.0, 2.0])]
    };
    let target = bench.adapter("target", &aligned, 1.0, &lora(&[4.0, 4.0]));
    let safety = bench.adapter("safety", &aligned, 1.0, &lora(&[0.0, 0.0]));
    let inputs = Inputs {
        aligned: Some(aligned),
        base: Some(model("base", &BASE, &ALIGNED)),
        safety_adapter: Some(safety),
        ..inputs(&target)
    };
    let report = bench.run("safemerge", &settings(0.35, None), &inputs).unwrap();
    assert_eq!((module(&report, K).action, module(&report, K).cosine), (Action::Merged, Some(0.0)));
    assert_eq!(module(&report, Q).action, Action::Kept);
    // 3/4 of [4, 8; 4, 8] on the one, all of it on the other.
    assert_eq!(bench.values("out", &weight(K)), [4.0, 8.0, 6.0, 10.0]);
    assert_eq!(bench.out(), [5.0, 10.0, 7.0, 12.0]);
}
