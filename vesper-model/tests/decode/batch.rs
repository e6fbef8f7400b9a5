use candle_core::{DType, Tensor};
use vesper_model::generate::{BatchLogits, NextLogits};
use vesper_model::ops::Path;
use vesper_model::{BatchSession, VesperLM};

use crate::common::{apart, bits, config, model, tokens};

/// Each row's logits after all of its tokens, from a session of its own that reads them in the same pieces.
fn alone(model: &VesperLM, pieces: &[Vec<u32>]) -> Vec<f32> {
    let mut session = model.session(60).unwrap();
    let mut last = Vec::new();
    for ids in pieces {
        last = session.append(ids).unwrap();
    }
    last
}

fn append(batch: &mut BatchSession, ids: &[Vec<u32>]) -> Vec<Vec<f32>> {
    batch.append(&ids.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
}

#[test]
fn rows_of_unequal_length_give_the_logits_that_they_give_alone() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for path in [Path::Fused, Path::Reference] {
            let model = model(&config(2, 12), dtype).with_path(path);
            // candle's own products in half precision depend on the number of rows.
            let limit = if dtype == DType::F32 || path == Path::Fused { 1e-5 } else { 5e-2 };
            let rows = 5;
            let mut batch = model.batch_session(rows, 60).unwrap();
            let mut read = vec![Vec::new(); rows];
            for round in 0..12usize {
                // Prompts of unequal length; then a token each, but for a row that rests; then pieces between.
                let ids: Vec<Vec<u32>> = (0..rows)
                    .map(|row| match round {
                        0 => tokens(1 + 4 * row, row as u32),
                        6 if row == 2 => tokens(5, 40),
                        _ if (round + row) % 6 == 0 => Vec::new(),
                        _ => tokens(1, (100 + 10 * round + row) as u32),
                    })
                    .collect();
                let before: Vec<usize> = (0..rows).map(|row| batch.len(row)).collect();
                let logits = append(&mut batch, &ids);
                for (row, ids) in ids.into_iter().enumerate() {
                    assert_eq!(batch.len(row), before[row] + ids.len());
                    if ids.is_empty() {
                        assert!(logits[row].is_empty());
                        continue;
                    }
                    read[row].push(ids);
                    let expected = alone(&model, &read[row]);
                    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                    let off = apart(&logits[row], &expected);
                    assert!(off < limit, "{dtype:?} {path:?} row {row} round {round}: off by {off:e}");
                }
            }
        }
    }
}

#[test]
fn reordered_rows_go_on_from_what_others_remember() {
    for dtype in [DType::F32, DType::BF16] {
        let model = model(&config(3, 16), dtype);
        let mut batch = model.batch_session(4, 60).unwrap();
        let mut read: Vec<Vec<Vec<u32>>> = (0..4).map(|row| vec![tokens(3 + 5 * row, row as u32)]).collect();
        append(&mut batch, &read.iter().map(|pieces| pieces[0].clone()).collect::<Vec<_>>());
        for from in [[0, 1, 2, 3], [3, 3, 0, 1], [1, 0, 2, 2], [2, 2, 2, 2]] {
            batch.reorder(&from).unwrap();
            read = from.iter().map(|&row| read[row].clone()).collect();
            let ids: Vec<Vec<u32>> = (0..4).map(|row| tokens(1, 50 + row)).collect();
            let logits = append(&mut batch, &ids);
            for (row, ids) in ids.into_iter().enumerate() {
                read[row].push(ids);
                let total: usize = read[row].iter().map(Vec::len).sum();
                assert_eq!((batch.len(row), batch.remaining(row)), (total, 60 - total));
                assert_eq!(bits(&logits[row]), bits(&alone(&model, &read[row])), "{from:?} row {row}");
            }
        }
    }
}

#[test]
fn a_row_can_be_truncated_and_used_again() {
    let model = model(&config(2, 16), DType::F32);
    let mut batch = model.batch_session(2, 60).unwrap();
    append(&mut batch, &[tokens(9, 1), tokens(4, 2)]);
    assert!(batch.last_hidden(0).is_some());
    batch.truncate(0, 0);
    assert!(batch.is_empty(0) && batch.last_hidden(0).is_none() && batch.last_hidden(1).is_some());
    let logits = append(&mut batch, &[tokens(6, 3), tokens(1, 4)]);
    assert_eq!(bits(&logits[0]), bits(&alone(&model, &[tokens(6, 3)])));
    assert_eq!(bits(&logits[1]), bits(&alone(&model, &[tokens(4, 2), tokens(1, 4)])));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_no_row() {
    let model = model(&config(2, 16), DType::F32);
    let mut batch = model.batch_session(2, 8).unwrap();
    assert_eq!((batch.rows(), batch.vocab_size()), (2, 128));
    append(&mut batch, &[tokens(5, 1), tokens(2, 2)]);
    let too_long = tokens(4, 3);
    for (ids, words) in [
        (vec![&[1u32][..]], "1 sequences"),
        (vec![&[1][..], &[999]], "999"),
        (vec![&[1][..], &[1], &[1]], "3 sequences"),
        (vec![&too_long[..], &[1]], "9 tokens"),
    ] {
        let message = batch.append(&ids).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
        assert_eq!([batch.len(0), batch.len(1)], [5, 2]);
    }
    let error = model.batch_session(usize::MAX / 8, 8).unwrap_err().to_string();
    assert!(error.contains("no memory has room"), "{error}");
    assert!(batch.reorder(&[0]).unwrap_err().to_string().contains("1 sequences"));
    assert!(batch.reorder(&[0, 2]).unwrap_err().to_string().contains("no sequence 2"));
    assert_eq!((batch.len(7), batch.remaining(7)), (0, 0));
    let logits = append(&mut batch, &[tokens(1, 4), tokens(1, 5)]);
    assert_eq!(bits(&logits[0]), bits(&alone(&model, &[tokens(5, 1), tokens(1, 4)])));
}

#[test]
fn greedy_rows_choose_what_they_choose_alone() {
    let mut config = config(2, 16);
    config.tie_word_embeddings = false; // else each token is followed by itself
    for path in [Path::Fused, Path::Reference] {
        let model = model(&config, DType::F32).with_path(path);
        let mut batch = model.batch_session(3, 20).unwrap();
        let prompts = [tokens(9, 1), tokens(4, 2), tokens(1, 3)];
        let [first, second, third] = [0, 1, 2].map(|row| prompts[row].as_slice());
        let mut chosen = batch.greedy(&[first, &[], third], 8).unwrap();
        assert!(chosen[1].is_empty() && batch.is_empty(1));
        chosen[1] = batch.greedy(&[&[], second, &[]], 8).unwrap().swap_remove(1);
        for (row, prompt) in prompts.iter().enumerate() {
            let mut alone = model.session(20).unwrap();
            assert_eq!(chosen[row], alone.greedy(prompt, 8).unwrap(), "{path:?} row {row}");
            assert_eq!(batch.len(row), prompt.len() + 7);
            let numbers = |hidden: Option<&Tensor>| -> Vec<f32> {
                hidden.unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            let expected: Vec<f64> = numbers(alone.last_hidden()).into_iter().map(f64::from).collect();
            assert!(apart(&numbers(batch.last_hidden(row)), &expected) < 1e-5, "{path:?} row {row}");
        }
        // One row has no room: none is read.
        let message = batch.greedy(&[&[1], &[1], &[1, 2, 3]], 5).unwrap_err().to_string();
        assert!(message.contains("21 tokens") && message.contains("20"), "{message}");
        assert_eq!([0, 1, 2].map(|row| batch.len(row)), [16, 11, 8]);
        assert_eq!(batch.greedy(&[&[1], &[], &[1]], 0).unwrap(), [const { Vec::<u32>::new() }; 3]);
        assert_eq!([0, 1, 2].map(|row| batch.len(row)), [17, 11, 9]);
    }
}
