//! Learning-rate schedules: closed values, ranges, and agreement with `torch.optim.lr_scheduler`;
//! `golden/schedule.py` made the values.

#![allow(clippy::unwrap_used, reason = "a test stops there")]

use proptest::prelude::*;
use serde::Deserialize;
use velvet_optim::{Curve, Error, Schedule, Span};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    total: u64,
    schedule: Schedule,
    lr: Vec<f64>,
}

#[test]
fn schedules_agree_with_torch_in_every_step() {
    let golden: Golden = serde_json::from_str(include_str!("golden/schedule.json")).unwrap();
    assert!(golden.cases.len() >= 12);
    for case in &golden.cases {
        case.schedule.validate().unwrap();
        assert!(case.lr.len() as u64 >= case.total);
        for (step, &expected) in case.lr.iter().enumerate() {
            let got = case.schedule.lr(1.0, step as u64, case.total);
            // torch multiplies its way from step to step, and rounds each time
            assert!((got - expected).abs() < 1e-12, "{}, step {step}: {got}, expected {expected}", case.name);
        }
    }
}

fn factors(schedule: Schedule, steps: &[u64], total: u64) -> Vec<f64> {
    schedule.validate().unwrap();
    steps.iter().map(|&step| schedule.factor(step, total)).collect()
}

fn assert_close(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() < 1e-14, "{got}, expected {expected}");
    }
}

#[test]
fn a_warm_up_starts_above_zero_and_ends_at_one() {
    for warm_up in [Span::Steps(4), Span::Fraction(0.04)] {
        let got = factors(Schedule::Constant { warm_up }, &[0, 1, 2, 3, 4, 99, 100, 1000], 100);
        assert_close(&got, &[0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }
    let none = Schedule::Constant { warm_up: Span::Fraction(0.001) };
    assert_eq!(factors(none, &[0, 1], 100), [1.0, 1.0]);
}

#[test]
fn a_linear_decay_over_the_last_half_leaves_no_step_at_zero() {
    let schedule = Schedule::Linear { warm_up: Span::Steps(2), decay: Span::Fraction(0.5), end: 0.0 };
    let got = factors(schedule, &[0, 1, 2, 10, 11, 15, 19, 20, 25], 20);
    assert_close(&got, &[0.5, 1.0, 1.0, 1.0, 0.9, 0.5, 0.1, 0.0, 0.0]);
}

#[test]
fn wsd_decays_by_its_shape() {
    let wsd = |shape| Schedule::Wsd { warm_up: Span::Steps(0), decay: Span::Steps(16), shape, end: 0.2 };
    let steps = [0, 84, 88, 92, 99, 100];
    assert_close(&factors(wsd(Curve::Linear), &steps, 100), &[1.0, 1.0, 0.8, 0.6, 0.25, 0.2]);
    let sqrt = factors(wsd(Curve::Sqrt), &steps, 100);
    assert_close(&sqrt[..3], &[1.0, 1.0, 0.6]);
    assert_close(&sqrt[3..], &[1.0 - 0.8 * 0.5f64.sqrt(), 1.0 - 0.2 * 15f64.sqrt(), 0.2]);
    let cosine = factors(wsd(Curve::Cosine), &steps, 100);
    let quarter = 0.2 + 0.4 * (1.0 + 0.5f64.sqrt());
    assert_close(&cosine[..4], &[1.0, 1.0, quarter, 0.6]);
}

#[test]
fn wsd_with_a_linear_shape_is_the_linear_schedule() {
    for (total, warm) in [(100, 7), (33, 20), (10, 0)] {
        let (warm_up, decay, end) = (Span::Steps(warm), Span::Fraction(0.3), 0.1);
        for step in 0..=total + 1 {
            let wsd = Schedule::Wsd { warm_up, decay, shape: Curve::Linear, end }.factor(step, total);
            assert_eq!(wsd, Schedule::Linear { warm_up, decay, end }.factor(step, total));
        }
    }
}

#[test]
fn inverse_sqrt_is_the_transformers_and_has_no_end() {
    let warm_up = Span::Steps(16);
    let schedule = Schedule::InverseSqrt { warm_up, timescale: warm_up, min: 0.1 };
    // sqrt(w / t) after the warm-up, whatever the total
    let got = factors(schedule, &[0, 15, 16, 32, 64, 1600, 160_000], 20);
    assert_close(&got, &[1.0 / 16.0, 1.0, 1.0, 0.5f64.sqrt(), 0.5, 0.1, 0.1]);
}

#[test]
fn one_cycle_starts_at_its_start_peaks_and_ends_in_the_last_step() {
    let rise = Span::Steps(5);
    let schedule = Schedule::OneCycle { rise, start: 0.2, end: 0.1, shape: Curve::Linear };
    let got = factors(schedule, &[0, 2, 4, 9, 14, 15, 99], 15);
    assert_close(&got, &[0.2, 0.6, 1.0, 0.55, 0.1, 0.1, 0.1]);
}

#[test]
fn a_warm_up_longer_than_the_run_leaves_no_decay() {
    let schedule = Schedule::Cosine { warm_up: Span::Steps(50), end: 0.3 };
    assert_close(&factors(schedule, &[0, 9, 10], 10), &[0.02, 0.2, 0.3]);
}

#[test]
fn fields_out_of_range_are_refused_by_name() {
    let bad = [
        (Schedule::Constant { warm_up: Span::Fraction(f64::NAN) }, "schedule.constant.warm_up"),
        (
            Schedule::Linear { warm_up: Span::Steps(1), decay: Span::Fraction(-0.1), end: 0.0 },
            "schedule.linear.decay",
        ),
        (Schedule::Cosine { warm_up: Span::Steps(1), end: 1.5 }, "schedule.cosine.end"),
        (
            Schedule::OneCycle { rise: Span::Steps(1), start: 0.0, end: 0.0, shape: Curve::Cosine },
            "schedule.one_cycle.start",
        ),
        (
            Schedule::InverseSqrt { warm_up: Span::Steps(1), timescale: Span::Steps(0), min: 0.0 },
            "schedule.inverse_sqrt.timescale",
        ),
    ];
    for (schedule, expected) in bad {
        match schedule.validate() {
            Err(Error::Config { field, .. }) => assert_eq!(field, expected),
            other => panic!("{schedule:?}: {other:?}"),
        }
    }
}

#[test]
fn unknown_fields_are_refused_and_every_schedule_survives_serde() {
    for text in [r#"{"cosine": {"ende": 0.1}}"#, r#"{"sine": {}}"#, r#"{"inverse_sqrt": {}}"#] {
        assert!(serde_json::from_str::<Schedule>(text).is_err(), "{text}");
    }
    for schedule in all(Span::Steps(7), Span::Fraction(0.25), 0.1) {
        let text = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule, "{text}");
    }
}

/// One of each kind.
fn all(warm_up: Span, part: Span, end: f64) -> Vec<Schedule> {
    let mut all = vec![
        Schedule::Constant { warm_up },
        Schedule::Linear { warm_up, decay: part, end },
        Schedule::Cosine { warm_up, end },
        Schedule::InverseSqrt { warm_up, timescale: part, min: end },
    ];
    for shape in [Curve::Linear, Curve::Cosine, Curve::Sqrt] {
        all.push(Schedule::Wsd { warm_up, decay: part, shape, end });
        all.push(Schedule::OneCycle { rise: warm_up, start: 0.04, end, shape });
    }
    all
}

fn span() -> impl Strategy<Value = Span> {
    prop_oneof![(1..200u64).prop_map(Span::Steps), (0.001..=1.0).prop_map(Span::Fraction)]
}

proptest! {
    #[test]
    fn every_factor_is_in_range_and_the_first_is_not_zero(
        warm_up in span(), part in span(), end in 0.0..=1.0f64, total in 0..200u64,
    ) {
        for schedule in all(warm_up, part, end) {
            schedule.validate().unwrap();
            for step in 0..total + 5 {
                let factor = schedule.factor(step, total);
                prop_assert!((0.0..=1.0 + 1e-15).contains(&factor), "{schedule:?}: {factor} in step {step} of {total}");
                prop_assert!(factor > 0.0 || step >= total, "{schedule:?}: 0 in step {step} of {total}");
            }
        }
    }

    #[test]
    fn after_its_warm_up_a_decay_never_rises(
        warm_up in span(), part in span(), end in 0.0..=1.0f64, total in 1..200u64,
    ) {
        for schedule in all(warm_up, part, end) {
            let factors: Vec<f64> = (0..total).map(|step| schedule.factor(step, total)).collect();
            let fall = factors.windows(2).position(|w| w[1] < w[0] - 1e-12).unwrap_or(factors.len());
            let rises = factors.iter().skip(fall).zip(factors.iter().skip(fall + 1)).any(|(a, b)| *b > a + 1e-12);
            prop_assert!(!rises, "{:?} of {} rises after it fell: {:?}", schedule, total, factors);
        }
    }
}
