//! The table of activations that every suite runs over, and small helpers.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use candle_core::{DType, Device, Result, Tensor, Var};
use era_act::{Activation, Era};

/// One row a variant, and more where parameters change the path. A new variant adds its rows here.
pub fn all() -> Vec<Activation> {
    let gate_entropy = |temperature, strength| Activation::Era(Era::GateEntropy { temperature, strength });
    vec![
        Activation::Era(Era::default()),
        gate_entropy(2.5, 0.4),
        gate_entropy(0.125, -0.3),
        gate_entropy(1e-6, 0.1),
        gate_entropy(1e6, 0.1),
        gate_entropy(1.0, 0.0),
        Activation::Era(Era::gelu_softplus()),
        Activation::Era(Era::GeluSoftplus { gamma: -0.7 }),
        Activation::Era(Era::GeluSoftplus { gamma: 0.0 }),
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::Relu,
        Activation::ReluSquared,
    ]
}

/// Points from -1e4 to 1e4, dense about 0, the ends and 0 among them.
pub fn points() -> Vec<f64> {
    let mut points = vec![0.0, 1e-30, 1e4, 88.0, 89.0, 103.0, 104.5, 745.0];
    points.extend((1..400).map(|i| f64::from(i) * 0.037));
    points.extend((1..120).map(|i| 1e-6 * 1.21f64.powi(i)).filter(|&x| x < 1e4));
    points.iter().flat_map(|&x| [x, -x]).map(|x| f64::from(x as f32)).collect()
}

pub fn tensor(values: &[f64], dtype: DType) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The value and, with the weights `dy`, the gradient.
pub fn with_gradient(x: &Tensor, dy: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> (Tensor, Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let y = f(&x).unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), grads.get(&x).expect("the input has a gradient").clone())
}

/// Numbers in [-scale, scale] that look random and are always the same.
pub fn noise(n: usize, scale: f64, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f64::from(((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0) as f32) * scale
        })
        .collect()
}

#[track_caller]
pub fn assert_close(got: &[f64], want: &[f64], relative: f64, absolute: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        assert!(
            error <= relative * w.abs() + absolute,
            "{what}: element {i}: got {g:e}, expected {w:e}, error {error:e}"
        );
    }
}
