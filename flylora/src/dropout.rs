//! Dropout of an adapter's input, drawn anew from a seed, a layer's name and the number of a pass.
//!
//! ```text
//! y[i] = x[i] / (1 - p) with probability 1 - p, else 0
//! ```
//!
//! Whether element i stays is a function of its place alone (Philox4x32-10 in counter mode), so nothing is kept for the
//! backward pass, which draws the same numbers again, and every device draws the same.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use rand_chacha::rand_core::RngCore;
use rayon::prelude::*;

use crate::Error;
use crate::init::generator;

/// Elements that one thread of the CPU takes at a time: a multiple of four.
const CHUNK: usize = 1 << 14;

/// The dropout of one layer's adapter; off until a pass of training is named.
#[derive(Debug)]
pub(crate) struct Dropout {
    rate: f64,
    key: u64,
    pass: Mutex<Option<u64>>,
}

impl Dropout {
    /// `rate`: the share of the elements that is dropped, from 0 up to, not including, 1.
    pub(crate) fn new(rate: f64, seed: u64, name: &str) -> Self {
        let key = generator(seed, &format!("{name}.dropout")).next_u64();
        Self { rate, key, pass: Mutex::new(None) }
    }

    pub(crate) fn set_pass(&self, pass: Option<u64>) {
        *self.pass.lock().unwrap_or_else(PoisonError::into_inner) = pass;
    }

    fn draw(&self) -> Option<Draw> {
        let pass = (*self.pass.lock().unwrap_or_else(PoisonError::into_inner)).filter(|_| self.rate > 0.0)?;
        let least = (self.rate * f64::from(u32::MAX)).round() as u32;
        Some(Draw { key: self.key, pass, least, factor: 1.0 / (1.0 - self.rate) })
    }

    /// Whether anything is dropped now.
    pub(crate) fn is_on(&self) -> bool {
        self.draw().is_some()
    }

    /// x with elements dropped, where that is on.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self.draw() {
            None => Ok(x.clone()),
            Some(draw) => {
                #[cfg(feature = "cuda")]
                if x.device().is_cuda() {
                    return crate::cuda::aligned(x)?.apply_op1(draw);
                }
                x.contiguous()?.apply_op1(draw)
            }
        }
    }
}

/// That a share can be dropped.
pub(crate) fn check_rate(rate: f64) -> crate::Result<()> {
    if (0.0..1.0).contains(&rate) {
        return Ok(());
    }
    let expected = "from 0 up to 1, without it".into();
    Err(Error::Config { field: "dropout", expected, got: rate.to_string() })
}

/// What one pass drops.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    pub(crate) key: u64,
    pub(crate) pass: u64,
    /// The least number that lets an element stay.
    pub(crate) least: u32,
    /// What is left is multiplied by it.
    pub(crate) factor: f64,
}

/// Philox4x32-10: four random numbers of a counter and a key.
///
/// # References
///
/// Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011
fn philox(mut counter: [u32; 4], key: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        let (a, b) = (u64::from(c0) * 0xd251_1f53, u64::from(c2) * 0xcd9e_8d57);
        counter = [(b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32];
        (k0, k1) = (k0.wrapping_add(0x9e37_79b9), k1.wrapping_add(0xbb67_ae85));
    }
    counter
}

impl Draw {
    /// The values, or 0, of a storage from its first element on.
    fn run<T: Copy + Default + Send + Sync>(self, x: &[T], scaled: impl Fn(T) -> T + Sync) -> Vec<T> {
        let mut y = vec![T::default(); x.len()];
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (y, x))| {
            for (four, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                let at = (chunk * (CHUNK / 4) + four) as u64;
                let counter = [at as u32, (at >> 32) as u32, self.pass as u32, (self.pass >> 32) as u32];
                for ((y, x), bits) in y.iter_mut().zip(x).zip(philox(counter, self.key)) {
                    if bits >= self.least {
                        *y = scaled(*x);
                    }
                }
            }
        });
        y
    }
}

impl CustomOp1 for Draw {
    fn name(&self) -> &'static str {
        "adapter-dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{}: expected a contiguous tensor", self.name())
        };
        let (wide, narrow) = (self.factor, self.factor as f32);
        let y = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(&x[start..end], |x| x * narrow)),
            CpuStorage::F64(x) => CpuStorage::F64(self.run(&x[start..end], |x| x * wide)),
            CpuStorage::BF16(x) => {
                CpuStorage::BF16(self.run(&x[start..end], |x| bf16::from_f32(x.to_f32() * narrow)))
            }
            CpuStorage::F16(x) => {
                CpuStorage::F16(self.run(&x[start..end], |x| f16::from_f32(x.to_f32() * narrow)))
            }
            _ => candle_core::bail!("{}: expected f32, f64, bf16 or f16", self.name()),
        };
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((crate::cuda::dropped(*self, storage, layout)?, layout.shape().clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("{}: flylora was built without its feature cuda", self.name())
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return crate::cuda::aligned(&dy.detach())?.apply_op1_no_bwd(self).map(Some);
        }
        dy.detach().contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_generator_gives_the_numbers_of_its_authors() {
        // From the known answers that come with Random123.
        assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], 0x299f_31d0_a409_3822),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    fn dropped(dropout: &Dropout, dtype: DType) -> Vec<f32> {
        let x = Tensor::ones((300, 173), dtype, &Device::Cpu).unwrap();
        let y = dropout.apply(&x).unwrap();
        y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_share_is_right_what_stays_is_scaled_and_a_pass_is_always_the_same() {
        let dropout = Dropout::new(0.25, 3, "layer");
        assert!(dropped(&dropout, DType::F32).iter().all(|v| *v == 1.0), "off at first");
        dropout.set_pass(Some(7));
        let first = dropped(&dropout, DType::F32);
        assert!(first.iter().all(|v| *v == 0.0 || *v == (4.0f32 / 3.0)));
        let share = first.iter().filter(|v| **v == 0.0).count() as f64 / first.len() as f64;
        assert!((share - 0.25).abs() < 0.006, "{share}");
        // Independent of the neighbour: of pairs a sixteenth is dropped.
        let pairs = first.windows(2).filter(|w| w[0] == 0.0 && w[1] == 0.0).count() as f64;
        assert!((pairs / first.len() as f64 - 0.0625).abs() < 0.004);
        assert_eq!(first, dropped(&dropout, DType::F32));
        for dtype in [DType::F64, DType::BF16, DType::F16] {
            let same = dropped(&dropout, dtype);
            assert!(same.iter().zip(&first).all(|(a, b)| (*a == 0.0) == (*b == 0.0)));
        }
        dropout.set_pass(Some(8));
        assert_ne!(first, dropped(&dropout, DType::F32));
        dropout.set_pass(Some(7));
        for (seed, name) in [(4, "layer"), (3, "other")] {
            let other = Dropout::new(0.25, seed, name);
            other.set_pass(Some(7));
            assert_ne!(first, dropped(&other, DType::F32));
        }
        let none = Dropout::new(0.0, 3, "layer");
        none.set_pass(Some(7));
        assert!(!none.is_on());
    }
}
