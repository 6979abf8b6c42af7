//! Positioned reads of large files: through the page cache where it holds them, past it where it does not.
//!
//! What is cached is read as always. A file of which less than half is cached is read past the cache (`O_DIRECT`), in
//! aligned windows that follow one another: a tensor that begins where the last one ended is in the window already, so
//! small neighbours cost no reads of their own, and a checkpoint larger than memory does not push out what others use.
//! Windows take a few megabytes in all, however many files there are. Where the file system refuses, the cache is used
//! after all.
//!
//! Not here: which bytes; and no mappings, so that a file that shrinks is an error and not a signal.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

/// Bytes of a window.
const WINDOW_BYTES: usize = 4 << 20;
/// Windows of all files together.
const WINDOWS_MAX: usize = 2;
/// Smaller files are not worth a window.
const DIRECT_BYTES_MIN: u64 = 64 << 20;
/// Places of a file that are looked at to see what is cached.
const SAMPLES: u64 = 64;

/// A part of a file that no file system refuses to read past the cache, and memory to read it to.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

const PAGE: u64 = size_of::<Page>() as u64;

/// A file that is read.
#[derive(Debug)]
pub(crate) struct Source {
    file: File,
    /// The same file past the cache, if it is read so; decided by the first read.
    direct: OnceLock<Option<Arc<File>>>,
    windows: Arc<Windows>,
}

/// The windows of some files, each with its file, the one that was used last at the end. One that is being read lives on
/// until that is done, also if another takes its place.
#[derive(Debug, Default)]
pub(crate) struct Windows(Mutex<Vec<Placed>>);

/// A file and its window.
type Placed = (Arc<File>, Arc<Mutex<Window>>);

/// What was read past the cache last.
struct Window {
    file: Arc<File>,
    pages: Vec<Page>,
    start: u64,
    len: usize,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({}..+{})", self.start, self.len)
    }
}

impl Source {
    pub(crate) fn new(file: File, windows: &Arc<Windows>) -> Source {
        Source { file, direct: OnceLock::new(), windows: windows.clone() }
    }

    /// Fills `into` from this place on.
    pub(crate) fn read_exact_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        let Some(direct) = self.direct.get_or_init(|| past_the_cache(&self.file)) else {
            return self.file.read_exact_at(into, offset);
        };
        let window = self.windows.of(direct);
        let done = window.lock().unwrap_or_else(PoisonError::into_inner).read(into, offset);
        match done {
            Err(error) if error.kind() == ErrorKind::InvalidInput => self.file.read_exact_at(into, offset),
            done => done,
        }
    }

    /// Whether it is read past the cache; decided by the first read.
    pub(crate) fn is_direct(&self) -> bool {
        matches!(self.direct.get(), Some(Some(_)))
    }
}

/// A large file that is mostly not cached, opened again to be read past the cache.
fn past_the_cache(file: &File) -> Option<Arc<File>> {
    let bytes = file.metadata().ok()?.len();
    if bytes < DIRECT_BYTES_MIN || cached_share(file, bytes) > 0.5 {
        return None;
    }
    // The same file, whatever its name is by now.
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(again).ok().map(Arc::new)
}

impl Windows {
    /// The window of a file, in the place of the one that was not used for longest if there are enough.
    fn of(&self, file: &Arc<File>) -> Arc<Mutex<Window>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match all.iter().position(|(of, _)| Arc::ptr_eq(of, file)) {
            Some(at) => all.remove(at),
            None => {
                if all.len() >= WINDOWS_MAX {
                    all.remove(0);
                }
                let window = Window { file: file.clone(), pages: Vec::new(), start: 0, len: 0 };
                (file.clone(), Arc::new(Mutex::new(window)))
            }
        };
        let window = entry.1.clone();
        all.push(entry);
        window
    }
}

impl Window {
    fn read(&mut self, mut into: &mut [u8], mut offset: u64) -> Result<()> {
        if self.pages.is_empty() {
            self.pages = vec![Page([0; PAGE as usize]); WINDOW_BYTES / PAGE as usize];
        }
        while !into.is_empty() {
            let inside = offset.checked_sub(self.start).filter(|at| *at < self.len as u64);
            let Some(at) = inside else {
                self.fill(offset)?;
                continue;
            };
            let bytes: &[u8] = bytemuck::cast_slice(&self.pages);
            let found = &bytes[at as usize..self.len];
            let n = found.len().min(into.len());
            into[..n].copy_from_slice(&found[..n]);
            into = &mut into[n..];
            offset += n as u64;
        }
        Ok(())
    }

    /// Reads the window that `offset` lies in.
    fn fill(&mut self, offset: u64) -> Result<()> {
        (self.start, self.len) = (offset / PAGE * PAGE, 0);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.pages);
        loop {
            // Reads that are cut short end at a page, or at the end of the file.
            match self.file.read_at(&mut bytes[self.len..], self.start + self.len as u64) {
                Ok(0) => break,
                Ok(n) => {
                    self.len += n;
                    if self.len == bytes.len() || !(n as u64).is_multiple_of(PAGE) {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.start + self.len as u64 > offset { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }
}

/// The share of a file's bytes that are in the page cache, from some places of it; 1 where the system does not tell.
fn cached_share(file: &File, bytes: u64) -> f64 {
    let step = (bytes / SAMPLES).max(1);
    let (mut cached, mut asked) = (0u32, 0u32);
    for at in (0..bytes).step_by(step as usize) {
        let mut byte = [0u8];
        let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT);
        asked += 1;
        match read {
            Ok(1..) => cached += 1,
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(_) => return 1.0,
        }
    }
    f64::from(cached) / f64::from(asked.max(1))
}

/// What share of a file is in the page cache, about; 1 where the system does not tell.
pub fn cached_share_of(path: &std::path::Path) -> Result<f64> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    Ok(cached_share(&file, bytes))
}

/// Asks the system to forget what it has cached of a file; what was not on the disk yet is flushed first.
pub fn forget(path: &std::path::Path) -> Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_cache_are_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // Odd length; every byte tells where it is.
        let bytes: Vec<u8> =
            (0..DIRECT_BYTES_MIN as u32 / 4 + 1000).flat_map(u32::to_le_bytes).skip(3).collect();
        std::fs::write(&path, &bytes).unwrap();
        forget(&path).unwrap();
        let source = Source::new(File::open(&path).unwrap(), &Arc::default());
        let window = WINDOW_BYTES as u64;
        let ends = bytes.len() as u64;
        for (offset, len) in [
            (0, 1),
            (1, 5000),
            (4095, 2),
            (window - 7, 20),
            (5, 3 * window + 11),
            (ends - 9, 9),
            (ends - 5000, 5000),
        ] {
            let mut into = vec![0u8; len as usize];
            source.read_exact_at(&mut into, offset).unwrap();
            assert!(into == bytes[offset as usize..][..len as usize], "{len} bytes at {offset}");
        }
        for (offset, len) in [(ends - 3, 4), (ends, 1), (ends + window, 1)] {
            let error = source.read_exact_at(&mut vec![0; len], offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{len} bytes at {offset}");
        }
        // Whether it went past the cache is the file system's decision; what is cached does not.
        let direct = source.is_direct();
        let mut all = vec![0u8; bytes.len()];
        File::open(&path).unwrap().read_exact_at(&mut all, 0).unwrap();
        let again = Source::new(File::open(&path).unwrap(), &Arc::default());
        again.read_exact_at(&mut [0; 10], 100).unwrap();
        assert!(!again.is_direct(), "direct before: {direct}");
    }

    #[test]
    fn windows_of_many_files_are_few_and_each_reads_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<Arc<File>> = (0..5u8)
            .map(|n| {
                let path = dir.path().join(n.to_string());
                std::fs::write(&path, vec![n; 3 * PAGE as usize + 5]).unwrap();
                Arc::new(File::open(path).unwrap())
            })
            .collect();
        let windows = Windows::default();
        for round in 0..3u64 {
            for (n, file) in files.iter().enumerate() {
                let mut into = [255u8; 10];
                windows.of(file).lock().unwrap().read(&mut into, round * PAGE + 5).unwrap();
                assert_eq!(into, [n as u8; 10]);
                assert!(windows.0.lock().unwrap().len() <= WINDOWS_MAX);
            }
        }
        let window = windows.of(&files[4]);
        assert!(Arc::ptr_eq(&window, &windows.of(&files[4])), "a file keeps its window");
    }
}
