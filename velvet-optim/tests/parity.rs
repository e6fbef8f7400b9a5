//! The fused CPU pass against the same rule in candle operations, and against itself on other thread counts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, bits, config, named, noise, store, tensor, train, values, var};
use proptest::prelude::*;
use velvet_optim::{BackendChoice, GradClip, PolyakCap, TrustRegion, Velvet, VelvetConfig};

const CHUNK: usize = 64 * 1024;
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

fn trained(shapes: &[&[usize]], dtype: DType, config: &VelvetConfig, steps: u64) -> [Velvet; 2] {
    [BackendChoice::Auto, BackendChoice::Plain].map(|backend| {
        let vars = named(shapes, dtype);
        let mut opt = Velvet::named(vars.clone(), config.clone().with_backend(backend)).unwrap();
        train(&mut opt, &vars, 1, steps);
        assert_eq!(opt.stats().unwrap().step, steps);
        opt
    })
}

fn both(
    shapes: &[&[usize]],
    dtype: DType,
    config: &VelvetConfig,
    steps: u64,
) -> [Vec<(String, Vec<u64>)>; 2] {
    trained(shapes, dtype, config, steps).map(|opt| all_bits(&opt))
}

#[test]
fn fused_and_plain_give_the_same_bits_for_every_dtype_and_odd_sizes() {
    let shapes: [&[usize]; 9] =
        [&[0], &[1], &[7], &[1023], &[1025], &[CHUNK + 3], &[3, 5, 7], &[2, 0, 4], &[]];
    let configs = [config(), VelvetConfig::language_model(8192).with_clip(GradClip::GlobalNorm(0.5))];
    for dtype in DTYPES {
        for config in &configs {
            let [fused, plain] = both(&shapes, dtype, config, 4);
            for (fused, plain) in fused.iter().zip(&plain) {
                assert!(fused == plain, "{dtype:?}: {} differs", fused.0);
            }
        }
    }
}

#[test]
fn rates_that_follow_measured_updates_agree_within_the_rounding_of_their_sums() {
    let shapes: [&[usize]; 4] = [&[CHUNK + 3], &[1025], &[130, 70], &[7]];
    let held = VelvetConfig::language_model(8192).with_lr(0.4);
    for dtype in DTYPES {
        for config in [held.clone(), held.clone().with_polyak(PolyakCap::cap())] {
            let [fused, plain] = trained(&shapes, dtype, &config, 5);
            let unheld = VelvetConfig { trust_region: TrustRegion::Off, ..config };
            let [unheld, _] = trained(&shapes, dtype, &unheld, 5);
            for (((name, a), (_, b)), (_, c)) in
                fused.parameters().zip(plain.parameters()).zip(unheld.parameters())
            {
                let norm = |a: &[f64], b: &[f64]| {
                    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
                        / (a.len() as f64).sqrt()
                };
                let (a, b, c) = (values(a), values(b), values(c));
                // An element may be rounded to the other neighbour of its type.
                let bound = if dtype.size_in_bytes() == 2 { 1e-4 } else { 1e-6 };
                assert!(norm(&a, &b) < bound, "{dtype:?} {name}: {}", norm(&a, &b));
                assert!(norm(&a, &c) > 1e-2, "{dtype:?} {name} was not held back");
            }
        }
    }
}

#[test]
fn many_small_parameters_are_all_updated() {
    let shapes: Vec<Vec<usize>> = (0..300).map(|i| vec![i % 9 + 1]).collect();
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    let [fused, plain] = both(&shapes, DType::F32, &config(), 2);
    assert_eq!(fused, plain);
    let untouched = named(&shapes, DType::F32);
    let changed =
        untouched.iter().filter(|(name, var)| fused.iter().any(|(n, b)| n == name && b != &bits(var)));
    assert_eq!(changed.count(), 300);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn fused_equals_plain_for_any_sizes(
        sizes in prop::collection::vec(0usize..3000, 1..6),
        dtype in 0usize..4,
        clip in prop::option::of(0.01f64..10.0),
        lr in 1e-5f64..1.0,
        beta1 in 0f64..0.99,
    ) {
        let shapes: Vec<[usize; 1]> = sizes.iter().map(|&n| [n]).collect();
        let shapes: Vec<&[usize]> = shapes.iter().map(<[usize; 1]>::as_slice).collect();
        let config = config()
            .with_lr(lr)
            .with_betas(beta1, 0.99)
            .with_clip(clip.map_or(GradClip::Off, GradClip::GlobalNorm));
        let [fused, plain] = both(&shapes, DTYPES[dtype], &config, 2);
        prop_assert_eq!(fused, plain);
    }
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let vars = named(&[&[3 * CHUNK + 11], &[5], &[300, 301]], DType::F32);
            let config = config().with_clip(GradClip::GlobalNorm(1.0)).with_lr(0.1);
            let config = config.with_trust_region(TrustRegion::relative()).with_polyak(PolyakCap::cap());
            let mut opt = Velvet::named(vars.clone(), config).unwrap();
            train(&mut opt, &vars, 1, 3);
            let stats = opt.stats().unwrap();
            let measured = [stats.grad_norm, stats.update_ratio].map(|x| x.unwrap().to_bits());
            (measured, all_bits(&opt))
        })
    };
    let one = run(1);
    assert!(one == run(2));
    assert!(one == run(3));
}

#[test]
fn gradients_that_are_views_are_read_as_their_elements() {
    let base = tensor(5, &[6, 40], DType::F32);
    let views = [
        base.t().unwrap(),
        base.narrow(1, 3, 17).unwrap(),
        base.narrow(0, 2, 2).unwrap(),
        base.narrow(0, 1, 1).unwrap().broadcast_as((5, 40)).unwrap(),
    ];
    for view in views {
        let (a, b) = (var(9, view.dims(), DType::F32), var(9, view.dims(), DType::F32));
        let mut opt =
            Velvet::named(vec![("a".into(), a.clone()), ("b".into(), b.clone())], config()).unwrap();
        let copy = Tensor::from_vec(
            view.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            view.dims(),
            &Device::Cpu,
        );
        opt.try_step(&store([(&a, view), (&b, copy.unwrap())])).unwrap();
        assert_eq!(bits(&a), bits(&b));
        assert_ne!(bits(&a), bits(&var(9, a.dims(), DType::F32)));
    }
}

#[test]
fn parameters_made_from_views_are_updated() {
    let base = tensor(3, &[6, 8], DType::F32);
    for view in [base.t().unwrap(), base.narrow(1, 2, 3).unwrap(), base.narrow(0, 2, 3).unwrap()] {
        let whole = Tensor::from_vec(
            view.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            view.dims(),
            &Device::Cpu,
        );
        let (a, b) = (Var::from_tensor(&view).unwrap(), Var::from_tensor(&whole.unwrap()).unwrap());
        let grad = tensor(4, view.dims(), DType::F32);
        let mut opt =
            Velvet::named(vec![("a".into(), a.clone()), ("b".into(), b.clone())], config()).unwrap();
        opt.try_step(&store([(&a, grad.clone()), (&b, grad)])).unwrap();
        assert_eq!(bits(&a), bits(&b));
        // The tensor the variable was made from keeps its values.
        assert_eq!(bits(&base), bits(&tensor(3, &[6, 8], DType::F32)));
    }
}

#[test]
fn a_gradient_may_have_another_float_type_than_its_parameter() {
    // Values that every type holds exactly, so that the type cannot matter.
    let exact: Vec<f32> = noise(7, 2050).iter().map(|x| (x * 64.0).round() / 64.0).collect();
    let exact = Tensor::from_vec(exact, 2050, &Device::Cpu).unwrap();
    for parameter in DTYPES {
        let step = |grad: DType, backend: BackendChoice| {
            let p = var(1, &[2050], parameter);
            let mut opt =
                Velvet::named(vec![("p".into(), p.clone())], config().with_backend(backend)).unwrap();
            opt.try_step(&store([(&p, exact.to_dtype(grad).unwrap())])).unwrap();
            (opt.stats().unwrap().grad_norm.unwrap(), bits(&p))
        };
        let expected = step(parameter, BackendChoice::Auto);
        for grad in DTYPES {
            assert!(step(grad, BackendChoice::Auto) == expected, "{parameter:?} with {grad:?}");
            assert!(step(grad, BackendChoice::Plain) == expected, "{parameter:?} with {grad:?}, plain");
        }
    }
}

#[test]
fn a_gradient_that_shares_a_parameters_storage_is_read_before_it_is_written() {
    let (a, b) = (var(1, &[33], DType::F32), var(1, &[33], DType::F32));
    let c = var(1, &[33], DType::F32);
    let mut opt = Velvet::named(
        vec![("a".into(), a.clone()), ("b".into(), b.clone()), ("c".into(), c.clone())],
        config(),
    )
    .unwrap();
    let grad = a.as_tensor().copy().unwrap();
    opt.try_step(&store([(&a, a.as_detached_tensor()), (&b, a.as_detached_tensor()), (&c, grad)])).unwrap();
    assert_eq!(bits(&a), bits(&c));
    assert_eq!(bits(&b), bits(&c));
}

#[test]
fn half_precision_parameters_keep_f32_moments() {
    for dtype in [DType::BF16, DType::F16] {
        let p = var(1, &[5, 3], dtype);
        let mut opt = Velvet::named(vec![("p".into(), p.clone())], config().with_lr(0.1)).unwrap();
        opt.try_step(&store([(&p, tensor(2, &[5, 3], dtype))])).unwrap();
        for tensor in opt.state().unwrap().values() {
            assert_eq!((tensor.dtype(), tensor.dims()), (DType::F32, &[5, 3][..]));
        }
        assert_ne!(bits(&p), bits(&var(1, &[5, 3], dtype)));
    }
}
