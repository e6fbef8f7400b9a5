//! One optimizer step on a GPU: Velvet and candle's AdamW, against the device's copy bandwidth, in one run.
//!
//! ```text
//! cargo bench -p vesper-benches --features cuda --bench optimizer_cuda
//! ```
//!
//! The tensors are those of the medium preset (109.6 M parameters), and 2000 tiny ones. Each figure is a median of 20
//! samples: of one step alone, from its first launch on the host to its last write on the device, and of one of 8 steps
//! that are queued behind each other, as a training loop queues them.
//!
//! A run writes `benches/record/<machine>/<date>-optimizer-cuda.json`, or the file that `VESPER_BENCH_RECORD` names; the
//! machine's name is that of its GPU, or `VESPER_BENCH_MACHINE`. Lines that other programs printed in the same session are
//! taken into the record from the file that `VESPER_BENCH_PEERS` names. Without a GPU the bench says so and ends.

use candle_core::backprop::GradStore;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde::Serialize;
use std::error::Error;
use std::time::Instant;
use velvet_optim::{
    GradClip, HalfParameters, NonFinite, Orthogonal, ParamGroup, Rule, StateFormat, UpdateNorms, Velvet,
    VelvetConfig,
};
use vesper_benches::record;

type Result<T> = candle_core::Result<T>;

const SAMPLES: usize = 20;
const QUEUED: usize = 8;

/// The medium preset: 12 layers, width 768, feed-forward 2048, vocabulary 32064, tied embedding. With names, because
/// orthogonalised momentum is for hidden matrices.
fn medium() -> Vec<(String, Vec<usize>)> {
    let mut shapes =
        vec![("embed.weight".to_owned(), vec![32_064, 768]), ("norm.weight".to_owned(), vec![768])];
    for layer in 0..12 {
        for (name, shape) in [
            ("norm1", vec![768]),
            ("qkv", vec![2304, 768]),
            ("out", vec![768, 768]),
            ("norm2", vec![768]),
            ("gate_up", vec![4096, 768]),
            ("down", vec![768, 2048]),
        ] {
            shapes.push((format!("layers.{layer:02}.{name}.weight"), shape));
        }
    }
    shapes
}

/// 2000 tensors of up to 4000 elements.
fn tiny() -> Vec<(String, Vec<usize>)> {
    (0..2000).map(|i| (format!("w{i:04}"), vec![100 + i % 13 * 300])).collect()
}

struct Model {
    vars: Vec<(String, Var)>,
    grads: GradStore,
    parameters: usize,
}

impl Model {
    fn new(shapes: &[(String, Vec<usize>)], dtype: DType, device: &Device) -> Result<Self> {
        let mut grads = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        let mut vars = Vec::new();
        for (name, shape) in shapes {
            let values = |std| Tensor::randn(0f32, std, shape.as_slice(), device)?.to_dtype(dtype);
            let var = Var::from_tensor(&values(0.02f32)?)?;
            grads.insert(&var, values(0.001f32)?);
            vars.push((name.clone(), var));
        }
        let parameters = vars.iter().map(|(_, var)| var.elem_count()).sum();
        Ok(Self { vars, grads, parameters })
    }
}

/// Median milliseconds of one call alone, and of one of several that are queued.
fn time(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    for _ in 0..3 {
        call()?;
    }
    let mut median = |calls: usize| -> Result<f64> {
        let mut samples = Vec::with_capacity(SAMPLES);
        for _ in 0..SAMPLES {
            device.synchronize()?;
            let start = Instant::now();
            for _ in 0..calls {
                call()?;
            }
            device.synchronize()?;
            samples.push(start.elapsed().as_secs_f64() * 1e3 / calls as f64);
        }
        samples.sort_by(f64::total_cmp);
        Ok(samples.get(SAMPLES / 2).copied().unwrap_or(f64::NAN))
    };
    Ok((median(1)?, median(QUEUED)?))
}

/// Bytes a second of a copy within the device's memory, each byte read and written.
fn copy_bandwidth(device: &Device, cuda: &CudaDevice) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    let from = cuda.alloc_zeros::<u8>(BYTES)?;
    let mut to = cuda.alloc_zeros::<u8>(BYTES)?;
    let stream = cuda.cuda_stream();
    let (_, queued) = time(device, || stream.memcpy_dtod(&from, &mut to).w())?;
    Ok(2.0 * BYTES as f64 / queued * 1e3)
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    tensors: usize,
    parameters: usize,
    /// One step of those that are queued behind each other.
    milliseconds: f64,
    /// One step with the device idle before and after it.
    alone_milliseconds: f64,
    /// What the step has to move, where that is the measure.
    bytes_a_parameter: Option<f64>,
    gb_per_s: Option<f64>,
    share_of_copy: Option<f64>,
    state_bytes_a_parameter: Option<f64>,
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    copy_gb_per_s: f64,
    rows: Vec<Row>,
    /// What other programs printed about themselves in the same session.
    peers: Vec<String>,
}

struct Bench {
    device: Device,
    copy: f64,
    rows: Vec<Row>,
}

impl Bench {
    fn row(
        &mut self,
        name: &'static str,
        model: &Model,
        bytes: Option<f64>,
        state: Option<usize>,
        call: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let (alone, queued) = time(&self.device, call)?;
        let rate = bytes.map(|bytes| bytes * model.parameters as f64 / queued * 1e3);
        let row = Row {
            name,
            tensors: model.vars.len(),
            parameters: model.parameters,
            milliseconds: queued,
            alone_milliseconds: alone,
            bytes_a_parameter: bytes,
            gb_per_s: rate.map(|rate| rate / 1e9),
            share_of_copy: rate.map(|rate| rate / self.copy),
            state_bytes_a_parameter: state.map(|state| state as f64 / model.parameters as f64),
        };
        let share = row.share_of_copy.map_or_else(String::new, |share| format!("  {share:.3} of copy"));
        println!("{name:<44} {queued:8.3} ms queued  {alone:8.3} ms alone{share}");
        self.rows.push(row);
        Ok(())
    }

    fn velvet(
        &mut self,
        name: &'static str,
        model: &Model,
        bytes: Option<f64>,
        config: VelvetConfig,
    ) -> Result<()> {
        let mut opt = Velvet::named(model.vars.clone(), config)?;
        let state = opt.state_bytes();
        self.row(name, model, bytes, Some(state), || opt.step(&model.grads))?;
        let stats = opt.stats()?;
        if stats.step == 0 || stats.skipped > 0 {
            bail!("{name}: {stats:?}");
        }
        Ok(())
    }

    fn candle(&mut self, name: &'static str, model: &Model) -> Result<()> {
        let vars = model.vars.iter().map(|(_, var)| var.clone()).collect();
        let mut opt = AdamW::new(vars, ParamsAdamW { lr: 1e-6, ..ParamsAdamW::default() })?;
        self.row(name, model, None, None, || opt.step(&model.grads))
    }

    fn run(&mut self) -> Result<()> {
        let base = VelvetConfig::default().with_lr(1e-6);
        let unchecked = base.clone().with_non_finite(NonFinite::Unchecked);
        let clip = base.clone().with_clip(GradClip::GlobalNorm(1.0));
        let hidden = clip.clone().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
        // Two state arrays of a byte an element and a scale of 4 bytes a block of 256, read and written: 4.0625 bytes.
        let eight = |config: &VelvetConfig| config.clone().with_state_format(StateFormat::Blockwise8);
        let measured = VelvetConfig { update_norms: UpdateNorms::On, ..clip.clone() };
        let device = self.device.clone();
        {
            let model = Model::new(&medium(), DType::F32, &device)?;
            self.velvet("velvet AdamW f32, unchecked", &model, Some(28.0), unchecked.clone())?;
            self.velvet("velvet AdamW f32", &model, Some(32.0), base.clone())?;
            self.velvet("velvet AdamW f32, clip", &model, Some(32.0), clip.clone())?;
            self.velvet("velvet AdamW f32, clip, measured", &model, Some(32.0), measured)?;
            self.velvet("velvet AdamW f32, 8-bit, unchecked", &model, Some(16.0625), eight(&unchecked))?;
            self.velvet("velvet AdamW f32, 8-bit, clip", &model, Some(20.0625), eight(&clip))?;
            self.velvet("velvet orthogonal hidden, clip", &model, None, hidden.clone())?;
            self.candle("candle AdamW f32", &model)?;
        }
        {
            let matrices: Vec<_> = medium()
                .into_iter()
                .filter(|(name, shape)| shape.len() == 2 && !name.starts_with("embed"))
                .collect();
            let model = Model::new(&matrices, DType::F32, &device)?;
            let unchecked = hidden.clone().with_clip(GradClip::Off).with_non_finite(NonFinite::Unchecked);
            self.velvet("velvet orthogonal, hidden matrices alone", &model, None, unchecked)?;
        }
        {
            let model = Model::new(&medium(), DType::BF16, &device)?;
            self.velvet("velvet AdamW bf16, unchecked", &model, Some(22.0), unchecked.clone())?;
            self.velvet("velvet AdamW bf16, clip", &model, Some(24.0), clip.clone())?;
            self.velvet("velvet AdamW bf16, 8-bit, unchecked", &model, Some(10.0625), eight(&unchecked))?;
            self.velvet("velvet AdamW bf16, 8-bit, clip", &model, Some(12.0625), eight(&clip))?;
            let rounded = eight(&clip).with_half_parameters(HalfParameters::Stochastic { seed: 1 });
            self.velvet("velvet AdamW bf16, 8-bit, clip, stochastic", &model, Some(12.0625), rounded)?;
            let stochastic = clip.clone().with_half_parameters(HalfParameters::Stochastic { seed: 1 });
            self.velvet("velvet AdamW bf16, clip, stochastic", &model, Some(24.0), stochastic)?;
            let masters = clip.clone().with_half_parameters(HalfParameters::Master);
            // 8 bytes of masters, but no reading of the parameters
            self.velvet("velvet AdamW bf16, clip, masters", &model, Some(30.0), masters)?;
            self.candle("candle AdamW bf16", &model)?;
        }
        {
            let model = Model::new(&tiny(), DType::F32, &device)?;
            self.velvet("velvet AdamW f32, 2000 tiny tensors", &model, Some(28.0), unchecked)?;
            self.velvet("velvet AdamW f32, 2000 tiny tensors, clip", &model, Some(32.0), clip)?;
            let slow = base.with_group(ParamGroup { lr_scale: 0.1, ..ParamGroup::of(["w1*"]) });
            self.velvet("velvet AdamW f32, 2000 tiny tensors, groups", &model, Some(32.0), slow)?;
            self.candle("candle AdamW f32, 2000 tiny tensors", &model)?;
        }
        Ok(())
    }
}

pub(crate) fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
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
    let mut bench = Bench { device: device.clone(), copy, rows: Vec::new() };
    bench.run()?;
    let peers = match std::env::var("VESPER_BENCH_PEERS") {
        Ok(path) => std::fs::read_to_string(path)?.lines().map(str::to_owned).collect(),
        Err(_) => Vec::new(),
    };
    let date = record::today();
    let record = Record {
        bench: "optimizer-cuda",
        date: date.clone(),
        machine: machine.clone(),
        copy_gb_per_s: copy / 1e9,
        rows: bench.rows,
        peers,
    };
    record::write(&record::path("optimizer-cuda", &date, &machine), &record)?;
    Ok(())
}
