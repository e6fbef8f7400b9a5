use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use vesper_model::VesperLM;
use vesper_model::metacognition::{Choice, ErrorKind, HeadConfig, KindRule, Predictions, TokenStatistics};

use crate::model;

#[test]
fn statistics_are_those_of_the_softmax() {
    let logits: Vec<f32> = (0..50_u8).map(|i| (f32::from(i) * 1.7).sin() * 3.0 + 100.0).collect();
    let row = Tensor::new(logits.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let p = candle_nn::ops::softmax(&row, 0).unwrap().to_vec1::<f64>().unwrap();
    let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
    for chosen in [0, 17, 49] {
        let statistics = TokenStatistics::of(&logits, chosen).unwrap();
        let own = p[chosen as usize];
        let others = p.iter().enumerate().filter(|(id, _)| *id != chosen as usize);
        let other = others.map(|(_, p)| *p).fold(0.0, f64::max);
        assert!((statistics.probability - own).abs() < 1e-9);
        assert!((statistics.margin - (own - other)).abs() < 1e-9);
        assert!((statistics.entropy - entropy).abs() < 1e-9);
        assert!((statistics.largest - p.iter().copied().fold(0.0, f64::max)).abs() < 1e-9);
    }
    // The lowest id among equals, as everywhere in this crate.
    assert_eq!(TokenStatistics::greedy(&[1.0, 2.0, 2.0]).unwrap().chosen, 1);
    let certain = TokenStatistics::greedy(&[f32::NEG_INFINITY, 5.0]).unwrap();
    assert_eq!((certain.probability, certain.entropy, certain.margin), (1.0, 0.0, 1.0));
    for wrong in [&[f32::NAN, 0.0][..], &[f32::INFINITY], &[f32::NEG_INFINITY; 3], &[]] {
        assert!(TokenStatistics::greedy(wrong).is_err(), "{wrong:?}");
    }
    assert!(TokenStatistics::of(&[0.0, 1.0], 2).unwrap_err().to_string().contains("token id 2"));
}

#[test]
fn kinds_part_where_the_rule_says() {
    use ErrorKind::{Confident, Far, Near, None};

    let logits = [0.0, 3.0, 2.0, 2.0, 1.0]; // ranks: 1, 2, 3, 4, 0
    let greedy = TokenStatistics::greedy(&logits).unwrap();
    let kinds = |near, confident, choice: &TokenStatistics| {
        (0..5)
            .map(|target| KindRule { near, confident }.kind(&logits, choice, target).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds(2, 1.0, &greedy), [Far, None, Near, Far, Far]);
    assert_eq!(kinds(3, 1.0, &greedy), [Far, None, Near, Near, Far]);
    assert_eq!(kinds(3, 0.1, &greedy), [Confident, None, Confident, Confident, Confident]);
    // A drawn token: the likeliest is then the nearest of the others.
    let drawn = TokenStatistics::of(&logits, 4).unwrap();
    assert_eq!(kinds(1, 1.0, &drawn), [Far, Near, Far, Far, None]);
    assert!(KindRule::default().kind(&logits, &greedy, 5).is_err());
}

#[test]
fn predictions_are_of_every_counted_target() {
    let lm = model::of_seed(0);
    let ids = model::ids(0);
    let targets = model::targets(&lm, &ids);
    let all = model::predictions(&lm, &HeadConfig::default(), 0..1);
    assert_eq!((all.len(), all.hidden().unwrap().dims()), (128, &[128, 32][..]));
    let read = ids.flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let odd: Vec<bool> = read.iter().map(|id| id % 2 == 1).collect();
    assert_eq!(all.wrong(), odd, "by the rule of the text");

    // Every other target is left out.
    let flat = targets.flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let some: Vec<u32> = flat.iter().zip(0..).map(|(t, i)| if i % 2 == 0 { *t } else { u32::MAX }).collect();
    let some = Tensor::from_vec(some, (4, 32), &Device::Cpu).unwrap();
    let mut half = Predictions::new(&HeadConfig::default()).unwrap();
    half.add(&lm, &ids, &some).unwrap();
    assert_eq!(half.len(), 64);
    let every_other: Vec<_> = all.statistics().iter().step_by(2).copied().collect();
    assert_eq!(half.statistics(), every_other);
    let hidden = all.hidden().unwrap().to_vec2::<f32>().unwrap();
    let kept: Vec<_> = hidden.into_iter().step_by(2).collect();
    assert_eq!(half.hidden().unwrap().to_vec2::<f32>().unwrap(), kept);

    let mut none = Predictions::new(&HeadConfig::default()).unwrap();
    none.add(&lm, &ids, &Tensor::full(u32::MAX, (4, 32), &Device::Cpu).unwrap()).unwrap();
    assert!(none.is_empty() && none.hidden().unwrap_err().to_string().contains("empty"));
}

#[test]
fn drawn_choices_depend_on_their_seed_alone() {
    let lm = model::of_seed(0);
    let drawn = |seed, temperature| {
        let config = HeadConfig::default().with_choice(Choice::Drawn { temperature, seed });
        let all = model::predictions(&lm, &config, 0..1);
        all.statistics().iter().map(|statistics| statistics.chosen).collect::<Vec<_>>()
    };
    assert_eq!(drawn(1, 1.0), drawn(1, 1.0));
    assert_ne!(drawn(1, 1.0), drawn(2, 1.0));
    // At a very low temperature the likeliest is drawn.
    let greedy = model::predictions(&lm, &HeadConfig::default(), 0..1);
    let greedy: Vec<u32> = greedy.statistics().iter().map(|statistics| statistics.chosen).collect();
    assert_eq!(drawn(1, 1e-5), greedy);
    let config = HeadConfig::default().with_choice(Choice::Drawn { temperature: 0.0, seed: 0 });
    assert!(Predictions::new(&config).unwrap_err().to_string().contains("choice.temperature is 0"));
}

#[test]
fn a_model_that_computes_nan_is_refused() {
    let lm = model::of_seed(0);
    let mut weights = lm.weights();
    let norm = weights.get_mut("model.norm.weight").unwrap();
    *norm = norm.affine(f64::NAN, 0.0).unwrap();
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let broken = VesperLM::new(&model::config(), vb).unwrap();
    let mut predictions = Predictions::new(&HeadConfig::default()).unwrap();
    let error = predictions.add(&broken, &model::ids(0), &model::ids(1)).unwrap_err();
    assert!(error.to_string().contains("hidden state is NaN"), "{error}");
    assert!(predictions.is_empty());

    let shorter = model::ids(1).narrow(1, 0, 8).unwrap();
    assert!(predictions.add(&lm, &model::ids(0), &shorter).is_err());
    let outside = Tensor::full(999_u32, (4, 32), &Device::Cpu).unwrap();
    let error = predictions.add(&lm, &model::ids(0), &outside).unwrap_err();
    assert!(error.to_string().contains("token id 999"), "{error}");
}

#[test]
fn settings_out_of_range_are_named() {
    let rule = |near, confident| HeadConfig::default().with_kinds(KindRule { near, confident }).validate();
    assert!(rule(0, 0.5).unwrap_err().to_string().contains("near is 0"));
    assert!(rule(1, 0.0).unwrap_err().to_string().contains("confident is 0"));
    assert!(rule(1, f64::NAN).is_err() && rule(1, 1.1).is_err() && rule(1, 1.0).is_ok());
    assert!(HeadConfig::default().with_units(1 << 20).validate().unwrap_err().to_string().contains("units"));
}
