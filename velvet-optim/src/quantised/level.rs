//! The ways in which blocks are read and written, of which the processor decides. All give the same bits.

use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::vectors::Vectors;
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};

/// Reads and writes the elements of one block, or of a part of one.
pub(super) trait Codec: Copy {
    /// Codes of finite values, of which none is larger than a scale that is finite and above 0.
    fn write(self, values: &[f32], codes: &mut [u8], scale: f32, signed: bool);
    fn read(self, codes: &[u8], scale: f32, signed: bool, out: &mut [f32]);
}

/// Something to do with a codec.
pub(super) trait Work {
    fn with<C: Codec>(self, codec: C);
}

/// A way that this processor has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(V4),
}

impl Level {
    /// All ways, the fastest last.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(V3::try_new().map(Self::Avx2));
            levels.extend(V4::try_new().map(Self::Avx512));
        }
        levels
    }

    /// The fastest.
    pub(super) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = V4::try_new() {
                return Self::Avx512(simd);
            }
            if let Some(simd) = V3::try_new() {
                return Self::Avx2(simd);
            }
        }
        Self::Portable
    }

    /// Does the work in this way.
    pub(super) fn run(self, work: impl Work) {
        match self {
            Self::Portable => pulp::Arch::new().dispatch(With(Portable, work)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(With(Vectors(simd), work)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(With(Vectors(simd), work)),
        }
    }
}

struct With<C, W>(C, W);

impl<C: Codec, W: Work> pulp::NullaryFnOnce for With<C, W> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.1.with(self.0);
    }
}
