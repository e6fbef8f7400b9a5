//! The product of a few vectors with blocks of 256 values of 4 or 5 bits (`Q4_K`, `Q5_K`), four rows at a time.
//!
//! ```text
//! block: d, dmin in f16; 8 scales s and 8 minima m of 6 bits; [256 fifth bits, byte l with those of the values l of the 8
//!        parts;] 256 values q of 4 bits, in 8 parts of 32
//! weight = d s q - dmin m     row . x = sum over parts of d s (q . x) - dmin m (sum of x)
//! ```
//!
//! candle's rounds x with one scale for 256 values; here each part has its own.

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, everywhere, in_fours, total,
};

/// Parts of a block.
const PARTS: usize = 8;
/// Bytes of d, dmin, scales and minima.
const HEAD: usize = 4 + 12;

/// The product with blocks of a type, if they are such blocks.
pub(super) fn rows(dtype: GgmlDType, level: Level) -> Option<Rows> {
    Some(match (dtype, level) {
        (GgmlDType::Q4K, Level::Avx2) => rows_avx2::<false>,
        (GgmlDType::Q4K, Level::Vnni) => rows_vnni::<false>,
        (GgmlDType::Q5K, Level::Avx2) => rows_avx2::<true>,
        (GgmlDType::Q5K, Level::Vnni) => rows_vnni::<true>,
        _ => return None,
    })
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

/// Of the fifth bits, those of two parts, where they stand above 4 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn fifths(bits: __m256i, pair: usize) -> (__m256i, __m256i) {
    let bits = _mm256_srl_epi16(bits, _mm_cvtsi32_si128(2 * pair as i32));
    let sixteen = _mm256_set1_epi8(16);
    (
        _mm256_and_si256(_mm256_slli_epi16(bits, 4), sixteen),
        _mm256_and_si256(_mm256_slli_epi16(bits, 3), sixteen),
    )
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident) => {
        #[target_feature(enable = $features)]
        fn $name<const FIVE: bool>(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let values_at = if FIVE { HEAD + BLOCK } else { HEAD };
            let bytes = values_at + PARTS * BLOCK / 2;
            let row = vectors.width / PARTS * bytes;
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
                        let block = &each[r][b * bytes..][..bytes];
                        (0..bytes).step_by(64).for_each(|i| ask_for(block, ROWS * row + i));
                        let (own, minima) = scales_and_minima(&block[4..16]);
                        let own = _mm256_mul_ps(everywhere(block), widened(own));
                        let minima = _mm256_mul_ps(everywhere(&block[2..]), widened(minima));
                        let factors = _mm256_mul_ps(own, scales);
                        let mut sum = _mm256_fnmadd_ps(minima, totals, sums[r]);
                        let pairs =
                            block[values_at..].chunks_exact(BLOCK).zip(values.chunks_exact(2 * BLOCK));
                        let bits: &[u8] = if FIVE { &block[HEAD..][..BLOCK] } else { &[0; BLOCK] };
                        // SAFETY: 32 bytes.
                        let bits = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
                        for (j, (x, y)) in pairs.enumerate() {
                            // SAFETY: chunks of 32 and of 64 bytes.
                            let (x, y, z) = unsafe {
                                (
                                    _mm256_loadu_si256(x.as_ptr().cast()),
                                    _mm256_loadu_si256(y.as_ptr().cast()),
                                    _mm256_loadu_si256(y[BLOCK..].as_ptr().cast()),
                                )
                            };
                            let mut high = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
                            let mut x = _mm256_and_si256(x, low);
                            if FIVE {
                                let (a, b) = fifths(bits, j);
                                (x, high) = (_mm256_or_si256(x, a), _mm256_or_si256(high, b));
                            }
                            let part =
                                |j: usize| _mm256_permutevar8x32_ps(factors, _mm256_set1_epi32(j as i32));
                            let a = _mm256_cvtepi32_ps($sum(x, y));
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
