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

    /// A vector of the processor's.
    type Vector<S: pulp::Simd>: Copy + 'static;
    fn splat<S: pulp::Simd>(simd: S, x: Self) -> Self::Vector<S>;
    fn add_vectors<S: pulp::Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn sub_vectors<S: pulp::Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn mul_vectors<S: pulp::Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The whole vectors of a slice.
    fn vectors<S: pulp::Simd>(simd: S, x: &[Self]) -> &[Self::Vector<S>];
    fn vectors_mut<S: pulp::Simd>(simd: S, x: &mut [Self]) -> &mut [Self::Vector<S>];
}

macro_rules! real {
    ($float:ty, $vector:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident, $of:ident, $of_mut:ident) => {
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

            type Vector<S: pulp::Simd> = S::$vector;
            #[inline(always)]
            fn splat<S: pulp::Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn add_vectors<S: pulp::Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn sub_vectors<S: pulp::Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$sub(a, b)
            }
            #[inline(always)]
            fn mul_vectors<S: pulp::Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn vectors<S: pulp::Simd>(_: S, x: &[Self]) -> &[S::$vector] {
                S::$of(x).0
            }
            #[inline(always)]
            fn vectors_mut<S: pulp::Simd>(_: S, x: &mut [Self]) -> &mut [S::$vector] {
                S::$of_mut(x).0
            }
        }
    };
}
real!(f32, f32s, splat_f32s, add_f32s, sub_f32s, mul_f32s, as_simd_f32s, as_mut_simd_f32s);
real!(f64, f64s, splat_f64s, add_f64s, sub_f64s, mul_f64s, as_simd_f64s, as_mut_simd_f64s);
