//! `factor` and `certify` on differences that an engine holds.

use kernels::{CpuEngine, DeltaStats, Dtype, Engine, Shape, Weights};
use lowrank::{Certificate, Factor, LowRank, LowRankError, Rank, certify, factor};

use crate::{brute_residual, matrix, noise, sum_of_squares, with_spectrum};

fn run(delta: &[f32], shape: Shape, options: &Factor) -> Result<(LowRank, Certificate), LowRankError> {
    let engine = CpuEngine::new();
    let bytes: Vec<u8> = delta.iter().flat_map(|x| x.to_le_bytes()).collect();
    let side = |bytes: &[u8]| Weights::copied(bytes, Dtype::F32, shape);
    let pair = engine.pair(side(&bytes)?, side(&vec![0; bytes.len()])?)?;
    let (low_rank, stats) = factor(&engine, &pair, 7, options)?;
    let low_rank = low_rank.ok_or(LowRankError::ZeroDelta { shape })?;
    let certificate = certify(&engine, &pair, &stats, &low_rank)?;
    Ok((low_rank, certificate))
}

/// Factors `delta` and compares with the optimum: the residual may be `slack` times it, beyond the `floor` that f32
/// leaves (a share of the energy).
#[track_caller]
fn check(delta: &[f32], shape: Shape, rank: usize, slack: f64) -> LowRank {
    let Shape { rows, cols } = shape;
    let dense = matrix(delta, rows, cols);
    let sigma = dense.singular_values().unwrap();
    let energy = dense.squared_norm_l2();
    let optimum = sum_of_squares(&sigma[rank.min(sigma.len())..]) / energy;

    let (found, certificate) = run(delta, shape, &Factor::new(Rank::Fixed(rank), 1)).unwrap();
    assert_eq!((found.rows, found.cols, found.singular.len()), (rows, cols, found.rank));
    assert_eq!((found.b.len(), found.a.len()), (rows * found.rank, found.rank * cols));
    assert!(found.rank >= 1 && found.rank <= rank.min(rows).min(cols), "rank {}", found.rank);

    // Each factor is rounded to f32, and products behind them too: a share of (a few epsilons)^2. And f32 products of
    // D^T D know the direction of a value s to an angle of eps (s_1 / s)^2, which costs s^2 times its square.
    let eps = f64::from(f32::EPSILON);
    let unknown = (eps * sigma[0].powi(2) / found.singular[found.rank - 1]).powi(2) / energy;
    let floor = 64.0 * eps.powi(2) + unknown;
    let brute = brute_residual(&dense, &found.b, &found.a, found.rank) / energy;
    // Both sums are f64 over the same factors. The engine's rests carry `rank` roundings of terms up to the energy: of
    // f64 where the sum is small, else of f32, which do not add more than 1e-6 of it.
    let rounding = 1e-6 * brute + 1e-15 * floor.sqrt();
    assert!((certificate.residual - brute).abs() <= rounding, "{} for {brute}", certificate.residual);
    assert!((certificate.energy - energy).abs() <= 1e-12 * energy);
    assert!(brute >= optimum * (1.0 - 1e-9) - floor, "{brute} beats the optimum {optimum}");
    assert!(
        brute <= optimum * slack + floor,
        "{shape} rank {rank}: {brute}, optimum {optimum}: {}",
        brute / optimum
    );
    let (captured, upper) = (certificate.captured(), certificate.captured_upper_bound);
    assert!(captured <= upper, "captured {captured} above {upper}");
    assert!(1.0 - optimum <= upper, "the optimum {} above {upper}", 1.0 - optimum);
    assert!(upper <= 1.0);
    // Ritz values from below; f32 products disturb them by a few epsilons of the largest.
    let rounding = 8.0 * f64::from(f32::EPSILON) * sigma[0];
    for (i, (theta, sigma)) in found.singular.iter().zip(&sigma).enumerate() {
        assert!(*theta <= sigma + rounding, "singular value {i}: {theta} above {sigma}");
    }
    found
}

fn power_law(n: usize, exponent: f64) -> Vec<f64> {
    (1..=n).map(|i| (i as f64).powf(-exponent)).collect()
}

#[test]
fn factor_of_slow_spectra_within_half_a_percent_of_the_optimum() {
    for (rows, cols) in [(400, 300), (300, 401), (511, 700), (896, 768)] {
        let shape = Shape { rows, cols };
        check(&with_spectrum(shape, 1, &power_law(rows.min(cols), 0.5)), shape, 16, 1.005);
    }
}

#[test]
fn factor_of_fast_spectra() {
    for (rows, cols) in [(257, 129), (120, 333)] {
        let shape = Shape { rows, cols };
        check(&with_spectrum(shape, 1, &power_law(100, 1.0)), shape, 16, 1.005);
    }
}

#[test]
fn factor_of_a_planted_rank_finds_it() {
    for (rows, cols, rank, asked) in [(301, 200, 8, 16), (90, 301, 8, 8), (200, 200, 3, 16), (300, 250, 1, 4)]
    {
        let shape = Shape { rows, cols };
        let singular: Vec<f64> = (0..rank).map(|i| 2.0 - i as f64 / 10.0).collect();
        let found = check(&with_spectrum(shape, 5, &singular), shape, asked, 1.0);
        assert_eq!(found.rank, rank, "{shape}: singular values {:?}", found.singular);
        for (theta, sigma) in found.singular.iter().zip(&singular) {
            assert!(
                (theta - sigma).abs() < 8.0 * f64::from(f32::EPSILON) * singular[0],
                "{theta} for {sigma}"
            );
        }
    }
}

#[test]
fn factor_of_a_wide_range_keeps_the_small_values() {
    let shape = Shape { rows: 300, cols: 280 };
    // From 1 down to 1e-3: D^T D in f32 holds a ratio of 1e-6 only just.
    let singular: Vec<f64> = (0..16).map(|i| 10.0f64.powf(-3.0 * f64::from(i) / 15.0)).collect();
    let found = check(&with_spectrum(shape, 5, &singular), shape, 16, 1.0);
    assert_eq!(found.rank, 16);
}

#[test]
fn factor_of_odd_and_small_shapes() {
    for (rows, cols) in
        [(1, 1), (1, 50), (50, 1), (3, 200), (129, 7), (24, 24), (33, 31), (40, 39), (41, 40), (45, 131)]
    {
        for rank in [1, 4, 16, 64] {
            let shape = Shape { rows, cols };
            // White noise, the flattest of spectra: in a side of 41 to 45 the basis of 12 to 18 for ranks 1 and 4 is
            // far from the optimum's, but not in what it captures.
            check(&noise(3, rows * cols), shape, rank, 1.02);
        }
    }
}

#[test]
fn factor_of_a_side_shorter_than_the_sketch_is_the_optimum() {
    for (rows, cols) in [(20, 300), (300, 32), (31, 33)] {
        let shape = Shape { rows, cols };
        check(&noise(3, rows * cols), shape, 16, 1.0 + 1e-9);
    }
}

#[test]
fn factor_of_one_changed_row_column_or_element() {
    let shape = Shape { rows: 150, cols: 131 };
    let x = noise(8, 150 * 131);
    let keep = |keep: &dyn Fn(usize, usize) -> bool| -> Vec<f32> {
        x.iter().enumerate().map(|(at, &x)| if keep(at / 131, at % 131) { x } else { 0.0 }).collect()
    };
    for delta in [keep(&|i, _| i == 149), keep(&|_, j| j == 0), keep(&|i, j| i == 3 && j == 130)] {
        assert_eq!(check(&delta, shape, 16, 1.0).rank, 1);
    }
}

#[test]
fn factor_of_tiny_and_huge_differences() {
    let shape = Shape { rows: 150, cols: 131 };
    for scale in [1e-26f32, 1e-12, 1e12, 1e17] {
        let delta: Vec<f32> =
            with_spectrum(shape, 1, &power_law(131, 1.0)).iter().map(|x| x * scale).collect();
        check(&delta, shape, 16, 1.005);
    }
}

#[test]
fn factor_of_nothing_and_rank_zero() {
    let shape = Shape { rows: 50, cols: 60 };
    assert!(matches!(
        run(&[0.0; 3000], shape, &Factor::new(Rank::Fixed(4), 1)),
        Err(LowRankError::ZeroDelta { .. })
    ));
    assert!(matches!(run(&[1.0; 3000], shape, &Factor::new(Rank::Fixed(0), 1)), Err(LowRankError::RankZero)));
    let empty = Shape { rows: 0, cols: 60 };
    assert!(matches!(run(&[], empty, &Factor::new(Rank::Fixed(4), 1)), Err(LowRankError::ZeroDelta { .. })));
}

#[test]
fn factor_is_the_same_for_any_thread_count() {
    let shape = Shape { rows: 300, cols: 270 };
    let delta = with_spectrum(shape, 1, &power_law(200, 0.5));
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&delta, shape, &Factor::new(Rank::Fixed(16), 1)).unwrap())
    };
    let one = on(1);
    assert!(one == on(2) && one == on(7));
    let other = run(&delta, shape, &Factor::new(Rank::Fixed(16), 2)).unwrap();
    assert!(one.0.b != other.0.b, "the seed has no effect");
}

/// Weights of bf16 and the same with a change of rank 16 and `relative` size merged in, rounded.
fn merged(shape: Shape, relative: f64) -> (Vec<u8>, Vec<u8>) {
    let engine = CpuEngine::new();
    let n = shape.len().unwrap();
    let store = |x: &[f32]| engine.pack(&engine.matrix(x, shape).unwrap(), Dtype::Bf16).unwrap();
    let aligned = store(&noise(1, n));
    let change = with_spectrum(shape, 2, &[relative * (n as f64 / 3.0 / 16.0).sqrt(); 16]);
    let wide = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    let moved: Vec<f32> =
        aligned.as_chunks::<2>().0.iter().zip(&change).map(|(w, change)| wide(w) + change).collect();
    (aligned, store(&moved))
}

#[test]
fn rank_by_noise_finds_what_was_planted() {
    let (engine, shape) = (CpuEngine::new(), Shape { rows: 768, cols: 1024 });
    for relative in [0.1, 0.03, 0.01, 0.003] {
        let (aligned, degraded) = merged(shape, relative);
        let side = |bytes: &[u8]| Weights::copied(bytes, Dtype::Bf16, shape).unwrap();
        let pair = engine.pair(side(&aligned), side(&degraded)).unwrap();
        let found = factor(&engine, &pair, 7, &Factor::new(Rank::Noise { max: 128 }, 1)).unwrap().0.unwrap();
        assert_eq!(found.rank, 16, "change of {relative}: {:?}", found.singular);
    }
}

#[test]
fn rank_by_noise_of_rounding_alone_is_zero() {
    // Weights and their values in another format: nothing but rounding.
    let (engine, shape) = (CpuEngine::new(), Shape { rows: 300, cols: 500 });
    let wide = noise(1, 150_000);
    let narrow = engine.pack(&engine.matrix(&wide, shape).unwrap(), Dtype::Bf16).unwrap();
    let wide: Vec<u8> = wide.iter().flat_map(|x| x.to_le_bytes()).collect();
    let pair = engine
        .pair(
            Weights::copied(&wide, Dtype::F32, shape).unwrap(),
            Weights::copied(&narrow, Dtype::Bf16, shape).unwrap(),
        )
        .unwrap();
    let (found, stats) = factor(&engine, &pair, 7, &Factor::new(Rank::Noise { max: 128 }, 1)).unwrap();
    assert!(stats.nonzero > 140_000);
    assert_eq!(found.unwrap().rank, 0);
}

#[test]
fn rank_by_residual_is_met_and_hardly_more_than_needed() {
    let shape = Shape { rows: 400, cols: 300 };
    let spectrum = power_law(300, 0.5);
    let delta = with_spectrum(shape, 1, &spectrum);
    let energy = sum_of_squares(&spectrum);
    for share in [0.6, 0.3, 0.1, 0.01] {
        let (found, certificate) =
            run(&delta, shape, &Factor::new(Rank::Residual { share, max: 300 }, 1)).unwrap();
        assert!(certificate.residual <= share, "{} for {share}", certificate.residual);
        let needed = (0..).find(|&r| sum_of_squares(&spectrum[r..]) <= share * energy).unwrap();
        // Singular values of the last block are low, which costs a few more.
        assert!(
            found.rank >= needed && found.rank <= needed + needed / 10 + 2,
            "{} for {needed}",
            found.rank
        );
    }
    let (found, certificate) =
        run(&delta, shape, &Factor::new(Rank::Residual { share: 0.01, max: 20 }, 1)).unwrap();
    assert!(found.rank == 20 && certificate.residual > 0.01);
}

#[test]
fn truncated_factors_are_those_of_the_smaller_rank() {
    let shape = Shape { rows: 120, cols: 90 };
    let delta = with_spectrum(shape, 1, &power_law(90, 1.0));
    let (found, _) = run(&delta, shape, &Factor::new(Rank::Fixed(16), 1)).unwrap();
    let dense = matrix(&delta, 120, 90);
    let small = found.truncated(5);
    assert_eq!((small.rank, small.b.len(), small.a.len(), small.singular.len()), (5, 600, 450, 5));
    let missed = brute_residual(&dense, &small.b, &small.a, 5);
    let optimum = sum_of_squares(&dense.singular_values().unwrap()[5..]);
    assert!(
        missed <= optimum * 1.001
            && dense.squared_norm_l2() - missed <= small.best_sumsq_upper * (1.0 + 1e-9)
    );
}

#[test]
fn certificate_of_a_merge_rounded_to_bf16() {
    // A rank-8 change of 3 % merged into bf16 weights: what is missed is the rounding noise, as predicted.
    let engine = CpuEngine::new();
    let shape = Shape { rows: 384, cols: 512 };
    let n = shape.len().unwrap();
    let store = |x: &[f32]| engine.pack(&engine.matrix(x, shape).unwrap(), Dtype::Bf16).unwrap();
    let aligned = store(&noise(1, n));
    let change = with_spectrum(shape, 2, &[0.03 * (n as f64 / 3.0 / 8.0).sqrt(); 8]);
    let wide: Vec<f32> = aligned
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
        .collect();
    let degraded = store(&wide.iter().zip(&change).map(|(w, c)| w + c).collect::<Vec<_>>());
    let side = |bytes: &[u8]| Weights::copied(bytes, Dtype::Bf16, shape).unwrap();
    let pair = engine.pair(side(&aligned), side(&degraded)).unwrap();
    let (low_rank, stats) = factor(&engine, &pair, 7, &Factor::new(Rank::Fixed(8), 1)).unwrap();
    let low_rank = low_rank.unwrap();
    let certificate = certify(&engine, &pair, &stats, &low_rank).unwrap();
    assert!(certificate.noise_floor > 1e-4 && certificate.noise_floor < 0.1, "{certificate:?}");
    // Rank 8 also absorbs about 8 * (m + n) / (m n) = 4 % of the noise; the prediction itself is good to some 10 %.
    let ratio = certificate.residual / certificate.noise_floor;
    assert!((0.85..1.05).contains(&ratio), "residual is {ratio} of the noise floor: {certificate:?}");
    assert!(certificate.zero_fraction > 0.0 && certificate.zero_fraction < 0.5);
}

#[test]
fn certificate_of_factors_that_are_worse_than_nothing() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 2, cols: 2 };
    let side = |x: f32| {
        let bytes: Vec<u8> = [x, 0.0, 0.0, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        Weights::copied(&bytes, Dtype::F32, shape).unwrap()
    };
    let pair = engine.pair(side(1.0), side(0.0)).unwrap();
    let stats = DeltaStats { sumsq: 1.0, ulp_sumsq: 120.0, max_abs: 1.0, nonzero: 1, elements: 4 };
    let (b, a) = (vec![-1.0, 0.0], vec![1.0, 0.0]);
    let wrong = LowRank {
        b,
        a,
        rows: 2,
        cols: 2,
        rank: 1,
        singular: vec![1.0],
        outside_sumsq: 0.0,
        best_sumsq_upper: 1.0,
    };
    let certificate = certify(&engine, &pair, &stats, &wrong).unwrap();
    assert_eq!((certificate.residual, certificate.captured()), (4.0, -3.0));
    assert_eq!((certificate.noise_floor, certificate.zero_fraction), (1.0, 0.75));
}
