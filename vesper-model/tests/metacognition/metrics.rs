use serde_json::Value;
use vesper_model::metacognition::metrics::{
    BINS, auroc, brier, error_at_coverage, expected_calibration_error, reliability,
};

fn golden() -> Vec<Value> {
    let json: Value = serde_json::from_str(include_str!("golden/metrics.json")).unwrap();
    json["cases"].as_array().unwrap().clone()
}

pub(crate) struct Case {
    pub(crate) json: Value,
    pub(crate) scores: Vec<f64>,
    pub(crate) wrong: Vec<bool>,
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |json: Value| {
        let scores = serde_json::from_value(json["scores"].clone()).unwrap();
        let wrong = serde_json::from_value(json["wrong"].clone()).unwrap();
        Case { json, scores, wrong }
    };
    golden().into_iter().map(case).collect()
}

pub(crate) fn close(a: f64, b: &Value, tolerance: f64) -> bool {
    (a - b.as_f64().unwrap()).abs() <= tolerance
}

#[test]
fn metrics_are_those_of_scikit_learn() {
    assert_eq!(cases().len(), 4);
    for Case { json, scores, wrong } in cases() {
        let name = &json["name"];
        let p: Vec<f64> = scores.iter().map(|s| 1.0 / (1.0 + (-s).exp())).collect();
        assert!(close(auroc(&scores, &wrong).unwrap(), &json["auroc"], 1e-12), "{name}");
        assert!(close(brier(&p, &wrong).unwrap(), &json["brier"], 1e-12), "{name}");
        assert!(close(expected_calibration_error(&p, &wrong).unwrap(), &json["ece"], 1e-12), "{name}");
    }
}

#[test]
fn equal_scores_count_half() {
    assert_eq!(auroc(&[0.0; 4], &[true, false, false, true]).unwrap(), 0.5);
    // Of the pairs (1, 1), (1, 0), (2, 1), (2, 0) one is equal.
    assert_eq!(auroc(&[1.0, 2.0, 1.0, 0.0], &[true, true, false, false]).unwrap(), 3.5 / 4.0);
    assert_eq!(auroc(&[f64::NEG_INFINITY, f64::INFINITY], &[false, true]).unwrap(), 1.0);
}

#[test]
fn bins_are_closed_above_and_the_first_has_zero() {
    let bins = reliability(&[0.0, 0.5, 0.5 + 1e-9, 1.0], &[false, true, false, true], 2).unwrap();
    assert_eq!((bins[0].count, bins[1].count), (2, 2));
    assert_eq!((bins[0].predicted, bins[0].observed), (0.25, 0.5));
    let all = reliability(&[0.2], &[true], BINS).unwrap();
    assert_eq!(all.iter().map(|bin| bin.count).sum::<usize>(), 1);
    assert_eq!(all[2].count, 1, "3 / 15 is in the third");
}

#[test]
fn errors_that_are_left_at_a_coverage() {
    let (scores, wrong) = ([0.3, 0.1, 0.2, 0.2], [true, false, true, false]);
    for (coverage, error) in [(0.25, 0.0), (0.5, 0.25), (0.75, 1.0 / 3.0), (1.0, 0.5), (1e-9, 0.0)] {
        let got = error_at_coverage(&scores, &wrong, coverage).unwrap();
        assert!((got - error).abs() < 1e-12, "{coverage}: {got}");
    }
    for wrong_coverage in [0.0, -0.5, 1.5, f64::NAN] {
        assert!(error_at_coverage(&scores, &wrong, wrong_coverage).is_err(), "{wrong_coverage}");
    }
}

#[test]
fn what_cannot_be_measured_is_said() {
    let message = |result: vesper_model::Result<f64>| result.unwrap_err().to_string();
    assert!(message(auroc(&[], &[])).contains("empty"));
    assert!(message(brier(&[], &[])).contains("empty"));
    assert!(message(auroc(&[1.0], &[true, false])).contains("1 scores for 2 outcomes"));
    assert!(message(auroc(&[1.0, f64::NAN], &[true, false])).contains("number 1 of the scores is NaN"));
    assert!(message(auroc(&[1.0, 2.0], &[true, true])).contains("all 2 predictions are wrong"));
    assert!(message(auroc(&[1.0, 2.0], &[false, false])).contains("all 2 predictions are right"));
    assert!(message(brier(&[0.5, 1.5], &[true, true])).contains("probability 1 is 1.5"));
    assert!(reliability(&[0.5], &[true], 0).is_err());
}
