//! What stops a generation, and what it refuses.

use vesper_model::generate::{Event, GenerationConfig, Generator, NextLogits, StopReason};
use vesper_model::{ModelError, Result};

use crate::fake::Counter;

fn run(model: &mut Counter, prompt: &[u32], config: &GenerationConfig) -> (Vec<u32>, Option<StopReason>) {
    let mut generator = Generator::new(model, prompt, config).unwrap();
    let events: Vec<Event> = generator.by_ref().map(|event| event.unwrap()).collect();
    assert!(generator.next().is_none(), "it stays stopped");
    let stop = generator.stop_reason().cloned();
    assert_eq!(events.last(), stop.clone().map(Event::Finish).as_ref(), "the reason is the last event");
    (events.iter().filter_map(Event::id).collect(), stop)
}

#[test]
fn any_end_of_text_stops_and_is_not_given() {
    for eos in [vec![9], vec![30, 9]] {
        let config = GenerationConfig::greedy().with_eos(eos);
        assert_eq!(run(&mut Counter::new(50), &[6], &config), (vec![7, 8], Some(StopReason::Eos(9))));
    }
}

#[test]
fn the_most_new_tokens_stop() {
    let config = GenerationConfig::greedy().with_max_new_tokens(3);
    assert_eq!(run(&mut Counter::new(50), &[6, 7], &config), (vec![8, 9, 10], Some(StopReason::MaxTokens)));
    let config = config.with_max_new_tokens(0);
    let mut model = Counter::new(50);
    assert_eq!(run(&mut model, &[6], &config), (vec![], Some(StopReason::MaxTokens)));
    assert!(model.calls.is_empty());
}

#[test]
fn a_full_context_stops_after_the_last_token_that_it_could_score() {
    // Four places: the prompt takes two; the scores after places 2, 3 and 4 give three tokens.
    let config = GenerationConfig::greedy();
    let mut model = Counter::new(4);
    assert_eq!(run(&mut model, &[6, 7], &config), (vec![8, 9, 10], Some(StopReason::ContextFull)));
    assert_eq!(model.seen, [6, 7, 8, 9]);
}

#[test]
fn the_prompt_goes_in_at_once_and_each_token_alone() {
    let mut model = Counter::new(50);
    run(&mut model, &[1, 2, 3], &GenerationConfig::greedy().with_max_new_tokens(3));
    assert_eq!(model.calls, [3, 1, 1]);
}

#[test]
fn the_most_tokens_with_the_prompt_stop() {
    let config = GenerationConfig::greedy().with_max_length(Some(4));
    assert_eq!(run(&mut Counter::new(50), &[6, 7], &config), (vec![8, 9], Some(StopReason::MaxTokens)));
    let (ids, stop) = run(&mut Counter::new(50), &[6, 7], &config.clone().with_max_new_tokens(1));
    assert_eq!((ids, stop), (vec![8], Some(StopReason::MaxTokens)), "the smaller limit holds");
    let (ids, stop) = run(&mut Counter::new(50), &[1, 2, 3, 4, 5], &config);
    assert_eq!((ids, stop), (vec![], Some(StopReason::MaxTokens)), "the prompt alone is as long");
}

#[test]
fn an_empty_prompt_begins_with_the_beginning_of_text() {
    let config = GenerationConfig::greedy().with_max_new_tokens(2).with_bos(Some(4));
    let mut model = Counter::new(50);
    assert_eq!(run(&mut model, &[], &config).0, [5, 6]);
    assert_eq!(model.seen, [4, 5]);
}

#[test]
fn an_empty_prompt_without_a_beginning_of_text_is_an_error() {
    let mut model = Counter::new(50);
    let error = Generator::new(&mut model, &[], &GenerationConfig::greedy()).unwrap_err();
    assert!(matches!(error, ModelError::EmptyPrompt));
    assert!(error.to_string().contains("bos_token_id"), "{error}");
}

#[test]
fn a_prompt_that_the_model_cannot_take_is_an_error() {
    let config = GenerationConfig::greedy();
    let mut model = Counter::new(2);
    let error = Generator::new(&mut model, &[1, 2, 3], &config).unwrap_err();
    assert!(matches!(error, ModelError::SequenceTooLong { got: 3, limit: 2 }), "{error}");
    let error = Generator::new(&mut model, &[64], &config).unwrap_err();
    assert!(matches!(error, ModelError::TokenOutOfRange { id: 64, vocab: 64 }), "{error}");
    let error = Generator::new(&mut model, &[], &config.clone().with_bos(Some(99))).unwrap_err();
    assert!(matches!(error, ModelError::TokenOutOfRange { id: 99, vocab: 64 }), "{error}");
    let error = Generator::new(&mut model, &[1], &config.with_top_p(2.0)).unwrap_err();
    assert!(matches!(error, ModelError::InvalidGeneration { field: "top_p", .. }), "{error}");
    assert!(model.calls.is_empty());
}

#[test]
fn the_repetition_penalty_covers_the_prompt() {
    struct Two;
    impl NextLogits for Two {
        fn append(&mut self, _: &[u32]) -> Result<Vec<f32>> {
            Ok(vec![0.6, 1.0])
        }
        fn remaining(&self) -> usize {
            10
        }
        fn vocab_size(&self) -> usize {
            2
        }
    }
    let config = GenerationConfig::greedy().with_max_new_tokens(2).with_repetition_penalty(2.0);
    let ids = Generator::new(&mut Two, &[1], &config).unwrap().ids().collect::<Result<Vec<_>>>().unwrap();
    // Token 1 is in the prompt: 1.0 / 2 is less than 0.6. Then both are penalised.
    assert_eq!(ids, [0, 1]);
}

#[test]
fn an_error_is_the_last_item() {
    struct Broken;
    impl NextLogits for Broken {
        fn append(&mut self, _: &[u32]) -> Result<Vec<f32>> {
            Ok(vec![f32::NAN; 4])
        }
        fn remaining(&self) -> usize {
            10
        }
        fn vocab_size(&self) -> usize {
            4
        }
    }
    let mut model = Broken;
    let mut generator = Generator::new(&mut model, &[1], &GenerationConfig::greedy()).unwrap();
    assert!(matches!(generator.next(), Some(Err(ModelError::InvalidLogits { .. }))));
    assert!(generator.next().is_none());
    assert_eq!(generator.stop_reason(), Some(&StopReason::Failed));
}
