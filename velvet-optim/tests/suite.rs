//! One suite over every rule: what a rule must hold whatever it computes. A new rule is one row in [`rules`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{
    Transformer, all_bits, bits, named, record_warnings, rosenbrock, rules, scalar, store, tensor, train, var,
};
use velvet_optim::{
    BackendChoice, Error, GradClip, HalfParameters, Lion, NonFinite, Orthogonal, Rule, Sgd, StateFormat,
    Velvet, VelvetConfig,
};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Odd sizes, no elements, a scalar, matrices both ways; the long one is quantised where state is.
const SHAPES: [&[usize]; 8] = [&[7, 13], &[13, 7], &[1], &[0], &[], &[3, 0], &[2, 3, 5], &[4099]];

fn optimizer(config: &VelvetConfig, dtype: DType) -> (Velvet, Vec<(String, Var)>) {
    let vars = named(&SHAPES, dtype);
    (Velvet::named(vars.clone(), config.clone()).unwrap(), vars)
}

#[test]
fn the_fused_pass_and_the_reference_give_the_same_bits() {
    for (name, config) in rules() {
        for dtype in DTYPES {
            for half in
                [HalfParameters::Nearest, HalfParameters::Master, HalfParameters::Stochastic { seed: 3 }]
            {
                let config = config.clone().with_clip(GradClip::GlobalNorm(0.5)).with_half_parameters(half);
                let run = |backend| {
                    let (mut opt, vars) = optimizer(&config.clone().with_backend(backend), dtype);
                    train(&mut opt, &vars, 1, 4);
                    all_bits(&opt)
                };
                let (fused, plain) = (run(BackendChoice::Auto), run(BackendChoice::Plain));
                for (fused, plain) in fused.iter().zip(&plain) {
                    assert!(fused == plain, "{name}, {dtype:?}, {half:?}: {} differs", fused.0);
                }
                assert_eq!(fused.len(), plain.len());
            }
        }
    }
}

#[test]
fn twenty_steps_saved_and_twenty_more_are_forty() {
    for (name, config) in rules() {
        for dtype in DTYPES {
            for (half, format) in [
                (HalfParameters::Nearest, StateFormat::Full),
                (HalfParameters::Master, StateFormat::Blockwise8),
                (HalfParameters::Stochastic { seed: 1 }, StateFormat::Blockwise8),
            ] {
                let config = config.clone().with_half_parameters(half).with_state_format(format);
                let (mut whole, vars) = optimizer(&config, dtype);
                train(&mut whole, &vars, 1, 40);

                let (mut first, vars) = optimizer(&config, dtype);
                train(&mut first, &vars, 1, 20);
                let state = first.to_bytes().unwrap();
                let copies: Vec<_> = vars
                    .iter()
                    .map(|(name, var)| {
                        (name.clone(), Var::from_tensor(&var.as_tensor().copy().unwrap()).unwrap())
                    })
                    .collect();
                let mut second = Velvet::named(copies.clone(), config.clone()).unwrap();
                second.load_bytes(&state).unwrap();
                assert_eq!(second.to_bytes().unwrap(), state, "{name}, {dtype:?}");
                train(&mut second, &copies, 21, 20);
                assert!(all_bits(&whole) == all_bits(&second), "{name}, {dtype:?}, {half:?}, {format:?}");
                assert_eq!(whole.stats().unwrap(), second.stats().unwrap());
            }
        }
    }
}

#[test]
fn an_interrupted_run_in_one_format_goes_on_in_another() {
    let (full, blockwise) = (StateFormat::Full, StateFormat::Blockwise8);
    for (from, to) in [(full, blockwise), (blockwise, full)] {
        for (saved, loaded) in [(DType::F32, DType::F64), (DType::F64, DType::F32), (DType::BF16, DType::F32)]
        {
            let config = |format| VelvetConfig::default().with_state_format(format);
            let (mut opt, vars) = optimizer(&config(from), saved);
            train(&mut opt, &vars, 1, 3);
            let (mut other, _) = optimizer(&config(to), loaded);
            other.load_bytes(&opt.to_bytes().unwrap()).unwrap();
            let (before, after) = (opt.state().unwrap(), other.state().unwrap());
            assert_eq!(before.len(), after.len());
            for (name, before) in before {
                let difference = (before.to_dtype(DType::F64).unwrap()
                    - after[&name].to_dtype(DType::F64).unwrap())
                .unwrap();
                if before.elem_count() > 0 {
                    let largest =
                        scalar(&before.to_dtype(DType::F64).unwrap().abs().unwrap().max_all().unwrap());
                    // NaN where there is one, which candle's own maximum passes over.
                    let errors = difference.abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    let error = errors.into_iter().max_by(f64::total_cmp).unwrap();
                    assert!(error <= 0.05 * largest.unwrap(), "{name}: {error}"); // 8 bits at worst
                }
            }
        }
    }
}

#[test]
fn a_parameter_without_a_gradient_keeps_everything() {
    for (name, config) in rules() {
        let (mut opt, vars) = optimizer(&config, DType::F32);
        record_warnings(&mut opt);
        train(&mut opt, &vars, 1, 2);
        let before = all_bits(&opt);
        let grads = vars.iter().skip(1).map(|(_, var)| (var, tensor(9, var.dims(), DType::F32)));
        opt.try_step(&store(grads)).unwrap();
        assert_eq!(opt.missing_gradients(), ["w0"]);
        let after = all_bits(&opt);
        for ((key, before), (_, after)) in before.iter().zip(&after) {
            if key.starts_with("w0") {
                assert_eq!(before, after, "{name}: {key}");
            }
        }
        assert_ne!(before, after);
    }
}

#[test]
fn a_gradient_that_is_no_number_changes_nothing() {
    for (name, config) in rules() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut opt, vars) = optimizer(&config.clone().with_non_finite(NonFinite::Skip), DType::F32);
            train(&mut opt, &vars, 1, 2);
            let before = all_bits(&opt);
            let grads = vars
                .iter()
                .map(|(_, var)| (var, var.as_tensor().zeros_like().unwrap().affine(0.0, 1.0).unwrap()));
            let mut grads = store(grads);
            grads.insert(&vars[0].1, Tensor::full(bad, (7, 13), &Device::Cpu).unwrap());
            opt.try_step(&grads).unwrap();
            assert_eq!(opt.stats().unwrap().skipped, 1);
            assert!(before == all_bits(&opt), "{name}");
            let mut config = opt.config().clone();
            config.non_finite = NonFinite::Error;
            opt.set_config(config).unwrap();
            let error = opt.try_step(&grads).unwrap_err();
            assert!(matches!(&error, Error::NonFiniteGradients { names, .. } if names == &["w0"]), "{error}");
            assert!(before == all_bits(&opt), "{name}");
        }
    }
}

#[test]
fn a_gradient_that_is_no_number_and_not_looked_at_does_the_same_on_both_back_ends() {
    for (name, config) in rules() {
        for bad in [f32::NAN, f32::INFINITY] {
            let run = |backend| {
                let config = config.clone().with_non_finite(NonFinite::Unchecked).with_backend(backend);
                let (mut opt, vars) = optimizer(&config, DType::F32);
                train(&mut opt, &vars, 1, 2);
                let mut grads = store(vars.iter().map(|(_, var)| (var, var.as_tensor().copy().unwrap())));
                let mut values = common::noise(3, 13);
                values[4] = bad;
                let one = Tensor::from_vec(values, 13, &Device::Cpu).unwrap();
                let grad = Tensor::zeros((7, 13), DType::F32, &Device::Cpu).unwrap();
                grads.insert(&vars[0].1, grad.broadcast_add(&one).unwrap());
                opt.try_step(&grads).unwrap();
                // One NaN is as good as another.
                let canonical = |(name, bits): (String, Vec<u64>)| {
                    let nan = |b: &u64| f32::from_bits(*b as u32).is_nan();
                    (name, bits.iter().map(|b| if nan(b) { u64::MAX } else { *b }).collect::<Vec<_>>())
                };
                all_bits(&opt).into_iter().map(canonical).collect::<Vec<_>>()
            };
            for (fused, plain) in run(BackendChoice::Auto).iter().zip(&run(BackendChoice::Plain)) {
                assert!(fused == plain, "{name}, {bad}: {} differs", fused.0);
            }
        }
    }
}

#[test]
fn gradients_that_are_views_are_read_as_their_elements() {
    for (name, config) in rules() {
        let base = tensor(5, &[6, 40], DType::F32);
        for view in [base.t().unwrap(), base.narrow(1, 3, 17).unwrap(), base.narrow(0, 2, 2).unwrap()] {
            let step = |grad: Tensor| {
                let p = var(9, grad.dims(), DType::F32);
                let mut opt = Velvet::named(vec![("p".into(), p.clone())], config.clone()).unwrap();
                opt.try_step(&store([(&p, grad)])).unwrap();
                bits(&p)
            };
            assert_eq!(step(view.clone()), step(view.copy().unwrap().contiguous().unwrap()), "{name}");
        }
    }
}

#[test]
fn an_update_goes_downhill_on_rosenbrock() {
    for (name, config) in rules() {
        rosenbrock(name, config, DType::F64, &Device::Cpu);
    }
}

#[test]
fn every_rule_trains_a_small_transformer() {
    for (name, config) in rules() {
        let (first, last) = Transformer::new(&Device::Cpu).train(name, config, 400);
        assert!(last < 0.6 * first, "{name}: {first} to {last}");
    }
}

#[test]
fn learning_rate_zero_changes_no_weight() {
    for (name, config) in rules() {
        let (mut opt, vars) = optimizer(&config.with_lr(0.0), DType::F32);
        let before: Vec<_> = vars.iter().map(|(_, var)| bits(var)).collect();
        train(&mut opt, &vars, 1, 2);
        let after: Vec<_> = vars.iter().map(|(_, var)| bits(var)).collect();
        assert!(before == after, "{name}");
    }
}

#[test]
fn state_takes_the_bytes_that_are_promised() {
    const N: usize = 64 * 1024;
    let bytes = |config: &VelvetConfig, dtype| {
        let vars = vec![("w".to_owned(), var(1, &[256, 256], dtype))];
        Velvet::named(vars, config.clone()).unwrap().state_bytes()
    };
    let rule = |rule| VelvetConfig::default().with_rule(rule);
    let (sgd, lion) = (rule(Rule::Sgd(Sgd::default())), rule(Rule::Lion(Lion::default())));
    let rows = rule(Rule::Orthogonal(Orthogonal::default()));
    let master = VelvetConfig::default().with_half_parameters(HalfParameters::Master);
    for (config, f32, f64, bf16) in [
        (VelvetConfig::default(), 8, 16, 8),
        (master.clone(), 8, 16, 12),
        (sgd.clone(), 4, 8, 4),
        (lion, 4, 8, 4),
    ] {
        assert_eq!(bytes(&config, DType::F32), f32 * N);
        assert_eq!(bytes(&config, DType::F64), f64 * N);
        assert_eq!(bytes(&config, DType::BF16), bf16 * N);
        assert_eq!(bytes(&config, DType::F16), bf16 * N);
    }
    assert_eq!(bytes(&rows, DType::F32), 4 * (N + 256)); // momentum, and one number a row
    let quantised = |config: VelvetConfig| config.with_state_format(StateFormat::Blockwise8);
    let block = 256 + 4; // bytes a block of 256 elements
    assert_eq!(bytes(&quantised(VelvetConfig::default()), DType::F32), 2 * N / 256 * block);
    assert_eq!(bytes(&quantised(master), DType::BF16), 2 * N / 256 * block + 4 * N);
    assert_eq!(bytes(&quantised(sgd), DType::BF16), N / 256 * block);
}
