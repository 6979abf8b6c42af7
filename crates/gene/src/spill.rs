//! Values that wait on disk until the header that lists them can be written.
//!
//! A safetensors file begins with all shapes, and the ranks may be known only at the end; so values go to one part file
//! first, in any order, and are copied to their place in the order of names. The part file goes with the folder of
//! unfinished work.
//!
//! Not here: the final files; see `write`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{FolderWriter, ShardWriter};

use crate::error::{GeneError, Result};

const CHUNK_BYTES: u64 = 8 << 20;

/// Where values lie: in the part file, or in a file that the caller wrote.
#[derive(Clone, Debug)]
pub(crate) enum Slot {
    Spilled { start: u64, bytes: u64 },
    Given(Given),
}

/// Little-endian values in a file, in pieces one after the other.
#[derive(Clone, Debug)]
pub struct Given {
    /// The file, open for reading.
    pub file: Arc<File>,
    /// Start and length of each piece, in bytes.
    pub segments: Vec<(u64, u64)>,
}

impl Given {
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// The part file, inside the partial folder.
#[derive(Debug)]
pub(crate) struct Spill {
    path: PathBuf,
    file: BufWriter<File>,
    end: u64,
}

impl Spill {
    pub(crate) fn create(folder: &FolderWriter) -> Result<Spill> {
        // A killed run may have left one; nothing in it counts.
        let path = folder.work()?.join("values.part");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(GeneError::io("create", &path))?;
        Ok(Spill { path, file: BufWriter::with_capacity(1 << 20, file), end: 0 })
    }

    pub(crate) fn keep(&mut self, bytes: &[u8]) -> Result<Slot> {
        self.file.write_all(bytes).map_err(GeneError::io("write", &self.path))?;
        let slot = Slot::Spilled { start: self.end, bytes: bytes.len() as u64 };
        self.end += bytes.len() as u64;
        Ok(slot)
    }

    pub(crate) fn copy(&mut self, slot: &Slot, name: &str, into: &mut ShardWriter) -> Result<()> {
        self.file.flush().map_err(GeneError::io("write", &self.path))?;
        let own;
        let (file, segments) = match slot {
            Slot::Spilled { start, bytes } => {
                own = [(*start, *bytes)];
                (self.file.get_ref(), &own[..])
            }
            Slot::Given(given) => (&*given.file, &given.segments[..]),
        };
        let mut chunk = Vec::new();
        for &(start, bytes) in segments {
            let mut done = 0;
            while done < bytes {
                chunk.resize((bytes - done).min(CHUNK_BYTES) as usize, 0);
                file.read_exact_at(&mut chunk, start + done).map_err(GeneError::io("read", &self.path))?;
                into.write(name, &chunk)?;
                done += chunk.len() as u64;
            }
        }
        Ok(())
    }
}

/// Little-endian `f32`.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
