//! Training steps in two dtypes by turns: what slows the machine down slows both.

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device};
use serde::Serialize;
use vesper_model::VesperConfig;

use super::{Effort, Trainer};

/// How often each takes its turn.
const TURNS: usize = 15;

/// A step in f32 over one in bf16, both of the same turn: above 1, bf16 is faster.
#[derive(Serialize)]
pub(crate) struct Turns {
    preset: String,
    batch: usize,
    t: usize,
    #[serde(rename = "turns")]
    count: usize,
    bf16_against_f32: f64,
    /// A quarter of the turns lies below, another above.
    quartiles: [f64; 2],
}

/// The medians of the turns' ratios.
pub(crate) fn bf16_against_f32(
    name: &str,
    config: &VesperConfig,
    device: &Device,
    effort: Effort,
) -> Result<Turns, Box<dyn Error>> {
    let mut trainers = Vec::new();
    for compute in [DType::F32, DType::BF16] {
        let mut trainer = Trainer::new(config, device, Effort { compute, ..effort })?;
        trainer.step()?;
        trainers.push(trainer);
    }
    let mut ratios = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        let mut seconds = [0.0; 2];
        for (seconds, trainer) in seconds.iter_mut().zip(&mut trainers) {
            device.synchronize()?;
            let start = Instant::now();
            trainer.step()?;
            device.synchronize()?;
            *seconds = start.elapsed().as_secs_f64();
        }
        ratios.push(seconds[0] / seconds[1]);
    }
    ratios.sort_by(f64::total_cmp);
    let at = |quarters: usize| ratios[(TURNS - 1) * quarters / 4];
    println!("turns {name}: bf16 {:.3} times as fast as f32, quartiles {:.3} and {:.3}", at(2), at(1), at(3));
    Ok(Turns {
        preset: name.into(),
        batch: effort.batch,
        t: effort.t,
        count: TURNS,
        bf16_against_f32: at(2),
        quartiles: [at(1), at(3)],
    })
}
