//! Matrix decompositions, by nalgebra in f64; the large products of the randomised one run in candle.

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;
use rand_chacha::ChaCha8Rng;

use crate::init::normal;
use crate::{Error, Result};

/// The largest singular triplets of a matrix: `M ~ U diag(s) Vt`.
pub(crate) struct Truncated {
    /// (rows, r)
    pub(crate) u: DMatrix<f64>,
    /// Largest first.
    pub(crate) s: Vec<f64>,
    /// (r, columns)
    pub(crate) vt: DMatrix<f64>,
}

impl Truncated {
    /// `(U sqrt(s), sqrt(s) Vt)`, two factors of equal size: (rows, r) and (r, columns), in f32 on the CPU.
    pub(crate) fn balanced(&self) -> Result<(Tensor, Tensor)> {
        let (mut u, mut vt) = (self.u.clone(), self.vt.clone());
        for (i, s) in self.s.iter().enumerate() {
            u.column_mut(i).scale_mut(s.max(0.0).sqrt());
            vt.row_mut(i).scale_mut(s.max(0.0).sqrt());
        }
        Ok((to_tensor(&u)?, to_tensor(&vt)?))
    }
}

/// A tensor (rows, columns) as a matrix of f64.
pub(crate) fn to_matrix(t: &Tensor) -> Result<DMatrix<f64>> {
    let (rows, columns) = t.dims2()?;
    let values = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(DMatrix::from_row_slice(rows, columns, &values))
}

/// A matrix as a tensor (rows, columns) of f32 on the CPU.
pub(crate) fn to_tensor(m: &DMatrix<f64>) -> Result<Tensor> {
    // nalgebra's order is by columns: that of the transposed tensor.
    let values: Vec<f32> = m.iter().map(|v| *v as f32).collect();
    Ok(Tensor::from_vec(values, (m.ncols(), m.nrows()), &Device::Cpu)?.t()?.contiguous()?)
}

/// The `r` largest singular triplets of a matrix, exactly.
pub(crate) fn truncated(m: DMatrix<f64>, r: usize) -> Result<Truncated> {
    let shape = (m.nrows(), m.ncols());
    if m.iter().any(|v| !v.is_finite()) {
        return Err(Error::Decomposition { shape, message: "it has a value that is not finite" });
    }
    // Sorted, largest first. The bound on the iterations only has to end what would not converge.
    let svd = m
        .try_svd(true, true, f64::EPSILON, 10_000)
        .ok_or(Error::Decomposition { shape, message: "the singular values did not converge" })?;
    let (Some(u), Some(vt)) = (svd.u, svd.v_t) else {
        return Err(Error::Decomposition { shape, message: "it has no singular vectors" });
    };
    let r = r.min(svd.singular_values.len());
    Ok(Truncated {
        u: u.columns(0, r).into_owned(),
        s: svd.singular_values.iter().take(r).copied().collect(),
        vt: vt.rows(0, r).into_owned(),
    })
}

/// The `r` largest singular triplets, approximately: a randomised range finder with `iterations` of subspace
/// iteration (Halko, Martinsson and Tropp, [arXiv 0909.4061](https://arxiv.org/abs/0909.4061)).
///
/// The cost is that of a few products with r + 8 columns, instead of growing with the cube of the size.
pub(crate) fn randomised(m: &Tensor, r: usize, iterations: usize, rng: &mut ChaCha8Rng) -> Result<Truncated> {
    let m = m.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let (rows, columns) = m.dims2()?;
    let width = (r + 8).min(rows).min(columns);
    let mut q = orthonormal(&m.matmul(&normal((columns, width), 1.0, rng)?)?)?; // (rows, width)
    for _ in 0..iterations {
        let p = orthonormal(&m.t()?.matmul(&q)?)?; // (columns, width)
        q = orthonormal(&m.matmul(&p)?)?;
    }
    let small = truncated(to_matrix(&q.t()?.matmul(&m)?)?, r)?; // of (width, columns)
    Ok(Truncated { u: to_matrix(&q)? * small.u, s: small.s, vt: small.vt })
}

/// The `r` largest singular triplets of `B A`, exactly, without the product: B (rows, n), A (n, columns).
pub(crate) fn of_product(b: &Tensor, a: &Tensor, r: usize) -> Result<Truncated> {
    let (b, a) = (to_matrix(b)?, to_matrix(a)?);
    let (qb, qa) = (b.qr(), a.transpose().qr());
    let core = truncated(qb.r() * qa.r().transpose(), r)?;
    Ok(Truncated { u: qb.q() * core.u, s: core.s, vt: core.vt * qa.q().transpose() })
}

/// An orthonormal basis of the columns of a tall matrix, in f32 on the CPU.
pub(crate) fn orthonormal(m: &Tensor) -> Result<Tensor> {
    to_tensor(&to_matrix(m)?.qr().q())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::generator;

    fn error(m: &DMatrix<f64>, t: &Truncated) -> f64 {
        let s = DMatrix::from_diagonal(&nalgebra::DVector::from_vec(t.s.clone()));
        (m - &t.u * s * &t.vt).norm()
    }

    #[test]
    fn the_decompositions_agree_and_leave_what_the_theory_says() {
        let mut rng = generator(1, "svd");
        let b = normal((40, 6), 1.0, &mut rng).unwrap();
        let a = normal((6, 30), 1.0, &mut rng).unwrap();
        let noise = (normal((40, 30), 1.0, &mut rng).unwrap() * 1e-3).unwrap();
        let m = (b.matmul(&a).unwrap() + noise).unwrap();
        let matrix = to_matrix(&m).unwrap();
        let all = truncated(matrix.clone(), 30).unwrap();
        assert!(error(&matrix, &all) < 1e-12 * matrix.norm());
        assert!(all.s.windows(2).all(|s| s[0] >= s[1]));
        // Eckart and Young: what is left is the rest of the singular values.
        let four = truncated(matrix.clone(), 4).unwrap();
        let rest = all.s[4..].iter().map(|s| s * s).sum::<f64>().sqrt();
        assert!((error(&matrix, &four) / rest - 1.0).abs() < 1e-9);
        let near = randomised(&m, 4, 4, &mut rng).unwrap();
        assert!((error(&matrix, &near) / rest - 1.0).abs() < 1e-4);
        let product = of_product(&b, &a, 4).unwrap();
        let exact = truncated(to_matrix(&b).unwrap() * to_matrix(&a).unwrap(), 4).unwrap();
        for (p, e) in product.s.iter().zip(&exact.s) {
            assert!((p / e - 1.0).abs() < 1e-10);
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let m = DMatrix::from_element(3, 3, f64::NAN);
        assert!(truncated(m, 2).is_err());
    }

    #[test]
    fn a_matrix_comes_back_from_a_tensor_as_it_was() {
        let t = normal((3, 5), 1.0, &mut generator(2, "t")).unwrap();
        let back = to_tensor(&to_matrix(&t).unwrap()).unwrap();
        assert_eq!(t.to_vec2::<f32>().unwrap(), back.to_vec2::<f32>().unwrap());
    }
}
