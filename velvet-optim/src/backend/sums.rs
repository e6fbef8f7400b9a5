//! Sums over runs of elements, the same bits for any vector width.

use super::Measured;
use super::element::{BLOCK, Compute, Grad};
use crate::rule::Real;

/// Running sums of squares: many, because the compiler takes a long row of sums for vectors and a short one for scalars.
const LANES: usize = 128;

/// The sum of squares of a gradient, in f64.
pub(super) fn of_squares(g: Grad<'_>) -> f64 {
    let mut buffer = [0f32; BLOCK];
    let mut converted = |g: Grad<'_>| {
        let mut rest = g;
        let mut sum = 0.0;
        while rest.len() > 0 {
            let (head, tail) = rest.split_at(BLOCK);
            let block = &mut buffer[..head.len()];
            f32::load_gradient(head, block);
            sum += squares(block);
            rest = tail;
        }
        sum
    };
    match g {
        Grad::F32(g) => squares(g),
        Grad::F64(g) => squares(g),
        Grad::Bf16(_) | Grad::F16(_) => converted(g),
    }
}

fn squares<F: Copy + Into<f64>>(values: &[F]) -> f64 {
    pulp::Arch::new().dispatch(Squares(values))
}

struct Squares<'a, F>(&'a [F]);

impl<F: Copy + Into<f64>> pulp::WithSimd for Squares<'_, F> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
        let mut sums = [0f64; LANES];
        let (blocks, tail) = self.0.as_chunks::<LANES>();
        for block in blocks {
            for (sum, &x) in sums.iter_mut().zip(block) {
                let x: f64 = x.into();
                *sum += x * x;
            }
        }
        for (sum, &x) in sums.iter_mut().zip(tail) {
            let x: f64 = x.into();
            *sum += x * x;
        }
        sums.iter().sum()
    }
}

/// What an update of at most [`BLOCK`] elements did: each lane sums a few of them, in their own precision.
pub(super) fn measure<F: Real>(before: &[F], after: &[F], g: &[F]) -> Measured {
    let [change_sq, weight_sq, descent] = pulp::Arch::new().dispatch(Change { before, after, g });
    Measured { change_sq, weight_sq, descent }
}

struct Change<'a, F> {
    before: &'a [F],
    after: &'a [F],
    g: &'a [F],
}

impl<F: Real> pulp::WithSimd for Change<'_, F> {
    type Output = [f64; 3];

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> [f64; 3] {
        let mut sums = [[F::ZERO; LANES]; 3];
        let ((before, before_tail), (after, after_tail), (g, g_tail)) =
            (self.before.as_chunks::<LANES>(), self.after.as_chunks::<LANES>(), self.g.as_chunks::<LANES>());
        for ((before, after), g) in before.iter().zip(after).zip(g) {
            let [changes, weights, descents] = &mut sums;
            for i in 0..LANES {
                let moved = before[i] - after[i];
                changes[i] = changes[i] + moved * moved;
                weights[i] = weights[i] + before[i] * before[i];
                descents[i] = descents[i] + g[i] * moved;
            }
        }
        for (i, ((&before, &after), &g)) in before_tail.iter().zip(after_tail).zip(g_tail).enumerate() {
            let moved = before - after;
            sums[0][i] = sums[0][i] + moved * moved;
            sums[1][i] = sums[1][i] + before * before;
            sums[2][i] = sums[2][i] + g * moved;
        }
        sums.map(total)
    }
}

/// The sum of the lanes, by halves.
#[inline(always)]
fn total<F: Real>(mut lanes: [F; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (sum, &other) in low.iter_mut().zip(&*high) {
            *sum = *sum + other;
        }
        width /= 2;
    }
    lanes[0].into()
}
