//! Models of candle-transformers, whose code knows nothing of adapters, from merged weights.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_transformers::models::{bert, llama, mistral, qwen2};
use common::{largest_difference, move_all, noise};
use flylora::files::{AdapterFile, MergedWeights};
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, AnyLinear, FrozenLinear, LoraConfig, Place, save_adapters,
};

/// Loads a model and runs it over four tokens.
type Run = fn(VarBuilder<'_>) -> Result<Tensor>;

fn ids() -> Tensor {
    Tensor::new(&[[1u32, 5, 19, 3]], &Device::Cpu).unwrap()
}

fn run_llama(vb: VarBuilder<'_>) -> Result<Tensor> {
    let config = llama::Config {
        hidden_size: 16,
        intermediate_size: 24,
        vocab_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 32,
        tie_word_embeddings: true,
    };
    let mut cache = llama::Cache::new(false, vb.dtype(), &config, &Device::Cpu)?;
    llama::Llama::load(vb, &config)?.forward(&ids(), 0, &mut cache)
}

fn run_qwen2(vb: VarBuilder<'_>) -> Result<Tensor> {
    let config = qwen2::Config {
        vocab_size: 20,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        sliding_window: 32,
        max_window_layers: 2,
        tie_word_embeddings: true,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    qwen2::ModelForCausalLM::new(&config, vb)?.forward(&ids(), 0)
}

fn run_mistral(vb: VarBuilder<'_>) -> Result<Tensor> {
    let config = mistral::Config {
        vocab_size: 20,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        head_dim: None,
        num_key_value_heads: 2,
        hidden_act: Activation::Silu,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        sliding_window: None,
        use_flash_attn: false,
    };
    mistral::Model::new(&config, vb)?.forward(&ids(), 0)
}

fn run_bert(vb: VarBuilder<'_>) -> Result<Tensor> {
    let config = bert::Config {
        vocab_size: 20,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 24,
        max_position_embeddings: 32,
        ..bert::Config::default()
    };
    bert::BertModel::load(vb, &config)?.forward(&ids(), &ids().zeros_like()?, None)
}

/// Weights by name for a model: what it asks for, with norms of 1.
fn weights(run: Run, dtype: DType) -> BTreeMap<String, Tensor> {
    let map = VarMap::new();
    run(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)).unwrap();
    let asked: BTreeMap<_, _> = map.data().lock().unwrap().clone().into_iter().collect();
    let weight = |(i, (name, var)): (usize, (String, candle_core::Var))| {
        let is_norm = var.rank() == 1 && name.ends_with("weight");
        let t = if is_norm { var.ones_like().unwrap() } else { noise(var.dims(), 0.5, DType::F32, i as u64) };
        (name, t.to_dtype(dtype).unwrap())
    };
    asked.into_iter().enumerate().map(weight).collect()
}

/// The weights in two files, as large models come.
fn from_shards(weights: &BTreeMap<String, Tensor>, folder: &Path, dtype: DType) -> VarBuilder<'static> {
    let mut shards = [HashMap::new(), HashMap::new()];
    for (i, (name, t)) in weights.iter().enumerate() {
        shards[i % 2].insert(name.clone(), t.clone());
    }
    let paths = ["model-1.safetensors", "model-2.safetensors"].map(|name| folder.join(name));
    for (shard, path) in shards.iter().zip(&paths) {
        candle_core::safetensors::save(shard, path).unwrap();
    }
    // SAFETY: nothing changes the files while they are mapped.
    #[allow(unsafe_code, reason = "candle's way to files")]
    unsafe { VarBuilder::from_mmaped_safetensors(&paths, dtype, &Device::Cpu) }.unwrap()
}

#[test]
fn a_model_from_merged_weights_is_one_whose_layers_were_merged_by_hand() {
    let models: [(&str, Run); 4] =
        [("llama", run_llama), ("qwen2", run_qwen2), ("mistral", run_mistral), ("bert", run_bert)];
    let lora = LoraConfig::default().with_r(2);
    let kinds = [
        AdapterKind::Lora(lora.clone()),
        AdapterKind::Dora(lora),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(3)),
    ];
    for (name, run) in models {
        for (stored, dtype) in [
            (DType::F32, DType::F32),
            (DType::BF16, DType::F32),
            (DType::F16, DType::F32),
            (DType::F32, DType::BF16),
        ] {
            if name == "bert" && dtype == DType::BF16 {
                continue; // the mask of candle's BERT is minus infinity in bf16
            }
            let weights = weights(run, stored);
            let is_layer = |(name, t): &(&String, &Tensor)| {
                t.rank() == 2 && name.ends_with(".weight") && !name.contains("embed")
            };
            let layers: Vec<&str> = weights
                .iter()
                .filter(is_layer)
                .filter_map(|(name, _)| name.strip_suffix(".weight"))
                .collect();
            for kind in &kinds {
                let mut by_hand: HashMap<String, Tensor> =
                    weights.iter().map(|(name, t)| (name.clone(), t.clone())).collect();
                let mut adapters: Vec<(&str, Arc<dyn Adapter>)> = Vec::new();
                for (i, path) in layers.iter().enumerate() {
                    let weight = weights[&format!("{path}.weight")].to_dtype(DType::F32).unwrap();
                    let base = FrozenLinear::new(weight, None).unwrap();
                    let place = Place::alone(*path, DType::F32, &Device::Cpu);
                    let layer = AnyLinear::build(base, kind, &place).unwrap();
                    move_all(layer.vars(), 0.2, i as u64);
                    adapters.push((path, Arc::clone(layer.adapter())));
                    by_hand.insert(format!("{path}.weight"), layer.into_merged().unwrap().weight().clone());
                }
                let named: Vec<(&str, &Arc<dyn Adapter>)> = adapters.iter().map(|(p, a)| (*p, a)).collect();
                let dir = tempfile::tempdir().unwrap();
                save_adapters(dir.path(), &named).unwrap();

                let plain = from_shards(&weights, dir.path(), dtype);
                let without = run(plain.clone()).unwrap();
                let merged = MergedWeights::new(plain, AdapterFile::read(dir.path()).unwrap()).unwrap();
                let got = run(merged.var_builder()).unwrap();
                merged.check_all_used().unwrap();
                let want = run(VarBuilder::from_tensors(by_hand, dtype, &Device::Cpu)).unwrap();
                let what = format!("{name}, {kind} over {stored:?} as {dtype:?}");
                assert!(layers.len() >= 12 && largest_difference(&got, &want) < 1e-5, "{what}");
                assert!(largest_difference(&got, &without) > 0.05, "{what} has an effect");
            }
        }
    }
}
