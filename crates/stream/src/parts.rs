//! Results that wait beside the output until all are there: one file of values and one journal for each worker.
//!
//! A journal is JSON by lines. The first says what the work is; each other is a finished tensor and where its values lie
//! in the part file beside it, and ends with the xxh3 of the line before that field. A line that is torn, and everything
//! after it, counts as not written; so does a journal that begins with other work. Values are written before their line,
//! and count if they are those that the line names, by their xxh3: after a power cut a line may be there without them.
//!
//! Not here: what a result means.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use checkpoint::CheckpointError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::{Result, StreamError};

/// Where values lie in a part file: start and length in bytes, and the xxh3 of them.
pub(crate) type Segment = (u64, u64, u64);
/// Values in pieces.
pub(crate) type Segments = Vec<Segment>;

/// One of N shares of the work, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Which one.
    pub index: u32,
    /// Of how many.
    pub of: u32,
}

impl Worker {
    /// All of the work.
    pub const ALL: Worker = Worker { index: 1, of: 1 };

    fn stem(self) -> String {
        format!("worker-{:05}-of-{:05}", self.index, self.of)
    }
}

/// A journal being written.
pub(crate) struct Log {
    values: Values,
    journal: File,
    journal_path: PathBuf,
}

/// The part file of a journal being written, for any thread.
#[derive(Clone)]
pub(crate) struct Values {
    part: Arc<File>,
    end: Arc<AtomicU64>,
    path: PathBuf,
}

impl Values {
    /// Writes values; they count once a line names them.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<Segment> {
        let start = self.end.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        self.part.write_all_at(bytes, start).map_err(write_error(&self.path))?;
        Ok((start, bytes.len() as u64, xxh3_64(bytes)))
    }
}

fn write_error(path: &Path) -> impl Fn(std::io::Error) -> StreamError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { action: "write", path: path.clone(), source }.into()
}

fn line<T: Serialize>(record: &T) -> String {
    let record = serde_json::to_string(record).unwrap_or_default();
    format!("{{\"record\":{record},\"check\":\"{:016x}\"}}\n", xxh3_64(record.as_bytes()))
}

fn parse<T: DeserializeOwned>(text: &str) -> Option<T> {
    let body = text.strip_prefix("{\"record\":")?;
    let (record, check) = body.rsplit_once(",\"check\":\"")?;
    let check = check.strip_suffix("\"}")?;
    (check == format!("{:016x}", xxh3_64(record.as_bytes()))).then(|| serde_json::from_str(record).ok())?
}

impl Log {
    /// Opens the journal of a worker in `partial`, and gives what it holds of the same work already.
    pub(crate) fn open<W, T>(partial: &Path, worker: Worker, work: &W) -> Result<(Log, Vec<T>)>
    where
        W: Serialize + DeserializeOwned + PartialEq,
        T: DeserializeOwned + Placed,
    {
        let journal_path = partial.join(format!("{}.jsonl", worker.stem()));
        let part_path = partial.join(format!("{}.part", worker.stem()));
        let found = read::<W, T>(&journal_path)?;
        let part = File::options().read(true).write(true).create(true).truncate(false).open(&part_path);
        let part = part.map_err(write_error(&part_path))?;
        let journal = File::options().read(true).append(true).create(true).open(&journal_path);
        let mut journal = journal.map_err(write_error(&journal_path))?;
        if matches!(journal.try_lock(), Err(fs::TryLockError::WouldBlock)) {
            return Err(CheckpointError::OutputBusy { out: journal_path }.into());
        }
        let (records, valid_bytes) = match found {
            Some((same, records, valid_bytes)) if same == *work => (records, valid_bytes),
            _ => (Vec::new(), 0),
        };
        let end = records
            .iter()
            .flat_map(Placed::segments)
            .map(|(start, bytes, _)| start + bytes)
            .max()
            .unwrap_or(0);
        journal.set_len(valid_bytes).map_err(write_error(&journal_path))?;
        part.set_len(end).map_err(write_error(&part_path))?;
        if valid_bytes == 0 {
            journal.write_all(line(work).as_bytes()).map_err(write_error(&journal_path))?;
        }
        let values = Values { part: Arc::new(part), end: Arc::new(AtomicU64::new(end)), path: part_path };
        Ok((Log { values, journal, journal_path }, records))
    }

    /// The part file.
    pub(crate) fn share(&self) -> Values {
        self.values.clone()
    }

    /// Writes the line of a finished tensor.
    pub(crate) fn finished<T: Serialize>(&mut self, record: &T) -> Result<()> {
        self.journal.write_all(line(record).as_bytes()).map_err(write_error(&self.journal_path))
    }

    /// Puts everything on the disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.values.part.sync_all().map_err(write_error(&self.values.path))?;
        self.journal.sync_all().map_err(write_error(&self.journal_path))
    }
}

/// A record that says where its values are.
pub(crate) trait Placed {
    fn segments(&self) -> Segments;
}

/// The work, the whole records and their length in bytes; `None` if there is no journal, or none that can be read.
fn read<W: DeserializeOwned, T: DeserializeOwned + Placed>(path: &Path) -> Result<Option<(W, Vec<T>, u64)>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(CheckpointError::Io { action: "read", path: path.to_path_buf(), source }.into());
        }
    };
    let part = File::open(path.with_extension("part")).ok();
    let mut reader = BufReader::new(file);
    let (mut work, mut records, mut valid_bytes) = (None, Vec::new(), 0u64);
    let mut text = String::new();
    loop {
        text.clear();
        // A torn line may not be text; it counts as not written.
        if !matches!(reader.read_line(&mut text), Ok(1..)) {
            break;
        }
        let Some(body) = text.strip_suffix('\n') else { break };
        if work.is_none() {
            let Some(found) = parse(body) else { break };
            work = Some(found);
        } else {
            let Some(found) = parse::<T>(body) else { break };
            if !found.segments().iter().all(|segment| holds(part.as_ref(), *segment)) {
                break;
            }
            records.push(found);
        }
        valid_bytes += text.len() as u64;
    }
    Ok(work.map(|work| (work, records, valid_bytes)))
}

/// Whether a part file has these values.
fn holds(part: Option<&File>, (start, bytes, check): Segment) -> bool {
    let Some(part) = part else { return false };
    let inside =
        part.metadata().is_ok_and(|kind| start.checked_add(bytes).is_some_and(|end| end <= kind.len()));
    let mut values = vec![0u8; if inside { bytes as usize } else { 0 }];
    inside && part.read_exact_at(&mut values, start).is_ok() && xxh3_64(&values) == check
}

/// Records, each with the part file that its values lie in.
pub(crate) type Kept<T> = Vec<(T, Arc<File>)>;

/// What all workers left in `partial`: the work, which has to be the same, and each record with its part file.
pub(crate) fn read_all<W, T>(partial: &Path) -> Result<Option<(W, Kept<T>)>>
where
    W: DeserializeOwned + PartialEq,
    T: DeserializeOwned + Placed,
{
    let entries = match fs::read_dir(partial) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(CheckpointError::Io { action: "read", path: partial.to_path_buf(), source }.into());
        }
    };
    let mut journals: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "jsonl"))
        .collect();
    journals.sort();
    let mut work: Option<W> = None;
    let mut all = Vec::new();
    for path in journals {
        let Some((found, records, _)) = read::<W, T>(&path)? else { continue };
        match &work {
            Some(work) if *work != found => return Err(StreamError::OtherWork { journal: path }),
            Some(_) => {}
            None => work = Some(found),
        }
        let part_path = path.with_extension("part");
        let part = File::open(&part_path).map_err(|source| CheckpointError::Io {
            action: "read",
            path: part_path,
            source,
        })?;
        let part = Arc::new(part);
        all.extend(records.into_iter().map(|record| (record, part.clone())));
    }
    Ok(work.map(|work| (work, all)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Record(String, Segments);

    impl Placed for Record {
        fn segments(&self) -> Segments {
            self.1.clone()
        }
    }

    fn write(dir: &Path, work: &str, names: &[&str]) -> Vec<Record> {
        let (mut log, found) = Log::open::<String, Record>(dir, Worker::ALL, &work.to_owned()).unwrap();
        for name in names {
            let at = log.share().write(name.as_bytes()).unwrap();
            log.finished(&Record((*name).to_owned(), vec![at])).unwrap();
        }
        log.sync().unwrap();
        found
    }

    #[test]
    fn log_is_found_again_by_the_same_work_only() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write(dir.path(), "w", &["one", "two"]).is_empty());
        assert_eq!(write(dir.path(), "w", &["three"]).len(), 2);
        let (work, all) = read_all::<String, Record>(dir.path()).unwrap().unwrap();
        assert_eq!((work.as_str(), all.len()), ("w", 3));
        for (Record(name, at), part) in &all {
            let mut bytes = vec![0; at[0].1 as usize];
            part.read_exact_at(&mut bytes, at[0].0).unwrap();
            assert_eq!(&bytes, name.as_bytes());
        }
        assert!(write(dir.path(), "other", &[]).is_empty());
        assert!(write(dir.path(), "w", &[]).is_empty());
    }

    #[test]
    fn log_that_is_torn_anywhere_keeps_what_was_whole() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "w", &["one", "two", "three"]);
        let path = dir.path().join("worker-00001-of-00001.jsonl");
        let whole = fs::read(&path).unwrap();
        let ends: Vec<usize> =
            whole.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1).collect();
        let part = fs::read(path.with_extension("part")).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            fs::write(path.with_extension("part"), &part).unwrap();
            let whole_lines = ends.iter().filter(|end| **end <= cut).count();
            let (_, found) = Log::open::<String, Record>(dir.path(), Worker::ALL, &"w".to_owned()).unwrap();
            assert_eq!(found.len(), whole_lines.saturating_sub(1), "cut at {cut}");
        }
        // A bit that flipped, and values that were lost.
        let mut bad = whole.clone();
        bad[ends[1] + 20] ^= 1;
        fs::write(&path, &bad).unwrap();
        fs::write(path.with_extension("part"), &part).unwrap();
        assert_eq!(read::<String, Record>(&path).unwrap().unwrap().1.len(), 1);
        fs::write(&path, &whole).unwrap();
        fs::write(path.with_extension("part"), &part[..5]).unwrap();
        assert_eq!(read::<String, Record>(&path).unwrap().unwrap().1.len(), 1);
        // Values that never reached the disk.
        let mut lost = part.clone();
        lost[4] ^= 1;
        fs::write(path.with_extension("part"), &lost).unwrap();
        assert_eq!(read::<String, Record>(&path).unwrap().unwrap().1.len(), 1);
    }
}
