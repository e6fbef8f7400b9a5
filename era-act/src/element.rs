//! The dtypes that tensors hold, and the type that each is computed in.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use crate::real::Real;

/// Elements that go through a conversion buffer at a time: three or four f32 buffers fit in the first-level cache.
pub(crate) const BLOCK: usize = 1024;

/// A dtype of a tensor, computed in `Acc`.
pub(crate) trait Element: WithDType + Send + Sync {
    type Acc: Real;

    fn zeros(len: usize) -> Vec<Self>;

    /// `src`, at most [`BLOCK`] long, as numbers to compute with: itself, or converted into `buffer`.
    fn load<'a>(src: &'a [Self], buffer: &'a mut [Self::Acc; BLOCK]) -> &'a [Self::Acc];

    /// Where to write the results for `dst`, at most [`BLOCK`] long, before [`store`](Self::store): itself, or `buffer`.
    fn results<'a>(dst: &'a mut [Self], buffer: &'a mut [Self::Acc; BLOCK]) -> &'a mut [Self::Acc];

    /// Brings what was written to [`results`](Self::results) into `dst`.
    fn store(dst: &mut [Self], buffer: &[Self::Acc; BLOCK]);
}

macro_rules! computed_in_itself {
    ($t:ty) => {
        impl Element for $t {
            type Acc = $t;

            fn zeros(len: usize) -> Vec<Self> {
                vec![0.0; len]
            }

            #[inline(always)]
            fn load<'a>(src: &'a [Self], _: &'a mut [$t; BLOCK]) -> &'a [$t] {
                src
            }

            #[inline(always)]
            fn results<'a>(dst: &'a mut [Self], _: &'a mut [$t; BLOCK]) -> &'a mut [$t] {
                dst
            }

            #[inline(always)]
            fn store(_: &mut [Self], _: &[$t; BLOCK]) {}
        }
    };
}

computed_in_itself!(f32);
computed_in_itself!(f64);

/// The part of a buffer that `len` elements take.
#[inline(always)]
fn first(buffer: &mut [f32; BLOCK], len: usize) -> &mut [f32] {
    &mut buffer[..len.min(BLOCK)]
}

impl Element for bf16 {
    type Acc = f32;

    fn zeros(len: usize) -> Vec<Self> {
        // A zeroed vector of integers comes from the allocator without being written.
        vec![0u16; len].reinterpret_into()
    }

    #[inline(always)]
    fn load<'a>(src: &'a [Self], buffer: &'a mut [f32; BLOCK]) -> &'a [f32] {
        let buffer = first(buffer, src.len());
        for (to, from) in buffer.iter_mut().zip(src) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
        buffer
    }

    #[inline(always)]
    fn results<'a>(dst: &'a mut [Self], buffer: &'a mut [f32; BLOCK]) -> &'a mut [f32] {
        first(buffer, dst.len())
    }

    #[inline(always)]
    fn store(dst: &mut [Self], buffer: &[f32; BLOCK]) {
        for (to, from) in dst.iter_mut().zip(buffer) {
            // To nearest, ties to even. The carry must not turn a NaN into an infinity.
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            let bits = if from.is_nan() { (bits >> 16) | 0x40 } else { rounded };
            *to = bf16::from_bits(bits as u16);
        }
    }
}

impl Element for f16 {
    type Acc = f32;

    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    #[inline(always)]
    fn load<'a>(src: &'a [Self], buffer: &'a mut [f32; BLOCK]) -> &'a [f32] {
        let src = &src[..src.len().min(BLOCK)];
        let buffer = first(buffer, src.len());
        src.convert_to_f32_slice(buffer);
        buffer
    }

    #[inline(always)]
    fn results<'a>(dst: &'a mut [Self], buffer: &'a mut [f32; BLOCK]) -> &'a mut [f32] {
        first(buffer, dst.len())
    }

    #[inline(always)]
    fn store(dst: &mut [Self], buffer: &[f32; BLOCK]) {
        dst.convert_from_f32_slice(&buffer[..dst.len().min(BLOCK)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_conversions_equal_those_of_half_for_every_value() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        for src in all.chunks(BLOCK) {
            let mut buffer = [0.0; BLOCK];
            for (got, want) in bf16::load(src, &mut buffer).iter().zip(src) {
                assert!(got.to_bits() == want.to_f32().to_bits() || (got.is_nan() && want.is_nan()));
            }
        }
        for high in 0..=u16::MAX {
            let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
            let values = lows.map(|low| f32::from_bits(u32::from(high) << 16 | low));
            let (mut got, mut buffer) = ([bf16::ZERO; 6], [0.0; BLOCK]);
            bf16::results(&mut got, &mut buffer).copy_from_slice(&values);
            bf16::store(&mut got, &buffer);
            for (got, value) in got.iter().zip(values) {
                assert_eq!(got.to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }
}
