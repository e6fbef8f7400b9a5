//! Error bounds and exactness of the 8-bit state.

use super::codes::{BINADES, Line, SIGNED_LINES, UNSIGNED_LINES, table};
use super::portable::index;
use super::*;

/// Signed and unsigned.
const BOTH: [bool; 2] = [true, false];

/// Uniform in (0, 1).
fn uniform(seed: u64, len: usize) -> Vec<f64> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 12) as f64 + 0.5) / (1u64 << 52) as f64
        })
        .collect()
}

/// Values of both signs for signed codes, and their magnitudes for unsigned ones.
fn data(name: &str, signed: bool, len: usize) -> Vec<f32> {
    let (a, b) = (uniform(1, len), uniform(2, len));
    let values = a.iter().zip(&b).map(|(&a, &b)| match name {
        "uniform" => 2.0 * a - 1.0,
        "normal" => (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos(),
        _ => (2.0 * b - 1.0).signum() * 10f64.powf(-8.0 * a), // log-uniform over eight decades
    });
    values.map(|x| if signed { x as f32 } else { x.abs() as f32 }).collect()
}

fn round_trip(signed: bool, values: &[f32]) -> (Blockwise, Vec<f32>) {
    let stored = Blockwise::from_slice(values, signed);
    let read = stored.to_vec();
    (stored, read)
}

/// Half the distance between the codes around y in [0, 1], from the table.
fn half_distance(signed: bool, y: f64) -> f64 {
    let table = table(signed);
    let above = table.iter().position(|&v| f64::from(v) >= y).unwrap_or(255);
    f64::from(table[above] - table[above - 1]) / 2.0
}

#[test]
fn tables_rise_and_hold_zero_and_one() {
    for signed in BOTH {
        let table = table(signed);
        assert_eq!(table[usize::from(zero(signed))], 0.0);
        assert_eq!(table[255], 1.0);
        let from = usize::from(signed); // code 0 repeats -1
        assert!(table[from..].windows(2).all(|w| w[0] < w[1]));
    }
    let signed = table(true);
    assert_eq!((signed[0], signed[1], signed[129]), (-1.0, -1.0, 1e-6));
    assert!((1..128).all(|k| signed[128 + k] == -signed[128 - k]));
    assert_eq!(table(false)[1], 1e-7);
    // The upper ends of decades are on the grid.
    let unsigned = table(false);
    assert_eq!([unsigned[127], unsigned[63], unsigned[31]], [0.1, 0.01, 0.001]);
}

#[test]
fn two_lines_a_binade_give_the_codes_of_all() {
    fn check<const DECADES: usize>(signed: bool, lines: &[Line; DECADES]) {
        let tables = code_tables(signed);
        assert_eq!(tables.len(), 256 + 4 * BINADES as usize);
        assert_eq!(&tables[..256], table(signed));
        let pairs = tables[256..].as_chunks::<4>().0;
        let code = |y: f32| {
            let [a, b, c, d] = pairs[(127 - (y.to_bits() >> 23)).min(31) as usize];
            (a * y + b).min(c * y + d) + 8_388_608.0
        };
        // Around the ends of decades and binades, where lines meet, and anywhere.
        let ends = (0..9).map(|d| 10f32.powi(-d)).chain((0..40).map(|i| 0.5f32.powi(i)));
        let near = ends.flat_map(|end| (0..4000).map(move |n| end.to_bits() - 2000 + n));
        let mut seed = 1u32;
        let anywhere = (0..200_000).map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed % 0x3f80_0001
        });
        for bits in near.chain(anywhere).filter(|&bits| bits <= 0x3f80_0000) {
            let y = f32::from_bits(bits);
            assert_eq!(code(y).to_bits(), index(lines, y), "signed {signed}: {y}");
        }
    }
    check(true, &SIGNED_LINES);
    check(false, &UNSIGNED_LINES);
}

#[test]
fn every_value_gets_the_nearest_code() {
    for signed in BOTH {
        let table = table(signed);
        // Every code, and values just below, in and just above the middle between neighbours.
        let mut values: Vec<f32> = table.to_vec();
        for pair in table.windows(2).filter(|pair| pair[0] < pair[1]) {
            let at = |part: f64| (f64::from(pair[0]) * (1.0 - part) + f64::from(pair[1]) * part) as f32;
            values.extend([0.01, 0.25, 0.4999, 0.5001, 0.75, 0.99].map(at));
        }
        values.extend(data("log-uniform", signed, 4096).iter().map(|x| x.clamp(-1.0, 1.0)));
        for &y in &values {
            let stored = Blockwise::from_slice(&[1.0, y], signed); // a scale of 1
            let got = usize::from(stored.codes()[1]);
            let nearest =
                table.iter().map(|&v| (f64::from(v) - f64::from(y)).abs()).fold(f64::INFINITY, f64::min);
            let error = (f64::from(table[got]) - f64::from(y)).abs();
            let is_kept_from_zero = !signed && got == 1 && y < 1e-7;
            let slack = 1e-4 * half_distance(signed, f64::from(y.abs()).clamp(1e-7, 1.0));
            assert!(
                error <= nearest + slack || is_kept_from_zero,
                "signed {signed}: {y} became {}",
                table[got]
            );
        }
    }
}

#[test]
fn errors_stay_within_the_bounds_of_the_table() {
    // Largest and mean error relative to the block's largest magnitude. On uniform data the mean is a quarter of the
    // distance between codes, averaged over decades of probability .9 * 10^-d:
    // sum over d of .9 * 10^-d * .9 * 10^-d / (4 n_d) = .81 / (4 n_0) / (1 - .02) = .00323 signed, .00161 unsigned.
    let expected = [
        ("uniform", true, 0.45 / 64.0, 0.003_229 * 1.03),
        ("uniform", false, 0.45 / 128.0, 0.001_614 * 1.03),
        ("normal", true, 0.45 / 64.0, 0.0030),
        ("normal", false, 0.45 / 128.0, 0.0015),
        ("log-uniform", true, 0.45 / 64.0, 0.0006),
        ("log-uniform", false, 0.45 / 128.0, 0.0003),
    ];
    for (name, signed, largest_allowed, mean_allowed) in expected {
        let values = data(name, signed, 200 * BLOCK + 77);
        let (stored, out) = round_trip(signed, &values);
        let (mut largest, mut sum) = (0f64, 0f64);
        for (i, (&x, &read)) in values.iter().zip(&out).enumerate() {
            let scale = f64::from(stored.scales()[i / BLOCK]);
            let error = (f64::from(x) - f64::from(read)).abs() / scale;
            // Each element's own bound, from the codes around it; the smallest unsigned code is also that of all below.
            let bound = half_distance(signed, f64::from(x.abs()) / scale);
            let bound = if signed { bound } else { bound.max(1e-7) };
            assert!(error <= bound * 1.0002 + 1e-9, "{name} signed {signed}: {x} of {scale} became {read}");
            largest = largest.max(error);
            sum += error;
        }
        let mean = sum / values.len() as f64;
        assert!(largest <= largest_allowed * 1.0002, "{name} signed {signed}: largest error {largest}");
        assert!(mean <= mean_allowed, "{name} signed {signed}: mean error {mean}");
        // A bound that is far from what happens bounds nothing.
        assert!(mean >= 0.5 * mean_allowed, "{name} signed {signed}: mean error {mean}");
    }
}

#[test]
fn quantising_what_was_read_changes_nothing() {
    for signed in BOTH {
        for name in ["uniform", "normal", "log-uniform"] {
            for scale in [1.0, 3e-9, 1e-24, 7.7e12] {
                let values: Vec<f32> = data(name, signed, 9 * BLOCK + 1).iter().map(|x| x * scale).collect();
                let (stored, read) = round_trip(signed, &values);
                let (again, read_again) = round_trip(signed, &read);
                assert_eq!(stored, again, "signed {signed} {name} at {scale}");
                assert_eq!(read, read_again);
            }
        }
        // Each code of its own accord, at scales that are no powers of two.
        for scale in [1.0f32, 0.3, 1.7e-11, 9.9e20] {
            let values: Vec<f32> = table(signed).iter().map(|v| v * scale).collect();
            let (stored, read) = round_trip(signed, &values);
            assert_eq!(read, values);
            let from = usize::from(signed);
            assert!(stored.codes().iter().enumerate().skip(from).all(|(i, &c)| i == usize::from(c)));
        }
    }
}

#[test]
fn zeros_and_the_largest_element_are_exact() {
    for signed in BOTH {
        let mut values = data("normal", signed, 3 * BLOCK);
        values[5] = 0.0;
        values[6] = -0.0;
        values[BLOCK..2 * BLOCK].fill(0.0);
        values[2 * BLOCK + 9] = if signed { -12.5 } else { 12.5 };
        let (stored, read) = round_trip(signed, &values);
        assert_eq!([read[5].to_bits(), read[6].to_bits()], [0, 0]);
        assert!(read[BLOCK..2 * BLOCK].iter().all(|x| x.to_bits() == 0));
        assert_eq!(stored.scales()[1..], [0.0, 12.5]);
        assert_eq!(read[2 * BLOCK + 9], values[2 * BLOCK + 9]);
        assert!(Blockwise::zeros(3 * BLOCK, signed).to_vec().iter().all(|x| x.to_bits() == 0));
    }
}

#[test]
fn a_positive_second_moment_never_becomes_zero() {
    let values = [1.0, 3e-8, 1e-12, 1e-38, f32::from_bits(1), 0.0, -1e-3];
    let (_, read) = round_trip(false, &values);
    assert_eq!(read[..], [1.0, 1e-7, 1e-7, 1e-7, 1e-7, 0.0, 0.0]);
}

#[test]
fn subnormal_blocks_are_read_back_finite_and_close() {
    for signed in BOTH {
        let values: Vec<f32> = (0..40).map(|i| f32::from_bits(i * 97)).collect();
        let (stored, read) = round_trip(signed, &values);
        assert_eq!(stored.scales(), [values[39]]);
        let step = f64::from(f32::from_bits(1));
        for (&x, &read) in values.iter().zip(&read) {
            let error = (f64::from(x) - f64::from(read)).abs();
            assert!(error <= 0.0071 * f64::from(values[39]) + step, "{x:e} became {read:e}");
        }
    }
}

#[test]
fn nan_and_infinity_show_in_their_block_and_no_other() {
    for signed in BOTH {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = data("uniform", signed, 3 * BLOCK);
            values[BLOCK + 100] = bad;
            let (stored, read) = round_trip(signed, &values);
            assert!(stored.scales()[1].is_nan());
            for (i, x) in read.iter().enumerate() {
                assert_eq!(x.is_nan(), (BLOCK..2 * BLOCK).contains(&i));
            }
            // And the block recovers when finite values are written.
            values[BLOCK..2 * BLOCK].fill(0.5);
            let mut stored = stored;
            if let Some((codes, scales)) = stored.chunks_mut(BLOCK).nth(1) {
                quantise(&values[BLOCK..2 * BLOCK], codes, scales, signed);
            }
            assert!(stored.to_vec()[BLOCK..2 * BLOCK].iter().all(|&x| x == 0.5));
        }
    }
}

#[test]
fn chunks_are_whole_blocks_and_give_what_the_whole_gives() {
    for (len, elements) in [(0, 256), (1, 256), (255, 256), (1000, 512), (5000, 1024), (5000, 1000), (300, 0)]
    {
        let values = data("normal", true, len);
        let whole = Blockwise::from_slice(&values, true);
        let mut parts = Blockwise::zeros(len, true);
        let size = usize::div_ceil(elements, BLOCK).max(1) * BLOCK;
        let mut count = 0;
        for ((codes, scales), values) in parts.chunks_mut(elements).zip(values.chunks(size)) {
            assert_eq!((codes.len(), scales.len()), (values.len(), values.len().div_ceil(BLOCK)));
            quantise(values, codes, scales, true);
            let mut read = vec![0.0; values.len()];
            dequantise(codes, scales, true, &mut read);
            assert_eq!(read, round_trip(true, values).1);
            count += 1;
        }
        assert_eq!(count, len.div_ceil(size));
        assert_eq!(parts, whole);
    }
}

#[test]
fn parts_bring_the_array_back_and_broken_ones_are_refused() {
    let (stored, _) = round_trip(true, &data("normal", true, 700));
    let (codes, scales) = (stored.codes().to_vec(), stored.scales().to_vec());
    assert_eq!((codes.len(), scales.len(), stored.is_signed()), (700, 3, true));
    assert_eq!(Blockwise::from_parts(codes.clone(), scales.clone(), true), Some(stored));
    assert_eq!(Blockwise::from_parts(codes[..512].to_vec(), scales.clone(), true), None);
    assert_eq!(Blockwise::from_parts(codes.clone(), scales[..2].to_vec(), true), None);
    for bad in [-1.0, f32::INFINITY] {
        assert_eq!(Blockwise::from_parts(codes.clone(), vec![1.0, bad, 1.0], true), None);
    }
}

/// Values, as quantised and read back on one level.
fn on(level: Level, values: &[f32], signed: bool) -> (Vec<u8>, Vec<u32>, Vec<u32>) {
    let (mut codes, mut scales) = (vec![7; values.len()], vec![-1.0; values.len().div_ceil(BLOCK)]);
    level.run(Quantise { values, codes: &mut codes, scales: &mut scales, signed });
    let mut out = vec![0.0; values.len()];
    level.run(Dequantise { codes: &codes, scales: &scales, signed, out: &mut out });
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect();
    (codes, bits(scales), bits(out))
}

#[test]
fn every_level_reads_all_codes_to_the_same_bits() {
    let codes: Vec<u8> = (0..=255).collect();
    let smallest = f32::from_bits(1);
    let scales = [1.0, 0.3, 1.7e-11, 9.9e20, f32::MAX, f32::MIN_POSITIVE, 1e-41, smallest, 0.0, f32::NAN];
    for signed in BOTH {
        for scale in scales {
            for level in Level::all() {
                let mut out = vec![0.0; 256];
                level.run(Dequantise { codes: &codes, scales: &[scale], signed, out: &mut out });
                for (code, (&value, read)) in table(signed).iter().zip(out).enumerate() {
                    assert_eq!(read.to_bits(), (value * scale).to_bits(), "{level:?}, {code} of {scale}");
                }
            }
        }
    }
}

#[test]
fn every_level_writes_the_same_codes_wherever_they_change() {
    // Each exponent that a scale can have, with any mantissa, and the ends of those that have a way of their own.
    let mantissas = uniform(3, 600).into_iter().map(|x| (x * f64::from(1 << 23)) as u32);
    let mut scales: Vec<u32> = mantissas.enumerate().map(|(i, x)| (i as u32 % 255) << 23 | x).collect();
    let ends = [1.0f32, f32::MAX, f32::MIN_POSITIVE, 1e-21, 1e30];
    scales
        .extend(ends.iter().flat_map(|x| [x.to_bits() - 1, x.to_bits(), (x.to_bits() + 1).min(0x7f7f_ffff)]));
    let anywhere: Vec<u32> = uniform(4, 1000).into_iter().map(|x| (x * f64::from(1 << 30)) as u32).collect();
    for signed in BOTH {
        // Codes, the middles between them, the ends of decades and of binades, and their surroundings.
        let table = table(signed);
        let middles = table.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
        let decades = (0..9).map(|d| 10f32.powi(-d));
        let about = decades.flat_map(|end| (-60..=60).map(move |n| end * (1.0 + 5e-4 * n as f32)));
        let ends = about.chain((0..34).map(|i| 0.5f32.powi(i)));
        let at: Vec<f32> = table.iter().copied().chain(middles).chain(ends).map(f32::abs).collect();
        let near = at.iter().flat_map(|y| (0..7).map(|n| (y.to_bits() + n).saturating_sub(3)));
        let ys: Vec<f32> =
            near.chain(anywhere.iter().copied()).map(f32::from_bits).map(|y| y.min(1.0)).collect();
        for (n, &scale) in scales.iter().enumerate() {
            let scale = f32::from_bits(scale);
            // The scale itself begins each block.
            let parts = ys.chunks(BLOCK - 1).enumerate();
            let values: Vec<f32> = parts
                .flat_map(|(i, ys)| {
                    let sign = if signed && (i + n) % 2 == 1 { -1.0 } else { 1.0 };
                    std::iter::once(scale).chain(ys.iter().map(move |y| sign * y * scale))
                })
                .collect();
            let expected = on(Level::Portable, &values, signed);
            for level in Level::all() {
                let got = on(level, &values, signed);
                let differs = got.0.iter().zip(&expected.0).position(|(a, b)| a != b);
                let at = differs.map(|i| (values[i], got.0[i], expected.0[i]));
                assert_eq!(at, None, "{level:?}, signed {signed}, scale {scale:e}");
                assert!(got == expected, "{level:?}, signed {signed}, scale {scale:e}");
            }
        }
    }
}

#[test]
fn every_level_takes_any_length_and_any_float() {
    let uniform = uniform(5, 3 * BLOCK);
    let any: Vec<f32> = uniform.iter().map(|x| f32::from_bits((x * 2f64.powi(32)) as u32)).collect();
    let finite: Vec<f32> = any.iter().map(|x| if x.is_finite() { *x } else { -0.0 }).collect();
    let tiny: Vec<f32> = any.iter().map(|x| f32::from_bits(x.to_bits() & 0x807f_ffff)).collect();
    for signed in BOTH {
        for values in [&any, &finite, &tiny, &data("normal", signed, 3 * BLOCK)] {
            for len in (0..70).chain([255, 256, 257, 511, 513, 600, 768]) {
                let expected = on(Level::Portable, &values[..len], signed);
                for level in Level::all() {
                    assert_eq!(on(level, &values[..len], signed), expected, "{level:?}, {len}");
                }
            }
        }
    }
}
