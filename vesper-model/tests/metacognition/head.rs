use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use velvet_optim::{Velvet, VelvetConfig};
use vesper_model::generate::NextLogits;
use vesper_model::metacognition::metrics::{auroc, expected_calibration_error};
use vesper_model::metacognition::{
    BaseModel, Calibrated, Confidence, ErrorHead, ErrorKind, ErrorScore, Features, HeadConfig, HeadTraining,
    Introspective, KindRule, Measure, Method, TokenStatistics, TokenView,
};

use crate::model;

#[test]
fn a_head_learns_errors_that_the_distribution_does_not_show() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(16);
    let test = model::predictions(&lm, &config, 40..48);
    let wrong = test.wrong();
    // The errors follow the parity of the token before.
    let plain = auroc(&Measure::Probability.scores(&test).unwrap(), &wrong).unwrap();
    assert!((0.3..0.7).contains(&plain), "{plain}");
    for units in [0, 16] {
        let (head, trained) = model::trained(&lm, &config.with_units(units), 1);
        assert_eq!((trained.losses.len(), trained.steps), (12, 12 * 12 * 128 / 64));
        assert!(trained.losses[11] < 0.7 * trained.losses[0], "{:?}", trained.losses);
        let learned = auroc(&head.scores(&test).unwrap(), &wrong).unwrap();
        assert!(learned > 0.9, "{units} units: {learned}");
    }
}

#[test]
fn every_parameter_receives_a_gradient_and_changes() {
    /// Looks at the gradients before the step.
    struct Watched(Velvet, Vec<(String, candle_core::Var)>, usize);

    impl Optimizer for Watched {
        type Config = ();
        fn new(_: Vec<candle_core::Var>, (): ()) -> candle_core::Result<Self> {
            unreachable!()
        }
        fn step(&mut self, grads: &candle_core::backprop::GradStore) -> candle_core::Result<()> {
            for (name, var) in &self.1 {
                let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
                let size = grad.abs()?.sum_all()?.to_scalar::<f32>()?;
                assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
            }
            self.2 += 1;
            self.0.step(grads)
        }
        fn learning_rate(&self) -> f64 {
            self.0.learning_rate()
        }
        fn set_learning_rate(&mut self, lr: f64) {
            self.0.set_learning_rate(lr);
        }
    }

    let lm = model::of_seed(0);
    let base = BaseModel::of(&lm).unwrap();
    for features in [Features::Hidden, Features::Statistics, Features::Both] {
        for units in [0, 8] {
            // Every kind occurs, so that every output is pushed somewhere.
            let kinds = KindRule { near: 8, confident: 0.02 };
            let config = HeadConfig::default().with_features(features).with_units(units).with_kinds(kinds);
            let predictions = model::predictions(&lm, &config, 0..2);
            let head = ErrorHead::new(&base, &config, &predictions, 3).unwrap();
            let before: Vec<_> =
                head.parameters().iter().map(|(_, var)| var.as_detached_tensor().copy().unwrap()).collect();
            let optimizer = Velvet::named(head.parameters(), VelvetConfig::default()).unwrap();
            let mut watched = Watched(optimizer, head.parameters(), 0);
            let training = HeadTraining { epochs: 1, batch: 128, seed: 0 };
            training.run(&head, &predictions, &mut watched).unwrap();
            assert_eq!(watched.2, 2);
            assert_eq!(head.parameters().len(), if units == 0 { 2 } else { 4 });
            for ((name, after), before) in head.parameters().iter().zip(before) {
                let moved = (after.as_tensor() - before).unwrap().abs().unwrap().max_all().unwrap();
                assert!(moved.to_scalar::<f32>().unwrap() > 0.0, "{name} {features:?}");
            }
            assert_eq!(watched.learning_rate(), 1e-3, "as it was given");
        }
    }
}

#[test]
fn a_head_depends_on_its_seeds_alone() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(4);
    let test = model::predictions(&lm, &config, 40..41);
    let scores = |seed| model::trained(&lm, &config, seed).0.scores(&test).unwrap();
    assert_eq!(scores(5), scores(5));
    assert_ne!(scores(5), scores(6));
}

#[test]
fn calibration_on_other_predictions_lowers_the_calibration_error() {
    let lm = model::of_seed(0);
    // The distribution says nothing here: half of everything is wrong.
    let config = HeadConfig::default().with_units(16).with_features(Features::Statistics);
    let (head, _) = model::trained(&lm, &config, 2);
    let (fit, test) = (model::predictions(&lm, &config, 20..32), model::predictions(&lm, &config, 40..60));
    let error = |head: &ErrorHead| {
        let p: Vec<f64> = head.assess_all(&test).unwrap().iter().map(|a| a.p_wrong).collect();
        expected_calibration_error(&p, &test.wrong()).unwrap()
    };
    // Overconfident by a factor.
    let head =
        head.with_calibration(vesper_model::metacognition::Calibration::Platt { slope: 5.0, offset: 2.0 });
    let before = error(&head);
    for method in [Method::Temperature, Method::Platt, Method::Isotonic] {
        let copy = model::trained(&lm, &config, 2).0.calibrate(method, &fit).unwrap();
        let after = error(&copy);
        assert!(after < before, "{method:?}: {before} {after}");
    }
}

#[test]
fn the_kinds_are_a_distribution_and_agree_with_the_probability() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(4);
    let head = model::trained(&lm, &config, 0).0;
    let test = model::predictions(&lm, &config, 40..41);
    let head = head.calibrate(Method::Platt, &test).unwrap();
    for assessment in head.assess_all(&test).unwrap() {
        let kinds = assessment.kinds;
        assert!((kinds.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((kinds[ErrorKind::None as usize] - (1.0 - assessment.p_wrong)).abs() < 1e-12);
        assert!((head.calibration().apply(assessment.score) - assessment.p_wrong).abs() < 1e-12);
    }
    assert_eq!(head.assess(None, &[]).unwrap(), []);
}

#[test]
fn a_token_at_a_time_is_assessed_as_the_whole_text() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(8);
    let head = model::trained(&lm, &config, 0).0;
    let test = model::predictions(&lm, &config, 40..41);
    let all = head.assess_all(&test).unwrap();
    let first_row = model::ids(40).to_vec2::<u32>().unwrap().remove(0);
    let mut session = lm.session(32).unwrap();
    for (id, whole) in first_row.iter().zip(&all) {
        let logits = session.append(&[*id]).unwrap();
        let statistics = TokenStatistics::greedy(&logits).unwrap();
        let view = TokenView { statistics, hidden: session.hidden_state() };
        let p = head.confidence().p_wrong(&view).unwrap();
        assert!((p - whole.p_wrong).abs() < 1e-4, "{p} {}", whole.p_wrong);
    }
}

#[test]
fn hidden_states_that_cannot_be_used_are_refused() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(4);
    let head = model::trained(&lm, &config, 0).0;
    let statistics = [TokenStatistics::greedy(&[0.0, 1.0]).unwrap()];
    let refused = |hidden: Option<&Tensor>, part: &str| {
        let message = head.assess(hidden, &statistics).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    let of = |value: f32, n: usize, d: usize| Tensor::full(value, (n, d), &Device::Cpu).unwrap();
    refused(None, "no hidden state");
    refused(Some(&of(f32::NAN, 1, 32)), "NaN");
    refused(Some(&of(f32::INFINITY, 1, 32)), "infinite");
    refused(Some(&of(1.0, 1, 31)), "expected (n, 32)");
    assert!(head.assess(Some(&of(1.0, 2, 32)), &statistics).is_err());
    assert!(head.assess(Some(&of(1.0, 1, 32).to_dtype(DType::BF16).unwrap()), &statistics).is_ok());
    // A head over the distribution alone needs none.
    let plain = model::trained(&lm, &config.with_features(Features::Statistics), 0).0;
    assert!(plain.assess(None, &statistics).is_ok());
}

#[test]
fn training_that_makes_no_sense_is_refused() {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(4);
    let predictions = model::predictions(&lm, &config, 0..1);
    let base = BaseModel::of(&lm).unwrap();
    let empty = vesper_model::metacognition::Predictions::new(&config).unwrap();
    assert!(ErrorHead::new(&base, &config, &empty, 0).unwrap_err().to_string().contains("empty"));
    let other = config.with_kinds(KindRule { near: 2, confident: 0.5 });
    assert!(
        ErrorHead::new(&base, &other, &predictions, 0).unwrap_err().to_string().contains("collected with")
    );
    let narrow = BaseModel { hidden_size: 31, ..base.clone() };
    assert!(ErrorHead::new(&narrow, &config, &predictions, 0).is_err());

    let head = ErrorHead::new(&base, &config, &predictions, 0).unwrap();
    let mut optimizer = Velvet::named(head.parameters(), VelvetConfig::default()).unwrap();
    for training in
        [HeadTraining { epochs: 0, ..Default::default() }, HeadTraining { batch: 0, ..Default::default() }]
    {
        assert!(training.run(&head, &predictions, &mut optimizer).is_err());
    }
    assert!(HeadTraining::default().run(&head, &empty, &mut optimizer).is_err());
    assert!(head.calibrate(Method::Platt, &empty).unwrap_err().to_string().contains("empty"));
    assert!(Calibrated::fit(Measure::Entropy, Method::Platt, &empty).is_err());
}
