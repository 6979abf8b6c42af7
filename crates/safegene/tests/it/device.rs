//! The program on a CUDA device: over the driver without a GPU that is built here (`kernels/host`), with what it fails at.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use assert_cmd::cargo::CommandCargoExt;
use bench::{Kind, Model, Synth, synthesize};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::Outcome;

/// The folder of the driver without a GPU.
fn driver() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda-plain");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/gpu/fake-driver");
        let built = Command::new(script).arg(&out).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        out
    })
}

/// Calls the program where there is a device that does as `settings` say; kernels are cached in `home`.
fn on_device(settings: &str, home: &Path, args: &[&str]) -> Outcome {
    let mut command = Command::cargo_bin("safegene").unwrap();
    command.args(args).env("LD_LIBRARY_PATH", driver()).env("SAFEGENE_FAKE_CUDA", settings);
    run(command.env("XDG_CACHE_HOME", home))
}

/// Calls the program where there is none.
fn without_device(args: &[&str]) -> Outcome {
    run(Command::cargo_bin("safegene").unwrap().args(args).env_remove("LD_LIBRARY_PATH"))
}

fn run(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

struct Pair {
    dir: TempDir,
}

impl Pair {
    /// Shapes that no tile divides, with experts of one shape.
    fn new(kind: Kind) -> Pair {
        let tiny = Model::named("tiny").unwrap();
        let model = Model {
            hidden: 88,
            intermediate: 200,
            attention: [88, 40],
            experts: [6, 72],
            dense_layers: 1,
            ..tiny
        };
        let dir = tempfile::tempdir().unwrap();
        let synth = Synth { model, kind, seed: 1, shard_bytes: 300_000, headers_only: false };
        synthesize(&synth, dir.path()).unwrap();
        Pair { dir }
    }

    fn arg(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The arguments of an extraction.
    fn extract(&self, out: &str, more: &[&str]) -> Vec<String> {
        let sides =
            ["--aligned", &self.arg("aligned"), "--degraded", &self.arg("degraded")].map(str::to_owned);
        let mut args: Vec<String> =
            ["extract", "--rank", "8", "--json", "--out", &self.arg(out)].map(str::to_owned).into();
        args.extend(sides);
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }

    fn on_device(&self, settings: &str, args: &[String]) -> Outcome {
        on_device(settings, &self.dir.path().join("home"), &strs(args))
    }
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn files(dir: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn summary(outcome: &Outcome) -> Value {
    serde_json::from_str(outcome.stdout.lines().last().unwrap()).unwrap()
}

#[test]
fn gene_of_a_device_is_that_of_the_cpu() {
    for kind in [Kind::Bf16, Kind::Fp8] {
        let pair = Pair::new(kind);
        let device = pair.on_device("", &pair.extract("device", &["--device", "cuda"])).ok();
        let cpu = without_device(&strs(&pair.extract("cpu", &["--device", "cpu"]))).ok();
        assert!(summary(&device)["engine"].as_str().unwrap().starts_with("cuda:0"), "{}", device.stderr);
        assert_eq!(summary(&cpu)["engine"], "cpu");
        assert_eq!(summary(&device)["classes"], summary(&cpu)["classes"]);
        let read = |name: &str| -> Value {
            serde_json::from_slice(&fs::read(pair.dir.path().join(name).join("gene.json")).unwrap()).unwrap()
        };
        let (device, cpu) = (read("device"), read("cpu"));
        let modules = |gene: &Value| gene["modules"].as_array().unwrap().clone();
        assert!(modules(&cpu).len() > 25);
        for (a, b) in modules(&device).iter().zip(modules(&cpu)) {
            assert_eq!((&a["name"], &a["rank"], &a["class"]), (&b["name"], &b["rank"], &b["class"]));
            let off = |key: &str| {
                let [x, y] = [a, &b].map(|module| module[key].as_f64().unwrap());
                (x - y).abs() / y
            };
            // Sums of the same numbers in another order; the residual is that of other factors, as good as the others.
            assert!(off("energy") < 1e-12, "{}: energy {}", a["name"], off("energy"));
            assert!(off("residual") < 1e-5, "{}: residual {}", a["name"], off("residual"));
        }
        // Either engine stands by what the other one says.
        let sides = [pair.arg("aligned"), pair.arg("degraded")];
        for (gene, name) in [("device", "cpu"), ("cpu", "cuda")] {
            let gene = pair.arg(gene);
            let verify = [
                "verify",
                "--gene",
                &gene,
                "--aligned",
                &sides[0],
                "--degraded",
                &sides[1],
                "--device",
                name,
            ];
            pair.on_device("", &verify.map(str::to_owned)).ok();
        }
    }
}

#[test]
fn same_bytes_however_the_work_was_cut() {
    let pair = Pair::new(Kind::Bf16);
    pair.on_device("", &pair.extract("want", &[])).ok();
    let want = files(&pair.arg("want"));
    let cases: [(&str, &[&str]); 5] = [
        ("order=early", &["--threads", "1"]),
        ("blocks=down", &["--threads", "7"]),
        ("blocks=3,threads=4", &["--memory-budget", "64M"]),
        // No pinned memory; and so little of the device's that segments come and go.
        ("fail=cuMemHostAlloc:*:2", &[]),
        ("memory=600000", &["--threads", "1"]),
    ];
    for (settings, more) in cases {
        pair.on_device(settings, &pair.extract("gene", more)).ok();
        assert!(files(&pair.arg("gene")) == want, "{settings} {more:?}");
        fs::remove_dir_all(pair.arg("gene")).unwrap();
    }
    for worker in ["1/2", "2/2"] {
        pair.on_device("", &pair.extract("gene", &["--worker", worker])).ok();
    }
    pair.on_device("", &["assemble".to_owned(), pair.arg("gene")]).ok();
    assert!(files(&pair.arg("gene")) == want);
}

#[test]
fn fused_model_of_a_device_has_the_bytes_of_the_cpu() {
    for kind in [Kind::Bf16, Kind::Fp8] {
        let pair = Pair::new(kind);
        without_device(&strs(&pair.extract("gene", &["--device", "cpu"]))).ok();
        let fuse = |device: &str| {
            let (gene, target, out) = (pair.arg("gene"), pair.arg("degraded"), pair.arg(device));
            let mut args =
                vec!["fuse", "--gene", &gene, "--coefficient", "0.7", "--target", &target, "--out", &out];
            args.extend(["--device", device]);
            args.extend((kind == Kind::Fp8).then_some("--dequantize"));
            args.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        pair.on_device("", &fuse("cuda")).ok();
        without_device(&strs(&fuse("cpu"))).ok();
        let mut both = [files(&pair.arg("cuda")), files(&pair.arg("cpu"))];
        // It has the sums, whose last bits are each engine's own.
        both.iter_mut().for_each(|files| drop(files.remove("safegene.json").unwrap()));
        assert!(both[0] == both[1]);
    }
}

#[test]
fn kernels_are_compiled_once() {
    let home = tempfile::tempdir().unwrap();
    let doctor = || on_device("", home.path(), &["doctor", "--json"]).ok();
    let kernels = |outcome: &Outcome| {
        let facts: Value = serde_json::from_str(&outcome.stdout).unwrap();
        let engines = facts["engines"].as_array().unwrap().clone();
        assert_eq!(engines.len(), 2);
        assert!(engines.iter().all(|engine| engine["cases"].as_array().unwrap().len() > 100), "{facts}");
        engines[1]["device"]["kernels"].as_str().unwrap().to_owned()
    };
    let first = kernels(&doctor());
    if first.starts_with("embedded") {
        return;
    }
    assert_eq!(kernels(&doctor()), format!("{first}, cached"));
    let cached: Vec<_> = fs::read_dir(home.path().join("safegene/kernels")).unwrap().collect();
    assert_eq!(cached.len(), 1);
}

#[test]
fn doctor_finds_a_wrong_result() {
    let home = tempfile::tempdir().unwrap();
    // A kernel that is not launched leaves the poison where its results should be.
    let found = on_device("fail=cuLaunchKernel:40:1", home.path(), &["doctor"]);
    assert_eq!(found.code, 1, "{}", found.stderr);
    assert!(found.stdout.contains("WRONG in") && found.stderr.contains("cuLaunchKernel"), "{}", found.stderr);
    let table = found.stdout.lines().filter(|line| line.contains("as the reference")).count();
    assert!(table > 9, "{}", found.stdout);
}

#[test]
fn device_that_is_not_there() {
    let pair = Pair::new(Kind::Bf16);
    let out = pair.dir.path().join("gene");
    let refused = without_device(&strs(&pair.extract("gene", &["--device", "cuda"])));
    refused.refused(2, &["no CUDA driver", "hint:", "--device cpu"], &out);
    let args = pair.extract("gene", &["--device", "cuda:3"]);
    pair.on_device("", &args).refused(2, &["no CUDA device 3", "sees 1"], &out);
    pair.on_device("devices=0", &pair.extract("gene", &["--device", "cuda"])).refused(
        2,
        &["no device"],
        &out,
    );
    let odd = without_device(&strs(&pair.extract("gene", &["--device", "gpu"])));
    assert_eq!(odd.code, 2);
    // Without being asked for, its absence is nothing to talk about; a driver that does not work is.
    for settings in ["devices=0", "fail=cuDevicePrimaryCtxRetain:1:2"] {
        let done = pair.on_device(settings, &pair.extract("gene", &["--quiet"])).ok();
        assert_eq!(summary(&done)["engine"], "cpu");
        assert_eq!(done.stderr.contains("the CPU is used"), settings != "devices=0", "{}", done.stderr);
        fs::remove_dir_all(&out).unwrap();
    }
    let doctor = without_device(&["doctor"]).ok();
    assert!(doctor.stdout.contains("no CUDA driver"), "{}", doctor.stdout);
    assert_eq!(without_device(&["doctor", "--device", "cuda"]).code, 2);
    assert_eq!(on_device("fail=cuInit:*:999", Path::new("/nowhere"), &["doctor"]).code, 1);
}

#[test]
fn device_that_fails_on_the_way() {
    let pair = Pair::new(Kind::Bf16);
    pair.on_device("", &pair.extract("want", &[])).ok();
    let want = files(&pair.arg("want"));
    for settings in
        ["fail=cuLaunchKernel:200:719", "fail=cuEventSynchronize:20:700", "fail=cuMemcpyHtoDAsync_v2:30:1"]
    {
        let failed = pair.on_device(settings, &pair.extract("gene", &["--threads", "2"]));
        assert_eq!(failed.code, 75, "{}", failed.stderr);
        assert!(failed.stderr.contains("the CUDA call `cu"), "{}", failed.stderr);
        // What was finished is used again.
        let done = pair.on_device("", &pair.extract("gene", &[])).ok();
        assert!(summary(&done)["resumed"].as_u64().unwrap() > 0, "{settings}: {}", failed.stderr);
        assert!(files(&pair.arg("gene")) == want);
        fs::remove_dir_all(pair.arg("gene")).unwrap();
    }
    let failed = pair.on_device("memory=50000", &pair.extract("gene", &["--device", "cuda"]));
    assert_eq!(failed.code, 75, "{}", failed.stderr);
    assert!(
        failed.stderr.contains("more memory and has") && failed.stderr.contains("hint:"),
        "{}",
        failed.stderr
    );
}
