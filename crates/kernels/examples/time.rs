use kernels::*;
use std::time::Instant;
fn main() {
    let e = CpuEngine::new();
    {
        let a = e.sketch(Shape { rows: 2048, cols: 2048 }, 1, 1).unwrap();
        let b = e.sketch(Shape { rows: 2048, cols: 512 }, 1, 2).unwrap();
        for _ in 0..3 {
            let s = Instant::now();
            for _ in 0..5 {
                e.gemm(&a, false, &b).unwrap();
            }
            println!("gemm {:.0} GF", 5.0 * 2.0 * 2048f64 * 2048.0 * 512.0 / s.elapsed().as_secs_f64() / 1e9);
        }
        let b = e.sketch(Shape { rows: 2048, cols: 24 }, 1, 2).unwrap();
        let s = Instant::now();
        for _ in 0..50 {
            e.gemm(&a, false, &b).unwrap();
        }
        println!("gemm24 {:.0} GF", 50.0 * 2.0 * 2048f64 * 2048.0 * 24.0 / s.elapsed().as_secs_f64() / 1e9);
    }

    for (rows, cols) in
        [(4864usize, 896usize), (896, 4864), (896, 896), (128, 896), (4096, 4096), (768, 2048)]
    {
        let shape = Shape { rows, cols };
        let n = rows * cols;
        let bytes = |s: u32| {
            (0..n as u32)
                .flat_map(|i| {
                    let w = philox4x32_10([i, 0, 0, 0], [s, 1])[0];
                    bf16_bits((w as i32 as f32) / 2f32.powi(36)).to_le_bytes()
                })
                .collect::<Vec<u8>>()
        };
        let (a, d) = (bytes(1), bytes(2));
        let p = e
            .pair(
                Weights::copied(&a, Dtype::Bf16, shape).unwrap(),
                Weights::copied(&d, Dtype::Bf16, shape).unwrap(),
            )
            .unwrap();
        for l in [24usize, 72] {
            let z = e.sketch(Shape { rows: cols, cols: l }, 1, 1).unwrap();
            let b = e.sketch(Shape { rows, cols: 16 }, 1, 1).unwrap();
            let aa = e.sketch(Shape { rows: 16, cols }, 1, 1).unwrap();
            let reps = (400_000_000 / (n * l)).max(2);
            let t = |name: &str, flop: f64, f: &mut dyn FnMut()| {
                f();
                let s = Instant::now();
                for _ in 0..reps {
                    f()
                }
                let dt = s.elapsed().as_secs_f64() / reps as f64;
                print!("{name} {:.2}ms {:.0}GF  ", dt * 1e3, flop / dt / 1e9);
            };
            print!("{rows}x{cols} l={l}: ");
            t("stats", 0.0, &mut || {
                e.stats(&p).unwrap();
            });
            t("sweep", 4.0 * (n * l) as f64, &mut || {
                e.sweep(&p, &z, None).unwrap();
            });
            let mut st = DeltaStats::default();
            t("sweep+stats", 4.0 * (n * l) as f64, &mut || {
                e.sweep(&p, &z, Some(&mut st)).unwrap();
            });
            t("forward", 2.0 * (n * l) as f64, &mut || {
                e.forward(&p, &z).unwrap();
            });
            t("residual", 2.0 * (n * 16) as f64, &mut || {
                e.residual(&p, &b, &aa).unwrap();
            });
            let mut w = a.clone();
            t("add", 2.0 * (n * 16) as f64, &mut || {
                e.add_low_rank(&mut w, Dtype::Bf16, shape, &[(1e-9, &b, &aa)]).unwrap();
            });
            println!();
        }
    }
}
