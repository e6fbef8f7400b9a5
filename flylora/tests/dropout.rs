//! Dropout on the input of an adapter: what it does, its gradients, and what files say of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use common::{assert_slopes, move_all, noise, values};
use flylora::files::PeftConfig;
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, AnyLinear, FrozenLinear, LoraAdapter, LoraConfig, MaskedLoraConfig,
    Place, load_adapters, save_adapters,
};

const RATE: f64 = 0.3;
const NAME: &str = "layer";

fn lora() -> LoraConfig {
    LoraConfig::default().with_r(4).with_alpha(6.0).with_seed(5).with_dropout(RATE)
}

fn kinds() -> Vec<AdapterKind> {
    let ada = AdaLoraConfig::default().with_init_r(4).with_seed(5).with_dropout(RATE);
    vec![
        AdapterKind::Lora(lora()),
        AdapterKind::Dora(lora()),
        AdapterKind::AdaLora(ada),
        AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora())),
    ]
}

/// A layer of 7 to 5 with all its parameters away from where they start.
fn layer(kind: &AdapterKind) -> AnyLinear {
    let base = common::base(7, 5, DType::F64, true);
    let base = FrozenLinear::try_from(&base).unwrap();
    let layer = AnyLinear::build(base, kind, &Place::alone(NAME, DType::F64, &Device::Cpu)).unwrap();
    move_all(layer.vars(), 0.4, 30);
    layer
}

/// What a pass leaves of x: the change of an adapter whose factors are the identity, of the same seed and name.
fn left(x: &Tensor, pass: u64) -> Tensor {
    let n = x.dim(D::Minus1).unwrap();
    let config = lora().with_r(n).with_alpha(n as f64);
    let one = LoraAdapter::seeded(n, n, &config, NAME, x.dtype(), &Device::Cpu).unwrap();
    for var in [one.a(), one.b()] {
        var.set(&Tensor::eye(n, x.dtype(), &Device::Cpu).unwrap()).unwrap();
    }
    one.set_training(Some(pass));
    one.delta(x).unwrap()
}

fn close(a: &Tensor, b: &Tensor, what: &str) {
    for (a, b) in values(a).into_iter().zip(values(b)) {
        assert!((a - b).abs() < 1e-12 * (1.0 + b.abs()), "{what}: {a} and {b}");
    }
}

#[test]
fn every_kind_reads_what_is_left_of_the_input_and_its_layer_all_of_it() {
    let x = noise(&[3, 40, 7], 1.0, DType::F64, 20);
    let left = left(&x, 9);
    let zeros = values(&left).iter().filter(|v| **v == 0.0).count() as f64 / left.elem_count() as f64;
    assert!((zeros - RATE).abs() < 0.05, "{zeros}");
    for kind in kinds() {
        let layer = layer(&kind);
        let (plain, of_left) = (layer.forward(&x).unwrap(), layer.adapter().delta(&left).unwrap());
        layer.set_training(Some(9));
        let y = layer.forward(&x).unwrap();
        close(&y, &(layer.base().forward(&x).unwrap() + &of_left).unwrap(), &kind.to_string());
        assert_ne!(values(&y), values(&plain));
        layer.set_training(Some(10));
        assert_ne!(values(&layer.forward(&x).unwrap()), values(&y), "another pass drops others");
        layer.set_training(None);
        assert_eq!(values(&layer.forward(&x).unwrap()), values(&plain), "evaluation drops nothing");
    }
}

#[test]
fn many_passes_are_on_average_the_pass_without_dropout() {
    let x = noise(&[6, 7], 1.0, DType::F64, 21);
    let layer = layer(&AdapterKind::Lora(lora()));
    let want = layer.forward(&x).unwrap();
    let passes = 4000;
    let mut sum = want.zeros_like().unwrap();
    for pass in 0..passes {
        layer.set_training(Some(pass));
        sum = (sum + layer.forward(&x).unwrap()).unwrap();
    }
    let off = ((sum / passes as f64).unwrap() - &want).unwrap();
    let spread = values(&off).into_iter().fold(0.0, |most: f64, v| most.max(v.abs()));
    assert!(spread < 0.06, "{spread}");
}

#[test]
fn gradients_equal_central_differences_of_the_same_pass() {
    for kind in kinds() {
        // Straight through a mask is no derivative, and DoRA's norm is held constant: those of x alone are.
        let all = matches!(kind, AdapterKind::Lora(_) | AdapterKind::AdaLora(_));
        let layer = layer(&kind);
        layer.set_training(Some(3));
        let x = Var::from_tensor(&noise(&[6, 7], 1.0, DType::F64, 22)).unwrap();
        let weights = noise(&[6, 5], 1.0, DType::F64, 23);
        let loss = || (layer.forward(&x).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
        let grads = loss().backward().unwrap();
        let mut of = vec![("x".to_owned(), x.clone())];
        of.extend(layer.parameters());
        for (name, var) in of {
            let got = grads.get(&var);
            assert!(got.is_some(), "{kind}: {name} has no gradient");
            if name != "x" && !all {
                continue;
            }
            assert_slopes(&format!("{kind} {name}"), got, &var, loss, 1e-7);
        }
    }
}

#[test]
fn files_hold_the_rate_and_refuse_one_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    for kind in kinds() {
        let saved = layer(&kind);
        save_adapters(dir.path(), &[(NAME, &saved)]).unwrap();
        let path = dir.path().join("adapter_config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"lora_dropout\": 0.3"), "{text}");
        let read = PeftConfig::read(dir.path()).unwrap().kind(NAME).unwrap();
        let rate = match &read {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.dropout,
            AdapterKind::MaskedLora(c) => c.lora.dropout,
            AdapterKind::AdaLora(c) => c.dropout,
            other => panic!("{other}"),
        };
        assert_eq!(rate, RATE, "{kind}");
        load_adapters(dir.path(), &[(NAME, &saved)]).unwrap();
        for wrong in ["1.0", "-0.1", "\"much\""] {
            std::fs::write(&path, text.replace("0.3", wrong)).unwrap();
            let error = PeftConfig::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("lora_dropout"), "{error}");
        }
        std::fs::write(&path, text.replace("0.3", "null")).unwrap();
        assert!(PeftConfig::read(dir.path()).is_ok());
    }
    let fly = r#"{"peft_type": "FLYLORA", "r": 4, "fly_k": 2, "fly_density": 0.5, "lora_alpha": 8, "lora_dropout": 0.1}"#;
    std::fs::write(dir.path().join("adapter_config.json"), fly).unwrap();
    let error = PeftConfig::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("lora_dropout") && error.contains("0.1"), "{error}");
    for rate in [-0.1, 1.0, f64::NAN] {
        assert!(lora().with_dropout(rate).validate().is_err());
        assert!(AdaLoraConfig::default().with_dropout(rate).validate().is_err());
    }
}
