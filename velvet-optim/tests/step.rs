//! What a step does and what it leaves alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, ParamsAdamW, VarBuilder, VarMap};
use common::{all_bits, bits, config, empty_store, record_warnings, scalar, store, tensor, var};
use velvet_optim::{
    BackendChoice, EntropyLr, Error, GradClip, MissingGradients, NonFinite, Optimizer, PerplexityMomentum,
    ProgressSignal, Velvet, VelvetConfig, WeightDecayOn,
};

const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Plain];

fn rosenbrock(x: &Var, y: &Var) -> candle_core::Result<Tensor> {
    let valley = (y.as_tensor() - x.sqr()?)?.sqr()?;
    (1.0 - x.as_tensor())?.sqr()? + (valley * 100.0)?
}

#[test]
fn rosenbrock_is_minimised() {
    for (dtype, backend) in [(DType::F32, BACKENDS[0]), (DType::F64, BACKENDS[0]), (DType::F64, BACKENDS[1])]
    {
        let start =
            |x: f64| Var::from_tensor(&Tensor::new(x, &Device::Cpu).unwrap().to_dtype(dtype).unwrap());
        let (x, y) = (start(-1.2).unwrap(), start(1.0).unwrap());
        let config = config().with_lr(0.1).with_weight_decay(0.0, WeightDecayOn::All).with_backend(backend);
        let mut opt = Velvet::new(vec![x.clone(), y.clone()], config).unwrap();
        for step in 0..2000 {
            opt.set_learning_rate(0.1 * (1.0 - f64::from(step) / 2000.0));
            opt.backward_step(&rosenbrock(&x, &y).unwrap()).unwrap();
        }
        let loss = scalar(&rosenbrock(&x, &y).unwrap()).unwrap();
        assert!(loss < 1e-3, "{dtype:?} {backend:?}: {loss}");
    }
}

#[test]
fn moving_from_candles_adamw_is_one_line() {
    fn train<O: Optimizer>(x: &Var, mut opt: O) -> Vec<f32> {
        for _ in 0..30 {
            let loss = x.sqr().unwrap().sum_all().unwrap();
            opt.backward_step(&loss).unwrap();
        }
        x.to_vec1().unwrap()
    }
    let (a, b) = (var(1, &[100], DType::F32), var(1, &[100], DType::F32));
    let candle =
        train(&a, AdamW::new(vec![a.clone()], ParamsAdamW { lr: 0.01, ..Default::default() }).unwrap());
    let velvet =
        train(&b, Velvet::new(vec![b.clone()], VelvetConfig { lr: 0.01, ..Default::default() }).unwrap());
    for (candle, velvet) in candle.iter().zip(&velvet) {
        assert!((candle - velvet).abs() < 2e-6, "{candle} {velvet}");
    }
}

#[test]
fn candles_other_constructors_work() {
    let x = var(1, &[3], DType::F32);
    assert_eq!(Velvet::new_lr(vec![x.clone()], 0.25).unwrap().learning_rate(), 0.25);
    assert_eq!(Velvet::from_slice(&[&x], config()).unwrap().parameters().count(), 1);
    let mut empty = Velvet::empty(config()).unwrap();
    empty.step(&empty_store()).unwrap();
    assert_eq!(empty.stats().unwrap().step, 1);
}

#[test]
fn integer_variables_are_left_out() {
    let ids = Var::from_tensor(&Tensor::new(&[1u32, 2], &Device::Cpu).unwrap()).unwrap();
    let opt = Velvet::new(vec![ids, var(1, &[3], DType::F32)], config()).unwrap();
    let names: Vec<_> = opt.parameters().map(|(name, var)| (name.to_owned(), var.dims().to_vec())).collect();
    assert_eq!(names, [("param.00000".to_owned(), vec![3])]);
}

#[test]
fn a_varmap_gives_names_in_sorted_order() {
    let map = VarMap::new();
    let builder = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    for name in ["z", "a", "m"] {
        builder.get_with_hints((2, 2), name, candle_nn::init::ZERO).unwrap();
    }
    let opt = Velvet::from_varmap(&map, config()).unwrap();
    assert_eq!(opt.parameters().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "m", "z"]);
}

#[test]
fn a_variable_or_name_given_twice_is_refused() {
    let x = var(1, &[3], DType::F32);
    let twice = Velvet::named(vec![("a".into(), x.clone()), ("b".into(), x.clone())], config());
    match twice {
        Err(Error::DuplicateVariable { first, second }) => assert_eq!((&*first, &*second), ("a", "b")),
        other => panic!("{other:?}"),
    }
    let names = Velvet::named(vec![("a".into(), x), ("a".into(), var(2, &[3], DType::F32))], config());
    assert!(matches!(names, Err(Error::DuplicateName { name }) if name == "a"));
}

#[test]
fn an_invalid_configuration_is_refused() {
    let error = Velvet::new(vec![], config().with_lr(f64::NAN)).unwrap_err().to_string();
    assert!(error.contains("the setting `lr`"), "{error}");
}

#[test]
fn a_learning_rate_that_is_not_finite_never_reaches_the_parameters() {
    let x = var(1, &[3], DType::F32);
    let mut opt = Velvet::new(vec![x.clone()], config()).unwrap();
    for lr in [f64::NAN, f64::INFINITY, -0.1] {
        opt.set_learning_rate(lr);
        let error = opt.try_step(&store([(&x, tensor(2, &[3], DType::F32))])).unwrap_err();
        assert!(matches!(error, Error::LearningRate { step: 1, .. }), "{error}");
    }
    assert_eq!(bits(&x), bits(&var(1, &[3], DType::F32)));
}

#[test]
fn weight_decay_can_be_kept_to_matrices() {
    for backend in BACKENDS {
        let (w, b) = (var(1, &[2, 2], DType::F64), var(2, &[2], DType::F64));
        let config =
            config().with_lr(0.5).with_weight_decay(0.1, WeightDecayOn::Matrices).with_backend(backend);
        let mut opt = Velvet::new(vec![w.clone(), b.clone()], config).unwrap();
        let zero = |v: &Var| v.zeros_like().unwrap();
        opt.try_step(&store([(&w, zero(&w)), (&b, zero(&b))])).unwrap();
        assert_eq!(bits(&b), bits(&var(2, &[2], DType::F64)));
        let decayed = (var(1, &[2, 2], DType::F64).as_tensor() * 0.95).unwrap();
        assert_eq!(bits(&w), bits(&decayed));
    }
}

#[test]
fn a_zero_valued_weight_with_a_gradient_trains() {
    let b = Var::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
    let mut opt = Velvet::new(vec![b.clone()], config()).unwrap();
    opt.try_step(&store([(&b, Tensor::ones((4, 2), DType::F32, &Device::Cpu).unwrap())])).unwrap();
    for x in b.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
        assert!((x + 1e-3).abs() < 1e-8);
    }
}

#[test]
fn the_norm_is_that_of_all_gradients_and_the_clip_keeps_it() {
    for backend in BACKENDS {
        let (a, b) = (var(1, &[3], DType::F32), var(2, &[1], DType::F64));
        let config = config().with_clip(GradClip::GlobalNorm(6.5)).with_backend(backend);
        let mut opt = Velvet::new(vec![a.clone(), b.clone()], config).unwrap();
        let grads = store([
            (&a, Tensor::new(&[3f32, 0.0, 4.0], &Device::Cpu).unwrap()),
            (&b, Tensor::new(&[12f64], &Device::Cpu).unwrap()),
        ]);
        opt.try_step(&grads).unwrap();
        let stats = opt.stats().unwrap();
        assert_eq!(stats.grad_norm, Some(13.0));
        assert_eq!(stats.clip_scale, 6.5 / (13.0 + 1e-6));
        // The first moment after one step is (1 - beta1) times the clipped gradient; the store is not written.
        let moment = scalar(&opt.state().unwrap()["param.00001.exp_avg"].squeeze(0).unwrap()).unwrap();
        assert!((moment - 0.1 * 12.0 * stats.clip_scale).abs() < 1e-12);
        assert_eq!(grads.get(&a).unwrap().to_vec1::<f32>().unwrap(), [3.0, 0.0, 4.0]);
    }
}

#[test]
fn the_norm_of_huge_gradients_does_not_overflow() {
    let a = var(1, &[2], DType::F32);
    let mut opt = Velvet::new(vec![a.clone()], config().with_clip(GradClip::GlobalNorm(1.0))).unwrap();
    opt.try_step(&store([(&a, Tensor::new(&[3e38f32, 0.0], &Device::Cpu).unwrap())])).unwrap();
    assert!((opt.stats().unwrap().grad_norm.unwrap() / 3e38 - 1.0).abs() < 1e-6);
    assert!(a.to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()));
}

fn poisoned(a: &Var, b: &Var, bad: f32) -> candle_core::backprop::GradStore {
    let mut grad = vec![0.5f32; b.elem_count()];
    grad[b.elem_count() / 2] = bad;
    let grad = Tensor::from_vec(grad, b.dims(), &Device::Cpu).unwrap().to_dtype(b.dtype()).unwrap();
    store([(a, a.ones_like().unwrap()), (b, grad)])
}

#[test]
fn a_gradient_with_nan_or_infinity_never_touches_anything() {
    for backend in BACKENDS {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for non_finite in [NonFinite::Error, NonFinite::Skip] {
                    let (a, b) = (var(1, &[70], dtype), var(2, &[2, 35], dtype));
                    let vars = vec![("a".into(), a.clone()), ("b".into(), b.clone())];
                    let config = config().with_backend(backend).with_non_finite(non_finite);
                    let mut opt = Velvet::named(vars, config).unwrap();
                    opt.try_step(&poisoned(&a, &b, 1.0)).unwrap();
                    let before = all_bits(&opt);
                    let result = opt.try_step(&poisoned(&a, &b, bad)).and_then(|()| opt.stats());
                    match (non_finite, result) {
                        (NonFinite::Skip, Ok(stats)) => assert_eq!((stats.step, stats.skipped), (1, 1)),
                        (NonFinite::Error, Err(Error::NonFiniteGradients { step, names, .. })) => {
                            assert_eq!((step, names), (2, vec!["b".to_owned()]));
                        }
                        other => panic!("{other:?}"),
                    }
                    assert!(!opt.stats().unwrap().grad_norm.unwrap().is_finite());
                    assert_eq!(all_bits(&opt), before);
                    // The next good step goes on as if nothing had happened.
                    opt.try_step(&poisoned(&a, &b, 1.0)).unwrap();
                    assert_eq!(opt.stats().unwrap().step, 2);
                }
            }
        }
    }
}

#[test]
fn unchecked_without_clipping_reads_no_norm() {
    let (a, b) = (var(1, &[4], DType::F32), var(2, &[4], DType::F32));
    let mut opt =
        Velvet::new(vec![a.clone(), b.clone()], config().with_non_finite(NonFinite::Unchecked)).unwrap();
    opt.try_step(&poisoned(&a, &b, f32::NAN)).unwrap();
    assert_eq!(opt.stats().unwrap().grad_norm, None);
    assert!(b.to_vec1::<f32>().unwrap()[2].is_nan());
}

#[test]
fn a_missing_gradient_is_reported_once_by_name_and_leaves_its_parameter_alone() {
    let (a, b) = (var(1, &[3], DType::F32), var(2, &[2, 5], DType::F32));
    let mut opt =
        Velvet::named(vec![("a".into(), a.clone()), ("b.weight".into(), b.clone())], config()).unwrap();
    let warnings = record_warnings(&mut opt);
    for _ in 0..3 {
        opt.try_step(&store([(&a, a.ones_like().unwrap())])).unwrap();
        assert_eq!(opt.missing_gradients(), ["b.weight"]);
    }
    assert_eq!(*warnings.lock().unwrap(), ["no gradient, so no update, for b.weight"]);
    assert_eq!(bits(&b), bits(&var(2, &[2, 5], DType::F32)));
    // Its own bias correction starts with its first gradient: the first step has the size of the learning rate.
    opt.set_config(config().with_weight_decay(0.0, WeightDecayOn::All)).unwrap();
    opt.try_step(&store([(&a, a.ones_like().unwrap()), (&b, b.ones_like().unwrap())])).unwrap();
    assert!(opt.missing_gradients().is_empty());
    let moved = (var(2, &[2, 5], DType::F32).as_tensor() - b.as_tensor()).unwrap();
    for x in moved.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
        assert!((x - 1e-3).abs() < 1e-6, "{x}");
    }
}

#[test]
fn a_missing_gradient_without_a_name_is_reported_by_shape() {
    let (a, b) = (var(1, &[3], DType::F32), var(2, &[2, 5], DType::F32));
    let mut opt = Velvet::new(vec![a.clone(), b], config()).unwrap();
    let warnings = record_warnings(&mut opt);
    opt.try_step(&store([(&a, a.ones_like().unwrap())])).unwrap();
    assert_eq!(*warnings.lock().unwrap(), ["no gradient, so no update, for param.00001 (shape [2, 5])"]);
}

#[test]
fn strict_mode_names_all_missing_gradients_and_updates_nothing() {
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let vars: Vec<_> =
        names.iter().zip(1..).map(|(n, i)| ((*n).to_owned(), var(i, &[3], DType::F32))).collect();
    let config = config().with_missing_gradients(MissingGradients::Error);
    let mut opt = Velvet::named(vars.clone(), config).unwrap();
    let before = all_bits(&opt);
    let error = opt.try_step(&store([(&vars[1].1, tensor(1, &[3], DType::F32))])).unwrap_err();
    assert_eq!(error.to_string(), "step 1: no gradient for a, c, d, e, f, g");
    assert_eq!(all_bits(&opt), before);
    assert_eq!(opt.stats().unwrap().step, 0);
}

#[test]
fn a_gradient_that_does_not_fit_is_an_error_that_names_the_parameter() {
    let a = var(1, &[3], DType::F32);
    let mut opt = Velvet::named(vec![("a".into(), a.clone())], config()).unwrap();
    let shape = opt.try_step(&store([(&a, tensor(1, &[1, 3], DType::F32))])).unwrap_err().to_string();
    assert_eq!(shape, "`a`: expected a gradient with shape [3], got [1, 3]");
    let integers = Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap();
    let dtype = opt.try_step(&store([(&a, integers)])).unwrap_err().to_string();
    assert!(dtype.contains("`a`") && dtype.contains("u32"), "{dtype}");
}

#[test]
fn observed_losses_drive_the_learning_rate_and_beta1() {
    let x = var(1, &[3], DType::F32);
    let config = config()
        .with_lr(0.1)
        .with_entropy_lr(EntropyLr::WarmUp {
            initial_loss: 9.0,
            margin: 0.0,
            nats: 3.0,
            floor: 0.02,
            decay: 0.0,
            signal: ProgressSignal::Loss,
        })
        .with_perplexity_momentum(PerplexityMomentum::Progress {
            initial_loss: 9.0,
            nats: 4.0,
            start: 0.8,
            end: 0.9,
            decay: 0.0,
        });
    let mut opt = Velvet::new(vec![x.clone()], config).unwrap();
    let step = |opt: &mut Velvet| {
        opt.try_step(&store([(&x, tensor(1, &[3], DType::F32))])).unwrap();
        opt.stats().unwrap()
    };
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        opt.observe(&Tensor::new(7.5f32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap();
        let stats = step(&mut opt);
        assert!((stats.lr - 0.05).abs() < 1e-12 && (stats.beta1 - 0.8375).abs() < 1e-12, "{stats:?}");
        opt.observe_value(9.0);
        let stats = step(&mut opt);
        assert!((stats.lr - 0.002).abs() < 1e-12 && (stats.beta1 - 0.8).abs() < 1e-12, "{stats:?}");
    }
    // A loss that is no number changes nothing, and is counted.
    opt.observe(&Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap()).unwrap();
    let stats = step(&mut opt);
    assert_eq!((stats.lr, stats.beta1, stats.ignored_losses), (0.002, 0.8, 1));
    assert_eq!(opt.learning_rate(), 0.1);
    assert!(matches!(opt.observe(&tensor(1, &[2], DType::F32)), Err(Error::Loss { .. })));
    assert!(matches!(opt.observe(&Tensor::new(1u32, &Device::Cpu).unwrap()), Err(Error::Loss { .. })));
}

#[test]
fn backward_step_observes_the_loss() {
    let x = Var::new(&[3f32, 1.0], &Device::Cpu).unwrap();
    let warm_up = EntropyLr::WarmUp {
        initial_loss: 11.0,
        margin: 0.0,
        nats: 4.0,
        floor: 0.0,
        decay: 0.5,
        signal: ProgressSignal::Loss,
    };
    let mut opt = Velvet::new(vec![x.clone()], config().with_lr(0.1).with_entropy_lr(warm_up)).unwrap();
    opt.backward_step(&x.sqr().unwrap().sum_all().unwrap()).unwrap();
    assert!((opt.stats().unwrap().lr - 0.1 / 4.0).abs() < 1e-12);
}

#[test]
fn an_adaptive_part_without_losses_says_so_once() {
    let x = var(1, &[3], DType::F32);
    let mut opt = Velvet::new(vec![x.clone()], VelvetConfig::language_model(100)).unwrap();
    let warnings = record_warnings(&mut opt);
    for _ in 0..2 {
        opt.try_step(&store([(&x, tensor(1, &[3], DType::F32))])).unwrap();
        let stats = opt.stats().unwrap();
        assert_eq!((stats.lr, stats.beta1), (1e-3, 0.9));
    }
    assert_eq!(warnings.lock().unwrap().len(), 1);
}

/// With a beta1 that moves, m is a weighted sum of gradients; corrected, its weights must sum to one.
#[test]
fn bias_correction_is_exact_for_a_beta1_that_moves() {
    let x = Var::new(&[100f64], &Device::Cpu).unwrap();
    let momentum =
        PerplexityMomentum::Progress { initial_loss: 9.0, nats: 4.0, start: 0.5, end: 0.95, decay: 0.0 };
    let config = config().with_weight_decay(0.0, WeightDecayOn::All).with_perplexity_momentum(momentum);
    let mut opt = Velvet::new(vec![x.clone()], config).unwrap();
    for step in 0..20 {
        let before = x.to_vec1::<f64>().unwrap()[0];
        opt.observe_value(9.0 - 0.2 * f64::from(step));
        opt.try_step(&store([(&x, Tensor::new(&[2f64], &Device::Cpu).unwrap())])).unwrap();
        let moved = before - x.to_vec1::<f64>().unwrap()[0];
        // A constant gradient makes every exactly corrected step lr * g / (|g| + eps).
        assert!((moved - 1e-3 * 2.0 / (2.0 + 1e-8)).abs() < 1e-12, "step {step}: {moved}");
    }
}

#[test]
fn set_config_keeps_what_was_learned() {
    let x = var(1, &[3], DType::F32);
    let mut opt = Velvet::new(vec![x.clone()], VelvetConfig::language_model(8192)).unwrap();
    opt.observe_value(7.0);
    opt.try_step(&store([(&x, tensor(1, &[3], DType::F32))])).unwrap();
    let (lr, state) = (opt.stats().unwrap().lr, all_bits(&opt));
    opt.set_config(VelvetConfig::language_model(8192)).unwrap();
    assert_eq!(all_bits(&opt), state);
    assert!(opt.set_config(config().with_eps(0.0)).is_err());
    opt.try_step(&store([(&x, tensor(1, &[3], DType::F32))])).unwrap();
    assert_eq!(opt.stats().unwrap().lr, lr);
}
