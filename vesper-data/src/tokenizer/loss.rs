//! Text that a tokenizer has no token for: counted, so that none is lost silently.

use serde_json::Value;
use tokenizers::{Encoding, Tokenizer};

use super::bpe::byte_chars;
use super::encode::Encoded;
use super::offsets;

/// How a tokenizer loses text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// It never does (it falls back on bytes), or it fails aloud.
    Never,
    /// It puts this id in the text's place.
    Unknown(u32),
    /// It leaves the text out: a BPE without an unknown token.
    Dropped,
}

impl Loss {
    pub(super) fn of(tokenizer: &Tokenizer, description: &Value) -> Self {
        let model = &description["model"];
        let has = |token: &str| tokenizer.token_to_id(token).is_some();
        let by_id = model["unk_id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let by_name = || model["unk_token"].as_str().and_then(|token| tokenizer.token_to_id(token));
        if let Some(id) = by_id.or_else(by_name) {
            return Self::Unknown(id);
        }
        if model["type"] != "BPE" {
            return Self::Never;
        }
        let falls_back =
            model["byte_fallback"] == true && (0..=255).all(|byte| has(&format!("<0x{byte:02X}>")));
        let byte_level = [&description["pre_tokenizer"], &description["normalizer"]]
            .into_iter()
            .any(|part| mentions(part, "ByteLevel"));
        if falls_back || (byte_level && byte_chars().iter().all(|char| has(char.encode_utf8(&mut [0; 4])))) {
            Self::Never
        } else {
            Self::Dropped
        }
    }

    pub(super) fn encode(self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Encoded> {
        // Offsets take time and memory, and are needed here only to see what is missing.
        let encoding = match self {
            Self::Dropped => offsets::encode(tokenizer, text)?,
            Self::Never | Self::Unknown(_) => tokenizer.encode_fast(text, false)?,
        };
        Ok(self.counted(text, &encoding))
    }

    /// The ids of an encoding and what is lost; with [`Loss::Dropped`], the encoding must have offsets.
    pub(super) fn counted(self, text: &str, encoding: &Encoding) -> Encoded {
        let ids = encoding.get_ids().to_vec();
        let unknown = match self {
            Self::Never => 0,
            Self::Unknown(unknown) => ids.iter().filter(|&&id| id == unknown).count() as u64,
            Self::Dropped => uncovered(text, encoding),
        };
        Encoded { ids, unknown, loss: None }
    }
}

/// Whether `part` is, or is a sequence that contains, a component of this type.
fn mentions(part: &Value, kind: &str) -> bool {
    match part {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|found| found == kind)
                || fields.values().any(|field| mentions(field, kind))
        }
        Value::Array(parts) => parts.iter().any(|part| mentions(part, kind)),
        _ => false,
    }
}

/// The number of bytes, white space aside, that no token covers.
fn uncovered(text: &str, encoding: &Encoding) -> u64 {
    let mut covered = vec![false; text.len()];
    for &(start, end) in encoding.get_offsets() {
        covered.get_mut(start..end).unwrap_or_default().fill(true);
    }
    text.char_indices()
        .filter(|(_, char)| !char.is_whitespace())
        .filter_map(|(start, char)| covered.get(start..start + char.len_utf8()))
        .flatten()
        .filter(|&&covered| !covered)
        .count() as u64
}
