//! A gene into a target.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{CheckpointError, Dtype};
use gene::{Gene, GeneError};
use kernels::CpuEngine;
use stream::{
    Assembled, Expressed, Extract, Form, Fuse, FuseReport, NoProgress, Progress, Ranks, StreamError, Worker,
    assemble, extract, fuse,
};
use tempfile::{TempDir, tempdir};

use crate::folders::{
    BIAS, DOWN, EMBED, FINAL, NORM, Q, Tensors, lora, model, names, open, product, save, save_adapter,
    save_as, save_sharded, to_bf16, usual,
};

/// An aligned and a degraded model, and the gene between them.
struct Setup {
    dir: TempDir,
    aligned: Tensors,
    degraded: Tensors,
    target: PathBuf,
    gene: PathBuf,
}

fn setup(aligned: Tensors, degraded: Tensors, rank: usize) -> Setup {
    let dir = tempdir().unwrap();
    let a = save(&dir.path().join("a"), &aligned, Dtype::Bf16);
    let target = save_sharded(&dir.path().join("d"), &degraded, Dtype::Bf16);
    let gene = dir.path().join("gene");
    let job = Extract { seed: 1, ..Extract::new(open(&a), open(&target), Ranks::Fixed(rank), &gene) };
    extract(&CpuEngine::new(), &job, &NoProgress).unwrap();
    Setup { dir, aligned, degraded, target, gene }
}

/// Linear modules only, so that an adapter can hold it all.
fn linear_only(model: &Tensors) -> Tensors {
    crate::folders::moved(model, &[Q[0], Q[1], DOWN[0]])
}

impl Setup {
    fn job(&self, name: &str, form: Form) -> Fuse {
        let gene = Gene::open(&self.gene).unwrap();
        let coefficients = [(0, 1.0), (1, 1.0)].into();
        Fuse { form, ..Fuse::new(gene, coefficients, open(&self.target), &self.dir.path().join(name)) }
    }

    /// Expects an error and no trace of an output.
    #[track_caller]
    fn refused(&self, job: &Fuse) -> StreamError {
        let before = names(self.dir.path());
        let error = run(job).unwrap_err();
        assert_eq!(names(self.dir.path()), before);
        error
    }
}

fn run(job: &Fuse) -> Result<FuseReport, StreamError> {
    fuse(&CpuEngine::new(), job, &NoProgress)
}

fn read(dir: &Path, name: &str) -> Vec<f32> {
    open(dir).read_f32(name).unwrap()
}

/// Half a unit in the last place of a bf16 of this size.
fn half_ulp(x: f64) -> f64 {
    2.0f64.powi(x.abs().log2().floor().max(-126.0) as i32 - 8)
}

#[test]
fn merged_into_the_degraded_model_is_the_aligned_one_but_for_the_residual() {
    let setup = setup(usual(&model()), model(), 8);
    let job = setup.job("merged", Form::Merged);
    let report = run(&job).unwrap();
    for name in [Q[0], Q[1], DOWN[0]] {
        let factors = job.genes[0].gene.factors(name.strip_suffix(".weight").unwrap()).unwrap();
        let product = product(&factors.b, &factors.a, factors.rank);
        for (i, got) in read(&job.out, name).into_iter().enumerate() {
            let want = f64::from(setup.degraded[name].1[i]) + product[i];
            // One rounding to bf16, of a sum in f32 of numbers up to 2.
            let bound = half_ulp(want) + 4.0 * f64::from(f32::EPSILON);
            assert!((f64::from(got) - want).abs() <= bound, "{name} {i}: {got} for {want}");
        }
    }
    for name in [NORM[0], NORM[1], BIAS[0], BIAS[1], DOWN[1]] {
        assert_eq!(read(&job.out, name), setup.aligned[name].1, "{name}");
    }
    // What belongs to no layer is not touched unasked.
    for name in [EMBED, FINAL] {
        assert_eq!(read(&job.out, name), setup.degraded[name].1, "{name}");
    }
    assert_eq!((report.tensors_changed, report.outputs.len(), report.already), (6, 1, false));
    assert!(report.elements_changed > 4000 && report.intended_sumsq > 0.0 && report.realised_sumsq > 0.0);
}

#[test]
fn merged_at_full_rank_is_the_aligned_model() {
    let setup = setup(usual(&model()), model(), 64);
    let mut job = setup.job("merged", Form::Merged);
    job.outside = Some(1.0);
    run(&job).unwrap();
    // The factors miss 1e-7 of the difference, far less than half a unit: rounding lands on the aligned value.
    for (name, (_, want)) in &setup.aligned {
        assert_eq!(&read(&job.out, name), want, "{name}");
    }
}

#[test]
fn merged_folder_keeps_layout_dtypes_and_support_files() {
    let setup = setup(usual(&model()), model(), 8);
    let job = setup.job("merged", Form::Merged);
    run(&job).unwrap();
    let mut want = names(&setup.target);
    want.push("safegene.json".into());
    want.sort();
    assert_eq!(names(&job.out), want);
    let (before, after) = (open(&setup.target), open(&job.out));
    let place = |info: &checkpoint::TensorInfo| {
        (
            info.name.clone(),
            info.dtype,
            info.shape.clone(),
            info.file.file_name().unwrap().to_owned(),
            info.offset,
        )
    };
    let places = |c: &checkpoint::Checkpoint| c.tensors().iter().map(place).collect::<Vec<_>>();
    assert_eq!(places(&before), places(&after));
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(job.out.join("safegene.json")).unwrap()).unwrap();
    assert_eq!(record["genes"][0]["gene"], job.genes[0].gene.content());
    assert_eq!(record["target"], before.content().unwrap());
    assert_eq!(record["genes"][0]["coefficients"]["1"], 1.0);
}

#[test]
fn coefficients_scale_a_layer_and_its_rest() {
    let setup = setup(usual(&model()), model(), 64);
    let mut job = setup.job("merged", Form::Merged);
    job.genes[0].coefficients = [(0, 0.5)].into();
    job.outside = Some(2.0);
    run(&job).unwrap();
    for name in [NORM[0], FINAL, EMBED] {
        let c = if name == NORM[0] { 0.5 } else { 2.0 };
        let sides = setup.degraded[name].1.iter().zip(&setup.aligned[name].1);
        // The difference is exact, and so is its product with a power of two: one f32 sum, one rounding.
        let want: Vec<f32> = sides.map(|(d, a)| to_bf16(d + c * (a - d))).collect();
        assert_eq!(read(&job.out, name), want, "{name}");
    }
    for (i, got) in read(&job.out, Q[0]).into_iter().enumerate() {
        let (a, d) = (f64::from(setup.aligned[Q[0]].1[i]), f64::from(setup.degraded[Q[0]].1[i]));
        let want = d + 0.5 * (a - d);
        assert!((f64::from(got) - want).abs() <= half_ulp(want) + 4.0 * f64::from(f32::EPSILON), "{i}");
    }
    for name in [Q[1], NORM[1], BIAS[1], DOWN[1]] {
        assert_eq!(read(&job.out, name), setup.degraded[name].1, "{name}");
    }
}

#[test]
fn adapter_and_merged_are_the_same_model() {
    let setup = setup(linear_only(&model()), model(), 8);
    let mut job = setup.job("both", Form::Both);
    job.genes[0].coefficients = [(0, 0.7), (1, 1.3)].into();
    let report = run(&job).unwrap();
    assert_eq!(report.outputs, [job.out.join("merged"), job.out.join("adapter")]);
    assert_eq!(report.adapter_modules, 3);
    let adapter = open(&job.out.join("adapter"));
    assert_eq!(adapter.base_dir().canonicalize().unwrap(), setup.target.canonicalize().unwrap());
    for (name, (_, before)) in &setup.degraded {
        let (merged, adapted) = (read(&job.out.join("merged"), name), adapter.read_f32(name).unwrap());
        for (i, (m, a)) in merged.iter().zip(&adapted).enumerate() {
            // The adapter's sum is f32, in another order; the merged one is rounded to bf16.
            let (m, a) = (f64::from(*m), f64::from(*a));
            assert!((m - a).abs() <= half_ulp(a) + 8.0 * f64::from(f32::EPSILON), "{name} {i}: {m} and {a}");
        }
        let changes = [Q[0], Q[1], DOWN[0]].contains(&name.as_str());
        assert_eq!(&adapted != before, changes, "{name}");
    }
}

#[test]
fn adapter_target_gets_base_adapter_and_gene_in_one_rounding() {
    let mut setup = setup(linear_only(&model()), model(), 8);
    let loras = [
        lora(1, "model.layers.0.self_attn.q_proj", [41, 48], 4),
        lora(11, "model.layers.1.mlp.down_proj", [48, 57], 4),
    ];
    let base = setup.target.clone();
    setup.target = save_adapter(&setup.dir.path().join("target"), &base, &loras, 8.0);
    let job = setup.job("both", Form::Both);
    let report = run(&job).unwrap();
    assert_eq!((report.tensors_changed, report.adapter_modules), (3, 4));
    let adapter = open(&job.out.join("adapter"));
    assert_eq!(adapter.base_dir().canonicalize().unwrap(), base.canonicalize().unwrap());
    let mut rank_of = BTreeMap::new();
    for (name, (_, before)) in &setup.degraded {
        let mut want: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        let module = name.strip_suffix(".weight").unwrap_or_default();
        let mut rank = 0;
        for lora in loras.iter().filter(|lora| lora.module == module) {
            want.iter_mut().zip(product(&lora.b, &lora.a, 4)).for_each(|(w, p)| *w += 2.0 * p);
            rank += 4;
        }
        if let Ok(f) = job.genes[0].gene.factors(module) {
            want.iter_mut().zip(product(&f.b, &f.a, f.rank)).for_each(|(w, p)| *w += p);
            rank += f.rank;
        }
        if rank > 0 {
            rank_of.insert(module.to_owned(), rank);
        }
        let (merged, adapted) = (read(&job.out.join("merged"), name), adapter.read_f32(name).unwrap());
        for (i, &want) in want.iter().enumerate() {
            let f32_sums = 8.0 * f64::from(f32::EPSILON);
            assert!((f64::from(adapted[i]) - want).abs() <= f32_sums, "{name} {i}");
            let bound = if rank > 0 { half_ulp(want) + f32_sums } else { 0.0 };
            assert!((f64::from(merged[i]) - want).abs() <= bound, "{name} {i}");
        }
    }
    let ranks: BTreeMap<String, usize> =
        adapter.adapter().unwrap().modules().iter().map(|(name, m)| (name.clone(), m.rank)).collect();
    assert_eq!(ranks, rank_of);
}

#[test]
fn adapter_target_with_rest_where_the_adapter_works_too() {
    // An exact difference of an embedding that an adapter changes as well: both in one sum.
    let mut setup = setup(usual(&model()), model(), 8);
    let factors = lora(21, "model.embed_tokens", [30, 48], 4);
    let product = product(&factors.b, &factors.a, 4);
    let base = setup.target.clone();
    setup.target = save_adapter(&setup.dir.path().join("target"), &base, &[factors], 4.0);
    let mut job = setup.job("merged", Form::Merged);
    job.outside = Some(1.0);
    run(&job).unwrap();
    for (i, got) in read(&job.out, EMBED).into_iter().enumerate() {
        let want = f64::from(setup.aligned[EMBED].1[i]) + product[i];
        let bound = half_ulp(want) + 4.0 * f64::from(f32::EPSILON);
        assert!((f64::from(got) - want).abs() <= bound, "{i}: {got} for {want}");
    }
}

#[test]
fn rest_in_an_adapter_is_an_error_unless_dropped() {
    let setup = setup(usual(&model()), model(), 8);
    for form in [Form::Adapter, Form::Both] {
        let error = setup.refused(&setup.job("out", form));
        assert!(matches!(error, StreamError::RestInAdapter { count: 3, .. }), "{error}");
    }
    let mut job = setup.job("out", Form::Both);
    job.drop_rest = true;
    let report = run(&job).unwrap();
    assert_eq!(report.dropped, [NORM[0], NORM[1], BIAS[1]]);
    // Both forms are still one model.
    assert_eq!(read(&job.out.join("merged"), NORM[0]), setup.degraded[NORM[0]].1);
    assert_eq!(read(&job.out.join("adapter"), NORM[0]), setup.degraded[NORM[0]].1);
}

#[test]
fn rows_that_the_degraded_side_lacked_are_not_added() {
    let mut aligned = usual(&model());
    let embed = aligned.get_mut(EMBED).unwrap();
    embed.0[0] = 32;
    embed.1.resize(32 * 48, 0.5);
    let setup = setup(aligned, model(), 8);
    let mut job = setup.job("merged", Form::Merged);
    job.outside = Some(1.0);
    let report = run(&job).unwrap();
    assert_eq!(report.rows_not_added, 2);
    assert_eq!(read(&job.out, EMBED), setup.aligned[EMBED].1[..30 * 48]);
}

#[test]
fn saved_copy_of_an_adapter_target_in_another_format() {
    // A norm that the adapter saved in f32: merged into bf16 with the gene's difference, rounded once.
    let mut setup = setup(usual(&model()), model(), 8);
    let base = setup.target.clone();
    let dir = save_adapter(
        &setup.dir.path().join("target"),
        &base,
        &[lora(1, "model.layers.0.self_attn.q_proj", [41, 48], 4)],
        4.0,
    );
    let copy: Vec<f32> = crate::folders::noise(77, 48);
    let mut tensors: Vec<(checkpoint::TensorSpec, Vec<u8>)> = open(&dir)
        .adapter()
        .map(|adapter| {
            let shards = adapter.shards();
            let spec = |info: &checkpoint::TensorInfo| (info.name.clone(), info.dtype, info.shape.clone());
            shards.tensors().iter().map(|info| (spec(info), shards.read(info).unwrap())).collect()
        })
        .unwrap();
    let name = format!("base_model.model.{}", NORM[0]);
    tensors.push(((name, Dtype::F32, vec![48]), checkpoint::pack_f32(&copy, Dtype::F32).unwrap()));
    let bytes = checkpoint::safetensors_bytes(&checkpoint::default_metadata(), &tensors).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
    setup.target = dir;
    let job = setup.job("merged", Form::Merged);
    run(&job).unwrap();
    let change = setup.aligned[NORM[0]].1.iter().zip(&setup.degraded[NORM[0]].1).map(|(a, d)| a - d);
    let want: Vec<f32> = copy.iter().zip(change).map(|(x, change)| to_bf16(x + change)).collect();
    assert_eq!(read(&job.out, NORM[0]), want);
}

#[test]
fn finished_output_is_left_as_it_is_and_another_is_refused() {
    let setup = setup(linear_only(&model()), model(), 8);
    for form in [Form::Merged, Form::Adapter, Form::Both] {
        let name = format!("{form:?}");
        let first = run(&setup.job(&name, form)).unwrap();
        let again = run(&setup.job(&name, form)).unwrap();
        assert!(again.already && !first.already, "{form:?}");
        assert_eq!(again.outputs, first.outputs);
        assert_eq!(
            (again.elements_changed, again.adapter_modules),
            (first.elements_changed, first.adapter_modules)
        );
        let mut other = setup.job(&name, form);
        other.genes[0].coefficients = [(0, 1.0)].into();
        let error = setup.refused(&other);
        assert!(matches!(error, StreamError::Checkpoint(CheckpointError::OutputExists { .. })), "{error}");
        other.force = true;
        assert!(!run(&other).unwrap().already);
        assert!(run(&Fuse { force: false, ..other }).unwrap().already);
    }
}

#[test]
fn both_goes_into_no_folder_with_something_else() {
    let setup = setup(linear_only(&model()), model(), 8);
    let mut job = setup.job("both", Form::Both);
    job.out = setup.target.clone();
    let error = setup.refused(&job);
    assert!(matches!(error, StreamError::Checkpoint(CheckpointError::OutputExists { .. })), "{error}");
}

#[test]
fn fuse_that_changes_nothing_is_an_error() {
    let setup = setup(linear_only(&model()), model(), 8);
    // Far below half a unit of any bf16 weight here.
    let mut job = setup.job("out", Form::Merged);
    job.genes[0].coefficients = [(0, 1e-12), (1, 1e-12)].into();
    assert!(matches!(setup.refused(&job), StreamError::NothingChanged { .. }));
    // With every coefficient 0 nothing is expected to change.
    for (name, coefficients) in [("zero", [(0, 0.0), (1, 0.0)].into()), ("none", BTreeMap::new())] {
        let mut job = setup.job(name, Form::Merged);
        job.genes[0].coefficients = coefficients;
        let report = run(&job).unwrap();
        assert_eq!((report.elements_changed, report.tensors_changed), (0, 0));
        let content = |dir: &Path| open(dir).content().unwrap();
        assert_eq!(content(&job.out), content(&setup.target));
    }
}

#[test]
fn target_of_another_family_is_refused() {
    let mut setup = setup(linear_only(&model()), model(), 8);
    setup.target = save_as(&setup.dir.path().join("llama"), &model(), Dtype::Bf16, "llama", 2);
    for form in [Form::Merged, Form::Adapter] {
        let error = setup.refused(&setup.job("out", form));
        assert!(matches!(error, StreamError::Gene(GeneError::OtherFamily { .. })), "{error}");
    }
}

#[test]
fn coefficients_that_are_refused() {
    let setup = setup(linear_only(&model()), model(), 8);
    let with = |layer, value| {
        let mut job = setup.job("out", Form::Merged);
        job.genes[0].coefficients = [(layer, value)].into();
        job
    };
    let gene_error = |job: &Fuse| match setup.refused(job) {
        StreamError::Gene(error) => error,
        other => panic!("{other}"),
    };
    assert!(matches!(gene_error(&with(0, -0.5)), GeneError::NegativeCoefficient { layer: 0, .. }));
    assert!(matches!(gene_error(&with(0, f64::NAN)), GeneError::CoefficientRange { .. }));
    assert!(matches!(gene_error(&with(9, 1.0)), GeneError::UnknownLayer { layer: 9 }));
    for value in [-1.0, f32::NAN, f32::INFINITY] {
        let job = Fuse { outside: Some(value), ..setup.job("out", Form::Merged) };
        assert!(matches!(setup.refused(&job), StreamError::OutsideCoefficient { .. }));
    }
}

#[test]
fn target_that_is_not_finite_is_refused_even_where_nothing_is_added() {
    let mut setup = setup(linear_only(&model()), model(), 8);
    for name in [Q[0], EMBED] {
        let mut bad = model();
        bad.get_mut(name).unwrap().1[5] = f32::NAN;
        setup.target = save(&setup.dir.path().join("bad"), &bad, Dtype::Bf16);
        // What was finished before stays for a rerun, as after any interruption.
        let error = run(&setup.job("out", Form::Merged)).unwrap_err();
        assert!(!setup.dir.path().join("out").exists());
        assert!(
            matches!(&error, StreamError::NonFinite { tensor, index: 5, .. } if tensor == name),
            "{error}"
        );
    }
}

#[test]
fn outside_that_the_target_has_in_another_shape() {
    let mut setup = setup(usual(&model()), model(), 8);
    let mut other = model();
    let embed = other.get_mut(EMBED).unwrap();
    embed.0[0] = 29;
    embed.1.truncate(29 * 48);
    setup.target = save(&setup.dir.path().join("other"), &other, Dtype::Bf16);
    let mut job = setup.job("out", Form::Merged);
    assert!(run(&job).is_ok(), "the vocabulary does not count unless it is asked for");
    (job.out, job.outside) = (setup.dir.path().join("outside"), Some(1.0));
    let error = setup.refused(&job);
    assert!(matches!(&error, StreamError::NoSuchTarget { tensor, .. } if tensor == EMBED), "{error}");
}

#[test]
fn merged_is_the_same_for_any_thread_count() {
    let setup = setup(usual(&model()), model(), 8);
    let on = |threads: usize| {
        let job = setup.job(&format!("merged-{threads}"), Form::Merged);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&job).unwrap());
        names(&job.out).into_iter().map(|name| fs::read(job.out.join(name)).unwrap()).collect::<Vec<_>>()
    };
    let one = on(1);
    assert!(one == on(2) && one == on(7));
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn genes_are_added_in_one_sum_with_one_rounding() {
    let setup = setup(linear_only(&model()), model(), 8);
    let gene = || Gene::open(&setup.gene).unwrap();
    let expressed = |c: f64| Expressed { gene: gene(), coefficients: [(0, c), (1, c)].into() };
    for form in [Form::Merged, Form::Adapter] {
        let twice = Fuse {
            genes: vec![expressed(0.5), expressed(1.25)],
            ..setup.job(&format!("two-{form:?}"), form)
        };
        let once = Fuse { genes: vec![expressed(1.75)], ..setup.job(&format!("one-{form:?}"), form) };
        run(&twice).unwrap();
        run(&once).unwrap();
        let base = (form == Form::Adapter).then_some(setup.target.as_path());
        let read =
            |out: &Path, name: &str| checkpoint::Checkpoint::open(out, base).unwrap().read_f32(name).unwrap();
        for name in [Q[0], Q[1], DOWN[0]] {
            for (i, (two, one)) in read(&twice.out, name).iter().zip(read(&once.out, name)).enumerate() {
                // Rounded to bf16 once in a merge; in f32 an adapter's products differ by their order.
                let slack = if form == Form::Merged { 2.0 * half_ulp(f64::from(one)) } else { 1e-6 };
                assert!(
                    (f64::from(*two) - f64::from(one)).abs() <= slack,
                    "{form:?} {name} {i}: {two}, {one}"
                );
            }
        }
    }
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(setup.dir.path().join("two-Merged/safegene.json")).unwrap())
            .unwrap();
    assert_eq!(record["genes"][1]["coefficients"]["0"], 1.25);
}

/// Stops the work once it has seen a tensor or two.
struct StopAfter(Arc<AtomicBool>);

impl Progress for StopAfter {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64, _: &str) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn interrupted_fuse_goes_on_where_it_stopped_and_makes_the_same_model() {
    let setup = setup(usual(&model()), model(), 8);
    let plain = setup.job("plain", Form::Merged);
    run(&plain).unwrap();
    let job = Fuse { memory_bytes: 1, ..setup.job("out", Form::Merged) };
    let stop = job.stop.clone();
    let error = fuse(&CpuEngine::new(), &job, &StopAfter(stop.clone())).unwrap_err();
    assert!(matches!(error, StreamError::Interrupted { done: 1.., .. }), "{error}");
    assert!(setup.dir.path().join("out.partial").exists() && !job.out.exists());
    stop.store(false, Ordering::SeqCst);
    let report = run(&job).unwrap();
    assert!(report.resumed > 0);
    assert!(files(&job.out) == files(&plain.out));
    assert!(!setup.dir.path().join("out.partial").exists());
}

#[test]
fn unfinished_fuse_of_bytes_that_were_lost_is_done_again() {
    let setup = setup(usual(&model()), model(), 8);
    let plain = setup.job("plain", Form::Merged);
    run(&plain).unwrap();
    let job = Fuse { memory_bytes: 1, ..setup.job("out", Form::Merged) };
    let error = fuse(&CpuEngine::new(), &job, &StopAfter(job.stop.clone())).unwrap_err();
    assert!(matches!(error, StreamError::Interrupted { .. }), "{error}");
    // As after a power cut: the journal is there, what it speaks of is not.
    let work = setup.dir.path().join("out.partial/.work");
    for name in names(&work).iter().filter(|name| name.ends_with(".safetensors")) {
        let mut bytes = fs::read(work.join(name)).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[header..].fill(0);
        fs::write(work.join(name), bytes).unwrap();
    }
    let report = run(&Fuse { memory_bytes: 1, ..setup.job("out", Form::Merged) }).unwrap();
    assert_eq!(report.resumed, 0);
    assert!(files(&job.out) == files(&plain.out));
}

#[test]
fn shares_of_any_number_of_workers_make_the_same_model() {
    let setup = setup(usual(&model()), model(), 8);
    let plain = setup.job("plain", Form::Merged);
    run(&plain).unwrap();
    for of in [1, 2, 5] {
        let name = format!("out-{of}");
        let out = setup.dir.path().join(&name);
        for index in (1..=of).rev() {
            let job = Fuse { worker: Worker { index, of }, ..setup.job(&name, Form::Merged) };
            assert_eq!(run(&job).unwrap().partial, of > 1);
        }
        if of > 1 {
            let made = assemble(&CpuEngine::new(), &out, 1 << 30, false).unwrap();
            assert!(matches!(made, Assembled::Model(report) if report.tensors_changed > 0));
        }
        assert!(files(&out) == files(&plain.out), "{of} workers");
    }
    // Half of them is no model.
    let job = Fuse { worker: Worker { index: 1, of: 2 }, ..setup.job("half", Form::Merged) };
    run(&job).unwrap();
    let error = assemble(&CpuEngine::new(), &job.out, 1 << 30, false).unwrap_err();
    assert!(matches!(error, StreamError::Incomplete { .. }), "{error}");
    let both = Fuse { worker: Worker { index: 1, of: 2 }, ..setup.job("both", Form::Both) };
    assert!(matches!(run(&both).unwrap_err(), StreamError::NoShares));
}

#[test]
fn target_other_than_the_coefficients_were_made_for() {
    let setup = setup(linear_only(&model()), model(), 8);
    let content = open(&setup.target).content().unwrap();
    for form in [Form::Merged, Form::Adapter] {
        let name = format!("{form:?}");
        let job = Fuse { target_content: Some("blake3:00".into()), ..setup.job(&name, form) };
        assert!(matches!(setup.refused(&job), StreamError::Gene(GeneError::OtherTarget { .. })));
        let forced = Fuse { force: true, out: setup.dir.path().join(format!("{name}-forced")), ..job };
        assert!(run(&forced).unwrap().other_target);
        let job = Fuse { target_content: Some(content.clone()), ..setup.job(&name, form) };
        assert!(!run(&job).unwrap().other_target);
    }
}
