//! Reading, computing and keeping, one after the other for each item and side by side for all.
//!
//! Reader threads take the items in their order and fill buffers; computing runs on rayon's pool; what comes out is
//! kept by the calling thread, in the order in which it is finished. Between them stands one limit, in bytes: an item is
//! read only when what it needs fits beside what is under way (a single item always may). An error or a wish to stop
//! lets what is under way finish and be kept, and begins nothing new.
//!
//! Not here: what the items are.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use kernels::{Demand, Engine};
use serde::Serialize;

use crate::{Result, StreamError};

/// How many items may be under way for each that is computed at once.
const AHEAD: usize = 3;

/// What the stages of a flow did, in seconds summed over threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stages {
    /// Reading (and hashing what was read).
    pub read_s: f64,
    /// Readers waiting for memory: something after them is the limit.
    pub read_waiting_s: f64,
    /// Computing.
    pub compute_s: f64,
    /// Keeping results.
    pub keep_s: f64,
    /// The keeper waiting for results: something before it is the limit.
    pub keep_waiting_s: f64,
    /// Items.
    pub items: u64,
}

/// Limits of a flow.
pub(crate) struct Limits<'a> {
    /// Bytes of items under way.
    pub(crate) memory_bytes: u64,
    /// Reader threads.
    pub(crate) readers: usize,
    /// Items that are computed at once; no more than rayon's pool has threads.
    pub(crate) callers: usize,
    /// Set from outside to stop.
    pub(crate) stop: &'a AtomicBool,
}

impl<'a> Limits<'a> {
    /// What an engine wants, under a limit of memory.
    pub(crate) fn new<E: Engine>(engine: &E, memory_bytes: u64, stop: &'a AtomicBool) -> Limits<'a> {
        let Demand { callers, readers, bytes } = engine.demand();
        let memory_bytes = memory_bytes.min(bytes.unwrap_or(u64::MAX));
        Limits { memory_bytes, readers, callers: callers.min(rayon::current_num_threads()), stop }
    }
}

/// Counts bytes under way.
struct Gate {
    state: Mutex<(u64, usize)>,
    freed: Condvar,
    bytes_max: u64,
    items_max: usize,
}

impl Gate {
    fn enter(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.1 > 0 && (state.0.saturating_add(bytes) > self.bytes_max || state.1 >= self.items_max) {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        *state = (state.0.saturating_add(bytes), state.1 + 1);
    }

    fn leave(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (state.0.saturating_sub(bytes), state.1.saturating_sub(1));
        self.freed.notify_all();
    }
}

/// Adds the time of one call to a sum of nanoseconds.
fn timed<T>(sum: &AtomicU64, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = f();
    sum.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    out
}

/// Takes every item through `read`, `compute` and `keep`. `bytes` says what an item needs.
pub(crate) fn flow<T: Sync, P: Send, R: Send>(
    items: &[T],
    limits: &Limits<'_>,
    bytes: impl Fn(&T) -> u64 + Sync,
    read: impl Fn(&T) -> Result<P> + Sync,
    compute: impl Fn(&T, P) -> Result<R> + Sync,
    mut keep: impl FnMut(&T, R) -> Result<()>,
) -> Result<Stages> {
    let gate = Gate {
        state: Mutex::default(),
        freed: Condvar::new(),
        bytes_max: limits.memory_bytes,
        items_max: AHEAD * limits.callers.max(1),
    };
    // Threads that wait for parts of one item begin another: more than one for each thread would only push each other's
    // weights out of the caches.
    let computing = &Gate {
        state: Mutex::default(),
        freed: Condvar::new(),
        bytes_max: u64::MAX,
        items_max: limits.callers.max(1),
    };
    let (next, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
    let clocks: [AtomicU64; 5] = Default::default();
    let [read_ns, read_waiting, compute_ns, keep_ns, keep_waiting] = &clocks;
    let (to_compute, ready): (Sender<(usize, Result<P>)>, Receiver<_>) = channel();
    let (to_keep, done): (Sender<(usize, Result<R>)>, Receiver<_>) = channel();
    let mut first_error: Option<(usize, StreamError)> = None;
    let mut kept = 0u64;
    std::thread::scope(|threads| {
        for _ in 0..limits.readers.max(1) {
            let (to_compute, gate, next, broken, read, bytes) =
                (to_compute.clone(), &gate, &next, &broken, &read, &bytes);
            threads.spawn(move || {
                while !broken.load(Ordering::Relaxed) && !limits.stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { return };
                    timed(read_waiting, || gate.enter(bytes(item)));
                    if to_compute.send((at, timed(read_ns, || read(item)))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(to_compute);
        let (gate, compute, bytes) = (&gate, &compute, &bytes);
        threads.spawn(move || {
            // In place: this thread waits for readers, the pool's threads do not.
            rayon::in_place_scope(|pool| {
                for (at, payload) in ready {
                    let to_keep = to_keep.clone();
                    computing.enter(1);
                    pool.spawn(move |_| {
                        let result =
                            payload.and_then(|payload| timed(compute_ns, || compute(&items[at], payload)));
                        computing.leave(1);
                        // The keeper is gone only after a panic of its own.
                        let _ = to_keep.send((at, result));
                    });
                }
            });
        });
        loop {
            let Ok((at, result)) = timed(keep_waiting, || done.recv()) else { break };
            let result = result.and_then(|result| timed(keep_ns, || keep(&items[at], result)));
            // Only now: a result may be as large as what it was made of.
            gate.leave(bytes(&items[at]));
            match result {
                Ok(()) => kept += 1,
                Err(error) => {
                    broken.store(true, Ordering::Relaxed);
                    if first_error.as_ref().is_none_or(|(first, _)| at < *first) {
                        first_error = Some((at, error));
                    }
                }
            }
        }
    });
    if let Some((_, error)) = first_error {
        return Err(error);
    }
    if kept < items.len() as u64 {
        return Err(StreamError::Interrupted { done: kept, of: items.len() as u64 });
    }
    let seconds = |clock: &AtomicU64| clock.load(Ordering::Relaxed) as f64 / 1e9;
    Ok(Stages {
        read_s: seconds(read_ns),
        read_waiting_s: seconds(read_waiting),
        compute_s: seconds(compute_ns),
        keep_s: seconds(keep_ns),
        keep_waiting_s: seconds(keep_waiting),
        items: kept,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(memory_bytes: u64, stop: &AtomicBool) -> Limits<'_> {
        Limits { memory_bytes, readers: 2, callers: rayon::current_num_threads(), stop }
    }

    #[test]
    fn flow_keeps_every_item_once_and_stays_under_its_limit() {
        let items: Vec<u64> = (1..=200).collect();
        let (under_way, most) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut kept = Vec::new();
        let stages = flow(
            &items,
            &limits(500, &AtomicBool::new(false)),
            |&n| n,
            |&n| {
                let now = under_way.fetch_add(n, Ordering::SeqCst) + n;
                most.fetch_max(now, Ordering::SeqCst);
                Ok(n)
            },
            |_, read| Ok(read * 2),
            |&n, doubled| {
                // Until it is kept.
                under_way.fetch_sub(n, Ordering::SeqCst);
                assert_eq!(doubled, 2 * n);
                kept.push(n);
                Ok(())
            },
        )
        .unwrap();
        kept.sort();
        assert_eq!((kept, stages.items), (items, 200));
        assert!(most.load(Ordering::SeqCst) <= 500);
    }

    #[test]
    fn flow_stops_when_told_and_keeps_what_was_under_way() {
        let items: Vec<u64> = (0..100).collect();
        let stop = AtomicBool::new(false);
        let mut kept = 0;
        let result = flow(
            &items,
            &limits(1, &stop),
            |_| 1,
            |_| Ok(()),
            |_, ()| Ok(()),
            |&n, ()| {
                kept += 1;
                stop.store(n >= 10, Ordering::SeqCst);
                Ok(())
            },
        );
        assert!(matches!(result, Err(StreamError::Interrupted { done, of: 100 }) if done == kept));
        assert!((11..100).contains(&kept), "{kept}");
    }

    #[test]
    fn flow_reports_the_first_of_the_errors() {
        let items: Vec<u64> = (0..50).collect();
        let fail = |n: u64| StreamError::OutsideCoefficient { value: n as f32 };
        let result = flow(
            &items,
            &limits(100, &AtomicBool::new(false)),
            |_| 1,
            |&n| if n == 7 { Err(fail(7)) } else { Ok(()) },
            |&n, ()| if n > 7 { Err(fail(n)) } else { Ok(()) },
            |_, ()| Ok(()),
        );
        assert!(matches!(result, Err(StreamError::OutsideCoefficient { value: 7.0 })), "{result:?}");
    }
}
