//! Worked examples. The Gram matrix comes from two rows, so H = 2/2 · G = G.

use recover::safe_delta::{Budget, Options, Report, Variant, safe_delta};
use recover::{Gram, RunError};

/// The Gram matrix of these vectors.
fn gram(vectors: &[&[f32]]) -> Gram {
    let mut g = Gram::new(vectors[0].len());
    // Two rows, whatever the number of vectors: H = G.
    let (head, tail) = vectors.split_at(1);
    g.add_row(head[0]);
    g.add_row(&tail.concat());
    g
}

fn exact(s: f64) -> Options {
    Options { s, damping: 0.0, ..Options::default() }
}

fn published(s: f64) -> Options {
    Options { variant: Variant::Published, ..exact(s) }
}

#[track_caller]
fn close(got: f64, want: f64, what: &str) {
    // A handful of f64 operations on small numbers.
    assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{what}: {got}, want {want}");
}

#[track_caller]
fn run(aligned: &[f32], target: &[f32], rows: usize, gram: &Gram, o: &Options) -> (Vec<f32>, Report) {
    safe_delta("m", aligned, target, rows, gram, o).unwrap()
}

/// H = diag(2, 8), from (1, 2) and (1, −2).
fn diagonal() -> Gram {
    let g = gram(&[&[1.0, 2.0], &[1.0, -2.0]]);
    assert_eq!(g.sums(), [2.0, 0.0, 0.0, 8.0]);
    g
}

#[test]
fn diagonal_costs_are_separable() {
    // ΔW = [[1, 1], [2, 1/2]], 1/[H⁻¹]_jj = H_jj = (2, 8): costs [[2, 8], [8, 2]], sum 20.
    let (a, t) = ([1.0, 1.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.5]);
    // A quarter: 5 buys the two entries of cost 2.
    let (w, r) = run(&a, &t, 2, &diagonal(), &exact(0.25));
    assert_eq!(w, [2.0, 1.0, 0.0, 2.5]);
    assert_eq!((r.entries, r.moved, r.kept), (4, 4, 2));
    close(r.cost, 20.0, "cost");
    close(r.budget, 5.0, "budget");
    close(r.spent, 4.0, "spent");
    // ½ Σ H_jj ΔW_ij²: half the costs, with nothing to compensate.
    close(r.distance_target, 10.0, "distance of the target");
    close(r.distance_masked, 2.0, "distance masked");
    close(r.distance, 2.0, "distance");
    // 14 buys one of the two that cost 8 as well: the first in row-major order.
    let (w, r) = run(&a, &t, 2, &diagonal(), &exact(0.7));
    assert_eq!(w, [2.0, 2.0, 0.0, 2.5]);
    close(r.spent, 12.0, "spent");
}

#[test]
fn budget_of_nothing_is_aligned_and_of_everything_the_target() {
    let g = gram(&[&[1.0, 1.0, 0.0], &[1.0, 0.0, 3.0, 0.0, 1.0, -1.0]]);
    let (a, t) = ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.3, -0.7, 0.3, 1.4, 0.55, 0.1]);
    let (w, r) = run(&a, &t, 2, &g, &exact(0.0));
    assert_eq!((w.as_slice(), r.kept, r.distance), (&a[..], 0, 0.0));
    let (w, r) = run(&a, &t, 2, &g, &exact(1.0));
    assert_eq!((w.as_slice(), r.moved, r.kept), (&t[..], 5, 5));
    close(r.spent, r.cost, "spent");
    close(r.distance, r.distance_target, "distance");
}

#[test]
fn kept_column_is_made_up_for_by_the_next() {
    // H = [[2, 1], [1, 2]] from (1, 1), (1, 0), (0, 1); H⁻¹ = 1/3 [[2, −1], [−1, 2]], [H⁻¹]_jj = 2/3.
    let g = gram(&[&[1.0, 1.0], &[1.0, 0.0, 0.0, 1.0]]);
    assert_eq!(g.sums(), [2.0, 1.0, 1.0, 2.0]);
    // ΔW = (3, 10): costs 27/2 and 150, sum 327/2; a tenth buys column 0.
    let (w, r) = run(&[1.0, 1.0], &[4.0, 11.0], 1, &g, &exact(0.1));
    close(r.cost, 163.5, "cost");
    close(r.spent, 13.5, "spent");
    // Column 1 moves by ΔW · [H⁻¹]_01/[H⁻¹]_00 = 3 · (−1/3)/(2/3) = −3/2.
    close(f64::from(w[0]), 4.0, "column 0");
    close(f64::from(w[1]), -0.5, "column 1");
    // δ = (3, −3/2): ½(2·9 + 2·1·3·(−3/2) + 2·9/4) = 27/4, half the cost; without compensation ½·2·9 = 9.
    close(r.distance, 6.75, "distance");
    close(r.distance_masked, 9.0, "distance masked");
    // ½(2·9 + 2·30 + 2·100) = 139.
    close(r.distance_target, 139.0, "distance of the target");
}

#[test]
fn earlier_columns_are_not_touched() {
    let g = gram(&[&[1.0, 1.0], &[1.0, 0.0, 0.0, 1.0]]);
    let (w, r) = run(&[1.0, 1.0], &[11.0, 4.0], 1, &g, &exact(0.1));
    assert_eq!(w, [1.0, 4.0]);
    close(r.distance, 9.0, "distance");
}

#[test]
fn second_kept_column_steps_from_where_compensation_left_it() {
    // U = [[1, 1, 0], [0, 1, 2], [0, 0, 1]]: H⁻¹ = UᵀU = [[1, 1, 0], [1, 2, 2], [0, 2, 5]],
    // H = R Rᵀ with R = U⁻¹ = [[1, −1, 2], [0, 1, −2], [0, 0, 1]]: the columns of R are the inputs.
    let g = gram(&[&[1.0, 0.0, 0.0], &[-1.0, 1.0, 0.0, 2.0, -2.0, 1.0]]);
    assert_eq!(g.sums(), [6.0, -5.0, 2.0, -5.0, 5.0, -2.0, 2.0, -2.0, 1.0]);
    // Costs 1²/1, 2²/2, 40²/5 = 1, 2, 320; a hundredth of 323 buys columns 0 and 1.
    let (w, r) = run(&[0.0; 3], &[1.0, 2.0, 40.0], 1, &g, &exact(0.01));
    close(r.spent, 3.0, "spent");
    // Column 0 by 1 moves column 1 to 1 and column 2 by 0; from 1 to 2 is a step of 1, which moves column 2 by 2.
    for (k, want) in [1.0, 2.0, 2.0].into_iter().enumerate() {
        close(f64::from(w[k]), want, "column");
    }
    // ½(1² + 1²), the two steps over U_jj = 1.
    close(r.distance, 1.0, "distance");
}

#[test]
fn budget_by_step_is_the_cost_of_that_step_everywhere() {
    // H = diag(2, 8), two rows: Σ_ij 1/[H⁻¹]_jj = 20; with s = 4096² · 0.41 the budget is 8.2.
    let (a, t) = ([1.0, 1.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.5]);
    let o = Options { budget: Budget::Step, ..exact(4096.0 * 4096.0 * 0.41) };
    let (w, r) = run(&a, &t, 2, &diagonal(), &o);
    close(r.budget, 8.2, "budget");
    assert_eq!(w, [2.0, 1.0, 0.0, 2.5]);
}

#[test]
fn published_orders_by_the_diagonal_not_by_the_cost() {
    // H = diag(1, 2, 4, 8) from unit vectors; U_jj² = 1/H_jj. Mean of 1/U² is 15/4, rows/4096 = 1/2048: s = 4096 makes
    // the budget 15/4 · 2048 · 1/2048 = 15/4.
    let r2 = |x: f32| x.sqrt();
    let g =
        gram(&[&[1.0, 0.0, 0.0, 0.0], &[0.0, r2(2.0), 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, r2(8.0)]]);
    let a = [0.0; 8];
    let t = [1.0, 0.5, 0.0, 0.1, 1.0, 1.0, 0.0, 0.1];
    let (w, r) = run(&a, &t, 2, &g, &published(4096.0));
    // √2 in f32 squares to 2 but for 1e-7.
    assert!((r.budget - 3.75).abs() < 1e-6, "{}", r.budget);
    // In order: 1, 1 of column 0; 1/2, then 2 of column 1, which is one too many. The cheap 0.08 of column 3 are never reached.
    assert_eq!(w, [1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    assert!((r.spent - 2.5).abs() < 1e-6);
    // By cost the two entries of 0.08 come first.
    let (w, _) = run(&a, &t, 2, &g, &Options { s: 0.16 / 4.66 + 0.001, ..exact(0.0) });
    assert_eq!(w, [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.1]);
}

#[test]
fn published_never_keeps_the_last_of_the_order() {
    // H = I of width 5, two rows: ten entries, int(1.5) = 1 is left out, whatever the budget.
    let mut g = Gram::new(5);
    g.add_row(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
    g.add_row(&[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    let (w, r) = run(&[0.0; 10], &[1.0; 10], 2, &g, &published(1e9));
    assert_eq!(r.kept, 9);
    assert_eq!(w, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
}

#[test]
fn published_blocks_of_2048_columns_have_a_budget_each() {
    // H = I, two rows, every entry moves by 1 and costs 1; s = 5 · 4096/2: each block may spend s/2 · 1 · 2/4096 = 5/2.
    let n = 2050;
    let sums = (0..n * n).map(|e| f64::from(u8::from(e / n == e % n))).collect();
    let g = Gram::from_sums(n, 2, n, sums).unwrap();
    let (w, r) = run(&vec![0.0; 2 * n], &vec![1.0; 2 * n], 2, &g, &published(10_240.0));
    close(r.budget, 5.0, "budget");
    close(r.spent, 4.0, "spent");
    let kept: Vec<usize> = (0..2 * n).filter(|&e| w[e] == 1.0).collect();
    // Row-major inside a block: the first two columns of row 0, of 2,048 and of the two that are left.
    assert_eq!(kept, [0, 1, 2048, 2049]);
    assert!(matches!(Gram::from_sums(3, 1, 1, vec![0.0; 8]), Err(RunError::Size { need: 9, .. })));
}

/// U is the identity but for U_01 = 1 and U_04 = 2; the columns of R = U⁻¹ are the inputs.
fn grouped() -> Gram {
    let mut g = Gram::new(5);
    g.add_row(&[1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
    g.add_row(&[0.0, 0.0, 0.0, 1.0, 0.0, -2.0, 0.0, 0.0, 0.0, 1.0]);
    g
}

#[test]
fn published_groups_of_four_do_not_compensate_each_other() {
    let mut t = [0.0; 10];
    (t[0], t[4]) = (1.0, 3.0);
    // All 1/U_jj² are 1, rows/4096 = 1/2048: s = 6144 makes the budget 3/2. In row-major order: 1, 0, 0, 0, then 9.
    let (w, r) = run(&[0.0; 10], &t, 2, &grouped(), &published(6144.0));
    close(r.budget, 1.5, "budget");
    // Column 0 by 1 moves column 4 by U_04 = 2; column 1 is of the same group, and kept at its own value.
    assert_eq!(w, [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    // Exact: [H⁻¹]_jj = (1, 2, 1, 1, 5), costs 1 and 9/5; 1.12 buys column 0, and column 1 moves by 1.
    let (w, r) = run(&[0.0; 10], &t, 2, &grouped(), &exact(0.4));
    close(r.cost, 2.8, "cost");
    assert_eq!(w, [1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    // The move follows the inputs' null space: ½ δᵀHδ = ½ · (1/U_00)² = 1/2.
    close(r.distance, 0.5, "distance");
}

#[test]
fn singular_inputs_need_damping() {
    // One direction only: H = [[1, 1], [1, 1]].
    let g = gram(&[&[1.0, 1.0], &[0.0, 0.0]]);
    let (a, t) = ([0.0, 0.0], [1.0, 5.0]);
    let e = safe_delta("model.layers.0.mlp.up_proj", &a, &t, 1, &g, &exact(0.1)).unwrap_err();
    assert!(
        e.to_string().contains("model.layers.0.mlp.up_proj") && e.hint().unwrap().contains("damping"),
        "{e}"
    );
    let (w, _) = run(&a, &t, 1, &g, &Options { damping: 0.01, ..exact(0.1) });
    // H = [[1.01, 1], [1, 1.01]]: column 1 moves by −H_01/H_11 = −1/1.01 for the 1 of column 0.
    assert_eq!(w[0], 1.0);
    assert!((w[1] + 1.0 / 1.01).abs() < 1e-6, "{}", w[1]);
    // Nothing was ever read: no damping helps.
    let zero = gram(&[&[0.0, 0.0], &[0.0, 0.0]]);
    assert!(matches!(safe_delta("m", &a, &t, 1, &zero, &Options::default()), Err(RunError::Singular { .. })));
    // The published code puts 1 there: any change is as dear as its square.
    let (w, _) = run(&a, &t, 1, &zero, &published(1e9));
    assert_eq!(w, [1.0, 5.0]);
}

#[test]
fn bad_operands_are_refused_by_name() {
    let g = diagonal();
    let run = |a: &[f32], t: &[f32], o: &Options| safe_delta("m", a, t, 1, &g, o).unwrap_err().to_string();
    let good = Options::default();
    assert!(run(&[0.0], &[0.0, 1.0], &good).contains("the aligned weight has 1 values, 2 are needed"));
    assert!(run(&[0.0; 2], &[f32::NAN, 1.0], &good).contains("the target's weight holds"));
    for o in [Options { s: -1.0, ..good }, Options { s: f64::NAN, ..good }] {
        assert!(run(&[0.0; 2], &[0.0; 2], &o).contains("`s` is"));
    }
    assert!(run(&[0.0; 2], &[0.0; 2], &Options { damping: -0.1, ..good }).contains("`damping` is"));
    let none = Gram::new(2);
    let e = safe_delta("m", &[0.0; 2], &[0.0; 2], 1, &none, &good).unwrap_err();
    assert!(matches!(e, RunError::NoRows("safety")));
    let mut wild = Gram::new(2);
    wild.add_row(&[f32::INFINITY, 1.0]);
    let e = safe_delta("m", &[0.0; 2], &[0.0; 2], 1, &wild, &good).unwrap_err();
    assert!(matches!(e, RunError::NotFinite { what: "the Gram matrix", .. }));
}

#[test]
fn result_does_not_depend_on_threads() {
    let (rows, n) = (13, 21);
    let g = {
        let mut g = Gram::new(n);
        g.add_row(&crate::decoder::noise(40 * n, 3));
        g
    };
    let a = crate::decoder::noise(rows * n, 1);
    let t: Vec<f32> = a.iter().zip(crate::decoder::noise(rows * n, 2)).map(|(a, d)| a + 0.1 * d).collect();
    for variant in [Variant::Exact, Variant::Published] {
        let o =
            Options { variant, s: if variant == Variant::Exact { 0.3 } else { 5.0 }, ..Options::default() };
        let [one, four] = [1, 4].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| safe_delta("m", &a, &t, rows, &g, &o).unwrap())
        });
        assert_eq!(one, four);
        assert!(one.1.kept > 0 && one.1.kept < one.1.moved, "{variant:?}: {:?}", one.1);
        // What is kept is the target's, bit for bit; compensation makes the rest differ from aligned.
        assert!(one.1.distance < one.1.distance_masked, "{variant:?}: {:?}", one.1);
    }
}
