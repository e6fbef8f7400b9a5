//! The product of a few vectors with blocks of 8 bits, four rows at a time: candle's goes row by row, and converts a scale by a
//! call each.

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::vectors::{
    BLOCK, Level, ROWS, Rows, Vector, Vectors, ask_for, dot_avx2, dot_vnni, everywhere, in_fours, total,
};

/// Bytes of a block: a scale in f16, then the values.
const BYTES: usize = 2 + BLOCK;

/// The product with blocks of a type, if they are such blocks.
pub(super) fn rows(dtype: GgmlDType, level: Level) -> Option<Rows> {
    match (dtype, level) {
        (GgmlDType::Q8_0, Level::Avx2) => Some(rows_avx2),
        (GgmlDType::Q8_0, Level::Vnni) => Some(rows_vnni),
        _ => None,
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
                        // SAFETY: a block is two bytes longer than 32.
                        let x = unsafe { _mm256_loadu_si256(block[2..].as_ptr().cast()) };
                        // One factor without its sign, the other with the sign of both.
                        let sum = $sum(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
                        sums[r] = _mm256_fmadd_ps(
                            _mm256_cvtepi32_ps(sum),
                            _mm256_mul_ps(everywhere(block), scale),
                            sums[r],
                        );
                    }
                }
            });
        }
    };
}

product!(rows_vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", dot_vnni);
product!(rows_avx2, "avx2,fma,f16c", dot_avx2);
