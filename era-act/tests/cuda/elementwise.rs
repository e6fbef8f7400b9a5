use candle_core::{DType, Device, Tensor};
use era_act::{Activation, Era, reference};

use crate::common::{all, tensor};
use crate::{DTYPES, Report, gpu, host, inputs, most, off, with_gradient};

#[test]
fn values_and_gradients_equal_the_reference_in_f64() {
    let Some((_lock, device)) = gpu("values_and_gradients_equal_the_reference_in_f64") else { return };
    let mut report = Report::new();
    for activation in all() {
        for dtype in DTYPES {
            let (mut value, mut gradient) = (0f64, 0f64);
            for n in [1, 7, 8, 17, 1000, 4099, most(70_001)] {
                let (x, dy) = inputs(n, dtype);
                let (y, dx) = with_gradient(&x, &dy.to_device(&device).unwrap(), |x| activation.forward(x));
                let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                let (want_y, want_dx) =
                    with_gradient(&wide(&x), &wide(&dy), |x| reference::forward(&activation, x));
                // The weighted sum that the gradient is of is rounded too, but not the weights.
                value = value.max(off(&y, &want_y, dtype, 1.0));
                gradient = gradient.max(off(&dx, &want_dx, dtype, 4.0));
            }
            report.add(&format!("{activation} {dtype:?} value"), value);
            report.add(&format!("{activation} {dtype:?} gradient"), gradient);
        }
    }
    report.end();
}

#[test]
fn strength_0_is_silu_and_gamma_0_is_gelu_to_the_bit() {
    let Some((_lock, device)) = gpu("strength_0_is_silu_and_gamma_0_is_gelu_to_the_bit") else { return };
    let silu = Activation::Era(Era::GateEntropy { temperature: 1.0, strength: 0.0 });
    let gelu = Activation::Era(Era::GeluSoftplus { gamma: 0.0 });
    for dtype in DTYPES {
        let (x, dy) = inputs(4099, dtype);
        let dy = dy.to_device(&device).unwrap();
        let run = |activation: Activation| with_gradient(&x, &dy, |x| activation.forward(x));
        assert_eq!(run(silu), run(Activation::Silu), "{dtype:?}");
        assert_eq!(run(gelu), run(Activation::GeluTanh), "{dtype:?}");
    }
}

#[test]
fn any_layout_gives_the_bits_of_the_contiguous_one_and_so_does_a_second_run() {
    let name = "any_layout_gives_the_bits_of_the_contiguous_one_and_so_does_a_second_run";
    let Some((_lock, device)) = gpu(name) else { return };
    for dtype in DTYPES {
        let (x, dy) = inputs(60 * 35, dtype);
        let (x, dy) =
            (x.reshape((35, 60)).unwrap(), dy.reshape((60, 35)).unwrap().to_device(&device).unwrap());
        for activation in all() {
            let turned = || with_gradient(&x, &dy, |x| activation.forward(&x.t()?));
            let plain = with_gradient(&x.t().unwrap().contiguous().unwrap(), &dy, |x| activation.forward(x));
            let (y, dx) = turned();
            assert_eq!(y, plain.0, "{activation} {dtype:?}");
            // The gradient of the turned input is turned.
            let back = Tensor::new(plain.1, &Device::Cpu).unwrap().reshape((60, 35)).unwrap();
            assert_eq!(dx, host(&back.t().unwrap().contiguous().unwrap()), "{activation} {dtype:?}");
            assert_eq!((y, dx), turned(), "{activation} {dtype:?}");
            // From the second element on: not at a multiple of 16 bytes.
            let flat = x.to_device(&device).unwrap().flatten_all().unwrap();
            let shifted = activation.forward(&flat.narrow(0, 1, 1001).unwrap()).unwrap();
            let whole = activation.forward(&flat).unwrap().narrow(0, 1, 1001).unwrap();
            assert_eq!(host(&shifted), host(&whole), "{activation} {dtype:?}");
        }
    }
}

#[test]
fn nothing_gives_nothing_and_nan_and_infinities_go_their_way() {
    let name = "nothing_gives_nothing_and_nan_and_infinities_go_their_way";
    let Some((_lock, device)) = gpu(name) else { return };
    let ends = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0];
    for dtype in DTYPES {
        let empty = Tensor::zeros((1, 4), dtype, &device).unwrap().narrow(0, 0, 0).unwrap();
        for activation in all() {
            assert_eq!(activation.forward(&empty).unwrap().dims(), [0, 4]);
            let dy = tensor(&[1.0; 4], dtype).to_device(&device).unwrap();
            let (y, dx) = with_gradient(&tensor(&ends, dtype), &dy, |x| activation.forward(x));
            let what = format!("{activation} {dtype:?}: {y:?}, {dx:?}");
            assert!(y[0].is_nan() && y[3].is_finite() && dx[3].is_finite(), "{what}");
            if !matches!(activation, Activation::Relu | Activation::ReluSquared) {
                assert!(dx[0].is_nan(), "{what}");
            }
            // gamma times an infinity decides GELU + softplus.
            if !matches!(activation, Activation::Era(Era::GeluSoftplus { .. })) {
                assert!(y[1] == f64::INFINITY && y[2] == 0.0, "{what}");
            }
        }
    }
}
