//! Tiles and packing with AVX-512, of f32 and of pairs of bf16.

#![allow(clippy::wildcard_imports)] // dozens of instructions

use std::arch::x86_64::*;

use half::bf16;

use super::{Element, Kernel, Lanes};

/// Rows of a tile, and vectors of 16 columns: 24 accumulators, of which each takes an instruction every 12 cycles on a
/// processor with two units, three times the latency.
const ROWS: usize = 8;
const VECTORS: usize = 3;
/// Values in a vector.
const WIDE: usize = 16;

/// The lowest `n` of 16 lanes, all for more.
#[inline(always)]
fn lowest(n: usize) -> __mmask16 {
    if n >= WIDE { !0 } else { (1 << n) - 1 }
}

/// As [`lowest`], of 32.
#[inline(always)]
fn lowest32(n: usize) -> __mmask32 {
    if n >= 2 * WIDE { !0 } else { (1 << n) - 1 }
}

/// Masked loads; lanes outside the mask are 0 and not read.
pub(super) trait Load: Sized {
    /// 16 values as f32, in bits.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL; the values of the mask are there.
    unsafe fn floats(from: *const Self, mask: __mmask16) -> __m512i;

    /// 16 values as bf16, in the lower halves of 32 bits each.
    ///
    /// # Safety
    /// Also AVX-512 BF16; the values of the mask are there.
    unsafe fn halves(from: *const Self, mask: __mmask16) -> __m512i;

    /// 32 values as bf16.
    ///
    /// # Safety
    /// Also AVX-512 BF16; the values of the mask are there.
    unsafe fn pairs(from: *const Self, mask: __mmask32) -> __m512i;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn floats(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn halves(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's; a vector of 16 bf16 has the size of one of 16 integers.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
            _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(rounded))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pairs(from: *const Self, mask: __mmask32) -> __m512i {
        // SAFETY: the caller's; the second half is read only where the mask has it.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as __mmask16, from);
            let high = _mm512_maskz_loadu_ps((mask >> WIDE) as __mmask16, from.wrapping_add(WIDE));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn floats(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's; bf16 is 16 bits, the upper ones of f32.
        unsafe { _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()))) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn halves(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pairs(from: *const Self, mask: __mmask32) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
    }
}

/// The transpose of 16 x 16 numbers of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(mut rows: [__m512i; WIDE]) -> [__m512i; WIDE] {
    // Pairs, then fours, of neighbours inside each quarter of the vectors; then the quarters.
    let mut next = rows;
    for i in 0..WIDE / 2 {
        next[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        next[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for i in 0..WIDE / 4 {
        rows[4 * i] = _mm512_unpacklo_epi64(next[4 * i], next[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(next[4 * i], next[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(next[4 * i + 1], next[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(next[4 * i + 1], next[4 * i + 3]);
    }
    // rows[4 g + j], quarter q: column 4 q + j of the rows 4 g .. 4 g + 4
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(rows[j], rows[4 + j]);
        let odd_low = _mm512_shuffle_i32x4::<0xdd>(rows[j], rows[4 + j]);
        let high = _mm512_shuffle_i32x4::<0x88>(rows[8 + j], rows[12 + j]);
        let odd_high = _mm512_shuffle_i32x4::<0xdd>(rows[8 + j], rows[12 + j]);
        next[j] = _mm512_shuffle_i32x4::<0x88>(low, high);
        next[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        next[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high);
        next[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high);
    }
    next
}

/// Body of [`Kernel::pack`] for groups of 32 bits. `$row` loads the groups of 16 neighbouring lanes at one step, `$lane`
/// 16 groups of one lane, `$one` a group.
macro_rules! pack {
    ($to:ident, $width:ident, $from:ident, $group:expr, $row:expr, $lane:expr, $one:expr) => {{
        let steps = $from.depth.div_ceil($group);
        if $from.lane_stride == 1 {
            for step in 0..steps {
                for lane in (0..$width).step_by(WIDE) {
                    let mask = lowest($from.count.saturating_sub(lane));
                    let group = $row(step, lane, mask);
                    store($to.add(step * $width + lane), group, $width - lane);
                }
            }
        } else if $from.depth_stride == 1 {
            for lane in (0..$width).step_by(WIDE) {
                for step in (0..steps).step_by(WIDE) {
                    let mut rows = [_mm512_setzero_si512(); WIDE];
                    for (i, row) in rows.iter_mut().enumerate() {
                        if lane + i < $from.count {
                            *row = $lane(step, lane + i, $from.depth - step * $group);
                        }
                    }
                    for (i, row) in transpose(rows).into_iter().enumerate() {
                        if step + i < steps {
                            store($to.add((step + i) * $width + lane), row, $width - lane);
                        }
                    }
                }
            }
        } else {
            for step in 0..steps {
                for lane in 0..$width {
                    let group = if lane < $from.count { $one(step, lane) } else { 0 };
                    $to.add(step * $width + lane).write(group);
                }
            }
        }
    }};
}

/// Writes the lowest `n` lanes, all for more.
///
/// # Safety
/// AVX-512 F, and room for them.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn store(to: *mut u32, lanes: __m512i, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        match n {
            8 => _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(lanes)),
            n if n >= WIDE => _mm512_storeu_si512(to.cast(), lanes),
            n => _mm512_mask_storeu_epi32(to.cast(), lowest(n), lanes),
        }
    }
}

/// Body of [`Kernel::tile`]: `$step(accumulator, group of the left operand, groups of the right one)`.
macro_rules! tile {
    ($steps:ident, $a:ident, $b:ident, $c:ident, $stride:ident, $size:ident, $add:ident, $step:expr) => {{
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut b) = ($a, $b);
        for _ in 0..$steps {
            let mut right = [_mm512_setzero_si512(); VECTORS];
            for j in 0..VECTORS {
                right[j] = _mm512_loadu_si512(b.add(j * WIDE).cast());
            }
            for i in 0..ROWS {
                let left = _mm512_set1_epi32(a.add(i).read().cast_signed());
                for j in 0..VECTORS {
                    sums[i][j] = $step(sums[i][j], left, right[j]);
                }
            }
            a = a.add(ROWS);
            b = b.add(VECTORS * WIDE);
        }
        let (rows, cols) = $size;
        if rows == ROWS && cols == VECTORS * WIDE {
            for i in 0..ROWS {
                for j in 0..VECTORS {
                    let to = $c.add(i * $stride + j * WIDE);
                    let sum = if $add { _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) } else { sums[i][j] };
                    _mm512_storeu_ps(to, sum);
                }
            }
        } else {
            for i in 0..ROWS {
                for j in 0..VECTORS {
                    if i < rows && j * WIDE < cols {
                        let (to, mask) = ($c.add(i * $stride + j * WIDE), lowest(cols - j * WIDE));
                        let sum = if $add {
                            _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[i][j])
                        } else {
                            sums[i][j]
                        };
                        _mm512_mask_storeu_ps(to, mask, sum);
                    }
                }
            }
        }
    }};
}

/// Pairs of bf16: two products and two additions in an instruction. Subnormal numbers count as 0, in what is read and
/// in what is added up.
pub(super) struct Bf16;

// SAFETY: `pack!` writes `width` groups a step, masked at the end; `tile!` the rows and columns of `size`.
unsafe impl Kernel for Bf16 {
    const GROUP: usize = 2;
    const ROWS: usize = ROWS;
    const COLS: usize = VECTORS * WIDE;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pack<E: Element>(to: *mut u32, width: usize, from: &Lanes<E>) {
        // SAFETY: lanes, depths and masks are below the counts of `from`.
        unsafe {
            pack!(
                to,
                width,
                from,
                2,
                |step: usize, lane: usize, mask| {
                    let low = E::halves(from.at(lane, 2 * step), mask);
                    let mask = if 2 * step + 1 < from.depth { mask } else { 0 };
                    let high = E::halves(from.at(lane, 2 * step).wrapping_add(from.depth_stride), mask);
                    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
                },
                |step: usize, lane, rest| E::pairs(from.at(lane, 2 * step), lowest32(rest)),
                |step: usize, lane| {
                    let half = |depth| {
                        if depth >= from.depth {
                            return 0;
                        }
                        u32::from(bf16::from_f32(from.at(lane, depth).read().to_f32()).to_bits())
                    };
                    half(2 * step) | half(2 * step + 1) << 16
                }
            );
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile(
        steps: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        size: (usize, usize),
        add: bool,
    ) {
        // SAFETY: the caller's; a vector of 32 bf16 has the size of one of 16 integers.
        unsafe {
            tile!(steps, a, b, c, stride, size, add, |sum, left, right| {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                _mm512_dpbf16_ps(sum, pairs(left), pairs(right))
            });
        }
    }
}

/// f32, by fused multiplication and addition.
pub(super) struct F32;

// SAFETY: as `Bf16`.
unsafe impl Kernel for F32 {
    const GROUP: usize = 1;
    const ROWS: usize = ROWS;
    const COLS: usize = VECTORS * WIDE;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pack<E: Element>(to: *mut u32, width: usize, from: &Lanes<E>) {
        // SAFETY: lanes, depths and masks are below the counts of `from`.
        unsafe {
            pack!(
                to,
                width,
                from,
                1,
                |step, lane, mask| E::floats(from.at(lane, step), mask),
                |step, lane, rest| E::floats(from.at(lane, step), lowest(rest)),
                |step, lane| from.at(lane, step).read().to_f32().to_bits()
            );
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn tile(
        steps: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        size: (usize, usize),
        add: bool,
    ) {
        // SAFETY: the caller's.
        unsafe {
            tile!(steps, a, b, c, stride, size, add, |sum, left, right| {
                _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum)
            });
        }
    }
}
