//! What stops a generation, and what it refuses.

use std::cell::Cell;

use tokenizers::Tokenizer;
use vesper_model::generate::{GenerationConfig, Generator, NextLogits, StopReason};
use vesper_model::{ModelError, Result};

/// After token n comes n + 1, up to the vocabulary, and it remembers `capacity` tokens.
struct Counter {
    seen: Vec<u32>,
    calls: Vec<usize>,
    capacity: usize,
    vocab: usize,
}

impl Counter {
    fn new(capacity: usize) -> Self {
        Self { seen: Vec::new(), calls: Vec::new(), capacity, vocab: 64 }
    }
}

impl NextLogits for Counter {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        assert!(!ids.is_empty() && ids.len() <= self.remaining());
        self.calls.push(ids.len());
        self.seen.extend(ids);
        let mut logits = vec![0.0; self.vocab];
        let next = (self.seen[self.seen.len() - 1] as usize + 1) % self.vocab;
        logits[next] = 1.0;
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        self.capacity - self.seen.len()
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }
}

fn run(model: &mut Counter, prompt: &[u32], config: &GenerationConfig) -> (Vec<u32>, Option<StopReason>) {
    let mut generator = Generator::new(model, prompt, config).unwrap();
    let ids = generator.by_ref().map(|id| id.unwrap()).collect();
    assert!(generator.next().is_none(), "it stays stopped");
    (ids, generator.stop_reason())
}

#[test]
fn any_end_of_text_stops_and_is_not_given() {
    for eos in [vec![9], vec![30, 9]] {
        let config = GenerationConfig::greedy().with_eos(eos);
        assert_eq!(run(&mut Counter::new(50), &[6], &config), (vec![7, 8], Some(StopReason::Eos)));
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
fn the_caller_stops_it() {
    let asked = Cell::new(0);
    let mut model = Counter::new(50);
    let config = GenerationConfig::greedy();
    let mut generator = Generator::new(&mut model, &[1], &config).unwrap().with_interrupt(|| {
        asked.set(asked.get() + 1);
        asked.get() > 2
    });
    assert_eq!(generator.by_ref().map(|id| id.unwrap()).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(generator.stop_reason(), Some(StopReason::Interrupted));
    assert_eq!((generator.generated(), generator.unfed()), (&[2, 3][..], &[3][..]));
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
    let ids = Generator::new(&mut Two, &[1], &config).unwrap().collect::<Result<Vec<_>>>().unwrap();
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
    assert_eq!(generator.stop_reason(), Some(StopReason::Failed));
}

#[test]
fn pieces_are_the_text_of_the_tokens() {
    // Tokens 1 to 3 are "a", "b" and the first byte of a character; 4 is its second.
    let tokenizer: Tokenizer =
        r#"{"added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true}, "model": {"type": "BPE",
        "vocab": {"z": 0, "a": 1, "b": 2, "Ã": 3, "©": 4, "c": 5, "d": 6}, "merges": []}}"#
            .parse()
            .unwrap();
    let mut model = Counter::new(50);
    let config = GenerationConfig::greedy().with_eos([6]);
    let mut generator = Generator::new(&mut model, &[1], &config).unwrap();
    let pieces: Vec<String> = generator.pieces(&tokenizer).unwrap().map(|piece| piece.unwrap()).collect();
    assert_eq!(pieces, ["b", "é", "c"]);
    assert_eq!(generator.stop_reason(), Some(StopReason::Eos));

    let mut model = Counter::new(50);
    let config = config.with_max_new_tokens(2);
    let mut generator = Generator::new(&mut model, &[1], &config).unwrap();
    let pieces: Vec<String> = generator.pieces(&tokenizer).unwrap().map(|piece| piece.unwrap()).collect();
    assert_eq!(pieces, ["b", "\u{fffd}"], "what is left open comes at the end");
}
