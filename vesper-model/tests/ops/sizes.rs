//! Sizes over u32 are refused before anything is allocated: the inputs are views of one number.

use candle_core::{DType, Device, Tensor};
use era_act::Activation;
use vesper_model::ops::{
    CrossEntropy, DecoderSettings, DecoderWeights, FrozenLinear, Heads, Path, Philox, causal_attention,
    decoder_block, dropout, embedding, gated_feed_forward, layer_norm, linear, linear_cross_entropy,
    residual_layer_norm, residual_rms_norm, rms_norm, self_attention,
};

/// A tensor of any size that takes four bytes.
fn huge(shape: &[usize]) -> Tensor {
    Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap().broadcast_as(shape).unwrap()
}

#[test]
fn more_elements_than_u32_counts_are_refused() {
    const N: usize = 1 << 20;
    let heads = Heads { query: 1, kv: 1, dim: 2 };
    let ids = Tensor::zeros(1, DType::U32, &Device::Cpu).unwrap().broadcast_as(N).unwrap();
    let (x, d) = (huge(&[N, 1 << 13]), huge(&[1 << 13]));
    for path in [Path::Fused, Path::Reference] {
        let results = [
            linear(&x, &huge(&[1, 1 << 13]), path).map(drop),
            // The inputs are small, the result is not.
            linear(&huge(&[N, 1]), &huge(&[1 << 13, 1]), path).map(drop),
            rms_norm(&x, &d, 1e-5, path).map(drop),
            layer_norm(&x, &d, None, 1e-5, path).map(drop),
            residual_rms_norm(&x, &x, &d, 1e-5, path).map(drop),
            residual_layer_norm(&x, &x, &d, None, 1e-5, path).map(drop),
            dropout(&x, 0.5, Philox::default(), path).map(drop),
            embedding(&huge(&[2, 1 << 13]), &ids, path).map(drop),
            gated_feed_forward(
                &huge(&[N, 1]),
                &huge(&[1 << 13, 1]),
                &huge(&[1, 1 << 12]),
                Activation::Silu,
                path,
            )
            .map(drop),
            causal_attention(&huge(&[N, N, 6]), heads, None, path).map(drop),
            self_attention(&huge(&[1 << 16, 1 << 16, 1]), &huge(&[6, 1]), &huge(&[1, 2]), heads, None, path)
                .map(drop),
            linear_cross_entropy(&x, &huge(&[2, 1 << 13]), &ids, CrossEntropy::default(), path).map(drop),
        ];
        for (i, result) in results.into_iter().enumerate() {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("more than the 4294967295 elements"), "{i}: {message}");
        }
    }
    let layer = FrozenLinear::new(huge(&[1 << 13, 1]), None).unwrap();
    // The reference holds all scores; the fused path never does.
    let scores = causal_attention(&huge(&[1, 70_000, 6]), heads, None, Path::Reference);
    for result in [layer.forward(&huge(&[N, 1])), scores] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("more than the 4294967295 elements"), "{message}");
    }
}

#[test]
fn a_block_is_refused_by_its_widest_part_before_the_others_run() {
    let (n, heads) = (1 << 22, Heads { query: 1, kv: 1, dim: 2 });
    let weights = DecoderWeights {
        norm_attention: huge(&[1]),
        qkv: huge(&[6, 1]),
        out: huge(&[1, 2]),
        norm_feed_forward: huge(&[1]),
        gate_up: huge(&[2048, 1]),
        down: huge(&[1, 1024]),
    };
    let settings = DecoderSettings { heads, activation: Activation::Silu, eps: 1e-5 };
    for path in [Path::Fused, Path::Reference] {
        let result = decoder_block(&huge(&[n, 1, 1]), &weights, settings, None, path);
        let message = result.unwrap_err().to_string();
        assert!(
            message.starts_with("decoder_block: a tensor of shape [4194304, 1, 2048] has more"),
            "{message}"
        );
    }
}

#[test]
fn weights_over_nothing_are_not_too_large_either() {
    let (x, w) = (huge(&[0, 1 << 33]), huge(&[1 << 33]));
    for path in [Path::Fused, Path::Reference] {
        for result in [rms_norm(&x, &w, 1e-5, path), layer_norm(&x, &w, Some(&w), 1e-5, path)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("[8589934592] has more than the 4294967295 elements"), "{message}");
        }
    }
}

#[test]
fn a_huge_but_empty_tensor_is_empty() {
    let x = Tensor::zeros((0, 1), DType::F32, &Device::Cpu).unwrap().broadcast_as((0, 1 << 40)).unwrap();
    let y = dropout(&x, 0.5, Philox::default(), Path::Fused).unwrap();
    assert_eq!(y.dims(), [0, 1 << 40]);
}

#[test]
fn a_frozen_layer_of_the_adapters_crate_has_a_gradient_for_its_input_alone() {
    let w = candle_core::Var::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
    let x = candle_core::Var::ones((4, 2), DType::F32, &Device::Cpu).unwrap();
    let layer = FrozenLinear::new(w.as_tensor().clone(), None).unwrap();
    let grads = layer.forward(x.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().to_vec2::<f32>().unwrap(), [[3.0; 2]; 4]);
    assert!(grads.get(&w).is_none());
}
