//! What a generation reports: tokens with their probabilities, text, the end.

use vesper_model::generate::{
    Cancellation, Event, GenerationConfig, Generator, History, LogitsProcessor, NextLogits, Request,
    StopReason,
};
use vesper_model::{ModelError, Result};

use crate::fake::{Counter, Script, bytes_and, ids, spell};

fn greedy() -> GenerationConfig {
    GenerationConfig::greedy().with_eos([0])
}

/// Texts and the end of what the model says.
fn texts(said: &[u32], words: &[&str], config: &GenerationConfig) -> (Vec<String>, StopReason) {
    let tokenizer = bytes_and(words);
    let mut model = Script::new(said, tokenizer.get_vocab_size(true));
    let mut generator = Generator::new(&mut model, &[1], config).unwrap().with_tokenizer(&tokenizer).unwrap();
    let pieces = generator.pieces().map(|piece| piece.unwrap()).collect();
    (pieces, generator.stop_reason().unwrap().clone())
}

#[test]
fn each_token_comes_before_the_text_that_it_completes_and_the_end_is_last() {
    let tokenizer = bytes_and(&["Once", " upon"]);
    let said = ids(&tokenizer, &["Once", " upon"]);
    let mut model = Script::new(&said, tokenizer.get_vocab_size(true));
    let generator = Generator::new(&mut model, &[1], &greedy()).unwrap().with_tokenizer(&tokenizer).unwrap();
    let events: Vec<Event> = generator.map(|event| event.unwrap()).collect();
    assert_eq!(events.iter().filter_map(Event::id).collect::<Vec<_>>(), said);
    let rest: Vec<&Event> = events.iter().filter(|event| event.id().is_none()).collect();
    let text = |text: &str| Event::Text(text.into());
    assert_eq!(
        rest,
        [&text("Onc"), &text("e upo"), &text("n"), &Event::Finish(StopReason::Eos(0))],
        "the last letter may get an accent until the next begins"
    );
    assert!(matches!(&events[..3], [Event::Token(_), Event::Text(_), Event::Token(_)]), "{events:?}");
}

#[test]
fn without_a_tokenizer_there_is_no_text() {
    let mut model = Counter::new(9);
    let config = greedy().with_max_new_tokens(2);
    let events: Vec<Event> =
        Generator::new(&mut model, &[1], &config).unwrap().map(|event| event.unwrap()).collect();
    assert!(
        matches!(events[..], [Event::Token(_), Event::Token(_), Event::Finish(StopReason::MaxTokens)]),
        "{events:?}"
    );
}

#[test]
fn probabilities_are_those_of_the_scores_that_were_left_and_of_the_model() {
    /// The odds 1 : 2 : 4 : 1, always.
    struct Odds;
    impl NextLogits for Odds {
        fn append(&mut self, _: &[u32]) -> Result<Vec<f32>> {
            Ok([1f32, 2.0, 4.0, 1.0].map(f32::ln).to_vec())
        }
        fn remaining(&self) -> usize {
            100
        }
        fn vocab_size(&self) -> usize {
            4
        }
    }
    let probabilities = |config: GenerationConfig, limit: usize| {
        let request = Request::new([1], config.with_max_new_tokens(40))
            .with_vocab_limit(limit)
            .with_model_log_probabilities(true);
        let mut odds = Odds;
        let events = Generator::from_request(&mut odds, request).unwrap();
        let tokens = events.filter_map(|event| match event.unwrap() {
            Event::Token(token) => Some(token),
            _ => None,
        });
        tokens
            .map(|token| (token.id, token.log_probability.exp(), token.model_log_probability.unwrap().exp()))
            .collect::<Vec<_>>()
    };
    let check = |got: Vec<(u32, f64, f64)>, expected: &[(u32, f64, f64)]| {
        for (id, left, model) in got {
            let expected = expected.iter().find(|row| row.0 == id).unwrap();
            assert!(
                (left - expected.1).abs() < 1e-6 && (model - expected.2).abs() < 1e-6,
                "{id} {left} {model}"
            );
        }
    };
    // Squared by the temperature, and two kept: 4 : 16.
    let drawn = GenerationConfig::default().with_temperature(0.5).with_top_k(2).with_top_p(1.0);
    let got = probabilities(drawn, 9);
    assert!(got.iter().any(|row| row.0 == 1) && got.iter().any(|row| row.0 == 2));
    check(got, &[(1, 0.2, 0.25), (2, 0.8, 0.5)]);
    // A greedy choice knows no temperature, but the constraints; ids over the limit have no part in either.
    let config = GenerationConfig::greedy().with_bad_words([vec![2]]);
    check(probabilities(config, 3), &[(1, 2.0 / 3.0, 2.0 / 7.0)]);

    let mut odds = Odds;
    let event = Generator::new(&mut odds, &[1], &GenerationConfig::greedy()).unwrap().next();
    assert!(matches!(event, Some(Ok(Event::Token(token))) if token.model_log_probability.is_none()));
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let words = ["Yes", ".\n", "Us", "er:", " no"];
    let tokenizer = bytes_and(&words);
    let said = ids(&tokenizer, &words);
    let config = greedy().with_stop_strings(["\nUser:", "never"]);
    let (pieces, stop) = texts(&said, &words, &config);
    assert_eq!((pieces.concat().as_str(), stop), ("Yes.", StopReason::Stop("\nUser:".into())));
    // The same letter by letter, and inside of one token.
    let (pieces, stop) = texts(&spell(&tokenizer, "Yes.\nUser: no"), &[], &config);
    assert_eq!((pieces.concat().as_str(), stop), ("Yes.", StopReason::Stop("\nUser:".into())));
    let words = ["Yes.\nUser: no"];
    let (pieces, stop) = texts(&ids(&bytes_and(&words), &words), &words, &config);
    assert_eq!((pieces.concat().as_str(), stop), ("Yes.", StopReason::Stop("\nUser:".into())));
}

#[test]
fn what_began_like_a_stop_string_is_given_at_the_end() {
    let tokenizer = bytes_and(&[]);
    let said = spell(&tokenizer, "Yes.\nUs");
    let (pieces, stop) = texts(&said, &[], &greedy().with_stop_strings(["\nUser:"]));
    assert_eq!((pieces.concat().as_str(), stop), ("Yes.\nUs", StopReason::Eos(0)));
    let config = greedy().with_stop_strings(["\nUser:"]).with_max_new_tokens(6);
    let (pieces, stop) = texts(&said, &[], &config);
    assert_eq!((pieces.concat().as_str(), stop), ("Yes.\nU", StopReason::MaxTokens));
}

#[test]
fn a_stop_string_of_several_bytes_is_found_across_tokens() {
    let tokenizer = bytes_and(&[]);
    let said = spell(&tokenizer, "déjà — 👩\u{200d}👧 fin");
    assert!(said.len() > 20);
    let (pieces, stop) = texts(&said, &[], &greedy().with_stop_strings(["👧"]));
    assert_eq!((pieces.concat().as_str(), stop), ("déjà — 👩\u{200d}", StopReason::Stop("👧".into())));
    let (pieces, stop) = texts(&said, &[], &greedy());
    assert_eq!((pieces.concat().as_str(), stop), ("déjà — 👩\u{200d}👧 fin", StopReason::Eos(0)));
    assert!(pieces.contains(&"👩\u{200d}👧".to_owned()), "{pieces:?}");
}

#[test]
fn a_stop_string_that_is_a_special_token_ends_the_text_at_that_token() {
    let tokenizer = bytes_and(&["Yes", ".\n"]);
    let end = tokenizer.token_to_id("</s>").unwrap();
    let mut said = ids(&tokenizer, &["Yes", ".\n"]);
    said.extend([end, said[0]]);
    let run = |stops: &[&str]| {
        let config = GenerationConfig::greedy().with_stop_strings(stops.to_vec()).with_max_new_tokens(4);
        let mut model = Script::new(&said, tokenizer.get_vocab_size(true));
        let mut generator =
            Generator::new(&mut model, &[1], &config).unwrap().with_tokenizer(&tokenizer).unwrap();
        let text: String = generator.pieces().map(|piece| piece.unwrap()).collect();
        (text, generator.generated().to_vec(), generator.stop_reason().unwrap().clone())
    };
    let stopped = |text: &str, tokens: usize, stop: &str| {
        (text.to_owned(), said[..tokens].to_vec(), StopReason::Stop(stop.into()))
    };
    assert_eq!(run(&["no", "</s>"]), stopped("Yes.\n", 3, "</s>"));
    // One that is complete before it counts, and what only began is given.
    assert_eq!(run(&["</s>", "s.\n"]), stopped("Ye", 2, "s.\n"));
    assert_eq!(run(&["</s>", "\n\n"]), stopped("Yes.\n", 3, "</s>"));
    // Without it the token is nothing that one sees.
    assert_eq!(run(&["no"]), ("Yes.\nYes".into(), said.clone(), StopReason::MaxTokens));
}

#[test]
fn bytes_that_are_no_text_are_replaced_at_the_end() {
    let tokenizer = bytes_and(&[]);
    let said = spell(&tokenizer, "é");
    let config = greedy().with_max_new_tokens(1);
    assert_eq!(texts(&said, &[], &config), (vec!["\u{fffd}".into()], StopReason::MaxTokens));
}

#[test]
fn stop_strings_without_a_tokenizer_are_an_error() {
    let config = greedy().with_stop_strings(["x"]);
    let mut model = Counter::new(9);
    let mut generator = Generator::new(&mut model, &[1], &config).unwrap();
    match generator.next() {
        Some(Err(error @ ModelError::InvalidGeneration { field: "stop_strings", .. })) => {
            assert!(error.to_string().contains("with_tokenizer"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(generator.next().is_none());
    assert_eq!(generator.stop_reason(), Some(&StopReason::Failed));
    assert!(model.calls.is_empty());
}

#[test]
fn another_thread_stops_it_before_the_next_token() {
    let cancellation = Cancellation::new();
    let mut model = Counter::new(50);
    let mut generator = Generator::new(&mut model, &[1], &greedy()).unwrap().with_cancellation(&cancellation);
    assert_eq!(generator.next().unwrap().unwrap().id(), Some(2));
    let elsewhere = cancellation.clone();
    std::thread::spawn(move || elsewhere.cancel()).join().unwrap();
    assert_eq!(generator.next().unwrap().unwrap(), Event::Finish(StopReason::Cancelled));
    assert!(generator.next().is_none());
    assert_eq!((generator.generated(), generator.unfed()), (&[2][..], &[2][..]));
    assert_eq!(model.calls, [1]);

    // The same handle again, once it is reset.
    let mut generator = Generator::new(&mut model, &[5], &greedy()).unwrap().with_cancellation(&cancellation);
    assert_eq!(generator.next().unwrap().unwrap(), Event::Finish(StopReason::Cancelled));
    cancellation.reset();
    let mut generator = Generator::new(&mut model, &[5], &greedy()).unwrap().with_cancellation(&cancellation);
    assert_eq!(generator.next().unwrap().unwrap().id(), Some(6));
}

#[test]
fn an_error_comes_after_the_text_before_it() {
    struct Fails(Script, usize);
    impl NextLogits for Fails {
        fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
            self.1 -= 1;
            if self.1 == 0 { Err(ModelError::EmptyPrompt) } else { self.0.append(ids) }
        }
        fn remaining(&self) -> usize {
            self.0.remaining()
        }
        fn vocab_size(&self) -> usize {
            self.0.vocab_size()
        }
    }
    let tokenizer = bytes_and(&[]);
    let mut model = Fails(Script::new(&spell(&tokenizer, "ab"), 257), 3);
    let generator = Generator::new(&mut model, &[1], &greedy()).unwrap().with_tokenizer(&tokenizer).unwrap();
    let items: Vec<Result<Event>> = generator.collect();
    let text: String = items.iter().flatten().filter_map(Event::text).collect();
    assert_eq!(text, "ab");
    assert!(matches!(items.last(), Some(Err(ModelError::EmptyPrompt))), "{items:?}");
    assert_eq!(items.iter().filter(|item| item.is_err()).count(), 1);
}

#[test]
fn a_request_may_hold_a_processor() {
    #[derive(Debug)]
    struct Never(usize);
    impl LogitsProcessor for Never {
        fn process(&mut self, scores: &mut [f32], _: History<'_>) {
            scores[self.0] = f32::NEG_INFINITY;
        }
    }
    let config = GenerationConfig::greedy().with_max_new_tokens(2);
    let mut model = Counter::new(9);
    let request = Request::new([1], config).with_processor(Never(2));
    let mut generator = Generator::from_request(&mut model, request).unwrap();
    assert_eq!(generator.ids().collect::<Result<Vec<_>>>().unwrap(), [0, 1]);
}
