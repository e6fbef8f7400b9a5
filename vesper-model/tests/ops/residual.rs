use candle_core::{DType, Result, Tensor};
use vesper_model::ops::{Path, layer_norm, residual_layer_norm, residual_rms_norm, rms_norm};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

/// x, residual, weight and bias.
fn inputs(shape: &[usize]) -> Vec<Tensor> {
    let d = &shape[shape.len() - 1..];
    vec![random(1, shape), random(2, shape), random(3, d), random(4, d)]
}

/// A function of both results, so that the sum's gradient has two parts.
fn both((sum, y): (Tensor, Tensor)) -> Result<Tensor> {
    (sum.sqr()? * 0.5)? + y
}

fn rms(x: &[Tensor], path: Path) -> Result<Tensor> {
    both(residual_rms_norm(&x[0], &x[1], &x[2], 1e-1, path)?)
}

fn layer(x: &[Tensor], path: Path) -> Result<Tensor> {
    both(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-1, path)?)
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    for shape in [&[1, 1][..], &[3, 17], &[2, 5, 33], &[129, 40], &[1, 1000, 3]] {
        parity("residual rms_norm", &inputs(shape)[..3], |x, fused| rms(x, path(fused)));
        parity("residual layer_norm", &inputs(shape), |x, fused| layer(x, path(fused)));
    }
}

#[test]
fn gradients_equal_finite_differences() {
    finite_differences("residual rms_norm", &inputs(&[3, 7])[..3], |x| rms(x, Path::Fused));
    finite_differences("residual layer_norm", &inputs(&[3, 7]), |x| layer(x, Path::Fused));
}

#[test]
fn equals_its_two_parts_bit_for_bit() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let inputs = inputs(&[70, 33]);
        let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            let (y, mut gradients) = value_and_gradients(&inputs[..3], dtype, f);
            gradients.push(y);
            gradients
        };
        let whole = run(&|x| both(residual_rms_norm(&x[0], &x[1], &x[2], 1e-5, Path::Fused)?));
        let parts = run(&|x| {
            let sum = (&x[0] + &x[1])?;
            both((sum.clone(), rms_norm(&sum, &x[2], 1e-5, Path::Fused)?))
        });
        let whole_layer = run(&|x| both(residual_layer_norm(&x[0], &x[1], &x[2], None, 1e-5, Path::Fused)?));
        let parts_layer = run(&|x| {
            let sum = (&x[0] + &x[1])?;
            both((sum.clone(), layer_norm(&sum, &x[2], None, 1e-5, Path::Fused)?))
        });
        for (a, b) in whole.iter().zip(&parts).chain(whole_layer.iter().zip(&parts_layer)) {
            assert_eq!(error(a, b), 0.0, "{dtype:?}");
        }
    }
}

#[test]
fn each_result_may_be_used_alone() {
    parity("the sum alone", &inputs(&[4, 6])[..2], |x, fused| {
        let w = random(3, &[6]).to_dtype(x[0].dtype())?;
        Ok(residual_rms_norm(&x[0], &x[1], &w, 1e-5, path(fused))?.0)
    });
    parity("the norm alone", &inputs(&[4, 6]), |x, fused| {
        Ok(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-1, path(fused))?.1)
    });
}

#[test]
fn strided_inputs_are_read_rightly() {
    let inputs = [random(1, &[6, 9]), random(2, &[9, 12]), random(3, &[6])];
    parity("residual strided", &inputs, |x, fused| {
        rms(&[x[0].t()?, x[1].narrow(1, 3, 6)?, x[2].clone()], path(fused))
    });
}

#[test]
fn no_rows_give_empty_results() {
    for fused in [true, false] {
        let inputs = inputs(&[0, 8]);
        let (sum, y) =
            residual_layer_norm(&inputs[0], &inputs[1], &inputs[2], Some(&inputs[3]), 1e-5, path(fused))
                .unwrap();
        assert_eq!((sum.dims(), y.dims()), (&[0, 8][..], &[0, 8][..]));
    }
}

#[test]
fn no_rows_give_zero_gradients() {
    // Of the norm alone: candle's own sum of empty tensors is its first operand, without the second one's graph.
    let (y, gradients) = value_and_gradients(&inputs(&[2, 0, 8]), DType::F32, |x| {
        Ok(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-5, Path::Fused)?.1)
    });
    assert_eq!(y.dims(), [2, 0, 8]);
    assert_eq!(gradients[0].dims(), [2, 0, 8]);
    for gradient in &gradients[2..] {
        assert_eq!(gradient.to_vec1::<f64>().unwrap(), [0.0; 8]);
    }
}

#[test]
fn wrong_shapes_and_dtypes_are_refused() {
    let (x, w) = (random(1, &[2, 6]), random(2, &[6]));
    let residual = random(1, &[3, 6]);
    assert!(residual_rms_norm(&x, &residual, &w, 1e-5, Path::Fused).is_err());
    assert!(residual_layer_norm(&x, &residual, &w, None, 1e-5, Path::Fused).is_err());
    let residual = x.to_dtype(DType::F32).unwrap();
    assert!(residual_rms_norm(&x, &residual, &w, 1e-5, Path::Fused).is_err());
    assert!(residual_rms_norm(&x, &x, &random(2, &[5]), 1e-5, Path::Fused).is_err());
    assert!(residual_layer_norm(&x, &x, &w, Some(&random(2, &[5])), 1e-5, Path::Fused).is_err());
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let (y, mut gradients) =
            value_and_gradients(&inputs(&[300, 65]), DType::F32, |x| layer(x, Path::Fused));
        gradients.push(y);
        gradients
    });
}
