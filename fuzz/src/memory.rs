//! How much memory a reader takes for its input.
//!
//! Counts what the thread itself allocates; other threads are not seen. Overhead of the system's allocator does not
//! count.
//!
//! Not here: stopping an allocation that is too large; it is reported once the reader is done.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Bytes that a reader may hold at once whatever its input: buffers for hashing and reading, compiled patterns.
pub const PEAK_BYTES: usize = 64 << 20;
/// Bytes that it may hold for each byte of its input beyond that: trees of parsed JSON, one unit for each expert.
pub const PEAK_PER_BYTE: usize = 512;

struct Counting;

thread_local! {
    /// Bytes that this thread holds, and the most that it held.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // A thread that is ending has no count any more, and nobody asks for it.
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, held.get().1.max(now)));
    });
}

// SAFETY: every call goes to `System` with its own arguments, whose contract is the same; counting touches a `Cell` of
// the thread that has no destructor and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `block` came from `System` with this layout, as the caller says.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // Both may be held while the values move.
        count(bytes as isize);
        count(-(layout.size() as isize));
        // SAFETY: `block` came from `System` with this layout, and `bytes` is a size, as the caller says.
        unsafe { System.realloc(block, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs a reader of `input_bytes` bytes. Panics if it held more than it may.
#[track_caller]
pub(crate) fn bounded<T>(input_bytes: usize, read: impl FnOnce() -> T) -> T {
    let (before, _) = HELD.get();
    HELD.set((before, before));
    let out = read();
    let peak = (HELD.get().1 - before) as usize;
    let limit = PEAK_BYTES + PEAK_PER_BYTE * input_bytes;
    assert!(peak <= limit, "{peak} bytes were held for an input of {input_bytes}, at most {limit} may be");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_sees_what_was_held_and_given_back() {
        bounded(0, || drop(vec![0u8; PEAK_BYTES]));
        let over = std::panic::catch_unwind(|| bounded(0, || drop(vec![0u8; PEAK_BYTES + 1])));
        assert!(over.is_err());
    }
}
