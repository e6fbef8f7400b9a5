//! A rule's loop that also sums what it did.

use super::elements::{Elements, Loop};
use super::real::Real;
use crate::backend::Measured;

/// Elements that are updated and then summed: their old values stay in registers or next to them, and the processor
/// goes on reading ahead from memory. Longer tiles, up to the 1024 of a block, took 1.3 times the time.
const TILE: usize = 64;

/// Running sums, in the elements' precision and each of every 16th element: so they have the same bits for vectors of
/// any width up to that.
const LANES: usize = 16;

/// An update of few enough elements that sums in their own precision are good for: a block of the CPU back end.
pub(super) struct RunMeasured<'a, 'b, 'r, L, F> {
    pub(super) rule: &'r L,
    pub(super) elements: Elements<'a, 'b, F>,
}

impl<L: Loop, F: Real> pulp::WithSimd for RunMeasured<'_, '_, '_, L, F> {
    type Output = Measured;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> Measured {
        let Self { rule, elements: Elements { p, g, slots } } = self;
        let mut sums = Sums::<S, F>::new(simd);
        let mut before = [F::ZERO; TILE];
        let mut start = 0;
        while start < p.len() {
            let tile = start..p.len().min(start + TILE);
            let (p, g, before) = (&mut p[tile.clone()], &g[tile.clone()], &mut before[..tile.len()]);
            before.copy_from_slice(p);
            match slots {
                [a] => rule.run(p, g, &mut [&mut a[tile.clone()]]),
                [a, b] => rule.run(p, g, &mut [&mut a[tile.clone()], &mut b[tile.clone()]]),
                _ => return Measured::default(), // no rule has more: see chunk::cut
            }
            sums.add(before, p, g);
            start = tile.end;
        }
        sums.total()
    }
}

struct Sums<S: pulp::Simd, F: Real> {
    simd: S,
    /// Of change^2, weight^2 and g * change; the first of them make up [`LANES`] lanes.
    vectors: [[F::Vector<S>; LANES]; 3],
    /// Of the elements after the last whole [`LANES`].
    rest: [[F; LANES]; 3],
}

impl<S: pulp::Simd, F: Real> Sums<S, F> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        Self { simd, vectors: [[F::splat(simd, F::ZERO); LANES]; 3], rest: [[F::ZERO; LANES]; 3] }
    }

    #[inline(always)]
    fn add(&mut self, before: &[F], after: &[F], g: &[F]) {
        let Self { simd, vectors: [changes, weights, descents], rest } = self;
        let simd = *simd;
        let ((before, before_rest), (after, after_rest), (g, g_rest)) =
            (before.as_chunks::<LANES>(), after.as_chunks::<LANES>(), g.as_chunks::<LANES>());
        for ((before, after), g) in before.iter().zip(after).zip(g) {
            let (before, after, g) = (F::vectors(simd, before), F::vectors(simd, after), F::vectors(simd, g));
            for (i, ((&before, &after), &g)) in before.iter().zip(after).zip(g).enumerate() {
                let moved = F::sub_vectors(simd, before, after);
                changes[i] = F::add_vectors(simd, changes[i], F::mul_vectors(simd, moved, moved));
                weights[i] = F::add_vectors(simd, weights[i], F::mul_vectors(simd, before, before));
                descents[i] = F::add_vectors(simd, descents[i], F::mul_vectors(simd, g, moved));
            }
        }
        for (i, ((&before, &after), &g)) in before_rest.iter().zip(after_rest).zip(g_rest).enumerate() {
            let moved = before - after;
            rest[0][i] = rest[0][i] + moved * moved;
            rest[1][i] = rest[1][i] + before * before;
            rest[2][i] = rest[2][i] + g * moved;
        }
    }

    #[inline(always)]
    fn total(self) -> Measured {
        let total = |k: usize| -> f64 {
            let mut lanes = [F::ZERO; LANES];
            F::vectors_mut(self.simd, &mut lanes)
                .iter_mut()
                .zip(&self.vectors[k])
                .for_each(|(to, &from)| *to = from);
            let wide = |x: F| -> f64 { x.into() };
            lanes.iter().zip(&self.rest[k]).map(|(&lane, &rest)| wide(lane) + wide(rest)).sum()
        };
        Measured { change_sq: total(0), weight_sq: total(1), descent: total(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{AdamOptions, Decay, Elementwise, Rule, Run, Sgd, Step, StepScalars};

    fn sgd() -> Step {
        let options = AdamOptions { nesterov: false, cautious: false };
        let scalars = StepScalars {
            clip_scale: 1.0,
            lr: 0.5,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            progress: None,
            options,
        };
        Rule::Sgd(Sgd::default()).step(&scalars, Decay { rate: 0.0, cautious: false }, [0.5; 2])
    }

    #[test]
    fn the_sums_are_those_of_the_changes_for_every_length() {
        let step = sgd();
        let rule: &dyn Elementwise = step.elementwise().unwrap();
        for len in (0..130).chain([1000, 1024]) {
            let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
            let before: Vec<f32> = (0..len).map(value).collect();
            let g: Vec<f32> = (0..len).map(|i| value(i + 5)).collect();
            let (mut p, mut plain, mut b, mut other) =
                (before.clone(), before.clone(), vec![0.25; len], vec![0.25; len]);
            let mut measured = Measured::default();
            let elements = Elements { p: &mut p, g: &g, slots: &mut [b.as_mut_slice()] };
            rule.update(Run::F32(elements, Some(&mut measured)));
            let elements = Elements { p: &mut plain, g: &g, slots: &mut [other.as_mut_slice()] };
            rule.update(Run::F32(elements, None));
            assert_eq!((&p, &b), (&plain, &other), "measuring changes no bit");
            let sum = |f: &dyn Fn(f64, f64, f64) -> f64| -> f64 {
                (0..len).map(|i| f(before[i].into(), p[i].into(), g[i].into())).sum()
            };
            for (got, expected, size) in [
                (measured.change_sq, sum(&|b, p, _| (b - p).powi(2)), sum(&|b, p, _| (b - p).powi(2))),
                (measured.weight_sq, sum(&|b, _, _| b * b), sum(&|b, _, _| b * b)),
                (measured.descent, sum(&|b, p, g| g * (b - p)), sum(&|b, p, g| (g * (b - p)).abs())),
            ] {
                assert!((got - expected).abs() <= 1e-6 * size, "{len}: {got}, {expected}");
            }
        }
    }

    #[test]
    fn the_sums_have_the_same_bits_for_vectors_of_any_width() {
        let Step::Sgd(rule) = sgd() else { panic!("not sgd") };
        let g: Vec<f32> = (0..1000).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect();
        let run = |widest: bool| {
            let (mut p, mut b) = (g.clone(), vec![0.125f32; g.len()]);
            let elements = Elements { p: p.as_mut_slice(), g: g.as_slice(), slots: &mut [b.as_mut_slice()] };
            let run = RunMeasured { rule: &rule, elements };
            let sums = if widest {
                pulp::Arch::new().dispatch(run)
            } else {
                pulp::WithSimd::with_simd(run, pulp::Scalar::new())
            };
            [sums.change_sq, sums.weight_sq, sums.descent].map(f64::to_bits)
        };
        assert_eq!(run(true), run(false));
    }
}
