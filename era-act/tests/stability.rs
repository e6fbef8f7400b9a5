//! The ends of the range, infinities and NaN, in every dtype.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all, points, tensor, values, with_gradient};
use era_act::{Activation, Era, reference};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

fn saturating() -> impl Iterator<Item = Activation> {
    let wide = |a: &Activation| matches!(a, Activation::Era(Era::GateEntropy { temperature, .. }) if *temperature > 100.0);
    all().into_iter().filter(move |a| !wide(a) && *a != Activation::ReluSquared)
}

#[test]
fn at_plus_and_minus_ten_thousand_values_and_gradients_are_those_of_the_limits() {
    for activation in saturating() {
        let gamma = match activation {
            Activation::Era(Era::GeluSoftplus { gamma }) => gamma,
            _ => 0.0,
        };
        for dtype in DTYPES {
            let x = tensor(&[-1e4, 1e4], dtype);
            let end = values(&x)[1]; // 1e4 rounded to the dtype
            let ones = x.ones_like().unwrap();
            for (path, (y, dx)) in [
                ("fused", with_gradient(&x, &ones, |x| activation.forward(x))),
                ("reference", with_gradient(&x, &ones, |x| reference::forward(&activation, x))),
            ] {
                let (y, dx) = (values(&y), values(&dx));
                let what = format!("{activation} in {dtype:?}, {path}: {y:?}, {dx:?}");
                let ulp = match dtype {
                    DType::BF16 => 4e-3,
                    DType::F16 => 5e-4,
                    _ => 1e-7,
                };
                assert!(y[0] == 0.0 && dx[0] == 0.0, "{what}");
                assert!((y[1] / (end * (1.0 + gamma)) - 1.0).abs() < ulp, "{what}");
                assert!((dx[1] / (1.0 + gamma) - 1.0).abs() < ulp, "{what}");
            }
        }
    }
}

#[test]
fn values_and_gradients_are_finite_over_the_whole_range() {
    for activation in all() {
        for dtype in DTYPES {
            let x = tensor(&points(), dtype);
            let ones = x.ones_like().unwrap();
            let (y, dx) = with_gradient(&x, &ones, |x| activation.forward(x));
            // 1e4 squared is above the largest f16.
            let overflows = activation == Activation::ReluSquared && dtype == DType::F16;
            for ((x, y), dx) in values(&x).iter().zip(values(&y)).zip(values(&dx)) {
                let fits = !overflows || *x < 255.0;
                assert!(
                    dx.is_finite() && (y.is_finite() || !fits),
                    "{activation} in {dtype:?} at {x}: {y}, {dx}"
                );
            }
        }
    }
}

#[test]
fn the_largest_numbers_of_each_dtype_give_no_nan() {
    for activation in saturating() {
        for (dtype, largest) in DTYPES.into_iter().zip([f64::from(f32::MAX), f64::MAX, 3.38e38, 65504.0]) {
            let x = tensor(&[-largest, largest], dtype);
            let (y, dx) = with_gradient(&x, &x.ones_like().unwrap(), |x| activation.forward(x));
            for v in values(&y).iter().chain(&values(&dx)) {
                assert!(!v.is_nan(), "{activation} in {dtype:?}");
            }
            assert_eq!(values(&y)[0], 0.0, "{activation} in {dtype:?}");
            assert_eq!(values(&dx)[0], 0.0, "{activation} in {dtype:?}");
        }
    }
}

#[test]
fn minus_infinity_gives_the_limit_zero_and_infinity_gives_infinity() {
    for activation in
        [Activation::default(), Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu]
    {
        let y =
            values(&activation.forward(&tensor(&[f64::NEG_INFINITY, f64::INFINITY], DType::F32)).unwrap());
        assert_eq!(y, [0.0, f64::INFINITY], "{activation}");
    }
}

#[test]
fn nan_in_gives_nan_out_and_touches_nothing_else() {
    for activation in all() {
        for dtype in DTYPES {
            let clean: Vec<f64> = (0..40).map(|i| f64::from(i) * 0.25 - 5.0).collect();
            let mut dirty = clean.clone();
            dirty[17] = f64::NAN;
            let want = values(&activation.forward(&tensor(&clean, dtype)).unwrap());
            for got in [
                activation.forward(&tensor(&dirty, dtype)).unwrap(),
                reference::forward(&activation, &tensor(&dirty, dtype)).unwrap(),
            ] {
                for (i, (got, want)) in values(&got).iter().zip(&want).enumerate() {
                    let close = (got - want).abs() <= 1e-6 + 8e-3 * want.abs();
                    assert!(
                        if i == 17 { got.is_nan() } else { close },
                        "{activation} in {dtype:?}: element {i}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_nan_input_has_a_nan_gradient() {
    for activation in all().into_iter().filter(|a| *a != Activation::Relu) {
        let x = Var::from_tensor(&tensor(&[1.0, f64::NAN], DType::F32)).unwrap();
        let grads = activation.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
        let dx = values(grads.get(&x).unwrap());
        assert!(dx[0].is_finite() && dx[1].is_nan(), "{activation}: {dx:?}");
    }
}

#[test]
fn at_zero_the_forms_have_their_known_values() {
    let zero = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
    let one = zero.ones_like().unwrap();
    // g = 1/2 and H = ln 2 at 0.
    let (y, dx) = with_gradient(&zero, &one, |x| Era::default().forward(x));
    let ln2 = std::f64::consts::LN_2;
    assert_eq!(values(&y), [0.0]);
    assert!((values(&dx)[0] - 0.5 * (1.0 + 0.1 * ln2)).abs() < 1e-15);
    let (y, dx) = with_gradient(&zero, &one, |x| Era::gelu_softplus().forward(x));
    assert!((values(&y)[0] - 0.1 * ln2).abs() < 1e-16);
    assert!((values(&dx)[0] - 0.55).abs() < 1e-15);
}
