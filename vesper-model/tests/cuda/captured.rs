//! Steps that are replayed as CUDA graphs.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;
use velvet_optim::{Optimizer, Velvet, VelvetConfig};
use vesper_model::ops::{CapturedStep, cuda_device};
use vesper_model::{Activations, VesperConfig, VesperLM, trainable};

use crate::common::{brief, gpu, ids};

/// A device of its own: a recording takes in whatever any thread sends to its stream.
fn device(name: &str) -> Option<(std::sync::MutexGuard<'static, ()>, Device)> {
    gpu(name).map(|(lock, _)| (lock, cuda_device(0).unwrap()))
}

struct Training {
    model: VesperLM,
    optimizer: Velvet,
    varmap: VarMap,
}

fn training(device: &Device, compute: DType, activations: Activations) -> Training {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(300).with_kv_heads(2);
    if brief() {
        config.num_hidden_layers = 1;
    }
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config, &varmap, 42, DType::F32, device).unwrap();
    let model = model.with_compute_dtype(compute).with_activations(activations);
    let settings = VelvetConfig::language_model(300).with_lr(1e-3);
    let optimizer = Velvet::named(trainable(&config, &varmap).unwrap(), settings).unwrap();
    Training { model, optimizer, varmap }
}

fn step(training: &mut Training, batch: &[Tensor]) -> Result<Tensor> {
    let loss = training.model.loss(&batch[0], &batch[1])?.loss;
    training.optimizer.backward_step(&loss)?;
    Ok(loss)
}

/// Batches of 3 x 40, and one of another shape.
fn batches(device: &Device) -> Vec<[Tensor; 2]> {
    (0..if brief() { 4 } else { 9u32 })
        .map(|i| {
            let t = if i == 6 { 24 } else { 40 };
            let rows = ids(3 * (t + 1) + i as usize, 290).narrow(0, i as usize, 3 * (t + 1)).unwrap();
            let rows = rows.reshape((3, t + 1)).unwrap().to_device(device).unwrap();
            [rows.narrow(1, 0, t).unwrap(), rows.narrow(1, 1, t).unwrap().contiguous().unwrap()]
        })
        .collect()
}

fn all_bits(varmap: &VarMap) -> Vec<(String, Vec<u32>)> {
    let data = varmap.data().lock().unwrap();
    let mut all: Vec<_> = data
        .iter()
        .map(|(name, var)| {
            let values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            (name.clone(), values.into_iter().map(f32::to_bits).collect())
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_replayed_training_gives_the_bits_of_the_steps() {
    let Some((_lock, device)) = device("a_replayed_training_gives_the_bits_of_the_steps") else { return };
    let computes = if brief() { &[DType::BF16][..] } else { &[DType::F32, DType::BF16] };
    for &compute in computes {
        let all = [Activations::Keep, Activations::Recompute];
        for activations in all.into_iter().take(if brief() { 1 } else { 2 }) {
            let lr = |i: usize| 1e-3 / (1 + i) as f64;
            let mut eager = training(&device, compute, activations);
            let mut expected = Vec::new();
            for (i, batch) in batches(&device).iter().enumerate() {
                eager.optimizer.set_learning_rate(lr(i));
                let loss = step(&mut eager, batch).unwrap();
                expected.push(loss.to_scalar::<f32>().unwrap().to_bits());
            }
            let mut captured = CapturedStep::new(training(&device, compute, activations), step);
            let mut losses = Vec::new();
            for (i, [inputs, targets]) in batches(&device).iter().enumerate() {
                captured.state_mut().optimizer.set_learning_rate(lr(i));
                let loss = captured.run(&[inputs, targets]).unwrap();
                losses.push(loss.to_scalar::<f32>().unwrap().to_bits());
                assert_eq!(captured.is_recorded(), i >= 2);
            }
            assert_eq!(losses, expected, "{compute:?} {activations:?}");
            let replayed = captured.into_state();
            assert!(all_bits(&replayed.varmap) == all_bits(&eager.varmap), "{compute:?} {activations:?}");
            assert_eq!(replayed.optimizer.stats().unwrap(), eager.optimizer.stats().unwrap());
        }
    }
}

#[test]
fn a_step_that_reads_back_is_an_error_and_the_device_goes_on() {
    let name = "a_step_that_reads_back_is_an_error_and_the_device_goes_on";
    let Some((_lock, device)) = device(name) else { return };
    let total = Var::zeros(3, DType::F32, &device).unwrap();
    let mut reading = CapturedStep::new(total.clone(), |total: &mut Var, x: &[Tensor]| {
        total.set(&(total.as_tensor() + &x[0])?)?;
        let sum = total.sum_all()?;
        sum.to_scalar::<f32>()?;
        Ok(sum)
    });
    let x = Tensor::new(&[1f32, 2., 3.], &device).unwrap();
    for expected in [6f32, 12.] {
        assert_eq!(reading.run(&[&x]).unwrap().to_scalar::<f32>().unwrap(), expected);
    }
    let error = reading.run(&[&x]).unwrap_err().to_string();
    assert!(error.contains("cannot be recorded") && error.contains("read"), "{error}");
    assert!(!reading.is_recorded());
    assert_eq!(total.to_vec1::<f32>().unwrap(), [2., 4., 6.]);

    let mut summing = CapturedStep::new((), |(), x: &[Tensor]| x[0].sum_all());
    for i in 1..6 {
        let sum = summing.run(&[&(&x * f64::from(i)).unwrap()]).unwrap();
        assert_eq!(sum.to_scalar::<f32>().unwrap(), 6.0 * i as f32);
    }
    // Another thread replays; a recording begins anew where the thread changes before it.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(summing.run(&[&x]).unwrap().to_scalar::<f32>().unwrap(), 6.0);
            summing.reset();
            summing.run(&[&x]).unwrap();
        });
    });
    for recorded in [false, false, true] {
        assert_eq!(summing.run(&[&x]).unwrap().to_scalar::<f32>().unwrap(), 6.0);
        assert_eq!(summing.is_recorded(), recorded);
    }
    summing.reset();
    assert!(!summing.is_recorded());
    let longer = Tensor::new(&[1f32, 2., 3., 4.], &device).unwrap();
    for _ in 0..4 {
        assert_eq!(summing.run(&[&longer]).unwrap().to_scalar::<f32>().unwrap(), 10.0);
    }
    assert!(summing.is_recorded());
}
