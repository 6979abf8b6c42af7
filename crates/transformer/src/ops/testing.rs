//! Noise, and gradients against central differences: for the tests of the ops.

use super::values;
use candle_core::{Device, Result, Tensor, Var};

/// Numbers between -1 and 1.
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            (x as f32 / u32::MAX as f32) * 2.0 - 1.0
        })
        .collect()
}

/// Compares the gradient of `Σ w·f(inputs)` with central differences in every coordinate.
#[track_caller]
pub(crate) fn check(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let dev = &Device::Cpu;
    let vars: Vec<Var> = shapes
        .iter()
        .enumerate()
        .map(|(i, s)| {
            let n = s.iter().product();
            Var::from_tensor(&Tensor::from_vec(noise(n, i as u32 + 1), *s, dev).unwrap()).unwrap()
        })
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors).unwrap();
    let w = Tensor::from_vec(noise(out.elem_count(), 99), out.shape(), dev).unwrap();
    let grads = (out * &w).unwrap().sum_all().unwrap().backward().unwrap();
    let value = |ts: &[Tensor]| -> f64 {
        let y = f(ts).unwrap();
        let (y, w) = (values(&y).unwrap(), values(&w).unwrap());
        y.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    for (i, var) in vars.iter().enumerate() {
        let g = values(grads.get(var).expect("a gradient reaches every input")).unwrap();
        let x = values(var.as_tensor()).unwrap();
        for j in 0..x.len() {
            let h = 1e-2f32;
            let at = |d: f32| {
                let mut x = x.clone();
                x[j] += d;
                let mut ts = tensors.clone();
                ts[i] = Tensor::from_vec(x, var.shape(), dev).unwrap();
                value(&ts)
            };
            let want = (at(h) - at(-h)) / (2.0 * f64::from(h));
            // Truncation is O(h²) of third derivatives near 1, rounding is 1e-7 / h.
            let err = (f64::from(g[j]) - want).abs();
            assert!(err < 2e-3 * (1.0 + want.abs()), "input {i}, element {j}: {} against {want}", g[j]);
        }
    }
}
