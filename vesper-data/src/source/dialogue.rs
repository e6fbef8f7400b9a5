//! Transcripts of conversations, in the layout of the Claire-Dialogue data sets.

use super::Document;
use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::lines::Lines;
use super::settings::too_long;
use crate::error::Result;

/// Turns like `[speaker001:] bonjour`, one a line, with a blank line between conversations.
///
/// Each conversation is a document, as it is: its lines without the last line break, `\n` for `\r\n`.
pub(super) struct Dialogue;

impl Format for Dialogue {
    fn name(&self) -> &'static str {
        "dialogue"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["txt", "text"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let limit = context.settings.max_record();
        let mut reader = Conversations { lines: Lines::new(input, limit), limit, broken: false };
        Ok(Box::new(std::iter::from_fn(move || reader.next_conversation().transpose())))
    }
}

/// Whether a line begins with the name of a speaker: `[speaker001:]`, `[Mme Dupont:]`.
pub(super) fn is_turn(line: &str) -> bool {
    line.strip_prefix('[')
        .and_then(|rest| rest.split_once(":]"))
        .is_some_and(|(name, _)| !name.is_empty() && name.len() <= 80 && !name.contains(['[', ']']))
}

struct Conversations {
    lines: Lines,
    limit: usize,
    /// Whether the lines up to the next blank one belong to a broken record.
    broken: bool,
}

impl Conversations {
    fn next_conversation(&mut self) -> Result<Option<Document>> {
        let mut text = String::new();
        let mut start = 0;
        loop {
            let line = match self.lines.next_text_line() {
                Ok(line) => line,
                Err(error) if error.is_broken_record() && self.broken => continue,
                Err(error) => {
                    self.broken = error.is_broken_record();
                    return Err(error);
                }
            };
            let end = line.is_none();
            let line = line.unwrap_or_default();
            let blank = line.trim().is_empty();
            if blank && !text.is_empty() {
                text.truncate(text.trim_end_matches('\n').len());
                return Ok(Some(Document { text, path: self.lines.path().clone(), line: start, loss: None }));
            }
            if end {
                return Ok(None);
            }
            self.broken &= !blank;
            if blank || self.broken {
                continue;
            }
            if text.is_empty() {
                start = self.lines.number();
            }
            if text.len() + line.len() > self.limit {
                self.broken = true;
                return Err(self.lines.broken(start, too_long("conversation", self.limit)));
            }
            text.push_str(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_begin_with_a_name_in_brackets() {
        for line in ["[speaker001:] oui", "[Mme Dupont:]\n", "[spk1:] [rire]"] {
            assert!(is_turn(line), "{line}");
        }
        for line in ["", "[Illustration]", "speaker001: oui", "[:] a", "[a] b [c:]", " [a:] b"] {
            assert!(!is_turn(line), "{line}");
        }
    }
}
