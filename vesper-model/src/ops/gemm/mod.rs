//! Matrix products of f32 and bf16 values with sums in f32, by blocks that fit into the caches.
//!
//! `blocks` cuts a product into tiles and packs what they read, converting it on the way; a [`Kernel`] computes one tile:
//!
//! | level | instructions | multiplies | tile |
//! |---|---|---|---|
//! | [`Level::Avx512Bf16`] | AVX-512 with BF16 | pairs of bf16, both operands rounded to it | 8 x 48 |
//! | [`Level::Avx512`] | AVX-512 (F, BW, VL) | f32 | 8 x 48 |
//! | [`Level::Avx2`] | AVX2 and FMA | f32 | 6 x 16 |
//!
//! On other processors the crate `gemm` computes the product, of operands converted to f32.
//!
//! An element's additions run in an order that depends on the inner dimension alone: neither the number of threads nor
//! the other dimensions change a bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(test)]
mod tests;

use std::sync::Once;

use candle_core::DType;

use super::matrix::{Matrix, Target, Threads, by_crate};
use super::notice;

/// What the operands of a product are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Precision {
    /// The type of the computation: nothing is rounded.
    Full,
    /// bf16, where the processor multiplies bf16 faster than f32, otherwise nothing.
    Bf16,
}

/// Which instructions compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The crate `gemm`.
    Crate,
}

impl Precision {
    /// That of activations in `dtype`.
    pub(super) fn of(dtype: DType) -> Self {
        static ASKED: Once = Once::new();
        if dtype != DType::BF16 {
            return Self::Full;
        }
        ASKED.call_once(|| {
            if !Level::best(Self::Bf16).rounds() {
                notice::once("this processor has no products in bf16 (AVX512-BF16); they run in f32".into());
            }
        });
        Self::Bf16
    }
}

impl Level {
    /// All, the fastest first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Crate,
    ];

    /// Whether this processor has the instructions.
    fn is_there(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            };
            match self {
                Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                Self::Avx512 => avx512(),
                Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                Self::Crate => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        true
    }

    /// Whether the level rounds its operands to bf16.
    fn rounds(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The fastest one that this processor has.
    fn best(precision: Precision) -> Self {
        let fits = |level: &Self| (precision == Precision::Bf16 || !level.rounds()) && level.is_there();
        Self::ALL.iter().copied().find(fits).unwrap_or(Self::Crate)
    }
}

/// `c = a b` or `c += a b`, at the fastest level. The sizes fit, and none is 0.
pub(super) fn multiply(
    c: Target<'_, f32>,
    a: Matrix<'_, f32>,
    b: Matrix<'_, f32>,
    precision: Precision,
    threads: Threads,
) {
    multiply_at(Level::best(precision), c, a, b, threads);
}

/// As [`multiply`], at a level that this processor has.
fn multiply_at(level: Level, c: Target<'_, f32>, a: Matrix<'_, f32>, b: Matrix<'_, f32>, threads: Threads) {
    debug_assert!(level.is_there());
    match level {
        // SAFETY: `is_there` has seen the instructions that each kernel needs.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { blocks::multiply::<avx512::Bf16>(c, a, b, threads) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { blocks::multiply::<avx512::F32>(c, a, b, threads) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { blocks::multiply::<avx2::F32>(c, a, b, threads) },
        Level::Crate => {
            let (left, right) = (a.values.to_full(), b.values.to_full());
            by_crate(c, (a, &left), (b, &right), threads);
        }
    }
}

/// How the values of an operand lie in memory, seen as lanes (rows of the left operand, columns of the right one) of
/// `depth` values each.
#[cfg(target_arch = "x86_64")]
struct Lanes<E> {
    data: *const E,
    count: usize,
    depth: usize,
    lane_stride: usize,
    depth_stride: usize,
}

#[cfg(target_arch = "x86_64")]
impl<E: Element> Lanes<E> {
    /// # Safety
    /// `lane` and `depth` are below the counts, and the data is there.
    #[inline(always)]
    unsafe fn at(&self, lane: usize, depth: usize) -> *const E {
        // SAFETY: the caller's.
        unsafe { self.data.add(lane * self.lane_stride + depth * self.depth_stride) }
    }
}

/// The instructions that compute a tile of a product.
///
/// # Safety
/// `pack` writes `width * depth.div_ceil(GROUP)` elements and no more, `tile` the rows and columns that it is given.
#[cfg(target_arch = "x86_64")]
unsafe trait Kernel {
    /// Values that follow each other along the inner dimension in 32 bits.
    const GROUP: usize;
    /// The tile.
    const ROWS: usize;
    const COLS: usize;

    /// Packs at most `width` lanes: the first group of each lane, the second of each, and so on; 0 for lanes and depths
    /// that are not there.
    ///
    /// # Safety
    /// The processor has the instructions, `to` has room, and what `from` describes is there.
    unsafe fn pack<E: Element>(to: *mut u32, width: usize, from: &Lanes<E>);

    /// `c (rows x cols, rows `stride` apart) = a b` or `+=`, of `steps` groups.
    ///
    /// # Safety
    /// The processor has the instructions; `a` and `b` are packed panels of `ROWS` and `COLS` lanes with at least
    /// `steps` groups; `c` has room for `rows <= ROWS` by `cols <= COLS`, and nothing else touches it.
    unsafe fn tile(
        steps: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        size: (usize, usize),
        add: bool,
    );
}

/// A type that operands are stored in.
#[cfg(target_arch = "x86_64")]
trait Element: Copy + Send + Sync + avx512::Load + avx2::Load {
    fn to_f32(self) -> f32;
}

#[cfg(target_arch = "x86_64")]
impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

#[cfg(target_arch = "x86_64")]
impl Element for half::bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // A signaling NaN stays one, which the product makes quiet; half's own conversion is slower for its sake.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}
