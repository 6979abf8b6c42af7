//! Memory of the host that the device reads from and writes to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::memory::Block;
use super::program::Program;
use crate::{KernelError, Result};

/// Memory of the host that results come to.
pub(super) struct Landing {
    pub(super) block: Option<Block>,
    pub(super) own: Box<[AtomicU64]>,
    pub(super) len: usize,
    pub(super) done: Arc<AtomicBool>,
}

impl Landing {
    pub(super) fn address(&self) -> u64 {
        self.block.as_ref().map_or(self.own.as_ptr() as u64, |block| block.address)
    }

    /// Writes down that it is filled from the device.
    pub(super) fn fill(self: &Arc<Landing>, program: &mut Program, from: u64) {
        // Nothing is nothing to wait for, and no step.
        self.done.store(self.len == 0, Ordering::Release);
        program.keep(self);
        program.promise(&self.done);
        program.download(from, self.address(), self.len as u64);
    }

    /// What came; an error if the program that was to bring it failed, or is not done.
    pub(super) fn bytes(&self) -> Result<&[u8]> {
        if !self.done.load(Ordering::Acquire) {
            let message = "an earlier one of the same work failed".to_owned();
            return Err(KernelError::Device { call: "cuMemcpyDtoHAsync_v2", code: 0, message });
        }
        // SAFETY: the block, or what is there instead, has at least `len` bytes, which the finished program wrote, and
        // which no program writes again.
        Ok(unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.len) })
    }
}

/// Pinned memory that weights are read into.
pub(super) struct Pinned {
    pub(super) block: Block,
    pub(super) len: usize,
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the block has at least `len` bytes, which the system gave out as zeros, and is borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.block.address as *const u8, self.len) }
    }
}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` says that nobody else borrows it.
        unsafe { std::slice::from_raw_parts_mut(self.block.address as *mut u8, self.len) }
    }
}
