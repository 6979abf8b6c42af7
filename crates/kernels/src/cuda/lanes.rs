//! A few streams, each of which takes the programs that are waiting whenever it is free.
//!
//! The thread that finds a lane free works it: it takes the first program that waits and all that are like it (as many as a
//! launch can serve), gives the steps to the lane's stream and waits for it. Programs that come meanwhile gather, so the
//! busier the device, the more of them share a launch. While one lane computes the next one copies.
//!
//! Bytes that are not in pinned memory go through slabs of the lane that are; a slab is filled again when its event says
//! that it has been read.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::driver::{Device, Event, Function, Stream};
use super::gemm::CublasHandle;
use super::kernel::{BATCH, Kernel, SLOTS, WORDS};
use super::memory::{Block, Heap};
use super::program::{Program, Source, Step};
use crate::{KernelError, Result};

/// Bytes of a slab.
const SLAB_BYTES: u64 = 16 << 20;
/// Slabs of a lane.
const SLABS: usize = 2;
/// Blocks of a launch in its third dimension.
pub(super) const GRID_Z_MAX: u32 = 65_535;

/// One stream and what only the thread that works it touches.
struct Lane {
    /// Of the last program; a thread that waits for it sleeps.
    done: Event,
    /// Made when it is first needed, and gone before its stream.
    cublas: Option<CublasHandle>,
    stream: Stream,
    slabs: Vec<Slab>,
    next: usize,
}

struct Slab {
    block: Block,
    read: Event,
}

impl Lane {
    /// Waits for all that was given.
    fn wait(&self) -> Result<()> {
        let waited = self.done.record(&self.stream).and_then(|()| self.done.wait());
        if waited.is_err() {
            let _ = self.stream.synchronize();
        }
        waited
    }
}

/// A program that waits, and its owner.
struct Waiting {
    program: Program,
    owner: Arc<Owner>,
}

/// A thread whose program waits or is being done.
#[derive(Default)]
struct Owner {
    news: Mutex<News>,
    told: Condvar,
    /// It works a lane, and would come late.
    busy: AtomicBool,
}

/// What a waiting thread is told.
#[derive(Default)]
enum News {
    /// Nothing yet.
    #[default]
    None,
    /// There may be a lane to work.
    Work,
    /// Its program is done.
    Done(Result<()>),
}

impl Owner {
    fn tell(&self, news: News) {
        let mut own = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        // What is done stays done.
        if !matches!(*own, News::Done(_)) {
            *own = news;
            self.told.notify_one();
        }
    }

    /// Waits for news; the result if that is what they are.
    fn wait(&self) -> Option<Result<()>> {
        let mut own = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        while matches!(*own, News::None) {
            own = self.told.wait(own).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut *own).result()
    }

    /// The result, if it is there.
    fn result(&self) -> Option<Result<()>> {
        std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner)).result()
    }
}

impl News {
    fn result(self) -> Option<Result<()>> {
        if let News::Done(result) = self { Some(result) } else { None }
    }
}

struct Queue {
    waiting: VecDeque<Waiting>,
    idle: Vec<Lane>,
}

impl Queue {
    /// Has somebody look, if there is work and a lane for it.
    fn nudge(&self) {
        let free = |waiting: &&Waiting| !waiting.owner.busy.load(Ordering::Relaxed);
        if let (Some(first), false) = (self.waiting.iter().find(free), self.idle.is_empty()) {
            first.owner.tell(News::Work);
        }
    }
}

/// Counts of what was done.
#[derive(Debug, Default)]
pub(super) struct Meters {
    pub(super) programs: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) launches: AtomicU64,
    pub(super) uploaded_pinned: AtomicU64,
    pub(super) uploaded_staged: AtomicU64,
    pub(super) downloaded: AtomicU64,
    pub(super) waited_ns: AtomicU64,
    pub(super) staged_ns: AtomicU64,
}

/// All lanes of a device.
pub(super) struct Lanes {
    queue: Mutex<Queue>,
    functions: Vec<Function>,
    pinned: Arc<Heap>,
    device: Arc<Device>,
    pub(super) meters: Meters,
}

impl Lanes {
    pub(super) fn new(
        device: Arc<Device>,
        pinned: Arc<Heap>,
        functions: Vec<Function>,
        count: usize,
    ) -> Result<Lanes> {
        device.enter()?;
        let lane = |_| {
            Ok(Lane { done: Event::new()?, cublas: None, stream: Stream::new()?, slabs: Vec::new(), next: 0 })
        };
        let idle = (0..count.max(1)).map(lane).collect::<Result<_>>()?;
        Ok(Lanes {
            queue: Mutex::new(Queue { waiting: VecDeque::new(), idle }),
            functions,
            pinned,
            device,
            meters: Meters::default(),
        })
    }

    /// Has a program done; returns when it is. A panic on the way, out of a reader, goes on only then: the program may name
    /// memory that is the caller's.
    pub(super) fn run(&self, program: Program) -> Result<()> {
        let mut panic = None;
        let result = self.wait_for(program, &mut panic);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        result
    }

    fn wait_for(&self, program: Program, panic: &mut Option<Box<dyn Any + Send>>) -> Result<()> {
        let own = Arc::<Owner>::default();
        let lock = || self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        lock().waiting.push_back(Waiting { program, owner: own.clone() });
        loop {
            let mut queue = lock();
            let lane = if queue.waiting.is_empty() { None } else { queue.idle.pop() };
            let Some(mut lane) = lane else {
                drop(queue);
                match own.wait() {
                    Some(result) => return result,
                    None => continue,
                }
            };
            let batch = take_batch(&mut queue.waiting);
            own.busy.store(true, Ordering::Relaxed);
            // What is not like these may go on another lane.
            queue.nudge();
            drop(queue);
            let programs: Vec<&Program> = batch.iter().map(|waiting| &waiting.program).collect();
            let worked = catch_unwind(AssertUnwindSafe(|| self.work(&mut lane, &programs)));
            let results = match worked {
                Ok(results) => results,
                Err(cause) => {
                    // Out of a reader. What was given is under way, and its memory is about to be free.
                    let _ = lane.stream.synchronize();
                    let message = "a thread that worked for several panicked".to_owned();
                    let error = KernelError::Device { call: "cuStreamSynchronize", code: 0, message };
                    *panic = Some(cause);
                    vec![Err(error); batch.len()]
                }
            };
            self.meters.programs.fetch_add(batch.len() as u64, Ordering::Relaxed);
            self.meters.batches.fetch_add(1, Ordering::Relaxed);
            for (Waiting { program, owner }, result) in batch.into_iter().zip(results) {
                if result.is_ok() {
                    program.succeeded();
                }
                // Its memory is free before its owner goes on.
                drop(program);
                owner.tell(News::Done(result));
            }
            let mut queue = lock();
            queue.idle.push(lane);
            own.busy.store(false, Ordering::Relaxed);
            queue.nudge();
            drop(queue);
            if let Some(result) = own.result() {
                return result;
            }
        }
    }

    /// Does every step of every program, and waits for the last; a result for each program.
    fn work(&self, lane: &mut Lane, batch: &[&Program]) -> Vec<Result<()>> {
        // A program whose rows cannot be read goes on with any bytes, beside the others; its result says so.
        let mut own = vec![Ok(()); batch.len()];
        let given = self.device.enter().and_then(|()| self.give(lane, batch, &mut own));
        // Also after an error: what was given is under way, and its memory is about to be free.
        let start = Instant::now();
        let waited = lane.wait();
        self.meters.waited_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        match given.and(waited) {
            Ok(()) => own,
            Err(error) => vec![Err(error); batch.len()],
        }
    }

    fn give(&self, lane: &mut Lane, batch: &[&Program], own: &mut [Result<()>]) -> Result<()> {
        let Some(first) = batch.first() else { return Ok(()) };
        for (at, step) in first.steps.iter().enumerate() {
            if let Step::Launch { kernel, grid, z, words, .. } = step {
                self.launch(lane, *kernel, *grid, *z, words, batch.iter().map(|program| &program.steps[at]))?;
                continue;
            }
            for (program, own) in batch.iter().zip(own.iter_mut()) {
                match self.give_one(lane, &program.steps[at]) {
                    Err(error @ KernelError::Unread { .. }) if own.is_ok() => *own = Err(error),
                    Err(KernelError::Unread { .. }) => {}
                    done => done?,
                }
            }
        }
        Ok(())
    }

    /// One launch for the same step of every program.
    fn launch<'a>(
        &self,
        lane: &Lane,
        kernel: Kernel,
        grid: (u32, u32),
        z: u32,
        words: &[u32; WORDS],
        steps: impl ExactSizeIterator<Item = &'a Step>,
    ) -> Result<()> {
        let (slots, _, threads) = kernel.layout();
        let count = steps.len() as u32;
        // As the kernels have it: arrays of slots, then words, two of them in each of these.
        let mut args = [0u64; SLOTS * BATCH + WORDS / 2];
        for (item, step) in steps.enumerate() {
            let Step::Launch { slots: own, .. } = step else { continue };
            for slot in 0..slots {
                args[slot * BATCH + item] = own[slot];
            }
        }
        for (i, pair) in words.chunks_exact(2).enumerate() {
            args[slots * BATCH + i] = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        self.meters.launches.fetch_add(1, Ordering::Relaxed);
        let function = self.functions[kernel as usize];
        // SAFETY:
        // - `args` is laid out as `kernels/common.cu` says, and a test compares slots and words with the sources;
        // - the addresses are blocks that the programs own until the stream has been waited for, as large as the shapes in
        //   `words` ask for: the methods of `CudaEngine` that write the step take them from the same shapes.
        unsafe { lane.stream.launch(function, (grid.0, grid.1, z * count), threads, &mut args) }
    }

    fn give_one(&self, lane: &mut Lane, step: &Step) -> Result<()> {
        match step {
            Step::Upload { from, to, len } => self.upload(lane, from, *to, *len),
            // SAFETY: both ends belong to the program, or to whoever waits for it, until the stream has been waited for;
            // whoever writes a step takes both as long as `len`.
            Step::Download { from, to, len } => unsafe {
                self.meters.downloaded.fetch_add(*len, Ordering::Relaxed);
                lane.stream.download(*from, *to, *len as usize)
            },
            // SAFETY: as above.
            Step::Copy { from, to, len } => unsafe { lane.stream.copy(*from, *to, *len as usize) },
            // SAFETY: as above.
            Step::Fill { to, value, len } => unsafe { lane.stream.fill(*to, *value, *len as usize) },
            Step::Sgemm(product) => {
                if lane.cublas.is_none() {
                    lane.cublas = Some(CublasHandle::new(&lane.stream)?);
                }
                match &lane.cublas {
                    // SAFETY: as above; whoever writes the step takes the addresses from the same shapes.
                    Some(handle) => unsafe { handle.run(product) },
                    None => Ok(()),
                }
            }
            Step::Launch { .. } => Ok(()),
        }
    }

    fn upload(&self, lane: &mut Lane, from: &Source, to: u64, len: u64) -> Result<()> {
        let bytes: &[u8] = match from {
            // SAFETY: whoever wrote the step keeps `len` bytes at this address, unchanged, until the program is done.
            Source::Address(address) => unsafe {
                std::slice::from_raw_parts(*address as *const u8, len as usize)
            },
            Source::Bytes { bytes, start } => &(**bytes).as_ref()[*start..*start + len as usize],
            Source::Rows { weights, side, first } => {
                let row_bytes = (weights.shape().cols * weights.dtype.bytes()).max(1) as u64;
                let rows = (SLAB_BYTES / row_bytes).max(1);
                let mut done = 0;
                while done < len {
                    let part = (rows * row_bytes).min(len - done);
                    let row = *first + (done / row_bytes) as usize;
                    self.staged(lane, to + done, part, &mut |slab| weights.read_rows(*side, row, slab))?;
                    done += part;
                }
                return Ok(());
            }
        };
        if self.pinned.contains(bytes.as_ptr() as u64, len) {
            self.meters.uploaded_pinned.fetch_add(len, Ordering::Relaxed);
            // SAFETY: the program keeps the bytes until the stream has been waited for, and `to` is a block of its own.
            return unsafe { lane.stream.upload(bytes, to) };
        }
        for (i, part) in bytes.chunks(SLAB_BYTES as usize).enumerate() {
            self.staged(lane, to + i as u64 * SLAB_BYTES, part.len() as u64, &mut |slab| {
                slab.copy_from_slice(part);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Fills a slab and sends it.
    fn staged(
        &self,
        lane: &mut Lane,
        to: u64,
        len: u64,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        self.meters.uploaded_staged.fetch_add(len, Ordering::Relaxed);
        let slab = if len <= SLAB_BYTES { self.next_slab(lane)? } else { None };
        let Some(slab) = slab.map(|at| &lane.slabs[at]) else {
            // No pinned memory to be had, or a row longer than a slab: the driver stages.
            let mut bytes = vec![0; len as usize];
            fill(&mut bytes)?;
            // SAFETY: the stream is waited for before the bytes go; `to` is a block of the program.
            let sent = unsafe { lane.stream.upload(&bytes, to) };
            return sent.and(lane.stream.synchronize());
        };
        slab.read.wait()?;
        // SAFETY: the block is pinned memory of this lane, at least as long, and its last copy has been waited for.
        let bytes = unsafe { std::slice::from_raw_parts_mut(slab.block.address as *mut u8, len as usize) };
        fill(bytes)?;
        // SAFETY: nobody fills the slab again before the event that is recorded next; `to` is a block of the program.
        unsafe { lane.stream.upload(bytes, to) }?;
        slab.read.record(&lane.stream)?;
        self.meters.staged_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The next slab in turn; `None` where there is no pinned memory.
    fn next_slab(&self, lane: &mut Lane) -> Result<Option<usize>> {
        lane.next = (lane.next + 1) % SLABS;
        if lane.slabs.len() < SLABS {
            let Some(block) = self.pinned.take(SLAB_BYTES)? else { return Ok(None) };
            lane.slabs.push(Slab { block, read: Event::new()? });
            lane.next = lane.slabs.len() - 1;
        }
        Ok(Some(lane.next))
    }
}

/// The first program and those like it.
fn take_batch(waiting: &mut VecDeque<Waiting>) -> Vec<Waiting> {
    let Some(first) = waiting.pop_front() else { return Vec::new() };
    let z = |step: &Step| if let Step::Launch { z, .. } = step { *z } else { 1 };
    let most = first.program.steps.iter().map(z).max().unwrap_or(1).max(1);
    let room = BATCH.min((GRID_Z_MAX / most) as usize).max(1);
    let mut batch = vec![first];
    let mut i = 0;
    while i < waiting.len() && batch.len() < room {
        if waiting[i].program.is_like(&batch[0].program) {
            batch.extend(waiting.remove(i));
        } else {
            i += 1;
        }
    }
    batch
}
