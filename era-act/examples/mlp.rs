//! A plain candle-nn MLP whose activation is swapped: one line of the model changes.
//!
//!     cargo run --release -p era-act --example mlp

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use era_act::{Activation, Era, LearnedEra};

/// Two layers with an activation between them; `act` was a `candle_nn::Activation`.
struct Mlp {
    up: Linear,
    act: Box<dyn Module>,
    down: Linear,
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&self.act.forward(&self.up.forward(x)?)?)
    }
}

/// Points on two spirals, (n, 2), and which of them each lies on, (n).
fn spirals(n: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let (mut points, mut labels) = (Vec::with_capacity(2 * n), Vec::with_capacity(n));
    for i in 0..n {
        let arm = i % 2;
        let radius = 0.15 + 0.85 * i as f32 / n as f32;
        let angle = 7.0 * radius + arm as f32 * std::f32::consts::PI;
        points.extend([radius * angle.cos(), radius * angle.sin()]);
        labels.push(arm as u32);
    }
    Ok((Tensor::from_vec(points, (n, 2), device)?, Tensor::from_vec(labels, n, device)?))
}

/// First weights that are the same for every activation.
fn layer(inputs: usize, outputs: usize, vb: &VarBuilder<'_>) -> Result<Linear> {
    let weight = vb.get((outputs, inputs), "weight")?;
    let bound = 1.0 / (inputs as f32).sqrt();
    let values: Vec<f32> = (0..(inputs * outputs) as u32)
        .map(|i| bound * (f64::from(i.wrapping_mul(2_654_435_761)) / f64::from(1u32 << 31) - 1.0) as f32)
        .collect();
    candle_core::Var::from_tensor(&weight)?.set(&Tensor::from_vec(
        values,
        (outputs, inputs),
        vb.device(),
    )?)?;
    Ok(Linear::new(weight, Some(vb.get(outputs, "bias")?)))
}

fn train(name: &str, act: impl FnOnce(VarBuilder<'_>) -> Result<Box<dyn Module>>) -> Result<()> {
    let device = Device::Cpu;
    let (x, labels) = spirals(400, &device)?;
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
    let model =
        Mlp { up: layer(2, 32, &vb.pp("up"))?, act: act(vb.pp("act"))?, down: layer(32, 2, &vb.pp("down"))? };
    let parameters = ParamsAdamW { lr: 0.03, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), parameters)?;
    for _ in 0..400 {
        let loss = candle_nn::loss::cross_entropy(&model.forward(&x)?, &labels)?;
        optimizer.backward_step(&loss)?;
    }
    let logits = model.forward(&x)?;
    let loss = candle_nn::loss::cross_entropy(&logits, &labels)?.to_scalar::<f32>()?;
    let right = logits.argmax(1)?.eq(&labels)?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
    println!("{name:28} loss {loss:.4}, {:.1} % right", 100.0 * right);
    Ok(())
}

fn main() -> Result<()> {
    train("candle_nn::Activation::Silu", |_| Ok(Box::new(candle_nn::Activation::Silu)))?;
    train("Activation::Silu", |_| Ok(Box::new(Activation::try_from(candle_nn::Activation::Silu)?)))?;
    train("Era::default()", |_| Ok(Box::new(Era::default())))?;
    train("Era::gelu_softplus()", |_| Ok(Box::new(Era::gelu_softplus())))?;
    train("LearnedEra", |vb| Ok(Box::new(LearnedEra::new(Era::default(), vb)?)))
}
