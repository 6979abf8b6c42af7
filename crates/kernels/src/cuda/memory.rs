//! Memory of the device, and pinned memory of the host: taken in large segments, handed out in blocks, and kept.
//!
//! The same sizes are asked for again and again, so a block that is free is kept for the next that asks for its size, and
//! joins the others only when memory runs short. A block goes back when its last owner drops it. Whoever gives a block to
//! the device owns it until the device is done, so a block that is free is idle, and the next owner need not wait for
//! anyone.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::driver::{self, Device};
use crate::Result;

/// Which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Device,
    Pinned,
}

/// Blocks up to this size have segments of their own, so that a few that live long do not stand in the way of large ones.
const SMALL: u64 = 1 << 20;
/// Blocks begin at multiples of this: a page, so that files can be read into them directly.
const ALIGN: u64 = 4096;

/// A heap of one kind of memory.
pub(super) struct Heap {
    kind: Kind,
    device: Arc<Device>,
    /// Bytes of a segment at least.
    segment: u64,
    /// Bytes of all segments at most.
    limit: u64,
    state: Mutex<State>,
    freed: Condvar,
    /// Held while the driver is asked for more, or given some back; `state` is not.
    growing: Mutex<()>,
}

#[derive(Default)]
struct State {
    segments: Vec<Segment>,
    /// Addresses of free blocks by their length.
    kept: BTreeMap<u64, Vec<u64>>,
}

struct Segment {
    base: u64,
    len: u64,
    small: bool,
    free: Ranges,
}

/// A part of a heap.
pub(super) struct Block {
    pub(super) address: u64,
    len: u64,
    home: Arc<Heap>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.home.lock().kept.entry(self.len).or_default().push(self.address);
        self.home.freed.notify_one();
    }
}

impl State {
    /// A kept block of this length, or one out of a free range.
    fn find(&mut self, len: u64) -> Option<u64> {
        let kept = self.kept.get_mut(&len).and_then(Vec::pop);
        kept.or_else(|| self.best(len))
    }

    /// The smallest free range that holds `len`.
    fn best(&mut self, len: u64) -> Option<u64> {
        let like = self.segments.iter_mut().filter(|s| s.small == (len <= SMALL));
        let fits = like.filter_map(|s| Some((s.free.smallest_that_holds(len)?, s)));
        let ((_, at), segment) = fits.min_by_key(|((have, _), _)| *have)?;
        segment.free.take(at, len);
        Some(segment.base + at)
    }

    /// Gives the kept blocks back to their segments.
    fn join(&mut self) {
        for (len, addresses) in std::mem::take(&mut self.kept) {
            for address in addresses {
                let inside = |s: &&mut Segment| (s.base..s.base + s.len).contains(&address);
                if let Some(segment) = self.segments.iter_mut().find(inside) {
                    segment.free.put(address - segment.base, len);
                }
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.len).sum()
    }
}

impl Heap {
    pub(super) fn new(kind: Kind, device: Arc<Device>, segment: u64, limit: u64) -> Arc<Heap> {
        Arc::new(Heap {
            kind,
            device,
            segment,
            limit,
            state: Mutex::default(),
            freed: Condvar::new(),
            growing: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of `len` bytes with anything in it; `None` where there is not enough memory.
    pub(super) fn take(self: &Arc<Heap>, len: u64) -> Result<Option<Block>> {
        let Some(len) = len.max(1).checked_next_multiple_of(ALIGN) else { return Ok(None) };
        let block = |address| Some(Block { address, len, home: self.clone() });
        if let Some(address) = self.lock().find(len) {
            return Ok(block(address));
        }
        // One after the other: the next may find what the one before has brought.
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = self.lock().find(len) {
            return Ok(block(address));
        }
        for want in [self.segment.max(len), len] {
            if let Some(address) = self.grow(want, len)? {
                return Ok(block(address));
            }
        }
        let mut idle = Vec::new();
        {
            let mut state = self.lock();
            state.join();
            if let Some(address) = state.best(len) {
                return Ok(block(address));
            }
            // Segments that nothing lies in make room for one that is large enough.
            state.segments.retain(|s| {
                let empty = s.free.holds_all(s.len);
                if empty {
                    idle.push(s.base);
                }
                !empty
            });
        }
        idle.into_iter().for_each(|base| self.free(base));
        Ok(self.grow(len, len)?.and_then(block))
    }

    /// Takes another segment, if the limit and the memory allow it, and `len` bytes of it. Others go on with what there is:
    /// pinning memory takes long. The caller holds `growing`.
    fn grow(&self, segment: u64, len: u64) -> Result<Option<u64>> {
        if self.bytes() + segment > self.limit {
            return Ok(None);
        }
        let Some(base) = self.alloc(segment)? else { return Ok(None) };
        let mut free = Ranges::default();
        free.put(0, segment);
        free.take(0, len);
        self.lock().segments.push(Segment { base, len: segment, small: len <= SMALL, free });
        Ok(Some(base))
    }

    /// Waits until some block is given back, but not longer than this; says whether there is any to wait for.
    pub(super) fn wait(&self, most: Duration) -> bool {
        let state = self.lock();
        let kept: u64 = state.kept.iter().map(|(len, all)| len * all.len() as u64).sum();
        let free: u64 = state.segments.iter().map(|s| s.free.total()).sum();
        if state.bytes() <= kept + free {
            return false;
        }
        drop(self.freed.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner));
        true
    }

    /// Bytes of all segments at most.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether bytes of the host lie in this heap.
    pub(super) fn contains(&self, address: u64, len: u64) -> bool {
        self.lock().segments.iter().any(|s| address >= s.base && address + len <= s.base + s.len)
    }

    /// Bytes of all segments.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    fn alloc(&self, len: u64) -> Result<Option<u64>> {
        self.device.enter()?;
        match self.kind {
            Kind::Device => driver::device_alloc(len),
            Kind::Pinned => driver::pinned_alloc(len),
        }
    }

    fn free(&self, base: u64) {
        if self.device.enter().is_err() {
            return;
        }
        // SAFETY: `base` comes from `alloc` of the same kind. Its segment holds no block, and a block's owners keep it until
        // the device is done with it.
        unsafe {
            match self.kind {
                Kind::Device => driver::device_free(base),
                Kind::Pinned => driver::pinned_free(base),
            }
        }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // Blocks own their heap, so none is left.
        let segments = std::mem::take(&mut self.lock().segments);
        for segment in segments {
            self.free(segment.base);
        }
    }
}

/// Free ranges: offset to length, neighbours joined.
#[derive(Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Length and offset of the smallest range that holds `len`.
    fn smallest_that_holds(&self, len: u64) -> Option<(u64, u64)> {
        self.0.iter().filter(|(_, have)| **have >= len).map(|(at, have)| (*have, *at)).min()
    }

    fn take(&mut self, at: u64, len: u64) {
        let Some(have) = self.0.remove(&at) else { return };
        if have > len {
            self.0.insert(at + len, have - len);
        }
    }

    fn put(&mut self, mut at: u64, mut len: u64) {
        if let Some((&before, &its)) = self.0.range(..at).next_back()
            && before + its == at
        {
            self.0.remove(&before);
            (at, len) = (before, its + len);
        }
        if let Some(after) = self.0.remove(&(at + len)) {
            len += after;
        }
        self.0.insert(at, len);
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    fn holds_all(&self, len: u64) -> bool {
        self.0.get(&0) == Some(&len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_their_neighbours() {
        let mut free = Ranges::default();
        free.put(0, 100);
        for at in [0, 10, 20] {
            free.take(at, 10);
        }
        assert_eq!(free.smallest_that_holds(1), Some((70, 30)));
        free.put(10, 10);
        assert_eq!(free.smallest_that_holds(5), Some((10, 10)));
        assert_eq!(free.smallest_that_holds(11), Some((70, 30)));
        free.put(0, 10);
        assert_eq!(free.smallest_that_holds(11), Some((20, 0)));
        assert!(!free.holds_all(100));
        free.put(20, 10);
        assert!(free.holds_all(100));
        assert_eq!(free.smallest_that_holds(101), None);
    }
}
