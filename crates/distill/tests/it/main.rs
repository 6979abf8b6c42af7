//! Calibration on a small random decoder, against an exhaustive search.

mod calibrate;
