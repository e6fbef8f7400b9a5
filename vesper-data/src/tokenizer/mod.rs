//! Text to token ids and back.

mod bpe;
mod encode;
mod fingerprint;
mod layout;
mod loss;
mod offsets;
mod segment;
mod special;
mod train;
mod unigram;
mod words;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::{DataError, Result, one_line};
use loss::Loss;
use segment::Segments;
use special::SpecialTokens;

pub use bpe::MIN_VOCAB_SIZE;
pub use encode::{EncodeDocuments, EncodeProgress, Encoded, TrainingText};
pub use layout::TokenLayout;
pub use train::{Algorithm, TrainConfig, TrainProgress};

/// More tokens than this is no vocabulary but a damaged file.
const MAX_VOCAB_SIZE: u32 = 1 << 24;

/// A tokenizer, set up for training: any `tokenizer.json`, or one trained on the data.
///
/// It never cuts, pads or adds tokens of its own, whatever the file says; and always gives the same ids for
/// the same text: BPE dropout is switched off. A special token's name inside of a text becomes that token.
///
/// # Examples
///
/// ```
/// use vesper_data::TextTokenizer;
///
/// let text = "the cat and the dog and the bird and the fox";
/// let tokenizer = TextTokenizer::train_bpe([Ok(text)], 300)?;
/// let ids = tokenizer.encode(text)?;
/// assert!(ids.len() < text.len());
/// assert_eq!(tokenizer.decode(&ids)?, text);
///
/// // Bytes are its alphabet: no text is unknown to it.
/// assert_eq!(tokenizer.decode(&tokenizer.encode("Ça va ? 🦊")?)?, "Ça va ? 🦊");
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    special: SpecialTokens,
    /// The settings that stood beside the tokenizer, to be saved with it again.
    config: Map<String, Value>,
    loss: Loss,
    segments: Segments,
    fingerprint: [u8; 32],
    vocab_size: usize,
    observer: Observer,
}

/// Whom to tell how far the encoding of documents is.
#[derive(Clone, Default)]
struct Observer(Option<Arc<dyn Fn(EncodeProgress) + Send + Sync>>);

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Observer" } else { "None" })
    }
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`, and the names of the special tokens from a `tokenizer_config.json` beside it
    /// where there is one.
    ///
    /// # Errors
    ///
    /// [`DataError::Missing`], [`DataError::Io`], or [`DataError::TokenizerFile`] for a file that is not a
    /// tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| DataError::io("read", path, error))?;
        let unusable = |problem| DataError::TokenizerFile { path: path.to_path_buf(), problem };
        let inner = Tokenizer::from_bytes(&bytes)
            .map_err(|error| unusable(format!("expected a tokenizer.json, got: {}", one_line(error))))?;
        special::check_added_ids(&bytes, &inner).map_err(unusable)?;
        let config = special::read_config(path)?;
        Self::new(inner, config).map_err(unusable)
    }

    /// Wraps a tokenizer; an error says what is wrong with it.
    fn new(mut inner: Tokenizer, config: Map<String, Value>) -> Result<Self, String> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(one_line)?;
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(model);
        }
        let highest = inner.get_vocab(true).into_values().max().ok_or("it has no tokens")?;
        if highest >= MAX_VOCAB_SIZE {
            return Err(format!("it has a token with id {highest}, expected ids below {MAX_VOCAB_SIZE}"));
        }
        let description = serde_json::to_value(&inner).map_err(one_line)?;
        Ok(Self {
            special: SpecialTokens::find(&inner, &config),
            loss: Loss::of(&inner, &description),
            segments: Segments::of(&inner, &description),
            fingerprint: fingerprint::of(&description),
            vocab_size: highest as usize + 1,
            observer: Observer::default(),
            inner,
            config,
        })
    }

    /// Trains a byte-level BPE of at most `vocab_size` tokens on `documents`: [`train`](Self::train) with the
    /// default settings.
    ///
    /// Its tokens are [`SEPARATOR`](crate::source::SEPARATOR) (id 0, the end of a document), the 256 bytes and
    /// the merges, most frequent first. Words are cut as GPT-2's tokenizer does it. Pairs that occur only once
    /// are not merged, so that little text gives a smaller vocabulary.
    ///
    /// # Errors
    ///
    /// Those of [`train`](Self::train); a `vocab_size` below [`MIN_VOCAB_SIZE`] is out of range.
    pub fn train_bpe<I, T>(documents: I, vocab_size: usize) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: AsRef<str>,
    {
        Self::train(documents, &TrainConfig::default().with_vocab_size(vocab_size), |_| {})
    }

    /// Trains a Unigram vocabulary of at most `vocab_size` tokens on `documents`, with CamemBERT's special tokens:
    /// [`train`](Self::train) with [`Algorithm::Unigram`] and [`TokenLayout::Camembert`].
    ///
    /// # Errors
    ///
    /// Those of [`train`](Self::train).
    pub fn train_unigram<I, T>(documents: I, vocab_size: usize) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: AsRef<str>,
    {
        let config = TrainConfig::default()
            .with_algorithm(Algorithm::Unigram)
            .with_layout(TokenLayout::Camembert)
            .with_vocab_size(vocab_size);
        Self::train(documents, &config, |_| {})
    }

    /// Has `observer` told each time that [`encode_documents`](Self::encode_documents) has made some more ids ready,
    /// for a progress bar.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use vesper_data::TextTokenizer;
    ///
    /// let bytes = Arc::new(AtomicU64::new(0));
    /// let counter = Arc::clone(&bytes);
    /// let tokenizer = TextTokenizer::train_bpe([Ok("to be or not to be")], 300)?
    ///     .with_observer(move |more| { counter.fetch_add(more.bytes, Ordering::Relaxed); });
    /// assert_eq!(tokenizer.encode_documents([Ok("to be"), Ok("or not")]).count(), 2);
    /// assert_eq!(bytes.load(Ordering::Relaxed), 11);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn with_observer(mut self, observer: impl Fn(EncodeProgress) + Send + Sync + 'static) -> Self {
        self.observer = Observer(Some(Arc::new(observer)));
        self
    }

    /// The ids of a text, with no special tokens around it.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] where the tokenizer cannot take the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_counted(text).map(|encoded| encoded.ids)
    }

    /// The ids of a text, and how often the tokenizer had no token for a piece of it.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_counted(&self, text: &str) -> Result<Encoded> {
        let failed = |error| DataError::Tokenizer { action: "encode", problem: one_line(error) };
        self.loss.encode(&self.inner, text).map_err(failed)
    }

    /// The ids of a text with the special tokens around it that the tokenizer's file has for it, such as the `<s>`
    /// and `</s>` of CamemBERT.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        let failed = |error| DataError::Tokenizer { action: "encode", problem: one_line(error) };
        self.inner.encode_fast(text, true).map(|encoding| encoding.get_ids().to_vec()).map_err(failed)
    }

    /// The ids of a whole document: those of the text, then [`eos_id`](Self::eos_id) where there is one.
    ///
    /// Where the loss is taken over parts of the text ([`TrainingText::loss`]), [`Encoded::loss`] has the ids that
    /// they touch: a token counts when a byte of its text is in one of the ranges, a token without text of its own
    /// (such as the space that some tokenizers put first) when the text behind it is, and the end of the text when
    /// the last range reaches up to it.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_document(&self, document: &(impl TrainingText + ?Sized)) -> Result<Encoded> {
        encode::whole(self, document)
    }

    /// Encodes documents as [`encode_document`](Self::encode_document) does: in parallel, yet in their order.
    ///
    /// It works on some megabytes of text at a time. Long documents are cut into pieces where it is certain
    /// that the ids stay the same: at line breaks, with byte-level BPE as GPT-2 and [`train_bpe`](Self::train_bpe)
    /// have it; at line breaks and spaces, with Unigram as CamemBERT and [`train_unigram`](Self::train_unigram) have
    /// it; at spaces, with BPE as Llama 2 and Mistral have it. With others, one document is encoded by one thread
    /// and takes about 100 times its size in memory.
    ///
    /// # Errors
    ///
    /// An error of the documents, or as of [`encode`](Self::encode), is an item in the place of its document; nothing comes after it.
    pub fn encode_documents<I, T>(&self, documents: I) -> EncodeDocuments<'_, I::IntoIter>
    where
        I: IntoIterator<Item = Result<T>>,
        T: TrainingText + Sync,
    {
        EncodeDocuments::new(self, documents.into_iter())
    }

    /// The text of ids. Special tokens, and ids outside the vocabulary, are left out.
    ///
    /// # Errors
    ///
    /// [`DataError::Tokenizer`] where the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|error| DataError::Tokenizer { action: "decode", problem: one_line(error) })
    }

    /// The number of rows that a model's embedding needs: 1 + the highest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, where the tokenizer has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text, where the tokenizer has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// The id of a token by its name.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The name of a token by its id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// SHA-256 of the canonical JSON (keys sorted, no white space) of all that decides over the ids, and of
    /// the end-of-text id: equal where two tokenizers give equal ids for every document.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint::with_eos(self.fingerprint, self.special.eos)
    }

    /// The tokenizer itself, for what this type does not offer, such as a streaming decoder.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }

    /// Writes the `tokenizer.json`: to a temporary file, then renamed.
    ///
    /// The names of special tokens that came from a `tokenizer_config.json` are not part of it: see
    /// [`save_dir`](Self::save_dir).
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let failed = |error| DataError::Tokenizer { action: "save", problem: one_line(error) };
        write_whole(path.as_ref(), self.inner.to_string(true).map_err(failed)?.as_bytes())
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into a folder, which is created where missing, as a
    /// Hugging Face model directory has them.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn save_dir(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).map_err(|error| DataError::io("create", dir, error))?;
        self.save(dir.join("tokenizer.json"))?;
        let mut config = self.config.clone();
        for (key, id) in [("bos_token", self.special.bos), ("eos_token", self.special.eos)] {
            if let Some(token) = id.and_then(|id| self.inner.id_to_token(id)) {
                config.insert(key.to_owned(), json!(token));
            }
        }
        config.entry("tokenizer_class").or_insert_with(|| json!("PreTrainedTokenizerFast"));
        let failed = |error| DataError::Tokenizer { action: "save", problem: one_line(error) };
        let text = serde_json::to_string_pretty(&config).map_err(failed)?;
        write_whole(&dir.join("tokenizer_config.json"), text.as_bytes())
    }
}

/// Puts a file in its place in one step.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| DataError::io("write", path, error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let mut file = crate::temporary::file(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
