//! Why no factors were made.

use kernels::{KernelError, Shape};

/// The result of a factorisation.
pub type Result<T> = std::result::Result<T, LowRankError>;

/// Why no factors were made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LowRankError {
    /// An operation of the engine failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The difference is zero: there is nothing to factor, or to take a share of.
    #[error("a difference of {shape} is zero")]
    ZeroDelta {
        /// The shape of the difference.
        shape: Shape,
    },
    /// Factors of rank 0 were asked for.
    #[error("rank 0 was asked for")]
    RankZero,
    /// A number became NaN or infinite on the way.
    #[error("the {what} of a difference of {shape} is not finite")]
    NotFinite {
        /// The quantity.
        what: &'static str,
        /// The shape of the difference.
        shape: Shape,
    },
    /// An eigenvalue or singular value iteration did not converge.
    #[error("the small decomposition of size {size} did not converge")]
    NoConvergence {
        /// The side of the small matrix.
        size: usize,
    },
    /// A low-rank product does not have the lengths that its shape asks for, or differs in shape from the first.
    #[error("low-rank product {index}: expected {expected} with factors to match")]
    TermShape {
        /// Which product.
        index: usize,
        /// The shape of the difference.
        expected: Shape,
    },
}
