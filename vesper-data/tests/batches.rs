//! The sampler gives each window once an epoch, and goes on where it stopped.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use proptest::prelude::*;
use vesper_data::tokens::IGNORE;
use vesper_data::{BatchSampler, DataError, Encoded, EvalBatches, SamplerConfig, SamplerState, Tokens};

fn counting(tokens: usize) -> Tokens {
    Tokens::from((0..tokens as u32).collect::<Vec<u32>>())
}

fn sampler(tokens: usize, batch: usize, seq: usize, seed: u64) -> BatchSampler {
    let config = SamplerConfig::default().with_batch(batch).with_seq(seq).with_seed(seed);
    BatchSampler::new(counting(tokens), config).unwrap()
}

fn rows(sampler: &mut BatchSampler) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let batch = sampler.next_batch(&Device::Cpu).unwrap();
    (batch.inputs.to_vec2().unwrap(), batch.targets.to_vec2().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_window_comes_exactly_once_an_epoch(
        tokens in 2..300_usize,
        seq in 1..20_usize,
        batch in 1..7_usize,
        seed: u64,
    ) {
        prop_assume!(tokens > seq);
        let mut sampler = sampler(tokens, batch, seq, seed);
        let windows = sampler.windows();
        prop_assert_eq!(windows, (tokens - 1) / seq);
        // As many batches as make whole epochs.
        let mut seen: Vec<u32> = Vec::new();
        for _ in 0..windows {
            let (inputs, targets) = rows(&mut sampler);
            prop_assert_eq!(inputs.len(), batch);
            for (input, target) in inputs.iter().zip(&targets) {
                let first = input[0];
                prop_assert_eq!(input, &(first..first + seq as u32).collect::<Vec<_>>());
                prop_assert_eq!(target, &(first + 1..=first + seq as u32).collect::<Vec<_>>());
                seen.push(first);
            }
        }
        let all: Vec<u32> = (0..windows).map(|window| (window * seq) as u32).collect();
        for epoch in seen.chunks(windows) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            prop_assert_eq!(&epoch, &all);
        }
    }

    #[test]
    fn a_restored_sampler_goes_on_with_the_same_batches(
        tokens in 20..200_usize,
        seq in 1..9_usize,
        batch in 1..9_usize,
        seed: u64,
        steps in 0..40_usize,
    ) {
        let mut original = sampler(tokens, batch, seq, seed);
        for _ in 0..steps {
            original.next_windows();
        }
        let saved = serde_json::to_string(&original.state()).unwrap();
        let state: SamplerState = serde_json::from_str(&saved).unwrap();
        // The seed is part of the state.
        let mut resumed = sampler(tokens, batch, seq, !seed);
        resumed.next_windows();
        resumed.restore(&state).unwrap();
        for _ in 0..30 {
            prop_assert_eq!(rows(&mut original), rows(&mut resumed));
        }
        prop_assert_eq!(original.state(), resumed.state());
    }

    #[test]
    fn evaluation_sees_every_window_once_and_in_order(
        tokens in 2..300_usize,
        seq in 1..20_usize,
        batch in 1..7_usize,
    ) {
        prop_assume!(tokens > seq);
        let batches = EvalBatches::new(counting(tokens), batch, seq, &Device::Cpu).unwrap();
        prop_assert_eq!(batches.len(), batches.windows().div_ceil(batch));
        let mut inputs = Vec::new();
        for batch in batches {
            inputs.extend(batch.unwrap().inputs.flatten_all().unwrap().to_vec1::<u32>().unwrap());
        }
        let windows = (tokens - 1) / seq;
        prop_assert_eq!(inputs, (0..(windows * seq) as u32).collect::<Vec<_>>());
    }
}

#[test]
fn the_order_does_not_depend_on_the_batch_size() {
    let flat = |batch| {
        let mut sampler = sampler(101, batch, 10, 5);
        (0..60 / batch).flat_map(|_| sampler.next_windows()).collect::<Vec<_>>()
    };
    assert_eq!(flat(1), flat(3));
    assert_eq!(flat(3), flat(20));
}

#[test]
fn a_batch_larger_than_an_epoch_is_full() {
    let mut sampler = sampler(31, 8, 10, 0);
    assert_eq!(sampler.windows(), 3);
    assert_eq!(rows(&mut sampler).0.len(), 8);
    assert_eq!((sampler.epoch(), sampler.state().position), (2, 2));
}

#[test]
fn settings_that_give_no_batch_are_errors() {
    let new = |tokens, batch, seq| {
        let config = SamplerConfig::default().with_batch(batch).with_seq(seq);
        BatchSampler::new(counting(tokens), config).unwrap_err().to_string()
    };
    assert_eq!(new(100, 0, 10), "batch is 0: expected at least 1");
    assert_eq!(new(100, 1, 0), "seq is 0: expected at least 1");
    assert_eq!(new(100, 1, 100), "seq is 100: one window needs 101 tokens, the data has 100");
    let ranks = |rank, world| {
        let config = SamplerConfig::default().with_batch(4).with_seq(2).with_shard(rank, world);
        BatchSampler::new(counting(100), config).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(ranks(0, 0), Err("world is 0: expected at least 1".into()));
    assert_eq!(ranks(3, 3), Err("rank is 3: expected a number below world".into()));
    assert_eq!(ranks(0, 1 << 30), Err("world is 1073741824: expected batch * world below 2^32".into()));
    assert_eq!(ranks(2, 3), Ok(()));
    assert_eq!(new(0, 1, 1), "seq is 1: one window needs 2 tokens, the data has 0");
    assert_eq!(new(100, 1 << 20, 1 << 20), "batch is 1048576: expected batch * seq below 2^32");
    assert!(new(100, 2, usize::MAX).contains("expected batch * seq below 2^32"));
    assert!(BatchSampler::new(counting(101), SamplerConfig::default().with_batch(1).with_seq(100)).is_ok());
    let eval = |tokens, batch, seq| EvalBatches::new(counting(tokens), batch, seq, &Device::Cpu).unwrap_err();
    assert!(matches!(eval(10, 0, 5), DataError::Config { name: "batch", .. }));
    assert!(matches!(eval(10, 1, 0), DataError::Config { name: "seq", .. }));
    assert!(matches!(eval(10, 1, 10), DataError::TooFewTokens { .. }));
}

#[test]
fn a_state_of_other_data_is_refused_and_changes_nothing() {
    let mut sampler = sampler(101, 2, 10, 3);
    sampler.next_windows();
    let good = sampler.state();
    let longer = BatchSampler::new(counting(201), sampler.config().clone()).unwrap().state();
    let other_seq = self::sampler(101, 2, 9, 3).state();
    let other_text =
        BatchSampler::new(Tokens::from(vec![7_u32; 101]), sampler.config().clone()).unwrap().state();
    let past_the_end = SamplerState { position: 10, ..good.clone() };
    for (state, expected) in [
        (longer, "the saved data position does not fit: the number of windows was 20, now it is 10"),
        (other_seq, "the saved data position does not fit: seq was 9, now it is 10"),
        (past_the_end, "the saved data position does not fit: the position (below) was 10, now it is 10"),
    ] {
        assert_eq!(sampler.restore(&state).unwrap_err().to_string(), expected);
        assert_eq!(sampler.state(), good);
    }
    assert!(matches!(
        sampler.restore(&other_text),
        Err(DataError::State { name: "the digest of the data", .. })
    ));
}

#[test]
fn a_state_of_another_order_is_refused_by_name() {
    let mut sampler = sampler(101, 2, 10, 3);
    let mut value = serde_json::to_value(sampler.state()).unwrap();
    assert_eq!(value["order"], vesper_data::batch::ORDER);
    // States of versions that kept the order in a list do not name it.
    value.as_object_mut().unwrap().remove("order");
    let old: SamplerState = serde_json::from_value(value).unwrap();
    assert_eq!(
        sampler.restore(&old).unwrap_err().to_string(),
        "the saved data position counts in the order \"fisher-yates-chacha8\", this program has \
         \"feistel-chacha8-1\": finish the run with the version that began it, or begin a new one"
    );
}

#[test]
fn a_state_with_an_unknown_field_is_refused() {
    let mut value = serde_json::to_value(sampler(101, 2, 10, 3).state()).unwrap();
    value["shard"] = 1.into();
    assert!(serde_json::from_value::<SamplerState>(value).unwrap_err().to_string().contains("shard"));
    assert!(serde_json::from_str::<SamplerConfig>(r#"{"batch": 2, "sequence": 5}"#).is_err());
    let config: SamplerConfig = serde_json::from_str(r#"{"batch": 2}"#).unwrap();
    assert_eq!(config, SamplerConfig::default().with_batch(2));
}

#[test]
fn a_limited_evaluation_takes_the_first_windows() {
    let batches = EvalBatches::new(counting(101), 4, 10, &Device::Cpu).unwrap();
    assert_eq!(
        batches.clone().limit(5).map(|batch| batch.unwrap().inputs.dims()[0]).collect::<Vec<_>>(),
        [4, 1]
    );
    assert_eq!(batches.limit(500).windows(), 10);
}

#[test]
fn targets_that_the_loss_leaves_out_are_ignored_and_counted() {
    let answer = |ids: Vec<u32>, loss| Ok(Encoded { ids, unknown: 0, loss });
    let documents = [
        answer(vec![1, 2, 3, 4], Some(vec![2..3, 3..4])),
        answer(vec![5, 6], None),
        answer(vec![7, 8, 9], Some(vec![])),
    ];
    let tokens = Tokens::from_documents(documents).unwrap();
    let mut batches = EvalBatches::new(tokens, 2, 4, &Device::Cpu).unwrap();
    let batch = batches.next().unwrap().unwrap();
    assert_eq!(batch.inputs.to_vec2::<u32>().unwrap(), [[1, 2, 3, 4], [5, 6, 7, 8]]);
    assert_eq!(batch.targets.to_vec2::<u32>().unwrap(), [[IGNORE, 3, 4, 5], [6, IGNORE, IGNORE, IGNORE]]);
    assert_eq!(batch.counted, 4);
}

/// The windows of `steps` steps of all ranks, in the order of the ranks, and the state after them.
fn steps(
    tokens: &Tokens,
    (batch, world): (usize, usize),
    from: Option<&SamplerState>,
    steps: usize,
) -> (Vec<usize>, SamplerState) {
    let mut ranks: Vec<BatchSampler> = (0..world)
        .map(|rank| {
            let config =
                SamplerConfig::default().with_batch(batch).with_seq(3).with_seed(11).with_shard(rank, world);
            let mut sampler = BatchSampler::new(tokens.clone(), config).unwrap();
            if let Some(state) = from {
                sampler.restore(state).unwrap();
            }
            sampler
        })
        .collect();
    let windows =
        (0..steps).flat_map(|_| ranks.iter_mut().flat_map(BatchSampler::next_windows).collect::<Vec<_>>());
    let windows = windows.collect();
    assert!(ranks.iter().all(|rank| rank.state() == ranks[0].state()));
    (windows, ranks[0].state())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn ranks_share_each_epoch_however_their_number_and_the_batch_change_in_the_middle(
        tokens in 4..200_usize,
        runs in prop::collection::vec(((1..5_usize, 1..5_usize), 1..12_usize), 1..6),
    ) {
        let tokens = counting(tokens);
        let (mut all, mut state) = (Vec::new(), None);
        for (shape, count) in runs {
            let (windows, after) = steps(&tokens, shape, state.as_ref(), count);
            all.extend(windows);
            state = Some(after);
        }
        let state = state.unwrap();
        let windows = state.windows as usize;
        // All ranks together read what one would read alone, so each window comes once an epoch.
        prop_assert_eq!(state.epoch * state.windows + state.position, all.len() as u64);
        let (alone, _) = steps(&tokens, (1, 1), None, all.len());
        prop_assert_eq!(&all, &alone);
        for epoch in all.chunks_exact(windows) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            prop_assert_eq!(epoch, (0..windows).collect::<Vec<_>>());
        }
    }
}
