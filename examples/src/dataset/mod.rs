//! What the program `data` does: text to caches, numbers about them, samples, plans.

pub mod access;
pub mod clean;
pub mod flags;
pub mod plan;
pub mod sample;
pub mod stats;
