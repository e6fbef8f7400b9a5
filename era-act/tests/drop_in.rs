//! In the place of candle-nn's own activation, and causal in a model.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use common::{all, noise, tensor, values};
use era_act::{Activation, Era, LearnedEra};

type Function = Box<dyn Fn(&Tensor) -> Tensor>;

#[test]
fn candle_nns_activations_turn_into_the_same_functions() {
    use candle_nn::Activation as Candle;
    let x = tensor(&noise(400, 6.0, 1), DType::F64);
    for candle in [
        Candle::Silu,
        Candle::Swish,
        Candle::Gelu,
        Candle::NewGelu,
        Candle::GeluPytorchTanh,
        Candle::Relu,
        Candle::Relu2,
    ] {
        let ours = Activation::try_from(candle).unwrap();
        let (got, want) = (Module::forward(&ours, &x).unwrap(), candle.forward(&x).unwrap());
        for (got, want) in values(&got).iter().zip(values(&want)) {
            assert!((got - want).abs() < 1e-7, "{candle:?} and {ours}: {got} and {want}");
        }
    }
    let error = Activation::try_from(Candle::Elu(1.0)).unwrap_err().to_string();
    assert!(error.contains("Elu(1.0) is not one of era-act's"), "{error}");
}

#[test]
fn configurations_read_the_names_of_hugging_face_and_era_with_its_parameters() {
    #[derive(serde::Deserialize)]
    struct Config {
        hidden_act: Activation,
    }
    let read = |act: &str| -> Activation {
        serde_json::from_str::<Config>(&format!("{{\"hidden_act\": {act}}}")).unwrap().hidden_act
    };
    for (name, want) in [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
        ("relu2", Activation::ReluSquared),
    ] {
        assert_eq!(read(&format!("{name:?}")), want, "{name}");
        assert_eq!(name.parse::<Activation>().unwrap(), want, "{name}");
    }
    let era = read(r#"{"era": {"gate_entropy": {"strength": 0.3}}}"#);
    assert_eq!(era, Activation::Era(Era::GateEntropy { temperature: 1.0, strength: 0.3 }));
    assert_eq!(read("\"era\""), Activation::default());
    assert_eq!(read("\"era_gelu_softplus\""), Activation::Era(Era::gelu_softplus()));
    for activation in all() {
        let text = serde_json::to_string(&activation).unwrap();
        assert_eq!(read(&text), activation, "{text}");
    }
    let error = |act: &str| serde_json::from_str::<Activation>(act).unwrap_err().to_string();
    assert!(
        error("\"elu\"").contains("unknown activation \"elu\", expected one of era, "),
        "{}",
        error("\"elu\"")
    );
    assert!(error("3").contains("the name of an activation"), "{}", error("3"));
    assert!(error(r#"{"era": {"gate_entropy": {"strong": 1}}}"#).contains("strong"));
}

#[test]
fn the_output_at_a_position_does_not_depend_on_any_other_position() {
    // (batch, t, d): later tokens, and other sequences, are changed.
    let x = tensor(&noise(2 * 6 * 8, 3.0, 2), DType::F32).reshape((2, 6, 8)).unwrap();
    let other = tensor(&noise(2 * 6 * 8, 50.0, 3), DType::F32).reshape((2, 6, 8)).unwrap();
    let mut functions: Vec<(String, Function)> = Vec::new();
    for activation in all() {
        functions.push((activation.to_string(), Box::new(move |x| activation.forward(x).unwrap())));
        functions.push((format!("gated {activation}"), Box::new(move |x| activation.gated(x).unwrap())));
    }
    let learned = LearnedEra::alone(Era::default(), &Device::Cpu).unwrap();
    functions.push(("learned".into(), Box::new(move |x| learned.forward(x).unwrap())));
    for (name, f) in functions {
        let whole = f(&x).narrow(0, 0, 1).unwrap();
        for t in 1..6 {
            let past = x.narrow(0, 0, 1).unwrap().narrow(1, 0, t).unwrap();
            let future = other.narrow(0, 0, 1).unwrap().narrow(1, t, 6 - t).unwrap();
            let changed = Tensor::cat(&[&past, &future], 1).unwrap();
            let changed = Tensor::cat(&[&changed, &other.narrow(0, 1, 1).unwrap()], 0).unwrap();
            let y = f(&changed).narrow(0, 0, 1).unwrap().narrow(1, 0, t).unwrap();
            assert_eq!(values(&y), values(&whole.narrow(1, 0, t).unwrap()), "{name} at {t}");
        }
    }
}
