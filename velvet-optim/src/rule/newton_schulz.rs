//! The Newton-Schulz iteration: the nearest orthogonal matrix, nearly, by products alone.

use candle_core::{D, DType, Result, Tensor};

/// Replaces the singular values of matrices by values near 1.
///
/// ```text
/// x: (.., rows, cols)    X = x / (|x|_F + 1e-7), transposed where rows > cols
/// A = X X^T    X = a X + (b A + c A A) X        (steps times)
/// ```
///
/// With the default coefficients (3.4445, -4.7750, 2.0315) and 5 steps, singular values above about 1e-3 of the norm
/// end between about 0.7 and 1.2; they are chosen for speed, not to converge to 1. A matrix of zeros stays zero. The
/// products run in the dtype of `x`, the norm in f32 (f64 for f64). The result is not tracked.
///
/// Work: about `steps * (4 m^2 n + 2 m^3)` operations a matrix, m the smaller side and n the larger.
///
/// # Errors
/// `x` has fewer than two dimensions, or a product fails.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use velvet_optim::newton_schulz;
/// let x = Tensor::new(&[[3f64, 0.0], [0.0, 0.5]], &Device::Cpu)?;
/// let y = newton_schulz(&x, [3.4445, -4.7750, 2.0315], 5)?.to_vec2::<f64>()?;
/// assert!((0.6..1.3).contains(&y[0][0]) && (0.6..1.3).contains(&y[1][1]) && y[0][1] == 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Jordan et al., Muon (2024); Bernstein and Newhouse, Old Optimizer, New Norm, arXiv 2409.20325; Björck and Bowie, An
/// iterative algorithm for computing the best estimate of an orthogonal matrix (1971).
pub fn newton_schulz(x: &Tensor, coefficients: [f64; 3], steps: usize) -> Result<Tensor> {
    let (rows, cols) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    let x = x.detach();
    if x.elem_count() == 0 {
        return Ok(x);
    }
    let [a, b, c] = coefficients;
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let norm = x.to_dtype(wide)?.sqr()?.sum_keepdim(D::Minus1)?.sum_keepdim(D::Minus2)?.sqrt()?;
    let mut x = x.to_dtype(wide)?.broadcast_div(&(norm + 1e-7)?)?.to_dtype(x.dtype())?;
    if rows > cols {
        x = x.t()?.contiguous()?; // (.., m, n) with m <= n
    }
    for _ in 0..steps {
        let gram = x.matmul(&x.t()?)?; // (.., m, m)
        let mixed = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        x = ((&x * a)? + mixed.matmul(&x)?)?; // (.., m, n)
    }
    if rows > cols { x.t()?.contiguous() } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const MUON: [f64; 3] = [3.4445, -4.7750, 2.0315];

    fn matrix(rows: usize, cols: usize, dtype: DType) -> Tensor {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f64 / 504.5 - 1.0;
        let values: Vec<f64> = (0..rows * cols).map(value).collect();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    /// The largest absolute value; NaN where there is one, which candle's own maximum passes over.
    fn largest(x: &Tensor) -> f64 {
        let values = x.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        values.into_iter().max_by(f64::total_cmp).unwrap()
    }

    /// The largest difference between the Gram matrix of the smaller side and the identity.
    fn distance_from_orthogonal(x: &Tensor) -> f64 {
        let (rows, cols) = x.dims2().unwrap();
        let x = x.to_dtype(DType::F64).unwrap();
        let x = if rows > cols { x.t().unwrap().contiguous().unwrap() } else { x };
        let gram = x.matmul(&x.t().unwrap()).unwrap();
        let eye = Tensor::eye(rows.min(cols), DType::F64, &Device::Cpu).unwrap();
        largest(&(gram - eye).unwrap())
    }

    #[test]
    fn rows_or_columns_become_nearly_orthonormal() {
        for (rows, cols) in [(4, 9), (9, 4), (16, 64), (1, 5), (5, 1)] {
            for dtype in [DType::F32, DType::F64] {
                let y = newton_schulz(&matrix(rows, cols, dtype), MUON, 5).unwrap();
                assert_eq!((y.dims(), y.dtype()), (&[rows, cols][..], dtype));
                let distance = distance_from_orthogonal(&y);
                assert!(distance < 0.55, "{rows} x {cols}: {distance}"); // singular values in 0.67 to 1.24
            }
        }
    }

    #[test]
    fn coefficients_that_converge_reach_the_polar_factor() {
        // 1.5 x - 0.5 x^3 converges to singular values of exactly 1.
        let y = newton_schulz(&matrix(4, 9, DType::F64), [1.5, -0.5, 0.0], 40).unwrap();
        assert!(distance_from_orthogonal(&y) < 1e-9);
    }

    #[test]
    fn a_batch_is_each_of_its_matrices() {
        let (a, b) = (matrix(3, 5, DType::F64), matrix(3, 5, DType::F64).affine(0.3, 0.2).unwrap());
        let batch = newton_schulz(&Tensor::stack(&[&a, &b], 0).unwrap(), MUON, 5).unwrap();
        for (i, x) in [a, b].iter().enumerate() {
            let alone = newton_schulz(x, MUON, 5).unwrap();
            assert!(largest(&(batch.get(i).unwrap() - alone).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn zeros_stay_zero_and_nothing_stays_nothing() {
        let zeros = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
        let y = newton_schulz(&zeros, MUON, 5).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), zeros.to_vec2::<f32>().unwrap());
        for shape in [(0, 4), (4, 0)] {
            let empty = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(newton_schulz(&empty, MUON, 5).unwrap().dims2().unwrap(), shape);
        }
    }
}
