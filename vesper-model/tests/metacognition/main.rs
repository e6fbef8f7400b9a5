//! Error heads, their calibration and files, metrics, and the regulator.

#![allow(clippy::unwrap_used)] // helpers of tests

mod calibration;
mod driver;
mod file;
mod head;
mod metrics;
mod model;
mod predictions;
mod regulator;
