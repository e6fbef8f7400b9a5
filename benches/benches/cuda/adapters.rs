//! Activations against the device's copy bandwidth, FlyLoRA's own products against those of candle, and what adapters cost
//! beside a frozen layer, on a GPU and in one run.
//!
//! ```text
//! cargo bench -p vesper-benches --features cuda --bench adapters_cuda
//! ```
//!
//! Each figure is a median of 20 samples, each of 8 calls that are queued behind each other. Activations run over tensors
//! of 256 MiB, which no cache holds. Frozen layers are 768 wide over 32768 rows; a call there is forward and backward, with
//! what candle's backward pass does of its own (a gradient of ones, zeros to add to) on both sides of the comparison.
//!
//! A run writes `benches/record/<machine>/<date>-adapters-cuda.json`, or the file that `VESPER_BENCH_RECORD` names; the
//! machine's name is that of its GPU, or `VESPER_BENCH_MACHINE`. Without a GPU the bench says so and ends.

use std::error::Error;
use std::time::Instant;

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, Var};
use era_act::{Activation, Era, LearnedEra};
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, AnyLinear, FlyLoraAdapter, FlyLoraConfig, FrozenLinear, LoraConfig,
    MaskSelection, MaskedLoraConfig, Place,
};
use serde::Serialize;
use vesper_benches::record;

const SAMPLES: usize = 20;
const QUEUED: usize = 8;
const BYTES: usize = 256 << 20;

/// Median milliseconds of one of several calls that are queued.
fn time(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        call()?;
    }
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..QUEUED {
            call()?;
        }
        device.synchronize()?;
        samples.push(start.elapsed().as_secs_f64() * 1e3 / QUEUED as f64);
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples.get(SAMPLES / 2).copied().unwrap_or(f64::NAN))
}

/// Bytes a second of a copy within the device's memory, each byte read and written.
fn copy_bandwidth(device: &Device, cuda: &CudaDevice) -> Result<f64> {
    let from = cuda.alloc_zeros::<u8>(4 * BYTES)?;
    let mut to = cuda.alloc_zeros::<u8>(4 * BYTES)?;
    let stream = cuda.cuda_stream();
    let ms = time(device, || stream.memcpy_dtod(&from, &mut to).w())?;
    Ok(2.0 * (4 * BYTES) as f64 / ms * 1e3)
}

/// One kernel of an activation.
#[derive(Serialize)]
struct Pass {
    activation: String,
    dtype: String,
    pass: &'static str,
    /// Tensors of 256 MiB that it reads and writes.
    tensors: f64,
    ms: f64,
    share_of_copy: f64,
}

/// ERA with learned parameters, forward and backward, and the same as a composition of candle ops.
#[derive(Serialize)]
struct Learned {
    form: String,
    dtype: String,
    fused_ms: f64,
    composed_ms: f64,
}

/// FlyLoRA's change alone, by its own kernels and by dense products of candle's.
#[derive(Serialize)]
struct Products {
    size: usize,
    rows: usize,
    dtype: String,
    routed_ms: f64,
    dense_ms: f64,
    forward_ms: f64,
    dense_forward_ms: f64,
    forward_and_backward_ms: f64,
    dense_forward_and_backward_ms: f64,
}

/// What a kind costs beside a frozen layer.
#[derive(Serialize)]
struct Cost {
    kind: String,
    size: usize,
    rows: usize,
    dtype: String,
    frozen_forward_ms: f64,
    frozen_ms: f64,
    adapted_forward_ms: f64,
    adapted_ms: f64,
    percent_more: f64,
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    copy_gb_per_s: f64,
    passes: Vec<Pass>,
    learned: Vec<Learned>,
    products: Vec<Products>,
    costs: Vec<Cost>,
}

fn activations(device: &Device, copy: f64) -> Result<(Vec<Pass>, Vec<Learned>)> {
    let all = [
        Activation::default(),
        Activation::Era(Era::gelu_softplus()),
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::Relu,
        Activation::ReluSquared,
    ];
    let (mut passes, mut learned) = (Vec::new(), Vec::new());
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let width = 2048;
        let rows = BYTES / dtype.size_in_bytes() / width;
        let normal = |shape: (usize, usize)| Tensor::randn(0f32, 2f32, shape, device)?.to_dtype(dtype);
        let (x, dy, packed) = (normal((rows, width))?, normal((rows, width))?, normal((rows, 2 * width))?);
        for activation in all {
            let mut pass = |name, tensors: f64, call: &dyn Fn() -> Result<Tensor>| -> Result<()> {
                let ms = time(device, || call().map(drop))?;
                let share = tensors * BYTES as f64 / ms * 1e3 / copy;
                println!("{activation:<18} {dtype:?} {name:<14} {ms:.4} ms  {share:.3} of copy");
                passes.push(Pass {
                    activation: activation.to_string(),
                    dtype: format!("{dtype:?}"),
                    pass: name,
                    tensors,
                    ms,
                    share_of_copy: share,
                });
                Ok(())
            };
            pass("forward", 2.0, &|| activation.forward(&x))?;
            pass("backward", 3.0, &|| activation.backward(&x, &dy))?;
            pass("gated", 3.0, &|| activation.gated(&packed))?;
            pass("gated backward", 5.0, &|| activation.gated_backward(&packed, &dy))?;
        }
        // A sixteenth of it: the composition keeps a dozen tensors.
        let x = Var::from_tensor(&x.narrow(0, 0, rows / 16)?)?;
        for era in [Era::default(), Era::gelu_softplus()] {
            let act = LearnedEra::alone(era, device)?;
            let fused_ms = time(device, || act.forward(&x)?.backward().map(drop))?;
            let composed_ms = time(device, || act.composed(&x)?.backward().map(drop))?;
            println!("learned {era:?} {dtype:?}: {fused_ms:.4} ms, composed {composed_ms:.4}");
            let form = format!("{era:?}");
            learned.push(Learned { form, dtype: format!("{dtype:?}"), fused_ms, composed_ms });
        }
    }
    Ok((passes, learned))
}

fn products(device: &Device, size: usize, dtype: DType) -> std::result::Result<Products, Box<dyn Error>> {
    let rows = 32_768;
    let place = Place::alone("layer", DType::F32, device);
    let adapter = FlyLoraAdapter::new(size, size, &FlyLoraConfig::default(), &place)?;
    adapter.b().set(&Tensor::randn(0f32, 0.1, (size, 32), device)?)?;
    let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, (rows, size), device)?.to_dtype(dtype)?)?;
    let still = x.as_detached_tensor();
    let a = adapter.a()?.to_device(device)?.to_dtype(dtype)?.t()?;
    let of = |call: &dyn Fn() -> Result<()>| time(device, call);
    let products = Products {
        size,
        rows,
        dtype: format!("{dtype:?}"),
        routed_ms: of(&|| adapter.used(&still).map(drop))?,
        dense_ms: of(&|| still.matmul(&a).map(drop))?,
        forward_ms: of(&|| adapter.delta(&still).map(drop))?,
        dense_forward_ms: of(&|| adapter.delta_dense(&still).map(drop))?,
        forward_and_backward_ms: of(&|| adapter.delta(&x)?.backward().map(drop))?,
        dense_forward_and_backward_ms: of(&|| adapter.delta_dense(&x)?.backward().map(drop))?,
    };
    println!(
        "FlyLoRA {size} {dtype:?}: A x and routing {:.4} ms, A x dense {:.4}; forward {:.4}, dense {:.4}; both {:.4}, dense {:.4}",
        products.routed_ms,
        products.dense_ms,
        products.forward_ms,
        products.dense_forward_ms,
        products.forward_and_backward_ms,
        products.dense_forward_and_backward_ms
    );
    Ok(products)
}

fn costs(device: &Device, dtype: DType) -> std::result::Result<Vec<Cost>, Box<dyn Error>> {
    let (size, rows) = (768, 32_768);
    let normal = |std: f32, shape: (usize, usize)| Tensor::randn(0f32, std, shape, device)?.to_dtype(dtype);
    let base = FrozenLinear::new(normal(0.02, (size, size))?, None)?;
    let x = Var::from_tensor(&normal(1.0, (rows, size))?)?;
    let still = x.as_detached_tensor();
    let forward = |f: &dyn Fn(&Tensor) -> Result<Tensor>| time(device, || f(&still).map(drop));
    let both = |f: &dyn Fn(&Tensor) -> Result<Tensor>| time(device, || f(&x)?.backward().map(drop));
    let frozen_forward_ms = forward(&|x| base.forward(x))?;
    let frozen_ms = both(&|x| base.forward(x))?;
    let lora = |r| LoraConfig::default().with_r(r);
    let kinds = [
        ("r 8", AdapterKind::Lora(lora(8))),
        ("r 16", AdapterKind::Lora(lora(16))),
        ("r 32", AdapterKind::Lora(lora(32))),
        ("r 64", AdapterKind::Lora(lora(64))),
        ("r 8", AdapterKind::Dora(lora(8))),
        ("r 12", AdapterKind::AdaLora(AdaLoraConfig::default())),
        ("8 of 32", AdapterKind::FlyLora(FlyLoraConfig::default())),
        ("defaults", AdapterKind::MaskedLora(MaskedLoraConfig::default())),
        (
            "selected every 100 steps",
            AdapterKind::MaskedLora(
                MaskedLoraConfig::default().with_selection(MaskSelection::Magnitude { every: 100 }),
            ),
        ),
    ];
    let mut costs = Vec::new();
    for (setting, kind) in kinds {
        let layer = AnyLinear::build(base.clone(), &kind, &Place::alone("layer", DType::F32, device))?;
        for (_, var) in layer.parameters() {
            var.set(&(var.as_detached_tensor() + 0.01)?)?;
        }
        let adapted_forward_ms = forward(&|x| layer.forward(x))?;
        let adapted_ms = both(&|x| layer.forward(x))?;
        let cost = Cost {
            kind: format!("{kind}, {setting}"),
            size,
            rows,
            dtype: format!("{dtype:?}"),
            frozen_forward_ms,
            frozen_ms,
            adapted_forward_ms,
            adapted_ms,
            percent_more: 100.0 * (adapted_ms / frozen_ms - 1.0),
        };
        println!(
            "{:<28} {dtype:?}: {adapted_ms:.4} ms beside {frozen_ms:.4} frozen ({:+.1} %); forward alone {adapted_forward_ms:.4} and {frozen_forward_ms:.4}",
            cost.kind, cost.percent_more
        );
        costs.push(cost);
    }
    // Once more, so that a drift of the clock is seen.
    println!("frozen again {dtype:?}: {:.4} ms", both(&|x| base.forward(x))?);
    Ok(costs)
}

pub(crate) fn main() -> std::result::Result<(), Box<dyn Error>> {
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(()); // `cargo test` runs benches too
    }
    let device = match vesper_model::ops::cuda_device(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped, there is no CUDA device: {error}");
            return Ok(());
        }
    };
    let Device::Cuda(cuda) = &device else { return Err("the device is not a CUDA device".into()) };
    let machine = record::machine_of(&device);
    let copy = copy_bandwidth(&device, cuda)?;
    println!("{machine}: copy {:.0} GB/s", copy / 1e9);
    let mut adapter_costs = costs(&device, DType::F32)?;
    adapter_costs.extend(costs(&device, DType::BF16)?);
    let mut all_products = Vec::new();
    for size in [768, 1024, 2048, 4096] {
        for dtype in [DType::F32, DType::BF16] {
            all_products.push(products(&device, size, dtype)?);
        }
    }
    let (passes, learned) = activations(&device, copy)?;
    let date = record::today();
    let record = Record {
        bench: "adapters-cuda",
        date: date.clone(),
        machine: machine.clone(),
        copy_gb_per_s: copy / 1e9,
        passes,
        learned,
        products: all_products,
        costs: adapter_costs,
    };
    record::write(&record::path("adapters-cuda", &date, &machine), &record)?;
    Ok(())
}
