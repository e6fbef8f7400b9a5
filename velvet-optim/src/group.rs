//! Parameter groups: which parameters have another rule, learning rate or decay, and the rule that fits a parameter.

use crate::config::{VelvetConfig, at_least_zero};
use crate::error::{Error, Result};
use crate::options::{DecayMode, SparseRows, WeightDecayOn};
use crate::parameter::Naming;
use crate::rule::{Decay, Rule};
use serde::{Deserialize, Serialize};

/// Settings for the parameters whose names match a pattern; the first group of a configuration that matches counts.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use velvet_optim::{ParamGroup, Training, Velvet, VelvetConfig};
/// let var = |dims: &[usize]| Var::ones(dims, DType::F32, &Device::Cpu);
/// let vars = vec![("embed.weight".to_owned(), var(&[9, 4])?), ("fc.weight".to_owned(), var(&[4, 4])?)];
/// let slow = ParamGroup { lr_scale: 0.1, ..ParamGroup::of(["fc.*"]) };
/// let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["embed.*"]) };
/// let opt = Velvet::named(vars, VelvetConfig { groups: vec![slow, frozen], ..Default::default() })?;
/// # Ok::<(), velvet_optim::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParamGroup {
    /// Patterns for whole names: `*` is any text, `?` any character, `[ab]` one of these (`**` and `{a,b}` have no
    /// meaning).
    pub names: Vec<String>,
    /// The rule (default: the one that the configuration gives to such a parameter).
    pub rule: Option<Rule>,
    /// The factor on the learning rate, finite and at least 0 (default 1).
    pub lr_scale: f64,
    /// The decoupled weight decay, finite and at least 0 (default: the configuration's, where it applies).
    pub weight_decay: Option<f64>,
    /// Whether the parameters are trained (default: yes).
    pub training: Training,
    /// What happens to rows without a gradient (default: the configuration's).
    pub sparse_rows: Option<SparseRows>,
}

/// Whether parameters are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Training {
    /// They are updated.
    #[default]
    On,
    /// They keep their values and state; their gradients are neither needed nor read.
    Frozen,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            rule: None,
            lr_scale: 1.0,
            weight_decay: None,
            training: Training::On,
            sparse_rows: None,
        }
    }
}

impl ParamGroup {
    /// A group of the parameters that match one of these patterns, which changes nothing yet.
    pub fn of<T: Into<String>>(names: impl IntoIterator<Item = T>) -> Self {
        Self { names: names.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        at_least_zero("lr_scale", self.lr_scale)?;
        if let Some(decay) = self.weight_decay {
            at_least_zero("weight_decay", decay)?;
        }
        if let Some(rule) = &self.rule {
            rule.validate().map_err(|error| error.within("rule"))?;
        }
        for pattern in &self.names {
            compile(pattern)?;
        }
        Ok(())
    }

    fn matches(&self, name: &str) -> Result<bool> {
        for pattern in &self.names {
            if compile(pattern)?.matches(name) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn compile(pattern: &str) -> Result<glob::Pattern> {
    glob::Pattern::new(pattern)
        .map_err(|error| Error::Pattern { pattern: pattern.to_owned(), problem: error.msg.to_owned() })
}

/// What a configuration says about one parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) rule: Rule,
    pub(crate) lr_scale: f64,
    pub(crate) decay: Decay,
    pub(crate) training: Training,
    pub(crate) sparse_rows: SparseRows,
}

/// The plans of all parameters, in their order.
pub(crate) fn plans<'a>(
    config: &VelvetConfig,
    naming: Naming,
    parameters: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> Result<Vec<Plan>> {
    let mut used = vec![false; config.groups.len()];
    let mut plans = Vec::new();
    for (name, shape) in parameters {
        let mut group = None;
        for (i, candidate) in config.groups.iter().enumerate() {
            if candidate.matches(name)? {
                used[i] = true;
                group = group.or(Some(candidate));
            }
        }
        plans.push(plan(config, group, naming, name, shape)?);
    }
    match used.iter().position(|used| !used) {
        Some(i) => Err(Error::UnusedGroup { names: config.groups[i].names.clone() }),
        None => Ok(plans),
    }
}

fn plan(
    config: &VelvetConfig,
    group: Option<&ParamGroup>,
    naming: Naming,
    name: &str,
    shape: &[usize],
) -> Result<Plan> {
    let rule = match (group.and_then(|group| group.rule), config.hidden_matrices) {
        (Some(rule), _) => rule,
        (None, Some(rule)) if is_hidden_matrix(naming, name, shape) => rule,
        (None, _) => config.rule,
    };
    let sparse_rows = group.and_then(|group| group.sparse_rows).unwrap_or(config.sparse_rows);
    let matrix = shape.len() >= 2;
    let training = group.map_or(Training::On, |group| group.training);
    let unfit = |problem| Err(Error::Unfit { name: name.to_owned(), problem, shape: shape.to_vec() });
    // What is never updated fits any rule.
    if training == Training::On {
        if matches!(rule, Rule::Orthogonal(_)) && !matrix {
            return unfit("orthogonalised momentum needs a matrix");
        }
        if group.is_some_and(|group| group.sparse_rows == Some(SparseRows::Skip)) {
            if !matrix {
                return unfit("SparseRows::Skip needs a matrix");
            }
            if matches!(rule, Rule::Orthogonal(_)) {
                return unfit("orthogonalised momentum mixes rows, so SparseRows::Skip cannot leave any out");
            }
        }
    }
    let sparse_rows =
        if matrix && !matches!(rule, Rule::Orthogonal(_)) { sparse_rows } else { SparseRows::Off };
    let decays = match config.decay_on {
        WeightDecayOn::All => true,
        WeightDecayOn::Matrices => matrix,
    };
    let default = if decays { config.weight_decay } else { 0.0 };
    Ok(Plan {
        rule,
        lr_scale: group.map_or(1.0, |group| group.lr_scale),
        decay: Decay {
            rate: group.and_then(|group| group.weight_decay).unwrap_or(default),
            cautious: config.decay_mode == DecayMode::Cautious,
        },
        training,
        sparse_rows,
    })
}

/// Whether a parameter is a matrix between two hidden layers, which orthogonalised momentum is for.
///
/// It must have two dimensions of at least 2. With a name: no part of the name contains `embed`, `embd` or `lora` or
/// has `emb` as a word (between underscores), and the module that owns the weight is not called as heads and
/// embeddings are ([`NOT_HIDDEN`]). Without: the longer side is less than [`RATIO`] times the shorter.
fn is_hidden_matrix(naming: Naming, name: &str, shape: &[usize]) -> bool {
    let &[rows, cols] = shape else { return false };
    if rows.min(cols) < 2 {
        return false;
    }
    match naming {
        Naming::Positional => rows.max(cols) < RATIO * rows.min(cols),
        Naming::Named => {
            let name = name.to_ascii_lowercase();
            let mut parts: Vec<&str> = name.split(['.', '/']).collect();
            if parts.last() == Some(&"weight") {
                parts.pop();
            }
            let owner = parts.last().copied().unwrap_or_default();
            let is_outside = |part: &&str| {
                ["embed", "embd", "lora"].iter().any(|word| part.contains(word))
                    || part.split('_').any(|word| word == "emb")
            };
            !parts.iter().any(is_outside) && !NOT_HIDDEN.contains(&owner)
        }
    }
}

/// A vocabulary is at least this many times as long as the model is wide; the widest feed-forward is some 6 times.
const RATIO: usize = 8;

/// How heads and embeddings are called.
const NOT_HIDDEN: [&str; 14] = [
    "wte",
    "wpe",
    "shared", // T5's embedding
    "relative_attention_bias",
    "lm_head",
    "head",
    "output",
    "output_layer",
    "classifier",
    "score",
    "decoder",
    "cls",
    "logits",
    "to_logits",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(name: &str, shape: &[usize]) -> bool {
        is_hidden_matrix(Naming::Named, name, shape)
    }

    #[test]
    fn names_tell_hidden_matrices_from_embeddings_and_heads() {
        for name in [
            "model.layers.0.self_attn.qkv_proj.weight",
            "transformer.h.0.mlp.c_fc.weight",
            "encoder.layer.3.attention.output.dense.weight",
            "model.layers.0.mlp.shared_expert.up_proj.weight",
            "ensemble.0.fc.weight",
            "fc1",
        ] {
            assert!(hidden(name, &[64, 64]), "{name}");
        }
        for name in [
            "model.embed_tokens.weight",
            "transformer.wte.weight",
            "embeddings.word_embeddings.weight",
            "lm_head.weight",
            "output.weight",
            "tok_emb.weight",
            "rwkv.emb.weight",
            "token_embd.weight",
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "to_logits.weight",
            "model.layers.0.q_proj.lora_A.weight",
        ] {
            assert!(!hidden(name, &[64, 64]), "{name}");
        }
        for shape in [&[64][..], &[1, 64], &[64, 1], &[3, 64, 64], &[]] {
            assert!(!hidden("fc1", shape), "{shape:?}");
        }
    }

    #[test]
    fn without_names_the_shape_tells() {
        let hidden = |shape: &[usize]| is_hidden_matrix(Naming::Positional, "param.00000", shape);
        for shape in [[768, 768], [4096, 768], [768, 2048], [896, 160]] {
            assert!(hidden(&shape), "{shape:?}");
        }
        for shape in [[32_064, 768], [768, 32_064], [2560, 160], [8, 768]] {
            assert!(!hidden(&shape), "{shape:?}");
        }
    }
}
