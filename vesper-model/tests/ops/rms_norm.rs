use candle_core::{DType, Device, Tensor};
use vesper_model::ops::{Path, rms_norm};

use crate::common::{
    finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

#[test]
fn equals_its_reference_at_odd_shapes() {
    for shape in [&[1, 1][..], &[3, 17], &[2, 5, 33], &[129, 40], &[1000, 3], &[2, 32_005]] {
        let inputs = [random(1, shape), random(2, &shape[shape.len() - 1..])];
        // With a small eps the gradient of a row of one element is 0 but for rounding.
        parity("rms_norm", &inputs, |x, fused| rms_norm(&x[0], &x[1], 1e-2, path(fused)));
    }
}

#[test]
fn no_rows_give_an_empty_result_and_a_zero_gradient() {
    let (y, gradients) = value_and_gradients(&[random(1, &[0, 8]), random(2, &[8])], DType::F32, |x| {
        rms_norm(&x[0], &x[1], 1e-6, Path::Fused)
    });
    assert_eq!(y.dims(), [0, 8]);
    assert_eq!(gradients[1].to_vec1::<f64>().unwrap(), [0.0; 8]);
}

#[test]
fn gradient_equals_finite_differences() {
    let inputs = [random(1, &[3, 7]), random(2, &[7])];
    finite_differences("rms_norm", &inputs, |x| rms_norm(&x[0], &x[1], 1e-3, Path::Fused));
}

#[test]
fn strided_inputs_are_read_rightly() {
    let inputs = [random(1, &[9, 4, 6]), random(2, &[18])];
    parity("rms_norm strided", &inputs, |x, fused| {
        let (x, w) = (x[0].transpose(0, 2)?.narrow(2, 2, 6)?, x[1].narrow(0, 5, 6)?);
        rms_norm(&x, &w, 1e-6, path(fused))
    });
}

#[test]
fn a_frozen_weight_gets_no_gradient() {
    let w = random(2, &[6]);
    let (_, gradients) =
        value_and_gradients(&[random(1, &[4, 6])], DType::F64, |x| rms_norm(&x[0], &w, 1e-6, Path::Fused));
    assert_eq!(gradients.len(), 1);
}

#[test]
fn huge_and_tiny_rows_stay_finite() {
    let x = Tensor::new(&[[1e18f32, -1e18], [1e-30, 0.0], [0.0, 0.0]], &Device::Cpu).unwrap();
    let w = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
    let y = rms_norm(&x, &w, 1e-6, Path::Fused).unwrap().to_vec2::<f32>().unwrap();
    assert!((y[0][0] - 1.0).abs() < 1e-6 && y[1][0].abs() < 1e-26 && y[2] == [0.0, 0.0]);
}

#[test]
fn wrong_weights_are_refused() {
    let x = random(1, &[2, 6]);
    assert!(rms_norm(&x, &random(2, &[5]), 1e-6, Path::Fused).is_err());
    assert!(rms_norm(&x, &random(2, &[6]).to_dtype(DType::F32).unwrap(), 1e-6, Path::Fused).is_err());
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let (y, mut gradients) =
            value_and_gradients(&[random(1, &[300, 65]), random(2, &[65])], DType::F32, |x| {
                rms_norm(&x[0], &x[1], 1e-6, Path::Fused)
            });
        gradients.push(y);
        gradients
    });
}
