//! French text: one typography instead of many, and the speakers of dialogues.
//!
//! French uses characters that are written in several ways: `l'été` and `l’été`, `« oui »` with three kinds of spaces,
//! `é` as one character or as two. To a tokenizer these are different words. [`Cleanup`] makes one of them, rule by
//! rule; each rule is optional, and the default ones lose nothing that a reader would miss.

mod cleanup;
mod rules;
mod speakers;

pub use cleanup::{
    Apostrophes, Cleanup, Composition, Dashes, Ellipses, Invisible, Ligatures, Quotes, Spaces,
};
pub use speakers::{renumber_speakers, speakers};
