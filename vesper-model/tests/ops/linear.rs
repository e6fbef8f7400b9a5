use candle_core::{DType, Tensor, Var};
use vesper_model::ops::{Path, linear};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

#[test]
fn equals_its_reference_at_odd_shapes() {
    for (shape, out) in [
        (&[1, 1][..], 1),
        (&[3, 17], 5),
        (&[2, 5, 33], 65),
        (&[1, 1000, 3], 2),
        (&[3, 4], 32_005),
        (&[0, 8], 3),
        (&[7, 4], 0),
        (&[2, 0], 3),
        (&[17], 5),
    ] {
        let inputs = [random(1, shape), random(2, &[out, shape[shape.len() - 1]])];
        parity("linear", &inputs, |x, fused| linear(&x[0], &x[1], path(fused)));
    }
}

#[test]
fn strided_inputs_are_read_rightly() {
    let inputs = [random(1, &[6, 5]), random(2, &[6, 9])];
    parity("linear strided", &inputs, |x, fused| linear(&x[0].t()?, &x[1].t()?, path(fused)));
    parity("linear narrow", &inputs, |x, fused| {
        linear(&x[0].narrow(0, 2, 3)?, &x[1].narrow(0, 1, 2)?.narrow(1, 3, 5)?, path(fused))
    });
}

#[test]
fn gradient_equals_finite_differences() {
    let inputs = [random(1, &[2, 3, 4]), random(2, &[5, 4])];
    finite_differences("linear", &inputs, |x| linear(&x[0], &x[1], Path::Fused));
}

#[test]
fn a_frozen_weight_gets_no_gradient() {
    let x = Var::from_tensor(&random(1, &[3, 4])).unwrap();
    let w = Var::from_tensor(&random(2, &[5, 4])).unwrap();
    let y = linear(x.as_tensor(), &w.as_tensor().detach(), Path::Fused).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
}

#[test]
fn wrong_shapes_and_dtypes_are_refused() {
    let (x, w) = (random(1, &[3, 4]), random(2, &[5, 3]));
    assert!(linear(&x, &w, Path::Fused).is_err());
    let w = random(2, &[5, 4]).to_dtype(DType::F32).unwrap();
    assert!(linear(&x, &w, Path::Fused).is_err());
}

#[test]
fn strided_weights_in_f32_beside_bf16_and_f16() {
    let (x, w) = (random(1, &[6, 50]), random(2, &[60, 9]));
    let view = |x: &Tensor, w: &Tensor, whole: bool| {
        let (x, w) = (x.t()?.narrow(0, 2, 40)?, w.narrow(0, 3, 6)?.t()?);
        linear(
            &if whole { x.contiguous()? } else { x },
            &if whole { w.contiguous()? } else { w },
            Path::Fused,
        )
    };
    for dtype in [DType::BF16, DType::F16] {
        let run = |whole: bool| {
            let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
            let w = Var::from_tensor(&w.to_dtype(DType::F32).unwrap()).unwrap();
            let y = view(x.as_tensor(), w.as_tensor(), whole).unwrap();
            assert_eq!((y.dims(), y.dtype()), (&[40, 9][..], dtype));
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let (dx, dw) = (grads.get(&x).unwrap().clone(), grads.get(&w).unwrap().clone());
            assert_eq!((dx.dtype(), dw.dtype()), (dtype, DType::F32));
            [y, dx, dw].map(|tensor| tensor.to_dtype(DType::F64).unwrap())
        };
        for (strided, contiguous) in run(false).iter().zip(&run(true)) {
            assert_eq!(error(strided, contiguous), 0.0, "{dtype:?}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dtype in [DType::F32, DType::BF16] {
        same_bits_on_any_number_of_threads(|| {
            let inputs = [random(1, &[3, 90, 70]), random(2, &[130, 70])];
            let (y, mut gradients) =
                value_and_gradients(&inputs, dtype, |x| linear(&x[0], &x[1], Path::Fused));
            gradients.push(y);
            gradients
        });
    }
}
