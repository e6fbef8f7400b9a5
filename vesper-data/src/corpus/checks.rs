//! Checks of the grammars themselves.

use std::convert::Infallible;

use super::draw::{Draw, Sampler, surprisal};
use super::template::{Dialect, Part, compile};
use super::{Language, Languages, Split, StoryCorpus, english, french};

const DIALECTS: [&Dialect; 2] = [&english::DIALECT, &french::DIALECT];

#[test]
fn the_grammars_have_no_mistake() {
    for dialect in DIALECTS {
        assert_eq!(compile(dialect).problems, Vec::<String>::new());
    }
}

/// Visits a rule and those it mentions; panics where a rule leads back to itself.
fn visit(dialect: &Dialect, id: usize, path: &mut Vec<usize>, seen: &mut Vec<usize>) {
    let names: Vec<_> = dialect.rules.iter().copied().flatten().map(|(name, _)| *name).collect();
    assert!(!path.contains(&id), "{} leads back to itself", names[id]);
    if seen.contains(&id) {
        return;
    }
    path.push(id);
    let compiled = compile(dialect);
    for alternative in &compiled.rules[id].alternatives {
        for part in alternative.columns.iter().flatten() {
            let (Part::Rule(ids) | Part::Column(ids, _) | Part::Noun(ids, _) | Part::AgreeWith(ids, _)) =
                part
            else {
                continue;
            };
            for &id in ids {
                visit(dialect, id, path, seen);
            }
            if let Part::Column(ids, column) = part {
                for alternative in ids.iter().flat_map(|&id| &compiled.rules[id].alternatives) {
                    assert!(*column < alternative.columns.len(), "{} has no such column", alternative.noun);
                }
            }
        }
    }
    path.pop();
    seen.push(id);
}

#[test]
fn every_rule_is_used_and_none_leads_back_to_itself() {
    for dialect in DIALECTS {
        let names: Vec<_> = dialect.rules.iter().copied().flatten().map(|(name, _)| *name).collect();
        let start = names.iter().position(|name| *name == "start").unwrap();
        let mut seen = Vec::new();
        visit(dialect, start, &mut Vec::new(), &mut seen);
        let unused: Vec<_> = (0..names.len()).filter(|id| !seen.contains(id)).map(|id| names[id]).collect();
        assert!(unused.is_empty(), "{unused:?}");
    }
}

#[test]
fn nouns_that_take_a_form_are_plain_words() {
    for dialect in DIALECTS {
        let compiled = compile(dialect);
        for part in
            compiled.rules.iter().flat_map(|rule| &rule.alternatives).flat_map(|a| &a.columns).flatten()
        {
            let Part::Noun(ids, _) = part else { continue };
            for alternative in ids.iter().flat_map(|&id| &compiled.rules[id].alternatives) {
                assert!(!alternative.noun.contains(['{', '~', '@', ':']), "{}", alternative.noun);
            }
        }
    }
}

#[test]
fn french_words_after_an_unelided_article_begin_with_a_consonant() {
    let rules = french::DIALECT.rules.iter().copied().flatten();
    for (name, words) in rules.filter(|(name, _)| {
        [
            "helper", "noun_m", "noun_f", "gear_m", "gear_f", "tool_m", "tool_f", "dream", "pre", "dish",
            "size_m",
        ]
        .contains(name)
    }) {
        for word in *words {
            let word = word.rsplit(':').next().unwrap();
            assert!(
                !word.starts_with(['a', 'e', 'i', 'o', 'u', 'é', 'h']) || word == "hibou",
                "{name}: {word}"
            );
        }
    }
}

/// Draws stories, and adds up the entropy of every set of weights it meets instead of the surprisals: a
/// different estimate, of smaller variance, of the same mean.
struct Entropy {
    sampler: Sampler,
    nats: f64,
}

impl Draw for Entropy {
    type Stop = Infallible;

    fn choose(&mut self, weights: &[u32]) -> Result<usize, Infallible> {
        let total: u32 = weights.iter().sum();
        let term = |i: usize| f64::from(weights[i]) / f64::from(total) * surprisal(weights, i);
        self.nats += (0..weights.len()).map(term).sum::<f64>();
        self.sampler.choose(weights)
    }

    fn emit(&mut self, text: &str) -> Result<(), Infallible> {
        self.sampler.emit(text)
    }
}

#[test]
fn the_mean_information_of_the_stories_is_the_entropy_of_the_grammar() {
    let count = 4000;
    for (language, languages) in
        [(Language::English, Languages::English), (Language::French, Languages::French)]
    {
        let mut entropy = 0.0;
        for index in 0..count {
            let mut draw = Entropy { sampler: Sampler::new(99, 1, index), nats: 0.0 };
            let Ok(()) = language.grammar().tell(&mut draw);
            entropy += draw.nats / count as f64;
        }
        let corpus = StoryCorpus::new(3).with_languages(languages).with_split(Split::Train);
        let nats: Vec<f64> = corpus.stories().take(count as usize).map(|story| story.nats).collect();
        let mean = nats.iter().sum::<f64>() / count as f64;
        let variance = nats.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
        let error = (variance / count as f64).sqrt();
        // The two means come from unlike seeds: both sampling errors are in the difference.
        assert!((mean - entropy).abs() < 6.0 * error, "{mean} and {entropy}, standard error {error}");
        assert!(error < 0.01 * mean, "too few stories to tell");
    }
}
