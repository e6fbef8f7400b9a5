//! A counter-based random generator: any word of any stream without the ones before it.

use super::real;

/// The place in a random sequence that an operation draws from: Philox 4x32-10.
///
/// ```text
/// word i of (seed, offset) = word i % 4 of philox(key, counter)
/// key = seed    counter = (i / 4) + 2^64 offset
/// ```
///
/// Nothing is stored and nothing advances: the same pair gives the same words, on every device and for any number of
/// threads, and two offsets of a seed share no word. Give each call its own offset, for instance
/// `step * calls_per_step + call`.
///
/// # References
/// Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Philox {
    /// The key: one for each run.
    pub seed: u64,
    /// The high half of the counter: one for each call.
    pub offset: u64,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
/// Blocks computed side by side, so that the rounds vectorise.
const LANES: usize = 16;
/// Words that [`Philox::fill`] makes in one go.
pub(super) const GROUP: usize = 4 * LANES;

impl Philox {
    /// Writes the words from `4 * first_block` on; vectorises inside of `real::simd`.
    #[inline(always)]
    pub(super) fn fill(self, first_block: u64, words: &mut [u32]) {
        let keys = self.keys();
        for (group, words) in words.chunks_mut(GROUP).enumerate() {
            let start = first_block.wrapping_add((group * LANES) as u64);
            let blocks: [u64; LANES] = std::array::from_fn(|lane| start.wrapping_add(lane as u64));
            let counter = [
                blocks.map(|block| block as u32),
                blocks.map(|block| (block >> 32) as u32),
                [self.offset as u32; LANES],
                [(self.offset >> 32) as u32; LANES],
            ];
            let counter = rounds(counter, keys);
            for (i, word) in words.iter_mut().enumerate() {
                *word = counter[i % 4][i / 4];
            }
        }
    }

    /// The key of each round.
    #[inline(always)]
    pub(super) fn keys(self) -> [[u32; 2]; ROUNDS] {
        let mut next = [self.seed as u32, (self.seed >> 32) as u32];
        [(); ROUNDS].map(|()| {
            let key = next;
            next = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            key
        })
    }

    /// The first `n` words.
    pub(super) fn words(self, n: usize) -> Vec<u32> {
        let mut words = vec![0; n];
        real::simd(
            #[inline(always)]
            || self.fill(0, &mut words),
        );
        words
    }
}

#[inline(always)]
fn rounds<const N: usize>(mut counter: [[u32; N]; 4], keys: [[u32; 2]; ROUNDS]) -> [[u32; N]; 4] {
    for key in keys {
        let mut next = [[0; N]; 4];
        for lane in 0..N {
            let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0][lane]);
            let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2][lane]);
            next[0][lane] = (b >> 32) as u32 ^ counter[1][lane] ^ key[0];
            next[1][lane] = b as u32;
            next[2][lane] = (a >> 32) as u32 ^ counter[3][lane] ^ key[1];
            next[3][lane] = a as u32;
        }
        counter = next;
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_answers() {
        // "philox4x32 10" of tests/kat_vectors in the authors' Random123: counter, key, answer.
        let known = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, answer) in known {
            let random = Philox {
                seed: u64::from(key[0]) | u64::from(key[1]) << 32,
                offset: u64::from(counter[2]) | u64::from(counter[3]) << 32,
            };
            assert_eq!(rounds(counter.map(|word| [word]), random.keys()), answer.map(|word: u32| [word]));
            let mut words = [0; 4];
            random.fill(u64::from(counter[0]) | u64::from(counter[1]) << 32, &mut words);
            assert_eq!(words, answer);
        }
    }

    #[test]
    fn words_depend_on_their_place_alone() {
        let random = Philox { seed: 7, offset: 3 };
        let all = random.words(300);
        assert_eq!(random.words(5), all[..5]);
        let mut late = [0; 130];
        random.fill(40, &mut late);
        assert_eq!(late[..], all[160..290]);
    }
}
