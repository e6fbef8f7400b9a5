//! What is said of the parameters: those that no gradient reaches, and how many there are.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use common::{adapter, frozen, lora, noise};
use flylora::{
    Adapter, AdapterKind, Baseline, Counted, Error, FlyLoraConfig, FrozenLinear, LoraAdapter, LoraConfig,
    LoraEmbedding, ParameterReport, Place,
};

#[test]
fn the_audit_names_the_first_variable_that_is_cut_off_and_where() {
    let layers: Vec<_> = ["a", "b"].iter().map(|name| adapter(&lora(2), name, 5)).collect();
    let names = |layers: &[Arc<dyn Adapter>]| -> Vec<(String, Var)> {
        let of = |(i, a): (usize, &Arc<dyn Adapter>)| {
            a.parameters().into_iter().map(|(p, var)| (format!("layers.{i}.{p}"), var)).collect::<Vec<_>>()
        };
        layers.iter().enumerate().flat_map(of).collect()
    };
    let x = noise(&[4, 20], 1.0, DType::F32, 9);
    let first = layers[0].delta(&x).unwrap();
    let wide = Tensor::cat(&[&first, &first.narrow(1, 0, 8).unwrap()], 1).unwrap();
    let run = |middle: &Tensor| layers[1].delta(middle).unwrap().sqr().unwrap().sum_all().unwrap();
    flylora::audit(names(&layers), &run(&wide).backward().unwrap()).unwrap();
    // candle's rms_norm has no backward pass and does not say so.
    let norm = |x: &Tensor| candle_nn::ops::rms_norm(x, &Tensor::ones(20, DType::F32, x.device())?, 1e-5);
    let grads = run(&norm(&wide).unwrap()).backward().unwrap();
    let error = flylora::audit(names(&layers), &grads).unwrap_err();
    let Error::NoGradient { parameter, why } = &error else { panic!("{error}") };
    assert_eq!(parameter, "layers.0.lora_A.weight");
    assert!(why.as_ref().unwrap().starts_with("layers.1.lora_A.weight, which comes after it, has one"));
    // Which op it is, the stages tell.
    let stages: Vec<flylora::Stage<'_>> = vec![
        ("layers.0", Box::new(|x| layers[0].delta(x))),
        ("widen", Box::new(|x| Tensor::cat(&[x, &x.narrow(1, 0, 8)?], 1))),
        ("norm", Box::new(norm)),
        ("layers.1", Box::new(|x| layers[1].delta(x))),
    ];
    let error = flylora::trace(&x, &stages).unwrap_err().to_string();
    assert!(error.starts_with("the input of norm has no gradient"), "{error}");
}

#[test]
fn the_audit_tells_a_layer_that_is_not_used_from_a_loss_that_is_cut_off() {
    let square = FrozenLinear::new(noise(&[20, 20], 0.3, DType::F32, 1), None).unwrap();
    let names = ["a", "b", "c"];
    let layers: Vec<Arc<dyn Adapter>> = names
        .iter()
        .map(|name| lora(2).build(&square, &Place::alone(*name, DType::F32, &Device::Cpu)).unwrap())
        .collect();
    let parameters: Vec<(String, Var)> = names
        .iter()
        .zip(&layers)
        .flat_map(|(name, a)| a.parameters().into_iter().map(move |(p, var)| (format!("{name}.{p}"), var)))
        .collect();
    let x = noise(&[4, 20], 1.0, DType::F32, 9);
    let audited = |used: &[usize], cut: bool| {
        let mut y = x.clone();
        for i in used {
            y = (&y + layers[*i].delta(&y).unwrap()).unwrap();
        }
        let y = if cut {
            y.detach() + Var::zeros(1, DType::F32, &Device::Cpu).unwrap().broadcast_as((4, 20))
        } else {
            Ok(y)
        };
        flylora::audit(parameters.clone(), &y.unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap())
            .map_err(|e| e.to_string())
    };
    // B is 0, so A's gradient is zeros: that is not a missing one.
    assert_eq!(audited(&[0, 1, 2], false), Ok(()));
    for (used, cut, name, why) in [
        (&[1, 2][..], false, "a.lora_A.weight", "b.lora_A.weight, which comes after it, has one"),
        (&[0, 2], false, "b.lora_A.weight", "c.lora_A.weight, which comes after it, has one"),
        (
            &[0, 1],
            false,
            "c.lora_A.weight",
            "those before it have one, and none from there on: the layer is not used",
        ),
        (&[0, 1, 2], true, "a.lora_A.weight", "no parameter has one: the loss is cut off behind all of them"),
    ] {
        let error = audited(used, cut).unwrap_err();
        assert!(error.starts_with(&format!("{name} has no gradient: {why}")), "{error}");
    }
}

#[test]
fn the_report_counts_and_names_what_it_compares_with() {
    let fly = AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(8, 2));
    let adapters = [("q", adapter(&lora(4), "q", 1)), ("v", adapter(&fly, "v", 2))];
    let of =
        |baseline| ParameterReport::new(adapters.iter().map(|(n, a)| (*n, a)), Some(1000), Some(baseline));
    let report = of(Baseline::lora(8));
    assert_eq!((report.trainable, report.active_per_token), (4 * 32 + 8 * 12, 4 * 32 + 2 * 12));
    assert_eq!(report.baseline.as_ref().unwrap().trainable, 2 * 8 * 32);
    assert_eq!(report.fewer_than_baseline(), Some(100.0 * (1.0 - 224.0 / 512.0)));
    assert!((report.percent().unwrap() - 100.0 * 224.0 / 1224.0).abs() < 1e-12);
    let text = report.to_string();
    assert!(
        text.contains("56.2 % fewer than LoRA of rank 8 on the same modules, which trains 512"),
        "{text}"
    );
    assert!(of(Baseline::lora(1)).to_string().contains("more than LoRA of rank 1"));
    assert_eq!(of(Baseline::FullWeights).baseline.unwrap().trainable, 2 * 240);
    let none: [(&str, &LoraAdapter); 0] = [];
    assert_eq!(ParameterReport::new(none, Some(0), None).percent(), None);
    // Embeddings beside layers: of A a token makes use of its own column.
    let table = noise(&[9, 6], 1.0, DType::F32, 1);
    let place = Place::alone("embed", DType::F32, &Device::Cpu);
    let config = LoraConfig::default().with_r(2);
    let embedding = LoraEmbedding::new(table.clone(), &config, &place).unwrap();
    let dora = LoraEmbedding::dora(table, &config, &place).unwrap();
    let q = flylora::AnyLinear::from_parts(frozen(), Arc::clone(&adapters[0].1)).unwrap();
    let all: [(&str, &dyn Counted); 3] = [("q", &q), ("embed", &embedding), ("other", &dora)];
    let report = ParameterReport::new(all, None, Some(Baseline::FullWeights));
    let of = |i: usize| (report.adapters[i].trainable, report.adapters[i].active_per_token);
    assert_eq!((of(1), of(2)), ((2 * (9 + 6), 2 * (1 + 6)), (2 * (9 + 6) + 6, 2 * (1 + 6) + 6)));
    assert_eq!(report.adapters[2].kind, "DoRA");
    assert_eq!(report.trainable, 4 * 32 + 2 * 30 + 6);
    assert_eq!(report.baseline.unwrap().trainable, 240 + 2 * 54);
}
