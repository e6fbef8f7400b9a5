//! What crosses to the kernels, in the layout of `common.cuh` and `control.cu`.

use crate::adaptive::{Brake, EntropyLr, PerplexityMomentum, PolyakCap, ProgressSignal, TrustRegion};
use crate::config::VelvetConfig;
use crate::options::{GradClip, HalfParameters, NonFinite};
use bytemuck::{Pod, Zeroable};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};

/// Threads of a block of most kernels.
pub(super) const THREADS: u32 = 256;
/// Elements of a block.
pub(super) const CHUNK: usize = 4096;
/// Tensors of a launch.
pub(super) const TENSORS: usize = 136;
/// Parameters whose presence a launch takes as bits.
pub(super) const BITS: usize = 16384;
/// Elements of a workspace that [`Table::at`] counts.
pub(super) const UNIT: usize = 64;
/// Bytes that are known of a row under orthogonalisation.
pub(super) const ROW_BYTES: usize = 16;
/// 64-bit words of one parameter's coefficients, which are made and read on the device.
pub(super) const COEFFICIENT_WORDS: usize = 8;

/// The tensors of a launch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub(super) p: [u64; TENSORS],
    pub(super) g: [u64; TENSORS],
    pub(super) tensor: [u32; TENSORS],
    pub(super) at: [u32; TENSORS],
    pub(super) first: [u32; TENSORS + 1],
    pub(super) count: u32,
}

impl Table {
    pub(super) fn empty() -> Self {
        Self {
            p: [0; TENSORS],
            g: [0; TENSORS],
            tensor: [0; TENSORS],
            at: [0; TENSORS],
            first: [0; TENSORS + 1],
            count: 0,
        }
    }
}

/// Which parameters take part in a launch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Present {
    bits: [u32; BITS / 32],
}

impl Present {
    /// Of the parameters from `base` on; positions outside of its range are left out.
    pub(super) fn new(base: usize, positions: impl Iterator<Item = usize>) -> Self {
        let mut bits = [0; BITS / 32];
        for i in positions.filter_map(|at| at.checked_sub(base)) {
            if let Some(word) = bits.get_mut(i / 32) {
                *word |= 1 << (i % 32);
            }
        }
        Self { bits }
    }
}

/// What does not change from step to step about a parameter.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Param {
    pub(super) state: [u64; 2],
    /// Of state in blocks of 8 bits.
    pub(super) scales: [u64; 2],
    pub(super) master: u64,
    pub(super) rows: u64,
    pub(super) elements: u64,
    pub(super) row: u32,
    pub(super) chunk: u32,
    pub(super) rule: u32,
    pub(super) options: u32,
    pub(super) lr_scale: f64,
    pub(super) decay: f64,
    /// Settings of the rule: see `coefficients` in `control.cu`.
    pub(super) rule_settings: [f64; 4],
}

pub(super) const ADAMW: u32 = 0;
pub(super) const SGD: u32 = 1;
pub(super) const LION: u32 = 2;
pub(super) const ORTHOGONAL: u32 = 3;

pub(super) const NESTEROV: u32 = 1;
pub(super) const CAUTIOUS: u32 = 2;
pub(super) const CAUTIOUS_DECAY: u32 = 4;
pub(super) const ROW_MOMENT: u32 = 8;
pub(super) const STOCHASTIC: u32 = 16;

/// The optimizer's own state on the device.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Control {
    pub(super) base_lr: f64,
    pub(super) averages: [f64; 5],
    pub(super) grad_norm: f64,
    pub(super) clip_scale: f64,
    pub(super) lr: f64,
    pub(super) beta1: f64,
    pub(super) progress: f64,
    pub(super) update_ratio: f64,
    pub(super) step: u64,
    pub(super) skipped: u64,
    pub(super) ignored: u64,
    pub(super) has_norm: u64,
    pub(super) has_progress: u64,
    pub(super) has_ratio: u64,
    pub(super) apply: u64,
    pub(super) failed_step: u64,
    pub(super) failed_norm: f64,
}

/// The configuration as the kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Settings {
    warm_up: [f64; 5],
    momentum: [f64; 5],
    brake: [f64; 4],
    polyak: [f64; 3],
    trust: [f64; 2],
    beta1: f64,
    beta2: f64,
    eps: f64,
    clip: f64,
    seed: u64,
    on: u32,
    parameters: u32,
}

const WARM_UP: u32 = 1;
const WARM_UP_BY_ENTROPY: u32 = 2;
const MOMENTUM: u32 = 4;
const BRAKE: u32 = 8;
const POLYAK: u32 = 16;
const TRUST: u32 = 32;
const CLIP: u32 = 64;
const MEASURE: u32 = 128;
const SUMS: u32 = 256;
const SKIP: u32 = 512;
const ERROR: u32 = 1024;

impl Settings {
    pub(super) fn new(config: &VelvetConfig, parameters: u32) -> Self {
        let mut s =
            Self { beta1: config.beta1, beta2: config.beta2, eps: config.eps, parameters, ..Self::default() };
        if let EntropyLr::WarmUp { initial_loss, margin, nats, floor, decay, signal } = config.entropy_lr {
            s.warm_up = [initial_loss, margin, nats, floor, decay];
            s.on |= WARM_UP;
            if signal == ProgressSignal::Entropy {
                s.on |= WARM_UP_BY_ENTROPY;
            }
        }
        if let PerplexityMomentum::Progress { initial_loss, nats, start, end, decay } =
            config.perplexity_momentum
        {
            s.momentum = [initial_loss, nats, start, end, decay];
            s.on |= MOMENTUM;
        }
        if let Brake::Gap { margin, nats, floor, decay } = config.brake {
            s.brake = [margin, nats, floor, decay];
            s.on |= BRAKE;
        }
        if let PolyakCap::Cap { lower_bound, factor, decay } = config.polyak {
            s.polyak = [lower_bound, factor, decay];
            s.on |= POLYAK;
        }
        if let TrustRegion::Relative { max_ratio, weight_floor } = config.trust_region {
            s.trust = [max_ratio, weight_floor];
            s.on |= TRUST;
        }
        if let GradClip::GlobalNorm(max) = config.clip {
            s.clip = max;
            s.on |= CLIP;
        }
        if let HalfParameters::Stochastic { seed } = config.half_parameters {
            s.seed = seed;
        }
        if config.measures() {
            s.on |= MEASURE;
        }
        if config.clip != GradClip::Off || config.non_finite != NonFinite::Unchecked {
            s.on |= SUMS;
        }
        s.on |= match config.non_finite {
            NonFinite::Unchecked => 0,
            NonFinite::Skip => SKIP,
            NonFinite::Error => ERROR,
        };
        s
    }

    pub(super) fn needs_sums(&self) -> bool {
        self.on & SUMS != 0
    }

    pub(super) fn measures(&self) -> bool {
        self.on & MEASURE != 0
    }

    pub(super) fn has_trust_region(&self) -> bool {
        self.on & TRUST != 0
    }
}

/// A number that is known here or lies in device memory.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Number {
    pub(super) at: u64,
    pub(super) value: f64,
    pub(super) kind: u32,
    pub(super) pad: u32,
}

impl Number {
    pub(super) fn value(value: f64) -> Self {
        Self { value, kind: 1, ..Self::default() }
    }
}

const _: () = assert!(size_of::<Table>() == 3816);
const _: () = assert!(size_of::<Present>() == 2048);
const _: () = assert!(size_of::<Param>() == 120);
const _: () = assert!(size_of::<Control>() == 168);
const _: () = assert!(size_of::<Settings>() == 200);
const _: () = assert!(size_of::<Number>() == 24);

// SAFETY: plain numbers in the layout of the C++ struct of the same name, whose size is asserted on both sides.
unsafe impl DeviceRepr for Table {}
// SAFETY: as above.
unsafe impl DeviceRepr for Present {}
// SAFETY: as above.
unsafe impl DeviceRepr for Param {}
// SAFETY: as above.
unsafe impl DeviceRepr for Control {}
// SAFETY: as above.
unsafe impl DeviceRepr for Settings {}
// SAFETY: as above.
unsafe impl DeviceRepr for Number {}
// SAFETY: zeros are valid numbers.
unsafe impl ValidAsZeroBits for Param {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Control {}
