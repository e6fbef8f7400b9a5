//! Trains a small GPT-2, written with candle-nn, on a fable; then again with three of its lines replaced by the
//! operations of this crate: the same losses, sooner.
//!
//! ```text
//! cargo run --release -p vesper-model --example gpt2 [steps]
//! ```

mod model;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use model::{Gpt2, Gpt2Config, Lines, initialize};

const TEXT: &str = include_str!("../../tests/golden/fables.txt");
const BATCH: usize = 4;
const T: usize = 128;

/// Row `row` of batch `step` of the text's bytes, with one more for the targets.
fn window(text: &[u8], step: usize, row: usize) -> impl Iterator<Item = u32> {
    let start = (step * BATCH + row) * 97 % (text.len() - T);
    text[start..=start + T].iter().map(|&byte| u32::from(byte))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let steps: usize = std::env::args().nth(1).map_or(Ok(60), |word| word.parse())?;
    let device = Device::Cpu;
    for lines in [Lines::Plain, Lines::Ops] {
        let varmap = VarMap::new();
        let config = Gpt2Config { vocab: 256, positions: T, hidden: 128, layers: 4, heads: 4 };
        let model = Gpt2::new(config, lines, &VarBuilder::from_varmap(&varmap, DType::F32, &device))?;
        initialize(&varmap, &device)?;
        let mut optimizer = AdamW::new_lr(varmap.all_vars(), 1e-3)?;
        let start = Instant::now();
        for step in 0..steps {
            let rows: Vec<u32> = (0..BATCH).flat_map(|row| window(TEXT.as_bytes(), step, row)).collect();
            let rows = Tensor::from_vec(rows, (BATCH, T + 1), &device)?;
            let (ids, targets) = (rows.narrow(1, 0, T)?, rows.narrow(1, 1, T)?);
            let loss = model.loss(&ids.contiguous()?, &targets)?;
            optimizer.backward_step(&loss)?;
            if step % 20 == 0 || step + 1 == steps {
                println!("{lines:?} step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
            }
        }
        let tokens = (steps * BATCH * T) as f64 / start.elapsed().as_secs_f64();
        println!("{lines:?}: {tokens:.0} tokens/s");
    }
    Ok(())
}
