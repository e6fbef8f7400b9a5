use candle_core::{DType, Device, Result, Tensor, Var};
use vesper_model::ops::{Heads, Path, Rope, causal_attention, linear, self_attention};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

const fn heads(query: usize, kv: usize, dim: usize) -> Heads {
    Heads { query, kv, dim }
}

fn rope(dim: usize, positions: usize) -> Rope {
    Rope::new(dim, positions, 1e4, &Device::Cpu).unwrap()
}

/// x, qkv and out; out has other rows than x has columns.
fn inputs(b: usize, t: usize, d: usize, heads: Heads, columns: usize) -> Vec<Tensor> {
    vec![
        random(1, &[b, t, d]),
        random(2, &[heads.packed(), d]),
        random(3, &[columns, heads.query * heads.dim]),
    ]
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    let shapes = [
        (1, 1, 1, heads(1, 1, 2), 1),
        (2, 17, 7, heads(5, 5, 6), 9),
        (1, 64, 16, heads(4, 2, 8), 16),
        (2, 65, 5, heads(6, 1, 4), 3),
        (1, 130, 33, heads(2, 2, 10), 65),
        (1, 1000, 3, heads(1, 1, 4), 2),
    ];
    for (b, t, d, heads, columns) in shapes {
        let (inputs, rope) = (inputs(b, t, d, heads, columns), rope(heads.dim, t + 3));
        parity("self-attention", &inputs, |x, fused| {
            self_attention(&x[0], &x[1], &x[2], heads, Some(&rope), path(fused))
        });
        parity("self-attention without rope", &inputs, |x, fused| {
            self_attention(&x[0], &x[1], &x[2], heads, None, path(fused))
        });
    }
}

#[test]
fn equals_its_three_parts_bit_for_bit() {
    let (heads, rope) = (heads(4, 2, 8), rope(8, 70));
    let run = |whole: bool| {
        value_and_gradients(&inputs(2, 70, 20, heads, 20), DType::F32, |x| {
            if whole {
                return self_attention(&x[0], &x[1], &x[2], heads, Some(&rope), Path::Fused);
            }
            let packed = linear(&x[0], &x[1], Path::Fused)?;
            linear(&causal_attention(&packed, heads, Some(&rope), Path::Fused)?, &x[2], Path::Fused)
        })
    };
    let ((y, gradients), (expected, expected_gradients)) = (run(true), run(false));
    assert_eq!(error(&y, &expected), 0.0);
    for (a, b) in gradients.iter().zip(&expected_gradients) {
        assert_eq!(error(a, b), 0.0);
    }
}

#[test]
fn no_rows_give_an_empty_result_and_zero_gradients() {
    let heads = heads(2, 1, 4);
    for (b, t) in [(0, 5), (3, 0)] {
        for fused in [true, false] {
            let (y, gradients) = value_and_gradients(&inputs(b, t, 6, heads, 7), DType::F32, |x| {
                self_attention(&x[0], &x[1], &x[2], heads, None, path(fused))
            });
            assert_eq!(y.dims(), [b, t, 7]);
            for gradient in &gradients[1..] {
                let sum = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
                assert_eq!(sum, 0.0, "{b} x {t}");
            }
        }
    }
}

#[test]
fn strided_inputs_are_read_rightly() {
    let heads = heads(2, 1, 4);
    // x: (b, t, d) from (d, t, b); qkv and out from their transposes, narrowed.
    let inputs = [random(1, &[6, 9, 2]), random(2, &[8, 16]), random(3, &[10, 5])];
    parity("self-attention strided", &inputs, |x, fused| {
        let (qkv, out) = (x[1].t()?.narrow(1, 1, 6)?, x[2].narrow(0, 2, 8)?.t()?);
        self_attention(&x[0].transpose(0, 2)?, &qkv, &out, heads, None, path(fused))
    });
}

#[test]
fn gradient_equals_finite_differences() {
    let (heads, rope) = (heads(4, 2, 4), rope(4, 70));
    finite_differences("self-attention", &inputs(1, 67, 5, heads, 3), |x| {
        self_attention(&x[0], &x[1], &x[2], heads, Some(&rope), Path::Fused)
    });
}

#[test]
fn frozen_inputs_get_no_gradient_and_the_others_the_same() {
    let heads = heads(2, 1, 4);
    let values = inputs(2, 5, 6, heads, 7);
    let run = |tracked: [bool; 3]| -> Result<Vec<Option<Tensor>>> {
        let vars = values.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let x: Vec<Tensor> = vars
            .iter()
            .zip(tracked)
            .map(|(var, tracked)| if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() })
            .collect();
        let y = self_attention(&x[0], &x[1], &x[2], heads, None, Path::Fused)?;
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
fn an_output_does_not_depend_on_later_tokens() {
    let heads = heads(2, 2, 4);
    let x = inputs(1, 80, 6, heads, 7);
    let run = |t: usize| {
        let start = x[0].narrow(1, 0, t).unwrap();
        self_attention(&start, &x[1], &x[2], heads, None, Path::Fused).unwrap().narrow(1, 0, 70).unwrap()
    };
    assert!(error(&run(80), &run(70)) < 1e-14);
}

#[test]
fn wrong_shapes_and_dtypes_are_refused() {
    let heads = heads(2, 1, 4);
    let good = inputs(1, 4, 6, heads, 7);
    for path in [Path::Fused, Path::Reference] {
        let run =
            |x: &[Tensor], heads, rope: Option<&Rope>| self_attention(&x[0], &x[1], &x[2], heads, rope, path);
        run(&good, heads, None).unwrap();
        for (i, wrong) in [
            (0, random(1, &[1, 4, 5])),
            (0, random(1, &[4, 6])),
            (1, random(2, &[15, 6])),
            (1, random(2, &[16, 5])),
            (2, random(3, &[7, 9])),
            (0, good[0].to_dtype(DType::F32).unwrap()),
            (1, good[1].to_dtype(DType::BF16).unwrap()),
            (2, good[2].to_dtype(DType::F32).unwrap()),
        ] {
            let mut x = good.clone();
            x[i] = wrong;
            let message = run(&x, heads, None).unwrap_err().to_string();
            assert!(
                message.contains(if i == 0 && x[0].rank() == 2 { "rank" } else { "self_attention" }),
                "{message}"
            );
        }
        // 2 query heads of 4 and 1 pair are packed as wide as 1 query head of 4 and 1.5.
        assert!(run(&good, Heads { query: 4, kv: 0, dim: 4 }, None).is_err());
        assert!(run(&good, heads, Some(&rope(4, 3))).is_err());
        assert!(run(&good, heads, Some(&rope(6, 8))).is_err());
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let heads = heads(4, 2, 8);
    for dtype in [DType::F32, DType::BF16] {
        same_bits_on_any_number_of_threads(|| {
            let (y, mut gradients) = value_and_gradients(&inputs(3, 90, 24, heads, 24), dtype, |x| {
                self_attention(&x[0], &x[1], &x[2], heads, None, Path::Fused)
            });
            gradients.push(y);
            gradients
        });
    }
}
