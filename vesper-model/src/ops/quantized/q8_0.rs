//! The product of a few vectors with blocks of 8 bits, four rows at a time: candle's goes row by row, and converts a scale by a
//! call each.
//!
//! | instructions | 32 products |
//! |---|---|
//! | AVX-512 with VNNI | one instruction |
//! | AVX2 | two, by sums of pairs in 16 bits: of 127 * 127 twice, they fit |

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;
use std::sync::OnceLock;

use rayon::prelude::*;

/// Values in a block, and its bytes: a scale in f16, then the values.
const BLOCK: usize = 32;
const BYTES: usize = 2 + BLOCK;
/// Rows of the weight that share what is read of a vector.
const ROWS: usize = 4;

/// The product of some rows of a weight with vectors: rows, vectors, values in a row, results (rows, vectors).
type Rows = unsafe fn(&[u8], &Vectors, &mut [f32]);

/// How this processor multiplies, if it has what it takes.
pub(super) fn rows() -> Option<Rows> {
    static ROWS: OnceLock<Option<Rows>> = OnceLock::new();
    *ROWS.get_or_init(|| {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let vnni = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl");
        match (avx2, vnni) {
            (true, true) => Some(rows_vnni as Rows),
            (true, false) => Some(rows_avx2 as Rows),
            _ => None,
        }
    })
}

/// Vectors rounded to blocks of 8 bits.
pub(super) struct Vectors {
    values: Vec<i8>,
    /// One a block.
    scales: Vec<f32>,
    count: usize,
    /// Blocks in a vector.
    width: usize,
}

impl Vectors {
    /// `count` vectors after each other, whose length is a multiple of a block.
    pub(super) fn new(x: &[f32], count: usize) -> Self {
        let mut values = Vec::with_capacity(x.len());
        let mut scales = Vec::with_capacity(x.len() / BLOCK);
        for block in x.chunks_exact(BLOCK) {
            let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
            let (scale, inverse) = if most > 0.0 { (most / 127.0, 127.0 / most) } else { (0.0, 0.0) };
            // A value that is no number makes the result none, as it would in f32.
            let broken = block.iter().any(|value| !value.is_finite());
            scales.push(if broken { f32::NAN } else { scale });
            values.extend(block.iter().map(|value| (value * inverse).round_ties_even() as i8));
        }
        Self { width: scales.len() / count.max(1), values, scales, count }
    }

    fn vector(&self, i: usize) -> (&[i8], &[f32]) {
        let (values, scales) = (self.width * BLOCK, self.width);
        (&self.values[i * values..(i + 1) * values], &self.scales[i * scales..(i + 1) * scales])
    }
}

/// `out[row][vector] = row . vector`, by all threads; `step` rows are a task.
pub(super) fn multiply(rows: Rows, weight: &[u8], vectors: &Vectors, step: usize, out: &mut [f32]) {
    let row = vectors.width * BYTES;
    let step = step.next_multiple_of(ROWS);
    assert_eq!(weight.len() * vectors.count, out.len() * row, "rows of other lengths than the vectors");
    if row == 0 {
        return out.fill(0.0);
    }
    out.par_chunks_mut(step * vectors.count).zip(weight.par_chunks(step * row)).for_each(|(out, weight)| {
        // SAFETY: `rows` is one that this processor has.
        unsafe { rows(weight, vectors, out) }
    });
}

/// Up to four rows with each vector, by the sum of the products of 32 pairs, in eight parts.
macro_rules! product {
    ($name:ident, $features:literal, $sum:ident) => {
        #[target_feature(enable = $features)]
        fn $name(weight: &[u8], vectors: &Vectors, out: &mut [f32]) {
            let row = vectors.width * BYTES;
            for (rows, out) in weight.chunks(ROWS * row).zip(out.chunks_mut(ROWS * vectors.count)) {
                let count = rows.len() / row;
                // Where there are fewer than four, the last one is read again.
                let at = |i: usize| &rows[i.min(count - 1) * row..][..row];
                let each = [at(0), at(1), at(2), at(3)];
                for i in 0..vectors.count {
                    let (values, scales) = vectors.vector(i);
                    let mut sums = [_mm256_setzero_ps(); ROWS];
                    for (b, (values, scale)) in values.chunks_exact(BLOCK).zip(scales).enumerate() {
                        // SAFETY: a chunk is 32 bytes long.
                        let y = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
                        let scale = _mm256_set1_ps(*scale);
                        for r in 0..ROWS {
                            let block = &each[r][b * BYTES..][..BYTES];
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
                    for (r, sum) in sums.into_iter().enumerate().take(count) {
                        out[r * vectors.count + i] = total(sum);
                    }
                }
            }
        }
    };
}

product!(rows_vnni, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", dot_vnni);
product!(rows_avx2, "avx2,fma,f16c", dot_avx2);

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
fn dot_vnni(x: __m256i, y: __m256i) -> __m256i {
    _mm256_dpbusd_epi32(_mm256_setzero_si256(), x, y)
}

#[inline]
#[target_feature(enable = "avx2")]
fn dot_avx2(x: __m256i, y: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1))
}

#[inline]
#[target_feature(enable = "avx2")]
fn total(sum: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)))
}

#[cfg(test)]
mod tests {
    use half::f16;

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
        let mut levels: Vec<Rows> = Vec::new();
        if rows().is_some() {
            levels.push(rows_avx2);
            levels.extend(rows());
        }
        for (n, width, count) in [(1, 1, 1), (3, 5, 2), (4, 22, 1), (13, 8, 3), (200, 5, 8)] {
            let (bytes, values) = blocks(n, width);
            let x: Vec<f32> =
                (0..count * width * BLOCK).map(|i| ((i * 13 % 101) as f32 - 50.0) / 9.0).collect();
            let vectors = Vectors::new(&x, count);
            for rows in &levels {
                let mut out = vec![f32::NAN; n * count];
                multiply(*rows, &bytes, &vectors, 8, &mut out);
                for row in 0..n {
                    for i in 0..count {
                        let (own, scales) = vectors.vector(i);
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
        let Some(rows) = rows() else { return };
        let (bytes, _) = blocks(2, 2);
        for value in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 2 * BLOCK];
            x[40] = value;
            let mut out = vec![0.0; 2];
            multiply(rows, &bytes, &Vectors::new(&x, 1), 4, &mut out);
            assert!(out.iter().all(|value| value.is_nan()));
        }
    }
}
