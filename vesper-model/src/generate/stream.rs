//! Turning ids into text while they are still coming.

use tokenizers::Tokenizer;

use crate::{ModelError, Result};

/// Whether special tokens such as `</s>` appear in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpecialTokens {
    /// They are left out.
    #[default]
    Skip,
    /// They appear as they are written.
    Keep,
}

/// Decodes ids one by one into pieces of complete text.
///
/// A token can be part of a character, and what a token means can depend on its neighbours: a sentencepiece
/// decoder drops the space that begins a text, and turns a run of byte tokens (`<0xE2><0x82><0xAC>`) into
/// characters only if the whole run is valid. So a piece is given out only when no later token can change it:
///
/// ```text
/// piece_1 + piece_2 + ... + flush = tokenizer.decode(ids)
/// ```
///
/// Only the last few ids are decoded again for each new one, not the whole text. The equation holds for decoders
/// in which a token does not rewrite text to the left of its own character or byte run: byte-level BPE,
/// sentencepiece (metaspace, byte fallback), WordPiece, BPE with suffixes.
///
/// # Examples
/// ```
/// use tokenizers::Tokenizer;
/// use vesper_model::generate::TokenStream;
///
/// // A byte-level vocabulary in which the two bytes of "é" are two tokens.
/// let tokenizer: Tokenizer = r#"{"added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false,
///     "trim_offsets": true, "use_regex": true}, "model": {"type": "BPE", "vocab": {"t": 0, "Ã": 1, "©": 2},
///     "merges": []}}"#.parse().expect("a tokenizer");
/// let mut stream = TokenStream::new(&tokenizer);
/// assert_eq!(stream.push(1)?, None);
/// assert_eq!(stream.push(2)?.as_deref(), Some("é"));
/// assert_eq!(stream.push(0)?.as_deref(), Some("t"));
/// assert_eq!(stream.flush()?, None);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    special: SpecialTokens,
    /// The ids whose text is not all given out, after some whose text is: their neighbours on the left.
    window: Vec<u32>,
    /// How many ids of the window came before the last time that everything was given out.
    settled: usize,
    /// What is given out of the window's text.
    shown: String,
}

impl<'a> TokenStream<'a> {
    /// A stream at the beginning of a text. Leaves special tokens out.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            special: SpecialTokens::default(),
            window: Vec::new(),
            settled: 0,
            shown: String::new(),
        }
    }

    /// Sets whether special tokens appear in the text.
    pub fn with_special_tokens(mut self, special: SpecialTokens) -> Self {
        self.special = special;
        self
    }

    /// Continues a text that is already shown, usually the prompt's: its text is not given out again, and a word
    /// that begins the continuation keeps its space. A character that the context leaves open is given out when it
    /// is complete.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer cannot decode the ids.
    pub fn with_context(mut self, ids: &[u32]) -> Result<Self> {
        for &id in ids {
            self.push(id)?;
        }
        let text = self.decode(&self.window)?;
        let open = !self.spells_replacement();
        let shown = if open { text.trim_end_matches(char::REPLACEMENT_CHARACTER) } else { &text };
        shown.clone_into(&mut self.shown);
        Ok(self)
    }

    /// Takes one id and gives the text that it completes, if any. Ids that the tokenizer does not know have none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer cannot decode the ids.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        if !self.accept(id) {
            return Ok(None);
        }
        let Some(text) = self.stable_text()? else { return Ok(None) };
        let piece = self.unseen(text.stable());
        self.settle(&text)?;
        Ok((!piece.is_empty()).then_some(piece))
    }

    /// Gives the rest of the text, with replacement characters for bytes that never became one. The next id
    /// begins a new text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer cannot decode the ids.
    pub fn flush(&mut self) -> Result<Option<String>> {
        let rest = self.unseen(&self.decode(&self.window)?);
        self.window.clear();
        self.shown.clear();
        self.settled = 0;
        Ok((!rest.is_empty()).then_some(rest))
    }

    /// What of the window's text is not given out. What was given out begins it, save where a byte run that the
    /// context left open turns out to be invalid.
    fn unseen(&self, text: &str) -> String {
        let mut rest = text.chars();
        for shown in self.shown.chars() {
            if !rest.as_str().starts_with(shown) {
                break;
            }
            rest.next();
        }
        rest.as_str().to_owned()
    }

    /// Whether the id has any text. The others are left out of the window as the tokenizer leaves them out, so
    /// that a decoder never sees an empty list of tokens: some decoders panic at that.
    fn accept(&mut self, id: u32) -> bool {
        let accepted = self.tokenizer.id_to_token(id).is_some_and(|token| {
            self.special == SpecialTokens::Keep
                || !self.tokenizer.get_added_vocabulary().is_special_token(&token)
        });
        if accepted {
            self.window.push(id);
        }
        accepted
    }

    /// Whether the last tokens are a replacement character of the text itself, rather than bytes that are none yet.
    fn spells_replacement(&self) -> bool {
        let last = self.window.get(self.window.len().saturating_sub(3)..).unwrap_or_default();
        let tail: String = last.iter().filter_map(|&id| self.tokenizer.id_to_token(id)).collect();
        // As it is, in the letters of a byte-level vocabulary, and in byte tokens.
        ["\u{fffd}", "\u{ef}\u{bf}\u{bd}", "<0xEF><0xBF><0xBD>"]
            .iter()
            .any(|spelling| tail.ends_with(spelling))
    }

    /// The window's text, unless a later token could change more of it than its last character.
    fn stable_text(&self) -> Result<Option<Text>> {
        let ends_in_byte = self
            .window
            .last()
            .and_then(|&id| self.tokenizer.id_to_token(id))
            .is_some_and(|token| is_byte(&token));
        if ends_in_byte {
            return Ok(None);
        }
        let text = self.decode(&self.window)?;
        // One unfinished character shows as one replacement character; those before it are there to stay.
        let stable = text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(&text).len();
        Ok(Some(Text { text, stable }))
    }

    /// Notes what is given out, and forgets the ids that can no longer matter.
    fn settle(&mut self, text: &Text) -> Result<()> {
        text.stable().clone_into(&mut self.shown);
        if text.stable < text.text.len() {
            return Ok(());
        }
        // The ids since the last settling stay, as the neighbours of those to come. If they have no text (a lone
        // space that a decoder strips), the decoder could still take what follows for the beginning of a text.
        let neighbours = self.decode(self.window.get(self.settled..).unwrap_or_default())?;
        if !neighbours.is_empty() {
            self.window.drain(..self.settled);
            self.shown = neighbours;
        }
        self.settled = self.window.len();
        Ok(())
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        if ids.is_empty() {
            return Ok(String::new());
        }
        self.tokenizer.decode(ids, false).map_err(|error| ModelError::Tokenizer(error.to_string()))
    }
}

struct Text {
    text: String,
    stable: usize,
}

impl Text {
    fn stable(&self) -> &str {
        self.text.get(..self.stable).unwrap_or_default()
    }
}

/// Whether a token stands for one byte, as sentencepiece writes it: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}
