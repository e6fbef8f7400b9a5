//! Stochastic rounding of f32 to bf16 and f16.
//!
//! A value between two neighbours of the narrow type goes to either of them, the more likely the nearer it is, so that
//! the expectation of the result is the value: updates of less than half a unit in the last place, which rounding to
//! nearest loses every time, arrive on average. (Gupta et al., arXiv 1502.02551.)
//!
//! # Random numbers
//! There is no generator and no state: the random number of an element is a hash of the seed, the step, the
//! parameter's index and the element's. Results depend neither on threads nor on how an array is cut, resumed runs go
//! on as they would have, and a GPU gets the same bits from the same formula. Everything is unsigned, of 32 bits, and
//! wraps around, but for `key`'s input of 64:
//!
//! ```text
//! mix(x)     x ^= x >> 16;  x *= 0x85ebca6b;  x ^= x >> 13;  x *= 0xc2b2ae35;  x ^= x >> 16
//! key        z = 0; for w in [seed, step, parameter]:  z = mix64(z + w + 0x9e3779b97f4a7c15);  key = z >> 32
//! mix64(z)   z ^= z >> 30;  z *= 0xbf58476d1ce4e5b9;  z ^= z >> 27;  z *= 0x94d049bb133111eb;  z ^= z >> 31
//! hash       i the element's index:  k = mix(key ^ (i >> 32));  mix(mix((i mod 2^32) + k) ^ key)
//! ```
//!
//! `mix` is MurmurHash3's finaliser and `mix64` SplitMix64's. Both are one-to-one, and so is the hash in the lower
//! half of i: over 2^32 elements each number comes up once.
//!
//! # Rounding
//! bf16 is the upper half of an f32: the upper half of the hash is added to the lower half of x's bits and the sum is
//! cut off, which carries into the upper half with a probability of (lower half) / 2^16, exactly.
//!
//! For f16, e = max(floor(log2 |x|), -14) and 2^(e - 10) is the distance between its neighbours there. With
//! y = |x| * 2^(10 - e), of which every operation is exact, q = floor(y) is one more where (hash >> 8) / 2^24 < y -
//! q. The magnitude's bits are (e + 14) * 1024 + q. The probability is exact but for |x| below 2^-14, where it is
//! rounded up to a multiple of 2^-24.
//!
//! Values that the narrow type has stay as they are, zeros with their sign, infinities and NaN (made quiet) too. A
//! finite value never becomes infinite: it ends at the largest finite value, 3.39e38 in bf16 and 65504 in f16.

use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// What the random numbers of one parameter in one step depend on.
pub(crate) fn key(seed: u64, step: u64, parameter: u64) -> u32 {
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let z = [seed, step, parameter]
        .into_iter()
        .fold(0u64, |z, word| mix(z.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15)));
    (z >> 32) as u32
}

/// Rounds to bf16; `offset` is the index of the first element in its parameter. Both slices have one length.
pub(crate) fn to_bf16(from: &[f32], to: &mut [bf16], key: u32, offset: usize) {
    let to = to.reinterpret_cast_mut();
    runs(from, to, offset, |from, to, i| pulp::Arch::new().dispatch(ToBf16 { from, to, key, i }));
}

/// Rounds to f16, as [`to_bf16`] does to bf16.
pub(crate) fn to_f16(from: &[f32], to: &mut [f16], key: u32, offset: usize) {
    let to = to.reinterpret_cast_mut();
    runs(from, to, offset, |from, to, i| pulp::Arch::new().dispatch(ToF16 { from, to, key, i }));
}

/// The same as f32, rounded to `dtype`; other types than bf16 and f16 are not rounded.
pub(crate) fn stochastic(values: &[f32], dtype: DType, key: u32, offset: usize) -> Vec<f32> {
    match dtype {
        DType::BF16 => {
            let mut rounded = vec![bf16::ZERO; values.len()];
            to_bf16(values, &mut rounded, key, offset);
            rounded.to_f32_vec()
        }
        DType::F16 => {
            let mut rounded = vec![f16::ZERO; values.len()];
            to_f16(values, &mut rounded, key, offset);
            rounded.to_f32_vec()
        }
        _ => values.to_vec(),
    }
}

/// Cuts arrays where the lower half of the index begins anew.
fn runs(mut from: &[f32], mut to: &mut [u16], offset: usize, f: impl Fn(&[f32], &mut [u16], u64)) {
    let mut i = offset as u64;
    while !from.is_empty() && !to.is_empty() {
        let left = (1u64 << 32) - (i & 0xffff_ffff);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(from.len()).min(to.len());
        let (head, tail) = from.split_at(len);
        let (head_to, tail_to) = to.split_at_mut(len);
        f(head, head_to, i);
        (from, to, i) = (tail, tail_to, i + len as u64);
    }
}

#[inline(always)]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

/// The hash of the element `lower`; `k` is mix(key ^ upper).
#[inline(always)]
fn hash(lower: u32, k: u32, key: u32) -> u32 {
    mix(mix(lower.wrapping_add(k)) ^ key)
}

#[inline(always)]
fn bf16_bits(x: f32, random: u32) -> u16 {
    let bits = x.to_bits();
    let sum = bits.wrapping_add(random >> 16);
    // A carry into the exponent of infinity is taken back.
    let is_too_large = sum & 0x7fff_ffff >= 0x7f80_0000;
    let rounded = if is_too_large { (bits & 0x8000_0000) | 0x7f7f_0000 } else { sum };
    let is_finite = bits & 0x7fff_ffff < 0x7f80_0000;
    let quiet = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x0040_0000 } else { bits };
    ((if is_finite { rounded } else { quiet }) >> 16) as u16
}

#[inline(always)]
fn f16_bits(x: f32, random: u32) -> u16 {
    let bits = x.to_bits();
    let (magnitude, sign) = (bits & 0x7fff_ffff, (bits >> 16) & 0x8000);
    // e + 127, at least that of 2^-14
    let exponent = (magnitude >> 23).max(113);
    // |x| * 2^(10 - e): below 2048, and exact
    let y = f32::from_bits(magnitude) * f32::from_bits((264 - exponent.min(254)) << 23);
    // Adding and taking away 2^23 rounds to an integer, to nearest; one above y is one too many.
    let nearest = (y + 8_388_608.0) - 8_388_608.0;
    let floor = if nearest > y { nearest - 1.0 } else { nearest };
    let part = (random >> 8) as i32 as f32 * (1.0 / 16_777_216.0);
    let q = if part < y - floor { floor + 1.0 } else { floor };
    // q as an integer, in the low bits of the sum
    let q = (q + 8_388_608.0).to_bits() & 0xfff;
    let rounded = ((exponent - 113) << 10) + q;
    let rounded = if rounded > 0x7bff { 0x7bff } else { rounded };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 | ((bits >> 13) & 0x3ff) } else { 0x7c00 };
    ((if magnitude < 0x7f80_0000 { rounded } else { special }) | sign) as u16
}

struct ToBf16<'a> {
    from: &'a [f32],
    to: &'a mut [u16],
    key: u32,
    i: u64,
}

// Not a closure: the compiler may leave a closure's call out of line, and with it out of the vector code.
impl pulp::WithSimd for ToBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let (lower, k) = (self.i as u32, mix(self.key ^ (self.i >> 32) as u32));
        for (j, (&x, to)) in self.from.iter().zip(self.to).enumerate() {
            *to = bf16_bits(x, hash(lower.wrapping_add(j as u32), k, self.key));
        }
    }
}

struct ToF16<'a> {
    from: &'a [f32],
    to: &'a mut [u16],
    key: u32,
    i: u64,
}

impl pulp::WithSimd for ToF16<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let (lower, k) = (self.i as u32, mix(self.key ^ (self.i >> 32) as u32));
        for (j, (&x, to)) in self.from.iter().zip(self.to).enumerate() {
            *to = f16_bits(x, hash(lower.wrapping_add(j as u32), k, self.key));
        }
    }
}

#[cfg(test)]
#[path = "rounding_tests.rs"]
mod tests;
