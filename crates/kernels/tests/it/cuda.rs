//! The CUDA engine: of a real device, or of the driver without a GPU that is built here (`kernels/host`).
//!
//! Every test of this binary runs on the CPU and, if there is a device, on that. [`fake_driver_runs_every_test`] runs the
//! whole binary again over the driver without a GPU, and the tests below it run parts of it over one that fails.

use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use kernels::selftest::{noise, stored};
use kernels::{
    CpuEngine, CudaDevice, CudaEngine, CudaMatrix, CudaOptions, DeltaStats, Dtype, Engine, ImageCache,
    KernelError, NoCuda, Shape, Weights, selftest,
};

/// Tells a run of this binary that it is one of those below, and what it is about.
const CHILD: &str = "SAFEGENE_TEST_CHILD";

fn options() -> CudaOptions {
    CudaOptions { poison: true, ..CudaOptions::new(0) }
}

/// The engine, if there is a device. `REQUIRE_GPU=1` makes its absence a failure.
pub(crate) fn engine() -> Option<&'static CudaEngine> {
    static ENGINE: OnceLock<Option<CudaEngine>> = OnceLock::new();
    ENGINE.get_or_init(|| open(&options())).as_ref()
}

fn open(options: &CudaOptions) -> Option<CudaEngine> {
    if std::env::var(CHILD).is_ok_and(|child| child != "all") {
        return None;
    }
    match CudaEngine::open(options) {
        Ok(engine) => Some(engine),
        Err(error) => {
            let required = std::env::var_os("REQUIRE_GPU").is_some_and(|value| value != "0");
            assert!(!required, "no CUDA engine: {error}");
            eprintln!("not run on CUDA: {error}");
            None
        }
    }
}

#[test]
fn selftest_of_every_engine() {
    crate::on_engines!(|engine| {
        let mut wrong = Vec::new();
        let failed = selftest::run(engine, &mut |outcome| {
            if let Some(why) = outcome.wrong {
                wrong.push(format!("{} of {}: {why}", outcome.op, outcome.case));
            }
        });
        assert_eq!((failed, wrong), (0, vec![]), "on {}", engine.name());
    });
}

/// Two sides of a difference in bf16.
fn sides(seed: u32, shape: Shape) -> [Weights; 2] {
    [seed, seed + 1].map(|seed| {
        let values = stored(&noise(seed, shape.rows * shape.cols), Dtype::Bf16);
        Weights::copied(&values, Dtype::Bf16, shape).unwrap()
    })
}

/// The bits of everything that is done to a pair.
fn everything(engine: &impl Engine, seed: u32, shape: Shape, l: usize) -> (Vec<u32>, DeltaStats, u64) {
    let [aligned, degraded] = sides(seed, shape);
    let pair = engine.pair(aligned, degraded).unwrap();
    let z = engine.sketch(Shape { rows: shape.cols, cols: l }, 3, seed.into()).unwrap();
    let mut stats = DeltaStats::default();
    let (y, w) = engine.sweep(&pair, &z, Some(&mut stats)).unwrap();
    let (y2, w2) = engine.sweep(&pair, &w, None).unwrap();
    let back = engine.back(&pair, &y2).unwrap();
    let (delta, again) = engine.delta(&pair).unwrap();
    assert_eq!(stats, again);
    let mut bits = Vec::new();
    for matrix in [&y, &w, &w2, &back, &delta] {
        bits.extend(crate::bits(&engine.read(matrix).unwrap()));
    }
    let b = engine.matrix(&noise(seed + 2, shape.rows * 3), Shape { rows: shape.rows, cols: 3 }).unwrap();
    let a = engine.matrix(&noise(seed + 3, 3 * shape.cols), Shape { rows: 3, cols: shape.cols }).unwrap();
    let residual = engine.residual(&pair, &b, &a).unwrap().to_bits();
    (bits, stats, residual)
}

#[test]
fn pair_in_panels_gives_the_bits_of_a_whole_one() {
    let Some(whole) = engine() else { return };
    // 8 MB a side and 16 MB of difference do not fit; some of their rows do, beside another 16 MB of difference.
    let shape = Shape { rows: 2500, cols: 1603 };
    let small = CudaEngine::open(&CudaOptions { device_bytes: 30 << 20, ..options() }).unwrap();
    let want = everything(whole, 5, shape, 7);
    assert!(everything(&small, 5, shape, 7) == want);
    assert_eq!((small.pairs_in_panels(), whole.pairs_in_panels()), (1, 0));
    let mut w = stored(&noise(9, shape.rows * shape.cols * 2), Dtype::Bf16);
    let wide = Shape { rows: shape.rows * 2, cols: shape.cols };
    let mut same = w.clone();
    let add = |engine: &CudaEngine, w: &mut [u8]| {
        let b = engine.matrix(&noise(6, wide.rows * 2), Shape { rows: wide.rows, cols: 2 }).unwrap();
        let a = engine.matrix(&noise(7, 2 * wide.cols), Shape { rows: 2, cols: wide.cols }).unwrap();
        engine.add_low_rank(w, Dtype::Bf16, wide, &[(0.25, &b, &a)]).unwrap()
    };
    assert_eq!(add(whole, &mut w), add(&small, &mut same));
    assert!(w == same);
}

#[test]
fn pair_that_does_not_fit_at_all() {
    let Some(_) = engine() else { return };
    let small = CudaEngine::open(&CudaOptions { device_bytes: 1 << 20, ..options() }).unwrap();
    let [aligned, degraded] = sides(1, Shape { rows: 300, cols: 4096 });
    let error = small.pair(aligned, degraded).unwrap_err();
    assert!(matches!(error, KernelError::DeviceMemory { need_bytes, .. } if need_bytes > 1 << 20), "{error}");
    // What fits is done all the same.
    let shape = Shape { rows: 20, cols: 30 };
    assert!(
        everything(&small, 5, shape, 3) == everything(&CudaEngine::open(&options()).unwrap(), 5, shape, 3)
    );
}

#[test]
fn threads_get_their_own_results() {
    let Some(shared) = engine() else { return };
    let engine = CudaEngine::open(&CudaOptions { lanes: 2, ..options() }).unwrap();
    let shape = Shape { rows: 70, cols: 300 };
    let want: Vec<_> = (0..24).map(|i| everything(shared, 100 + 10 * i, shape, 5)).collect();
    std::thread::scope(|threads| {
        for (i, want) in want.iter().enumerate() {
            let engine = &engine;
            threads.spawn(move || {
                for _ in 0..3 {
                    assert!(everything(engine, 100 + 10 * i as u32, shape, 5) == *want, "thread {i}");
                }
            });
        }
    });
}

/// Bytes that take their time.
struct Slow(Vec<u8>);

impl kernels::RowReader for Slow {
    fn read(&self, _: usize, out: &mut [u8]) -> Result<(), kernels::Unreadable> {
        std::thread::sleep(std::time::Duration::from_millis(700));
        out.copy_from_slice(&self.0[..out.len()]);
        Ok(())
    }
}

#[test]
fn programs_that_wait_share_their_launches() {
    let Some(shared) = engine() else { return };
    let engine = CudaEngine::open(&CudaOptions { lanes: 1, ..options() }).unwrap();
    let (shape, threads) = (Shape { rows: 70, cols: 300 }, 12);
    let stats = |engine: &CudaEngine, seed: u32| {
        let [aligned, degraded] = sides(seed, shape);
        engine.stats(&engine.pair(aligned, degraded).unwrap()).unwrap()
    };
    let want: Vec<_> = (0..threads).map(|i| stats(shared, 10 * i)).collect();
    std::thread::scope(|scope| {
        // The one lane waits for a reader; meanwhile all others come.
        scope.spawn(|| {
            let bytes = Slow(stored(&noise(1, 21_000), Dtype::Bf16));
            let slow = Weights::read(Arc::new(bytes), Dtype::Bf16, shape).unwrap();
            let [aligned, _] = sides(1, shape);
            engine.stats(&engine.pair(aligned, slow).unwrap()).unwrap();
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        for (i, want) in want.iter().enumerate() {
            let (engine, stats) = (&engine, &stats);
            scope.spawn(move || assert_eq!(stats(engine, 10 * i as u32), *want, "thread {i}"));
        }
    });
    let meters = engine.meters();
    assert_eq!(meters.programs, u64::from(threads) + 1);
    // Two, unless a thread came very late.
    assert!(meters.batches <= 4, "{meters:?}");
}

#[test]
fn threads_short_of_memory_do_not_get_each_others() {
    let Some(shared) = engine() else { return };
    // Enough for one pair, and another in panels: operations are cut short, and go on.
    let engine = CudaEngine::open(&CudaOptions { device_bytes: 10 << 20, ..options() }).unwrap();
    let shape = Shape { rows: 900, cols: 700 };
    let want: Vec<_> = (0..2).map(|i| everything(shared, 10 * i, shape, 9)).collect();
    // Whether threads meet is up to the scheduler; a matrix that is held shows that a pair then comes in panels.
    let tall = Shape { rows: 1450, cols: 1000 };
    let held = engine.matrix(&noise(50, tall.rows * tall.cols), tall).unwrap();
    assert!(everything(&engine, 0, shape, 9) == want[0]);
    assert_eq!(engine.pairs_in_panels(), 1);
    drop(held);
    std::thread::scope(|threads| {
        for (i, want) in want.iter().enumerate() {
            let engine = &engine;
            threads.spawn(move || {
                for _ in 0..6 {
                    assert!(everything(engine, 10 * i as u32, shape, 9) == *want, "thread {i}");
                }
            });
        }
    });
}

/// Fails to read, or panics.
struct Broken(bool);

impl kernels::RowReader for Broken {
    fn read(&self, _: usize, _: &mut [u8]) -> Result<(), kernels::Unreadable> {
        assert!(!self.0, "a reader that panics, on purpose");
        Err(kernels::Unreadable)
    }
}

#[test]
fn reader_that_fails_is_its_own_affair() {
    let Some(shared) = engine() else { return };
    let engine = CudaEngine::open(&CudaOptions { lanes: 1, ..options() }).unwrap();
    let shape = Shape { rows: 70, cols: 300 };
    let want = everything(shared, 3, shape, 5);
    std::thread::scope(|threads| {
        for i in 0..8 {
            let (engine, want) = (&engine, &want);
            threads.spawn(move || {
                for _ in 0..4 {
                    if i % 2 == 0 {
                        assert!(everything(engine, 3, shape, 5) == *want);
                        continue;
                    }
                    let [aligned, _] = sides(3, shape);
                    let broken = Weights::read(Arc::new(Broken(false)), Dtype::Bf16, shape).unwrap();
                    let pair = engine.pair(aligned, broken).unwrap();
                    for _ in 0..2 {
                        let error = engine.stats(&pair).unwrap_err();
                        // The second time there is nothing new to find out, and nothing to be taken for a result.
                        assert!(
                            matches!(error, KernelError::Unread { .. } | KernelError::Device { .. }),
                            "{error}"
                        );
                    }
                }
            });
        }
    });
    // One that panics takes its own thread with it, and nobody else.
    let [aligned, _] = sides(3, shape);
    let broken = Weights::read(Arc::new(Broken(true)), Dtype::Bf16, shape).unwrap();
    let panics = std::thread::scope(|threads| {
        threads.spawn(|| engine.stats(&engine.pair(aligned, broken).unwrap())).join().is_err()
    });
    assert!(panics && everything(&engine, 3, shape, 5) == want);
}

#[test]
fn back_of_no_columns_leaves_its_operand() {
    crate::on_engines!(|engine| {
        let pair = crate::pair(engine, (&[], Dtype::Bf16), (&[], Dtype::Bf16), Shape { rows: 3, cols: 0 });
        let q = engine.matrix(&[1.0, 2.0, 3.0], Shape { rows: 3, cols: 1 }).unwrap();
        assert_eq!(engine.shape(&engine.back(&pair, &q).unwrap()), Shape { rows: 0, cols: 1 });
        assert_eq!(engine.read(&q).unwrap(), [1.0, 2.0, 3.0]);
    });
}

#[test]
fn matrix_of_another_thread_is_complete() {
    let Some(engine) = engine() else { return };
    let values = noise(4, 600);
    let made: Mutex<Option<CudaMatrix>> = Mutex::new(None);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let x = engine.matrix(&values, Shape { rows: 20, cols: 30 }).unwrap();
            *made.lock().unwrap() = Some(engine.beside(&[&x, &x]).unwrap());
        });
    });
    let both = made.lock().unwrap().take().unwrap();
    let want: Vec<f32> = values.chunks(30).flat_map(|row| [row, row].concat()).collect();
    assert_eq!(engine.read(&both).unwrap(), want);
    // And read by several threads at once while its owner is gone.
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| assert_eq!(engine.read(&both).unwrap(), want));
        }
    });
}

#[test]
fn buffers_of_the_engine_are_pinned() {
    let Some(shared) = engine() else { return };
    let engine = CudaEngine::open(&CudaOptions { pinned_bytes: 64 << 20, ..options() }).unwrap();
    let shape = Shape { rows: 500, cols: 2048 };
    let [aligned, degraded] = [1, 2].map(|seed| stored(&noise(seed, 500 * 2048), Dtype::Bf16));
    let mut buffer = engine.buffer(aligned.len()).unwrap();
    (*buffer).as_mut()[..aligned.len()].copy_from_slice(&aligned);
    struct Held(kernels::HostBuffer);
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            (*self.0).as_ref()
        }
    }
    let before = engine.meters();
    let pinned = Weights::held(Arc::new(Held(buffer)), Dtype::Bf16, shape).unwrap();
    let plain = || Weights::copied(&degraded, Dtype::Bf16, shape).unwrap();
    let found = engine.stats(&engine.pair(pinned, plain()).unwrap()).unwrap();
    let after = engine.meters();
    assert_eq!(after.uploaded_pinned_bytes - before.uploaded_pinned_bytes, aligned.len() as u64);
    assert_eq!(after.uploaded_staged_bytes - before.uploaded_staged_bytes, degraded.len() as u64);
    let aligned = Weights::copied(&aligned, Dtype::Bf16, shape).unwrap();
    assert_eq!(shared.stats(&shared.pair(aligned, plain()).unwrap()).unwrap(), found);
    // When they run out, any memory will do.
    assert!(engine.buffer(65 << 20).is_none());
}

#[test]
fn products_by_cublas_are_as_good() {
    let Some(_) = engine() else { return };
    // Where its library is not there our own kernels multiply, as they do without being asked.
    let with = CudaEngine::open(&CudaOptions { cublas: true, ..options() }).unwrap();
    for (rows, depth, n) in [(1, 1, 1), (130, 300, 7), (3, 700, 75), (5, 1, 2)] {
        for transposed in [false, true] {
            selftest::gemm(&with, rows, depth, n, transposed).unwrap();
        }
    }
    for (rows, cols, l) in [(7, 33, 5), (600, 95, 18), (9, 300, 72), (3, 0, 2)] {
        selftest::sweep(&with, rows, cols, l).unwrap();
    }
    let small = CudaEngine::open(&CudaOptions { cublas: true, device_bytes: 8 << 20, ..options() }).unwrap();
    selftest::sweep(&small, 1300, 1100, 3).unwrap();
    assert_eq!(small.pairs_in_panels(), 1);
}

#[test]
fn no_driver_is_an_ordinary_error() {
    if engine().is_some() || std::env::var_os(CHILD).is_some() {
        return;
    }
    let error = CudaEngine::open(&options()).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
    assert!(CudaDevice::all().is_err());
}

/// A cache in memory.
#[derive(Default)]
struct Cache(Mutex<Vec<(String, Vec<u8>)>>);

impl ImageCache for Cache {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.0.lock().unwrap().iter().find(|(found, _)| found == key).map(|(_, image)| image.clone())
    }

    fn put(&self, key: &str, image: &[u8]) {
        self.0.lock().unwrap().push((key.to_owned(), image.to_vec()));
    }
}

#[test]
fn compiled_kernels_are_kept() {
    let Some(found) = engine() else { return };
    if !kernels::embedded_images().is_empty() {
        assert!(found.kernels().starts_with("embedded"), "{}", found.kernels());
        return;
    }
    let cache = Arc::new(Cache::default());
    let with = CudaOptions { cache: Some(cache.clone()), ..options() };
    let first = CudaEngine::open(&with).unwrap().kernels().to_owned();
    let second = CudaEngine::open(&with).unwrap().kernels().to_owned();
    assert_eq!(second, format!("{first}, cached"));
    assert_eq!(cache.0.lock().unwrap().len(), 1);
}

/// A run of this binary over the driver without a GPU, which is built on the way.
pub(crate) struct Fake {
    pub(crate) command: Command,
}

impl Fake {
    pub(crate) fn new(build: &[&str], settings: &str, child: &str) -> Fake {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let name = if build.is_empty() { "plain".to_owned() } else { build.join("-") };
        let out = format!("{}/fake-cuda-{name}", env!("CARGO_TARGET_TMPDIR"));
        let built = Command::new(format!("{root}/scripts/gpu/fake-driver"))
            .arg(&out)
            .args(build)
            .output()
            .expect("scripts/gpu/fake-driver cannot be run");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("LD_LIBRARY_PATH", out).env("REQUIRE_GPU", "1").env(CHILD, child);
        command.env("SAFEGENE_FAKE_CUDA", settings).env_remove("LD_PRELOAD");
        Fake { command }
    }

    /// Runs some tests; all pass, and there are some.
    #[track_caller]
    pub(crate) fn passes(mut self, filter: &[&str]) {
        let run = self.command.args(filter).output().unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
        assert!(run.status.success(), "{:?}: {text}", run.status);
        assert!(!text.contains("running 0 tests"), "no test is called {filter:?}");
        assert!(!text.contains("not run on CUDA"), "{text}");
    }
}

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn fake_driver_runs_every_test() {
    if is_child() {
        return;
    }
    // Work is done as late as possible, so that whoever does not wait sees poison.
    Fake::new(&[], "", "all").passes(&[]);
}

#[test]
fn fake_driver_in_other_orders() {
    if is_child() {
        return;
    }
    for settings in ["order=early,blocks=down", "blocks=7,threads=8"] {
        Fake::new(&[], settings, "all").passes(&["cuda::"]);
    }
}

#[test]
fn fake_driver_without_races() {
    if is_child() {
        return;
    }
    let library = Command::new("c++").arg("-print-file-name=libtsan.so").output().unwrap();
    let library = String::from_utf8(library.stdout).unwrap();
    for settings in ["", "blocks=3,threads=5"] {
        let mut fake = Fake::new(&["--tsan"], settings, "all");
        fake.command
            .env("LD_PRELOAD", library.trim())
            .env("TSAN_OPTIONS", "atexit_sleep_ms=0 ignore_noninstrumented_modules=1");
        fake.passes(&["cuda::one_of_each", "--test-threads=1"]);
    }
}

#[test]
fn one_of_each_kernel() {
    let Some(engine) = engine() else { return };
    let bf16 = Dtype::Bf16;
    let found = [
        selftest::delta(engine, Shape { rows: 35, cols: 24 }, bf16, bf16),
        selftest::delta(engine, Shape { rows: 20, cols: 16 }, Dtype::F16, Dtype::F16),
        selftest::delta(engine, Shape { rows: 20, cols: 12 }, Dtype::F32, Dtype::F32),
        selftest::delta(engine, Shape { rows: 20, cols: 7 }, Dtype::F64, bf16),
        selftest::scaled_delta(engine, Shape { rows: 20, cols: 48 }, Dtype::F8E4M3, [16, 16], [0, 16]),
        selftest::sketch(engine, Shape { rows: 70, cols: 3 }),
        selftest::sweep(engine, 130, 270, 5),
        selftest::sweep(engine, 130, 20, 66),
        selftest::gram(engine, 270, 40),
        selftest::apply_right(engine, 70, 20, 40),
        selftest::residual(engine, 70, 70, 17, 0.3),
        selftest::residual(engine, 70, 70, 17, 1e-6),
        selftest::pack(engine, bf16),
    ];
    for (i, found) in found.into_iter().enumerate() {
        found.unwrap_or_else(|why| panic!("{i}: {why}"));
    }
    for dtype in selftest::DTYPES {
        selftest::add_low_rank(engine, 70, 70, &[2, 15], dtype).unwrap();
    }
    let x = engine.matrix(&noise(1, 60), Shape { rows: 6, cols: 10 }).unwrap();
    assert_eq!(engine.shape(&engine.beside(&[&x, &x]).unwrap()), Shape { rows: 6, cols: 20 });
}

/// What a failing driver does to an engine; `want` is in the error, or nothing for none.
#[track_caller]
fn fails(build: &[&str], settings: &str, want: &str) {
    Fake::new(build, settings, want).passes(&["--exact", "cuda::child_of_a_failing_driver"]);
}

#[test]
fn child_of_a_failing_driver() {
    let Ok(want) = std::env::var(CHILD) else { return };
    if want == "all" {
        return;
    }
    let shape = Shape { rows: 70, cols: 300 };
    let used = || -> Result<(), String> {
        let engine = CudaEngine::open(&options()).map_err(|error| {
            assert!(error.hint().is_some());
            error.to_string()
        })?;
        let [aligned, degraded] = sides(1, shape);
        let work = || -> kernels::Result<(Vec<f32>, f64)> {
            let pair = engine.pair(aligned.clone(), degraded.clone())?;
            let z = engine.sketch(Shape { rows: shape.cols, cols: 5 }, 1, 1)?;
            let (y, w) = engine.sweep(&pair, &z, Some(&mut DeltaStats::default()))?;
            let (b, a) = (
                engine.sketch(Shape { rows: 70, cols: 1 }, 2, 2)?,
                engine.sketch(Shape { rows: 1, cols: 300 }, 2, 3)?,
            );
            engine.gram(&w)?;
            Ok((engine.read(&y)?, engine.residual(&pair, &b, &a)?))
        };
        let (y, _) = work().map_err(|error| error.to_string())?;
        let cpu = CpuEngine::new();
        let pair = cpu.pair(aligned.clone(), degraded.clone()).unwrap();
        let z = cpu.sketch(Shape { rows: shape.cols, cols: 5 }, 1, 1).unwrap();
        let want = cpu.read(&cpu.sweep(&pair, &z, None).unwrap().0).unwrap();
        assert!(y.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-3 * b.abs().max(1.0)));
        Ok(())
    };
    match used() {
        Ok(()) => assert_eq!(want, "none"),
        Err(error) => assert!(error.contains(&want), "`{error}` instead of `{want}`"),
    }
}

#[test]
fn driver_that_is_absent_or_old() {
    if is_child() {
        return;
    }
    fails(&[], "devices=0", "sees no device");
    fails(&[], "fail=cuInit:*:100", "sees no device");
    fails(&[], "fail=cuInit:*:803", "`cuInit` failed");
    fails(&[], "fail=cuDevicePrimaryCtxRetain:1:2", "`cuDevicePrimaryCtxRetain` failed");
    fails(&["--without", "cuMemHostAlloc"], "", "has no `cuMemHostAlloc`");
    if kernels::embedded_images().is_empty() {
        fails(&["--without", "nvrtcGetCUBIN"], "", "libnvrtc.so has no `nvrtcGetCUBIN`");
        let mut fake = Fake::new(&[], "", "nvrtcCompileProgram");
        fake.command.env("SAFEGENE_FAKE_NVRTC", "fail");
        fake.passes(&["--exact", "cuda::child_of_a_failing_driver"]);
    }
}

#[test]
fn driver_that_fails_on_the_way() {
    if is_child() {
        return;
    }
    fails(&[], "", "none");
    for nth in [1, 2, 5, 9] {
        fails(&[], &format!("fail=cuLaunchKernel:{nth}:719"), "`cuLaunchKernel` failed");
    }
    for nth in [1, 2, 3] {
        fails(&[], &format!("fail=cuEventSynchronize:{nth}:700"), "`cuEventSynchronize` failed");
    }
    fails(&[], "fail=cuMemcpyHtoDAsync_v2:1:1", "`cuMemcpyHtoDAsync_v2` failed");
    fails(&[], "fail=cuModuleLoadData:*:209", "`cuModuleLoadData` failed");
    fails(&[], "fail=cuModuleGetFunction:3:500", "`cuModuleGetFunction` failed");
    fails(&[], "fail=cuStreamCreate:2:2", "`cuStreamCreate` failed");
    // Device memory that is not there is an error with numbers; pinned memory that is not there only costs time.
    fails(&[], "fail=cuMemAlloc_v2:*:2", "bytes more memory");
    fails(&[], "memory=60000", "bytes more memory");
    fails(&[], "fail=cuMemHostAlloc:*:2", "none");
    // A segment that is refused makes way for a smaller one.
    fails(&[], "fail=cuMemAlloc_v2:1:2", "none");
}

#[test]
fn errors_of_an_absent_driver_have_hints() {
    let all = [
        NoCuda::NoDriver,
        NoCuda::OldDriver { symbol: "cuInit" },
        NoCuda::NoDevice,
        NoCuda::NoSuchDevice { device: 3, count: 1 },
    ];
    assert!(all.iter().all(|error| error.hint().is_some() && !error.to_string().is_empty()));
}
