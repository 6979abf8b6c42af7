//! Dense algebra on l x l matrices, on the host, in f64.

use faer::{Mat, MatRef};

use crate::{LowRankError, Result};

/// Eigenvalues, largest first, and the eigenvectors as columns.
pub(crate) struct Eigen {
    pub(crate) values: Vec<f64>,
    vectors: Mat<f64>,
}

impl Eigen {
    /// Of a symmetric row-major `l` x `l` matrix of finite numbers.
    pub(crate) fn new(matrix: &[f64], l: usize) -> Result<Eigen> {
        let eigen = MatRef::from_row_major_slice(matrix, l, l)
            .self_adjoint_eigen(faer::Side::Lower)
            .map_err(|_| LowRankError::NoConvergence { size: l })?;
        let values = (0..l).rev().map(|i| eigen.S()[i]).collect();
        Ok(Eigen { values, vectors: Mat::from_fn(l, l, |i, j| eigen.U()[(i, l - 1 - j)]) })
    }

    /// The first `count` eigenvectors, row-major, each row i times `row(i)` and each column j times `col(j)`.
    pub(crate) fn scaled(
        &self,
        count: usize,
        row: impl Fn(usize) -> f64,
        col: impl Fn(usize) -> f64,
    ) -> Vec<f64> {
        let l = self.values.len();
        (0..l * count)
            .map(|at| (at / count, at % count))
            .map(|(i, j)| row(i) * self.vectors[(i, j)] * col(j))
            .collect()
    }
}

/// The eigenvectors of a Gram matrix of columns brought to unit length, and with them the way to an orthonormal basis.
/// Unit length first: the eigenvalues are then about directions, not about how long a column is.
pub(crate) struct Directions {
    /// What each column is multiplied by.
    inverse: Vec<f64>,
    eigen: Eigen,
}

impl Directions {
    /// Of the columns whose Gram matrix this is.
    pub(crate) fn new(gram: &[f64], l: usize) -> Result<Directions> {
        let inverse: Vec<f64> = (0..l)
            .map(|i| gram[i * l + i])
            .map(|square| if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 })
            .collect();
        let unit: Vec<f64> = (0..l * l).map(|at| gram[at] * inverse[at / l] * inverse[at % l]).collect();
        let eigen = Eigen::new(&unit, l)?;
        Ok(Directions { inverse, eigen })
    }

    /// The eigenvalues above a share of the largest, largest first.
    pub(crate) fn above(&self, share: f64) -> &[f64] {
        let cut = self.eigen.values.first().copied().unwrap_or(0.0).max(0.0) * share;
        let count = self.eigen.values.iter().take_while(|&&value| value > cut).count();
        &self.eigen.values[..count]
    }

    /// `T` (row-major, `count` columns), such that `Y T` has orthonormal columns.
    pub(crate) fn to_basis(&self, count: usize) -> Vec<f64> {
        self.eigen.scaled(count, |i| self.inverse[i], |j| 1.0 / self.eigen.values[j].sqrt())
    }
}

/// `W` (row-major) and its column count, such that `Y W` has orthonormal columns and spans what `Y` spans, from the
/// Gram matrix of `Y`. Directions that vanish to rounding are dropped.
pub(crate) fn whitening(gram: &[f64], l: usize) -> Result<(Vec<f64>, usize)> {
    let directions = Directions::new(gram, l)?;
    // A Gram matrix in f64 knows eigenvalues down to about l epsilons of the largest.
    let kept = directions.above(4.0 * l as f64 * f64::EPSILON).len();
    Ok((directions.to_basis(kept), kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitening_of_dependent_and_zero_columns() {
        // Columns x, 1000 y, x + y, 0 of orthonormal x and y.
        let columns: [[f64; 2]; 4] = [[1.0, 0.0], [0.0, 1000.0], [1.0, 1.0], [0.0, 0.0]];
        let gram: Vec<f64> = (0..16)
            .map(|at| (columns[at / 4], columns[at % 4]))
            .map(|(a, b)| a[0] * b[0] + a[1] * b[1])
            .collect();
        let (w, kept) = whitening(&gram, 4).unwrap();
        assert_eq!(kept, 2);
        for i in 0..2 {
            for j in 0..2 {
                let dot: f64 = (0..16).map(|at| w[at / 4 * 2 + i] * gram[at] * w[at % 4 * 2 + j]).sum();
                let want = f64::from(u8::from(i == j));
                assert!((dot - want).abs() < 1e-12, "{i},{j}: {dot}"); // a few roundings of numbers near 1
            }
        }
    }
}
