//! SafeLoRA on matrices whose `C` is written down.

use std::fs;

use checkpoint::Checkpoint;
use recover::{Action, Form, Inputs, Settings};

use crate::support::{
    Bench, EMBED, K, NORM, Q, V, assert_close, assert_near, dot, inputs, module, named, noise, product,
    weight, wide,
};

const SHAPE: [u64; 2] = [2, 2];
const ALIGNED: [f32; 4] = [1.0, 2.0, 3.0, 4.0];
/// W_a − [3, 0; 0, 4]
const BASE: [f32; 4] = [-2.0, 2.0, 3.0, 0.0];
const B: [f32; 2] = [1.0, 1.0];
const A: [f32; 2] = [1.0, 2.0];

// V = diag(3, 4), |V| = 5, C = diag(9, 16) / 5, C B = (9/5, 16/5).
// With one column the A of both sides is the same, so cos = ⟨C B, B⟩ / (|C B| |B|) = 25/5 / (√337/5 · √2) = 25/√674.
const COSINE_SQUARED: f64 = 625.0 / 674.0;
/// |C B| / |B| = √337/5 / √2
const RATIO_SQUARED: f64 = 337.0 / 50.0;

fn worked(bench: &Bench) -> Inputs {
    let aligned = bench.one("aligned", SHAPE, &ALIGNED);
    let target = bench.adapter("target", &aligned, 2.0, &[(Q, 1, &B, &A)]);
    Inputs { aligned: Some(aligned), base: Some(bench.one("base", SHAPE, &BASE)), ..inputs(&target) }
}

fn tau(tau: f64) -> Settings {
    Settings { tau: Some(tau), ..Settings::default() }
}

fn variant(name: &str, settings: Settings) -> Settings {
    Settings { variant: Some(name.to_owned()), ..settings }
}

#[test]
fn module_below_tau_is_projected() {
    let bench = Bench::new();
    let report = bench.run("safelora", &tau(0.97), &worked(&bench)).unwrap();
    // W_a + 2 C B A = [1, 2; 3, 4] + 2 [9/5, 18/5; 16/5, 32/5]
    assert_close(&bench.out(), &[1.0 + 3.6, 2.0 + 7.2, 3.0 + 6.4, 4.0 + 12.8]);
    let q = module(&report, Q);
    assert_near(q.cosine, COSINE_SQUARED.sqrt());
    assert_near(q.norm_ratio, RATIO_SQUARED.sqrt());
    assert_eq!((q.action, q.changed, q.elements_changed), (Action::Projected, true, 4));
}

#[test]
fn module_above_tau_is_kept() {
    let bench = Bench::new();
    let report = bench.run("safelora", &tau(0.96), &worked(&bench)).unwrap();
    // W_a + 2 B A
    assert_eq!(bench.out(), [3.0, 6.0, 5.0, 8.0]);
    assert!(report.changed_nothing);
    let q = module(&report, Q);
    assert_near(q.cosine, COSINE_SQUARED.sqrt());
    assert_eq!((q.action, q.changed), (Action::Kept, false));
}

#[test]
fn dropped_module_is_the_aligned_one() {
    let bench = Bench::new();
    let report = bench.run("safelora", &variant("drop", tau(0.97)), &worked(&bench)).unwrap();
    assert_eq!(bench.out(), ALIGNED);
    assert_eq!(module(&report, Q).action, Action::Dropped);
    // |2 B A|² = 4 · 2 · 5
    assert!((report.change_norm - 40f64.sqrt()).abs() < 1e-12);
}

#[test]
fn orthonormal_projector_keeps_the_scale_of_what_it_keeps() {
    let bench = Bench::new();
    let settings = Settings { rank: Some(1), ..variant("orthonormal", tau(0.75)) };
    let report = bench.run("safelora", &settings, &worked(&bench)).unwrap();
    // The first left singular vector of diag(3, 4) is (0, 1): C B = (0, 1), cosine and ratio 1/√2.
    assert_close(&bench.out(), &[1.0, 2.0, 3.0 + 2.0, 4.0 + 4.0]);
    let q = module(&report, Q);
    assert_near(q.cosine, 0.5f64.sqrt());
    assert_near(q.norm_ratio, 0.5f64.sqrt());
    // With every direction it projects onto everything.
    fs::remove_dir_all(bench.path("out")).unwrap();
    let settings = Settings { rank: Some(2), ..settings };
    let settings = Settings { tau: Some(1.0), ..settings };
    let report = bench.run("safelora", &settings, &worked(&bench)).unwrap();
    assert_near(module(&report, Q).norm_ratio, 1.0);
    assert_close(&bench.out(), &[3.0, 6.0, 5.0, 8.0]);
}

#[test]
fn step_that_is_a_multiple_of_the_identity_only_scales() {
    for step in [0.5f32, 3.0] {
        let bench = Bench::new();
        let aligned = bench.one("aligned", SHAPE, &ALIGNED);
        let base = [ALIGNED[0] - step, ALIGNED[1], ALIGNED[2], ALIGNED[3] - step];
        let target = bench.adapter("target", &aligned, 1.0, &[(Q, 1, &B, &A)]);
        let base = bench.one("base", SHAPE, &base);
        let inputs = Inputs { aligned: Some(aligned), base: Some(base), ..inputs(&target) };
        let report = bench.run("safelora", &tau(1.0), &inputs).unwrap();
        // V = c I: C = c² I / (c √2), so an update becomes c/√2 of itself: smaller for a small step, larger for a large one.
        let scale = f64::from(step) / 2f64.sqrt();
        let q = module(&report, Q);
        assert_near(q.cosine, 1.0);
        assert_near(q.norm_ratio, scale);
        assert_close(&bench.out(), &[1.0 + scale, 2.0 + 2.0 * scale, 3.0 + scale, 4.0 + 2.0 * scale]);
    }
}

/// Rank 3 of 7 x 5, everything dense and in f64.
#[test]
fn factors_agree_with_dense_matrices() {
    let bench = Bench::new();
    let (out, into, rank) = (7, 5, 3);
    let shape = [out as u64, into as u64];
    let (aligned, base) = (noise(out * into, 1), noise(out * into, 2));
    let (b, a) = (noise(out * rank, 3), noise(rank * into, 4));
    let aligned_dir = bench.one("aligned", shape, &aligned);
    let target = bench.adapter("target", &aligned_dir, 6.0, &[(Q, rank as u64, &b, &a)]);
    let base_dir = bench.one("base", shape, &base);
    let inputs = Inputs { aligned: Some(aligned_dir), base: Some(base_dir), ..inputs(&target) };
    let report = bench.run("safelora", &tau(1.0), &inputs).unwrap();

    let v: Vec<f64> = aligned.iter().zip(&base).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
    let transposed: Vec<f64> = (0..into * out).map(|at| v[at % out * into + at / out]).collect();
    let norm = dot(&v, &v).sqrt();
    let c: Vec<f64> = product(&v, &transposed, out, into, out).iter().map(|x| x / norm).collect();
    let update = product(&wide(&b), &wide(&a), out, rank, into);
    let seen = product(&c, &update, out, out, into);
    let q = module(&report, Q);
    assert_near(q.cosine, dot(&seen, &update) / dot(&seen, &seen).sqrt() / dot(&update, &update).sqrt());
    assert_near(q.norm_ratio, dot(&seen, &seen).sqrt() / dot(&update, &update).sqrt());
    let want: Vec<f64> = aligned.iter().zip(&seen).map(|(&a, s)| f64::from(a) + 2.0 * s).collect();
    assert_close(&bench.out(), &want);

    // The same target as a whole model: its update is the dense difference.
    let whole: Vec<f32> =
        aligned.iter().zip(&update).map(|(&a, u)| (f64::from(a) + 2.0 * u) as f32).collect();
    let inputs = Inputs { target: bench.one("whole", shape, &whole), ..inputs };
    let dense = bench.run_as("safelora", &tau(1.0), &inputs, Form::Merged, "dense").unwrap();
    assert_near(module(&dense, Q).cosine, q.cosine.unwrap());
    assert_near(module(&dense, Q).norm_ratio, q.norm_ratio.unwrap());
    assert_close(&bench.values("dense", &weight(Q)), &want);
    // And through the first two directions, whichever of the two it is given as.
    let settings = Settings { rank: Some(2), ..variant("orthonormal", tau(1.0)) };
    let from_whole = bench.run_as("safelora", &settings, &inputs, Form::Merged, "a").unwrap();
    let inputs = Inputs { target, ..inputs };
    let from_adapter = bench.run_as("safelora", &settings, &inputs, Form::Merged, "b").unwrap();
    assert_near(module(&from_whole, Q).cosine, module(&from_adapter, Q).cosine.unwrap());
    assert_close(&bench.values("a", &weight(Q)), &wide(&bench.values("b", &weight(Q))));
    // A projector: the cosine is the share of the norm that it keeps.
    assert_near(module(&from_whole, Q).cosine, module(&from_whole, Q).norm_ratio.unwrap());
}

/// Three modules with V = diag(3, 4) and B = (1, x): cos = (9 + 16 x²) / (√(81 + 256 x²) √(1 + x²)).
fn three(bench: &Bench) -> (Inputs, [(&'static str, f64); 3]) {
    let modules = [(Q, 1.0f32), (K, 0.25), (V, 0.5)];
    let model = |name: &str, values: &[f32]| {
        let mut tensors: Vec<_> =
            modules.iter().map(|(module, _)| named(&weight(module), &SHAPE, values)).collect();
        tensors.push(named(NORM, &[2], &[1.0, 1.0]));
        tensors.push(named(EMBED, &[2, 2], &ALIGNED));
        bench.model(name, checkpoint::Dtype::F32, &tensors)
    };
    let aligned = model("aligned", &ALIGNED);
    let bs = modules.map(|(_, x)| [1.0, x]);
    let lora: Vec<_> = modules.iter().zip(&bs).map(|((module, _), b)| (*module, 1, &b[..], &A[..])).collect();
    let target = bench.adapter("target", &aligned, 1.0, &lora);
    let inputs = Inputs { aligned: Some(aligned), base: Some(model("base", &BASE)), ..inputs(&target) };
    let cosines = modules.map(|(module, x)| {
        let x2 = f64::from(x) * f64::from(x);
        (module, (9.0 + 16.0 * x2) / ((81.0 + 256.0 * x2) * (1.0 + x2)).sqrt())
    });
    (inputs, cosines)
}

#[test]
fn smallest_cosines_are_projected() {
    let bench = Bench::new();
    let (inputs, mut cosines) = three(&bench);
    cosines.sort_by(|a, b| a.1.total_cmp(&b.1));
    for count in 1..=4 {
        let settings = Settings { modules: Some(count), ..Settings::default() };
        let report =
            bench.run_as("safelora", &settings, &inputs, Form::Merged, &format!("out{count}")).unwrap();
        for (place, (name, cosine)) in cosines.iter().enumerate() {
            assert_near(module(&report, name).cosine, *cosine);
            let want = if place < count { Action::Projected } else { Action::Kept };
            assert_eq!(module(&report, name).action, want, "{name} of {count}");
        }
        let projected = count.min(3) as u64;
        assert_eq!((report.tensors.changed, report.tensors.kept), (projected, 5 - projected));
    }
}

#[test]
fn adapter_and_merged_model_are_the_same() {
    let bench = Bench::new();
    let (inputs, _) = three(&bench);
    let settings = Settings { modules: Some(2), ..Settings::default() };
    let report = bench.run_as("safelora", &settings, &inputs, Form::Both, "out").unwrap();
    assert_eq!(report.outputs, [bench.path("out/merged"), bench.path("out/adapter")]);
    for name in [Q, K, V] {
        let (merged, adapter) =
            (bench.values("out/merged", &weight(name)), bench.values("out/adapter", &weight(name)));
        assert_eq!(merged, adapter, "{name}");
    }
    // What was kept has its bytes, what was made is f32, and the config says where the base is.
    let open = |dir: &str| Checkpoint::open(&bench.path(dir), None).unwrap();
    let (before, after) = (open("target"), open("out/adapter"));
    for info in before.adapter().unwrap().shards().tensors() {
        let found = after.adapter().unwrap().shards().get(&info.name).unwrap();
        let read = |model: &Checkpoint, info| model.adapter().unwrap().shards().read(info).unwrap();
        let kept = report
            .modules
            .iter()
            .any(|module| module.action == Action::Kept && info.name.contains(&module.name));
        let same = read(&before, info) == read(&after, found);
        assert_eq!(same, kept || info.name.ends_with("lora_A.weight"), "{}", info.name);
    }
    assert_eq!(after.base_dir(), bench.path("aligned").canonicalize().unwrap());
    assert_eq!(after.adapter().unwrap().config().lora_alpha, 1.0);
}

#[test]
fn adapter_alone_says_what_changed_in_it() {
    let bench = Bench::new();
    let report = bench.run_as("safelora", &tau(0.97), &worked(&bench), Form::Adapter, "out").unwrap();
    assert_close(&bench.out(), &[1.0 + 3.6, 2.0 + 7.2, 3.0 + 6.4, 4.0 + 12.8]);
    let q = module(&report, Q);
    assert_eq!((q.changed, q.elements_changed), (true, 2));
    assert_eq!((report.tensors.changed, report.tensors.kept), (1, 1));
    // 2 (C − 1) B A = 2 [4/5, 8/5; 11/5, 22/5]: squared 4 · 5 · (16 + 121) / 25
    assert_near(Some(report.change_norm), (4.0 * 5.0 * 137.0 / 25.0f64).sqrt());
}

#[test]
fn module_that_alignment_did_not_touch_is_kept() {
    let bench = Bench::new();
    let model = |name: &str, q: &[f32], k: &[f32]| {
        let tensors = [named(&weight(K), &SHAPE, k), named(&weight(Q), &SHAPE, q)];
        bench.model(name, checkpoint::Dtype::F32, &tensors)
    };
    let aligned = model("aligned", &ALIGNED, &ALIGNED);
    let target = bench.adapter("target", &aligned, 1.0, &[(K, 1, &B, &A), (Q, 1, &[0.0, 0.0], &A)]);
    let base = model("base", &BASE, &ALIGNED);
    let inputs = Inputs { aligned: Some(aligned), base: Some(base), ..inputs(&target) };
    let report = bench.run("safelora", &tau(1.0), &inputs).unwrap();
    // V of the one is zero, and the update of the other.
    for name in [K, Q] {
        assert_eq!((module(&report, name).action, module(&report, name).cosine), (Action::Kept, None));
    }
    assert!(report.changed_nothing);
}
