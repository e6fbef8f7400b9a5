//! Parameters that are trained: their gradients, forward and gated, and what training does to them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, noise, points, tensor, values};
use era_act::{Era, LearnedEra};

fn forms() -> Vec<Era> {
    vec![
        Era::default(),
        Era::GateEntropy { temperature: 2.5, strength: -0.4 },
        Era::GateEntropy { temperature: 0.125, strength: 0.0 },
        Era::gelu_softplus(),
        Era::GeluSoftplus { gamma: -0.7 },
    ]
}

/// The output, the gradient of x and those of the parameters.
fn run(
    learned: &LearnedEra,
    x: &Tensor,
    dy: &Tensor,
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let x = Var::from_tensor(x).unwrap();
    let y = f(&x).unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let parameters = learned.parameters();
    let of = |t: &Tensor| values(grads.get(t).expect("every parameter has a gradient"))[0];
    (values(&y), values(grads.get(&x).unwrap()), parameters.iter().map(|(_, t)| of(t)).collect())
}

#[test]
fn values_are_those_of_the_fixed_form_to_the_bit() {
    for era in forms() {
        let learned = LearnedEra::alone(era, &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = tensor(&points(), dtype);
            // The temperature comes back from its logarithm.
            let now = learned.era().unwrap();
            assert_eq!(values(&learned.forward(&x).unwrap()), values(&now.forward(&x).unwrap()), "{era:?}");
            let packed = x.narrow(0, 0, 16).unwrap().reshape((2, 8)).unwrap();
            assert_eq!(values(&learned.gated(&packed).unwrap()), values(&now.gated(&packed).unwrap()));
            assert_eq!(learned.forward(&x).unwrap().dtype(), dtype);
        }
    }
}

#[test]
fn both_ends_of_the_range_of_the_temperature_are_in_it() {
    // The logarithm of either is rounded to a number whose exponential is a little outside.
    for temperature in [1e-6, 1e6] {
        let era = Era::GateEntropy { temperature, strength: 0.1 };
        let learned = LearnedEra::alone(era, &Device::Cpu).unwrap();
        let Era::GateEntropy { temperature: now, .. } = learned.era().unwrap() else { panic!() };
        assert_eq!(now, temperature);
        let x = tensor(&points(), DType::F32);
        assert!(values(&learned.forward(&x).unwrap()).iter().all(|y| y.is_finite()));
    }
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let learned = LearnedEra::new(Era::default(), vb).unwrap();
    let far = Tensor::new((1.0001e6f64).ln() as f32, &Device::Cpu).unwrap();
    map.data().lock().unwrap()["log_temperature"].set(&far).unwrap();
    assert!(
        learned.era().unwrap_err().to_string().contains("temperature must be from 1e-6 to 1e6, got 1000")
    );
}

#[test]
fn gradients_equal_those_of_the_composition_over_the_whole_range() {
    for era in forms() {
        let learned = LearnedEra::alone(era, &Device::Cpu).unwrap();
        for (dtype, bound) in [(DType::F64, 1e-6), (DType::F32, 2e-5)] {
            // Each point by itself, so that large terms do not hide small ones.
            for part in points().chunks(7) {
                let x = tensor(part, dtype);
                let dy = tensor(&noise(part.len(), 1.0, 1), dtype);
                let (y, dx, dp) = run(&learned, &x, &dy, |x| learned.forward(x));
                let (want_y, want_dx, want_dp) = run(&learned, &x, &dy, |x| learned.composed(x));
                let what = format!("{era:?} in {dtype:?}");
                assert_close(&y, &want_y, bound, 1e-6, &what);
                assert_close(&dx, &want_dx, bound, 4e-6, &what);
                let size = part.iter().fold(1f64, |m, v| m.max(v.abs()));
                assert_close(&dp, &want_dp, bound, 1e-6 * size, &what);
                assert!(dp.iter().all(|g| g.is_finite()));
            }
        }
    }
}

#[test]
fn gradients_of_the_parameters_equal_central_differences() {
    let x = tensor(&noise(300, 6.0, 2), DType::F64);
    let dy = tensor(&noise(300, 1.0, 3), DType::F64);
    let sum = |era: Era| values(&(era.forward(&x).unwrap() * &dy).unwrap().sum_all().unwrap())[0];
    let step = 1e-5;
    for era in forms() {
        let learned = LearnedEra::alone(era, &Device::Cpu).unwrap();
        let (_, _, got) = run(&learned, &x, &dy, |x| learned.forward(x));
        let slope = |f: &dyn Fn(f64) -> Era| (sum(f(step)) - sum(f(-step))) / (2.0 * step);
        let want = match learned.era().unwrap() {
            Era::GateEntropy { temperature: t, strength } => vec![
                slope(&|h| Era::GateEntropy { temperature: t * h.exp(), strength }),
                slope(&|h| Era::GateEntropy { temperature: t, strength: strength + h }),
            ],
            Era::GeluSoftplus { gamma } => vec![slope(&|h| Era::GeluSoftplus { gamma: gamma + h })],
            other => panic!("{other:?} has no row here"),
        };
        assert_close(&got, &want, 1e-5, 1e-5, &format!("{era:?}"));
    }
}

#[test]
fn gated_gradients_equal_those_of_the_two_halves_at_every_size_and_stride() {
    for era in forms() {
        let learned = LearnedEra::alone(era, &Device::Cpu).unwrap();
        for (rows, width) in [(1, 1), (3, 7), (2, 1024), (5, 1027), (40, 513)] {
            let packed =
                tensor(&noise(rows * 2 * width, 5.0, 4), DType::F32).reshape((rows, 2 * width)).unwrap();
            let dy = tensor(&noise(rows * width, 1.0, 5), DType::F32).reshape((rows, width)).unwrap();
            let (y, dx, dp) = run(&learned, &packed, &dy, |x| learned.gated(x));
            let halves =
                |x: &Tensor| learned.composed(&x.narrow(1, 0, width)?)? * x.narrow(1, width, width)?;
            let (want_y, want_dx, want_dp) = run(&learned, &packed, &dy, halves);
            let what = format!("{era:?}, ({rows}, 2 * {width})");
            assert_close(&y, &want_y, 1e-5, 1e-5, &what);
            assert_close(&dx, &want_dx, 1e-5, 1e-5, &what);
            assert_close(&dp, &want_dp, 1e-4, 1e-5 * (1.0 + (rows * width) as f64), &what);
        }
        let empty = learned.gated(&tensor(&[], DType::F32).reshape((0, 8)).unwrap()).unwrap();
        assert_eq!(empty.dims(), [0, 4]);
        // A view that is not in row-major order.
        let x = tensor(&noise(60, 3.0, 6), DType::F32).reshape((6, 10)).unwrap().t().unwrap();
        let dy = tensor(&noise(60, 1.0, 7), DType::F32).reshape((10, 6)).unwrap();
        let (_, _, dp) = run(&learned, &x, &dy, |x| learned.forward(x));
        let (_, _, want) = run(&learned, &x.contiguous().unwrap(), &dy, |x| learned.forward(x));
        assert_eq!(dp, want);
    }
}

#[test]
fn sums_have_the_same_bits_for_any_number_of_threads() {
    let learned = LearnedEra::alone(Era::default(), &Device::Cpu).unwrap();
    let x = tensor(&noise(100_000, 4.0, 8), DType::F32);
    let dy = tensor(&noise(100_000, 1.0, 9), DType::F32);
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&learned, &x, &dy, |x| learned.forward(x)).2)
    };
    assert_eq!(bits(1), bits(2));
    assert_eq!(bits(1), bits(7));
}

#[test]
fn variables_lie_in_the_map_and_values_out_of_range_are_named() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::BF16, &Device::Cpu);
    let learned = LearnedEra::new(Era::default(), vb.pp("act")).unwrap();
    LearnedEra::new(Era::gelu_softplus(), vb.pp("other")).unwrap();
    let data = map.data().lock().unwrap();
    let mut names: Vec<&str> = data.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["act.log_temperature", "act.strength", "other.gamma"]);
    assert_eq!(data["act.strength"].dtype(), DType::F32, "whatever the model's dtype");
    data["act.log_temperature"].set(&Tensor::new(20f32, &Device::Cpu).unwrap()).unwrap();
    let x = tensor(&[1.0], DType::F32);
    let error = learned.forward(&x).unwrap_err().to_string();
    assert!(error.contains("temperature must be from 1e-6 to 1e6"), "{error}");
    let wrong = Era::GateEntropy { temperature: 0.0, strength: 0.1 };
    assert!(LearnedEra::alone(wrong, &Device::Cpu).is_err());
    assert!(learned.gated(&tensor(&[1.0, 2.0, 3.0], DType::F32)).unwrap_err().to_string().contains("even"));
}
