//! Training steps of the presets, and each fused operation against the machine's ceilings, in one run.
//!
//! ```text
//! cargo bench -p vesper-benches --features cuda --bench model -- [small medium large] [short] [ops] [products] [turns] [reference] [f32 bf16]
//! ```
//!
//! On CUDA: batches of 32 rows of 1024 tokens, f32 parameters, activations in bf16. Elsewhere rows of 128 tokens, 4 for
//! the small preset and 2 for larger ones, in f32; `f32` and `bf16` name other activations, one run each. A step is
//! forward, backward and Velvet with clipping at norm 1. `ops` measures the operations at the shapes of the medium
//! preset, and what share of its step they take where that was measured before; `products` measures the matrix products
//! of the named presets, `turns` their steps in f32 and bf16 by turns; `reference` takes the compositions of candle ops. On CUDA each step is also measured as a graph
//! that is replayed, and `short` measures the presets on 8 rows of 64 tokens, where launches are what takes the time.
//! `profile` and `VESPER_BENCH_KERNELS`: see `kernels.rs`.
//!
//! A run writes `benches/record/<machine>/<date>-model.json` (`-model-cpu.json` without a GPU), or the file that `VESPER_BENCH_RECORD` names; the
//! machine's name is that of its GPU or its processor, or `VESPER_BENCH_MACHINE`. Lines that other
//! programs printed in the same session are taken into the record from the file that `VESPER_BENCH_PEERS` names.
//! Without `--bench`, which cargo bench passes, everything runs once on a tiny model and nothing is written.

mod kernels;
mod turns;

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;
use serde::Serialize;
use velvet_optim::{GradClip, Optimizer, Velvet, VelvetConfig};
use vesper_benches::record;
use vesper_model::ops::{
    self, CapturedStep, CrossEntropy, Heads, Path, Philox, Rope, causal_attention, cuda_device, dropout,
    embedding, gated_feed_forward, layer_norm, linear, linear_cross_entropy, prepare_cpu,
    release_unused_memory, residual_layer_norm, residual_rms_norm, rms_norm, self_attention,
};
use vesper_model::{VesperConfig, VesperLM, trainable};

/// A preset's training.
#[derive(Serialize)]
struct Training {
    preset: String,
    parameters: usize,
    batch: usize,
    t: usize,
    compute: String,
    path: String,
    tokens_per_s: f64,
    step_ms: f64,
    /// The same step replayed as a CUDA graph.
    captured_step_ms: Option<f64>,
    forward_ms: f64,
    forward_and_backward_ms: f64,
    first_loss: f32,
    last_loss: f32,
    /// In use on the device, the context and the copy of this training alone, before the step is recorded as a graph.
    memory_gib: Option<f64>,
    /// The same while the graph is replayed.
    captured_memory_gib: Option<f64>,
}

/// An operation, and what it would take at the ceiling that bounds it.
#[derive(Serialize)]
struct Operation {
    name: String,
    path: String,
    forward_ms: f64,
    forward_at_ceiling_ms: f64,
    backward_ms: f64,
    backward_at_ceiling_ms: f64,
    /// How often a training step of the medium preset runs it.
    calls_per_step: usize,
    /// The share of such a step that these calls take, both measured in this run.
    share_of_step: Option<f64>,
}

/// The three products of a linear layer with weights in f32, in 10^9 floating-point operations a second.
#[derive(Serialize)]
struct Products {
    preset: String,
    layer: &'static str,
    rows: usize,
    input: usize,
    output: usize,
    compute: String,
    /// y = x W^T
    forward_gflop_per_s: f64,
    /// dx = dy W
    input_gradient_gflop_per_s: f64,
    /// dW = dy^T x
    weight_gradient_gflop_per_s: f64,
}

#[derive(Serialize, Default)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    copy_tb_per_s: Option<f64>,
    /// Of tensors as large as the hidden states of the medium preset: a short copy is slower than a long one.
    copy_of_hidden_tb_per_s: Option<f64>,
    product_tflop_per_s: Option<f64>,
    training: Vec<Training>,
    operations: Vec<Operation>,
    /// Of one training step of the medium preset.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<kernels::Kernel>,
    /// Those of the attention in a step of the same model with half as many heads of twice the size.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attention_kernels_of_wide_heads: Vec<kernels::Kernel>,
    /// Those of the norms and of dropout, where the step has others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels_of_other_operations: Vec<kernels::Kernel>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    products: Vec<Products>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    turns: Vec<turns::Turns>,
    /// What other programs printed about themselves in the same session.
    peers: Vec<String>,
}

/// How long and how often things are measured.
#[derive(Clone, Copy)]
struct Effort {
    warm: usize,
    runs: usize,
    batch: usize,
    t: usize,
    compute: DType,
    path: Path,
}

/// Median seconds of `f`, with the device idle before and after.
fn clock(device: &Device, effort: Effort, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..effort.warm {
        f()?;
    }
    device.synchronize()?;
    let mut samples = Vec::with_capacity(effort.runs);
    for _ in 0..effort.runs {
        let start = Instant::now();
        f()?;
        device.synchronize()?;
        samples.push(start.elapsed().as_secs_f64());
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN))
}

/// Memory in use on the device by everything that runs there, GiB; the allocator keeps what the peak needed.
#[cfg(feature = "cuda")]
fn memory(device: &Device) -> Option<f64> {
    let Device::Cuda(device) = device else { return None };
    device.cuda_stream().context().bind_to_thread().ok()?;
    let (free, total) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok()?;
    Some((total - free) as f64 / (1u64 << 30) as f64)
}

#[cfg(not(feature = "cuda"))]
fn memory(_: &Device) -> Option<f64> {
    None
}

fn ids(n: usize, vocab: usize, device: &Device) -> Result<Tensor> {
    let ids: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab as u32).collect();
    Tensor::from_vec(ids, n, device)
}

/// A model, its optimizer and the batch that it is trained on again and again.
struct Trainer {
    model: VesperLM,
    optimizer: Velvet,
    inputs: Tensor,
    targets: Tensor,
}

impl Trainer {
    fn new(
        config: &VesperConfig,
        device: &Device,
        effort: Effort,
    ) -> std::result::Result<Self, Box<dyn Error>> {
        let varmap = VarMap::new();
        let model = VesperLM::initialize(config, &varmap, 42, DType::F32, device)?;
        let model = model.with_compute_dtype(effort.compute).with_path(effort.path);
        let settings = VelvetConfig::default().with_lr(1e-4).with_clip(GradClip::GlobalNorm(1.0));
        let optimizer = Velvet::named(trainable(config, &varmap)?, settings)?;
        let rows = ids(effort.batch * (effort.t + 1), config.vocab_size, device)?;
        let rows = rows.reshape((effort.batch, effort.t + 1))?;
        let inputs = rows.narrow(1, 0, effort.t)?.contiguous()?;
        let targets = rows.narrow(1, 1, effort.t)?.contiguous()?;
        Ok(Self { model, optimizer, inputs, targets })
    }

    fn loss(&self) -> Result<Tensor> {
        self.model.loss(&self.inputs, &self.targets).map(|out| out.loss).map_err(candle_core::Error::from)
    }

    fn step(&mut self) -> Result<()> {
        let grads = ops::backward(&self.loss()?)?;
        self.optimizer.step(&grads)
    }
}

fn train(
    name: &str,
    config: &VesperConfig,
    device: &Device,
    effort: Effort,
) -> std::result::Result<Training, Box<dyn Error>> {
    release_unused_memory(device)?; // of the preset before
    let mut trainer = Trainer::new(config, device, effort)?;
    let first: f32 = trainer.loss()?.to_dtype(DType::F32)?.to_scalar()?;
    let forward = clock(device, effort, || trainer.loss().map(drop))?;
    let backward = clock(device, effort, || ops::backward(&trainer.loss()?).map(drop))?;
    let step = clock(device, effort, || trainer.step())?;
    let last: f32 = trainer.loss()?.to_dtype(DType::F32)?.to_scalar()?;
    let memory_gib = memory(device);
    let captured = if device.is_cuda() { Some(captured(trainer, effort)?) } else { None };
    let captured_memory_gib = captured.and_then(|(_, memory)| memory);
    let row = Training {
        preset: name.into(),
        parameters: config.num_parameters(),
        batch: effort.batch,
        t: effort.t,
        compute: format!("{:?}", effort.compute),
        path: format!("{:?}", effort.path),
        tokens_per_s: (effort.batch * effort.t) as f64 / step,
        step_ms: step * 1e3,
        captured_step_ms: captured.map(|(seconds, _)| seconds * 1e3),
        forward_ms: forward * 1e3,
        forward_and_backward_ms: backward * 1e3,
        first_loss: first,
        last_loss: last,
        memory_gib,
        captured_memory_gib,
    };
    println!(
        "train {name} {:.1} M B{} T{} {} {}: {:.0} tok/s; step {:.2} ms, as a graph {}, forward {:.2}, forward and backward {:.2}; loss {first:.3} to {last:.3}; memory {}, as a graph {}",
        row.parameters as f64 / 1e6,
        row.batch,
        row.t,
        row.compute,
        row.path,
        row.tokens_per_s,
        row.step_ms,
        row.captured_step_ms.map_or("none".into(), |ms| format!("{ms:.2}")),
        row.forward_ms,
        row.forward_and_backward_ms,
        row.memory_gib.map_or("unknown".into(), |gib| format!("{gib:.2} GiB")),
        row.captured_memory_gib.map_or("unknown".into(), |gib| format!("{gib:.2} GiB")),
    );
    Ok(row)
}

/// Seconds of a step that is replayed as a graph, and the memory then in use, GiB.
fn captured(trainer: Trainer, effort: Effort) -> Result<(f64, Option<f64>)> {
    let Trainer { model, optimizer, inputs, targets } = trainer;
    let mut step = CapturedStep::new(optimizer, |optimizer: &mut Velvet, batch: &[Tensor]| {
        let loss = model.loss(&batch[0], &batch[1])?.loss;
        optimizer.backward_step_with(&loss, ops::backward)?;
        Ok(loss)
    });
    let effort = Effort { warm: effort.warm.max(3), ..effort };
    let seconds = clock(inputs.device(), effort, || step.run(&[&inputs, &targets]).map(drop))?;
    Ok((seconds, memory(inputs.device())))
}

/// Bytes a second of a copy, and floating-point operations a second of a large product.
fn ceilings(device: &Device, effort: Effort, n: usize) -> Result<(f64, f64)> {
    let x = Tensor::zeros((n, n), effort.compute, device)?;
    let many = Tensor::zeros(16 * n * n, DType::F32, device)?;
    let copy = clock(device, effort, || many.copy().map(drop))?;
    let product = clock(device, effort, || x.matmul(&x).map(drop))?;
    let ceilings = (2.0 * 64.0 * (n * n) as f64 / copy, 2.0 * (n as f64).powi(3) / product);
    println!(
        "ceilings: copy {:.3} TB/s, {:?} product {:.1} TFLOP/s",
        ceilings.0 / 1e12,
        effort.compute,
        ceilings.1 / 1e12
    );
    Ok(ceilings)
}

/// Bytes a second of copies of tensors (n, d), one after the other, together larger than any cache.
fn copy_of(device: &Device, effort: Effort, n: usize, d: usize) -> Result<f64> {
    let tensors: Vec<Tensor> =
        (0..12).map(|_| Tensor::zeros((n, d), effort.compute, device)).collect::<Result<_>>()?;
    let copy = || tensors.iter().map(Tensor::copy).collect::<Result<Vec<_>>>().map(drop);
    let bytes = 2 * tensors.len() * n * d * effort.compute.size_in_bytes();
    let rate = bytes as f64 / clock(device, effort, copy)?;
    println!("copy of ({n}, {d}): {:.3} TB/s", rate / 1e12);
    Ok(rate)
}

/// What bounds an operation: its work, in the unit of its ceiling.
#[derive(Clone, Copy)]
enum Bound {
    Bytes(f64),
    Flops(f64),
}

fn operations(
    config: &VesperConfig,
    device: &Device,
    effort: Effort,
    (copy, product): (f64, f64),
    step_ms: Option<f64>,
) -> Result<Vec<Operation>> {
    let mut measured = Vec::new();
    let (batch, t, dtype, path) = (effort.batch, effort.t, effort.compute, effort.path);
    let (rows, d, ffn, vocab) = (batch * t, config.hidden_size, config.intermediate_size, config.vocab_size);
    let heads =
        Heads { query: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim };
    let var = |shape: &[usize], dtype: DType| -> Result<Tensor> {
        let x = Tensor::randn(0f32, 0.5, shape, device)?.to_dtype(dtype)?;
        Ok(Var::from_tensor(&x)?.as_tensor().clone())
    };
    let mut report = |name: &str,
                      calls: usize,
                      forward: Bound,
                      backward: Bound,
                      f: &dyn Fn() -> Result<Tensor>|
     -> Result<()> {
        let seconds = clock(device, effort, || f().map(drop))?;
        let both = clock(device, effort, || ops::backward(&f()?).map(drop))?;
        let at_ceiling = |bound: Bound| match bound {
            Bound::Bytes(bytes) => bytes / copy,
            Bound::Flops(flops) => flops / product,
        };
        let row = Operation {
            name: name.into(),
            path: format!("{path:?}"),
            forward_ms: seconds * 1e3,
            forward_at_ceiling_ms: at_ceiling(forward) * 1e3,
            backward_ms: (both - seconds) * 1e3,
            backward_at_ceiling_ms: at_ceiling(backward) * 1e3,
            calls_per_step: calls,
            share_of_step: step_ms.map(|step| calls as f64 * both * 1e3 / step),
        };
        println!(
            "{name} {path:?}: forward {:.3} ms ({:.3} at the ceiling), backward {:.3} ms ({:.3}), {calls} a step, {}",
            row.forward_ms,
            row.forward_at_ceiling_ms,
            row.backward_ms,
            row.backward_at_ceiling_ms,
            row.share_of_step.map_or("share unknown".into(), |share| format!("{:.1} % of it", share * 100.0)),
        );
        measured.push(row);
        Ok(())
    };
    let (wide, size, layers) = ((rows * d) as f64, dtype.size_in_bytes() as f64, config.num_hidden_layers);
    let (x, w) = (var(&[batch, t, d], dtype)?, var(&[d], dtype)?);
    let passes = |n: f64| Bound::Bytes(n * wide * size);
    report("rms_norm", layers + 1, passes(2.0), passes(3.0), &|| rms_norm(&x, &w, 1e-6, path))?;
    report("layer_norm", 0, passes(2.0), passes(3.0), &|| layer_norm(&x, &w, Some(&w), 1e-5, path))?;
    let residual = var(&[batch, t, d], dtype)?;
    // Only the norm is used after it, as if the sum's own gradient cost nothing.
    report("residual_rms_norm", layers, passes(4.0), passes(3.0), &|| {
        Ok(residual_rms_norm(&x, &residual, &w, 1e-6, path)?.1)
    })?;
    report("residual_layer_norm", 0, passes(4.0), passes(3.0), &|| {
        Ok(residual_layer_norm(&x, &residual, &w, Some(&w), 1e-5, path)?.1)
    })?;
    let random = Philox { seed: 42, offset: 0 };
    report("dropout", 0, passes(2.0), passes(2.0), &|| dropout(&x, 0.1, random, path))?;
    let (table, tokens) = (var(&[vocab, d], DType::F32)?, ids(rows, vocab, device)?);
    let table_bytes = 4.0 * (vocab * d) as f64;
    report("embedding", 1, Bound::Bytes(8.0 * wide), Bound::Bytes(4.0 * wide + table_bytes), &|| {
        embedding(&table, &tokens, path)
    })?;
    let square = var(&[d, d], dtype)?;
    let flops = 2.0 * wide * d as f64;
    report("linear", 0, Bound::Flops(flops), Bound::Flops(2.0 * flops), &|| linear(&x, &square, path))?;
    let (gate_up, down) = (var(&[2 * ffn, d], dtype)?, var(&[d, ffn], dtype)?);
    let flops = 6.0 * wide * ffn as f64;
    report("gated_feed_forward", layers, Bound::Flops(flops), Bound::Flops(2.0 * flops), &|| {
        gated_feed_forward(&x, &gate_up, &down, config.hidden_act, path)
    })?;
    let (packed, rope) = (var(&[batch, t, heads.packed()], dtype)?, Rope::new(heads.dim, t, 1e4, device)?);
    let scores = (batch * heads.query * heads.dim) as f64 * (t * (t + 1)) as f64; // 2 products of half the square
    report("causal_attention", 0, Bound::Flops(2.0 * scores), Bound::Flops(5.0 * scores), &|| {
        causal_attention(&packed, heads, Some(&rope), path)
    })?;
    // The same with half as many heads of twice the size.
    let larger = Heads { query: heads.query.div_ceil(2), kv: heads.kv.div_ceil(2), dim: 2 * heads.dim };
    let packed = var(&[batch, t, larger.packed()], dtype)?;
    let wide_rope = Rope::new(larger.dim, t, 1e4, device)?;
    let of_larger = (batch * larger.query * larger.dim) as f64 * (t * (t + 1)) as f64;
    let (forward, backward) = (Bound::Flops(2.0 * of_larger), Bound::Flops(5.0 * of_larger));
    report("causal_attention, heads of twice the size", 0, forward, backward, &|| {
        causal_attention(&packed, larger, Some(&wide_rope), path)
    })?;
    let (qkv, out) = (var(&[heads.packed(), d], dtype)?, var(&[d, heads.query * heads.dim], dtype)?);
    let flops = 2.0 * wide * (heads.packed() + heads.query * heads.dim) as f64;
    report(
        "self_attention",
        layers,
        Bound::Flops(flops + 2.0 * scores),
        Bound::Flops(2.0 * flops + 5.0 * scores),
        &|| self_attention(&x, &qkv, &out, heads, Some(&rope), path),
    )?;
    let (hidden, weight) = (var(&[rows, d], dtype)?, var(&[vocab, d], dtype)?);
    let flops = 2.0 * wide * vocab as f64;
    // All three products are in the forward.
    report("linear_cross_entropy", 1, Bound::Flops(3.0 * flops), Bound::Bytes(4.0 * wide), &|| {
        Ok(linear_cross_entropy(&hidden, &weight, &tokens, CrossEntropy::default(), path)?.loss)
    })?;
    Ok(measured)
}

fn products(name: &str, config: &VesperConfig, device: &Device, effort: Effort) -> Result<Vec<Products>> {
    let Effort { batch, t, compute, path, .. } = effort;
    let (d, ffn) = (config.hidden_size, config.intermediate_size);
    let heads =
        Heads { query: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim };
    let layers = [
        ("qkv_proj", d, heads.packed()),
        ("o_proj", heads.query * heads.dim, d),
        ("gate_up_proj", d, 2 * ffn),
        ("down_proj", ffn, d),
        ("lm_head", d, config.vocab_size),
    ];
    let rows = batch * t;
    let random = |rows, cols| Tensor::randn(0f32, 0.5, (rows, cols), device);
    let mut measured = Vec::with_capacity(layers.len());
    for (layer, input, output) in layers {
        let w = random(output, input)?;
        let (x, dy) = (random(rows, input)?.to_dtype(compute)?, random(rows, output)?.to_dtype(compute)?);
        let rate = |x: &Tensor, w: &Tensor| -> Result<f64> {
            let seconds = clock(device, effort, || linear(x, w, path).map(drop))?;
            Ok(2.0 * (rows * input * output) as f64 / seconds / 1e9)
        };
        let row = Products {
            preset: name.into(),
            layer,
            rows,
            input,
            output,
            compute: format!("{compute:?}"),
            forward_gflop_per_s: rate(&x, &w)?,
            input_gradient_gflop_per_s: rate(&dy, &w.t()?)?,
            weight_gradient_gflop_per_s: rate(&dy.t()?, &x.t()?)?,
        };
        println!(
            "products {name} {layer} {rows} x {input} x {output} {compute:?}: forward {:.0} GFLOP/s, gradient of the input {:.0}, of the weight {:.0}",
            row.forward_gflop_per_s, row.input_gradient_gflop_per_s, row.weight_gradient_gflop_per_s,
        );
        measured.push(row);
    }
    Ok(measured)
}

/// One step of the medium preset under a profiler; `wide`: with half as many heads of twice the size.
fn profile(device: &Device, effort: Effort, wide: bool) -> std::result::Result<(), Box<dyn Error>> {
    let mut config = VesperConfig::preset("medium")?;
    if wide {
        config.num_attention_heads /= 2;
        config.num_key_value_heads /= 2;
        config.head_dim *= 2;
    }
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config, &varmap, 42, DType::F32, device)?;
    let model = model.with_compute_dtype(effort.compute).with_path(effort.path);
    let settings = VelvetConfig::default().with_lr(1e-4).with_clip(GradClip::GlobalNorm(1.0));
    let mut optimizer = Velvet::named(trainable(&config, &varmap)?, settings)?;
    let rows = ids(effort.batch * effort.t, config.vocab_size, device)?.reshape((effort.batch, effort.t))?;
    kernels::profile(device, || {
        let loss = model.loss(&rows, &rows).map_err(candle_core::Error::from)?.loss;
        optimizer.backward_step_with(&loss, ops::backward)
    })?;
    Ok(())
}

/// Norms and dropout at the shapes of the medium preset under a profiler: what its step has none of.
fn profile_others(device: &Device, effort: Effort) -> std::result::Result<(), Box<dyn Error>> {
    let d = VesperConfig::preset("medium")?.hidden_size;
    let var = |shape: &[usize]| -> Result<Tensor> {
        let x = Tensor::randn(0f32, 0.5, shape, device)?.to_dtype(effort.compute)?;
        Ok(Var::from_tensor(&x)?.as_tensor().clone())
    };
    let (path, shape) = (effort.path, [effort.batch, effort.t, d]);
    let (x, residual, w, b) = (var(&shape)?, var(&shape)?, var(&[d])?, var(&[d])?);
    kernels::profile(device, || {
        ops::backward(&layer_norm(&x, &w, Some(&b), 1e-5, path)?)?;
        ops::backward(&residual_layer_norm(&x, &residual, &w, Some(&b), 1e-5, path)?.1)?;
        ops::backward(&residual_rms_norm(&x, &residual, &w, 1e-6, path)?.1)?;
        ops::backward(&dropout(&x, 0.1, Philox { seed: 42, offset: 0 }, path)?).map(drop)
    })?;
    Ok(())
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let path = if has("reference") { Path::Reference } else { Path::Fused };
    let device = cuda_device(0).unwrap_or(Device::Cpu);
    if device.is_cpu() {
        prepare_cpu();
    }
    if !has("--bench") {
        let mut config = VesperConfig::preset("nano")?.with_vocab(100);
        config.num_hidden_layers = 1;
        let effort = Effort { warm: 0, runs: 1, batch: 1, t: 8, compute: DType::F32, path };
        train("nano", &config, &device, effort)?;
        let ceilings = ceilings(&device, effort, 64)?;
        operations(&config, &device, effort, ceilings, None)?;
        products("nano", &config, &device, effort)?;
        turns::bf16_against_f32("nano", &config, &device, effort)?;
        return Ok(());
    }
    let effort = match device {
        Device::Cpu => Effort { warm: 1, runs: 5, batch: 4, t: 128, compute: DType::F32, path },
        _ => Effort { warm: 3, runs: 11, batch: 32, t: 1024, compute: DType::BF16, path },
    };
    let (date, machine) = (record::today(), record::machine_of(&device));
    let mut record =
        Record { bench: "model", date: date.clone(), machine: machine.clone(), ..Record::default() };
    let named: Vec<&str> = VesperConfig::PRESETS.into_iter().filter(|name| has(name)).collect();
    let computes: Vec<DType> =
        [DType::F32, DType::BF16].into_iter().filter(|dtype| has(dtype.as_str())).collect();
    let computes = if computes.is_empty() { vec![effort.compute] } else { computes };
    // Two cores do not get through four rows of a larger model in good time.
    let batch =
        |name| if device.is_cpu() && !["nano", "tiny", "small"].contains(&name) { 2 } else { effort.batch };
    if has("profile") {
        return if has("others") {
            profile_others(&device, effort)
        } else {
            profile(&device, effort, has("wide"))
        };
    }
    for name in if named.is_empty() && !has("ops") { vec!["small"] } else { named } {
        for &compute in &computes {
            let effort = Effort { compute, batch: batch(name), ..effort };
            let config = VesperConfig::preset(name)?;
            let short = Effort { batch: 8, t: 64, runs: 51, ..effort };
            for effort in if has("short") { vec![effort, short] } else { vec![effort] } {
                record.training.push(train(name, &config, &device, effort)?);
            }
            if has("products") {
                record.products.extend(products(name, &config, &device, effort)?);
            }
        }
        if has("turns") {
            let effort = Effort { batch: batch(name), ..effort };
            let config = VesperConfig::preset(name)?;
            record.turns.push(turns::bf16_against_f32(name, &config, &device, effort)?);
        }
    }
    if has("ops") {
        let effort = Effort { compute: computes[0], batch: batch("medium"), ..effort };
        let of_medium =
            |row: &&Training| row.preset == "medium" && row.compute == format!("{:?}", effort.compute);
        let step_ms = record.training.iter().find(of_medium).map(|row| row.step_ms);
        let ceilings = ceilings(&device, effort, if device.is_cpu() { 1024 } else { 8192 })?;
        record.copy_tb_per_s = Some(ceilings.0 / 1e12);
        record.product_tflop_per_s = Some(ceilings.1 / 1e12);
        let config = VesperConfig::preset("medium")?;
        let of_hidden = copy_of(&device, effort, effort.batch * effort.t, config.hidden_size)?;
        record.copy_of_hidden_tb_per_s = Some(of_hidden / 1e12);
        record.operations = operations(&config, &device, effort, ceilings, step_ms)?;
        if let Ok(file) = std::env::var("VESPER_BENCH_KERNELS") {
            record.kernels = kernels::read(file.as_ref(), ceilings)?;
        }
        if let Ok(file) = std::env::var("VESPER_BENCH_WIDE_KERNELS") {
            record.attention_kernels_of_wide_heads = kernels::read(file.as_ref(), ceilings)?
                .into_iter()
                .filter(|kernel| kernel.is_of("attention"))
                .collect();
        }
        if let Ok(file) = std::env::var("VESPER_BENCH_OTHER_KERNELS") {
            record.kernels_of_other_operations = kernels::read(file.as_ref(), ceilings)?
                .into_iter()
                .filter(|kernel| kernel.is_of("norm") || kernel.is_of("dropout"))
                .collect();
        }
    }
    if let Ok(path) = std::env::var("VESPER_BENCH_PEERS") {
        record.peers = std::fs::read_to_string(path)?.lines().map(str::to_owned).collect();
    }
    let bench = if device.is_cpu() { "model-cpu" } else { "model" };
    record::write(&record::path(bench, &date, &machine), &record)?;
    Ok(())
}
