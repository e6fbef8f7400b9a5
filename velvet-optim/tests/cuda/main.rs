//! The CUDA back end against the CPU's. Without a CUDA device every test says so and passes.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test stops there")]

mod blockwise;
#[path = "../common/mod.rs"]
mod common;
mod elementwise;
mod orthogonal;
mod run;

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Device, Tensor, Var};
use common::{bits, config, noise, record_warnings, store, tensor};
use std::collections::BTreeMap;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard};
use velvet_optim::{
    BackendChoice, Brake, CautiousUpdate, DecayMode, EntropyLr, Error, GradClip, HalfParameters, Lion,
    Momentum, NonFinite, Optimizer, Orthogonal, ParamGroup, PerplexityMomentum, PolyakCap, ProgressSignal,
    RowMoment, Rule, Sgd, SparseRows, StateFormat, Training, TrustRegion, UpdateNorms, Velvet, VelvetConfig,
};

type Named = Vec<(String, Var)>;

/// Elements of a block of the kernels.
const CHUNK: usize = 4096;

/// What a test on the device holds: a capture of another thread can fail by what this one does to the driver's context.
static AT_WORK: RwLock<()> = RwLock::new(());

/// One device, with a stream of its own, for all tests.
fn gpu(test: &str) -> Option<(RwLockReadGuard<'static, ()>, Device)> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let guard = AT_WORK.read().unwrap_or_else(PoisonError::into_inner);
    let device = DEVICE.get_or_init(|| Device::new_cuda_with_stream(0).ok()).clone();
    if device.is_none() {
        eprintln!("{test}: skipped, there is no CUDA device");
    }
    Some((guard, device?))
}

/// Whether `VESPER_CUDA_TESTS` is `brief`: for compute-sanitizer, under which every access of a kernel takes some hundred
/// times as long. Then long runs of rules whose kernels other tests run are cut or left out.
fn brief() -> bool {
    std::env::var_os("VESPER_CUDA_TESTS").is_some_and(|value| value == "brief")
}

fn on(tensor: &Tensor, device: &Device) -> Tensor {
    tensor.to_device(device).unwrap()
}

/// Variables `w0`, `w1`, ... with values that depend on shape and position alone.
fn named(shapes: &[&[usize]], dtype: DType, device: &Device) -> Named {
    let var = |i: usize, shape: &[usize]| {
        Var::from_tensor(&on(&tensor(i as u64 + 1, shape, dtype), device)).unwrap()
    };
    shapes.iter().enumerate().map(|(i, shape)| (format!("w{i}"), var(i, shape))).collect()
}

fn gradient(step: u64, i: usize, shape: &[usize], dtype: DType) -> Tensor {
    tensor(step * 1000 + i as u64, shape, DType::F32).to_dtype(dtype).unwrap()
}

/// Steps on gradients and losses that depend on the step's number alone.
fn train(opt: &mut Velvet, vars: &Named, grads: DType, steps: std::ops::Range<u64>) {
    for step in steps {
        let loss = 9.0 / (1.0 + 0.02 * step as f64);
        opt.observe_values(loss, Some(loss - 0.01 * step as f64));
        let grads = vars
            .iter()
            .enumerate()
            .map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), grads), var.device())));
        opt.try_step(&store(grads)).unwrap();
    }
}

fn host(tensor: &Tensor) -> Tensor {
    on(tensor, &Device::Cpu)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    host(tensor).to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Everything an optimizer holds, by name.
fn all(opt: &Velvet) -> BTreeMap<String, Tensor> {
    let mut all: BTreeMap<_, _> = opt.parameters().map(|(name, var)| (name.to_owned(), host(var))).collect();
    all.extend(opt.state().unwrap());
    all
}

/// Names of what differs in its bits, with how many elements and the largest distance.
fn differences(a: &Velvet, b: &Velvet) -> Vec<String> {
    let (a, b) = (all(a), all(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let differs = |(name, x): (&String, &Tensor)| {
        let y = &b[name];
        let count = bits(x).iter().zip(bits(y)).filter(|(x, y)| **x != *y).count();
        let far = values(x).into_iter().zip(values(y)).map(|(x, y)| (x - y).abs());
        let far = far.max_by(f64::total_cmp).unwrap_or(0.0);
        (count > 0).then(|| format!("{name}{:?}: {count} of {}, by up to {far:e}", x.dims(), x.elem_count()))
    };
    a.iter().filter_map(differs).collect()
}

/// What two back ends measure of one update agrees to this: each sums in its own order, the CPU in f32 over blocks.
const MEASURED: f64 = 1e-6;

/// Names of what is further apart than rates that follow measured updates explain, in the Frobenius norm.
fn far(a: &Velvet, b: &Velvet) -> Vec<String> {
    let (a, b) = (all(a), all(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let differs = |(name, x): (&String, &Tensor)| {
        // A rate that differs by so little still moves an element to the next bf16 or f16 once in a while.
        let bound = if matches!(x.dtype(), DType::F32 | DType::F64) { MEASURED } else { 1e-4 };
        let (x, y) = (values(x), values(&b[name]));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let (apart, size) = (norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)), norm(&mut x.iter().copied()));
        // Not `>`, which NaN would pass.
        (!(apart <= bound * size)).then(|| format!("{name}: {apart:e} of {size:e}"))
    };
    a.iter().filter_map(differs).collect()
}

fn close(a: Option<f64>, b: Option<f64>, bound: f64) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= bound * a.abs().max(b.abs()).max(1e-300),
        (a, b) => a == b,
    }
}

/// What of the statistics differs by more than 1e-12 of itself, or what was measured by more than 1e-6.
fn different_stats(a: &Velvet, b: &Velvet) -> Vec<String> {
    stats_apart(a, b, 1e-12)
}

fn stats_apart(a: &Velvet, b: &Velvet, bound: f64) -> Vec<String> {
    let (x, y) = (a.stats().unwrap(), b.stats().unwrap());
    let mut different = Vec::new();
    for (name, x, y) in [
        ("step", Some(x.step as f64), Some(y.step as f64)),
        ("grad_norm", x.grad_norm, y.grad_norm),
        ("clip_scale", Some(x.clip_scale), Some(y.clip_scale)),
        ("lr", Some(x.lr), Some(y.lr)),
        ("beta1", Some(x.beta1), Some(y.beta1)),
        ("progress", x.progress, y.progress),
        ("update_ratio", x.update_ratio, y.update_ratio),
        ("skipped", Some(x.skipped as f64), Some(y.skipped as f64)),
        ("ignored", Some(x.ignored_losses as f64), Some(y.ignored_losses as f64)),
    ] {
        if !close(x, y, if name == "update_ratio" { MEASURED } else { bound }) {
            different.push(format!("{name}: {x:?} {y:?}"));
        }
    }
    for ((name, x), (_, y)) in a.update_ratios().unwrap().into_iter().zip(b.update_ratios().unwrap()) {
        if !close(Some(x), Some(y), MEASURED) {
            different.push(format!("ratio of {name}: {x} {y}"));
        }
    }
    different
}

/// The same run on the CPU and on the device.
fn both(
    shapes: &[&[usize]],
    dtype: DType,
    grads: DType,
    config: &VelvetConfig,
    device: &Device,
) -> [Velvet; 2] {
    [&Device::Cpu, device].map(|device| {
        let vars = named(shapes, dtype, device);
        let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
        train(&mut opt, &vars, grads, 1..6);
        opt
    })
}

/// The parts that follow losses: their steps have the CPU's bits.
fn adaptive() -> VelvetConfig {
    VelvetConfig {
        entropy_lr: EntropyLr::WarmUp {
            initial_loss: 9.0,
            margin: 0.05,
            nats: 3.0,
            floor: 0.02,
            decay: 0.8,
            signal: ProgressSignal::Entropy,
        },
        perplexity_momentum: PerplexityMomentum::progress(8192),
        brake: Brake::Gap { margin: 0.01, nats: 1.0, floor: 0.1, decay: 0.8 },
        clip: GradClip::GlobalNorm(0.5),
        ..config()
    }
}

/// With those that follow measured updates, set so that they bind.
fn measured() -> VelvetConfig {
    VelvetConfig {
        polyak: PolyakCap::Cap { lower_bound: 0.0, factor: 0.1, decay: 0.9 },
        trust_region: TrustRegion::Relative { max_ratio: 1e-3, weight_floor: 1e-3 },
        ..adaptive()
    }
}

/// Every rule whose elements do not depend on each other, with each of its options.
fn configs() -> Vec<(&'static str, VelvetConfig)> {
    let nesterov = VelvetConfig { momentum: Momentum::Nesterov, ..config() };
    let cautious = VelvetConfig { cautious_update: CautiousUpdate::Aligned, ..config() };
    let decay = VelvetConfig { decay_mode: DecayMode::Cautious, weight_decay: 0.1, ..config() };
    let sgd = |form| Rule::Sgd(Sgd { momentum: 0.9, form });
    vec![
        ("adamw", config()),
        ("adamw, unchecked", config().with_non_finite(NonFinite::Unchecked)),
        ("adamw, clip", config().with_clip(GradClip::GlobalNorm(0.5))),
        ("adamw, measured", VelvetConfig { update_norms: UpdateNorms::On, ..config() }),
        ("adamw, Nesterov", nesterov.clone()),
        ("adamw, cautious", cautious.clone()),
        ("adamw, cautious Nesterov", VelvetConfig { momentum: Momentum::Nesterov, ..cautious }),
        ("adamw, cautious decay", decay.clone()),
        (
            "adamw, everything",
            VelvetConfig {
                cautious_update: CautiousUpdate::Aligned,
                momentum: Momentum::Nesterov,
                ..decay.clone()
            },
        ),
        ("adamw, adaptive", adaptive()),
        ("adamw, sparse rows", VelvetConfig { sparse_rows: SparseRows::Skip, ..config() }),
        ("adamw, stochastic", config().with_half_parameters(HalfParameters::Stochastic { seed: 7 })),
        ("adamw, masters", config().with_half_parameters(HalfParameters::Master)),
        ("sgd", config().with_rule(sgd(Momentum::Averaged))),
        (
            "sgd, Nesterov, clip",
            config().with_rule(sgd(Momentum::Nesterov)).with_clip(GradClip::GlobalNorm(0.1)),
        ),
        (
            "sgd, cautious decay, measured",
            VelvetConfig {
                update_norms: UpdateNorms::On,
                ..decay.clone().with_rule(sgd(Momentum::Averaged))
            },
        ),
        ("lion", config().with_rule(Rule::Lion(Lion::default()))),
        (
            "lion, cautious decay, masters",
            decay.with_rule(Rule::Lion(Lion::default())).with_half_parameters(HalfParameters::Master),
        ),
    ]
}

/// A step that is captured in a graph and replayed gives what steps give.
fn replay(test: &str, shapes: &[&[usize]], config: &VelvetConfig) {
    if gpu(test).is_none() {
        return;
    }
    // A device of its own: a capture takes in whatever any thread sends to its stream.
    let _alone = AT_WORK.write().unwrap_or_else(PoisonError::into_inner);
    let device = Device::new_cuda_with_stream(0).unwrap();
    let Device::Cuda(cuda) = &device else { panic!("{device:?}") };
    // SAFETY: all tensors of this device are used on its one stream.
    #[allow(unsafe_code, reason = "the switch is an unsafe function")]
    unsafe {
        cuda.disable_event_tracking();
    }
    let new = || {
        let vars = named(shapes, DType::F32, &device);
        let opt = Velvet::named(vars.clone(), config.clone()).unwrap();
        (vars, opt)
    };
    let grads: Vec<_> =
        shapes.iter().enumerate().map(|(i, shape)| on(&gradient(1, i, shape, DType::F32), &device)).collect();
    let loss = Tensor::new(5f32, &device).unwrap();
    let step = |vars: &Named, opt: &mut Velvet| {
        opt.observe_with_entropy(&loss, &loss).unwrap();
        opt.try_step(&store(vars.iter().map(|(_, var)| var).zip(grads.clone()))).unwrap();
    };
    let (eager_vars, mut eager) = new();
    for i in 0..6 {
        eager.set_learning_rate(1e-3 / f64::from(i + 1));
        step(&eager_vars, &mut eager);
    }
    let (vars, mut opt) = new();
    step(&vars, &mut opt);
    let stream = cuda.cuda_stream();
    stream.synchronize().unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    step(&vars, &mut opt);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    for i in 1..6 {
        opt.set_learning_rate(1e-3 / f64::from(i + 1));
        graph.launch().unwrap();
    }
    assert_eq!(differences(&eager, &opt), Vec::<String>::new());
    assert_eq!(eager.stats().unwrap(), opt.stats().unwrap());
    assert_eq!(opt.stats().unwrap().step, 6);
}
