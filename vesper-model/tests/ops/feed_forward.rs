use candle_core::{DType, Result, Tensor, Var};
use era_act::{Activation, Era};
use vesper_model::ops::{Path, gated_feed_forward, linear};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

fn activations() -> [Activation; 7] {
    [
        Activation::default(),
        Activation::Era(Era::GeluSoftplus { gamma: 0.1 }),
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::Relu,
        Activation::ReluSquared,
    ]
}

/// x, gate_up and down; down has other rows than x has columns.
fn inputs(shape: &[usize], ffn: usize, out: usize) -> Vec<Tensor> {
    let d = shape[shape.len() - 1];
    vec![random(1, shape), random(2, &[2 * ffn, d]), random(3, &[out, ffn])]
}

#[test]
fn equals_its_reference_with_every_activation() {
    for activation in activations() {
        parity(&format!("{activation}"), &inputs(&[3, 17, 8], 13, 5), |x, fused| {
            gated_feed_forward(&x[0], &x[1], &x[2], activation, path(fused))
        });
    }
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    let shapes = [
        (&[1, 1][..], 1, 1),
        (&[1, 2, 33], 65, 7),
        (&[129, 40], 3, 40),
        (&[1, 1000, 5], 7, 3),
        (&[4], 5, 6),
        (&[2, 1, 3, 4], 6, 4),
    ];
    for (shape, ffn, out) in shapes {
        parity("feed-forward", &inputs(shape, ffn, out), |x, fused| {
            gated_feed_forward(&x[0], &x[1], &x[2], Activation::Silu, path(fused))
        });
    }
}

#[test]
fn equals_its_three_parts_bit_for_bit() {
    for activation in activations() {
        let run = |whole: bool| {
            value_and_gradients(&inputs(&[2, 70, 24], 40, 24), DType::F32, |x| {
                if whole {
                    return gated_feed_forward(&x[0], &x[1], &x[2], activation, Path::Fused);
                }
                linear(&activation.gated(&linear(&x[0], &x[1], Path::Fused)?)?, &x[2], Path::Fused)
            })
        };
        let ((y, gradients), (expected, expected_gradients)) = (run(true), run(false));
        assert_eq!(error(&y, &expected), 0.0, "{activation}");
        for (a, b) in gradients.iter().zip(&expected_gradients) {
            assert_eq!(error(a, b), 0.0, "{activation}");
        }
    }
}

#[test]
fn no_rows_give_an_empty_result_and_zero_gradients() {
    for shape in [&[0, 6][..], &[3, 0, 6]] {
        for fused in [true, false] {
            let (y, gradients) = value_and_gradients(&inputs(shape, 5, 7), DType::F32, |x| {
                gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), path(fused))
            });
            assert_eq!(y.dims()[..shape.len() - 1], shape[..shape.len() - 1]);
            assert_eq!(y.dims()[shape.len() - 1], 7);
            for gradient in &gradients[1..] {
                let sum = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
                assert_eq!(sum, 0.0, "{shape:?}");
            }
        }
    }
}

#[test]
fn no_columns_give_an_empty_result() {
    let (y, gradients) = value_and_gradients(&inputs(&[4, 6], 5, 0), DType::F32, |x| {
        gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), Path::Fused)
    });
    assert_eq!(y.dims(), [4, 0]);
    let sum = gradients[0].abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    assert_eq!(sum, 0.0);
}

#[test]
fn strided_inputs_are_read_rightly() {
    let inputs = [random(1, &[6, 9, 2]), random(2, &[8, 10]), random(3, &[9, 4])];
    parity("feed-forward strided", &inputs, |x, fused| {
        let (gate_up, down) = (x[1].t()?.narrow(1, 1, 6)?, x[2].narrow(0, 2, 5)?.t()?);
        gated_feed_forward(&x[0].transpose(0, 2)?, &gate_up, &down, Activation::Gelu, path(fused))
    });
}

#[test]
fn gradient_equals_finite_differences_with_every_activation() {
    for activation in activations() {
        finite_differences(&format!("{activation}"), &inputs(&[2, 3, 4], 5, 3), |x| {
            gated_feed_forward(&x[0], &x[1], &x[2], activation, Path::Fused)
        });
    }
}

#[test]
fn frozen_inputs_get_no_gradient_and_the_others_the_same() {
    let values = inputs(&[4, 6], 5, 7);
    let run = |tracked: [bool; 3]| -> Result<Vec<Option<Tensor>>> {
        let vars = values.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let x: Vec<Tensor> = vars
            .iter()
            .zip(tracked)
            .map(|(var, tracked)| if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() })
            .collect();
        let y = gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), Path::Fused)?;
        let grads = (&y * random(77, y.dims()))?.sum_all()?.backward()?;
        Ok(vars.iter().map(|var| grads.get(var).cloned()).collect())
    };
    let all = run([true; 3]).unwrap();
    for tracked in [[true, false, false], [false, true, false], [false, false, true], [true, true, false]] {
        for ((gradient, expected), tracked) in run(tracked).unwrap().iter().zip(&all).zip(tracked) {
            assert_eq!(gradient.is_some(), tracked);
            if let (Some(gradient), Some(expected)) = (gradient, expected) {
                assert_eq!(error(gradient, expected), 0.0);
            }
        }
    }
}

#[test]
fn extreme_inputs_stay_finite() {
    for activation in activations() {
        let mut x = inputs(&[5, 6], 5, 7);
        x[0] = (&x[0] * 1e4).unwrap();
        let (y, gradients) = value_and_gradients(&x, DType::F32, |x| {
            gated_feed_forward(&x[0], &x[1], &x[2], activation, Path::Fused)
        });
        for tensor in gradients.iter().chain([&y]) {
            let values = tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert!(values.iter().all(|v| v.is_finite()), "{activation}");
        }
    }
}

#[test]
fn wrong_shapes_dtypes_and_parameters_are_refused() {
    let good = inputs(&[4, 6], 5, 7);
    for path in [Path::Fused, Path::Reference] {
        let run = |x: &[Tensor]| gated_feed_forward(&x[0], &x[1], &x[2], Activation::Silu, path);
        run(&good).unwrap();
        for (i, wrong) in [
            (0, random(1, &[4, 5])),
            (1, random(2, &[9, 6])),
            (1, random(2, &[5, 6])),
            (1, random(2, &[10, 5])),
            (2, random(3, &[7, 10])),
            (0, good[0].to_dtype(DType::F32).unwrap()),
            (1, good[1].to_dtype(DType::BF16).unwrap()),
            (2, good[2].to_dtype(DType::F32).unwrap()),
        ] {
            let mut x = good.clone();
            x[i] = wrong;
            let message = run(&x).unwrap_err().to_string();
            assert!(message.contains("gated_feed_forward"), "{message}");
        }
        let era = Activation::Era(Era::GateEntropy { temperature: 0.0, strength: 0.1 });
        assert!(gated_feed_forward(&good[0], &good[1], &good[2], era, path).is_err());
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dtype in [DType::F32, DType::BF16] {
        same_bits_on_any_number_of_threads(|| {
            let (y, mut gradients) = value_and_gradients(&inputs(&[3, 90, 24], 64, 24), dtype, |x| {
                gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), Path::Fused)
            });
            gradients.push(y);
            gradients
        });
    }
}
