//! Beam search against Hugging Face's, and against all continuations.

use std::collections::BTreeSet;

use serde::Deserialize;
use vesper_model::generate::{
    BatchLogits, Cancellation, EarlyStopping, Event, GenerationConfig, Generator, Hypothesis, NextLogits,
    Request, StopReason, beam_search,
};
use vesper_model::{ModelError, Result};

use crate::fake::{Hashed, Rows};

#[derive(Deserialize)]
struct Golden {
    last: Vec<Vec<f32>>,
    before: Vec<Vec<f32>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: serde_json::Value,
    prompt: Vec<u32>,
    found: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    /// With the end of text.
    ids: Vec<u32>,
    score: f64,
}

/// The sum of two tables' rows: of the last token, and of the one before it.
#[derive(Clone)]
struct Table<'a> {
    golden: &'a Golden,
    read: Vec<u32>,
}

impl NextLogits for Table<'_> {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.read.extend(ids);
        let (last, rest) = self.read.split_last().unwrap();
        let mut logits = self.golden.last[*last as usize].clone();
        if let Some(before) = rest.last() {
            logits.iter_mut().zip(&self.golden.before[*before as usize]).for_each(|(a, b)| *a += b);
        }
        Ok(logits)
    }
    fn remaining(&self) -> usize {
        100 - self.read.len()
    }
    fn vocab_size(&self) -> usize {
        self.golden.last.len()
    }
}

/// `golden/beams.py` made the file.
#[test]
fn sequences_and_scores_are_those_of_hugging_face() {
    let golden: Golden = serde_json::from_str(include_str!("golden/beams.json")).unwrap();
    assert_eq!(golden.cases.len(), 63);
    for case in &golden.cases {
        let config: GenerationConfig = serde_json::from_value(case.config.clone()).unwrap();
        let table = || Table { golden: &golden, read: Vec::new() };
        let mut model = Rows::new(config.num_beams, table);
        let found = beam_search(&mut model, Request::new(case.prompt.clone(), config.clone())).unwrap();
        assert_eq!(found.len(), case.found.len(), "{} {:?}", case.config, case.prompt);
        for (got, expected) in found.iter().zip(&case.found) {
            let mut ids = got.ids.clone();
            if let StopReason::Eos(id) = got.stop {
                ids.push(id);
            }
            assert_eq!(ids, expected.ids, "{} {:?}", case.config, case.prompt);
            assert!(
                (got.score - expected.score).abs() < 1e-5,
                "{} {:?}: {}, expected {}",
                case.config,
                case.prompt,
                got.score,
                expected.score
            );
            let divisor = (ids.len() as f64).powf(config.length_penalty);
            assert!((got.log_probability / divisor - got.score).abs() < 1e-12);
        }
    }
}

fn beams(n: usize) -> GenerationConfig {
    GenerationConfig::greedy().with_beams(n).with_return_sequences(n).with_max_new_tokens(4)
}

fn search(config: &GenerationConfig) -> Result<Vec<Hypothesis>> {
    beam_search(
        &mut Rows::new(config.num_beams.max(1), || Hashed::new(20)),
        Request::new([3, 4], config.clone()),
    )
}

#[test]
fn one_beam_is_the_greedy_choice() {
    let constrained = beams(1)
        .with_max_new_tokens(12)
        .with_repetition_penalty(1.7)
        .with_no_repeat_ngram_size(2)
        .with_frequency_penalty(0.8)
        .with_bad_words([vec![9], vec![3, 4]]);
    let patient = beams(1)
        .with_max_new_tokens(12)
        .with_eos(0..100)
        .with_length_penalty(2.0)
        .with_early_stopping(EarlyStopping::WhenImpossible);
    for config in [beams(1), constrained.clone(), constrained.with_eos(0..40).with_min_new_tokens(3), patient]
    {
        let mut model = Hashed::new(20);
        let greedy = Generator::new(&mut model, &[3, 4], &config).unwrap();
        let (mut ids, mut end, mut log_probability) = (Vec::new(), None, 0.0);
        for event in greedy {
            match event.unwrap() {
                Event::Token(token) => {
                    ids.push(token.id);
                    log_probability += token.log_probability;
                }
                Event::Finish(reason) => end = Some(reason),
                Event::Text(_) => panic!("there is no tokenizer"),
            }
        }
        let found = search(&config).unwrap();
        assert_eq!((found.len(), &found[0].ids, Some(&found[0].stop)), (1, &ids, end.as_ref()));
        // An event has no log-probability of the token that ends a text.
        if found[0].stop == StopReason::MaxTokens {
            assert!((found[0].log_probability - log_probability).abs() < 1e-5, "{config:?}");
        }
    }
}

#[test]
fn enough_beams_find_the_most_probable_of_all() {
    /// Four tokens.
    #[derive(Clone)]
    struct Four(Hashed);
    impl NextLogits for Four {
        fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
            Ok(self.0.append(ids)?[..4].to_vec())
        }
        fn remaining(&self) -> usize {
            self.0.remaining()
        }
        fn vocab_size(&self) -> usize {
            4
        }
    }
    let log_softmax = |logits: Vec<f32>| {
        let total = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        logits.into_iter().map(move |l| f64::from(l) - total).collect::<Vec<_>>()
    };
    let mut all = Vec::new();
    for (a, b, c) in (0..64u32).map(|i| (i / 16, i / 4 % 4, i % 4)) {
        let mut model = Four(Hashed::new(20));
        let steps = [(vec![1], a), (vec![a], b), (vec![b], c)];
        let log_probability: f64 =
            steps.iter().map(|(read, next)| log_softmax(model.append(read).unwrap())[*next as usize]).sum();
        all.push((log_probability, vec![a, b, c]));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    let config = GenerationConfig::greedy().with_beams(16).with_return_sequences(3).with_max_new_tokens(3);
    let mut model = Rows::new(16, || Four(Hashed::new(20)));
    let found = beam_search(&mut model, Request::new([1], config)).unwrap();
    for (found, (log_probability, ids)) in found.iter().zip(&all) {
        assert_eq!(&found.ids, ids);
        assert!((found.log_probability - log_probability).abs() < 1e-5);
    }
    assert_eq!(found.len(), 3);
}

#[test]
fn sequences_differ_and_come_in_order() {
    let found = search(&beams(5)).unwrap();
    assert_eq!(found.len(), 5);
    assert_eq!(found.iter().map(|one| &one.ids).collect::<BTreeSet<_>>().len(), 5);
    assert!(found.windows(2).all(|pair| pair[0].score >= pair[1].score));
}

#[test]
fn the_prompt_is_read_once_and_spare_rows_never() {
    let mut model = Rows::new(4, || Hashed::new(20));
    beam_search(&mut model, Request::new([3, 4], beams(2))).unwrap();
    assert_eq!(model.calls, [vec![0], vec![0, 1], vec![0, 1], vec![0, 1]]);
}

#[test]
fn a_full_context_ends_all() {
    let config = beams(2).with_max_new_tokens(50);
    let mut model = Rows::new(2, || Hashed::new(4));
    let found = beam_search(&mut model, Request::new([3, 4], config)).unwrap();
    assert!(found.iter().all(|one| one.ids.len() == 3 && one.stop == StopReason::ContextFull), "{found:?}");
}

#[test]
fn no_tokens_are_wanted() {
    let found = search(&beams(2).with_max_new_tokens(0)).unwrap();
    let empty = Hypothesis { ids: vec![], score: 0.0, log_probability: 0.0, stop: StopReason::MaxTokens };
    assert_eq!(found, [empty]);
}

#[test]
fn a_cancellation_gives_what_there_is() {
    /// Cancels at its third call.
    struct Cancels(Rows<Hashed>, Cancellation);
    impl BatchLogits for Cancels {
        fn rows(&self) -> usize {
            self.0.rows()
        }
        fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
            if self.0.calls.len() == 2 {
                self.1.cancel();
            }
            self.0.append(ids)
        }
        fn reorder(&mut self, from: &[usize]) -> Result<()> {
            self.0.reorder(from)
        }
        fn remaining(&self, row: usize) -> usize {
            self.0.remaining(row)
        }
        fn vocab_size(&self) -> usize {
            self.0.vocab_size()
        }
    }
    let cancellation = Cancellation::new();
    let mut model = Cancels(Rows::new(2, || Hashed::new(20)), cancellation.clone());
    let request = Request::new([3, 4], beams(2)).with_cancellation(&cancellation);
    let found = beam_search(&mut model, request).unwrap();
    assert!(found.iter().all(|one| one.ids.len() == 3 && one.stop == StopReason::Cancelled), "{found:?}");
}

#[test]
fn a_beam_without_continuation_is_given_up() {
    // Each of 260 tokens once: the third token has 258 left, and so on; then there is none.
    let config = beams(2).with_no_repeat_ngram_size(1).with_max_new_tokens(300);
    let words = (0..260).filter(|id| ![9, 10].contains(id)).map(|id| vec![id]);
    let config = config.with_bad_words(words).with_eos([10]).with_min_new_tokens(2);
    let error = beam_search(&mut Rows::new(2, || Hashed::new(500)), Request::new([3, 4], config.clone()));
    match error {
        Err(ModelError::InvalidLogits { reason }) => assert!(reason.contains("bad_words_ids"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let found = beam_search(
        &mut Rows::new(2, || Hashed::new(500)),
        Request::new([3, 4], config.with_min_new_tokens(1)),
    );
    assert_eq!(found.unwrap()[0].ids, [9]);
}

#[test]
fn wrong_settings_are_named() {
    for (config, field) in [
        (beams(0), "num_beams"),
        (beams(2).with_return_sequences(0), "num_return_sequences"),
        (beams(2).with_return_sequences(3), "num_return_sequences"),
        (beams(2).with_temperature(1.0), "do_sample"),
        (beams(2).with_stop_strings(["x"]), "stop_strings"),
        (beams(2).with_length_penalty(f64::NAN), "length_penalty"),
    ] {
        match search(&config) {
            Err(ModelError::InvalidGeneration { field: got, .. }) => assert_eq!(got, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let mut model = Rows::new(2, || Hashed::new(20));
    let error = beam_search(&mut model, Request::new([1], beams(3))).unwrap_err().to_string();
    assert!(error.contains("num_beams is 3 for a model of 2 rows"), "{error}");
    let mut run = |prompt: Vec<u32>| beam_search(&mut model, Request::new(prompt, beams(2))).unwrap_err();
    assert!(matches!(run(vec![]), ModelError::EmptyPrompt));
    assert!(matches!(run(vec![1; 21]), ModelError::SequenceTooLong { got: 21, limit: 20 }));
    assert!(matches!(run(vec![260]), ModelError::TokenOutOfRange { id: 260, vocab: 260 }));
}

#[test]
fn scores_that_are_no_numbers_are_an_error() {
    #[derive(Clone)]
    struct Nan;
    impl NextLogits for Nan {
        fn append(&mut self, _: &[u32]) -> Result<Vec<f32>> {
            Ok(vec![0.0, f32::NAN])
        }
        fn remaining(&self) -> usize {
            9
        }
        fn vocab_size(&self) -> usize {
            2
        }
    }
    let result = beam_search(&mut Rows::new(2, || Nan), Request::new([1], beams(2)));
    assert!(matches!(result, Err(ModelError::InvalidLogits { .. })), "{result:?}");
}

#[test]
fn settings_of_beam_search_survive_their_file() {
    let config = beams(4).with_length_penalty(0.5).with_early_stopping(EarlyStopping::WhenImpossible);
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!((&json["num_beams"], &json["early_stopping"]), (&4.into(), &"never".into()));
    assert_eq!(serde_json::from_value::<GenerationConfig>(json).unwrap(), config);
    for (text, early_stopping) in [("true", EarlyStopping::WhenFull), ("false", EarlyStopping::WhenUnlikely)]
    {
        let config: GenerationConfig =
            serde_json::from_str(&format!(r#"{{"early_stopping": {text}}}"#)).unwrap();
        assert_eq!(config.early_stopping, early_stopping);
    }
    let error = serde_json::from_str::<GenerationConfig>(r#"{"early_stopping": "soon"}"#).unwrap_err();
    assert!(error.to_string().contains("early_stopping is \"soon\""), "{error}");
}
