//! The arithmetic a rule's loop needs of f32 and f64.

/// f32 or f64.
pub(crate) trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + Into<f64>
{
    const ZERO: Self;
    const ONE: Self;
    /// Rounds a coefficient, which is computed in f64, to the element type.
    fn coefficient(x: f64) -> Self;
    fn sqrt(self) -> Self;
    /// -1, 0 or 1; NaN stays NaN.
    fn sign(self) -> Self;
}

macro_rules! real {
    ($float:ty) => {
        impl Real for $float {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn coefficient(x: f64) -> Self {
                x as Self
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn sign(self) -> Self {
                // Not `signum`, which is 1 at zero: a weight without momentum must not move.
                if self > 0.0 {
                    1.0
                } else if self < 0.0 {
                    -1.0
                } else {
                    self
                }
            }
        }
    };
}
real!(f32);
real!(f64);

/// A rule's loop over one run of elements, with whatever vectors the processor has.
///
/// The loop has only additions, multiplications, divisions, roots and selections, none contracted: IEEE fixes every
/// bit of the result, whatever the width of the vectors that the compiler makes of it.
pub(super) trait Loop {
    fn run<F: Real>(&self, p: &mut [F], g: &[F], slots: &mut [&mut [F]]);
}

/// Runs a loop on the processor's widest vectors.
pub(super) fn vectorised<L: Loop, F: Real>(rule: &L, p: &mut [F], g: &[F], slots: &mut [&mut [F]]) {
    pulp::Arch::new().dispatch(Run { rule, p, g, slots });
}

struct Run<'a, 'b, L, F> {
    rule: &'a L,
    p: &'a mut [F],
    g: &'a [F],
    slots: &'a mut [&'b mut [F]],
}

// Not a closure: the compiler may leave a closure's call out of line, and with it out of the vector code.
impl<L: Loop, F: Real> pulp::WithSimd for Run<'_, '_, L, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.rule.run(self.p, self.g, self.slots);
    }
}
