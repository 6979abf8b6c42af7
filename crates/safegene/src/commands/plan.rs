//! `safegene plan`: what an extraction will do, from headers alone.

use crate::args::{Plan, Profile};
use crate::commands::{bytes, extract::open};
use crate::fail::Failure;
use crate::ui::Ui;
use kernels::{CpuEngine, Dtype, Engine, Shape, Weights};
use std::collections::BTreeMap;
use std::time::Instant;
use stream::Becomes;

pub(super) fn run(job: &Plan, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    let (aligned, degraded) = (open(&job.aligned, &job.base)?, open(&job.degraded, &job.base)?);
    let plan = stream::plan(&aligned, &degraded, stream::Ranks::Fixed(job.rank as usize)).map_err(|e| {
        let (a, d) = (job.aligned.display(), job.degraded.display());
        Failure::from(e).context(format!("cannot extract from `{a}` and `{d}`"))
    })?;
    let rate = sweep_rate()?;
    let compute_s = plan.operations / rate;
    let mut counts: BTreeMap<Becomes, (u64, u64)> = BTreeMap::new();
    for tensor in &plan.tensors {
        let count = counts.entry(tensor.becomes).or_default();
        *count = (count.0 + 1, count.1 + tensor.bytes);
    }
    let differing: Vec<_> = plan.tensors.iter().filter(|tensor| tensor.differs.is_some()).collect();
    let lints = lints(job, &plan);
    if job.json {
        for tensor in &plan.tensors {
            let mut line = serde_json::to_value(tensor).unwrap_or_default();
            line["type"] = "tensor".into();
            line["schema"] = 1.into();
            ui.data(&line.to_string());
        }
        let counts: BTreeMap<String, u64> = counts
            .iter()
            .map(|(becomes, (n, _))| (serde_json::to_value(becomes).unwrap_or_default(), *n))
            .filter_map(|(name, n)| Some((name.as_str()?.to_owned(), n)))
            .collect();
        ui.data(
            &serde_json::json!({"type": "summary", "schema": 1, "tensors": plan.tensors.len(), "becomes": counts,
                "stored_tensors": plan.stored_tensors, "scale_tensors": plan.scale_tensors,
                "layout_differences": differing.len(), "input_bytes": plan.input_bytes,
                "factor_bytes_max": plan.factor_bytes_max, "rest_bytes_max": plan.rest_bytes_max,
                "operations": plan.operations, "compute_s": compute_s, "memory_bytes": memory_bytes,
                "largest_pair_bytes": plan.largest_bytes, "lints": lints, "wall_s": start.elapsed().as_secs_f64()})
            .to_string(),
        );
        return Ok(());
    }
    let [a, d] = plan.stored_tensors;
    ui.data(&format!(
        "pairs     {} tensors of {a} and {d} stored, {} of weights",
        plan.tensors.len(),
        bytes(plan.input_bytes)
    ));
    let [a, d] = plan.scale_tensors;
    if a + d > 0 {
        ui.data(&format!("scales    {a} and {d} stored tensors are scales of others"));
    }
    for (becomes, (n, of_bytes)) in &counts {
        let what = match becomes {
            Becomes::Factors => "become low-rank factors if they changed",
            Becomes::Exact => "are kept exactly if they changed",
            Becomes::Rows => "are kept by rows if they changed",
            Becomes::Buffer => "are computed buffers, left out if they changed",
        };
        ui.data(&format!("{n:>9} {what} ({})", bytes(*of_bytes)));
    }
    for tensor in differing.iter().take(10) {
        let how = tensor.differs.as_deref().unwrap_or_default();
        ui.data(&format!(
            "layout    `{}`: {}",
            checkpoint::printable(&tensor.name),
            checkpoint::printable(how)
        ));
    }
    if differing.len() > 10 {
        ui.data(&format!("layout    and {} more that are stored differently", differing.len() - 10));
    }
    ui.data(&format!(
        "gene      at most {} of factors at rank {}, and {} of the rest if all of it changed",
        bytes(plan.factor_bytes_max),
        job.rank,
        bytes(plan.rest_bytes_max)
    ));
    ui.data("disk      twice that while it is made");
    let in_place =
        if plan.largest_bytes > memory_bytes { "; the largest tensors are read row by row" } else { "" };
    ui.data(&format!("memory    {} under way{in_place}", bytes(memory_bytes)));
    ui.data(&format!(
        "time      about {compute_s:.0} s of computing at {:.0} GF/s, beside reading {} once",
        rate / 1e9,
        bytes(plan.input_bytes)
    ));
    for lint in &lints {
        ui.data(&format!("note      {lint}"));
    }
    Ok(())
}

/// Operations a second that a sweep does here, from one on a small difference.
fn sweep_rate() -> Result<f64, Failure> {
    let (engine, shape, columns) = (CpuEngine::new(), Shape { rows: 2048, cols: 1024 }, 24);
    let failed = |e: kernels::KernelError| Failure::usage(e.to_string(), "this is a mistake of the program");
    let n = shape.len().map_err(failed)?;
    let side = |add: usize| {
        let bytes: Vec<u8> =
            (0..n).flat_map(|i| (0x3c00u16 + ((i * 31 + add) % 997) as u16).to_le_bytes()).collect();
        Weights::copied(&bytes, Dtype::Bf16, shape).map_err(failed)
    };
    let pair = engine.pair(side(0)?, side(7)?).map_err(failed)?;
    let z = engine.sketch(Shape { rows: shape.cols, cols: columns }, 0, 0).map_err(failed)?;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        engine.sweep(&pair, &z, None).map_err(failed)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(4.0 * n as f64 * columns as f64 / best)
}

/// What the loader will not take.
fn lints(job: &Plan, plan: &stream::Plan) -> Vec<String> {
    const VLLM_RANKS: [u32; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
    const HUB_HEADER_BYTES: u64 = 25_000_000;
    let mut lints = Vec::new();
    let rest = plan.tensors.iter().filter(|t| matches!(t.becomes, Becomes::Exact | Becomes::Rows)).count();
    if rest > 0 {
        lints.push(format!(
            "{rest} tensors cannot be held by an adapter: if they changed, fuse merged, or with --drop-rest"
        ));
    }
    if job.profile == Profile::Vllm && !VLLM_RANKS.contains(&job.rank) {
        let next = VLLM_RANKS.iter().find(|rank| **rank > job.rank);
        lints.push(match next {
            Some(next) => format!("vLLM has no --max-lora-rank {}; it will reserve {next}", job.rank),
            None => format!("vLLM loads no adapter above rank 512, this is {}", job.rank),
        });
    }
    if matches!(job.profile, Profile::LlamaCpp | Profile::Universal) {
        lints.push("llama.cpp scales by one alpha: all modules need the same rank; `--rank auto` and budgets do not give it".into());
    }
    let experts = plan.tensors.iter().filter(|t| t.name.contains(".experts.")).count();
    if experts > 0 && job.profile != Profile::Peft {
        lints.push(format!("{experts} expert matrices are stored one by one, not as a stack"));
    }
    // Two tensors a module, some 150 bytes of header and twice the name each.
    let header: u64 = plan
        .tensors
        .iter()
        .filter(|t| t.becomes == Becomes::Factors)
        .map(|t| 2 * (t.name.len() as u64 + 120))
        .sum();
    if header > HUB_HEADER_BYTES {
        lints.push(format!("the adapter's header will have about {}, the Hub reads 25 MB", bytes(header)));
    }
    lints
}
