//! The product of a few vectors with blocks of 256 values of 6 bits (`Q6_K`), four rows at a time.
//!
//! ```text
//! block: 128 bytes of lower halves; 64 bytes of upper quarters; 16 scales s of 8 bits, one to 16 values; d in f16
//! of 128 values: byte l of 64 has the lower halves of l and l + 64, byte l of 32 the upper quarters of l, l + 32, l + 64, l + 96
//! weight = d s (q - 32)
//! ```

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, everywhere, in_fours, total,
};

/// Parts of 32 values, and where in a block the upper quarters, the scales and d begin.
const PARTS: usize = 8;
const UPPER: usize = PARTS * BLOCK / 2;
const SCALES: usize = UPPER + PARTS * BLOCK / 4;
const D: usize = SCALES + 2 * PARTS;
const BYTES: usize = D + 2;

/// The product with blocks of a type, if they are such blocks.
pub(super) fn rows(dtype: GgmlDType, level: Level) -> Option<Rows> {
    match (dtype, level) {
        (GgmlDType::Q6K, Level::Avx2) => Some(rows_avx2),
        (GgmlDType::Q6K, Level::Vnni) => Some(rows_vnni),
        _ => None,
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8]) -> __m256i {
    let bytes = &bytes[..BLOCK];
    // SAFETY: 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The values q of part `j` of four: their lower halves and their upper quarters, with those of other parts.
#[inline]
#[target_feature(enable = "avx2")]
fn sixes(lower: __m256i, upper: __m256i, j: usize) -> __m256i {
    let lower = if j < 2 { lower } else { _mm256_srli_epi16(lower, 4) };
    let upper = _mm256_srl_epi16(upper, _mm_cvtsi32_si128(2 * j as i32));
    _mm256_or_si256(
        _mm256_and_si256(lower, _mm256_set1_epi8(0x0f)),
        _mm256_and_si256(_mm256_slli_epi16(upper, 4), _mm256_set1_epi8(0x30)),
    )
}

/// Eight scales, times eight numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn scaled(scales: &[u8], by: __m256) -> __m256 {
    let &[a, b, c, d, e, f, g, h] = scales else { return by };
    let bytes = i64::from_le_bytes([a, b, c, d, e, f, g, h]);
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes))), by)
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident) => {
        #[target_feature(enable = $features)]
        fn $name(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let row = vectors.width / PARTS * BYTES;
            let middle = _mm256_set1_epi8(32);
            let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            in_fours!(weight, row, vectors, out, |each, vector, sums| {
                let Vector { values, scales, .. } = vector;
                let blocks = values.chunks_exact(PARTS * BLOCK).zip(scales.chunks_exact(PARTS));
                for (b, (values, scales)) in blocks.enumerate() {
                    // SAFETY: a chunk has eight numbers.
                    let scales = unsafe { _mm256_loadu_ps(scales.as_ptr()) };
                    let mut ys = [_mm256_setzero_si256(); PARTS];
                    let mut middles = ys;
                    for (j, values) in values.chunks_exact(BLOCK).enumerate() {
                        // SAFETY: a chunk is 32 bytes long.
                        ys[j] = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
                        middles[j] = $sum(middle, ys[j]);
                    }
                    for r in 0..ROWS {
                        let block = &each[r][b * BYTES..][..BYTES];
                        (0..BYTES).step_by(64).for_each(|i| ask_for(block, ROWS * row + i));
                        let own = _mm256_mul_ps(everywhere(&block[D..]), scales);
                        let mut sum = sums[r];
                        for half in 0..2 {
                            let lower = &block[half * UPPER / 2..][..UPPER / 2];
                            let (first, second) = (load(lower), load(&lower[BLOCK..]));
                            let upper = load(&block[UPPER + half * BLOCK..]);
                            // The scales of the vector of four parts, each twice.
                            let of = _mm256_add_epi32(twice, _mm256_set1_epi32(4 * half as i32));
                            let of = _mm256_permutevar8x32_ps(own, of);
                            let factors = scaled(&block[SCALES + half * PARTS..][..PARTS], of);
                            for j in 0..4 {
                                let at = 4 * half + j;
                                let x = sixes(if j % 2 == 0 { first } else { second }, upper, j);
                                let part = _mm256_sub_epi32($sum(x, ys[at]), middles[at]);
                                // Values 0 to 15 in the lower four sums, with a scale of their own.
                                let (a, b) = (2 * j as i32, 2 * j as i32 + 1);
                                let factor = _mm256_permutevar8x32_ps(
                                    factors,
                                    _mm256_setr_epi32(a, a, a, a, b, b, b, b),
                                );
                                sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), factor, sum);
                            }
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
