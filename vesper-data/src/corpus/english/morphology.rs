//! English agreement: articles, possessives, pronouns.

use super::super::template::{Gender, NounForm, Number};

type Hero = (Gender, Number);

/// The forms of a noun that templates can ask for.
pub(in super::super) const FORMS: &[(&str, NounForm)] = &[
    ("noun", |noun, _, _| noun.to_owned()),
    ("a", |noun, _, _| format!("{} {noun}", indefinite(noun))),
    ("the", |noun, _, _| format!("the {noun}")),
    ("his", |noun, _, hero| format!("{} {noun}", possessive(hero))),
    ("my", |noun, _, hero| format!("{} {noun}", own(hero))),
    ("he", |_, gender, _| pick(gender, "he", "she")),
    ("him", |_, gender, _| pick(gender, "him", "her")),
];

fn pick(gender: Gender, masculine: &str, feminine: &str) -> String {
    match gender {
        Gender::Masculine => masculine.to_owned(),
        Gender::Feminine => feminine.to_owned(),
    }
}

/// `an` before a vowel sound, else `a`.
///
/// Enough for this corpus: a written vowel stands for a vowel sound except in `u` and `eu` said "you"
/// (`a unicorn`) and `one`; a written `h` is silent in `honest` and `hour`.
fn indefinite(word: &str) -> &'static str {
    let you = ["uni", "use", "eu", "one"].iter().any(|start| word.starts_with(start));
    let silent = ["hon", "hour"].iter().any(|start| word.starts_with(start)) && !word.starts_with("honey");
    if silent || (word.starts_with(['a', 'e', 'i', 'o', 'u']) && !you) { "an" } else { "a" }
}

/// The possessive of the hero in the third person.
fn possessive(hero: Hero) -> &'static str {
    match hero {
        (Gender::Masculine, Number::Singular) => "his",
        (Gender::Feminine, Number::Singular) => "her",
        (_, Number::Plural) => "their",
    }
}

/// The possessive of the hero in the first person.
fn own(hero: Hero) -> &'static str {
    match hero.1 {
        Number::Singular => "my",
        Number::Plural => "our",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_article_follows_the_sound() {
        for word in ["owl", "apple pie", "honest fox", "hour", "old map", "umbrella"] {
            assert_eq!(indefinite(word), "an", "{word}");
        }
        for word in ["fox", "hedgehog", "unicorn", "honey cake", "useful rope", "young bear"] {
            assert_eq!(indefinite(word), "a", "{word}");
        }
    }

    #[test]
    fn possessives_follow_the_owner() {
        use Gender::{Feminine, Masculine};
        use Number::{Plural, Singular};
        assert_eq!(possessive((Masculine, Singular)), "his");
        assert_eq!(possessive((Feminine, Singular)), "her");
        assert_eq!(possessive((Feminine, Plural)), "their");
        assert_eq!(own((Feminine, Singular)), "my");
        assert_eq!(own((Masculine, Plural)), "our");
    }
}
