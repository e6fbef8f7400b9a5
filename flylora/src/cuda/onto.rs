//! Products with the frozen weight that are added to what is there already: of a low-rank change, which then costs no pass
//! over the result of its own.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, Gemm, GemmConfig};
use candle_core::{CudaStorage, DType, Layout, Result, Tensor, bail};
use half::bf16;

use super::launch::{Element, Held, size, view};

/// Which product with a weight (out, in).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `x W^T`
    Forward,
    /// `dy W`
    Backward,
}

/// Whether the elements of a weight (out, in) lie by rows, or by columns; `None` where they do neither, or where
/// [`add_product`] does not take them.
pub(super) fn by_rows(weight: &Tensor) -> Option<bool> {
    let [outputs, inputs] = *weight.dims() else { return None };
    if !matches!(weight.dtype(), DType::F32 | DType::BF16) {
        return None;
    }
    match *weight.stride() {
        [stride, 1] if stride == inputs => Some(true),
        [1, stride] if stride == outputs => Some(false),
        _ => None,
    }
}

/// Whether the product with a weight is added to a low-rank change, by [`add_product`], and not the change to the product: in
/// bf16, where that takes less time.
pub(super) fn comes_second(weight: &Tensor) -> bool {
    weight.dtype() == DType::BF16 && by_rows(weight).is_some()
}

/// `y += x W^T` or `y += x W` for contiguous x and y of `rows` rows, with sums in f32; all f32, or all bf16.
pub(super) fn add_product(
    y: &mut CudaStorage,
    x: (&CudaStorage, &Layout),
    rows: usize,
    weight: &Tensor,
    way: Way,
) -> Result<()> {
    match y.dtype() {
        DType::F32 => run(y, x, rows, weight, way, 1f32),
        DType::BF16 => run(y, x, rows, weight, way, bf16::ONE),
        other => bail!("no product that adds to {other:?}"),
    }
}

fn run<T: Element>(
    y: &mut CudaStorage,
    (x, layout): (&CudaStorage, &Layout),
    rows: usize,
    weight: &Tensor,
    way: Way,
    one: T,
) -> Result<()>
where
    CudaBlas: Gemm<T>,
{
    let (outputs, inputs) = weight.dims2()?;
    let Some(by_rows) = by_rows(weight) else {
        bail!("a weight that is not contiguous: {:?}", weight.layout())
    };
    let (n, k) = match way {
        Way::Forward => (outputs, inputs),
        Way::Backward => (inputs, outputs),
    };
    if layout.shape().elem_count() != rows * k {
        bail!("an input of {:?} for {rows} rows of {k}", layout.shape());
    }
    let int = |n: usize| Ok::<_, candle_core::Error>(size(n)?.cast_signed());
    // cuBLAS takes matrices by columns, so that all are transposed: y^T (n, rows) += second^T x^T, second (k, n).
    let (transa, lda) = if by_rows == (way == Way::Backward) { (CUBLAS_OP_N, n) } else { (CUBLAS_OP_T, k) };
    let config = GemmConfig {
        transa,
        transb: CUBLAS_OP_N,
        m: int(n)?,
        n: int(rows)?,
        k: int(k)?,
        alpha: one,
        lda: int(lda)?,
        ldb: int(k)?,
        beta: one,
        ldc: int(n)?,
    };
    let blas = y.device().cublas_handle();
    let x = view::<T>(x, layout)?;
    let held = Held::new(weight);
    let (storage, layout) = held.parts()?;
    let start = layout.start_offset();
    let Some(weight) = storage.as_cuda_slice::<T>()?.try_slice(start..start + n * k) else {
        bail!("layout {layout:?} reaches outside a storage")
    };
    let y = y.as_cuda_slice_mut::<T>()?;
    if y.len() < rows * n {
        bail!("an output of {} elements for {rows} rows of {n}", y.len());
    }
    // SAFETY: the sizes are those of the three matrices, which were checked to be in their buffers.
    unsafe { blas.gemm(config, &weight, &x, y) }.w()
}
