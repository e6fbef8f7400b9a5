//! Strided matrix views over slices and their product, by the `gemm` crate.

use candle_core::{Result, bail};
use gemm::Parallelism;

use super::real::Real;

/// A read-only matrix inside a slice: element (i, j) stands at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// One more than the last index that a strided matrix reaches.
fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

impl<'a, T> Matrix<'a, T> {
    /// `rows` rows of `cols` elements, `row_stride` apart.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        if reach(rows, cols, row_stride, 1) > data.len() {
            bail!(
                "a {rows} x {cols} matrix with stride {row_stride} does not fit into {} elements",
                data.len()
            );
        }
        Ok(Self { data, rows, cols, row_stride, col_stride: 1 })
    }

    /// The first `rows` rows, or all if there are fewer.
    pub(super) fn first_rows(self, rows: usize) -> Self {
        Self { rows: rows.min(self.rows), ..self }
    }

    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// How a product is added to what the destination holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    /// `dst = a * b`
    Overwrite,
    /// `dst += a * b`
    Add,
}

/// `dst (rows of a x cols of b, rows `dst_stride` apart) = a * b`, or `+=`.
///
/// The order of the additions does not depend on the number of threads: the work is split over rows and columns of
/// the destination only.
pub(super) fn product<T: Real>(
    dst: &mut [T],
    dst_stride: usize,
    mode: Into,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    threads: Threads,
) -> Result<()> {
    if a.cols != b.rows {
        bail!("matrix product of {} x {} and {} x {}", a.rows, a.cols, b.rows, b.cols);
    }
    if reach(a.rows, b.cols, dst_stride, 1) > dst.len() || (a.rows > 1 && dst_stride < b.cols) {
        bail!("a {} x {} product does not fit into {} elements", a.rows, b.cols, dst.len());
    }
    if a.rows == 0 || b.cols == 0 {
        return Ok(());
    }
    if a.cols == 0 {
        if mode == Into::Overwrite {
            for row in dst.chunks_mut(dst_stride).take(a.rows) {
                row[..b.cols].fill(T::ZERO);
            }
        }
        return Ok(());
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: `Matrix::new` and the checks above hold every index (i, j) of the three matrices inside their slices;
    // `dst` is borrowed mutably, so it overlaps neither `a` nor `b`, and `dst_stride >= cols` keeps its elements
    // distinct. T is f32 or f64 (the only implementors of Real), which gemm knows.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            mode == Into::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
    Ok(())
}

/// Whether a product runs on the calling thread or on all of rayon's.
#[derive(Clone, Copy)]
pub(super) enum Threads {
    One,
    All,
}

/// `a (rows, inner) * b^T`, b (columns, inner)
pub(super) fn times_transposed<T: Real>(
    a: &[T],
    b: &[T],
    rows: usize,
    inner: usize,
    columns: usize,
) -> Result<Vec<T>> {
    let mut c = vec![T::ZERO; rows * columns];
    let (a, b) = (Matrix::new(a, rows, inner, inner)?, Matrix::new(b, columns, inner, inner)?);
    product(&mut c, columns, Into::Overwrite, a, b.t(), Threads::All)?;
    Ok(c)
}

/// `a (rows, inner) * b`, b (inner, columns)
pub(super) fn times<T: Real>(a: &[T], b: &[T], rows: usize, inner: usize, columns: usize) -> Result<Vec<T>> {
    let mut c = vec![T::ZERO; rows * columns];
    let (a, b) = (Matrix::new(a, rows, inner, inner)?, Matrix::new(b, inner, columns, columns)?);
    product(&mut c, columns, Into::Overwrite, a, b, Threads::All)?;
    Ok(c)
}

/// `a^T b`, a (inner, rows), b (inner, columns)
pub(super) fn transposed_times<T: Real>(
    a: &[T],
    b: &[T],
    rows: usize,
    inner: usize,
    columns: usize,
) -> Result<Vec<T>> {
    let mut c = vec![T::ZERO; rows * columns];
    let (a, b) = (Matrix::new(a, inner, rows, rows)?, Matrix::new(b, inner, columns, columns)?);
    product(&mut c, columns, Into::Overwrite, a.t(), b, Threads::All)?;
    Ok(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_and_transposed_products() {
        // a: 2 x 3 with stride 4, b: 2 x 3 used transposed
        let a = [1., 2., 3., 9., 4., 5., 6., 9f64];
        let b = [1., 0., 2., 0., 1., 1f64];
        let a = Matrix::new(&a, 2, 3, 4).unwrap();
        let b = Matrix::new(&b, 2, 3, 3).unwrap();
        let mut dst = [10f64; 6];
        product(&mut dst, 3, Into::Overwrite, a, b.t(), Threads::One).unwrap();
        assert_eq!(dst, [7., 5., 10., 16., 11., 10.]);
        product(&mut dst, 3, Into::Add, a, b.t(), Threads::All).unwrap();
        assert_eq!(dst, [14., 10., 10., 32., 22., 10.]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let a = [0f32; 6];
        assert!(Matrix::new(&a, 2, 4, 4).is_err());
        let m = Matrix::new(&a, 2, 3, 3).unwrap();
        assert!(product(&mut [0f32; 3], 2, Into::Overwrite, m, m.t(), Threads::One).is_err());
        assert!(product(&mut [0f32; 9], 3, Into::Overwrite, m, m, Threads::One).is_err());
    }
}
