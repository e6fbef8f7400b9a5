//! Which tensor becomes which type.

use serde::{Deserialize, Serialize};

use super::BlockType;

/// Which tensor becomes which type. In this order: the last pattern that fits its name; for the embedding and the output
/// layer what is set for them; the default.
///
/// The output layer is the most sensitive matrix: where nothing is set for it, it is no smaller than `q6_k`. Where the
/// embedding is the output layer too, what is set for the output layer counts, then what is set for the embedding.
///
/// # Examples
/// ```
/// use vesper_model::quantized::{BlockType, Policy};
/// let policy = Policy::new(BlockType::Q4K)
///     .with_embedding(BlockType::Q8_0)
///     .with_pattern("v_proj", BlockType::Q6K)
///     .with_pattern("model.layers.0.*", BlockType::F16);
/// let of = |name: &str| policy.choose(name, false);
/// assert_eq!(of("model.embed_tokens.weight"), BlockType::Q8_0);
/// assert_eq!(of("lm_head.weight"), BlockType::Q6K);
/// assert_eq!(of("model.layers.3.self_attn.v_proj.weight"), BlockType::Q6K);
/// assert_eq!(of("model.layers.3.mlp.up_proj.weight"), BlockType::Q4K);
/// assert_eq!(of("model.layers.0.mlp.up_proj.weight"), BlockType::F16);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    default: BlockType,
    embedding: Option<BlockType>,
    head: Option<BlockType>,
    patterns: Vec<(String, BlockType)>,
}

impl Policy {
    /// Everything of one type, the output layer of `q6_k` at the least.
    pub fn new(default: BlockType) -> Self {
        Self { default, embedding: None, head: None, patterns: Vec::new() }
    }

    /// The type of the embedding.
    pub fn with_embedding(mut self, block: BlockType) -> Self {
        self.embedding = Some(block);
        self
    }

    /// The type of the output layer.
    pub fn with_head(mut self, block: BlockType) -> Self {
        self.head = Some(block);
        self
    }

    /// The type of the matrices whose Hugging Face name (`model.layers.0.self_attn.q_proj.weight`) contains `pattern`, or is
    /// the pattern where it has a `*`, which stands for any characters.
    pub fn with_pattern(mut self, pattern: impl Into<String>, block: BlockType) -> Self {
        self.patterns.push((pattern.into(), block));
        self
    }

    /// The type of the matrices that nothing else is said about.
    pub fn default_type(&self) -> BlockType {
        self.default
    }

    /// The patterns and their types, in the order they were given.
    pub fn patterns(&self) -> &[(String, BlockType)] {
        &self.patterns
    }

    /// The type that a matrix is to have, by its Hugging Face name; `tied`: the embedding is the output layer.
    pub fn choose(&self, name: &str, tied: bool) -> BlockType {
        if let Some((_, block)) = self.patterns.iter().rev().find(|(pattern, _)| fits(pattern, name)) {
            return *block;
        }
        let head = || match self.default {
            small if small.bytes(256) < BlockType::Q6K.bytes(256) => BlockType::Q6K,
            large => large,
        };
        match name {
            "lm_head.weight" => self.head.unwrap_or_else(head),
            "model.embed_tokens.weight" if tied => self.head.or(self.embedding).unwrap_or_else(head),
            "model.embed_tokens.weight" => self.embedding.unwrap_or(self.default),
            _ => self.default,
        }
    }
}

/// Whether a pattern fits a name: as a part of it, or with `*` for any characters as the whole.
pub(super) fn fits(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(last) = pieces.next_back() else { return name.contains(pattern) };
    let Some(rest) = name.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)) else { return false };
    // Each piece as early as it can be leaves the most for those after it.
    pieces.try_fold(rest, |rest, piece| Some(&rest[rest.find(piece)? + piece.len()..])).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_parts_or_with_stars_the_whole() {
        for (pattern, name, expected) in [
            ("v_proj", "model.layers.3.self_attn.v_proj.weight", true),
            ("layers.3.", "model.layers.13.mlp.up_proj.weight", false),
            ("layers.3.", "model.layers.3.mlp.up_proj.weight", true),
            ("*.3.*", "model.layers.3.mlp.up_proj.weight", true),
            ("*.3.*.weight", "model.layers.3.mlp.up_proj.weight", true),
            ("layers.*", "model.layers.3.mlp.up_proj.weight", false),
            ("*", "anything", true),
            ("a*a", "a", false),
            ("a*b*c", "axcxbxc", true),
            ("a*b*c", "axcxc", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_output_layer_is_not_made_small_by_default() {
        let policy = Policy::new(BlockType::Q4K);
        assert_eq!(policy.choose("lm_head.weight", false), BlockType::Q6K);
        assert_eq!(policy.choose("model.embed_tokens.weight", true), BlockType::Q6K);
        assert_eq!(policy.choose("model.embed_tokens.weight", false), BlockType::Q4K);
        let policy = policy.with_head(BlockType::Q4_0);
        assert_eq!(policy.choose("model.embed_tokens.weight", true), BlockType::Q4_0);
        assert_eq!(Policy::new(BlockType::Q8_0).choose("lm_head.weight", false), BlockType::Q8_0);
        assert_eq!(Policy::new(BlockType::F16).choose("lm_head.weight", false), BlockType::F16);
    }
}
