//! Bugs that users of other extraction and merge tools met, each as a test that shows it is not here.
//!
//! The numbers P4 to P15 are those of the list of complaints that this project keeps.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use checkpoint::{Checkpoint, CheckpointError, Dtype, TensorSpec};
use gene::{Class, Gene, GeneError, RestDelta};
use kernels::CpuEngine;
use serde_json::json;
use stream::{Extract, ExtractReport, Form, Fuse, NoProgress, Progress, Ranks, StreamError, extract, fuse};
use tempfile::tempdir;

use crate::extract::{check_module, delta};
use crate::folders::{
    DOWN, EMBED, FINAL, Q, Tensors, lora, model, names, noise, open, product, save, save_adapter,
    save_sharded, sumsq, to_bf16, usual,
};
use crate::inputs::{bf16, factors, write};
use crate::work::files;

fn job(aligned: &Path, degraded: &Path, out: &Path, rank: usize) -> Extract {
    Extract::new(open(aligned), open(degraded), Ranks::Fixed(rank), out)
}

fn run(aligned: &Path, degraded: &Path, out: &Path, rank: usize) -> Result<ExtractReport, StreamError> {
    extract(&CpuEngine::new(), &job(aligned, degraded, out, rank), &NoProgress)
}

/// A fuse of a whole gene at coefficient 1, what is outside of the layers included.
fn whole(gene: &Path, target: &Path, out: &Path, form: Form) -> Fuse {
    let gene = Gene::open(gene).unwrap();
    let coefficients = gene.layers().into_iter().map(|layer| (layer, 1.0)).collect();
    Fuse {
        form,
        outside: (form == Form::Merged).then_some(1.0),
        drop_rest: form != Form::Merged,
        ..Fuse::new(gene, coefficients, open(target), out)
    }
}

fn read(dir: &Path, name: &str) -> Vec<f32> {
    open(dir).read_f32(name).unwrap()
}

/// The model with other names.
fn renamed(model: &Tensors, from: &str, to: &str) -> Tensors {
    model.iter().map(|(name, values)| (name.replacen(from, to, 1), values.clone())).collect()
}

/// Peers cut factors at the 99 % quantile of their elements: a difference with a few large entries loses most of itself.
#[test]
fn p4_factors_are_never_clamped() {
    let dir = tempdir().unwrap();
    // From zero, so that the difference is exact.
    let mut degraded = model();
    degraded.get_mut(Q[0]).unwrap().1.fill(0.0);
    let mut aligned = degraded.clone();
    // Rank 3, each part with one large element; the largest makes nine tenths of the energy.
    let values = &mut aligned.get_mut(Q[0]).unwrap().1;
    for (k, peak) in [40.0, -10.0, 5.0].into_iter().enumerate() {
        let (mut u, mut v) = (noise(k as u32, 41), noise(9 + k as u32, 48));
        (u[3 + k], v[7 + k]) = (peak, peak);
        values.iter_mut().enumerate().for_each(|(at, x)| *x += u[at / 48] * v[at % 48] / 64.0);
    }
    let (a, d) = (dir.path().join("a"), dir.path().join("d"));
    save(&a, &aligned, Dtype::F32);
    save(&d, &degraded, Dtype::F32);
    let out = dir.path().join("gene");
    run(&a, &d, &out, 3).unwrap();

    let gene = Gene::open(&out).unwrap();
    let delta = delta(&aligned, &degraded, Q[0]);
    let (energy, missed) = check_module(&gene, Q[0], &delta);
    // What is missed is rounding to f32: of three sums that made the weights, and of the factors.
    assert!(missed <= 1e-12 * energy, "{}", missed / energy);
    let f = gene.factors(Q[0].strip_suffix(".weight").unwrap()).unwrap();
    let largest = |side: &[f32]| side.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert!(largest(&f.b) > 4.0 && largest(&f.a) > 4.0, "{} and {}", largest(&f.b), largest(&f.a));

    // The peers' way on the same factors.
    let mut sizes: Vec<f32> = f.b.iter().chain(&f.a).map(|x| x.abs()).collect();
    sizes.sort_by(f32::total_cmp);
    let edge = sizes[(0.99 * (sizes.len() - 1) as f64) as usize];
    let cut = |side: &[f32]| side.iter().map(|x| x.clamp(-edge, edge)).collect::<Vec<_>>();
    let held = product(&cut(&f.b), &cut(&f.a), f.rank);
    let missed = sumsq(&delta.iter().zip(held).map(|(d, p)| d - p).collect::<Vec<_>>());
    assert!(missed > 0.5 * energy, "the difference of this test is too tame: {}", missed / energy);
}

/// Peers merge what matches and skip the rest in silence: a prefix in the names, and the output is the base.
#[test]
fn p5_gene_whose_names_match_nothing_is_an_error() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    save(&path("a"), &usual(&model()), Dtype::Bf16);
    save(&path("d"), &model(), Dtype::Bf16);
    save(&path("wrapped"), &renamed(&model(), "model.", "language_model.model."), Dtype::Bf16);
    run(&path("a"), &path("d"), &path("gene"), 8).unwrap();
    for form in [Form::Merged, Form::Adapter, Form::Both] {
        let job = whole(&path("gene"), &path("wrapped"), &path("out"), form);
        let error = fuse(&CpuEngine::new(), &job, &NoProgress).unwrap_err();
        let StreamError::Gene(GeneError::OtherFamily { first_difference, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!(first_difference, "`model.layers.0.mlp.down_proj` is not in the target");
    }
    assert_eq!(names(dir.path()), ["a", "d", "gene", "wrapped"]);
}

/// The same for two checkpoints of which one has its names under a prefix.
#[test]
fn p5_checkpoints_without_a_common_name_are_an_error() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    save(&path("a"), &usual(&model()), Dtype::Bf16);
    save(&path("wrapped"), &renamed(&model(), "model.", "language_model.model."), Dtype::Bf16);
    let error = run(&path("a"), &path("wrapped"), &path("gene"), 8).unwrap_err();
    let StreamError::OneSided { tensor, missing_from, .. } = error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), missing_from), (EMBED, path("wrapped")));
    assert_eq!(names(dir.path()), ["a", "wrapped"]);
}

/// The same for an adapter: peers load it with a warning and run the base.
#[test]
fn p5_adapter_whose_names_match_nothing_is_an_error() {
    let dir = tempdir().unwrap();
    let base = save(&dir.path().join("base"), &model(), Dtype::Bf16);
    let factors = lora(1, "transformer.h.0.attn.q_proj", [41, 48], 4);
    let adapter = save_adapter(&dir.path().join("adapter"), &base, &[factors], 8.0);
    let error = Checkpoint::open(&adapter, None).unwrap_err();
    let CheckpointError::AdapterOtherBase { tensor, detail, .. } = error else { panic!("{error}") };
    assert_eq!(
        (tensor.as_str(), detail.as_str()),
        ("transformer.h.0.attn.q_proj.weight", "is not in the base")
    );
}

/// And the proof that peers lack: the report counts what differs in the files, no more and no less.
#[test]
fn p5_report_counts_exactly_the_elements_that_differ() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    save(&path("a"), &usual(&model()), Dtype::Bf16);
    save(&path("d"), &model(), Dtype::Bf16);
    run(&path("a"), &path("d"), &path("gene"), 8).unwrap();
    let job = whole(&path("gene"), &path("d"), &path("out"), Form::Merged);
    let report = fuse(&CpuEngine::new(), &job, &NoProgress).unwrap();
    let (mut tensors, mut elements) = (0, 0);
    for (name, (_, before)) in &model() {
        let after = read(&path("out"), name);
        let differ = before.iter().zip(&after).filter(|(b, a)| b.to_bits() != a.to_bits()).count() as u64;
        tensors += u64::from(differ > 0);
        elements += differ;
    }
    assert_eq!((report.tensors_changed, report.elements_changed), (tensors, elements));
    // Three linear weights, two norms, a bias, the final norm and two rows of the embedding.
    assert_eq!(tensors, 8);
}

const EXPERTS: usize = 3;
/// Half of `HIDDEN`, so that a stack of gate and up is square and its sides tell nothing about its layout.
const INNER: usize = 16;
const HIDDEN: usize = 32;

/// Gate, up and down of each expert as [out, in], exact in bf16.
fn experts(seed: u32) -> Vec<[Vec<f32>; 3]> {
    let values = |at: u32| -> Vec<f32> {
        let change = noise(seed + at, INNER * HIDDEN);
        let base = noise(at, INNER * HIDDEN);
        base.iter().zip(change).map(|(x, change)| to_bf16(x + 0.05 * change)).collect()
    };
    (0..EXPERTS as u32).map(|e| [0, 1, 2].map(|p| values(10 * e + p))).collect()
}

type Stored = Vec<(TensorSpec, Vec<u8>)>;

/// One tensor for each matrix.
fn single(experts: &[[Vec<f32>; 3]], container: &str, projections: [&str; 3]) -> Stored {
    let shapes = [[INNER, HIDDEN], [INNER, HIDDEN], [HIDDEN, INNER]];
    let each = experts.iter().enumerate().flat_map(|(e, matrices)| {
        projections.iter().zip(matrices).zip(shapes).map(move |((projection, values), shape)| {
            bf16(&format!("model.layers.0.{container}.{e}.{projection}.weight"), &shape, values)
        })
    });
    each.collect()
}

/// Two stacks; `place` says where (o, i) of gate, up or down lies in its expert's stored matrix of these sides.
fn stacks(
    experts: &[[Vec<f32>; 3]],
    container: &str,
    sides: [[usize; 2]; 2],
    place: impl Fn(usize, usize, usize) -> usize,
) -> Stored {
    let [mut gate_up, mut down] = sides.map(|[rows, cols]| vec![0.0; EXPERTS * rows * cols]);
    for (e, matrices) in experts.iter().enumerate() {
        for (projection, values) in matrices.iter().enumerate() {
            let (stack, [rows, cols]) =
                if projection == 2 { (&mut down, sides[1]) } else { (&mut gate_up, sides[0]) };
            let into = if projection == 2 { INNER } else { HIDDEN };
            for (at, &x) in values.iter().enumerate() {
                stack[e * rows * cols + place(projection, at / into, at % into)] = x;
            }
        }
    }
    let name = |projection| format!("model.layers.0.{container}.{projection}_proj");
    let shape = |[rows, cols]: [usize; 2]| [EXPERTS, rows, cols];
    vec![bf16(&name("gate_up"), &shape(sides[0]), &gate_up), bf16(&name("down"), &shape(sides[1]), &down)]
}

/// [E, 2I, H] and [E, H, I].
fn out_in(experts: &[[Vec<f32>; 3]], container: &str) -> Stored {
    let sides = [[2 * INNER, HIDDEN], [HIDDEN, INNER]];
    stacks(experts, container, sides, |projection, o, i| match projection {
        2 => o * INNER + i,
        half => (half * INNER + o) * HIDDEN + i,
    })
}

/// [E, H, 2I] and [E, I, H]; gate and up as halves of the columns, or as even and odd ones.
fn in_out(experts: &[[Vec<f32>; 3]], container: &str, interleaved: bool) -> Stored {
    let sides = [[HIDDEN, 2 * INNER], [INNER, HIDDEN]];
    stacks(experts, container, sides, |projection, o, i| match projection {
        2 => i * HIDDEN + o,
        half if interleaved => i * 2 * INNER + 2 * o + half,
        half => i * 2 * INNER + half * INNER + o,
    })
}

fn experts_folder(dir: &Path, model_type: &str, tensors: &Stored) -> PathBuf {
    let config = json!({"model_type": model_type, "num_hidden_layers": 1, "hidden_size": HIDDEN});
    write(dir, config, tensors)
}

/// Peers mix up fused and single experts, orientations and the order of gate and up, or guess them from sides that are
/// equal here: their deltas are transposed, shuffled or skipped.
#[test]
fn p6_experts_of_every_layout_give_one_gene() {
    let ours = ["gate_proj", "up_proj", "down_proj"];
    let numbered = ["w1", "w3", "w2"];
    let (a, d) = (experts(100), experts(200));
    let layouts = |x: &[[Vec<f32>; 3]]| -> Vec<(&str, Stored)> {
        vec![
            ("qwen3_moe", single(x, "mlp.experts", ours)),
            ("qwen3_moe", out_in(x, "mlp.experts")),
            ("mixtral", single(x, "block_sparse_moe.experts", numbered)),
            ("mixtral", out_in(x, "mlp.experts")),
            ("gpt_oss", single(x, "mlp.experts", ours)),
            ("gpt_oss", in_out(x, "mlp.experts", true)),
            ("llama4_text", single(x, "feed_forward.experts", ours)),
            ("llama4_text", in_out(x, "feed_forward.experts", false)),
        ]
    };
    let dir = tempdir().unwrap();
    let (aligned, degraded) = (layouts(&a), layouts(&d));
    let mut genes: BTreeMap<bool, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    let mut compared = 0;
    for (n, (kind, a_tensors)) in aligned.iter().enumerate() {
        for (m, (other, d_tensors)) in degraded.iter().enumerate() {
            if kind != other {
                continue;
            }
            let path = |side: &str| dir.path().join(format!("{side}-{n}-{m}"));
            let a_dir = experts_folder(&path("a"), kind, a_tensors);
            let d_dir = experts_folder(&path("d"), kind, d_tensors);
            let report = run(&a_dir, &d_dir, &path("gene"), INNER).unwrap();
            assert_eq!(report.classes, [(Class::LowRank, 3 * EXPERTS as u64)].into(), "{kind}");
            // The names of two containers differ, and with them the sketches; the others are one gene bit for bit.
            let found = factors(&path("gene"));
            let want = genes.entry(*kind == "llama4_text").or_insert_with(|| found.clone());
            assert!(found == *want, "{kind}: layouts {n} and {m}");
            compared += 1;

            // At full rank the factors are the difference itself, each matrix in its own place and orientation.
            let gene = Gene::open(&path("gene")).unwrap();
            let container = if *kind == "llama4_text" { "feed_forward" } else { "mlp" };
            for e in 0..EXPERTS {
                for p in 0..3 {
                    let name = format!("model.layers.0.{container}.experts.{e}.{}", ours[p]);
                    let f = gene.factors(&name).unwrap();
                    let shape = if p == 2 { [HIDDEN, INNER] } else { [INNER, HIDDEN] };
                    assert_eq!([f.rows, f.cols], shape, "{name}");
                    for (at, held) in product(&f.b, &f.a, f.rank).iter().enumerate() {
                        let want = f64::from(a[e][p][at]) - f64::from(d[e][p][at]);
                        // Differences are up to 0.1; the factors are f32 and found by f32 products.
                        assert!((held - want).abs() <= 1e-5, "{kind} {name} {at}: {held} for {want}");
                    }
                }
            }
        }
    }
    assert_eq!((compared, genes.len()), (16, 2));
}

/// A family that is written in both orientations, with sides that fit either: refused, not guessed.
#[test]
fn p6_layout_that_the_sides_cannot_tell_is_refused() {
    let dir = tempdir().unwrap();
    for (n, stored) in
        [out_in(&experts(1), "mlp.experts"), in_out(&experts(1), "mlp.experts", false)].iter().enumerate()
    {
        let folder = experts_folder(&dir.path().join(format!("{n}")), "qwen3_vl_moe", stored);
        let error = run(&folder, &folder, &dir.path().join("gene"), 4).unwrap_err();
        let StreamError::Checkpoint(CheckpointError::Layout { tensor, problem, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!(tensor, "model.layers.0.mlp.experts.gate_up_proj");
        assert_eq!(
            problem,
            "its shape is [3, 32, 32], which fits both layouts that this family is written in"
        );
    }
}

/// The model with this many rows in its embedding; those beyond its own are 0.5.
fn with_rows(mut model: Tensors, rows: usize) -> Tensors {
    let embed = model.get_mut(EMBED).unwrap();
    embed.0[0] = rows as u64;
    embed.1.resize(rows * 48, 0.5);
    model
}

/// Peers cut both vocabularies to the shorter one, or to the tokenizer's length, or fail with a shape.
#[test]
fn p8_added_rows_are_kept_and_never_truncated() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Five tokens more than the degraded side; the target's table is padded to 40 rows, for a tokenizer of one token.
    let aligned = with_rows(usual(&model()), 35);
    save(&path("a"), &aligned, Dtype::Bf16);
    save(&path("d"), &model(), Dtype::Bf16);
    let padded = with_rows(model(), 40);
    save(&path("target"), &padded, Dtype::Bf16);
    fs::write(path("target").join("tokenizer.json"), r#"{"model": {"vocab": {"a": 0}}}"#).unwrap();
    let report = run(&path("a"), &path("d"), &path("gene"), 8).unwrap();
    assert_eq!(report.classes[&Class::RowPatch], 1);

    let gene = Gene::open(&path("gene")).unwrap();
    let RestDelta::Rows { rows, delta } = gene.rest_delta(EMBED).unwrap() else { panic!("no rows") };
    assert_eq!(rows, [3, 17, 30, 31, 32, 33, 34]);
    assert_eq!(delta[2 * 48..], [0.5; 5 * 48]);
    let entry = gene.rest().iter().find(|entry| entry.name == EMBED).unwrap();
    assert_eq!(entry.shape, [35, 48]);
    let changed: Vec<f64> = (0..2 * 48).map(|at| f64::from(delta[at])).collect();
    assert!((entry.energy - sumsq(&changed) - 5.0 * 48.0 * 0.25).abs() <= 1e-12 * entry.energy);

    let job = whole(&path("gene"), &path("target"), &path("out"), Form::Merged);
    let report = fuse(&CpuEngine::new(), &job, &NoProgress).unwrap();
    assert_eq!(report.rows_not_added, 5);
    let merged = read(&path("out"), EMBED);
    assert_eq!(open(&path("out")).shards().get(EMBED).unwrap().shape, [40, 48]);
    // Common rows are the aligned ones exactly: a difference of bf16 values is exact, and so is its sum.
    assert_eq!(merged[..30 * 48], aligned[EMBED].1[..30 * 48]);
    // New rows are no differences and mean nothing in another table.
    assert_eq!(merged[30 * 48..], padded[EMBED].1[30 * 48..]);
}

/// The other way round, and a target that lacks rows which the gene changes.
#[test]
fn p8_missing_rows_are_named_and_never_truncated() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    save(&path("a"), &usual(&model()), Dtype::Bf16);
    save(&path("d"), &with_rows(model(), 33), Dtype::Bf16);
    run(&path("a"), &path("d"), &path("gene"), 8).unwrap();
    let gene = Gene::open(&path("gene")).unwrap();
    let RestDelta::Rows { rows, .. } = gene.rest_delta(EMBED).unwrap() else { panic!("no rows") };
    assert_eq!((rows, &gene.manifest().extra["common_rows"][EMBED]), (vec![3, 17], &json!(30)));

    let mut short = model();
    let embed = short.get_mut(EMBED).unwrap();
    embed.0[0] = 29;
    embed.1.truncate(29 * 48);
    save(&path("short"), &short, Dtype::Bf16);
    let before = names(dir.path());
    let job = whole(&path("gene"), &path("short"), &path("out"), Form::Merged);
    let error = fuse(&CpuEngine::new(), &job, &NoProgress).unwrap_err();
    let StreamError::NoSuchTarget { tensor, shape, .. } = error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), shape), (EMBED, vec![30, 48]));
    assert_eq!(names(dir.path()), before);
}

/// Names of finished tensors, and the bytes that were announced.
#[derive(Default)]
struct Seen(Mutex<(Vec<String>, u64)>);

impl Progress for Seen {
    fn stage(&self, _: &str, total_bytes: u64) {
        self.0.lock().unwrap().1 += total_bytes;
    }
    fn advance(&self, _: u64, name: &str) {
        self.0.lock().unwrap().0.push(name.to_owned());
    }
}

/// Peers fail at 99 % with a message of the linear algebra library, without a name, and keep nothing.
#[test]
fn p13_nan_is_named_and_finished_work_survives() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let a = save_sharded(&path("a"), &usual(&model()), Dtype::Bf16);
    let d = save(&path("d"), &model(), Dtype::Bf16);
    run(&a, &d, &path("plain"), 8).unwrap();
    let weights = d.join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let written = fs::metadata(&weights).unwrap().modified().unwrap();
    // The same time again: the work of before belongs to the same files.
    let put = |bytes: &[u8]| {
        fs::write(&weights, bytes).unwrap();
        File::options().write(true).open(&weights).unwrap().set_modified(written).unwrap();
    };

    // The last tensor in the order of the files but one.
    let mut bad = good.clone();
    let info = open(&d).shards().get(FINAL).unwrap().clone();
    let at = info.offset as usize + 2 * 11;
    bad[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    put(&bad);
    let attempt = |seen: &Seen| {
        let job = Extract { memory_bytes: 1, ..job(&a, &d, &path("gene"), 8) };
        extract(&CpuEngine::new(), &job, seen)
    };
    let named = |error: StreamError| match error {
        StreamError::NonFinite { tensor, file, index } => {
            assert_eq!((tensor.as_str(), &file, index), (FINAL, &weights, 11));
        }
        error => panic!("{error}"),
    };
    let first = Seen::default();
    named(attempt(&first).unwrap_err());
    let (done, announced) = first.0.into_inner().unwrap();
    assert!(done.len() >= model().len() - 2, "{done:?}");
    assert!(!path("gene").exists());

    // Again, with only the rest announced, and the same answer.
    let second = Seen::default();
    named(attempt(&second).unwrap_err());
    let bytes = |name: &str| 2 * open(&d).shards().get(name).unwrap().bytes;
    let kept: u64 = done.iter().map(|name| bytes(name)).sum();
    let (more, left) = second.0.into_inner().unwrap();
    assert_eq!(left, announced - kept);

    // Repaired: only what was not finished is done, and the gene is that of a run that met no NaN.
    put(&good);
    let report = attempt(&Seen::default()).unwrap();
    assert_eq!(report.resumed, (done.len() + more.len()) as u64);
    assert!(files(&path("gene")) == files(&path("plain")));
}

/// Peers' SVD "failed to converge" on differences that are zero, of one element, tiny or huge.
#[test]
fn p13_degenerate_differences_are_certified_and_stop_nothing() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut degraded = model();
    for name in [Q[0], Q[1], DOWN[0], DOWN[1]] {
        degraded.get_mut(name).unwrap().1.fill(0.0);
    }
    let mut aligned = degraded.clone();
    aligned.get_mut(Q[0]).unwrap().1[5 * 48 + 7] = -3.0; // one element
    aligned.get_mut(Q[1]).unwrap().1.fill(0.25); // a constant
    aligned.get_mut(DOWN[0]).unwrap().1.iter_mut().zip(noise(5, 48 * 57)).for_each(|(x, n)| *x = 1e-18 * n);
    aligned.get_mut(DOWN[1]).unwrap().1.iter_mut().zip(noise(6, 48 * 57)).for_each(|(x, n)| *x = 1e17 * n);
    save(&path("a"), &aligned, Dtype::F32);
    save(&path("d"), &degraded, Dtype::F32);
    let report = run(&path("a"), &path("d"), &path("gene"), 48).unwrap();
    // The norms, the biases, the embedding, the buffer: differences of zero, no factors and no error.
    assert_eq!(report.classes, [(Class::LowRank, 4), (Class::Unchanged, 7)].into());
    let gene = Gene::open(&path("gene")).unwrap();
    for (name, rank) in [(Q[0], 1), (Q[1], 1), (DOWN[0], 48), (DOWN[1], 48)] {
        let (energy, missed) = check_module(&gene, name, &delta(&aligned, &degraded, name));
        assert!(energy > 0.0 && missed <= 1e-10 * energy, "{name}: {missed} of {energy}");
        assert_eq!(gene.module(name.strip_suffix(".weight").unwrap()).unwrap().rank, rank, "{name}");
    }
}

/// Copies what lies under the output's name and beside it whenever a tensor is finished or a stage begins: what a process
/// that is killed at that moment leaves.
struct Moments<'a> {
    dir: &'a Path,
    taken: AtomicUsize,
}

impl Moments<'_> {
    fn take(&self) {
        let moment = self.dir.join(format!("moment-{}", self.taken.fetch_add(1, Ordering::SeqCst)));
        for name in ["out", "out.partial"].iter().filter(|name| self.dir.join(name).exists()) {
            copy(&self.dir.join(name), &moment.join(name));
        }
    }
}

impl Progress for Moments<'_> {
    fn stage(&self, _: &str, _: u64) {
        self.take();
    }
    fn advance(&self, _: u64, _: &str) {
        self.take();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

/// The work of a kind; how many tensors were finished before, if it is one that goes on.
fn work(kind: &str, dir: &Path, progress: &dyn Progress) -> u64 {
    let path = |name: &str| dir.join(name);
    let engine = CpuEngine::new();
    let form = match kind {
        "extract" => {
            return extract(&engine, &job(&path("a"), &path("d"), &path("out"), 8), progress)
                .unwrap()
                .resumed;
        }
        "merged" => Form::Merged,
        _ => Form::Both,
    };
    assert!(!fuse(&engine, &whole(&path("gene"), &path("d"), &path("out"), form), progress).unwrap().already);
    0
}

/// Everything below a folder.
fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() {
            found.extend(tree(&path).into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes)));
        } else {
            found.insert(name, fs::read(path).unwrap());
        }
    }
    found
}

/// Peers that die leave shards without an index, or a file that cannot be read, under the output's own name.
#[test]
fn p15_run_that_was_cut_off_leaves_no_half_output() {
    let tensors = model().len();
    // A moment for each tensor and each stage; the second stage of `both` begins when its first part is whole.
    for (kind, moments) in [("extract", 1 + tensors), ("merged", 1 + tensors), ("both", 2 + tensors)] {
        let dir = tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        save_sharded(&path("a"), &usual(&model()), Dtype::Bf16);
        save_sharded(&path("d"), &model(), Dtype::Bf16);
        run(&path("a"), &path("d"), &path("gene"), 8).unwrap();
        let seen = Moments { dir: dir.path(), taken: AtomicUsize::new(0) };
        work(kind, dir.path(), &seen);
        let plain = tree(&path("out"));
        assert_eq!(seen.taken.into_inner(), moments, "{kind}");
        for n in 0..moments {
            fs::remove_dir_all(path("out")).unwrap();
            let moment = path(&format!("moment-{n}"));
            for name in names(&moment) {
                fs::rename(moment.join(&name), path(&name)).unwrap();
            }

            // Nothing under the output's name, or a part that is whole.
            assert_eq!(path("out.partial").exists(), kind != "both", "{kind} at {n}");
            assert_eq!(path("out").exists(), kind == "both", "{kind} at {n}");
            if kind == "both" {
                let parts = names(&path("out")).into_iter().filter(|name| !name.ends_with(".partial"));
                let whole: &[&str] = if n <= tensors { &[] } else { &["merged"] };
                assert_eq!(parts.collect::<Vec<_>>(), whole, "at {n}");
                let below: BTreeMap<_, _> =
                    tree(&path("out")).into_iter().filter(|(name, _)| !name.contains(".partial/")).collect();
                assert!(below.iter().all(|(name, bytes)| plain.get(name) == Some(bytes)), "at {n}");
                let wanted = plain.keys().filter(|name| n > tensors && name.starts_with("merged/")).count();
                assert_eq!(below.len(), wanted, "at {n}");
            }

            // The same again goes on where that was, ends in the same bytes, and leaves nothing beside them.
            let resumed = work(kind, dir.path(), &NoProgress);
            assert_eq!(resumed, if kind == "extract" { n as u64 } else { 0 }, "{kind} at {n}");
            assert!(tree(&path("out")) == plain, "{kind} at {n}");
            assert!(!path("out.partial").exists(), "{kind} at {n}");
        }
    }
}
