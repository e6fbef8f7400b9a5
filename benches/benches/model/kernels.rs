//! The kernels of a training step, as NVIDIA's profiler measured them.
//!
//! ```text
//! ncu --profile-from-start off --clock-control none --cache-control none --csv --page raw --print-units base \
//!     --metrics gpu__time_duration.sum,dram__bytes.sum,sm__ops_path_tensor_src_bf16_dst_fp32.sum \
//!     --log-file kernels.csv PROGRAM --bench profile
//! VESPER_BENCH_KERNELS=kernels.csv PROGRAM --bench ops
//! ```
//!
//! `PROGRAM` is this bench's executable; the first command profiles one step of the medium preset, the second one
//! reads what it wrote. `profile wide` and `VESPER_BENCH_WIDE_KERNELS` do so for heads of twice the size, of which the kernels
//! of the attention are recorded; `profile others` and `VESPER_BENCH_OTHER_KERNELS` do so for norms and dropout.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use candle_core::{Device, Result};
use serde::Serialize;

const TIME: &str = "gpu__time_duration.sum";
const BYTES: &str = "dram__bytes.sum";
const FLOPS: &str = "sm__ops_path_tensor_src_bf16_dst_fp32.sum";

/// The launches of one kernel in one step.
#[derive(Serialize)]
pub(crate) struct Kernel {
    name: String,
    launches: usize,
    ms: f64,
    share: f64,
    /// Read and written in the device's memory.
    tb_per_s: f64,
    /// Of the tensor cores' bf16 products.
    tflop_per_s: Option<f64>,
    /// The larger of both rates, each over its ceiling.
    fraction_of_ceiling: f64,
}

impl Kernel {
    pub(crate) fn is_of(&self, operation: &str) -> bool {
        self.name.contains(operation)
    }
}

/// Reads the profiler's table; the ceilings are bytes and operations a second.
pub(crate) fn read(
    file: &Path,
    (copy, product): (f64, f64),
) -> std::result::Result<Vec<Kernel>, Box<dyn Error>> {
    let text = std::fs::read_to_string(file)?;
    let start = text.find("\"ID\"").ok_or_else(|| format!("{}: no table of ncu", file.display()))?;
    let mut reader = csv::Reader::from_reader(&text.as_bytes()[start..]);
    let mut rows = reader.deserialize::<HashMap<String, String>>();
    rows.next(); // the units
    let mut sums: HashMap<String, (usize, [f64; 3])> = HashMap::new();
    for row in rows {
        let row = row?;
        let number = |key: &str| row.get(key).and_then(|text| text.replace(',', "").parse::<f64>().ok());
        let name = row.get("Kernel Name").ok_or("a row without a kernel's name")?;
        let name = name.split(['(', '<']).next().unwrap_or(name).trim_start_matches("void ").to_owned();
        let time = number(TIME).ok_or_else(|| format!("{name}: no {TIME}"))?;
        let (launches, sum) = sums.entry(name).or_default();
        *launches += 1;
        sum[0] += time * 1e-9;
        sum[1] += number(BYTES).unwrap_or(0.0);
        sum[2] += number(FLOPS).unwrap_or(0.0);
    }
    let total: f64 = sums.values().map(|(_, sum)| sum[0]).sum();
    let mut kernels: Vec<Kernel> = sums
        .into_iter()
        .map(|(name, (launches, [seconds, bytes, flops]))| Kernel {
            name,
            launches,
            ms: seconds * 1e3,
            share: seconds / total,
            tb_per_s: bytes / seconds / 1e12,
            tflop_per_s: (flops > 0.0).then_some(flops / seconds / 1e12),
            fraction_of_ceiling: (bytes / seconds / copy).max(flops / seconds / product),
        })
        .collect();
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    for kernel in &kernels {
        println!(
            "{:60} {:4} launches {:8.3} ms {:5.1} % {:6.3} TB/s {:6.1} TFLOP/s, {:.2} of the ceiling",
            kernel.name,
            kernel.launches,
            kernel.ms,
            100.0 * kernel.share,
            kernel.tb_per_s,
            kernel.tflop_per_s.unwrap_or_default(),
            kernel.fraction_of_ceiling,
        );
    }
    Ok(kernels)
}

/// Runs `step` a few times, the last time under the profiler.
pub(crate) fn profile(device: &Device, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..3 {
        step()?;
    }
    device.synchronize()?;
    #[cfg(feature = "cuda")]
    let _profiler =
        candle_core::cuda_backend::cudarc::driver::Profiler::new().map_err(candle_core::Error::wrap)?;
    step()?;
    device.synchronize()
}
