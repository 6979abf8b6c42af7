//! The options of all methods under one name each, as a command line or a comparison gives them.
//!
//! A method takes what it knows and refuses the rest, so that an option never goes unheard.

use crate::error::{RecoverError, Result};

/// Options; what is `None` has the method's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// How strongly safety is added.
    pub gamma: Option<f64>,
    /// The share of the target.
    pub lambda: Option<f64>,
    /// The probability with which an element of a task's change is dropped.
    pub drop: Option<f64>,
    /// The seed of what is random.
    pub seed: Option<u64>,
    /// A rank.
    pub rank: Option<usize>,
    /// How far alignment is extrapolated.
    pub coefficient: Option<f64>,
    /// The cosine up to which a module is changed.
    pub tau: Option<f64>,
    /// How many modules are changed, instead of a cosine.
    pub modules: Option<usize>,
    /// The share of the safety adapter.
    pub weight: Option<f64>,
    /// Which form of the method.
    pub variant: Option<String>,
    /// The scale of a budget.
    pub s: Option<f64>,
    /// What `s` is a multiple of.
    pub budget: Option<String>,
    /// What is added to the diagonal of a Gram matrix, as a share of its mean.
    pub damping: Option<f64>,
    /// How many rows the inputs of modules are measured on.
    pub samples: Option<usize>,
    /// The largest learning rate.
    pub rate: Option<f64>,
    /// Optimiser steps.
    pub steps: Option<usize>,
    /// Rows of a step.
    pub rows: Option<usize>,
    /// The limit on KL, nat per token.
    pub max_kl: Option<f64>,
    /// The safety loss that is enough, nat per token.
    pub delta: Option<f64>,
    /// How many directions of safety are kept out of.
    pub safety_rank: Option<usize>,
}

/// Settings that a method takes its options out of.
pub(crate) struct Taking {
    method: &'static str,
    pub(crate) left: Settings,
}

impl Taking {
    pub(crate) fn new(method: &'static str, settings: &Settings) -> Taking {
        Taking { method, left: settings.clone() }
    }

    /// Refuses what no method of this name knows.
    pub(crate) fn finish(self) -> Result<()> {
        let Settings {
            gamma,
            lambda,
            drop,
            seed,
            rank,
            coefficient,
            tau,
            modules,
            weight,
            variant,
            s,
            budget,
            damping,
            samples,
            rate,
            steps,
            rows,
            max_kl,
            delta,
            safety_rank,
        } = &self.left;
        let given = [
            ("gamma", gamma.is_some()),
            ("lambda", lambda.is_some()),
            ("drop", drop.is_some()),
            ("seed", seed.is_some()),
            ("rank", rank.is_some()),
            ("coefficient", coefficient.is_some()),
            ("tau", tau.is_some()),
            ("modules", modules.is_some()),
            ("weight", weight.is_some()),
            ("variant", variant.is_some()),
            ("s", s.is_some()),
            ("budget", budget.is_some()),
            ("damping", damping.is_some()),
            ("samples", samples.is_some()),
            ("rate", rate.is_some()),
            ("steps", steps.is_some()),
            ("rows", rows.is_some()),
            ("max-kl", max_kl.is_some()),
            ("delta", delta.is_some()),
            ("safety-rank", safety_rank.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((option, _)) => Err(RecoverError::UnusedOption { method: self.method, option }),
        }
    }

    /// A number that has to be one of `allowed`.
    pub(crate) fn number(
        &self,
        option: &'static str,
        given: Option<f64>,
        default: f64,
        allowed: &'static str,
        is_allowed: impl Fn(f64) -> bool,
    ) -> Result<f64> {
        let value = given.unwrap_or(default);
        // NaN is never allowed.
        if value.is_finite() && is_allowed(value) {
            Ok(value)
        } else {
            Err(self.refuse(option, value, allowed))
        }
    }

    /// A count above 0 and up to 4096.
    pub(crate) fn count(&self, option: &'static str, given: Option<usize>, default: usize) -> Result<usize> {
        match given.unwrap_or(default) {
            count @ 1..=4096 => Ok(count),
            count => Err(self.refuse(option, count, "a number from 1 to 4096")),
        }
    }

    /// A count above 0 and up to a million.
    pub(crate) fn many(&self, option: &'static str, given: Option<usize>, default: usize) -> Result<usize> {
        match given.unwrap_or(default) {
            count @ 1..=1_000_000 => Ok(count),
            count => Err(self.refuse(option, count, "a number from 1 to 1000000")),
        }
    }

    pub(crate) fn refuse(
        &self,
        option: &'static str,
        value: impl ToString,
        allowed: &'static str,
    ) -> RecoverError {
        let value = checkpoint::printable(&value.to_string());
        RecoverError::Option { method: self.method, option, value, allowed }
    }
}
