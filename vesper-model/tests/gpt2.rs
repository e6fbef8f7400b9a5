//! The model of examples/gpt2: with three lines replaced by the operations it computes the same.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../examples/gpt2/model.rs"]
mod model;

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use model::{Gpt2, Gpt2Config, Lines, initialize};

const CONFIG: Gpt2Config = Gpt2Config { vocab: 50, positions: 20, hidden: 24, layers: 2, heads: 3 };

fn batch() -> (Tensor, Tensor) {
    let rows: Vec<u32> = (0..4 * 18u32).map(|i| i.wrapping_mul(2_654_435_761) % 50).collect();
    let rows = Tensor::from_vec(rows, (4, 18), &Device::Cpu).unwrap();
    (rows.narrow(1, 0, 17).unwrap().contiguous().unwrap(), rows.narrow(1, 1, 17).unwrap())
}

fn model(lines: Lines) -> (Gpt2, VarMap) {
    let varmap = VarMap::new();
    let model =
        Gpt2::new(CONFIG, lines, &VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu)).unwrap();
    initialize(&varmap, &Device::Cpu).unwrap();
    (model, varmap)
}

#[test]
fn both_ways_have_the_same_losses_while_they_train() {
    let (ids, targets) = batch();
    let run = |lines| -> Vec<f32> {
        let (model, varmap) = model(lines);
        let mut optimizer = AdamW::new_lr(varmap.all_vars(), 3e-3).unwrap();
        (0..30)
            .map(|_| {
                let loss = model.loss(&ids, &targets).unwrap();
                optimizer.backward_step(&loss).unwrap();
                loss.to_scalar::<f32>().unwrap()
            })
            .collect()
    };
    let (plain, ops) = (run(Lines::Plain), run(Lines::Ops));
    assert!(plain[29] < plain[0] - 0.5, "{plain:?}");
    for (a, b) in plain.iter().zip(&ops) {
        assert!((a - b).abs() < 1e-3, "{plain:?}\n{ops:?}");
    }
}

#[test]
fn every_variable_gets_the_same_gradient() {
    let (ids, targets) = batch();
    let ((plain, plain_vars), (ops, ops_vars)) = (model(Lines::Plain), model(Lines::Ops));
    let plain = plain.loss(&ids, &targets).unwrap().backward().unwrap();
    let ops = ops.loss(&ids, &targets).unwrap().backward().unwrap();
    let (plain_vars, ops_vars) = (plain_vars.data().lock().unwrap(), ops_vars.data().lock().unwrap());
    assert_eq!(plain_vars.len(), 28);
    for (name, var) in plain_vars.iter() {
        let (a, b) = (plain.get(var).unwrap(), ops.get(&ops_vars[name]).unwrap());
        let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert!(norm(&(a - b).unwrap()) <= 1e-5 * norm(a) + 1e-7, "{name}");
    }
}
