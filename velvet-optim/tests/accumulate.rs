//! Gradient accumulation.

#![allow(clippy::unwrap_used, reason = "a test stops there")]

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::VarMap;
use half::bf16;
use std::sync::{Arc, Weak};
use velvet_optim::{Accumulator, Error};

fn noise(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let n: usize = shape.iter().product();
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn store(grads: &[(&Var, &Tensor)]) -> GradStore {
    let mut store = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap().backward().unwrap();
    for (var, grad) in grads {
        store.insert(var, (*grad).clone());
    }
    store
}

fn values(store: &GradStore, var: &Var) -> Vec<f64> {
    let grad = store.get(var).unwrap();
    grad.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f64, |a, b| a.max(b.abs()));
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= tolerance * largest, "{got}, expected {expected}");
    }
}

/// The mean squared error of a small net over the rows of x.
fn loss(w: &Var, b: &Var, x: &Tensor) -> Tensor {
    let y = x.matmul(w).unwrap().broadcast_add(b).unwrap().tanh().unwrap();
    (y.sqr().unwrap().sum_all().unwrap() / x.dims()[0] as f64).unwrap()
}

#[test]
fn the_mean_is_the_gradient_of_the_whole_batch() {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14)] {
        let w = Var::from_tensor(&noise(1, &[5, 7], dtype)).unwrap();
        let b = Var::from_tensor(&noise(2, &[7], dtype)).unwrap();
        let x = noise(3, &[12, 5], dtype);
        let whole = loss(&w, &b, &x).backward().unwrap();
        let mut accumulator = Accumulator::new(vec![w.clone(), b.clone()]).unwrap();
        for i in 0..4 {
            accumulator.add(&loss(&w, &b, &x.narrow(0, 3 * i, 3).unwrap()).backward().unwrap()).unwrap();
        }
        let mean = accumulator.mean().unwrap();
        for var in [&w, &b] {
            assert_eq!(mean.get(var).unwrap().dtype(), dtype);
            assert_close(&values(&mean, var), &values(&whole, var), tolerance);
        }
        // Micro-batches of 7, 4 and 1 rows, weighted by them.
        accumulator.reset();
        for (start, rows) in [(0, 7), (7, 4), (11, 1)] {
            let part = loss(&w, &b, &x.narrow(0, start, rows).unwrap());
            accumulator.add_weighted(&part.backward().unwrap(), rows as f64).unwrap();
        }
        assert_eq!((accumulator.micro_batches(), accumulator.weight()), (3, 12.0));
        let mean = accumulator.take().unwrap();
        for var in [&w, &b] {
            assert_close(&values(&mean, var), &values(&whole, var), tolerance);
        }
        assert_eq!((accumulator.micro_batches(), accumulator.weight()), (0, 0.0));
        assert!(accumulator.mean().unwrap().get(&w).is_none());
    }
}

#[test]
fn sums_of_bf16_gradients_are_f32() {
    let w = Var::from_tensor(&Tensor::zeros(3, DType::BF16, &Device::Cpu).unwrap()).unwrap();
    let grad = Tensor::new(&[1f32, 0.125, -3.0], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    let mut accumulator = Accumulator::new(vec![w.clone()]).unwrap();
    for _ in 0..1024 {
        accumulator.add(&store(&[(&w, &grad)])).unwrap();
    }
    let mean = accumulator.mean().unwrap();
    assert_eq!(mean.get(&w).unwrap().to_vec1::<f32>().unwrap(), [1.0, 0.125, -3.0]);
    // What bf16 makes of the same sum.
    let in_bf16 = (0..1024).fold(bf16::ZERO, |sum, _| sum + bf16::ONE);
    assert_eq!(in_bf16.to_f32(), 256.0);
}

#[test]
fn a_gradient_missing_from_one_micro_batch_counts_as_zero_and_from_all_stays_missing() {
    let vars = VarMap::new();
    for name in ["always", "never", "once"] {
        let var = Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
        vars.data().lock().unwrap().insert(name.to_owned(), var);
    }
    let var = |name: &str| vars.data().lock().unwrap()[name].clone();
    let (always, never, once) = (var("always"), var("never"), var("once"));
    let grad = Tensor::new(&[2f32, -4.0], &Device::Cpu).unwrap();
    let mut accumulator = Accumulator::from_varmap(&vars).unwrap();
    accumulator.add(&store(&[(&always, &grad)])).unwrap();
    accumulator.add(&store(&[(&always, &grad), (&once, &grad)])).unwrap();
    assert_eq!(accumulator.missing().collect::<Vec<_>>(), ["never"]);
    let mean = accumulator.take().unwrap();
    assert_eq!(values(&mean, &always), [2.0, -4.0]);
    assert_eq!(values(&mean, &once), [1.0, -2.0]);
    assert!(mean.get(&never).is_none());
    assert_eq!(mean.get_ids().count(), 2);
    assert_eq!(accumulator.missing().count(), 3);
}

#[test]
fn a_micro_batch_of_weight_zero_adds_nothing_even_if_it_is_nan() {
    let w = Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let nan = Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).unwrap();
    let grad = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let mut accumulator = Accumulator::new(vec![w.clone()]).unwrap();
    accumulator.add_weighted(&store(&[(&w, &nan)]), 0.0).unwrap();
    assert!(accumulator.mean().unwrap().get(&w).is_none());
    accumulator.add_weighted(&store(&[(&w, &grad)]), 3.0).unwrap();
    assert_eq!(values(&accumulator.mean().unwrap(), &w), [1.0, 2.0]);
    // With a weight it shows.
    accumulator.add(&store(&[(&w, &nan)])).unwrap();
    assert!(values(&accumulator.mean().unwrap(), &w)[0].is_nan());
}

#[test]
fn gradients_that_do_not_fit_are_refused_by_name_and_add_nothing() {
    let a = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let b = Var::zeros(4, DType::F32, &Device::Cpu).unwrap();
    let names = [("a".to_owned(), a.clone()), ("b".to_owned(), b.clone())];
    let mut accumulator = Accumulator::named(names.clone()).unwrap();
    let good = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
    accumulator.add(&store(&[(&a, &good)])).unwrap();
    let shape = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let dtype = Tensor::zeros(4, DType::U32, &Device::Cpu).unwrap();
    for (bad, expected) in [(shape, "shape"), (dtype, "dtype")] {
        match accumulator.add(&store(&[(&a, &good), (&b, &bad)])) {
            Err(Error::Gradient { name, what, .. }) => assert_eq!((name.as_str(), what), ("b", expected)),
            other => panic!("{other:?}"),
        }
    }
    for weight in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(accumulator.add_weighted(&store(&[]), weight), Err(Error::Config { .. })));
    }
    assert_eq!((accumulator.micro_batches(), accumulator.weight()), (1, 1.0));
    assert_eq!(values(&accumulator.mean().unwrap(), &a), [1.0; 6]);
    // By position where there are no names.
    let mut unnamed = Accumulator::new(vec![a.clone(), b.clone()]).unwrap();
    let message = unnamed.add(&store(&[(&b, &good)])).unwrap_err().to_string();
    assert!(message.contains("`param.00001`"), "{message}");
}

#[test]
fn a_variable_given_twice_is_refused() {
    let a = Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let twice = Accumulator::new(vec![a.clone(), a.clone()]);
    assert!(matches!(twice, Err(Error::DuplicateVariable { .. })), "{twice:?}");
    let other = Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let names = Accumulator::named([("x".to_owned(), a), ("x".to_owned(), other)]);
    assert!(matches!(names, Err(Error::DuplicateName { .. })), "{names:?}");
}

/// Passes its input on, and lives as long as the graph that it is part of.
struct Tracer(#[allow(dead_code, reason = "only its life counts")] Arc<()>);

impl CustomOp1 for Tracer {
    fn name(&self) -> &'static str {
        "tracer"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (start, end) = layout.contiguous_offsets().unwrap();
        let values = storage.as_slice::<f32>()?[start..end].to_vec();
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    /// Out of the result, as that of tanh is: so the gradient is attached to the graph.
    fn bwd(&self, _: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some((grad * res)?))
    }
}

fn traced_gradients(w: &Var) -> (GradStore, Weak<()>) {
    let life = Arc::new(());
    let watch = Arc::downgrade(&life);
    let loss = w.apply_op1(Tracer(life)).unwrap().sum_all().unwrap();
    (loss.backward().unwrap(), watch)
}

#[test]
fn the_graph_of_a_micro_batch_is_freed_with_its_gradients() {
    let w = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
    // A GradStore that is kept, which is what the accumulator is for, pins the graph.
    let (kept, watch) = traced_gradients(&w);
    assert!(watch.upgrade().is_some(), "the tracer does not see the graph");
    drop(kept);
    assert!(watch.upgrade().is_none());

    let mut accumulator = Accumulator::new(vec![w.clone()]).unwrap();
    for _ in 0..3 {
        let (grads, watch) = traced_gradients(&w);
        accumulator.add(&grads).unwrap();
        drop(grads);
        assert!(watch.upgrade().is_none(), "the accumulator pins the graph");
    }
    assert_eq!(values(&accumulator.mean().unwrap(), &w), [1.0, 2.0, 3.0]);
}
