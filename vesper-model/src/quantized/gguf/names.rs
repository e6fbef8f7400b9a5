//! The names of tensors in a GGUF file, and the order of their rows.

use crate::hf::layout::Part;
use crate::{Projection, VesperConfig};

/// The names of a block's tensors: in a Hugging Face directory, in a GGUF file.
const BLOCK: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The name in a GGUF file of a tensor of a Hugging Face directory.
pub(super) fn gguf(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let rest = rest.strip_suffix(".weight")?;
    let (_, own) = BLOCK.iter().find(|(hf, _)| *hf == rest)?;
    Some(format!("blk.{block}.{own}.weight"))
}

/// The tensors that are packed into the one of this name in memory, in the order of their rows.
pub(super) fn parts(config: &VesperConfig, name: &str, shape: &[usize]) -> Vec<Part> {
    use Projection::{GateProj, KProj, QProj, UpProj, VProj};
    let packed = |suffix: &str, projections: &[Projection]| {
        let prefix = name.strip_suffix(suffix)?;
        let part = |&projection: &Projection| {
            let (input, output) = config.projection_size(projection);
            Part { name: format!("{prefix}{}.weight", projection.path()), shape: vec![output, input] }
        };
        Some(projections.iter().map(part).collect())
    };
    packed("self_attn.qkv_proj.weight", &[QProj, KProj, VProj])
        .or_else(|| packed("mlp.gate_up_proj.weight", &[GateProj, UpProj]))
        .unwrap_or_else(|| vec![Part { name: name.into(), shape: shape.into() }])
}

/// The heads whose rows a Llama's file has in another order, if this is a tensor of queries or keys.
pub(super) fn heads(config: &VesperConfig, name: &str) -> Option<usize> {
    if name.ends_with("self_attn.q_proj.weight") {
        return Some(config.num_attention_heads);
    }
    name.ends_with("self_attn.k_proj.weight").then_some(config.num_key_value_heads)
}

/// Rotary pairs are the halves of a head here and in a Hugging Face directory, neighbours in a Llama's GGUF file: row
/// `p * dim / 2 + j` of a head there is row `2 j + p` here.
pub(super) fn interleave(rows: &[u8], heads: usize, count: usize) -> Vec<u8> {
    reorder(rows, heads, count, |half, j, p| (p * half + j, 2 * j + p))
}

/// The other way around.
pub(super) fn separate(rows: &[u8], heads: usize, count: usize) -> Vec<u8> {
    reorder(rows, heads, count, |half, j, p| (2 * j + p, p * half + j))
}

/// `count` rows in all; `places` gives, for the pair `j` and its side `p`, where its row is in a head and where it goes.
fn reorder(
    rows: &[u8],
    heads: usize,
    count: usize,
    places: impl Fn(usize, usize, usize) -> (usize, usize),
) -> Vec<u8> {
    let mut to = rows.to_vec();
    let (width, dim) = (rows.len() / count.max(1), count / heads.max(1));
    for head in 0..heads {
        for j in 0..dim / 2 {
            for p in 0..2 {
                let (source, target) = places(dim / 2, j, p);
                let at = |row: usize| (head * dim + row) * width..(head * dim + row + 1) * width;
                to[at(target)].copy_from_slice(&rows[at(source)]);
            }
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::layout::entries;

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        let config = VesperConfig { tie_word_embeddings: false, ..VesperConfig::preset("nano").unwrap() };
        let mut names = std::collections::BTreeSet::new();
        for entry in entries(&config) {
            assert_eq!(parts(&config, &entry.name, &entry.shape), entry.parts);
            for part in entry.parts {
                assert!(names.insert(gguf(&part.name).unwrap()), "{}", part.name);
            }
        }
        assert_eq!(names.len(), 3 + 9 * config.num_hidden_layers);
        assert!(names.contains("blk.3.ffn_gate.weight"));
        assert_eq!(gguf("model.layers.0.self_attn.q_proj.lora_A.weight"), None);
    }

    #[test]
    fn rotary_pairs_become_neighbours_and_halves_again() {
        // Two heads of four rows of two bytes.
        let rows: Vec<u8> = (0..16).collect();
        let interleaved = interleave(&rows, 2, 8);
        assert_eq!(interleaved, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert_eq!(separate(&interleaved, 2, 8), rows);
    }
}
