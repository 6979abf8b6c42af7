//! The weight path as a job scheduler sees it: interrupted, killed, shared, short of disk, and larger than its memory.

#![allow(clippy::print_stdout)] // what was not run is said

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use assert_cmd::cargo::CommandCargoExt;
use bench::{Kind, Model, Synth, synthesize};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::safegene;

/// A pair of some 60 MB, enough for a run to be caught in the middle.
struct Pair {
    dir: TempDir,
}

impl Pair {
    fn new(layers: u64) -> Pair {
        let tiny = Model::named("tiny").unwrap();
        let model = Model {
            layers,
            hidden: 512,
            intermediate: 1408,
            attention: [512, 256],
            vocabulary: 4000,
            ..tiny
        };
        Self::of(Synth { model, kind: Kind::Bf16, seed: 1, shard_bytes: 20_000_000, headers_only: false })
    }

    fn of(synth: Synth) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        synthesize(&synth, dir.path()).unwrap();
        Pair { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, out: &Path) -> Vec<String> {
        let arg = |path: &Path| path.to_str().unwrap().to_owned();
        let mut call = vec!["-q".to_owned(), "extract".into(), "--rank".into(), "8".into(), "--json".into()];
        for (key, path) in [
            ("--aligned", self.path("aligned")),
            ("--degraded", self.path("degraded")),
            ("--out", out.into()),
        ] {
            call.extend([key.to_owned(), arg(&path)]);
        }
        call
    }

    fn start(&self, out: &Path) -> Child {
        let mut command = Command::cargo_bin("safegene").unwrap();
        command.args(self.call(out)).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }

    /// Runs to the end; returns the summary.
    fn finish(&self, out: &Path) -> Value {
        let call = self.call(out);
        let stdout = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>()).ok().stdout;
        serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn killed_at_twenty_moments_and_rerun_gives_the_same_bytes() {
    let pair = Pair::new(6);
    let plain = pair.path("plain");
    let wall_s = pair.finish(&plain)["wall_s"].as_f64().unwrap();
    let want = files(&plain);
    let (mut resumed, mut killed) = (0, 0);
    for moment in 0..20u32 {
        let out = pair.path("gene");
        let mut child = pair.start(&out);
        // Spread over the run, and not at the same places each time.
        let part = (f64::from(moment) + f64::from(moment * 7919 % 97) / 97.0) / 20.0;
        std::thread::sleep(Duration::from_secs_f64(0.01 + part * wall_s));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        let summary = pair.finish(&out);
        resumed += summary["resumed"].as_u64().unwrap();
        assert!(files(&out) == want, "killed at moment {moment}");
        assert!(!pair.path("gene.partial").exists());
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(killed >= 5 && resumed > 0, "{killed} of 20 runs were caught, {resumed} tensors were used again");
}

#[test]
fn terminated_run_ends_with_75_and_goes_on() {
    let pair = Pair::new(10);
    let want = {
        pair.finish(&pair.path("plain"));
        files(&pair.path("plain"))
    };
    let mut caught = 0;
    for signal in ["-TERM", "-INT"] {
        for delay_ms in [40, 90, 160, 250, 400] {
            let out = pair.path("gene");
            let mut child = pair.start(&out);
            std::thread::sleep(Duration::from_millis(delay_ms));
            Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            match child.wait().unwrap().code() {
                Some(75) => {
                    caught += 1;
                    assert!(pair.path("gene.partial").exists() && !out.exists());
                    pair.finish(&out);
                }
                // Done before the signal came.
                Some(0) => {}
                // Caught before the program could listen.
                None => drop(pair.finish(&out)),
                other => panic!("{signal} after {delay_ms} ms: {other:?}"),
            }
            assert!(files(&out) == want, "{signal} after {delay_ms} ms");
            fs::remove_dir_all(&out).unwrap();
        }
    }
    assert!(caught > 0, "no run was caught");
}

#[test]
fn tasks_of_an_array_and_assemble_make_what_one_process_makes() {
    let pair = Pair::new(2);
    pair.finish(&pair.path("plain"));
    let out = pair.path("gene");
    for task in [7, 5, 6] {
        let mut command = Command::cargo_bin("safegene").unwrap();
        command.args(pair.call(&out));
        command.env("SLURM_ARRAY_TASK_ID", task.to_string()).env("SLURM_ARRAY_TASK_COUNT", "3");
        command.env("SLURM_ARRAY_TASK_MIN", "5");
        assert_eq!(command.output().unwrap().status.code(), Some(0), "task {task}");
        if task != 6 {
            let early = safegene(&["assemble", out.to_str().unwrap()]);
            assert_eq!(early.code, 75, "{}", early.stderr);
            assert!(early.stderr.contains("not there yet"), "{}", early.stderr);
        }
    }
    assert!(!out.exists());
    safegene(&["assemble", out.to_str().unwrap()]).ok();
    assert!(files(&out) == files(&pair.path("plain")));
    // Once more, as a requeued job does.
    let again = safegene(&["assemble", out.to_str().unwrap()]).ok();
    assert!(again.stderr.contains("there already"), "{}", again.stderr);
    let nothing = safegene(&["assemble", pair.path("nothing").to_str().unwrap()]);
    assert_eq!(nothing.code, 2, "{}", nothing.stderr);
}

#[test]
fn worker_that_is_none_is_a_usage_error() {
    let pair = Pair::new(1);
    for worker in ["0/2", "3/2", "2", "a/b", "1/0"] {
        let mut call = pair.call(&pair.path("gene"));
        call.extend(["--worker".to_owned(), worker.to_owned()]);
        let outcome = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(outcome.code, 2, "{worker}: {}", outcome.stderr);
    }
}

#[test]
fn pair_twenty_times_the_budget_stays_under_it() {
    let budget: u64 = 64 << 20;
    let tiny = Model::named("tiny").unwrap();
    let model = Model {
        layers: 110,
        hidden: 512,
        intermediate: 1408,
        attention: [512, 512],
        vocabulary: 40_000,
        ..tiny
    };
    let pair =
        Pair::of(Synth { model, kind: Kind::Bf16, seed: 1, shard_bytes: 200_000_000, headers_only: false });
    // The system refuses it more than that: code, stacks of threads, and the allocator's reserves are addresses too.
    let capped = |args: &[String]| {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("ulimit -v {} && exec \"$@\"", (budget + (320 << 20)) >> 10)).arg("sh");
        command.arg(assert_cmd::cargo::cargo_bin("safegene")).args(args).args(["--threads", "2"]);
        command.env("MALLOC_ARENA_MAX", "1");
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        let stdout = String::from_utf8(output.stdout).unwrap();
        serde_json::from_str::<Value>(stdout.lines().last().unwrap()).unwrap()
    };
    let check = |what: &str, peak: &Value| {
        // The program itself takes some 20 MB.
        let peak = peak.as_u64().unwrap();
        assert!(peak < budget + (32 << 20), "{what}: {peak} bytes");
    };
    let mut call = pair.call(&pair.path("gene"));
    call.extend(["--memory-budget".to_owned(), "64M".to_owned()]);
    let summary = capped(&call);
    let input = summary["input_bytes"].as_u64().unwrap();
    assert!(input >= 20 * budget, "{input}");
    check("extract", &summary["peak_rss_bytes"]);
    let arg = |name: &str| pair.path(name).to_str().unwrap().to_owned();
    let fuse =
        ["-q", "fuse", "--coefficient", "1", "--json", "--memory-budget", "64M", "--gene", &arg("gene")];
    let mut call: Vec<String> = fuse.iter().map(|arg| (*arg).to_owned()).collect();
    call.extend(["--target".to_owned(), arg("degraded"), "--out".to_owned(), arg("fused")]);
    check("fuse", &capped(&call)["peak_rss_bytes"]);
}

#[test]
fn fuse_killed_at_twenty_moments_and_rerun_gives_the_same_bytes() {
    let pair = Pair::new(6);
    pair.finish(&pair.path("gene"));
    let arg = |name: &str| pair.path(name).to_str().unwrap().to_owned();
    let call = |out: &str| -> Vec<String> {
        let fixed =
            ["-q", "fuse", "--coefficient", "1.5", "--json", "--outside", "1", "--gene", &arg("gene")];
        let mut call: Vec<String> = fixed.iter().map(|arg| (*arg).to_owned()).collect();
        call.extend(["--target".to_owned(), arg("degraded"), "--out".to_owned(), arg(out)]);
        call
    };
    let finish = |out: &str| -> Value {
        let call = call(out);
        let stdout = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>()).ok().stdout;
        serde_json::from_str(&stdout).unwrap()
    };
    let wall_s = finish("plain")["wall_s"].as_f64().unwrap();
    let want = files(&pair.path("plain"));
    let (mut resumed, mut killed) = (0, 0);
    for moment in 0..20u32 {
        let mut command = Command::cargo_bin("safegene").unwrap();
        let mut child =
            command.args(call("fused")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let part = (f64::from(moment) + f64::from(moment * 7919 % 97) / 97.0) / 20.0;
        std::thread::sleep(Duration::from_secs_f64(0.01 + part * wall_s));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        resumed += finish("fused")["resumed"].as_u64().unwrap();
        assert!(files(&pair.path("fused")) == want, "killed at moment {moment}");
        assert!(!pair.path("fused.partial").exists());
        fs::remove_dir_all(pair.path("fused")).unwrap();
    }
    assert!(killed >= 5 && resumed > 0, "{killed} of 20 runs were caught, {resumed} tensors were used again");
}

#[test]
fn fuse_in_shares_is_put_together_and_may_be_again() {
    let pair = Pair::new(4);
    pair.finish(&pair.path("gene"));
    let arg = |name: &str| pair.path(name).to_str().unwrap().to_owned();
    let fuse = |out: &str, worker: Option<&str>| {
        let (gene, target, out) = (arg("gene"), arg("degraded"), arg(out));
        let mut call =
            vec!["fuse", "--coefficient", "1", "--gene", &gene, "--target", &target, "--out", &out];
        call.extend(worker.into_iter().flat_map(|worker| ["--worker", worker]));
        safegene(&call).ok();
    };
    fuse("plain", None);
    for worker in ["3/3", "1/3"] {
        fuse("fused", Some(worker));
        let early = safegene(&["assemble", &arg("fused")]);
        assert_eq!(early.code, 75, "{}", early.stderr);
    }
    fuse("fused", Some("2/3"));
    safegene(&["assemble", &arg("fused")]).ok();
    assert!(files(&pair.path("fused")) == files(&pair.path("plain")));
    let again = safegene(&["assemble", &arg("fused")]).ok();
    assert!(again.stderr.contains("there already"), "{}", again.stderr);
}

#[test]
fn full_disk_is_temporary_and_what_was_finished_is_used() {
    let pair = Pair::new(4);
    pair.finish(&pair.path("plain"));
    let small = pair.path("small");
    fs::create_dir(&small).unwrap();
    let mount = |args: &[&str]| Command::new("mount").args(args).stderr(Stdio::null()).status();
    let size = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", small.to_str().unwrap()];
    if !mount(&size).is_ok_and(|status| status.success()) {
        println!("not run: a small file system cannot be mounted here");
        return;
    }
    let out = small.join("gene");
    let call = pair.call(&out);
    let full = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>());
    let left = small.join("gene.partial").exists();
    mount(&["-o", "remount,size=64m", small.to_str().unwrap()]).unwrap();
    let resumed = pair.finish(&out)["resumed"].as_u64().unwrap();
    let made = files(&out);
    Command::new("umount").arg(&small).status().unwrap();
    assert_eq!(full.code, 75, "{}", full.stderr);
    assert!(full.stderr.contains("No space left"), "{}", full.stderr);
    assert!(left && resumed > 0, "{resumed} tensors were used again");
    assert!(made == files(&pair.path("plain")));
}

#[test]
fn plan_of_the_largest_models_takes_seconds_and_adds_up() {
    for (name, kind, tensors) in
        [("llama-70b", "bf16", 722), ("qwen3-30b-a3b", "bf16", 18_770), ("deepseek-v3", "fp8", 44_979)]
    {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().to_str().unwrap();
        safegene(&["-q", "bench", "synth", "--model", name, "--kind", kind, "--headers-only", "--out", out])
            .ok();
        let side = |side: &str| dir.path().join(side).to_str().unwrap().to_owned();
        let outcome =
            safegene(&["plan", "--aligned", &side("aligned"), "--degraded", &side("degraded"), "--json"])
                .ok();
        let lines: Vec<Value> =
            outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (summary, rows) = lines.split_last().unwrap();
        assert_eq!((rows.len(), summary["tensors"].as_u64().unwrap()), (tensors, tensors as u64), "{name}");
        let sum: u64 = rows.iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
        assert_eq!(summary["input_bytes"].as_u64().unwrap(), sum);
        let becomes: u64 =
            summary["becomes"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        let scales = summary["scale_tensors"][0].as_u64().unwrap();
        assert_eq!(
            (becomes, becomes + scales),
            (tensors as u64, summary["stored_tensors"][0].as_u64().unwrap())
        );
        assert!(summary["wall_s"].as_f64().unwrap() < 30.0);
    }
}

#[test]
fn verify_says_no_to_a_gene_of_other_files() {
    let pair = Pair::new(1);
    let gene = pair.path("gene");
    pair.finish(&gene);
    let arg = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (gene, aligned, degraded) = (arg(gene), arg(pair.path("aligned")), arg(pair.path("degraded")));
    safegene(&["verify", "--gene", &gene]).ok();
    safegene(&["verify", "--gene", &gene, "--aligned", &aligned, "--degraded", &degraded]).ok();
    let swapped = safegene(&["verify", "--gene", &gene, "--aligned", &degraded, "--degraded", &aligned]);
    assert_eq!(swapped.code, 1, "{}", swapped.stderr);
    assert!(swapped.stderr.contains("is not what it says"), "{}", swapped.stderr);
}

#[test]
fn ranks_that_exclude_each_other_are_usage_errors() {
    let pair = Pair::new(1);
    let mut call = pair.call(&pair.path("gene"));
    call.extend(["--max-residual".to_owned(), "0.5".to_owned()]);
    let both = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(both.code, 2, "{}", both.stderr);
    for (key, value) in [
        ("--max-residual", "1.5"),
        ("--max-residual", "0"),
        ("--budget-mb", "-1"),
        ("--budget-mb", "nan"),
        ("--rank", "0"),
    ] {
        let mut call = pair.call(&pair.path("gene"));
        let at = call.iter().position(|arg| arg == "--rank").unwrap();
        (call[at], call[at + 1]) = (format!("{key}={value}"), "--seed=1".into());
        let outcome = safegene(&call.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(outcome.code, 2, "{key} {value}: {}", outcome.stderr);
    }
}
