//! GGUF files: a model with its tokenizer and settings in one file.

mod architecture;
mod file;
mod header;
mod names;
mod reader;
mod rope_freqs;
mod save;

pub use file::Gguf;
pub use save::{GgufExtras, save};

use std::path::Path;

use crate::ModelError;

/// As [`hf::invalid`](crate::hf::invalid), in one line: names and texts of a damaged file may hold anything.
fn invalid(path: &Path, reason: impl AsRef<str>) -> ModelError {
    let escaped = |text: String, c: char| {
        if c.is_control() {
            text + &c.escape_default().to_string()
        } else {
            text + c.encode_utf8(&mut [0; 4])
        }
    };
    crate::hf::invalid(path, reason.as_ref().chars().fold(String::new(), escaped))
}

/// The keys of the metadata that this crate writes and reads.
mod keys {
    pub(super) const ARCHITECTURE: &str = "general.architecture";
    pub(super) const NAME: &str = "general.name";
    pub(super) const ALIGNMENT: &str = "general.alignment";
    pub(super) const FILE_TYPE: &str = "general.file_type";
    pub(super) const QUANTIZATION_VERSION: &str = "general.quantization_version";
    /// `config.json`
    pub(super) const CONFIG: &str = "vesper.config";
    /// `generation_config.json`
    pub(super) const GENERATION: &str = "vesper.generation_config";
    /// `tokenizer.json`
    pub(super) const TOKENIZER: &str = "tokenizer.huggingface.json";
    /// The special tokens of `tokenizer_config.json` by the names that templates know them by.
    pub(super) const SPECIAL_TOKENS: &str = "tokenizer.huggingface.special_tokens";
    pub(super) const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
    pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
    pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
}

/// How a GGUF file begins.
const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written.
const VERSION: u32 = 3;
/// Where tensors begin, where a file does not say so.
const ALIGNMENT: u64 = 32;
/// The architecture of a model that other programs know, too.
const LLAMA: &str = "llama";
/// The architecture of any other.
const VESPER: &str = "vesper";
