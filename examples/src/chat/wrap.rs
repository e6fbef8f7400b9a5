//! Text into rows of a terminal.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// The bytes of each row, `width` columns wide, broken between words where that is possible and never inside of a
/// grapheme. The spaces and the line end at a break belong to no row. There is at least one row.
pub fn words(text: &str, width: usize) -> Vec<Range<usize>> {
    rows(text, width, true)
}

/// The bytes of each row, broken wherever it is full: for text that is being edited.
pub fn graphemes(text: &str, width: usize) -> Vec<Range<usize>> {
    rows(text, width, false)
}

fn rows(text: &str, width: usize, at_words: bool) -> Vec<Range<usize>> {
    let width = width.max(2); // the widest grapheme
    let mut rows = Vec::new();
    let mut line_start = 0;
    for line in text.split('\n') {
        let mut start = 0;
        let mut columns = 0;
        // Where the row can be broken: the end of a word, and the beginning of the next.
        let mut gap: Option<Range<usize>> = None;
        for (i, grapheme) in line.grapheme_indices(true) {
            let wide = grapheme.width();
            if at_words && grapheme == " " {
                match &mut gap {
                    Some(gap) if gap.end == i => gap.end = i + 1,
                    _ => gap = Some(i..i + 1),
                }
            }
            // Spaces that do not fit hang over the edge, unseen.
            let hangs = at_words && grapheme == " ";
            if columns + wide > width && !hangs {
                let broken = gap.take().filter(|gap| gap.start > start).unwrap_or(i..i);
                rows.push(line_start + start..line_start + broken.start);
                start = broken.end;
                columns = line.get(start..i).unwrap_or_default().width();
            }
            columns += wide;
        }
        let end = if at_words { line.trim_end_matches(' ').len().max(start) } else { line.len() };
        rows.push(line_start + start..line_start + end);
        line_start += line.len() + 1;
    }
    rows
}

/// The row and the column of a byte of the text, among the rows of [`graphemes`].
pub fn place(text: &str, rows: &[Range<usize>], at: usize) -> (usize, usize) {
    let row = rows.iter().rposition(|row| row.start <= at).unwrap_or_default();
    let start = rows.get(row).map_or(0, |row| row.start);
    (row, text.get(start..at).unwrap_or_default().width())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(text: &str, width: usize) -> Vec<&str> {
        words(text, width).into_iter().map(|row| text.get(row).unwrap()).collect()
    }

    #[test]
    fn rows_break_between_words_where_they_can() {
        assert_eq!(lines("the quick brown fox", 10), ["the quick", "brown fox"]);
        assert_eq!(lines("the quick  brown", 9), ["the quick", "brown"]);
        assert_eq!(lines("abcdefghij kl", 4), ["abcd", "efgh", "ij", "kl"]);
        assert_eq!(lines("a\n\nb ", 4), ["a", "", "b"]);
        assert_eq!(lines("", 4), [""]);
        assert_eq!(lines("  indented", 20), ["  indented"]);
    }

    #[test]
    fn wide_graphemes_take_two_columns() {
        assert_eq!(lines("日本語", 4), ["日本", "語"]);
        assert_eq!(lines("日本語", 5), ["日本", "語"]);
        assert_eq!(lines("e\u{301}e\u{301}e\u{301}", 2), ["e\u{301}e\u{301}", "e\u{301}"]);
        assert_eq!(lines("a👩\u{200d}👩\u{200d}👧b", 3), ["a👩\u{200d}👩\u{200d}👧", "b"]);
    }

    #[test]
    fn the_cursor_has_a_place_in_every_row() {
        let text = "abcd\ne";
        let rows = graphemes(text, 3);
        let places: Vec<_> = (0..=text.len()).map(|at| place(text, &rows, at)).collect();
        assert_eq!(places, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]);
    }

    proptest! {
        #[test]
        fn no_row_is_too_wide_and_nothing_but_spaces_is_lost(text in "[a-z日é \n👧]{0,60}", width in 2_usize..12) {
            for (rows, spaces) in [(words(&text, width), false), (graphemes(&text, width), true)] {
                let shown: String = rows.iter().map(|row| text.get(row.clone()).unwrap()).collect();
                for row in &rows {
                    let row = text.get(row.clone()).unwrap();
                    prop_assert!(row.trim_end().width() <= width, "{:?}", row);
                }
                let kept = |text: &str| -> String {
                    text.chars().filter(|&c| c != '\n' && (spaces || c != ' ')).collect()
                };
                prop_assert_eq!(kept(&shown), kept(&text));
            }
        }
    }
}
