//! f32 master copies of bf16 and f16 parameters.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, bits, config, train, values, var};
use velvet_optim::{BackendChoice, HalfParameters, Orthogonal, Rule, TrustRegion, Velvet, VelvetConfig};

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];
const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Plain];

fn masters() -> VelvetConfig {
    config().with_half_parameters(HalfParameters::Master)
}

/// Every third element is trained.
fn mask() -> (Vec<bool>, Tensor) {
    let kept: Vec<bool> = (0..12 * 20).map(|i| i % 3 == 0).collect();
    let values = kept.iter().map(|&kept| u8::from(kept)).collect::<Vec<_>>();
    (kept, Tensor::from_vec(values, (12, 20), &Device::Cpu).unwrap())
}

fn orthogonal() -> VelvetConfig {
    masters().with_rule(Rule::Orthogonal(Orthogonal::default())).with_lr(0.02)
}

#[test]
fn masked_elements_are_zero_in_the_master_copy_of_an_orthogonalised_matrix() {
    for (dtype, backend) in DTYPES.into_iter().flat_map(|dtype| BACKENDS.map(|backend| (dtype, backend))) {
        let (kept, mask) = mask();
        let vars = vec![("w".to_owned(), var(1, &[12, 20], dtype))];
        let mut opt = Velvet::named(vars.clone(), orthogonal().with_backend(backend)).unwrap();
        opt.set_mask("w", Some(&mask)).unwrap();
        train(&mut opt, &vars, 1, 4);
        for values in [values(&vars[0].1), values(&opt.state().unwrap()["w.master"])] {
            for (&kept, value) in kept.iter().zip(values) {
                assert_eq!(kept, value != 0.0, "{dtype:?} {backend:?}");
            }
        }
        // So nothing jumps when all elements train again: they move by an update, 0.2 lr each on average.
        opt.set_mask("w", None).unwrap();
        train(&mut opt, &vars, 5, 1);
        for (&kept, value) in kept.iter().zip(values(&vars[0].1)) {
            assert!(kept || value.abs() < 0.02, "{dtype:?} {backend:?}: {value}");
        }
    }
}

#[test]
fn a_masked_orthogonalised_run_goes_on_with_the_same_bits() {
    for (dtype, backend) in DTYPES.into_iter().flat_map(|dtype| BACKENDS.map(|backend| (dtype, backend))) {
        let config = orthogonal().with_trust_region(TrustRegion::relative()).with_backend(backend);
        let start = || {
            let vars = vec![("w".to_owned(), var(1, &[12, 20], dtype))];
            let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
            opt.set_mask("w", Some(&mask().1)).unwrap();
            (vars, opt)
        };
        let (vars, mut whole) = start();
        train(&mut whole, &vars, 1, 40);
        let (vars, mut first) = start();
        train(&mut first, &vars, 1, 20);
        let bytes = first.to_bytes().unwrap();
        let copies = vec![("w".to_owned(), Var::from_tensor(&vars[0].1.copy().unwrap()).unwrap())];
        let mut second = Velvet::named(copies.clone(), config.clone()).unwrap();
        second.load_bytes(&bytes).unwrap();
        assert!(second.to_bytes().unwrap() == bytes, "{dtype:?} {backend:?}");
        train(&mut second, &copies, 21, 20);
        assert!(all_bits(&second) == all_bits(&whole), "{dtype:?} {backend:?}");
    }
}

#[test]
fn weights_that_were_loaded_later_train_from_where_they_are() {
    for (dtype, backend) in DTYPES.into_iter().flat_map(|dtype| BACKENDS.map(|backend| (dtype, backend))) {
        let make = |seed| vec![("w".to_owned(), var(seed, &[12, 20], dtype))];
        let (pretrained, vars) = (make(2), make(1));
        let mut opt = Velvet::named(vars.clone(), masters().with_backend(backend)).unwrap();
        vars[0].1.set(&pretrained[0].1.copy().unwrap()).unwrap();
        opt.refresh_masters().unwrap();
        train(&mut opt, &vars, 1, 2);
        let mut other = Velvet::named(pretrained.clone(), masters().with_backend(backend)).unwrap();
        train(&mut other, &pretrained, 1, 2);
        assert_eq!(bits(&vars[0].1), bits(&pretrained[0].1), "{dtype:?} {backend:?}");
        assert!(all_bits(&opt) == all_bits(&other), "{dtype:?} {backend:?}");
    }
}
