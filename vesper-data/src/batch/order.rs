//! Shuffling without a list: a permutation that is computed number by number.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The name of the order that saved states count in. Another algorithm would get another name.
pub const ORDER: &str = "feistel-chacha8-1";

/// The order of versions of this crate that kept it in a list (ChaCha8, Fisher and Yates), whose states do not name it.
pub(super) fn first_order() -> String {
    "fisher-yates-chacha8".to_owned()
}

const ROUNDS: usize = 8;
/// Numbers are permuted in a domain of at least 2^10: with fewer bits, a Feistel network makes some orders more often.
const MIN_BITS: u32 = 10;

/// A permutation of `0..len` that depends on `len`, the seed, the epoch and the use alone.
///
/// ```text
/// bits = max(10, number of bits of len - 1)      left = bits / 2, right = bits - left
/// key[0..8]: the first u64 of ChaCha8, whose key is seed, use (u64, little-endian), zeros, and whose stream is epoch
/// network(x):  l, r = the upper `left` and the lower `right` bits of x
///              for each round: l, r = r, l xor (the lowest bits of mix(r xor key[round]), as many as l has)
///              x = l, r (after 8 rounds each half has its first width)
/// at(i): network(i), then network of that, ... until it is below len (cycle walking)
/// mix: SplitMix64's function of the state
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Permutation {
    len: u64,
    left: u32,
    right: u32,
    keys: [u64; ROUNDS],
}

/// What a permutation is of: the same seed and epoch give each its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// The windows of a stream.
    Windows,
    /// Documents, before they are packed.
    Documents,
    /// The rows of a block of packed documents.
    Rows(u64),
}

impl Permutation {
    pub(super) fn new(len: u64, seed: u64, epoch: u64, purpose: Use) -> Self {
        let purpose = match purpose {
            Use::Windows => 0,
            Use::Documents => 1,
            Use::Rows(block) => block.saturating_add(2),
        };
        let mut key = [0; 32];
        for (slot, byte) in
            key.iter_mut().zip(seed.to_le_bytes().into_iter().chain(u64::to_le_bytes(purpose)))
        {
            *slot = byte;
        }
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch);
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(MIN_BITS);
        let left = bits / 2;
        Self { len, left, right: bits - left, keys: std::array::from_fn(|_| rng.next_u64()) }
    }

    /// The number in place `index`, which must be below the length.
    pub(super) fn at(&self, index: u64) -> u64 {
        let mut x = self.network(index);
        // The walk comes back to `index` at the latest, which is below the length.
        while x >= self.len && index < self.len {
            x = self.network(x);
        }
        x
    }

    fn network(&self, x: u64) -> u64 {
        let (mut l, mut r) = (x >> self.right, x & low(self.right));
        let (mut l_bits, mut r_bits) = (self.left, self.right);
        for key in self.keys {
            (l, r) = (r, l ^ (mix(r ^ key) & low(l_bits)));
            (l_bits, r_bits) = (r_bits, l_bits);
        }
        (l << r_bits) | r
    }
}

/// The lowest `bits` bits set; at most 32 are asked for.
fn low(bits: u32) -> u64 {
    (1_u64 << bits) - 1
}

/// SplitMix64's function of the state.
pub(crate) fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(len: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, seed, epoch, Use::Windows);
        (0..len).map(|index| permutation.at(index)).collect()
    }

    /// The values are those of `tests/golden/orders.py`, which knows nothing of this file. A change here would send
    /// every saved run down another path.
    #[test]
    fn the_order_of_a_seed_and_an_epoch_never_changes() {
        assert_eq!(order(10, 0, 0), GOLDEN_SMALL);
        assert_eq!(order(10, 42, 1), GOLDEN_OTHER);
        let large = Permutation::new((1 << 41) + 12345, 1 << 40, (1 << 33) + 5, Use::Windows);
        assert_eq!([0, 1, 2, 1 << 41].map(|index| large.at(index)), GOLDEN_LARGE);
        let rows = Permutation::new(1000, 7, 3, Use::Rows(5));
        assert_eq!([0, 1, 2, 999].map(|index| rows.at(index)), GOLDEN_ROWS);
    }

    const GOLDEN_SMALL: [u64; 10] = [9, 4, 6, 8, 3, 2, 5, 0, 1, 7];
    const GOLDEN_OTHER: [u64; 10] = [4, 8, 9, 7, 6, 1, 0, 2, 3, 5];
    const GOLDEN_LARGE: [u64; 4] = [933_145_680_827, 431_146_694_448, 1_704_078_863_691, 2_109_908_365_656];
    const GOLDEN_ROWS: [u64; 4] = [462, 147, 399, 794];

    #[test]
    fn epochs_seeds_and_uses_differ() {
        assert_ne!(order(100, 1, 0), order(100, 1, 1));
        assert_ne!(order(100, 1, 0), order(100, 2, 0));
        assert_ne!(order(100, 1, 0), (0..100).collect::<Vec<_>>());
        let documents = Permutation::new(100, 1, 0, Use::Documents);
        assert_ne!(documents, Permutation::new(100, 1, 0, Use::Windows));
        assert_ne!(documents, Permutation::new(100, 1, 0, Use::Rows(0)));
    }

    proptest! {
        #[test]
        fn every_number_comes_exactly_once(len in 1..5000_u64, seed: u64, epoch: u64) {
            let mut all = order(len, seed, epoch);
            all.sort_unstable();
            prop_assert_eq!(all, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn any_length_stays_in_range_without_a_collision(len in 1..=u64::MAX, seed: u64, start: u64) {
            let permutation = Permutation::new(len, seed, 0, Use::Windows);
            let indices: std::collections::BTreeSet<u64> = (0..50).map(|step| (start % len).wrapping_add(step) % len).collect();
            let images: std::collections::BTreeSet<u64> = indices.iter().map(|&index| permutation.at(index)).collect();
            prop_assert_eq!(images.len(), indices.len());
            prop_assert!(images.iter().all(|&image| image < len));
        }
    }

    /// Pearson's chi-squared statistic of counts that should all be equal.
    fn chi_squared(counts: &[u64]) -> f64 {
        let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        counts.iter().map(|&count| (count as f64 - expected).powi(2) / expected).sum()
    }

    #[test]
    fn all_orders_of_a_few_are_equally_likely() {
        for (len, orders) in [(3, 6), (4, 24)] {
            let mut counts = std::collections::BTreeMap::new();
            for seed in 0..orders * 400 {
                *counts.entry(order(len, seed, 0)).or_insert(0) += 1;
            }
            assert_eq!(counts.len() as u64, orders);
            let counts: Vec<u64> = counts.into_values().collect();
            // Mean `orders - 1`, variance twice that: five standard deviations. The seeds are fixed, so is the result.
            let degrees = (orders - 1) as f64;
            assert!(chi_squared(&counts) < degrees + 5.0 * (2.0 * degrees).sqrt(), "{counts:?}");
        }
    }

    #[test]
    fn every_number_is_equally_likely_in_every_place_and_after_every_other() {
        let (len, runs) = (40_u64, 4000_u64);
        let mut places = vec![0; (len * len) as usize];
        let mut steps = vec![0; (len - 1) as usize];
        for epoch in 0..runs {
            let order = order(len, 9, epoch);
            for (place, number) in order.iter().enumerate() {
                places[place * len as usize + *number as usize] += 1;
            }
            for pair in order.windows(2) {
                steps[((pair[1] + len - pair[0]) % len) as usize - 1] += 1;
            }
        }
        // Rows and columns are fixed: (len - 1)^2 degrees of freedom.
        let degrees = ((len - 1) * (len - 1)) as f64;
        assert!((chi_squared(&places) - degrees).abs() < 5.0 * (2.0 * degrees).sqrt());
        let degrees = (len - 2) as f64;
        assert!(chi_squared(&steps) < degrees + 5.0 * (2.0 * degrees).sqrt(), "{steps:?}");
    }

    #[test]
    fn neighbours_are_scattered_over_a_large_range() {
        let len = 1_000_003;
        let order = order(len, 3, 0);
        // The mean distance of two random numbers of a range is a third of it, with a standard deviation of 0.24.
        let distances: f64 = order.windows(2).map(|pair| pair[0].abs_diff(pair[1]) as f64 / len as f64).sum();
        assert!((distances / (len - 1) as f64 - 1.0 / 3.0).abs() < 5.0 * 0.24 / (len as f64).sqrt());
    }
}
