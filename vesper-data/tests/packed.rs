//! Packed documents: each pair of neighbours once an epoch, no document sees another, and runs go on where they were.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use vesper_data::batch::BLOCK_DOCUMENTS;
use vesper_data::tokens::IGNORE;
use vesper_data::{
    DataError, Encoded, PackedBatch, PackedSampler, PackedState, Prefetch, SamplerConfig, Tokens,
};

/// Each token names its document and its place in it.
fn documents(lengths: &[usize]) -> Tokens {
    Tokens::from_documents(
        lengths
            .iter()
            .enumerate()
            .map(|(d, &n)| Ok((0..n).map(|t| (d * 1000 + t) as u32).collect::<Vec<_>>())),
    )
    .unwrap()
}

fn config(batch: usize, seq: usize) -> SamplerConfig {
    SamplerConfig::default().with_batch(batch).with_seq(seq).with_seed(5)
}

fn numbers(tensor: &Tensor) -> Vec<Vec<u32>> {
    tensor.to_vec2().unwrap()
}

/// Checks a batch against its definition; gives the inputs that are not padding, row by row.
fn check(batch: &PackedBatch, seq: usize) -> Vec<Vec<u32>> {
    let (inputs, targets) = (numbers(&batch.inputs), numbers(&batch.targets));
    let (positions, segments) = (numbers(&batch.positions), numbers(&batch.segments));
    let boundaries: Vec<u32> = batch.boundaries.to_vec1().unwrap();
    let mut expected_boundaries = vec![0];
    let mut rows = Vec::new();
    for row in 0..inputs.len() {
        let mut real = Vec::new();
        for t in 0..seq {
            let at = (row * seq + t) as u32;
            let new = t == 0 || segments[row][t] != segments[row][t - 1];
            if new && at > 0 {
                expected_boundaries.push(at);
            }
            assert_eq!(positions[row][t], if new { 0 } else { positions[row][t - 1] + 1 });
            if segments[row][t] == 0 {
                assert_eq!((inputs[row][t], targets[row][t]), (0, IGNORE));
                assert!(
                    t == 0 || segments[row][t..].iter().all(|&segment| segment == 0),
                    "padding is at the end"
                );
                continue;
            }
            assert_eq!(segments[row][t], if t == 0 { 1 } else { segments[row][t - 1] + u32::from(new) });
            // The next token of the same document.
            assert_eq!(targets[row][t], inputs[row][t] + 1);
            assert!(new || inputs[row][t] == targets[row][t - 1]);
            real.push(inputs[row][t]);
        }
        rows.push(real);
    }
    expected_boundaries.push((inputs.len() * seq) as u32);
    assert_eq!(boundaries, expected_boundaries);
    assert_eq!(batch.tokens, rows.iter().map(Vec::len).sum::<usize>());
    assert_eq!(batch.counted, batch.tokens);
    let longest = boundaries.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert_eq!(batch.longest, longest as usize);
    rows
}

/// The rows of `steps` steps of all ranks, in the order of the ranks, and the state after them.
fn steps(
    tokens: &Tokens,
    seq: usize,
    (batch, world): (usize, usize),
    from: Option<&PackedState>,
    steps: usize,
) -> (Vec<Vec<u32>>, PackedState) {
    let mut ranks: Vec<PackedSampler> = (0..world)
        .map(|rank| {
            let mut sampler =
                PackedSampler::new(tokens.clone(), config(batch, seq).with_shard(rank, world)).unwrap();
            if let Some(state) = from {
                sampler.restore(state).unwrap();
            }
            sampler
        })
        .collect();
    let mut rows = Vec::new();
    for _ in 0..steps {
        for rank in &mut ranks {
            rows.extend(check(&rank.next_batch(&Device::Cpu).unwrap(), seq));
        }
    }
    assert!(ranks.iter().all(|rank| rank.state() == ranks[0].state()));
    (rows, ranks[0].state())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn ranks_share_each_epoch_however_their_number_and_the_batch_change_in_the_middle(
        lengths in prop::collection::vec(0..40_usize, 1..60),
        seq in 1..20_usize,
        runs in prop::collection::vec(((1..4_usize, 1..4_usize), 1..8_usize), 1..5),
    ) {
        prop_assume!(lengths.iter().any(|&length| length > 1));
        let tokens = documents(&lengths);
        let (mut all, mut state) = (Vec::new(), None);
        for (shape, count) in runs {
            let (rows, after) = steps(&tokens, seq, shape, state.as_ref(), count);
            all.extend(rows);
            // What a checkpoint keeps.
            state = Some(serde_json::from_str(&serde_json::to_string(&after).unwrap()).unwrap());
        }
        let (alone, _) = steps(&tokens, seq, (1, 1), None, all.len());
        prop_assert_eq!(&all, &alone);

        // Whole epochs have each input that something follows in its document, once.
        let mut one = PackedSampler::new(tokens.clone(), config(1, seq)).unwrap();
        for epoch in 0..2 {
            let mut seen = Vec::new();
            while one.epoch() == epoch {
                seen.extend(check(&one.next_batch(&Device::Cpu).unwrap(), seq).concat());
            }
            seen.sort_unstable();
            let pairs = lengths.iter().enumerate().flat_map(|(d, &n)| (0..n.saturating_sub(1)).map(move |t| (d * 1000 + t) as u32));
            prop_assert_eq!(seen, pairs.collect::<Vec<_>>());
        }
    }
}

#[test]
fn blocks_follow_each_other_through_an_epoch() {
    // Three blocks, and one in the middle of which nothing is left of the documents is no obstacle.
    let lengths: Vec<usize> =
        (0..2 * BLOCK_DOCUMENTS + 100).map(|n| if n % 50 == 0 { 4 } else { 1 }).collect();
    let tokens = Tokens::from_documents(lengths.iter().map(|&n| Ok(vec![7; n]))).unwrap();
    let mut sampler = PackedSampler::new(tokens, config(1, 16)).unwrap();
    let (mut pairs, mut blocks) = (0, std::collections::BTreeSet::new());
    while sampler.epoch() == 0 {
        blocks.insert(sampler.state().block);
        pairs += sampler.next_batch(&Device::Cpu).unwrap().tokens;
    }
    assert_eq!(pairs, lengths.iter().map(|n| n - 1).sum::<usize>());
    assert!(blocks.len() >= 2, "{blocks:?}");
}

#[test]
fn packing_fills_the_rows() {
    let lengths: Vec<usize> = (0..4000).map(|n| 2 + (n * 7919) % 200).collect();
    let mut sampler = PackedSampler::new(documents_of_any_length(&lengths), config(1, 256)).unwrap();
    let (mut rows, mut tokens) = (0, 0);
    while sampler.epoch() == 0 {
        rows += 1;
        tokens += sampler.next_batch(&Device::Cpu).unwrap().tokens;
    }
    let share = tokens as f64 / (rows * 256) as f64;
    assert!(share > 0.97, "{share}");
}

fn documents_of_any_length(lengths: &[usize]) -> Tokens {
    Tokens::from_documents(lengths.iter().map(|&n| Ok(vec![1; n]))).unwrap()
}

#[test]
fn epochs_and_seeds_differ() {
    let tokens = documents(&[9; 50]);
    let epoch = |seed, epoch| {
        let mut sampler = PackedSampler::new(tokens.clone(), config(1, 16).with_seed(seed)).unwrap();
        let mut rows = Vec::new();
        while sampler.epoch() <= epoch {
            let at = sampler.epoch();
            let batch = sampler.next_batch(&Device::Cpu).unwrap();
            if at == epoch {
                rows.push(numbers(&batch.inputs));
            }
        }
        rows
    };
    assert_eq!(epoch(1, 0), epoch(1, 0));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_ne!(epoch(1, 0), epoch(1, 1));
}

#[test]
fn the_mask_lets_each_token_see_its_own_document_only() {
    let tokens = documents(&[4, 3, 6, 2]);
    let batch = PackedSampler::new(tokens, config(2, 8)).unwrap().next_batch(&Device::Cpu).unwrap();
    let segments = numbers(&batch.segments);
    let allowed: Vec<Vec<Vec<u8>>> = batch.attention_allowed().unwrap().to_vec3().unwrap();
    let mask = batch.attention_mask(DType::F32).unwrap();
    assert_eq!(mask.dims(), [2, 1, 8, 8]);
    let mask: Vec<Vec<Vec<f32>>> = mask.squeeze(1).unwrap().to_vec3().unwrap();
    for row in 0..2 {
        for i in 0..8 {
            for j in 0..8 {
                let sees = j <= i && segments[row][i] == segments[row][j];
                assert_eq!(allowed[row][i][j], u8::from(sees));
                assert_eq!(mask[row][i][j], if sees { 0.0 } else { f32::NEG_INFINITY });
            }
        }
    }
    assert_eq!(batch.attention_mask(DType::BF16).unwrap().dtype(), DType::BF16);
}

#[test]
fn targets_that_the_loss_leaves_out_are_ignored_and_counted() {
    let pair = Encoded { ids: vec![1, 2, 3, 4, 5], unknown: 0, loss: Some(vec![3..4, 4..5]) };
    let tokens = Tokens::from_documents([Ok(pair)]).unwrap();
    let batch = PackedSampler::new(tokens, config(1, 6)).unwrap().next_batch(&Device::Cpu).unwrap();
    assert_eq!(numbers(&batch.inputs), [[1, 2, 3, 4, 0, 0]]);
    assert_eq!(numbers(&batch.targets), [[IGNORE, IGNORE, 4, 5, IGNORE, IGNORE]]);
    assert_eq!((batch.tokens, batch.counted), (4, 2));
}

#[test]
fn data_without_anything_to_predict_and_states_of_something_else_are_errors() {
    for lengths in [&[][..], &[0, 1, 1]] {
        let error = PackedSampler::new(documents(lengths), config(1, 4)).unwrap_err();
        assert!(matches!(error, DataError::TooFewTokens { needed: 2, .. }), "{error}");
    }
    assert!(matches!(PackedSampler::new(documents(&[9]), config(0, 4)), Err(DataError::Config { .. })));
    let mut sampler = PackedSampler::new(documents(&[9, 9, 9]), config(1, 4)).unwrap();
    sampler.next_batch(&Device::Cpu).unwrap();
    let good = sampler.state();
    let other =
        |lengths: &[usize], seq| PackedSampler::new(documents(lengths), config(1, seq)).unwrap().state();
    for (state, expected) in [
        (
            PackedState { order: "random".into(), ..good.clone() },
            "counts in the order \"random\", this program has",
        ),
        (PackedState { packing: "best-fit".into(), ..good.clone() }, "counts in the packing \"best-fit\""),
        (other(&[9, 9, 9], 5), "seq was 5, now it is 4"),
        (other(&[9, 9], 4), "the number of documents was 2, now it is 3"),
        (other(&[9, 9, 8], 4), "the digest of the data was"),
        (PackedState { row: 6, ..good.clone() }, "the row of its block (below) was 6, now it is 6"),
        (PackedState { block: 1, ..good.clone() }, "the row of its block (below) was 1, now it is 0"),
        (PackedState { block: u64::MAX, row: u64::MAX, ..good.clone() }, "the row of its block"),
    ] {
        let message = sampler.restore(&state).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(sampler.state(), good);
    }
}

#[test]
fn prefetched_rows_are_the_same_and_a_run_goes_on_from_the_one_that_was_taken() {
    let tokens = documents(&[9, 4, 30, 2, 17, 8]);
    let new = || PackedSampler::new(tokens.clone(), config(2, 8)).unwrap();
    let mut plain = new();
    let mut ahead = Prefetch::new(new(), 3).unwrap();
    for _ in 0..10 {
        let (a, b) = (plain.next_batch(&Device::Cpu).unwrap(), ahead.next_batch(&Device::Cpu).unwrap());
        assert_eq!(numbers(&a.inputs), numbers(&b.inputs));
        assert_eq!(plain.state(), *ahead.state());
    }
    let mut resumed = new();
    resumed.restore(ahead.state()).unwrap();
    drop(ahead);
    let mut resumed = Prefetch::new(resumed, 1).unwrap();
    assert_eq!(*resumed.state(), plain.state());
    let (a, b) = (plain.next_batch(&Device::Cpu).unwrap(), resumed.next_batch(&Device::Cpu).unwrap());
    assert_eq!(numbers(&a.inputs), numbers(&b.inputs));
}
