//! Weights in f32 beside activations in bf16 and f16.

use candle_core::{DType, Device, Result, Tensor, Var};
use era_act::Activation;
use vesper_model::ops::{
    CrossEntropy, Heads, Path, Philox, Rope, causal_attention, dropout, embedding, embedding_in,
    gated_feed_forward, layer_norm, linear, linear_cross_entropy, residual_layer_norm, residual_rms_norm,
    rms_norm, rope, self_attention,
};

use crate::common::{error, random};

/// f of an input in `dtype` and weights in `weights`: the value and the gradients, in f64, and the gradients' dtypes.
fn run(
    inputs: &[Tensor],
    (dtype, weights): (DType, DType),
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Vec<Tensor>, Vec<DType>) {
    let vars: Vec<Var> = (inputs.iter().enumerate())
        .map(|(i, x)| Var::from_tensor(&x.to_dtype(if i == 0 { dtype } else { weights }).unwrap()).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let factor = random(77, y.dims()).to_dtype(y.dtype()).unwrap();
    let grads = (&y * factor).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients: Vec<&Tensor> = vars.iter().map(|var| grads.get(var).unwrap()).collect();
    let dtypes = gradients.iter().map(|gradient| gradient.dtype()).collect();
    let all = std::iter::once(&y).chain(gradients);
    (all.map(|tensor| tensor.to_dtype(DType::F64).unwrap()).collect(), dtypes)
}

fn check(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor], Path) -> Result<Tensor>) {
    let (exact, _) = run(inputs, (DType::F64, DType::F64), |x| f(x, Path::Reference));
    for (dtype, limit) in [(DType::BF16, 3e-2), (DType::F16, 5e-3)] {
        for path in [Path::Fused, Path::Reference] {
            let (results, dtypes) = run(inputs, (dtype, DType::F32), |x| f(x, path));
            for (i, (a, b)) in results.iter().zip(&exact).enumerate() {
                let off = error(a, b);
                assert!(off < limit, "{name} {dtype:?} {path:?}: result {i} off by {off:e}");
            }
            assert_eq!(dtypes[0], dtype, "{name} {path:?}");
            assert!(dtypes[1..].iter().all(|&dtype| dtype == DType::F32), "{name} {path:?}: {dtypes:?}");
        }
    }
}

#[test]
fn weights_in_f32_get_gradients_in_f32() {
    let (x, d) = (random(1, &[2, 17, 12]), random(2, &[12]));
    check("linear", &[x.clone(), random(2, &[9, 12])], |x, path| linear(&x[0], &x[1], path));
    check("rms_norm", &[x.clone(), d.clone()], |x, path| rms_norm(&x[0], &x[1], 1e-2, path));
    check("layer_norm", &[x.clone(), d.clone(), random(3, &[12])], |x, path| {
        layer_norm(&x[0], &x[1], Some(&x[2]), 1e-2, path)
    });
    check("residual_rms_norm", &[x.clone(), d.clone()], |x, path| {
        let (sum, y) = residual_rms_norm(&x[0], &x[0], &x[1], 1e-2, path)?;
        sum + y
    });
    check("residual_layer_norm", &[x.clone(), d, random(3, &[12])], |x, path| {
        let (sum, y) = residual_layer_norm(&x[0], &x[0], &x[1], Some(&x[2]), 1e-2, path)?;
        sum + y
    });
    check("feed-forward", &[x.clone(), random(2, &[14, 12]), random(3, &[5, 7])], |x, path| {
        gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), path)
    });
    let heads = Heads { query: 2, kv: 1, dim: 4 };
    check("self-attention", &[x.clone(), random(2, &[16, 12]), random(3, &[5, 8])], |x, path| {
        self_attention(&x[0], &x[1], &x[2], heads, None, path)
    });
    let targets: Vec<u32> = (0..34).map(|i| i * 7 % 31).collect();
    let targets = Tensor::new(targets, &Device::Cpu).unwrap();
    check("cross-entropy", &[x.reshape((34, 12)).unwrap(), random(2, &[31, 12])], |x, path| {
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), path)?.loss)
    });
}

#[test]
fn other_pairs_of_dtypes_are_refused() {
    for (dtype, weights) in [
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F16),
        (DType::F64, DType::F32),
        (DType::F16, DType::F64),
    ] {
        let x = random(1, &[3, 4]).to_dtype(dtype).unwrap();
        let w = random(2, &[5, 4]).to_dtype(weights).unwrap();
        let message = linear(&x, &w, Path::Fused).unwrap_err().to_string();
        assert!(message.contains(&format!("x is {dtype:?} and the weight {weights:?}")), "{message}");
    }
}

#[test]
fn what_is_no_floating_point_is_refused_by_name() {
    let heads = Heads { query: 1, kv: 1, dim: 2 };
    let ids = Tensor::zeros(2, DType::U32, &Device::Cpu).unwrap();
    let table = Rope::new(4, 8, 1e4, &Device::Cpu).unwrap();
    // candle's conversion of 0.99999 to 8 bits does not end.
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F8E4M3] {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap().to_dtype(dtype);
        let ones = |shape: &[usize]| ones(shape).unwrap();
        let (x, d) = (ones(&[2, 4]), ones(&[4]));
        for path in [Path::Fused, Path::Reference] {
            let results = [
                rms_norm(&x, &d, 1e-5, path),
                layer_norm(&x, &d, Some(&d), 1e-5, path),
                residual_rms_norm(&x, &x, &d, 1e-5, path).map(|(sum, _)| sum),
                residual_layer_norm(&x, &x, &d, None, 1e-5, path).map(|(sum, _)| sum),
                linear(&x, &x, path),
                causal_attention(&ones(&[1, 3, 6]), heads, None, path),
                self_attention(&ones(&[1, 3, 4]), &ones(&[6, 4]), &ones(&[4, 2]), heads, None, path),
                gated_feed_forward(&x, &x, &ones(&[4, 1]), Activation::Relu, path),
                linear_cross_entropy(&x, &x, &ids, CrossEntropy::default(), path).map(|out| out.loss),
                dropout(&x, 0.5, Philox::default(), path),
                dropout(&x, 0.0, Philox::default(), path),
                embedding(&x, &ids, path),
                embedding_in(&x, &ids, DType::F32, path),
                embedding_in(&random(1, &[2, 4]), &ids, dtype, path),
                rope(&x, &table, 0),
            ];
            for (i, result) in results.into_iter().enumerate() {
                let message = result.unwrap_err().to_string();
                let named = format!("must be f32, f64, bf16 or f16, got {dtype:?}");
                assert!(message.contains(&named), "{i} {path:?}: {message}");
            }
        }
    }
}

#[test]
fn ranks_that_do_not_fit_are_refused_by_name() {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let (scalar, vector, matrix) = (ones(&[]), ones(&[4]), ones(&[2, 4]));
    let heads = Heads { query: 1, kv: 1, dim: 2 };
    let ids = Tensor::zeros(2, DType::U32, &Device::Cpu).unwrap();
    let table = Rope::new(4, 8, 1e4, &Device::Cpu).unwrap();
    let plain = CrossEntropy::default();
    for path in [Path::Fused, Path::Reference] {
        for (name, result) in [
            ("rms_norm: a weight of shape [4] for x of shape []", rms_norm(&scalar, &vector, 1e-5, path)),
            ("layer_norm: a weight of shape [4] for", layer_norm(&scalar, &vector, None, 1e-5, path)),
            ("linear: x is a scalar", linear(&scalar, &matrix, path)),
            ("linear: w of shape [4], expected rank 2", linear(&matrix, &vector, path)),
            (
                "causal_attention: qkv of shape [2, 4], expected rank 3",
                causal_attention(&matrix, heads, None, path),
            ),
            ("self_attention: x of shape", self_attention(&matrix, &matrix, &matrix, heads, None, path)),
            (
                "gated_feed_forward: down of shape [4]",
                gated_feed_forward(&matrix, &matrix, &vector, Activation::Silu, path),
            ),
            (
                "linear_cross_entropy: hidden is a scalar",
                linear_cross_entropy(&scalar, &matrix, &ids, plain, path).map(|out| out.loss),
            ),
            (
                "linear_cross_entropy: weight of shape [4], expected rank 2",
                linear_cross_entropy(&matrix, &vector, &ids, plain, path).map(|out| out.loss),
            ),
            (
                "linear_cross_entropy: hidden [2, 4], weight [2, 4] and targets [1, 2]",
                linear_cross_entropy(&matrix, &matrix, &ids.unsqueeze(0).unwrap(), plain, path)
                    .map(|out| out.loss),
            ),
            ("embedding: the table of shape [4]", embedding(&vector, &ids, path)),
            ("rope: x of shape [4], expected rank 2", rope(&vector, &table, 0)),
        ] {
            let message = result.unwrap_err().to_string();
            assert!(message.starts_with(name), "{path:?}: {message} for {name}");
        }
    }
}
