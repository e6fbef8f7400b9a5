//! Questions, answers and conversations as running text.

use std::borrow::Cow;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::LossOn;

/// What stands before the turns of a conversation, a question or an answer, without the space that follows it.
///
/// A document is its turns, each with its label, a space and its text, and with a blank line between them:
///
/// ```text
/// User: Quelle est la capitale de la France ?
///
/// Assistant: Paris.
/// ```
///
/// The range of an answer that counts in the loss begins with the space behind the label and ends with the blank line
/// behind the answer, where there is one: so the model learns to end its turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Labels {
    /// Before what sets the scene of a conversation.
    pub system: String,
    /// Before a turn of the user, or an instruction.
    pub user: String,
    /// Before a turn of the assistant, or the output of an instruction.
    pub assistant: String,
    /// Before the result of a tool.
    pub tool: String,
    /// Before a question on a text.
    pub question: String,
    /// Before its answer.
    pub answer: String,
    /// The answer to a question that the text does not answer.
    pub no_answer: String,
}

impl Labels {
    /// English words.
    pub fn english() -> Self {
        Self::of(["System:", "User:", "Assistant:", "Tool:", "Question:", "Answer:", "No answer."])
    }

    /// French words.
    pub fn french() -> Self {
        let words = [
            "Système :",
            "Utilisateur :",
            "Assistant :",
            "Outil :",
            "Question :",
            "Réponse :",
            "Sans réponse.",
        ];
        Self::of(words)
    }

    fn of(words: [&str; 7]) -> Self {
        let [system, user, assistant, tool, question, answer, no_answer] = words.map(str::to_owned);
        Self { system, user, assistant, tool, question, answer, no_answer }
    }
}

impl Default for Labels {
    fn default() -> Self {
        Self::english()
    }
}

/// A part of a document.
pub(super) struct Turn<'a> {
    /// The label, or nothing.
    pub(super) label: &'a str,
    pub(super) text: Cow<'a, str>,
    /// Whether the model is to learn to write it.
    pub(super) answer: bool,
}

/// A text, and the ranges of it that count in the loss; `None`: all of it.
pub(super) struct Rendered {
    pub(super) text: String,
    pub(super) loss: Option<Vec<Range<usize>>>,
}

/// The turns, but for blank ones, as a text.
pub(super) fn render<'a>(turns: impl IntoIterator<Item = Turn<'a>>, loss: LossOn) -> Rendered {
    let mut text = String::new();
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut open = None;
    for turn in turns {
        if turn.text.trim().is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push_str("\n\n");
        }
        close(&mut ranges, open.take(), text.len());
        text.push_str(turn.label);
        open = turn.answer.then_some(text.len());
        if !turn.label.is_empty() {
            text.push(' ');
        }
        text.push_str(&turn.text);
    }
    close(&mut ranges, open, text.len());
    Rendered { text, loss: (loss == LossOn::Answers).then_some(ranges) }
}

/// Ends the range that begins at `start`, if one does. Ranges that touch become one.
fn close(ranges: &mut Vec<Range<usize>>, start: Option<usize>, end: usize) {
    match (start, ranges.last_mut()) {
        (Some(start), Some(last)) if last.end == start => last.end = end,
        (Some(start), _) => ranges.push(start..end),
        (None, _) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_count_with_the_space_before_and_the_blank_line_after_them() {
        let turn = |label, text, answer| Turn { label, text: Cow::from(text), answer };
        let turns = || {
            [
                turn("", "Contexte.", false),
                turn("Q:", "un ?", false),
                turn("A:", "é", true),
                turn("B:", " ", false),
                turn("A:", "deux", true),
            ]
        };
        let Rendered { text, loss } = render(turns(), LossOn::Answers);
        assert_eq!(text, "Contexte.\n\nQ: un ?\n\nA: é\n\nA: deux");
        let learned: Vec<&str> = loss.unwrap().into_iter().map(|range| &text[range]).collect();
        assert_eq!(learned, [" é\n\n", " deux"]);
        let unlabelled =
            render([turn("", "a", true), turn("", "b", true), turn("", "c", false)], LossOn::Answers);
        assert_eq!(unlabelled.text, "a\n\nb\n\nc");
        let ranges: Vec<_> =
            unlabelled.loss.unwrap().into_iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(ranges, [(0, 6)]);
        assert_eq!(render(turns(), LossOn::Everything).loss, None);
        assert_eq!(render([], LossOn::Answers).loss, Some(vec![]));
    }
}
