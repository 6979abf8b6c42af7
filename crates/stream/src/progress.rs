//! What a stream tells while it runs. It tells; somebody else shows.

/// Hears how far a stream has come. Calls come in order, from one thread.
pub trait Progress: Send + Sync {
    /// A stage begins that will pass `total_bytes`.
    fn stage(&self, name: &str, total_bytes: u64);

    /// `bytes` more are done; `item` is the tensor they belonged to.
    fn advance(&self, bytes: u64, item: &str);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64, _: &str) {}
}
