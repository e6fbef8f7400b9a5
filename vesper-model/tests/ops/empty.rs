//! Parts of tensors without elements: candle lets them begin behind the end of what they are a part of.

use candle_core::{DType, Device, Tensor, Var};
use era_act::Activation;
use vesper_model::ops::{
    CrossEntropy, FrozenLinear, Heads, Path, Philox, causal_attention, dropout, embedding,
    gated_feed_forward, layer_norm, linear, linear_cross_entropy, residual_layer_norm, residual_rms_norm,
    rms_norm, self_attention,
};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
}

/// The last columns of a matrix of no rows.
fn part(width: usize, dtype: DType) -> Tensor {
    ones(&[0, width + 3], dtype).narrow(1, 3, width).unwrap()
}

#[test]
fn a_part_of_nothing_is_nothing() {
    for (dtype, path) in DTYPES.into_iter().flat_map(|dtype| [(dtype, Path::Fused), (dtype, Path::Reference)])
    {
        let (x, w) = (part(6, dtype), ones(&[6], dtype));
        let heads = Heads { query: 2, kv: 1, dim: 4 };
        let square = ones(&[6, 6], dtype);
        let targets = Tensor::zeros((0, 4), DType::U32, &Device::Cpu).unwrap().narrow(1, 2, 1).unwrap();
        let targets = targets.squeeze(1).unwrap();
        let loss = linear_cross_entropy(&x, &square, &targets, CrossEntropy::default(), path);
        let loss = loss.unwrap().loss;
        assert_eq!(loss.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap(), 0.0);
        let rows = x.unsqueeze(0).unwrap();
        let ids = Tensor::zeros(2, DType::U32, &Device::Cpu).unwrap();
        let results = [
            (rms_norm(&x, &w, 1e-5, path), 6),
            (layer_norm(&x, &w, None, 1e-5, path), 6),
            (residual_rms_norm(&x, &x, &w, 1e-5, path).map(|(_, y)| y), 6),
            (residual_layer_norm(&x, &x, &w, Some(&w), 1e-5, path).map(|(_, y)| y), 6),
            (dropout(&x, 0.5, Philox::default(), path), 6),
            (linear(&x, &square, path), 6),
            (FrozenLinear::new(square.clone(), Some(w.clone())).unwrap().forward(&x), 6),
            (gated_feed_forward(&x, &ones(&[8, 6], dtype), &ones(&[5, 4], dtype), Activation::Silu, path), 5),
            (
                self_attention(
                    &rows,
                    &ones(&[heads.packed(), 6], dtype),
                    &ones(&[5, 8], dtype),
                    heads,
                    None,
                    path,
                ),
                5,
            ),
            (causal_attention(&part(heads.packed(), dtype).unsqueeze(0).unwrap(), heads, None, path), 8),
            (embedding(&square, &targets, path), 6),
            (embedding(&ones(&[2, 0, 2], dtype).narrow(2, 1, 1).unwrap().squeeze(2).unwrap(), &ids, path), 0),
        ];
        for (i, (y, width)) in results.into_iter().enumerate() {
            let y = y.unwrap_or_else(|error| panic!("{i} {dtype:?} {path:?}: {error}"));
            assert_eq!((y.elem_count(), y.dims().last()), (0, Some(&width)), "{i} {dtype:?} {path:?}");
        }
    }
}

#[test]
fn weights_over_a_part_of_nothing_get_a_gradient_of_zero() {
    for path in [Path::Fused, Path::Reference] {
        let w = Var::ones((3, 6), DType::F32, &Device::Cpu).unwrap();
        let norm = Var::ones(6, DType::F32, &Device::Cpu).unwrap();
        let x = rms_norm(&part(6, DType::F32), norm.as_tensor(), 1e-5, path).unwrap();
        let grads = linear(&x, w.as_tensor(), path).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&w).unwrap().to_vec2::<f32>().unwrap(), [[0.0; 6]; 3]);
        assert_eq!(grads.get(&norm).unwrap().to_vec1::<f32>().unwrap(), [0.0; 6]);
    }
}
