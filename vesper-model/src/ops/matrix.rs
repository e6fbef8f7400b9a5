//! Strided matrix views over slices and their product.

use std::borrow::Cow;
use std::marker::PhantomData;

use candle_core::{Layout, Result, bail};
use gemm::Parallelism;
use half::bf16;

use super::gemm::Precision;
use super::real::{Real, widened};

/// The elements of an operand: in the type `T` of the computation, or in bf16, which a product converts as it reads.
#[derive(Clone, Copy)]
pub(super) enum Values<'a, T> {
    Full(&'a [T]),
    Half(&'a [bf16]),
}

impl<T: Real> Values<'_, T> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Full(values) => values.len(),
            Self::Half(values) => values.len(),
        }
    }

    /// The elements from `start` on.
    pub(super) fn from(self, start: usize) -> Self {
        match self {
            Self::Full(values) => Self::Full(&values[start..]),
            Self::Half(values) => Self::Half(&values[start..]),
        }
    }
}

impl<'a> Values<'a, f32> {
    /// The elements in f32.
    pub(super) fn to_full(self) -> Cow<'a, [f32]> {
        match self {
            Self::Full(values) => Cow::Borrowed(values),
            Self::Half(values) => Cow::Owned(widened(values)),
        }
    }
}

impl<'a, T> From<&'a [T]> for Values<'a, T> {
    fn from(values: &'a [T]) -> Self {
        Self::Full(values)
    }
}

impl<'a, T> From<&'a Vec<T>> for Values<'a, T> {
    fn from(values: &'a Vec<T>) -> Self {
        Self::Full(values)
    }
}

/// A read-only matrix inside a slice: element (i, j) stands at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    pub(super) values: Values<'a, T>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// One more than the last index that a strided matrix reaches; none where that is no `usize`.
fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let (down, right) = ((rows - 1).checked_mul(row_stride)?, (cols - 1).checked_mul(col_stride)?);
    down.checked_add(right)?.checked_add(1)
}

impl<'a, T: Real> Matrix<'a, T> {
    /// `rows` rows of `cols` elements, `row_stride` apart.
    pub(super) fn new(
        values: impl Into<Values<'a, T>>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        Self::strided(values.into(), (rows, cols), (row_stride, 1))
    }

    /// The values that a tensor's layout of two dimensions finds in its whole storage.
    pub(super) fn of_layout(storage: Values<'a, T>, layout: &Layout) -> Result<Self> {
        let size = layout.shape().dims2()?;
        let &[row_stride, col_stride] = layout.stride() else {
            bail!("a layout of other strides than dimensions: {layout:?}");
        };
        let start = layout.start_offset().min(storage.len());
        Self::strided(storage.from(start), size, (row_stride, col_stride))
    }

    fn strided(
        values: Values<'a, T>,
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Result<Self> {
        if reach(rows, cols, row_stride, col_stride).is_none_or(|reach| reach > values.len()) {
            bail!(
                "a {rows} x {cols} matrix with strides {row_stride} and {col_stride} does not fit into {} elements",
                values.len()
            );
        }
        Ok(Self { values, rows, cols, row_stride, col_stride })
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

/// Where a product goes: rows that are `stride` apart, and whether it is added to what they hold.
pub(super) struct Target<'a, T> {
    pub(super) values: *mut T,
    len: usize,
    pub(super) stride: usize,
    pub(super) add: bool,
    life: PhantomData<&'a mut [T]>,
}

impl<'a, T> Target<'a, T> {
    /// `dst = a * b`
    pub(super) fn overwrite(values: &'a mut [T], stride: usize) -> Self {
        Self { values: values.as_mut_ptr(), len: values.len(), stride, add: false, life: PhantomData }
    }

    /// `dst += a * b`
    pub(super) fn add(values: &'a mut [T], stride: usize) -> Self {
        Self { add: true, ..Self::overwrite(values, stride) }
    }
}

/// Whether a product runs on the calling thread or on all of rayon's.
#[derive(Clone, Copy)]
pub(super) enum Threads {
    One,
    All,
}

/// The product of a (rows, inner) and b (inner, cols), to the rows of `dst`.
///
/// The order of the additions does not depend on the number of threads: the work is split over rows and columns of
/// the destination only.
pub(super) fn product<T: Real>(
    dst: Target<'_, T>,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    precision: Precision,
    threads: Threads,
) -> Result<()> {
    if a.cols != b.rows {
        bail!("matrix product of {} x {} and {} x {}", a.rows, a.cols, b.rows, b.cols);
    }
    let fits = reach(a.rows, b.cols, dst.stride, 1).is_some_and(|reach| reach <= dst.len);
    if !fits || (a.rows > 1 && dst.stride < b.cols) {
        bail!("a {} x {} product does not fit into {} elements", a.rows, b.cols, dst.len);
    }
    if a.rows == 0 || b.cols == 0 {
        return Ok(());
    }
    if a.cols > 0 {
        T::multiply(dst, a, b, precision, threads);
    } else if !dst.add {
        for i in 0..a.rows {
            for j in 0..b.cols {
                // SAFETY: `reach` says that row and column are inside; every number type is 0 by zeros.
                unsafe { dst.values.add(i * dst.stride + j).write(T::ZERO) };
            }
        }
    }
    Ok(())
}

/// As [`product`], by the crate `gemm`, for sizes that fit and are not 0. `a` and `b` are slices of `T`.
#[allow(clippy::needless_pass_by_value)] // the exclusive borrow ends here
pub(super) fn by_crate<T: Real>(
    dst: Target<'_, T>,
    (a, left): (Matrix<'_, T>, &[T]),
    (b, right): (Matrix<'_, T>, &[T]),
    threads: Threads,
) {
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    debug_assert!(left.len() >= a.values.len() && right.len() >= b.values.len());
    // SAFETY: `Matrix::strided` and `product` hold every index (i, j) of the three matrices inside their slices;
    // `dst` is borrowed mutably, so it overlaps neither `a` nor `b`, and `stride >= cols` keeps its elements
    // distinct. T is f32 or f64 (the only implementors of Real), which gemm knows.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            dst.values,
            1,
            dst.stride as isize,
            dst.add,
            left.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            right.as_ptr(),
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
}

/// A product in a vector of its own, rows after each other.
pub(super) fn new<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>, precision: Precision) -> Result<Vec<T>> {
    let mut c = Vec::new();
    replace(&mut c, a, b, precision)?;
    Ok(c)
}

/// A product in the place of what a vector holds, rows after each other.
pub(super) fn replace<T: Real>(
    c: &mut Vec<T>,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    precision: Precision,
) -> Result<()> {
    let len = a.rows * b.cols;
    c.clear();
    c.reserve_exact(len);
    let dst = Target { values: c.as_mut_ptr(), len, stride: b.cols, add: false, life: PhantomData };
    product(dst, a, b, precision, Threads::All)?;
    // SAFETY: the product has written all elements, without reading them.
    unsafe { c.set_len(len) };
    Ok(())
}

/// `a (rows, inner) * b^T`, b (columns, inner)
pub(super) fn times_transposed<'a, T: Real>(
    a: impl Into<Values<'a, T>>,
    b: impl Into<Values<'a, T>>,
    (rows, inner, columns): (usize, usize, usize),
    precision: Precision,
) -> Result<Vec<T>> {
    new(Matrix::new(a, rows, inner, inner)?, Matrix::new(b, columns, inner, inner)?.t(), precision)
}

/// `a (rows, inner) * b`, b (inner, columns)
pub(super) fn times<'a, T: Real>(
    a: impl Into<Values<'a, T>>,
    b: impl Into<Values<'a, T>>,
    (rows, inner, columns): (usize, usize, usize),
    precision: Precision,
) -> Result<Vec<T>> {
    new(Matrix::new(a, rows, inner, inner)?, Matrix::new(b, inner, columns, columns)?, precision)
}

/// `a^T b`, a (inner, rows), b (inner, columns)
pub(super) fn transposed_times<'a, T: Real>(
    a: impl Into<Values<'a, T>>,
    b: impl Into<Values<'a, T>>,
    (rows, inner, columns): (usize, usize, usize),
    precision: Precision,
) -> Result<Vec<T>> {
    new(Matrix::new(a, inner, rows, rows)?.t(), Matrix::new(b, inner, columns, columns)?, precision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_and_transposed_products() {
        // a: 2 x 3 with stride 4, b: 2 x 3 used transposed
        let a = [1., 2., 3., 9., 4., 5., 6., 9f64];
        let b = [1., 0., 2., 0., 1., 1f64];
        let a = Matrix::new(&a[..], 2, 3, 4).unwrap();
        let b = Matrix::new(&b[..], 2, 3, 3).unwrap();
        let mut dst = [10f64; 6];
        product(Target::overwrite(&mut dst, 3), a, b.t(), Precision::Full, Threads::One).unwrap();
        assert_eq!(dst, [7., 5., 10., 16., 11., 10.]);
        product(Target::add(&mut dst, 3), a, b.t(), Precision::Full, Threads::All).unwrap();
        assert_eq!(dst, [14., 10., 10., 32., 22., 10.]);
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        let product = times::<f64>(&[][..], &[][..], (2, 0, 3), Precision::Full).unwrap();
        assert_eq!(product, [0.0; 6]);
        assert!(times::<f32>(&[][..], &[1.0; 6][..], (0, 2, 3), Precision::Bf16).unwrap().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let a = [0f32; 6];
        assert!(Matrix::new(&a[..], 2, 4, 4).is_err());
        assert!(Matrix::new(&a[..], usize::MAX, 2, usize::MAX).is_err());
        let m = Matrix::new(&a[..], 2, 3, 3).unwrap();
        let mut dst = [0f32; 9];
        let refused = |dst: Target<'_, f32>, b| product(dst, m, b, Precision::Full, Threads::One).is_err();
        assert!(refused(Target::overwrite(&mut dst[..3], 2), m.t()));
        assert!(refused(Target::overwrite(&mut dst[..4], 1), m.t()));
        assert!(refused(Target::overwrite(&mut dst, 3), m));
    }
}
