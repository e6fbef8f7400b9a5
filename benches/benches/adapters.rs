//! FlyLoRA's sparse products against the dense ones, and what adapters cost beside a frozen layer, on the CPU.
//!
//! ```text
//! cargo bench -p vesper-benches --bench adapters
//! ```
//!
//! The recipe of the paper: 32 ranks, of which a row makes use of 8, and a density of 8 / 32. A run writes
//! `benches/record/<machine>/<date>-adapters.json`, or the file that `VESPER_BENCH_RECORD` names; the machine's name is
//! that of its processor, or `VESPER_BENCH_MACHINE`. Without `--bench`, which cargo bench passes,
//! everything runs once on small sizes and nothing is written.

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use flylora::{
    AdaLoraConfig, AdapterKind, AnyLinear, FlyLoraAdapter, FlyLoraConfig, FrozenLinear, LoraConfig, Place,
};
use serde::Serialize;
use vesper_benches::record;

/// One size of FlyLoRA's change: milliseconds.
#[derive(Serialize)]
struct Products {
    size: usize,
    rows: usize,
    sparse_forward_ms: f64,
    dense_forward_ms: f64,
    sparse_forward_and_backward_ms: f64,
    dense_forward_and_backward_ms: f64,
}

/// What a kind costs beside a frozen layer, forward and backward.
#[derive(Serialize)]
struct Cost {
    kind: String,
    size: usize,
    rows: usize,
    frozen_ms: f64,
    adapted_ms: f64,
    percent_more: f64,
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    threads: usize,
    products: Vec<Products>,
    costs: Vec<Cost>,
}

/// The least of some runs, in milliseconds: other programs only ever add to a time.
fn clock(runs: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?;
    let mut least = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        f()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(1e3 * least)
}

fn products(size: usize, rows: usize, runs: usize) -> std::result::Result<Products, Box<dyn Error>> {
    let place = Place::alone("layer", DType::F32, &Device::Cpu);
    let adapter = FlyLoraAdapter::new(size, size, &FlyLoraConfig::default(), &place)?;
    adapter.b().set(&Tensor::randn(0f32, 0.1, (size, 32), &Device::Cpu)?)?;
    let x = Var::randn(0f32, 1f32, (rows, size), &Device::Cpu)?;
    let forward = |dense: bool| {
        clock(runs, || {
            let x = x.detach();
            std::hint::black_box(if dense {
                adapter.delta_dense(&x)?
            } else {
                flylora::Adapter::delta(&adapter, &x)?
            });
            Ok(())
        })
    };
    let both = |dense: bool| {
        clock(runs, || {
            let y = if dense { adapter.delta_dense(&x)? } else { flylora::Adapter::delta(&adapter, &x)? };
            std::hint::black_box(y.backward()?); // from a gradient of ones
            Ok(())
        })
    };
    Ok(Products {
        size,
        rows,
        sparse_forward_ms: forward(false)?,
        dense_forward_ms: forward(true)?,
        sparse_forward_and_backward_ms: both(false)?,
        dense_forward_and_backward_ms: both(true)?,
    })
}

fn costs(size: usize, rows: usize, runs: usize) -> std::result::Result<Vec<Cost>, Box<dyn Error>> {
    let base = FrozenLinear::new(Tensor::randn(0f32, 0.02, (size, size), &Device::Cpu)?, None)?;
    let x = Var::randn(0f32, 1f32, (rows, size), &Device::Cpu)?;
    let time = |f: &dyn Fn(&Tensor) -> Result<Tensor>| {
        clock(runs, || {
            std::hint::black_box(f(&x)?.backward()?); // from a gradient of ones
            Ok(())
        })
    };
    let frozen_ms = time(&|x| base.forward(x))?;
    [
        AdapterKind::Lora(LoraConfig::default()),
        AdapterKind::Dora(LoraConfig::default()),
        AdapterKind::AdaLora(AdaLoraConfig::default()),
        AdapterKind::FlyLora(FlyLoraConfig::default()),
    ]
    .into_iter()
    .map(|kind| {
        let place = Place::alone("layer", DType::F32, &Device::Cpu);
        let layer = AnyLinear::build(base.clone(), &kind, &place)?;
        let adapted_ms = time(&|x| layer.forward(x))?;
        let percent_more = 100.0 * (adapted_ms / frozen_ms - 1.0);
        Ok(Cost { kind: kind.to_string(), size, rows, frozen_ms, adapted_ms, percent_more })
    })
    .collect()
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let measured = std::env::args().any(|arg| arg == "--bench");
    let (sizes, rows, runs): (&[usize], usize, usize) =
        if measured { (&[768, 1024, 2048, 4096], 1024, 12) } else { (&[32], 8, 1) };
    let mut record = Record {
        bench: "adapters",
        date: record::today(),
        machine: record::machine(),
        threads: std::thread::available_parallelism().map_or(1, Into::into),
        products: Vec::new(),
        costs: Vec::new(),
    };
    for &size in sizes {
        let p = products(size, rows, runs)?;
        println!(
            "FlyLoRA {size} x {size}, {rows} rows: forward {:.2} ms sparse, {:.2} dense; with backward {:.2} and {:.2}",
            p.sparse_forward_ms,
            p.dense_forward_ms,
            p.sparse_forward_and_backward_ms,
            p.dense_forward_and_backward_ms
        );
        record.products.push(p);
    }
    for cost in costs(if measured { 768 } else { 32 }, 4 * rows, runs)? {
        println!(
            "{:8} beside a frozen {} x {}, {} rows: {:.2} ms for {:.2} ({:+.1} %)",
            cost.kind, cost.size, cost.size, cost.rows, cost.adapted_ms, cost.frozen_ms, cost.percent_more
        );
        record.costs.push(cost);
    }
    if measured {
        record::write(&record::path("adapters", &record.date, &record.machine), &record)?;
    }
    Ok(())
}
