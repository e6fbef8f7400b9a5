//! Exactness, unbiasedness and reproducibility of stochastic rounding.

use super::*;
use half::slice::HalfBitsSliceExt;

const TYPES: [DType; 2] = [DType::BF16, DType::F16];

fn bits(values: &[f32], dtype: DType, key: u32, offset: usize) -> Vec<u16> {
    let mut to = vec![0u16; values.len()];
    match dtype {
        DType::BF16 => to_bf16(values, to.reinterpret_cast_mut(), key, offset),
        _ => to_f16(values, to.reinterpret_cast_mut(), key, offset),
    }
    to
}

fn widen(bits: u16, dtype: DType) -> f64 {
    if dtype == DType::BF16 { bf16::from_bits(bits).to_f64() } else { f16::from_bits(bits).to_f64() }
}

/// The neighbours of x in the narrow type, from half's own conversion.
fn neighbours(x: f32, dtype: DType) -> [f64; 2] {
    let nearest = if dtype == DType::BF16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
    let value = widen(nearest, dtype);
    let x = f64::from(x);
    let next = |up: bool| widen(nearest.wrapping_add_signed(if up { 1 } else { -1 }), dtype);
    match () {
        () if value == x => [value, value],
        // One further from zero, or one nearer to it.
        () if value.abs() < x.abs() => [value, next(true)],
        () => [next(false), value],
    }
}

/// Magnitudes from far below the smallest f16 to its largest, of both signs.
fn samples() -> Vec<f32> {
    let mut x = 0x1234_5678_9abc_def1u64;
    (0..4000)
        .map(|i| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let exponent = 127 - 30 + (i % 45) as u32; // 2^-30 to 2^14
            f32::from_bits(((x >> 63) as u32) << 31 | exponent << 23 | (x >> 32) as u32 & 0x007f_ffff)
        })
        .collect()
}

#[test]
fn a_value_goes_to_one_of_its_neighbours() {
    for dtype in TYPES {
        let values = samples();
        for key in 0..8 {
            for (&x, &rounded) in values.iter().zip(&bits(&values, dtype, key, 0)) {
                let [a, b] = neighbours(x, dtype);
                let got = widen(rounded, dtype);
                assert!(got == a || got == b, "{dtype:?}: {x:e} became {got:e}, between {a:e} and {b:e}");
            }
        }
    }
}

#[test]
fn values_of_the_narrow_type_stay() {
    for dtype in TYPES {
        // All of them, zeros, subnormal values, infinities and NaN too.
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let values: Vec<f32> =
            all.iter()
                .map(|&b| {
                    if dtype == DType::BF16 {
                        bf16::from_bits(b).to_f32()
                    } else {
                        f16::from_bits(b).to_f32()
                    }
                })
                .collect();
        for key in [1, 0xffff_ffff, key(3, 4, 5)] {
            for ((&expected, &x), &got) in all.iter().zip(&values).zip(&bits(&values, dtype, key, 0)) {
                if x.is_nan() {
                    assert!(widen(got, dtype).is_nan(), "{dtype:?}: {expected:x} became {got:x}");
                } else {
                    assert_eq!(got, expected, "{dtype:?}: {x}");
                }
            }
        }
    }
}

#[test]
fn a_finite_value_never_becomes_infinite_and_nan_stays_nan() {
    let nans = [0x7f80_0001u32, 0xff80_0001, 0x7fff_ffff, 0x7fc0_0000].map(f32::from_bits);
    for dtype in TYPES {
        let largest = if dtype == DType::BF16 { bf16::MAX.to_f32() } else { f16::MAX.to_f32() };
        for key in 0..100 {
            let above = f32::from_bits(largest.to_bits() + 1);
            let values = [above, -above, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY];
            let got =
                bits(&values, dtype, key, 0).iter().map(|&b| widen(b, dtype) as f32).collect::<Vec<_>>();
            let infinite = [f32::INFINITY, f32::NEG_INFINITY];
            assert_eq!(got, [largest, -largest, largest, -largest, infinite[0], infinite[1]]);
            assert!(bits(&nans, dtype, key, 0).iter().all(|&b| widen(b, dtype).is_nan()));
        }
    }
}

#[test]
fn the_mean_over_many_elements_is_the_value() {
    const N: usize = 1 << 16;
    let values = [1.001f32, -0.3, 1.0 / 3.0, 4.999, 1e-3, -7.77e-6, 3.3e-8, 1.2e-4, 60_001.3];
    for dtype in TYPES {
        for x in values {
            let rounded = stochastic(&vec![x; N], dtype, key(42, 7, 1), 0);
            let mean = rounded.iter().map(|&x| f64::from(x)).sum::<f64>() / N as f64;
            let [a, b] = neighbours(x, dtype);
            let p = if a == b { 0.0 } else { (f64::from(x) - a) / (b - a) };
            // The standard deviation of the mean of N draws from {a, b}.
            let sigma = (b - a).abs() * (p * (1.0 - p) / N as f64).sqrt();
            let error = (mean - f64::from(x)).abs();
            assert!(error <= 4.0 * sigma, "{dtype:?}: the mean of {x} is off by {} sigma", error / sigma);
        }
    }
}

#[test]
fn small_updates_arrive_that_rounding_to_nearest_loses() {
    // 4000 updates of a thousandth of bf16's distance at 1.
    let (mut stochastic_sum, mut nearest) = (vec![1f32; 256], bf16::ONE);
    let update = 0.001 / 128.0;
    for step in 0..4000 {
        let values: Vec<f32> = stochastic_sum.iter().map(|x| x + update).collect();
        stochastic_sum = stochastic(&values, DType::BF16, key(0, step, 0), 0);
        nearest = bf16::from_f32(nearest.to_f32() + update);
    }
    let mean = stochastic_sum.iter().sum::<f32>() / 256.0;
    assert_eq!(nearest, bf16::ONE);
    // One walk deviates by about sqrt(4000 * .001) = 2 distances, the mean of 256 by an eighth of one.
    assert!((mean - (1.0 + 4000.0 * update)).abs() < 4.0 * 0.125 / 128.0, "{mean}");
}

#[test]
fn bits_depend_on_the_key_and_the_element_alone() {
    let values = samples();
    for dtype in TYPES {
        let whole = bits(&values, dtype, 99, 1000);
        for cut in [1, 7, 64, 1001] {
            let (head, tail) = values.split_at(cut);
            let parts = [bits(head, dtype, 99, 1000), bits(tail, dtype, 99, 1000 + cut)].concat();
            assert_eq!(parts, whole);
        }
        assert_ne!(bits(&values, dtype, 100, 1000), whole);
        assert_ne!(bits(&values, dtype, 99, 1001), whole);
    }
}

#[test]
fn keys_differ_by_seed_step_and_parameter() {
    let mut keys = Vec::new();
    for seed in 0..10 {
        for step in 0..10 {
            for parameter in 0..10 {
                keys.push(key(seed, step, parameter));
            }
        }
    }
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 1000);
}

#[test]
fn the_formula_is_the_documented_one() {
    // Worked out by hand from the module's documentation, in another language.
    assert_eq!(key(1, 2, 3), KEY);
    let k = mix(KEY);
    assert_eq!([0, 1, u32::MAX].map(|i| hash(i, k, KEY)), HASHES);
    // An array that crosses 2^32 elements.
    #[cfg(target_pointer_width = "64")]
    {
        let x = [1.003f32; 6];
        let got = bits(&x, DType::BF16, KEY, (1 << 32) - 3);
        let at = |i: u64| bf16_bits(x[0], hash(i as u32, mix(KEY ^ (i >> 32) as u32), KEY));
        assert_eq!(got, (0..6).map(|j| at((1 << 32) - 3 + j)).collect::<Vec<_>>());
    }
}

const KEY: u32 = 0x6ae5_15c1;
const HASHES: [u32; 3] = [0x2501_b758, 0x41e0_0642, 0xa8a6_362c];
