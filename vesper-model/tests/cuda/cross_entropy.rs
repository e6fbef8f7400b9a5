use candle_core::{DType, Tensor, Var};
use vesper_model::ops::{CrossEntropy, Path, linear_cross_entropy};

use crate::common::{error, gpu, ids, parity, random, runs, same_bits, to_f64, value_and_gradients};

#[test]
fn cross_entropy_equals_its_reference() {
    let Some((_lock, device)) = gpu("cross_entropy_equals_its_reference") else { return };
    for (n, vocab, d) in
        [(1, 1, 1), (17, 5, 3), (70, 131, 8), (200, 32, 16), (3, 32_005, 4), (40, 32_005, 24)]
    {
        if !runs(n * vocab) {
            continue;
        }
        let targets = ids(n, vocab as u32);
        let inputs = [random(1, &[n, d]), random(2, &[vocab, d])];
        parity(&format!("cross-entropy {n} {vocab} {d}"), &device, &inputs, |x, path| {
            let targets = targets.to_device(x[0].device())?;
            Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), path)?.loss)
        });
        let entropy = |device, path| {
            let on = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
            let targets = targets.to_device(device).unwrap();
            let out = linear_cross_entropy(
                &on(&inputs[0]),
                &on(&inputs[1]),
                &targets,
                CrossEntropy::default(),
                path,
            );
            to_f64(&out.unwrap().entropy)
        };
        let off = error(&entropy(&device, Path::Fused), &entropy(&candle_core::Device::Cpu, Path::Reference));
        assert!(off < 1e-5, "entropy off by {off:e}");
    }
}

#[test]
fn rows_of_cross_entropy_may_have_any_shape() {
    let Some((_lock, device)) = gpu("rows_of_cross_entropy_may_have_any_shape") else { return };
    let inputs = [random(1, &[2, 3, 8]), random(2, &[5, 8])];
    parity("cross-entropy (2, 3)", &device, &inputs, |x, path| {
        let targets = ids(6, 5).reshape((2, 3))?.to_device(x[0].device())?;
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), path)?.loss)
    });
}

#[test]
fn many_rows_run_in_several_chunks() {
    let Some((_lock, device)) = gpu("many_rows_run_in_several_chunks") else { return };
    if !runs(5000 * 32_005) {
        return;
    }
    // 4096 rows a chunk.
    let targets = ids(5000, 32_005).to_device(&device).unwrap();
    let inputs = [random(1, &[5000, 8]), random(2, &[32_005, 8])];
    let run = |path| {
        value_and_gradients(&inputs, DType::F32, &device, |x| {
            Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), path)?.loss)
        })
        .unwrap()
    };
    let ((loss, gradients), (expected, expected_gradients)) = (run(Path::Fused), run(Path::Reference));
    assert!(error(&loss, &expected) < 1e-5);
    for (a, b) in gradients.iter().zip(&expected_gradients) {
        let off = error(a, b);
        println!("several chunks: gradient off by {off:.2e}");
        assert!(off < 2e-5);
    }
    same_bits("cross-entropy", &device, &inputs, |x| {
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, CrossEntropy::default(), Path::Fused)?.loss)
    });
}

#[test]
fn ignored_rows_count_neither_in_the_loss_nor_in_the_gradient() {
    let Some((_lock, device)) = gpu("ignored_rows_count_neither_in_the_loss_nor_in_the_gradient") else {
        return;
    };
    let settings = CrossEntropy::default().with_ignore_index(3);
    let targets = Tensor::new(&[1u32, 3, 0, 3, 2], &device).unwrap();
    let inputs = [random(1, &[5, 4]), random(2, &[6, 4])];
    parity("ignore", &device, &inputs, |x, path| {
        let targets = targets.to_device(x[0].device())?;
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path)?.loss)
    });
    let all = Tensor::new(&[3u32; 5], &device).unwrap();
    let (loss, gradients) = value_and_gradients(&inputs, DType::F32, &device, |x| {
        Ok(linear_cross_entropy(&x[0], &x[1], &all, settings, Path::Fused)?.loss)
    })
    .unwrap();
    for tensor in [&loss, &gradients[0], &gradients[1]] {
        assert_eq!(tensor.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap(), 0.0);
    }
}

#[test]
fn a_scaled_loss_scales_its_gradients() {
    let Some((_lock, device)) = gpu("a_scaled_loss_scales_its_gradients") else { return };
    let targets = ids(3, 5).to_device(&device).unwrap();
    let on = |x: Tensor| x.to_dtype(DType::F32).unwrap().to_device(&device).unwrap();
    let (hidden, weight) = (Var::from_tensor(&on(random(1, &[3, 4]))).unwrap(), on(random(2, &[5, 4])));
    let gradient = |factor: f64| {
        let out =
            linear_cross_entropy(hidden.as_tensor(), &weight, &targets, CrossEntropy::default(), Path::Fused);
        let grads = (out.unwrap().loss * factor).unwrap().backward().unwrap();
        (to_f64(grads.get(&hidden).unwrap()) / factor).unwrap()
    };
    assert!(error(&gradient(4.0), &gradient(1.0)) < 1e-7);
}

#[test]
fn extreme_logits_stay_finite() {
    let Some((_lock, device)) = gpu("extreme_logits_stay_finite") else { return };
    let hidden = Var::from_tensor(&Tensor::new(&[[1e4f32], [-1e4]], &device).unwrap()).unwrap();
    let weight = Tensor::new(&[[1f32], [-1.], [0.]], &device).unwrap();
    let targets = Tensor::new(&[0u32, 0], &device).unwrap();
    let out =
        linear_cross_entropy(hidden.as_tensor(), &weight, &targets, CrossEntropy::default(), Path::Fused)
            .unwrap();
    assert_eq!(out.loss.to_scalar::<f32>().unwrap(), 1e4); // (0 + 20 000) / 2
    assert_eq!(out.entropy.to_scalar::<f32>().unwrap(), 0.0);
    let grads = out.loss.backward().unwrap();
    assert_eq!(grads.get(&hidden).unwrap().to_vec2::<f32>().unwrap(), [[0.0], [-1.0]]);
}

/// Logits as masks leave them, and one so far above the others that its loss is 0.
#[test]
fn the_lowest_and_the_highest_logits_have_their_loss() {
    let Some((_lock, device)) = gpu("the_lowest_and_the_highest_logits_have_their_loss") else { return };
    let loss = |hidden: f32, weight: &[f32], dtype: DType| {
        let hidden = Tensor::new(&[[hidden]], &device).unwrap().to_dtype(dtype).unwrap();
        let weight = Tensor::new(weight, &device).unwrap().unsqueeze(1).unwrap().to_dtype(dtype).unwrap();
        let targets = Tensor::new(&[0u32], &device).unwrap();
        let out = linear_cross_entropy(&hidden, &weight, &targets, CrossEntropy::default(), Path::Fused);
        out.unwrap().loss.to_scalar::<f32>().unwrap()
    };
    // All of them the lowest number.
    assert!((loss(f32::MIN, &[1.0, 1.0, 1.0, 1.0], DType::F32) - 4f32.ln()).abs() < 1e-6);
    // Many of the lowest before the highest: their sum is not a number of f32.
    let mut weight = vec![-1.0; 9000];
    weight[0] = 0.0;
    assert!((loss(f32::MAX, &weight, DType::F32)).abs() < 1e-6);
    weight[8999] = 0.0;
    assert!((loss(f32::MAX, &weight, DType::F32) - 2f32.ln()).abs() < 1e-6);
    for (dtype, top) in [(DType::F32, 1e30), (DType::BF16, 1e6), (DType::F16, 6e4)] {
        assert!(loss(top, &[1.0, 0.0, -1.0, 0.5], dtype).abs() < 1e-6, "{dtype:?}");
    }
}

#[test]
fn a_target_outside_the_vocabulary_makes_the_loss_nan() {
    let Some((_lock, device)) = gpu("a_target_outside_the_vocabulary_makes_the_loss_nan") else { return };
    let targets = Tensor::new(&[0u32, 5], &device).unwrap();
    let (hidden, weight) =
        (Tensor::ones((2, 4), DType::BF16, &device), Tensor::ones((5, 4), DType::BF16, &device));
    let out = linear_cross_entropy(
        &hidden.unwrap(),
        &weight.unwrap(),
        &targets,
        CrossEntropy::default(),
        Path::Fused,
    );
    assert!(out.unwrap().loss.to_scalar::<f32>().unwrap().is_nan());
}
