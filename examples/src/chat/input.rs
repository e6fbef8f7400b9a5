//! The line that is being written: editing by graphemes, and the lines written before.

use unicode_segmentation::UnicodeSegmentation;

/// Text, a cursor between two graphemes of it, and a history.
#[derive(Debug, Clone, Default)]
pub struct Input {
    text: String,
    /// In bytes, always at the boundary of a grapheme.
    cursor: usize,
    history: Vec<String>,
    /// Which line of the history is shown; its length: the new one.
    at: usize,
    /// The new line, while an old one is shown.
    draft: String,
}

impl Input {
    /// An empty line after these, the oldest first.
    pub fn with_history(history: Vec<String>) -> Self {
        Self { at: history.len(), history, ..Self::default() }
    }

    /// What is written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where the cursor is, in bytes.
    pub fn cursor(&self) -> usize {
        self.cursor
    }

    /// The lines taken so far, the oldest first.
    pub fn history(&self) -> &[String] {
        &self.history
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Puts text where the cursor is. Line ends of any system become `\n`; other control characters are left out.
    pub fn insert(&mut self, text: &str) {
        let text = text.replace("\r\n", "\n").replace('\r', "\n").replace('\t', "    ");
        let text: String = text.chars().filter(|&c| c == '\n' || !c.is_control()).collect();
        self.text.insert_str(self.cursor, &text);
        self.cursor += text.len();
        self.settle();
    }

    /// Gives what is written and begins a new line. What is not blank, and no repetition, goes into the history.
    pub fn take(&mut self) -> String {
        let text = std::mem::take(&mut self.text);
        if !text.trim().is_empty() && self.history.last() != Some(&text) {
            self.history.push(text.clone());
        }
        self.clear();
        text
    }

    /// Throws away what is written.
    pub fn clear(&mut self) {
        self.text.clear();
        self.cursor = 0;
        self.at = self.history.len();
        self.draft.clear();
    }

    /// One grapheme to the left.
    pub fn left(&mut self) {
        self.cursor = self.before();
    }

    /// One grapheme to the right.
    pub fn right(&mut self) {
        self.cursor = self.after();
    }

    /// To the beginning of a word.
    pub fn word_left(&mut self) {
        self.cursor = self.word_before();
    }

    /// Behind a word.
    pub fn word_right(&mut self) {
        let rest = self.text.get(self.cursor..).unwrap_or_default();
        let word = rest.split_word_bound_indices().find(|(_, word)| !word.trim().is_empty());
        self.cursor += word.map_or(rest.len(), |(i, word)| i + word.len());
    }

    /// To the beginning.
    pub fn home(&mut self) {
        self.cursor = 0;
    }

    /// To the end.
    pub fn end(&mut self) {
        self.cursor = self.text.len();
    }

    /// Deletes the grapheme before the cursor.
    pub fn backspace(&mut self) {
        self.delete_from(self.before());
    }

    /// Deletes the grapheme after the cursor.
    pub fn delete(&mut self) {
        self.text.replace_range(self.cursor..self.after(), "");
        self.settle();
    }

    /// Deletes the word before the cursor.
    pub fn delete_word(&mut self) {
        self.delete_from(self.word_before());
    }

    /// Deletes everything before the cursor.
    pub fn delete_to_start(&mut self) {
        self.delete_from(0);
    }

    /// Deletes everything after the cursor.
    pub fn delete_to_end(&mut self) {
        self.text.truncate(self.cursor);
    }

    /// Shows the line before this one in the history.
    pub fn older(&mut self) {
        if self.at > 0 {
            if self.at == self.history.len() {
                self.draft.clone_from(&self.text);
            }
            self.show(self.at - 1);
        }
    }

    /// Shows the line after this one in the history, at last the new one.
    pub fn newer(&mut self) {
        if self.at < self.history.len() {
            self.show(self.at + 1);
        }
    }

    fn show(&mut self, at: usize) {
        self.at = at;
        self.text = self.history.get(at).unwrap_or(&self.draft).clone();
        self.end();
    }

    fn delete_from(&mut self, start: usize) {
        self.text.replace_range(start..self.cursor, "");
        self.cursor = start;
        self.settle();
    }

    /// What is joined may have become one grapheme with the cursor inside of it: the cursor goes behind it.
    fn settle(&mut self) {
        let boundaries = self.text.grapheme_indices(true).map(|(i, _)| i);
        self.cursor = boundaries.into_iter().find(|&i| i >= self.cursor).unwrap_or(self.text.len());
    }

    fn before(&self) -> usize {
        let left = self.text.get(..self.cursor).unwrap_or_default();
        left.grapheme_indices(true).next_back().map_or(0, |(i, _)| i)
    }

    fn after(&self) -> usize {
        let right = self.text.get(self.cursor..).unwrap_or_default();
        self.cursor + right.graphemes(true).next().map_or(0, str::len)
    }

    fn word_before(&self) -> usize {
        let left = self.text.get(..self.cursor).unwrap_or_default();
        left.split_word_bound_indices().rfind(|(_, word)| !word.trim().is_empty()).map_or(0, |(i, _)| i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(text: &str) -> Input {
        let mut input = Input::default();
        input.insert(text);
        input
    }

    #[test]
    fn graphemes_are_never_cut() {
        let family = "👩\u{200d}👩\u{200d}👧";
        let mut line = input(&format!("e\u{301}日{family}x"));
        line.left();
        line.backspace();
        assert_eq!(line.text(), "e\u{301}日x");
        line.left();
        line.left();
        assert_eq!(line.cursor(), 0);
        line.left();
        line.delete();
        assert_eq!(line.text(), "日x");
        line.right();
        line.right();
        line.right();
        assert_eq!(line.cursor(), line.text().len());
    }

    #[test]
    fn the_cursor_goes_behind_a_grapheme_that_is_made_under_it() {
        let mut line = input("ex");
        line.left();
        line.insert("\u{301}"); // combines with the e before it
        assert_eq!((line.text(), line.cursor()), ("e\u{301}x", 3));
        let mut line = input("ea\u{301}");
        line.left();
        line.backspace();
        assert_eq!(line.text(), "a\u{301}");
        assert_eq!(line.cursor(), 0);
    }

    #[test]
    fn words_are_moved_over_and_deleted() {
        let mut line = input("une île, là-bas ");
        line.word_left();
        line.word_left();
        assert_eq!(line.text().get(line.cursor()..), Some("-bas "));
        line.end();
        line.delete_word();
        assert_eq!(line.text(), "une île, là-");
        line.home();
        line.word_right();
        assert_eq!(line.cursor(), 3);
        line.delete_to_end();
        assert_eq!(line.text(), "une");
        line.left();
        line.delete_to_start();
        assert_eq!(line.text(), "e");
    }

    #[test]
    fn old_lines_come_back_and_the_new_one_is_kept() {
        let mut line = Input::with_history(vec!["old".into()]);
        line.insert("first");
        assert_eq!(line.take(), "first");
        line.insert("first");
        line.take();
        line.insert("  ");
        line.take();
        assert_eq!(line.history(), ["old", "first"]);
        line.insert("new");
        line.older();
        assert_eq!(line.text(), "first");
        line.older();
        line.older();
        assert_eq!(line.text(), "old");
        line.newer();
        line.newer();
        line.newer();
        assert_eq!(line.text(), "new");
    }

    #[test]
    fn pasted_text_keeps_its_lines_and_no_control_characters() {
        assert_eq!(input("a\r\nb\rc\u{1b}[31m\td\u{7}").text(), "a\nb\nc[31m    d");
    }
}
