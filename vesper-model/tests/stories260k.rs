//! A Llama that others trained, against golden values of `transformers` and of a computation in f64 (the two
//! `reference_*.json` beside it). It needs the folder that the environment variable `VESPER_DATA` names.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use serde_json::Value;
use tokenizers::Tokenizer;
use vesper_model::generate::{GenerationConfig, Generator, NextLogits, StopReason};
use vesper_model::{ModelError, VesperConfig, VesperLM, hf, ops};

const CPU: Device = Device::Cpu;

/// What the golden values are rounded and computed to.
const LIMIT: f64 = 1e-4;

fn data(test: &str) -> Option<PathBuf> {
    let data = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    data
}

fn stories(test: &str) -> Option<PathBuf> {
    Some(data(test)?.join("models/stories260K"))
}

fn golden(dir: &Path, name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join(name)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// (1, t, vocab) of (t)
fn logits(model: &VesperLM, ids: &[u32]) -> Vec<Vec<f32>> {
    let ids = Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap();
    model.forward(&ids).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
}

fn largest_difference(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).max_by(f64::total_cmp).unwrap()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}

#[test]
fn a_forward_pass_gives_the_golden_logits_and_loss() {
    let Some(dir) = stories("a_forward_pass_gives_the_golden_logits_and_loss") else { return };
    let golden = golden(&dir, "reference_transformers.json");
    let prompt = ids(&golden["prompt_ids"]);
    for path in [ops::Path::Fused, ops::Path::Reference] {
        let model = VesperLM::load(&dir, DType::F32, &CPU).unwrap().with_path(path);
        let rows = logits(&model, &prompt);
        assert!(largest_difference(rows.last().unwrap(), &numbers(&golden["last_logits"])) < LIMIT);
        let means: Vec<f32> = rows.iter().map(|row| row.iter().sum::<f32>() / row.len() as f32).collect();
        assert!(largest_difference(&means, &numbers(&golden["mean_logits_per_position"])) < LIMIT);
        let likeliest: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
        assert_eq!(likeliest, ids(&golden["argmax_per_position"]));

        let row = |ids: &[u32]| Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap();
        let n = prompt.len() - 1;
        let loss = model.loss(&row(&prompt[..n]), &row(&prompt[1..])).unwrap().loss;
        let expected = golden["causal_lm_loss"].as_f64().unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - expected).abs() < LIMIT);
    }
}

#[test]
fn the_golden_text_has_the_golden_likelihood() {
    let Some(dir) = stories("the_golden_text_has_the_golden_likelihood") else { return };
    let golden = golden(&dir, "reference_greedy.json");
    let text = ids(&golden["greedy_ids"]);
    let row = |ids: &[u32]| Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap();
    let model = VesperLM::load(&dir, DType::F64, &CPU).unwrap();
    let n = text.len() - 1;
    let loss = model.loss(&row(&text[..n]), &row(&text[1..])).unwrap().loss;
    let loss = loss.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
    // Both are computed in f64.
    assert!((loss - golden["mean_nll_of_greedy"].as_f64().unwrap()).abs() < 1e-6, "{loss}");
}

#[test]
fn the_fused_path_agrees_with_the_reference() {
    let Some(dir) = stories("the_fused_path_agrees_with_the_reference") else { return };
    let text = ids(&golden(&dir, "reference_greedy.json")["greedy_ids"]);
    let run = |path, dtype| {
        let model = VesperLM::load(&dir, dtype, &CPU).unwrap().with_path(path);
        let ids = Tensor::new(&text[..], &CPU).unwrap().unsqueeze(0).unwrap();
        model.forward(&ids).unwrap().to_dtype(DType::F64).unwrap()
    };
    for (dtype, limit) in [(DType::F64, 1e-9), (DType::F32, 2e-4)] {
        let difference = (run(ops::Path::Fused, dtype) - run(ops::Path::Reference, dtype)).unwrap();
        let off = difference.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let largest = off.into_iter().max_by(f64::total_cmp).unwrap();
        assert!(largest < limit, "{dtype:?}: {largest:e}");
    }
}

#[test]
fn decoding_with_a_cache_gives_the_golden_text() {
    let Some(dir) = stories("decoding_with_a_cache_gives_the_golden_text") else { return };
    let golden = golden(&dir, "reference_greedy.json");
    let expected = ids(&golden["greedy_ids"]);
    let config = hf::read_config(&dir).unwrap();
    let tokenizer = hf::read_tokenizer(&dir, &config).unwrap();
    let settings = GenerationConfig::greedy()
        .with_bos(config.bos_token_id)
        .with_eos(config.eos_token_id)
        .with_max_new_tokens(expected.len() - 1);
    for path in [ops::Path::Fused, ops::Path::Reference] {
        let model = VesperLM::load(&dir, DType::F32, &CPU).unwrap().with_path(path);
        let first = model.session(8).unwrap().append(&[1]).unwrap();
        assert!(largest_difference(&first, &numbers(&golden["first_logits_after_bos"])) < LIMIT);

        let mut session = model.session(expected.len()).unwrap();
        let mut generator =
            Generator::new(&mut session, &[], &settings).unwrap().with_tokenizer(&tokenizer).unwrap();
        let pieces: Vec<String> = generator.pieces().map(Result::unwrap).collect();
        assert_eq!(generator.generated(), &expected[1..]);
        assert_eq!(generator.stop_reason(), Some(&StopReason::MaxTokens));
        assert!(pieces.len() > 100, "streamed in {} pieces", pieces.len());
        assert_eq!(pieces.concat(), golden["greedy_text"].as_str().unwrap());
    }
}

#[test]
fn a_cached_prompt_gives_the_golden_logits_whole_and_in_parts() {
    let Some(dir) = stories("a_cached_prompt_gives_the_golden_logits_whole_and_in_parts") else { return };
    let golden = golden(&dir, "reference_transformers.json");
    let (prompt, expected) = (ids(&golden["prompt_ids"]), numbers(&golden["last_logits"]));
    let model = VesperLM::load(&dir, DType::F32, &CPU).unwrap();
    for part in [prompt.len(), 7, 1] {
        let mut session = model.session(prompt.len()).unwrap();
        let mut last = Vec::new();
        for ids in prompt.chunks(part) {
            last = session.append(ids).unwrap();
        }
        assert!(largest_difference(&last, &expected) < LIMIT, "in parts of {part}");
    }
}

#[test]
fn the_tokenizer_encodes_and_decodes_as_given() {
    let Some(dir) = stories("the_tokenizer_encodes_and_decodes_as_given") else { return };
    let tokenizer = hf::read_tokenizer(&dir, &hf::read_config(&dir).unwrap()).unwrap();
    let golden = golden(&dir, "reference_greedy.json");
    let (expected, text) = (ids(&golden["greedy_ids"]), golden["greedy_text"].as_str().unwrap());
    assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
    assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), expected);

    let prompt = ids(&self::golden(&dir, "reference_transformers.json")["prompt_ids"]);
    let text = tokenizer.decode(&prompt, true).unwrap();
    assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), prompt);
}

#[test]
fn saving_and_loading_gives_the_same_logits_bit_for_bit() {
    let Some(dir) = stories("saving_and_loading_gives_the_same_logits_bit_for_bit") else { return };
    let prompt = ids(&golden(&dir, "reference_transformers.json")["prompt_ids"]);
    let varmap = VarMap::new();
    let model = VesperLM::load_into(&dir, None, &varmap, 0, DType::F32, &CPU).unwrap();
    let weights: HashMap<String, Tensor> = varmap
        .data()
        .lock()
        .unwrap()
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let copy = tempfile::tempdir().unwrap();
    let tokenizer = std::fs::read_to_string(dir.join("tokenizer.json")).unwrap();
    let extras = hf::Extras { tokenizer_json: Some(&tokenizer), ..hf::Extras::default() };
    hf::save(copy.path(), model.config(), &weights, &extras).unwrap();

    let config = golden(copy.path(), "config.json");
    assert_eq!(config["model_type"], "llama");
    assert_eq!(config["architectures"], serde_json::json!(["LlamaForCausalLM"]));
    assert_eq!(config["hidden_act"], "silu");

    let bits = |model: &VesperLM| -> Vec<u32> {
        logits(model, &prompt).concat().into_iter().map(f32::to_bits).collect()
    };
    let loaded = VesperLM::load(copy.path(), DType::F32, &CPU).unwrap();
    assert_eq!(loaded.config(), model.config());
    assert_eq!(bits(&loaded), bits(&model));
    assert_eq!(bits(&loaded), bits(&VesperLM::load(&dir, DType::F32, &CPU).unwrap()));
}

#[test]
fn a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers() {
    let Some(data) = data("a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers") else {
        return;
    };
    let file = data.join("tokenizers/camembert-base/tokenizer.json");
    let config = VesperConfig::preset("nano").unwrap();
    let tokenizer = Tokenizer::from_file(&file).unwrap();
    let size = tokenizer.get_vocab_size(true);
    assert!(size > config.vocab_size);

    let expected =
        format!("the tokenizer has {size} entries but the model's vocabulary has {}", config.vocab_size);
    let check = |result: Result<(), ModelError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, ModelError::TokenizerTooLarge { .. }), "{error:?}");
        assert!(error.to_string().contains(&expected), "{error}");
    };
    check(hf::check_tokenizer(&tokenizer, &config));

    // Beside a model that is there, and when one is saved.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(&file, dir.path().join("tokenizer.json")).unwrap();
    check(hf::read_tokenizer(dir.path(), &config).map(|_| ()));
    let varmap = VarMap::new();
    VesperLM::initialize(&config, &varmap, 0, DType::F32, &CPU).unwrap();
    let weights: HashMap<String, Tensor> = varmap
        .data()
        .lock()
        .unwrap()
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let json = std::fs::read_to_string(&file).unwrap();
    let extras = hf::Extras { tokenizer_json: Some(&json), ..hf::Extras::default() };
    check(hf::save(dir.path().join("model"), &config, &weights, &extras));
    assert!(!dir.path().join("model").exists());

    // A vocabulary that is wide enough takes it.
    hf::check_tokenizer(&tokenizer, &config.with_vocab(size)).unwrap();
}
