//! Rotary positions of a packed projection on CUDA.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig};
use candle_core::{CudaDevice, Result};

use super::launch::{Element, Held, Module, allocate, blocks, launch, name, size};
use crate::ops::{Heads, Rope};

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    t: u32,
    rotated: u32,
    heads: u32,
    dim: u32,
    sign: f32,
}

const _: () = assert!(size_of::<Params>() == 20);
// SAFETY: plain numbers in the layout of `RopeParams`.
unsafe impl DeviceRepr for Params {}

/// The kernel's name, its launch, and its parameters, for `rows` rows of a projection with `t` positions.
fn prepare<T: Element>(
    heads: Heads,
    rows: usize,
    t: usize,
    sign: f32,
) -> Result<(String, LaunchConfig, Params)> {
    let half = heads.dim / 2;
    let wide = half.is_multiple_of(T::WIDE);
    let rotated = heads.query + heads.kv;
    let all = rotated + heads.kv;
    let vectors = all * half / if wide { T::WIDE } else { 1 };
    let threads = vectors.next_multiple_of(32).clamp(32, 256) as u32;
    let params =
        Params { t: size(t)?, rotated: size(rotated)?, heads: size(all)?, dim: size(heads.dim)?, sign };
    Ok((name::<T>("rope", wide), blocks(rows, threads)?, params))
}

/// A copy of the projection (rows, packed) whose query and key heads are rotated to their positions.
pub(super) fn rotated<T: Element>(
    device: &CudaDevice,
    qkv: &CudaView<'_, T>,
    heads: Heads,
    t: usize,
    rope: &Rope,
) -> Result<CudaSlice<T>> {
    let rows = qkv.len() / heads.packed();
    let (name, config, params) = prepare::<T>(heads, rows, t, 1.0)?;
    let mut out = allocate::<T>(device, qkv.len())?;
    let (cos, sin) = (Held::new(rope.cos()), Held::new(rope.sin()));
    let (cos, sin) = (cos.view::<f32>()?, sin.view::<f32>()?);
    launch!(device, Module::Rope, &name, config, qkv, &mut out, &cos, &sin, &params);
    Ok(out)
}

/// Rotates the query and key heads in place, forwards (`sign` 1) or back (-1).
pub(super) fn rotate<T: Element>(
    device: &CudaDevice,
    qkv: &mut CudaSlice<T>,
    heads: Heads,
    (rows, t): (usize, usize),
    rope: &Rope,
    sign: f32,
) -> Result<()> {
    let (name, config, params) = prepare::<T>(heads, rows, t, sign)?;
    let (cos, sin) = (Held::new(rope.cos()), Held::new(rope.sin()));
    let (cos, sin) = (cos.view::<f32>()?, sin.view::<f32>()?);
    let in_place = 0u64;
    launch!(device, Module::Rope, &name, config, &in_place, qkv, &cos, &sin, &params);
    Ok(())
}
