//! Sequential quadratic programming over a box, for a handful of scalars.
//!
//! Minimises `f(x)` subject to `h_j(x) ≤ 0` and `low ≤ x ≤ high`. Each step solves a quadratic model with linearised
//! constraints inside a trust region (Nocedal & Wright, *Numerical Optimization*, 2nd ed., ch. 18: ℓ₁ merit function,
//! damped BFGS of the Lagrangian, procedure 18.2). Every evaluation returns exact gradients; a rejected point still
//! teaches the curvature.

/// Values and gradients at one point.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Where.
    pub x: Vec<f64>,
    /// Objective.
    pub f: f64,
    /// Its gradient.
    pub df: Vec<f64>,
    /// Constraints, each wanted ≤ 0.
    pub h: Vec<f64>,
    /// Their gradients.
    pub dh: Vec<Vec<f64>>,
}

impl Point {
    /// Largest violation of a constraint.
    pub fn violation(&self) -> f64 {
        self.h.iter().fold(0.0, |m, &h| f64::max(m, h))
    }
}

/// Box, first trust radius, budget and tolerances.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Smallest value of every variable.
    pub low: f64,
    /// Largest value of every variable.
    pub high: f64,
    /// First trust radius, per variable.
    pub radius: f64,
    /// Evaluations (each with gradients) at most.
    pub evaluations_max: usize,
    /// A violation up to this counts as none.
    pub feasible: f64,
    /// Ends when a feasible step promises less than this share of `f`.
    pub progress: f64,
    /// Ends at a feasible point where `f` is at most this: less would not matter.
    pub enough: f64,
    /// Curvature that `f` is known to have in every direction; added to the first guess of the Hessian.
    pub curvature: f64,
}

/// Price of a violation in the merit function; grows when multipliers ask for more.
const PENALTY: f64 = 1.0;
/// A constraint that cannot be met asks for more in every step; its price ends here, far above any that can be.
const PENALTY_MAX: f64 = 1e6;

/// Minimises; returns the best feasible point, or the least infeasible one. `evaluate` may fail; the error ends the run.
pub fn minimise<E>(
    start: Point,
    settings: &Settings,
    mut evaluate: impl FnMut(&[f64]) -> Result<Point, E>,
) -> Result<(Point, usize), E> {
    let n = start.x.len();
    let mut at = start;
    let mut best = at.clone();
    let mut hessian: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row = vec![0.0; n];
            // As if f were quadratic and least at zero: its gradient at x is curvature times x.
            row[i] = (at.df[i].abs() / at.x[i].abs().max(0.1)).max(1e-6);
            row
        })
        .collect();
    // A flat direction gets the curvature of the others, or it would run to the border at once.
    let mean = (0..n).map(|i| hessian[i][i]).sum::<f64>() / n.max(1) as f64;
    for (i, row) in hessian.iter_mut().enumerate() {
        row[i] = row[i].max(0.1 * mean) + settings.curvature;
    }
    let mut radius = settings.radius;
    let mut penalty = PENALTY;
    let mut used = 0;
    while used < settings.evaluations_max {
        if best.violation() <= settings.feasible && best.f <= settings.enough {
            break;
        }
        let (step, multipliers) = quadratic_step(&at, &hessian, settings, radius, penalty);
        penalty = penalty.max(2.0 * multipliers.iter().fold(0.0, |m: f64, &l| m.max(l))).min(PENALTY_MAX);
        let merit = |p: &Point| p.f + penalty * p.h.iter().map(|h| h.max(0.0)).sum::<f64>();
        let predicted = merit(&at) - model(&at, &hessian, &step, penalty);
        if predicted <= settings.progress * at.f.abs().max(1e-12) && at.violation() <= settings.feasible {
            break;
        }
        if step.iter().all(|d| d.abs() < 1e-6) {
            break;
        }
        let x: Vec<f64> =
            at.x.iter().zip(&step).map(|(x, d)| (x + d).clamp(settings.low, settings.high)).collect();
        let new = evaluate(&x)?;
        used += 1;
        update(&mut hessian, &at, &new, &multipliers);
        if better(&new, &best, settings.feasible) {
            best = new.clone();
        }
        let actual = merit(&at) - merit(&new);
        let ratio = actual / predicted.max(1e-300);
        if ratio > 0.75 {
            radius = (radius * 2.0).min(settings.high - settings.low);
        } else if ratio < 0.25 {
            radius = (0.5 * radius).min(step.iter().fold(0.0, |m: f64, d| m.max(d.abs())) * 0.5).max(1e-3);
        }
        if actual > 0.0 {
            at = new;
        }
    }
    Ok((best, used))
}

/// Feasible beats infeasible; then the smaller objective or the smaller violation wins.
pub(crate) fn better(a: &Point, b: &Point, feasible: f64) -> bool {
    let (va, vb) = (a.violation(), b.violation());
    match (va <= feasible, vb <= feasible) {
        (true, true) => a.f < b.f,
        (true, false) => true,
        (false, true) => false,
        (false, false) => va < vb,
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(m: &[Vec<f64>], v: &[f64]) -> Vec<f64> {
    m.iter().map(|row| dot(row, v)).collect()
}

/// Merit of the quadratic model after `step`.
fn model(at: &Point, hessian: &[Vec<f64>], step: &[f64], penalty: f64) -> f64 {
    let f = at.f + dot(&at.df, step) + 0.5 * dot(step, &times(hessian, step));
    let h: f64 = at.h.iter().zip(&at.dh).map(|(h, g)| (h + dot(g, step)).max(0.0)).sum();
    f + penalty * h
}

/// The step of the quadratic model in the box and trust region, with the constraints' multipliers (capped, so that a
/// constraint that cannot be met inside the region is met as far as it can be).
fn quadratic_step(
    at: &Point,
    hessian: &[Vec<f64>],
    settings: &Settings,
    radius: f64,
    penalty: f64,
) -> (Vec<f64>, Vec<f64>) {
    let low: Vec<f64> = at.x.iter().map(|x| (settings.low - x).max(-radius).min(0.0)).collect();
    let high: Vec<f64> = at.x.iter().map(|x| (settings.high - x).min(radius).max(0.0)).collect();
    // The dual is concave in the multipliers: one at a time, each by bisection on the sign of its constraint.
    let cap = 100.0 * penalty;
    let mut lambda = vec![0.0; at.h.len()];
    let solve = |lambda: &[f64]| -> Vec<f64> {
        let mut g = at.df.clone();
        for (l, dh) in lambda.iter().zip(&at.dh) {
            for (g, d) in g.iter_mut().zip(dh) {
                *g += l * d;
            }
        }
        box_quadratic(hessian, &g, &low, &high)
    };
    for _ in 0..if lambda.len() > 1 { 20 } else { 1 } {
        for j in 0..lambda.len() {
            let slack = |l: f64, lambda: &[f64]| {
                let mut lambda = lambda.to_vec();
                lambda[j] = l;
                at.h[j] + dot(&at.dh[j], &solve(&lambda))
            };
            lambda[j] = if slack(0.0, &lambda) <= 0.0 {
                0.0
            } else if slack(cap, &lambda) > 0.0 {
                cap
            } else {
                let (mut lo, mut hi) = (0.0, cap);
                for _ in 0..60 {
                    let mid = 0.5 * (lo + hi);
                    if slack(mid, &lambda) > 0.0 { lo = mid } else { hi = mid }
                }
                hi
            };
        }
    }
    let step = solve(&lambda);
    // A capped multiplier is not the constraint's price.
    for l in &mut lambda {
        *l = l.min(10.0 * penalty);
    }
    (step, lambda)
}

/// Minimises `½ dᵀHd + gᵀd` over a box by coordinate descent; H is positive definite.
fn box_quadratic(h: &[Vec<f64>], g: &[f64], low: &[f64], high: &[f64]) -> Vec<f64> {
    let n = g.len();
    let mut d = vec![0.0; n];
    for _ in 0..500 {
        let mut moved = 0.0f64;
        for i in 0..n {
            let slope = g[i] + dot(&h[i], &d);
            let new = (d[i] - slope / h[i][i]).clamp(low[i], high[i]);
            moved = moved.max((new - d[i]).abs());
            d[i] = new;
        }
        if moved < 1e-10 {
            break;
        }
    }
    d
}

/// Damped BFGS of the Lagrangian: stays positive definite whatever the curvature.
fn update(hessian: &mut [Vec<f64>], old: &Point, new: &Point, multipliers: &[f64]) {
    let n = old.x.len();
    let gradient = |p: &Point| -> Vec<f64> {
        let mut g = p.df.clone();
        for (l, dh) in multipliers.iter().zip(&p.dh) {
            for (g, d) in g.iter_mut().zip(dh) {
                *g += l * d;
            }
        }
        g
    };
    let s: Vec<f64> = new.x.iter().zip(&old.x).map(|(a, b)| a - b).collect();
    let mut y: Vec<f64> = gradient(new).iter().zip(&gradient(old)).map(|(a, b)| a - b).collect();
    let hs = times(hessian, &s);
    let shs = dot(&s, &hs);
    if shs < 1e-16 {
        return;
    }
    let sy = dot(&s, &y);
    if sy < 0.2 * shs {
        let theta = 0.8 * shs / (shs - sy);
        for (y, hs) in y.iter_mut().zip(&hs) {
            *y = theta * *y + (1.0 - theta) * hs;
        }
    }
    let sy = dot(&s, &y);
    for i in 0..n {
        for j in 0..n {
            hessian[i][j] += y[i] * y[j] / sy - hs[i] * hs[j] / shs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn settings() -> Settings {
        Settings {
            low: 0.0,
            high: 10.0,
            radius: 2.0,
            evaluations_max: 40,
            feasible: 1e-3,
            progress: 1e-6,
            enough: f64::NEG_INFINITY,
            curvature: 0.0,
        }
    }

    #[track_caller]
    fn check(f: impl Fn(&[f64]) -> Point, start: &[f64], want: &[f64], tolerance: f64) {
        let run = |x: &[f64]| -> Result<Point, Infallible> { Ok(f(x)) };
        let (best, used) = minimise(f(start), &settings(), run).unwrap();
        for (i, (got, want)) in best.x.iter().zip(want).enumerate() {
            assert!((got - want).abs() < tolerance, "x[{i}] = {got}, want {want}, after {used} evaluations");
        }
        assert!(used <= 40);
    }

    #[test]
    fn quadratic_with_a_linear_constraint() {
        // min x² + 4y² with x + y ≥ 5: Lagrange gives x = 4, y = 1.
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: x[0] * x[0] + 4.0 * x[1] * x[1],
            df: vec![2.0 * x[0], 8.0 * x[1]],
            h: vec![5.0 - x[0] - x[1]],
            dh: vec![vec![-1.0, -1.0]],
        };
        check(f, &[1.0, 1.0], &[4.0, 1.0], 2e-2);
    }

    #[test]
    fn ends_early_where_less_would_not_matter() {
        // min x² with x ≥ 1: any feasible point with x² ≤ 9 is good enough.
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: x[0] * x[0],
            df: vec![2.0 * x[0]],
            h: vec![1.0 - x[0]],
            dh: vec![vec![-1.0]],
        };
        let run = |x: &[f64]| -> Result<Point, Infallible> { Ok(f(x)) };
        let early = Settings { enough: 9.0, ..settings() };
        let (best, used) = minimise(f(&[9.0]), &early, run).unwrap();
        assert!(best.f <= 9.0 && best.x[0] >= 0.999, "{best:?}");
        let (exact, more) = minimise(f(&[9.0]), &settings(), run).unwrap();
        assert!((exact.x[0] - 1.0).abs() < 1e-2 && used < more, "{used} and {more}");
        assert_eq!(minimise(f(&[2.0]), &early, run).unwrap().1, 0, "the start is good enough");
    }

    #[test]
    fn bounds_hold() {
        // min (x − 12)² + (y + 3)²: both at the border.
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: (x[0] - 12.0).powi(2) + (x[1] + 3.0).powi(2),
            df: vec![2.0 * (x[0] - 12.0), 2.0 * (x[1] + 3.0)],
            h: vec![],
            dh: vec![],
        };
        check(f, &[1.0, 1.0], &[10.0, 0.0], 1e-9);
    }

    #[test]
    fn curved_constraint_as_in_calibration() {
        // KL-like: f = Σ w x², safety-like: log loss = 3 − Σ a √(1 + x²) ≤ 0.
        let (w, a) = ([1.0, 0.2, 3.0], [1.0, 1.0, 0.5]);
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: (0..3).map(|i| w[i] * x[i] * x[i]).sum(),
            df: (0..3).map(|i| 2.0 * w[i] * x[i]).collect(),
            h: vec![4.0 - (0..3).map(|i| a[i] * (1.0 + x[i] * x[i]).sqrt()).sum::<f64>()],
            dh: vec![(0..3).map(|i| -a[i] * x[i] / (1.0 + x[i] * x[i]).sqrt()).collect()],
        };
        let run = |x: &[f64]| -> Result<Point, Infallible> { Ok(f(x)) };
        let (best, _) = minimise(f(&[1.0; 3]), &settings(), run).unwrap();
        // By hand: all on the second variable (cheapest a²/w), a₂√(1+x²) = 4 − 1 − 0.5.
        let want = (2.5f64 * 2.5 - 1.0).sqrt();
        assert!(best.violation() <= 1e-3);
        assert!((best.x[1] - want).abs() < 0.05, "{:?}", best.x);
        assert!(best.f < 0.2 * want * want * 1.02, "{}", best.f);
    }

    #[test]
    fn two_constraints() {
        // max x + y with x² + y² ≤ 4 and x ≤ 1.
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: -x[0] - x[1],
            df: vec![-1.0, -1.0],
            h: vec![x[0] * x[0] + x[1] * x[1] - 4.0, x[0] - 1.0],
            dh: vec![vec![2.0 * x[0], 2.0 * x[1]], vec![1.0, 0.0]],
        };
        check(f, &[0.5, 0.5], &[1.0, 3f64.sqrt()], 5e-3);
    }

    #[test]
    fn what_cannot_be_met_is_met_as_far_as_it_can() {
        // x ≥ 20 in a box that ends at 10.
        let f = |x: &[f64]| Point {
            x: x.to_vec(),
            f: 0.01 * x[0] * x[0],
            df: vec![0.02 * x[0]],
            h: vec![20.0 - x[0]],
            dh: vec![vec![-1.0]],
        };
        check(f, &[1.0], &[10.0], 1e-6);
    }

    #[test]
    fn constraint_that_is_never_met_and_a_large_budget_stay_finite() {
        // The price of the violation must not grow without end; the noise keeps the run from ending by itself.
        let noise = |x: f64| 1e-2 * (x * 1e9).sin();
        let f = |x: &[f64]| {
            assert!(x.iter().all(|x| x.is_finite()), "{x:?}");
            Point {
                x: x.to_vec(),
                f: 0.1 * x[1] + noise(x[0] + x[1]),
                df: vec![noise(x[0]), 0.1 + noise(x[1])],
                h: vec![1.0 + (x[0] - 3.0).powi(2) + noise(x[0])],
                dh: vec![vec![2.0 * (x[0] - 3.0) + noise(x[1]), noise(x[0])]],
            }
        };
        let settings = Settings { evaluations_max: 2000, progress: 0.0, feasible: 0.0, ..settings() };
        let run = |x: &[f64]| -> Result<Point, Infallible> { Ok(f(x)) };
        let (best, used) = minimise(f(&[5.0, 5.0]), &settings, run).unwrap();
        assert!(used > 300, "the run ended after {used} evaluations and shows nothing");
        assert!((best.x[0] - 3.0).abs() < 0.2, "{best:?}");
    }
}
