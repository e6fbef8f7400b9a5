//! Writing a GGUF file and reading it back.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use era_act::Activation;
use vesper_model::VesperLM;
use vesper_model::generate::GenerationConfig;
use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, save};

use super::{config, ids, model, values};

/// A tokenizer of three words.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}}"#;

fn written(model: &VesperLM, extras: &GgufExtras<'_>) -> (tempfile::TempDir, Gguf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    save(&path, model, extras).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
    let gguf = Gguf::open(path).unwrap();
    (dir, gguf)
}

fn logits(model: &VesperLM) -> Vec<f32> {
    values(&model.forward(&ids(2, 24)).unwrap())
}

#[test]
fn what_is_written_is_read_back_bit_for_bit() {
    for activation in [Activation::default(), Activation::Silu] {
        for tied in [true, false] {
            for (width, policy) in [
                (256, Policy::new(BlockType::Q4K)),
                (64, Policy::new(BlockType::Q8_0).with_pattern("k_proj", BlockType::Q4_1)),
                (64, Policy::new(BlockType::F32)),
                (96, Policy::new(BlockType::Q5_0)),
            ] {
                let config = config(width, tied, activation);
                let (small, report) = model(&config).quantized(&policy).unwrap();
                let (_dir, gguf) = written(&small, &GgufExtras::default());
                assert_eq!(gguf.config(), &config);
                let loaded = gguf.model(DType::F32, &Device::Cpu).unwrap();
                assert_eq!(logits(&loaded), logits(&small), "{activation:?} {tied} {policy:?}");
                assert_eq!(loaded.is_quantized(), small.is_quantized());
                assert_eq!(gguf.tensors().count(), report.tensors.len());
                assert_eq!(gguf.tensors().map(|(.., bytes)| bytes).sum::<usize>(), report.bytes());
            }
        }
    }
}

#[test]
fn plain_models_are_written_in_their_dtype() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let config = config(32, false, Activation::Silu);
        let weights =
            model(&config).weights().into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
        let vb = candle_nn::VarBuilder::from_tensors(weights, dtype, &Device::Cpu);
        let plain = VesperLM::new(&config, vb).unwrap();
        let (_dir, gguf) = written(&plain, &GgufExtras::default());
        assert!(!gguf.is_quantized());
        let matrix = gguf.tensors().find(|(name, ..)| *name == "blk.1.ffn_up.weight").unwrap();
        assert_eq!(matrix.2.bytes(1), dtype.size_in_bytes());
        let loaded = gguf.model(dtype, &Device::Cpu).unwrap();
        for (name, weight) in plain.weights() {
            let got = &loaded.weights()[&name];
            let same = |t: &candle_core::Tensor| values(&t.to_dtype(DType::F32).unwrap());
            assert_eq!(same(got), same(&weight), "{name}");
        }
    }
}

#[test]
fn the_tokenizer_and_the_settings_are_in_the_file() {
    let model = model(&config(32, true, Activation::default()));
    let generation = GenerationConfig::default().with_temperature(0.3).with_max_new_tokens(9);
    let extras = GgufExtras {
        name: Some("small"),
        tokenizer_json: Some(TOKENIZER),
        generation,
        chat_template: Some("{{ messages }}"),
        special_tokens: BTreeMap::from([("eos_token".into(), "c".into())]),
    };
    let (_dir, gguf) = written(&model, &extras);
    assert_eq!(gguf.tokenizer().unwrap().encode("c b", false).unwrap().get_ids(), [2, 1]);
    assert_eq!(gguf.tokenizer_json().unwrap(), Some(TOKENIZER));
    assert_eq!(gguf.chat_template().unwrap(), Some("{{ messages }}"));
    assert_eq!(gguf.special_tokens().unwrap(), extras.special_tokens);
    let generation = gguf.generation_config().unwrap();
    assert_eq!((generation.temperature, generation.max_new_tokens), (0.3, 9));
    assert_eq!((generation.bos_token_id, generation.eos_token_id), (Some(1), vec![2]));

    // A text is neither cut nor filled up unseen.
    let mut cutting: serde_json::Value = serde_json::from_str(TOKENIZER).unwrap();
    cutting["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
    let cutting = cutting.to_string();
    let extras = GgufExtras { tokenizer_json: Some(&cutting), ..GgufExtras::default() };
    let (_dir, gguf) = written(&model, &extras);
    assert_eq!(gguf.tokenizer().unwrap().encode("c b", false).unwrap().get_ids(), [2, 1]);

    let (_dir, bare) = written(&model, &GgufExtras::default());
    assert_eq!(bare.chat_template().unwrap(), None);
    assert!(bare.special_tokens().unwrap().is_empty());
    let error = bare.tokenizer().unwrap_err().to_string();
    assert!(error.contains("model.gguf: no key tokenizer.huggingface.json"), "{error}");
}

#[test]
fn candle_reads_the_file_too() {
    let config = config(64, true, Activation::Silu);
    let (small, _) = model(&config).quantized(&Policy::new(BlockType::Q8_0)).unwrap();
    let (_dir, gguf) = written(&small, &GgufExtras::default());
    let mut file = std::fs::File::open(gguf.path()).unwrap();
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    let key = |key: &str| content.metadata[key].to_u32().unwrap();
    assert_eq!(content.metadata["general.architecture"].to_string().unwrap(), "llama");
    assert_eq!((key("llama.block_count"), key("llama.attention.head_count_kv")), (2, 2));
    assert_eq!(key("general.file_type"), 7);
    let up = content.tensor(&mut file, "blk.1.ffn_up.weight", &Device::Cpu).unwrap();
    let gate_up = small.dequantized().unwrap().weights()["model.layers.1.mlp.gate_up_proj.weight"].clone();
    assert_eq!(values(&up.dequantize(&Device::Cpu).unwrap()), values(&gate_up.narrow(0, 96, 96).unwrap()));
    // Queries: the halves of a head have become neighbours.
    let q = content.tensor(&mut file, "blk.0.attn_q.weight", &Device::Cpu).unwrap();
    let q = q.dequantize(&Device::Cpu).unwrap();
    let own = small.dequantized().unwrap().weights()["model.layers.0.self_attn.qkv_proj.weight"].clone();
    let row = |t: &candle_core::Tensor, i: usize| t.get(i).unwrap().to_vec1::<f32>().unwrap();
    for (stored, here) in [(0, 0), (1, 8), (2, 1), (17, 24), (63, 63)] {
        assert_eq!(row(&q, stored), row(&own, here), "{stored}");
    }
}

#[test]
fn saving_needs_what_fits() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(&config(32, true, Activation::default()));
    let missing = dir.path().join("nowhere/model.gguf");
    assert!(save(&missing, &model, &GgufExtras::default()).unwrap_err().to_string().contains("nowhere"));
    let path = dir.path().join("model.gguf");
    let large = TOKENIZER.replace("\"c\": 2", "\"c\": 64");
    let extras = GgufExtras { tokenizer_json: Some(&large), ..GgufExtras::default() };
    assert!(save(&path, &model, &extras).unwrap_err().to_string().contains("65"));
    let extras = GgufExtras { tokenizer_json: Some("{"), ..GgufExtras::default() };
    assert!(save(&path, &model, &extras).unwrap_err().to_string().contains("model.gguf"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_same_model_gives_the_same_bytes_and_replaces_an_older_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, "older").unwrap();
    let (small, _) =
        model(&config(64, true, Activation::default())).quantized(&Policy::new(BlockType::Q8_0)).unwrap();
    save(&path, &small, &GgufExtras::default()).unwrap();
    let first = std::fs::read(&path).unwrap();
    let again = Gguf::open(&path).unwrap().model(DType::F32, &Device::Cpu).unwrap();
    save(&path, &again, &GgufExtras::default()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), first);
}

#[test]
fn a_file_of_version_2_is_the_same_model() {
    let model = model(&config(32, true, Activation::default()));
    let (dir, gguf) = written(&model, &GgufExtras::default());
    let mut bytes = std::fs::read(gguf.path()).unwrap();
    assert_eq!(bytes[4..8], 3u32.to_le_bytes());
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    let path = dir.path().join("older.gguf");
    std::fs::write(&path, bytes).unwrap();
    let older = Gguf::open(&path).unwrap().model(DType::F32, &Device::Cpu).unwrap();
    for (name, weight) in model.weights() {
        assert_eq!(values(&older.weights()[&name]), values(&weight), "{name}");
    }
}
