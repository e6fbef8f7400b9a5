//! Tiles and packing with AVX2 and FMA.

#![allow(clippy::wildcard_imports)] // dozens of instructions
#![allow(clippy::needless_range_loop)] // registers, by their numbers

use std::arch::x86_64::*;

use super::{Element, Kernel, Lanes};

/// Rows of a tile, and vectors of 8 columns: 12 of the 16 registers are accumulators.
const ROWS: usize = 6;
const VECTORS: usize = 2;
/// Values in a vector.
const WIDE: usize = 8;
/// Columns of a tile.
const COLS: usize = VECTORS * WIDE;

/// A type that is read eight values at a time.
pub(super) trait Load: Copy {
    /// # Safety
    /// The processor has AVX2, and there are eight values.
    unsafe fn load(from: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Load for half::bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's.
        unsafe {
            let values = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(values))
        }
    }
}

/// Packs `N` lanes that follow each other in memory, step after step.
///
/// # Safety
/// As [`Kernel::pack`] of `N` lanes, all of which are there, with a stride of 1.
#[inline(always)]
unsafe fn copy<E: Element, const N: usize>(to: *mut f32, from: &Lanes<E>) {
    for step in 0..from.depth {
        // SAFETY: the caller's.
        unsafe {
            let (row, to) = (from.at(0, step), to.add(step * N));
            for lane in 0..N {
                to.add(lane).write(row.add(lane).read().to_f32());
            }
        }
    }
}

/// Packs lanes whose values follow each other along the depth, eight by eight.
///
/// # Safety
/// As [`Kernel::pack`], with a depth stride of 1.
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose<E: Element>(to: *mut f32, width: usize, from: &Lanes<E>) {
    let whole = from.depth / WIDE * WIDE;
    // SAFETY: loads are of eight depths of a lane that is there; a vector that would end behind the last step is cut.
    unsafe {
        for step in (0..whole).step_by(WIDE) {
            for lane in (0..width).step_by(WIDE) {
                let mut rows = [_mm256_setzero_ps(); WIDE];
                for i in 0..WIDE.min(from.count.saturating_sub(lane)) {
                    rows[i] = E::load(from.at(lane + i, step));
                }
                let rows = turned(rows);
                for i in 0..WIDE {
                    let place = (step + i) * width + lane;
                    if place + WIDE <= width * from.depth {
                        // What is over the width are places of the next step, which is written later.
                        _mm256_storeu_ps(to.add(place), rows[i]);
                    } else {
                        let mut last = [0f32; WIDE];
                        _mm256_storeu_ps(last.as_mut_ptr(), rows[i]);
                        to.add(place).copy_from_nonoverlapping(last.as_ptr(), width - lane);
                    }
                }
            }
        }
        one_by_one(to, width, from, whole);
    }
}

/// The columns of eight rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn turned(r: [__m256; WIDE]) -> [__m256; WIDE] {
    // Pairs, then fours of two rows in each half of a vector, then the halves.
    let low = |i: usize| _mm256_unpacklo_ps(r[i], r[i + 1]);
    let high = |i: usize| _mm256_unpackhi_ps(r[i], r[i + 1]);
    let pairs = [low(0), high(0), low(2), high(2), low(4), high(4), low(6), high(6)];
    let first = |a: usize, b: usize| _mm256_shuffle_ps::<0x44>(pairs[a], pairs[b]);
    let second = |a: usize, b: usize| _mm256_shuffle_ps::<0xee>(pairs[a], pairs[b]);
    let fours = [
        first(0, 2),
        second(0, 2),
        first(1, 3),
        second(1, 3),
        first(4, 6),
        second(4, 6),
        first(5, 7),
        second(5, 7),
    ];
    let front = |i: usize| _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
    let back = |i: usize| _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    [front(0), front(1), front(2), front(3), back(0), back(1), back(2), back(3)]
}

/// Packs lanes of any strides from step `start` on.
///
/// # Safety
/// As [`Kernel::pack`].
#[inline(always)]
unsafe fn one_by_one<E: Element>(to: *mut f32, width: usize, from: &Lanes<E>, start: usize) {
    for step in start..from.depth {
        for lane in 0..width {
            // SAFETY: lanes and depths are below the counts of `from`, places below `width * depth`.
            unsafe {
                let value = if lane < from.count { from.at(lane, step).read().to_f32() } else { 0.0 };
                to.add(step * width + lane).write(value);
            }
        }
    }
}

/// f32, by fused multiplication and addition.
pub(super) struct F32;

// SAFETY: `pack` writes `width` numbers a step; `tile` the rows and columns of `size`.
unsafe impl Kernel for F32 {
    const GROUP: usize = 1;
    const ROWS: usize = ROWS;
    const COLS: usize = COLS;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack<E: Element>(to: *mut u32, width: usize, from: &Lanes<E>) {
        let to: *mut f32 = to.cast();
        // SAFETY: the caller's; each takes lanes of strides, counts and widths as it says.
        unsafe {
            match (from.lane_stride, width) {
                (1, ROWS) if from.count == ROWS => copy::<E, ROWS>(to, from),
                (1, COLS) if from.count == COLS => copy::<E, COLS>(to, from),
                _ if from.depth_stride == 1 => transpose(to, width, from),
                _ => one_by_one(to, width, from, 0),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile(
        steps: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        (rows, cols): (usize, usize),
        add: bool,
    ) {
        let (mut a, mut b): (*const f32, *const f32) = (a.cast(), b.cast());
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
            for _ in 0..steps {
                let right = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(WIDE))];
                for i in 0..ROWS {
                    let left = _mm256_set1_ps(a.add(i).read());
                    for j in 0..VECTORS {
                        sums[i][j] = _mm256_fmadd_ps(left, right[j], sums[i][j]);
                    }
                }
                a = a.add(ROWS);
                b = b.add(VECTORS * WIDE);
            }
            if rows == ROWS && cols == VECTORS * WIDE {
                for i in 0..ROWS {
                    for j in 0..VECTORS {
                        let to = c.add(i * stride + j * WIDE);
                        let sum =
                            if add { _mm256_add_ps(_mm256_loadu_ps(to), sums[i][j]) } else { sums[i][j] };
                        _mm256_storeu_ps(to, sum);
                    }
                }
                return;
            }
            let mut whole = [0f32; ROWS * VECTORS * WIDE];
            for i in 0..ROWS {
                for j in 0..VECTORS {
                    _mm256_storeu_ps(whole.as_mut_ptr().add((i * VECTORS + j) * WIDE), sums[i][j]);
                }
            }
            for (i, row) in whole.chunks_exact(VECTORS * WIDE).enumerate().take(rows) {
                for (j, &sum) in row.iter().enumerate().take(cols) {
                    let to = c.add(i * stride + j);
                    to.write(if add { to.read() + sum } else { sum });
                }
            }
        }
    }
}
