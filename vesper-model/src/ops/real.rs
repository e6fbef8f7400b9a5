//! The number types that the CPU kernels compute in, and the way in and out of candle's storages.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use super::filled::filled;
use super::gemm::{self, Precision};
use super::matrix::{Matrix, Target, Threads, Values, by_crate};

/// `f32` (for f32, bf16 and f16 tensors) or `f64` (for f64 tensors).
pub(super) trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Default
    + 'static
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    /// candle's name for the type itself.
    const DTYPE: DType;
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    fn exp(self) -> Self;
    fn sqrt(self) -> Self;
    fn of(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn max(self, other: Self) -> Self;
    /// The elements of a contiguous storage; borrowed where the type is already right.
    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [Self]>>;
    /// A storage that a product can read as it is.
    fn values(storage: &CpuStorage) -> Option<Values<'_, Self>>;
    /// `dst = a b` or `dst += a b`; the sizes fit, and none is 0.
    fn multiply(
        dst: Target<'_, Self>,
        a: Matrix<'_, Self>,
        b: Matrix<'_, Self>,
        precision: Precision,
        threads: Threads,
    );
    /// Turns computed values into a storage of the wanted type.
    fn store(values: Vec<Self>, dtype: DType) -> Result<CpuStorage>;
}

pub(super) fn range<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    if layout.shape().elem_count() == 0 {
        return Ok(&[]); // a part of an empty tensor may begin behind its end
    }
    match layout.contiguous_offsets() {
        Some((start, end)) => match data.get(start..end) {
            Some(slice) => Ok(slice),
            None => bail!("layout {layout:?} reaches outside a storage of {} elements", data.len()),
        },
        None => bail!("a fused kernel got a tensor that is not contiguous: {layout:?}"),
    }
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    /// Within 2 ulp of the exact value; 0 below -87.3 (where results would be subnormal), infinity above 88.7.
    /// Branch-free, so that loops over it vectorise.
    #[inline(always)]
    fn exp(self) -> Self {
        // e^x = 2^n * e^r, |r| <= ln 2 / 2, with ln 2 in two parts so that r is exact.
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
        let clamped = if self > 89.0 { 89.0 } else { self };
        let clamped = if clamped < -104.0 { -104.0 } else { clamped };
        let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
        let n = shifted - SHIFT;
        let r = clamped - n * 0.693_359_4;
        let r = r - n * -2.121_944_4e-4;
        let mut p = 1.987_569_1e-4;
        p = p * r + 1.398_199_9e-3;
        p = p * r + 8.333_452e-3;
        p = p * r + 4.166_579_6e-2;
        p = p * r + 1.666_666_5e-1;
        p = p * r + 5e-1;
        let p = p * r * r + r + 1.0;
        // Two half steps keep the exponent of each factor in range.
        let n = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
        let half = n >> 1;
        let a = Self::from_bits(((half + 127) << 23) as u32);
        let b = Self::from_bits(((n - half + 127) << 23) as u32);
        let value = p * a * b;
        let value = if self > 88.722_84 { Self::INFINITY } else { value };
        let value = if self < -87.336_55 { 0.0 } else { value };
        if self.is_nan() { self } else { value }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [Self]>> {
        Ok(match storage {
            CpuStorage::F32(data) => Cow::Borrowed(range(data, layout)?),
            CpuStorage::BF16(data) => Cow::Owned(widened(range(data, layout)?)),
            CpuStorage::F16(data) => {
                Cow::Owned(convert(range(data, layout)?, |out, of| of.convert_to_f32_slice(out)))
            }
            _ => bail!("expected f32, bf16 or f16"),
        })
    }

    fn values(storage: &CpuStorage) -> Option<Values<'_, Self>> {
        match storage {
            CpuStorage::F32(data) => Some(Values::Full(data)),
            CpuStorage::BF16(data) => Some(Values::Half(data)),
            _ => None,
        }
    }

    fn multiply(
        dst: Target<'_, Self>,
        a: Matrix<'_, Self>,
        b: Matrix<'_, Self>,
        precision: Precision,
        threads: Threads,
    ) {
        gemm::multiply(dst, a, b, precision, threads);
    }

    fn store(values: Vec<Self>, dtype: DType) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(values),
            DType::BF16 => {
                CpuStorage::BF16(convert(&values, |out: &mut [bf16], of| out.convert_from_f32_slice(of)))
            }
            DType::F16 => {
                CpuStorage::F16(convert(&values, |out: &mut [f16], of| out.convert_from_f32_slice(of)))
            }
            other => bail!("expected f32, bf16 or f16, got {other:?}"),
        })
    }
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [Self]>> {
        match storage {
            CpuStorage::F64(data) => Ok(Cow::Borrowed(range(data, layout)?)),
            _ => bail!("expected f64"),
        }
    }

    fn values(storage: &CpuStorage) -> Option<Values<'_, Self>> {
        match storage {
            CpuStorage::F64(data) => Some(Values::Full(data)),
            _ => None,
        }
    }

    fn multiply(
        dst: Target<'_, Self>,
        a: Matrix<'_, Self>,
        b: Matrix<'_, Self>,
        _precision: Precision,
        threads: Threads,
    ) {
        let full = |values| match values {
            Values::Full(values) => Cow::Borrowed(values),
            Values::Half(values) => Cow::Owned(values.iter().map(|value: &bf16| value.to_f64()).collect()),
        };
        by_crate(dst, (a, &full(a.values)), (b, &full(b.values)), threads);
    }

    fn store(values: Vec<Self>, _dtype: DType) -> Result<CpuStorage> {
        Ok(CpuStorage::F64(values))
    }
}

/// The values in another type, several tasks at once.
fn convert<A: Sync, B: Copy + Default + Send>(values: &[A], f: impl Fn(&mut [B], &[A]) + Sync) -> Vec<B> {
    const TASK: usize = 1 << 15;
    let ([converted], _) = filled(values.len(), TASK, |range, [out]| {
        simd(
            #[inline(always)]
            || f(out, &values[range]),
        );
    });
    converted
}

/// bf16 in f32.
pub(super) fn widened(values: &[bf16]) -> Vec<f32> {
    convert(values, |out: &mut [f32], of| of.convert_to_f32_slice(out))
}

/// The elements of a contiguous storage, for a product.
pub(super) enum Operand<'a, T> {
    AsTheyAre(Values<'a, T>),
    Converted(Vec<T>),
}

impl<'a, T: Real> Operand<'a, T> {
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        Ok(match T::values(storage) {
            Some(Values::Full(values)) => Self::AsTheyAre(Values::Full(range(values, layout)?)),
            Some(Values::Half(values)) => Self::AsTheyAre(Values::Half(range(values, layout)?)),
            None => Self::Converted(T::read(storage, layout)?.into_owned()),
        })
    }

    pub(super) fn values(&self) -> Values<'_, T> {
        match self {
            Self::AsTheyAre(values) => *values,
            Self::Converted(values) => Values::Full(values),
        }
    }
}

/// Runs `f` on the elements of a contiguous CPU tensor, for a product.
pub(super) fn with_operand<T: Real, R>(
    tensor: &Tensor,
    f: impl FnOnce(Values<'_, T>) -> Result<R>,
) -> Result<R> {
    with_storage(tensor, |storage, layout| f(Operand::new(storage, layout)?.values()))
}

/// Runs `f` on the elements of a contiguous CPU tensor.
pub(super) fn with_values<T: Real, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    with_storage(tensor, |storage, layout| f(&T::read(storage, layout)?))
}

/// Runs `f` on what a CPU tensor is stored in.
pub(super) fn with_storage<R>(
    tensor: &Tensor,
    f: impl FnOnce(&CpuStorage, &Layout) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(storage, layout),
        _ => bail!("a CPU kernel got a tensor on {:?}", tensor.device().location()),
    }
}

/// Makes a CPU tensor of computed values.
pub(super) fn tensor<T: Real>(values: Vec<T>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    match T::store(values, dtype)? {
        CpuStorage::F32(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::BF16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::F16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::F64(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        _ => bail!("not a floating-point type"),
    }
}

/// Ids of a contiguous CPU tensor of unsigned or signed integers.
pub(super) fn ids(storage: &CpuStorage, layout: &Layout) -> Result<Vec<usize>> {
    Ok(match storage {
        CpuStorage::U32(data) => range(data, layout)?.iter().map(|&id| id as usize).collect(),
        CpuStorage::U8(data) => range(data, layout)?.iter().map(|&id| id as usize).collect(),
        CpuStorage::I64(data) => {
            range(data, layout)?.iter().map(|&id| usize::try_from(id).unwrap_or(usize::MAX)).collect()
        }
        _ => bail!("token ids must be u8, u32 or i64"),
    })
}

/// Ids of a tensor on the CPU, in order.
pub(super) fn ids_of(tensor: &Tensor) -> Result<Vec<usize>> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => ids(storage, layout),
        _ => bail!("a CPU kernel got a tensor on {:?}", tensor.device().location()),
    }
}

/// Runs `f` with the widest vector instructions that this processor has.
#[inline]
pub(super) fn simd<F: FnOnce() -> R, R>(f: F) -> R {
    struct Run<F>(F);
    impl<F: FnOnce() -> R, R> WithSimd for Run<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _simd: S) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Run(f))
}

/// Sum over a slice in a fixed order that vectorises: 16 partial sums, then a tree.
#[inline(always)]
pub(super) fn sum<T: Real>(values: &[T]) -> T {
    fold(values.len(), |i| values[i])
}

/// `sum(f(0), ..., f(n - 1))` in the order of [`sum`].
#[inline(always)]
pub(super) fn fold<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let whole = n / 16 * 16;
    let mut i = 0;
    while i < whole {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
        i += 16;
    }
    for (j, lane) in lanes.iter_mut().take(n - whole).enumerate() {
        *lane += f(whole + j);
    }
    let mut width = 8;
    while width > 0 {
        for j in 0..width {
            let other = lanes[j + width];
            lanes[j] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// The maximum of a slice, minus infinity if it is empty. A NaN is not seen.
#[inline(always)]
pub(super) fn max<T: Real>(values: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(value);
    }
    lanes.into_iter().fold(T::NEG_INFINITY, Real::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_whole_range() {
        let mut worst = 0f64;
        for i in -870_000..887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(Real::exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
    }

    #[test]
    fn exp_saturates_and_keeps_nan() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-1e30f32), 0.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(Real::exp(1e30f32), f32::INFINITY);
        assert_eq!(Real::exp(0f32), 1.0);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_of_any_length() {
        for n in 0..70 {
            let values: Vec<f64> = (0..n).map(|i| f64::from((i * 37) % 11) - 3.0).collect();
            assert!((sum(&values) - values.iter().sum::<f64>()).abs() < 1e-12);
            assert_eq!(max(&values), values.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
    }
}
