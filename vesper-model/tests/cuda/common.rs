//! The device, seeded inputs, gradients of a weighted sum, and the comparison of paths.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vesper_model::ops::{Path, backward, cuda_device};

pub(crate) const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// The device, for one test at a time, or None, with a line that names the test.
pub(crate) fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, Device)> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = DEVICE.get_or_init(|| cuda_device(0).ok()) else {
        eprintln!("{test}: passed over, there is no CUDA device");
        return None;
    };
    Some((guard, device.clone()))
}

/// A device of its own: a recording takes in whatever any thread sends to its stream.
pub(crate) fn own_device(test: &str) -> Option<(MutexGuard<'static, ()>, Device)> {
    gpu(test).map(|(lock, _)| (lock, cuda_device(0).unwrap()))
}

/// Whether `VESPER_CUDA_TESTS` is `brief`: for compute-sanitizer, under which every access of a kernel takes some hundred
/// times as long. Then the largest inputs are left out or cut, candle's composition does not run,
/// and errors are not judged, for want of its own to compare with.
pub(crate) fn brief() -> bool {
    std::env::var_os("VESPER_CUDA_TESTS").is_some_and(|value| value == "brief")
}

/// `n`, or as many rows as a sanitizer can follow.
pub(crate) fn rows(n: usize) -> usize {
    if brief() { n.min(70) } else { n }
}

/// Whether a case of so many elements runs.
pub(crate) fn runs(elements: usize) -> bool {
    !brief() || elements <= 140_000
}

/// Values in -1 .. 1 that depend on the seed alone, f64 on the CPU.
pub(crate) fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: usize = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Ids below `vocab` that depend on their place.
pub(crate) fn ids(n: usize, vocab: u32) -> Tensor {
    let ids: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    Tensor::from_vec(ids, n, &Device::Cpu).unwrap()
}

pub(crate) fn to_f64(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

/// f(inputs) and the gradients of `sum(f(inputs) * fixed weights)`, both in f64 on the CPU.
pub(crate) fn value_and_gradients(
    inputs: &[Tensor],
    dtype: DType,
    device: &Device,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<(Tensor, Vec<Tensor>)> {
    let vars = inputs
        .iter()
        .map(|x| Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?))
        .collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors)?;
    // Weights that every dtype holds exactly.
    let weights = ((random(77, y.dims()) * 64.0)?.round()? / 64.0)?.to_dtype(y.dtype())?.to_device(device)?;
    let loss = (&y * weights)?.sum_all()?;
    let grads = backward(&loss)?;
    // candle's own pass gives the same values.
    let others = if brief() { None } else { Some(loss.backward()?) };
    let gradients = vars
        .iter()
        .map(|v| {
            let gradient = grads.get(v).unwrap_or_else(|| panic!("no gradient for {:?}", v.shape()));
            if let Some(other) = others.as_ref().and_then(|grads| grads.get(v)) {
                assert_eq!(values(&to_f64(gradient)), values(&to_f64(other)));
            }
            assert_eq!((gradient.dtype(), gradient.dims()), (dtype, v.dims()));
            to_f64(gradient)
        })
        .collect();
    Ok((to_f64(&y), gradients))
}

/// The values to compare exactly: 0 for -0 and for NaN a bit pattern.
fn values(x: &Tensor) -> Vec<u64> {
    let x = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    x.into_iter().map(|x| if x.is_nan() { u64::MAX } else { (x + 0.0).to_bits() }).collect()
}

/// `|a - b| / |b|` in the Euclidean norm (absolute where b is 0); infinite where a is not finite.
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let (difference, size) = (norm(&(a - b).unwrap()), norm(b));
    if difference.is_nan() {
        f64::INFINITY
    } else if size == 0.0 {
        difference
    } else {
        difference / size
    }
}

/// Compares `f(inputs, path)` on the device with the reference in f64 on the CPU, on inputs rounded to the dtype: in
/// f32 within 1e-5, or the composition's error; in bf16 and f16 with no more than twice the error of the composition in that dtype, or half of its
/// rounding error.
pub(crate) fn parity(
    name: &str,
    device: &Device,
    inputs: &[Tensor],
    f: impl Fn(&[Tensor], Path) -> Result<Tensor>,
) {
    let wrong = off(name, device, inputs, 1.0, f);
    assert!(brief() || wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What [`parity`] finds, with limits so many times wider: of a few numbers, whose errors do not even out.
pub(crate) fn off(
    name: &str,
    device: &Device,
    inputs: &[Tensor],
    slack: f64,
    f: impl Fn(&[Tensor], Path) -> Result<Tensor>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let inputs: Vec<Tensor> = inputs.iter().map(|x| to_f64(&x.to_dtype(dtype).unwrap())).collect();
        let run = |dtype, device: &Device, path| {
            let (y, gradients) = value_and_gradients(&inputs, dtype, device, |x| f(x, path)).unwrap();
            std::iter::once(y).chain(gradients).collect::<Vec<_>>()
        };
        let exact = run(DType::F64, &Device::Cpu, Path::Reference);
        let fused = run(dtype, device, Path::Fused);
        let composed = if brief() { exact.clone() } else { run(dtype, device, Path::Reference) };
        for (i, ((fused, composed), exact)) in fused.iter().zip(&composed).zip(&exact).enumerate() {
            let (off, composed) = (error(fused, exact), error(composed, exact));
            let limit = match dtype {
                DType::F32 => composed.max(1e-5),
                DType::BF16 => (2.0 * composed).max(2e-3),
                _ => (2.0 * composed).max(2.5e-4),
            };
            let what = if i == 0 { "value".into() } else { format!("gradient {i}") };
            println!("{name} {dtype:?} {what}: off by {off:.2e}, composition {composed:.2e}");
            if off >= slack * limit {
                wrong.push(format!("{name} {dtype:?} {what}: off by {off:e}, composition {composed:e}"));
            }
        }
    }
    wrong
}

/// Runs `f` twice and compares the bits of its value and its gradients.
pub(crate) fn same_bits(
    name: &str,
    device: &Device,
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let bits = |dtype| {
        let (y, gradients) = value_and_gradients(inputs, dtype, device, &f).unwrap();
        let all = std::iter::once(y).chain(gradients);
        all.flat_map(|t| t.flatten_all().unwrap().to_vec1::<f64>().unwrap()).map(f64::to_bits).collect()
    };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (a, b): (Vec<u64>, Vec<u64>) = (bits(dtype), bits(dtype));
        assert!(a == b, "{name} {dtype:?}: other bits the second time");
    }
}
