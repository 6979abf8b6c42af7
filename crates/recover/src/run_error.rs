//! Why a method that runs a model gave nothing.

use transformer::{ModelError, Row};

/// Why a method that runs a model gave nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A kind of rows is empty.
    #[error("there are no {0} rows")]
    NoRows(&'static str),
    /// A row lacks one of its two parts.
    #[error("{what} row {row} has no {part}")]
    EmptyRow {
        /// Kind of rows.
        what: &'static str,
        /// Which row, counted from 1.
        row: usize,
        /// `prompt` or `answer`.
        part: &'static str,
    },
    /// An option makes no sense.
    #[error("`{name}` is {value}; it must be {need}")]
    Setting {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        need: &'static str,
    },
    /// No module is left to work on.
    #[error("there is no module to train or to measure")]
    NoModule,
    /// Values of another number than the shapes ask for.
    #[error("module `{module}`: {what} has {found} values, {need} are needed")]
    Size {
        /// Module name.
        module: String,
        /// Which operand.
        what: &'static str,
        /// Values needed.
        need: usize,
        /// Values found.
        found: usize,
    },
    /// A module whose inputs were not measured.
    #[error("module `{module}`: its inputs on the {what} rows were not measured")]
    NotMeasured {
        /// Module name.
        module: String,
        /// Kind of rows.
        what: &'static str,
    },
    /// An operand holds a NaN or an infinity.
    #[error("module `{module}`: {what} holds a number that is not finite")]
    NotFinite {
        /// Module name.
        module: String,
        /// Which operand.
        what: &'static str,
    },
    /// The Gram matrix has no inverse.
    #[error("module `{module}`: the Gram matrix of its inputs is singular at damping {damping}")]
    Singular {
        /// Module name.
        module: String,
        /// Share of the mean diagonal that was added.
        damping: f64,
    },
    /// A decomposition did not converge.
    #[error("module `{module}`: the decomposition of {what} does not converge")]
    NoConvergence {
        /// Module name.
        module: String,
        /// Which matrix.
        what: &'static str,
    },
    /// Told to stop.
    #[error("interrupted")]
    Stopped,
    /// A loss left the finite numbers.
    #[error("the loss on the {what} rows is not finite at step {step}")]
    Diverged {
        /// Kind of rows.
        what: &'static str,
        /// Optimiser steps made before.
        step: usize,
    },
}

impl From<candle_core::Error> for RunError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.into())
    }
}

impl RunError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(e) => e.hint(),
            Self::NoRows("safety") => Some("harmful prompts, each with a refusal, are needed".into()),
            Self::NoRows("task") => Some("the limit on KL is measured on rows of the target's task".into()),
            Self::NotFinite { .. } => Some("are the model's weights sound?".into()),
            Self::Singular { .. } => Some("use more rows, or a larger damping (0.01 is the default)".into()),
            Self::Diverged { step: 0, .. } => Some("are the model's weights sound?".into()),
            Self::Diverged { .. } => Some("use a smaller learning rate".into()),
            _ => None,
        }
    }

    pub(crate) fn check_rows(what: &'static str, rows: &[Row]) -> Result<(), Self> {
        if rows.is_empty() {
            return Err(Self::NoRows(what));
        }
        for (i, row) in rows.iter().enumerate() {
            for (part, ids) in [("prompt", &row.prompt), ("answer", &row.answer)] {
                if ids.is_empty() {
                    return Err(Self::EmptyRow { what, row: i + 1, part });
                }
            }
        }
        Ok(())
    }

    pub(crate) fn check_positive(name: &'static str, value: f64) -> Result<(), Self> {
        if value > 0.0 && value.is_finite() {
            Ok(())
        } else {
            Err(Self::Setting { name, value, need: "a positive number" })
        }
    }

    pub(crate) fn check_not_negative(name: &'static str, value: f64) -> Result<(), Self> {
        if value >= 0.0 && value.is_finite() {
            Ok(())
        } else {
            Err(Self::Setting { name, value, need: "a number that is not negative" })
        }
    }

    pub(crate) fn check_finite(module: &str, what: &'static str, values: &[f32]) -> Result<(), Self> {
        if values.iter().all(|v| v.is_finite()) {
            Ok(())
        } else {
            Err(Self::NotFinite { module: module.into(), what })
        }
    }

    pub(crate) fn check_size(
        module: &str,
        what: &'static str,
        need: usize,
        found: usize,
    ) -> Result<(), Self> {
        if need == found { Ok(()) } else { Err(Self::Size { module: module.into(), what, need, found }) }
    }
}
