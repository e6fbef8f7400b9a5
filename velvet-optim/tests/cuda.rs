//! The CUDA back end against the CPU's. Without a CUDA device every test says so and passes.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test stops there")]

mod common;

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Device, Tensor, Var};
use common::{bits, config, noise, record_warnings, store, tensor};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use velvet_optim::{
    BackendChoice, Brake, CautiousUpdate, DecayMode, EntropyLr, Error, GradClip, HalfParameters, Lion,
    Momentum, NonFinite, Optimizer, Orthogonal, ParamGroup, PerplexityMomentum, PolyakCap, ProgressSignal,
    RowMoment, Rule, Sgd, SparseRows, Training, TrustRegion, UpdateNorms, Velvet, VelvetConfig,
};

type Named = Vec<(String, Var)>;

/// Elements of a block of the kernels.
const CHUNK: usize = 4096;

/// One device, with a stream of its own, for all tests.
fn gpu(test: &str) -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Device::new_cuda_with_stream(0).ok()).clone();
    if device.is_none() {
        eprintln!("{test}: skipped, there is no CUDA device");
    }
    device
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
        let far = values(x).iter().zip(values(y)).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        (count > 0).then(|| format!("{name}{:?}: {count} of {}, by up to {far:e}", x.dims(), x.elem_count()))
    };
    a.iter().filter_map(differs).collect()
}

fn close(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * a.abs().max(b.abs()).max(1e-300),
        (a, b) => a == b,
    }
}

/// What of the statistics differs by more than 1e-12 of itself.
fn different_stats(a: &Velvet, b: &Velvet) -> Vec<String> {
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
        if !close(x, y) {
            different.push(format!("{name}: {x:?} {y:?}"));
        }
    }
    for ((name, x), (_, y)) in a.update_ratios().unwrap().into_iter().zip(b.update_ratios().unwrap()) {
        if !close(Some(x), Some(y)) {
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
        polyak: PolyakCap::Cap { lower_bound: 0.0, factor: 0.1, decay: 0.9 },
        trust_region: TrustRegion::Relative { max_ratio: 1e-3, weight_floor: 1e-3 },
        clip: GradClip::GlobalNorm(0.5),
        ..config()
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

#[test]
fn updates_over_elements_have_the_bits_of_the_cpus() {
    let Some(device) = gpu("updates_over_elements_have_the_bits_of_the_cpus") else { return };
    let shapes: [&[usize]; 10] =
        [&[0], &[1], &[7], &[1023], &[2, CHUNK], &[CHUNK + 3], &[3, 5, 7], &[2, 0, 4], &[], &[129, 257]];
    let types = [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F16),
    ];
    let mut failures = Vec::new();
    for (name, config) in configs() {
        for (dtype, grads) in types {
            let [cpu, cuda] = both(&shapes, dtype, grads, &config, &device);
            let mut different = differences(&cpu, &cuda);
            different.extend(different_stats(&cpu, &cuda));
            if !different.is_empty() {
                let failure = format!("{name}, {dtype:?} with {grads:?}: {}", different.join("; "));
                eprintln!("{failure}");
                failures.push(failure);
            }
        }
    }
    assert!(failures.is_empty(), "{} cases differ: {failures:?}", failures.len());
}

#[test]
fn rows_without_a_gradient_keep_weights_and_moments() {
    let Some(device) = gpu("rows_without_a_gradient_keep_weights_and_moments") else { return };
    for (dtype, width) in [(DType::F32, 64), (DType::F32, 37), (DType::BF16, 64), (DType::BF16, 36)] {
        let config =
            VelvetConfig { sparse_rows: SparseRows::Skip, update_norms: UpdateNorms::On, ..config() };
        let run = |device: &Device| {
            let vars = named(&[&[1000, width]], dtype, device);
            let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
            for step in 1..4u64 {
                let mut g = noise(step, 1000 * width);
                for (row, g) in g.chunks_mut(width).enumerate() {
                    if (row as u64 + step).is_multiple_of(3) {
                        g.fill(if row % 2 == 0 { 0.0 } else { -0.0 });
                    }
                }
                let g = Tensor::from_vec(g, (1000, width), device).unwrap().to_dtype(dtype).unwrap();
                opt.try_step(&store([(&vars[0].1, g)])).unwrap();
            }
            opt
        };
        let (cpu, cuda) = (run(&Device::Cpu), run(&device));
        assert_eq!(differences(&cpu, &cuda), Vec::<String>::new(), "{dtype:?} {width}");
        assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new(), "{dtype:?} {width}");
    }
}

/// The distance of the changes that two optimizers made, relative to the first one's.
fn distance(before: &Tensor, a: &Tensor, b: &Tensor) -> f64 {
    let (before, a, b) = (values(before), values(a), values(b));
    let norm = |x: &dyn Fn(usize) -> f64| (0..before.len()).map(|i| x(i) * x(i)).sum::<f64>().sqrt();
    norm(&|i| a[i] - b[i]) / norm(&|i| a[i] - before[i])
}

#[test]
fn orthogonalised_updates_are_near_the_cpus() {
    let Some(device) = gpu("orthogonalised_updates_are_near_the_cpus") else { return };
    let shapes: [&[usize]; 9] =
        [&[64, 64], &[64, 64], &[96, 32], &[64, 200], &[200, 64], &[33, 47], &[2, 2], &[24, 8, 3], &[5]];
    for row_moment in [RowMoment::Off, RowMoment::Average { decay: 0.95 }] {
        for (dtype, half) in [
            (DType::F32, HalfParameters::Nearest),
            (DType::BF16, HalfParameters::Master),
            (DType::F16, HalfParameters::Master),
        ] {
            let rule = Rule::Orthogonal(Orthogonal { row_moment, ..Default::default() });
            let group = ParamGroup { rule: Some(Rule::AdamW), ..ParamGroup::of(["w8"]) };
            let config = config()
                .with_rule(rule)
                .with_group(group)
                .with_half_parameters(half)
                .with_perplexity_momentum(PerplexityMomentum::progress(8192));
            let config = VelvetConfig { update_norms: UpdateNorms::On, ..config };
            let [cpu, cuda] = both(&shapes, dtype, dtype, &config, &device);
            let [_, again] = both(&shapes, dtype, dtype, &config, &device);
            assert_eq!(differences(&cuda, &again), Vec::<String>::new(), "not deterministic");
            let (a, b) = (all(&cpu), all(&cuda));
            let mut report = Vec::new();
            for (i, shape) in shapes.iter().enumerate().take(8) {
                let name =
                    if half == HalfParameters::Master { format!("w{i}.master") } else { format!("w{i}") };
                let before = tensor(i as u64 + 1, shape, dtype);
                let far = distance(&before, &a[&name], &b[&name]);
                report.push((shape, far));
            }
            eprintln!("{row_moment:?} {dtype:?}: {report:?}");
            for (shape, far) in report {
                // Small matrices average the rounding of bf16 over fewer elements.
                let bound = if shape.iter().product::<usize>() < 100 { 0.06 } else { 0.025 };
                assert!(far < bound, "{row_moment:?} {dtype:?} {shape:?}: {far}");
            }
            let momentum = distance(
                &tensor(99, &[64, 64], DType::F32),
                &a["w0.momentum_buffer"],
                &b["w0.momentum_buffer"],
            );
            assert!(momentum < 1e-6, "{momentum}");
            let (x, y) = (cpu.stats().unwrap(), cuda.stats().unwrap());
            assert!((x.update_ratio.unwrap() / y.update_ratio.unwrap() - 1.0).abs() < 0.01, "{x:?} {y:?}");
            assert_eq!((x.beta1, x.progress), (y.beta1, y.progress));
        }
    }
}

#[test]
fn large_matrices_are_orthogonalised_within_the_rounding_of_bf16() {
    let Some(device) = gpu("large_matrices_are_orthogonalised_within_the_rounding_of_bf16") else { return };
    for shape in [[256usize, 768], [768, 256], [512, 512]] {
        let step = |device: &Device| {
            let vars = named(&[&shape], DType::F32, device);
            let rule = Rule::Orthogonal(Orthogonal::default());
            let mut opt = Velvet::named(vars.clone(), config().with_rule(rule).with_lr(0.01)).unwrap();
            opt.try_step(&store([(&vars[0].1, on(&tensor(77, &shape, DType::F32), device))])).unwrap();
            host(&vars[0].1)
        };
        let far = distance(&tensor(1, &shape, DType::F32), &step(&Device::Cpu), &step(&device));
        eprintln!("{shape:?}: {far}");
        assert!(far < 0.02, "{shape:?}: {far}");
    }
}

#[test]
fn many_tiny_parameters_are_all_updated() {
    let Some(device) = gpu("many_tiny_parameters_are_all_updated") else { return };
    let shapes: Vec<Vec<usize>> = (0..2000).map(|i| vec![i % 13 + 1, i % 3 + 1]).collect();
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    let config = config().with_clip(GradClip::GlobalNorm(1.0));
    let [cpu, cuda] = both(&shapes, DType::F32, DType::F32, &config, &device);
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn gradients_that_are_views_are_read_as_their_elements() {
    let Some(device) = gpu("gradients_that_are_views_are_read_as_their_elements") else { return };
    let run = |device: &Device| {
        let base = on(&tensor(5, &[6, 40], DType::F32), device);
        let views = [
            base.t().unwrap(),
            base.narrow(1, 3, 17).unwrap(),
            base.narrow(0, 2, 2).unwrap(),
            base.flatten_all().unwrap().narrow(0, 3, 101).unwrap(), // contiguous, but not at a multiple of 16 bytes
            base.narrow(0, 1, 1).unwrap().broadcast_as((5, 40)).unwrap(),
        ];
        let shapes: Vec<Vec<usize>> = views.iter().map(|view| view.dims().to_vec()).collect();
        let vars = named(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), DType::F32, device);
        let mut opt = Velvet::named(vars.clone(), config().with_clip(GradClip::GlobalNorm(1.0))).unwrap();
        for _ in 0..3 {
            opt.try_step(&store(vars.iter().map(|(_, var)| var).zip(views.clone()))).unwrap();
        }
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn a_gradient_that_shares_a_parameters_storage_is_read_before_it_is_written() {
    let Some(device) = gpu("a_gradient_that_shares_a_parameters_storage") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[33], &[33]], DType::F32, device);
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        let first = vars[0].1.as_detached_tensor();
        opt.try_step(&store([(&vars[0].1, first.clone()), (&vars[1].1, first)])).unwrap();
        opt
    };
    assert_eq!(differences(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

#[test]
fn parameters_without_a_gradient_and_frozen_ones_keep_everything() {
    let Some(device) = gpu("parameters_without_a_gradient_and_frozen_ones_keep_everything") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5], &[300], &[17]], DType::F32, device);
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w3"]) };
        let slow = ParamGroup { lr_scale: 0.1, weight_decay: Some(0.0), ..ParamGroup::of(["w0"]) };
        let config = config().with_group(frozen).with_group(slow).with_clip(GradClip::GlobalNorm(1.0));
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        record_warnings(&mut opt);
        for step in 1..6u64 {
            let given = vars.iter().enumerate().filter(|(i, _)| !(*i as u64 + step).is_multiple_of(3));
            let grads =
                given.map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), device)));
            opt.try_step(&store(grads)).unwrap();
        }
        (opt, host(&vars[3].1))
    };
    let ((cpu, _), (cuda, frozen)) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(cpu.missing_gradients(), cuda.missing_gradients());
    assert_eq!(bits(&frozen), bits(&tensor(4, &[17], DType::F32)));
}

#[test]
fn masked_elements_stay_zero() {
    let Some(device) = gpu("masked_elements_stay_zero") else { return };
    for rule in [Rule::AdamW, Rule::Orthogonal(Orthogonal::default())] {
        let vars = named(&[&[16, 24]], DType::F32, &device);
        let mut opt = Velvet::named(vars.clone(), config().with_rule(rule)).unwrap();
        train(&mut opt, &vars, DType::F32, 1..3);
        let mask: Vec<u8> = (0..16 * 24).map(|i| u8::from(i % 3 != 0)).collect();
        let mask = Tensor::from_vec(mask, (16, 24), &device).unwrap();
        opt.set_mask("w0", Some(&mask)).unwrap();
        train(&mut opt, &vars, DType::F32, 3..6);
        let weights = values(&vars[0].1);
        assert!(weights.iter().enumerate().all(|(i, w)| (i % 3 == 0) == (*w == 0.0)), "{rule:?}");
        if rule == Rule::AdamW {
            let moments = values(&opt.state().unwrap()["w0.exp_avg"]);
            assert!(moments.iter().enumerate().all(|(i, m)| (i % 3 == 0) == (*m == 0.0)));
        }
    }
}

fn poisoned(vars: &Named, step: u64) -> candle_core::backprop::GradStore {
    let grads = vars.iter().enumerate().map(|(i, (_, var))| {
        let mut g = noise(step * 10 + i as u64, var.elem_count());
        if i == 1 {
            *g.last_mut().unwrap() = f32::NAN;
        }
        (var, Tensor::from_vec(g, var.dims(), var.device()).unwrap())
    });
    store(grads)
}

#[test]
fn steps_with_nan_are_skipped_and_counted() {
    let Some(device) = gpu("steps_with_nan_are_skipped_and_counted") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5]], DType::F32, device);
        let config =
            VelvetConfig { update_norms: UpdateNorms::On, ..config().with_non_finite(NonFinite::Skip) };
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        train(&mut opt, &vars, DType::F32, 1..3);
        opt.try_step(&poisoned(&vars, 7)).unwrap();
        train(&mut opt, &vars, DType::F32, 3..5);
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
    assert_eq!((cuda.stats().unwrap().step, cuda.stats().unwrap().skipped), (4, 1));
}

#[test]
fn a_step_with_nan_is_an_error_of_the_next_call_that_looks() {
    let Some(device) = gpu("a_step_with_nan_is_an_error_of_the_next_call_that_looks") else { return };
    let new = || {
        let vars = named(&[&[100], &[40, 5], &[3]], DType::F32, &device);
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        train(&mut opt, &vars, DType::F32, 1..3);
        let before = all(&opt);
        opt.try_step(&poisoned(&vars, 7)).unwrap();
        (opt, vars, before)
    };
    let check = |error: Error| match error {
        Error::NonFiniteGradients { step, norm, names } => {
            assert_eq!((step, names), (3, vec!["w1".to_owned()]));
            assert!(norm.is_nan());
        }
        other => panic!("{other}"),
    };
    let untouched = |opt: &Velvet, before: &BTreeMap<String, Tensor>| {
        for (name, now) in all(opt) {
            assert_eq!(bits(&now), bits(&before[&name]), "{name}");
        }
    };
    // By the statistics, then everything goes on.
    let (mut opt, vars, before) = new();
    check(opt.stats().unwrap_err());
    untouched(&opt, &before);
    assert_eq!(opt.stats().unwrap().step, 2);
    train(&mut opt, &vars, DType::F32, 3..4);
    assert_eq!(opt.stats().unwrap().step, 3);
    // By saving.
    let (opt, _, _) = new();
    check(opt.to_bytes().unwrap_err());
    // By a step that comes later; those in between are left out.
    let (mut opt, vars, before) = new();
    let mut error = None;
    for step in 3..100 {
        let grads = vars
            .iter()
            .enumerate()
            .map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), &device)));
        if let Err(e) = opt.try_step(&store(grads)) {
            error = Some(e);
            break;
        }
        device.synchronize().unwrap();
    }
    check(error.expect("a step reports the failure"));
    untouched(&opt, &before);
}

#[test]
fn losses_on_the_device_are_taken_in_there() {
    let Some(device) = gpu("losses_on_the_device_are_taken_in_there") else { return };
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let run = |device: &Device| {
            let vars = named(&[&[100], &[40, 5]], DType::F32, device);
            let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
            for step in 1..12u64 {
                let loss = if step == 5 { f64::NAN } else { 9.0 - 0.3 * step as f64 };
                let scalar = |x: f64, shape: &[usize]| {
                    Tensor::full(x, shape, device).unwrap().to_dtype(dtype).unwrap()
                };
                match step % 3 {
                    0 => opt.observe(&scalar(loss, &[])).unwrap(),
                    1 => opt.observe_with_entropy(&scalar(loss, &[1]), &scalar(loss - 0.2, &[1, 1])).unwrap(),
                    _ => opt.observe_values(loss, Some(loss - 0.1)),
                }
                let grads = vars
                    .iter()
                    .enumerate()
                    .map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), device)));
                opt.try_step(&store(grads)).unwrap();
            }
            opt
        };
        let (cpu, cuda) = (run(&Device::Cpu), run(&device));
        assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new(), "{dtype:?}");
        assert_eq!(differences(&cpu, &cuda), Vec::<String>::new(), "{dtype:?}");
        let stats = cuda.stats().unwrap();
        assert_eq!(stats.ignored_losses, 1);
        assert!(stats.progress.is_some_and(|p| p > 0.0) && stats.lr < 1e-3);
    }
}

#[test]
fn a_loaded_run_goes_on_with_the_same_bits() {
    let Some(device) = gpu("a_loaded_run_goes_on_with_the_same_bits") else { return };
    let orthogonal = config().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
    let master = adaptive().with_half_parameters(HalfParameters::Master);
    for (dtype, config) in [(DType::F32, adaptive()), (DType::BF16, master), (DType::F32, orthogonal)] {
        let shapes: [&[usize]; 4] = [&[100], &[40, 50], &[5], &[0]];
        let vars = named(&shapes, dtype, &device);
        let mut whole = Velvet::named(vars.clone(), config.clone()).unwrap();
        train(&mut whole, &vars, dtype, 1..21);
        let saved = whole.to_bytes().unwrap();
        let copy: Named = vars
            .iter()
            .map(|(name, var)| {
                (name.clone(), Var::from_tensor(&var.as_detached_tensor().copy().unwrap()).unwrap())
            })
            .collect();
        let on_cpu: Named = vars
            .iter()
            .map(|(name, var)| (name.clone(), Var::from_tensor(&host(&var.as_detached_tensor())).unwrap()))
            .collect();
        let mut resumed = Velvet::named(copy.clone(), config.clone()).unwrap();
        train(&mut resumed, &copy, dtype, 1..2);
        for ((_, copy), (_, var)) in copy.iter().zip(&vars) {
            copy.set(&var.as_detached_tensor()).unwrap();
        }
        resumed.load_bytes(&saved).unwrap();
        assert_eq!(resumed.stats().unwrap(), whole.stats().unwrap());
        assert!(resumed.to_bytes().unwrap() == saved);
        // Onto the CPU and back.
        let mut elsewhere = Velvet::named(on_cpu, config.clone()).unwrap();
        elsewhere.load_bytes(&saved).unwrap();
        assert!(elsewhere.to_bytes().unwrap() == saved);
        train(&mut whole, &vars, dtype, 21..41);
        train(&mut resumed, &copy, dtype, 21..41);
        assert_eq!(differences(&whole, &resumed), Vec::<String>::new(), "{dtype:?}");
        assert_eq!(resumed.stats().unwrap(), whole.stats().unwrap());
        resumed.load_bytes(&elsewhere.to_bytes().unwrap()).unwrap();
        assert!(resumed.to_bytes().unwrap() == saved);
    }
}

#[test]
fn the_configuration_can_change_in_mid_run() {
    let Some(device) = gpu("the_configuration_can_change_in_mid_run") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5]], DType::F32, device);
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w1"]) };
        let mut opt = Velvet::named(vars.clone(), adaptive().with_group(frozen)).unwrap();
        train(&mut opt, &vars, DType::F32, 1..4);
        opt.set_config(adaptive().with_lr(5e-4)).unwrap();
        train(&mut opt, &vars, DType::F32, 4..6);
        opt.set_learning_rate(2e-4);
        train(&mut opt, &vars, DType::F32, 6..8);
        opt.set_config(config().with_rule(Rule::Lion(Lion::default()))).unwrap();
        train(&mut opt, &vars, DType::F32, 8..10);
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn f64_parameters_and_the_plain_back_end_work_on_the_device() {
    let Some(device) = gpu("f64_parameters_and_the_plain_back_end_work_on_the_device") else { return };
    for (dtype, backend) in [(DType::F64, BackendChoice::Auto), (DType::F32, BackendChoice::Plain)] {
        let config = adaptive().with_backend(backend);
        let [cpu, cuda] = both(&[&[100], &[40, 5]], dtype, dtype, &config, &device);
        let (a, b) = (all(&cpu), all(&cuda));
        for (name, a) in &a {
            for (x, y) in values(a).iter().zip(values(&b[name])) {
                assert!((x - y).abs() < 1e-6, "{dtype:?} {backend:?} {name}: {x} {y}");
            }
        }
    }
}

#[test]
fn rosenbrock_is_minimised() {
    let Some(device) = gpu("rosenbrock_is_minimised") else { return };
    let start = |x: f32| Var::from_tensor(&Tensor::new(x, &device).unwrap()).unwrap();
    let (x, y) = (start(-1.2), start(1.0));
    let rosenbrock = || -> candle_core::Result<Tensor> {
        let valley = (y.as_tensor() - x.sqr()?)?.sqr()?;
        (1.0 - x.as_tensor())?.sqr()? + (valley * 100.0)?
    };
    let mut opt =
        Velvet::new(vec![x.clone(), y.clone()], VelvetConfig { weight_decay: 0.0, ..config() }).unwrap();
    for step in 0..2000 {
        opt.set_learning_rate(0.1 * (1.0 - f64::from(step) / 2000.0));
        opt.backward_step(&rosenbrock().unwrap()).unwrap();
    }
    let loss = values(&rosenbrock().unwrap())[0];
    assert!(loss < 1e-3, "{loss}");
}

// In a suite that shares the device another test's copy can hold this one's launches up until the work is over.
#[test]
#[ignore = "needs the device to itself: run it by name with `--ignored`"]
fn a_step_does_not_wait_for_the_device() {
    let Some(device) = gpu("a_step_does_not_wait_for_the_device") else { return };
    let device_of = |device: &Device| match device {
        Device::Cuda(device) => device.clone(),
        other => panic!("{other:?}"),
    };
    let vars = named(&[&[100], &[40, 50]], DType::F32, &device);
    let config = adaptive().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
    let mut opt = Velvet::named(vars.clone(), config).unwrap();
    let grads: Vec<_> =
        vars.iter().map(|(_, var)| on(&gradient(1, 0, var.dims(), DType::F32), &device)).collect();
    let loss = Tensor::new(5f32, &device).unwrap();
    let step = |opt: &mut Velvet| {
        opt.observe_with_entropy(&loss, &loss).unwrap();
        opt.try_step(&store(vars.iter().map(|(_, var)| var).zip(grads.clone()))).unwrap();
    };
    step(&mut opt); // kernels are loaded, which waits
    let a = Tensor::randn(0f32, 1f32, (8192, 8192), &device).unwrap();
    device.synchronize().unwrap();
    let mut work = a.clone();
    for _ in 0..20 {
        work = (work.matmul(&a).unwrap() * 1e-4).unwrap();
    }
    let stream = device_of(&device).cuda_stream();
    let event = stream.record_event(None).unwrap();
    assert!(!event.is_complete(), "the work that a step must not wait for was over too soon");
    step(&mut opt);
    assert!(!event.is_complete(), "a step waited for the device");
    device.synchronize().unwrap();
    assert_eq!(opt.stats().unwrap().step, 2);
}

#[test]
fn a_captured_step_replays_as_steps_do() {
    if gpu("a_captured_step_replays_as_steps_do").is_none() {
        return;
    }
    // A device of its own: a capture takes in whatever any thread sends to its stream.
    let device = Device::new_cuda_with_stream(0).unwrap();
    let Device::Cuda(cuda) = &device else { panic!("{device:?}") };
    // SAFETY: all tensors of this device are used on its one stream.
    #[allow(unsafe_code, reason = "the switch is an unsafe function")]
    unsafe {
        cuda.disable_event_tracking();
    }
    let shapes: [&[usize]; 3] = [&[100], &[40, 50], &[17, 3]];
    let config = adaptive().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
    let new = || {
        let vars = named(&shapes, DType::F32, &device);
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
