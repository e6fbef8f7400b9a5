//! The product of a few vectors with blocks of 256 values of 4 bits (`Q4_K`), four rows at a time.
//!
//! ```text
//! block: d, dmin in f16; 8 scales s and 8 minima m of 6 bits; 256 values q of 4 bits, in 8 parts of 32
//! weight = d s q - dmin m     row . x = sum over parts of d s (q . x) - dmin m (sum of x)
//! ```
//!
//! candle's rounds x with one scale for 256 values; here each part has its own.

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, in_fours, total,
};

/// Parts of a block, and its bytes: d, dmin, scales and minima, values.
const PARTS: usize = 8;
pub(super) const BYTES: usize = 4 + 12 + PARTS * BLOCK / 2;

pub(super) fn rows(level: Level) -> Rows {
    match level {
        Level::Avx2 => rows_avx2,
        Level::Vnni => rows_vnni,
    }
}

/// The scales and the minima of a block, a byte each, from their 12 bytes.
#[inline(always)]
fn scales_and_minima(packed: &[u8]) -> (u64, u64) {
    let word = |i: usize| {
        u32::from_le_bytes([packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]])
    };
    let (a, b, c) = (word(0), word(1), word(2));
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
    let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
    (
        join(a & six, (c & four) | (((a >> 6) & two) << 4)),
        join(b & six, ((c >> 4) & four) | (((b >> 6) & two) << 4)),
    )
}

/// Eight bytes in f32.
#[inline]
#[target_feature(enable = "avx2")]
fn widened(bytes: u64) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)))
}

/// A number in f16, eight times in f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn everywhere(bytes: &[u8]) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([bytes[0], bytes[1]])))
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident) => {
        #[target_feature(enable = $features)]
        fn $name(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let row = vectors.width / PARTS * BYTES;
            let low = _mm256_set1_epi8(0x0f);
            in_fours!(weight, row, vectors, out, |each, vector, sums| {
                let Vector { values, scales, sums: totals } = vector;
                let parts = scales.chunks_exact(PARTS).zip(totals.chunks_exact(PARTS));
                for (b, (values, (scales, totals))) in
                    values.chunks_exact(PARTS * BLOCK).zip(parts).enumerate()
                {
                    // SAFETY: a chunk has eight numbers.
                    let scales = unsafe { _mm256_loadu_ps(scales.as_ptr()) };
                    // SAFETY: as above.
                    let totals = unsafe { _mm256_loadu_ps(totals.as_ptr()) };
                    for r in 0..ROWS {
                        let block = &each[r][b * BYTES..][..BYTES];
                        (0..BYTES).step_by(64).for_each(|i| ask_for(block, ROWS * row + i));
                        let (own, minima) = scales_and_minima(&block[4..16]);
                        let own = _mm256_mul_ps(everywhere(block), widened(own));
                        let minima = _mm256_mul_ps(everywhere(&block[2..]), widened(minima));
                        let factors = _mm256_mul_ps(own, scales);
                        let mut sum = _mm256_fnmadd_ps(minima, totals, sums[r]);
                        let pairs = block[16..].chunks_exact(BLOCK).zip(values.chunks_exact(2 * BLOCK));
                        for (j, (x, y)) in pairs.enumerate() {
                            // SAFETY: chunks of 32 and of 64 bytes.
                            let (x, y, z) = unsafe {
                                (
                                    _mm256_loadu_si256(x.as_ptr().cast()),
                                    _mm256_loadu_si256(y.as_ptr().cast()),
                                    _mm256_loadu_si256(y[BLOCK..].as_ptr().cast()),
                                )
                            };
                            let high = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
                            let part =
                                |j: usize| _mm256_permutevar8x32_ps(factors, _mm256_set1_epi32(j as i32));
                            let a = _mm256_cvtepi32_ps($sum(_mm256_and_si256(x, low), y));
                            let b = _mm256_cvtepi32_ps($sum(high, z));
                            sum = _mm256_fmadd_ps(a, part(2 * j), sum);
                            sum = _mm256_fmadd_ps(b, part(2 * j + 1), sum);
                        }
                        sums[r] = sum;
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
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::super::vectors::{level, multiply};
    use super::*;

    #[test]
    fn every_level_gives_the_product_of_the_rounded_values() {
        let levels: Vec<Rows> = match level() {
            None => vec![],
            Some(Level::Avx2) => vec![rows_avx2],
            Some(Level::Vnni) => vec![rows_avx2, rows_vnni],
        };
        for (n, blocks, count) in [(1, 1, 1), (3, 2, 2), (4, 3, 1), (13, 1, 3), (70, 4, 8)] {
            let width = blocks * PARTS * BLOCK;
            // Values of several sizes, most of them above 0, so that scales and minima differ.
            let value = |i: usize| {
                (((i * 7919 + (i * i) % 977) % 2003) as f32 / 1500.0 - 0.4) * (1 + i / 32 % 5) as f32
            };
            let w = Tensor::from_vec((0..n * width).map(value).collect(), (n, width), &Device::Cpu).unwrap();
            let w = QTensor::quantize(&w, GgmlDType::Q4K).unwrap();
            let values = w.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
            let x: Vec<f32> = (0..count * width).map(|i| ((i * 13 % 101) as f32 - 50.0) / 9.0).collect();
            let vectors = Vectors::new(&x, count);
            for rows in &levels {
                let mut out = vec![f32::NAN; n * count];
                multiply(*rows, (&w.data().unwrap(), blocks * BYTES), &vectors, 8, &mut out);
                for (row, values) in values.iter().enumerate() {
                    for i in 0..count {
                        let own = vectors.vector(i);
                        let products = values.iter().enumerate().map(|(j, value)| {
                            f64::from(*value) * f64::from(own.values[j]) * f64::from(own.scales[j / BLOCK])
                        });
                        let (exact, got) = (products.sum::<f64>(), f64::from(out[row * count + i]));
                        assert!((got - exact).abs() < 1e-3 * (1.0 + exact.abs()), "{got} for {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let Some(rows) = level().map(rows) else { return };
        let bytes = vec![1u8; 2 * BYTES];
        for value in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; PARTS * BLOCK];
            x[40] = value;
            let mut out = vec![0.0; 2];
            multiply(rows, (&bytes, BYTES), &Vectors::new(&x, 1), 4, &mut out);
            assert!(out.iter().all(|value| value.is_nan()));
        }
    }
}
