//! What the tests share: numbers that look random and are not, and gradients put in by hand.
#![allow(dead_code, unreachable_pub, reason = "each test file is a crate of its own and uses its part")]
#![allow(clippy::unwrap_used, reason = "a test stops there")]

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, Var};
use velvet_optim::{Velvet, VelvetConfig};

/// Values in [-1, 1) that depend on the seed and the position alone.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let len = shape.iter().product();
    Tensor::from_vec(noise(seed, len), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub fn var(seed: u64, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&tensor(seed, shape, dtype)).unwrap()
}

/// A store with nothing in it: candle makes one only by a backward pass.
pub fn empty_store() -> GradStore {
    Tensor::zeros((), DType::F32, &Device::Cpu).unwrap().backward().unwrap()
}

pub fn store<'a>(grads: impl IntoIterator<Item = (&'a Var, Tensor)>) -> GradStore {
    let mut store = empty_store();
    for (var, grad) in grads {
        store.insert(var, grad);
    }
    store
}

/// The bits of a tensor's elements in row-major order.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    let tensor = tensor.contiguous().unwrap();
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().unwrap();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        Storage::Cpu(CpuStorage::F64(x)) => x[start..end].iter().map(|x| x.to_bits()).collect(),
        Storage::Cpu(CpuStorage::BF16(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        Storage::Cpu(CpuStorage::F16(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        other => panic!("{other:?}"),
    }
}

/// The bits of everything an optimizer holds: parameters, then state, by name.
pub fn all_bits(opt: &Velvet) -> Vec<(String, Vec<u64>)> {
    let mut all: Vec<_> = opt.parameters().map(|(name, var)| (name.to_owned(), bits(var))).collect();
    all.extend(opt.state().unwrap().iter().map(|(name, t)| (name.clone(), bits(t))));
    all.sort();
    all
}

/// Variables named `w0`, `w1`, ... of the given shapes.
pub fn named(shapes: &[&[usize]], dtype: DType) -> Vec<(String, Var)> {
    shapes.iter().enumerate().map(|(i, shape)| (format!("w{i}"), var(i as u64 + 1, shape, dtype))).collect()
}

/// Takes `steps` steps on gradients that depend on the step's number alone; the loss falls from 9 nats.
pub fn train(opt: &mut Velvet, vars: &[(String, Var)], first: u64, steps: u64) {
    for step in first..first + steps {
        opt.observe_value(9.0 / (1.0 + 0.02 * step as f64));
        let grads = vars.iter().enumerate().map(|(i, (_, var))| {
            (var, tensor(step * 1000 + i as u64, var.dims(), DType::F32).to_dtype(var.dtype()).unwrap())
        });
        opt.try_step(&store(grads)).unwrap();
    }
}

/// The warnings an optimizer gives.
pub fn record_warnings(opt: &mut Velvet) -> std::sync::Arc<std::sync::Mutex<Vec<String>>> {
    let warnings = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = warnings.clone();
    opt.on_warning(move |message| sink.lock().unwrap().push(message.to_owned()));
    warnings
}

pub fn scalar(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.to_scalar()
}

pub fn config() -> VelvetConfig {
    VelvetConfig::default()
}
