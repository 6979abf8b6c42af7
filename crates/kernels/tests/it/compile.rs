//! The kernels through the real compilers, which need no GPU.
//!
//! `SAFEGENE_CUDA_TOOLKIT` names the folder that `scripts/gpu/toolkit` made. Without it nothing is compiled, and that is
//! said.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::{env, fs};

use kernels::{CudaEngine, CudaOptions, ImageCache};

use crate::cuda::{Fake, is_child};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const TMP: &str = env!("CARGO_TARGET_TMPDIR");
/// Tells [`child_of_a_real_compiler`] which one it is to find.
const COMPILER: &str = "SAFEGENE_TEST_COMPILER";

/// The folder of the compilers, if there is one.
fn toolkit() -> Option<PathBuf> {
    if is_child() {
        return None;
    }
    let Some(folder) = env::var_os("SAFEGENE_CUDA_TOOLKIT").filter(|folder| !folder.is_empty()) else {
        eprintln!("not run: no CUDA compiler (scripts/gpu/toolkit)");
        return None;
    };
    Some(PathBuf::from(folder).canonicalize().expect("SAFEGENE_CUDA_TOOLKIT names no folder"))
}

fn compile(toolkit: &Path, kernels: &Path, out: &str) -> Output {
    Command::new(format!("{ROOT}/scripts/gpu/kernels"))
        .arg(toolkit)
        .arg(format!("{TMP}/{out}"))
        .env("KERNELS_DIR", kernels)
        .output()
        .expect("scripts/gpu/kernels cannot be run")
}

#[track_caller]
fn succeeds(run: &Output) {
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// All of `wants` are among the reasons for the failure.
#[track_caller]
fn fails(run: &Output, wants: &[&str]) {
    let text = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success(), "succeeds: {text}");
    for want in wants {
        assert!(text.contains(want), "no `{want}` in: {text}");
    }
}

#[test]
fn kernels_compile_for_every_architecture_within_their_budget() {
    let Some(toolkit) = toolkit() else { return };
    let kernels = Path::new(ROOT).join("kernels");
    succeeds(&compile(&toolkit, &kernels, "kernels"));
    let made = PathBuf::from(TMP).join("kernels");
    for name in ["sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_120.cubin"] {
        assert!(fs::read(made.join(name)).unwrap().starts_with(b"\x7fELF"), "{name}");
    }
    let ptx = fs::read_to_string(made.join("compute_75.ptx")).unwrap();
    let table = fs::read_to_string(made.join("resources.tsv")).unwrap();
    let budget = fs::read_to_string(kernels.join("BUDGET")).unwrap();
    let names =
        budget.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(' ').next());
    for name in names {
        assert!(ptx.contains(&format!(".entry {name}(")), "{name}");
        assert_eq!(table.matches(&format!("\t{name}\t")).count(), 6, "{name}");
    }
}

/// A folder of kernels: the shortest of ours, with its budget, and another one.
fn short_copy(name: &str, registers: u32, more: &str, budget: &str) -> PathBuf {
    let folder = PathBuf::from(TMP).join(name);
    fs::create_dir_all(&folder).unwrap();
    for file in ["common.cu", "sketch.cu"] {
        // What is static and not used would be warned of.
        let text = fs::read_to_string(format!("{ROOT}/kernels/{file}")).unwrap();
        fs::write(folder.join(file), text.replace("static __device__", "__device__")).unwrap();
    }
    fs::write(folder.join("ORDER"), "common.cu\nsketch.cu\nmore.cu\n").unwrap();
    fs::write(folder.join("more.cu"), more).unwrap();
    fs::write(folder.join("BUDGET"), format!("# a comment\nsketch {registers} 0\n{budget}")).unwrap();
    folder
}

/// 128 values live at a barrier, and 64 registers for a thread: half of them must be elsewhere.
const SPILLS: &str = "
struct MoreArgs { float* x[BATCH]; };
KERNEL(spills, MoreArgs, 1024) {
    float* x = args.x[blockIdx.z] + threadIdx.x;
    float value[128];
#pragma unroll
    for (int i = 0; i < 128; i++) value[i] = x[1024 * i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; i++) x[1024 * i] = value[127 - i];
}
";

/// Registers have no addresses, so what is indexed is in a stack frame.
const HAS_A_STACK: &str = "
KERNEL(has_a_stack, MoreArgs, 32) {
    float* x = args.x[blockIdx.z];
    float value[40];
    for (int i = 0; i < 40; i++) value[(int)x[i] % 40] = x[i + 40];
    for (int i = 0; i < 40; i++) x[i] = value[(int)x[i + 80] % 40];
}
";

#[test]
fn kernels_that_do_not_fit_are_refused() {
    let Some(toolkit) = toolkit() else { return };
    let out = "kernels-short-out";
    let run = |copy: PathBuf| compile(&toolkit, &copy, out);
    succeeds(&run(short_copy("kernels-short", 24, "", "")));
    let want = "kernel `sketch` for sm_90: 18 registers, its budget is 16";
    fails(&run(short_copy("kernels-over-budget", 16, "", "")), &[want]);
    let spills = run(short_copy("kernels-spill", 24, SPILLS, "spills 64 0\n"));
    for arch in ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "ptx_75"] {
        fails(&spills, &[&format!("kernel `spills` for {arch}: stack frame of ")]);
    }
    let more = format!("{SPILLS}{HAS_A_STACK}");
    let wants = [
        "kernel `has_a_stack` for sm_80: stack frame of 160 bytes, 0 bytes of spill stores",
        "kernel `spills` has no line in BUDGET",
        "there is no kernel `absent`",
    ];
    fails(&run(short_copy("kernels-stack", 24, &more, "has_a_stack 255 0\nabsent 8 0\n")), &wants);
    let warned = "static __device__ void nothing() { int unused; }\n";
    fails(&run(short_copy("kernels-warning", 24, warned, "")), &["unused", "a compiler fails"]);
    // What was made before is still there, and complete.
    let image = fs::read(format!("{TMP}/{out}/sm_90.cubin")).unwrap();
    assert!(image.starts_with(b"\x7fELF"));
}

#[test]
fn sources_compile_with_old_and_new_nvrtc() {
    let Some(toolkit) = toolkit() else { return };
    for (folder, version) in [("nvrtc-13", "13.0"), ("nvrtc-12", "12.0")] {
        let mut fake = Fake::new(&[], "", "all");
        // The driver without a GPU and not its compiler: a folder of links to the one alone.
        let driver = format!("{TMP}/fake-driver-alone");
        fs::create_dir_all(&driver).unwrap();
        for name in ["libcuda.so", "libcuda.so.1"] {
            let link = format!("{driver}/{name}");
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(format!("{TMP}/fake-cuda-plain/{name}"), link).unwrap();
        }
        let path = format!("{driver}:{}", toolkit.join(folder).display());
        fake.command.env("LD_LIBRARY_PATH", path).env(COMPILER, format!("NVRTC {version}"));
        fake.passes(&["--exact", "compile::child_of_a_real_compiler"]);
    }
}

/// A cache that keeps the last image.
#[derive(Default)]
struct Last(Mutex<Vec<u8>>);

impl ImageCache for Last {
    fn get(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn put(&self, _: &str, image: &[u8]) {
        *self.0.lock().unwrap() = image.to_vec();
    }
}

#[test]
fn child_of_a_real_compiler() {
    let Ok(compiler) = env::var(COMPILER) else { return };
    let last = Arc::new(Last::default());
    let engine = CudaEngine::open(&CudaOptions { cache: Some(last.clone()), ..CudaOptions::new(0) }).unwrap();
    if !kernels::embedded_images().is_empty() {
        assert!(engine.kernels().starts_with("embedded"), "{}", engine.kernels());
        return;
    }
    assert_eq!(engine.kernels(), format!("compiled by {compiler} for sm_90"));
    let image = last.0.lock().unwrap();
    assert!(image.starts_with(b"\x7fELF"), "{} bytes that are no machine code", image.len());
}
