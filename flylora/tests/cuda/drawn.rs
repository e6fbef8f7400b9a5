//! Cases drawn from seeds: kinds, ranks, sizes and layouts that nobody chose. A failure names its case;
//! `VESPER_CUDA_CASES` says how many there are.

use candle_core::{DType, Device, Tensor};
use flylora::{AdaLoraConfig, AdapterKind, LoraConfig};

use crate::common::noise;
use crate::lora::layer_by;
use crate::{all, allowed, brief, gpu, host, off};

/// Whole numbers from a seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    /// A size up to `most`, often one at the edge of a block.
    fn size(&mut self, most: usize) -> usize {
        const EDGES: [usize; 14] = [1, 2, 8, 15, 16, 63, 64, 65, 127, 128, 129, 256, 384, 768];
        let size = if self.below(2) == 0 { EDGES[self.below(EDGES.len())] } else { 1 + self.below(most) };
        size.min(most)
    }
}

#[test]
fn drawn_layers_equal_themselves_in_f64_on_the_cpu() {
    let Some((_lock, device)) = gpu("drawn_layers_equal_themselves_in_f64_on_the_cpu") else { return };
    let mut wrong = Vec::new();
    let wanted = std::env::var("VESPER_CUDA_CASES").ok().and_then(|n| n.parse().ok());
    for case in 0..wanted.unwrap_or(if brief() { 4 } else { 40 }) {
        let mut draw = Draw(case);
        draw.below(1);
        let ranks = if draw.below(4) == 0 { 80 } else { 33 };
        let r = 1 + draw.below(ranks);
        let dropout = if draw.below(3) == 0 { 0.25 } else { 0.0 };
        let lora = LoraConfig::default().with_r(r).with_alpha(9.0).with_dropout(dropout);
        let kind = match draw.below(5) {
            0 => AdapterKind::Dora(lora),
            1 => AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(r).with_dropout(dropout)),
            _ => AdapterKind::Lora(lora),
        };
        let most = if brief() { 140 } else { 900 };
        // DoRA of one column divides a number by itself, and of its rounding nothing else is left.
        let least = if matches!(kind, AdapterKind::Dora(_)) { 8 } else { 1 };
        let (rows, inputs, outputs) = (draw.size(most), draw.size(800).max(least), draw.size(800));
        let dtype = [DType::F32, DType::BF16, DType::F16][draw.below(3)];
        let (bias, turned, way) = (draw.below(2) == 0, draw.below(2) == 0, draw.below(4));
        let pass = (draw.below(2) == 0).then(|| draw.below(100) as u64);
        let x = match way {
            0 => noise(&[rows + 3, inputs], 1.0, dtype, 3),
            1 => noise(&[rows, inputs + 5], 1.0, dtype, 3),
            2 => noise(&[inputs, rows], 1.0, dtype, 3),
            _ => noise(&[rows, inputs], 1.0, dtype, 3),
        };
        let part = |x: &Tensor| match way {
            0 => x.narrow(0, 2, rows),
            1 => x.narrow(1, 3, inputs),
            2 => x.t(),
            _ => Ok(x.clone()),
        };
        let run = |device: &Device, x: &Tensor| {
            let layer = layer_by(&kind, (inputs, outputs), (dtype, DType::F32), bias, turned, device);
            layer.set_training(pass);
            all(&layer, x, |x| layer.forward(&part(x)?))
        };
        let what = format!(
            "case {case}: {kind} {r}, dropout {dropout} in pass {pass:?}, {rows} rows of {inputs} to {outputs} in \
             {dtype:?}, bias {bias}, turned {turned}, layout {way}"
        );
        let (want, got) = (run(&Device::Cpu, &host(&x)), run(&device, &x));
        wrong.extend(off(&what, &got, &want, 3.0 * allowed(dtype)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
