//! The product of a few vectors with blocks of 8 bits, four rows at a time: candle's goes row by row, and converts a scale by a
//! call each.

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, in_fours, total,
};

/// Bytes of a block: a scale in f16, then the values.
pub(super) const BYTES: usize = 2 + BLOCK;

pub(super) fn rows(level: Level) -> Rows {
    match level {
        Level::Avx2 => rows_avx2,
        Level::Vnni => rows_vnni,
    }
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident) => {
        #[target_feature(enable = $features)]
        fn $name(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let row = vectors.width * BYTES;
            in_fours!(weight, row, vectors, out, |each, vector, sums| {
                let Vector { values, scales, .. } = vector;
                for (b, (values, scale)) in values.chunks_exact(BLOCK).zip(scales).enumerate() {
                    // SAFETY: a chunk is 32 bytes long.
                    let y = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
                    let scale = _mm256_set1_ps(*scale);
                    for r in 0..ROWS {
                        let block = &each[r][b * BYTES..][..BYTES];
                        ask_for(block, ROWS * row);
                        let own = i16::from_le_bytes([block[0], block[1]]);
                        let own = _mm256_cvtph_ps(_mm_set1_epi16(own));
                        // SAFETY: a block is two bytes longer than 32.
                        let x = unsafe { _mm256_loadu_si256(block[2..].as_ptr().cast()) };
                        // One factor without its sign, the other with the sign of both.
                        let sum = $sum(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
                        sums[r] =
                            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(own, scale), sums[r]);
                    }
                }
            });
        }
    };
}

product!(rows_vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", dot_vnni);
product!(rows_avx2, "avx2,fma,f16c", dot_avx2);

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::vectors::{level, multiply};
    use super::*;

    fn blocks(rows: usize, width: usize) -> (Vec<u8>, Vec<f64>) {
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        for b in 0..rows * width {
            let scale = f16::from_f32(0.01 + (b % 7) as f32 * 0.003);
            bytes.extend_from_slice(&scale.to_bits().to_le_bytes());
            for i in 0..BLOCK {
                // With -128, whose absolute value is no i8.
                let value = ((b * 37 + i * 91) % 256) as u8 as i8;
                bytes.push(value as u8);
                values.push(f64::from(value) * f64::from(scale.to_f32()));
            }
        }
        (bytes, values)
    }

    #[test]
    fn every_level_gives_the_product_of_the_rounded_values() {
        let levels: Vec<Rows> = match level() {
            None => vec![],
            Some(Level::Avx2) => vec![rows_avx2],
            Some(Level::Vnni) => vec![rows_avx2, rows_vnni],
        };
        for (n, width, count) in [(1, 1, 1), (3, 5, 2), (4, 22, 1), (13, 8, 3), (200, 5, 8)] {
            let (bytes, values) = blocks(n, width);
            let x: Vec<f32> =
                (0..count * width * BLOCK).map(|i| ((i * 13 % 101) as f32 - 50.0) / 9.0).collect();
            let vectors = Vectors::new(&x, count);
            for rows in &levels {
                let mut out = vec![f32::NAN; n * count];
                multiply(*rows, (&bytes, width * BYTES), &vectors, 8, &mut out);
                for row in 0..n {
                    for i in 0..count {
                        let Vector { values: own, scales, .. } = vectors.vector(i);
                        let exact: f64 = (0..width * BLOCK)
                            .map(|j| {
                                values[row * width * BLOCK + j]
                                    * f64::from(own[j])
                                    * f64::from(scales[j / BLOCK])
                            })
                            .sum();
                        let got = f64::from(out[row * count + i]);
                        assert!((got - exact).abs() < 1e-3 * (1.0 + exact.abs()), "{got} for {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let Some(rows) = level().map(rows) else { return };
        let (bytes, _) = blocks(2, 2);
        for value in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 2 * BLOCK];
            x[40] = value;
            let mut out = vec![0.0; 2];
            multiply(rows, (&bytes, 2 * BYTES), &Vectors::new(&x, 1), 4, &mut out);
            assert!(out.iter().all(|value| value.is_nan()));
        }
    }
}
