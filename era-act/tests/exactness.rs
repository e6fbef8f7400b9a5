//! Values and gradients against the composition of candle ops, f64 and finite differences, over [-1e4, 1e4].
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{all, assert_close, noise, points, tensor, values, with_gradient};
use era_act::{Activation, Era, reference};

#[test]
fn values_and_gradients_equal_the_reference_composition() {
    for activation in all() {
        // At 0 ReLU's slope is a matter of choice; everywhere else too the two must agree.
        for (dtype, relative, absolute) in [(DType::F64, 1e-12, 1e-12), (DType::F32, 2e-6, 1e-6)] {
            let what = format!("{activation} in {dtype:?}");
            let x = tensor(&points(), dtype);
            let dy = tensor(&noise(x.elem_count(), 1.0, 1), dtype);
            let (y, dx) = with_gradient(&x, &dy, |x| activation.forward(x));
            let (want_y, want_dx) = with_gradient(&x, &dy, |x| reference::forward(&activation, x));
            assert_close(&values(&y), &values(&want_y), relative, absolute, &what);
            assert_close(
                &values(&dx),
                &values(&want_dx),
                relative,
                4.0 * absolute,
                &format!("gradient of {what}"),
            );
        }
    }
}

#[test]
fn gated_values_and_gradients_equal_the_reference_composition() {
    for activation in all() {
        for (dtype, relative, absolute) in [(DType::F64, 1e-12, 1e-11), (DType::F32, 2e-6, 1e-5)] {
            for (rows, width) in [(1, 1), (3, 7), (2, 1024), (5, 1027), (40, 513)] {
                let what = format!("{activation} in {dtype:?}, ({rows}, 2 * {width})");
                let packed =
                    tensor(&noise(rows * 2 * width, 9.0, 2), dtype).reshape((rows, 2 * width)).unwrap();
                let dy = tensor(&noise(rows * width, 1.0, 3), dtype).reshape((rows, width)).unwrap();
                let (y, dx) = with_gradient(&packed, &dy, |x| activation.gated(x));
                let (want_y, want_dx) = with_gradient(&packed, &dy, |x| reference::gated(&activation, x));
                assert_eq!(y.dims(), [rows, width]);
                assert_close(&values(&y), &values(&want_y), relative, absolute, &what);
                // Of order 30 * 30 for the square: its slope times a value.
                assert_close(
                    &values(&dx),
                    &values(&want_dx),
                    relative,
                    4.0 * absolute,
                    &format!("gradient of {what}"),
                );
            }
        }
    }
}

#[test]
fn gradients_equal_central_differences_in_f64() {
    for activation in all() {
        let (step, kink) = match activation {
            // The gate turns within T.
            Activation::Era(Era::GateEntropy { temperature, .. }) if temperature < 0.1 => continue,
            Activation::Relu | Activation::ReluSquared => (1e-4, true),
            _ => (1e-4, false),
        };
        let x: Vec<f64> = points().into_iter().filter(|x| !kink || x.abs() > 2.0 * step).collect();
        let n = x.len();
        let at = |offset: f64| {
            let moved: Vec<f64> = x.iter().map(|x| x + offset * step).collect();
            values(&activation.forward(&tensor(&moved, DType::F64)).unwrap())
        };
        let [far_left, left, right, far_right] = [-2.0, -1.0, 1.0, 2.0].map(at);
        let want: Vec<f64> = (0..n)
            .map(|i| (8.0 * (right[i] - left[i]) - (far_right[i] - far_left[i])) / (12.0 * step))
            .collect();
        let dy = Tensor::ones(n, DType::F64, &Device::Cpu).unwrap();
        let (_, dx) = with_gradient(&tensor(&x, DType::F64), &dy, |x| activation.forward(x));
        // The subtraction of values of the size of x loses eps * |x| / step, and of x^2 for the square.
        for (i, (got, want)) in values(&dx).iter().zip(&want).enumerate() {
            let size = if activation == Activation::ReluSquared { x[i] * x[i] } else { x[i].abs() };
            let bound = 4.0 * f64::EPSILON * (1.0 + size) / step + 2e-11 * (1.0 + want.abs());
            assert!((got - want).abs() <= bound.max(1e-10), "{activation} at {}: {got} and {want}", x[i]);
        }
    }
}

#[test]
fn a_steep_gate_has_the_gradient_of_a_unit_gate_at_the_scaled_point() {
    // y_T(x) = T y_1(x / T), so y_T'(x) = y_1'(x / T).
    let unit = Era::default();
    let steep = Era::GateEntropy { temperature: 1e-6, strength: 0.1 };
    let z: Vec<f64> = points().into_iter().filter(|z| z.abs() < 50.0).collect();
    let x: Vec<f64> = z.iter().map(|z| z * 1e-6).collect();
    let dy = Tensor::ones(z.len(), DType::F64, &Device::Cpu).unwrap();
    let (_, want) = with_gradient(&tensor(&z, DType::F64), &dy, |x| unit.forward(x));
    let (_, got) = with_gradient(&tensor(&x, DType::F64), &dy, |x| steep.forward(x));
    assert_close(&values(&got), &values(&want), 1e-12, 1e-13, "T = 1e-6");
}

#[test]
fn f32_values_of_the_default_are_within_a_millionth_of_f64() {
    let grid: Vec<f64> = (-200_000..=200_000).map(|i| f64::from(i as f32 * 5e-4)).chain(points()).collect();
    for activation in [Activation::default(), Activation::Silu] {
        let want = values(&activation.forward(&tensor(&grid, DType::F64)).unwrap());
        let got = values(&activation.forward(&tensor(&grid, DType::F32)).unwrap());
        // Below 1e-36 the gate is subnormal in f32.
        assert_close(&got, &want, 1e-6, 1e-36, &activation.to_string());
    }
}

#[test]
fn f32_values_are_within_a_millionth_of_f64_where_the_argument_of_the_exponential_must_be_rounded() {
    // exp(-a) of a rounded a is off by a * eps: in the far left tail that is more than 1e-6 of a vanishing value.
    let grid: Vec<f64> = (-200_000..=200_000).map(|i| f64::from(i as f32 * 5e-4)).chain(points()).collect();
    for activation in all() {
        let want = values(&activation.forward(&tensor(&grid, DType::F64)).unwrap());
        let got = values(&activation.forward(&tensor(&grid, DType::F32)).unwrap());
        assert_close(&got, &want, 1e-6, 2e-7, &activation.to_string());
    }
}

#[test]
fn half_types_are_rounded_once_from_f32() {
    for activation in all() {
        for (dtype, largest) in [(DType::BF16, f64::INFINITY), (DType::F16, 65504.0)] {
            let x = tensor(&points(), dtype);
            let dy = tensor(&noise(x.elem_count(), 1.0, 4), dtype);
            let (y, dx) = with_gradient(&x, &dy, |x| activation.forward(x));
            assert_eq!((y.dtype(), dx.dtype()), (dtype, dtype));
            let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let (want_y, want_dx) = with_gradient(&wide(&x), &wide(&dy), |x| activation.forward(x));
            let rounded = |t: &Tensor| values(&t.to_dtype(dtype).unwrap());
            assert_eq!(values(&y), rounded(&want_y), "{activation} in {dtype:?}");
            // candle's sum of a gradient with zeros may flush subnormal bf16 numbers.
            let what = format!("gradient of {activation} in {dtype:?}");
            assert_close(&values(&dx), &rounded(&want_dx), 0.0, f64::from(f32::MIN_POSITIVE), &what);

            // And against f64: half an ulp of the half type, and what f32 adds.
            let (ulp, least) =
                if dtype == DType::BF16 { (2f64.powi(-8), 1e-37) } else { (2f64.powi(-11), 3e-8) };
            let exact = values(&activation.forward(&x.to_dtype(DType::F64).unwrap()).unwrap());
            for (got, want) in values(&y).iter().zip(exact) {
                let fits = want.abs() < largest;
                assert!(
                    !fits || (got - want).abs() <= 1.01 * ulp * want.abs() + least + 5e-8,
                    "{activation}: {got}, {want}"
                );
            }
        }
    }
}

#[test]
fn zero_strength_is_silu_and_zero_gamma_is_gelu_bit_for_bit() {
    let cases = [
        (Era::GateEntropy { temperature: 1.0, strength: 0.0 }, Activation::Silu),
        (Era::GeluSoftplus { gamma: 0.0 }, Activation::GeluTanh),
    ];
    for (era, plain) in cases {
        // The sign of a zero too: both are -0 far to the left.
        let bits = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let points: Vec<f64> = points().into_iter().chain([f64::INFINITY, f64::NEG_INFINITY]).collect();
            let x = tensor(&points, dtype);
            let dy = tensor(&noise(x.elem_count(), 1.0, 5), dtype);
            let (y, dx) = with_gradient(&x, &dy, |x| era.forward(x));
            let (want_y, want_dx) = with_gradient(&x, &dy, |x| plain.forward(x));
            assert_eq!(bits(&y), bits(&want_y), "{plain} in {dtype:?}");
            assert_eq!(bits(&dx), bits(&want_dx), "gradient of {plain} in {dtype:?}");
            let packed = Tensor::stack(&[&x, &dy], 1).unwrap();
            assert_eq!(bits(&era.gated(&packed).unwrap()), bits(&plain.gated(&packed).unwrap()));
        }
    }
}

#[test]
fn the_compositions_without_their_terms_are_candles_own_formula_bit_for_bit() {
    let x = tensor(&points(), DType::F32);
    let composed = |era: Era| values(&reference::forward(&Activation::Era(era), &x).unwrap());
    let silu = (&x * candle_nn::ops::sigmoid(&x).unwrap()).unwrap();
    assert_eq!(composed(Era::GateEntropy { temperature: 1.0, strength: 0.0 }), values(&silu));
    let gelu = values(&reference::forward(&Activation::GeluTanh, &x).unwrap());
    assert_eq!(composed(Era::GeluSoftplus { gamma: 0.0 }), gelu);
}
