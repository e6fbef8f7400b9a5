use candle_core::{DType, Device, Tensor};
use vesper_model::ops::{Path, layer_norm};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

/// x, weight and bias.
fn inputs(shape: &[usize]) -> Vec<Tensor> {
    let d = &shape[shape.len() - 1..];
    vec![random(1, shape), random(2, d), random(3, d)]
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    for shape in [&[1, 1][..], &[3, 17], &[2, 5, 33], &[129, 40], &[1, 1000, 3], &[2, 32_005]] {
        // With a small eps the gradient of a row of few elements is 0 but for rounding.
        parity("layer_norm", &inputs(shape), |x, fused| {
            layer_norm(&x[0], &x[1], Some(&x[2]), 1e-1, path(fused))
        });
        parity("layer_norm without bias", &inputs(shape)[..2], |x, fused| {
            layer_norm(&x[0], &x[1], None, 1e-1, path(fused))
        });
    }
}

#[test]
fn gradient_equals_finite_differences() {
    finite_differences("layer_norm", &inputs(&[3, 7]), |x| {
        layer_norm(&x[0], &x[1], Some(&x[2]), 1e-3, Path::Fused)
    });
}

#[test]
fn strided_inputs_are_read_rightly() {
    let inputs = [random(1, &[9, 4, 6]), random(2, &[18]), random(3, &[6, 2])];
    parity("layer_norm strided", &inputs, |x, fused| {
        let (x, w, b) = (
            x[0].transpose(0, 2)?.narrow(2, 2, 6)?,
            x[1].narrow(0, 5, 6)?,
            x[2].narrow(1, 1, 1)?.squeeze(1)?,
        );
        layer_norm(&x, &w, Some(&b), 1e-5, path(fused))
    });
}

#[test]
fn no_rows_give_an_empty_result_and_zero_gradients() {
    let (y, gradients) = value_and_gradients(&inputs(&[2, 0, 8]), DType::F32, |x| {
        layer_norm(&x[0], &x[1], Some(&x[2]), 1e-5, Path::Fused)
    });
    assert_eq!(y.dims(), [2, 0, 8]);
    for gradient in &gradients[1..] {
        assert_eq!(gradient.to_vec1::<f64>().unwrap(), [0.0; 8]);
    }
    let x = inputs(&[2, 0, 8]);
    assert_eq!(layer_norm(&x[0], &x[1], Some(&x[2]), 1e-5, Path::Reference).unwrap().dims(), [2, 0, 8]);
}

#[test]
fn a_large_mean_does_not_swallow_the_variance() {
    let x = Tensor::new(&[[10_000f32, 10_001., 10_002., 10_003.]], &Device::Cpu).unwrap();
    let w = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
    let y = layer_norm(&x, &w, None, 0.0, Path::Fused).unwrap().to_vec2::<f32>().unwrap();
    let r = 1.0 / 1.25f32.sqrt();
    for (y, expected) in y[0].iter().zip([-1.5 * r, -0.5 * r, 0.5 * r, 1.5 * r]) {
        assert!((y - expected).abs() < 1e-5, "{y} {expected}");
    }
}

#[test]
fn frozen_parameters_get_no_gradient() {
    let inputs = inputs(&[4, 6]);
    let (_, gradients) = value_and_gradients(&inputs[..1], DType::F64, |x| {
        layer_norm(&x[0], &inputs[1], Some(&inputs[2]), 1e-5, Path::Fused)
    });
    assert_eq!(gradients.len(), 1);
}

#[test]
fn wrong_parameters_are_refused() {
    let x = random(1, &[2, 6]);
    let (good, short, f32s) =
        (random(2, &[6]), random(2, &[5]), random(2, &[6]).to_dtype(DType::F32).unwrap());
    let message =
        |w: &Tensor, b: &Tensor| layer_norm(&x, w, Some(b), 1e-5, Path::Fused).unwrap_err().to_string();
    assert!(message(&short, &good).contains("weight of shape [5]"));
    assert!(message(&good, &short).contains("bias of shape [5]"));
    assert!(message(&good, &f32s).contains("x is F64 and the bias F32"));
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let (y, mut gradients) = value_and_gradients(&inputs(&[300, 65]), DType::F32, |x| {
            layer_norm(&x[0], &x[1], Some(&x[2]), 1e-5, Path::Fused)
        });
        gradients.push(y);
        gradients
    });
}

#[test]
fn rows_far_from_zero_keep_their_bits() {
    // In f32, 1000 is rounded to 6e-5: much more than what is left where the mean is subtracted.
    let x = ((random(1, &[9, 33]) + 1000.0).unwrap().to_dtype(DType::F32).unwrap(), random(2, &[33]));
    let inputs = [x.0.to_dtype(DType::F64).unwrap(), x.1];
    let run =
        |dtype, path| value_and_gradients(&inputs, dtype, |x| layer_norm(&x[0], &x[1], None, 1e-5, path));
    let (exact, exact_gradients) = run(DType::F64, Path::Reference);
    for path in [Path::Fused, Path::Reference] {
        let (y, gradients) = run(DType::F32, path);
        assert!(error(&y, &exact) < 1e-6, "{path:?}: {:e}", error(&y, &exact));
        for (a, b) in gradients.iter().zip(&exact_gradients) {
            assert!(error(a, b) < 1e-5, "{path:?}: {:e}", error(a, b));
        }
        // What does not differ at all has no variance.
        let same = Tensor::full(1000.1f32, (1, 33), &Device::Cpu).unwrap();
        let ones = Tensor::ones(33, DType::F32, &Device::Cpu).unwrap();
        let y = layer_norm(&same, &ones, Some(&ones), 1e-5, path).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[1.0; 33]], "{path:?}");
    }
}
