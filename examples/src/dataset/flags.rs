//! The flags of the program `data`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::de::DeserializeOwned;
use vesper_data::french::{
    Apostrophes, Cleanup, Composition, Dashes, Ellipses, Invisible, Ligatures, Quotes, Spaces,
};
use vesper_data::sizing::{Law, LossFit};
use vesper_data::source::{BrokenRecords, FormatKind, Labels, LossOn, SquadDocuments, TextDocuments};
use vesper_data::tokenizer::{Algorithm, TokenLayout};
use vesper_data::{ReadSettings, TrainConfig};

/// Look at text as a model will see it: tokens, statistics, samples, and what to train on it.
#[derive(Debug, Clone, Parser)]
#[command(name = "data", version, long_about = None)]
pub struct Flags {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Tokenise text into a cache, which train then opens at once
    Build(Text),
    /// Print what cache files say about themselves, after checking them
    Inspect(Inspect),
    /// Count documents, tokens and bytes; lengths, frequent tokens, entropy
    Stats(Stats),
    /// Print random pieces of text, decoded from their tokens
    Sample(Sample),
    /// Say which model suits the text, and how long training takes
    Plan(Plan),
    /// Write French text with one typography, as JSONL
    Clean(Clean),
}

/// Text, and what makes tokens of it.
#[derive(Debug, Clone, Args)]
pub struct Text {
    /// Files and folders
    #[arg(value_name = "PATH")]
    pub positional: Vec<PathBuf>,
    /// More files and folders, as the program train names them
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// A tokenizer.json [default: a byte-level BPE trained on the text]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Train a tokenizer on the text
    #[arg(long, value_name = "KIND")]
    pub train_tokenizer: Option<Kind>,
    /// Entries of the trained tokenizer's vocabulary, special tokens included [default: 32000;
    /// train takes that of its --size]
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<usize>,
    /// Special tokens of the trained tokenizer [default: camembert for unigram, else end-of-text]
    #[arg(long, value_name = "LAYOUT")]
    pub special_tokens: Option<Layout>,
    /// Where to keep the tokenizer
    #[arg(long, value_name = "FILE")]
    pub save_tokenizer: Option<PathBuf>,
    /// Folder of the token caches
    #[arg(long, value_name = "DIR", default_value = "data-cache")]
    pub cache: PathBuf,
    /// How the files are read
    #[command(flatten)]
    pub read: Read,
}

/// How files are read.
#[derive(Debug, Clone, Args)]
pub struct Read {
    /// The format of every file [default: by each file's content and name]
    #[arg(long, value_name = "NAME", value_parser = named::<FormatKind>)]
    pub format: Option<FormatKind>,
    /// Where the text of a JSON or Parquet record is, such as `text` or `page.body` [default: by the fields' names]
    #[arg(long, value_name = "FIELD")]
    pub text_field: Option<String>,
    /// Where in a JSON document its list of records is [default: the document is the list]
    #[arg(long, value_name = "FIELD")]
    pub records: Option<String>,
    /// What a document of a SQuAD file is: pairs (of question and answer) or paragraphs [default: pairs]
    #[arg(long, value_name = "KIND", value_parser = named::<SquadDocuments>)]
    pub squad: Option<SquadDocuments>,
    /// What counts in the loss where there are answers: answers or everything [default: answers]
    #[arg(long, value_name = "PART", value_parser = named::<LossOn>)]
    pub loss: Option<LossOn>,
    /// What a document of a plain text file is: separated (by <|endoftext|>; else the whole file) or lines
    /// [default: separated]
    #[arg(long, value_name = "KIND", value_parser = named::<TextDocuments>)]
    pub text_documents: Option<TextDocuments>,
    /// The words before turns, questions and answers: english or french [default: english]
    #[arg(long, value_name = "LANGUAGE")]
    pub labels: Option<Language>,
    /// How many broken records are passed over and reported before one is an error: a number or any
    #[arg(long, value_name = "N", default_value = "1000", value_parser = broken, allow_hyphen_values = true)]
    pub broken: BrokenRecords,
}

impl Read {
    /// The flags as settings.
    ///
    /// # Errors
    /// A flag that is out of range.
    pub fn settings(&self) -> Result<ReadSettings> {
        let mut settings = ReadSettings::default().with_broken(self.broken);
        settings.format = self.format;
        if let Some(field) = &self.text_field {
            settings = settings.with_text(field.as_str());
        }
        if let Some(field) = &self.records {
            settings = settings.with_records(field.as_str());
        }
        settings.squad = self.squad.unwrap_or_default();
        settings.loss = self.loss.unwrap_or_default();
        settings.text_documents = self.text_documents.unwrap_or_default();
        settings.labels = match self.labels {
            Some(Language::French) => Labels::french(),
            Some(Language::English) | None => Labels::default(),
        };
        settings.validate()?;
        Ok(settings)
    }
}

/// A language of labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// User, Assistant, ...
    English,
    /// Utilisateur, Réponse, ...
    French,
}

/// A number of broken records, or any.
fn broken(value: &str) -> Result<BrokenRecords, String> {
    match value {
        "any" => Ok(BrokenRecords::Any),
        _ => value.parse().map(BrokenRecords::AtMost).map_err(|_| "expected a number, or any".to_owned()),
    }
}

/// A choice by the name that the settings have for it.
fn named<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

/// A kind of tokenizer to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Byte-level BPE, as GPT-2's
    Bpe,
    /// Unigram, as CamemBERT's
    Unigram,
}

/// The special tokens of a trained tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// `<|endoftext|>` alone
    EndOfText,
    /// Those of CamemBERT, at its ids
    Camembert,
}

impl Text {
    /// All files and folders that were named.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.positional.iter().chain(&self.data)
    }

    /// Whether nothing that was asked for decides how many entries the vocabulary has.
    pub fn leaves_the_vocabulary_open(&self) -> bool {
        self.tokenizer.is_none() && self.vocab_size.is_none()
    }

    /// How to train a tokenizer, where that was asked for.
    ///
    /// # Errors
    /// Flags that contradict each other, or are out of range.
    pub fn training(&self) -> Result<Option<TrainConfig>> {
        let asked =
            self.train_tokenizer.is_some() || self.vocab_size.is_some() || self.special_tokens.is_some();
        if self.tokenizer.is_some() {
            if asked {
                bail!(
                    "--tokenizer: --train-tokenizer, --vocab-size and --special-tokens are for a tokenizer that is trained"
                );
            }
            return Ok(None);
        }
        let kind = self.train_tokenizer.unwrap_or(Kind::Bpe);
        let layout = self.special_tokens.unwrap_or(match kind {
            Kind::Bpe => Layout::EndOfText,
            Kind::Unigram => Layout::Camembert,
        });
        let mut config = TrainConfig::default()
            .with_algorithm(match kind {
                Kind::Bpe => Algorithm::Bpe,
                Kind::Unigram => Algorithm::Unigram,
            })
            .with_layout(match layout {
                Layout::EndOfText => TokenLayout::EndOfText,
                Layout::Camembert => TokenLayout::Camembert,
            });
        if let Some(size) = self.vocab_size {
            config = config.with_vocab_size(size);
        }
        if let Err(error) = config.validate() {
            bail!("--{}", error.to_string().replacen('_', "-", 1));
        }
        Ok(Some(config))
    }
}

/// Flags of `inspect`.
#[derive(Debug, Clone, Args)]
pub struct Inspect {
    /// Folders of caches, or folders that hold caches
    #[arg(value_name = "DIR", required = true)]
    pub caches: Vec<PathBuf>,
    /// One JSON object for each cache
    #[arg(long)]
    pub json: bool,
}

/// Flags of `stats`.
#[derive(Debug, Clone, Args)]
pub struct Stats {
    /// The text
    #[command(flatten)]
    pub text: Text,
    /// One JSON object instead of text for people
    #[arg(long)]
    pub json: bool,
    /// Where to draw the histogram of the documents' lengths
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// How many of the most frequent tokens to list
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub top: usize,
}

/// Flags of `sample`.
#[derive(Debug, Clone, Args)]
pub struct Sample {
    /// The text
    #[command(flatten)]
    pub text: Text,
    /// How many pieces
    #[arg(long, default_value_t = 3)]
    pub count: usize,
    /// Tokens a piece
    #[arg(long, default_value_t = 64)]
    pub length: usize,
    /// Another seed, other pieces
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Flags of `plan`.
#[derive(Debug, Clone, Args)]
pub struct Plan {
    /// The text
    #[command(flatten)]
    pub text: Text,
    /// Plan for this many tokens, without text
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub tokens: Option<f64>,
    /// Plan for this many operations instead of for as many tokens as there are
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    pub flops: Option<f64>,
    /// The scaling law
    #[arg(long, default_value = "ratio")]
    pub law: LawName,
    /// Tokens a parameter, for the law of the same name
    #[arg(long, value_name = "R", default_value_t = 20.0, allow_negative_numbers = true)]
    pub ratio: f64,
    /// Tokens a second that training reaches, for the hours
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    pub speed: Option<f64>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// A scaling law.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LawName {
    /// Chinchilla's rule: 20 tokens a parameter, or --ratio
    Ratio,
    /// The fit of the Chinchilla paper
    Hoffmann,
    /// Epoch AI's fit to the same measurements
    Epoch,
}

impl Plan {
    /// The law with its constants.
    pub fn law(&self) -> Law {
        match self.law {
            LawName::Ratio => Law::Ratio(self.ratio),
            LawName::Hoffmann => Law::Fit(LossFit::HOFFMANN),
            LawName::Epoch => Law::Fit(LossFit::EPOCH_AI),
        }
    }
}

/// Flags of `clean`.
#[derive(Debug, Clone, Args)]
pub struct Clean {
    /// Files and folders
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// How the files are read
    #[command(flatten)]
    pub read: Read,
    /// The JSONL file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// keep or remove [default: remove]
    #[arg(long, value_parser = rule::<Invisible>)]
    pub invisible: Option<Invisible>,
    /// keep or split [default: split]
    #[arg(long, value_parser = rule::<Ligatures>)]
    pub ligatures: Option<Ligatures>,
    /// keep or nfc [default: nfc]
    #[arg(long, value_parser = rule::<Composition>)]
    pub composition: Option<Composition>,
    /// keep, straight or curly [default: straight]
    #[arg(long, value_parser = rule::<Apostrophes>)]
    pub apostrophes: Option<Apostrophes>,
    /// keep, guillemets or straight [default: keep]
    #[arg(long, value_parser = rule::<Quotes>)]
    pub quotes: Option<Quotes>,
    /// keep, plain or no-break [default: plain]
    #[arg(long, value_parser = rule::<Spaces>)]
    pub spaces: Option<Spaces>,
    /// keep, hyphens, typographic or ascii [default: hyphens]
    #[arg(long, value_parser = rule::<Dashes>)]
    pub dashes: Option<Dashes>,
    /// keep, character or dots [default: keep]
    #[arg(long, value_parser = rule::<Ellipses>)]
    pub ellipses: Option<Ellipses>,
    /// Call the speakers of each conversation speaker001, speaker002, ...
    #[arg(long)]
    pub renumber_speakers: bool,
}

impl Clean {
    /// The rules.
    pub fn cleanup(&self) -> Cleanup {
        let default = Cleanup::default();
        Cleanup {
            invisible: self.invisible.unwrap_or(default.invisible),
            ligatures: self.ligatures.unwrap_or(default.ligatures),
            composition: self.composition.unwrap_or(default.composition),
            apostrophes: self.apostrophes.unwrap_or(default.apostrophes),
            quotes: self.quotes.unwrap_or(default.quotes),
            spaces: self.spaces.unwrap_or(default.spaces),
            dashes: self.dashes.unwrap_or(default.dashes),
            ellipses: self.ellipses.unwrap_or(default.ellipses),
        }
    }
}

/// A rule by the name that its settings have, with `-` or `_`.
fn rule<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    serde_json::from_value(name.replace('-', "_").into()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training(args: &[&str]) -> Result<Option<TrainConfig>> {
        let all = ["data", "stats", "a.txt"].iter().chain(args);
        let Command::Stats(stats) = Flags::try_parse_from(all).unwrap().command else { panic!() };
        stats.text.training()
    }

    #[test]
    fn a_tokenizer_is_named_or_trained() {
        assert_eq!(training(&["--tokenizer", "t.json"]).unwrap(), None);
        assert_eq!(training(&[]).unwrap(), Some(TrainConfig::default()));
        let unigram = training(&["--train-tokenizer", "unigram", "--vocab-size", "500"]).unwrap().unwrap();
        assert_eq!(
            (unigram.algorithm, unigram.layout, unigram.vocab_size),
            (Algorithm::Unigram, TokenLayout::Camembert, 500)
        );
        let bpe = training(&["--special-tokens", "camembert"]).unwrap().unwrap();
        assert_eq!((bpe.algorithm, bpe.layout), (Algorithm::Bpe, TokenLayout::Camembert));
        assert!(training(&["--tokenizer", "t.json", "--vocab-size", "500"]).is_err());
        let error = training(&["--vocab-size", "10"]).unwrap_err().to_string();
        assert!(error.starts_with("--vocab-size is 10: expected at least 257"), "{error}");
    }

    #[test]
    fn rules_have_the_names_of_the_settings() {
        let args =
            ["data", "clean", "a.txt", "--out", "b.jsonl", "--spaces", "no-break", "--quotes", "guillemets"];
        let Command::Clean(clean) = Flags::try_parse_from(args).unwrap().command else { panic!() };
        let expected = Cleanup::default().with_spaces(Spaces::NoBreak).with_quotes(Quotes::Guillemets);
        assert_eq!(clean.cleanup(), expected);
        let error = Flags::try_parse_from(["data", "clean", "a", "--out", "b", "--dashes", "x"]).unwrap_err();
        assert!(error.to_string().contains("`keep`"), "{error}");
    }
}
