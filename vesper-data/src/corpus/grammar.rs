//! Expands a compiled grammar: draws alternatives, remembers facts, and makes words agree with the hero.

use super::draw::Draw;
use super::template::{AGREEMENTS, Agreement, Alternative, Compilation, Compiled, Dialect, Part, compile};

/// How often the hero is a he, a she, two of the first, two of the second.
const HERO_WEIGHTS: [u32; 4] = [20, 20, 2, 2];

/// The grammar of one language.
pub(super) struct Grammar {
    rules: Vec<Compiled>,
    start: [usize; 4],
}

/// What a story has settled so far.
struct State {
    hero: Agreement,
    /// The alternative chosen for each rule that is used as a fact.
    facts: Vec<Option<usize>>,
    capital: bool,
}

impl Grammar {
    /// Compiles the rules of a language, whose text a test holds to be without mistake.
    pub(super) fn new(dialect: &Dialect) -> Self {
        let Compilation { rules, start, problems } = compile(dialect);
        debug_assert!(problems.is_empty(), "{problems:?}");
        Self { rules, start }
    }

    /// Writes one story through `draw`.
    pub(super) fn tell<D: Draw + ?Sized>(&self, draw: &mut D) -> Result<(), D::Stop> {
        let hero = draw.choose(&HERO_WEIGHTS)?;
        let mut state = State { hero, facts: vec![None; self.rules.len()], capital: false };
        self.rule(&self.start, &mut state, draw)
    }

    fn rule<D: Draw + ?Sized>(
        &self,
        ids: &[usize; 4],
        state: &mut State,
        draw: &mut D,
    ) -> Result<(), D::Stop> {
        // The identifiers come from the compiler, which names every one it cannot find.
        let Some(rule) = ids.get(state.hero).and_then(|&id| self.rules.get(id)) else { return Ok(()) };
        let chosen = draw.choose(&rule.weights)?;
        match rule.alternatives.get(chosen).and_then(|alternative| alternative.columns.first()) {
            Some(parts) => self.parts(parts, state, draw),
            None => Ok(()),
        }
    }

    /// The alternative of a fact, drawn if this is its first mention.
    fn fact<D: Draw + ?Sized>(
        &self,
        ids: &[usize; 4],
        state: &mut State,
        draw: &mut D,
    ) -> Result<Option<&Alternative>, D::Stop> {
        let Some(&id) = ids.get(state.hero) else { return Ok(None) };
        let Some(rule) = self.rules.get(id) else { return Ok(None) };
        let known = state.facts.get(id).copied().flatten();
        let chosen = match known {
            Some(chosen) => chosen,
            None => draw.choose(&rule.weights)?,
        };
        if let Some(fact) = state.facts.get_mut(id) {
            *fact = Some(chosen);
        }
        Ok(rule.alternatives.get(chosen))
    }

    fn parts<D: Draw + ?Sized>(
        &self,
        parts: &[Part],
        state: &mut State,
        draw: &mut D,
    ) -> Result<(), D::Stop> {
        for part in parts {
            match part {
                Part::Text(text) => emit(text, state, draw)?,
                Part::Capital => state.capital = true,
                Part::Agree(row) => emit(row.get(state.hero).map_or("", |text| text), state, draw)?,
                Part::Rule(ids) => self.rule(ids, state, draw)?,
                Part::Column(ids, column) => {
                    if let Some(alternative) = self.fact(ids, state, draw)?
                        && let Some(parts) = alternative.columns.get(*column)
                    {
                        self.parts(parts, state, draw)?;
                    }
                }
                Part::Noun(ids, render) => {
                    let hero = AGREEMENTS.get(state.hero).copied().unwrap_or(AGREEMENTS[0]);
                    if let Some(alternative) = self.fact(ids, state, draw)? {
                        let form = render(&alternative.noun, alternative.gender, hero);
                        emit(&form, state, draw)?;
                    }
                }
                Part::AgreeWith(ids, texts) => {
                    if let Some(alternative) = self.fact(ids, state, draw)? {
                        emit(&texts[alternative.gender as usize], state, draw)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Emits text, with its first letter raised where that was asked for.
fn emit<D: Draw + ?Sized>(text: &str, state: &mut State, draw: &mut D) -> Result<(), D::Stop> {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) if state.capital => {
            state.capital = false;
            let raised: String = first.to_uppercase().chain(letters).collect();
            draw.emit(&raised)
        }
        Some(_) => draw.emit(text),
        None => Ok(()),
    }
}
