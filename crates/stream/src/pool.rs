//! Buffers that are used again: fresh memory costs more than the bytes read into it.
//!
//! Where the engine has memory of its own that weights should lie in, that is taken first.

use std::sync::{Arc, Mutex, PoisonError};

use kernels::{Engine, HostBuffer};

/// Buffers that nobody uses at the moment, and the engine's.
pub(crate) struct Pool<'a> {
    free: Arc<Free>,
    engine: &'a (dyn Fn(usize) -> Option<HostBuffer> + Sync),
}

type Free = Mutex<Vec<Vec<u8>>>;

/// A buffer that goes back to where it came from.
pub(crate) struct Buffer {
    bytes: Bytes,
    len: usize,
}

enum Bytes {
    Own(Vec<u8>),
    Pooled(Vec<u8>, Arc<Free>),
    Engine(HostBuffer),
}

/// Where an engine's buffers come from.
pub(crate) fn buffers_of<E: Engine>(engine: &E) -> impl Fn(usize) -> Option<HostBuffer> + Sync {
    |len| engine.buffer(len)
}

impl<'a> Pool<'a> {
    pub(crate) fn new(engine: &'a (dyn Fn(usize) -> Option<HostBuffer> + Sync)) -> Pool<'a> {
        Pool { free: Arc::default(), engine }
    }

    /// A buffer of this length with anything in it.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        if let Some(bytes) = (self.engine)(len) {
            return Buffer { bytes: Bytes::Engine(bytes), len };
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is long enough, else the longest, which grows.
        let fits = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        let at = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()));
        let mut bytes = at.map(|at| free.swap_remove(at)).unwrap_or_default();
        drop(free);
        if bytes.len() < len {
            bytes = vec![0; len];
        }
        Buffer { bytes: Bytes::Pooled(bytes, self.free.clone()), len }
    }
}

impl Buffer {
    /// A buffer of no pool.
    pub(crate) fn own(bytes: Vec<u8>) -> Buffer {
        Buffer { len: bytes.len(), bytes: Bytes::Own(bytes) }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.bytes {
            Bytes::Own(bytes) | Bytes::Pooled(bytes, _) => bytes.as_mut_slice(),
            Bytes::Engine(bytes) => (**bytes).as_mut(),
        };
        &mut bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        let bytes = match &self.bytes {
            Bytes::Own(bytes) | Bytes::Pooled(bytes, _) => bytes.as_slice(),
            Bytes::Engine(bytes) => (**bytes).as_ref(),
        };
        &bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Bytes::Pooled(bytes, free) = &mut self.bytes {
            free.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_fit() {
        let pool = Pool::new(&|_| None);
        let (a, b) = (pool.take(10), pool.take(100));
        assert_eq!((a.as_ref().len(), b.as_ref().len()), (10, 100));
        drop((a, b));
        let length = |buffer: Buffer| match &buffer.bytes {
            Bytes::Pooled(bytes, _) => bytes.len(),
            _ => 0,
        };
        assert_eq!(length(pool.take(50)), 100);
        assert_eq!(length(pool.take(8)), 10);
        assert_eq!(pool.take(200).as_ref().len(), 200);
        assert_eq!(pool.free.lock().unwrap().len(), 2);
    }

    #[test]
    fn buffers_of_an_engine_come_first() {
        let lend = |len: usize| (len <= 16).then(|| Box::new(vec![7u8; len + 5]) as HostBuffer);
        let pool = Pool::new(&lend);
        let (mut small, large) = (pool.take(16), pool.take(17));
        assert_eq!(small.as_ref(), [7; 16]);
        assert_eq!(small.as_mut().len(), 16);
        assert_eq!(large.as_ref(), [0; 17]);
        drop((small, large));
        assert_eq!(pool.free.lock().unwrap().len(), 1);
    }
}
