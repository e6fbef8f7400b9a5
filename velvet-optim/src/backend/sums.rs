//! Sums of squares over runs of elements, the same bits for any vector width.

use super::element::{BLOCK, Compute, Grad};
use crate::rule::Element;
use std::marker::PhantomData;

/// Running sums of squares: many, because the compiler takes a long row of sums for vectors and a short one for
/// scalars.
const LANES: usize = 128;

/// The sum of squares of a gradient, in f64.
pub(super) fn of_squares(g: Grad<'_>) -> f64 {
    match g {
        Grad::F32(g) => squares::<f32, _>(g),
        Grad::F64(g) => squares::<f64, _>(g),
        Grad::Bf16(g) => g.chunks(BLOCK).fold(0.0, |sum, block| sum + squares::<f32, _>(block)),
        Grad::F16(g) => {
            let mut buffer = [0f32; BLOCK];
            g.chunks(BLOCK).fold(0.0, |sum, block| {
                let buffer = &mut buffer[..block.len()];
                f32::load_gradient(Grad::F16(block), buffer);
                sum + squares::<f32, _>(buffer)
            })
        }
    }
}

/// The sum of squares in f64, of elements that stand for values in F.
pub(super) fn squares<F: Into<f64>, T: Element<F>>(values: &[T]) -> f64 {
    pulp::Arch::new().dispatch(Squares(values, PhantomData))
}

struct Squares<'a, F, T>(&'a [T], PhantomData<F>);

impl<F: Into<f64>, T: Element<F>> pulp::WithSimd for Squares<'_, F, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
        let mut sums = [0f64; LANES];
        let (blocks, tail) = self.0.as_chunks::<LANES>();
        for block in blocks {
            add_squares(&mut sums, block);
        }
        add_squares(&mut sums, tail);
        sums.iter().sum()
    }
}

#[inline(always)]
fn add_squares<F: Into<f64>, T: Element<F>>(sums: &mut [f64; LANES], values: &[T]) {
    for (sum, &x) in sums.iter_mut().zip(values) {
        let x: f64 = x.widen().into();
        *sum += x * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn sums_of_bf16_are_those_of_blocks_of_f32() {
        for len in [0, 1, 127, 129, 1023, 1024, 1025, 5000] {
            let narrow: Vec<bf16> =
                (0..len).map(|i| bf16::from_f32((i as f32 * 0.37).sin() * 1e-3)).collect();
            let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
            let expected = wide.chunks(BLOCK).fold(0.0, |sum, block| sum + of_squares(Grad::F32(block)));
            assert_eq!(of_squares(Grad::Bf16(&narrow)).to_bits(), expected.to_bits());
            let exact: f64 = wide.iter().map(|&x| f64::from(x).powi(2)).sum();
            assert!((expected - exact).abs() <= 1e-12 * exact);
        }
        assert!(of_squares(Grad::Bf16(&[bf16::ONE, bf16::NAN])).is_nan());
        assert!(of_squares(Grad::Bf16(&[bf16::ONE, bf16::NEG_INFINITY])).is_infinite());
    }
}
