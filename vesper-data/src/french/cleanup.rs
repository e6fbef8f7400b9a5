//! Which typographic rules are applied to a text.

use std::borrow::Cow;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::rules;
use crate::source::Document;

/// Characters that one does not see: soft hyphens (U+00AD), zero-width spaces (U+200B), word joiners (U+2060) and byte
/// order marks inside of the text (U+FEFF). Joiners between characters (U+200C, U+200D), which emoji and other scripts
/// need, are never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Invisible {
    /// As they are.
    Keep,
    /// Taken out.
    #[default]
    Remove,
}

/// The typesetter's `ﬀ ﬁ ﬂ ﬃ ﬄ ﬅ ﬆ`, which come from PDF files. The letters `œ` and `æ` are never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ligatures {
    /// As they are.
    Keep,
    /// The letters they are made of: `ﬁn` becomes `fin`.
    #[default]
    Split,
}

/// Letters with accents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Composition {
    /// As they are.
    Keep,
    /// Unicode's form NFC: `e` and a combining accent become `é`.
    #[default]
    Nfc,
}

/// Apostrophes: one of `' ’ ‘ ʼ ′ ´` behind a letter and before a letter or digit (`l’été`, `aujourd'hui`, `d’1 franc`).
/// Others, which may be quotation marks, are never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Apostrophes {
    /// As they are.
    Keep,
    /// `'`, which most French data and most tokenizers have.
    #[default]
    Straight,
    /// `’`, as books have it.
    Curly,
}

/// Quotation marks with a direction: `« » “ ” „ ‟`. `"` itself has none and is never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quotes {
    /// As they are.
    #[default]
    Keep,
    /// `“oui”` becomes `« oui »`, with no-break spaces (U+00A0).
    Guillemets,
    /// `« oui »` and `“oui”` become `"oui"`.
    Straight,
}

/// Spaces of other widths than that of a space, and those that do not break: U+00A0, U+202F, U+2000 to U+200A, U+205F.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spaces {
    /// As they are.
    Keep,
    /// All become ordinary spaces: `Quoi ?` is written in one way only.
    #[default]
    Plain,
    /// As printers have them: where there are spaces before `; ! ?`, one narrow no-break space (U+202F); before `:` and
    /// `»` and behind `«`, one no-break space (U+00A0). Spaces that are missing are not added (`12:30`, `http://`), and
    /// signs inside of other signs (` :)`) are left alone.
    NoBreak,
}

/// Hyphens and dashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dashes {
    /// As they are.
    Keep,
    /// Only hyphens: U+2010 and U+2011 become `-`.
    #[default]
    Hyphens,
    /// Hyphens; and two or three of them in a row, or a bar (U+2015), become the `—` that begins speech.
    Typographic,
    /// All of them, `–` and `—` included, become `-`.
    Ascii,
}

/// Three dots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ellipses {
    /// As they are.
    #[default]
    Keep,
    /// Exactly three dots in a row become `…`.
    Character,
    /// `…` becomes three dots.
    Dots,
}

/// What is done to a text; each field is a rule, and the rules are applied in the order of the fields.
///
/// Cleaning twice gives the same as cleaning once.
///
/// # Examples
///
/// ```
/// use vesper_data::french::{Apostrophes, Cleanup, Quotes, Spaces};
///
/// // The default makes equal what looks equal.
/// let text = "L’e\u{301}te\u{301} ﬁ\u{ad}nit\u{202f}: «\u{a0}Déjà\u{202f}?\u{a0}»";
/// assert_eq!(Cleanup::default().clean(text), "L'été finit : « Déjà ? »");
///
/// // What a printer would do.
/// let book = Cleanup::none()
///     .with_apostrophes(Apostrophes::Curly)
///     .with_quotes(Quotes::Guillemets)
///     .with_spaces(Spaces::NoBreak);
/// assert_eq!(book.clean("“C'est fini” !"), "«\u{a0}C’est fini\u{a0}»\u{202f}!");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cleanup {
    /// Characters that one does not see. Default: removed.
    pub invisible: Invisible,
    /// The typesetter's ligatures. Default: split.
    pub ligatures: Ligatures,
    /// Letters with accents. Default: NFC.
    pub composition: Composition,
    /// Apostrophes. Default: straight.
    pub apostrophes: Apostrophes,
    /// Quotation marks. Default: kept.
    pub quotes: Quotes,
    /// Unusual spaces. Default: plain.
    pub spaces: Spaces,
    /// Hyphens and dashes. Default: hyphens alone.
    pub dashes: Dashes,
    /// Three dots. Default: kept.
    pub ellipses: Ellipses,
}

impl Cleanup {
    /// No rule at all, to start from.
    pub fn none() -> Self {
        Self {
            invisible: Invisible::Keep,
            ligatures: Ligatures::Keep,
            composition: Composition::Keep,
            apostrophes: Apostrophes::Keep,
            quotes: Quotes::Keep,
            spaces: Spaces::Keep,
            dashes: Dashes::Keep,
            ellipses: Ellipses::Keep,
        }
    }

    /// Sets [`Cleanup::invisible`].
    pub fn with_invisible(mut self, rule: Invisible) -> Self {
        self.invisible = rule;
        self
    }

    /// Sets [`Cleanup::ligatures`].
    pub fn with_ligatures(mut self, rule: Ligatures) -> Self {
        self.ligatures = rule;
        self
    }

    /// Sets [`Cleanup::composition`].
    pub fn with_composition(mut self, rule: Composition) -> Self {
        self.composition = rule;
        self
    }

    /// Sets [`Cleanup::apostrophes`].
    pub fn with_apostrophes(mut self, rule: Apostrophes) -> Self {
        self.apostrophes = rule;
        self
    }

    /// Sets [`Cleanup::quotes`].
    pub fn with_quotes(mut self, rule: Quotes) -> Self {
        self.quotes = rule;
        self
    }

    /// Sets [`Cleanup::spaces`].
    pub fn with_spaces(mut self, rule: Spaces) -> Self {
        self.spaces = rule;
        self
    }

    /// Sets [`Cleanup::dashes`].
    pub fn with_dashes(mut self, rule: Dashes) -> Self {
        self.dashes = rule;
        self
    }

    /// Sets [`Cleanup::ellipses`].
    pub fn with_ellipses(mut self, rule: Ellipses) -> Self {
        self.ellipses = rule;
        self
    }

    /// The text with every rule applied; borrowed where nothing changes.
    pub fn clean<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        apply(&mut text, |text| rules::invisible(self.invisible, text));
        apply(&mut text, |text| rules::ligatures(self.ligatures, text));
        apply(&mut text, |text| rules::composition(self.composition, text));
        apply(&mut text, |text| rules::apostrophes(self.apostrophes, text));
        apply(&mut text, |text| rules::quotes(self.quotes, text));
        apply(&mut text, |text| rules::spaces(self.spaces, text));
        apply(&mut text, |text| rules::dashes(self.dashes, text));
        apply(&mut text, |text| rules::ellipses(self.ellipses, text));
        text
    }

    /// The document with its text cleaned. Where the loss is taken over ranges of the text, these stay what they
    /// were: each range, and what is between them, is cleaned for itself.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Document;
    /// use vesper_data::french::Cleanup;
    ///
    /// let text = "Qui\u{202f}? L’été.".to_owned();
    /// let document = Document { text, path: std::path::Path::new("a.txt").into(), line: 1, loss: Some(vec![8..18]) };
    /// let clean = Cleanup::default().clean_document(document);
    /// assert_eq!(clean.text, "Qui ? L'été.");
    /// assert_eq!(clean.loss, Some(vec![6..14]));
    /// ```
    pub fn clean_document(&self, document: Document) -> Document {
        let Some(ranges) = document.loss else {
            let text = match self.clean(&document.text) {
                Cow::Owned(text) => Some(text),
                Cow::Borrowed(_) => None,
            };
            return Document { text: text.unwrap_or(document.text), loss: None, ..document };
        };
        let (mut text, mut loss, mut done) = (String::with_capacity(document.text.len()), Vec::new(), 0);
        let part = |range: Range<usize>| document.text.get(range).unwrap_or_default();
        for range in ranges {
            text += &self.clean(part(done..range.start));
            let start = text.len();
            text += &self.clean(part(range.clone()));
            loss.push(start..text.len());
            done = range.end;
        }
        text += &self.clean(part(done..document.text.len()));
        Document { text, loss: Some(loss), path: document.path, line: document.line }
    }
}

/// Puts a rule's result in a text's place, where it has one.
fn apply(text: &mut Cow<'_, str>, rule: impl FnOnce(&str) -> Option<String>) {
    if let Some(changed) = rule(text) {
        *text = Cow::Owned(changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_cleanup() -> impl Strategy<Value = Cleanup> {
        (
            prop::sample::select(vec![Invisible::Keep, Invisible::Remove]),
            prop::sample::select(vec![Ligatures::Keep, Ligatures::Split]),
            prop::sample::select(vec![Composition::Keep, Composition::Nfc]),
            prop::sample::select(vec![Apostrophes::Keep, Apostrophes::Straight, Apostrophes::Curly]),
            prop::sample::select(vec![Quotes::Keep, Quotes::Guillemets, Quotes::Straight]),
            prop::sample::select(vec![Spaces::Keep, Spaces::Plain, Spaces::NoBreak]),
            prop::sample::select(vec![Dashes::Keep, Dashes::Hyphens, Dashes::Typographic, Dashes::Ascii]),
            prop::sample::select(vec![Ellipses::Keep, Ellipses::Character, Ellipses::Dots]),
        )
            .prop_map(
                |(invisible, ligatures, composition, apostrophes, quotes, spaces, dashes, ellipses)| {
                    Cleanup {
                        invisible,
                        ligatures,
                        composition,
                        apostrophes,
                        quotes,
                        spaces,
                        dashes,
                        ellipses,
                    }
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn cleaning_twice_is_cleaning_once(
            cleanup in any_cleanup(),
            text in "([a1é \n\t.,;:!?()'’‘´«»“”„\"…—–―-]|[\u{a0}\u{202f}\u{2009}\u{2002}\u{ad}\u{200b}\u{feff}\u{301}\u{2010}\u{2011}\u{37e}]|ﬁ|\\.\\.\\.|--|\\PC)*",
        ) {
            let once = cleanup.clean(&text).into_owned();
            prop_assert_eq!(cleanup.clean(&once), once.as_str());
        }

        #[test]
        fn cleaning_keeps_every_letter_and_line(text in "([a-zàéèêœæ 0-9\n]|\\PC)*") {
            // The default rules make no word and no line of their own.
            let clean = Cleanup::default().with_composition(Composition::Keep).with_ligatures(Ligatures::Keep);
            let letters = |text: &str| text.chars().filter(|c| c.is_alphanumeric() || *c == '\n').collect::<String>();
            // "ʼ" is a letter to Unicode.
            prop_assume!(!text.contains('ʼ'));
            prop_assert_eq!(letters(&clean.clean(&text)), letters(&text));
        }
    }

    #[test]
    fn without_rules_the_text_is_not_even_copied() {
        let text = "L’été\u{202f}: «\u{a0}ﬁn…\u{a0}» -- e\u{301}\u{ad}";
        assert!(matches!(Cleanup::none().clean(text), Cow::Borrowed(same) if same == text));
        assert!(matches!(Cleanup::default().clean("L'été : « fin » !"), Cow::Borrowed(_)));
    }

    #[test]
    fn settings_are_read_by_the_names_of_the_rules() {
        let cleanup: Cleanup =
            serde_json::from_str(r#"{"quotes": "guillemets", "spaces": "no_break", "dashes": "ascii"}"#)
                .unwrap();
        assert_eq!(
            (cleanup.quotes, cleanup.spaces, cleanup.dashes),
            (Quotes::Guillemets, Spaces::NoBreak, Dashes::Ascii)
        );
        assert_eq!(cleanup.apostrophes, Apostrophes::Straight);
        assert!(serde_json::from_str::<Cleanup>(r#"{"quote": "keep"}"#).is_err());
    }

    #[test]
    fn the_loss_stays_with_its_text() {
        let text = "Quand\u{202f}? L’an ﬁ\u{ad}ni. Où\u{202f}? Là‑bas";
        let at = |part: &str| text.find(part).map(|at| at..at + part.len()).unwrap();
        let document = Document {
            text: text.to_owned(),
            path: std::path::Path::new("a").into(),
            line: 7,
            loss: Some(vec![at("L’an ﬁ\u{ad}ni."), at("Là‑bas")]),
        };
        let clean = Cleanup::default().clean_document(document);
        let answers: Vec<&str> =
            clean.loss.iter().flatten().map(|range| &clean.text[range.clone()]).collect();
        assert_eq!(clean.text, "Quand ? L'an fini. Où ? Là-bas");
        assert_eq!(answers, ["L'an fini.", "Là-bas"]);
        assert_eq!(clean.line, 7);
    }
}
