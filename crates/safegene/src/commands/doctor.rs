//! `safegene doctor`: what there is to compute with, and whether it computes what it should.

use crate::args::Doctor;
use crate::device::{Wanted, options};
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use ::bench::Machine;
use kernels::selftest::{self, Outcome};
use kernels::{CpuEngine, CudaDevice, CudaEngine, CudaOptions, Engine, NoCuda};
use serde_json::{Value, json};

pub(super) fn run(job: &Doctor, wanted: Wanted, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let machine = Machine::new();
    say(job, ui, &format!("cpu      {}, {} cores, {}", machine.cpu, machine.cores, machine.vectors));
    let (mut engines, mut failed): (Vec<Value>, Vec<String>) = (Vec::new(), Vec::new());
    if !matches!(wanted, Wanted::Cuda(_)) {
        examine(&CpuEngine::new(), json!({}), job, ui, &mut engines, &mut failed);
    }
    let found = match wanted {
        Wanted::Cpu => Ok(Vec::new()),
        _ => CudaDevice::all(),
    };
    let embedded = kernels::embedded_images();
    let images = if embedded.is_empty() { "none".to_owned() } else { embedded.join(", ") };
    let mut absent = None;
    match found {
        Ok(devices) => {
            let asked = |device: &CudaDevice| match wanted {
                Wanted::Cuda(ordinal) => device.ordinal == ordinal,
                _ => true,
            };
            if wanted != Wanted::Cpu {
                say(job, ui, &format!("kernels  embedded: {images}"));
            }
            for device in devices.iter().filter(|device| asked(device)) {
                let facts = json!({"name": device.name, "capability": [device.capability.0, device.capability.1],
                    "memory_bytes": device.memory_bytes, "multiprocessors": device.multiprocessors,
                    "driver": device.driver});
                say(
                    job,
                    ui,
                    &format!(
                        "cuda:{}   {device}, {} GB, driver for CUDA {}.{}",
                        device.ordinal,
                        device.memory_bytes / 1_000_000_000,
                        device.driver / 1000,
                        device.driver % 1000 / 10
                    ),
                );
                let options = CudaOptions { poison: true, ..options(device.ordinal, memory_bytes) };
                match CudaEngine::open(&options) {
                    Ok(engine) => {
                        say(job, ui, &format!("kernels  {}", engine.kernels()));
                        let mut facts = facts;
                        facts["kernels"] = engine.kernels().into();
                        examine(&engine, facts, job, ui, &mut engines, &mut failed);
                    }
                    Err(error) => {
                        failed.push(format!("cuda:{}: {error}", device.ordinal));
                        engines.push(json!({"engine": format!("cuda:{}", device.ordinal), "device": facts,
                            "error": error.to_string()}));
                    }
                }
            }
            if let Wanted::Cuda(ordinal) = wanted
                && !devices.iter().any(asked)
            {
                return Err(NoCuda::NoSuchDevice { device: ordinal, count: devices.len() }.into());
            }
        }
        Err(error) if matches!(wanted, Wanted::Cuda(_)) => return Err(error.into()),
        Err(error @ (NoCuda::NoDriver | NoCuda::NoDevice)) => absent = Some(error.to_string()),
        Err(error) => failed.push(error.to_string()),
    }
    if let Some(why) = &absent {
        say(job, ui, &format!("cuda     {why}"));
    }
    if job.json {
        let facts = json!({"type": "doctor", "schema": 1, "machine": machine, "embedded_kernels": embedded,
            "no_cuda": absent, "engines": engines, "failed": failed});
        ui.data(&facts.to_string());
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure {
        code: Code::No,
        message: format!("{} checks failed", failed.len()),
        causes: failed.into_iter().take(20).collect(),
        hint: Some(
            "what fails here gives wrong genes: use `--device cpu`, and report it with `doctor --json`"
                .into(),
        ),
    })
}

/// A line for people.
fn say(job: &Doctor, ui: &Ui, line: &str) {
    if !job.json {
        ui.data(line);
    }
}

/// Every operation of an engine, as a table.
fn examine<E: Engine>(
    engine: &E,
    facts: Value,
    job: &Doctor,
    ui: &Ui,
    engines: &mut Vec<Value>,
    failed: &mut Vec<String>,
) {
    let name = engine.name();
    let mut outcomes: Vec<Outcome> = Vec::new();
    selftest::run(engine, &mut |outcome| outcomes.push(outcome));
    say(job, ui, &name);
    let mut ops: Vec<&'static str> = Vec::new();
    for outcome in &outcomes {
        if !ops.contains(&outcome.op) {
            ops.push(outcome.op);
        }
    }
    for op in ops {
        let own: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.op == op).collect();
        let wrong: Vec<&&Outcome> = own.iter().filter(|outcome| outcome.wrong.is_some()).collect();
        let how = if own.iter().all(|outcome| outcome.exact) { "to the bit" } else { "within bounds" };
        let verdict = match wrong.len() {
            0 => format!("as the reference, {how}"),
            n => format!("WRONG in {n}"),
        };
        say(job, ui, &format!("  {op:<13}{:>3} cases   {verdict}", own.len()));
        for outcome in wrong {
            let why = outcome.wrong.as_deref().unwrap_or_default();
            failed.push(format!("{name}: {op} of {}: {why}", outcome.case));
        }
    }
    let cases: Vec<Value> = outcomes
        .iter()
        .map(|o| json!({"op": o.op, "case": o.case, "exact": o.exact, "wrong": o.wrong}))
        .collect();
    engines.push(json!({"engine": name, "device": facts, "cases": cases}));
}
