//! A folder that appears whole or not at all.
//!
//! Work happens in `OUT.partial/` beside the output; [`FolderWriter::publish`] flushes files and folder to disk, renames
//! and flushes the parent. A writer that is dropped unpublished removes its partial folder. A partial folder carries a
//! locked marker: one left by a killed process is emptied and used again, one in use is refused, and a folder without the
//! marker is somebody else's and stays. With `force` an old output is replaced, but only if it looks like one.
//!
//! Safetensors files start their data at a multiple of 8, carry `format: pt` and hold exactly the bytes announced.
//!
//! Not here: deciding what goes in which file; see `layout`.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, Result, printable};
use crate::files::{has_ending, is_pickle, names, open_inside};
use crate::header::HEADER_BYTES_MAX;

/// Name, dtype and shape of a tensor to be written.
pub type TensorSpec = (String, Dtype, Vec<u64>);

/// File that marks a partial folder as ours; it is locked while a process writes there.
pub const PARTIAL_MARKER: &str = ".safegene-partial";

/// Folder inside a partial one for what is only needed until the output is complete; it is never published.
const WORK_FOLDER: &str = ".work";

/// A folder is an output of this tool, or a model, if it holds one of these.
const OUTPUT_FILES: [&str; 5] =
    ["config.json", "adapter_config.json", "gene.json", "safegene.json", PARTIAL_MARKER];

/// Files that describe another run or another layout, never copied.
const NOT_COPIED: [&str; 4] = ["safegene.json", "gene.json", "log.json", "adapter_config.json"];

/// Endings of weights in other formats, never copied.
const OTHER_WEIGHTS: [&str; 8] = ["safetensors", "h5", "msgpack", "gguf", "onnx", "ot", "npz", "npy"];

/// `{"format": "pt"}`, without which loaders refuse a file.
pub fn default_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// Writes a folder.
#[derive(Debug)]
pub struct FolderWriter {
    out: PathBuf,
    partial: PathBuf,
    force: bool,
    /// Whether unfinished work stays when the writer is dropped.
    keep: bool,
    unfinished: Arc<AtomicUsize>,
    published: bool,
    /// Keeps the lock.
    _marker: File,
}

/// A claim on the partial folder of an output, shared with other workers on the same output.
#[derive(Debug)]
pub struct PartialFolder {
    partial: PathBuf,
    _marker: File,
}

impl PartialFolder {
    /// Opens `OUT.partial`, making it if need be; what is in it stays. Refused while somebody assembles the output.
    pub fn open(out: &Path, force: bool) -> Result<PartialFolder> {
        let (partial, marker) = claim(out, force)?;
        if matches!(marker.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            return Err(CheckpointError::OutputBusy { out: out.to_path_buf() });
        }
        Ok(PartialFolder { partial, _marker: marker })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// A folder for unfinished work; it goes when the output is published.
    pub fn work(&self) -> Result<PathBuf> {
        work_folder(&self.partial)
    }

    /// Puts files that a run took out of the folder for unfinished work, but did not live to publish, back into it.
    pub fn put_back(&self, files: &[String]) -> Result<()> {
        let work = self.work()?;
        for name in files {
            let (from, to) = (self.partial.join(name), work.join(name));
            if from.exists() && !to.exists() {
                fs::rename(&from, &to).map_err(CheckpointError::io("move", &from))?;
            }
        }
        Ok(())
    }

    /// Where the unfinished work of an output is, if there is any.
    pub fn find_work(out: &Path) -> Result<Option<PathBuf>> {
        let partial = beside(out, ".partial")?;
        Ok(partial.join(PARTIAL_MARKER).exists().then_some(partial.join(WORK_FOLDER)))
    }
}

fn work_folder(partial: &Path) -> Result<PathBuf> {
    let work = partial.join(WORK_FOLDER);
    fs::create_dir_all(&work).map_err(CheckpointError::io("create", &work))?;
    Ok(work)
}

/// Makes the partial folder of an output, or takes the one of an earlier run.
fn claim(out: &Path, force: bool) -> Result<(PathBuf, File)> {
    let partial = beside(out, ".partial")?;
    check_free(out, force)?;
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
    }
    match fs::create_dir(&partial) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let is_folder = fs::symlink_metadata(&partial).is_ok_and(|kind| kind.is_dir());
            if !is_folder || !(partial.join(PARTIAL_MARKER).exists() || names(&partial)?.is_empty()) {
                return Err(CheckpointError::OutputForeign { found: partial });
            }
        }
        Err(error) => return Err(CheckpointError::io("create", &partial)(error)),
    }
    let marker_path = partial.join(PARTIAL_MARKER);
    let marker = File::create(&marker_path).map_err(CheckpointError::io("create", &marker_path))?;
    Ok((partial, marker))
}

impl FolderWriter {
    /// Starts an output. Parents that are missing are made.
    pub fn create(out: &Path, force: bool) -> Result<FolderWriter> {
        let mut writer = Self::resume(out, force)?;
        empty_but(&writer.partial, &[PARTIAL_MARKER])?;
        writer.keep = false;
        Ok(writer)
    }

    /// Removes what an earlier run left of the output's own files; unfinished work stays.
    pub fn clear(&self) -> Result<()> {
        empty_but(&self.partial, &[PARTIAL_MARKER, WORK_FOLDER])
    }

    /// Goes on with an output whose partial folder holds work: what is in it stays, also when the writer is dropped.
    pub fn resume(out: &Path, force: bool) -> Result<FolderWriter> {
        let (partial, marker) = claim(out, force)?;
        // File systems without locks are used without one.
        if matches!(marker.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(CheckpointError::OutputBusy { out: out.to_path_buf() });
        }
        Ok(FolderWriter {
            out: out.to_path_buf(),
            partial,
            force,
            keep: true,
            unfinished: Arc::new(AtomicUsize::new(0)),
            published: false,
            _marker: marker,
        })
    }

    /// Gives the output up, and what was kept for it.
    pub fn discard(mut self) {
        self.keep = false;
    }

    /// Where the folder will appear.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Where it is being made.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// A folder for unfinished work; it goes when the output is published.
    pub fn work(&self) -> Result<PathBuf> {
        work_folder(&self.partial)
    }

    /// Starts a safetensors file whose tensors will be streamed in this order. `format: pt` is added if absent.
    pub fn shard(
        &self,
        file_name: &str,
        metadata: &BTreeMap<String, String>,
        specs: &[TensorSpec],
    ) -> Result<ShardWriter> {
        let path = self.place(file_name)?;
        let header = header_bytes(metadata, specs).map_err(|problem| write_order(&path, problem))?;
        let file = File::options()
            .write(true)
            .create_new(!self.keep)
            .create(self.keep)
            .truncate(self.keep)
            .open(&path)
            .map_err(CheckpointError::io("create", &path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(CheckpointError::io("write", &path))?;
        let left =
            specs.iter().map(|(name, dtype, shape)| (name.clone(), dtype.bytes_of(shape).unwrap_or(0)));
        self.unfinished.fetch_add(1, Ordering::SeqCst);
        Ok(ShardWriter {
            path,
            file,
            left: left.rev().collect(),
            started: false,
            unfinished: self.unfinished.clone(),
        })
    }

    /// Takes a finished file out of the folder for unfinished work; it is flushed to disk.
    pub fn take(&self, name: &str) -> Result<()> {
        let (from, to) = (self.work()?.join(name), self.place(name)?);
        let file = File::open(&from).map_err(CheckpointError::io("read", &from))?;
        file.sync_all().map_err(CheckpointError::io("write", &from))?;
        fs::rename(&from, &to).map_err(CheckpointError::io("move", &from))
    }

    /// Writes a whole safetensors file of small tensors, in this order.
    pub fn write_safetensors(
        &self,
        file_name: &str,
        metadata: &BTreeMap<String, String>,
        tensors: &[(TensorSpec, Vec<u8>)],
    ) -> Result<()> {
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let mut shard = self.shard(file_name, metadata, &specs)?;
        for ((name, ..), bytes) in tensors {
            shard.write(name, bytes)?;
        }
        shard.finish()
    }

    /// Writes a small file, in place of one of that name written before.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.place(name)?;
        let mut file = File::create(&path).map_err(CheckpointError::io("create", &path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(CheckpointError::io("write", &path))
    }

    /// Copies the regular files of a model folder's top level that are neither weights nor training state nor already
    /// written here. Returns their names, sorted: a `*.py` among them is code that runs when the model is loaded.
    pub fn copy_support_files(&self, from: &Path) -> Result<Vec<String>> {
        let mut copied = Vec::new();
        for name in names(from)? {
            let source_path = from.join(&name);
            let target_path = self.partial.join(&name);
            let is_file = fs::metadata(&source_path).is_ok_and(|kind| kind.is_file());
            if !is_file || !is_support(&name) || target_path.exists() {
                continue;
            }
            let Some(mut source) = open_inside(from, Path::new(&name))? else { continue };
            // Bytes only: blobs of a Hub cache are read-only, the copy should not be.
            let mut target =
                File::create(&target_path).map_err(CheckpointError::io("create", &target_path))?;
            std::io::copy(&mut source, &mut target)
                .and_then(|_| target.sync_all())
                .map_err(CheckpointError::io("write", &target_path))?;
            copied.push(name);
        }
        Ok(copied)
    }

    /// Makes the folder appear under its name. Refused while a shard is unfinished.
    pub fn publish(mut self) -> Result<()> {
        if self.unfinished.load(Ordering::SeqCst) > 0 {
            return Err(write_order(&self.partial, "a file in it was not finished"));
        }
        sync_folder(&self.partial)?;
        check_free(&self.out, self.force)?;
        let work = self.partial.join(WORK_FOLDER);
        if work.exists() {
            fs::remove_dir_all(&work).map_err(CheckpointError::io("remove", &work))?;
        }
        let replaced = beside(&self.out, ".replaced")?;
        let had_output = self.out.symlink_metadata().is_ok();
        if had_output {
            if replaced.symlink_metadata().is_ok() {
                check_free(&replaced, true)?;
                fs::remove_dir_all(&replaced).map_err(CheckpointError::io("remove", &replaced))?;
            }
            fs::rename(&self.out, &replaced).map_err(CheckpointError::io("move", &self.out))?;
        }
        if let Err(error) = fs::rename(&self.partial, &self.out) {
            if had_output {
                // The old output goes back; if even that fails the first error is still the one to tell.
                let _ = fs::rename(&replaced, &self.out);
            }
            return Err(CheckpointError::io("create", &self.out)(error));
        }
        self.published = true;
        let marker = self.out.join(PARTIAL_MARKER);
        fs::remove_file(&marker).map_err(CheckpointError::io("remove", &marker))?;
        sync_folder(&self.out)?;
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_folder(parent.unwrap_or(Path::new(".")))?;
        if had_output {
            fs::remove_dir_all(&replaced).map_err(CheckpointError::io("remove", &replaced))?;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<PathBuf> {
        let mut parts = Path::new(name).components();
        let plain = matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(part)), None) if part == name);
        if !plain || name == PARTIAL_MARKER || name == WORK_FOLDER || name.contains('\0') {
            return Err(CheckpointError::FileName { name: name.to_owned() });
        }
        Ok(self.partial.join(name))
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.published && !self.keep {
            // Nobody is left to tell; the marker lets the next run clean up.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// A file whose tensors are written where they belong, in any order and from any thread.
#[derive(Debug)]
pub struct PlacedShard {
    path: PathBuf,
    file: File,
    like: Option<Like>,
}

/// The file that another is like.
#[derive(Debug)]
struct Like {
    file: File,
    /// Whether the other one began as its clone.
    cloned: bool,
    /// Whether the system refused to copy between the two.
    no_copy: AtomicBool,
}

impl PlacedShard {
    /// Opens a file with the header of `source`, byte for byte, so that every tensor has the same place in both. One of
    /// that header and length that is there already is gone on with; else it begins as a clone that shares the blocks
    /// of `source`, where the file system can, or as zeros.
    pub fn like(source: &Path, path: &Path) -> Result<PlacedShard> {
        let from = File::open(source).map_err(CheckpointError::io("read", source))?;
        let total_bytes = from.metadata().map_err(CheckpointError::io("read", source))?.len();
        let mut length = [0u8; 8];
        from.read_exact_at(&mut length, 0).map_err(CheckpointError::io("read", source))?;
        // The header was read and checked when the source was opened; the limit holds should it have changed since.
        let header_bytes = u64::from_le_bytes(length).min(HEADER_BYTES_MAX);
        let mut header = vec![0u8; header_bytes as usize];
        from.read_exact_at(&mut header, 8).map_err(CheckpointError::io("read", source))?;
        let header = [&length[..], &header].concat();
        let (file, known) = Self::open(path, &header, total_bytes)?;
        let mut cloned = false;
        if !known {
            cloned = rustix::fs::ioctl_ficlone(&file, &from).is_ok();
            if !cloned {
                Self::begin(&file, path, &header, total_bytes)?;
            }
        }
        Ok(PlacedShard {
            path: path.to_path_buf(),
            file,
            like: Some(Like { file: from, cloned, no_copy: AtomicBool::new(false) }),
        })
    }

    /// Opens a file with this header (of [`safetensors_header`]) and `data_bytes` behind it; one that is there already is
    /// gone on with.
    pub fn with_header(path: &Path, header: &[u8], data_bytes: u64) -> Result<PlacedShard> {
        let total_bytes = header.len() as u64 + data_bytes;
        let (file, known) = Self::open(path, header, total_bytes)?;
        if !known {
            Self::begin(&file, path, header, total_bytes)?;
        }
        Ok(PlacedShard { path: path.to_path_buf(), file, like: None })
    }

    /// The file, and whether it has this header and length already.
    fn open(path: &Path, header: &[u8], total_bytes: u64) -> Result<(File, bool)> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(CheckpointError::io("create", path))?;
        let mut found = vec![0u8; header.len()];
        let known = file.metadata().is_ok_and(|kind| kind.len() == total_bytes)
            && file.read_exact_at(&mut found, 0).is_ok()
            && found == header;
        Ok((file, known))
    }

    fn begin(file: &File, path: &Path, header: &[u8], total_bytes: u64) -> Result<()> {
        file.set_len(0)
            .and_then(|()| file.set_len(total_bytes))
            .and_then(|()| file.write_all_at(header, 0))
            .map_err(CheckpointError::io("write", path))
    }

    /// Writes bytes from this place in the file on.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(CheckpointError::io("write", &self.path))
    }

    /// The same for bytes that the file it is like has at the same place: a clone has them already, else the system is
    /// asked to copy them (and may share blocks, or copy on the server), and only if it does not are they written.
    pub fn keep_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(like) = &self.like else { return self.write_at(offset, bytes) };
        if like.cloned {
            return Ok(());
        }
        let mut done = 0u64;
        while done < bytes.len() as u64 && !like.no_copy.load(Ordering::Relaxed) {
            let (mut from, mut to) = (offset + done, offset + done);
            let left = bytes.len() - done as usize;
            match rustix::fs::copy_file_range(&like.file, Some(&mut from), &self.file, Some(&mut to), left) {
                Ok(copied @ 1..) => done += copied as u64,
                // Another file system, or one that cannot: bytes in memory do as well.
                _ => like.no_copy.store(true, Ordering::Relaxed),
            }
        }
        self.write_at(offset + done, &bytes[done as usize..])
    }

    /// Sends what was written so far to the disk.
    pub fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(CheckpointError::io("write", &self.path))
    }

    /// Fills `bytes` from this place in the file on.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(CheckpointError::io("read", &self.path))
    }

    /// Flushes the file to disk.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(CheckpointError::io("write", &self.path))
    }
}

/// Streams the tensors of one safetensors file.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    /// Tensors not yet complete and the bytes each still lacks, the next one last.
    left: Vec<(String, u64)>,
    /// Whether the next one has bytes already.
    started: bool,
    unfinished: Arc<AtomicUsize>,
}

impl ShardWriter {
    /// Appends bytes to a tensor, which has to be the next in the announced order; parts are fine.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        // An empty tensor may be written with no bytes, or not at all.
        while self.left.last().is_some_and(|(next, left)| *left == 0 && next != name) {
            self.left.pop();
        }
        let problem = match self.left.last_mut() {
            Some((next, left)) if next == name => {
                if let Some(rest) = left.checked_sub(bytes.len() as u64) {
                    *left = rest;
                    self.started = rest > 0;
                    if rest == 0 {
                        self.left.pop();
                    }
                    return self.file.write_all(bytes).map_err(CheckpointError::io("write", &self.path));
                }
                format!("tensor `{}` lacks {left} bytes, {} were given", printable(name), bytes.len())
            }
            Some((next, left)) if self.started => {
                format!(
                    "tensor `{}` still lacks {left} bytes when `{}` begins",
                    printable(next),
                    printable(name)
                )
            }
            Some((next, _)) => {
                format!("tensor `{}` is next, `{}` was given", printable(next), printable(name))
            }
            None => format!("tensor `{}` comes after the last", printable(name)),
        };
        Err(write_order(&self.path, problem))
    }

    /// Flushes the file to disk. Refused if a tensor is incomplete.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, left)) = self.left.iter().rev().find(|(_, left)| *left > 0) {
            return Err(write_order(
                &self.path,
                format!("tensor `{}` still lacks {left} bytes", printable(name)),
            ));
        }
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(CheckpointError::io("write", &self.path))?;
        self.unfinished.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A whole safetensors file in memory, its tensors in this order.
pub fn safetensors_bytes(
    metadata: &BTreeMap<String, String>,
    tensors: &[(TensorSpec, Vec<u8>)],
) -> Result<Vec<u8>> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let in_memory = Path::new("safetensors in memory");
    let mut bytes = header_bytes(metadata, &specs).map_err(|problem| write_order(in_memory, problem))?;
    for ((name, dtype, shape), data) in tensors {
        if dtype.bytes_of(shape) != Some(data.len() as u64) {
            let problem = format!("tensor `{}`: {} bytes do not make its shape", printable(name), data.len());
            return Err(write_order(in_memory, problem));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

/// The beginning of a safetensors file up to its data: length and JSON. `Err` says what is wrong with the tensors.
pub fn safetensors_header(
    metadata: &BTreeMap<String, String>,
    tensors: &[TensorSpec],
) -> Result<Vec<u8>, String> {
    header_bytes(metadata, tensors)
}

/// Length and JSON, padded with spaces so that the data starts at a multiple of 8.
fn header_bytes(metadata: &BTreeMap<String, String>, specs: &[TensorSpec]) -> Result<Vec<u8>, String> {
    let text = |value: &str| serde_json::Value::from(value).to_string();
    let mut metadata = metadata.clone();
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    let pairs: Vec<String> =
        metadata.iter().map(|(key, value)| format!("{}:{}", text(key), text(value))).collect();
    let mut json = format!("{{\"__metadata__\":{{{}}}", pairs.join(","));

    let mut seen = HashSet::with_capacity(specs.len());
    let mut start = 0u64;
    for (name, dtype, shape) in specs {
        if name == "__metadata__" || !seen.insert(name) {
            return Err(format!("tensor `{}` is announced twice or has a reserved name", printable(name)));
        }
        let end = dtype.bytes_of(shape).and_then(|bytes| start.checked_add(bytes));
        let Some(end) = end else {
            return Err(format!(
                "tensor `{}`: shape {shape:?} of {dtype} is no possible number of bytes",
                printable(name)
            ));
        };
        let sides: Vec<String> = shape.iter().map(u64::to_string).collect();
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{start},{end}]}}",
            text(name),
            sides.join(",")
        ));
        start = end;
    }
    json.push('}');
    json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(8) - json.len()));
    if json.len() as u64 > HEADER_BYTES_MAX {
        return Err(format!("header of {} bytes is over the limit of {HEADER_BYTES_MAX}", json.len()));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    Ok(bytes)
}

fn write_order(file: &Path, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::WriteOrder { file: file.to_path_buf(), problem: problem.into() }
}

fn is_support(name: &str) -> bool {
    let state = ["optimizer", "scheduler", "rng_state", "training_args", "trainer_state"];
    !(name.starts_with('.')
        || is_pickle(name)
        || has_ending(name, &OTHER_WEIGHTS)
        || name.ends_with(".index.json")
        || NOT_COPIED.contains(&name)
        || state.iter().any(|state| name.starts_with(state)))
}

/// `OUT` and a suffix, in the same parent.
fn beside(out: &Path, suffix: &str) -> Result<PathBuf> {
    let mut name: OsString =
        out.file_name().ok_or_else(|| CheckpointError::OutputName { out: out.to_path_buf() })?.to_owned();
    name.push(suffix);
    Ok(out.with_file_name(name))
}

/// Whether the output may be (re)placed.
fn check_free(out: &Path, force: bool) -> Result<()> {
    let kind = match fs::symlink_metadata(out) {
        Ok(kind) => kind,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(CheckpointError::io("create", out)(error)),
    };
    if !force {
        return Err(CheckpointError::OutputExists { out: out.to_path_buf() });
    }
    let ours = kind.is_dir() && {
        let names = names(out)?;
        let any_entry = fs::read_dir(out).map_err(CheckpointError::io("read", out))?.next().is_some();
        !any_entry || names.iter().any(|name| OUTPUT_FILES.contains(&name.as_str()))
    };
    if ours { Ok(()) } else { Err(CheckpointError::OutputForeign { found: out.to_path_buf() }) }
}

fn empty_but(folder: &Path, stays: &[&str]) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(CheckpointError::io("read", folder))? {
        let entry = entry.map_err(CheckpointError::io("read", folder))?;
        if stays.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let path = entry.path();
        let is_folder = entry.file_type().map_err(CheckpointError::io("read", &path))?.is_dir();
        let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(CheckpointError::io("remove", &path))?;
    }
    Ok(())
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(CheckpointError::io("write", folder))
}
