//! The tokenizer that belongs to a model.

use std::path::Path;

use tokenizers::Tokenizer;

use super::{TOKENIZER, invalid, read_text};
use crate::{ModelError, Result, VesperConfig};

/// Reads `tokenizer.json` and checks that the model has a row for each of its entries.
///
/// What the file says of truncation and padding does not count, as in `transformers`: a text is never cut or filled up
/// unseen.
///
/// # Errors
/// [`ModelError::Io`] or [`ModelError::InvalidFile`] when the file cannot be read;
/// [`ModelError::TokenizerTooLarge`] as in [`check_tokenizer`].
pub fn read_tokenizer(dir: impl AsRef<Path>, config: &VesperConfig) -> Result<Tokenizer> {
    let path = dir.as_ref().join(TOKENIZER);
    let tokenizer = whole(parse(&path, &read_text(&path)?)?)?;
    check_tokenizer(&tokenizer, config)?;
    Ok(tokenizer)
}

/// Checks that the model has a row for every id of the tokenizer.
///
/// The embedding may have more rows than the tokenizer has entries: it is padded. Rows over the tokenizer's size
/// are not to be generated, see [`Sampler::with_vocab_limit`](crate::generate::Sampler::with_vocab_limit).
///
/// # Errors
/// [`ModelError::TokenizerTooLarge`] when the highest id is `vocab_size` or more.
pub fn check_tokenizer(tokenizer: &Tokenizer, config: &VesperConfig) -> Result<()> {
    let size = vocab_limit(tokenizer);
    if size > config.vocab_size {
        return Err(ModelError::TokenizerTooLarge { tokenizer: size, model: config.vocab_size });
    }
    Ok(())
}

/// One more than the highest id of the tokenizer, added tokens included: what
/// [`Sampler::with_vocab_limit`](crate::generate::Sampler::with_vocab_limit) is to be given.
///
/// Ids may have gaps, so the number of entries says nothing about it.
pub fn vocab_limit(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
}

/// The tokenizer without truncation and padding.
pub(crate) fn whole(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
    Ok(tokenizer)
}

pub(super) fn parse(path: &Path, json: &str) -> Result<Tokenizer> {
    json.parse().map_err(|error: tokenizers::Error| invalid(path, error.to_string()))
}
