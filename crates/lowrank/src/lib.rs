//! Low-rank factors of a difference of weights, and what they are worth.
//!
//! [`factor`] finds factors of a difference that an engine holds, [`factor_factors`] of one that is itself a sum of
//! low-rank products. [`certify`] and [`certify_factors`] measure the factors as they are stored, in f64, next to a
//! bound that no factorisation of the rank can exceed and to the noise that rounding leaves.
//!
//! Every share is one of squared Frobenius norms. The same difference, key and options give the same bits.
//!
//! A rank is given, or chosen: by the residual it leaves, or by what stands out of the rounding noise.
//!
//! Not here: files, formats of factors, and a budget over many differences.

mod certificate;
mod error;
mod factors;
mod small;
mod subspace;

pub use certificate::{Certificate, NOISE_RELIABLE, certify};
pub use error::{LowRankError, Result};
pub use factors::{Term, certify_factors, factor_factors};
pub use subspace::{Factor, LowRank, Rank, factor};
