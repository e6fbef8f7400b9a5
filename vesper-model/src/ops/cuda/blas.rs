//! Matrix products with a destination of one's own, by cuBLAS.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, Result, bail};

use super::launch::Element;

/// A matrix stored row by row, `stride` elements from one row to the next, taken as it is or transposed.
pub(super) struct Matrix<'a, T> {
    pub(super) data: &'a CudaView<'a, T>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

impl<'a, T> Matrix<'a, T> {
    pub(super) fn new(data: &'a CudaView<'a, T>, rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, transposed: false }
    }

    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns of what the product sees.
    pub(super) fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// Whether its data holds it.
    pub(super) fn fits(&self) -> bool {
        self.rows == 0
            || self.stride >= self.cols && (self.rows - 1) * self.stride + self.cols <= self.data.len()
    }

    pub(super) fn operation(&self) -> sys::cublasOperation_t {
        if self.transposed {
            sys::cublasOperation_t::CUBLAS_OP_T
        } else {
            sys::cublasOperation_t::CUBLAS_OP_N
        }
    }
}

/// `c = alpha a b + beta c`, c row by row with `stride` elements from one row to the next; accumulated in f32.
pub(super) fn product<T: Element, C: Element>(
    device: &CudaDevice,
    a: &Matrix<'_, T>,
    b: &Matrix<'_, T>,
    c: &mut CudaViewMut<'_, C>,
    stride: usize,
    (alpha, beta): (f32, f32),
) -> Result<()> {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    let reach = if m == 0 { 0 } else { (m - 1) * stride + n };
    if k != inner || stride < n || reach > c.len() || !a.fits() || !b.fits() {
        bail!("a CUDA product of {m} x {k} and {inner} x {n} does not fit its buffers");
    }
    let int = |n: usize| match i32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("a dimension of {n} is too large for cuBLAS"),
    };
    if m == 0 || n == 0 {
        return Ok(());
    }
    let compute =
        if T::BLAS == sys::cudaDataType_t::CUDA_R_32F && candle_core::cuda::gemm_reduced_precision_f32() {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    let (from_a, _held_a) = a.data.device_ptr(&stream);
    let (from_b, _held_b) = b.data.device_ptr(&stream);
    let (to, _held_c) = c.device_ptr_mut(&stream);
    // cuBLAS counts by columns: row by row, that is the transposed product, c^T = b^T a^T.
    // SAFETY: the pointers are of live buffers on the handle's device and stream, which are as long as the checks
    // above say; alpha and beta are of the compute type, f32, and read before the call returns.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            b.operation(),
            a.operation(),
            int(n)?,
            int(m)?,
            int(k)?,
            std::ptr::from_ref(&alpha).cast(),
            from_b as *const _,
            T::BLAS,
            int(b.stride)?,
            from_a as *const _,
            T::BLAS,
            int(a.stride)?,
            std::ptr::from_ref(&beta).cast(),
            to as *mut _,
            C::BLAS,
            int(stride)?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
        .w()
    }
}
