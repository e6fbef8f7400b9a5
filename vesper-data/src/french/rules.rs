//! The rules, each a function from a text to the changed text, or `None` where nothing changes.

use unicode_normalization::{UnicodeNormalization, is_nfc};

use super::cleanup::{Apostrophes, Composition, Dashes, Ellipses, Invisible, Ligatures, Quotes, Spaces};

const NO_BREAK: char = '\u{a0}';
const NARROW_NO_BREAK: char = '\u{202f}';

/// Replaces each character that `rule` has something for; `rule` also sees the characters around it.
fn replace(
    text: &str,
    rule: impl Fn(Option<char>, char, Option<char>) -> Option<&'static str>,
) -> Option<String> {
    let mut changed: Option<String> = None;
    let mut before = None;
    let mut chars = text.char_indices().peekable();
    while let Some((at, char)) = chars.next() {
        let after = chars.peek().map(|(_, char)| *char);
        match (rule(before, char, after), &mut changed) {
            (Some(new), Some(changed)) => changed.push_str(new),
            (Some(new), None) => changed = Some([text.get(..at).unwrap_or_default(), new].concat()),
            (None, Some(changed)) => changed.push(char),
            (None, None) => {}
        }
        before = Some(char);
    }
    changed
}

pub(super) fn invisible(rule: Invisible, text: &str) -> Option<String> {
    let removes = rule == Invisible::Remove;
    replace(text, |_, char, _| {
        (removes && matches!(char, '\u{ad}' | '\u{200b}' | '\u{2060}' | '\u{feff}')).then_some("")
    })
}

pub(super) fn ligatures(rule: Ligatures, text: &str) -> Option<String> {
    if rule == Ligatures::Keep {
        return None;
    }
    replace(text, |_, char, _| {
        Some(match char {
            'ﬀ' => "ff",
            'ﬁ' => "fi",
            'ﬂ' => "fl",
            'ﬃ' => "ffi",
            'ﬄ' => "ffl",
            'ﬅ' | 'ﬆ' => "st",
            _ => return None,
        })
    })
}

pub(super) fn composition(rule: Composition, text: &str) -> Option<String> {
    (rule == Composition::Nfc && !is_nfc(text)).then(|| text.nfc().collect())
}

pub(super) fn apostrophes(rule: Apostrophes, text: &str) -> Option<String> {
    let (new, one) = match rule {
        Apostrophes::Keep => return None,
        Apostrophes::Straight => ("'", '\''),
        Apostrophes::Curly => ("’", '’'),
    };
    // "ʼ" itself is a letter to Unicode.
    let letter = |char: char| char.is_alphabetic() && char != 'ʼ';
    replace(text, |before, char, after| {
        let is_apostrophe = matches!(char, '\'' | '’' | '‘' | 'ʼ' | '′' | '´') && char != one;
        let inside =
            before.is_some_and(letter) && after.is_some_and(|char| letter(char) || char.is_numeric());
        (is_apostrophe && inside).then_some(new)
    })
}

fn is_space(char: char) -> bool {
    matches!(char, ' ' | NO_BREAK | NARROW_NO_BREAK | '\u{2000}'..='\u{200a}' | '\u{205f}')
}

/// Rewrites each run of spaces that `rule` has something for; `rule` sees what is before, the run, and the rest.
fn replace_runs(
    text: &str,
    rule: impl Fn(Option<char>, &str, &str) -> Option<&'static str>,
) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_space) {
        let (before, run) = rest.split_at(start);
        let end = run.find(|char| !is_space(char)).unwrap_or(run.len());
        let (run, after) = run.split_at(end);
        out += before;
        let last = out.chars().next_back();
        out += rule(last, run, after).unwrap_or(run);
        rest = after;
    }
    out += rest;
    (out != text).then_some(out)
}

pub(super) fn quotes(rule: Quotes, text: &str) -> Option<String> {
    let opens = |char: char| matches!(char, '“' | '„' | '‟');
    match rule {
        Quotes::Keep => None,
        Quotes::Straight => {
            // First the spaces inside of guillemets, then the marks.
            let tight = replace_runs(text, |before, _, after| {
                (before == Some('«') || after.starts_with('»')).then_some("")
            });
            let tight = tight.as_deref().unwrap_or(text);
            let straight =
                replace(tight, |_, char, _| (opens(char) || matches!(char, '«' | '»' | '”')).then_some("\""));
            straight.or_else(|| (tight != text).then(|| tight.to_owned()))
        }
        Quotes::Guillemets => {
            if !text.contains(|char| opens(char) || char == '”') {
                return None;
            }
            let tight = replace_runs(text, |before, _, after| {
                (before.is_some_and(opens) || after.starts_with('”')).then_some("")
            });
            let tight = tight.as_deref().unwrap_or(text);
            replace(tight, |_, char, _| match char {
                '”' => Some("\u{a0}»"),
                char if opens(char) => Some("«\u{a0}"),
                _ => None,
            })
        }
    }
}

pub(super) fn spaces(rule: Spaces, text: &str) -> Option<String> {
    match rule {
        Spaces::Keep => None,
        Spaces::Plain => replace(text, |_, char, _| (char != ' ' && is_space(char)).then_some(" ")),
        Spaces::NoBreak => replace_runs(text, |before, _, after| {
            let mut signs = after.chars();
            let (sign, next) = (signs.next(), signs.next());
            let at_start = before.is_none_or(char::is_whitespace);
            let ends = next.is_none_or(|char| {
                char.is_whitespace() || matches!(char, '»' | '"' | '”' | '…' | '.' | '!' | '?')
            });
            match sign {
                Some(sign) if before == Some('«') && !sign.is_whitespace() => Some("\u{a0}"),
                Some('»') if !at_start => Some("\u{a0}"),
                Some(':') if !at_start && ends => Some("\u{a0}"),
                Some(';') if !at_start && ends => Some("\u{202f}"),
                Some('!' | '?') if !at_start && (ends || next == Some(')')) => Some("\u{202f}"),
                _ => None,
            }
        }),
    }
}

/// Rewrites runs of `sign` of a length that `fits`.
fn replace_repeated(text: &str, sign: char, fits: impl Fn(usize) -> bool, new: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(sign) {
        let (before, run) = rest.split_at(start);
        let end = run.find(|char| char != sign).unwrap_or(run.len());
        let (run, after) = run.split_at(end);
        out += before;
        out += if fits(run.len() / sign.len_utf8()) { new } else { run };
        rest = after;
    }
    out += rest;
    (out != text).then_some(out)
}

pub(super) fn dashes(rule: Dashes, text: &str) -> Option<String> {
    if rule == Dashes::Keep {
        return None;
    }
    let one_by_one = replace(text, |_, char, _| match char {
        '\u{2010}' | '\u{2011}' => Some("-"),
        '―' if rule == Dashes::Typographic => Some("—"),
        '–' | '—' | '―' if rule == Dashes::Ascii => Some("-"),
        _ => None,
    });
    if rule != Dashes::Typographic {
        return one_by_one;
    }
    let hyphens = one_by_one.as_deref().unwrap_or(text);
    replace_repeated(hyphens, '-', |length| matches!(length, 2 | 3), "—").or(one_by_one)
}

pub(super) fn ellipses(rule: Ellipses, text: &str) -> Option<String> {
    match rule {
        Ellipses::Keep => None,
        Ellipses::Character => replace_repeated(text, '.', |length| length == 3, "…"),
        Ellipses::Dots => replace(text, |_, char, _| (char == '…').then_some("...")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a rule makes of a text.
    fn made(changed: Option<String>, text: &str) -> String {
        changed.unwrap_or_else(|| text.to_owned())
    }

    #[test]
    fn apostrophes_between_letters_are_told_from_quotation_marks() {
        let straight = |text| made(apostrophes(Apostrophes::Straight, text), text);
        assert_eq!(
            straight("l’été, aujourd‘hui, d’1 franc, lʼan, c´est"),
            "l'été, aujourd'hui, d'1 franc, l'an, c'est"
        );
        assert_eq!(straight("‘oui’ dit-il, 5′ après"), "‘oui’ dit-il, 5′ après");
        let curly = |text| made(apostrophes(Apostrophes::Curly, text), text);
        assert_eq!(curly("l'été 'cité' l’an"), "l’été 'cité' l’an");
    }

    #[test]
    fn spaces_before_signs_become_those_of_printers() {
        let printed = |text| made(spaces(Spaces::NoBreak, text), text);
        assert_eq!(printed("Quoi  ? Non ; si : oui !"), "Quoi\u{202f}? Non\u{202f}; si\u{a0}: oui\u{202f}!");
        assert_eq!(printed("« Quoi ?! » (oui !)"), "«\u{a0}Quoi\u{202f}?!\u{a0}» (oui\u{202f}!)");
        assert_eq!(printed("12:30, http://a, :) ;) a :b\n ! x"), "12:30, http://a, :) ;) a :b\n ! x");
        let plain = |text| made(spaces(Spaces::Plain, text), text);
        assert_eq!(plain("1\u{202f}000\u{a0}€\u{2009}!\u{3000}"), "1 000 € !\u{3000}");
    }

    #[test]
    fn quotation_marks_take_their_spaces_with_them() {
        let straight = |text| made(quotes(Quotes::Straight, text), text);
        assert_eq!(straight("«\u{a0}oui\u{202f}», « non », “si” «là»"), "\"oui\", \"non\", \"si\" \"là\"");
        let guillemets = |text| made(quotes(Quotes::Guillemets, text), text);
        assert_eq!(guillemets("“ oui” et „non” «si»"), "«\u{a0}oui\u{a0}» et «\u{a0}non\u{a0}» «si»");
        assert_eq!(guillemets("\"oui\""), "\"oui\"");
    }

    #[test]
    fn dashes_are_told_from_rules_of_hyphens() {
        let typographic = |text| made(dashes(Dashes::Typographic, text), text);
        assert_eq!(typographic("--Oui. ―Non. peut‑être --- ----"), "—Oui. —Non. peut-être — ----");
        let hyphens = |text| made(dashes(Dashes::Hyphens, text), text);
        assert_eq!(hyphens("a\u{2010}b --—–"), "a-b --—–");
        let ascii = |text| made(dashes(Dashes::Ascii, text), text);
        assert_eq!(ascii("a‑b —–―"), "a-b ---");
    }

    #[test]
    fn exactly_three_dots_are_an_ellipsis() {
        let character = |text| made(ellipses(Ellipses::Character, text), text);
        assert_eq!(character("a... b.... c.. …"), "a… b.... c.. …");
        assert_eq!(made(ellipses(Ellipses::Dots, "a…"), "a…"), "a...");
    }

    #[test]
    fn what_one_does_not_see_goes_and_what_emoji_need_stays() {
        let text = "su\u{ad}per\u{200b} \u{feff}👩\u{200d}🚀";
        assert_eq!(made(invisible(Invisible::Remove, text), text), "super 👩\u{200d}🚀");
        assert_eq!(made(ligatures(Ligatures::Split, "ﬁn eﬀet œuf"), ""), "fin effet œuf");
        assert_eq!(made(composition(Composition::Nfc, "e\u{301}"), ""), "é");
    }
}
