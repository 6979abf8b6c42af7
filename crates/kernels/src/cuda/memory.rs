//! Memory of the device, and pinned memory of the host: taken in large segments, handed out in blocks, and kept.
//!
//! A block goes back when its last owner drops it. Whoever gives a block to the device owns it until the device is done, so
//! a block that is free is idle, and the next owner need not wait for anyone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{self, Device};
use crate::Result;

/// Which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Device,
    Pinned,
}

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
    segments: Mutex<Vec<Segment>>,
}

struct Segment {
    base: u64,
    len: u64,
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
        let mut segments = self.home.segments.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = |s: &&mut Segment| (s.base..s.base + s.len).contains(&self.address);
        if let Some(segment) = segments.iter_mut().find(inside) {
            segment.free.put(self.address - segment.base, self.len);
        }
    }
}

impl Heap {
    pub(super) fn new(kind: Kind, device: Arc<Device>, segment: u64, limit: u64) -> Arc<Heap> {
        Arc::new(Heap { kind, device, segment, limit, segments: Mutex::default() })
    }

    /// A block of `len` bytes with anything in it; `None` where there is not enough memory.
    pub(super) fn take(self: &Arc<Heap>, len: u64) -> Result<Option<Block>> {
        let Some(len) = len.max(1).checked_next_multiple_of(ALIGN) else { return Ok(None) };
        let block = |address| Some(Block { address, len, home: self.clone() });
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |s: &Segment| s.free.smallest_that_holds(len);
        let best = segments.iter_mut().filter_map(|s| Some((fits(s)?, s))).min_by_key(|((len, _), _)| *len);
        if let Some(((_, at), segment)) = best {
            segment.free.take(at, len);
            return Ok(block(segment.base + at));
        }
        let used: u64 = segments.iter().map(|s| s.len).sum();
        for want in [self.segment.max(len), len] {
            if used + want > self.limit {
                continue;
            }
            if let Some(base) = self.alloc(want)? {
                let mut free = Ranges::default();
                free.put(0, want);
                free.take(0, len);
                segments.push(Segment { base, len: want, free });
                return Ok(block(base));
            }
        }
        // Segments that nothing lies in make room for one that is large enough.
        let before = segments.len();
        segments.retain(|s| {
            let idle = s.free.holds_all(s.len);
            if idle {
                self.free(s.base);
            }
            !idle
        });
        let used: u64 = segments.iter().map(|s| s.len).sum();
        if segments.len() == before || used + len > self.limit {
            return Ok(None);
        }
        let Some(base) = self.alloc(len)? else { return Ok(None) };
        segments.push(Segment { base, len, free: Ranges::default() });
        Ok(block(base))
    }

    /// Whether bytes of the host lie in this heap.
    pub(super) fn contains(&self, address: u64, len: u64) -> bool {
        let segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.iter().any(|s| address >= s.base && address + len <= s.base + s.len)
    }

    /// Bytes of all segments.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|s| s.len).sum()
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
        for segment in std::mem::take(self.segments.get_mut().unwrap_or_else(PoisonError::into_inner)) {
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
