//! The parameters of a decoder.

use crate::error::{DataError, Result};

/// The sizes of a decoder as Llama has it: RMSNorm, rotary positions, a gated feed-forward, no biases.
///
/// # Examples
///
/// ```
/// use vesper_data::sizing::Architecture;
///
/// let llama_2_7b = Architecture {
///     vocab_size: 32_000,
///     hidden_size: 4096,
///     layers: 32,
///     heads: 32,
///     kv_heads: 32,
///     head_dim: 128,
///     intermediate_size: 11_008,
///     tied_embeddings: false,
/// };
/// assert_eq!(llama_2_7b.parameters()?, 6_738_415_616);
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// Rows of the embedding.
    pub vocab_size: u64,
    /// Width of the residual stream, `d`.
    pub hidden_size: u64,
    /// Blocks.
    pub layers: u64,
    /// Heads of the queries.
    pub heads: u64,
    /// Heads of the keys and values.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width of the feed-forward, `f`.
    pub intermediate_size: u64,
    /// Whether the output layer is the embedding.
    pub tied_embeddings: bool,
}

impl Architecture {
    /// The exact number of parameters.
    ///
    /// ```text
    /// vocab d (twice if untied) + layers (2 d + 2 d (heads + kv_heads) head_dim + 3 d f) + d
    /// ```
    ///
    /// # Errors
    ///
    /// [`DataError::Sizing`] where a size is zero, or the number is beyond 64 bits.
    pub fn parameters(&self) -> Result<u64> {
        let refused = |problem: &str| DataError::Sizing {
            asked: format!("a model of {} layers of width {}", self.layers, self.hidden_size),
            problem: problem.to_owned(),
        };
        let sizes = [
            self.vocab_size,
            self.hidden_size,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate_size,
        ];
        if sizes.contains(&0) {
            return Err(refused("one of its sizes is 0, expected positive numbers"));
        }
        self.checked().ok_or_else(|| refused("it has more parameters than fit 64 bits"))
    }

    fn checked(&self) -> Option<u64> {
        let d = self.hidden_size;
        let heads = self.heads.checked_add(self.kv_heads)?.checked_mul(self.head_dim)?;
        let attention = d.checked_mul(heads)?.checked_mul(2)?;
        let feed_forward = d.checked_mul(self.intermediate_size)?.checked_mul(3)?;
        let block = attention.checked_add(feed_forward)?.checked_add(d.checked_mul(2)?)?;
        let embeddings =
            self.vocab_size.checked_mul(d)?.checked_mul(if self.tied_embeddings { 1 } else { 2 })?;
        embeddings.checked_add(self.layers.checked_mul(block)?)?.checked_add(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_models_have_their_published_number_of_parameters() {
        let stories = Architecture {
            vocab_size: 512,
            hidden_size: 64,
            layers: 5,
            heads: 8,
            kv_heads: 4,
            head_dim: 8,
            intermediate_size: 172,
            tied_embeddings: true,
        };
        assert_eq!(stories.parameters().unwrap(), 260_032);
        let tiny_llama = Architecture {
            vocab_size: 32_000,
            hidden_size: 2048,
            layers: 22,
            heads: 32,
            kv_heads: 4,
            head_dim: 64,
            intermediate_size: 5632,
            tied_embeddings: false,
        };
        assert_eq!(tiny_llama.parameters().unwrap(), 1_100_048_384);
    }

    #[test]
    fn sizes_that_make_no_model_are_refused() {
        let sizes = Architecture {
            vocab_size: 10,
            hidden_size: 0,
            layers: 2,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            intermediate_size: 16,
            tied_embeddings: true,
        };
        let message = sizes.parameters().unwrap_err().to_string();
        assert_eq!(
            message,
            "no size for a model of 2 layers of width 0: one of its sizes is 0, expected positive numbers"
        );
        let endless = Architecture { hidden_size: u64::MAX / 2, ..sizes };
        assert!(endless.parameters().unwrap_err().to_string().contains("64 bits"));
    }
}
