//! Shapes, strides, empty tensors, threads, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use common::{all, noise, tensor, values, with_gradient};
use era_act::{Activation, Era, Error};
use proptest::prelude::*;

fn grid(dims: &[usize], dtype: DType, seed: u64) -> Tensor {
    tensor(&noise(dims.iter().product(), 6.0, seed), dtype).reshape(dims).unwrap()
}

/// Views that are not in row-major order, of the same numbers as their contiguous copies.
fn views(dtype: DType) -> Vec<(&'static str, Tensor)> {
    let x = grid(&[6, 5, 8], dtype, 7);
    vec![
        ("transposed", x.transpose(0, 2).unwrap()),
        ("rows transposed", x.transpose(0, 1).unwrap()),
        ("narrowed last", x.narrow(2, 3, 4).unwrap()),
        ("narrowed middle", x.narrow(1, 1, 2).unwrap()),
        ("narrowed first", x.narrow(0, 2, 3).unwrap()),
        ("narrowed and transposed", x.narrow(2, 1, 6).unwrap().transpose(0, 1).unwrap()),
        (
            "broadcast",
            x.i((.., .., 2..4)).unwrap().i((0..1, .., ..)).unwrap().broadcast_as((4, 5, 2)).unwrap(),
        ),
        ("one of each", x.i((5..6, 4..5, 6..8)).unwrap()),
    ]
}

#[test]
fn strided_views_give_the_bits_of_their_contiguous_copies() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for (name, view) in views(dtype) {
            let copy =
                Tensor::from_vec(values(&view), view.shape(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            for activation in all() {
                let what = format!("{activation}, {dtype:?}, {name}");
                let got = activation.forward(&view).unwrap();
                assert!(got.is_contiguous() && got.dims() == view.dims());
                assert_eq!(values(&got), values(&activation.forward(&copy).unwrap()), "{what}");
                let got = activation.gated(&view).unwrap();
                assert_eq!(values(&got), values(&activation.gated(&copy).unwrap()), "gated {what}");
            }
        }
    }
}

#[test]
fn gradients_through_strided_views_are_those_of_the_copies() {
    let x = grid(&[4, 6, 10], DType::F64, 8);
    let era = Era::default();
    for gated in [false, true] {
        let f = |x: &Tensor| if gated { era.gated(x) } else { era.forward(x) };
        let dy = grid(&[6, 4, if gated { 3 } else { 6 }], DType::F64, 9);
        let view = |x: &Tensor| x.narrow(2, 1, 6)?.transpose(0, 1);
        let (_, got) = with_gradient(&x, &dy, |x| f(&view(x)?));
        let (_, want) = with_gradient(&x, &dy, |x| f(&view(x)?.force_contiguous()?));
        assert_eq!(values(&got), values(&want), "gated: {gated}");
        // A gradient that comes in transposed.
        let transposed = dy.transpose(0, 1).unwrap();
        let packed = view(&x).unwrap().contiguous().unwrap();
        let (_, got) = with_gradient(&packed, &transposed, |x| f(x)?.transpose(0, 1));
        let (_, want) = with_gradient(&packed, &dy, f);
        assert_eq!(values(&got), values(&want), "gated: {gated}");
    }
}

#[test]
fn empty_tensors_and_scalars_go_through_forward_and_backward() {
    for activation in all() {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            for dims in [vec![0], vec![0, 4], vec![3, 0], vec![2, 0, 6], vec![]] {
                let x = Tensor::ones(dims.as_slice(), dtype, &Device::Cpu).unwrap();
                let (y, dx) = with_gradient(&x, &x, |x| activation.forward(x));
                assert_eq!((y.dims(), dx.dims()), (dims.as_slice(), dims.as_slice()), "{activation}");
            }
            for dims in [vec![0], vec![0, 4], vec![3, 0], vec![2, 0, 6]] {
                let x = Tensor::ones(dims.as_slice(), dtype, &Device::Cpu).unwrap();
                let y = activation.gated(&x).unwrap();
                assert_eq!(y.dims().last(), dims.last().map(|d| d / 2).as_ref());
                let (_, dx) = with_gradient(&x, &y, |x| activation.gated(x));
                assert_eq!(dx.dims(), dims.as_slice());
            }
        }
    }
}

#[test]
fn the_output_at_a_position_depends_on_no_other_position() {
    // (batch, seq, dim): changing what comes after t leaves the bits up to t as they were.
    let x = grid(&[2, 9, 12], DType::F32, 10);
    let t = 4;
    let later = grid(&[2, 9 - t, 12], DType::F32, 11);
    let changed = Tensor::cat(&[x.narrow(1, 0, t).unwrap(), later], 1).unwrap();
    for activation in all() {
        let until = |y: Tensor| values(&y.narrow(1, 0, t).unwrap());
        assert_eq!(until(activation.forward(&x).unwrap()), until(activation.forward(&changed).unwrap()));
        assert_eq!(until(activation.gated(&x).unwrap()), until(activation.gated(&changed).unwrap()));
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads_or_the_place_in_the_tensor() {
    let run = |threads: usize, activation: Activation, dtype: DType| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            // Several chunks and a rest.
            let x = grid(&[3, 34_567], dtype, 12).narrow(1, 0, 34_566).unwrap().contiguous().unwrap();
            let dy = grid(&[3, 34_566], dtype, 13);
            let half = dy.narrow(1, 0, 17_283).unwrap();
            let (y, dx) = with_gradient(&x, &dy, |x| activation.forward(x));
            let (gy, gdx) = with_gradient(&x, &half, |x| activation.gated(x));
            [y, dx, gy, gdx].map(|t| values(&t))
        })
    };
    for activation in [Activation::default(), Activation::Era(Era::gelu_softplus()), Activation::Gelu] {
        for dtype in [DType::F32, DType::BF16] {
            let one = run(1, activation, dtype);
            for threads in [2, 5] {
                assert!(
                    run(threads, activation, dtype) == one,
                    "{activation} in {dtype:?}, {threads} threads"
                );
            }
        }
        let x = grid(&[1000], DType::F32, 14);
        let all = values(&activation.forward(&x).unwrap());
        for i in [0, 1, 7, 8, 500, 997, 999] {
            assert_eq!(values(&activation.forward(&x.narrow(0, i, 1).unwrap()).unwrap()), [all[i]]);
        }
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let era = Era::default();
    let message = |r: candle_core::Result<Tensor>| r.unwrap_err().to_string();
    let integers = Tensor::new(&[1u32, 2], &Device::Cpu).unwrap();
    assert!(
        message(era.forward(&integers)).contains("expected a tensor of dtype f32, f64, bf16 or f16, got U32")
    );
    assert!(message(era.gated(&integers)).contains("got U32"));
    let odd = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(message(era.gated(&odd)).contains("last dimension is even, got shape [2, 3]"));
    let scalar = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    assert!(message(era.gated(&scalar)).contains("got shape []"));
    let cold = Era::GateEntropy { temperature: 0.0, strength: 0.1 };
    assert!(
        message(cold.forward(&odd)).contains("gate_entropy: temperature must be from 1e-6 to 1e6, got 0")
    );
}

#[test]
fn parameters_outside_their_range_are_refused_by_name() {
    let gate = |temperature, strength| Era::GateEntropy { temperature, strength }.validate();
    for bad in [0.0, -1.0, 9e-7, 2e6, f64::NAN, f64::INFINITY] {
        assert!(matches!(gate(bad, 0.1), Err(Error::Parameter { parameter: "temperature", .. })), "{bad}");
    }
    for bad in [f64::NAN, f64::INFINITY, 1e39] {
        assert!(matches!(gate(1.0, bad), Err(Error::Parameter { parameter: "strength", .. })), "{bad}");
        let softplus = Era::GeluSoftplus { gamma: bad };
        assert!(matches!(softplus.validate(), Err(Error::Parameter { parameter: "gamma", .. })), "{bad}");
    }
    for activation in all() {
        assert_eq!(activation.validate(), Ok(()));
    }
}

#[test]
fn configurations_read_back_as_they_were_written_and_unknown_fields_are_refused() {
    for activation in all() {
        let text = serde_json::to_string(&activation).unwrap();
        assert_eq!(serde_json::from_str::<Activation>(&text).unwrap(), activation, "{text}");
    }
    let read = |text: &str| serde_json::from_str::<Activation>(text);
    assert_eq!(read(r#"{"era": {"gate_entropy": {}}}"#).unwrap(), Activation::default());
    assert_eq!(read(r#""relu_squared""#).unwrap(), Activation::ReluSquared);
    assert!(
        read(r#"{"era": {"gate_entropy": {"temprature": 2.0}}}"#)
            .unwrap_err()
            .to_string()
            .contains("temprature")
    );
    assert!(read(r#""tanh""#).is_err());
}

#[test]
fn names_are_read_as_they_are_printed() {
    let named = ["era", "era_gelu_softplus", "silu", "gelu_tanh", "gelu", "relu", "relu_squared"];
    for name in named {
        assert_eq!(name.parse::<Activation>().unwrap().to_string(), name);
    }
    assert_eq!("gelu_pytorch_tanh".parse(), Ok(Activation::GeluTanh));
    let error = "tanh".parse::<Activation>().unwrap_err();
    assert!(
        error.to_string().contains("\"tanh\"") && error.to_string().contains(&named.join(", ")),
        "{error}"
    );
}

#[test]
fn both_enums_are_candle_modules() {
    fn apply(module: impl candle_nn::Module + 'static, x: &Tensor) -> Tensor {
        candle_nn::seq().add(module).add(candle_nn::Activation::Relu).forward_t(x, true).unwrap()
    }
    use candle_nn::ModuleT;
    let x = grid(&[5], DType::F32, 15);
    let want = values(&Era::default().forward(&x).unwrap().relu().unwrap());
    assert_eq!(values(&apply(Era::default(), &x)), want);
    assert_eq!(values(&apply(Activation::default(), &x)), want);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_view_of_any_shape_equals_the_elementwise_function(
        dims in proptest::collection::vec(1usize..7, 1..5),
        swap in (0usize..4, 0usize..4),
        cut in (0usize..4, 0usize..6),
        which in 0usize..14,
        seed in 0u64..1000,
    ) {
        let activation = all()[which];
        let rank = dims.len();
        let x = grid(&dims, DType::F32, seed).transpose(swap.0 % rank, swap.1 % rank).unwrap();
        let axis = cut.0 % rank;
        let start = cut.1 % x.dims()[axis];
        let x = Var::from_tensor(&x.narrow(axis, start, x.dims()[axis] - start).unwrap()).unwrap();
        let view = x.as_tensor();
        let one_by_one: Vec<f64> = values(view)
            .iter()
            .map(|v| values(&activation.forward(&tensor(&[*v], DType::F32)).unwrap())[0])
            .collect();
        prop_assert_eq!(values(&activation.forward(view).unwrap()), one_by_one);
    }
}
