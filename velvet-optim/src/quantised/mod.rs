//! 8-bit block-wise storage of optimizer state: 1 + 4/256 bytes an element.
//!
//! Elements are cut into blocks of 256. A block keeps its largest magnitude as an f32 scale, and each element as one
//! of 256 codes for x / scale, after Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv
//! 2110.02861).
//!
//! # The codes
//! Dynamic codes: decade d, the values in (10^-(d+1), 10^-d], has half as many codes as the one above it, evenly
//! spaced. With H = 127 magnitudes for signed values (first moments) and 255 for unsigned ones (second moments):
//!
//! ```text
//! n_d      = (H + 1) / 2^(d+1)                         codes in decade d: 64 (128), 32, .. 1; 7 (8) decades
//! value(0) = 0
//! value(k) = 10^-d * (0.1 + 0.9 * (k - n_d + 1) / n_d) for n_d <= k < 2 n_d;   value(H) = 1
//! unsigned   code k stands for value(k)
//! signed     code 128 + k for value(k) and 128 - k for -value(k); code 0 is never written and reads as -1
//! ```
//!
//! The paper puts codes in the middle of their intervals and 1 aside. Here they are at the upper ends, so that 1 and -1
//! are on the grid: a block's largest element is kept exactly, the scale of a block that was read back is the scale it
//! had, and quantising twice changes nothing.
//!
//! # Quantising
//! k(y) is piecewise linear between codes, and steeper the smaller y: a concave function, which is the least of its
//! pieces. So there is no search and no branch, and the loop becomes vector code:
//!
//! ```text
//! y = |x| / scale
//! k = round(min over d of (slope_d * y + offset_d))    slope_d = n_d / (0.9 * 10^-d), offset_d = n_d - 1 - n_d / 9
//!                                                      in the last decade, down to 0: slope 10^d, offset 0
//! ```
//!
//! in f32, every operation rounded once (no fused multiply-add), `round` to the nearest integer and ties to even: other
//! back ends that do the same get the same bits. It is the nearest code, but for values so close to the middle between
//! two that the rounding of k, 4e-5, decides.
//!
//! A positive unsigned value never becomes 0, but at least code 1: an update divides by the root of a second moment,
//! and one that is lost makes a step of any size.
//!
//! # Bounds
//! The error of an element is at most half the distance between codes at its place: 0.45 * 10^-d / n_d of the scale in
//! decade d, and so at most 0.0071 of it (signed) or 0.0036 (unsigned). Zero stays zero (-0 becomes 0).
//! Scales below 1e-30 lose precision in their smallest elements, which are then subnormal.
//!
//! # NaN and infinity
//! A block that holds one gets the scale NaN, and every element of it reads as NaN: a state that has diverged shows.

mod codes;
mod level;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vectors;

#[cfg(any(feature = "cuda", test))]
pub(crate) use codes::code_tables;

use codes::zero;
use level::{Codec, Level, Work};

/// Elements that share a scale.
pub(crate) const BLOCK: usize = 256;

/// Writes `values` as codes and scales: a code for each value, a scale for each block of them. Values are for signed
/// codes of both signs, and for unsigned ones at least 0 (negative ones become 0).
pub(crate) fn quantise(values: &[f32], codes: &mut [u8], scales: &mut [f32], signed: bool) {
    debug_assert_eq!(values.len(), codes.len());
    debug_assert!(values.len().div_ceil(BLOCK) <= scales.len());
    Level::new().run(Quantise { values, codes, scales, signed });
}

/// Reads codes and scales back, into an `out` of as many elements as there are codes.
pub(crate) fn dequantise(codes: &[u8], scales: &[f32], signed: bool, out: &mut [f32]) {
    debug_assert_eq!(out.len(), codes.len());
    debug_assert!(out.len().div_ceil(BLOCK) <= scales.len());
    Level::new().run(Dequantise { codes, scales, signed, out });
}

struct Quantise<'a> {
    values: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    signed: bool,
}

impl Work for Quantise<'_> {
    #[inline(always)]
    fn with<C: Codec>(self, codec: C) {
        // All scales first, so that the processor need not wait for one before it goes on with the next. Loops, not
        // `for_each`: the compiler may leave a closure's call out of line, and with it out of the vector code.
        for (values, scale) in self.values.chunks(BLOCK).zip(&mut *self.scales) {
            *scale = match <&[f32; BLOCK]>::try_from(values) {
                Ok(whole) => scale_of(whole),
                Err(_) => scale_of(values),
            };
        }
        let blocks = self.values.chunks(BLOCK).zip(self.codes.chunks_mut(BLOCK));
        for ((values, codes), &mut scale) in blocks.zip(self.scales) {
            if scale.is_nan() || scale == 0.0 {
                codes.fill(zero(self.signed));
            } else {
                codec.write(values, codes, scale, self.signed);
            }
        }
    }
}

/// The largest magnitude, or NaN where one is not finite.
#[inline(always)]
fn scale_of(values: &[f32]) -> f32 {
    // Magnitudes are ordered as their bits are, with infinity and NaN above all others.
    let largest = values.iter().fold(0, |a, x| (x.to_bits() & 0x7fff_ffff).max(a));
    let scale = f32::from_bits(largest);
    if scale.is_finite() { scale } else { f32::NAN }
}

struct Dequantise<'a> {
    codes: &'a [u8],
    scales: &'a [f32],
    signed: bool,
    out: &'a mut [f32],
}

impl Work for Dequantise<'_> {
    #[inline(always)]
    fn with<C: Codec>(self, codec: C) {
        let blocks = self.codes.chunks(BLOCK).zip(self.out.chunks_mut(BLOCK));
        for ((codes, out), &scale) in blocks.zip(self.scales) {
            codec.read(codes, scale, self.signed, out);
        }
    }
}

/// The blocks that consecutive elements are in, the first of which begins one.
pub(crate) fn blocks(elements: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    elements.start / BLOCK..elements.end.div_ceil(BLOCK)
}

/// An array of f32 in 8 bits an element.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Blockwise {
    codes: Vec<u8>,
    scales: Vec<f32>,
    signed: bool,
}

impl Blockwise {
    /// `len` zeros, of values of both signs or of at least 0.
    pub(crate) fn zeros(len: usize, signed: bool) -> Self {
        Self { codes: vec![zero(signed); len], scales: vec![0.0; len.div_ceil(BLOCK)], signed }
    }

    /// The nearest there is to `values`.
    pub(crate) fn from_slice(values: &[f32], signed: bool) -> Self {
        let mut new = Self::zeros(values.len(), signed);
        quantise(values, &mut new.codes, &mut new.scales, signed);
        new
    }

    /// An array out of what [`codes`](Self::codes) and [`scales`](Self::scales) gave; `None` where their lengths
    /// do not fit each other, or a scale is negative or infinite.
    pub(crate) fn from_parts(codes: Vec<u8>, scales: Vec<f32>, signed: bool) -> Option<Self> {
        let fits = scales.len() == codes.len().div_ceil(BLOCK);
        let valid = scales.iter().all(|s| s.is_nan() || (*s >= 0.0 && s.is_finite()));
        (fits && valid).then_some(Self { codes, scales, signed })
    }

    /// Whether values are of both signs.
    pub(crate) fn is_signed(&self) -> bool {
        self.signed
    }

    /// The codes, one an element.
    pub(crate) fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales, one a block.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// All elements.
    pub(crate) fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.codes.len()];
        dequantise(&self.codes, &self.scales, self.signed, &mut out);
        out
    }

    /// Disjoint parts of `elements` each (the last may be shorter) for threads to own, as codes and scales.
    /// `elements` is rounded up to whole blocks.
    pub(crate) fn chunks_mut(&mut self, elements: usize) -> ChunksMut<'_> {
        let blocks = elements.div_ceil(BLOCK).max(1);
        self.codes.chunks_mut(blocks.saturating_mul(BLOCK)).zip(self.scales.chunks_mut(blocks))
    }
}

/// The parts of a [`Blockwise`] array.
pub(crate) type ChunksMut<'a> = std::iter::Zip<std::slice::ChunksMut<'a, u8>, std::slice::ChunksMut<'a, f32>>;

#[cfg(test)]
mod tests;
