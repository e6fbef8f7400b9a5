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
}

/// What a state array is made for.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// The fused pass over host memory.
    Host(StateFormat),
    /// Candle operations.
    Tensors,
}

/// The element type of the state of a parameter.
pub(crate) fn dtype(param: DType) -> DType {
    if param == DType::F64 { DType::F64 } else { DType::F32 }
}

impl Slot {
    /// An array of zeros for a parameter; a master copy has the parameter's values.
    pub(crate) fn new(spec: SlotSpec, param: &Var, place: Place) -> Result<Self> {
        let dtype = dtype(param.dtype());
        let len = spec.shape.iter().product();
        let data = match place {
            // Some devices refuse to convert nothing.
            Place::Tensors if spec.name == MASTER && len > 0 => {
                Data::Tensor(param.as_detached_tensor().to_dtype(dtype)?.copy()?)
            }
            Place::Tensors => Data::Tensor(Tensor::zeros(spec.shape.as_slice(), dtype, param.device())?),
            Place::Host(_) if spec.name == MASTER => {
                let values = param.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?;
                Data::F32(values.to_vec1()?)
            }
            Place::Host(_) if dtype == DType::F64 => Data::F64(vec![0.0; len]),
            Place::Host(StateFormat::Blockwise8)
                if spec.kind != SlotKind::Other && len >= SMALLEST_QUANTISED =>
            {
                Data::Blockwise(Blockwise::zeros(len, spec.kind == SlotKind::Signed))
            }
            Place::Host(_) => Data::F32(vec![0.0; len]),
        };
        Ok(Self { spec, data })
    }

    /// Keeps the array in full precision from now on.
    pub(crate) fn widen(&mut self) {
        if let Data::Blockwise(x) = &self.data {
            self.data = Data::F32(x.to_vec());
        }
    }

    pub(crate) fn is_on_host(&self) -> bool {
        !matches!(self.data, Data::Tensor(_))
    }

    /// The bytes that the array takes in memory.
    pub(crate) fn bytes_held(&self) -> usize {
        match &self.data {
            Data::F32(x) => 4 * x.len(),
            Data::F64(x) => 8 * x.len(),
            Data::Blockwise(x) => x.codes().len() + 4 * x.scales().len(),
            Data::Tensor(t) => t.dtype().size_in_bytes() * t.elem_count(),
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
        })
    }

    /// New data of this array's kind, in this array's place, with other values.
    pub(crate) fn data_of(&self, values: &Values) -> Result<Data> {
        let shape = self.spec.shape.as_slice();
        Ok(match &self.data {
            Data::F32(_) => Data::F32(values.f32().into_owned()),
            Data::F64(_) => Data::F64(values.f64()),
            Data::Blockwise(old) => match values {
                Values::Blockwise(x) if x.is_signed() == old.is_signed() => Data::Blockwise(x.clone()),
                _ => Data::Blockwise(Blockwise::from_slice(&values.f32(), old.is_signed())),
            },
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
