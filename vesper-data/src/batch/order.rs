//! The order of an epoch's windows.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A permutation of `0..windows` that depends on `seed` and `epoch` alone.
///
/// Fisher and Yates's shuffle, driven by ChaCha8 (key from the seed, stream number = epoch). Both are spelled
/// out here instead of left to a library's `shuffle`, since a saved run must find the same order with every
/// later version.
pub(super) fn epoch_order(windows: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut key = [0; 32];
    for (slot, byte) in key.iter_mut().zip(seed.to_le_bytes()) {
        *slot = byte;
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..windows).collect();
    for last in (1..windows).rev() {
        order.swap(last, below(&mut rng, last as u64 + 1) as usize);
    }
    order
}

/// A number uniform in `0..bound`, without bias: the low end of the product is refused (Lemire 2019).
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let refused = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= refused {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values are those of `tests/golden/epoch_order.py`, which knows nothing of this file. A change here
    /// would send every saved run down another path.
    #[test]
    fn the_order_of_a_seed_and_an_epoch_never_changes() {
        assert_eq!(epoch_order(10, 0, 0), [9, 2, 3, 4, 6, 7, 0, 1, 5, 8]);
        assert_eq!(epoch_order(10, 42, 1), [4, 6, 8, 9, 2, 3, 0, 5, 1, 7]);
        let large = epoch_order(100, 1 << 40, (1 << 33) + 5);
        assert_eq!(large[..10], [71, 68, 84, 76, 63, 46, 74, 75, 13, 97]);
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = epoch_order(100, 1, 0);
        assert_ne!(order, epoch_order(100, 1, 1));
        assert_ne!(order, epoch_order(100, 2, 0));
        assert_ne!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn all_orders_are_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts.entry(epoch_order(3, seed, 0)).or_insert(0) += 1;
        }
        // 1000 expected of each of the 6 orders, standard deviation 29.
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
