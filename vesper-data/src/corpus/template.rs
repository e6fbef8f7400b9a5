//! The notation of the grammar's templates, compiled once into parts.
//!
//! ```text
//! {rule}            one alternative of the rule, drawn afresh
//! {fact.form}       the story's one alternative of the rule `fact`: drawn at its first mention and
//!                   remembered; `form` is a column number or a form of the noun (.a, .le, .his, ...)
//! {m/f}             text for a masculine or a feminine hero
//! {s|p}  {m/f|p}    text for one hero or for two; each side may be split by gender
//! {fact?m/f}        text that agrees with the noun of a fact
//! {^...}            the same with its first letter raised
//! ~e  ~ait          an ending that agrees with the hero, listed by the language
//! ```
//!
//! A rule is a list of alternatives, likeliest first: the alternative of rank `r` weighs `120 / (r + 5)`, a
//! long tail as words have it, unless it begins with a weight of its own (`12:...`). A fact's alternative may
//! have columns, parted by `@`, so that what belongs together is drawn together. A leading `f:` or `m:` is
//! the gender of the noun in column 0.

use std::collections::HashMap;

/// The hero's agreement: gender and number, as an index into a row of four.
pub(super) type Agreement = usize;

/// The rows of the agreement table.
pub(super) const AGREEMENTS: [(Gender, Number); 4] = [
    (Gender::Masculine, Number::Singular),
    (Gender::Feminine, Number::Singular),
    (Gender::Masculine, Number::Plural),
    (Gender::Feminine, Number::Plural),
];

/// Grammatical gender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gender {
    Masculine,
    Feminine,
}

/// Grammatical number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Singular,
    Plural,
}

/// A rule's name and its alternatives.
pub(super) type Rule = (&'static str, &'static [&'static str]);

/// Renders a noun of a given gender in one form; the last argument is the hero, for possessives.
pub(super) type NounForm = fn(&str, Gender, (Gender, Number)) -> String;

/// What the notation needs to know of a language.
pub(super) struct Dialect {
    /// The grammar, in tables.
    pub(super) rules: &'static [&'static [Rule]],
    /// The forms of a noun, by name.
    pub(super) forms: &'static [(&'static str, NounForm)],
    /// The endings after `~`, by name, for the four agreements.
    pub(super) endings: &'static [(&'static str, [&'static str; 4])],
}

/// One step of an expansion.
#[derive(Debug)]
pub(super) enum Part {
    Text(Box<str>),
    /// Raises the first letter of the text that follows.
    Capital,
    /// Text by the hero's agreement.
    Agree([Box<str>; 4]),
    /// A rule by the hero's agreement, drawn afresh.
    Rule([usize; 4]),
    /// A column of a fact.
    Column([usize; 4], usize),
    /// A form of the noun of a fact.
    Noun([usize; 4], NounForm),
    /// Text by the gender of a fact: masculine, feminine.
    AgreeWith([usize; 4], [Box<str>; 2]),
}

/// One alternative of a rule.
#[derive(Debug)]
pub(super) struct Alternative {
    /// At least one column.
    pub(super) columns: Vec<Vec<Part>>,
    /// Column 0 as plain text.
    pub(super) noun: Box<str>,
    pub(super) gender: Gender,
}

/// A compiled rule.
#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) weights: Vec<u32>,
    pub(super) alternatives: Vec<Alternative>,
}

/// The compiled rules of a language, and what was wrong with their text (nothing: a test holds that).
pub(super) struct Compilation {
    pub(super) rules: Vec<Compiled>,
    pub(super) start: [usize; 4],
    pub(super) problems: Vec<String>,
}

/// The weight of the alternative of rank `rank`, counted from 0.
fn rank_weight(rank: usize) -> u32 {
    (120 / (rank as u32 + 5)).max(1)
}

struct Compiler<'a> {
    dialect: &'a Dialect,
    names: HashMap<&'static str, usize>,
    problems: Vec<String>,
}

impl Compiler<'_> {
    /// The rule of each agreement: `name`, or `name:m` and `name:f`, or `name:s` and `name:p`.
    fn resolve(&mut self, name: &str) -> [usize; 4] {
        let find = |suffix: &str| self.names.get(format!("{name}{suffix}").as_str()).copied();
        let found = if let Some(i) = find("") {
            Some([i; 4])
        } else if let (Some(m), Some(f)) = (find(":m"), find(":f")) {
            Some([m, f, m, f])
        } else if let (Some(s), Some(p)) = (find(":s"), find(":p")) {
            Some([s, s, p, p])
        } else {
            None
        };
        found.unwrap_or_else(|| {
            self.problems.push(format!("no rule is named {name:?}"));
            [usize::MAX; 4]
        })
    }

    fn slot(&mut self, slot: &str, parts: &mut Vec<Part>) {
        let slot = if let Some(rest) = slot.strip_prefix('^') {
            parts.push(Part::Capital);
            rest
        } else {
            slot
        };
        if let Some((fact, texts)) = slot.split_once('?') {
            let (m, f) = texts.split_once('/').unwrap_or((texts, texts));
            parts.push(Part::AgreeWith(self.resolve(fact), [m.into(), f.into()]));
        } else if slot.contains(['/', '|']) {
            let (one, two) = slot.split_once('|').unwrap_or((slot, slot));
            let [(m, f), (pm, pf)] = [one, two].map(|side| side.split_once('/').unwrap_or((side, side)));
            parts.push(Part::Agree([m, f, pm, pf].map(Box::from)));
        } else if let Some((fact, form)) = slot.split_once('.') {
            let rules = self.resolve(fact);
            if let Ok(column) = form.parse() {
                parts.push(Part::Column(rules, column));
            } else if let Some((_, render)) = self.dialect.forms.iter().find(|(name, _)| *name == form) {
                parts.push(Part::Noun(rules, *render));
            } else {
                self.problems.push(format!("no form is named {form:?} in {{{slot}}}"));
            }
        } else {
            parts.push(Part::Rule(self.resolve(slot)));
        }
    }

    /// Reads an ending at the start of `text` (after its `~`); returns the rest.
    fn ending<'t>(&mut self, text: &'t str, parts: &mut Vec<Part>) -> &'t str {
        let endings = self.dialect.endings.iter().filter(|(name, _)| text.starts_with(name));
        if let Some((name, row)) = endings.max_by_key(|(name, _)| name.len()) {
            parts.push(Part::Agree(row.map(Box::from)));
            text.get(name.len()..).unwrap_or_default()
        } else {
            self.problems.push(format!("no ending at ~{text:?}"));
            text
        }
    }

    fn template(&mut self, template: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some(at) = rest.find(['{', '~']) {
            let (text, marked) = rest.split_at(at);
            if !text.is_empty() {
                parts.push(Part::Text(text.into()));
            }
            if let Some(after) = marked.strip_prefix('~') {
                rest = self.ending(after, &mut parts);
            } else if let Some((slot, after)) = marked.get(1..).and_then(|inner| inner.split_once('}')) {
                self.slot(slot, &mut parts);
                rest = after;
            } else {
                self.problems.push(format!("a slot is not closed in {template:?}"));
                rest = "";
            }
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.into()));
        }
        parts
    }

    fn alternative(&mut self, text: &'static str, rank: usize) -> (u32, Alternative) {
        let weighted = text.split_once(':').and_then(|(w, rest)| Some((w.parse().ok()?, rest)));
        let (weight, text) = weighted.unwrap_or((rank_weight(rank), text));
        let (gender, text) = match (text.strip_prefix("m:"), text.strip_prefix("f:")) {
            (Some(rest), _) => (Gender::Masculine, rest),
            (_, Some(rest)) => (Gender::Feminine, rest),
            _ => (Gender::Masculine, text),
        };
        let noun = text.split('@').next().unwrap_or_default().into();
        let columns = text.split('@').map(|column| self.template(column)).collect();
        (weight, Alternative { columns, noun, gender })
    }
}

/// Compiles the rules of a language.
pub(super) fn compile(dialect: &Dialect) -> Compilation {
    let tables = || dialect.rules.iter().copied().flatten();
    let mut compiler = Compiler { dialect, names: HashMap::new(), problems: Vec::new() };
    for (i, (name, _)) in tables().enumerate() {
        if compiler.names.insert(name, i).is_some() {
            compiler.problems.push(format!("two rules are named {name:?}"));
        }
    }
    let mut rules = Vec::new();
    for (_, alternatives) in tables() {
        let compiled = alternatives.iter().enumerate().map(|(rank, text)| compiler.alternative(text, rank));
        let (weights, alternatives) = compiled.unzip();
        rules.push(Compiled { weights, alternatives });
    }
    let start = compiler.resolve("start");
    Compilation { rules, start, problems: compiler.problems }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROKEN: Dialect = Dialect {
        rules: &[&[
            ("start", &["{nothing}", "{open", "~zz", "{word.odd}"]),
            ("word", &["a"]),
            ("word", &["b"]),
        ]],
        forms: &[],
        endings: &[],
    };

    #[test]
    fn every_mistake_in_a_template_is_reported() {
        let problems = compile(&BROKEN).problems;
        let expected = ["two rules", "no rule is named \"nothing\"", "not closed", "no ending", "no form"];
        assert_eq!(problems.len(), expected.len(), "{problems:?}");
        for (problem, text) in problems.iter().zip(expected) {
            assert!(problem.contains(text), "{problem} lacks {text}");
        }
    }

    #[test]
    fn weights_fall_with_the_rank_and_may_be_given() {
        const DIALECT: Dialect =
            Dialect { rules: &[&[("start", &["a", "50:b", "c", "d"])]], forms: &[], endings: &[] };
        assert_eq!(compile(&DIALECT).rules[0].weights, [24, 50, 17, 15]);
    }
}
