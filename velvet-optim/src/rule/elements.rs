//! Runs of elements that a rule updates, in the types that they are stored in.

use super::measure::RunMeasured;
use super::real::Real;
use crate::backend::Measured;
use half::bf16;

/// A type that elements are stored in, of which an update is computed in F.
pub(crate) trait Element<F>: Copy {
    fn widen(self) -> F;
    /// Rounds to the nearest, ties to even.
    fn round(x: F) -> Self;
}

impl<F: Real> Element<F> for F {
    #[inline(always)]
    fn widen(self) -> F {
        self
    }

    #[inline(always)]
    fn round(x: F) -> Self {
        x
    }
}

impl Element<f32> for bf16 {
    // It is the upper half of an f32.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without the branch of `bf16::from_f32`, so that vectors can do it.
    #[inline(always)]
    fn round(x: f32) -> Self {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN stays one: rounding could carry it into the exponent.
        let nan = (bits >> 16) | 0x40;
        Self::from_bits(if x.is_nan() { nan } else { nearest } as u16)
    }
}

/// A run of elements: parameters, their gradients, and the state arrays in the order of the rule's slots.
pub(crate) struct Elements<'a, 'b, F, P = F, G = F> {
    pub(crate) p: &'a mut [P],
    pub(crate) g: &'a [G],
    pub(crate) slots: &'a mut [&'b mut [F]],
}

/// A run of elements in any types that there is a loop for. What [`Measured`] is there is added to; a run is then of
/// some thousand elements at the most, which are summed in their own precision.
pub(crate) enum Run<'a, 'b> {
    F32(Elements<'a, 'b, f32>, Option<&'a mut Measured>),
    F64(Elements<'a, 'b, f64>, Option<&'a mut Measured>),
    /// Parameters and gradients in bf16.
    Bf16(Elements<'a, 'b, f32, bf16, bf16>),
    /// Gradients in bf16.
    Bf16Gradients(Elements<'a, 'b, f32, f32, bf16>),
}

impl Run<'_, '_> {
    /// Runs a rule's loop on the processor's widest vectors.
    pub(super) fn vectorised<L: Loop>(self, rule: &L) {
        let arch = pulp::Arch::new();
        match self {
            Self::F32(elements, None) => arch.dispatch(Update { rule, elements }),
            Self::F64(elements, None) => arch.dispatch(Update { rule, elements }),
            Self::Bf16(elements) => arch.dispatch(Update { rule, elements }),
            Self::Bf16Gradients(elements) => arch.dispatch(Update { rule, elements }),
            Self::F32(elements, Some(measured)) => *measured += arch.dispatch(RunMeasured { rule, elements }),
            Self::F64(elements, Some(measured)) => *measured += arch.dispatch(RunMeasured { rule, elements }),
        }
    }
}

/// A rule's loop over one run of elements, with whatever vectors the processor has.
///
/// The loop has only additions, multiplications, divisions, roots and selections, none contracted: IEEE fixes every
/// bit of the result, whatever the width of the vectors that the compiler makes of it.
pub(super) trait Loop {
    fn run<F: Real, P: Element<F>, G: Element<F>>(&self, p: &mut [P], g: &[G], slots: &mut [&mut [F]]);
}

struct Update<'a, 'b, 'r, L, F, P, G> {
    rule: &'r L,
    elements: Elements<'a, 'b, F, P, G>,
}

// Not a closure: the compiler may leave a closure's call out of line, and with it out of the vector code.
impl<L: Loop, F: Real, P: Element<F>, G: Element<F>> pulp::WithSimd for Update<'_, '_, '_, L, F, P, G> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Elements { p, g, slots } = self.elements;
        self.rule.run(p, g, slots);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{AdamOptions, Decay, Lion, Rule, Sgd, Step, StepScalars};

    /// Steps of every rule over elements, with every choice.
    fn steps() -> Vec<Step> {
        let mut steps = Vec::new();
        for [nesterov, cautious, cautious_decay] in
            [[false; 3], [true, false, false], [false, true, false], [false, false, true], [true; 3]]
        {
            let scalars = StepScalars {
                clip_scale: 0.75,
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                progress: None,
                options: AdamOptions { nesterov, cautious },
            };
            let decay = Decay { rate: 0.1, cautious: cautious_decay };
            for rule in [Rule::AdamW, Rule::Sgd(Sgd::default()), Rule::Lion(Lion::default())] {
                steps.push(rule.step(&scalars, decay, [0.5; 2]));
            }
        }
        steps
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn bf16_in_its_own_loop_gives_the_bits_of_a_detour_through_f32() {
        let value = |i: usize| ((i * 7919 + 13) % 2003) as f32 / 1001.5 - 1.0;
        for step in steps() {
            let rule = step.elementwise().unwrap();
            for len in (0..70).chain([1000, 1024]) {
                let p: Vec<bf16> = (0..len).map(|i| bf16::from_f32(value(i))).collect();
                let g: Vec<bf16> = (0..len).map(|i| bf16::from_f32(1e-3 * value(i + 77))).collect();
                let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
                let arrays = if matches!(step, Step::AdamW(_)) { 2 } else { 1 };
                let after = |update: &mut dyn FnMut(&mut [&mut [f32]])| {
                    let [mut a, mut b] =
                        [0, 5].map(|at| (0..len).map(|i| value(i + at).powi(2)).collect::<Vec<f32>>());
                    update(&mut [a.as_mut_slice(), b.as_mut_slice()][..arrays]);
                    [bits(&a), bits(&b)]
                };
                let (mut narrow, mut of_gradients, mut of_detour) = (p.clone(), wide(&p), wide(&p));
                let states = [
                    after(&mut |slots| rule.update(Run::Bf16(Elements { p: &mut narrow, g: &g, slots }))),
                    after(&mut |slots| {
                        rule.update(Run::Bf16Gradients(Elements { p: &mut of_gradients, g: &g, slots }));
                    }),
                    after(&mut |slots| {
                        rule.update(Run::F32(Elements { p: &mut of_detour, g: &wide(&g), slots }, None));
                    }),
                ];
                let rounded: Vec<bf16> = of_detour.iter().map(|&x| bf16::from_f32(x)).collect();
                assert_eq!(narrow, rounded, "{step:?}, {len}");
                assert_eq!(bits(&of_gradients), bits(&of_detour), "{step:?}, {len}");
                assert!(states.iter().all(|state| *state == states[2]), "{step:?}, {len}");
            }
        }
    }
}
