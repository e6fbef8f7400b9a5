use candle_core::{DType, Device, Tensor, Var};
use vesper_model::ops::{Path, Philox, dropout};

use crate::common::{
    finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

const RANDOM: Philox = Philox { seed: 42, offset: 7 };

fn ones(n: usize) -> Tensor {
    Tensor::ones(n, DType::F32, &Device::Cpu).unwrap()
}

fn drop_ones(n: usize, p: f64, random: Philox) -> Vec<f32> {
    dropout(&ones(n), p, random, Path::Fused).unwrap().to_vec1().unwrap()
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    for shape in [&[1][..], &[3, 17], &[2, 5, 33], &[1000, 40], &[0, 4]] {
        for p in [0.1, 0.5, 0.9] {
            parity("dropout", &[random(1, shape)], |x, fused| dropout(&x[0], p, RANDOM, path(fused)));
        }
    }
}

#[test]
fn gradient_equals_finite_differences() {
    finite_differences("dropout", &[random(1, &[9, 5])], |x| dropout(&x[0], 0.3, RANDOM, Path::Fused));
}

#[test]
fn strided_inputs_are_read_rightly() {
    parity("dropout strided", &[random(1, &[6, 9])], |x, fused| {
        dropout(&x[0].t()?.narrow(0, 2, 5)?, 0.4, RANDOM, path(fused))
    });
}

#[test]
fn the_probability_and_the_mean_are_kept() {
    let n = 200_000;
    for p in [0.01, 0.25, 0.8] {
        let y = drop_ones(n, p, RANDOM);
        let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
        let deviation = (p * (1.0 - p) / n as f64).sqrt();
        assert!((dropped - p).abs() < 5.0 * deviation, "p = {p}, but {dropped} were dropped");
        let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 5.0 * deviation / (1.0 - p), "p = {p}: mean {mean}");
    }
}

#[test]
fn nothing_and_everything_can_be_dropped() {
    let x = Var::from_tensor(&random(1, &[50])).unwrap();
    for fused in [true, false] {
        let same = dropout(x.as_tensor(), 0.0, RANDOM, path(fused)).unwrap();
        assert_eq!(same.to_vec1::<f64>().unwrap(), x.to_vec1::<f64>().unwrap());
        let none = dropout(x.as_tensor(), 1.0, RANDOM, path(fused)).unwrap();
        assert_eq!(none.to_vec1::<f64>().unwrap(), [0.0; 50]);
        let grads = none.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec1::<f64>().unwrap(), [0.0; 50]);
    }
}

#[test]
fn a_dropped_nan_is_zero() {
    let x = Tensor::full(f32::NAN, 64, &Device::Cpu).unwrap();
    let y = dropout(&x, 0.5, RANDOM, Path::Fused).unwrap().to_vec1::<f32>().unwrap();
    assert!(y.contains(&0.0) && y.iter().any(|y| y.is_nan()));
}

#[test]
fn a_factor_beyond_f16_makes_no_nan() {
    // 1 / (1 - p) is a million; the largest f16 is 65504.
    let x = Var::from_tensor(&(ones(100).to_dtype(DType::F16).unwrap() * 0.01).unwrap()).unwrap();
    for fused in [true, false] {
        let y = dropout(x.as_tensor(), 0.999_999, RANDOM, path(fused)).unwrap();
        assert_eq!(y.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [0.0; 100]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        let gradient = grads.get(&x).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(gradient.to_vec1::<f32>().unwrap(), [0.0; 100]);
    }
}

#[test]
fn seeds_and_offsets_give_other_masks_and_the_same_pair_the_same() {
    let mask = |seed, offset| drop_ones(4096, 0.5, Philox { seed, offset });
    assert_eq!(mask(1, 1), mask(1, 1));
    for other in [mask(2, 1), mask(1, 2), mask(1 << 40, 1), mask(1, 1 << 40)] {
        let same = mask(1, 1).iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((1850..2250).contains(&same), "{same} of 4096 agree");
    }
    // A longer tensor begins with the mask of a shorter one.
    assert_eq!(drop_ones(100_000, 0.5, RANDOM)[..777], drop_ones(777, 0.5, RANDOM)[..]);
}

#[test]
fn a_mask_stays_what_it_is() {
    // Words of philox4x32-10 with the key 42 and the counter (i / 4, 7), by tests/golden/philox.py.
    let kept: Vec<u8> = drop_ones(24, 0.5, RANDOM).into_iter().map(|y| (y > 0.0).into()).collect();
    assert_eq!(kept, GOLDEN);
}

const GOLDEN: [u8; 24] = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0];

#[test]
fn wrong_probabilities_are_refused() {
    for p in [-0.1, 1.1, f64::NAN] {
        let message = dropout(&ones(3), p, RANDOM, Path::Fused).unwrap_err().to_string();
        assert!(message.contains("0 to 1"), "{message}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let (y, mut gradients) = value_and_gradients(&[random(1, &[100, 999])], DType::F32, |x| {
            dropout(&x[0], 0.2, RANDOM, Path::Fused)
        });
        gradients.push(y);
        gradients
    });
}
