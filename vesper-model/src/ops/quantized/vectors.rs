//! What the products of vectors with blocks share: the vectors, rounded to 8 bits, and the work of the threads.
//!
//! | instructions | 32 products |
//! |---|---|
//! | AVX-512 with VNNI | one instruction |
//! | AVX2 | two, by sums of pairs in 16 bits |

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;
use std::sync::OnceLock;

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

/// Values of a vector that share a scale.
pub(super) const BLOCK: usize = 32;
/// Rows of the weight that share what is read of a vector.
pub(super) const ROWS: usize = 4;

/// The product of some rows of a weight with vectors: rows, vectors, results (rows, vectors).
pub(super) type Rows = unsafe fn(&[u8], &Vectors, &mut [f32]);

/// The instructions of this processor, if it has what it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Avx2,
    Vnni,
}

pub(super) fn level() -> Option<Level> {
    static LEVEL: OnceLock<Option<Level>> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let vnni = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        match (avx2, vnni) {
            (true, true) => Some(Level::Vnni),
            (true, false) => Some(Level::Avx2),
            _ => None,
        }
    })
}

/// The product with blocks of a type, if this processor has the instructions and the type a product of ours.
pub(super) fn rows(dtype: GgmlDType) -> Option<Rows> {
    rows_of(dtype, level()?)
}

/// As [`rows`], by the instructions of a level that the processor has.
pub(super) fn rows_of(dtype: GgmlDType, level: Level) -> Option<Rows> {
    [super::q8_0::rows, super::q6_k::rows, super::q4_q5::rows, super::q4_k_q5_k::rows]
        .iter()
        .find_map(|of| of(dtype, level))
}

/// Vectors rounded to blocks of 8 bits.
pub(super) struct Vectors {
    values: Vec<i8>,
    /// One a block.
    scales: Vec<f32>,
    /// The sum of a block's rounded values, times its scale.
    sums: Vec<f32>,
    pub(super) count: usize,
    /// Blocks in a vector.
    pub(super) width: usize,
}

/// One of them.
pub(super) struct Vector<'a> {
    pub(super) values: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [f32],
}

impl Vectors {
    /// `count` vectors after each other, whose length is a multiple of a block.
    pub(super) fn new(x: &[f32], count: usize) -> Self {
        let mut values = Vec::with_capacity(x.len());
        let mut scales = Vec::with_capacity(x.len() / BLOCK);
        let mut sums = Vec::with_capacity(x.len() / BLOCK);
        for block in x.chunks_exact(BLOCK) {
            let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
            let (scale, inverse) = if most > 0.0 { (most / 127.0, 127.0 / most) } else { (0.0, 0.0) };
            // A value that is no number makes the result none, as it would in f32.
            let broken = block.iter().any(|value| !value.is_finite());
            let scale = if broken { f32::NAN } else { scale };
            let start = values.len();
            values.extend(block.iter().map(|value| (value * inverse).round_ties_even() as i8));
            let sum: i32 = values[start..].iter().map(|&value| i32::from(value)).sum();
            scales.push(scale);
            sums.push(scale * sum as f32);
        }
        Self { width: scales.len() / count.max(1), values, scales, sums, count }
    }

    pub(super) fn vector(&self, i: usize) -> Vector<'_> {
        let (values, blocks) = (self.width * BLOCK, self.width);
        Vector {
            values: &self.values[i * values..][..values],
            scales: &self.scales[i * blocks..][..blocks],
            sums: &self.sums[i * blocks..][..blocks],
        }
    }
}

/// `out[row][vector] = row . vector`, by all threads; a row has `row` bytes, and `step` rows are a task.
pub(super) fn multiply(
    rows: Rows,
    (weight, row): (&[u8], usize),
    vectors: &Vectors,
    step: usize,
    out: &mut [f32],
) {
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

/// For four rows `$each` of a weight, `$row` bytes each, and each `$vector`: `$body` adds to `$sums`, eight parts of the product of
/// a row each, which become the results. Where there are fewer than four rows, the last one is there again.
///
/// (A macro, because a closure of such instructions costs a tenth of the time.)
macro_rules! in_fours {
    ($weight:expr, $row:expr, $vectors:expr, $out:expr, |$each:ident, $vector:ident, $sums:ident| $body:block) => {
        let (row, vectors) = ($row, $vectors);
        for (rows, out) in $weight.chunks(ROWS * row).zip($out.chunks_mut(ROWS * vectors.count)) {
            let count = rows.len() / row;
            let at = |i: usize| &rows[i.min(count - 1) * row..][..row];
            let $each = [at(0), at(1), at(2), at(3)];
            for i in 0..vectors.count {
                let $vector = vectors.vector(i);
                let mut $sums = [_mm256_setzero_ps(); ROWS];
                $body
                for (r, sum) in $sums.into_iter().enumerate().take(count) {
                    out[r * vectors.count + i] = total(sum);
                }
            }
        }
    };
}
pub(super) use in_fours;

/// Asks for the memory `ahead` bytes after the beginning of a block, which may be behind the end of the weight: four rows at a
/// time are no pattern that a processor foresees.
#[inline(always)]
pub(super) fn ask_for(block: &[u8], ahead: usize) {
    // SAFETY: a hint, of any address; every x86-64 has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(ahead).cast()) }
}

/// A number in f16, eight times in f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn everywhere(bytes: &[u8]) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes([bytes[0], bytes[1]])))
}

/// The sums of four products each of x, without signs, and y, with signs.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
pub(super) fn dot_vnni(x: __m256i, y: __m256i) -> __m256i {
    _mm256_dpbusd_epi32(_mm256_setzero_si256(), x, y)
}

/// As [`dot_vnni`], where no two neighbouring products together exceed 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dot_avx2(x: __m256i, y: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn total(sum: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)))
}
