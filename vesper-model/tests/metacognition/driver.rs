use vesper_model::generate::{GenerationConfig, NextLogits, StopReason};
use vesper_model::metacognition::{
    Action, Calibrated, Confidence, Event, HeadConfig, Introspective, Measure, Regulated, Regulation,
    RegulatorConfig, State, TokenView, Verdict,
};
use vesper_model::{ModelError, Result};

use crate::model;

/// After n tokens, prompt included, the logits are row n.
struct Script {
    rows: Vec<Vec<f32>>,
    read: usize,
    capacity: usize,
}

impl NextLogits for Script {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.read += ids.len();
        Ok(self.rows[self.read % self.rows.len()].clone())
    }
    fn remaining(&self) -> usize {
        self.capacity - self.read
    }
    fn vocab_size(&self) -> usize {
        4
    }
}

impl Introspective for Script {}

/// Rows in which token n has `p`, and the next one the rest.
fn script(p: &[f32]) -> impl FnMut() -> Result<Script> {
    let row = |(n, p): (usize, &f32)| {
        let mut row = vec![f32::NEG_INFINITY; 4];
        row[n % 4] = p.ln();
        row[(n + 1) % 4] = (1.0 - p).ln();
        row
    };
    let rows: Vec<Vec<f32>> = p.iter().enumerate().map(row).collect();
    move || Ok(Script { rows: rows.clone(), read: 0, capacity: 64 })
}

fn settings() -> RegulatorConfig {
    RegulatorConfig {
        max_drafts: 3,
        temperature: 1.0,
        cooled: 0.0,
        cool_above: 1.0,
        discard_above: 1.0,
        satisfied_at: 0.0,
        abstain_above: 1.0,
    }
}

fn tokens(n: usize) -> GenerationConfig {
    GenerationConfig::default().with_top_k(0).with_top_p(1.0).with_max_new_tokens(n)
}

fn run(settings: RegulatorConfig, generation: &GenerationConfig, p: &[f32]) -> Regulated {
    let confidence = Calibrated::new(Measure::Probability);
    Regulation::new(&settings, generation, &confidence).unwrap().answer(script(p), &[0]).unwrap()
}

#[test]
fn a_good_draft_ends_the_search() {
    let report = run(RegulatorConfig { satisfied_at: 0.3, ..settings() }, &tokens(2), &[0.5, 0.9999, 0.9999]);
    assert_eq!((report.verdict, report.answer()), (Verdict::Satisfied { draft: 0 }, Some(vec![1, 2])));
    assert_eq!((report.drafts.len(), report.cost()), (1, 2));
    let draft = &report.drafts[0];
    assert_eq!(draft.end, Some(StopReason::MaxTokens));
    assert!((draft.tokens[0].p_wrong - 1e-4).abs() < 1e-6 && (draft.p_wrong - 2e-4).abs() < 1e-6);
    let states: Vec<State> = report.events.iter().map(|(state, ..)| *state).collect();
    assert_eq!(states[0], State::Plan);
    assert_eq!(states.len(), 1 + 2 * 2 + 1, "begin, two tokens predicted and chosen, finished");
    assert!(states[1..].iter().all(|state| *state == State::Regulate));
}

#[test]
fn the_draft_with_the_highest_confidence_is_the_answer() {
    // A token of .6 against .4: over enough seeds both are drawn among three drafts.
    let mut mixed = 0;
    for seed in 0..20 {
        let report = run(settings(), &tokens(1).with_seed(seed), &[0.5, 0.6]);
        assert_eq!(report.drafts.len(), 3);
        let best = report.drafts.iter().map(|draft| draft.p_wrong).fold(1.0, f64::min);
        let Verdict::Best { draft } = report.verdict else { panic!("{:?}", report.verdict) };
        assert_eq!(report.drafts[draft].p_wrong, best);
        assert_eq!((report.p_wrong(), report.cost()), (Some(best), 3));
        let first: Vec<u32> = report.drafts.iter().map(|draft| draft.tokens[0].id).collect();
        mixed += usize::from(first.contains(&1) && first.contains(&2));
        // A drawn token that is not the likeliest is judged by its own probability.
        for token in report.drafts.iter().map(|draft| draft.tokens[0]) {
            let expected = if token.id == 1 { 0.4 } else { 0.6 };
            assert!((token.p_wrong - expected).abs() < 1e-6 && (token.p_likeliest_wrong - 0.4).abs() < 1e-6);
        }
        assert_eq!(run(settings(), &tokens(1).with_seed(seed), &[0.5, 0.6]), report, "reproducible");
    }
    assert!(mixed > 5, "{mixed}");
}

#[test]
fn nothing_is_answered_without_confidence() {
    let settings = RegulatorConfig { abstain_above: 0.3, satisfied_at: 0.3, max_drafts: 2, ..settings() };
    let report = run(settings, &tokens(3), &[0.6]);
    assert_eq!((report.verdict, report.answer()), (Verdict::Abstained, None));
    assert_eq!(report.cost(), 6);
    assert!(report.p_wrong().unwrap() > 0.3);
}

#[test]
fn a_token_of_low_confidence_is_chosen_at_the_lower_temperature() {
    // Rows 1 and 3 are sure enough, row 2 is not.
    let p = [0.5, 0.9, 0.6, 0.9];
    let greedy = RegulatorConfig { cool_above: 0.2, max_drafts: 1, ..settings() };
    for seed in 0..20 {
        let report = run(greedy, &tokens(3).with_seed(seed), &p);
        let tokens = &report.drafts[0].tokens;
        assert_eq!(tokens.iter().map(|t| t.temperature).collect::<Vec<_>>(), [1.0, 0.0, 1.0]);
        assert_eq!(tokens[1].id, 2, "the likeliest");
    }
    // At a low temperature the likelier of .6 and .4 is drawn nearly always, (.6/.4)^10 times as often; at 1 it is not.
    let share = |cooled: f64| {
        let settings = RegulatorConfig { cool_above: 0.2, cooled, max_drafts: 1, ..settings() };
        let likeliest = |seed| {
            let report = run(settings, &tokens(3).with_seed(seed), &p);
            u32::from(report.drafts[0].tokens[1].id == 2)
        };
        (0..200).map(likeliest).sum::<u32>()
    };
    assert!(share(0.1) > 190, "{}", share(0.1));
    assert!((90..150).contains(&share(1.0)), "{}", share(1.0));
    // Where everything is greedy, the temperature is 0 from the start.
    let cold = RegulatorConfig { temperature: 0.0, cooled: 0.0, max_drafts: 1, ..settings() };
    assert_eq!(run(cold, &tokens(3), &p).answer(), Some(vec![1, 2, 3]));
}

#[test]
fn a_hopeless_draft_is_given_up_before_its_end() {
    let settings = RegulatorConfig { discard_above: 0.5, max_drafts: 2, ..settings() };
    let report = run(settings, &tokens(4), &[0.7]);
    assert_eq!(report.drafts[0].end, None);
    let given_up = report.drafts[0].tokens.len();
    assert!(given_up < 4, "{given_up}");
    assert_eq!(report.drafts[1].end, Some(StopReason::MaxTokens), "the last one is not");
    assert_eq!((report.verdict, report.cost()), (Verdict::Best { draft: 1 }, given_up + 4));
    assert_eq!(report.p_wrong(), Some(report.drafts[1].p_wrong));
    assert!(report.events.contains(&(
        State::Regulate,
        Event::Chosen { p_wrong: report.drafts[0].p_wrong },
        Action::Discard
    )));
}

#[test]
fn the_end_of_the_text_is_a_choice_but_no_text() {
    let generation = tokens(9).with_eos([3]);
    let report = run(RegulatorConfig { satisfied_at: 1.0, ..settings() }, &generation, &[0.9999; 4]);
    assert_eq!(report.answer(), Some(vec![1, 2]));
    assert_eq!((&report.drafts[0].end, report.cost()), (&Some(StopReason::Eos(3)), 3));
}

#[test]
fn the_caller_and_the_context_stop_it() {
    let confidence = Calibrated::new(Measure::Probability);
    let mut left = 3;
    let interrupt = || {
        left -= 1;
        left < 0
    };
    let mut regulation =
        Regulation::new(&settings(), &tokens(2), &confidence).unwrap().with_interrupt(interrupt);
    let report = regulation.answer(script(&[0.6]), &[0]).unwrap();
    assert_eq!((report.verdict, report.answer()), (Verdict::Interrupted, None));
    assert_eq!(report.drafts.last().unwrap().end, Some(StopReason::Cancelled));
    drop(regulation);

    let short = || Ok(Script { rows: vec![vec![0.0; 4]], read: 0, capacity: 3 });
    let mut regulation = Regulation::new(&settings(), &tokens(9), &confidence).unwrap();
    let report = regulation.answer(short, &[0]).unwrap();
    assert!(report.drafts.iter().all(|draft| draft.end == Some(StopReason::ContextFull)));
    assert_eq!(report.drafts[0].tokens.len(), 3);
}

#[test]
fn the_length_of_the_whole_ends_a_draft_and_texts_cannot() {
    let whole = tokens(9).with_max_length(Some(3));
    let report = run(RegulatorConfig { max_drafts: 1, ..settings() }, &whole, &[0.9; 4]);
    // The prompt has one token.
    assert_eq!((report.drafts[0].tokens.len(), &report.drafts[0].end), (2, &Some(StopReason::MaxTokens)));
    let confidence = Calibrated::new(Measure::Probability);
    let error = Regulation::new(&settings(), &tokens(9).with_stop_strings(["."]), &confidence).unwrap_err();
    assert!(error.to_string().contains("stop_strings"), "{error}");
}

#[test]
fn an_answer_without_room_for_a_token_is_refused_and_none_that_is_certain() {
    let confidence = Calibrated::new(Measure::Probability);
    for (generation, part) in [
        (tokens(0), "max_new_tokens is 0"),
        (tokens(0).with_max_length(Some(9)), "max_new_tokens is 0"),
        (tokens(9).with_max_length(Some(3)), "max_length is 3 for a prompt of 3"),
        (tokens(9).with_max_length(Some(1)), "max_length is 1 for a prompt of 3"),
    ] {
        let mut regulation = Regulation::new(&settings(), &generation, &confidence).unwrap();
        let error = regulation.answer(script(&[0.6]), &[0, 1, 2]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn what_the_constraints_exclude_stays_excluded_at_any_temperature() {
    let confidence = Calibrated::new(Measure::Probability);
    // The prefix is not in the vocabulary of four; the words are all of it.
    let prefix = tokens(2).with_forced_prefix([9]);
    let words = tokens(2).with_bad_words((0..4).map(|id| vec![id]));
    for (cooled, cool_above) in [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 0.0)] {
        for generation in [&prefix, &words] {
            let settings = RegulatorConfig { cooled, cool_above, ..settings() };
            let mut regulation = Regulation::new(&settings, generation, &confidence).unwrap();
            let error = regulation.answer(script(&[0.6]), &[0]).unwrap_err().to_string();
            assert!(error.contains("every token is excluded"), "{cooled}: {error}");
        }
        let generation = tokens(2).with_bad_words([vec![1]]);
        let settings = RegulatorConfig { cooled, cool_above, ..settings() };
        let mut regulation = Regulation::new(&settings, &generation, &confidence).unwrap();
        let report = regulation.answer(script(&[0.6]), &[0]).unwrap();
        assert!(report.drafts.iter().all(|draft| !draft.ids().contains(&1)), "{cooled}");
    }
}

#[test]
fn ids_beyond_the_tokenizer_are_not_chosen() {
    let confidence = Calibrated::new(Measure::Probability);
    let rows = || Ok(Script { rows: vec![vec![0.0, 0.0, 9.0, 9.0]], read: 0, capacity: 64 });
    let mut regulation =
        Regulation::new(&settings(), &tokens(30), &confidence).unwrap().with_vocab_limit(2).with_seed(4);
    let report = regulation.answer(rows, &[0]).unwrap();
    assert!(report.drafts.iter().all(|draft| draft.ids().iter().all(|id| *id < 2)));
}

#[test]
fn a_head_regulates_a_session() {
    let lm = model::of_seed(0);
    let head = model::trained(&lm, &HeadConfig::default().with_units(8), 0).0;
    let confidence = head.confidence();
    let generation = tokens(5);
    let mut regulation = Regulation::new(&settings(), &generation, &confidence).unwrap();
    let report = regulation.answer(|| lm.session(16), &[1, 2, 3]).unwrap();
    assert_eq!((report.drafts.len(), report.cost()), (3, 15));
    let tokens: Vec<f64> = report.drafts[0].tokens.iter().map(|token| token.p_wrong).collect();
    assert_eq!(report.drafts[0].p_wrong, confidence.p_answer_wrong(&tokens));
}

/// Gives what no probability is.
struct Broken;
impl Confidence for Broken {
    fn p_wrong(&self, _: &TokenView<'_>) -> Result<f64> {
        Ok(f64::NAN)
    }
    fn p_answer_wrong(&self, _: &[f64]) -> f64 {
        0.5
    }
}

#[test]
fn prompts_and_settings_that_cannot_be_used_are_refused() {
    let confidence = Calibrated::new(Measure::Probability);
    let answer = |generation: &GenerationConfig, prompt: &[u32]| {
        Regulation::new(&settings(), generation, &confidence)?.answer(script(&[0.6]), prompt)
    };
    assert!(matches!(answer(&tokens(1), &[]), Err(ModelError::EmptyPrompt)));
    assert!(answer(&tokens(1).with_bos(Some(1)), &[]).is_ok());
    assert!(matches!(answer(&tokens(1), &[9]), Err(ModelError::TokenOutOfRange { id: 9, vocab: 4 })));
    assert!(matches!(answer(&tokens(1), &[0; 65]), Err(ModelError::SequenceTooLong { got: 65, limit: 64 })));
    assert!(matches!(answer(&tokens(1).with_top_p(2.0), &[0]), Err(ModelError::InvalidGeneration { .. })));
    let wrong = RegulatorConfig { max_drafts: 0, ..settings() };
    assert!(Regulation::new(&wrong, &tokens(1), &confidence).is_err());

    let generation = tokens(1);
    let mut regulation = Regulation::new(&settings(), &generation, &Broken).unwrap();
    assert!(regulation.answer(script(&[0.6]), &[0]).unwrap_err().to_string().contains("p_wrong is NaN"));
    // A head needs hidden states, which this model does not show.
    let lm = model::of_seed(0);
    let head = model::trained(&lm, &HeadConfig::default().with_units(4), 0).0;
    let confidence = head.confidence();
    let mut regulation = Regulation::new(&settings(), &generation, &confidence).unwrap();
    assert!(regulation.answer(script(&[0.6]), &[0]).unwrap_err().to_string().contains("no hidden state"));
}
