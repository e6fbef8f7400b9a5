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

/// f32, by fused multiplication and addition.
pub(super) struct F32;

// SAFETY: `pack` writes `width` numbers a step; `tile` the rows and columns of `size`.
unsafe impl Kernel for F32 {
    const GROUP: usize = 1;
    const ROWS: usize = ROWS;
    const COLS: usize = VECTORS * WIDE;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack<E: Element>(to: *mut u32, width: usize, from: &Lanes<E>) {
        /// Steps at a time, so that what is read and what is written both stay in the cache.
        const STEPS: usize = 16;
        let to: *mut f32 = to.cast();
        // SAFETY: lanes and depths are below the counts of `from`, places below `width * depth`.
        unsafe {
            if from.lane_stride == 1 {
                for step in 0..from.depth {
                    let (row, to) = (from.at(0, step), to.add(step * width));
                    for lane in 0..from.count {
                        to.add(lane).write(row.add(lane).read().to_f32());
                    }
                    for lane in from.count..width {
                        to.add(lane).write(0.0);
                    }
                }
                return;
            }
            for first in (0..from.depth).step_by(STEPS) {
                for lane in 0..width {
                    for step in first..from.depth.min(first + STEPS) {
                        let value = if lane < from.count { from.at(lane, step).read().to_f32() } else { 0.0 };
                        to.add(step * width + lane).write(value);
                    }
                }
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
