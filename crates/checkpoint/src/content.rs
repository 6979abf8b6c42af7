//! The content hash of a model: the same for the same tensors, however they are spread over files.
//!
//! `blake3:` and the hex blake3 of the sorted lines `tensor dtype shape xxh3_128(bytes)`, each ended by a line break, the
//! shape as `[2,3]` and the inner hash as 32 hex digits. It recognises files; it does not defend against a forger.
//!
//! A line needs no more than a digest, so a caller that reads every byte anyway can make the lines as it goes.
//!
//! Not here: caching, which is the caller's.

use std::collections::BTreeMap;
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

/// The line of one tensor, `digest` being the xxh3_128 of its bytes.
pub fn content_line(info: &TensorInfo, digest: u128) -> String {
    let mut line = format!("{} {} [", info.name, info.dtype);
    for (n, side) in info.shape.iter().enumerate() {
        let comma = if n == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(line, "{comma}{side}");
    }
    let _ = write!(line, "] {digest:032x}");
    line
}

/// One line per tensor of a set; bytes are read only where no digest is known.
pub(crate) fn content_lines(shards: &ShardSet, known: &BTreeMap<String, u128>) -> Result<Vec<String>> {
    shards
        .tensors()
        .par_iter()
        .map(|info| {
            let digest = known.get(&info.name).copied().map_or_else(|| digest(shards, info), Ok)?;
            Ok(content_line(info, digest))
        })
        .collect()
}

fn digest(shards: &ShardSet, info: &TensorInfo) -> Result<u128> {
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
    Ok(hash.digest128())
}
