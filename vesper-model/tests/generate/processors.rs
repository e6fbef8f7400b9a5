//! Each processor against Hugging Face's, and what theirs do not say.

use serde::Deserialize;
use vesper_model::ModelError;
use vesper_model::generate::{
    BadWords, FrequencyPenalty, GenerationConfig, History, LogitsProcessor, NoRepeatNgram, Sampler,
};

#[derive(Deserialize)]
struct Golden {
    eos: u32,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: serde_json::Map<String, serde_json::Value>,
    history: Vec<u32>,
    prompt: usize,
    /// `None`: excluded before.
    scores: Vec<Option<f32>>,
    /// Log-probabilities; `None`: excluded.
    left: Vec<Option<f64>>,
}

/// `golden/processors.py` made the file.
#[test]
fn scores_are_those_of_hugging_face() {
    let golden: Golden = serde_json::from_str(include_str!("golden/processors.json")).unwrap();
    assert_eq!(golden.cases.len(), 145);
    for case in golden.cases {
        let mut config = case.config.clone();
        // What the case does not name is off.
        for (field, off) in
            [("do_sample", true.into()), ("top_k", 0.into()), ("eos_token_id", golden.eos.into())]
        {
            config.entry(field).or_insert(off);
        }
        let config: GenerationConfig = serde_json::from_value(config.into()).unwrap();
        let mut scores: Vec<f32> =
            case.scores.iter().map(|score| score.unwrap_or(f32::NEG_INFINITY)).collect();
        Sampler::new(&config).unwrap().with_prompt(case.prompt).sample(&mut scores, &case.history).unwrap();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|score| f64::from(score - most).exp()).sum();
        let total = f64::from(most) + sum.ln();
        for (id, (score, left)) in scores.iter().zip(&case.left).enumerate() {
            match left {
                None => assert_eq!(*score, f32::NEG_INFINITY, "token {id} of {:?}", case.config),
                Some(left) => {
                    let got = f64::from(*score) - total;
                    assert!(
                        (got - left).abs() < 2e-6 + 3e-7 * left.abs(),
                        "token {id} of {:?}: {got}, expected {left}",
                        case.config
                    );
                }
            }
        }
    }
}

fn excluded(processor: &mut dyn LogitsProcessor, tokens: &[u32], prompt: usize) -> Vec<usize> {
    let mut scores = [0.0; 6];
    processor.process(&mut scores, History::new(tokens, prompt));
    (0..6).filter(|&id| scores[id] == f32::NEG_INFINITY).collect()
}

#[test]
fn a_run_of_tokens_is_excluded_only_where_it_would_be_complete() {
    assert_eq!(excluded(&mut NoRepeatNgram::new(3), &[1, 2, 3, 1, 2], 0), [3]);
    assert_eq!(excluded(&mut NoRepeatNgram::new(3), &[1, 2, 3, 2, 1], 0), [0; 0]);
    assert_eq!(excluded(&mut NoRepeatNgram::new(3), &[1], 0), [0; 0]);
    assert_eq!(excluded(&mut NoRepeatNgram::new(0), &[1, 1], 0), [0; 0]);
    assert_eq!(excluded(&mut NoRepeatNgram::new(1), &[1, 4], 0), [1, 4]);
}

#[test]
fn that_every_token_is_excluded_is_an_error_that_says_by_what() {
    let on = |config: GenerationConfig| [GenerationConfig { do_sample: false, ..config.clone() }, config];
    let ngram = GenerationConfig::default().with_no_repeat_ngram_size(1);
    let words = GenerationConfig::default().with_bad_words((0..3).map(|id| vec![id]));
    let end = GenerationConfig::default().with_eos(0..3).with_min_new_tokens(1);
    for config in [on(ngram), on(words), on(end)].concat() {
        let mut sampler = Sampler::new(&config).unwrap().with_prompt(3);
        match sampler.sample(&mut [0.0, 1.0, 2.0], &[0, 1, 2]) {
            Err(ModelError::InvalidLogits { reason }) => {
                assert!(reason.contains("bad_words_ids"), "{reason}");
            }
            other => panic!("{config:?}: {other:?}"),
        }
    }
}

#[test]
fn a_sequence_may_be_as_long_as_the_history_and_the_token() {
    assert_eq!(excluded(&mut BadWords::new(vec![vec![1, 2, 3]], &[]), &[1, 2], 0), [3]);
    assert_eq!(excluded(&mut BadWords::new(vec![vec![1, 2, 3]], &[]), &[2], 0), [0; 0]);
    // The end of the text alone is no word, whatever one asks for.
    assert_eq!(excluded(&mut BadWords::new(vec![vec![2], vec![9]], &[2]), &[2], 0), [0; 0]);
}

#[test]
fn frequency_counts_each_time_and_presence_once_and_neither_the_prompt() {
    let mut scores = [1.0; 6];
    FrequencyPenalty::new(0.5, 0.25).process(&mut scores, History::new(&[0, 0, 1, 1, 2], 2));
    assert_eq!(scores, [1.0, -0.25, 0.25, 1.0, 1.0, 1.0]);
}

#[test]
fn an_answer_begins_with_the_forced_prefix() {
    let config = GenerationConfig::default().with_forced_prefix([4, 2]).with_seed(3);
    let mut sampler = Sampler::new(&config).unwrap().with_prompt(1);
    let mut tokens = vec![0];
    for _ in 0..3 {
        let mut scores = [9.0, 0.0, f32::NEG_INFINITY, 0.0, -50.0, 0.0];
        tokens.push(sampler.sample(&mut scores, &tokens).unwrap());
    }
    assert_eq!(tokens, [0, 4, 2, 0]);
    // What cannot be forced is not forgotten.
    let config = GenerationConfig::greedy().with_forced_prefix([6]);
    let error = Sampler::new(&config).unwrap().sample(&mut [0.0; 6], &[]).unwrap_err().to_string();
    assert!(error.contains("forced_prefix"), "{error}");
}

#[test]
fn settings_out_of_range_are_named() {
    let on = GenerationConfig::default;
    for (config, field) in [
        (on().with_min_p(1.5), "min_p"),
        (on().with_min_p(f64::NAN), "min_p"),
        (on().with_typical_p(0.0), "typical_p"),
        (on().with_frequency_penalty(f64::INFINITY), "frequency_penalty"),
        (on().with_presence_penalty(f64::NAN), "presence_penalty"),
        (on().with_bad_words([vec![1], vec![]]), "bad_words_ids"),
        (on().with_max_new_tokens(3).with_min_new_tokens(4), "min_new_tokens"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn settings_survive_their_file_and_those_that_are_off_are_not_in_it() {
    let config = GenerationConfig::default()
        .with_min_p(0.1)
        .with_typical_p(0.9)
        .with_frequency_penalty(0.5)
        .with_presence_penalty(-0.5)
        .with_no_repeat_ngram_size(3)
        .with_bad_words([vec![1, 2], vec![3]])
        .with_forced_prefix([7])
        .with_min_new_tokens(2);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<GenerationConfig>(&json).unwrap(), config);
    let plain = serde_json::to_value(GenerationConfig::default()).unwrap();
    for field in
        ["min_p", "typical_p", "frequency_penalty", "no_repeat_ngram_size", "bad_words_ids", "forced_prefix"]
    {
        assert_eq!(plain.get(field), None, "{field}");
    }
}
