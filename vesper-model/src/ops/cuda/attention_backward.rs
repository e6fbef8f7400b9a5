//! The gradient of causal attention on CUDA.

use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{Result, Tensor};

use super::attention::Attention;
use super::launch::{Element, Held, allocate, blocks, launch, tensor};
use super::{attention_warpgroup as warpgroup, rope};
use crate::ops::Heads;

impl Attention {
    /// The gradient of the projection before its rotation, (b, t, packed).
    pub(super) fn backward<T: Element>(
        &self,
        rotated: &Tensor,
        out: &Tensor,
        logs: &Tensor,
        dout: &Tensor,
    ) -> Result<Tensor> {
        let (b, t, packed) = rotated.dims3()?;
        let Heads { query, kv, dim } = self.heads;
        let (params, kernels) = self.params::<T>(t)?;
        let (held, out, logs, dout) = (Held::new(rotated), Held::new(out), Held::new(logs), Held::new(dout));
        let device = held.device()?;
        let (qkv, out, logs, dout) =
            (held.view::<T>()?, out.view::<T>()?, logs.view::<f32>()?, dout.view::<T>()?);
        let (module, rows) = (kernels.backward_module(), b * t * query);
        let mut dots = allocate::<f32>(device, rows)?;
        // Threads a row: a warp, or one for each 16 bytes.
        let threads = if kernels.plain { 32 } else { kernels.dim / 8 };
        let config = blocks(rows.div_ceil(256 / threads), 256)?;
        let (name, total) = (kernels.name::<T>("row_dots"), rows as u64);
        launch!(device, module, &name, config, &out, &dout, &mut dots, &total, &params);

        // A head that fills its tile is rotated back on the way out of the kernel, others in place afterwards.
        let inside = !kernels.plain && dim == kernels.dim;
        let table = self.rope.as_ref().filter(|_| inside);
        let tables = table.map(|table| (Held::new(table.cos()), Held::new(table.sin())));
        let tables = match &tables {
            Some((cos, sin)) => Some((cos.view::<f32>()?, sin.view::<f32>()?)),
            None => None,
        };
        let stream = device.cuda_stream();
        let held = tables.as_ref().map(|(cos, sin)| (cos.device_ptr(&stream), sin.device_ptr(&stream)));
        let (cos, sin) = held.as_ref().map_or((0, 0), |(cos, sin)| (cos.0, sin.0));
        let mut dqkv = allocate::<T>(device, b * t * packed)?;
        if warpgroup::supports(self.heads, T::DTYPE) {
            let from =
                warpgroup::Inputs { qkv: &qkv, dout: &dout, logs: &logs, dots: &dots, tables: (cos, sin) };
            warpgroup::backward(device, &from, &mut dqkv, (b, t), self.heads, &params)?;
        } else {
            let steps = [("backward_kv", kernels.backward_kv, kv), ("backward_q", kernels.backward_q, query)];
            for (kernel, blocks, heads) in steps {
                let (name, config) = (kernels.name::<T>(kernel), blocks.config(b * heads, t)?);
                launch!(
                    device, module, &name, config, &qkv, &dout, &logs, &dots, &cos, &sin, &mut dqkv, &params
                );
            }
        }
        drop(held);
        if let Some(table) = self.rope.as_ref().filter(|_| !inside) {
            rope::rotate::<T>(device, &mut dqkv, self.heads, (b * t, t), table, -1.0)?;
        }
        Ok(tensor(dqkv, device, (b, t, packed)))
    }
}
