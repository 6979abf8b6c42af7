//! Two folders in, a gene out.

use std::fs;
use std::path::Path;

use checkpoint::{CheckpointError, Dtype};
use gene::{Class, Gene, RestDelta};
use kernels::CpuEngine;
use stream::{Extract, ExtractReport, NoProgress, Progress, Ranks, StreamError, extract};
use tempfile::tempdir;

use crate::folders::{
    BIAS, BUFFER, DOWN, EMBED, FINAL, Lora, NORM, Q, Tensors, lora, model, moved, names, open, product, save,
    save_adapter, save_as, save_sharded, sumsq, usual,
};

fn job(aligned: &Path, degraded: &Path, out: &Path, rank: usize) -> Extract {
    Extract { seed: 1, ..Extract::new(open(aligned), open(degraded), Ranks::Fixed(rank), out) }
}

fn run(aligned: &Path, degraded: &Path, out: &Path, rank: usize) -> Result<ExtractReport, StreamError> {
    extract(&CpuEngine::new(), &job(aligned, degraded, out, rank), &NoProgress)
}

/// The exact difference of a tensor of two models.
pub(crate) fn delta(aligned: &Tensors, degraded: &Tensors, name: &str) -> Vec<f64> {
    aligned[name].1.iter().zip(&degraded[name].1).map(|(a, d)| f64::from(*a) - f64::from(*d)).collect()
}

/// Checks the factors and the certificate of a module against its difference; returns energy and what is missed.
#[track_caller]
pub(crate) fn check_module(gene: &Gene, weight: &str, delta: &[f64]) -> (f64, f64) {
    let name = weight.strip_suffix(".weight").unwrap();
    let module = gene.module(name).unwrap();
    let factors = gene.factors(name).unwrap();
    assert_eq!((module.class, factors.rank, factors.scale), (Class::LowRank, module.rank, 1.0), "{name}");
    let held = product(&factors.b, &factors.a, factors.rank);
    let missed: Vec<f64> = delta.iter().zip(&held).map(|(d, p)| d - p).collect();
    let (energy, missed) = (sumsq(delta), sumsq(&missed));
    // Differences of bf16 values are exact, and every sum is f64.
    assert!(
        (module.energy - energy).abs() <= 1e-12 * energy,
        "{name}: energy {} for {energy}",
        module.energy
    );
    let residual = missed / energy;
    // f32 roundings of the engine's rests add no more than 1e-6 of their sum.
    assert!(
        (module.residual - residual).abs() <= 1e-6 * residual,
        "{name}: {} for {residual}",
        module.residual
    );
    (energy, missed)
}

fn full(gene: &Gene, name: &str) -> Vec<f64> {
    match gene.rest_delta(name).unwrap() {
        RestDelta::Full(values) => values.iter().map(|&x| f64::from(x)).collect(),
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn dense_pair_puts_every_tensor_into_its_class() {
    let dir = tempdir().unwrap();
    let degraded = model();
    let aligned = usual(&degraded);
    let (a, d) = (dir.path().join("aligned"), dir.path().join("degraded"));
    save(&a, &aligned, Dtype::Bf16);
    save_sharded(&d, &degraded, Dtype::Bf16); // the layout does not count
    let out = dir.path().join("gene");
    let report = run(&a, &d, &out, 8).unwrap();

    let classes = [(Class::LowRank, 3), (Class::Full, 4), (Class::RowPatch, 1), (Class::Unchanged, 3)];
    assert_eq!(report.classes, classes.into());
    assert_eq!(report.classes.values().sum::<u64>(), aligned.len() as u64);
    assert!(!report.already && report.wall_s > 0.0);
    let bytes: u64 =
        [&a, &d].iter().flat_map(|dir| open(dir).tensors().to_vec()).map(|info| info.bytes).sum();
    assert_eq!(report.input_bytes, bytes);

    let gene = Gene::open(&out).unwrap();
    assert_eq!(gene.modules(), report.modules);
    let (mut energy, mut missed) = (0.0, 0.0);
    for name in [Q[0], Q[1], DOWN[0]] {
        let (e, m) = check_module(&gene, name, &delta(&aligned, &degraded, name));
        assert!(m > 0.0 && m < e);
        (energy, missed) = (energy + e, missed + m);
    }
    for name in [NORM[0], NORM[1], BIAS[1], FINAL] {
        let delta = delta(&aligned, &degraded, name);
        assert_eq!(full(&gene, name), delta, "{name}");
        energy += sumsq(&delta);
    }
    let embed = delta(&aligned, &degraded, EMBED);
    energy += sumsq(&embed);
    let RestDelta::Rows { rows, delta } = gene.rest_delta(EMBED).unwrap() else { panic!("no rows") };
    assert_eq!(rows, [3, 17]);
    let kept: Vec<f64> = delta.iter().map(|&x| f64::from(x)).collect();
    assert_eq!(kept, [&embed[3 * 48..4 * 48], &embed[17 * 48..18 * 48]].concat());
    let unchanged = gene.module(DOWN[1].strip_suffix(".weight").unwrap()).unwrap();
    assert_eq!((unchanged.class, unchanged.energy), (Class::Unchanged, 0.0));

    let captured = 1.0 - missed / energy;
    assert!((report.energy - energy).abs() <= 1e-12 * energy);
    assert!((report.captured - captured).abs() <= 1e-9, "{} for {captured}", report.captured);
    assert!(report.captured <= report.captured_upper_bound && report.captured_upper_bound < 1.0);
    assert!(report.noise_floor > 0.0 && report.noise_floor < 0.1, "{}", report.noise_floor);
    let manifest = gene.manifest();
    assert_eq!(manifest.sources.degraded.name, "degraded");
    assert_eq!(manifest.sources.aligned.content, open(&a).content().unwrap());
    assert_eq!(manifest.options["rank"], 8);
    assert_eq!(gene.layers(), [0, 1]);
}

#[test]
fn dense_pair_at_full_rank_holds_everything() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    save(&a, &usual(&model()), Dtype::Bf16);
    save(&d, &model(), Dtype::Bf16);
    let report = run(&a, &d, &dir.path().join("gene"), 64).unwrap();
    // The factors are f32.
    assert!(report.captured > 1.0 - 1e-12, "{}", report.captured);
    assert_eq!(report.modules.iter().map(|module| module.rank).max(), Some(48));
}

#[test]
fn gene_is_the_same_for_any_thread_count() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    save(&a, &usual(&model()), Dtype::Bf16);
    save(&d, &model(), Dtype::Bf16);
    let on = |threads: usize| {
        let out = dir.path().join(format!("gene-{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&a, &d, &out, 8).unwrap());
        Gene::open(&out).unwrap().content().to_owned()
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(7));
}

#[test]
fn buffers_are_left_out_and_their_energy_is_missed() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    let aligned = moved(&model(), &[NORM[0], BUFFER]);
    save(&a, &aligned, Dtype::Bf16);
    save(&d, &model(), Dtype::Bf16);
    let report = run(&a, &d, &dir.path().join("gene"), 8).unwrap();
    assert_eq!((report.classes[&Class::LeftOut], report.classes[&Class::Full]), (1, 1));
    let (kept, lost) =
        (sumsq(&delta(&aligned, &model(), NORM[0])), sumsq(&delta(&aligned, &model(), BUFFER)));
    assert!((report.captured - kept / (kept + lost)).abs() < 1e-12);
}

#[test]
fn embedding_of_which_every_row_changed_is_kept_whole() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    let aligned = moved(&model(), &[EMBED]);
    save(&a, &aligned, Dtype::Bf16);
    save(&d, &model(), Dtype::Bf16);
    let out = dir.path().join("gene");
    run(&a, &d, &out, 8).unwrap();
    assert_eq!(full(&Gene::open(&out).unwrap(), EMBED), delta(&aligned, &model(), EMBED));
}

/// A model whose embedding has other rows.
fn resized(rows: usize) -> Tensors {
    let mut model = model();
    let embed = model.get_mut(EMBED).unwrap();
    embed.0[0] = rows as u64;
    embed.1.resize(rows * 48, 0.5);
    model
}

#[test]
fn embedding_with_more_rows_keeps_the_new_ones_whole() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    let mut aligned = resized(32);
    aligned.get_mut(EMBED).unwrap().1[5 * 48] += 1.0;
    save(&a, &aligned, Dtype::Bf16);
    save(&d, &model(), Dtype::Bf16);
    let out = dir.path().join("gene");
    let report = run(&a, &d, &out, 8).unwrap();
    let gene = Gene::open(&out).unwrap();
    let RestDelta::Rows { rows, delta } = gene.rest_delta(EMBED).unwrap() else { panic!("no rows") };
    assert_eq!(rows, [5, 30, 31]);
    assert_eq!(delta[48..], [0.5; 96]);
    assert_eq!(gene.manifest().extra["common_rows"][EMBED], 30);
    assert_eq!(report.energy, 1.0 + 96.0 * 0.25);
}

#[test]
fn embedding_with_fewer_rows_is_named() {
    let dir = tempdir().unwrap();
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    save(&a, &moved(&model(), &[NORM[0]]), Dtype::Bf16);
    save(&d, &resized(32), Dtype::Bf16);
    let report = run(&a, &d, &dir.path().join("gene"), 8).unwrap();
    assert_eq!((report.classes[&Class::LeftOut], report.classes[&Class::Full]), (1, 1));
}

fn loras(seed: u32) -> [Lora; 2] {
    [
        lora(seed, "model.layers.0.self_attn.q_proj", [41, 48], 4),
        lora(seed + 10, "model.layers.1.mlp.down_proj", [48, 57], 4),
    ]
}

/// `scale` times the product of an adapter's module.
fn scaled(factors: &Lora, scale: f64) -> Vec<f64> {
    product(&factors.b, &factors.a, factors.rank).iter().map(|x| x * scale).collect()
}

#[test]
fn adapters_over_one_base_are_subtracted_as_factors() {
    let dir = tempdir().unwrap();
    let base = save(&dir.path().join("base"), &model(), Dtype::Bf16);
    let (first, second) = (loras(1), loras(50));
    let a = save_adapter(&dir.path().join("a"), &base, &first, 8.0);
    // The same weights in another folder are the same base.
    let copy = save_sharded(&dir.path().join("copy"), &model(), Dtype::Bf16);
    let d = save_adapter(&dir.path().join("d"), &copy, &second[..1], 2.0);
    let out = dir.path().join("gene");
    let report = run(&a, &d, &out, 8).unwrap();
    assert_eq!(report.classes, [(Class::LowRank, 2), (Class::Unchanged, 9)].into());

    let gene = Gene::open(&out).unwrap();
    let subtrahend = scaled(&second[0], 0.5);
    let q: Vec<f64> = scaled(&first[0], 2.0).iter().zip(subtrahend).map(|(a, d)| a - d).collect();
    for (name, delta, rank) in [(Q[0], q, 8), (DOWN[1], scaled(&first[1], 2.0), 4)] {
        let name = name.strip_suffix(".weight").unwrap();
        let factors = gene.factors(name).unwrap();
        assert_eq!(factors.rank, rank);
        let held = product(&factors.b, &factors.a, rank);
        let missed: Vec<f64> = delta.iter().zip(held).map(|(d, p)| d - p).collect();
        // Rank 8 holds both adapters; the factors are rounded to f32 once. A difference of the merged f32 weights
        // would miss 1e-9 of it: weights of 1 carry 6e-8, the difference is of size 0.01.
        assert!(sumsq(&missed) <= 1e-13 * sumsq(&delta), "{}", sumsq(&missed) / sumsq(&delta));
        let module = gene.module(name).unwrap();
        assert!((module.energy - sumsq(&delta)).abs() <= 1e-12 * sumsq(&delta));
        assert_eq!(module.noise_floor, 0.0);
    }
    assert!(report.captured > 1.0 - 1e-12 && report.captured_upper_bound == 1.0);
}

#[test]
fn adapter_against_its_own_base() {
    let dir = tempdir().unwrap();
    let base = save(&dir.path().join("base"), &model(), Dtype::Bf16);
    let factors = loras(1);
    let a = save_adapter(&dir.path().join("a"), &base, &factors, 8.0);
    let out = dir.path().join("gene");
    let report = run(&base, &a, &out, 2).unwrap();
    assert_eq!(report.classes, [(Class::LowRank, 2), (Class::Unchanged, 9)].into());
    let gene = Gene::open(&out).unwrap();
    for (name, factors) in [(Q[0], &factors[0]), (DOWN[1], &factors[1])] {
        let (energy, missed) = check_module(&gene, name, &scaled(factors, -2.0));
        assert!(missed > 0.01 * energy, "rank 2 of 4 cannot hold it all");
    }
    assert!(report.captured <= report.captured_upper_bound && report.captured_upper_bound < 1.0);
}

#[test]
fn adapter_over_a_base_that_differs() {
    let dir = tempdir().unwrap();
    let degraded = model();
    let base = usual(&degraded);
    let base_dir = save(&dir.path().join("base"), &base, Dtype::Bf16);
    let factors = loras(1);
    let a = save_adapter(&dir.path().join("a"), &base_dir, &factors, 4.0);
    let d = save(&dir.path().join("d"), &degraded, Dtype::Bf16);
    let out = dir.path().join("gene");
    let report = run(&a, &d, &out, 16).unwrap();
    assert_eq!(report.classes[&Class::LowRank], 4);
    let gene = Gene::open(&out).unwrap();
    for (name, factors) in [(Q[0], &factors[0]), (DOWN[1], &factors[1])] {
        let added = scaled(factors, 1.0);
        let delta: Vec<f64> = delta(&base, &degraded, name).iter().zip(added).map(|(d, p)| d + p).collect();
        let module = gene.module(name.strip_suffix(".weight").unwrap()).unwrap();
        // Adapted weights are f32 sums of numbers up to 1: half an epsilon of 1 beside differences of about 0.02.
        let slack = f64::from(f32::EPSILON) / 0.02;
        assert!((module.energy / sumsq(&delta) - 1.0).abs() <= 2.0 * slack, "{name}");
    }
    check_module(&gene, DOWN[0], &self::delta(&base, &degraded, DOWN[0]));
}

#[test]
fn equal_models_are_an_error_whatever_their_dtype_and_layout() {
    let dir = tempdir().unwrap();
    let a = save(&dir.path().join("a"), &model(), Dtype::Bf16);
    let d = save_sharded(&dir.path().join("d"), &model(), Dtype::F32);
    let fresh = Lora { b: vec![0.0; 41 * 4], ..lora(1, "model.layers.0.self_attn.q_proj", [41, 48], 4) };
    let adapter = save_adapter(&dir.path().join("adapter"), &a, &[fresh], 8.0);
    for other in [&d, &adapter] {
        let error = run(&a, other, &dir.path().join("gene"), 8).unwrap_err();
        assert!(matches!(error, StreamError::NothingDiffers { .. }), "{error}");
    }
    assert_eq!(names(dir.path()), ["a", "adapter", "d"]);
}

/// Extracts and expects an error and no output; only a tensor refused midway leaves unfinished work.
#[track_caller]
fn refused(aligned: &Path, degraded: &Path) -> StreamError {
    let out = aligned.parent().unwrap().join("gene");
    let before = names(aligned.parent().unwrap());
    let error = run(aligned, degraded, &out, 8).unwrap_err();
    if matches!(error, StreamError::NonFinite { .. }) {
        fs::remove_dir_all(aligned.parent().unwrap().join("gene.partial")).unwrap();
    }
    assert_eq!(names(aligned.parent().unwrap()), before);
    error
}

#[test]
fn other_architectures_shapes_and_tensors_are_refused() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let good = save(&path("good"), &usual(&model()), Dtype::Bf16);
    let other_type = save_as(&path("type"), &model(), Dtype::Bf16, "llama", 2);
    let other_depth = save_as(&path("depth"), &model(), Dtype::Bf16, "qwen2", 3);
    for other in [other_type, other_depth] {
        assert!(matches!(refused(&good, &other), StreamError::OtherArchitecture { .. }));
    }
    let mut model = model();
    let norm = model.remove(NORM[1]).unwrap();
    let fewer = save(&path("fewer"), &model, Dtype::Bf16);
    for (a, d) in [(&good, &fewer), (&fewer, &good)] {
        let error = refused(a, d);
        assert!(matches!(&error, StreamError::OneSided { tensor, .. } if tensor == NORM[1]), "{error}");
    }
    model.insert(NORM[1].into(), (vec![6, 8], norm.1));
    let reshaped = save(&path("reshaped"), &model, Dtype::Bf16);
    let error = refused(&good, &reshaped);
    assert!(matches!(&error, StreamError::OtherShape { tensor, .. } if tensor == NORM[1]), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name_file_and_index() {
    let dir = tempdir().unwrap();
    let good = save(&dir.path().join("good"), &usual(&model()), Dtype::Bf16);
    for (i, name) in [Q[1], NORM[0], EMBED, BIAS[0]].iter().enumerate() {
        let mut bad = model();
        bad.get_mut(*name).unwrap().1[7] = if i % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY };
        let bad = save(&dir.path().join("bad"), &bad, Dtype::Bf16);
        for (a, d) in [(&good, &bad), (&bad, &good)] {
            let StreamError::NonFinite { tensor, file, index } = refused(a, d) else { panic!("{name}") };
            assert_eq!((tensor.as_str(), index), (*name, 7));
            assert_eq!(file, bad.join("model.safetensors"));
        }
    }
}

#[test]
fn weights_that_cancel_are_still_looked_at() {
    let dir = tempdir().unwrap();
    let mut base = model();
    base.get_mut(DOWN[0]).unwrap().1[11] = f32::INFINITY;
    let base = save(&dir.path().join("base"), &base, Dtype::Bf16);
    let a = save_adapter(&dir.path().join("a"), &base, &loras(1), 8.0);
    let error = refused(&a, &base);
    assert!(
        matches!(&error, StreamError::NonFinite { tensor, index: 11, .. } if tensor == DOWN[0]),
        "{error}"
    );
}

#[test]
fn formats_that_need_scales_are_refused() {
    let dir = tempdir().unwrap();
    let good = save(&dir.path().join("good"), &model(), Dtype::Bf16);
    let bad = save(&dir.path().join("bad"), &model(), Dtype::Bf16);
    let tensors = [((Q[0].to_owned(), Dtype::F8E4M3, vec![41, 48]), vec![0u8; 41 * 48])];
    for dir in [&good, &bad] {
        // Equal on both sides, and refused all the same: its values depend on scales in another tensor.
        let bytes = checkpoint::safetensors_bytes(&checkpoint::default_metadata(), &tensors).unwrap();
        fs::write(dir.join("model.safetensors"), bytes).unwrap();
    }
    let error = refused(&good, &bad);
    assert!(matches!(error, StreamError::Checkpoint(CheckpointError::Scale { .. })), "{error}");
}

#[test]
fn finished_output_is_left_as_it_is_and_another_is_refused() {
    let dir = tempdir().unwrap();
    let a = save(&dir.path().join("a"), &usual(&model()), Dtype::Bf16);
    let d = save(&dir.path().join("d"), &model(), Dtype::Bf16);
    let out = dir.path().join("gene");
    let first = run(&a, &d, &out, 8).unwrap();
    let written = fs::metadata(out.join("gene.json")).unwrap().modified().unwrap();

    let again = run(&a, &d, &out, 8).unwrap();
    assert!(again.already && !first.already);
    assert_eq!(
        (again.energy, again.captured, &again.modules),
        (first.energy, first.captured, &first.modules)
    );
    assert_eq!(fs::metadata(out.join("gene.json")).unwrap().modified().unwrap(), written);

    let other = save(&dir.path().join("other"), &moved(&model(), &[Q[0]]), Dtype::Bf16);
    for error in [run(&a, &d, &out, 4).unwrap_err(), run(&other, &d, &out, 8).unwrap_err()] {
        assert!(
            matches!(error, StreamError::Checkpoint(CheckpointError::OutputExists { .. }))
                || gene_exists(&error)
        );
    }
    assert_eq!(Gene::open(&out).unwrap().manifest().options["rank"], 8);
    let forced = Extract { force: true, ..job(&a, &d, &out, 4) };
    assert!(!extract(&CpuEngine::new(), &forced, &NoProgress).unwrap().already);
    assert_eq!(Gene::open(&out).unwrap().manifest().options["rank"], 4);
}

fn gene_exists(error: &StreamError) -> bool {
    use gene::GeneError;
    matches!(error, StreamError::Gene(GeneError::Checkpoint(CheckpointError::OutputExists { .. })))
}

#[test]
fn progress_adds_up_to_what_was_announced() {
    #[derive(Default)]
    struct Meter(std::sync::Mutex<(u64, u64, usize)>);
    impl Progress for Meter {
        fn stage(&self, _: &str, total_bytes: u64) {
            self.0.lock().unwrap().0 += total_bytes;
        }
        fn advance(&self, bytes: u64, _: &str) {
            let mut meter = self.0.lock().unwrap();
            meter.1 += bytes;
            meter.2 += 1;
        }
    }
    let dir = tempdir().unwrap();
    let a = save(&dir.path().join("a"), &usual(&model()), Dtype::Bf16);
    let d = save(&dir.path().join("d"), &model(), Dtype::Bf16);
    let meter = Meter::default();
    let report = extract(&CpuEngine::new(), &job(&a, &d, &dir.path().join("gene"), 8), &meter).unwrap();
    assert_eq!(*meter.0.lock().unwrap(), (report.input_bytes, report.input_bytes, model().len()));
}
