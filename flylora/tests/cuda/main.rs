//! Layers with adapters on a CUDA device against the same in f64 on the CPU. Each test passes over itself, by name, where
//! there is no CUDA device.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod drawn;
mod fly;
mod lora;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use flylora::{Adapter, AnyLinear};

use crate::common::noise;

/// The device, for one test at a time, or None, with a line that names the test.
pub(crate) fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, Device)> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = DEVICE.get_or_init(|| Device::new_cuda(0).ok()) else {
        eprintln!("{test}: passed over, there is no CUDA device");
        return None;
    };
    Some((guard, device.clone()))
}

/// Whether `VESPER_CUDA_TESTS` is `brief`: for compute-sanitizer, under which every access of a kernel takes some hundred
/// times as long. Then the largest inputs are left out or cut.
pub(crate) fn brief() -> bool {
    std::env::var_os("VESPER_CUDA_TESTS").is_some_and(|value| value == "brief")
}

/// `n`, or as many rows as a sanitizer can follow: more than one block of the kernels has.
pub(crate) fn rows(n: usize) -> usize {
    if brief() { n.min(130) } else { n }
}

/// Whether a case of so many products of the frozen layer runs.
pub(crate) fn runs(products: usize) -> bool {
    !brief() || products <= 80_000_000
}

pub(crate) fn host(t: &Tensor) -> Tensor {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

/// `|a - b| / |b|` in the Euclidean norm (absolute where b is 0); infinite where a is not finite.
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let (difference, size) = (norm(&(a - b).unwrap()), norm(b));
    match (difference.is_nan(), size == 0.0) {
        (true, _) => f64::INFINITY,
        (_, true) => difference,
        _ => difference / size,
    }
}

/// The output and, for fixed weights of it, the gradients of x and of the layer's parameters, in f64 on the CPU.
pub(crate) fn all(
    layer: &AnyLinear,
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Vec<(String, Tensor)> {
    let x = Var::from_tensor(&x.to_device(&layer.base().device()).unwrap()).unwrap();
    let y = f(&x).unwrap();
    assert_eq!(y.dtype(), x.dtype());
    // Weights that every dtype holds exactly.
    let weights = ((noise(y.dims(), 1.0, DType::F64, 77) * 64.0).unwrap().round().unwrap() / 64.0).unwrap();
    let weights = weights.to_dtype(y.dtype()).unwrap().to_device(y.device()).unwrap();
    let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let mut all = vec![("y".to_owned(), host(&y)), ("dx".to_owned(), host(grads.get(&x).unwrap()))];
    for (name, var) in layer.adapter().parameters() {
        let gradient = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_eq!((gradient.dtype(), gradient.dims()), (var.dtype(), var.dims()));
        all.push((format!("d {name}"), host(gradient)));
    }
    all
}

/// What relative error is allowed in a dtype of x.
pub(crate) fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 3e-6,
        DType::BF16 => 4e-3,
        _ => 5e-4,
    }
}

/// Prints each error and fails with those that are too large.
pub(crate) fn compare(what: &str, got: &[(String, Tensor)], want: &[(String, Tensor)], allowed: f64) {
    let wrong = off(what, got, want, allowed);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Prints each error; those that are too large.
pub(crate) fn off(
    what: &str,
    got: &[(String, Tensor)],
    want: &[(String, Tensor)],
    allowed: f64,
) -> Vec<String> {
    let mut wrong = Vec::new();
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(want) {
        let off = error(got, want);
        println!("{what}: {name} off by {off:.1e}");
        if off > allowed {
            wrong.push(format!("{what}: {name} off by {off:.1e}, allowed {allowed:.1e}"));
        }
    }
    wrong
}
