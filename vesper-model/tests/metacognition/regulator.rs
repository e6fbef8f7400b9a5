use vesper_model::metacognition::Verdict::{Abstained, Best, Interrupted, Satisfied};
use vesper_model::metacognition::{Action, Event, Regulator, RegulatorConfig, State};

fn config() -> RegulatorConfig {
    RegulatorConfig {
        max_drafts: 2,
        temperature: 1.0,
        cooled: 0.25,
        cool_above: 0.5,
        discard_above: 0.8,
        satisfied_at: 0.3,
        abstain_above: 0.6,
    }
}

const BEGIN: Event = Event::Begin;
const STOP: Event = Event::Interrupt;

fn predicted(p_wrong: f64) -> Event {
    Event::Predicted { p_wrong }
}

fn chosen(p_wrong: f64) -> Event {
    Event::Chosen { p_wrong }
}

fn finished(p_wrong: f64) -> Event {
    Event::Finished { p_wrong }
}

/// A regulator that has seen these events.
fn after(events: &[Event]) -> Regulator {
    let mut regulator = Regulator::new(config()).unwrap();
    for event in events {
        regulator.step(*event).unwrap();
    }
    regulator
}

#[test]
fn every_transition_of_the_table() {
    use Action::{Choose, Continue, Discard, Draft, Keep, Stop};
    let hot = Choose { temperature: 1.0 };
    let cool = Choose { temperature: 0.25 };
    let table: [(&[Event], Event, Action, State); 23] = [
        (&[], BEGIN, Draft { number: 0 }, State::Regulate),
        (&[], STOP, Stop(Interrupted), State::Stop),
        (&[BEGIN], predicted(0.0), hot, State::Regulate),
        (&[BEGIN], predicted(0.5), hot, State::Regulate),
        (&[BEGIN], predicted(0.51), cool, State::Regulate),
        (&[BEGIN], predicted(1.0), cool, State::Regulate),
        (&[BEGIN], chosen(0.8), Continue, State::Regulate),
        (&[BEGIN], chosen(0.81), Discard, State::Plan),
        (&[BEGIN], finished(0.3), Stop(Satisfied { draft: 0 }), State::Stop),
        (&[BEGIN], finished(0.31), Keep, State::Plan),
        (&[BEGIN], STOP, Stop(Interrupted), State::Stop),
        // The second draft is the last: it is not given up.
        (&[BEGIN, chosen(0.9)], BEGIN, Draft { number: 1 }, State::Regulate),
        (&[BEGIN, chosen(0.9), BEGIN], chosen(1.0), Continue, State::Regulate),
        (&[BEGIN, finished(0.5)], BEGIN, Draft { number: 1 }, State::Regulate),
        (&[BEGIN, finished(0.5), BEGIN], finished(0.1), Stop(Satisfied { draft: 1 }), State::Stop),
        (&[BEGIN, finished(0.5), BEGIN], finished(0.4), Keep, State::Plan),
        // The best of what was kept, the first of equals, or none.
        (&[BEGIN, finished(0.5), BEGIN, finished(0.4)], BEGIN, Stop(Best { draft: 1 }), State::Stop),
        (&[BEGIN, finished(0.4), BEGIN, finished(0.5)], BEGIN, Stop(Best { draft: 0 }), State::Stop),
        (&[BEGIN, finished(0.4), BEGIN, finished(0.4)], BEGIN, Stop(Best { draft: 0 }), State::Stop),
        (&[BEGIN, finished(0.6), BEGIN, finished(0.7)], BEGIN, Stop(Best { draft: 0 }), State::Stop),
        (&[BEGIN, finished(0.61), BEGIN, finished(0.7)], BEGIN, Stop(Abstained), State::Stop),
        (&[BEGIN, chosen(0.9), BEGIN, finished(0.61)], BEGIN, Stop(Abstained), State::Stop),
        (&[BEGIN, finished(0.5), BEGIN, finished(0.4)], STOP, Stop(Interrupted), State::Stop),
    ];
    for (before, event, action, state) in table {
        let mut regulator = after(before);
        assert_eq!(regulator.step(event).unwrap(), action, "{before:?} {event:?}");
        assert_eq!(regulator.state(), state, "{before:?} {event:?}");
    }
}

#[test]
fn any_other_event_is_an_error_and_changes_nothing() {
    let events = [BEGIN, predicted(0.1), chosen(0.1), finished(0.1), STOP];
    for (before, allowed) in [
        (&[][..], &[BEGIN, STOP][..]),
        (&[BEGIN], &[predicted(0.1), chosen(0.1), finished(0.1), STOP]),
        (&[BEGIN, finished(0.1)], &[]),
        (&[STOP], &[]),
    ] {
        for event in events.iter().filter(|event| !allowed.contains(event)) {
            let mut regulator = after(before);
            let unchanged = regulator.clone();
            let message = regulator.step(*event).unwrap_err().to_string();
            let state = format!("{:?}", unchanged.state());
            assert!(message.contains("event") && message.contains(&state), "{message}");
            assert_eq!(regulator, unchanged);
        }
    }
    for p_wrong in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        let mut regulator = after(&[BEGIN]);
        for event in [predicted(p_wrong), chosen(p_wrong), finished(p_wrong)] {
            assert!(regulator.step(event).unwrap_err().to_string().contains("p_wrong"), "{event:?}");
            assert_eq!(regulator, after(&[BEGIN]));
        }
    }
}

#[test]
fn whatever_the_confidence_it_stops_after_its_drafts() {
    // Every sequence of outcomes of up to four drafts.
    for max_drafts in 1..=4 {
        for outcomes in 0..3_usize.pow(4) {
            let mut regulator = Regulator::new(RegulatorConfig { max_drafts, ..config() }).unwrap();
            let mut begun = 0;
            let verdict = loop {
                match regulator.step(BEGIN).unwrap() {
                    Action::Draft { number } => assert_eq!(number, begun),
                    Action::Stop(verdict) => break verdict,
                    other => panic!("{other:?}"),
                }
                let p = [0.2, 0.5, 0.9][outcomes / 3_usize.pow(begun as u32) % 3];
                begun += 1;
                if regulator.step(chosen(p)).unwrap() == Action::Discard {
                    continue;
                }
                if let Action::Stop(verdict) = regulator.step(finished(p)).unwrap() {
                    break verdict;
                }
            };
            assert_eq!(regulator.state(), State::Stop);
            assert!(begun <= max_drafts && verdict.draft().is_none_or(|draft| draft < begun));
        }
    }
}

#[test]
fn what_is_off_does_nothing() {
    let mut regulator = Regulator::new(RegulatorConfig::off(0.7)).unwrap();
    assert_eq!(regulator.step(BEGIN).unwrap(), Action::Draft { number: 0 });
    assert_eq!(regulator.step(predicted(1.0)).unwrap(), Action::Choose { temperature: 0.7 });
    assert_eq!(regulator.step(chosen(1.0)).unwrap(), Action::Continue);
    assert_eq!(regulator.step(finished(1.0)).unwrap(), Action::Stop(Satisfied { draft: 0 }));
}

#[test]
fn settings_out_of_range_are_named() {
    let wrong = [
        (RegulatorConfig { max_drafts: 0, ..config() }, "max_drafts is 0"),
        (RegulatorConfig { temperature: f64::NAN, ..config() }, "temperature is NaN"),
        (RegulatorConfig { temperature: -1.0, ..config() }, "temperature is -1"),
        (RegulatorConfig { cooled: 1.5, ..config() }, "cooled is 1.5"),
        (RegulatorConfig { cooled: f64::NAN, ..config() }, "cooled is NaN"),
        (RegulatorConfig { cool_above: 1.5, ..config() }, "cool_above is 1.5"),
        (RegulatorConfig { discard_above: -0.5, ..config() }, "discard_above is -0.5"),
        (RegulatorConfig { satisfied_at: f64::NAN, ..config() }, "satisfied_at is NaN"),
        (RegulatorConfig { abstain_above: 0.1, ..config() }, "abstain_above is 0.1"),
    ];
    for (config, part) in wrong {
        let message = Regulator::new(config).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let json = serde_json::to_string(&config()).unwrap();
    assert_eq!(serde_json::from_str::<RegulatorConfig>(&json).unwrap(), config());
}
