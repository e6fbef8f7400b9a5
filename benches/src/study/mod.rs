//! The studies. Of the optimizer: one model, one text, many ways to update it, each with the same budget for its
//! learning rate.
//!
//! [`arm`] names the ways, [`task`] trains one model one way, [`plan`] decides which runs are made, [`report`]
//! prints them; [`shared`] has the flags of all. [`activation`] is the study of the activations, on the same task.

pub mod activation;
pub mod arm;
pub mod parts;
pub mod plan;
pub mod report;
pub mod shared;
pub mod task;
