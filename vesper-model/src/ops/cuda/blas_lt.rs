//! A matrix product that is added to one matrix and written to another, by cuBLASLt: cuBLAS itself adds to what it
//! overwrites.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, DType, Error, Result, bail};
use sys::cublasLtMatmulDescAttributes_t as Of;
use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;

use super::blas::{Matrix, product};
use super::launch::{Element, allocate};

/// How much memory an algorithm may ask for.
const WORKSPACE: usize = 32 << 20;

/// `d = c + a b`, c and d row by row without gaps; accumulated in f32 and rounded once.
pub(super) fn sum_with_product<T: Element>(
    device: &CudaDevice,
    c: &CudaView<'_, T>,
    a: &Matrix<'_, T>,
    b: &Matrix<'_, T>,
    d: &mut CudaViewMut<'_, T>,
) -> Result<()> {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    if k != inner || c.len() != m * n || d.len() != m * n || !a.fits() || !b.fits() {
        bail!("a sum with a CUDA product of {m} x {k} and {inner} x {n} does not fit its buffers");
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if by_lt(device, c, a, b, d)? {
        return Ok(());
    }
    device.memcpy_dtod(c, d)?;
    product::<T, T>(device, a, b, d, n, (1.0, 1.0))
}

/// The same of matrices that fit and are not empty; false where the library has no algorithm for them.
fn by_lt<T: Element>(
    device: &CudaDevice,
    c: &CudaView<'_, T>,
    a: &Matrix<'_, T>,
    b: &Matrix<'_, T>,
    d: &mut CudaViewMut<'_, T>,
) -> Result<bool> {
    let ((m, _), (_, n)) = (a.shape(), b.shape());
    let dtype = match T::DTYPE {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        other => bail!("no CUDA product of {other:?}"),
    };
    let compute = if T::DTYPE == DType::F32 && candle_core::cuda::gemm_reduced_precision_f32() {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    // The library counts by columns: row by row, that is the transposed product, d^T = c^T + b^T a^T.
    let layout = |rows: usize, columns: usize, stride: usize| -> Result<Descriptor<_>> {
        let made = result::create_matrix_layout(dtype, columns as u64, rows as u64, stride as i64);
        Ok(Descriptor(made.map_err(failed)?, result::destroy_matrix_layout))
    };
    let of_a = layout(a.rows, a.cols, a.stride)?;
    let of_b = layout(b.rows, b.cols, b.stride)?;
    let of_sum = layout(m, n, n)?;
    let made = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
    let how = Descriptor(made.map_err(failed)?, result::destroy_matmul_desc);
    let made = result::create_matmul_pref();
    let preference = Descriptor(made.map_err(failed)?, result::destroy_matmul_pref);

    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    // A handle of cuBLAS is one of cuBLASLt too.
    let handle = (*blas.handle()).cast();
    let (from_a, _held_a) = a.data.device_ptr(&stream);
    let (from_b, _held_b) = b.data.device_ptr(&stream);
    let (from_c, _held_c) = c.device_ptr(&stream);
    let (to, _held_d) = d.device_ptr_mut(&stream);

    // SAFETY: the descriptors are live, and the values of the types that the attributes have.
    let heuristic = unsafe {
        set(how.0, Of::CUBLASLT_MATMUL_DESC_TRANSA, &b.operation(), result::set_matmul_desc_attribute)?;
        set(how.0, Of::CUBLASLT_MATMUL_DESC_TRANSB, &a.operation(), result::set_matmul_desc_attribute)?;
        let prefer = result::set_matmul_pref_attribute;
        set(preference.0, Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE, prefer)?;
        for (attribute, address) in [
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, from_b),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, from_a),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, from_c),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, to),
        ] {
            let alignment = 1u32 << address.trailing_zeros().min(8);
            set(preference.0, attribute, &alignment, prefer)?;
        }
        result::get_matmul_algo_heuristic(handle, how.0, of_b.0, of_a.0, of_sum.0, of_sum.0, preference.0)
    };
    let heuristic = match heuristic {
        Ok(heuristic) => heuristic,
        Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    let workspace = allocate::<u8>(device, heuristic.workspaceSize)?;
    let (space, _held_space) = workspace.device_ptr(&stream);
    let one = 1f32;
    // SAFETY: the pointers are of live buffers on the handle's device and stream, which are as long as the caller has
    // checked; the factor is of the scale type, f32, and read before the call returns.
    unsafe {
        result::matmul(
            handle,
            how.0,
            std::ptr::from_ref(&one).cast(),
            std::ptr::from_ref(&one).cast(),
            from_b as *const _,
            of_b.0,
            from_a as *const _,
            of_a.0,
            from_c as *const _,
            of_sum.0,
            to as *mut _,
            of_sum.0,
            &raw const heuristic.algo,
            space as *mut _,
            heuristic.workspaceSize,
            stream.cu_stream().cast(),
        )
        .map_err(failed)?;
    }
    Ok(true)
}

/// Something that the library has made, and how it is given back.
struct Descriptor<H: Copy>(H, unsafe fn(H) -> std::result::Result<(), result::CublasError>);

impl<H: Copy> Drop for Descriptor<H> {
    fn drop(&mut self) {
        // SAFETY: made by the library, and given back here alone.
        // Where that fails there is nothing to be done.
        let _ = unsafe { (self.1)(self.0) };
    }
}

/// Sets an attribute of something that the library has made.
///
/// # Safety
/// `of` is live, and `V` the type of the attribute.
unsafe fn set<H, A, V>(
    of: H,
    attribute: A,
    value: &V,
    by: unsafe fn(H, A, *const c_void, usize) -> std::result::Result<(), result::CublasError>,
) -> Result<()> {
    // SAFETY: the caller's promise; the value is read before the call returns.
    unsafe { by(of, attribute, std::ptr::from_ref(value).cast(), size_of::<V>()) }.map_err(failed)
}

fn failed(error: result::CublasError) -> Error {
    Error::Cuda(Box::new(error))
}
