//! Text in whole graphemes, up to a stop string.

use unicode_segmentation::UnicodeSegmentation;

use crate::{ModelError, Result};

/// Lets text through in pieces that end where a grapheme ends, until it comes to a stop string.
///
/// A grapheme is what a reader takes for one character: `é` as `e` and an accent, a flag, a family of emoji. Its end is known
/// only when the next one begins, so the last grapheme is withheld, and with it whatever may still become a stop string.
///
/// The stop string that is complete first counts, of several the longest. It is looked for character by character, so
/// that what the text comes to depends on no division into tokens; it may begin or end inside of a grapheme, where the text
/// ends then.
///
/// # Examples
/// ```
/// use vesper_model::generate::StopStrings;
///
/// let mut stops = StopStrings::new(["\nUser:"])?;
/// assert_eq!(stops.push("Yes.").text, "Yes"); // an accent could follow the full stop
/// assert_eq!(stops.push("\nUs").text, "."); // the rest may become a stop string
/// assert_eq!(stops.push("ually").text, "\nUsuall");
/// let end = stops.push(" so.\nUser: why?");
/// assert_eq!((end.text.as_str(), end.stop.as_deref()), ("y so.", Some("\nUser:")));
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// Unicode Standard Annex 29, [grapheme cluster boundaries](https://www.unicode.org/reports/tr29/).
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// What came and was not let through.
    withheld: String,
}

/// What [`StopStrings`] lets through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// The next text, perhaps empty.
    pub text: String,
    /// The stop string that ends it.
    pub stop: Option<String>,
}

impl StopStrings {
    /// `stops`: the strings that end a text; without any, text comes in whole graphemes and goes on.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] for an empty string.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Result<Self> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(empty_stop());
        }
        Ok(Self { stops, withheld: String::new() })
    }

    /// The strings that end a text.
    pub(super) fn strings(&self) -> &[String] {
        &self.stops
    }

    /// Takes text and gives what can no longer change. After a stop string begins a new text.
    pub fn push(&mut self, text: &str) -> Piece {
        self.withheld.push_str(text);
        if let Some(end) = self.stopped() {
            return end;
        }
        let withheld = &self.withheld;
        let possible = withheld.char_indices().map(|(at, _)| at).find(|&at| {
            let rest = withheld.get(at..).unwrap_or_default();
            self.stops.iter().any(|stop| stop.starts_with(rest))
        });
        let limit = possible.unwrap_or(withheld.len());
        // Where each grapheme begins the one before it has ended; the last has not, unless it is closed.
        let last = withheld.graphemes(true).next_back().is_some_and(is_closed).then_some(withheld.len());
        let ends = withheld.grapheme_indices(true).map(|(at, _)| at).chain(last);
        let end = ends.take_while(|&end| end <= limit).last().unwrap_or(0);
        Piece { text: self.withheld.drain(..end).collect(), stop: None }
    }

    /// Gives the rest of the text, at its end. The next begins a new text.
    pub fn flush(&mut self) -> Piece {
        Piece { text: std::mem::take(&mut self.withheld), stop: None }
    }

    /// What is left before the first stop string, if there is one.
    fn stopped(&mut self) -> Option<Piece> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.withheld.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        let (_, start, stop) = found.min()?;
        let stop = stop.clone();
        let mut text = std::mem::take(&mut self.withheld);
        text.truncate(start);
        Some(Piece { text, stop: Some(stop) })
    }
}

/// Whether nothing that follows can belong to this grapheme: so it is after control characters, save a carriage return
/// that a line feed follows.
fn is_closed(grapheme: &str) -> bool {
    grapheme.ends_with(char::is_control) && grapheme != "\r"
}

pub(super) fn empty_stop() -> ModelError {
    ModelError::InvalidGeneration {
        field: "stop_strings",
        got: "an empty string".into(),
        expected: "strings of at least one character",
    }
}
