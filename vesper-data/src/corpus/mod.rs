//! Endless little stories in French and English, with their exact information content.
//!
//! [`StoryCorpus`] writes stories from a weighted grammar: a hero with a home and a habit, something to find,
//! see, cook, mend or win, an obstacle, a helper, a word of advice, an ending that looks back. What a story
//! settles early (name, species, gender, number, goal, obstacle) it keeps to its end. The grammar was written
//! for this crate, so the text has no other author and falls under the crate's licence.
//!
//! # The floor
//!
//! A story is the result of weighted draws `d_1 .. d_n`, each independent given those before it:
//!
//! ```text
//! nats(story) = sum_i -ln p(d_i | d_1 .. d_{i-1})
//! ```
//!
//! No two derivations give the same text (a test parses stories back and counts), so `nats(story)` is exactly
//! `-ln P(story)`, and its mean over stories is the entropy of the corpus. By Gibbs' inequality no language
//! model's mean loss on fresh stories, one story a document and its end included, can be lower:
//!
//! ```text
//! floor, in nats a token = sum(nats) / sum(tokens)
//! ```
//!
//! with `tokens` counted as the loss counts them (the end-of-text token of each story included). The order
//! and end of stories carry no information: the number of stories is given, and where a story stops follows
//! from its text. A model that sees a story cut at a window's edge lacks its beginning and can only do worse.
//!
//! # Random access and held-out stories
//!
//! Story `i` is drawn from the ChaCha8 keystream number `i` of a key made of the seed and the [`Split`]; it
//! depends on nothing else, so any thread may write any story. Training and held-out stories have the same
//! distribution and share no keystream. A text carries some 100 nats, so that the same whole story drawn twice
//! is not something that happens.
//!
//! # Changing the grammar
//!
//! A language is a folder: tables of rules in the notation that `template.rs` describes, likeliest
//! alternatives first, and the forms of its nouns. A new plot is one rule and one line of the rule `plot`. The
//! tests find a slot without a rule, a rule without a use, and any change that makes a text ambiguous.
//!
//! ```
//! use vesper_data::corpus::{Languages, Split, StoryCorpus, floor_nats};
//!
//! let corpus = StoryCorpus::new(42).with_languages(Languages::English);
//! let story = corpus.story(7);
//! assert_eq!(story, corpus.story(7));
//! assert!(story.text.ends_with(['.', '!', '"']));
//!
//! // Parsing the story back finds one derivation, of the same probability.
//! let parsed = corpus.derivations(&story.text);
//! assert_eq!(parsed.count, 1);
//! assert!((parsed.nats - story.nats).abs() < 1e-9);
//!
//! // The floor of a held-out set, in nats a byte.
//! let held_out = corpus.with_split(Split::HeldOut).take_stories(100);
//! let bytes: usize = held_out.iter().map(|story| story.text.len()).sum();
//! let floor = floor_nats(&held_out) / bytes as f64;
//! assert!((0.1..0.3).contains(&floor));
//! ```

mod draw;
mod english;
mod french;
mod grammar;
mod parse;
mod template;

#[cfg(test)]
mod checks;

use std::sync::LazyLock;

use draw::{Draw, Sampler};
use grammar::Grammar;
pub use parse::Derivations;

static ENGLISH: LazyLock<Grammar> = LazyLock::new(|| Grammar::new(&english::DIALECT));
static FRENCH: LazyLock<Grammar> = LazyLock::new(|| Grammar::new(&french::DIALECT));

/// The language of a story.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Language {
    /// English.
    English,
    /// French.
    French,
}

impl Language {
    fn grammar(self) -> &'static Grammar {
        match self {
            Self::English => &ENGLISH,
            Self::French => &FRENCH,
        }
    }
}

/// Which languages a corpus is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Languages {
    /// Each story is English or French with probability one half, which costs it `ln 2` nats.
    #[default]
    Both,
    /// English stories only.
    English,
    /// French stories only.
    French,
}

impl Languages {
    fn choices(self) -> &'static [Language] {
        match self {
            Self::Both => &[Language::English, Language::French],
            Self::English => &[Language::English],
            Self::French => &[Language::French],
        }
    }
}

/// Which of two sets of stories, equal in distribution and drawn apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Split {
    /// The stories to train on.
    #[default]
    Train,
    /// The stories to evaluate on.
    HeldOut,
}

/// One story.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    /// Its text, without a final newline: three lines, or four with a title; words parted by single spaces.
    pub text: String,
    /// `-ln P(text)`, in nats.
    pub nats: f64,
    /// The language it is written in.
    pub language: Language,
}

/// A corpus of stories of any size: see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoryCorpus {
    seed: u64,
    languages: Languages,
    split: Split,
}

impl StoryCorpus {
    /// The training stories of a seed, in both languages.
    pub fn new(seed: u64) -> Self {
        Self { seed, languages: Languages::default(), split: Split::default() }
    }

    /// The same corpus in the given languages.
    #[must_use]
    pub fn with_languages(mut self, languages: Languages) -> Self {
        self.languages = languages;
        self
    }

    /// The training or the held-out stories of the same seed.
    #[must_use]
    pub fn with_split(mut self, split: Split) -> Self {
        self.split = split;
        self
    }

    /// Story number `index`: a function of the seed, the languages, the split and the index alone.
    pub fn story(&self, index: u64) -> Story {
        let mut sampler = Sampler::new(self.seed, self.split as u8, index);
        let Ok(language) = self.tell(&mut sampler);
        let (text, nats) = sampler.finish();
        Story { text, nats, language }
    }

    /// Stories 0, 1, 2, ... without end.
    pub fn stories(&self) -> Stories {
        Stories { corpus: *self, next: 0 }
    }

    /// The first `count` stories.
    pub fn take_stories(&self, count: usize) -> Vec<Story> {
        self.stories().take(count).collect()
    }

    /// The fewest first stories whose texts have at least `bytes` bytes in all: none for zero.
    pub fn take_bytes(&self, bytes: usize) -> Vec<Story> {
        let mut total = 0_usize;
        let enough = self.stories().take_while(|story| {
            let wanted = total < bytes;
            total = total.saturating_add(story.text.len());
            wanted
        });
        enough.collect()
    }

    /// Every derivation of a text in this corpus's grammar, by exhaustive search.
    ///
    /// A text that the corpus can contain has exactly one, of `-ln P` equal to [`Story::nats`]; any other text
    /// has none. Use it to ask whether what a trained model wrote is a story of the language, how likely it
    /// is, or ([`Derivations::matched`]) where it leaves the language.
    ///
    /// ```
    /// use vesper_data::corpus::StoryCorpus;
    ///
    /// let parsed = StoryCorpus::new(0).derivations("Once upon a time, there was a purple fox.");
    /// assert_eq!(parsed.count, 0);
    /// assert_eq!(parsed.matched, "Once upon a time, there was a ".len());
    /// ```
    pub fn derivations(&self, text: &str) -> Derivations {
        parse::derivations(text, |draw| self.tell(draw).map(|_| ()))
    }

    fn tell<D: Draw + ?Sized>(&self, draw: &mut D) -> Result<Language, D::Stop> {
        let choices = self.languages.choices();
        let chosen = draw.choose([1, 1].get(..choices.len()).unwrap_or(&[1]))?;
        let language = choices.get(chosen).copied().unwrap_or(Language::English);
        language.grammar().tell(draw)?;
        Ok(language)
    }
}

/// The information content of some stories, in nats: divided by their number of tokens (end-of-text tokens
/// included), the least mean loss that any model can expect on stories like them.
///
/// ```
/// use vesper_data::corpus::{StoryCorpus, floor_nats};
///
/// let stories = StoryCorpus::new(1).take_stories(3);
/// assert_eq!(floor_nats(&stories), stories[0].nats + stories[1].nats + stories[2].nats);
/// assert_eq!(floor_nats(&[]), 0.0);
/// ```
pub fn floor_nats(stories: &[Story]) -> f64 {
    // `Sum` for floats starts from -0.0, which would print as "-0" for no story.
    stories.iter().fold(0.0, |total, story| total + story.nats)
}

/// The stories of a corpus in order, without end.
#[derive(Debug, Clone)]
pub struct Stories {
    corpus: StoryCorpus,
    next: u64,
}

impl Stories {
    /// The stories from number `index` on.
    #[must_use]
    pub fn starting_at(mut self, index: u64) -> Self {
        self.next = index;
        self
    }
}

impl Iterator for Stories {
    type Item = Story;

    fn next(&mut self) -> Option<Story> {
        let story = self.corpus.story(self.next);
        self.next = self.next.wrapping_add(1);
        Some(story)
    }
}
