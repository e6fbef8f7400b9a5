use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, TensorId, Var};
use candle_nn::VarMap;
use rayon::prelude::*;
use vesper_model::ops::{Path, backward, checkpoint, embedding, linear, rms_norm};
use vesper_model::{Activations, VesperConfig, VesperLM};

use crate::common::{error, random};

fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&random(seed, shape)).unwrap()
}

/// The values, where -0 is 0.
fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    x.into_iter().map(|x| x + 0.0).collect()
}

/// Both passes give the same gradients to the same tensors.
fn same(loss: &Tensor, vars: &[Var]) {
    let (ours, candles) = (backward(loss).unwrap(), loss.backward().unwrap());
    let ids = |grads: &GradStore| grads.get_ids().copied().collect::<HashSet<TensorId>>();
    assert_eq!(ids(&ours), ids(&candles));
    let mut reached = 0;
    for var in vars {
        let Some(gradient) = candles.get(var) else { continue };
        let ours = ours.get(var).unwrap();
        assert_eq!((ours.dtype(), ours.dims()), (gradient.dtype(), gradient.dims()));
        assert_eq!(values(ours), values(gradient));
        reached += 1;
    }
    assert!(reached > 0);
}

#[test]
fn a_model_gets_the_gradients_of_candles_pass() {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(300);
    config.num_hidden_layers = 2;
    let ids = Tensor::arange(0u32, 60, &Device::Cpu).unwrap().reshape((2, 30)).unwrap();
    for tied in [true, false] {
        config.tie_word_embeddings = tied;
        for compute in [DType::F32, DType::BF16] {
            for path in [Path::Fused, Path::Reference] {
                for activations in [Activations::Keep, Activations::Recompute] {
                    let varmap = VarMap::new();
                    let model = VesperLM::initialize(&config, &varmap, 1, DType::F32, &Device::Cpu).unwrap();
                    let model = model.with_compute_dtype(compute).with_path(path);
                    let model = model.with_activations(activations);
                    let loss = model.loss(&ids, &ids).unwrap().loss;
                    let vars = varmap.all_vars();
                    same(&loss, &vars);
                    let grads = backward(&loss).unwrap();
                    assert!(
                        vars.iter().all(|var| grads.get(var).is_some()),
                        "a parameter without a gradient"
                    );
                }
            }
        }
    }
}

#[test]
fn a_variable_that_is_used_often_gets_the_sum() {
    let (x, w) = (var(1, &[5, 8]), var(2, &[8, 8]));
    let (h, v) = (x.as_tensor(), w.as_tensor());
    let once = linear(h, v, Path::Fused).unwrap();
    same(&once.sum_all().unwrap(), &[x.clone(), w.clone()]);
    // By this crate's operations and by candle's, as itself and as a view, inside and outside of a checkpoint.
    let twice = linear(&once, v, Path::Fused).unwrap().matmul(v).unwrap();
    let view = linear(&twice, &v.t().unwrap(), Path::Fused).unwrap();
    let captured = v.clone();
    let all = checkpoint(move |xs| linear(&xs[0], &captured, Path::Fused), &[&view]).unwrap();
    let loss = all.sqr().unwrap().sum_all().unwrap();
    let (ours, candles) = (backward(&loss).unwrap(), loss.backward().unwrap());
    for var in [x, w] {
        // In another order: within the rounding of f64.
        assert!(error(ours.get(&var).unwrap(), candles.get(&var).unwrap()) < 1e-14);
    }
}

#[test]
fn tensors_that_are_no_variables_keep_their_gradients() {
    let (x, w) = (var(1, &[5, 8]), var(2, &[8]));
    let doubled = (w.as_tensor() * 2.0).unwrap();
    let loss =
        rms_norm(x.as_tensor(), &doubled, 1e-5, Path::Fused).unwrap().sqr().unwrap().sum_all().unwrap();
    same(&loss, &[x, w]);
}

#[test]
fn passes_do_not_mix() {
    // What an operation delivers to one pass is not in the next, nor in candle's own.
    let table = var(1, &[4, 3]);
    let ids = Tensor::new(&[1u32, 1, 2], &Device::Cpu).unwrap();
    let loss = embedding(table.as_tensor(), &ids, Path::Fused).unwrap().sum_all().unwrap();
    let wanted = [0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0];
    for _ in 0..2 {
        assert_eq!(values(backward(&loss).unwrap().get(&table).unwrap()), wanted);
        assert_eq!(values(loss.backward().unwrap().get(&table).unwrap()), wanted);
    }
}

/// An operation whose backward fails, or panics.
struct Fails {
    panics: bool,
}

impl CustomOp1 for Fails {
    fn name(&self) -> &'static str {
        "fails"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        assert!(!self.panics, "on purpose");
        candle_core::bail!("on purpose")
    }
}

#[test]
fn a_pass_that_fails_leaves_nothing_behind() {
    let (x, w) = (var(1, &[5, 8]), var(2, &[8, 8]));
    for panics in [false, true] {
        let before = (x.as_tensor() * 1.0).unwrap().apply_op1(Fails { panics }).unwrap();
        let broken = linear(&before, w.as_tensor(), Path::Fused).unwrap().sum_all().unwrap();
        match catch_unwind(AssertUnwindSafe(|| backward(&broken))) {
            Ok(result) => assert!(!panics && result.unwrap_err().to_string().contains("on purpose")),
            Err(_) => assert!(panics),
        }
        let loss = linear(x.as_tensor(), w.as_tensor(), Path::Fused).unwrap().sum_all().unwrap();
        // Were the failed pass still open, candle's own would miss the gradient of w.
        assert!(loss.backward().unwrap().get(&w).is_some());
        same(&loss, &[x.clone(), w.clone()]);
    }
}

#[test]
fn passes_in_one_pool_of_threads_keep_apart() {
    // A thread that waits for its part of one pass takes up another in between.
    let run = |seed: u64| {
        let (x, w, norm) = (random(seed, &[700, 40]), var(seed + 100, &[40, 40]), var(seed + 200, &[40]));
        let layer = {
            let w = w.as_tensor().clone();
            move |x: &[Tensor]| linear(&x[0], &w, Path::Fused)
        };
        let y = checkpoint(layer, &[&rms_norm(&x, norm.as_tensor(), 1e-5, Path::Fused).unwrap()]).unwrap();
        let grads = backward(&y.sqr().unwrap().sum_all().unwrap()).unwrap();
        [values(grads.get(&w).unwrap()), values(grads.get(&norm).unwrap())]
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let got: Vec<_> = pool.install(|| (0..24).into_par_iter().map(run).collect());
    for (seed, got) in got.into_iter().enumerate() {
        assert!(got == run(seed as u64), "{seed}");
    }
}
