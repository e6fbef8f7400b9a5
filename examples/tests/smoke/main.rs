//! The examples as their users run them: real programs, small settings, what they write and how they fail.
//!
//! `cargo test` builds the examples first. Tests of real data need the folder that `VESPER_DATA` names.

#![allow(clippy::unwrap_used)] // helpers of tests

mod benchmark;
mod chat;
mod commands;
mod data;
mod export;
mod finetune;
mod interface;
mod metacognition;
mod program;
mod quantize;
mod resume;
mod storage;
mod terminal;
mod train;
mod wrong_inputs;
