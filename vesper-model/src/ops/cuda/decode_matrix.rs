//! The matrices of a decoding step: the formats of their rows, and the kernels that read them.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, DevicePtr, sys};
use candle_core::quantized::GgmlDType;
use candle_core::{CudaDevice, DType, Result, Tensor};

use super::launch::{Element, Held, Module, allow_shared, by_dtype, has_kernels, size};
use crate::quantized::Weight;

/// How many sequences read rows together, and from how many on.
const OF_NUMBERS: &[(usize, usize)] = &[(8, 5), (4, 2), (1, 0)];
const OF_BLOCKS: &[(usize, usize)] = &[(4, 2), (1, 0)];
/// Shared memory that the kernels declare for themselves, at most.
const DECLARED: usize = 2048;

/// How rows are stored, see `decode_rows.cuh`.
#[derive(Debug, Clone, Copy)]
struct Format {
    module: Module,
    /// In the kernels' names.
    name: &'static str,
    /// Elements of a unit.
    unit: usize,
    together: &'static [(usize, usize)],
}

impl Format {
    /// Of plain numbers, read 16 bytes at a time where `wide`.
    fn numbers(dtype: DType, wide: bool) -> Option<Self> {
        let (module, name, unit) = match (dtype, wide) {
            (DType::F32, true) => (Module::DecodeF32, "f32_wide", 4),
            (DType::F32, false) => (Module::DecodeF32, "f32_single", 1),
            (DType::BF16, true) => (Module::DecodeBf16, "bf16_wide", 8),
            (DType::BF16, false) => (Module::DecodeBf16, "bf16_single", 1),
            (DType::F16, true) => (Module::DecodeF16, "f16_wide", 8),
            (DType::F16, false) => (Module::DecodeF16, "f16_single", 1),
            _ => return None,
        };
        Some(Self { module, name, unit, together: OF_NUMBERS })
    }

    fn blocks(dtype: GgmlDType) -> Option<Self> {
        let (module, name) = match dtype {
            GgmlDType::Q8_0 => (Module::DecodeQ8_0, "q8_0"),
            GgmlDType::Q5_1 => (Module::DecodeQ5_1, "q5_1"),
            GgmlDType::Q5_0 => (Module::DecodeQ5_0, "q5_0"),
            GgmlDType::Q4_1 => (Module::DecodeQ4_1, "q4_1"),
            GgmlDType::Q4_0 => (Module::DecodeQ4_0, "q4_0"),
            GgmlDType::Q6K => (Module::DecodeQ6K, "q6_k"),
            GgmlDType::Q5K => (Module::DecodeQ5K, "q5_k"),
            GgmlDType::Q4K => (Module::DecodeQ4K, "q4_k"),
            GgmlDType::Q3K => (Module::DecodeQ3K, "q3_k"),
            GgmlDType::Q2K => (Module::DecodeQ2K, "q2_k"),
            _ => return None,
        };
        Some(Self { module, name, unit: 8, together: OF_BLOCKS })
    }

    /// Bytes of shared memory of a vector of n, as `padded` has it.
    fn bytes(&self, n: usize) -> usize {
        4 * if self.unit > 4 { n.next_multiple_of(32 * self.unit) } else { n }
    }

    /// The kernel of this name for the format, without what sets those for several sequences apart.
    fn kernel(&self, name: &str) -> String {
        format!("decode_{name}_{}", self.name)
    }
}

/// A kernel that may ask for so much shared memory.
pub(super) fn load(device: &CudaDevice, module: Module, name: &str, shared: u32) -> Result<CudaFunction> {
    let function = device.get_or_load_custom_func(name, module.name(), module.ptx())?;
    allow_shared(&function, shared)?;
    Ok(function.into_cuda_function())
}

/// Rows of one format.
#[derive(Debug)]
struct Group {
    format: Format,
    address: u64,
    rows: usize,
}

/// The groups of a matrix; none where one of them has no kernels. `wide`: whether vectors may be read four elements at
/// a time.
fn groups(weight: &Weight, wide: bool) -> Result<Option<Vec<Group>>> {
    let numbers = |dtype, address: u64, rows, width: usize| {
        let unit = if dtype == DType::F32 { 4 } else { 8 };
        let wide = wide && width.is_multiple_of(unit) && address.is_multiple_of(16);
        Format::numbers(dtype, wide).map(|format| Group { format, address, rows })
    };
    match weight {
        Weight::Plain(tensor) => {
            if !has_kernels(tensor.dtype()) || !tensor.is_contiguous() {
                return Ok(None);
            }
            let (rows, width) = tensor.dims2()?;
            Ok(numbers(tensor.dtype(), address_of(tensor)?, rows, width).map(|group| vec![group]))
        }
        Weight::Blocks(blocks) => {
            let all = blocks.groups().iter().map(|group| {
                let (rows, width) = group.shape().dims2()?;
                let address = group.device_ptr()? as u64;
                Ok(match group.dtype() {
                    GgmlDType::F32 => numbers(DType::F32, address, rows, width),
                    GgmlDType::BF16 => numbers(DType::BF16, address, rows, width),
                    GgmlDType::F16 => numbers(DType::F16, address, rows, width),
                    blocks if wide => Format::blocks(blocks).map(|format| Group { format, address, rows }),
                    _ => None,
                })
            });
            all.collect()
        }
    }
}

/// What reads some rows of a matrix.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) kernel: CudaFunction,
    /// Where the rows are, which of the matrix is the first, and how many they are.
    pub(super) address: u64,
    pub(super) first: u32,
    pub(super) rows: u32,
    /// Bytes of shared memory.
    pub(super) shared: u32,
}

/// What a product needs to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    /// Sequences.
    pub(super) rows: usize,
    /// Bytes of shared memory beside a sequence's vector.
    pub(super) beside: usize,
    /// Whether vectors may be read four elements at a time.
    pub(super) wide: bool,
}

/// The kernel of this name for each group of a matrix's rows; none where there is none, or where the device has too
/// little shared memory for it.
pub(super) fn parts(
    device: &CudaDevice,
    name: &str,
    weight: &Weight,
    needs: Needs,
) -> Result<Option<Vec<Part>>> {
    let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let limit = device.cuda_stream().context().attribute(limit).w()? as usize;
    let [_, width] = weight.dims()?;
    let Some(groups) = groups(weight, needs.wide)? else { return Ok(None) };
    let mut first = 0;
    let mut parts = Vec::with_capacity(groups.len());
    for Group { format, address, rows } in groups {
        let own = format.bytes(width) + needs.beside;
        let fits = |&&(n, least): &&(usize, usize)| needs.rows >= least && DECLARED + n * own <= limit;
        let Some(&(together, _)) = format.together.iter().find(fits) else { return Ok(None) };
        let shared = size(together * own)?;
        let kernel = load(device, format.module, &format!("{}_{together}", format.kernel(name)), shared)?;
        parts.push(Part { kernel, address, first: size(first)?, rows: size(rows)?, shared });
        first += rows;
    }
    Ok(Some(parts))
}

/// As [`parts`], where all rows are of one format.
pub(super) fn part(device: &CudaDevice, name: &str, weight: &Weight, needs: Needs) -> Result<Option<Part>> {
    let Some(mut parts) = parts(device, name, weight, needs)? else { return Ok(None) };
    Ok(if parts.len() == 1 { parts.pop() } else { None })
}

/// The kernel that reads rows of a table, and where the table is.
pub(super) fn table(device: &CudaDevice, weight: &Weight) -> Result<Option<(CudaFunction, u64)>> {
    match groups(weight, true)?.as_deref() {
        Some([Group { format, address, .. }]) => {
            Ok(Some((load(device, format.module, &format.kernel("embed"), 0)?, *address)))
        }
        _ => Ok(None),
    }
}

/// Where a contiguous tensor begins.
pub(super) fn address_of(tensor: &Tensor) -> Result<u64> {
    fn of<T: Element>(tensor: &Tensor) -> Result<u64> {
        let held = Held::new(tensor);
        let stream = held.device()?.cuda_stream();
        let view = held.view::<T>()?;
        let (address, _) = view.device_ptr(&stream);
        Ok(address)
    }
    by_dtype!(tensor.dtype(), T => of::<T>(tensor))
}
