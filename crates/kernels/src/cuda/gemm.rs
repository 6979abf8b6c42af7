//! What multiplies f32 matrices: a kernel of ours, or cuBLAS where its library is and it was asked for.
//!
//! Ours gives the same bits on every device. cuBLAS is there to be compared with, and for devices that ours does not fill: its
//! order of additions is its own, and changes from version to version.

use std::ffi::CString;

use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys;

use super::driver::Stream;
use super::kernel::SPLIT;
use super::program::{Program, Sgemm};
use super::steps::write_gemm;
use crate::{KernelError, Result, Shape};

/// A way to multiply f32 matrices: into parts of the depth, which are added afterwards.
pub(super) trait Gemm32: Send + Sync {
    /// Parts that a sum over `depth` is cut into.
    fn parts(&self, depth: u32) -> u32;

    /// Writes `A B` or `A^T B`: `a` is the address of [rows, depth], or [depth, rows], of stride `lda`; `out` has room for
    /// [parts, rows, cols].
    fn write(
        &self,
        program: &mut Program,
        transposed: bool,
        sides: (u32, u32, u32),
        a: (u64, u32),
        b: u64,
        out: u64,
    );
}

/// The kernels of `product.cu`.
pub(super) struct Own;

impl Gemm32 for Own {
    fn parts(&self, depth: u32) -> u32 {
        depth.div_ceil(SPLIT)
    }

    fn write(
        &self,
        program: &mut Program,
        transposed: bool,
        sides: (u32, u32, u32),
        a: (u64, u32),
        b: u64,
        out: u64,
    ) {
        write_gemm(program, transposed, sides, a, b, out);
    }
}

/// cuBLAS, whose library is there.
pub(super) struct Cublas;

/// Every symbol of cuBLAS that is called here.
const SYMBOLS: [&str; 5] =
    ["cublasCreate_v2", "cublasDestroy_v2", "cublasSetStream_v2", "cublasSetMathMode", "cublasSgemm_v2"];

impl Cublas {
    pub(super) fn find() -> Option<Cublas> {
        // SAFETY: only opens the library.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        // SAFETY: the library was found above, so this does not panic.
        let library = unsafe { sys::culib() };
        let there = |symbol: &str| {
            let name = CString::new(symbol).unwrap_or_default();
            // SAFETY: the symbol is looked up and not called.
            unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes_with_nul()) }.is_ok()
        };
        SYMBOLS.into_iter().all(there).then_some(Cublas)
    }
}

impl Gemm32 for Cublas {
    fn parts(&self, _: u32) -> u32 {
        1
    }

    fn write(
        &self,
        program: &mut Program,
        transposed: bool,
        (rows, cols, depth): (u32, u32, u32),
        (a, lda): (u64, u32),
        b: u64,
        out: u64,
    ) {
        if rows > 0 && cols > 0 {
            program.sgemm(Sgemm { transposed, rows, cols, depth, a, lda, b, out });
        }
    }
}

/// A handle of cuBLAS on one stream.
pub(super) struct CublasHandle(sys::cublasHandle_t);

// SAFETY: a handle may be used by any thread, by one at a time: it belongs to a lane.
unsafe impl Send for CublasHandle {}

fn check(call: &'static str, result: std::result::Result<(), CublasError>) -> Result<()> {
    result.map_err(|error| KernelError::Device { call, code: 0, message: format!("{:?}", error.0) })
}

impl CublasHandle {
    pub(super) fn new(stream: &Stream) -> Result<CublasHandle> {
        let mut handle = CublasHandle(std::ptr::null_mut());
        // SAFETY: a product by cuBLAS is written only where every symbol was found. The handle is written before it is used,
        // destroyed once, in `drop`, and the stream outlives it: a lane drops it first.
        unsafe {
            check("cublasCreate_v2", sys::cublasCreate_v2(&mut handle.0).result())?;
            check("cublasSetStream_v2", result::set_stream(handle.0, stream.raw().cast()))?;
            let strict = sys::cublasMath_t::CUBLAS_PEDANTIC_MATH;
            check("cublasSetMathMode", sys::cublasSetMathMode(handle.0, strict).result())?;
        }
        Ok(handle)
    }

    /// # Safety
    /// The addresses must be device memory as large as the shapes ask for, until the stream has passed this call.
    pub(super) unsafe fn run(&self, product: &Sgemm) -> Result<()> {
        let Sgemm { transposed, rows, cols, depth, a, lda, b, out } = *product;
        let int = |n: u32| {
            let shape = Shape { rows: rows as usize, cols: depth as usize };
            i32::try_from(n).map_err(|_| KernelError::ShapeOverflow { shape })
        };
        let (m, n, k) = (int(cols)?, int(rows)?, int(depth)?);
        let (as_is, turned) = (sys::cublasOperation_t::CUBLAS_OP_N, sys::cublasOperation_t::CUBLAS_OP_T);
        // Column-major it is C^T = B^T A^T, and what is stored row by row is that transposed.
        let of_a = if transposed { turned } else { as_is };
        // SAFETY: as the caller promises; alpha and beta are read before the call returns.
        check("cublasSgemm_v2", unsafe {
            result::sgemm(
                self.0,
                as_is,
                of_a,
                m,
                n,
                k,
                &1.0,
                b as *const f32,
                m,
                a as *const f32,
                int(lda)?,
                &0.0,
                out as *mut f32,
                m,
            )
        })
    }
}

impl Drop for CublasHandle {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::destroy_handle(self.0) };
        }
    }
}
