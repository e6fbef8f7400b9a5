//! The arithmetic that the kernels are written over, for f32 and f64.
//!
//! The f32 functions are branch-free and use only `+ - * /`, comparisons and shifts, so that loops over them
//! vectorise at whatever width the CPU has, and give the same bits on every CPU (no fused multiply-add, no
//! reassociation). Their constants come from `tests/golden/coefficients.py`. The f64 ones use the standard library.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// A floating-point type that kernels compute in.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    const ZERO: Self;
    const HALF: Self;
    const ONE: Self;
    const TWO: Self;
    /// From here on `exp(-a)` is exactly 0.
    const EXP_CUTOFF: Self;
    const MIN_FINITE: Self;

    fn from_f64(value: f64) -> Self;

    fn to_f64(self) -> f64;

    fn abs(self) -> Self;

    /// `exp(-a)` for `0 <= a <= EXP_CUTOFF`; NaN at NaN.
    fn exp_neg(a: Self) -> Self;

    /// `ln(1 + e)` for `0 <= e <= 1`, with a small relative error for every `e`.
    fn ln_1p_unit(e: Self) -> Self;

    /// The sum of the Chebyshev series of `(1 + 2 x) exp(x^2) erfc(x)` at `t = (x - 3.75) / (x + 3.75)`.
    fn scaled_erfc_series(t: Self) -> Self;

    /// The smaller one; NaN stays NaN.
    #[inline(always)]
    fn at_most(self, bound: Self) -> Self {
        if self > bound { bound } else { self }
    }

    /// The larger one; NaN stays NaN.
    #[inline(always)]
    fn at_least(self, bound: Self) -> Self {
        if self < bound { bound } else { self }
    }
}

/// `sigmoid(z)` with all that is had on the way, each part stable for every `z`.
#[derive(Clone, Copy)]
pub(crate) struct Sigmoid<R> {
    /// `min(|z|, EXP_CUTOFF)`
    pub(crate) magnitude: R,
    /// `exp(-|z|)`
    pub(crate) exp: R,
    /// `sigmoid(-|z|)`
    pub(crate) tail: R,
    /// `sigmoid(z)`
    pub(crate) value: R,
    /// `sigmoid'(z)`
    pub(crate) slope: R,
}

#[inline(always)]
pub(crate) fn sigmoid<R: Real>(z: R) -> Sigmoid<R> {
    let magnitude = z.abs().at_most(R::EXP_CUTOFF);
    let exp = R::exp_neg(magnitude);
    let head = R::ONE / (R::ONE + exp);
    let tail = exp * head;
    let value = if z < R::ZERO { tail } else { head };
    Sigmoid { magnitude, exp, tail, value, slope: tail * head }
}

/// `x * gate`, with the limit 0 rather than NaN where `x` is minus infinity and the gate is 0.
#[inline(always)]
pub(crate) fn gate<R: Real>(x: R, gate: R) -> R {
    x.at_least(R::MIN_FINITE) * gate
}

/// `x` held inside `[-EXP_CUTOFF, EXP_CUTOFF]`, for products with a factor that is 0 outside. NaN stays NaN.
#[inline(always)]
pub(crate) fn hold<R: Real>(x: R) -> R {
    x.at_most(R::EXP_CUTOFF).at_least(-R::EXP_CUTOFF)
}

/// `exp(r) = 1 + r + r^2 EXP(r)` on `|r| <= ln 2 / 2`, relative error 1.0e-8.
const EXP: [f32; 5] = [0.5, 0.166_665_77, 0.041_666_556, 0.008_363_173, 0.001_392_617_6];

/// `ln(1 + e) = 2 s + s^3 LOG1P(s^2)`, `s = e / (2 + e)`, on `0 <= e <= 1`, relative error 3.9e-10.
const LOG1P: [f32; 5] = [0.666_666_7, 0.399_997_06, 0.285_923_57, 0.217_065_76, 0.232_243_3];

/// Relative error 1.3e-8.
const ERFCX_F32: [f32; 12] = [
    1.177_578_9,
    -0.004_590_054_7,
    -0.084_249_13,
    0.059_209_94,
    -0.026_658_668,
    0.009_074_997,
    -0.002_413_163_6,
    0.000_490_775_83,
    -6.916_973_5e-5,
    4.139_028e-6,
    7.740_383e-7,
    -2.188_640_2e-7,
];

/// Relative error 3.8e-18.
const ERFCX_F64: [f64; 25] = [
    1.177_578_934_567_401_7,
    -0.004_590_054_580_646_477,
    -0.084_249_133_366_517_9,
    0.059_209_939_998_191_89,
    -0.026_658_668_435_305_753,
    0.009_074_997_670_705_265,
    -0.002_413_163_540_417_608,
    0.000_490_775_836_525_808_6,
    -6.916_973_302_501_207e-5,
    4.139_027_986_073_01e-6,
    7.740_383_066_198_491e-7,
    -2.188_640_104_923_439_6e-7,
    1.076_499_946_567_091_1e-8,
    4.521_959_811_218_287e-9,
    -7.754_400_208_831_135e-10,
    -6.318_088_340_886_685e-11,
    2.868_795_010_930_67e-11,
    1.945_586_854_577_734_6e-13,
    -9.654_696_748_433_44e-13,
    3.252_548_148_147_94e-14,
    3.347_811_948_286_805e-14,
    -1.864_562_880_419_313e-15,
    -1.250_795_053_068_864_8e-15,
    7.418_235_256_624_043e-17,
    5.068_148_904_796_111e-17,
];

/// Clenshaw's sum of a Chebyshev series.
#[inline(always)]
fn chebyshev<R: Real>(coefficients: &[R], t: R) -> R {
    let (mut b1, mut b2) = (R::ZERO, R::ZERO);
    for &c in coefficients.iter().skip(1).rev() {
        let b = R::TWO * t * b1 - b2 + c;
        b2 = b1;
        b1 = b;
    }
    coefficients.first().map_or(R::ZERO, |&c| t * b1 - b2 + c)
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const HALF: Self = 0.5;
    const ONE: Self = 1.0;
    const TWO: Self = 2.0;
    const EXP_CUTOFF: Self = 104.0;
    const MIN_FINITE: Self = f32::MIN;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        f32::from_bits(self.to_bits() & 0x7fff_ffff)
    }

    #[inline(always)]
    fn exp_neg(a: Self) -> Self {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts; the first has 9 bits, so its product with an integer up to 2^15 is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let shifted = ROUND - a * std::f32::consts::LOG2_E;
        let n = shifted - ROUND;
        let r = (-a - n * LN2_HIGH) - n * LN2_LOW;
        let q = EXP[0] + r * (EXP[1] + r * (EXP[2] + r * (EXP[3] + r * EXP[4])));
        let p = 1.0 + (r + r * r * q);
        // Two factors: 2^n alone is no f32 where the result is subnormal.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let first = n >> 1;
        let second = n.wrapping_sub(first);
        let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
        p * power(first) * power(second)
    }

    #[inline(always)]
    fn ln_1p_unit(e: Self) -> Self {
        let s = e / (2.0 + e);
        let w = s * s;
        let q = LOG1P[0] + w * (LOG1P[1] + w * (LOG1P[2] + w * (LOG1P[3] + w * LOG1P[4])));
        // 2 s = e - s e: the rounding of s then only counts against the small second term.
        e - s * (e - w * q)
    }

    #[inline(always)]
    fn scaled_erfc_series(t: Self) -> Self {
        chebyshev(&ERFCX_F32, t)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const HALF: Self = 0.5;
    const ONE: Self = 1.0;
    const TWO: Self = 2.0;
    const EXP_CUTOFF: Self = 746.0;
    const MIN_FINITE: Self = f64::MIN;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }

    #[inline(always)]
    fn exp_neg(a: Self) -> Self {
        (-a).exp()
    }

    #[inline(always)]
    fn ln_1p_unit(e: Self) -> Self {
        e.ln_1p()
    }

    #[inline(always)]
    fn scaled_erfc_series(t: Self) -> Self {
        chebyshev(&ERFCX_F64, t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(to: f64, n: u32) -> impl Iterator<Item = f32> {
        (0..=n).map(move |i| (to * f64::from(i) / f64::from(n)) as f32)
    }

    #[test]
    fn f32_exp_is_within_one_machine_epsilon() {
        for a in grid(87.0, 400_000) {
            let want = (-f64::from(a)).exp();
            let error = (f64::from(f32::exp_neg(a)) / want - 1.0).abs();
            assert!(error <= f64::from(f32::EPSILON), "exp(-{a}): relative error {error:e}");
        }
    }

    #[test]
    fn f32_exp_goes_through_subnormal_numbers_to_zero() {
        for a in grid(104.0, 20_000).filter(|&a| a > 87.0) {
            let error = (f64::from(f32::exp_neg(a)) - (-f64::from(a)).exp()).abs();
            assert!(error <= 2.9e-45, "exp(-{a}): error {error:e}");
        }
        assert_eq!(f32::exp_neg(0.0), 1.0);
        assert_eq!(f32::exp_neg(f32::EXP_CUTOFF), 0.0);
        assert_eq!(f64::exp_neg(f64::EXP_CUTOFF), 0.0);
    }

    #[test]
    fn f32_ln_1p_is_within_one_machine_epsilon_down_to_the_smallest_argument() {
        let small = (1..140).map(|i| 2f32.powi(-i) * 0.777);
        for e in grid(1.0, 400_000).chain(small).filter(|&e| e >= f32::MIN_POSITIVE) {
            let error = (f64::from(f32::ln_1p_unit(e)) / f64::from(e).ln_1p() - 1.0).abs();
            assert!(error <= f64::from(f32::EPSILON), "ln(1 + {e}): relative error {error:e}");
        }
        assert_eq!(f32::ln_1p_unit(0.0), 0.0);
    }

    #[test]
    fn sigmoid_keeps_its_relative_precision_in_both_tails() {
        for a in grid(80.0, 50_000) {
            for z in [a, -a] {
                let s = sigmoid(z);
                let want = 1.0 / (1.0 + (-f64::from(z)).exp());
                let slope = want * (1.0 / (1.0 + f64::from(z).exp()));
                assert!((f64::from(s.value) / want - 1.0).abs() < 3e-7, "sigmoid({z})");
                assert!((f64::from(s.slope) / slope - 1.0).abs() < 4e-7, "sigmoid'({z})");
            }
        }
    }
}
