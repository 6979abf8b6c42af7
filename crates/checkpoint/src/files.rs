//! Opening a file of a folder that somebody else filled.
//!
//! A link is followed when its target lies inside the folder, or when the folder is a snapshot of a Hub cache and the
//! target is one of that cache's `blobs/`. Anything else that leads out, and anything that is no regular file, is
//! refused before it is opened (a pipe would block).
//!
//! Not here: what the bytes mean.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::error::{CheckpointError, Result};

/// Longest JSON file that is read whole (configs, indices).
pub const JSON_BYTES_MAX: u64 = 100_000_000;

/// Reads a JSON file of a folder, under the rules for links and lengths; `None` if there is no such file.
pub fn read_json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    let path = dir.join(name);
    let Some(bytes) = read_small(dir, name, JSON_BYTES_MAX)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| CheckpointError::json(&path, &error))
}

/// Reads a file of at most `limit_bytes`; `None` if there is no such file.
pub(crate) fn read_small(dir: &Path, name: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    let Some(file) = open_inside(dir, Path::new(name))? else { return Ok(None) };
    let bytes = file.metadata().map_err(CheckpointError::io("read", &path))?.len();
    if bytes > limit_bytes {
        return Err(CheckpointError::TooLarge { file: path, bytes, limit_bytes });
    }
    let mut content = Vec::with_capacity(bytes as usize);
    file.take(limit_bytes).read_to_end(&mut content).map_err(CheckpointError::io("read", &path))?;
    Ok(Some(content))
}

/// Opens `dir/name` for reading; `None` if there is no such file (a link to nothing counts as no file).
pub fn open_inside(dir: &Path, name: &Path) -> Result<Option<File>> {
    let path = dir.join(name);
    let Some(target) = resolve_inside(dir, &path)? else { return Ok(None) };
    let kind = fs::metadata(&target).map_err(CheckpointError::io("read", &path))?;
    if !kind.is_file() {
        return Err(CheckpointError::NotAFile { file: path });
    }
    File::open(&target).map(Some).map_err(CheckpointError::io("read", &path))
}

/// The real place of `path`, provided that it is one that `dir` may lead to.
fn resolve_inside(dir: &Path, path: &Path) -> Result<Option<PathBuf>> {
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CheckpointError::io("read", path)(error)),
    };
    let home = fs::canonicalize(dir).map_err(CheckpointError::io("read", dir))?;
    if target.starts_with(&home) || hub_blobs(&home).is_some_and(|blobs| target.parent() == Some(&blobs)) {
        return Ok(Some(target));
    }
    Err(CheckpointError::LinkOut { file: path.to_path_buf(), target })
}

/// `…/models--a--b/blobs` of a folder `…/models--a--b/snapshots/<revision>[/…]`.
fn hub_blobs(home: &Path) -> Option<PathBuf> {
    let snapshots =
        home.ancestors().skip(1).find(|folder| folder.file_name().is_some_and(|name| name == "snapshots"))?;
    Some(snapshots.parent()?.join("blobs"))
}

/// Names of the top level, sorted; names that are not UTF-8 are left out.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::io("read", dir))? {
        let entry = entry.map_err(CheckpointError::io("read", dir))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// Whether a file name's ending is one of pickled weights or training state.
pub(crate) fn is_pickle(name: &str) -> bool {
    has_ending(name, &["bin", "pt", "pth", "ckpt", "pkl", "pickle"])
}

/// Whether the name ends in a dot and one of `endings`, in any case of letters.
pub(crate) fn has_ending(name: &str, endings: &[&str]) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(_, ending)| endings.iter().any(|&known| ending.eq_ignore_ascii_case(known)))
}
