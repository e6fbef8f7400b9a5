//! The program `chat`: a terminal interface, and a plain mode for pipes, over one [`writer::Writer`].

pub mod app;
pub mod command;
pub mod engine;
pub mod input;
pub mod keys;
pub mod load;
pub mod memory;
pub mod plain;
pub mod settings;
pub mod transcript;
pub mod ui;
pub mod view;
pub mod wrap;
pub mod writer;
