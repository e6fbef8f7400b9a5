//! The state arrays of one parameter.

use crate::error::Result;
use crate::options::StateFormat;
use crate::quantised::Blockwise;
use crate::rule::{SlotKind, SlotSpec};
use candle_core::{DType, Device, Tensor, Var};
use std::borrow::Cow;

/// The name of the f32 copy of a bf16 or f16 parameter; always the last array of a parameter that has one.
pub(crate) const MASTER: &str = "master";

/// Parameters with fewer elements keep their state in full precision.
const SMALLEST_QUANTISED: usize = 4096;

/// One state array.
pub(crate) struct Slot {
    pub(crate) spec: SlotSpec,
    pub(crate) data: Data,
}

/// Where and how a state array is kept.
pub(crate) enum Data {
    /// On the host, updated in place.
    F32(Vec<f32>),
    /// On the host, of an f64 parameter.
    F64(Vec<f64>),
    /// On the host, in blocks of 8 bits.
    Blockwise(Blockwise),
    /// On the parameter's device, in the state's element type.
    Tensor(Tensor),
    /// On the parameter's device, in blocks of 8 bits, for kernels that read them.
    TensorBlocks(TensorBlocks),
}

/// What [`Blockwise`] holds, in memory of a device.
pub(crate) struct TensorBlocks {
    /// u8, one an element.
    pub(crate) codes: Tensor,
    /// f32, one a block.
    pub(crate) scales: Tensor,
    pub(crate) signed: bool,
}

impl TensorBlocks {
    fn new(from: &Blockwise, device: &Device) -> Result<Self> {
        Ok(Self {
            codes: Tensor::from_slice(from.codes(), from.codes().len(), device)?,
            scales: Tensor::from_slice(from.scales(), from.scales().len(), device)?,
            signed: from.is_signed(),
        })
    }

    fn to_host(&self) -> Result<Blockwise> {
        let (codes, scales) = (self.codes.to_vec1()?, self.scales.to_vec1()?);
        Ok(Blockwise::from_parts(codes, scales, self.signed)
            .ok_or_else(|| candle_core::Error::Msg("a block of 8-bit state has no valid scale".to_owned()))?)
    }
}

/// What a state array is made for.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// The fused pass over host memory.
    Host(StateFormat),
    /// The parameter's device: kernels, which read blocks of 8 bits, or candle operations, which do not.
    Tensors(StateFormat),
}

/// The element type of the state of a parameter.
pub(crate) fn dtype(param: DType) -> DType {
    if param == DType::F64 { DType::F64 } else { DType::F32 }
}

impl SlotSpec {
    /// Whether the array of such a parameter is kept in blocks of 8 bits where that is chosen.
    fn fits_blocks(&self, param: &Var) -> bool {
        let len: usize = self.shape.iter().product();
        dtype(param.dtype()) == DType::F32 && self.kind != SlotKind::Other && len >= SMALLEST_QUANTISED
    }
}

impl Slot {
    /// An array of zeros for a parameter; a master copy has the parameter's values.
    pub(crate) fn new(spec: SlotSpec, param: &Var, place: Place) -> Result<Self> {
        let dtype = dtype(param.dtype());
        let len = spec.shape.iter().product();
        let quantised = || spec.fits_blocks(param);
        let zeros = || Blockwise::zeros(len, spec.kind == SlotKind::Signed);
        let data = match place {
            // Some devices refuse to convert nothing.
            Place::Tensors(_) if spec.name == MASTER && len > 0 => {
                Data::Tensor(param.as_detached_tensor().to_dtype(dtype)?.copy()?)
            }
            Place::Tensors(StateFormat::Blockwise8) if quantised() => {
                Data::TensorBlocks(TensorBlocks::new(&zeros(), param.device())?)
            }
            Place::Tensors(_) => Data::Tensor(Tensor::zeros(spec.shape.as_slice(), dtype, param.device())?),
            Place::Host(_) if spec.name == MASTER => {
                let values = param.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?;
                Data::F32(values.to_vec1()?)
            }
            Place::Host(StateFormat::Blockwise8) if quantised() => Data::Blockwise(zeros()),
            Place::Host(_) if dtype == DType::F64 => Data::F64(vec![0.0; len]),
            Place::Host(_) => Data::F32(vec![0.0; len]),
        };
        Ok(Self { spec, data })
    }

    /// Keeps the array in the format of a new one in its place from now on.
    pub(crate) fn reformat(&mut self, param: &Var, place: Place) -> Result<()> {
        let (Place::Host(format) | Place::Tensors(format)) = place;
        if format == StateFormat::Full || !self.spec.fits_blocks(param) {
            return self.widen();
        }
        let signed = self.spec.kind == SlotKind::Signed;
        match &self.data {
            Data::F32(x) => self.data = Data::Blockwise(Blockwise::from_slice(x, signed)),
            Data::Tensor(t) => {
                let values: Vec<f32> = t.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
                let blocks = Blockwise::from_slice(&values, signed);
                self.data = Data::TensorBlocks(TensorBlocks::new(&blocks, t.device())?);
            }
            Data::F64(_) | Data::Blockwise(_) | Data::TensorBlocks(_) => {}
        }
        Ok(())
    }

    /// Keeps the array in full precision from now on.
    pub(crate) fn widen(&mut self) -> Result<()> {
        match &self.data {
            Data::Blockwise(x) => self.data = Data::F32(x.to_vec()),
            Data::TensorBlocks(x) => {
                let (values, shape) = (x.to_host()?.to_vec(), self.spec.shape.as_slice());
                self.data = Data::Tensor(Tensor::from_vec(values, shape, x.codes.device())?);
            }
            Data::F32(_) | Data::F64(_) | Data::Tensor(_) => {}
        }
        Ok(())
    }

    pub(crate) fn is_on_host(&self) -> bool {
        !matches!(self.data, Data::Tensor(_) | Data::TensorBlocks(_))
    }

    /// The bytes that the array takes in memory.
    pub(crate) fn bytes_held(&self) -> usize {
        match &self.data {
            Data::F32(x) => 4 * x.len(),
            Data::F64(x) => 8 * x.len(),
            Data::Blockwise(x) => x.codes().len() + 4 * x.scales().len(),
            Data::Tensor(t) => t.dtype().size_in_bytes() * t.elem_count(),
            Data::TensorBlocks(x) => x.codes.elem_count() + 4 * x.scales.elem_count(),
        }
    }

    /// The values as a tensor of the array's shape on the CPU.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        let shape = self.spec.shape.as_slice();
        Ok(match &self.data {
            Data::F32(x) => Tensor::from_slice(x, shape, &Device::Cpu)?,
            Data::F64(x) => Tensor::from_slice(x, shape, &Device::Cpu)?,
            Data::Blockwise(x) => Tensor::from_vec(x.to_vec(), shape, &Device::Cpu)?,
            // A copy: the tensor itself goes on being updated.
            Data::Tensor(t) => t.to_device(&Device::Cpu)?.copy()?,
            Data::TensorBlocks(x) => Tensor::from_vec(x.to_host()?.to_vec(), shape, &Device::Cpu)?,
        })
    }

    /// New data of this array's kind, in this array's place, with other values.
    pub(crate) fn data_of(&self, values: &Values) -> Result<Data> {
        let shape = self.spec.shape.as_slice();
        Ok(match &self.data {
            Data::F32(_) => Data::F32(values.f32().into_owned()),
            Data::F64(_) => Data::F64(values.f64()),
            Data::Blockwise(old) => Data::Blockwise(values.blockwise(old.is_signed()).into_owned()),
            Data::TensorBlocks(old) => {
                Data::TensorBlocks(TensorBlocks::new(&values.blockwise(old.signed), old.codes.device())?)
            }
            Data::Tensor(old) if old.dtype() == DType::F64 => {
                Data::Tensor(Tensor::from_vec(values.f64(), shape, old.device())?)
            }
            Data::Tensor(old) => Data::Tensor(Tensor::from_slice(&values.f32(), shape, old.device())?),
        })
    }

    /// Sets the elements to zero whose mask is zero; `mask` has the array's shape.
    pub(crate) fn zero_where(&mut self, mask: &Tensor) -> Result<()> {
        if mask.dims() != self.spec.shape {
            return Ok(());
        }
        let zeroed = |t: &Tensor| -> Result<Tensor> {
            let kept = mask.to_device(t.device())?.ne(0.0)?;
            Ok(kept.where_cond(t, &t.zeros_like()?)?)
        };
        let masked = if let Data::Tensor(t) = &self.data {
            Data::Tensor(zeroed(t)?)
        } else {
            let t = zeroed(&self.tensor()?)?.flatten_all()?;
            self.data_of(&match t.dtype() {
                DType::F64 => Values::F64(t.to_vec1()?),
                _ => Values::F32(t.to_vec1()?),
            })?
        };
        self.data = masked;
        Ok(())
    }
}

/// The values of a saved state array.
#[derive(Clone)]
pub(crate) enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Blockwise(Blockwise),
}

impl Values {
    fn f32(&self) -> Cow<'_, [f32]> {
        match self {
            Self::F32(x) => Cow::Borrowed(x),
            Self::F64(x) => Cow::Owned(x.iter().map(|&x| x as f32).collect()),
            Self::Blockwise(x) => Cow::Owned(x.to_vec()),
        }
    }

    pub(crate) fn has_negative(&self) -> bool {
        match self {
            Self::F32(x) => x.iter().any(|&x| x < 0.0),
            Self::F64(x) => x.iter().any(|&x| x < 0.0),
            Self::Blockwise(x) => x.to_vec().iter().any(|&x| x < 0.0),
        }
    }

    fn blockwise(&self, signed: bool) -> Cow<'_, Blockwise> {
        match self {
            Self::Blockwise(x) if x.is_signed() == signed => Cow::Borrowed(x),
            other => Cow::Owned(Blockwise::from_slice(&other.f32(), signed)),
        }
    }

    fn f64(&self) -> Vec<f64> {
        match self {
            Self::F64(x) => x.clone(),
            other => other.f32().iter().map(|&x| f64::from(x)).collect(),
        }
    }
}

pub(crate) fn f32_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

pub(crate) fn f64_bytes(values: &[f64]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

pub(crate) fn f32_from(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

pub(crate) fn f64_from(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
}
