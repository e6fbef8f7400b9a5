//! Weights in blocks on CUDA against their values on the CPU: products, gradients, a model, and an adapter on it.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use vesper_model::flylora::{self, AdapterKind, FlyLoraConfig, LoraConfig, Targets};
use vesper_model::generate::{BatchLogits, NextLogits};
use vesper_model::ops::{cuda_device, quantized_embedding, quantized_linear};
use vesper_model::quantized::{BlockType, Policy};
use vesper_model::{DecodeStep, VesperConfig, VesperLM};

use crate::common::{brief, error, gpu, ids, random, to_f64};

/// The same blocks on the device, and their values in f64 on the CPU.
fn blocks(block: BlockType, (out, input): (usize, usize), device: &Device) -> (Arc<QTensor>, Tensor) {
    let w = random(3, &[out, input]).to_dtype(DType::F32).unwrap();
    let own = QTensor::quantize(&w.to_device(device).unwrap(), block.ggml()).unwrap();
    let values = to_f64(&own.dequantize(device).unwrap());
    let on_cpu = QTensor::quantize(&w, block.ggml()).unwrap().dequantize(&Device::Cpu).unwrap();
    assert!(error(&values, &to_f64(&on_cpu)) < 1e-6, "{block}: other values on the device");
    (Arc::new(own), values)
}

#[test]
fn products_with_blocks_and_their_gradients_are_near_the_exact_ones() {
    let name = "products_with_blocks_and_their_gradients_are_near_the_exact_ones";
    let Some((_lock, device)) = gpu(name) else { return };
    for block in BlockType::ALL {
        for shape in [(37, 256), (1, 512), (300, 768)] {
            let (w, values) = blocks(block, shape, &device);
            for m in [1, 2, 8, 9, 33] {
                let x = random(m as u64, &[m, shape.1]);
                let dy = random(99, &[m, shape.0]);
                let input =
                    Var::from_tensor(&x.to_dtype(DType::F32).unwrap().to_device(&device).unwrap()).unwrap();
                let y = quantized_linear(input.as_tensor(), &w).unwrap();
                assert_eq!(y.dims(), [m, shape.0]);
                let off = error(&to_f64(&y), &x.matmul(&values.t().unwrap()).unwrap());
                assert!(off < 2e-2, "{block} {shape:?}, {m} rows: off by {off:e}");
                let weights = dy.to_dtype(DType::F32).unwrap().to_device(&device).unwrap();
                let grads = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
                let off = error(&to_f64(grads.get(&input).unwrap()), &dy.matmul(&values).unwrap());
                assert!(off < 1e-5, "{block} {shape:?}, {m} rows: gradient off by {off:e}");
            }
        }
        let (table, values) = blocks(block, (50, 256), &device);
        let rows = quantized_embedding(&table, &ids(7, 50).to_device(&device).unwrap()).unwrap();
        let expected = values.index_select(&ids(7, 50), 0).unwrap();
        assert!(error(&to_f64(&rows), &expected) < 1e-6, "{block}: rows of a table");
    }
}

fn config() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(301).with_kv_heads(2);
    config.num_hidden_layers = 2;
    config.hidden_size = 256;
    config.num_attention_heads = 4;
    config.head_dim = 64;
    config.intermediate_size = 512;
    config.initializer_range = 0.06;
    config
}

#[test]
fn a_model_in_blocks_writes_what_its_values_would() {
    let Some((_lock, device)) = gpu("a_model_in_blocks_writes_what_its_values_would") else { return };
    let tokens: Vec<u32> = (0..40).map(|i| i * 97 % 301).collect();
    for block in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K, BlockType::Q6K, BlockType::Bf16] {
        let plain = VesperLM::initialize(&config(), &VarMap::new(), 7, DType::F32, &device).unwrap();
        let (small, _) = plain.quantized(&Policy::new(block)).unwrap();
        assert!(small.is_quantized());
        let input = Tensor::new(&tokens[..], &device).unwrap().unsqueeze(0).unwrap();
        let exact = to_f64(&small.dequantized().unwrap().forward(&input).unwrap()).squeeze(0).unwrap();
        let off = error(&to_f64(&small.forward(&input).unwrap()).squeeze(0).unwrap(), &exact);
        println!("{block}: logits off by {off:.1e}");
        // Every product of two layers rounds its input to 8 bits, and those of 4 bits their blocks' sums to f16.
        assert!(off < 1e-1, "{block}: logits off by {off:e}");
        let mut session = small.session(64).unwrap();
        let mut read = 0;
        for n in [30, 1, 1, 5, 1] {
            let logits = session.append(&tokens[read..read + n]).unwrap();
            read += n;
            let logits = to_f64(&Tensor::new(logits, &Device::Cpu).unwrap());
            let off = error(&logits, &exact.get(read - 1).unwrap());
            println!("{block}: after {read} tokens off by {off:.1e}");
            assert!(off < 1e-1, "{block}: after {read} tokens off by {off:e}");
        }
    }
}

/// The model of the blocks' values in f64 on the CPU, as a function from tokens to their logits (n, vocab).
fn exact(small: &VesperLM) -> impl Fn(&[u32]) -> Tensor {
    let weights = small.dequantized().unwrap().weights();
    let weights = weights.into_iter().map(|(name, weight)| (name, to_f64(&weight))).collect();
    let vb = VarBuilder::from_tensors(weights, DType::F64, &Device::Cpu);
    let exact = VesperLM::new(small.config(), vb).unwrap();
    move |tokens| {
        let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        exact.forward(&ids).unwrap().squeeze(0).unwrap()
    }
}

/// The largest difference between the logits of single tokens, of `rows` sequences at once, and those of the values in f64.
fn step_off(small: &VesperLM, rows: usize, n: usize) -> f64 {
    let exact = exact(small);
    let mut batch = small.batch_session(rows, n).unwrap().with_step(DecodeStep::Captured).unwrap();
    assert!(batch.is_fused());
    let tokens: Vec<Vec<u32>> =
        (0..rows).map(|row| (0..n).map(|i| ((i * 97 + row * 31) % 301) as u32).collect()).collect();
    let exact: Vec<Tensor> = tokens.iter().map(|tokens| exact(tokens)).collect();
    let mut most: f64 = 0.0;
    for i in 0..n {
        let ids: Vec<&[u32]> = tokens.iter().map(|tokens| &tokens[i..=i]).collect();
        for (logits, exact) in batch.append(&ids).unwrap().into_iter().zip(&exact) {
            let logits = to_f64(&Tensor::new(logits, &Device::Cpu).unwrap());
            most = most.max(error(&logits, &exact.get(i).unwrap()));
        }
    }
    most
}

#[test]
fn the_fused_step_reads_blocks_of_every_type() {
    let Some((_lock, _)) = gpu("the_fused_step_reads_blocks_of_every_type") else { return };
    let device = cuda_device(0).unwrap(); // of its own: a recording takes in what other threads send
    let of = |config: &VesperConfig, policy: &Policy| {
        let plain = VesperLM::initialize(config, &VarMap::new(), 7, DType::F32, &device).unwrap();
        plain.quantized(policy).unwrap().0
    };
    let untied = VesperConfig { tie_word_embeddings: false, ..config() };
    for block in BlockType::ALL {
        let small = of(&untied, &Policy::new(block).with_head(block).with_embedding(block));
        for rows in if brief() { 1..2 } else { 1..6 } {
            let off = step_off(&small, rows, 12);
            println!("{block}, {rows} rows: off by {off:.1e}");
            assert!(off < 1e-4, "{block}, {rows} rows: off by {off:e}");
        }
    }
    // Matrices of several types, rows of several types in one, and sizes that leave parts of a warp without work.
    let mixed = Policy::new(BlockType::Q4K)
        .with_pattern("v_proj", BlockType::Q6K)
        .with_pattern("o_proj", BlockType::F16)
        .with_pattern("layers.1.mlp.down", BlockType::Q5_1);
    let small = of(&config(), &mixed);
    assert!(step_off(&small, 3, 12) < 1e-4, "of several types");
    let odd = VesperConfig {
        hidden_size: 96,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        head_dim: 32,
        intermediate_size: 160,
        ..config()
    };
    for block in [BlockType::Q8_0, BlockType::Q5_0, BlockType::Q4_1] {
        assert!(step_off(&of(&odd, &Policy::new(block)), 9, 12) < 1e-4, "{block}, rows of 96 and 160");
    }
    // A cache in half types, and numbers in f32 beside it.
    let plain = VesperLM::initialize(&config(), &VarMap::new(), 7, DType::F32, &device).unwrap();
    for (model, dtype) in [(&small, DType::BF16), (&small, DType::F16), (&plain, DType::BF16)] {
        let off = step_off(&model.clone().with_compute_dtype(dtype), 2, 12);
        assert!(off < 1e-2, "{dtype:?}: off by {off:e}");
    }
    // Gates and the other half of two types are composed, and so is what no step has kernels for.
    let apart = of(&config(), &Policy::new(BlockType::Q8_0).with_pattern("up_proj", BlockType::Q4_0));
    assert!(!apart.session(8).unwrap().is_fused());
}

#[test]
fn an_adapter_on_blocks_is_trained_and_the_blocks_are_not() {
    let Some((_lock, device)) = gpu("an_adapter_on_blocks_is_trained_and_the_blocks_are_not") else { return };
    let plain = VesperLM::initialize(&config(), &VarMap::new(), 7, DType::F32, &device).unwrap();
    let tokens = ids(2 * 33, 301).reshape((2, 33)).unwrap().to_device(&device).unwrap();
    let (inputs, targets) = (tokens.narrow(1, 0, 32).unwrap(), tokens.narrow(1, 1, 32).unwrap());
    for kind in [
        AdapterKind::Lora(LoraConfig::default().with_r(4)),
        AdapterKind::Dora(LoraConfig::default().with_r(4)),
        AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(16, 4)),
    ] {
        let (mut model, _) = plain.quantized(&Policy::new(BlockType::Q4K)).unwrap();
        model.attach(&kind, &Targets::all_linear()).unwrap();
        let vars: Vec<(String, Var)> = (model.adapters().into_iter())
            .flat_map(|(path, own)| {
                own.parameters().into_iter().map(move |(name, var)| (format!("{path}.{name}"), var))
            })
            .collect();
        for (i, (_, var)) in vars.iter().enumerate() {
            // Away from the start, where half of the gradients are 0.
            let moved = (random(i as u64, var.dims()) * 0.02).unwrap().to_dtype(DType::F32).unwrap();
            let moved = (var.as_detached_tensor() + moved.to_device(&device).unwrap()).unwrap();
            var.set(&moved).unwrap();
        }
        let loss = |model: &VesperLM| model.loss(&inputs, &targets).unwrap().loss;
        let before = loss(&model);
        let grads = before.backward().unwrap();
        flylora::audit(vars.clone(), &grads).unwrap();
        for (_, var) in &vars {
            let step = (grads.get(var).unwrap() * 0.05).unwrap();
            var.set(&(var.as_detached_tensor() - step).unwrap()).unwrap();
        }
        let [before, after] = [before, loss(&model)].map(|loss| loss.to_scalar::<f32>().unwrap());
        assert!(after < before, "{kind}: {before} to {after}");
    }
}
