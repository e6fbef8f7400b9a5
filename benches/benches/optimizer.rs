//! One optimizer step over the small preset's 22.9 M f32 parameters on the CPU: Velvet against candle's AdamW, and
//! against the machine's memory bandwidth, in one run.
//!
//! ```text
//! cargo bench -p vesper-benches --bench optimizer
//! ```
//!
//! `VESPER_BENCH_PEER` may name a command that measures another implementation, such as PyTorch's, on the same machine in the
//! same run; what it prints goes into the record as it is.
//!
//! A whole run writes `benches/record/<machine>/<date>-optimizer.json`; the machine's name is that of its processor,
//! or `VESPER_BENCH_MACHINE`. With `-- --test` everything runs once, on small tensors, and nothing is written.
#![allow(missing_docs, reason = "criterion's macros write undocumented functions")]

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};
use velvet_optim::{
    CautiousUpdate, GradClip, HalfParameters, Lion, NonFinite, Orthogonal, Rule, StateFormat, UpdateNorms,
    Velvet, VelvetConfig,
};
use vesper_benches::record::{machine, path, today, write};

/// The tensors of the small preset: 6 layers, width 384, feed-forward 1024, vocabulary 32064, tied embedding.
fn shapes() -> Vec<Vec<usize>> {
    let layer = [vec![384], vec![1152, 384], vec![384, 384], vec![384], vec![2048, 384], vec![384, 1024]];
    let mut shapes = vec![vec![32_064, 384]];
    shapes.extend((0..6).flat_map(|_| layer.clone()));
    shapes.push(vec![384]);
    shapes
}

/// What is measured, by name; the bytes are those an f32 parameter must move, and `None` for candle, whose chain of
/// operations moves several times what it must.
const STEPS: [(&str, Option<f64>); 11] = [
    ("velvet", Some(32.0)),
    ("velvet, clip 1.0", Some(32.0)),
    ("velvet, unchecked", Some(28.0)),
    ("velvet, measured updates", Some(32.0)),
    ("velvet, cautious update", Some(40.0)),
    ("velvet, 8-bit state", Some(20.06)),
    ("velvet, bf16 parameters", Some(24.0)),
    ("velvet, bf16 with masters", Some(30.0)),
    ("velvet, lion", Some(24.0)),
    ("velvet, orthogonal", None),
    ("candle AdamW", None),
];

/// Median seconds a step, by name.
type Medians = BTreeMap<String, f64>;

struct Model {
    vars: Vec<Var>,
    grads: GradStore,
}

impl Model {
    fn new(shapes: &[Vec<usize>], dtype: DType) -> Result<Self> {
        let mut grads = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        let mut vars = Vec::new();
        for shape in shapes {
            let var = Var::randn(0f32, 0.02, shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
            let var = Var::from_tensor(&var.detach())?;
            let grad = Tensor::randn(0f32, 0.001, shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
            grads.insert(&var, grad);
            vars.push(var);
        }
        Ok(Self { vars, grads })
    }
}

/// One optimizer's step, whichever optimizer it is.
type Step = Box<dyn FnMut(&GradStore) -> Result<()>>;

fn optimizer(name: &str, vars: Vec<Var>) -> Result<Step> {
    let base = VelvetConfig::default();
    let config = match name {
        "candle AdamW" => {
            let mut opt = AdamW::new(vars, ParamsAdamW::default())?;
            return Ok(Box::new(move |grads| opt.step(grads)));
        }
        "velvet, clip 1.0" => base.with_clip(GradClip::GlobalNorm(1.0)),
        "velvet, unchecked" => base.with_non_finite(NonFinite::Unchecked),
        "velvet, measured updates" => VelvetConfig { update_norms: UpdateNorms::On, ..base },
        "velvet, cautious update" => VelvetConfig { cautious_update: CautiousUpdate::Aligned, ..base },
        "velvet, 8-bit state" => base.with_state_format(StateFormat::Blockwise8),
        "velvet, bf16 with masters" => base.with_half_parameters(HalfParameters::Master),
        "velvet, lion" => base.with_rule(Rule::Lion(Lion::default())),
        "velvet, orthogonal" => base.with_hidden_matrices(Rule::Orthogonal(Orthogonal::default())),
        _ => base,
    };
    let mut opt = Velvet::new(vars, config)?;
    Ok(Box::new(move |grads| opt.step(grads)))
}

fn median(samples: &mut [f64]) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}

fn steps(c: &mut Criterion, shapes: &[Vec<usize>], medians: &mut Medians) -> Result<()> {
    let parameters: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
    let mut group = c.benchmark_group("step");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(4)).throughput(Throughput::Elements(parameters as u64));
    for (name, _) in STEPS {
        let dtype = if name.contains("bf16") { DType::BF16 } else { DType::F32 };
        let model = Model::new(shapes, dtype)?;
        let mut step = optimizer(name, model.vars.clone())?;
        // The first step also touches the state's memory for the first time.
        step(&model.grads)?;
        let mut samples = Vec::new();
        let mut failure = None;
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter_custom(|n| {
                let start = Instant::now();
                for _ in 0..n {
                    if let Err(error) = step(&model.grads) {
                        failure = Some(error);
                    }
                }
                let elapsed = start.elapsed();
                samples.push(elapsed.as_secs_f64() / n as f64);
                elapsed
            });
        });
        if let Some(error) = failure {
            return Err(error);
        }
        medians.extend(median(&mut samples).map(|median| (name.to_owned(), median)));
    }
    group.finish();
    Ok(())
}

/// In-place triad, `a = s * a + b` over f32: 12 bytes an element, cut and scheduled as a step is.
fn triad(c: &mut Criterion, elements: usize, medians: &mut Medians) {
    const CHUNK: usize = 64 * 1024;
    let (mut a, b) = (vec![1f32; elements], vec![0.5f32; elements]);
    let mut samples = Vec::new();
    let mut group = c.benchmark_group("memory");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3)).throughput(Throughput::Bytes(12 * elements as u64));
    group.bench_function("in-place triad", |bencher| {
        bencher.iter_custom(|n| {
            let start = Instant::now();
            for _ in 0..n {
                a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
                    a.iter_mut().zip(b).for_each(|(a, b)| *a = 0.5 * *a + b);
                });
            }
            let elapsed = start.elapsed();
            samples.push(elapsed.as_secs_f64() / n as f64);
            elapsed
        });
    });
    group.finish();
    medians.extend(median(&mut samples).map(|median| ("in-place triad".to_owned(), median)));
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    threads: usize,
    parameters: usize,
    triad_gb_per_s: f64,
    rows: Vec<Row>,
    /// What another implementation printed.
    peer: Vec<String>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    milliseconds: f64,
    times_faster_than_candle_adamw: f64,
    bytes_a_parameter: Option<f64>,
    gb_per_s: Option<f64>,
    share_of_triad: Option<f64>,
}

/// The record of a whole run; `None` where a filter left something out.
fn record(medians: &Medians, parameters: usize, triad_elements: usize) -> Option<Record> {
    let triad = 12.0 * triad_elements as f64 / medians.get("in-place triad")? / 1e9;
    let candle = *medians.get("candle AdamW")?;
    let row = |(name, bytes): (&'static str, Option<f64>)| {
        let seconds = *medians.get(name)?;
        let rate = bytes.map(|bytes| bytes * parameters as f64 / seconds / 1e9);
        Some(Row {
            name,
            milliseconds: seconds * 1e3,
            times_faster_than_candle_adamw: candle / seconds,
            bytes_a_parameter: bytes,
            gb_per_s: rate,
            share_of_triad: rate.map(|rate| rate / triad),
        })
    };
    Some(Record {
        bench: "optimizer",
        date: today(),
        machine: machine(),
        threads: rayon::current_num_threads(),
        parameters,
        triad_gb_per_s: triad,
        rows: STEPS.into_iter().map(row).collect::<Option<_>>()?,
        peer: Vec::new(),
    })
}

/// Runs another implementation's benchmark.
fn peer() -> std::result::Result<Vec<String>, Box<dyn Error>> {
    let Ok(command) = std::env::var("VESPER_BENCH_PEER") else { return Ok(Vec::new()) };
    let mut words = command.split_whitespace();
    let Some(program) = words.next() else { return Ok(Vec::new()) };
    let output = std::process::Command::new(program).args(words).output()?;
    if !output.status.success() {
        return Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    // As criterion decides it: `cargo test` gives no `--bench`.
    let smoke = !has("--bench") || has("--test") || has("--list");
    let (shapes, triad_elements) =
        if smoke { (vec![vec![300, 301], vec![7]], 100_000) } else { (shapes(), 32 << 20) };
    let mut criterion = Criterion::default().configure_from_args();
    let mut medians = Medians::new();
    triad(&mut criterion, triad_elements, &mut medians);
    steps(&mut criterion, &shapes, &mut medians)?;
    criterion.final_summary();
    if smoke {
        return Ok(());
    }
    let parameters = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
    let Some(mut record) = record(&medians, parameters, triad_elements) else { return Ok(()) };
    record.peer = peer()?;
    println!(
        "\n{parameters} parameters, {} threads, triad {:.1} GB/s",
        record.threads, record.triad_gb_per_s
    );
    for row in &record.rows {
        let share = row.share_of_triad.map_or_else(String::new, |share| format!(", {share:.2} of triad"));
        println!(
            "{:<24} {:8.2} ms  {:6.1} x candle AdamW{share}",
            row.name, row.milliseconds, row.times_faster_than_candle_adamw
        );
    }
    for line in &record.peer {
        println!("{line}");
    }
    write(&path("optimizer", &record.date, &record.machine), &record)?;
    Ok(())
}
