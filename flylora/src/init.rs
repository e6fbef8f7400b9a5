//! Initial weights that reproduce: a named generator, seeded by a number and the name of the layer.

use candle_core::{DType, Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Kaiming-uniform with `a = sqrt 5`, as PEFT draws `A`: uniform in `[-1, 1) / sqrt(in)`. (r, in)
///
/// The name is part of the seed, so that layers of one model differ and their order does not matter.
pub(crate) fn kaiming_uniform(
    (rows, columns): (usize, usize),
    seed: u64,
    name: &str,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name));
    let bound = 1.0 / (columns as f64).sqrt();
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| {
            let unit = f64::from(rng.next_u32() >> 8) / f64::from(1u32 << 23) - 1.0;
            (unit * bound) as f32
        })
        .collect();
    Tensor::from_vec(values, (rows, columns), device)?.to_dtype(dtype)
}

/// FNV-1a, 64 bits: the standard library's hash may change between versions.
fn fnv1a(text: &str) -> u64 {
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
    fn the_draw_depends_on_the_seed_and_the_name_and_on_nothing_else() {
        assert_eq!(draw(7, "layer"), draw(7, "layer"));
        assert_ne!(draw(7, "layer"), draw(8, "layer"));
        assert_ne!(draw(7, "layer"), draw(7, "other"));
        // Fixed for good: adapters of one seed must be the same in every version.
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
