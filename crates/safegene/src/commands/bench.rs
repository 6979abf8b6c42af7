//! `safegene bench`: throughput on synthetic checkpoints, beside what the machine can do at best in the same run.

use crate::args::{Bench, BenchDevice, BenchRun, Kind};
use crate::commands::{bytes, extract::Streaming};
use crate::device::{Device, on_device};
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use ::bench::{Ceilings, Machine, Model, Synth};
use checkpoint::Checkpoint;
use gene::Gene;
use kernels::{CudaEngine, CudaRate, Engine, Shape};
use std::path::{Path, PathBuf};
use std::time::Instant;

impl From<::bench::BenchError> for Failure {
    fn from(e: ::bench::BenchError) -> Self {
        match e {
            ::bench::BenchError::Checkpoint(e) => e.into(),
            e => Failure { code: Code::Temporary, message: e.to_string(), causes: Vec::new(), hint: None },
        }
    }
}

pub(super) fn run(job: &Bench, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    match job {
        Bench::Synth(job) => {
            let start = Instant::now();
            let written =
                ::bench::synthesize(&synth(&job.model, job.layers, job.kind, job.headers_only)?, &job.out)?;
            let what = if job.headers_only { "described" } else { "written" };
            ui.say(&format!("{} {what} in {:.1} s", bytes(written), start.elapsed().as_secs_f64()));
            Ok(())
        }
        Bench::Read(job) => {
            let pair = Pair::of(job, ui)?;
            let files = pair.files()?;
            let ceilings = Ceilings::measure(&files, job.cold)?;
            let (ours_gb_s, direct) = read_units(&pair, job, &files)?;
            let facts = serde_json::json!({"type": "bench", "schema": 1, "bench": "read", "model": job.model,
                "cold": job.cold, "machine": Machine::new(), "ceilings": ceilings, "reader_gb_s": ours_gb_s,
                "past_the_cache": direct});
            let way = if direct { "past the page cache" } else { "through the page cache" };
            report(job, &facts, ui, &[format!("reader    {ours_gb_s:.2} GB/s, {way}")]);
            Ok(())
        }
        Bench::Extract(job) => extract(job, device, memory_bytes, ui),
        Bench::Fuse(job) => fuse(job, device, memory_bytes, ui),
        Bench::Device(job) => rates(job, device, ui),
    }
}

fn synth(model: &str, layers: Option<u64>, kind: Kind, headers_only: bool) -> Result<Synth, Failure> {
    let model = Model::named(model).ok_or_else(|| {
        Failure::usage(
            format!("no model is called `{model}`"),
            format!("one of: {}", Model::NAMES.join(", ")),
        )
    })?;
    let model = Model { layers: layers.unwrap_or(model.layers), ..model };
    let kind = match kind {
        Kind::Bf16 => ::bench::Kind::Bf16,
        Kind::Fp8 => ::bench::Kind::Fp8,
    };
    Ok(Synth { model, kind, seed: 1, shard_bytes: 5_000_000_000, headers_only })
}

/// A synthetic pair in a work folder, made if it is not there.
struct Pair {
    dir: PathBuf,
}

impl Pair {
    fn of(job: &BenchRun, ui: &Ui) -> Result<Pair, Failure> {
        let kind = if job.kind == Kind::Fp8 { "-fp8" } else { "" };
        let layers = job.layers.map_or(String::new(), |layers| format!("-{layers}"));
        let dir = job.work.join(format!("{}{layers}{kind}", job.model));
        for side in ["aligned", "degraded"] {
            if !dir.join(side).join("config.json").exists() {
                ui.say(&format!("writing a pair of {} to `{}`", job.model, dir.display()));
                // A side that is there already was written by the same call and stays out of the way.
                let _ = std::fs::remove_dir_all(&dir);
                ::bench::synthesize(&synth(&job.model, job.layers, job.kind, false)?, &dir)?;
            }
        }
        Ok(Pair { dir })
    }

    fn side(&self, name: &str) -> Result<Checkpoint, Failure> {
        Ok(Checkpoint::open(&self.dir.join(name), None)?)
    }

    fn files(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut files = self.side("aligned")?.shards().files().to_vec();
        files.extend(self.side("degraded")?.shards().files().iter().cloned());
        Ok(files)
    }
}

/// Gigabytes a second that the stream's reader takes from both sides, tensor by tensor, and whether past the cache.
fn read_units(pair: &Pair, job: &BenchRun, files: &[PathBuf]) -> Result<(f64, bool), Failure> {
    let (mut rates, mut direct) = (Vec::new(), false);
    for _ in 0..job.rounds {
        if job.cold {
            ::bench::forget(files)?;
        }
        let sides = [pair.side("aligned")?, pair.side("degraded")?];
        let start = Instant::now();
        let read = |side: &Checkpoint| -> Result<u64, Failure> {
            let shards = side.shards();
            let mut buffer = Vec::new();
            let mut total = 0;
            for info in shards.files().iter().flat_map(|file| shards.in_file(file)) {
                buffer.resize(info.bytes as usize, 0u8);
                shards.read_at(info, 0, &mut buffer)?;
                total += info.bytes;
            }
            Ok(total)
        };
        let (a, d) = rayon::join(|| read(&sides[0]), || read(&sides[1]));
        rates.push((a? + d?) as f64 / start.elapsed().as_secs_f64() / 1e9);
        direct |= sides.iter().any(|side| side.shards().is_direct());
    }
    Ok((median(&mut rates), direct))
}

fn extract(job: &BenchRun, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let pair = Pair::of(job, ui)?;
    let ranks = stream::Ranks::Fixed(job.rank as usize);
    let operations = stream::plan(&pair.side("aligned")?, &pair.side("degraded")?, ranks)?.operations;
    let out = pair.dir.join("gene");
    let files = pair.files()?;
    let mut walls = Vec::new();
    let mut cached = 1.0f64;
    let mut last = None;
    for _ in 0..job.rounds {
        if job.cold {
            ::bench::forget(&files)?;
        }
        cached = cached.min(::bench::cached_share(&files));
        let start = Instant::now();
        let work = stream::Extract {
            force: true,
            memory_bytes,
            ..stream::Extract::new(pair.side("aligned")?, pair.side("degraded")?, ranks, &out)
        };
        let streaming = Streaming::new(ui);
        let report = on_device!(device, |engine| stream::extract(engine, &work, &streaming));
        streaming.finish();
        last = Some(report?);
        walls.push(start.elapsed().as_secs_f64());
    }
    let Some(found) = last else { return Ok(()) };
    // Before the limits are measured, which takes memory of its own.
    let rss = ::bench::peak_rss_bytes();
    let ceilings = Ceilings::measure(&files, job.cold)?;
    let wall_s = median(&mut walls);
    let input_gb = found.input_bytes as f64 / 1e9;
    let rate = input_gb / wall_s;
    let mut limits = Vec::new();
    match device {
        Device::Cpu(_) => {
            limits.push(("read", ceilings.read_gb_s, input_gb / ceilings.read_gb_s));
            limits.push(("gemm", ceilings.gemm_gf_s, operations / 1e9 / ceilings.gemm_gf_s));
        }
        Device::Cuda(engine) => {
            if let Some(read) = ::bench::read_for(engine, &files, engine.demand().readers)? {
                limits.push(("read into pinned memory", read, input_gb / read));
            }
            let sends = |rate: &CudaRate| rate.what == "host to device, pinned";
            let best = best_rates(engine, Shape { rows: 4096, cols: 4096 })?;
            if let Some(send) = best.iter().find(|rate| sends(rate)) {
                limits.push(("host to device", send.gb_s(), input_gb / send.gb_s()));
            }
            // By our kernels, or by cuBLAS where it is.
            let products = best.iter().filter(|rate| rate.what.starts_with("D Z"));
            let gf_s = products.map(CudaRate::gf_s).fold(0.0, f64::max);
            limits.push(("gemm", gf_s, operations / 1e9 / gf_s));
        }
    }
    let (binding, _, bound_s) =
        limits.iter().copied().max_by(|a, b| a.2.total_cmp(&b.2)).unwrap_or(("nothing", 0.0, 0.0));
    let meters = match device {
        Device::Cpu(_) => None,
        Device::Cuda(engine) => Some(meters(engine)),
    };
    let limits: Vec<_> = limits
        .iter()
        .map(|(what, rate, s)| serde_json::json!({"limit": what, "rate": rate, "seconds": s}))
        .collect();
    let facts = serde_json::json!({
        "type": "bench", "schema": 1, "bench": "extract", "engine": device.name(), "model": job.model,
        "layers": job.layers, "kind": format!("{:?}", job.kind).to_lowercase(), "rank": job.rank,
        "cold": job.cold, "cached_share": cached, "machine": Machine::new(), "ceilings": ceilings,
        "wall_s": wall_s, "walls_s": walls,
        "input_bytes": found.input_bytes, "input_gb_s": rate, "operations": operations,
        "gf_s": operations / wall_s / 1e9, "binding": binding, "share_of_binding": bound_s / wall_s,
        "limits": limits, "device": meters, "stages": found.stages,
        "captured": found.captured, "captured_upper_bound": found.captured_upper_bound,
        "noise_floor": found.noise_floor, "peak_rss_bytes": rss, "memory_budget_bytes": memory_bytes,
    });
    let lines = [
        format!(
            "extract   {} in {wall_s:.2} s: {rate:.2} GB/s, {:.0} GF/s",
            bytes(found.input_bytes),
            operations / wall_s / 1e9
        ),
        format!("binding   {binding}: {:.0} % of what it allows", 100.0 * bound_s / wall_s),
        stages(&found.stages),
        format!(
            "accuracy  captured {:.5}, at most {:.5}, rounding {:.5}",
            found.captured, found.captured_upper_bound, found.noise_floor
        ),
        format!("cache     at least {:.0} % of the input before each run", 100.0 * cached),
        format!("memory    {} at most, of a budget of {}", bytes(rss.unwrap_or(0)), bytes(memory_bytes)),
    ];
    report(job, &facts, ui, &lines);
    Ok(())
}

/// What a device does at best.
fn best_rates(engine: &CudaEngine, shape: Shape) -> Result<Vec<CudaRate>, Failure> {
    let mut found = Vec::new();
    engine.rates(shape, &mut |rate| found.push(rate)).map_err(device_failed)?;
    Ok(found)
}

fn device_failed(error: kernels::KernelError) -> Failure {
    kernels::NoCuda::Driver(error).into()
}

/// What an engine has done so far.
fn meters(engine: &CudaEngine) -> serde_json::Value {
    let m = engine.meters();
    serde_json::json!({"programs": m.programs, "batches": m.batches, "launches": m.launches,
        "uploaded_pinned_bytes": m.uploaded_pinned_bytes, "uploaded_staged_bytes": m.uploaded_staged_bytes,
        "downloaded_bytes": m.downloaded_bytes, "waited_s": m.waited_s, "staged_s": m.staged_s,
        "device_bytes": m.device_bytes, "pinned_bytes": m.pinned_bytes,
        "pairs_in_panels": engine.pairs_in_panels(), "kernels": engine.kernels()})
}

fn rates(job: &BenchDevice, device: &Device, ui: &Ui) -> Result<(), Failure> {
    let Device::Cuda(engine) = device else {
        return Err(Failure::usage(
            "there is no CUDA device",
            "`safegene bench read` measures the CPU's limits",
        ));
    };
    let (rows, cols) = job.shape;
    let mut found = Vec::new();
    let mut show = |rate: CudaRate| {
        if !job.json {
            let (gb_s, tf_s) = (rate.gb_s(), rate.gf_s() / 1e3);
            let operations = if tf_s > 0.0 { format!("{tf_s:>8.2} TF/s") } else { String::new() };
            let CudaRate { what, shape, seconds, .. } = &rate;
            ui.data(&format!("{what:<24}{shape:<28}{:>9.3} ms{gb_s:>9.1} GB/s{operations}", seconds * 1e3));
        }
        found.push(serde_json::json!({"what": rate.what, "shape": rate.shape, "seconds": rate.seconds,
            "gb_s": rate.gb_s(), "gf_s": rate.gf_s()}));
    };
    engine.rates(Shape { rows, cols }, &mut show).map_err(device_failed)?;
    if job.json {
        let facts = serde_json::json!({"type": "bench", "schema": 1, "bench": "device", "engine": device.name(),
            "machine": Machine::new(), "rates": found, "device": meters(engine)});
        ui.data(&facts.to_string());
    }
    Ok(())
}

fn fuse(job: &BenchRun, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let pair = Pair::of(job, ui)?;
    let gene_dir = pair.dir.join("gene");
    let ranks = stream::Ranks::Fixed(job.rank as usize);
    let work = stream::Extract {
        force: true,
        memory_bytes,
        ..stream::Extract::new(pair.side("aligned")?, pair.side("degraded")?, ranks, &gene_dir)
    };
    on_device!(device, |engine| stream::extract(engine, &work, &stream::NoProgress))?;
    let target = pair.side("degraded")?;
    let total: u64 = target.tensors().iter().map(|info| info.bytes).sum();
    let (mut walls, mut copies) = (Vec::new(), Vec::new());
    let mut last = None;
    for _ in 0..job.rounds {
        // Old outputs are not this round's work, and what was written before is not either.
        let copied = pair.dir.join("copy");
        let _ = (std::fs::remove_dir_all(pair.dir.join("fused")), std::fs::remove_dir_all(&copied));
        ::bench::flush_all();
        copies.push(copy(&target, &copied)?);
        let _ = std::fs::remove_dir_all(&copied);
        ::bench::flush_all();
        let start = Instant::now();
        let gene = Gene::open(&gene_dir)?;
        let coefficients = gene.layers().into_iter().map(|layer| (layer, 1.0)).collect();
        let work = stream::Fuse {
            force: true,
            memory_bytes,
            dequantize: job.kind == Kind::Fp8,
            ..stream::Fuse::new(gene, coefficients, pair.side("degraded")?, &pair.dir.join("fused"))
        };
        last = Some(on_device!(device, |engine| stream::fuse(engine, &work, &stream::NoProgress))?);
        walls.push(start.elapsed().as_secs_f64());
    }
    let Some(found) = last else { return Ok(()) };
    let (wall_s, copy_s) = (median(&mut walls), median(&mut copies));
    let facts = serde_json::json!({"type": "bench", "schema": 1, "bench": "fuse", "engine": device.name(), "model": job.model, "rank": job.rank,
        "machine": Machine::new(), "wall_s": wall_s, "walls_s": walls, "copy_s": copy_s, "copies_s": copies,
        "share_of_copy": copy_s / wall_s, "output_bytes": total, "output_gb_s": total as f64 / wall_s / 1e9,
        "stages": found.stages, "elements_changed": found.elements_changed,
        "realised_share": found.realised_sumsq / found.intended_sumsq, "peak_rss_bytes": ::bench::peak_rss_bytes()});
    let lines = [
        format!(
            "fuse      {} in {wall_s:.2} s: {:.2} GB/s written",
            bytes(total),
            total as f64 / wall_s / 1e9
        ),
        format!(
            "binding   a plain copy, flushed: {copy_s:.2} s; {:.0} % of its rate",
            100.0 * copy_s / wall_s
        ),
        stages(&found.stages),
    ];
    report(job, &facts, ui, &lines);
    Ok(())
}

/// Copies the weight files as they are and flushes them; returns the seconds.
fn copy(target: &Checkpoint, to: &Path) -> Result<f64, Failure> {
    let io = |source| ::bench::BenchError::Io { path: to.to_path_buf(), source };
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).map_err(io)?;
    let start = Instant::now();
    for file in target.shards().files() {
        let path = to.join(file.file_name().unwrap_or_default());
        std::fs::copy(file, &path).map_err(io)?;
        std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(io)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn stages(s: &stream::Stages) -> String {
    format!(
        "stages    read {:.2} s (waiting for memory {:.2}), compute {:.2} s, keep {:.2} s (waiting for results {:.2})",
        s.read_s, s.read_waiting_s, s.compute_s, s.keep_s, s.keep_waiting_s
    )
}

fn report(job: &BenchRun, facts: &serde_json::Value, ui: &Ui, lines: &[String]) {
    if job.json {
        ui.data(&facts.to_string());
        return;
    }
    let machine = Machine::new();
    ui.data(&format!("machine   {}, {} cores, {}", machine.cpu, machine.cores, machine.vectors));
    if let Ok(limits) =
        serde_json::from_value::<std::collections::BTreeMap<String, f64>>(facts["ceilings"].clone())
    {
        ui.data(&format!(
            "limits    read {:.1} GB/s, copy {:.1} GB/s, GEMM {:.0} GF/s",
            limits["read_gb_s"], limits["copy_gb_s"], limits["gemm_gf_s"]
        ));
    }
    for line in lines {
        ui.data(line);
    }
}
