//! Numbers about text.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use vesper_data::{TextTokenizer, Tokens};

use crate::chart::{self, Bar};
use crate::dataset::access::{self, Counts};
use crate::dataset::flags::Stats as Flags;

/// Numbers about text and its tokens.
#[derive(Debug, Serialize)]
pub struct Stats {
    /// The files and folders.
    pub sources: Vec<String>,
    /// What the text is without a tokenizer.
    #[serde(flatten)]
    pub counts: Counts,
    /// Tokens, the ends of the documents included.
    pub tokens: u64,
    /// Tokens a byte.
    pub tokens_per_byte: f64,
    /// Bytes a token.
    pub bytes_per_token: f64,
    /// How often the tokenizer had no token for a piece of text.
    pub unknown_tokens: u64,
    /// Tokens of the vocabulary.
    pub vocab_size: u64,
    /// Tokens of the vocabulary that occur.
    pub used_tokens: u64,
    /// Entropy of the tokens' frequencies, in nats: the loss of a model without context.
    pub unigram_entropy: f64,
    /// Tokens a document.
    pub document_tokens: Lengths,
    /// Documents by their tokens: from a power of two up to the next.
    pub histogram: Vec<Bin>,
    /// The most frequent tokens.
    pub frequent: Vec<Frequent>,
    /// The cache's file.
    pub cache: String,
}

/// Tokens a document.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest document.
    pub min: u64,
    /// Half of the documents are not longer.
    pub median: u64,
    /// The mean.
    pub mean: f64,
    /// The longest.
    pub max: u64,
}

/// A bar of the histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Tokens, at least.
    pub from: u64,
    /// Tokens, less than.
    pub to: u64,
    /// How many documents.
    pub documents: u64,
}

/// A frequent token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Frequent {
    /// Its id.
    pub id: u32,
    /// Its name.
    pub token: String,
    /// How often it occurs.
    pub count: u64,
    /// Its share of all tokens.
    pub share: f64,
}

impl Stats {
    /// Reads the text and its tokens.
    ///
    /// # Errors
    /// Names what cannot be read or written.
    pub fn of(flags: &Flags) -> Result<Self> {
        let opened = access::open(&flags.text)?;
        let counts = access::counts(&opened.cache);
        let tokens = opened.cache.tokens();
        let vocab_size = opened.tokenizer.vocab_size();
        let by_id = counts_by_id(&tokens, vocab_size)?;
        let lengths = document_lengths(&tokens)?;
        let (all, bytes) = (tokens.len() as f64, counts.bytes as f64);
        Ok(Self {
            sources: opened.sources.paths().iter().map(|path| path.display().to_string()).collect(),
            counts,
            tokens: tokens.len() as u64,
            tokens_per_byte: all / bytes.max(1.0),
            bytes_per_token: bytes / all.max(1.0),
            unknown_tokens: opened.cache.unknown_tokens(),
            vocab_size: vocab_size as u64,
            used_tokens: by_id.iter().filter(|&&count| count > 0).count() as u64,
            unigram_entropy: tokens.unigram_entropy()?,
            histogram: histogram(&lengths),
            document_tokens: summary(lengths),
            frequent: frequent(&by_id, flags.top, &opened.tokenizer),
            cache: opened.cache.path().display().to_string(),
        })
    }

    /// Prints the numbers for people.
    pub fn print(&self) {
        let number = |name: &str, value: String| crate::say!("{name:<22} {value}");
        let counts = &self.counts;
        number("documents", counts.documents.to_string());
        if counts.records_skipped > 0 {
            number("records skipped", counts.records_skipped.to_string());
        }
        if let Some(questions) = counts.questions {
            let (impossible, wrong) = (counts.impossible_questions, counts.wrong_answer_offsets);
            let (impossible, wrong) = (impossible.unwrap_or(0), wrong.unwrap_or(0));
            number(
                "questions",
                format!("{questions}, {impossible} of them impossible, {wrong} answers misplaced"),
            );
        }
        number("bytes", counts.bytes.to_string());
        number("characters", counts.characters.to_string());
        number("tokens", self.tokens.to_string());
        number("tokens a byte", format!("{:.4}", self.tokens_per_byte));
        number("bytes a token", format!("{:.3}", self.bytes_per_token));
        number("unknown tokens", self.unknown_tokens.to_string());
        number("vocabulary", format!("{}, {} of it used", self.vocab_size, self.used_tokens));
        number("unigram entropy", format!("{:.4} nats a token", self.unigram_entropy));
        let Lengths { min, median, mean, max } = self.document_tokens;
        number("tokens a document", format!("{min} to {max}, median {median}, mean {mean:.1}"));
        let most = self.histogram.iter().map(|bin| bin.documents).max().unwrap_or(0).max(1);
        for bin in &self.histogram {
            let bar = "#".repeat((40 * bin.documents).div_ceil(most) as usize);
            number(&format!("  {} to {}", bin.from, bin.to - 1), format!("{:<8} {bar}", bin.documents));
        }
        number("most frequent tokens", String::new());
        for Frequent { id, token, count, share } in &self.frequent {
            let name = crate::printable(token).replace('\n', "\\n");
            number(&format!("  {id:>8}"), format!("{count:>10} {:6.2} %  {name}", 100.0 * share));
        }
    }

    /// Draws the histogram.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn draw(&self, path: &Path) -> Result<()> {
        let bars: Vec<Bar> = self
            .histogram
            .iter()
            .map(|bin| Bar {
                left: (bin.from as f64).log2(),
                right: (bin.to as f64).log2(),
                height: bin.documents as f64,
            })
            .collect();
        let title = format!("{} documents, {} tokens", self.counts.documents, self.tokens);
        chart::write_bars(path, &title, ("tokens a document", "documents"), &bars, |x| {
            format!("{:.0}", x.exp2())
        })
    }
}

/// How often each id occurs.
fn counts_by_id(tokens: &Tokens, vocab_size: usize) -> Result<Vec<u64>> {
    let mut counts = vec![0_u64; vocab_size];
    let mut buffer = vec![0_u32; 1 << 16];
    let mut position = 0;
    while position < tokens.len() {
        let take = (tokens.len() - position).min(buffer.len());
        let ids = buffer.get_mut(..take).unwrap_or_default();
        tokens.read_into(position, ids)?;
        for &id in ids.iter() {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1;
            }
        }
        position += take;
    }
    Ok(counts)
}

fn document_lengths(tokens: &Tokens) -> Result<Vec<u64>> {
    tokens.documents().map(|document| Ok(document?.len() as u64)).collect()
}

fn histogram(lengths: &[u64]) -> Vec<Bin> {
    let mut bins: Vec<Bin> = Vec::new();
    for &length in lengths {
        let power = length.max(1).ilog2() as usize;
        while bins.len() <= power {
            let from = 1 << bins.len();
            bins.push(Bin { from, to: 2 * from, documents: 0 });
        }
        if let Some(bin) = bins.get_mut(power) {
            bin.documents += 1;
        }
    }
    // Powers below the shortest document are no news.
    let first = bins.iter().position(|bin| bin.documents > 0).unwrap_or(0);
    bins.split_off(first)
}

fn summary(mut lengths: Vec<u64>) -> Lengths {
    lengths.sort_unstable();
    let at = |index: usize| lengths.get(index).copied().unwrap_or(0);
    Lengths {
        min: at(0),
        median: at(lengths.len().saturating_sub(1) / 2),
        mean: lengths.iter().sum::<u64>() as f64 / lengths.len().max(1) as f64,
        max: at(lengths.len().saturating_sub(1)),
    }
}

fn frequent(counts: &[u64], top: usize, tokenizer: &TextTokenizer) -> Vec<Frequent> {
    let all: u64 = counts.iter().sum();
    let mut by_count: Vec<(u64, u32)> =
        counts.iter().copied().zip(0..).filter(|(count, _)| *count > 0).collect();
    by_count.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    by_count.truncate(top);
    let named = |(count, id): (u64, u32)| Frequent {
        id,
        token: tokenizer.id_to_token(id).unwrap_or_default(),
        count,
        share: count as f64 / all.max(1) as f64,
    };
    by_count.into_iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_counted_by_powers_of_two() {
        let lengths = [4, 7, 8, 3, 40];
        let bins = histogram(&lengths);
        let counts: Vec<_> = bins.iter().map(|bin| (bin.from, bin.to, bin.documents)).collect();
        assert_eq!(counts, [(2, 4, 1), (4, 8, 2), (8, 16, 1), (16, 32, 0), (32, 64, 1)]);
        assert_eq!(summary(lengths.into()), Lengths { min: 3, median: 7, mean: 12.4, max: 40 });
        assert!(histogram(&[]).is_empty());
    }

    #[test]
    fn lengths_and_frequencies_come_from_the_tokens() {
        let tokens = Tokens::from_documents([Ok(vec![3, 3, 1]), Ok(vec![3])]).unwrap();
        assert_eq!(document_lengths(&tokens).unwrap(), [3, 1]);
        assert_eq!(counts_by_id(&tokens, 5).unwrap(), [0, 1, 0, 3, 0]);
    }
}
