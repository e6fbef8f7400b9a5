//! Where a trained vocabulary has its special tokens, and what is done with them.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::source::SEPARATOR;

/// Which special tokens a trained vocabulary has, and at which ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLayout {
    /// `<|endoftext|>` has id 0 (and `<unk>` id 1, where the model needs one): all that a language model needs.
    #[default]
    EndOfText,
    /// The ids of CamemBERT's `tokenizer.json`, for models that read its inputs:
    ///
    /// | id | token |
    /// |---|---|
    /// | 0 | `<s>NOTUSED` |
    /// | 1 | `<pad>` |
    /// | 2 | `</s>NOTUSED` |
    /// | 3 | `<unk>` |
    /// | 4 | `<unk>NOTUSED` |
    /// | 5 | `<s>` |
    /// | 6 | `</s>`, which ends a document |
    /// | the last | `<mask>` |
    Camembert,
}

/// How the tokens that are not special came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pieces {
    /// Bytes and what they were merged to: nothing is unknown.
    Bytes,
    /// Characters and strings of them.
    Characters,
}

impl TokenLayout {
    /// The tokens from id 0 on.
    pub(super) fn first(self, pieces: Pieces) -> &'static [&'static str] {
        match (self, pieces) {
            (Self::EndOfText, Pieces::Bytes) => &[SEPARATOR],
            (Self::EndOfText, Pieces::Characters) => &[SEPARATOR, "<unk>"],
            (Self::Camembert, _) => {
                &["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
            }
        }
    }

    /// The tokens behind all others.
    pub(super) fn last(self) -> &'static [&'static str] {
        match self {
            Self::EndOfText => &[],
            Self::Camembert => &["<mask>"],
        }
    }

    /// The number of special tokens.
    pub(super) fn count(self, pieces: Pieces) -> usize {
        self.first(pieces).len() + self.last().len()
    }

    /// The special tokens as a `tokenizer.json` lists them; `vocab_size` counts all tokens.
    pub(super) fn added_tokens(self, pieces: Pieces, vocab_size: usize) -> Value {
        let first = self.first(pieces).iter().copied().enumerate();
        let last_id = vocab_size - self.last().len();
        let last = self.last().iter().enumerate().map(|(index, token)| (last_id + index, *token));
        first
            .chain(last)
            // As CamemBERT's file has it: a token of the vocabulary that no text becomes.
            .filter(|(_, token)| *token != "<unk>NOTUSED")
            .map(|(id, token)| {
                let mask = token == "<mask>";
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    // A mask stands for a word with the space before it.
                    "lstrip": mask,
                    "rstrip": false,
                    "normalized": mask,
                    "special": true,
                })
            })
            .collect()
    }

    /// What puts special tokens around a text that is to have them.
    pub(super) fn post_processor(self) -> Value {
        match self {
            Self::EndOfText => Value::Null,
            Self::Camembert => {
                let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
                let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
                let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
                let (begin, end) = (token("<s>"), token("</s>"));
                json!({
                    "type": "TemplateProcessing",
                    "single": [begin, text("A"), end],
                    "pair": [begin, text("A"), end, end, text("B"), end],
                    "special_tokens": {"<s>": special("<s>", 5), "</s>": special("</s>", 6)},
                })
            }
        }
    }
}
