//! The CUDA kernels against the composition of candle ops in f64 on the CPU. Each test passes over itself, by name, where
//! there is no CUDA device.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod elementwise;
mod gated;
mod learned;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{noise, points, tensor, values};

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

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
fn brief() -> bool {
    std::env::var_os("VESPER_CUDA_TESTS").is_some_and(|value| value == "brief")
}

/// `n`, or as many elements as a sanitizer can follow.
pub(crate) fn most(n: usize) -> usize {
    if brief() { n.min(9001) } else { n }
}

pub(crate) fn host(x: &Tensor) -> Vec<f64> {
    values(&x.to_device(&Device::Cpu).unwrap())
}

/// `n` inputs over [-1e4, 1e4], most of them about 0, as the dtype holds them; and gradients in [-1, 1].
pub(crate) fn inputs(n: usize, dtype: DType) -> (Tensor, Tensor) {
    let mut x: Vec<f64> = points().into_iter().cycle().take(n).collect();
    for (x, other) in x.iter_mut().zip(noise(n, 6.0, n as u64)).skip(points().len()) {
        *x = other;
    }
    (tensor(&x, dtype), tensor(&noise(n, 1.0, 1), dtype))
}

/// The value and the gradient for the weights `dy`, of x on the device of `dy`.
pub(crate) fn with_gradient(
    x: &Tensor,
    dy: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> (Vec<f64>, Vec<f64>) {
    let x = Var::from_tensor(&x.to_device(dy.device()).unwrap()).unwrap();
    let y = f(&x).unwrap();
    assert_eq!((y.dtype(), y.dims()), (x.dtype(), dy.dims()));
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    (host(&y), host(grads.get(&x).expect("the input has a gradient")))
}

/// How far values are off, each in units of what it may be off by: in f32 2e-6 of itself and 1e-6 times `scale`, in half
/// types 0.55 of the distance to the next number besides.
pub(crate) fn off(got: &[f64], want: &[f64], dtype: DType, scale: f64) -> f64 {
    assert_eq!(got.len(), want.len());
    let (relative, largest) = match dtype {
        DType::F32 => (2e-6, f64::from(f32::MAX)),
        DType::BF16 => (2e-6 + 0.55 / 128.0, 3.38e38),
        _ => (2e-6 + 0.55 / 1024.0, 65_504.0),
    };
    let mut worst = 0f64;
    for (g, w) in got.iter().zip(want) {
        if w.abs() > largest {
            continue; // overflows when it is rounded
        }
        let error = (g - w).abs() / (relative * w.abs() + 1e-6 * scale);
        worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
    }
    worst
}

/// Fails with all that was off by more than 1, and prints everything.
pub(crate) struct Report(Vec<String>);

impl Report {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn add(&mut self, what: &str, off: f64) {
        println!("{what}: {off:.3} of what is allowed");
        if off > 1.0 {
            self.0.push(format!("{what}: {off:.3} of what is allowed"));
        }
    }

    pub(crate) fn end(self) {
        assert!(self.0.is_empty(), "{}", self.0.join("\n"));
    }
}
