//! What a VesperLM is made of: sizes, activation, adapters; the presets; the exact parameter count.

use era_act::Activation;
use flylora::{LoraConfig, LoraInit};
use serde::{Deserialize, Serialize};

use crate::ops::RopeScaling;
use crate::{ModelError, Result};

/// The vocabulary of a model is padded up to a multiple of this, so that matrix products stay aligned.
pub const VOCAB_MULTIPLE: usize = 64;

/// The linear layers of a block, by their Hugging Face names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries, `(heads * head_dim, hidden)`.
    QProj,
    /// Keys, `(kv_heads * head_dim, hidden)`.
    KProj,
    /// Values, `(kv_heads * head_dim, hidden)`.
    VProj,
    /// Output of the attention, `(hidden, heads * head_dim)`.
    OProj,
    /// Gate of the feed-forward, `(ffn, hidden)`.
    GateProj,
    /// Up-projection of the feed-forward, `(ffn, hidden)`.
    UpProj,
    /// Down-projection of the feed-forward, `(hidden, ffn)`.
    DownProj,
}

impl Projection {
    /// Every projection of a block, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The path inside a block, as Hugging Face names it: `self_attn.q_proj` and so on.
    pub const fn path(self) -> &'static str {
        match self {
            Self::QProj => "self_attn.q_proj",
            Self::KProj => "self_attn.k_proj",
            Self::VProj => "self_attn.v_proj",
            Self::OProj => "self_attn.o_proj",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
        }
    }
}

/// Low-rank adapters to train on top of a frozen model.
///
/// # Examples
/// ```
/// use vesper_model::flylora::LoraConfig;
/// use vesper_model::{AdapterConfig, Projection, VesperConfig};
///
/// let adapter = AdapterConfig {
///     lora: LoraConfig::default().with_r(4),
///     targets: vec![Projection::QProj, Projection::VProj],
/// };
/// let config = VesperConfig { adapter: Some(adapter), ..VesperConfig::preset("nano")? };
/// let trained = config.parameters().into_iter().filter(|parameter| parameter.trainable);
/// assert_eq!(trained.count(), 4 * 2 * 2); // A and B of two projections in each of four blocks
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Rank, scale and initialisation of each adapter.
    pub lora: LoraConfig,
    /// The projections that get one, in every block.
    pub targets: Vec<Projection>,
}

/// The architecture of a VesperLM. Field names are those of a Hugging Face `config.json`.
///
/// # Examples
/// ```
/// let config = vesper_model::VesperConfig::preset("small")?;
/// assert_eq!(config.num_parameters(), 22_934_400);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VesperConfig {
    /// Always `vesper`.
    #[serde(default = "model_type")]
    pub model_type: String,
    /// Always `["VesperForCausalLM"]`.
    #[serde(default = "architectures")]
    pub architectures: Vec<String>,
    /// Rows of the embedding: the tokenizer's size rounded up to a multiple of [`VOCAB_MULTIPLE`].
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; fewer than the query heads means grouped-query attention.
    pub num_key_value_heads: usize,
    /// Size of one head, even. Usually `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Width of the gated feed-forward.
    pub intermediate_size: usize,
    /// The longest sequence that the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm. Default 1e-6.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles. Default 10 000.
    pub rope_theta: f64,
    /// How rotary angles are lowered for longer sequences; absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output layer is the embedding, transposed. Default true.
    pub tie_word_embeddings: bool,
    /// The gate of the feed-forward. Default ERA.
    pub hidden_act: Activation,
    /// Standard deviation of the normal initialisation. Default 0.02.
    pub initializer_range: f64,
    /// The token that begins a document, where the tokenizer has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// The token that ends a document, where the tokenizer has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<u32>,
    /// Low-rank adapters over the frozen model; absent: every parameter trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
}

fn model_type() -> String {
    "vesper".into()
}

fn architectures() -> Vec<String> {
    vec!["VesperForCausalLM".into()]
}

/// name, layers, heads, hidden, feed-forward, vocabulary, positions
const PRESETS: [(&str, usize, usize, usize, usize, usize, usize); 5] = [
    ("nano", 4, 4, 160, 448, 2560, 512),
    ("tiny", 6, 4, 256, 704, 8192, 1024),
    ("small", 6, 6, 384, 1024, 32_064, 2048),
    ("medium", 12, 12, 768, 2048, 32_064, 2048),
    ("large", 24, 16, 1024, 2816, 32_064, 2048),
];

impl VesperConfig {
    /// The names that [`VesperConfig::preset`] knows, from small to large.
    pub const PRESETS: [&'static str; 5] = ["nano", "tiny", "small", "medium", "large"];

    /// A named size.
    ///
    /// | name | layers | heads | hidden | feed-forward | vocabulary | parameters |
    /// |---|---|---|---|---|---|---|
    /// | nano | 4 | 4 | 160 | 448 | 2560 | 1.7 M |
    /// | tiny | 6 | 4 | 256 | 704 | 8192 | 6.9 M |
    /// | small | 6 | 6 | 384 | 1024 | 32064 | 22.9 M |
    /// | medium | 12 | 12 | 768 | 2048 | 32064 | 109.6 M |
    /// | large | 24 | 16 | 1024 | 2816 | 32064 | 341 M |
    ///
    /// # Errors
    /// [`ModelError::UnknownPreset`], which lists the names there are.
    pub fn preset(name: &str) -> Result<Self> {
        let &(_, layers, heads, hidden, ffn, vocab, positions) =
            PRESETS.iter().find(|preset| preset.0 == name).ok_or_else(|| ModelError::UnknownPreset {
                name: name.into(),
                known: Self::PRESETS.join(", "),
            })?;
        Ok(Self {
            model_type: model_type(),
            architectures: architectures(),
            vocab_size: vocab,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden / heads,
            intermediate_size: ffn,
            max_position_embeddings: positions,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_word_embeddings: true,
            hidden_act: Activation::default(),
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_id: None,
            adapter: None,
        })
    }

    /// Sets the vocabulary to hold `tokens` entries, padded up to a multiple of [`VOCAB_MULTIPLE`].
    pub fn with_vocab(mut self, tokens: usize) -> Self {
        self.vocab_size = tokens.next_multiple_of(VOCAB_MULTIPLE);
        self
    }

    /// Sets the feed-forward's activation.
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.hidden_act = activation;
        self
    }

    /// Sets the number of key and value heads.
    pub fn with_kv_heads(mut self, heads: usize) -> Self {
        self.num_key_value_heads = heads;
        self
    }

    /// Puts adapters on a model whose other parameters stay frozen.
    pub fn with_adapter(mut self, adapter: AdapterConfig) -> Self {
        self.adapter = Some(adapter);
        self
    }

    /// Width of the packed query, key and value projection: `(heads + 2 * kv_heads) * head_dim`.
    pub fn qkv_size(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }

    /// Input and output width of one projection.
    pub fn projection_size(&self, projection: Projection) -> (usize, usize) {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        match projection {
            Projection::QProj => (d, q),
            Projection::KProj | Projection::VProj => (d, kv),
            Projection::OProj => (q, d),
            Projection::GateProj | Projection::UpProj => (d, f),
            Projection::DownProj => (f, d),
        }
    }

    /// The exact number of parameters, adapters included.
    ///
    /// ```text
    /// vocab*d (twice if untied) + layers * (2d + sum of in*out over the projections) + d
    /// ```
    pub fn num_parameters(&self) -> usize {
        self.num_base_parameters() + self.num_adapter_parameters()
    }

    /// The number of parameters that training changes: all, or the adapters' alone.
    pub fn num_trainable_parameters(&self) -> usize {
        if self.adapter.is_some() { self.num_adapter_parameters() } else { self.num_base_parameters() }
    }

    fn num_base_parameters(&self) -> usize {
        let d = self.hidden_size;
        let projections: usize = Projection::ALL
            .iter()
            .map(|&p| {
                let (input, output) = self.projection_size(p);
                input * output
            })
            .sum();
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size * d;
        embeddings + self.num_hidden_layers * (2 * d + projections) + d
    }

    fn num_adapter_parameters(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| {
            let block: usize = adapter
                .targets
                .iter()
                .map(|&p| {
                    let (input, output) = self.projection_size(p);
                    adapter.lora.r * (input + output)
                })
                .sum();
            self.num_hidden_layers * block
        })
    }

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] names the field, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        let bad = |field: &'static str, got: String, expected: String| {
            Err(ModelError::InvalidConfig { field, got, expected })
        };
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 || value > 1 << 31 {
                return bad(field, value.to_string(), "from 1 to 2^31".into());
            }
        }
        // A row each of the tables of rotary angles.
        if self.max_position_embeddings > 1 << 20 {
            let got = self.max_position_embeddings.to_string();
            return bad("max_position_embeddings", got, "from 1 to 2^20".into());
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(
                "num_key_value_heads",
                self.num_key_value_heads.to_string(),
                format!("a divisor of num_attention_heads = {}", self.num_attention_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad("head_dim", self.head_dim.to_string(), "an even number (rotary pairs)".into());
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return bad("rms_norm_eps", self.rms_norm_eps.to_string(), "a positive number".into());
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return bad("rope_theta", self.rope_theta.to_string(), "a number over 1".into());
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate()?;
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            return bad("initializer_range", self.initializer_range.to_string(), "zero or more".into());
        }
        self.hidden_act.validate().map_err(|error| ModelError::InvalidConfig {
            field: "hidden_act",
            got: format!("{:?}", self.hidden_act),
            expected: error.to_string(),
        })?;
        if let Some(adapter) = &self.adapter {
            if adapter.targets.is_empty() {
                return bad("adapter.targets", "[]".into(), "at least one projection".into());
            }
            if adapter.lora.init != LoraInit::KaimingUniform {
                // The parameters' first values are drawn before there is a weight to start from.
                let expected = "the default here; VesperLM::attach takes every start".into();
                return bad("adapter.lora.init", format!("{:?}", adapter.lora.init), expected);
            }
            if adapter.lora.bias {
                // The configuration's parameters have none, and so neither training nor files.
                let expected = "false here; VesperLM::attach takes one".into();
                return bad("adapter.lora.bias", "true".into(), expected);
            }
            for (i, target) in adapter.targets.iter().enumerate() {
                if adapter.targets[..i].contains(target) {
                    return bad("adapter.targets", target.path().into(), "each projection once".into());
                }
                let (input, output) = self.projection_size(*target);
                if adapter.lora.r == 0 || adapter.lora.r > input.min(output) {
                    return bad(
                        "adapter.lora.r",
                        adapter.lora.r.to_string(),
                        format!("from 1 to {} for {}", input.min(output), target.path()),
                    );
                }
            }
        }
        Ok(())
    }
}
