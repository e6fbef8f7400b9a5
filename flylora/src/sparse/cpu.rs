//! The loops: parallel over blocks of rows, vectorised over the rows of a block or the values of a row.
//!
//! The order of every sum is fixed, so results do not depend on the number of threads.

use candle_core::WithDType;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::SparseMatrix;

/// Rows of x that are projected together: their values of one column lie side by side.
const LANES: usize = 16;
/// Rows of A whose sums are made at a time.
const GROUP: usize = 4;
/// Values of an output row that are summed in registers.
const CHUNK: usize = 64;

/// A float type that the loops run in.
pub(crate) trait Float: WithDType + Default + std::ops::AddAssign {
    fn of(value: f32) -> Self;
}

impl Float for f32 {
    fn of(value: f32) -> Self {
        value
    }
}

impl Float for f64 {
    fn of(value: f32) -> Self {
        f64::from(value)
    }
}

/// A block of `LANES` rows, turned: `turned[c][l] = x[l][c]`. Rows that are missing stay 0.
#[inline(always)]
fn turn<T: Float>(x: &[T], columns: usize, turned: &mut [[T; LANES]]) {
    // A few columns at a time, so that what is written stays in the cache until its lanes are full.
    for (c, part) in turned.chunks_mut(LANES).enumerate() {
        for (l, row) in x.chunks_exact(columns).enumerate() {
            for (to, from) in part.iter_mut().zip(&row[c * LANES..]) {
                to[l] = *from;
            }
        }
    }
}

/// The way back, added to what is there.
#[inline(always)]
fn turn_back<T: Float>(turned: &[[T; LANES]], columns: usize, x: &mut [T]) {
    for (c, part) in turned.chunks(LANES).enumerate() {
        for (l, row) in x.chunks_exact_mut(columns).enumerate() {
            for (from, to) in part.iter().zip(&mut row[c * LANES..]) {
                *to += from[l];
            }
        }
    }
}

/// `y = x A^T`: x (m, columns), y (m, rows).
pub(super) fn project<T: Float>(x: &[T], a: &SparseMatrix) -> Vec<T> {
    let m = x.len() / a.columns.max(1);
    let mut y = vec![T::default(); m * a.rows];
    let arch = Arch::new();
    x.par_chunks(LANES * a.columns).zip(y.par_chunks_mut(LANES * a.rows)).for_each_init(
        || vec![[T::default(); LANES]; a.columns],
        |turned, (x, y)| arch.dispatch(Project { x, y, a, turned }),
    );
    y
}

struct Project<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
    a: &'a SparseMatrix,
    turned: &'a mut [[T; LANES]],
}

impl<T: Float> WithSimd for Project<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, y, a, turned } = self;
        if x.len() < 4 * a.columns {
            // Not worth turning.
            for (x, y) in x.chunks_exact(a.columns).zip(y.chunks_exact_mut(a.rows)) {
                let rows = a.indices.chunks_exact(a.per_row).zip(a.values.chunks_exact(a.per_row));
                for (y, (indices, values)) in y.iter_mut().zip(rows) {
                    let mut sum = T::default();
                    for (i, v) in indices.iter().zip(values) {
                        sum += T::of(*v) * x[*i as usize];
                    }
                    *y = sum;
                }
            }
            return;
        }
        turn(x, a.columns, turned);
        // Several rows of A at a time: their sums do not wait for each other.
        let mut row = 0;
        let (indices, values) = (a.indices.as_slice(), a.values.as_slice());
        let groups = indices.chunks_exact(GROUP * a.per_row).zip(values.chunks_exact(GROUP * a.per_row));
        for (indices, values) in groups {
            let of = |g: usize| {
                let part = g * a.per_row..(g + 1) * a.per_row;
                indices[part.clone()].iter().zip(&values[part])
            };
            let mut sums = [[T::default(); LANES]; GROUP];
            for (((e0, e1), e2), e3) in of(0).zip(of(1)).zip(of(2)).zip(of(3)) {
                for (sums, (i, v)) in sums.iter_mut().zip([e0, e1, e2, e3]) {
                    let (x, v) = (&turned[*i as usize], T::of(*v));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum += v * *x;
                    }
                }
            }
            for sums in sums {
                scatter(&sums, y, a.rows, row);
                row += 1;
            }
        }
        let rest = indices.chunks_exact(a.per_row).zip(values.chunks_exact(a.per_row)).skip(row);
        for (indices, values) in rest {
            let mut sums = [T::default(); LANES];
            for (i, v) in indices.iter().zip(values) {
                let v = T::of(*v);
                for (sum, x) in sums.iter_mut().zip(&turned[*i as usize]) {
                    *sum += v * *x;
                }
            }
            scatter(&sums, y, a.rows, row);
            row += 1;
        }
    }
}

/// Writes the sums of one row of A into its column of y.
#[inline(always)]
fn scatter<T: Float>(sums: &[T; LANES], y: &mut [T], rows: usize, row: usize) {
    for (y, sum) in y.chunks_exact_mut(rows).zip(sums) {
        y[row] = *sum;
    }
}

/// `out += sum of v * row` over terms, whose rows are as long as `out`.
#[inline(always)]
fn combine<'a, T: Float + 'a>(out: &mut [T], terms: impl Iterator<Item = (T, &'a [T])> + Clone) {
    let full = out.len() - out.len() % CHUNK;
    let (chunks, rest) = out.split_at_mut(full);
    for (c, out) in chunks.chunks_exact_mut(CHUNK).enumerate() {
        // Of a fixed length, so that it stays in registers.
        let mut sums = [T::default(); CHUNK];
        sums.copy_from_slice(out);
        for (v, row) in terms.clone() {
            if let Some(row) = row[c * CHUNK..].first_chunk::<CHUNK>() {
                for (sum, b) in sums.iter_mut().zip(row) {
                    *sum += v * *b;
                }
            }
        }
        out.copy_from_slice(&sums);
    }
    for (v, row) in terms {
        for (sum, b) in rest.iter_mut().zip(&row[full..]) {
            *sum += v * *b;
        }
    }
}

/// `dx += dy A`: dy (m, rows), dx (m, columns).
pub(super) fn project_back<T: Float>(dx: &mut [T], dy: &[T], a: &SparseMatrix) {
    let arch = Arch::new();
    dy.par_chunks(LANES * a.rows).zip(dx.par_chunks_mut(LANES * a.columns)).for_each_init(
        || (vec![[T::default(); LANES]; a.rows], vec![[T::default(); LANES]; a.columns]),
        |(dy_turned, dx_turned), (dy, dx)| {
            arch.dispatch(ProjectBack { dy, dx, a, dy_turned, dx_turned });
        },
    );
}

struct ProjectBack<'a, T> {
    dy: &'a [T],
    dx: &'a mut [T],
    a: &'a SparseMatrix,
    dy_turned: &'a mut [[T; LANES]],
    dx_turned: &'a mut [[T; LANES]],
}

impl<T: Float> WithSimd for ProjectBack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { dy, dx, a, dy_turned, dx_turned } = self;
        turn(dy, a.rows, dy_turned);
        for (ends, dx) in a.starts.windows(2).zip(dx_turned.iter_mut()) {
            let mut sums = [T::default(); LANES];
            for (row, v) in &a.by_column[ends[0] as usize..ends[1] as usize] {
                let v = T::of(*v);
                for (sum, dy) in sums.iter_mut().zip(&dy_turned[*row as usize]) {
                    *sum += v * *dy;
                }
            }
            *dx = sums;
        }
        turn_back(dx_turned, a.columns, dx);
    }
}

/// `delta[m] += sum over i in chosen[m] of y[m][i] b[i]`: y (m, r), b (r, out), chosen (m, k), delta (m, out).
pub(super) fn routed<T: Float>(
    delta: &mut [T],
    y: &[T],
    b: &[T],
    chosen: &[u32],
    (r, k, out): (usize, usize, usize),
) {
    let arch = Arch::new();
    let block = LANES;
    delta
        .par_chunks_mut(block * out)
        .zip(y.par_chunks(block * r).zip(chosen.par_chunks(block * k)))
        .for_each(|(delta, (y, chosen))| arch.dispatch(Routed { y, b, chosen, delta, r, k, out }));
}

struct Routed<'a, T> {
    y: &'a [T],
    b: &'a [T],
    chosen: &'a [u32],
    delta: &'a mut [T],
    r: usize,
    k: usize,
    out: usize,
}

impl<T: Float> WithSimd for Routed<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { y, b, chosen, delta, r, k, out } = self;
        let rows = y.chunks_exact(r).zip(chosen.chunks_exact(k)).zip(delta.chunks_exact_mut(out));
        for ((y, chosen), delta) in rows {
            let terms = chosen.iter().map(|i| {
                let i = *i as usize;
                (y[i], &b[i * out..(i + 1) * out])
            });
            combine(delta, terms);
        }
    }
}

/// `dy[m][i] = delta'[m] . b[i]` for i in chosen[m], else 0: the gradient of y in [`routed`].
pub(super) fn routed_back_y<T: Float>(
    grad: &[T],
    b: &[T],
    chosen: &[u32],
    (r, k, out): (usize, usize, usize),
) -> Vec<T> {
    let m = grad.len() / out.max(1);
    let mut dy = vec![T::default(); m * r];
    let arch = Arch::new();
    let block = LANES;
    dy.par_chunks_mut(block * r)
        .zip(grad.par_chunks(block * out).zip(chosen.par_chunks(block * k)))
        .for_each(|(dy, (grad, chosen))| arch.dispatch(RoutedBackY { dy, grad, b, chosen, r, k, out }));
    dy
}

struct RoutedBackY<'a, T> {
    dy: &'a mut [T],
    grad: &'a [T],
    b: &'a [T],
    chosen: &'a [u32],
    r: usize,
    k: usize,
    out: usize,
}

impl<T: Float> WithSimd for RoutedBackY<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { dy, grad, b, chosen, r, k, out } = self;
        let rows = dy.chunks_exact_mut(r).zip(grad.chunks_exact(out)).zip(chosen.chunks_exact(k));
        for ((dy, grad), chosen) in rows {
            for i in chosen {
                let i = *i as usize;
                dy[i] = dot(grad, &b[i * out..(i + 1) * out]);
            }
        }
    }
}

#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::default(); CHUNK];
    let (a_parts, b_parts) = (a.chunks_exact(CHUNK), b.chunks_exact(CHUNK));
    let rest = a_parts.remainder().iter().zip(b_parts.remainder());
    let mut total = T::default();
    for (a, b) in rest {
        total += *a * *b;
    }
    for (a, b) in a_parts.zip(b_parts) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += *a * *b;
        }
    }
    for sum in sums {
        total += sum;
    }
    total
}

/// `db[i] = sum over m with i in chosen[m] of y[m][i] delta'[m]`: the gradient of b in [`routed`], (r, out).
pub(super) fn routed_back_b<T: Float>(
    grad: &[T],
    y: &[T],
    chosen: &[u32],
    (r, k, out): (usize, usize, usize),
) -> Vec<T> {
    // The rows of x that chose each i, in their order.
    let mut users: Vec<Vec<u32>> = vec![Vec::new(); r];
    for (m, chosen) in chosen.chunks_exact(k.max(1)).enumerate() {
        for i in chosen {
            users[*i as usize].push(m as u32);
        }
    }
    let mut db = vec![T::default(); r * out];
    let arch = Arch::new();
    db.par_chunks_mut(out.max(1))
        .zip(users.par_iter())
        .enumerate()
        .for_each(|(i, (db, users))| arch.dispatch(RoutedBackB { db, grad, y, users, i, r, out }));
    db
}

struct RoutedBackB<'a, T> {
    db: &'a mut [T],
    grad: &'a [T],
    y: &'a [T],
    users: &'a [u32],
    i: usize,
    r: usize,
    out: usize,
}

impl<T: Float> WithSimd for RoutedBackB<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { db, grad, y, users, i, r, out } = self;
        let terms = users.iter().map(|m| {
            let m = *m as usize;
            (y[m * r + i], &grad[m * out..(m + 1) * out])
        });
        combine(db, terms);
    }
}

/// (rows, columns) to (columns, rows).
pub(super) fn transpose<T: Float>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut turned = vec![T::default(); x.len()];
    for (c, to) in turned.chunks_exact_mut(rows.max(1)).enumerate() {
        for (to, from) in to.iter_mut().zip(x.iter().skip(c).step_by(columns.max(1))) {
            *to = *from;
        }
    }
    turned
}

/// The indices of the `k` largest scores of each row, ascending; of equal scores the first. scores: (m, r).
pub(crate) fn top_k(scores: &[f32], r: usize, k: usize) -> Vec<u32> {
    let m = scores.len() / r.max(1);
    let mut chosen = vec![0u32; m * k];
    let block = 64;
    chosen.par_chunks_mut(block * k).zip(scores.par_chunks(block * r)).for_each(|(chosen, scores)| {
        let mut order: Vec<u32> = Vec::with_capacity(r);
        for (chosen, scores) in chosen.chunks_exact_mut(k).zip(scores.chunks_exact(r)) {
            order.clear();
            order.extend(0..r as u32);
            if k < r {
                order.select_nth_unstable_by(k, |a, b| {
                    scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b))
                });
            }
            chosen.copy_from_slice(&order[..k]);
            chosen.sort_unstable();
        }
    });
    chosen
}
