//! LayerNorm, residual sums with their norm, dropout, and the terms of the cross-entropy.

use candle_core::{DType, Device, Result, Tensor};
use vesper_model::ops::{
    CrossEntropy, Path, Philox, dropout, layer_norm, linear_cross_entropy, residual_layer_norm,
    residual_rms_norm,
};

use crate::common::{
    brief, error, gpu, ids, parity, random, rows, runs, same_bits, to_f64, value_and_gradients,
};

/// Rows that divide into vectors, rows that do not, long rows.
const SHAPES: [&[usize]; 7] =
    [&[1, 1], &[3, 17], &[2, 5, 384], &[700, 768], &[9, 2048], &[4, 5000], &[3, 4099]];

fn inputs(shape: &[usize]) -> Vec<Tensor> {
    let d = &shape[shape.len() - 1..];
    vec![random(1, shape), random(2, shape), random(3, d), random(4, d)]
}

/// A function of both results.
fn both((sum, y): (Tensor, Tensor)) -> Result<Tensor> {
    (sum * 0.5)? + y
}

#[test]
fn layer_norm_equals_its_reference() {
    let Some((_lock, device)) = gpu("layer_norm_equals_its_reference") else { return };
    for shape in SHAPES.into_iter().filter(|shape| runs(shape.iter().product())) {
        parity(&format!("layer_norm {shape:?}"), &device, &inputs(shape)[1..], |x, path| {
            layer_norm(&x[0], &x[1], Some(&x[2]), 1e-1, path)
        });
        parity(&format!("layer_norm without bias {shape:?}"), &device, &inputs(shape)[1..3], |x, path| {
            layer_norm(&x[0], &x[1], None, 1e-1, path)
        });
    }
    let strided = [random(1, &[48, 6]), random(2, &[48]), random(3, &[48])];
    parity("layer_norm strided", &device, &strided, |x, path| {
        layer_norm(&x[0].t()?, &x[1], Some(&x[2]), 1e-5, path)
    });
    same_bits("layer_norm", &device, &inputs(&[rows(3000), 768])[1..], |x| {
        layer_norm(&x[0], &x[1], Some(&x[2]), 1e-5, Path::Fused)
    });
}

#[test]
fn rows_far_from_zero_keep_their_bits() {
    let Some((_lock, device)) = gpu("rows_far_from_zero_keep_their_bits") else { return };
    // In f32, 1000 is rounded to 6e-5: much more than what is left where the mean is subtracted. Rows in registers, wide
    // and not, and rows that are read again.
    for d in [33, 96, 1024, 5000] {
        let x = (random(1, &[9, d]) + 1000.0).unwrap().to_dtype(DType::F32).unwrap();
        let inputs = [x.to_dtype(DType::F64).unwrap(), random(2, &[d])];
        let norm = |path| move |x: &[Tensor]| layer_norm(&x[0], &x[1], None, 1e-5, path);
        let (y, gradients) = value_and_gradients(&inputs, DType::F32, &device, norm(Path::Fused)).unwrap();
        let (exact, exact_gradients) =
            value_and_gradients(&inputs, DType::F64, &Device::Cpu, norm(Path::Reference)).unwrap();
        assert!(error(&to_f64(&y), &exact) < 1e-6, "rows of {d}: {:e}", error(&to_f64(&y), &exact));
        for (gradient, exact) in gradients.iter().zip(&exact_gradients) {
            let off = error(&to_f64(gradient), exact);
            assert!(off < 1e-5, "rows of {d}: gradient off by {off:e}");
        }
        let same = Tensor::full(1000.1f32, (3, d), &device).unwrap();
        let ones = Tensor::ones(d, DType::F32, &device).unwrap();
        let y = layer_norm(&same, &ones, Some(&ones), 1e-5, Path::Fused).unwrap();
        assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), vec![1.0; 3 * d], "rows of {d}");
    }
}

#[test]
fn residual_norms_equal_their_references() {
    let Some((_lock, device)) = gpu("residual_norms_equal_their_references") else { return };
    for shape in SHAPES.into_iter().filter(|shape| runs(shape.iter().product())) {
        parity(&format!("residual_rms_norm {shape:?}"), &device, &inputs(shape)[..3], |x, path| {
            both(residual_rms_norm(&x[0], &x[1], &x[2], 1e-1, path)?)
        });
        parity(&format!("residual_layer_norm {shape:?}"), &device, &inputs(shape), |x, path| {
            both(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-1, path)?)
        });
    }
    same_bits("residual_layer_norm", &device, &inputs(&[rows(3000), 768]), |x| {
        both(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-5, Path::Fused)?)
    });
}

#[test]
fn dropout_has_the_mask_of_the_cpu() {
    let Some((_lock, device)) = gpu("dropout_has_the_mask_of_the_cpu") else { return };
    for shape in [&[1][..], &[3, 17], &[1000, 1023]] {
        if !runs(shape.iter().product()) {
            continue;
        }
        for p in [0.1, 0.5, 1.0] {
            let random_at = Philox { seed: 42 << 33 | 7, offset: 1 << 40 | 3 };
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = random(1, shape).to_dtype(dtype).unwrap();
                let list = |x: &Tensor| {
                    let y = dropout(x, p, random_at, Path::Fused).unwrap().to_device(&Device::Cpu).unwrap();
                    y.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()
                };
                assert_eq!(list(&x), list(&x.to_device(&device).unwrap()), "{shape:?} {p} {dtype:?}");
            }
            if p < 1.0 {
                parity(&format!("dropout {shape:?}"), &device, &[random(1, shape)], |x, path| {
                    dropout(&x[0], p, random_at, path)
                });
            }
        }
    }
}

#[test]
fn z_loss_and_label_smoothing_equal_their_reference() {
    let Some((_lock, device)) = gpu("z_loss_and_label_smoothing_equal_their_reference") else { return };
    let plain = CrossEntropy::default().with_ignore_index(3);
    let settings = [plain.with_z_loss(0.02), plain.with_label_smoothing(0.1)];
    for settings in [settings[0], settings[1], settings[0].with_label_smoothing(0.3)] {
        let wide = if brief() { (3, 32_005, 4) } else { (40, 32_005, 24) };
        for (n, vocab, d) in [(1, 1, 1), (17, 5, 3), (70, 131, 8), wide] {
            let targets = ids(n, vocab as u32);
            let inputs = [random(1, &[n, d]), random(2, &[vocab, d])];
            parity(&format!("{settings:?} {n} {vocab} {d}"), &device, &inputs, |x, path| {
                let targets = targets.to_device(x[0].device())?;
                Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path)?.loss)
            });
        }
    }
    let targets = ids(300, 131).to_device(&device).unwrap();
    same_bits("cross-entropy with terms", &device, &[random(1, &[300, 8]), random(2, &[131, 8])], |x| {
        let settings = settings[0].with_label_smoothing(0.1);
        Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, Path::Fused)?.loss)
    });
}
