//! What the tests share: numbers that look random and are not, and gradients put in by hand.
#![allow(dead_code, unreachable_pub, reason = "each test file is a crate of its own and uses its part")]
#![allow(clippy::unwrap_used, reason = "a test stops there")]

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, Var};
use velvet_optim::{
    CautiousUpdate, DecayMode, Lion, Momentum, Optimizer, Orthogonal, RowMoment, Rule, Sgd, Velvet,
    VelvetConfig,
};

/// Values in [-1, 1) that depend on the seed and the position alone.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn tensor(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let len = shape.iter().product();
    Tensor::from_vec(noise(seed, len), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub fn var(seed: u64, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&tensor(seed, shape, dtype)).unwrap()
}

/// A store with nothing in it: candle makes one only by a backward pass.
pub fn empty_store() -> GradStore {
    Tensor::zeros((), DType::F32, &Device::Cpu).unwrap().backward().unwrap()
}

pub fn store<'a>(grads: impl IntoIterator<Item = (&'a Var, Tensor)>) -> GradStore {
    let mut store = empty_store();
    for (var, grad) in grads {
        store.insert(var, grad);
    }
    store
}

pub fn values(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The bits of a tensor's elements in row-major order.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    let tensor = tensor.contiguous().unwrap();
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().unwrap();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        Storage::Cpu(CpuStorage::F64(x)) => x[start..end].iter().map(|x| x.to_bits()).collect(),
        Storage::Cpu(CpuStorage::BF16(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        Storage::Cpu(CpuStorage::F16(x)) => x[start..end].iter().map(|x| u64::from(x.to_bits())).collect(),
        other => panic!("{other:?}"),
    }
}

/// The bits of everything an optimizer holds: parameters, then state, by name.
pub fn all_bits(opt: &Velvet) -> Vec<(String, Vec<u64>)> {
    let mut all: Vec<_> = opt.parameters().map(|(name, var)| (name.to_owned(), bits(var))).collect();
    all.extend(opt.state().unwrap().iter().map(|(name, t)| (name.clone(), bits(t))));
    all.sort();
    all
}

/// Variables named `w0`, `w1`, ... of the given shapes.
pub fn named(shapes: &[&[usize]], dtype: DType) -> Vec<(String, Var)> {
    shapes.iter().enumerate().map(|(i, shape)| (format!("w{i}"), var(i as u64 + 1, shape, dtype))).collect()
}

/// Takes `steps` steps on gradients that depend on the step's number alone; the loss falls from 9 nats.
pub fn train(opt: &mut Velvet, vars: &[(String, Var)], first: u64, steps: u64) {
    for step in first..first + steps {
        opt.observe_value(9.0 / (1.0 + 0.02 * step as f64));
        let grads = vars.iter().enumerate().map(|(i, (_, var))| {
            (var, tensor(step * 1000 + i as u64, var.dims(), DType::F32).to_dtype(var.dtype()).unwrap())
        });
        opt.try_step(&store(grads)).unwrap();
    }
}

/// The warnings an optimizer gives.
pub fn record_warnings(opt: &mut Velvet) -> std::sync::Arc<std::sync::Mutex<Vec<String>>> {
    let warnings = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = warnings.clone();
    opt.on_warning(move |message| sink.lock().unwrap().push(message.to_owned()));
    warnings
}

pub fn scalar(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.to_scalar()
}

pub fn config() -> VelvetConfig {
    VelvetConfig::default()
}

/// Every rule with each of its options, and a learning rate that suits it.
pub fn rules() -> Vec<(&'static str, VelvetConfig)> {
    let base = VelvetConfig { lr: 0.02, beta2: 0.95, weight_decay: 0.1, ..VelvetConfig::default() };
    let matrices = |rule| VelvetConfig { hidden_matrices: Some(rule), ..base.clone() };
    let orthogonal = Orthogonal::default();
    vec![
        ("adamw", base.clone()),
        ("adamw, nesterov", VelvetConfig { momentum: Momentum::Nesterov, ..base.clone() }),
        ("adamw, cautious update", VelvetConfig { cautious_update: CautiousUpdate::Aligned, ..base.clone() }),
        ("adamw, cautious decay", VelvetConfig { decay_mode: DecayMode::Cautious, ..base.clone() }),
        (
            "adamw, all options",
            VelvetConfig {
                momentum: Momentum::Nesterov,
                cautious_update: CautiousUpdate::Aligned,
                decay_mode: DecayMode::Cautious,
                ..base.clone()
            },
        ),
        ("sgd", base.clone().with_rule(Rule::Sgd(Sgd::default()))),
        (
            "sgd, nesterov",
            base.clone().with_rule(Rule::Sgd(Sgd { form: Momentum::Nesterov, ..Sgd::default() })),
        ),
        ("lion", base.clone().with_lr(0.005).with_rule(Rule::Lion(Lion::default()))),
        (
            "lion, cautious decay",
            VelvetConfig { decay_mode: DecayMode::Cautious, ..base.clone() }
                .with_lr(0.005)
                .with_rule(Rule::Lion(Lion::default())),
        ),
        ("orthogonal", matrices(Rule::Orthogonal(Orthogonal { row_moment: RowMoment::Off, ..orthogonal }))),
        ("orthogonal, rows", matrices(Rule::Orthogonal(orthogonal))),
        (
            "orthogonal, cautious decay",
            VelvetConfig { decay_mode: DecayMode::Cautious, ..matrices(Rule::Orthogonal(orthogonal)) },
        ),
    ]
}

/// Rosenbrock's valley, under a rule of [`rules`]; the loss must fall to a share of the first that suits the rule.
pub fn rosenbrock(name: &str, config: VelvetConfig, dtype: DType, device: &Device) {
    let lr = if name.starts_with("sgd") { 2e-4 } else { 1e-2 };
    // A valley for each row; a matrix, so that every rule takes it.
    let start = Tensor::new(&[[-1.2f32, 1.0], [1.5, -0.5]], device).unwrap().to_dtype(dtype).unwrap();
    let p = Var::from_tensor(&start).unwrap();
    let config = VelvetConfig { weight_decay: 0.0, lr, ..config };
    let mut opt = Velvet::named(vec![("w".into(), p.clone())], config).unwrap();
    let loss = || {
        let (x, y) = (p.narrow(1, 0, 1).unwrap(), p.narrow(1, 1, 1).unwrap());
        let valley = ((y - x.sqr().unwrap()).unwrap().sqr().unwrap() * 100.0).unwrap();
        (valley + (1.0 - x).unwrap().sqr().unwrap()).unwrap().sum_all().unwrap()
    };
    let first = scalar(&loss()).unwrap();
    for step in 0..2000 {
        opt.set_learning_rate(lr * (1.0 - f64::from(step) / 2000.0));
        opt.backward_step(&loss()).unwrap();
    }
    let last = scalar(&loss()).unwrap();
    let share = match name {
        name if name.starts_with("sgd") => 1e-3,
        name if name.starts_with("lion") => 1e-5, // each step is as long as the learning rate
        name if name.starts_with("orthogonal") => 0.05, // as are these, and they go along both valleys at once
        _ => 1e-10,
    };
    assert!(last < share * first, "{name}: {first} to {last}");
}

/// One block of a transformer without norms that learns to repeat the token before the last.
pub struct Transformer {
    vars: Vec<(String, Var)>,
}

impl Transformer {
    const VOCAB: usize = 7;
    const WIDTH: usize = 8;
    const LEN: usize = 6;

    pub fn new(device: &Device) -> Self {
        let (v, d, t) = (Self::VOCAB, Self::WIDTH, Self::LEN);
        let shapes: [(&str, [usize; 2]); 8] = [
            ("embed.weight", [v, d]),
            ("positions.embed", [t, d]),
            ("q.weight", [d, d]),
            ("k.weight", [d, d]),
            ("v.weight", [d, d]),
            ("up.weight", [4 * d, d]),
            ("down.weight", [d, 4 * d]),
            ("lm_head.weight", [v, d]),
        ];
        let var = |(i, (name, shape)): (usize, &(&str, [usize; 2]))| {
            let t = (tensor(i as u64 + 1, shape, DType::F32) * 0.3).unwrap().to_device(device).unwrap();
            ((*name).to_owned(), Var::from_tensor(&t).unwrap())
        };
        Self { vars: shapes.iter().enumerate().map(var).collect() }
    }

    fn loss(&self, step: u64) -> Tensor {
        let (b, t, d) = (16, Self::LEN, Self::WIDTH);
        let w = |name: &str| self.vars.iter().find(|(n, _)| n == name).unwrap().1.as_tensor();
        let device = self.vars[0].1.device();
        let noise = noise(step + 1, b * t);
        let token = |x: f32| (x.mul_add(0.5, 0.5) * Self::VOCAB as f32) as u32 % Self::VOCAB as u32;
        let ids: Vec<u32> = noise.into_iter().map(token).collect();
        let targets: Vec<u32> = ids.chunks(t).map(|ids| ids[t - 2]).collect();
        let ids = Tensor::from_vec(ids, b * t, device).unwrap();
        let x = w("embed.weight").index_select(&ids, 0).unwrap().reshape((b, t, d)).unwrap();
        let x = x.broadcast_add(w("positions.embed")).unwrap();
        let linear = |x: &Tensor, name: &str| x.broadcast_matmul(&w(name).t().unwrap()).unwrap();
        let (q, k, v) = (linear(&x, "q.weight"), linear(&x, "k.weight"), linear(&x, "v.weight"));
        let scores = (q.matmul(&k.t().unwrap()).unwrap() / (d as f64).sqrt()).unwrap(); // (b, t, t)
        let x = (&x + candle_nn::ops::softmax(&scores, 2).unwrap().matmul(&v).unwrap()).unwrap();
        let x = (&x + linear(&linear(&x, "up.weight").gelu().unwrap(), "down.weight")).unwrap();
        let last = x.narrow(1, t - 1, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap(); // (b, d)
        let logits = last.matmul(&w("lm_head.weight").t().unwrap()).unwrap();
        candle_nn::loss::cross_entropy(&logits, &Tensor::from_vec(targets, b, device).unwrap()).unwrap()
    }

    /// Trains with a rule of [`rules`]; returns the loss before and after.
    pub fn train(&self, name: &str, config: VelvetConfig, steps: u64) -> (f64, f64) {
        let lr = match name {
            name if name.starts_with("sgd") => 0.3,
            name if name.starts_with("lion") => 0.003,
            name if name.starts_with("orthogonal") => 0.05,
            _ => 0.01,
        };
        let config = VelvetConfig { weight_decay: 0.01, ..config.with_lr(lr) };
        let mut opt = Velvet::named(self.vars.clone(), config).unwrap();
        let first = scalar(&self.loss(1_000_000)).unwrap();
        for step in 0..steps {
            opt.set_learning_rate(lr * (1.0 - step as f64 / steps as f64));
            opt.backward_step(&self.loss(step)).unwrap();
            assert_eq!(opt.missing_gradients(), [""; 0], "{name}");
        }
        (first, scalar(&self.loss(1_000_000)).unwrap())
    }
}
