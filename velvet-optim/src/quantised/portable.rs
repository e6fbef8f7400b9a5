//! One element after the other, in loops that the compiler makes vectors of on any processor: the specification of the
//! other ways.

use super::codes::{Line, SIGNED_LINES, UNSIGNED_LINES, table};
use super::level::Codec;

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Codec for Portable {
    #[inline(always)]
    fn write(self, values: &[f32], codes: &mut [u8], scale: f32, signed: bool) {
        if signed {
            codes.iter_mut().zip(values).for_each(|(code, &x)| {
                let k = index(&SIGNED_LINES, x.abs() / scale);
                // -k for negative values, by two's complement
                let sign = (x.to_bits() as i32 >> 31) as u32;
                *code = (k ^ sign).wrapping_sub(sign).wrapping_add(128) as u8;
            });
        } else {
            codes.iter_mut().zip(values).for_each(|(code, &x)| {
                let x = if x > 0.0 { x } else { 0.0 };
                let k = index(&UNSIGNED_LINES, x / scale) & 0xff;
                let least = u32::from(x > 0.0);
                *code = (if k > least { k } else { least }) as u8;
            });
        }
    }

    #[inline(always)]
    fn read(self, codes: &[u8], scale: f32, signed: bool, out: &mut [f32]) {
        let table = table(signed);
        codes.iter().zip(out).for_each(|(&code, out)| *out = table[usize::from(code)] * scale);
    }
}

/// k(y), rounded, in the low bits.
#[inline(always)]
pub(super) fn index<const DECADES: usize>(lines: &[Line; DECADES], y: f32) -> u32 {
    // Adding it leaves an integer in the low bits, rounded to nearest even; a conversion would have to saturate.
    const ROUND: f32 = 8_388_608.0; // 2^23
    let mut k = 255.0;
    for line in lines {
        let piece = line.slope * y + line.offset;
        // Not `f32::min`, which has NaN to think of.
        k = if piece < k { piece } else { k };
    }
    (k + ROUND).to_bits()
}
