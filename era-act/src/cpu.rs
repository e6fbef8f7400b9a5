//! The loops over CPU memory: parallel over chunks of a fixed size, vectorised within.
//!
//! Every output element depends on its own inputs alone, and the arithmetic is the same in a vector lane and in the
//! scalar rest of a loop, so the bits depend neither on the number of threads nor on where an element lies.
//!
//! The loops stand in `WithSimd` implementations and call no closure: a closure's call is compiled without the
//! caller's target features unless it happens to be inlined.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::element::{BLOCK, Element};
use crate::pointwise::{Learned, Pointwise};
use crate::real::Real;

/// Elements a task: below this, handing work to another thread costs more than it saves.
const CHUNK: usize = 16 * BLOCK;

/// `y[i] = f(x[i])`
pub(crate) fn forward<T: Element, P: Pointwise>(f: P, x: &[T]) -> Vec<T> {
    let mut y = T::zeros(x.len());
    let arch = Arch::new();
    each_chunk(&mut y, CHUNK, |y, at| arch.dispatch(Forward { f, x: &x[at..], y }));
    y
}

struct Forward<'a, T, P> {
    f: P,
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Element, P: Pointwise> WithSimd for Forward<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { f, x, y } = self;
        let [mut bx, mut by] = [[T::Acc::ZERO; BLOCK]; 2];
        for (x, y) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)) {
            let x = T::load(x, &mut bx);
            for (y, &x) in T::results(y, &mut by).iter_mut().zip(x) {
                *y = f.value(x);
            }
            T::store(y, &by);
        }
    }
}

/// `dx[i] = dy[i] f'(x[i])`
pub(crate) fn backward<T: Element, P: Pointwise>(f: P, x: &[T], dy: &[T]) -> Vec<T> {
    let mut dx = T::zeros(x.len());
    let arch = Arch::new();
    each_chunk(&mut dx, CHUNK, |dx, at| arch.dispatch(Backward { f, x: &x[at..], dy: &dy[at..], dx }));
    dx
}

struct Backward<'a, T, P> {
    f: P,
    x: &'a [T],
    dy: &'a [T],
    dx: &'a mut [T],
}

impl<T: Element, P: Pointwise> WithSimd for Backward<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { f, x, dy, dx } = self;
        let [mut bx, mut bdy, mut bdx] = [[T::Acc::ZERO; BLOCK]; 3];
        for ((x, dy), dx) in x.chunks(BLOCK).zip(dy.chunks(BLOCK)).zip(dx.chunks_mut(BLOCK)) {
            let (x, dy) = (T::load(x, &mut bx), T::load(dy, &mut bdy));
            for ((dx, &x), &dy) in T::results(dx, &mut bdx).iter_mut().zip(x).zip(dy) {
                *dx = dy * f.value_and_slope(x).1;
            }
            T::store(dx, &bdx);
        }
    }
}

/// Rows of `[gate | up]`, `width` each: `y = f(gate) up`.
pub(crate) fn gated_forward<T: Element, P: Pointwise>(f: P, packed: &[T], width: usize) -> Vec<T> {
    let mut y = T::zeros(packed.len() / 2);
    if width > 0 {
        let arch = Arch::new();
        each_chunk(&mut y, rows_per_chunk(width) * width, |y, at| {
            arch.dispatch(GatedForward { f, packed: &packed[2 * at..], y, width });
        });
    }
    y
}

struct GatedForward<'a, T, P> {
    f: P,
    packed: &'a [T],
    y: &'a mut [T],
    width: usize,
}

impl<T: Element, P: Pointwise> WithSimd for GatedForward<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { f, packed, y, width } = self;
        let [mut bg, mut bu, mut by] = [[T::Acc::ZERO; BLOCK]; 3];
        for (row, y) in packed.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((gate, up), y) in gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(y.chunks_mut(BLOCK)) {
                let (gate, up) = (T::load(gate, &mut bg), T::load(up, &mut bu));
                for ((y, &gate), &up) in T::results(y, &mut by).iter_mut().zip(gate).zip(up) {
                    *y = f.value(gate) * up;
                }
                T::store(y, &by);
            }
        }
    }
}

/// The gradient of [`gated_forward`] in its packed input: rows of `[dy up f'(gate) | dy f(gate)]`.
pub(crate) fn gated_backward<T: Element, P: Pointwise>(f: P, packed: &[T], dy: &[T], width: usize) -> Vec<T> {
    let mut dpacked = T::zeros(packed.len());
    if width > 0 {
        let arch = Arch::new();
        each_chunk(&mut dpacked, rows_per_chunk(width) * 2 * width, |dpacked, at| {
            arch.dispatch(GatedBackward { f, packed: &packed[at..], dy: &dy[at / 2..], dpacked, width });
        });
    }
    dpacked
}

struct GatedBackward<'a, T, P> {
    f: P,
    packed: &'a [T],
    dy: &'a [T],
    dpacked: &'a mut [T],
    width: usize,
}

impl<T: Element, P: Pointwise> WithSimd for GatedBackward<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { f, packed, dy, dpacked, width } = self;
        let [mut bg, mut bu, mut bdy, mut bdg, mut bdu] = [[T::Acc::ZERO; BLOCK]; 5];
        let rows = packed.chunks_exact(2 * width).zip(dy.chunks_exact(width));
        for ((row, dy), drow) in rows.zip(dpacked.chunks_exact_mut(2 * width)) {
            let (gate, up) = row.split_at(width);
            let (dgate, dup) = drow.split_at_mut(width);
            let inputs = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(dy.chunks(BLOCK));
            let outputs = dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK));
            for (((gate, up), dy), (dgate, dup)) in inputs.zip(outputs) {
                let (gate, up, dy) = (T::load(gate, &mut bg), T::load(up, &mut bu), T::load(dy, &mut bdy));
                let results = T::results(dgate, &mut bdg).iter_mut().zip(T::results(dup, &mut bdu));
                for (((dgate, dup), &gate), (&up, &dy)) in results.zip(gate).zip(up.iter().zip(dy)) {
                    let (value, slope) = f.value_and_slope(gate);
                    *dgate = dy * up * slope;
                    *dup = dy * value;
                }
                T::store(dgate, &bdg);
                T::store(dup, &bdu);
            }
        }
    }
}

/// `sum over i of dy[i] df/dp(x[i])` for each parameter p.
pub(crate) fn parameter_sums<T: Element, P: Learned>(f: P, x: &[T], dy: &[T]) -> [f64; 2] {
    let arch = Arch::new();
    let parts = x.par_chunks(CHUNK).zip(dy.par_chunks(CHUNK));
    let sums = parts.map(|(x, dy)| arch.dispatch(ParameterSums { f, x, up: None, dy }));
    in_order(&sums.collect::<Vec<_>>())
}

/// The same for [`gated_forward`]: `sum of dy up df/dp(gate)`.
pub(crate) fn gated_parameter_sums<T: Element, P: Learned>(
    f: P,
    packed: &[T],
    dy: &[T],
    width: usize,
) -> [f64; 2] {
    if width == 0 {
        return [0.0; 2];
    }
    let arch = Arch::new();
    let rows = packed.par_chunks_exact(2 * width).zip(dy.par_chunks_exact(width));
    let sums = rows.map(|(row, dy)| {
        let (gate, up) = row.split_at(width);
        arch.dispatch(ParameterSums { f, x: gate, up: Some(up), dy })
    });
    in_order(&sums.collect::<Vec<_>>())
}

/// The sums of parts, in their order, whichever thread made them.
fn in_order(parts: &[[f64; 2]]) -> [f64; 2] {
    parts.iter().fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
}

struct ParameterSums<'a, T, P> {
    f: P,
    x: &'a [T],
    up: Option<&'a [T]>,
    dy: &'a [T],
}

impl<T: Element, P: Learned> WithSimd for ParameterSums<'_, T, P> {
    type Output = [f64; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [f64; 2] {
        const LANES: usize = 16;
        let Self { f, x, up, dy } = self;
        let [mut bx, mut bdy, mut bup, mut weights, mut first, mut second] = [[T::Acc::ZERO; BLOCK]; 6];
        let mut total = [0.0; 2];
        for (i, (x, dy)) in x.chunks(BLOCK).zip(dy.chunks(BLOCK)).enumerate() {
            let (x, dy) = (T::load(x, &mut bx), T::load(dy, &mut bdy));
            let n = x.len();
            match up {
                None => weights[..n].copy_from_slice(dy),
                Some(up) => {
                    let up = T::load(&up[i * BLOCK..][..n], &mut bup);
                    for ((weight, &dy), &up) in weights.iter_mut().zip(dy).zip(up) {
                        *weight = dy * up;
                    }
                }
            }
            for (((a, b), &x), &weight) in first.iter_mut().zip(&mut second).zip(x).zip(&weights) {
                let [da, db] = f.parameter_slopes(x);
                *a = weight * da;
                *b = weight * db;
            }
            // In lanes, whose order is fixed, and then in f64.
            for (total, values) in total.iter_mut().zip([&first, &second]) {
                let mut lanes = [T::Acc::ZERO; LANES];
                for part in values[..n].chunks(LANES) {
                    for (lane, value) in lanes.iter_mut().zip(part) {
                        *lane = *lane + *value;
                    }
                }
                *total += lanes.iter().map(|lane| lane.to_f64()).sum::<f64>();
            }
        }
        total
    }
}

fn rows_per_chunk(width: usize) -> usize {
    (CHUNK / width).max(1)
}

/// Runs `body(chunk, offset of the chunk)` for every chunk of `out`, in parallel where there is more than one.
fn each_chunk<T: Send>(out: &mut [T], chunk: usize, body: impl Fn(&mut [T], usize) + Sync) {
    if out.len() <= chunk {
        body(out, 0);
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| body(out, i * chunk));
    }
}
