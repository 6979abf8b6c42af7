//! Buffers that are used again: fresh memory costs more than the bytes read into it.

use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that nobody uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Vec<u8>>>);

/// A buffer that goes back to its pool.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Option<Arc<Pool>>,
}

impl Pool {
    /// A buffer of this length with anything in it.
    pub(crate) fn take(self: &Arc<Pool>, len: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is long enough, else the longest, which grows.
        let fits = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        let at = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()));
        let mut bytes = at.map(|at| free.swap_remove(at)).unwrap_or_default();
        drop(free);
        if bytes.len() < len {
            bytes = vec![0; len];
        }
        Buffer { bytes, len, pool: Some(self.clone()) }
    }
}

impl Buffer {
    /// A buffer of no pool.
    pub(crate) fn own(bytes: Vec<u8>) -> Buffer {
        Buffer { len: bytes.len(), bytes, pool: None }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let bytes = std::mem::take(&mut self.bytes);
            pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_fit() {
        let pool = Arc::new(Pool::default());
        let (a, b) = (pool.take(10), pool.take(100));
        assert_eq!((a.as_ref().len(), b.as_ref().len()), (10, 100));
        drop((a, b));
        assert_eq!(pool.take(50).bytes.len(), 100);
        assert_eq!(pool.take(8).bytes.len(), 10);
        assert_eq!(pool.take(200).as_ref().len(), 200);
        assert_eq!(pool.0.lock().unwrap().len(), 2);
    }
}
