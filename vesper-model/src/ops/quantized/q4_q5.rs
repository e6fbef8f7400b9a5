//! The product of a few vectors with blocks of 32 values of 4 or 5 bits (`Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`), four rows at a time.
//!
//! ```text
//! block: d in f16; [m in f16;] [32 fifth bits;] 16 bytes, byte i with value i and, above it, value i + 16
//! weight = d q + m     without m: d (q - 8) of 4 bits, d (q - 16) of 5
//! ```

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, everywhere, in_fours, total,
};

/// The product with blocks of a type, if they are such blocks.
pub(super) fn rows(dtype: GgmlDType, level: Level) -> Option<Rows> {
    Some(match (dtype, level) {
        (GgmlDType::Q4_0, Level::Avx2) => rows_avx2::<false, false>,
        (GgmlDType::Q4_0, Level::Vnni) => rows_vnni::<false, false>,
        (GgmlDType::Q4_1, Level::Avx2) => rows_avx2::<false, true>,
        (GgmlDType::Q4_1, Level::Vnni) => rows_vnni::<false, true>,
        (GgmlDType::Q5_0, Level::Avx2) => rows_avx2::<true, false>,
        (GgmlDType::Q5_0, Level::Vnni) => rows_vnni::<true, false>,
        (GgmlDType::Q5_1, Level::Avx2) => rows_avx2::<true, true>,
        (GgmlDType::Q5_1, Level::Vnni) => rows_vnni::<true, true>,
        _ => return None,
    })
}

/// The values of 4 bits of 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn fours(bytes: &[u8]) -> __m256i {
    let bytes = &bytes[..BLOCK / 2];
    // SAFETY: 16 bytes.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(0x0f))
}

fn bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Values of 4 bits with their fifth.
#[inline]
#[target_feature(enable = "avx2")]
fn fives_avx2(fours: __m256i, bytes: &[u8]) -> __m256i {
    // Of every byte of bits eight copies, of which each keeps its own bit.
    let eights = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits(bytes) as i32), eights);
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
    _mm256_or_si256(fours, _mm256_and_si256(set, _mm256_set1_epi8(16)))
}

/// As [`fives_avx2`].
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw")]
fn fives_vnni(fours: __m256i, bytes: &[u8]) -> __m256i {
    _mm256_mask_add_epi8(fours, bits(bytes), fours, _mm256_set1_epi8(16))
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident, $fives:ident) => {
        #[target_feature(enable = $features)]
        fn $name<const FIVE: bool, const MINIMUM: bool>(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let (numbers, fifths) = (if MINIMUM { 4 } else { 2 }, if FIVE { 4 } else { 0 });
            let bytes = numbers + fifths + BLOCK / 2;
            let row = vectors.width * bytes;
            let middle = _mm256_set1_epi8(if FIVE { 16 } else { 8 });
            in_fours!(weight, row, vectors, out, |each, vector, sums| {
                let Vector { values, scales, sums: totals } = vector;
                let blocks = values.chunks_exact(BLOCK).zip(scales.iter().zip(totals));
                for (b, (values, (scale, total))) in blocks.enumerate() {
                    // SAFETY: a chunk is 32 bytes long.
                    let y = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
                    let scale = _mm256_set1_ps(*scale);
                    let middles = $sum(middle, y);
                    let eighth = _mm256_set1_ps(*total / 8.0);
                    for r in 0..ROWS {
                        let block = &each[r][b * bytes..][..bytes];
                        ask_for(block, ROWS * row);
                        let mut x = fours(&block[numbers + fifths..]);
                        if FIVE {
                            x = $fives(x, &block[numbers..]);
                        }
                        let mut sum = $sum(x, y);
                        if MINIMUM {
                            sums[r] = _mm256_fmadd_ps(everywhere(&block[2..]), eighth, sums[r]);
                        } else {
                            sum = _mm256_sub_epi32(sum, middles);
                        }
                        let factor = _mm256_mul_ps(everywhere(block), scale);
                        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, sums[r]);
                    }
                }
            });
        }
    };
}

product!(rows_vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512vnni", dot_vnni, fives_vnni);
product!(rows_avx2, "avx2,fma,f16c", dot_avx2, fives_avx2);
