//! Seeded inputs, gradients of a weighted sum, error measures and finite differences.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vesper_model::ops::backward;

/// Values in -1 .. 1 that depend on the seed alone.
pub(crate) fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: usize = shape.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// f(inputs) and the gradients of `sum(f(inputs) * fixed weights)` for each input.
pub(crate) fn value_and_gradients(
    inputs: &[Tensor],
    dtype: DType,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> =
        inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let weights = random(77, y.dims()).to_dtype(y.dtype()).unwrap();
    let loss = (&y * weights).unwrap().sum_all().unwrap();
    let (grads, others) = (backward(&loss).unwrap(), loss.backward().unwrap());
    let gradients = vars
        .iter()
        .map(|v| {
            let gradient = grads.get(v).unwrap_or_else(|| panic!("no gradient for {:?}", v.shape()));
            assert_eq!(gradient.dtype(), dtype);
            assert_eq!(gradient.dims(), v.dims());
            assert!(error(gradient, others.get(v).unwrap()) < 1e-6, "candle's pass gives another gradient");
            gradient.to_dtype(DType::F64).unwrap()
        })
        .collect();
    (y.to_dtype(DType::F64).unwrap(), gradients)
}

/// `|a - b| / |b|` in the Euclidean norm (absolute where b is 0).
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let norm = |t: &Tensor| {
        let squares = t.to_dtype(DType::F64).unwrap().sqr().unwrap();
        squares.sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
    };
    let (difference, size) = (norm(&(a - b).unwrap()), norm(b));
    assert!(difference.is_finite(), "not finite");
    if size == 0.0 { difference } else { difference / size }
}

/// Compares the fused path of `f` with its reference in f64, in every dtype; `f(inputs, fused)`.
pub(crate) fn parity(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor], bool) -> Result<Tensor>) {
    let (exact, exact_gradients) = value_and_gradients(inputs, DType::F64, |x| f(x, false));
    for (dtype, limit) in [(DType::F64, 1e-10), (DType::F32, 1e-5), (DType::BF16, 3e-2), (DType::F16, 5e-3)] {
        let (y, gradients) = value_and_gradients(inputs, dtype, |x| f(x, true));
        let off = error(&y, &exact);
        assert!(off < limit, "{name} {dtype:?}: forward off by {off:e}");
        for (i, (a, b)) in gradients.iter().zip(&exact_gradients).enumerate() {
            let off = error(a, b);
            assert!(off < limit, "{name} {dtype:?}: gradient of input {i} off by {off:e}");
        }
    }
}

/// Compares the fused gradients with central differences in f64, at up to 40 places an input.
pub(crate) fn finite_differences(name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let (_, gradients) = value_and_gradients(inputs, DType::F64, &f);
    let step = 1e-5;
    for (i, gradient) in gradients.iter().enumerate() {
        let values = inputs[i].flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for place in (0..values.len()).step_by(values.len().div_ceil(40).max(1)) {
            let moved = |by: f64| -> f64 {
                let mut values = values.clone();
                values[place] += by;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(values, inputs[i].shape(), &Device::Cpu).unwrap();
                let y = f(&inputs).unwrap();
                (&y * random(77, y.dims())).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!(
                (slope - gradient[place]).abs() <= 1e-7 * (1.0 + slope.abs()),
                "{name}: input {i} place {place}: gradient {} but slope {slope}",
                gradient[place]
            );
        }
    }
}

/// The path of a flag.
pub(crate) fn path(fused: bool) -> vesper_model::ops::Path {
    if fused { vesper_model::ops::Path::Fused } else { vesper_model::ops::Path::Reference }
}

/// The same result, bit for bit, on one thread and on three.
pub(crate) fn same_bits_on_any_number_of_threads(f: impl Fn() -> Vec<Tensor> + Send + Sync) {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    for (a, b) in run(1).iter().zip(run(3)) {
        let bits = |t: &Tensor| -> Vec<u64> {
            let t = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
            t.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
        };
        assert_eq!(bits(a), bits(&b));
    }
}
