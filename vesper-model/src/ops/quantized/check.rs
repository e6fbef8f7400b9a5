//! The tests of the products of vectors with blocks: every type of block by the instructions of every level that there is here.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::vectors::{BLOCK, Level, Vectors, level, multiply, rows_of};

/// The types with a product of ours.
const TYPES: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// The levels that this processor has.
fn levels() -> Vec<Level> {
    match level() {
        None => vec![],
        Some(Level::Avx2) => vec![Level::Avx2],
        Some(Level::Vnni) => vec![Level::Avx2, Level::Vnni],
    }
}

/// Rows of blocks in which every byte takes every value (so -128 too, whose absolute value is no i8), but for the numbers
/// in f16, which stay small.
fn blocks(dtype: GgmlDType, n: usize, width: usize) -> QTensor {
    let bytes = dtype.type_size();
    let halves: &[usize] = match dtype {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q6K => &[208],
        _ => &[0, 2],
    };
    let mut data: Vec<u8> = (0..n * width * bytes).map(|i| (i * 91 + i / 256 * 37) as u8).collect();
    for (b, block) in data.chunks_exact_mut(bytes).enumerate() {
        for (i, &half) in halves.iter().enumerate() {
            let sign = if b % 3 == 1 { -1.0 } else { 1.0 };
            let value = half::f16::from_f32(sign * (0.01 + (b % 7 + 2 * i) as f32 * 0.003));
            block[half..half + 2].copy_from_slice(&value.to_bits().to_le_bytes());
        }
    }
    let storage = QStorage::from_data(Cow::Owned(data), &Device::Cpu, dtype).unwrap();
    QTensor::new(storage, (n, width * dtype.block_size())).unwrap()
}

#[test]
fn every_level_gives_the_product_of_the_rounded_values() {
    for dtype in TYPES {
        for shape in [(1, 1, 1), (3, 5, 2), (4, 22, 1), (13, 8, 3), (70, 3, 8), (200, 1, 1)] {
            product(dtype, shape);
        }
    }
}

/// The product of `n` rows of `width` blocks with `count` vectors, as they are rounded.
fn product(dtype: GgmlDType, (n, width, count): (usize, usize, usize)) {
    let w = blocks(dtype, n, width);
    let values = w.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
    let length = width * dtype.block_size();
    let x: Vec<f32> = (0..count * length).map(|i| ((i * 13 % 101) as f32 - 50.0) / 9.0).collect();
    let vectors = Vectors::new(&x, count);
    for level in levels() {
        let mut out = vec![f32::NAN; n * count];
        let data = w.data().unwrap();
        let rows = rows_of(dtype, level).unwrap();
        multiply(rows, (&data, width * dtype.type_size()), &vectors, 8, &mut out);
        for (row, values) in values.iter().enumerate() {
            for i in 0..count {
                let own = vectors.vector(i);
                let products = values.iter().enumerate().map(|(j, value)| {
                    f64::from(*value) * f64::from(own.values[j]) * f64::from(own.scales[j / BLOCK])
                });
                let (exact, size) =
                    products.fold((0.0, 0.0), |(sum, size), p: f64| (sum + p, size + p.abs()));
                let got = f64::from(out[row * count + i]);
                assert!((got - exact).abs() <= 1e-6 * size, "{dtype:?} {level:?}: {got} for {exact}");
            }
        }
    }
}

/// A vector with a value that is no number has no product.
#[test]
fn what_is_no_number_stays_none() {
    for dtype in TYPES {
        let w = blocks(dtype, 2, 2);
        let data = w.data().unwrap();
        for (level, value) in
            levels().into_iter().flat_map(|level| [(level, f32::NAN), (level, f32::INFINITY)])
        {
            let mut x = vec![1.0; 2 * dtype.block_size()];
            x[40] = value;
            let mut out = vec![0.0; 2];
            let rows = rows_of(dtype, level).unwrap();
            multiply(rows, (&data, 2 * dtype.type_size()), &Vectors::new(&x, 1), 4, &mut out);
            assert!(out.iter().all(|value| value.is_nan()), "{dtype:?} {level:?} {value}: {out:?}");
        }
    }
}
