//! Every rule against PyTorch, or against its formula written out in PyTorch; `golden/rules.py` made the values.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::store;
use serde::Deserialize;
use velvet_optim::{
    BackendChoice, CautiousUpdate, DecayMode, Lion, Momentum, Orthogonal, RowMoment, Rule, Sgd, Velvet,
    VelvetConfig,
};

#[derive(Deserialize)]
struct Golden {
    shapes: Vec<Vec<usize>>,
    steps: u64,
    checkpoints: Vec<u64>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    rule: String,
    which: Vec<usize>,
    config: Config,
    /// Of cases that were computed in bf16.
    tolerance: Option<Vec<Vec<f64>>>,
    float64: Vec<Vec<Vec<f64>>>,
    float32: Vec<Vec<Vec<f64>>>,
}

#[derive(Deserialize)]
struct Config {
    lr: f64,
    weight_decay: f64,
    #[serde(default)]
    nesterov: bool,
    momentum: Option<f64>,
    beta1: Option<f64>,
    beta2: Option<f64>,
    eps: Option<f64>,
    #[serde(default)]
    cautious_update: bool,
    #[serde(default)]
    cautious_decay: bool,
    ns_steps: Option<usize>,
    coefficients: Option<[f64; 3]>,
    row_beta2: Option<f64>,
}

impl Case {
    fn config(&self) -> VelvetConfig {
        let c = &self.config;
        let form = if c.nesterov { Momentum::Nesterov } else { Momentum::Averaged };
        let base = VelvetConfig {
            lr: c.lr,
            weight_decay: c.weight_decay,
            decay_mode: if c.cautious_decay { DecayMode::Cautious } else { DecayMode::Always },
            ..VelvetConfig::default()
        };
        match self.rule.as_str() {
            "sgd" => base.with_rule(Rule::Sgd(Sgd { momentum: c.momentum.unwrap(), form })),
            "lion" => base.with_rule(Rule::Lion(Lion { beta1: c.beta1.unwrap(), beta2: c.beta2.unwrap() })),
            "adamw" => VelvetConfig {
                beta1: c.beta1.unwrap(),
                beta2: c.beta2.unwrap(),
                eps: c.eps.unwrap(),
                momentum: form,
                cautious_update: if c.cautious_update {
                    CautiousUpdate::Aligned
                } else {
                    CautiousUpdate::Off
                },
                ..base
            },
            "orthogonal" => base.with_rule(Rule::Orthogonal(Orthogonal {
                momentum: c.momentum.unwrap(),
                form,
                steps: c.ns_steps.unwrap(),
                coefficients: c.coefficients.unwrap(),
                row_moment: c.row_beta2.map_or(RowMoment::Off, |decay| RowMoment::Average { decay }),
                ..Orthogonal::default()
            })),
            other => panic!("{other}"),
        }
    }
}

fn parameter(k: usize, shape: &[usize], dtype: DType) -> Var {
    let value = |i: usize| {
        let sign = if (i + k).is_multiple_of(2) { 1.0 } else { -1.0 };
        sign * (0.5 + ((i * 37 + k * 11) % 512) as f64 / 512.0)
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
    let t = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    Var::from_tensor(&t).unwrap()
}

fn gradient(k: usize, shape: &[usize], step: u64, dtype: DType) -> Tensor {
    let scale = 0.5f64.powi((step % 5) as i32);
    let value = |i: usize| {
        let mut h = 2_654_435_761u32
            .wrapping_mul(i as u32)
            .wrapping_add(2_246_822_519u32.wrapping_mul(step as u32))
            .wrapping_add(3_266_489_917u32.wrapping_mul(k as u32));
        h ^= h >> 15;
        h = h.wrapping_mul(2_246_822_519);
        h ^= h >> 13;
        (f64::from(h % 2001) - 1000.0) / 1024.0 * scale
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn agrees(backend: BackendChoice) {
    let golden: Golden = serde_json::from_str(include_str!("golden/rules.json")).unwrap();
    assert!(golden.cases.len() >= 18 && golden.steps == 50);
    for case in &golden.cases {
        for (dtype, expected) in [(DType::F64, &case.float64), (DType::F32, &case.float32)] {
            let vars: Vec<(usize, Var)> =
                case.which.iter().map(|&k| (k, parameter(k, &golden.shapes[k], dtype))).collect();
            let start: Vec<Vec<f64>> = vars.iter().map(|(_, var)| values(var)).collect();
            let named = vars.iter().map(|(k, var)| (format!("p{k}"), var.clone())).collect();
            let mut opt = Velvet::named(named, case.config().with_backend(backend)).unwrap();
            for step in 1..=golden.steps {
                let grads = vars.iter().map(|(k, var)| (var, gradient(*k, var.dims(), step, dtype)));
                opt.try_step(&store(grads)).unwrap();
                let Some(at) = golden.checkpoints.iter().position(|&checkpoint| checkpoint == step) else {
                    continue;
                };
                for (i, (k, var)) in vars.iter().enumerate() {
                    let (got, expected) = (values(var), &expected[at][i]);
                    let moved = norm(expected.iter().zip(&start[i]).map(|(a, b)| a - b));
                    let mut error = norm(got.iter().zip(expected).map(|(a, b)| a - b));
                    if dtype == DType::F32 {
                        // Each step rounds the parameter once in each implementation, in random directions.
                        let rounding = norm(expected.iter().copied()) * 6e-8 * (step as f64).sqrt();
                        error = (error - 2.0 * rounding).max(0.0);
                    }
                    let error = error / moved;
                    let tolerance = match (&case.tolerance, dtype, case.rule.as_str()) {
                        (Some(tolerance), ..) => tolerance[at][i],
                        (None, DType::F64, _) => 1e-11,
                        (None, _, "orthogonal") => 2e-5,
                        (None, ..) => 2e-6,
                    };
                    assert!(
                        error <= tolerance,
                        "{}, {dtype:?}: p{k} after {step} steps is off by {error}",
                        case.name
                    );
                }
            }
        }
    }
}

#[test]
fn the_fused_pass_agrees_with_pytorch() {
    agrees(BackendChoice::Auto);
}

#[test]
fn the_reference_agrees_with_pytorch() {
    agrees(BackendChoice::Plain);
}
