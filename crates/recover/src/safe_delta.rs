//! Which fine-tuned entries may stay, by what they cost on safety rows: Safe Delta (arXiv 2505.12038).
//!
//! For one linear module, `W_a` aligned, `W_t` fine-tuned, `ΔW = W_t − W_a`, and `x` what the module reads in the
//! *aligned* model over all tokens (prompt and answer) of `N` safety rows (128 in the paper):
//!
//! ```text
//! H = 2/N · Σ x xᵀ + λI,   λ = damping · mean diagonal of 2/N · Σ x xᵀ
//! cost of keeping entry (i, j):   ΔW_ij² / [H⁻¹]_jj
//! ```
//!
//! Why this is the cost: a change `δ` of row `i` moves the safety outputs by `½ δᵀHδ` (the mean over rows of the squared
//! change summed over tokens). Under `δ_j = Δ` with the other columns free, the Lagrangian `½ δᵀHδ − μ(δ_j − Δ)` gives
//! `δ = μ H⁻¹e_j`, `μ = Δ/[H⁻¹]_jj`, so
//!
//! ```text
//! δ_k = Δ · [H⁻¹]_jk / [H⁻¹]_jj      and      ½ δᵀHδ = ½ Δ² / [H⁻¹]_jj        (Optimal Brain Surgeon)
//! ```
//!
//! **[`Variant::Exact`].** Entries that moved are sorted by cost, cheapest first (ties: row-major order), over the whole
//! module, and the longest run whose costs sum to at most the [`Budget`] stays. Then each row is walked from the first
//! column to the last. A kept column is set to `W_t`; with `e` the step this takes from the column's present value, every
//! *later* column moves by `e · [H_F⁻¹]_jk/[H_F⁻¹]_jj`, `F = {j, j+1, …}` the columns that are still free. With `U` the upper
//! Cholesky factor of `H⁻¹ = UᵀU` this is `e · U_jk/U_jj`, and `U_jj² = [H_F⁻¹]_jj`. A kept column is exactly `W_t` at the
//! end; any other is `W_a` plus compensation, entries that did not move included. Where all that moved may stay, nothing is
//! left to make up for, and the target is returned as it is.
//!
//! **[`Variant::Published`]** follows the authors' code (`ColinLu50/SafeDelta`, read for its arithmetic) where that differs:
//! costs are `ΔW_ij²/U_jj²`; candidates are ordered by `1/U_jj²`, smallest first, *not* by cost, and the last 15 % of that
//! order are never kept; blocks of 2,048 columns are chosen one by one, each with the budget
//! `s/2 · mean(1/U_jj²) · rows/4096`; entries that did not move are candidates, which cancels compensation in them; groups
//! of four columns do not compensate each other; columns never read get 1 on the diagonal before damping.
//! Ties, which are all rows of one column, go to the lower row (theirs: unspecified). Theirs keeps nothing in a block of
//! fewer than seven entries (an empty slice); ours treats it like any other.
//!
//! What is ours: sorting by cost under [`Budget::Share`] (the code's budget grows with the weights' absolute size and fits
//! one model size; `s` as a share of the cost of keeping everything does not); the definition of ties; counting what moved;
//! f64 throughout. The code's order, by `1/[H⁻¹]_jj` alone, is what maximises `Σ ΔW²` for its cost, entry by entry; ours
//! keeps the most entries.
//! `N` counts rows, as in the code, not tokens; no choice depends on it.
//!
//! Not here: models, except that [`gram`](crate::gram) measures them, and folders, which are [`SafeDelta`]'s; biases, norms and embeddings, which stay fine-tuned
//! or return to aligned as the caller likes (the authors' code starts from the aligned model, so they return).

mod method;

pub(crate) use method::INFO;
pub use method::SafeDelta;

use crate::gram::Gram;
use crate::run_error::RunError;
use faer::{Mat, Side};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Which of the two algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Sorted by exact cost.
    Exact,
    /// As in the authors' code.
    Published,
}

/// What [`Variant::Exact`] may spend; the published variant has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// `s` times the cost of keeping every entry: 0 gives the aligned module, 1 the fine-tuned one.
    Share,
    /// `s/4096² · Σ_ij 1/[H⁻¹]_jj`, the cost if every entry had moved by `√s/4096`: the published budget without its blocks.
    Step,
}

/// How much stays, and how.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Algorithm.
    pub variant: Variant,
    /// Scale of the budget.
    pub s: f64,
    /// What `s` is a multiple of.
    pub budget: Budget,
    /// λ over the mean diagonal of `H`.
    pub damping: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { variant: Variant::Exact, s: 0.1, budget: Budget::Share, damping: 0.01 }
    }
}

/// What was kept of one module, and what it costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Entries of the module.
    pub entries: usize,
    /// Entries that differ between the two sides.
    pub moved: usize,
    /// Of these, how many stay fine-tuned.
    pub kept: usize,
    /// Cost of keeping all that moved.
    pub cost: f64,
    /// What could be spent; of several blocks, the sum.
    pub budget: f64,
    /// What was spent.
    pub spent: f64,
    /// `½ tr(D H Dᵀ)` without damping, `D` the fine-tuned minus the aligned weight: the target's distance on safety rows.
    pub distance_target: f64,
    /// The same with the kept entries alone, before compensation.
    pub distance_masked: f64,
    /// The same of the result.
    pub distance: f64,
}

/// Columns of a block of the published code.
const BLOCK: usize = 2048;
/// Columns that do not compensate each other in the published code.
const GROUP: usize = 4;
/// Share of candidates that the published code never keeps.
const LEFT_OUT: f64 = 0.15;
/// Rows, and columns, of the weight to which the published budget is scaled.
const WIDTH: f64 = 4096.0;

/// The weight `[rows, gram.width()]` with the affordable fine-tuned entries, and what was done; both sides row-major.
///
/// `module` names the weight in errors.
pub fn safe_delta(
    module: &str,
    aligned: &[f32],
    target: &[f32],
    rows: usize,
    gram: &Gram,
    options: &Options,
) -> Result<(Vec<f32>, Report), RunError> {
    RunError::check_not_negative("s", options.s)?;
    RunError::check_not_negative("damping", options.damping)?;
    let n = gram.width();
    for (what, values) in [("the aligned weight", aligned), ("the target's weight", target)] {
        RunError::check_size(module, what, rows.saturating_mul(n), values.len())?;
        RunError::check_finite(module, what, values)?;
    }
    if !gram.sums().iter().all(|v| v.is_finite()) {
        return Err(RunError::NotFinite { module: module.into(), what: "the Gram matrix" });
    }
    if gram.rows() == 0 {
        return Err(RunError::NoRows("safety"));
    }
    let h = hessian(gram, options);
    let u = upper_factor(&h, n)
        .ok_or_else(|| RunError::Singular { module: module.into(), damping: options.damping })?;
    // [H⁻¹]_jj = Σ_{i ≤ j} U_ij², or what the published code has in its place.
    let inverse_diagonal: Vec<f64> = match options.variant {
        Variant::Exact => (0..n).map(|j| (0..=j).map(|i| u[i * n + j] * u[i * n + j]).sum()).collect(),
        Variant::Published => (0..n).map(|j| u[j * n + j] * u[j * n + j]).collect(),
    };
    let price: Vec<f64> = inverse_diagonal.iter().map(|d| 1.0 / d).collect();
    let choice = match options.variant {
        Variant::Exact => by_cost(aligned, target, rows, &price, options),
        Variant::Published => as_published(aligned, target, rows, &price, options),
    };
    let group = match options.variant {
        Variant::Exact => 1,
        Variant::Published => GROUP,
    };
    let moved = |e: usize| aligned[e] != target[e];
    let moved_count = (0..rows * n).filter(|&e| moved(e)).count();
    let kept = (0..rows * n).filter(|&e| choice.keep[e] && moved(e)).count();
    let mut out = target.to_vec();
    let of_row = |i: usize| i * n..(i + 1) * n;
    if n > 0 && (kept < moved_count || options.variant == Variant::Published) {
        out.par_chunks_mut(n).enumerate().for_each(|(i, out)| {
            let at = of_row(i);
            walk(out, &aligned[at.clone()], &target[at.clone()], &choice.keep[at], &u, group);
        });
    }

    let change = |side: &dyn Fn(usize) -> f32| -> Vec<f64> {
        (0..rows * n).map(|e| f64::from(side(e)) - f64::from(aligned[e])).collect()
    };
    // ½ tr(D H Dᵀ) = ½ · 2/N · tr(D G Dᵀ).
    let distance = |d: Vec<f64>| gram.moved(&d) / gram.rows() as f64;
    let report = Report {
        entries: rows * n,
        moved: moved_count,
        kept,
        cost: choice.cost,
        budget: choice.budget,
        spent: choice.spent,
        distance_target: distance(change(&|e| target[e])),
        distance_masked: distance(change(&|e| if choice.keep[e] { target[e] } else { aligned[e] })),
        distance: distance(change(&|e| out[e])),
    };
    Ok((out, report))
}

fn hessian(gram: &Gram, options: &Options) -> Vec<f64> {
    let n = gram.width();
    let scale = 2.0 / gram.rows() as f64;
    let mut h: Vec<f64> = gram.sums().iter().map(|g| scale * g).collect();
    if options.variant == Variant::Published {
        for j in 0..n {
            if h[j * n + j] == 0.0 {
                h[j * n + j] = 1.0;
            }
        }
    }
    let mean = (0..n).map(|j| h[j * n + j]).sum::<f64>() / n.max(1) as f64;
    for j in 0..n {
        h[j * n + j] += options.damping * mean;
    }
    h
}

/// `U` upper, row-major, with `H⁻¹ = UᵀU`, or `None` where `H` is not positive definite in f64.
///
/// With rows and columns in reverse, `H` is `L Lᵀ`; in their own order that is `R Rᵀ` with `R` upper, and `U = R⁻¹`: one
/// factorisation, and no inverse of `H` that would have to be factored again.
fn upper_factor(h: &[f64], n: usize) -> Option<Vec<f64>> {
    let reversed = Mat::from_fn(n, n, |i, j| h[(n - 1 - i) * n + (n - 1 - j)]);
    let llt = reversed.llt(Side::Lower).ok()?;
    let l = llt.L();
    let r: Vec<f64> = (0..n * n)
        .map(|e| (e / n, e % n))
        .map(|(i, j)| if j >= i { l[(n - 1 - i, n - 1 - j)] } else { 0.0 })
        .collect();
    // A pivot that rounding alone keeps above zero is no information.
    let largest = (0..n).map(|j| h[j * n + j]).fold(0.0, f64::max);
    let sound = |j: usize| {
        let pivot = r[j * n + j];
        pivot.is_finite() && pivot * pivot > largest * n as f64 * f64::EPSILON
    };
    if !(0..n).all(sound) {
        return None;
    }
    // Column k of U by back substitution, held as row k of `columns`.
    let mut columns = vec![0f64; n * n];
    columns.par_chunks_mut(n.max(1)).enumerate().for_each(|(k, column)| {
        column[k] = 1.0 / r[k * n + k];
        for i in (0..k).rev() {
            let row = &r[i * n..(i + 1) * n];
            let sum: f64 = row[i + 1..=k].iter().zip(&column[i + 1..=k]).map(|(a, b)| a * b).sum();
            column[i] = -sum / row[i];
        }
    });
    Some((0..n * n).map(|e| columns[e % n * n + e / n]).collect())
}

struct Choice {
    keep: Vec<bool>,
    cost: f64,
    budget: f64,
    spent: f64,
}

fn squared(aligned: &[f32], target: &[f32], e: usize) -> f64 {
    let d = f64::from(target[e]) - f64::from(aligned[e]);
    d * d
}

fn by_cost(aligned: &[f32], target: &[f32], rows: usize, price: &[f64], options: &Options) -> Choice {
    let n = price.len();
    let mut order: Vec<(f64, usize)> = (0..rows * n)
        .filter(|&e| aligned[e] != target[e])
        .map(|e| (squared(aligned, target, e) * price[e % n], e))
        .collect();
    order.par_sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    // Summed in the order of choosing, so that a share of 1 is met to the last bit.
    let cost = order.iter().fold(0.0, |sum, (c, _)| sum + c);
    let budget = match options.budget {
        Budget::Share => options.s * cost,
        Budget::Step => options.s / (WIDTH * WIDTH) * rows as f64 * price.iter().sum::<f64>(),
    };
    let (mut keep, mut spent) = (vec![false; rows * n], 0.0);
    for (c, e) in order {
        if spent + c > budget {
            break;
        }
        spent += c;
        keep[e] = true;
    }
    Choice { keep, cost, budget, spent }
}

fn as_published(aligned: &[f32], target: &[f32], rows: usize, price: &[f64], options: &Options) -> Choice {
    let n = price.len();
    let mut choice = Choice { keep: vec![false; rows * n], cost: 0.0, budget: 0.0, spent: 0.0 };
    for first in (0..n).step_by(BLOCK) {
        let columns = first..(first + BLOCK).min(n);
        let budget = columns.clone().map(|j| price[j]).sum::<f64>() / columns.len() as f64
            * (options.s / 2.0)
            * (rows as f64 / WIDTH);
        choice.budget += budget;
        let mut order: Vec<usize> = (0..rows).flat_map(|i| columns.clone().map(move |j| i * n + j)).collect();
        choice.cost += order.iter().map(|&e| squared(aligned, target, e) * price[e % n]).sum::<f64>();
        order.par_sort_unstable_by(|&a, &b| price[a % n].total_cmp(&price[b % n]).then(a.cmp(&b)));
        order.truncate(order.len() - (LEFT_OUT * order.len() as f64) as usize);
        let mut spent = 0.0;
        for e in order {
            let c = squared(aligned, target, e) * price[e % n];
            if spent + c > budget {
                break;
            }
            spent += c;
            choice.keep[e] = true;
        }
        choice.spent += spent;
    }
    choice
}

/// One row: kept columns become the target's, later ones make up for it. In groups of `group` columns, only columns
/// behind the group do.
fn walk(out: &mut [f32], aligned: &[f32], target: &[f32], keep: &[bool], u: &[f64], group: usize) {
    let n = aligned.len();
    let mut w: Vec<f64> = aligned.iter().map(|&x| f64::from(x)).collect();
    for j in 0..n {
        if !keep[j] {
            continue;
        }
        let u = &u[j * n..(j + 1) * n];
        let step = (f64::from(target[j]) - w[j]) / u[j];
        w[j] = f64::from(target[j]);
        if step == 0.0 {
            continue;
        }
        let behind = ((j / group + 1) * group).min(n);
        for (w, u) in w[behind..].iter_mut().zip(&u[behind..]) {
            *w += step * u;
        }
    }
    for (out, w) in out.iter_mut().zip(w) {
        *out = w as f32;
    }
}
