//! Initial weights that reproduce: a named generator, seeded by a number and the name of the layer.

use candle_core::{DType, Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The generator of a layer. The name is part of the seed, so that layers of one model differ and their order does
/// not matter.
pub(crate) fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    stream(seed, fnv1a(name))
}

/// The generator of a layer whose name is hashed already.
pub(crate) fn stream(seed: u64, name: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(name);
    rng
}

/// Kaiming-uniform with `a = sqrt 5`, as PEFT draws `A`: uniform in `[-1, 1) / sqrt(in)`. (r, in)
pub(crate) fn kaiming_uniform(
    (rows, columns): (usize, usize),
    seed: u64,
    name: &str,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let mut rng = generator(seed, name);
    let bound = 1.0 / (columns as f64).sqrt();
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| {
            let unit = f64::from(rng.next_u32() >> 8) / f64::from(1u32 << 23) - 1.0;
            (unit * bound) as f32
        })
        .collect();
    Tensor::from_vec(values, (rows, columns), device)?.to_dtype(dtype)
}

/// A matrix of independent normal numbers, on the CPU in f32.
pub(crate) fn normal(
    (rows, columns): (usize, usize),
    deviation: f64,
    rng: &mut impl RngCore,
) -> Result<Tensor> {
    Tensor::from_vec(normals(rows * columns, deviation, rng), (rows, columns), &Device::Cpu)
}

/// Independent normal numbers (Box and Muller).
pub(crate) fn normals(n: usize, deviation: f64, rng: &mut impl RngCore) -> Vec<f32> {
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        // 1 - u is in (0, 1], so the logarithm is finite.
        let (radius, angle) = ((-2.0 * (1.0 - unit(rng)).ln()).sqrt(), std::f64::consts::TAU * unit(rng));
        values.push((deviation * radius * angle.cos()) as f32);
        values.push((deviation * radius * angle.sin()) as f32);
    }
    values.truncate(n);
    values
}

/// A number in [0, 1) with 53 bits.
pub(crate) fn unit(rng: &mut impl RngCore) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// FNV-1a, 64 bits: the standard library's hash may change between versions.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u64, name: &str) -> Vec<f32> {
        let a = kaiming_uniform((8, 256), seed, name, DType::F32, &Device::Cpu).unwrap();
        a.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn values_are_uniform_within_one_over_the_root_of_the_input_size() {
        let values = draw(7, "layer");
        let bound = 1.0 / 16.0;
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(values.iter().all(|v| (-bound..=bound).contains(v)));
        assert!(mean.abs() < 0.05 * bound, "mean {mean}");
        assert!((square / (bound * bound / 3.0) - 1.0).abs() < 0.06, "mean square {square}");
    }

    #[test]
    fn normal_values_have_the_deviation_asked_for() {
        let values = normals(20_001, 0.5, &mut generator(7, "layer"));
        assert_eq!(values.len(), 20_001);
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        let beyond = values.iter().filter(|v| v.abs() > 1.0).count() as f32 / values.len() as f32;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((square / 0.25 - 1.0).abs() < 0.05, "mean square {square}");
        assert!((beyond - 0.0455).abs() < 0.006, "beyond two deviations: {beyond}");
    }

    #[test]
    fn the_draw_depends_on_the_seed_and_the_name_and_on_nothing_else() {
        assert_eq!(draw(7, "layer"), draw(7, "layer"));
        assert_ne!(draw(7, "layer"), draw(8, "layer"));
        assert_ne!(draw(7, "layer"), draw(7, "other"));
        // Fixed for good: adapters of one seed must be the same in every version.
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
