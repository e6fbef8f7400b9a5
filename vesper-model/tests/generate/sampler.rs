//! Each step of the sampler against its formula.

use proptest::prelude::*;
use vesper_model::ModelError;
use vesper_model::generate::{GenerationConfig, Sampler};

/// Samples with everything off but the seed.
fn plain() -> GenerationConfig {
    GenerationConfig::default().with_temperature(1.0).with_top_k(0).with_top_p(1.0).with_seed(7)
}

fn sampler(config: &GenerationConfig) -> Sampler {
    Sampler::new(config).unwrap()
}

/// How often each token comes in `n` draws.
fn frequencies(config: &GenerationConfig, logits: &[f32], n: usize) -> Vec<f64> {
    let mut sampler = sampler(config);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..n {
        counts[sampler.sample(&mut logits.to_vec(), &[]).unwrap() as usize] += 1;
    }
    counts.into_iter().map(|count| count as f64 / n as f64).collect()
}

/// Within five standard deviations of a binomial, and exactly zero where nothing may come.
fn assert_frequencies(got: &[f64], expected: &[f64], n: usize) {
    for (id, (got, p)) in got.iter().zip(expected).enumerate() {
        let tolerance = 5.0 * (p * (1.0 - p) / n as f64).sqrt();
        assert!((got - p).abs() <= tolerance, "token {id}: {got}, expected {p} +- {tolerance}");
    }
}

fn logits(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

const N: usize = 40_000;

#[test]
fn frequencies_match_the_softmax() {
    let p = [0.05, 0.4, 0.25, 0.0, 0.3];
    assert_frequencies(&frequencies(&plain(), &logits(&p), N), &p, N);
}

#[test]
fn temperature_divides_the_logits() {
    // p^(1/T), normalised; T = 1/2 squares.
    let p = [0.5, 0.3, 0.2];
    let total: f64 = p.iter().map(|p| p * p).sum();
    let squared: Vec<f64> = p.iter().map(|p| p * p / total).collect();
    assert_frequencies(&frequencies(&plain().with_temperature(0.5), &logits(&p), N), &squared, N);
}

#[test]
fn top_k_keeps_the_k_most_probable_in_proportion() {
    let p = [0.1, 0.4, 0.2, 0.3];
    let expected = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
    assert_frequencies(&frequencies(&plain().with_top_k(2), &logits(&p), N), &expected, N);
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_p() {
    let p = [0.1, 0.4, 0.2, 0.3];
    // 0.4 + 0.3 is less than 0.75, so the token that crosses it stays too.
    let expected = [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0];
    assert_frequencies(&frequencies(&plain().with_top_p(0.75), &logits(&p), N), &expected, N);
    let expected = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
    assert_frequencies(&frequencies(&plain().with_top_p(0.65), &logits(&p), N), &expected, N);
}

#[test]
fn top_p_looks_at_what_top_k_leaves() {
    // After top-k 2 the probabilities are 4/7 and 3/7: 0.55 is reached by the first alone.
    let p = [0.1, 0.4, 0.2, 0.3];
    let config = plain().with_top_k(2).with_top_p(0.55);
    assert_frequencies(&frequencies(&config, &logits(&p), 1000), &[0.0, 1.0, 0.0, 0.0], 1000);
}

#[test]
fn repetition_penalty_divides_positive_and_multiplies_negative_logits_once_each() {
    let config = GenerationConfig::greedy().with_repetition_penalty(2.0);
    let mut scores = [4.0, -1.0, 3.0, 0.0, -2.0];
    let chosen = sampler(&config).sample(&mut scores, &[0, 1, 0, 0, 3]).unwrap();
    assert_eq!(scores, [2.0, -2.0, 3.0, 0.0, -2.0]);
    assert_eq!(chosen, 2);
}

#[test]
fn the_penalty_forgets_the_history_of_the_last_call() {
    let config = GenerationConfig::greedy().with_repetition_penalty(2.0);
    let mut sampler = sampler(&config);
    sampler.sample(&mut [4.0, 3.0], &[0]).unwrap();
    let mut scores = [4.0, 3.0];
    sampler.sample(&mut scores, &[1]).unwrap();
    assert_eq!(scores, [4.0, 1.5]);
}

#[test]
fn an_excluded_token_stays_excluded_under_any_penalty() {
    for penalty in [0.5, 2.0] {
        let config = plain().with_repetition_penalty(penalty);
        let mut scores = [f32::NEG_INFINITY, 1.0];
        assert_eq!(sampler(&config).sample(&mut scores, &[0, 1]).unwrap(), 1);
    }
}

#[test]
fn equal_scores_give_the_lowest_id() {
    assert_eq!(sampler(&GenerationConfig::greedy()).sample(&mut [1.0, 2.0, 2.0, 2.0], &[]).unwrap(), 1);
    assert_eq!(sampler(&plain().with_top_k(1)).sample(&mut [1.0, 2.0, 2.0, 2.0], &[]).unwrap(), 1);
    assert_eq!(sampler(&plain().with_top_p(1e-9)).sample(&mut [1.0, 2.0, 2.0, 2.0], &[]).unwrap(), 1);
}

#[test]
fn the_smallest_temperature_is_greedy_and_the_largest_uniform() {
    for seed in 0..50 {
        let config = plain().with_temperature(f64::MIN_POSITIVE).with_seed(seed);
        assert_eq!(sampler(&config).sample(&mut [1.0, 1.5, 1e30, -1e30], &[]).unwrap(), 2);
    }
    let config = plain().with_temperature(f64::MAX);
    assert_frequencies(&frequencies(&config, &[1.0, 100.0, -1e30, 5.0], N), &[0.25; 4], N);
}

#[test]
fn a_single_possible_token_is_chosen() {
    let configs =
        [GenerationConfig::greedy(), plain(), plain().with_top_k(1), plain().with_top_k(3).with_top_p(1e-12)];
    for config in configs {
        assert_eq!(sampler(&config).sample(&mut [-3.0], &[0]).unwrap(), 0);
        let mut scores = [f32::NEG_INFINITY; 9];
        scores[6] = -1e30;
        assert_eq!(sampler(&config).sample(&mut scores, &[]).unwrap(), 6);
    }
}

#[test]
fn padding_rows_are_never_chosen() {
    for config in [GenerationConfig::greedy(), plain()] {
        let mut sampler = sampler(&config).with_vocab_limit(2);
        for _ in 0..100 {
            // A history may hold them all the same.
            assert!(sampler.sample(&mut [0.0, 0.1, 50.0, f32::NAN], &[3]).unwrap() < 2);
        }
    }
}

#[test]
fn scores_that_are_no_numbers_are_an_error_that_names_the_token() {
    for config in [GenerationConfig::greedy(), plain()] {
        for (scores, text) in [
            (&mut [0.0, f32::NAN, 1.0][..], "token 1 is NaN"),
            (&mut [0.0, 1.0, f32::INFINITY][..], "token 2 is inf"),
            (&mut [f32::NEG_INFINITY, f32::NEG_INFINITY][..], "no token has a score over minus infinity"),
            (&mut [][..], "no token has a score over minus infinity"),
        ] {
            match sampler(&config).sample(scores, &[]) {
                Err(ModelError::InvalidLogits { reason }) => assert!(reason.contains(text), "{reason}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_history_of_another_vocabulary_is_an_error() {
    let result = sampler(&plain()).sample(&mut [0.0, 1.0], &[0, 2]);
    assert!(matches!(result, Err(ModelError::TokenOutOfRange { id: 2, vocab: 2 })), "{result:?}");
}

#[test]
fn the_seed_decides_the_draws() {
    let draws = |seed| {
        let mut sampler = sampler(&plain().with_seed(seed));
        (0..64).map(|_| sampler.sample(&mut [0.0; 1000], &[]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

/// What is kept, written as plainly as can be: by definition, over all subsets in order of probability.
fn kept(probabilities: &[f64], k: usize, p: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
    if k > 0 {
        order.truncate(k);
    }
    let total: f64 = order.iter().map(|&i| probabilities[i]).sum();
    let mut sum = 0.0;
    let last = order.iter().position(|&i| {
        sum += probabilities[i] / total;
        sum >= p
    });
    order.truncate(last.map_or(order.len(), |last| last + 1));
    order
}

proptest! {
    #[test]
    fn only_kept_tokens_are_drawn(
        scores in prop::collection::vec(-8.0..8.0f32, 1..40), k in 0usize..50, p in 0.01..=1.0f64, seed: u64,
    ) {
        let max = scores.iter().copied().fold(f32::MIN, f32::max);
        let weights: Vec<f64> = scores.iter().map(|&l| f64::from(l - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|w| w / total).collect();
        // A hair more than p, as the two sums may round differently.
        let allowed = kept(&probabilities, k, (p + 1e-6).min(1.0));
        let mut sampler = sampler(&plain().with_top_k(k).with_top_p(p).with_seed(seed));
        for _ in 0..20 {
            let id = sampler.sample(&mut scores.clone(), &[]).unwrap() as usize;
            prop_assert!(allowed.contains(&id), "{id} of {allowed:?}");
        }
    }

    #[test]
    fn no_scores_and_no_history_panic(
        mut scores in prop::collection::vec(any::<f32>(), 0..20), history in prop::collection::vec(0u32..20, 0..10),
        temperature in prop::num::f64::ANY, k in 0usize..25, p in prop::num::f64::ANY,
        penalty in prop::num::f64::ANY, limit in 0usize..25,
    ) {
        let config = plain().with_temperature(temperature).with_top_k(k).with_top_p(p).with_repetition_penalty(penalty);
        if let Ok(sampler) = Sampler::new(&config)
            && let Ok(id) = sampler.with_vocab_limit(limit).sample(&mut scores, &history)
        {
            prop_assert!((id as usize) < scores.len().min(limit));
        }
    }
}
