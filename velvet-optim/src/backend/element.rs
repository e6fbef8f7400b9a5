//! The element types the fused pass reads and writes, and their way to the type it computes in.

use super::{Measured, Rounding};
use crate::quantised;
use crate::rounding;
use crate::rule::{Element, Elements, Elementwise, Real, Run};
use crate::state::Data;
use candle_core::CpuStorage;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The elements that are converted at a time: two such buffers of f64 stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// A run of gradient elements of any supported type.
#[derive(Clone, Copy)]
pub(super) enum Grad<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Grad<'a> {
    /// The elements `range` of a storage; `None` where it has no such range or is of another type.
    pub(super) fn new(storage: &'a CpuStorage, range: std::ops::Range<usize>) -> Option<Self> {
        match storage {
            CpuStorage::F32(x) => x.get(range).map(Self::F32),
            CpuStorage::F64(x) => x.get(range).map(Self::F64),
            CpuStorage::BF16(x) => x.get(range).map(Self::Bf16),
            CpuStorage::F16(x) => x.get(range).map(Self::F16),
            _ => None,
        }
    }

    pub(super) fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
        }
    }

    /// Some of the elements; a range past the end is cut.
    pub(super) fn range(self, range: std::ops::Range<usize>) -> Self {
        self.split_at(range.end).0.split_at(range.start).1
    }

    /// Whether all elements are zero.
    pub(super) fn is_zero(self) -> bool {
        match self {
            Self::F32(x) => x.iter().all(|&x| x == 0.0),
            Self::F64(x) => x.iter().all(|&x| x == 0.0),
            Self::Bf16(x) => x.iter().all(|&x| x == bf16::ZERO),
            Self::F16(x) => x.iter().all(|&x| x == f16::ZERO),
        }
    }

    /// The first `at` elements and the others; `at` is cut to the length.
    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len());
        macro_rules! split {
            ($x:expr, $variant:ident) => {{
                let (head, tail) = $x.split_at(at);
                (Self::$variant(head), Self::$variant(tail))
            }};
        }
        match self {
            Self::F32(x) => split!(x, F32),
            Self::F64(x) => split!(x, F64),
            Self::Bf16(x) => split!(x, Bf16),
            Self::F16(x) => split!(x, F16),
        }
    }
}

/// A type the update is computed in.
pub(super) trait Compute: Real + Default {
    /// Updates a run of at most [`BLOCK`] elements, and adds to `measured` what that did. `buffer` has room for
    /// gradients.
    fn apply(
        rule: &dyn Elementwise,
        p: &mut [Self],
        g: Grad<'_>,
        buffer: &mut [Self],
        slots: &mut [&mut [Self]],
        measured: Option<&mut Measured>,
    );
    fn count_aligned(rule: &dyn Elementwise, g: &[Self], slots: &[&[Self]]) -> u64;
    /// The elements of a state array of this type.
    fn of(data: &mut Data) -> Option<&mut [Self]>;
    /// Converts the elements of `g`; `out` has its length.
    fn load_gradient(g: Grad<'_>, out: &mut [Self]);
    /// Reads whole blocks of quantised state.
    fn dequantise(codes: &[u8], scales: &[f32], signed: bool, out: &mut [Self]);
    /// Writes them.
    fn quantise(values: &[Self], codes: &mut [u8], scales: &mut [f32], signed: bool);
}

impl Compute for f32 {
    fn apply(
        rule: &dyn Elementwise,
        p: &mut [Self],
        g: Grad<'_>,
        buffer: &mut [Self],
        slots: &mut [&mut [Self]],
        measured: Option<&mut Measured>,
    ) {
        rule.update(match (g, measured) {
            (Grad::F32(g), measured) => Run::F32(Elements { p, g, slots }, measured),
            (Grad::Bf16(g), None) => Run::Bf16Gradients(Elements { p, g, slots }),
            (g, measured) => {
                Self::load_gradient(g, buffer);
                Run::F32(Elements { p, g: buffer, slots }, measured)
            }
        });
    }
    fn count_aligned(rule: &dyn Elementwise, g: &[Self], slots: &[&[Self]]) -> u64 {
        rule.aligned_f32(g, slots)
    }
    fn of(data: &mut Data) -> Option<&mut [Self]> {
        if let Data::F32(x) = data { Some(x) } else { None }
    }
    fn load_gradient(g: Grad<'_>, out: &mut [Self]) {
        match g {
            Grad::F32(g) => g.iter().zip(out).for_each(|(&g, out)| *out = g),
            Grad::F64(g) => g.iter().zip(out).for_each(|(&g, out)| *out = g as Self),
            Grad::Bf16(g) => bf16::load(g, out),
            Grad::F16(g) => f16::load(g, out),
        }
    }
    fn dequantise(codes: &[u8], scales: &[f32], signed: bool, out: &mut [Self]) {
        quantised::dequantise(codes, scales, signed, out);
    }
    fn quantise(values: &[Self], codes: &mut [u8], scales: &mut [f32], signed: bool) {
        quantised::quantise(values, codes, scales, signed);
    }
}

impl Compute for f64 {
    fn apply(
        rule: &dyn Elementwise,
        p: &mut [Self],
        g: Grad<'_>,
        buffer: &mut [Self],
        slots: &mut [&mut [Self]],
        measured: Option<&mut Measured>,
    ) {
        let g = if let Grad::F64(g) = g {
            g
        } else {
            Self::load_gradient(g, buffer);
            buffer
        };
        rule.update(Run::F64(Elements { p, g, slots }, measured));
    }
    fn count_aligned(rule: &dyn Elementwise, g: &[Self], slots: &[&[Self]]) -> u64 {
        rule.aligned_f64(g, slots)
    }
    fn of(data: &mut Data) -> Option<&mut [Self]> {
        if let Data::F64(x) = data { Some(x) } else { None }
    }
    fn load_gradient(g: Grad<'_>, out: &mut [Self]) {
        match g {
            Grad::F32(g) => g.iter().zip(out).for_each(|(&g, out)| *out = Self::from(g)),
            Grad::F64(g) => g.iter().zip(out).for_each(|(&g, out)| *out = g),
            Grad::Bf16(g) => g.iter().zip(out).for_each(|(&g, out)| *out = g.to_f64()),
            Grad::F16(g) => g.iter().zip(out).for_each(|(&g, out)| *out = g.to_f64()),
        }
    }
    // The state of f64 parameters is never quantised.
    fn dequantise(_: &[u8], _: &[f32], _: bool, _: &mut [Self]) {}
    fn quantise(_: &[Self], _: &mut [u8], _: &mut [f32], _: bool) {}
}

/// A type a parameter is stored in.
pub(super) trait Stored: Copy + Send + Sync {
    type Compute: Compute;
    /// The update of the elements where they lie, where there is a loop for these types and this rounding.
    fn run<'a, 'b>(
        p: &'a mut [Self],
        g: Grad<'a>,
        slots: &'a mut [&'b mut [Self::Compute]],
        rounding: Rounding,
    ) -> Option<Run<'a, 'b>>;
    /// The elements themselves, where they are stored in the type of the computation.
    fn in_place(p: &mut [Self]) -> Option<&mut [Self::Compute]>;
    /// Converts to the type of the computation; both slices have one length.
    fn load(p: &[Self], out: &mut [Self::Compute]);
    /// Rounds to the nearest, ties to even; both slices have one length.
    fn store(from: &[Self::Compute], p: &mut [Self]);
    /// Rounds up or down at random; `offset` is the position of the first element in its parameter.
    fn store_stochastic(from: &[Self::Compute], p: &mut [Self], _key: u32, _offset: usize) {
        Self::store(from, p);
    }
}

impl Stored for f32 {
    type Compute = Self;
    fn run<'a, 'b>(
        p: &'a mut [Self],
        g: Grad<'a>,
        slots: &'a mut [&'b mut [Self]],
        _: Rounding,
    ) -> Option<Run<'a, 'b>> {
        match g {
            Grad::F32(g) => Some(Run::F32(Elements { p, g, slots }, None)),
            Grad::Bf16(g) => Some(Run::Bf16Gradients(Elements { p, g, slots })),
            Grad::F64(_) | Grad::F16(_) => None,
        }
    }
    fn in_place(p: &mut [Self]) -> Option<&mut [Self]> {
        Some(p)
    }
    fn load(p: &[Self], out: &mut [Self]) {
        p.iter().zip(out).for_each(|(&p, out)| *out = p);
    }
    fn store(from: &[Self], p: &mut [Self]) {
        from.iter().zip(p).for_each(|(&from, p)| *p = from);
    }
}

impl Stored for f64 {
    type Compute = Self;
    fn run<'a, 'b>(
        p: &'a mut [Self],
        g: Grad<'a>,
        slots: &'a mut [&'b mut [Self]],
        _: Rounding,
    ) -> Option<Run<'a, 'b>> {
        if let Grad::F64(g) = g { Some(Run::F64(Elements { p, g, slots }, None)) } else { None }
    }
    fn in_place(p: &mut [Self]) -> Option<&mut [Self]> {
        Some(p)
    }
    fn load(p: &[Self], out: &mut [Self]) {
        p.iter().zip(out).for_each(|(&p, out)| *out = p);
    }
    fn store(from: &[Self], p: &mut [Self]) {
        from.iter().zip(p).for_each(|(&from, p)| *p = from);
    }
}

impl Stored for bf16 {
    type Compute = f32;
    fn run<'a, 'b>(
        p: &'a mut [Self],
        g: Grad<'a>,
        slots: &'a mut [&'b mut [f32]],
        rounding: Rounding,
    ) -> Option<Run<'a, 'b>> {
        match (g, rounding) {
            (Grad::Bf16(g), Rounding::Nearest) => Some(Run::Bf16(Elements { p, g, slots })),
            _ => None,
        }
    }
    fn in_place(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
    fn load(p: &[Self], out: &mut [f32]) {
        pulp::Arch::new().dispatch(Load(p, out));
    }
    fn store(from: &[f32], p: &mut [Self]) {
        pulp::Arch::new().dispatch(Store(from, p));
    }
    fn store_stochastic(from: &[f32], p: &mut [Self], key: u32, offset: usize) {
        rounding::to_bf16(from, p, key, offset);
    }
}

struct Load<'a>(&'a [bf16], &'a mut [f32]);

impl pulp::WithSimd for Load<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.0.iter().zip(self.1).for_each(|(x, out)| *out = x.widen());
    }
}

struct Store<'a>(&'a [f32], &'a mut [bf16]);

impl pulp::WithSimd for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.0.iter().zip(self.1).for_each(|(&x, out)| *out = Element::round(x));
    }
}

impl Stored for f16 {
    type Compute = f32;
    fn run<'a, 'b>(
        _: &'a mut [Self],
        _: Grad<'a>,
        _: &'a mut [&'b mut [f32]],
        _: Rounding,
    ) -> Option<Run<'a, 'b>> {
        None
    }
    fn in_place(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
    // half's slice functions detect the processor's conversions once a call, its scalar ones once an element.
    fn load(p: &[Self], out: &mut [f32]) {
        if p.len() == out.len() {
            p.convert_to_f32_slice(out);
        }
    }
    fn store(from: &[f32], p: &mut [Self]) {
        if p.len() == from.len() {
            p.convert_from_f32_slice(from);
        }
    }
    fn store_stochastic(from: &[f32], p: &mut [Self], key: u32, offset: usize) {
        rounding::to_f16(from, p, key, offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_as_half_rounds_it() {
        // Every upper half with the lower halves around a tie.
        for upper in 0..=u16::MAX {
            let from: Vec<f32> = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff]
                .iter()
                .map(|lower| f32::from_bits(u32::from(upper) << 16 | lower))
                .collect();
            let mut got = [bf16::ZERO; 6];
            bf16::store(&from, &mut got);
            let expected: Vec<u16> = from.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            assert_eq!(got.map(bf16::to_bits).as_slice(), expected);
            let mut wide = [0f32; 6];
            bf16::load(&got, &mut wide);
            assert!(wide.iter().zip(got).all(|(wide, x)| wide.to_bits() == x.to_f32().to_bits()));
        }
    }
}
