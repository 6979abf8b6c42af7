//! SaLoRA: what is fixed stays fixed, and training starts where the model is.

use crate::decoder::{answered, flat, model, noise, other, product};
use recover::lora::Schedule;
use recover::salora::{Directions, Settings, Start, output_directions, prepare, train};
use recover::{Gram, ModuleFactors, RunError};
use transformer::{AnswerBatch, Attachments, ModuleKind, Row};

/// Gram matrix diag(1, 4, 9).
fn stretched() -> Gram {
    let mut g = Gram::new(3);
    g.add_row(&[1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]);
    g
}

/// Swaps axes 0 and 1, and leaves axis 2: outputs have lengths (2, 1, 3).
const SWAP: [f32; 9] = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0];

#[track_caller]
fn check_axes(d: &Directions, axes: &[usize], out: usize) {
    assert_eq!(d.rank(), axes.len());
    for (k, &axis) in axes.iter().enumerate() {
        for i in 0..out {
            let want = f64::from(u8::from(i == axis));
            let got = d.values()[i * d.rank() + k].abs();
            assert!((got - want).abs() < 1e-12, "direction {k}, entry {i}: {got}");
        }
    }
}

#[test]
fn directions_are_those_of_the_outputs_largest_first() {
    // W G Wᵀ = diag(4, 1, 9): axis 2, then 0, then 1. Inputs alone would give 2, 1, 0.
    let d = output_directions("m", &SWAP, 3, &stretched(), 2).unwrap();
    check_axes(&d, &[2, 0], 3);
    // C keeps axis 1 of a matrix whose columns are (1, 2, 3) and (4, 5, 6), and nothing else.
    let m = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
    for (got, want) in d.outside(&m, 2).iter().zip([0.0, 0.0, 2.0, 5.0, 0.0, 0.0]) {
        assert!((got - want).abs() < 1e-12, "{got} {want}");
    }
    for (got, want) in d.within(&m, 2).iter().zip([1.0, 4.0, 0.0, 0.0, 3.0, 6.0]) {
        assert!((got - want).abs() < 1e-12, "{got} {want}");
    }
}

#[test]
fn safety_directions_vanish_under_c() {
    let (out, inn) = (24, 16);
    let mut g = Gram::new(inn);
    g.add_row(&noise(40 * inn, 5));
    let d = output_directions("m", &noise(out * inn, 6), out, &g, 8).unwrap();
    assert_eq!(d.rank(), 8);
    // ‖C V_s‖ = 0 up to roundings of orthonormal columns.
    assert!(d.outside(d.values(), 8).iter().all(|x| x.abs() < 1e-13));
    // Only 16 directions are reached by 16 inputs, whatever is asked for.
    assert_eq!(output_directions("m", &noise(out * inn, 6), out, &g, 99).unwrap().rank(), 16);
}

#[test]
fn start_by_hand() {
    // W = diag(4, 9): U = V = I, the best rank 1 is axis 1 with S = 9, so U√S = (0, 3), A₀ = (0, 3).
    // Task direction (3, 4)/5: V_tV_tᵀ(0, 3) = (4·3/5)·(3, 4)/5 = (36/25, 48/25) = B₀.
    // Safety direction axis 0: C B₀ = (0, 48/25).
    let weight = [4.0, 0.0, 0.0, 9.0];
    let identity = [1.0, 0.0, 0.0, 1.0];
    let along = |x: f32, y: f32| {
        let mut g = Gram::new(2);
        g.add_row(&[x, y]);
        output_directions("m", &identity, 2, &g, 1).unwrap()
    };
    let start = Start::new((0, ModuleKind::Q), &weight, along(1.0, 0.0), &along(3.0, 4.0), 1).unwrap();
    assert_eq!(start.free(), 1);
    // The sign of a singular vector is free; the products are not.
    let sign = start.a[1].signum();
    let near = |got: f32, want: f64| assert!((f64::from(got) - want).abs() < 1e-6, "{got} {want}");
    near(sign * start.a[0], 0.0);
    near(sign * start.a[1], 3.0);
    near(sign * start.b[0], 36.0 / 25.0);
    near(sign * start.b[1], 48.0 / 25.0);
    // Trained to B = (1, 1), A = (2, 0): C·B·A − C·B₀·A₀ = [[0, 0], [2, −144/25]].
    let f = start.export(&[1.0, 1.0], &[2.0, 0.0]).unwrap();
    assert_eq!((f.rank, f.b.len(), f.a.len()), (2, 4, 4));
    for (got, want) in product(&f).into_iter().zip([0.0, 0.0, 2.0, -144.0 / 25.0]) {
        assert!((got - want).abs() < 1e-5, "{got} {want}");
    }
}

#[test]
fn export_of_the_start_is_nothing_at_all() {
    let model = model();
    let rows = |seed| answered(&model, &Attachments::none(), seed, 6);
    let settings = Settings { rank: 4, safety_rank: 5, task_rank: 5, ..Settings::default() };
    let starts = prepare(&model, &rows(1), &rows(2), 0, &settings).unwrap();
    assert_eq!(starts.len(), 14);
    for s in &starts {
        let f = s.export(&s.b, &s.a).unwrap();
        // Columns k and k + r of B are opposite numbers, rows k and k + r of A are the same.
        let inn = f.a.len() / f.rank;
        assert_eq!(f.a[..4 * inn], f.a[4 * inn..]);
        for b in f.b.chunks(8) {
            for k in 0..4 {
                assert_eq!(b[k], -b[k + 4]);
            }
        }
        assert!(f.b.iter().any(|b| b.abs() > 1e-3), "{:?} starts at nothing", s.kind);
        let dense = product(&f);
        assert!(dense.iter().all(|x| x.abs() < 1e-15), "products of opposite numbers cancel in f64");
    }
}

fn trained(steps: usize) -> (Vec<Start>, Vec<ModuleFactors>, Vec<f32>, f32) {
    let model = model();
    let none = Attachments::none();
    let settings = Settings { rank: 4, safety_rank: 5, task_rank: 5, ..Settings::default() };
    let starts =
        prepare(&model, &answered(&model, &none, 1, 6), &answered(&model, &none, 2, 6), 0, &settings)
            .unwrap();
    let lesson = answered(&model, &other(3.0), 3, 8);
    let mut at = 0;
    let mut next = || -> Result<Row, RunError> {
        at += 1;
        Ok(lesson[at % lesson.len()].clone())
    };
    let (mut losses, mut last) = (Vec::new(), f32::NAN);
    let batch = AnswerBatch::new(&lesson, 0);
    let mut stop = |_: usize, loss: f32, at: &Attachments| {
        losses.push(loss);
        last = flat(&batch.cross_entropy(&model, at)?)[0];
        Ok(losses.len() == steps)
    };
    let schedule = Schedule { steps: 60, rows: 8, rate: 1e-2 };
    let factors = train(&model, &starts, schedule, 0, &mut next, &mut stop).unwrap();
    (starts, factors, losses, last)
}

#[test]
fn training_learns_and_never_writes_into_safety() {
    let (starts, factors, losses, last) = trained(60);
    let model = model();
    let lesson = answered(&model, &other(3.0), 3, 8);
    let batch = AnswerBatch::new(&lesson, 0);
    // The first loss is that of the model itself: training starts at W, up to f32 roundings of sums near 1.
    let itself = flat(&batch.cross_entropy(&model, &Attachments::none()).unwrap())[0];
    assert!((losses[0] - itself).abs() < 1e-5 * itself, "{} {itself}", losses[0]);
    assert!(last < 0.7 * itself, "{itself} -> {last}");
    // The export over the stock base is the model that was trained.
    let at = ModuleFactors::attachments(&factors).unwrap();
    let exported = flat(&batch.cross_entropy(&model, &at).unwrap())[0];
    assert!((exported - last).abs() < 1e-5 * last.max(1.0), "{exported} {last}");
    let mut changed = 0.0f64;
    for (s, f) in starts.iter().zip(&factors) {
        assert_eq!((s.layer, s.kind, f.rank), (f.layer, f.kind, 8));
        let dense = product(f);
        let inn = f.a.len() / f.rank;
        let size = dense.iter().fold(0f64, |m, x| m.max(x.abs()));
        changed = changed.max(size);
        let inside = s.safety.within(&dense, inn);
        // V_s and C·B are in f32: orthogonal up to a few of its roundings of the factors' size.
        assert!(inside.iter().all(|x| x.abs() < 1e-5), "{:?} of layer {}", s.kind, s.layer);
    }
    assert!(changed > 1e-2, "nothing was trained: {changed}");
}

#[test]
fn gradient_goes_through_c() {
    // After one step B has moved only outside V_s *as C·B*; if C were applied at export only, the loss that was reported
    // would be another than that of the export.
    let (_, factors, losses, last) = trained(1);
    assert_eq!(losses.len(), 1);
    let model = model();
    let batch = AnswerBatch::new(&answered(&model, &other(3.0), 3, 8), 0);
    let at = ModuleFactors::attachments(&factors).unwrap();
    let exported = flat(&batch.cross_entropy(&model, &at).unwrap())[0];
    assert!((exported - last).abs() < 1e-5 * last, "{exported} {last}");
    assert!(last < losses[0], "a step along the gradient of C·B·A lowers the loss: {} {last}", losses[0]);
}

#[test]
fn same_rows_give_the_same_factors() {
    assert_eq!(trained(5).1, trained(5).1);
}

#[test]
fn ranks_are_cut_to_what_there_is() {
    let model = model();
    let rows = |seed| answered(&model, &Attachments::none(), seed, 8);
    // k and v have 8 outputs: r_s = 32 of them is all there are.
    let settings = Settings { modules: vec![ModuleKind::K], ..Settings::default() };
    let starts = prepare(&model, &rows(1), &rows(2), 0, &settings).unwrap();
    for s in &starts {
        assert_eq!((s.rank, s.safety.rank(), s.free()), (8, 8, 0));
        let f = s.export(&s.b.iter().map(|b| b + 1.0).collect::<Vec<_>>(), &s.a).unwrap();
        assert!(product(&f).iter().all(|x| x.abs() < 1e-5), "nothing is left to train");
    }
}

#[test]
fn bad_operands_are_refused_by_name() {
    let model = model();
    let rows = answered(&model, &Attachments::none(), 1, 2);
    let run = |safety: &[Row], task: &[Row], s: &Settings| prepare(&model, safety, task, 0, s).unwrap_err();
    let good = Settings::default();
    assert!(matches!(run(&[], &rows, &good), RunError::NoRows("safety")));
    assert!(matches!(run(&rows, &[], &good), RunError::NoRows("task")));
    let e = run(&rows, &rows, &Settings { rank: 0, ..good.clone() });
    assert!(e.to_string().contains("`rank` is 0"), "{e}");
    assert!(matches!(run(&rows, &rows, &Settings { modules: Vec::new(), ..good }), RunError::NoModule));
    let e = output_directions("m", &[f32::NAN; 9], 3, &stretched(), 1).unwrap_err();
    assert!(e.to_string().contains("module `m`") && e.hint().is_some());
    assert!(matches!(output_directions("m", &SWAP, 2, &stretched(), 1), Err(RunError::Size { .. })));
    let schedule = Schedule { steps: 1, rows: 1, rate: 1.0 };
    let mut next = || -> Result<Row, RunError> { Ok(rows[0].clone()) };
    let e = train(&model, &[], schedule, 0, &mut next, &mut |_, _, _| Ok(false)).unwrap_err();
    assert!(matches!(e, RunError::NoModule));
    let d = output_directions("m", &SWAP, 3, &stretched(), 1).unwrap();
    let start = Start::new((0, ModuleKind::Q), &SWAP, d.clone(), &d, 2).unwrap();
    assert!(matches!(start.export(&[0.0], &start.a), Err(RunError::Size { what: "the trained B", .. })));
    let wild = vec![f32::INFINITY; start.a.len()];
    assert!(matches!(start.export(&start.b, &wild), Err(RunError::NotFinite { .. })));
}
