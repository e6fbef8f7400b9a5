//! Products of stored rows with a few vectors, and weighted sums of stored rows: each row is read once, at the speed of
//! memory.
//!
//! Rows are seen as words of 32 bits: one f32, or two bf16, which are widened while they are read. A sum of products runs
//! in an order that depends on the length alone, so a vector's results do not depend on those beside it.

use pulp::bytemuck;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Products that are worth a task of their own.
pub(super) const TASK: usize = 1 << 16;

/// Rows of equal length.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Rows<'a> {
    words: &'a [u32],
    /// Words in a row.
    width: usize,
    /// Whether a word is two bf16.
    pairs: bool,
}

impl<'a> Rows<'a> {
    /// `width` words a row.
    pub(in crate::ops) fn new(words: &'a [u32], width: usize, pairs: bool) -> Self {
        Self { words, width, pairs }
    }

    pub(super) fn count(self) -> usize {
        self.words.len() / self.width.max(1)
    }

    /// Values in a row.
    pub(super) fn values(self) -> usize {
        if self.pairs { 2 * self.width } else { self.width }
    }

    /// The rows `start .. start + count`.
    fn part(self, start: usize, count: usize) -> Self {
        Self { words: &self.words[start * self.width..][..count * self.width], ..self }
    }

    fn row(self, i: usize) -> &'a [u32] {
        &self.words[i * self.width..][..self.width]
    }
}

/// Vectors as the products read them: filled up with zeros to whole registers and, beside pairs of bf16, with the even
/// and the odd elements of two registers apart.
#[derive(Debug)]
pub(in crate::ops) struct Vectors {
    data: Vec<f32>,
    stride: usize,
    count: usize,
}

impl Vectors {
    /// `count` vectors after each other, to be multiplied with `rows`.
    pub(in crate::ops) fn new(values: &[f32], count: usize, rows: Rows<'_>) -> Self {
        struct Pack<'a>(&'a [f32], usize, bool);
        impl WithSimd for Pack<'_> {
            type Output = Vec<f32>;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
                let Self(values, n, pairs) = self;
                let lanes = S::F32_LANES;
                let step = if pairs { 2 * lanes } else { lanes };
                let stride = n.next_multiple_of(step);
                let mut data = vec![0.0; values.len() / n.max(1) * stride];
                for (to, from) in data.chunks_exact_mut(stride.max(1)).zip(values.chunks_exact(n.max(1))) {
                    if pairs {
                        for (to, from) in to.chunks_exact_mut(step).zip(from.chunks(step)) {
                            for (i, value) in from.iter().enumerate() {
                                to[i % 2 * lanes + i / 2] = *value;
                            }
                        }
                    } else {
                        to[..n].copy_from_slice(from);
                    }
                }
                data
            }
        }
        let data = pulp::Arch::new().dispatch(Pack(values, rows.values(), rows.pairs));
        Self { stride: data.len() / count.max(1), data, count }
    }

    fn vector(&self, i: usize) -> &[f32] {
        &self.data[i * self.stride..][..self.stride]
    }
}

/// `out[row][vector] = row . vector`, by several threads where that pays.
pub(super) fn products(rows: Rows<'_>, vectors: &Vectors) -> Vec<f32> {
    let (count, columns) = (rows.count(), vectors.count);
    let mut out = vec![0.0; count * columns];
    let work = count * rows.values() * columns;
    let threads = rayon::current_num_threads();
    if work < 2 * TASK || threads == 1 {
        some_products(rows, vectors, &mut out);
        return out;
    }
    // A few tasks a thread, so that one that is late does not hold up the rest.
    let tasks = (work / TASK).min(4 * threads).max(1);
    let each = count.div_ceil(tasks).next_multiple_of(8);
    out.par_chunks_mut(each * columns).enumerate().for_each(|(i, out)| {
        some_products(rows.part(i * each, out.len() / columns), vectors, out);
    });
    out
}

/// As [`products`], by this thread alone.
pub(in crate::ops) fn some_products(rows: Rows<'_>, vectors: &Vectors, out: &mut [f32]) {
    struct Run<'a>(Rows<'a>, &'a Vectors, &'a mut [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(rows, vectors, out) = self;
            if rows.pairs {
                all::<S, true>(simd, rows, vectors, out);
            } else {
                all::<S, false>(simd, rows, vectors, out);
            }
        }
    }
    pulp::Arch::new().dispatch(Run(rows, vectors, out));
}

#[inline(always)]
fn all<S: Simd, const PAIRS: bool>(simd: S, rows: Rows<'_>, vectors: &Vectors, out: &mut [f32]) {
    let count = rows.count();
    let mut column = 0;
    // 16 sums are held in registers, or 8.
    let most = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
    while column < vectors.count {
        let left = (vectors.count - column).min(most);
        let mut row = 0;
        while row < count {
            let rest = count - row;
            let (taken, wide) = match (left, rest) {
                (1, 8..) => (block::<S, PAIRS, 8, 1>(simd, rows, row, vectors, column, out), 1),
                (1, _) => (block::<S, PAIRS, 1, 1>(simd, rows, row, vectors, column, out), 1),
                (2 | 3, 4..) => (block::<S, PAIRS, 4, 2>(simd, rows, row, vectors, column, out), 2),
                (2 | 3, _) => (block::<S, PAIRS, 1, 2>(simd, rows, row, vectors, column, out), 2),
                (_, 4..) => (block::<S, PAIRS, 4, 4>(simd, rows, row, vectors, column, out), 4),
                (_, _) => (block::<S, PAIRS, 1, 4>(simd, rows, row, vectors, column, out), 4),
            };
            debug_assert!(wide <= left);
            row += taken;
        }
        column += match left {
            3 => 2,
            left => left,
        };
    }
}

/// The products of R rows with B vectors; R.
#[inline(always)]
fn block<S: Simd, const PAIRS: bool, const R: usize, const B: usize>(
    simd: S,
    rows: Rows<'_>,
    row: usize,
    vectors: &Vectors,
    column: usize,
    out: &mut [f32],
) -> usize {
    // Plain loops: a closure may be compiled without the instructions of its surroundings.
    let (whole, factor) = (rows.width / S::U32_LANES, if PAIRS { 2 } else { 1 });
    let mut bodies: [&[S::u32s]; R] = [&[]; R];
    let mut tails: [&[u32]; R] = [&[]; R];
    for i in 0..R {
        (bodies[i], tails[i]) = S::as_simd_u32s(rows.row(row + i));
        bodies[i] = &bodies[i][..whole];
    }
    let mut xs: [&[S::f32s]; B] = [&[]; B];
    let mut rests: [&[S::f32s]; B] = [&[]; B];
    for b in 0..B {
        (xs[b], rests[b]) = S::as_simd_f32s(vectors.vector(column + b)).0.split_at(factor * whole);
    }
    let mut sums = [[simd.splat_f32s(0.0); B]; R];
    let mut words = [simd.splat_u32s(0); R];
    let mut low = [simd.splat_f32s(0.0); B];
    let mut high = low;
    for c in 0..whole {
        for i in 0..R {
            words[i] = bodies[i][c];
        }
        for b in 0..B {
            low[b] = xs[b][factor * c];
            high[b] = xs[b][factor * c + factor - 1];
        }
        add::<S, PAIRS, R, B>(simd, &mut sums, words, low, high);
    }
    if !tails[0].is_empty() {
        for i in 0..R {
            words[i] = simd.partial_load_u32s(tails[i]);
        }
        for b in 0..B {
            low[b] = rests[b][0];
            high[b] = rests[b][factor - 1];
        }
        add::<S, PAIRS, R, B>(simd, &mut sums, words, low, high);
    }
    for (i, sums) in sums.iter().enumerate() {
        for (b, sum) in sums.iter().enumerate() {
            out[(row + i) * vectors.count + column + b] = simd.reduce_sum_f32s(*sum);
        }
    }
    R
}

/// Adds the products of one register of each row with those of each vector.
#[inline(always)]
fn add<S: Simd, const PAIRS: bool, const R: usize, const B: usize>(
    simd: S,
    sums: &mut [[S::f32s; B]; R],
    words: [S::u32s; R],
    low: [S::f32s; B],
    high: [S::f32s; B],
) {
    for i in 0..R {
        let (even, odd) = widened::<S, PAIRS>(simd, words[i]);
        for b in 0..B {
            sums[i][b] = simd.mul_add_f32s(even, low[b], sums[i][b]);
            if PAIRS {
                sums[i][b] = simd.mul_add_f32s(odd, high[b], sums[i][b]);
            }
        }
    }
}

/// The values of words: of pairs the even and the odd ones, otherwise the words themselves twice.
#[inline(always)]
fn widened<S: Simd, const PAIRS: bool>(simd: S, words: S::u32s) -> (S::f32s, S::f32s) {
    if PAIRS {
        // bf16 is the upper half of f32.
        let even = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let odd = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        (simd.transmute_f32s_u32s(even), simd.transmute_f32s_u32s(odd))
    } else {
        let values = simd.transmute_f32s_u32s(words);
        (values, values)
    }
}

/// `out = sum of weights[i] rows[i]`, over as many rows as there are weights.
pub(super) fn weighted_sum(rows: Rows<'_>, weights: &[f32], out: &mut [f32]) {
    struct Run<'a>(Rows<'a>, &'a [f32], &'a mut [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(rows, weights, out) = self;
            if rows.pairs {
                sum_columns::<S, true>(simd, rows, weights, out);
            } else {
                sum_columns::<S, false>(simd, rows, weights, out);
            }
        }
    }
    pulp::Arch::new().dispatch(Run(rows, weights, out));
}

#[inline(always)]
fn sum_columns<S: Simd, const PAIRS: bool>(simd: S, rows: Rows<'_>, weights: &[f32], out: &mut [f32]) {
    let (lanes, mut word) = (S::U32_LANES, 0);
    while word < rows.width {
        let left = rows.width - word;
        if left >= 4 * lanes {
            sum_words::<S, PAIRS, 4>(simd, rows, word, weights, out);
            word += 4 * lanes;
        } else {
            sum_words::<S, PAIRS, 1>(simd, rows, word, weights, out);
            word += lanes;
        }
    }
}

/// The columns of C registers from a word on; the last register may be cut.
#[inline(always)]
fn sum_words<S: Simd, const PAIRS: bool, const C: usize>(
    simd: S,
    rows: Rows<'_>,
    word: usize,
    weights: &[f32],
    out: &mut [f32],
) {
    let lanes = S::U32_LANES;
    let end = rows.width.min(word + C * lanes);
    let mut sums = [[simd.splat_f32s(0.0); 2]; C];
    for (i, weight) in weights.iter().enumerate() {
        let weight = simd.splat_f32s(*weight);
        let words = &rows.row(i)[word..end];
        for (c, sums) in sums.iter_mut().enumerate() {
            let words = &words[c * lanes..];
            let words = if words.len() >= lanes {
                S::as_simd_u32s(&words[..lanes]).0[0]
            } else {
                simd.partial_load_u32s(words)
            };
            let (even, odd) = widened::<S, PAIRS>(simd, words);
            sums[0] = simd.mul_add_f32s(even, weight, sums[0]);
            if PAIRS {
                sums[1] = simd.mul_add_f32s(odd, weight, sums[1]);
            }
        }
    }
    let factor = if PAIRS { 2 } else { 1 };
    for (c, sums) in sums.iter().enumerate() {
        let (even, odd): (&[f32], &[f32]) =
            (bytemuck::cast_slice(&sums[..1]), bytemuck::cast_slice(&sums[1..]));
        let out = &mut out[factor * (word + c * lanes)..factor * end.min(word + (c + 1) * lanes)];
        for (i, out) in out.iter_mut().enumerate() {
            *out = if PAIRS && i % 2 == 1 { odd[i / 2] } else { even[i / factor] };
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Exact in bf16.
        (0..n).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0)).to_f32()).collect()
    }

    fn words(values: &[f32], pairs: bool) -> Vec<u32> {
        if !pairs {
            return values.iter().map(|v| v.to_bits()).collect();
        }
        let bits = |v: f32| u32::from(bf16::from_f32(v).to_bits());
        values.chunks(2).map(|pair| bits(pair[0]) | bits(pair[1]) << 16).collect()
    }

    /// Rows, their values, and the length of one.
    fn case(count: usize, n: usize, pairs: bool) -> (Vec<u32>, Vec<f32>, usize) {
        let values = random(count * n, (count * 1000 + n) as u64);
        (words(&values, pairs), values, if pairs { n / 2 } else { n })
    }

    #[test]
    fn products_are_those_of_the_definition_and_do_not_depend_on_their_neighbours() {
        for pairs in [false, true] {
            for n in [2, 6, 16, 30, 32, 40, 64, 100, 160] {
                for count in [1, 3, 8, 13, 700] {
                    let (stored, values, width) = case(count, n, pairs);
                    let rows = Rows::new(&stored, width, pairs);
                    let xs = random(7 * n, 5);
                    for columns in 1..=7 {
                        let out = products(rows, &Vectors::new(&xs[..columns * n], columns, rows));
                        for row in 0..count {
                            for column in 0..columns {
                                let exact: f64 = (0..n)
                                    .map(|i| f64::from(values[row * n + i]) * f64::from(xs[column * n + i]))
                                    .sum();
                                let got = out[row * columns + column];
                                assert!((f64::from(got) - exact).abs() < 1e-5, "{got} for {exact}");
                                let x = &xs[column * n..][..n];
                                let mut alone = [0.0];
                                some_products(rows.part(row, 1), &Vectors::new(x, 1, rows), &mut alone);
                                assert_eq!(got.to_bits(), alone[0].to_bits());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn weighted_sums_are_those_of_the_definition() {
        for pairs in [false, true] {
            for n in [2, 6, 16, 30, 40, 64, 128, 200] {
                for count in [1, 5, 33] {
                    let (stored, values, width) = case(count + 2, n, pairs);
                    let weights = random(count, 9);
                    let mut out = vec![f32::NAN; n];
                    weighted_sum(Rows::new(&stored, width, pairs), &weights, &mut out);
                    for (i, got) in out.iter().enumerate() {
                        let exact: f64 =
                            (0..count).map(|p| f64::from(weights[p]) * f64::from(values[p * n + i])).sum();
                        assert!((f64::from(*got) - exact).abs() < 1e-5, "{got} for {exact}");
                    }
                }
            }
        }
    }
}
