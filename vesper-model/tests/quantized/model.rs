//! A model with its matrices in blocks.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use era_act::Activation;
use vesper_model::VesperLM;
use vesper_model::flylora::{AdapterKind, LoraConfig, Targets};
use vesper_model::generate::NextLogits;
use vesper_model::metacognition::fingerprint;
use vesper_model::quantized::{BlockType, Policy};

use super::{config, ids, model, relative, values};

#[test]
fn each_type_is_as_near_as_it_is_large() {
    let plain = model(&config(256, false, Activation::default()));
    let want = plain.forward(&ids(2, 30)).unwrap();
    let loss =
        |model: &VesperLM| model.loss(&ids(2, 30), &ids(2, 30)).unwrap().loss.to_scalar::<f32>().unwrap();
    for (block, bound) in [
        (BlockType::F32, 1e-6),
        (BlockType::F16, 2e-3),
        (BlockType::Bf16, 2e-2),
        (BlockType::Q8_0, 0.08),
        (BlockType::Q6K, 0.25),
        (BlockType::Q5K, 0.5),
        (BlockType::Q5_1, 0.5),
        (BlockType::Q5_0, 0.5),
        (BlockType::Q4K, 0.9),
        (BlockType::Q4_1, 0.9),
        (BlockType::Q4_0, 0.9),
        (BlockType::Q3K, 1.5),
        (BlockType::Q2K, 2.0),
    ] {
        let (small, report) = plain.quantized(&Policy::new(block)).unwrap();
        assert_eq!(small.is_quantized(), block != BlockType::F32);
        let y = small.forward(&ids(2, 30)).unwrap();
        let error = relative(&y, &want);
        println!("{block}: logits {error}, weights {}", report.tensors[1].error);
        // The weights are random and wide, so that errors grow through the blocks.
        assert!(error < bound && (error > bound / 100.0 || error == 0.0), "{block}: {error}");
        assert!((loss(&small) - loss(&plain)).abs() < bound as f32, "{block}");
        // The blocks' values as numbers give the same.
        let numbers = small.dequantized().unwrap();
        assert!(!numbers.is_quantized());
        assert!(relative(&numbers.forward(&ids(2, 30)).unwrap(), &y) < 1e-5, "{block}");
        assert_eq!(fingerprint(&small).unwrap(), fingerprint(&numbers).unwrap());
        // A fingerprint counts weights as rounded to bf16.
        if !matches!(block, BlockType::F32 | BlockType::Bf16) {
            assert_ne!(fingerprint(&small).unwrap(), fingerprint(&plain).unwrap());
        }
        assert_eq!(report.tensors.len(), 3 + 2 * 9);
        assert_eq!(report.bytes_before(), 4 * plain.config().num_parameters());
        for tensor in &report.tensors {
            assert!(tensor.error < 0.5, "{block}: {} {}", tensor.name, tensor.error);
            assert_eq!(tensor.bytes, tensor.got.bytes(tensor.shape.iter().product()));
        }
    }
}

#[test]
fn the_report_says_what_fell_back() {
    let plain = model(&config(96, true, Activation::default())); // 96 = 3 * 32; the feed-forward 144 is no multiple of 32
    let (_, report) = plain.quantized(&Policy::new(BlockType::Q4K).with_head(BlockType::Q8_0)).unwrap();
    let of = |name: &str| report.tensors.iter().find(|t| t.name.ends_with(name)).unwrap();
    assert_eq!(of("embed_tokens.weight").got, BlockType::Q8_0);
    assert_eq!(of("embed_tokens.weight").reason(), None);
    assert_eq!(of("k_proj.weight").got, BlockType::Q5_0);
    assert_eq!(of("k_proj.weight").reason().unwrap(), "rows of 96 do not divide into blocks of 256");
    assert_eq!(of("down_proj.weight").got, BlockType::F16);
    assert_eq!(of("model.norm.weight").got, BlockType::F32);
    assert_eq!(of("model.norm.weight").asked, None);
    assert!(report.tensors.iter().all(|t| t.name != "lm_head.weight"));
}

#[test]
fn packed_projections_may_be_of_several_types() {
    let plain = model(&config(64, false, Activation::default()));
    let policy = Policy::new(BlockType::Q8_0)
        .with_pattern("v_proj", BlockType::F16)
        .with_pattern("*.0.*up_proj*", BlockType::F32)
        .with_pattern("k_proj", BlockType::Q4_0);
    let (small, _) = plain.quantized(&policy).unwrap();
    let y = small.forward(&ids(1, 20)).unwrap();
    assert!(relative(&y, &plain.forward(&ids(1, 20)).unwrap()) < 0.2);
    assert!(relative(&small.dequantized().unwrap().forward(&ids(1, 20)).unwrap(), &y) < 1e-5);
}

#[test]
fn decoding_follows_the_whole_sequence() {
    let (small, _) =
        model(&config(64, true, Activation::Silu)).quantized(&Policy::new(BlockType::Q8_0)).unwrap();
    let all = ids(1, 20);
    let want = small.forward(&all).unwrap();
    let tokens: Vec<u32> = all.flatten_all().unwrap().to_vec1().unwrap();
    let mut session = small.session(32).unwrap();
    for (start, end) in [(0, 11), (11, 12), (12, 20)] {
        let logits = session.append(&tokens[start..end]).unwrap();
        let logits = Tensor::from_vec(logits, 64, &Device::Cpu).unwrap();
        let error = relative(&logits, &want.get(0).unwrap().get(end - 1).unwrap());
        assert!(error < 0.03, "{start}: {error}");
    }
    // In bf16 the blocks are the same.
    let half = small.clone().with_compute_dtype(DType::BF16).forward(&all).unwrap();
    assert!(relative(&half, &want) < 0.05);
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let plain = model(&config(64, true, Activation::default()));
    let policy = Policy::new(BlockType::Q8_0);
    let (small, _) = plain.quantized(&policy).unwrap();
    let message = |model: &VesperLM, policy: &Policy| model.quantized(policy).unwrap_err().to_string();
    assert!(message(&small, &policy).contains("quantised already"));
    let mut adapted = plain.clone();
    adapted.attach(&AdapterKind::Lora(LoraConfig::default().with_r(2)), &Targets::all_linear()).unwrap();
    assert!(message(&adapted, &policy).contains("merge them first"));
    let unused = policy.clone().with_pattern("w_proj", BlockType::F16);
    assert!(message(&plain, &unused).contains("`w_proj` fits none"), "{}", message(&plain, &unused));

    for (value, what) in
        [(f32::NAN, "not finite"), (f32::INFINITY, "not finite"), (1e12, "too large for q8_0")]
    {
        let varmap = VarMap::new();
        let config = config(64, true, Activation::default());
        let broken = VesperLM::initialize(&config, &varmap, 3, DType::F32, &Device::Cpu).unwrap();
        {
            let data = varmap.data().lock().unwrap();
            let var = &data["model.layers.1.mlp.down_proj.weight"];
            let mut values = values(var);
            values[70] = value;
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        let message = message(&broken, &policy);
        assert!(
            message.contains("model.layers.1.mlp.down_proj.weight") && message.contains(what),
            "{message}"
        );
    }
}

#[test]
fn a_training_model_is_left_as_it_is() {
    let varmap = VarMap::new();
    let config = config(64, true, Activation::default());
    let training = VesperLM::initialize(&config, &varmap, 3, DType::F32, &Device::Cpu).unwrap();
    let (small, _) = training.quantized(&Policy::new(BlockType::Q8_0)).unwrap();
    let loss = training.loss(&ids(1, 12), &ids(1, 12)).unwrap().loss;
    let grads = loss.backward().unwrap();
    assert!(varmap.all_vars().iter().all(|var| grads.get(var).is_some()));
    // The quantised one has no gradient to give.
    let loss = small.loss(&ids(1, 12), &ids(1, 12)).unwrap().loss;
    let grads = loss.backward().unwrap();
    assert!(varmap.all_vars().iter().all(|var| grads.get(var).is_none()));
}
