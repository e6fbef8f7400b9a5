//! Against PyTorch in float64; `golden/activations.py` writes the file.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{assert_close, values, with_gradient};
use era_act::Activation;

#[derive(serde::Deserialize)]
struct Golden {
    x: Vec<u64>,
    rows: usize,
    packed: Vec<u64>,
    seed: Vec<u64>,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    activation: Activation,
    y: Vec<u64>,
    dx: Vec<u64>,
    gated: Vec<u64>,
    dpacked: Vec<u64>,
}

fn floats(bits: &[u64]) -> Vec<f64> {
    bits.iter().map(|&b| f64::from_bits(b)).collect()
}

#[test]
fn every_activation_and_its_gated_form_equal_pytorch() {
    let golden: Golden = serde_json::from_str(include_str!("golden/activations.json")).unwrap();
    assert_eq!(golden.cases.len(), 9);
    let x = Tensor::new(floats(&golden.x), &Device::Cpu).unwrap();
    let seed = floats(&golden.seed);
    let width = seed.len() / golden.rows;
    let seed = Tensor::from_vec(seed, (golden.rows, width), &Device::Cpu).unwrap();
    let packed = Tensor::from_vec(floats(&golden.packed), (golden.rows, 2 * width), &Device::Cpu).unwrap();
    for case in golden.cases {
        for (dtype, relative, absolute) in [(DType::F64, 1e-13, 4e-15), (DType::F32, 2e-6, 2e-7)] {
            let what = format!("{} in {dtype:?}", case.name);
            let cast = |t: &Tensor| t.to_dtype(dtype).unwrap();
            let (x, packed, seed) = (cast(&x), cast(&packed), cast(&seed));
            let (y, dx) = with_gradient(&x, &x.ones_like().unwrap(), |x| case.activation.forward(x));
            assert_close(&values(&y), &floats(&case.y), relative, absolute, &what);
            assert_close(
                &values(&dx),
                &floats(&case.dx),
                relative,
                10.0 * absolute,
                &format!("dx of {what}"),
            );
            let (y, dx) = with_gradient(&packed, &seed, |x| case.activation.gated(x));
            assert_close(
                &values(&y),
                &floats(&case.gated),
                relative,
                10.0 * absolute,
                &format!("gated {what}"),
            );
            let what = format!("gradient of gated {what}");
            assert_close(&values(&dx), &floats(&case.dpacked), relative, 20.0 * absolute, &what);
        }
    }
}
