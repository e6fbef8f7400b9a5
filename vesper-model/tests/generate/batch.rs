//! Several generations in one loop, against each alone.

use vesper_model::generate::{
    BatchGenerator, BatchLogits, Cancellation, Event, GenerationConfig, Generator, Request, StopReason,
};
use vesper_model::{ModelError, Result};

use crate::fake::{Hashed, Rows, bytes_and};

fn everything(generator: impl Iterator<Item = Result<Event>>) -> Vec<Event> {
    generator.map(|event| event.unwrap()).collect()
}

/// All events, by row, and for each call of the model the rows that it was given.
fn run(capacity: usize, requests: Vec<Request>) -> (Vec<Vec<Event>>, Vec<Vec<usize>>) {
    let tokenizer = bytes_and(&[]);
    let mut model = Rows::new(requests.len(), || Hashed::new(capacity));
    let mut events = vec![Vec::new(); requests.len()];
    let generator = BatchGenerator::new(&mut model, requests).unwrap().with_tokenizer(&tokenizer).unwrap();
    for (row, event) in generator {
        events[row].push(event.unwrap());
    }
    (events, model.calls)
}

fn configs() -> Vec<(Vec<u32>, GenerationConfig)> {
    let drawn = GenerationConfig::default().with_temperature(1.5);
    vec![
        (vec![5], drawn.clone().with_max_new_tokens(30).with_seed(1)),
        (vec![5], drawn.clone().with_max_new_tokens(3).with_seed(2)),
        ((1..20).collect(), GenerationConfig::greedy().with_max_new_tokens(12).with_repetition_penalty(1.4)),
        (vec![7, 7, 9], drawn.clone().with_eos(0..60).with_seed(3)),
        (vec![100, 200], drawn.with_stop_strings(('a'..='z').chain('0'..='9')).with_no_repeat_ngram_size(2)),
        (vec![1, 2], GenerationConfig::greedy().with_max_new_tokens(0)),
    ]
}

#[test]
fn each_row_is_what_it_is_alone() {
    let requests = configs().into_iter().map(|(prompt, config)| {
        Request::new(prompt, config).with_vocab_limit(257).with_model_log_probabilities(true)
    });
    let (rows, calls) = run(40, requests.collect());
    let tokenizer = bytes_and(&[]);
    for (row, (prompt, config)) in configs().into_iter().enumerate() {
        let mut model = Hashed::new(40);
        let request = Request::new(prompt, config).with_vocab_limit(257).with_model_log_probabilities(true);
        let alone = Generator::from_request(&mut model, request).unwrap().with_tokenizer(&tokenizer).unwrap();
        assert_eq!(rows[row], everything(alone), "row {row}");
        // A row that has ended is given to the model no more.
        assert_eq!(calls.iter().filter(|call| call.contains(&row)).count(), model.calls, "row {row}");
    }
    let reasons: Vec<_> = rows.iter().map(|row| row.last().unwrap().clone()).collect();
    assert!(matches!(&reasons[3], Event::Finish(StopReason::Eos(_))), "{reasons:?}");
    assert!(matches!(&reasons[4], Event::Finish(StopReason::Stop(_))), "{reasons:?}");
}

#[test]
fn rows_take_turns() {
    let config = GenerationConfig::greedy().with_max_new_tokens(2);
    let requests = [Request::new([1], config.clone()), Request::new([2], config)];
    let mut model = Rows::new(2, || Hashed::new(9));
    let order: Vec<usize> = BatchGenerator::new(&mut model, requests).unwrap().map(|(row, _)| row).collect();
    assert_eq!(order, [0, 1, 0, 1, 0, 1]);
}

#[test]
fn a_row_is_cancelled_alone() {
    let config = GenerationConfig::greedy().with_max_new_tokens(5);
    let cancellation = Cancellation::new();
    let requests =
        [Request::new([1], config.clone()).with_cancellation(&cancellation), Request::new([2], config)];
    let mut model = Rows::new(2, || Hashed::new(9));
    let mut generator = BatchGenerator::new(&mut model, requests).unwrap();
    for (row, event) in generator.by_ref() {
        if row == 1 && event.unwrap().id().is_some() {
            cancellation.cancel();
        }
    }
    assert_eq!(generator.stop_reason(0), Some(&StopReason::Cancelled));
    assert_eq!(generator.stop_reason(1), Some(&StopReason::MaxTokens));
    assert_eq!((generator.generated(0).len(), generator.generated(1).len()), (1, 5));
    assert_eq!((generator.generated(2).len(), generator.stop_reason(2)), (0, None), "no such row");
}

#[test]
fn a_full_context_ends_a_row_and_not_the_others() {
    let config = GenerationConfig::greedy().with_max_new_tokens(6);
    let requests = vec![Request::new([1, 2, 3], config.clone()), Request::new([2], config)];
    let (rows, _) = run(4, requests);
    let ends: Vec<_> = rows.iter().map(|row| row.last().unwrap().clone()).collect();
    assert_eq!(ends, [Event::Finish(StopReason::ContextFull), Event::Finish(StopReason::ContextFull)]);
    let tokens = |row: &[Event]| row.iter().filter(|event| event.id().is_some()).count();
    assert_eq!((tokens(&rows[0]), tokens(&rows[1])), (2, 4));
}

/// Fails at the n-th call, or gives scores that are no numbers in one row.
struct Bad {
    rows: Rows<Hashed>,
    fails: Option<usize>,
    nan: Option<usize>,
}

impl BatchLogits for Bad {
    fn rows(&self) -> usize {
        self.rows.rows()
    }
    fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        if self.fails.is_some_and(|call| call == self.rows.calls.len()) {
            return Err(ModelError::Tokenizer("as told".into()));
        }
        let mut logits = self.rows.append(ids)?;
        if let Some(row) = self.nan {
            logits[row].fill(f32::NAN);
        }
        Ok(logits)
    }
    fn reorder(&mut self, from: &[usize]) -> Result<()> {
        self.rows.reorder(from)
    }
    fn remaining(&self, row: usize) -> usize {
        self.rows.remaining(row)
    }
    fn vocab_size(&self) -> usize {
        self.rows.vocab_size()
    }
}

fn two() -> [Request; 2] {
    let config = GenerationConfig::greedy().with_max_new_tokens(3);
    [Request::new([1], config.clone()), Request::new([2], config)]
}

#[test]
fn a_wrong_row_fails_alone() {
    let mut model = Bad { rows: Rows::new(2, || Hashed::new(9)), fails: None, nan: Some(0) };
    let mut generator = BatchGenerator::new(&mut model, two()).unwrap();
    let items: Vec<_> = generator.by_ref().collect();
    assert!(matches!(&items[0], (0, Err(ModelError::InvalidLogits { .. }))), "{items:?}");
    assert_eq!(items.iter().filter(|(row, _)| *row == 0).count(), 1);
    assert_eq!(generator.stop_reason(0), Some(&StopReason::Failed));
    assert_eq!(generator.stop_reason(1), Some(&StopReason::MaxTokens));
}

#[test]
fn an_error_of_the_model_ends_all_and_is_given_once() {
    let mut model = Bad { rows: Rows::new(2, || Hashed::new(9)), fails: Some(1), nan: None };
    let items: Vec<_> = BatchGenerator::new(&mut model, two()).unwrap().collect();
    assert_eq!(items.len(), 4, "{items:?}");
    assert!(matches!(&items[2], (0, Err(ModelError::Tokenizer(_)))), "{items:?}");
    assert!(matches!(&items[3], (1, Ok(Event::Finish(StopReason::Failed)))), "{items:?}");
}

#[test]
fn wrong_requests_are_refused() {
    let mut model = Rows::new(2, || Hashed::new(9));
    let [one, _] = two();
    let error = BatchGenerator::new(&mut model, [one]).unwrap_err().to_string();
    assert!(error.contains("1 for a model of 2 rows"), "{error}");
    let [one, other] = two();
    let error = BatchGenerator::new(&mut model, [one, other, Request::new([1], GenerationConfig::default())]);
    assert!(error.unwrap_err().to_string().contains("3 for a model of 2 rows"));
    let [one, _] = two();
    let error = BatchGenerator::new(&mut model, [one, Request::new([], GenerationConfig::default())]);
    assert!(matches!(error.unwrap_err(), ModelError::EmptyPrompt));
    let [one, _] = two();
    let error = BatchGenerator::new(&mut model, [one, Request::new([1; 10], GenerationConfig::default())]);
    assert!(matches!(error.unwrap_err(), ModelError::SequenceTooLong { got: 10, limit: 9 }));
}

#[test]
fn no_rows_are_no_events() {
    let mut model = Rows::new(0, || Hashed::new(9));
    assert!(BatchGenerator::new(&mut model, []).unwrap().next().is_none());
}
