//! Chat templates against `transformers`, conversations against a context, and what is wrong with files.
#![allow(clippy::unwrap_used, reason = "a test stops there")]

mod conversation;
mod files;
mod golden;
mod refused;
