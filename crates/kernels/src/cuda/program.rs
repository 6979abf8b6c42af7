//! Work for the device that is written down first and done later, all at once.
//!
//! Each thread that calls an engine writes a program. When it needs a result on the host the program is handed to a lane
//! (`lanes`), and if other threads' programs that do the same to other matrices are waiting, they are launched together.
//! A program owns all memory that it names, so that nothing of it is used again before it is done.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::kernel::{Kernel, SLOTS, WORDS};
use crate::{KernelError, Result, Side, Weights};

/// One step.
pub(super) enum Step {
    /// Bytes from the host.
    Upload { from: Source, to: u64, len: u64 },
    /// Bytes to the host.
    Download { from: u64, to: u64, len: u64 },
    /// Bytes inside the device.
    Copy { from: u64, to: u64, len: u64 },
    /// Poison, or zeros.
    Fill { to: u64, value: u8, len: u64 },
    /// A product by cuBLAS.
    Sgemm(Sgemm),
    /// A kernel; `z` blocks for each matrix.
    Launch { kernel: Kernel, grid: (u32, u32), z: u32, slots: [u64; SLOTS], words: [u32; WORDS] },
}

/// `A B` or `A^T B`, row-major, `B` and the result without padding.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sgemm {
    pub(super) transposed: bool,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) depth: u32,
    pub(super) a: u64,
    pub(super) lda: u32,
    pub(super) b: u64,
    pub(super) out: u64,
}

/// Where bytes of the host come from.
pub(super) enum Source {
    /// Memory that somebody keeps until the program is done.
    Address(u64),
    /// Some bytes of shared memory.
    Bytes { bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, start: usize },
    /// Rows that are read when they are needed.
    Rows { weights: Weights, side: Side, first: usize },
}

impl Step {
    /// Whether two steps can be one launch, or one after the other in the place of one.
    fn is_like(&self, other: &Step) -> bool {
        match (self, other) {
            (Step::Upload { len: a, .. }, Step::Upload { len: b, .. })
            | (Step::Download { len: a, .. }, Step::Download { len: b, .. })
            | (Step::Copy { len: a, .. }, Step::Copy { len: b, .. }) => a == b,
            (Step::Sgemm(a), Step::Sgemm(b)) => {
                (a.transposed, a.rows, a.cols, a.depth, a.lda)
                    == (b.transposed, b.rows, b.cols, b.depth, b.lda)
            }
            (Step::Fill { value: a, len: m, .. }, Step::Fill { value: b, len: n, .. }) => (a, m) == (b, n),
            (
                Step::Launch { kernel: a, grid: b, z: c, words: d, .. },
                Step::Launch { kernel: e, grid: f, z: g, words: h, .. },
            ) => (a, b, c, d) == (e, f, g, h),
            _ => false,
        }
    }
}

/// Steps, and what has to live until they are done.
#[derive(Default)]
pub(super) struct Program {
    pub(super) steps: Vec<Step>,
    keep: Vec<Arc<dyn Any + Send + Sync>>,
    /// What the program before this one kept: it may have been for steps that are still to be written.
    before: Vec<Weak<dyn Any + Send + Sync>>,
    results: Vec<Arc<AtomicBool>>,
}

impl Program {
    /// Whether every step of this program is like that of the other.
    pub(super) fn is_like(&self, other: &Program) -> bool {
        self.steps.len() == other.steps.len()
            && self.steps.iter().zip(&other.steps).all(|(a, b)| a.is_like(b))
    }

    /// Has something live until the program is done.
    pub(super) fn keep<T: Any + Send + Sync>(&mut self, what: &Arc<T>) {
        self.keep.push(what.clone());
    }

    /// Has this said when the program is done, if it succeeds.
    pub(super) fn promise(&mut self, done: &Arc<AtomicBool>) {
        self.results.push(done.clone());
    }

    /// Every step was done.
    pub(super) fn succeeded(&self) {
        self.results.iter().for_each(|done| done.store(true, Ordering::Release));
    }

    /// The program that is written next. It keeps what this one kept, from its first step on and as far as it is still
    /// there then: this one may be done in the middle of an operation.
    fn next(&self) -> Program {
        let mut before: Vec<Weak<dyn Any + Send + Sync>> = self.keep.iter().map(Arc::downgrade).collect();
        before.extend(self.before.iter().cloned());
        before.sort_by_key(|kept| kept.as_ptr().cast::<()>());
        before.dedup_by(|a, b| std::ptr::addr_eq(a.as_ptr(), b.as_ptr()));
        before.retain(|kept| kept.strong_count() > 0);
        Program { before, ..Program::default() }
    }

    fn push(&mut self, step: Step) {
        self.keep.extend(self.before.drain(..).filter_map(|kept| kept.upgrade()));
        self.steps.push(step);
    }

    pub(super) fn sgemm(&mut self, product: Sgemm) {
        self.push(Step::Sgemm(product));
    }

    pub(super) fn upload(&mut self, from: Source, to: u64, len: u64) {
        if len > 0 {
            self.push(Step::Upload { from, to, len });
        }
    }

    pub(super) fn download(&mut self, from: u64, to: u64, len: u64) {
        if len > 0 {
            self.push(Step::Download { from, to, len });
        }
    }

    pub(super) fn fill(&mut self, to: u64, value: u8, len: u64) {
        if len > 0 {
            self.push(Step::Fill { to, value, len });
        }
    }

    pub(super) fn copy(&mut self, from: u64, to: u64, len: u64) {
        if len > 0 {
            self.push(Step::Copy { from, to, len });
        }
    }

    /// A launch of `grid` blocks times `z`; nothing where that is none.
    pub(super) fn launch(&mut self, kernel: Kernel, grid: (u32, u32), z: u32, slots: &[u64], words: &[u32]) {
        if grid.0 == 0 || grid.1 == 0 || z == 0 {
            return;
        }
        debug_assert_eq!((slots.len(), words.len()), (kernel.layout().0, kernel.layout().1), "{kernel:?}");
        let (mut all, mut rest) = ([0; SLOTS], [0; WORDS]);
        all[..slots.len()].copy_from_slice(slots);
        rest[..words.len()].copy_from_slice(words);
        self.push(Step::Launch { kernel, grid, z, slots: all, words: rest });
    }
}

/// The program that one thread is writing.
#[derive(Default)]
pub(super) struct Track {
    program: Mutex<Program>,
    /// Held while a program of this track runs: what was written first is done first.
    running: Mutex<()>,
    failed: Mutex<Option<KernelError>>,
}

impl Track {
    /// Writes on.
    pub(super) fn write<T>(&self, write: impl FnOnce(&mut Program) -> T) -> T {
        write(&mut self.program.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has everything done that is written, by `run`. A failure that another thread met is told, once.
    pub(super) fn finish(&self, run: impl FnOnce(Program) -> Result<()>) -> Result<()> {
        let done = self.run(run);
        let met = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        met.map_or(done, Err)
    }

    /// The same for another thread's track, which is told of a failure, too.
    pub(super) fn finish_for_another(&self, run: impl FnOnce(Program) -> Result<()>) -> Result<()> {
        let done = self.run(run);
        if let Err(error) = &done {
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        }
        done
    }

    fn run(&self, run: impl FnOnce(Program) -> Result<()>) -> Result<()> {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let program = self.write(|program| {
            let next = program.next();
            std::mem::replace(program, next)
        });
        if program.steps.is_empty() { Ok(()) } else { run(program) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_done_midway_leaves_what_others_own_to_the_next() {
        let track = Track::default();
        let (owned, temporary) = (Arc::new(1), Arc::new(2));
        let gone = Arc::downgrade(&temporary);
        let step = |program: &mut Program| program.fill(0, 0, 1);
        track.write(|program| {
            (0..3).for_each(|_| program.keep(&owned));
            (0..2).for_each(|_| program.keep(&temporary));
            step(program);
        });
        drop(temporary);
        // A program without steps in between changes nothing.
        for _ in 0..2 {
            track.finish(|_| Ok(())).unwrap();
            assert!(gone.upgrade().is_none());
            // Nothing is kept for nothing.
            assert_eq!(Arc::strong_count(&owned), 1);
        }
        track.write(step);
        assert_eq!(Arc::strong_count(&owned), 2);
        track
            .finish(|program| {
                assert_eq!((program.keep.len(), program.steps.len()), (1, 1));
                Ok(())
            })
            .unwrap();
        assert_eq!(Arc::strong_count(&owned), 1);
    }

    #[test]
    fn blocks_that_were_never_used_are_free_again() {
        let track = Track::default();
        let block = Arc::new(1);
        track.write(|program| program.keep(&block));
        track.finish(|_| panic!("there is no step")).unwrap();
        assert_eq!(Arc::strong_count(&block), 1);
    }

    #[test]
    fn failure_met_by_another_thread_is_told_to_the_owner() {
        let track = Track::default();
        let error = crate::KernelError::Device { call: "x", code: 1, message: String::new() };
        track.write(|program| program.fill(0, 0, 1));
        assert_eq!(track.finish_for_another(|_| Err(error.clone())), Err(error.clone()));
        assert_eq!(track.finish(|_| Ok(())), Err(error));
        assert_eq!(track.finish(|_| Ok(())), Ok(()));
    }
}
