//! Sums of squares over runs of elements, the same bits for any vector width.

use super::element::{BLOCK, Compute, Grad};

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

/// The sum of squares in f64.
pub(super) fn squares<F: Copy + Into<f64>>(values: &[F]) -> f64 {
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
