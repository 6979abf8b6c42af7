//! Shares of the work, interruptions, limits of memory and ranks: the gene does not depend on how it was made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use checkpoint::Dtype;
use gene::{Class, Gene};
use kernels::CpuEngine;
use stream::{
    Assembled, Extract, ExtractReport, NoProgress, Progress, Ranks, StreamError, Worker, assemble, extract,
    verify,
};
use tempfile::{TempDir, tempdir};

use crate::folders::{DOWN, NORM, Q, model, names, open, save, save_sharded, usual};

/// A pair of folders, and what a plain run makes of them.
struct Bench {
    dir: TempDir,
    aligned: PathBuf,
    degraded: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempdir().unwrap();
        let aligned = save_sharded(&dir.path().join("aligned"), &usual(&model()), Dtype::Bf16);
        let degraded = save(&dir.path().join("degraded"), &model(), Dtype::Bf16);
        Bench { dir, aligned, degraded }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn job(&self, name: &str) -> Extract {
        Extract::new(open(&self.aligned), open(&self.degraded), Ranks::Fixed(8), &self.out(name))
    }

    fn run(&self, job: &Extract) -> Result<ExtractReport, StreamError> {
        extract(&CpuEngine::new(), job, &NoProgress)
    }

    /// The files of the gene of a plain run.
    fn plain(&self) -> BTreeMap<String, Vec<u8>> {
        self.run(&self.job("plain")).unwrap();
        files(&self.out("plain"))
    }
}

pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn shares_of_any_number_of_workers_make_the_same_gene() {
    let bench = Bench::new();
    let plain = bench.plain();
    assert!(plain.len() >= 4);
    for of in [2, 3, 7, 20] {
        let name = format!("gene-{of}");
        for index in (1..=of).rev() {
            let report = bench.run(&Extract { worker: Worker { index, of }, ..bench.job(&name) }).unwrap();
            assert!(report.partial && !bench.out(&name).exists());
        }
        assemble(&CpuEngine::new(), &bench.out(&name), 1 << 30, false).unwrap();
        assert!(files(&bench.out(&name)) == plain, "{of} workers");
        assert!(!bench.out(&format!("{name}.partial")).exists());
    }
}

#[test]
fn assemble_without_all_shares_or_without_any() {
    let bench = Bench::new();
    let worker = |index| Extract { worker: Worker { index, of: 3 }, ..bench.job("gene") };
    bench.run(&worker(1)).unwrap();
    bench.run(&worker(3)).unwrap();
    let assemble = |name: &str| assemble(&CpuEngine::new(), &bench.out(name), 1 << 30, false);
    let error = assemble("gene").unwrap_err();
    assert!(matches!(error, StreamError::Incomplete { missing: 1.., .. }), "{error}");
    assert!(error.hint().is_some());
    bench.run(&worker(2)).unwrap();
    assemble("gene").unwrap();
    assert!(files(&bench.out("gene")) == bench.plain());
    assert!(matches!(assemble("nothing").unwrap_err(), StreamError::NoWork { .. }));
}

#[test]
fn shares_of_different_work_do_not_mix() {
    let bench = Bench::new();
    bench.run(&Extract { worker: Worker { index: 1, of: 2 }, ..bench.job("gene") }).unwrap();
    let other = Extract { worker: Worker { index: 2, of: 2 }, ranks: Ranks::Fixed(4), ..bench.job("gene") };
    bench.run(&other).unwrap();
    let error = assemble(&CpuEngine::new(), &bench.out("gene"), 1 << 30, false).unwrap_err();
    assert!(matches!(error, StreamError::OtherWork { .. }), "{error}");
}

/// Stops after some tensors.
struct StopAfter(AtomicU64, Arc<AtomicBool>);

impl Progress for StopAfter {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64, _: &str) {
        if self.0.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.1.store(true, Ordering::SeqCst);
        }
    }
}

#[test]
fn interrupted_run_goes_on_where_it_stopped_and_makes_the_same_gene() {
    let bench = Bench::new();
    let plain = bench.plain();
    let mut interrupted = 0;
    for after in 1..=9 {
        let name = format!("gene-{after}");
        let job = Extract { memory_bytes: 1, ..bench.job(&name) };
        let stopper = StopAfter(AtomicU64::new(after), job.stop.clone());
        match extract(&CpuEngine::new(), &job, &stopper) {
            Err(StreamError::Interrupted { done, .. }) => {
                assert!(done >= after && !bench.out(&name).exists());
                interrupted += 1;
                let report = bench.run(&bench.job(&name)).unwrap();
                assert_eq!(report.resumed, done);
            }
            done => drop(done.unwrap()),
        }
        assert!(files(&bench.out(&name)) == plain, "stopped after {after}");
    }
    assert!(interrupted >= 5, "{interrupted} runs were interrupted");
}

#[test]
fn unfinished_work_of_changed_inputs_is_not_used() {
    let bench = Bench::new();
    bench.run(&Extract { worker: Worker { index: 1, of: 2 }, ..bench.job("gene") }).unwrap();
    // The same names and shapes, other values.
    let mut other = model();
    other.get_mut(Q[0]).unwrap().1[5] += 1.0;
    save(&bench.degraded, &other, Dtype::Bf16);
    let report = bench.run(&Extract { worker: Worker { index: 1, of: 2 }, ..bench.job("gene") }).unwrap();
    assert_eq!(report.resumed, 0);
}

#[test]
fn rows_that_are_read_when_needed_give_the_same_gene() {
    let bench = Bench::new();
    let plain = bench.plain();
    bench.run(&Extract { memory_bytes: 1, ..bench.job("small") }).unwrap();
    assert!(files(&bench.out("small")) == plain);
}

#[test]
fn ranks_by_budget_fit_and_are_certified() {
    let bench = Bench::new();
    let whole = bench.run(&Extract { ranks: Ranks::Fixed(40), ..bench.job("whole") }).unwrap();
    let mut last = 0.0;
    for bytes in [2_000u64, 6_000, 12_000] {
        let name = format!("gene-{bytes}");
        let ranks = Ranks::Budget { bytes, max: 40 };
        let report = bench.run(&Extract { ranks, ..bench.job(&name) }).unwrap();
        let kept: Vec<_> = report.modules.iter().filter(|m| m.class == Class::LowRank).collect();
        let used: u64 = kept.iter().map(|m| 4 * m.rank as u64 * (m.shape[0] + m.shape[1])).sum();
        assert!(used <= bytes && used + 4 * (48 + 57) > bytes, "{used} of {bytes}");
        assert!(report.captured > last && report.captured < whole.captured);
        last = report.captured;
        let gene = Gene::open(&bench.out(&name)).unwrap();
        let (a, d) = (Arc::new(open(&bench.aligned)), Arc::new(open(&bench.degraded)));
        let found = verify(&CpuEngine::new(), &gene, &a, &d, 1 << 30, &NoProgress).unwrap();
        assert!(found.faults.is_empty() && found.modules == kept.len() as u64, "{:?}", found.faults);
    }
    // No room for any: what is left is the rest.
    let report =
        bench.run(&Extract { ranks: Ranks::Budget { bytes: 10, max: 8 }, ..bench.job("none") }).unwrap();
    assert!(report.modules.iter().all(|m| m.class != Class::LowRank));
    assert!(report.classes[&Class::LeftOut] >= 3);
}

#[test]
fn ranks_by_residual_are_met_by_every_module() {
    let bench = Bench::new();
    let ranks = Ranks::Residual { share: 0.3, max: 48 };
    let report = bench.run(&Extract { ranks, ..bench.job("gene") }).unwrap();
    for module in report.modules.iter().filter(|m| m.class == Class::LowRank) {
        assert!(module.residual <= 0.3 && module.residual > 0.2, "{}: {}", module.name, module.residual);
    }
}

#[test]
fn left_out_by_pattern_is_listed_and_missed() {
    let bench = Bench::new();
    let leave_out = vec!["model.layers.1.*".to_owned(), DOWN[0].to_owned()];
    let report = bench.run(&Extract { leave_out, ..bench.job("gene") }).unwrap();
    let gene = Gene::open(&bench.out("gene")).unwrap();
    assert_eq!(gene.layers(), [0]);
    assert!(gene.rest().iter().any(|entry| entry.name == NORM[1] && entry.class == Class::LeftOut));
    let plain = bench.run(&bench.job("plain")).unwrap();
    assert_eq!(report.energy, plain.energy);
    assert!(report.captured < plain.captured);
    assert_eq!(report.classes.values().sum::<u64>(), plain.classes.values().sum::<u64>());
}

#[test]
fn verify_agrees_with_genes_of_every_choice_of_ranks() {
    let bench = Bench::new();
    let choices = [
        Ranks::Fixed(3),
        Ranks::Residual { share: 0.4, max: 30 },
        Ranks::Auto { max: 30 },
        Ranks::Budget { bytes: 8000, max: 30 },
    ];
    for (at, ranks) in choices.into_iter().enumerate() {
        let job = Extract { ranks, seed: 5, ..bench.job(&format!("gene-{at}")) };
        bench.run(&job).unwrap();
        let (a, d) = (Arc::new(open(&bench.aligned)), Arc::new(open(&bench.degraded)));
        let gene = Gene::open(&job.out).unwrap();
        let report = verify(&CpuEngine::new(), &gene, &a, &d, 1 << 30, &NoProgress).unwrap();
        assert!(report.faults.is_empty() && report.tensors > 0, "{ranks:?}: {:?}", report.faults);
    }
}

#[test]
fn verify_finds_another_value_another_file_and_another_claim() {
    let bench = Bench::new();
    bench.run(&bench.job("gene")).unwrap();
    let check = || {
        let gene = Gene::open(&bench.out("gene")).unwrap();
        let (a, d) = (Arc::new(open(&bench.aligned)), Arc::new(open(&bench.degraded)));
        verify(&CpuEngine::new(), &gene, &a, &d, 1 << 30, &NoProgress).unwrap()
    };
    let good = check();
    assert!(good.faults.is_empty() && good.modules == 3, "{:?}", good.faults);
    let manifest = bench.out("gene").join("gene.json");
    let text = fs::read_to_string(&manifest).unwrap();
    // A claim that was made a little better, or worse.
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let at = json["modules"].as_array().unwrap().iter().position(|m| m["class"] == "low-rank").unwrap();
    for (key, word) in [
        ("residual", "residual"),
        ("energy", "energy"),
        ("noise_floor", "noise floor"),
        ("zero_fraction", "zero fraction"),
        ("captured_upper_bound", "upper bound"),
    ] {
        let mut lie = json.clone();
        let said = json["modules"][at][key].as_f64().unwrap();
        lie["modules"][at][key] = (said * 0.999 + f64::from(u8::from(said == 0.0)) * 1e-3).into();
        fs::write(&manifest, lie.to_string()).unwrap();
        let faults = check().faults;
        assert!(faults.iter().any(|fault| fault.contains(word)), "{key}: {faults:?}");
    }
    let mut lie = json.clone();
    lie["captured"] = (json["captured"].as_f64().unwrap() * 1.001).min(1.0).into();
    fs::write(&manifest, lie.to_string()).unwrap();
    assert!(check().faults.iter().any(|fault| fault.contains("captured of the whole")));
    fs::write(&manifest, &text).unwrap();
    // One element of one checkpoint.
    let mut other = model();
    other.get_mut(Q[0]).unwrap().1[7] += 0.5;
    save(&bench.degraded, &other, Dtype::Bf16);
    let faults = check().faults;
    assert!(faults.iter().any(|fault| fault.contains("content")), "{faults:?}");
    assert!(faults.iter().any(|fault| fault.contains(Q[0])), "{faults:?}");
}

#[test]
fn files_left_by_a_run_that_was_killed_while_it_wrote_the_gene_do_not_matter() {
    let bench = Bench::new();
    let plain = bench.plain();
    // The journal is whole; the gene's own files are torn, and one belongs to no gene of this pair.
    bench.run(&Extract { worker: Worker { index: 1, of: 2 }, ..bench.job("gene") }).unwrap();
    bench.run(&Extract { worker: Worker { index: 2, of: 2 }, ..bench.job("gene") }).unwrap();
    let partial = bench.out("gene.partial");
    for name in [".work/values.part", "adapter_model.safetensors", "rest.safetensors", "of-another-run"] {
        fs::write(partial.join(name), b"torn").unwrap();
    }
    let made = assemble(&CpuEngine::new(), &bench.out("gene"), 1 << 30, false).unwrap();
    let Assembled::Gene(report) = made else { panic!("{made:?}") };
    assert!(!report.already && files(&bench.out("gene")) == plain);
    assert_eq!(fs::read_dir(bench.out("gene")).unwrap().count(), plain.len(), "hidden files stay behind");
}
