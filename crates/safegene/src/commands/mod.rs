//! One file a subcommand: validated arguments in, work done, report out.

mod assemble;
mod bench;
mod calibrate;
mod compare;
mod demo;
mod distill;
mod doctor;
mod evaluate;
mod extract;
mod fuse;
mod inspect;
mod lab;
mod models;
mod plan;
mod recover;
mod select;
mod verify;

use crate::args::{Args, Bench, Command, Lab, Recover};
use crate::device::Device;
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use ::checkpoint::Checkpoint;
use ::gene::Gene;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use transformer::Openings;

/// Says so where a gene was fused into a target, or into what it is an adapter over.
fn warn_if_fused(gene: &Gene, target: &Checkpoint, ui: &Ui) {
    let holds = |dir: &Path| stream::fused_genes(dir).iter().any(|g| g == gene.content());
    let (dir, base) = (target.dir(), target.base_dir());
    if holds(dir) {
        ui.warn(&format!("`{}` holds this gene already; what is fused comes on top of it", dir.display()));
    } else if base != dir && holds(base) {
        ui.warn(&format!(
            "`{}` was fine-tuned from `{}`, which holds this gene already: in the lab such fine-tunes learnt to undo it, and after \
             three rounds adding it again was not enough; fine-tune what was never fused, and fuse into a copy",
            dir.display(),
            base.display()
        ));
    }
}

/// Runs the chosen command.
pub(crate) fn run(args: Args, ui: &Ui) -> Result<(), Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory_bytes = args.memory_budget.unwrap_or_else(default_memory_bytes);
    let on_weights = matches!(
        args.command,
        Command::Extract(_)
            | Command::Assemble(_)
            | Command::Verify(_)
            | Command::Fuse(_)
            | Command::Recover(Recover { list: false, .. })
            | Command::Bench(Bench::Extract(_) | Bench::Fuse(_) | Bench::Device(_))
    );
    let device = match on_weights {
        true => Device::open(args.device, memory_bytes, ui)?,
        false => Device::Cpu(kernels::CpuEngine::new()),
    };
    let threads = device.threads(args.threads, cores);
    // Fails only if the pool was built before, which nothing does.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match args.command {
        Command::Plan(job) => plan::run(&job, memory_bytes, ui),
        Command::Extract(job) => extract::run(&job, &device, memory_bytes, ui),
        Command::Assemble(job) => assemble::run(&job, &device, memory_bytes, ui),
        Command::Verify(job) => verify::run(&job, &device, memory_bytes, ui),
        Command::Bench(job) => self::bench::run(&job, &device, memory_bytes, ui),
        Command::Doctor(job) => doctor::run(&job, args.device, memory_bytes, ui),
        Command::Inspect(job) => inspect::run(&job, ui),
        Command::Distill(job) => self::distill::run(&job, ui),
        Command::Select(job) => select::run(&job, ui),
        Command::Calibrate(job) => calibrate::run(&job, ui),
        Command::Fuse(job) => fuse::run(&job, &device, memory_bytes, ui),
        Command::Recover(job) => recover::run(&job, &device, memory_bytes, ui),
        Command::Evaluate(job) => evaluate::run(&job, ui),
        Command::Lab(Lab::Build(job)) => lab::run(&job, threads, ui),
        Command::Compare(job) => self::compare::run(&job, threads, ui),
        Command::Demo(job) => demo::run(&job, threads, ui),
    }
}

/// The built-in refusal openings, or those of a file.
fn openings(file: Option<&Path>) -> Result<Openings, Failure> {
    let Some(path) = file else { return Ok(Openings::default()) };
    let input = |causes: Vec<String>| Failure {
        code: Code::Input,
        message: format!("cannot read `{}`", path.display()),
        causes,
        hint: Some("the file holds one opening of a refusal on each line".into()),
    };
    let text = std::fs::read_to_string(path).map_err(|e| input(vec![e.to_string()]))?;
    Openings::parse(&text).ok_or_else(|| input(vec!["it holds no opening".into()]))
}

/// Refuses a file whose folder is not there: before the work, not after it.
fn check_folder_of(out: &Path) -> Result<(), Failure> {
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() {
        return Ok(());
    }
    let message = format!("cannot write `{}`: `{}` is no folder", out.display(), folder.display());
    Err(Failure::usage(message, "make the folder, or choose another path"))
}

/// `91.2 %`.
fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Bytes in decimal units.
fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.0} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// A quarter of the machine's memory, at most 4 GiB.
fn default_memory_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    total.map_or(1 << 30, |kb| (kb * 1024 / 4).clamp(64 << 20, 4 << 30))
}

/// Set by the first SIGINT or SIGTERM, so that the work stops after what is under way; the second ends the program.
fn stop_on_signals() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // Order matters: the default action is taken only if the flag was set by a signal before this one. Where a
        // handler cannot be set, signals do what they always do.
        let _ = signal_hook::flag::register_conditional_default(signal, stop.clone());
        let _ = signal_hook::flag::register(signal, stop.clone());
    }
    stop
}

/// The share of this task of a job array, if this is one.
fn worker_of_environment() -> Result<Option<stream::Worker>, Failure> {
    type Variable = Result<String, std::env::VarError>;
    let number = |variable: Variable| -> Result<Option<u32>, Failure> {
        let Ok(text) = variable else { return Ok(None) };
        let bad = || Failure::usage(format!("`{text}` is no task number"), "give --worker I/N");
        text.parse().map(Some).map_err(|_| bad())
    };
    let (id, of) = (std::env::var("SLURM_ARRAY_TASK_ID"), std::env::var("SLURM_ARRAY_TASK_COUNT"));
    if let (Some(id), Some(of)) = (number(id)?, number(of)?) {
        let first = number(std::env::var("SLURM_ARRAY_TASK_MIN"))?.unwrap_or(1);
        let index = id.wrapping_sub(first).wrapping_add(1);
        if !(1..=of).contains(&index) {
            let message = format!("task {id} is not one of {of} from {first} on");
            return Err(Failure::usage(message, "number array tasks without gaps, or give --worker I/N"));
        }
        return Ok(Some(stream::Worker { index, of }));
    }
    let (index, of) = (std::env::var("JOB_COMPLETION_INDEX"), std::env::var("JOB_COMPLETIONS"));
    if let (Some(index), Some(of)) = (number(index)?, number(of)?) {
        let worker = stream::Worker { index: index.saturating_add(1), of };
        if worker.index <= of {
            return Ok(Some(worker));
        }
    }
    Ok(None)
}

/// Largest resident size of this process so far, in bytes; `None` where the system does not tell.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
