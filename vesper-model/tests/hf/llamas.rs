//! Models that `transformers` wrote, against the logits that it computed (`golden/llamas.py` made both).

use std::path::{Path, PathBuf};

use vesper_model::candle_core::{DType, Device, Tensor};
use vesper_model::generate::NextLogits;
use vesper_model::hf::{Extras, read_config, read_weights, save};
use vesper_model::ops::{self, RopeScaling};
use vesper_model::{VesperConfig, VesperLM};

const LLAMAS: [&str; 5] = ["tied", "grouped_sharded", "wide_heads_llama3", "linear", "mistral"];

const LIMIT: f64 = 3e-5;

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    /// The positions that there are logits of.
    rows: Vec<usize>,
    logits: Vec<Vec<f64>>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf/golden/llamas").join(name)
}

fn golden(name: &str) -> Golden {
    serde_json::from_str(&std::fs::read_to_string(folder(name).join("logits.json")).unwrap()).unwrap()
}

/// (t)(vocab)
pub(crate) fn logits(model: &VesperLM, ids: &[u32]) -> Vec<Vec<f32>> {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&ids).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
}

pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f64], limit: f64) {
    assert_eq!(got.len(), expected.len());
    let off =
        got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).max_by(f64::total_cmp).unwrap();
    assert!(off < limit, "{what}: off by {off:e}");
}

#[test]
fn the_configurations_say_what_is_special() {
    let config = |name: &str| read_config(folder(name)).unwrap();
    let heads = |c: &VesperConfig| (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    assert_eq!((heads(&config("tied")), config("tied").tie_word_embeddings), ((4, 4, 6), true));
    let sharded = config("grouped_sharded");
    assert_eq!((heads(&sharded), sharded.tie_word_embeddings), ((4, 2, 6), false));
    let wide = config("wide_heads_llama3");
    assert_eq!((heads(&wide), wide.rope_theta), ((4, 2, 10), 500.0));
    assert!(matches!(
        wide.rope_scaling,
        Some(RopeScaling::Llama3 { original_max_position_embeddings: 16, .. })
    ));
    assert_eq!(config("linear").rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(config("mistral").hidden_act.to_string(), "gelu_tanh");
}

#[test]
fn logits_are_those_of_transformers() {
    for name in LLAMAS {
        let golden = golden(name);
        for path in [ops::Path::Fused, ops::Path::Reference] {
            let model = VesperLM::load(folder(name), DType::F32, &Device::Cpu).unwrap().with_path(path);
            let got = logits(&model, &golden.ids);
            for (&row, expected) in golden.rows.iter().zip(&golden.logits) {
                assert_close(&format!("{name}, {path:?}, {row}"), &got[row], expected, LIMIT);
            }
        }
    }
}

#[test]
fn decoding_gives_the_same_logits() {
    for name in LLAMAS {
        let golden = golden(name);
        let model = VesperLM::load(folder(name), DType::F32, &Device::Cpu).unwrap();
        let mut session = model.session(golden.ids.len()).unwrap();
        for (i, &id) in golden.ids.iter().enumerate() {
            let got = session.append(&[id]).unwrap();
            if let Some(row) = golden.rows.iter().position(|&row| row == i) {
                assert_close(&format!("{name}, {i}"), &got, &golden.logits[row], LIMIT);
            }
        }
    }
}

#[test]
fn what_is_saved_again_is_the_same_model() {
    for name in LLAMAS {
        let config = read_config(folder(name)).unwrap();
        let weights = read_weights(folder(name), &config, DType::F32, &Device::Cpu).unwrap();
        let copy = tempfile::tempdir().unwrap();
        save(copy.path(), &config, &weights, &Extras::default()).unwrap();
        assert_eq!(read_config(copy.path()).unwrap(), config, "{name}");
        let ids = golden(name).ids;
        let of = |dir: &Path| logits(&VesperLM::load(dir, DType::F32, &Device::Cpu).unwrap(), &ids);
        assert_eq!(of(copy.path()), of(&folder(name)), "{name}");
    }
}
