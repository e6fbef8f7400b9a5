//! French agreement: elision, contraction, possessives, and the endings of verbs and adjectives.

use super::super::template::{Gender, NounForm, Number};

/// The forms of a noun that templates can ask for.
pub(in super::super) const FORMS: &[(&str, NounForm)] = &[
    ("noun", |noun, _, _| noun.to_owned()),
    ("un", |noun, gender, _| format!("{} {noun}", pick(gender, "un", "une"))),
    ("le", |noun, gender, _| definite(noun, gender)),
    ("du", |noun, gender, _| contracted("de", noun, gender)),
    ("au", |noun, gender, _| contracted("à", noun, gender)),
    ("de", |noun, _, _| elided("de", noun)),
    ("son", |noun, gender, hero| possessive(noun, gender, hero.1, Person::Third)),
    ("mon", |noun, gender, hero| possessive(noun, gender, hero.1, Person::First)),
    ("my", |noun, gender, _| possessive(noun, gender, Number::Singular, Person::First)),
    ("il", |_, gender, _| pick(gender, "il", "elle").to_owned()),
];

/// The endings that agree with the hero: masculine, feminine, then the plurals.
pub(in super::super) const ENDINGS: &[(&str, [&str; 4])] = &[
    // Adjectives and past participles with être.
    ("e", ["", "e", "s", "es"]),
    ("s", ["", "", "s", "s"]),
    ("le", ["", "le", "s", "les"]),
    ("eux", ["eux", "euse", "eux", "euses"]),
    ("eur", ["eur", "euse", "eurs", "euses"]),
    ("if", ["if", "ive", "ifs", "ives"]),
    // The imperfect, and the past historic of each group.
    ("ait", ["ait", "ait", "aient", "aient"]),
    ("a", ["a", "a", "èrent", "èrent"]),
    ("ea", ["ea", "ea", "èrent", "èrent"]),
    ("ça", ["ça", "ça", "cèrent", "cèrent"]),
    ("it", ["it", "it", "irent", "irent"]),
    ("ut", ["ut", "ut", "urent", "urent"]),
    ("int", ["int", "int", "inrent", "inrent"]),
];

enum Person {
    First,
    Third,
}

fn pick(gender: Gender, masculine: &'static str, feminine: &'static str) -> &'static str {
    match gender {
        Gender::Masculine => masculine,
        Gender::Feminine => feminine,
    }
}

/// Words in `h` before which nothing is elided.
const ASPIRATED: [&str; 8] = ["hibou", "hérisson", "héron", "haricot", "hamac", "hache", "hutte", "haut"];

/// Whether a word takes the elided article: it begins with a vowel or a mute `h`.
fn elides(word: &str) -> bool {
    let first = word.chars().next().unwrap_or(' ');
    "aàâeéèêiîoôuœAÉEIOU".contains(first)
        || (first == 'h' && !ASPIRATED.iter().any(|aspirated| word.starts_with(aspirated)))
}

/// `le renard`, `la souris`, `l'ours`.
fn definite(noun: &str, gender: Gender) -> String {
    if elides(noun) { format!("l'{noun}") } else { format!("{} {noun}", pick(gender, "le", "la")) }
}

/// The preposition `de` or `à` with the definite article: `du`, `de la`, `de l'`, `au`, `à la`, `à l'`.
fn contracted(preposition: &str, noun: &str, gender: Gender) -> String {
    match (gender, elides(noun), preposition) {
        (Gender::Masculine, false, "de") => format!("du {noun}"),
        (Gender::Masculine, false, _) => format!("au {noun}"),
        _ => format!("{preposition} {}", definite(noun, gender)),
    }
}

/// `de` before a bare noun or a name: `de Mina`, `d'Alice`.
fn elided(word: &str, noun: &str) -> String {
    if elides(noun) {
        let stem = word.strip_suffix('e').unwrap_or(word);
        format!("{stem}'{noun}")
    } else {
        format!("{word} {noun}")
    }
}

/// `son`, `sa`, `leur`, `mon`, `ma`, `notre`: `son` and `mon` before a vowel even for the feminine.
fn possessive(noun: &str, gender: Gender, owner: Number, person: Person) -> String {
    let masculine = gender == Gender::Masculine || elides(noun);
    let word = match (owner, person, masculine) {
        (Number::Singular, Person::Third, true) => "son",
        (Number::Singular, Person::Third, false) => "sa",
        (Number::Singular, Person::First, true) => "mon",
        (Number::Singular, Person::First, false) => "ma",
        (Number::Plural, Person::Third, _) => "leur",
        (Number::Plural, Person::First, _) => "notre",
    };
    format!("{word} {noun}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use Gender::{Feminine, Masculine};
    use Number::{Plural, Singular};

    #[test]
    fn articles_elide_before_a_vowel_or_a_mute_h() {
        let cases = [
            ("renard", Masculine, "le renard"),
            ("souris", Feminine, "la souris"),
            ("ours", Masculine, "l'ours"),
            ("île", Feminine, "l'île"),
            ("écharpe", Feminine, "l'écharpe"),
            ("histoire", Feminine, "l'histoire"),
            ("hibou", Masculine, "le hibou"),
            ("hérisson", Masculine, "le hérisson"),
            ("œuf", Masculine, "l'œuf"),
        ];
        for (noun, gender, expected) in cases {
            assert_eq!(definite(noun, gender), expected);
        }
    }

    #[test]
    fn prepositions_contract_with_the_masculine_article_alone() {
        assert_eq!(contracted("de", "phare", Masculine), "du phare");
        assert_eq!(contracted("de", "mer", Feminine), "de la mer");
        assert_eq!(contracted("de", "hôtel", Masculine), "de l'hôtel");
        assert_eq!(contracted("à", "phare", Masculine), "au phare");
        assert_eq!(contracted("à", "hibou", Masculine), "au hibou");
        assert_eq!(contracted("à", "tortue", Feminine), "à la tortue");
        assert_eq!(contracted("à", "île", Feminine), "à l'île");
    }

    #[test]
    fn de_elides_before_a_name() {
        assert_eq!(elided("de", "Alice"), "d'Alice");
        assert_eq!(elided("de", "Mina"), "de Mina");
    }

    #[test]
    fn possessives_follow_owner_and_thing() {
        let cases = [
            ("amie", Feminine, Singular, "son amie", "mon amie"),
            ("clé", Feminine, Singular, "sa clé", "ma clé"),
            ("ballon", Masculine, Singular, "son ballon", "mon ballon"),
            ("hache", Feminine, Singular, "sa hache", "ma hache"),
            ("clé", Feminine, Plural, "leur clé", "notre clé"),
        ];
        for (noun, gender, owner, third, first) in cases {
            assert_eq!(possessive(noun, gender, owner, Person::Third), third);
            assert_eq!(possessive(noun, gender, owner, Person::First), first);
        }
    }

    #[test]
    fn endings_conjugate_and_agree() {
        let word = |stem: &str, ending: &str| {
            let (_, row) = ENDINGS.iter().find(|(name, _)| *name == ending).unwrap();
            row.map(|end| format!("{stem}{end}"))
        };
        assert_eq!(word("content", "e"), ["content", "contente", "contents", "contentes"]);
        assert_eq!(word("curi", "eux"), ["curieux", "curieuse", "curieux", "curieuses"]);
        assert_eq!(word("rêv", "eur"), ["rêveur", "rêveuse", "rêveurs", "rêveuses"]);
        assert_eq!(word("gentil", "le"), ["gentil", "gentille", "gentils", "gentilles"]);
        assert_eq!(word("trouv", "a")[1..3], ["trouva", "trouvèrent"]);
        assert_eq!(word("mang", "ea")[1..3], ["mangea", "mangèrent"]);
        assert_eq!(word("commen", "ça")[1..3], ["commença", "commencèrent"]);
        assert_eq!(word("f", "it")[1..3], ["fit", "firent"]);
        assert_eq!(word("voul", "ut")[1..3], ["voulut", "voulurent"]);
        assert_eq!(word("rev", "int")[1..3], ["revint", "revinrent"]);
        assert_eq!(word("all", "ait")[1..3], ["allait", "allaient"]);
    }
}
