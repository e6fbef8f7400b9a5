//! Where gradients go, and that they are right.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Optimizer, SGD};
use common::{assert_slopes, awake, base, largest_difference, noise, values};
use flylora::{
    Adapter, AdapterLinear, DoraAdapter, FrozenLinear, LoraConfig, LoraEmbedding, LoraLinear, Place,
};

#[test]
fn gradients_of_the_input_and_the_adapter_equal_central_differences() {
    for bias in [false, true] {
        let layer = awake(7, 5, DType::F64, bias);
        let x = Var::from_tensor(&noise(&[2, 3, 7], 1.0, DType::F64, 20)).unwrap();
        let weights = noise(&[2, 3, 5], 1.0, DType::F64, 21);
        // Not linear in the output, so that the gradient that arrives is not a constant.
        let loss = || (layer.forward(&x).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
        let grads = loss().backward().unwrap();
        for (name, var) in [("x", &x), ("A", layer.adapter().a()), ("B", layer.adapter().b())] {
            assert_slopes(name, grads.get(var), var, loss, 1e-8);
        }
    }
}

#[test]
fn every_trainable_has_a_gradient_and_nothing_else_has() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        // Weights that are variables themselves: even so they get nothing.
        let weight = Var::from_tensor(&noise(&[6, 10], 0.3, dtype, 22)).unwrap();
        let bias = Var::from_tensor(&noise(&[6], 0.3, dtype, 23)).unwrap();
        let linear = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
        let layer = LoraLinear::seeded(linear, &LoraConfig::default().with_r(2), "layer").unwrap();
        common::wake(layer.adapter(), 24);
        let x = Var::from_tensor(&noise(&[4, 10], 1.0, dtype, 25)).unwrap();
        let grads = layer.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in layer.parameters() {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert!(grad.dims() == var.dims() && values(grad).iter().all(|v| v.is_finite()));
            assert!(values(grad).iter().any(|v| *v != 0.0), "{name} in {dtype:?}");
        }
        assert!(grads.get(&x).is_some());
        for frozen in [
            weight.as_tensor(),
            bias.as_tensor(),
            &layer.base().weight().unwrap(),
            layer.base().bias().unwrap(),
        ] {
            assert!(grads.get(frozen).is_none());
        }
        // No tensor of the weight's size was made under any name.
        assert!(grads.get_ids().all(|id| grads.get_id(*id).unwrap().elem_count() != weight.elem_count()));
    }
}

#[test]
fn a_new_adapter_gets_its_first_gradient_through_b() {
    let layer = LoraLinear::seeded(base(10, 6, DType::F32, false), &LoraConfig::default().with_r(2), "layer")
        .unwrap();
    let x = noise(&[4, 10], 1.0, DType::F32, 26);
    let grads = layer.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(layer.adapter().b()).unwrap()).iter().all(|v| *v != 0.0));
    // A's is there too, and 0 as long as B is.
    assert!(values(grads.get(layer.adapter().a()).unwrap()).iter().all(|v| *v == 0.0));
}

#[test]
fn three_steps_of_descent_move_the_adapter_alone_and_lower_the_loss() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let weight = Var::from_tensor(&noise(&[6, 10], 0.3, dtype, 27)).unwrap();
        let bias = Var::from_tensor(&noise(&[6], 0.3, dtype, 28)).unwrap();
        let linear = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
        let layer = LoraLinear::seeded(linear, &LoraConfig::default().with_r(3), "layer").unwrap();
        let frozen = (values(&weight), values(&bias));
        let start: Vec<Vec<f64>> = layer.vars().iter().map(|v| values(v)).collect();
        let x = noise(&[16, 10], 1.0, dtype, 29);
        let target = noise(&[16, 6], 1.0, dtype, 30);
        let loss = || layer.forward(&x).unwrap().sub(&target).unwrap().sqr().unwrap().mean_all().unwrap();
        let mut sgd = SGD::new(layer.vars(), 0.5).unwrap();
        let first = values(&loss())[0];
        for _ in 0..3 {
            sgd.backward_step(&loss()).unwrap();
        }
        assert!(values(&loss())[0] < first);
        for (start, var) in start.iter().zip(layer.vars()) {
            assert_ne!(start, &values(&var));
        }
        assert_eq!(frozen, (values(&weight), values(&bias)));
    }
}

#[test]
fn a_merged_layer_passes_the_gradient_on_to_its_input() {
    let mut layer = awake(7, 5, DType::F64, true);
    let x = Var::from_tensor(&noise(&[3, 7], 1.0, DType::F64, 31)).unwrap();
    let gradient = |layer: &LoraLinear| {
        let grads = layer.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        (values(grads.get(&x).unwrap()), grads.get(layer.adapter().a()).is_some())
    };
    let (want, reached) = gradient(&layer);
    assert!(reached);
    layer.merge().unwrap();
    let (got, reached) = gradient(&layer);
    assert!(!reached);
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 1e-12 * (1.0 + want.abs()));
    }
}

#[test]
fn gradients_go_through_a_stack_of_layers_and_strided_inputs() {
    let first = awake(6, 8, DType::F64, true);
    let second = FrozenLinear::new(noise(&[4, 8], 0.4, DType::F64, 32), None).unwrap();
    let x = Var::from_tensor(&noise(&[6, 5], 1.0, DType::F64, 33)).unwrap();
    let run = |x: &Tensor| second.forward(&first.forward(&x.t().unwrap()).unwrap().tanh().unwrap()).unwrap();
    let grads = run(&x).sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let loss = || run(&x).sqr().unwrap().sum_all().unwrap();
    assert_slopes("x", grads.get(&x), &x, loss, 1e-8);
    assert!(grads.get(first.adapter().a()).is_some());
}

#[test]
fn an_empty_batch_goes_backward_with_an_empty_gradient() {
    let layer = awake(7, 5, DType::F32, true);
    let x = Var::from_tensor(&noise(&[0, 7], 1.0, DType::F32, 34)).unwrap();
    let grads = layer.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().dims(), [0, 7]);
}

#[test]
fn doras_gradients_are_right_where_rows_are_many_and_where_a_magnitude_is_zero() {
    let frozen = FrozenLinear::try_from(&base(7, 5, DType::F64, true)).unwrap();
    let config = LoraConfig::default().with_r(2).with_alpha(3.0);
    let place = Place::alone("layer", DType::F64, &Device::Cpu);
    let adapter = DoraAdapter::over(&frozen, &config, &place).unwrap();
    common::wake(adapter.lora(), 40);
    let mut magnitudes = values(adapter.magnitude());
    magnitudes[3] = 0.0;
    adapter.magnitude().set(&Tensor::new(magnitudes, &Device::Cpu).unwrap()).unwrap();
    let layer = AdapterLinear::from_parts(frozen, adapter).unwrap();
    for rows in [2, 60] {
        let x = Var::from_tensor(&noise(&[rows, 7], 1.0, DType::F64, 41)).unwrap();
        let weights = noise(&[rows, 5], 1.0, DType::F64, 42);
        let loss = || (layer.forward(&x).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
        let grads = loss().backward().unwrap();
        for (name, var) in [("x", &x), ("m", layer.adapter().magnitude())] {
            assert_slopes(&format!("{name}, {rows} rows"), grads.get(var), var, loss, 1e-7);
        }
        // The norm counts as a constant: then the factors' gradients are those of the two ways to the same layer.
        let y = (layer.base().forward(&x).unwrap() + layer.adapter().delta(&x).unwrap()).unwrap();
        let other = (y.sqr().unwrap() * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in layer.parameters() {
            for (a, b) in values(grads.get(&var).unwrap()).into_iter().zip(values(other.get(&var).unwrap())) {
                assert!((a - b).abs() < 1e-9 * (1.0 + b.abs()), "{name}, {rows} rows: {a} and {b}");
            }
        }
    }
}

#[test]
fn an_embedding_of_dora_has_the_gradients_of_its_loss_where_the_norm_is_constant() {
    let table = noise(&[9, 5], 0.6, DType::F64, 50);
    let place = Place::alone("embed", DType::F64, &Device::Cpu);
    let config = LoraConfig::default().with_r(3).with_alpha(4.0);
    let mut embedding = LoraEmbedding::dora(table.clone(), &config, &place).unwrap();
    let ids = Tensor::new(&[[1u32, 8, 1], [0, 4, 4]], &Device::Cpu).unwrap();
    let plain = table.index_select(&ids.flatten_all().unwrap(), 0).unwrap().reshape((2, 3, 5)).unwrap();
    assert!(largest_difference(&embedding.forward(&ids).unwrap(), &plain) < 1e-12, "a new one adds nothing");
    embedding.a().set(&noise(&[3, 9], 0.5, DType::F64, 51)).unwrap();
    let weights = noise(&[2, 3, 5], 1.0, DType::F64, 52);
    let loss =
        |e: &LoraEmbedding| (e.forward(&ids).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
    let grads = loss(&embedding).backward().unwrap();
    let parameters = embedding.parameters();
    assert_eq!(parameters.len(), 3);
    flylora::audit(parameters.clone(), &grads).unwrap();
    let (_, magnitude) = parameters.last().unwrap();
    assert_slopes("m", grads.get(magnitude), magnitude, || loss(&embedding), 1e-8);
    // The factors' gradients are those of the change times the ratio, which does not move with them.
    let (a, b) = (Var::from_tensor(embedding.a()).unwrap(), Var::from_tensor(embedding.b()).unwrap());
    let changed = |a: &Tensor, b: &Tensor| {
        (&table + (a.t().unwrap() * (4.0 / 3.0)).unwrap().matmul(&b.t().unwrap()).unwrap()).unwrap()
    };
    let norms = changed(&a.detach(), &b.detach()).sqr().unwrap().sum(0).unwrap().sqrt().unwrap();
    let ratio = (magnitude.as_detached_tensor() / norms).unwrap();
    let y =
        changed(&a, &b).broadcast_mul(&ratio).unwrap().index_select(&ids.flatten_all().unwrap(), 0).unwrap();
    let y = y.reshape((2, 3, 5)).unwrap();
    assert!(largest_difference(&embedding.forward(&ids).unwrap(), &y) < 1e-12);
    let want = (y.sqr().unwrap() * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(largest_difference(grads.get(embedding.a()).unwrap(), want.get(&a).unwrap()) < 1e-12);
    assert!(largest_difference(grads.get(embedding.b()).unwrap(), want.get(&b).unwrap()) < 1e-12);
    let before = embedding.forward(&ids).unwrap();
    embedding.merge().unwrap();
    assert!(largest_difference(&embedding.forward(&ids).unwrap(), &before) < 1e-12);
}
