//! What is measured of updates, and what is made of it: ratios, the trust region, the brake and the Polyak cap.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, config, named, store, tensor, train, values, var};
use velvet_optim::{
    BackendChoice, Brake, GradClip, HalfParameters, NonFinite, Optimizer, PolyakCap, SparseRows, TrustRegion,
    UpdateNorms, Velvet, VelvetConfig,
};

#[test]
fn measured_updates_are_the_changes() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        let vars = named(&[&[1100], &[3, 5]], DType::F32);
        let config = VelvetConfig { update_norms: UpdateNorms::On, backend, ..config() };
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        assert_eq!(opt.update_ratios().unwrap(), []);
        let before: Vec<_> = vars.iter().map(|(_, var)| values(var)).collect();
        train(&mut opt, &vars, 1, 1);
        let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
        let (mut change, mut weight) = (0.0, 0.0);
        for (((name, ratio), before), (_, var)) in opt.update_ratios().unwrap().iter().zip(&before).zip(&vars)
        {
            let moved: Vec<f64> = before.iter().zip(values(var)).map(|(a, b)| a - b).collect();
            let expected = (norm(&moved) / norm(before)).sqrt();
            assert!((ratio - expected).abs() < 1e-6 * expected, "{name}: {ratio}, {expected}");
            change += norm(&moved);
            weight += norm(before);
        }
        let ratio = opt.stats().unwrap().update_ratio.unwrap();
        assert!((ratio - (change / weight).sqrt()).abs() < 1e-6 * ratio);
    }
}

#[test]
fn the_ratio_of_no_update_is_none_and_that_of_zero_weights_infinite() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        let zeros = Var::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let config = VelvetConfig { update_norms: UpdateNorms::On, backend, ..config() };
        let mut opt = Velvet::named(vec![("w".into(), zeros.clone())], config).unwrap();
        opt.on_warning(|_| {});
        opt.try_step(&store([])).unwrap();
        let stats = opt.stats().unwrap();
        assert_eq!((stats.update_ratio, stats.grad_norm.map(f64::to_bits)), (None, Some(0)));
        assert_eq!(opt.update_ratios().unwrap(), []);
        opt.try_step(&store([(&zeros, tensor(1, &[3, 2], DType::F32))])).unwrap();
        assert_eq!(opt.stats().unwrap().update_ratio, Some(f64::INFINITY));
    }
}

#[test]
fn an_update_that_is_no_number_leaves_the_size_of_the_last_as_a_resumed_run_does() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        let config = VelvetConfig {
            trust_region: TrustRegion::relative(),
            non_finite: NonFinite::Unchecked,
            backend,
            ..config().with_lr(0.5)
        };
        let vars = named(&[&[4, 3]], DType::F32);
        let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
        train(&mut opt, &vars, 1, 2);
        let ratios = opt.update_ratios().unwrap();
        let mut grad = common::noise(7, 12);
        grad[5] = f32::NAN;
        let grad = Tensor::from_vec(grad, (4, 3), &Device::Cpu).unwrap();
        opt.try_step(&store([(&vars[0].1, grad)])).unwrap();
        assert_eq!(opt.update_ratios().unwrap(), ratios);
        let copy = vec![("w0".to_owned(), Var::from_tensor(&vars[0].1.copy().unwrap()).unwrap())];
        let mut resumed = Velvet::named(copy.clone(), config).unwrap();
        resumed.load_bytes(&opt.to_bytes().unwrap()).unwrap();
        train(&mut opt, &vars, 4, 1);
        train(&mut resumed, &copy, 4, 1);
        assert!(all_bits(&opt) == all_bits(&resumed), "{backend:?}");
    }
}

#[test]
fn measuring_changes_no_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let run = |norms| {
            let vars = named(&[&[70_000], &[3, 5]], dtype);
            let config =
                VelvetConfig { update_norms: norms, ..config().with_clip(GradClip::GlobalNorm(1.0)) };
            let mut opt = Velvet::named(vars.clone(), config).unwrap();
            train(&mut opt, &vars, 1, 3);
            all_bits(&opt)
        };
        assert!(run(UpdateNorms::Off) == run(UpdateNorms::On));
    }
}

#[test]
fn the_trust_region_limits_every_step_to_a_share_of_the_weights() {
    let vars = named(&[&[64, 64]], DType::F32);
    let limit = TrustRegion::Relative { max_ratio: 0.01, weight_floor: 1e-3 };
    let config = config().with_lr(1.0).with_trust_region(limit);
    let mut opt = Velvet::named(vars.clone(), VelvetConfig { weight_decay: 0.0, ..config }).unwrap();
    for step in 1..20 {
        train(&mut opt, &vars, step, 1);
        let ratio = opt.stats().unwrap().update_ratio.unwrap();
        // The limit looks at the update of the step before, so a change of direction can pass it a little.
        assert!(ratio < 0.02, "step {step}: {ratio}");
    }
}

#[test]
fn the_brake_and_the_polyak_cap_lower_the_learning_rate() {
    let x = var(1, &[3], DType::F32);
    let grads = || store([(&x, tensor(1, &[3], DType::F32))]);
    let mut opt = Velvet::new(vec![x.clone()], config().with_lr(0.1).with_brake(Brake::gap())).unwrap();
    let t = |x: f32| Tensor::new(x, &Device::Cpu).unwrap();
    opt.observe_with_entropy(&t(4.0), &t(4.0)).unwrap();
    opt.step(&grads()).unwrap();
    assert_eq!(opt.stats().unwrap().lr, 0.1);
    for _ in 0..20 {
        opt.observe_with_entropy(&t(5.0), &t(4.0)).unwrap();
    }
    opt.step(&grads()).unwrap();
    assert!(opt.stats().unwrap().lr < 0.02);

    let mut opt = Velvet::new(vec![x.clone()], config().with_lr(0.1).with_polyak(PolyakCap::cap())).unwrap();
    opt.observe_value(1e-3); // next to nothing is left to gain
    opt.step(&grads()).unwrap();
    assert_eq!(opt.stats().unwrap().lr, 0.1); // no step was measured yet
    opt.observe_value(1e-3);
    opt.step(&grads()).unwrap();
    assert!(opt.stats().unwrap().lr < 0.01);
}

#[test]
fn rows_that_are_left_out_count_among_the_weights() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            for half in [HalfParameters::Nearest, HalfParameters::Master] {
                let p = Var::ones((4, 2), dtype, &Device::Cpu).unwrap();
                let config = VelvetConfig {
                    sparse_rows: SparseRows::Skip,
                    update_norms: UpdateNorms::On,
                    weight_decay: 0.0,
                    half_parameters: half,
                    backend,
                    ..config().with_lr(0.125)
                };
                let mut opt = Velvet::named(vec![("w".into(), p.clone())], config).unwrap();
                let grad = Tensor::new(&[[1f32, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], &Device::Cpu);
                opt.try_step(&store([(&p, grad.unwrap().to_dtype(dtype).unwrap())])).unwrap();
                // Two of eight weights of 1 moved by lr.
                let ratio = opt.stats().unwrap().update_ratio.unwrap();
                assert!((ratio - 0.125 / 2.0).abs() < 1e-6, "{backend:?} {dtype:?} {half:?}: {ratio}");
            }
        }
    }
}

#[test]
fn a_step_without_a_gradient_does_not_lift_the_trust_region() {
    let lr = 8e-3;
    let step = |p: &Var, opt: &mut Velvet, grad: Tensor| {
        let before = values(p);
        opt.try_step(&store([(p, grad)])).unwrap();
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let weight = norm(&mut before.iter().copied()) / before.len() as f64;
        let change = norm(&mut before.iter().zip(values(p)).map(|(a, b)| a - b)) / before.len() as f64;
        change.sqrt() / weight.sqrt().max(1e-3)
    };
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        // A bias of zeros, and a matrix that decays meanwhile, as the A of a low-rank adapter while B is zero.
        let start = [Tensor::zeros(64, DType::F32, &Device::Cpu), tensor(1, &[16, 32], DType::F32) * 0.02];
        for start in start {
            let p = Var::from_tensor(&start.unwrap()).unwrap();
            let config = VelvetConfig::language_model(8192).with_lr(lr).with_backend(backend);
            let config = VelvetConfig { hidden_matrices: None, ..config };
            let mut opt = Velvet::named(vec![("w".into(), p.clone())], config).unwrap();
            for _ in 0..2 {
                step(&p, &mut opt, p.zeros_like().unwrap());
            }
            let ratio = step(&p, &mut opt, tensor(2, p.dims(), DType::F32));
            assert!(ratio > 0.0 && ratio < 0.05, "{backend:?} {:?}: {ratio}", p.dims());
        }
    }
}

#[test]
fn no_change_of_no_weights_is_no_ratio() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        let vars = named(&[&[3], &[5]], DType::F32);
        let zeros = Var::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let mut all = vars.clone();
        all.push(("zeros".to_owned(), zeros.clone()));
        let config = VelvetConfig { update_norms: UpdateNorms::On, backend, ..config() };
        let mut opt = Velvet::named(all, config).unwrap();
        opt.on_warning(|_| {});
        let grads = || vars.iter().map(|(_, var)| (var, tensor(1, var.dims(), DType::F32)));
        opt.try_step(&store(grads().chain([(&zeros, zeros.zeros_like().unwrap())]))).unwrap();
        let ratios = opt.update_ratios().unwrap();
        assert_eq!(ratios.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["w0", "w1"]);
        assert!(ratios.iter().all(|(_, ratio)| *ratio > 0.0));
        // That of the last update stays where there is no gradient.
        opt.try_step(&store(grads().take(1))).unwrap();
        let later = opt.update_ratios().unwrap();
        assert_eq!(later[1], ratios[1]);
        assert_ne!(later[0], ratios[0]);
    }
}
