//! Llamas that another program wrote, against the logits of `transformers`: `golden/llama.py` makes both.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use vesper_model::quantized::{BlockType, Gguf, GgufExtras, save};

use super::values;

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    f32: Vec<f32>,
    q8_0: Vec<f32>,
}

fn golden() -> (std::path::PathBuf, Golden) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantized/golden");
    let golden = serde_json::from_str(&std::fs::read_to_string(dir.join("logits.json")).unwrap()).unwrap();
    (dir, golden)
}

#[test]
fn files_of_other_programs_give_the_logits_of_transformers() {
    let (dir, golden) = golden();
    for (file, want) in [("llama-f32.gguf", &golden.f32), ("llama-q8_0.gguf", &golden.q8_0)] {
        let gguf = Gguf::open(dir.join(file)).unwrap();
        let config = gguf.config();
        assert_eq!((config.vocab_size, config.num_key_value_heads, config.head_dim), (96, 2, 16));
        assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 50_000.0));
        assert_eq!((config.bos_token_id, config.eos_token_id), (Some(1), Some(2)));
        let model = gguf.model(DType::F32, &Device::Cpu).unwrap();
        assert_eq!(model.is_quantized(), file.contains("q8_0"));
        let ids = Tensor::new(golden.ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let got = values(&model.forward(&ids).unwrap());
        let most = got.iter().zip(want).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap();
        assert!(got.len() == want.len() && most < 1e-4, "{file}: {most}");

        // Written by this crate it is a Llama again, with the same bytes of weights.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("again.gguf");
        save(&path, &model, &GgufExtras::default()).unwrap();
        let again = Gguf::open(&path).unwrap();
        let list = |gguf: &Gguf| -> Vec<(String, Vec<usize>, BlockType)> {
            gguf.tensors().map(|(name, shape, block, _)| (name.into(), shape.into(), block)).collect()
        };
        assert_eq!(list(&again), list(&gguf));
        let loaded = again.model(DType::F32, &Device::Cpu).unwrap();
        assert_eq!(values(&loaded.forward(&ids).unwrap()), got);
    }
}

#[test]
fn what_a_llama_must_say_is_named() {
    let (dir, _) = golden();
    let bytes = std::fs::read(dir.join("llama-q8_0.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let error = |from: &str, to: &str| {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let (from, to) = (text(from), text(to));
        let at = (0..bytes.len()).find(|&i| bytes[i..].starts_with(&from)).unwrap();
        std::fs::write(&path, [&bytes[..at], &to[..], &bytes[at + from.len()..]].concat()).unwrap();
        let error =
            Gguf::open(&path).and_then(|gguf| gguf.model(DType::F32, &Device::Cpu)).unwrap_err().to_string();
        assert!(error.contains("model.gguf: ") && !error.contains('\n'), "{error}");
        error
    };
    for key in
        ["block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"]
    {
        let key = format!("llama.{key}");
        let other = format!("{}_", &key[..key.len() - 1]);
        assert!(error(&key, &other).contains(&format!("no key {key}")));
    }
    assert!(error("llama.vocab_size", "llama.expert_count").contains("llama.expert_count is set"));
    for scaled in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let message = error("llama.rope.freq_base", scaled);
        assert!(message.contains(&format!("{scaled} is 50000, expected rotary positions")), "{message}");
    }
    assert!(error("blk.1.attn_q.weight", "blk.2.attn_q.weight").contains("no tensor blk.1.attn_q.weight"));
    assert!(error("token_embd.weight", "token_embd.weighx").contains("no tensor token_embd.weight"));
}
