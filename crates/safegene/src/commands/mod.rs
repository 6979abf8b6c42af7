//! One file a subcommand: validated arguments in, work done, report out.

mod calibrate;
mod demo;
mod evaluate;
mod extract;
mod fuse;
mod inspect;
mod lab;

use crate::args::{Args, Command, Lab};
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use std::path::Path;
use transformer::Openings;

/// Runs the chosen command.
pub(crate) fn run(args: Args, ui: &Ui) -> Result<(), Failure> {
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    // Fails only if the pool was built before, which nothing does.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match args.command {
        Command::Extract(job) => extract::run(&job, ui),
        Command::Inspect(job) => inspect::run(&job, ui),
        Command::Calibrate(job) => calibrate::run(&job, ui),
        Command::Fuse(job) => fuse::run(&job, ui),
        Command::Evaluate(job) => evaluate::run(&job, ui),
        Command::Lab(Lab::Build(job)) => lab::run(&job, threads, ui),
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
