use crate::metrics::{Case, cases, close};
use vesper_model::metacognition::metrics::expected_calibration_error;
use vesper_model::metacognition::{Aggregate, AnswerCalibration, Calibration, Method};

#[test]
fn platts_fit_is_that_of_scikit_learn() {
    for Case { json, scores, wrong } in cases() {
        let Calibration::Platt { slope, offset } = Calibration::platt(&scores, &wrong).unwrap() else {
            panic!()
        };
        // scikit-learn stops earlier.
        assert!(close(slope, &json["platt"][0], 2e-4), "{}: {slope}", json["name"]);
        assert!(close(offset, &json["platt"][1], 2e-4), "{}: {offset}", json["name"]);
    }
}

#[test]
fn the_isotonic_fit_is_that_of_scikit_learn() {
    for Case { json, scores, wrong } in cases() {
        let isotonic = Calibration::isotonic(&scores, &wrong).unwrap();
        for (at, expected) in json["at"].as_array().unwrap().iter().zip(json["isotonic"].as_array().unwrap())
        {
            let got = isotonic.apply(at.as_f64().unwrap());
            assert!(close(got, expected, 1e-9), "{} at {at}: {got}, expected {expected}", json["name"]);
        }
    }
}

#[test]
fn a_fit_does_not_depend_on_the_scale_of_the_scores() {
    let Case { scores, wrong, .. } = cases().remove(0);
    let fit = Calibration::platt(&scores, &wrong).unwrap();
    for (scale, shift) in [(1e-6, 0.0), (1e6, -3e6), (1.0, 1e4)] {
        let moved: Vec<f64> = scores.iter().map(|s| s * scale + shift).collect();
        let other = Calibration::platt(&moved, &wrong).unwrap();
        for (s, m) in scores.iter().zip(&moved) {
            assert!((fit.apply(*s) - other.apply(*m)).abs() < 1e-5, "{scale} {shift}");
        }
    }
}

#[test]
fn a_temperature_only_scales() {
    let Case { scores, wrong, .. } = cases().remove(1);
    let wild: Vec<f64> = scores.iter().map(|s| 4.0 * s).collect();
    let p = |calibration: &Calibration| wild.iter().map(|s| calibration.apply(*s)).collect::<Vec<_>>();
    let fit = Calibration::temperature(&wild, &wrong).unwrap();
    let Calibration::Platt { slope, offset } = fit else { panic!() };
    assert!(offset == 0.0 && (0.2..0.5).contains(&slope), "{slope}");
    let before = expected_calibration_error(&p(&Calibration::LOG_ODDS), &wrong).unwrap();
    let after = expected_calibration_error(&p(&fit), &wrong).unwrap();
    assert!(after < before, "{before} {after}");
}

#[test]
fn degenerate_scores_have_finite_fits() {
    let constant =
        Calibration::platt(&[2.0; 8], &[true, false, false, false, true, false, false, false]).unwrap();
    // Platt's targets: (2 * 3/4 + 6 / 8) / 8
    assert!((constant.apply(2.0) - 0.28125).abs() < 1e-6, "{constant:?}");
    for method in [Method::Temperature, Method::Platt, Method::Isotonic] {
        let all_right = Calibration::fit(method, &[0.5, 1.0, 2.0], &[false; 3]).unwrap();
        assert!(all_right.apply(1.0) <= 0.5, "{all_right:?}");
        for (scores, wrong) in
            [(vec![], vec![]), (vec![1.0, f64::NAN], vec![true, false]), (vec![f64::INFINITY], vec![true])]
        {
            assert!(Calibration::fit(method, &scores, &wrong).is_err(), "{method:?} {scores:?}");
        }
    }
    assert!(Calibration::LOG_ODDS.apply(f64::NAN).is_nan());
    assert_eq!(Calibration::LOG_ODDS.apply(1e9), 1.0);
    assert_eq!(Calibration::LOG_ODDS.apply(-1e9), 0.0);
}

#[test]
fn answers_are_calibrated_over_their_aggregate() {
    // Answers of three tokens that are wrong together: far less often than if they were independent.
    let answers: Vec<Vec<f64>> = (0..200).map(|i| vec![if i % 2 == 0 { 0.2 } else { 0.6 }; 3]).collect();
    let wrong: Vec<bool> = (0..200).map(|i| if i % 2 == 0 { i % 10 == 0 } else { i % 10 < 6 }).collect();
    for aggregate in [Aggregate::Independent, Aggregate::Mean, Aggregate::Largest] {
        let fit = AnswerCalibration::fit(aggregate, Method::Platt, &answers, &wrong).unwrap();
        assert!((fit.apply(&[0.2; 3]) - 0.2).abs() < 0.02, "{aggregate:?}");
        assert!((fit.apply(&[0.6; 3]) - 0.6).abs() < 0.02, "{aggregate:?}");
    }
    assert!((AnswerCalibration::default().apply(&[0.2; 3]) - 0.488).abs() < 1e-9);
    assert_eq!(Aggregate::Mean.of(&[]), 0.0);
    assert!(AnswerCalibration::fit(Aggregate::Mean, Method::Platt, &[], &[]).is_err());
}
