//! The generator run backwards: every derivation of a given text, and the probability of each.

use super::draw::{Draw, surprisal};

/// What an exhaustive search for the derivations of a text found.
#[derive(Debug, Clone, PartialEq)]
pub struct Derivations {
    /// How many derivations give exactly the text.
    pub count: usize,
    /// `-ln P(text)` in nats, `P` summed over the derivations: infinite where there is none.
    pub nats: f64,
    /// How many bytes of the text some derivation can begin with: the whole length for a story.
    pub matched: usize,
}

/// The text emitted is not what the target has at this place.
#[derive(Debug)]
pub(super) struct Mismatch;

/// One choice of the script that is being replayed.
struct Step {
    index: usize,
    alternatives: usize,
    nats: f64,
}

/// Replays a script of choices against a target text, and extends it by first alternatives.
struct Replay<'a> {
    target: &'a [u8],
    position: usize,
    matched: usize,
    script: Vec<Step>,
    cursor: usize,
}

impl Draw for Replay<'_> {
    type Stop = Mismatch;

    fn choose(&mut self, weights: &[u32]) -> Result<usize, Mismatch> {
        if weights.len() < 2 {
            return Ok(0);
        }
        if self.cursor == self.script.len() {
            self.script.push(Step { index: 0, alternatives: weights.len(), nats: 0.0 });
        }
        let step = self.script.get_mut(self.cursor).ok_or(Mismatch)?;
        step.nats = surprisal(weights, step.index);
        self.cursor += 1;
        Ok(step.index)
    }

    fn emit(&mut self, text: &str) -> Result<(), Mismatch> {
        let rest = self.target.get(self.position..).unwrap_or_default();
        let same = rest.iter().zip(text.as_bytes()).take_while(|(a, b)| a == b).count();
        self.matched = self.matched.max(self.position + same);
        if same < text.len() {
            return Err(Mismatch);
        }
        self.position += same;
        Ok(())
    }
}

impl Replay<'_> {
    /// Moves the script to the next branch of the tree in depth-first order; false at its end.
    fn advance(&mut self) -> bool {
        // Choices after the cursor belong to a branch that the last run did not reach.
        self.script.truncate(self.cursor);
        while let Some(step) = self.script.last_mut() {
            if step.index + 1 < step.alternatives {
                step.index += 1;
                return true;
            }
            self.script.pop();
        }
        false
    }
}

/// Walks the whole tree of choices of `generate`, leaving a branch at its first byte that differs.
pub(super) fn derivations<F>(target: &str, mut generate: F) -> Derivations
where
    F: FnMut(&mut dyn Draw<Stop = Mismatch>) -> Result<(), Mismatch>,
{
    let target = target.as_bytes();
    let mut replay = Replay { target, position: 0, matched: 0, script: Vec::new(), cursor: 0 };
    let (mut count, mut probability) = (0, 0.0);
    loop {
        replay.position = 0;
        replay.cursor = 0;
        if generate(&mut replay).is_ok() && replay.position == target.len() {
            count += 1;
            probability += (-replay.script.iter().map(|step| step.nats).sum::<f64>()).exp();
        }
        if !replay.advance() {
            break;
        }
    }
    Derivations { count, nats: -f64::ln(probability), matched: replay.matched }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two letters, each `a` or `b` or `ab`: "ab" then "a" and "a" then "ba" would clash.
    fn two_words(draw: &mut dyn Draw<Stop = Mismatch>) -> Result<(), Mismatch> {
        for _ in 0..2 {
            let word = ["a", "b", "ab", "ba"][draw.choose(&[4, 3, 2, 1])?];
            draw.emit(word)?;
        }
        Ok(())
    }

    #[test]
    fn every_derivation_of_an_ambiguous_text_is_counted() {
        let found = derivations("aba", two_words);
        assert_eq!(found.count, 2); // a+ba, ab+a
        assert!((found.nats + (0.4_f64 * 0.1 + 0.2 * 0.4).ln()).abs() < 1e-12);
        assert_eq!(found.matched, 3);
    }

    #[test]
    fn a_text_outside_the_language_has_no_derivation() {
        let found = derivations("abz", two_words);
        assert_eq!((found.count, found.matched), (0, 2));
        assert!(found.nats.is_infinite());
        assert_eq!(derivations("abab!", two_words).count, 0);
    }
}
