//! The content hash of a model: the same for the same tensors, however they are spread over files.
//!
//! `blake3:` and the hex blake3 of the sorted lines `tensor dtype shape xxh3_128(bytes)`, each ended by a line break, the
//! shape as `[2,3]` and the inner hash as 32 hex digits. It recognises files; it does not defend against a forger.
//!
//! Not here: caching, which is the caller's.

use std::fmt::Write;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::error::Result;
use crate::shards::{ShardSet, TensorInfo};

const CHUNK_BYTES: usize = 8 << 20;

/// The content hash of these lines, in any order.
pub fn content_of(mut lines: Vec<String>) -> String {
    lines.sort();
    let mut hash = blake3::Hasher::new();
    for line in &lines {
        hash.update(line.as_bytes());
        hash.update(b"\n");
    }
    format!("blake3:{}", hash.finalize().to_hex())
}

/// One line per tensor of a set.
pub(crate) fn content_lines(shards: &ShardSet) -> Result<Vec<String>> {
    shards.tensors().par_iter().map(|info| line(shards, info)).collect()
}

fn line(shards: &ShardSet, info: &TensorInfo) -> Result<String> {
    let mut hash = Xxh3::new();
    let mut chunk = vec![0u8; CHUNK_BYTES.min(info.bytes as usize)];
    let mut start = 0;
    while start < info.bytes {
        let take = (info.bytes - start).min(CHUNK_BYTES as u64);
        let part = &mut chunk[..take as usize];
        shards.read_at(info, start, part)?;
        hash.update(part);
        start += take;
    }
    let mut line = format!("{} {} [", info.name, info.dtype);
    for (n, side) in info.shape.iter().enumerate() {
        let comma = if n == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(line, "{comma}{side}");
    }
    let _ = write!(line, "] {:032x}", hash.digest128());
    Ok(line)
}
