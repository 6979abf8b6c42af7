//! `factor_factors` and `certify_factors` on sums of low-rank products.

use faer::Mat;
use lowrank::{LowRank, LowRankError, Rank, Term, certify_factors, factor_factors};

use crate::{brute_residual, matrix, noise, sum_of_squares};

struct Product {
    b: Vec<f32>,
    a: Vec<f32>,
    rank: usize,
    scale: f64,
}

fn product(seed: u32, rows: usize, cols: usize, rank: usize, scale: f64) -> Product {
    Product { b: noise(seed, rows * rank), a: noise(seed + 1, rank * cols), rank, scale }
}

fn terms(products: &[Product], rows: usize, cols: usize) -> Vec<Term<'_>> {
    products.iter().map(|p| Term { b: &p.b, a: &p.a, rows, cols, rank: p.rank, scale: p.scale }).collect()
}

/// Compares with the dense singular value decomposition. `known` is how well f64 products know the sum, as a share of
/// the squared norm.
#[track_caller]
fn check(products: &[Product], rows: usize, cols: usize, rank: usize, known: f64) -> LowRank {
    let dense = products.iter().fold(Mat::zeros(rows, cols), |sum: Mat<f64>, p| {
        sum + matrix(&p.b, rows, p.rank) * matrix(&p.a, p.rank, cols) * faer::Scale(p.scale)
    });
    let sigma = dense.singular_values().unwrap();
    let energy = dense.squared_norm_l2();
    let optimum = sum_of_squares(&sigma[rank.min(sigma.len())..]) / energy;

    let terms = terms(products, rows, cols);
    let found = factor_factors(&terms, Rank::Fixed(rank)).unwrap();
    let certificate = certify_factors(&terms, &found).unwrap();
    // The factors are rounded to f32 once, each by half an epsilon of its elements.
    let floor = f64::from(f32::EPSILON).powi(2) + known;
    let brute = brute_residual(&dense, &found.b, &found.a, found.rank) / energy;
    assert!(brute <= optimum * (1.0 + 1e-9) + floor, "{brute}, optimum {optimum}");
    assert!((certificate.residual - brute).abs() <= 1e-9 * brute + 1e-9 * floor + 10.0 * known);
    assert!((certificate.energy - energy).abs() <= (1e-12 + known.sqrt()) * energy);
    assert!(certificate.captured() <= certificate.captured_upper_bound);
    assert!((certificate.captured_upper_bound - (1.0 - optimum)).abs() <= 1e-11 + 2.0 * known.sqrt());
    for (theta, sigma) in found.singular.iter().zip(&sigma) {
        assert!((theta - sigma).abs() <= (1e-13 + known.sqrt()) * sigma.max(sigma_norm(&found)));
    }
    found
}

fn sigma_norm(found: &LowRank) -> f64 {
    sum_of_squares(&found.singular).sqrt()
}

#[test]
fn factors_of_one_and_of_several_products() {
    for (rows, cols) in [(100, 61), (60, 101), (33, 33)] {
        for rank in [3, 8, 11, 30] {
            let one = [product(1, rows, cols, 8, 2.0)];
            assert_eq!(check(&one, rows, cols, rank, 0.0).rank, rank.min(8));
            let two = [product(1, rows, cols, 8, 2.0), product(5, rows, cols, 5, -0.25)];
            assert_eq!(check(&two, rows, cols, rank, 0.0).rank, rank.min(13));
        }
    }
}

#[test]
fn factors_of_more_columns_than_a_side() {
    let products = [product(1, 9, 40, 8, 2.0), product(5, 9, 40, 8, -1.0)];
    assert_eq!(check(&products, 9, 40, 16, 0.0).rank, 9);
    let products = [product(1, 1, 1, 3, 1.0)];
    assert_eq!(check(&products, 1, 1, 4, 0.0).rank, 1);
}

#[test]
fn factors_of_adapters_that_differ_little() {
    // Two adapters that agree to about 1e-6: a difference formed from f32 products would be a tenth rounding error.
    let (rows, cols, rank) = (120, 90, 8);
    let first = product(1, rows, cols, rank, 2.0);
    let nudge = |x: &[f32], seed| -> Vec<f32> {
        x.iter().zip(noise(seed, x.len())).map(|(x, e)| x * (1.0 + 1e-6 * e)).collect()
    };
    let second = Product { b: nudge(&first.b, 11), a: nudge(&first.a, 12), rank, scale: -2.0 };
    // f64 knows the products to about 1e-15, hence their difference to 1e-9 of itself: a share of 1e-18.
    let found = check(&[first, second], rows, cols, 16, 1e-17);
    assert_eq!(found.rank, 16);
}

#[test]
fn factors_that_cancel_are_of_rank_zero() {
    let (rows, cols) = (50, 40);
    let products = [product(1, rows, cols, 8, 0.3), product(1, rows, cols, 8, -0.3)];
    let terms = terms(&products, rows, cols);
    let found = factor_factors(&terms, Rank::Fixed(4)).unwrap();
    assert_eq!((found.rank, found.b.len(), found.a.len()), (0, 0, 0));
    assert!(matches!(certify_factors(&terms, &found), Err(LowRankError::ZeroDelta { .. })));
}

#[test]
fn factors_of_a_fresh_adapter_are_of_rank_zero() {
    let fresh = Product { b: vec![0.0; 30], ..product(1, 10, 20, 3, 1.0) };
    assert_eq!(factor_factors(&terms(&[fresh], 10, 20), Rank::Fixed(4)).unwrap().rank, 0);
}

#[test]
fn factors_of_other_shapes_and_rank_zero() {
    let fine = product(1, 10, 20, 3, 1.0);
    let mut products = vec![fine, product(2, 10, 20, 2, 1.0)];
    assert!(matches!(factor_factors(&terms(&products, 10, 20), Rank::Fixed(0)), Err(LowRankError::RankZero)));
    products[1].a.pop();
    let error = factor_factors(&terms(&products, 10, 20), Rank::Fixed(4)).unwrap_err();
    assert!(matches!(error, LowRankError::TermShape { index: 1, .. }));
}
