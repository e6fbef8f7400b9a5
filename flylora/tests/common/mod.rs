#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Linear;
use flylora::{Adapter, AdapterKind, FrozenLinear, LoraAdapter, LoraConfig, LoraLinear, Place};

/// Numbers in [-scale, scale] that look random and are always the same.
pub fn noise(shape: &[usize], scale: f64, dtype: DType, seed: u64) -> Tensor {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0) * scale
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn base(inputs: usize, outputs: usize, dtype: DType, bias: bool) -> Linear {
    let bias = bias.then(|| noise(&[outputs], 0.5, dtype, 2));
    Linear::new(noise(&[outputs, inputs], 0.3, dtype, 1), bias)
}

/// Gives `B` values, so that an adapter that does nothing is noticed.
pub fn wake(adapter: &LoraAdapter, seed: u64) {
    let b = adapter.b();
    b.set(&noise(b.dims(), 0.4, b.dtype(), seed)).unwrap();
}

/// A layer whose adapter has an effect.
pub fn awake(inputs: usize, outputs: usize, dtype: DType, bias: bool) -> LoraLinear {
    let config = LoraConfig::default().with_r(4).with_alpha(6.0);
    let layer = LoraLinear::seeded(base(inputs, outputs, dtype, bias), &config, "layer").unwrap();
    wake(layer.adapter(), 3);
    layer
}

pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    // NaN is the largest of all.
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).max_by(f64::total_cmp).unwrap_or(0.0)
}

/// Moves every variable, so that an adapter that does nothing is noticed.
pub fn move_all(vars: impl IntoIterator<Item = Var>, scale: f64, seed: u64) {
    for (i, var) in vars.into_iter().enumerate() {
        let moved = var.as_detached_tensor() + noise(var.dims(), scale, var.dtype(), seed + i as u64);
        var.set(&moved.unwrap()).unwrap();
    }
}

/// That a gradient is the slope of the loss in each value of a variable, by central differences; `allowed` is relative, and
/// absolute for small ones.
#[track_caller]
pub fn assert_slopes(what: &str, got: Option<&Tensor>, var: &Var, loss: impl Fn() -> Tensor, allowed: f64) {
    let step = 1e-5;
    let got = values(got.unwrap_or_else(|| panic!("{what} has no gradient")));
    let original = values(var);
    let set =
        |values: Vec<f64>| var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
    for (i, got) in got.iter().enumerate() {
        let at = |step: f64| {
            let mut moved = original.clone();
            moved[i] += step;
            set(moved);
            values(&loss())[0]
        };
        let want = (at(step) - at(-step)) / (2.0 * step);
        assert!((got - want).abs() < allowed * (1.0 + want.abs()), "{what}[{i}]: {got} and {want}");
    }
    set(original);
}

/// A frozen layer from 20 to 12.
pub fn frozen() -> FrozenLinear {
    FrozenLinear::new(noise(&[12, 20], 0.3, DType::F32, 1), Some(noise(&[12], 0.5, DType::F32, 2))).unwrap()
}

/// An adapter of it that has an effect.
pub fn adapter(kind: &AdapterKind, name: &str, seed: u64) -> Arc<dyn Adapter> {
    let adapter = kind.build(&frozen(), &Place::alone(name, DType::F32, &Device::Cpu)).unwrap();
    move_all(adapter.parameters().into_iter().map(|(_, var)| var), 0.4, seed);
    adapter
}

pub fn lora(r: usize) -> AdapterKind {
    AdapterKind::Lora(LoraConfig::default().with_r(r).with_alpha(6.0))
}
