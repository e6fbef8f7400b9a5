//! The types that tensors are stored in, beside those that are computed in.

use std::ops::Range;

use candle_core::{CpuStorage, Layout, Result, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::matrix::Values;
use super::real::{Real, range, with_storage};

/// A type that a tensor is stored in. A kernel converts it row by row, in its first-level cache, as it reads and writes.
pub(super) trait Stored: WithDType + Default {
    /// What is computed in.
    type Real: Real;

    /// `row` in the type of the computation: itself, or converted in the first places of `room`.
    fn read<'a>(row: &'a [Self], room: &'a mut [Self::Real]) -> &'a [Self::Real];

    /// `row` as it would be read after it was stored: itself, or rounded in the first places of `room`.
    fn rounded<'a>(row: &'a [Self::Real], room: &'a mut [Self::Real]) -> &'a [Self::Real];

    /// Lets `compute` write a row over whatever is there, in `row` itself or in `room`, from which it is rounded.
    fn write(row: &mut [Self], room: &mut [Self::Real], compute: impl FnOnce(&mut [Self::Real]));

    /// The elements of a contiguous storage.
    fn of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [Self]> {
        range(Self::cpu_storage_as_slice(storage)?, layout)
    }
}

macro_rules! as_it_is {
    ($real:ty) => {
        impl Stored for $real {
            type Real = $real;

            #[inline(always)]
            fn read<'a>(row: &'a [$real], _room: &'a mut [$real]) -> &'a [$real] {
                row
            }

            #[inline(always)]
            fn rounded<'a>(row: &'a [$real], _room: &'a mut [$real]) -> &'a [$real] {
                row
            }

            #[inline(always)]
            fn write(row: &mut [$real], _room: &mut [$real], compute: impl FnOnce(&mut [$real])) {
                compute(row);
            }
        }
    };
}

macro_rules! in_f32 {
    ($half:ty) => {
        impl Stored for $half {
            type Real = f32;

            #[inline(always)]
            fn read<'a>(row: &'a [$half], room: &'a mut [f32]) -> &'a [f32] {
                let room = &mut room[..row.len()];
                row.convert_to_f32_slice(room);
                room
            }

            #[inline(always)]
            fn rounded<'a>(row: &'a [f32], room: &'a mut [f32]) -> &'a [f32] {
                let room = &mut room[..row.len()];
                for (rounded, &value) in room.iter_mut().zip(row) {
                    *rounded = <$half>::from_f32(value).to_f32();
                }
                room
            }

            #[inline(always)]
            fn write(row: &mut [$half], room: &mut [f32], compute: impl FnOnce(&mut [f32])) {
                let room = &mut room[..row.len()];
                compute(room);
                row.convert_from_f32_slice(room);
            }
        }
    };
}

as_it_is!(f32);
as_it_is!(f64);
in_f32!(bf16);
in_f32!(f16);

/// Values that a kernel reads row by row.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a, E: Stored> {
    Stored(&'a [E]),
    /// In the type of the computation, for a kernel that reads them as if they had been stored.
    Computed(&'a [E::Real]),
}

impl<'a, E: Stored> Rows<'a, E> {
    /// Those of a contiguous storage.
    pub(super) fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        match (E::of(storage, layout), E::Real::values(storage)) {
            (Err(_), Some(Values::Full(values))) => Ok(Self::Computed(range(values, layout)?)),
            (values, _) => values.map(Self::Stored),
        }
    }

    /// The values of a range.
    #[inline(always)]
    pub(super) fn read<'b>(self, row: Range<usize>, room: &'b mut [E::Real]) -> &'b [E::Real]
    where
        'a: 'b,
    {
        match self {
            Self::Stored(values) => E::read(&values[row], room),
            Self::Computed(values) => E::rounded(&values[row], room),
        }
    }
}

/// Runs `f` on the rows of a contiguous CPU tensor.
pub(super) fn with_rows<E: Stored, R>(
    tensor: &Tensor,
    f: impl FnOnce(Rows<'_, E>) -> Result<R>,
) -> Result<R> {
    with_storage(tensor, |storage, layout| f(Rows::of(storage, layout)?))
}

/// Runs `f` on the elements of a contiguous CPU tensor, as they are stored.
pub(super) fn with_stored<E: Stored, R>(tensor: &Tensor, f: impl FnOnce(&[E]) -> Result<R>) -> Result<R> {
    with_storage(tensor, |storage, layout| f(E::of(storage, layout)?))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn computed_rows_are_read_as_if_they_had_been_stored() {
        let computed = Tensor::new(&[1f32, 1.003, -2.7512, 1e-40, 3e38, f32::NAN], &Device::Cpu).unwrap();
        let stored = computed.to_dtype(DType::BF16).unwrap();
        let bits = |tensor: &Tensor| {
            let row = |rows: Rows<'_, bf16>| {
                let mut room = [9f32; 8];
                Ok(rows.read(1..6, &mut room).iter().map(|value| value.to_bits()).collect::<Vec<_>>())
            };
            with_rows(tensor, row).unwrap()
        };
        assert_eq!(bits(&computed), bits(&stored));
        let mut written = [bf16::ZERO; 5];
        bf16::write(&mut written, &mut [9f32; 8], |row| {
            row.copy_from_slice(&[1.003, -2.7512, 1e-40, 3e38, 0.5]);
        });
        assert_eq!(written.map(|value| value.to_f32().to_bits())[..4], bits(&stored)[..4]);
        // f64 is not what bf16 is computed in.
        assert!(with_rows(&computed.to_dtype(DType::F64).unwrap(), |_: Rows<'_, bf16>| Ok(())).is_err());
    }
}
