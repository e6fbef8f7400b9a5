use candle_core::{DType, Tensor};
use era_act::{Activation, reference};

use crate::common::{all, noise, tensor};
use crate::{DTYPES, Report, gpu, host, off, with_gradient};

const SIZES: [(usize, usize); 8] =
    [(1, 1), (3, 7), (17, 8), (2, 1024), (5, 1027), (40, 513), (300, 48), (9, 2560)];

/// The packed input (rows, 2 width) and the gradient (rows, width).
fn packed(rows: usize, width: usize, dtype: DType) -> (Tensor, Tensor) {
    let packed = tensor(&noise(rows * 2 * width, 9.0, 2), dtype).reshape((rows, 2 * width)).unwrap();
    (packed, tensor(&noise(rows * width, 1.0, 3), dtype).reshape((rows, width)).unwrap())
}

#[test]
fn gated_values_and_gradients_equal_the_reference_in_f64() {
    let Some((_lock, device)) = gpu("gated_values_and_gradients_equal_the_reference_in_f64") else { return };
    let mut report = Report::new();
    for activation in all() {
        for dtype in DTYPES {
            let (mut value, mut gradient) = (0f64, 0f64);
            for (rows, width) in SIZES {
                let (x, dy) = packed(rows, width, dtype);
                let (y, dx) = with_gradient(&x, &dy.to_device(&device).unwrap(), |x| activation.gated(x));
                let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                let (want_y, want_dx) =
                    with_gradient(&wide(&x), &wide(&dy), |x| reference::gated(&activation, x));
                value = value.max(off(&y, &want_y, dtype, 10.0));
                gradient = gradient.max(off(&dx, &want_dx, dtype, 40.0));
            }
            report.add(&format!("gated {activation} {dtype:?} value"), value);
            report.add(&format!("gated {activation} {dtype:?} gradient"), gradient);
        }
    }
    report.end();
}

#[test]
fn any_layout_and_both_backward_forms_give_the_same_bits() {
    let Some((_lock, device)) = gpu("any_layout_and_both_backward_forms_give_the_same_bits") else { return };
    for dtype in DTYPES {
        for (rows, width) in SIZES {
            let (x, dy) = packed(rows, width, dtype);
            let (x, dy) = (x.to_device(&device).unwrap(), dy.to_device(&device).unwrap());
            let turned = x.t().unwrap().contiguous().unwrap().t().unwrap();
            for activation in [Activation::default(), Activation::Gelu] {
                let y = activation.gated(&x).unwrap();
                assert_eq!(host(&y), host(&activation.gated(&turned).unwrap()), "{dtype:?}, {rows}, {width}");
                let (_, dx) = with_gradient(&x, &dy, |x| activation.gated(x));
                assert_eq!(dx, host(&activation.gated_backward(&turned, &dy).unwrap()));
                let (again, value) = activation.gated_backward_and_value(&x, &dy).unwrap();
                assert_eq!((dx, host(&y)), (host(&again), host(&value)), "{dtype:?}, {rows}, {width}");
            }
        }
        let empty = Tensor::zeros((1, 8), dtype, &device).unwrap().narrow(0, 0, 0).unwrap();
        assert_eq!(Activation::default().gated(&empty).unwrap().dims(), [0, 4]);
        let short = Tensor::zeros((1, 3), dtype, &device).unwrap();
        let four = Tensor::zeros((1, 8), dtype, &device).unwrap();
        assert!(Activation::Silu.gated(&short).is_err());
        assert!(Activation::Silu.gated_backward(&four, &short).is_err());
        assert!(Activation::Silu.gated_backward_and_value(&four, &short).is_err());
    }
}
