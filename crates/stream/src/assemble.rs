//! What several workers left beside an output, put together.
//!
//! The journals say what the work is, so nothing but the output's name is needed. All tensors have to be there; an output
//! that was made before is left as it is.

use std::path::Path;
use std::sync::Arc;

use checkpoint::{Checkpoint, PartialFolder};
use kernels::Engine;
use serde_json::{Map, Value};

use crate::extract::{Input, Ranks, Work};
use crate::fuse::{self, FuseReport};
use crate::make::make_gene;
use crate::pairing::pairs;
use crate::parts::{self, Placed, Segments, Worker};
use crate::{Extract, ExtractReport, Result, StreamError};

/// A record of which only the work around it matters.
#[derive(serde::Deserialize)]
struct Any {}

impl Placed for Any {
    fn segments(&self) -> Segments {
        Vec::new()
    }
}

/// What was put together.
#[derive(Debug)]
pub enum Assembled {
    /// A gene.
    Gene(ExtractReport),
    /// A merged model.
    Model(FuseReport),
}

/// Makes the output at `out` from the workers' parts.
pub fn assemble<E: Engine>(engine: &E, out: &Path, memory_bytes: u64, force: bool) -> Result<Assembled> {
    let nothing = || StreamError::NoWork { out: out.to_path_buf() };
    let folder = PartialFolder::find_work(out)?.ok_or_else(nothing)?;
    let (found, _) = parts::read_all::<Value, Any>(&folder)?.ok_or_else(nothing)?;
    if let Ok(work) = serde_json::from_value::<fuse::Work>(found.clone()) {
        let changed = || StreamError::OtherWork { journal: folder.clone() };
        let job = work.job(out, memory_bytes, force)?.ok_or_else(changed)?;
        return fuse::assemble(&job).map(Assembled::Model);
    }
    let work: Work = serde_json::from_value(found).map_err(|_| nothing())?;
    let open = |input: &Input| -> Result<Arc<Checkpoint>> {
        let base = (input.base != input.dir).then_some(input.base.as_path());
        Ok(Arc::new(Checkpoint::open(&input.dir, base)?))
    };
    let (aligned, degraded) = (open(&work.aligned)?, open(&work.degraded)?);
    let job = Extract {
        aligned,
        degraded,
        ranks: ranks(&work.options).ok_or_else(nothing)?,
        out: out.to_path_buf(),
        force,
        seed: work.options.get("seed").and_then(Value::as_u64).unwrap_or(0),
        leave_out: Vec::new(),
        memory_bytes,
        worker: Worker::ALL,
        stop: Arc::default(),
    };
    let now = Work { aligned: Input::of(&job.aligned)?, degraded: Input::of(&job.degraded)?, ..work.clone() };
    if now != work {
        return Err(StreamError::OtherWork { journal: folder });
    }
    make_gene(engine, &job, &work, &pairs(&job.aligned, &job.degraded)?).map(Assembled::Gene)
}

/// The ranks that a gene's options say.
pub(crate) fn ranks(options: &Map<String, Value>) -> Option<Ranks> {
    let number = |key: &str| options.get(key).and_then(Value::as_u64);
    let max = number("rank_max").unwrap_or(0) as usize;
    if let Some(bytes) = number("budget_bytes") {
        return Some(Ranks::Budget { bytes, max });
    }
    if let Some(share) = options.get("max_residual").and_then(Value::as_f64) {
        return Some(Ranks::Residual { share, max });
    }
    match options.get("rank")? {
        Value::String(_) => Some(Ranks::Auto { max }),
        rank => rank.as_u64().map(|rank| Ranks::Fixed(rank as usize)),
    }
}
