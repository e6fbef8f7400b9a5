//! The state arrays of one parameter.

use candle_core::{DType, Device, Result, Tensor};
use std::borrow::Cow;

/// The state arrays of one parameter, in the order of its rule's slot names.
pub(crate) enum Slots {
    /// f32 arrays that the fused CPU pass updates in place.
    F32(Vec<Vec<f32>>),
    /// f64 arrays that the fused CPU pass updates in place.
    F64(Vec<Vec<f64>>),
    /// Tensors on the parameter's device.
    OnDevice(Vec<Tensor>),
}

impl Slots {
    pub(super) fn zeros_on_host(dtype: DType, count: usize, len: usize) -> Self {
        if dtype == DType::F64 {
            Self::F64(vec![vec![0.0; len]; count])
        } else {
            Self::F32(vec![vec![0.0; len]; count])
        }
    }

    pub(super) fn is_on_host(&self) -> bool {
        !matches!(self, Self::OnDevice(_))
    }

    /// The size in bytes of one slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        match self {
            Self::F32(slots) => slots.first().map_or(0, |s| 4 * s.len()),
            Self::F64(slots) => slots.first().map_or(0, |s| 8 * s.len()),
            Self::OnDevice(slots) => slots.first().map_or(0, |t| t.dtype().size_in_bytes() * t.elem_count()),
        }
    }

    /// One slot as little-endian bytes, copied only where it must be.
    pub(crate) fn bytes(&self, slot: usize) -> Result<Cow<'_, [u8]>> {
        match self {
            Self::F32(slots) => Ok(slots.get(slot).map_or(Cow::Borrowed(&[]), |s| f32_bytes(s))),
            Self::F64(slots) => Ok(slots.get(slot).map_or(Cow::Borrowed(&[]), |s| f64_bytes(s))),
            Self::OnDevice(slots) => {
                let Some(tensor) = slots.get(slot) else { return Ok(Cow::Borrowed(&[])) };
                let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
                Ok(Cow::Owned(if flat.dtype() == DType::F64 {
                    f64_bytes(&flat.to_vec1()?).into_owned()
                } else {
                    f32_bytes(&flat.to_vec1()?).into_owned()
                }))
            }
        }
    }

    /// One slot as a tensor of the given shape on the CPU.
    pub(crate) fn tensor(&self, slot: usize, shape: &[usize]) -> Result<Option<Tensor>> {
        match self {
            Self::F32(slots) => {
                slots.get(slot).map(|s| Tensor::from_slice(s, shape, &Device::Cpu)).transpose()
            }
            Self::F64(slots) => {
                slots.get(slot).map(|s| Tensor::from_slice(s, shape, &Device::Cpu)).transpose()
            }
            Self::OnDevice(slots) => slots.get(slot).map(|t| t.to_device(&Device::Cpu)).transpose(),
        }
    }

    /// New state with the values of little-endian bytes, in the same place and of the same kind as this one.
    /// The sizes of `slots` were checked against [`Slots::slot_bytes`].
    pub(crate) fn like_from_bytes(&self, slots: &[&[u8]], shape: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::F32(_) => Self::F32(slots.iter().map(|s| f32_from(s)).collect()),
            Self::F64(_) => Self::F64(slots.iter().map(|s| f64_from(s)).collect()),
            Self::OnDevice(old) => Self::OnDevice(
                slots
                    .iter()
                    .zip(old)
                    .map(|(s, old)| match old.dtype() {
                        DType::F64 => Tensor::from_vec(f64_from(s), shape, old.device()),
                        _ => Tensor::from_vec(f32_from(s), shape, old.device()),
                    })
                    .collect::<Result<_>>()?,
            ),
        })
    }
}

fn f32_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

fn f64_bytes(values: &[f64]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

fn f32_from(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn f64_from(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
}
