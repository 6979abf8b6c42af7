//! What a certificate promises, for differences of any shape: captured <= the optimum <= the bound.

use kernels::{CpuEngine, Dtype, Engine, Shape, Weights};
use lowrank::{Factor, Rank, certify, factor};
use proptest::prelude::*;

use crate::{matrix, noise, sum_of_squares};

/// Kinds of difference.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// White noise, the flattest of spectra.
    Noise,
    /// A product of this rank, and noise of this size beside it.
    LowRank(usize, f32),
    /// One row of noise.
    Row(usize),
    /// One element.
    Element(usize),
}

fn difference(kind: Kind, shape: Shape, seed: u32, scale: f32) -> Vec<f32> {
    let Shape { rows, cols } = shape;
    let all = noise(seed, rows * cols);
    let values: Vec<f32> = match kind {
        Kind::Noise => all,
        Kind::LowRank(rank, size) => {
            let (b, a) = (noise(seed + 1, rows * rank), noise(seed + 2, rank * cols));
            let product = |at: usize| -> f32 {
                (0..rank).map(|k| b[at / cols * rank + k] * a[k * cols + at % cols]).sum()
            };
            all.iter().enumerate().map(|(at, x)| product(at) + size * x).collect()
        }
        Kind::Row(row) => {
            all.iter().enumerate().map(|(at, &x)| if at / cols == row % rows { x } else { 0.0 }).collect()
        }
        Kind::Element(place) => (0..all.len()).map(|at| f32::from(at == place % all.len())).collect(),
    };
    values.iter().map(|x| x * scale).collect()
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Noise),
        (1usize..12, prop_oneof![Just(0.0f32), Just(1e-6), Just(1e-3), Just(0.1)])
            .prop_map(|(rank, size)| Kind::LowRank(rank, size)),
        any::<prop::sample::Index>().prop_map(|at| Kind::Row(at.index(70))),
        any::<prop::sample::Index>().prop_map(|at| Kind::Element(at.index(4900))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn optimum_lies_between_what_is_captured_and_the_bound(
        rows in 1usize..=70,
        cols in 1usize..=70,
        rank in 1usize..=12,
        kind in kinds(),
        seed in 0u32..1_000_000,
        exponent in -20i32..20,
    ) {
        let shape = Shape { rows, cols };
        let delta = difference(kind, shape, seed, 2.0f32.powi(exponent));
        let dense = matrix(&delta, rows, cols);
        let sigma = dense.singular_values().unwrap();
        let energy = dense.squared_norm_l2();
        let optimum = sum_of_squares(&sigma[..rank.min(sigma.len())]) / energy;

        let engine = CpuEngine::new();
        let bytes: Vec<u8> = delta.iter().flat_map(|x| x.to_le_bytes()).collect();
        let side = |bytes: &[u8]| Weights::copied(bytes, Dtype::F32, shape).unwrap();
        let pair = engine.pair(side(&bytes), side(&vec![0; bytes.len()])).unwrap();
        let (found, stats) = factor(&engine, &pair, 7, &Factor::new(Rank::Fixed(rank), u64::from(seed))).unwrap();
        let found = found.unwrap();
        let certificate = certify(&engine, &pair, &stats, &found).unwrap();
        let (captured, upper) = (certificate.captured(), certificate.captured_upper_bound);
        // Energies and the oracle are f64 sums of fewer than 5000 terms; a residual may carry f32 roundings of its rests,
        // which the engine keeps below 1e-6 of it.
        let slack = 1e-9 + 1e-6 * certificate.residual;
        prop_assert!((certificate.energy - energy).abs() <= 1e-12 * energy);
        prop_assert!(found.rank <= rank.min(rows).min(cols));
        prop_assert!(captured <= optimum + slack, "captured {captured}, optimum {optimum}");
        prop_assert!(optimum <= upper + slack, "optimum {optimum}, bound {upper}");
        prop_assert!(captured <= upper + slack, "captured {captured}, bound {upper}");
        prop_assert!(upper <= 1.0);
        // One row and one element are of rank 1, and held but for the rounding of two factors to f32.
        if matches!(kind, Kind::Row(_) | Kind::Element(_)) {
            prop_assert!(found.rank == 1 && captured >= 1.0 - 1e-12, "rank {}: {captured}", found.rank);
        }
    }
}
