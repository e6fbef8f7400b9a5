//! The codec in vectors that look up eight values in registers: AVX2 and AVX-512.
//!
//! The same bits as [`portable`](super::portable), in half of the operations.
//!
//! # Reading
//! The decade of k is in its exponent as a float, and a code's value is a quotient of two integers that floats hold:
//!
//! ```text
//! value(k) = (9 k - 8 n_d + 9) / (10^(d+1) n_d)        n_d the power of two that k's exponent stands for
//! ```
//!
//! # Writing
//! Only the line of y's own decade is computed: the one that is the least, or at an end of the decade one that rounds
//! to the same code. Two binades hold one end of a decade at the most: the exponent of y says which, and a comparison
//! with it says on which side y is.

use super::codes::{Line, POWERS, SIGNED_LINES, SIGNED_TOP, UNSIGNED_LINES, UNSIGNED_TOP};
use super::level::Codec;
use pulp::x86::{V3, V4};
use pulp::{Simd, cast};

/// Elements that are converted at a time.
const GROUP: usize = 32;

#[derive(Clone, Copy)]
pub(super) struct Vectors<S>(pub(super) S);

impl<S: Lookup> Codec for Vectors<S> {
    #[inline(always)]
    fn write(self, values: &[f32], codes: &mut [u8], scale: f32, signed: bool) {
        if signed {
            write::<S, true>(self.0, values, codes, scale);
        } else {
            write::<S, false>(self.0, values, codes, scale);
        }
    }

    #[inline(always)]
    fn read(self, codes: &[u8], scale: f32, signed: bool, out: &mut [f32]) {
        if signed {
            read::<S, true>(self.0, codes, scale, out);
        } else {
            read::<S, false>(self.0, codes, scale, out);
        }
    }
}

/// What is needed of vectors beyond pulp's operations on all of them.
pub(super) trait Lookup: Simd {
    /// The values of a table at the low three bits of each index.
    fn lookup(self, table: &[f32; 8], index: Self::u32s) -> Self::f32s;
    /// The values of a table at the low four bits of each index, the others being 0; in the low bits of the result.
    fn lookup_small(self, table: &[u8; 16], index: Self::u32s) -> Self::u32s;
    /// i, and one more where y is below a bound.
    fn next_below(self, i: Self::u32s, y: Self::f32s, bound: Self::f32s) -> Self::u32s;
    /// Rounds to the nearest integers, ties to even: of [-128, 127] plus 128, or of [0, 255].
    fn pack_codes<const SIGNED: bool>(self, k: &[f32; GROUP]) -> [u8; GROUP];
    /// And back.
    fn unpack_codes<const SIGNED: bool>(self, codes: &[u8; GROUP]) -> [f32; GROUP];
}

/// 10^(d+1) n_d for each exponent of k, by its low three bits.
static SIGNED_DIVISORS: [f32; 8] = divisors(SIGNED_TOP);
static UNSIGNED_DIVISORS: [f32; 8] = divisors(UNSIGNED_TOP);

const fn divisors(top: usize) -> [f32; 8] {
    let mut divisors = [1.0; 8];
    let (mut d, mut n) = (0, top);
    while n > 0 {
        divisors[(127 + n.ilog2() as usize) % 8] = (10.0 * POWERS[d] * n as f64) as f32;
        d += 1;
        n /= 2;
    }
    if top == SIGNED_TOP {
        // Code 0 is k = -128 and stands for -1: 9 * 128 - 8 * 128 + 9 = 137.
        divisors[(127 + 7) % 8] = 137.0;
    }
    divisors
}

#[inline(always)]
fn read<S: Lookup, const SIGNED: bool>(simd: S, codes: &[u8], scale: f32, out: &mut [f32]) {
    let (groups, rest) = codes.as_chunks::<GROUP>();
    let (out_groups, out_rest) = out.as_chunks_mut::<GROUP>();
    for (codes, out) in groups.iter().zip(out_groups) {
        read_group::<S, SIGNED>(simd, codes, scale, out);
    }
    if !rest.is_empty() {
        let (mut codes, mut out) = ([0; GROUP], [0.0; GROUP]);
        codes[..rest.len()].copy_from_slice(rest);
        read_group::<S, SIGNED>(simd, &codes, scale, &mut out);
        out_rest.copy_from_slice(&out[..out_rest.len()]);
    }
}

#[inline(always)]
fn read_group<S: Lookup, const SIGNED: bool>(
    simd: S,
    codes: &[u8; GROUP],
    scale: f32,
    out: &mut [f32; GROUP],
) {
    *out = simd.unpack_codes::<SIGNED>(codes);
    let divisors = if SIGNED { &SIGNED_DIVISORS } else { &UNSIGNED_DIVISORS };
    let [exponent, sign, shift] = [0x7f80_0000, 0x8000_0000, 23].map(|x| simd.splat_u32s(x));
    let [eight, nine] = [-8.0, 9.0].map(|x| simd.splat_f32s(x));
    let scale = simd.splat_f32s(scale);
    for k in S::as_mut_simd_f32s(out).0 {
        let bits = simd.transmute_u32s_f32s(*k);
        let sign = simd.and_u32s(bits, sign);
        let power = simd.and_u32s(bits, exponent);
        let k_abs = if SIGNED { simd.abs_f32s(*k) } else { *k };
        let n = simd.transmute_f32s_u32s(power);
        let numerator = simd.mul_add_f32s(k_abs, nine, simd.mul_add_f32s(n, eight, nine));
        let divisor = simd.lookup(divisors, simd.wrapping_dyn_shr_u32s(power, shift));
        let value = simd.div_f32s(numerator, divisor);
        // 0 for k = 0, whose exponent is that of no decade; all others are at most 1.
        let value = simd.min_f32s(value, k_abs);
        let value = if SIGNED {
            simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(value), sign))
        } else {
            value
        };
        *k = simd.mul_f32s(value, scale);
    }
}

/// What codes are written by.
struct Decades {
    /// The decade of the upper end of each two binades, by the low four of the bits of y from the 24th on.
    of_binades: [u8; 16],
    /// The lower end of each decade.
    end: [f32; 8],
    slope: [f32; 8],
    offset: [f32; 8],
}

static SIGNED_DECADES: Decades = decades(&SIGNED_LINES);
static UNSIGNED_DECADES: Decades = decades(&UNSIGNED_LINES);

/// What is below goes the way of what is a little above.
const SMALLEST: f32 = 1.0 / (1u32 << 31) as f32;

const fn decades<const DECADES: usize>(lines: &[Line; DECADES]) -> Decades {
    let mut decades = Decades { of_binades: [0; 16], end: [0.0; 8], slope: [0.0; 8], offset: [0.0; 8] };
    let mut d = 0;
    while d < DECADES {
        decades.slope[d] = lines[d].slope;
        decades.offset[d] = lines[d].offset;
        if d + 1 < DECADES {
            decades.end[d] = (0.1 / POWERS[d]) as f32; // the last one ends at 0
        }
        d += 1;
    }
    // The uppermost: from 1/2 to 1.
    let (mut i, mut upper, mut d) = (16, 1.0, 0);
    while i > 0 {
        i -= 1;
        while d + 1 < DECADES && upper * POWERS[d + 1] <= 1.0 {
            d += 1;
        }
        decades.of_binades[i] = d as u8;
        upper = if i == 15 { 0.5 } else { upper / 4.0 };
    }
    decades
}

#[inline(always)]
fn write<S: Lookup, const SIGNED: bool>(simd: S, values: &[f32], codes: &mut [u8], scale: f32) {
    let (groups, rest) = values.as_chunks::<GROUP>();
    let (code_groups, code_rest) = codes.as_chunks_mut::<GROUP>();
    for (values, codes) in groups.iter().zip(code_groups) {
        *codes = write_group::<S, SIGNED>(simd, values, scale);
    }
    if !rest.is_empty() {
        let mut values = [0.0; GROUP];
        values[..rest.len()].copy_from_slice(rest);
        let codes = write_group::<S, SIGNED>(simd, &values, scale);
        code_rest.copy_from_slice(&codes[..code_rest.len()]);
    }
}

#[inline(always)]
fn write_group<S: Lookup, const SIGNED: bool>(simd: S, values: &[f32; GROUP], scale: f32) -> [u8; GROUP] {
    let decades = if SIGNED { &SIGNED_DECADES } else { &UNSIGNED_DECADES };
    let [zero, one, smallest] = [0.0, 1.0, SMALLEST].map(|x| simd.splat_f32s(x));
    let [sign, shift] = [0x8000_0000, 24].map(|x| simd.splat_u32s(x));
    let scale = simd.splat_f32s(scale);
    let mut k = [0.0; GROUP];
    let vectors = S::as_mut_simd_f32s(&mut k).0.iter_mut().zip(S::as_simd_f32s(values).0);
    for (k, &x) in vectors {
        let magnitude = if SIGNED { simd.abs_f32s(x) } else { simd.max_f32s(x, zero) };
        let y = simd.div_f32s(magnitude, scale);
        let clamped = simd.transmute_u32s_f32s(simd.max_f32s(y, smallest));
        let upper = simd.lookup_small(&decades.of_binades, simd.wrapping_dyn_shr_u32s(clamped, shift));
        let d = simd.next_below(upper, y, simd.lookup(&decades.end, upper));
        let rise = simd.mul_f32s(simd.lookup(&decades.slope, d), y);
        let index = simd.add_f32s(rise, simd.lookup(&decades.offset, d));
        *k = if SIGNED {
            let sign = simd.and_u32s(simd.transmute_u32s_f32s(x), sign);
            simd.transmute_f32s_u32s(simd.xor_u32s(simd.transmute_u32s_f32s(index), sign))
        } else {
            // At least 1 where x is positive.
            let least = simd.select_f32s(simd.greater_than_f32s(x, zero), one, zero);
            simd.max_f32s(index, least)
        };
    }
    simd.pack_codes::<SIGNED>(&k)
}

impl Lookup for V3 {
    #[inline(always)]
    fn lookup(self, table: &[f32; 8], index: Self::u32s) -> Self::f32s {
        cast(self.avx2._mm256_permutevar8x32_ps(cast(*table), cast(index)))
    }

    #[inline(always)]
    fn lookup_small(self, table: &[u8; 16], index: Self::u32s) -> Self::u32s {
        // The upper three bytes of an index are 0.
        cast(self.avx2._mm256_shuffle_epi8(cast([*table; 2]), cast(index)))
    }

    #[inline(always)]
    fn next_below(self, i: Self::u32s, y: Self::f32s, bound: Self::f32s) -> Self::u32s {
        let below = self.less_than_f32s(y, bound); // all bits: -1
        self.sub_u32s(i, self.transmute_u32s_m32s(below))
    }

    #[inline(always)]
    fn pack_codes<const SIGNED: bool>(self, k: &[f32; GROUP]) -> [u8; GROUP] {
        let [a, b, c, d]: [pulp::f32x8; 4] = cast(*k);
        let pack = |a, b| {
            let [a, b] = [a, b].map(|x| self.avx._mm256_cvtps_epi32(cast(x)));
            self.avx2._mm256_packs_epi32(a, b)
        };
        let (ab, cd) = (pack(a, b), pack(c, d));
        let packed = if SIGNED {
            let packed = self.avx2._mm256_packs_epi16(ab, cd);
            self.avx2._mm256_xor_si256(packed, self.avx._mm256_set1_epi8(-128))
        } else {
            self.avx2._mm256_packus_epi16(ab, cd)
        };
        // Packing goes by halves of vectors.
        cast(self.avx2._mm256_permutevar8x32_epi32(packed, cast([0u32, 4, 1, 5, 2, 6, 3, 7])))
    }

    #[inline(always)]
    fn unpack_codes<const SIGNED: bool>(self, codes: &[u8; GROUP]) -> [f32; GROUP] {
        let eights: [[u8; 8]; 4] = cast(*codes);
        cast(eights.map(|eight| {
            let codes = cast([eight, [0; 8]]);
            let k = self.avx2._mm256_cvtepu8_epi32(codes);
            let k = if SIGNED { self.avx2._mm256_sub_epi32(k, self.avx._mm256_set1_epi32(128)) } else { k };
            self.avx._mm256_cvtepi32_ps(k)
        }))
    }
}

impl Lookup for V4 {
    #[inline(always)]
    fn lookup(self, table: &[f32; 8], index: Self::u32s) -> Self::f32s {
        cast(self.avx512f._mm512_permutexvar_ps(cast(index), cast([*table; 2])))
    }

    #[inline(always)]
    fn lookup_small(self, table: &[u8; 16], index: Self::u32s) -> Self::u32s {
        cast(self.avx512bw._mm512_shuffle_epi8(cast([*table; 4]), cast(index)))
    }

    #[inline(always)]
    fn next_below(self, i: Self::u32s, y: Self::f32s, bound: Self::f32s) -> Self::u32s {
        let next = self.add_u32s(i, self.splat_u32s(1));
        self.select_u32s(self.less_than_f32s(y, bound), next, i)
    }

    #[inline(always)]
    fn pack_codes<const SIGNED: bool>(self, k: &[f32; GROUP]) -> [u8; GROUP] {
        let halves: [pulp::f32x16; 2] = cast(*k);
        let bytes = halves.map(|half| {
            let k = self.avx512f._mm512_cvtps_epi32(cast(half));
            let of_zero = self.avx512f._mm512_set1_epi32(if SIGNED { 128 } else { 0 });
            self.avx512f._mm512_cvtepi32_epi8(self.avx512f._mm512_add_epi32(k, of_zero))
        });
        cast(bytes)
    }

    #[inline(always)]
    fn unpack_codes<const SIGNED: bool>(self, codes: &[u8; GROUP]) -> [f32; GROUP] {
        let halves: [[u8; 16]; 2] = cast(*codes);
        cast(halves.map(|half| {
            let k = self.avx512f._mm512_cvtepu8_epi32(cast(half));
            let k = if SIGNED {
                self.avx512f._mm512_sub_epi32(k, self.avx512f._mm512_set1_epi32(128))
            } else {
                k
            };
            self.avx512f._mm512_cvtepi32_ps(k)
        }))
    }
}
