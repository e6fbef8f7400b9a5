use candle_core::{DType, Device, Tensor, Var};
use vesper_model::ops::{CrossEntropy, Path, linear_cross_entropy};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

fn targets(n: usize, vocab: u32) -> Tensor {
    let ids: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    Tensor::from_vec(ids, n, &Device::Cpu).unwrap()
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    for (n, vocab, d) in [(1, 1, 1), (17, 5, 3), (70, 131, 8), (200, 33, 16), (1000, 7, 5), (2, 32_005, 3)] {
        let targets = targets(n, vocab as u32);
        let inputs = [(random(1, &[n, d]) * 3.0).unwrap(), (random(2, &[vocab, d]) * 3.0).unwrap()];
        parity("cross-entropy", &inputs, |x, fused| {
            Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), path(fused))?.loss)
        });
        let entropy = |fused| {
            let out =
                linear_cross_entropy(&inputs[0], &inputs[1], &targets, CrossEntropy::default(), path(fused));
            out.unwrap().entropy
        };
        assert!(error(&entropy(true), &entropy(false)) < 1e-10);
    }
}

#[test]
fn a_large_vocabulary_runs_in_several_blocks() {
    // 8 Mi logits a block: 300 rows of 32005 make two.
    let targets = targets(300, 32_005);
    let inputs = [random(1, &[300, 4]), random(2, &[32_005, 4])];
    let settings = CrossEntropy::default().with_ignore_index(0).with_z_loss(1e-3).with_label_smoothing(0.1);
    let run = |fused| {
        let (loss, mut gradients) = value_and_gradients(&inputs, DType::F32, |x| {
            let out = linear_cross_entropy(&x[0], &x[1], &targets, settings, path(fused))?;
            assert!((0.0..32_005f32.ln()).contains(&out.entropy.to_scalar::<f32>()?));
            Ok(out.loss)
        });
        gradients.push(loss);
        gradients
    };
    // The reference of each half for itself has one block.
    let parts = [(0, 150), (150, 150)].map(|(start, n)| {
        let (hidden, targets) =
            (inputs[0].narrow(0, start, n).unwrap(), targets.narrow(0, start, n).unwrap());
        let out = linear_cross_entropy(&hidden, &inputs[1], &targets, settings, Path::Reference).unwrap();
        let counted = targets.ne(0u32).unwrap().to_dtype(DType::F64).unwrap().sum_all().unwrap();
        ((out.loss * &counted).unwrap(), counted)
    });
    let [(a, na), (b, nb)] = parts;
    let whole = ((a + b).unwrap() / (na + nb).unwrap()).unwrap();
    let (fused, reference) = (run(true), run(false));
    assert!(error(&fused[2], &whole) < 1e-5);
    for (a, b) in fused.iter().zip(&reference) {
        assert!(error(a, b) < 1e-5);
    }
}

#[test]
fn strided_inputs_are_read_rightly() {
    let targets = targets(20, 31).reshape((10, 2)).unwrap().narrow(1, 1, 1).unwrap().squeeze(1).unwrap();
    let inputs = [random(1, &[6, 10]), random(2, &[9, 31])];
    parity("cross-entropy strided", &inputs, |x, fused| {
        let (hidden, weight) = (x[0].t()?, x[1].t()?.narrow(1, 2, 6)?);
        let settings = CrossEntropy::default();
        Ok(linear_cross_entropy(&hidden, &weight, &targets, settings, path(fused))?.loss)
    });
}

/// Every combination of the two additions.
fn settings() -> [CrossEntropy; 4] {
    let plain = CrossEntropy::default();
    let z = plain.with_z_loss(0.02);
    [plain, z, plain.with_label_smoothing(0.1), z.with_label_smoothing(0.3)]
}

#[test]
fn gradient_equals_finite_differences() {
    let targets = targets(6, 9);
    let inputs = [random(1, &[6, 4]), random(2, &[9, 4])];
    for settings in settings() {
        for path in [Path::Fused, Path::Reference] {
            finite_differences(&format!("{settings:?} {path:?}"), &inputs, |x| {
                Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path)?.loss)
            });
        }
    }
}

#[test]
fn z_loss_and_label_smoothing_equal_their_reference_at_odd_shapes() {
    for settings in settings() {
        for (n, vocab, d) in [(1, 1, 1), (17, 5, 3), (70, 131, 8), (3, 32_005, 4)] {
            let targets = targets(n, vocab as u32);
            let inputs = [(random(1, &[n, d]) * 3.0).unwrap(), (random(2, &[vocab, d]) * 3.0).unwrap()];
            parity(&format!("{settings:?}"), &inputs, |x, fused| {
                Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path(fused))?.loss)
            });
        }
    }
}

#[test]
fn z_loss_and_label_smoothing_are_what_they_are_called() {
    // Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8 and a log-sum-exp of ln 8.
    let hidden = Tensor::ones((1, 1), DType::F64, &Device::Cpu).unwrap();
    let logits = [1f64, 2., 5.].map(f64::ln);
    let weight = Tensor::new(&[[logits[0]], [logits[1]], [logits[2]]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[2u32], &Device::Cpu).unwrap();
    let loss = |settings, path| {
        let out = linear_cross_entropy(&hidden, &weight, &targets, settings, path).unwrap();
        let entropy = -[0.125f64, 0.25, 0.625].map(|p| p * p.ln()).iter().sum::<f64>();
        assert!((out.entropy.to_scalar::<f64>().unwrap() - entropy).abs() < 1e-12);
        out.loss.to_scalar::<f64>().unwrap()
    };
    let nll = (8f64 / 5.0).ln();
    let even = -(0.125f64.ln() + 0.25f64.ln() + 0.625f64.ln()) / 3.0;
    for path in [Path::Fused, Path::Reference] {
        let [plain, z, smooth, both] = settings().map(|settings| loss(settings, path));
        assert!((plain - nll).abs() < 1e-12);
        assert!((z - (nll + 0.02 * 8f64.ln().powi(2))).abs() < 1e-12);
        assert!((smooth - (0.9 * nll + 0.1 * even)).abs() < 1e-12);
        assert!((both - (0.7 * nll + 0.3 * even + 0.02 * 8f64.ln().powi(2))).abs() < 1e-12);
    }
}

#[test]
fn rows_may_have_any_shape() {
    let inputs = [random(1, &[6, 4]), random(2, &[5, 4])];
    let flat = targets(6, 5);
    let of = |shape: &[usize], path| {
        value_and_gradients(&inputs, DType::F64, |x| {
            let hidden = x[0].reshape([shape, &[4]].concat())?;
            let targets = flat.reshape(shape)?;
            Ok(linear_cross_entropy(&hidden, &x[1], &targets, CrossEntropy::default(), path)?.loss)
        })
    };
    for path in [Path::Fused, Path::Reference] {
        let (loss, gradients) = of(&[6], path);
        for shape in [&[2, 3][..], &[3, 1, 2]] {
            let (other, others) = of(shape, path);
            assert!(error(&loss, &other) == 0.0);
            assert!(gradients.iter().zip(&others).all(|(one, other)| error(one, other) == 0.0));
        }
    }
    // One row and its target, and rows that do not fit.
    let loss = |hidden: &[usize], targets: &Tensor| {
        let (hidden, weight) = (random(1, hidden), &inputs[1]);
        linear_cross_entropy(&hidden, weight, targets, CrossEntropy::default(), Path::Fused)
    };
    assert_eq!(loss(&[4], &Tensor::new(3u32, &Device::Cpu).unwrap()).unwrap().loss.rank(), 0);
    for hidden in [&[3, 2, 4][..], &[6, 4], &[2, 3, 1], &[1, 2, 3, 4]] {
        let refused = loss(hidden, &flat.reshape((2, 3)).unwrap()).unwrap_err().to_string();
        assert!(refused.contains("do not fit together"), "{refused}");
    }
}

#[test]
fn settings_outside_their_range_are_refused() {
    let targets = targets(2, 5);
    for (settings, name) in [
        (CrossEntropy::default().with_z_loss(-1.0), "z_loss"),
        (CrossEntropy::default().with_z_loss(f64::NAN), "z_loss"),
        (CrossEntropy::default().with_label_smoothing(1.5), "label_smoothing"),
        (CrossEntropy::default().with_label_smoothing(-0.1), "label_smoothing"),
    ] {
        let out =
            linear_cross_entropy(&random(1, &[2, 4]), &random(2, &[5, 4]), &targets, settings, Path::Fused);
        assert!(out.unwrap_err().to_string().contains(name));
    }
}

#[test]
fn ignored_rows_count_neither_in_the_loss_nor_in_the_gradient() {
    let settings = CrossEntropy::default().with_ignore_index(3);
    let targets = Tensor::new(&[1u32, 3, 0, 3, 2], &Device::Cpu).unwrap();
    let inputs = [random(1, &[5, 4]), random(2, &[6, 4])];
    parity("ignore", &inputs, |x, fused| {
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path(fused))?.loss)
    });
    let (_, gradients) = value_and_gradients(&inputs, DType::F64, |x| {
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, Path::Fused)?.loss)
    });
    let rows = gradients[0].abs().unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap();
    assert!(rows[1] == 0.0 && rows[3] == 0.0 && rows[0] > 0.0);

    let all = Tensor::new(&[3u32, 3], &Device::Cpu).unwrap();
    for fused in [true, false] {
        let hidden = Var::from_tensor(&random(1, &[2, 4])).unwrap();
        let loss =
            linear_cross_entropy(hidden.as_tensor(), &inputs[1], &all, settings, path(fused)).unwrap().loss;
        assert_eq!(loss.to_scalar::<f64>().unwrap(), 0.0);
        let gradient = loss.backward().unwrap().get(&hidden).unwrap().abs().unwrap().sum_all().unwrap();
        assert_eq!(gradient.to_scalar::<f64>().unwrap(), 0.0);
    }
}

#[test]
fn ignored_rows_may_be_no_numbers() {
    let hidden = Tensor::new(&[[1f32, 2.], [f32::NAN, 1.], [f32::INFINITY, 0.]], &Device::Cpu).unwrap();
    let weight = random(2, &[5, 2]).to_dtype(DType::F32).unwrap();
    let targets = Tensor::new(&[3u32, u32::MAX, u32::MAX], &Device::Cpu).unwrap();
    let settings = CrossEntropy::default().with_z_loss(0.1).with_label_smoothing(0.1);
    for path in [Path::Fused, Path::Reference] {
        let h = Var::from_tensor(&hidden).unwrap();
        let out = linear_cross_entropy(h.as_tensor(), &weight, &targets, settings, path).unwrap();
        assert!(out.entropy.to_scalar::<f32>().unwrap().is_finite(), "{path:?}");
        assert!(out.loss.to_scalar::<f32>().unwrap().is_finite(), "{path:?}");
        let grads = out.loss.backward().unwrap();
        let rows = grads.get(&h).unwrap().to_vec2::<f32>().unwrap();
        assert!(rows[0][0] != 0.0 && rows[1..] == [[0.0; 2]; 2], "{path:?}: {rows:?}");
    }
}

#[test]
fn a_class_without_any_probability_adds_nothing_to_the_entropy() {
    let hidden = Tensor::new(&[[3e38f32]], &Device::Cpu).unwrap();
    let weight = Tensor::new(&[[1f32], [-1.], [1.]], &Device::Cpu).unwrap(); // logits whose difference is infinite
    let targets = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    for path in [Path::Fused, Path::Reference] {
        let out = linear_cross_entropy(&hidden, &weight, &targets, CrossEntropy::default(), path).unwrap();
        assert!((out.entropy.to_scalar::<f32>().unwrap() - 2f32.ln()).abs() < 1e-6, "{path:?}");
    }
}

#[test]
fn a_vocabulary_of_nothing_has_no_target() {
    let hidden = random(1, &[2, 4]);
    let empty = random(1, &[0, 4]);
    for path in [Path::Fused, Path::Reference] {
        let out = linear_cross_entropy(&hidden, &empty, &targets(2, 5), CrossEntropy::default(), path);
        assert!(out.unwrap_err().to_string().contains("outside a vocabulary of 0"), "{path:?}");
    }
}

#[test]
fn no_rows_at_all_give_zero() {
    let targets = Tensor::zeros(0, DType::U32, &Device::Cpu).unwrap();
    for fused in [true, false] {
        let (hidden, weight) = (random(1, &[0, 4]), random(2, &[6, 4]));
        let out =
            linear_cross_entropy(&hidden, &weight, &targets, CrossEntropy::default(), path(fused)).unwrap();
        assert_eq!(out.loss.to_scalar::<f64>().unwrap(), 0.0);
    }
}

#[test]
fn a_scaled_loss_scales_its_gradients() {
    let targets = targets(3, 5);
    let hidden = Var::from_tensor(&random(1, &[3, 4])).unwrap();
    let weight = random(2, &[5, 4]);
    let gradient = |factor: f64| {
        let out =
            linear_cross_entropy(hidden.as_tensor(), &weight, &targets, CrossEntropy::default(), Path::Fused);
        let grads = (out.unwrap().loss * factor).unwrap().backward().unwrap();
        (grads.get(&hidden).unwrap() / factor).unwrap()
    };
    assert!(error(&gradient(4.0), &gradient(1.0)) < 1e-14);
}

#[test]
fn extreme_logits_stay_finite() {
    let hidden = Tensor::new(&[[1e4f32], [-1e4]], &Device::Cpu).unwrap();
    let weight = Tensor::new(&[[1f32], [-1.], [0.]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[0u32, 0], &Device::Cpu).unwrap();
    let hidden = Var::from_tensor(&hidden).unwrap();
    let out =
        linear_cross_entropy(hidden.as_tensor(), &weight, &targets, CrossEntropy::default(), Path::Fused)
            .unwrap();
    assert_eq!(out.loss.to_scalar::<f32>().unwrap(), 1e4); // (0 + 20 000) / 2
    assert_eq!(out.entropy.to_scalar::<f32>().unwrap(), 0.0);
    let grads = out.loss.backward().unwrap();
    let gradient = grads.get(&hidden).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(gradient, [[0.0], [-1.0]]);
}

#[test]
fn a_target_outside_the_vocabulary_is_refused() {
    for path in [Path::Fused, Path::Reference] {
        for target in [5, u32::MAX] {
            let targets = Tensor::new(&[0u32, target], &Device::Cpu).unwrap();
            let settings = CrossEntropy::default().with_ignore_index(1);
            let out =
                linear_cross_entropy(&random(1, &[2, 4]), &random(2, &[5, 4]), &targets, settings, path);
            let message = out.unwrap_err().to_string();
            let named = format!("target {target} of row 1");
            assert!(message.contains(&named) && message.contains("vocabulary of 5"), "{message}");
        }
    }
}

#[test]
fn signed_targets_below_zero_are_ignored_by_default() {
    let (hidden, weight) = (random(1, &[4, 3]), random(2, &[5, 3]));
    let loss = |targets: &Tensor, path| {
        let out = linear_cross_entropy(&hidden, &weight, targets, CrossEntropy::default(), path).unwrap();
        out.loss.to_scalar::<f64>().unwrap()
    };
    let signed = Tensor::new(&[2i64, -1, (1 << 32) + 1, 0], &Device::Cpu).unwrap();
    let plain = Tensor::new(&[2u32, u32::MAX, u32::MAX, 0], &Device::Cpu).unwrap();
    let expected = loss(&plain, Path::Fused);
    for path in [Path::Fused, Path::Reference] {
        assert!((loss(&signed, path) - expected).abs() < 1e-14);
    }
}

#[test]
fn f16_gradients_of_many_rows_keep_their_bits_under_a_loss_scale() {
    // Without the scale the gradients, about 1e-6, are subnormal in f16.
    let (n, vocab) = (4096, 7);
    let (hidden, weight, targets) = (random(1, &[n, 4]), random(2, &[vocab, 4]), targets(n, vocab as u32));
    let gradient = |dtype, factor: f64| {
        let hidden = Var::from_tensor(&hidden.to_dtype(dtype).unwrap()).unwrap();
        let weight = weight.to_dtype(dtype).unwrap();
        let settings = CrossEntropy::default();
        let out = linear_cross_entropy(hidden.as_tensor(), &weight, &targets, settings, Path::Fused).unwrap();
        let grads = (out.loss * factor).unwrap().backward().unwrap();
        (grads.get(&hidden).unwrap().to_dtype(DType::F64).unwrap() / factor).unwrap()
    };
    let exact = gradient(DType::F64, 1.0);
    let off = error(&gradient(DType::F16, 4096.0), &exact);
    assert!(off < 1e-3, "off by {off:e}");
}

#[test]
fn a_hidden_state_without_columns_is_refused() {
    let (hidden, weight) = (random(1, &[2, 0]), random(2, &[5, 0]));
    for path in [Path::Fused, Path::Reference] {
        let out = linear_cross_entropy(&hidden, &weight, &targets(2, 5), CrossEntropy::default(), path);
        assert!(out.unwrap_err().to_string().contains("no columns"));
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let targets = targets(300, 70);
        let (y, mut gradients) =
            value_and_gradients(&[random(1, &[300, 24]), random(2, &[70, 24])], DType::F32, |x| {
                Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), Path::Fused)?.loss)
            });
        gradients.push(y);
        gradients
    });
}
