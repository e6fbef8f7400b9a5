//! Greedy decoding by the fused step on CUDA: what it chooses, and what it refuses to choose from.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use vesper_model::generate::NextLogits;
use vesper_model::{DecodeStep, VesperLM};

use crate::common::{brief, own_device};
use crate::decode::{SHAPES, apart, config, models, session, tokens};

/// The rows of a matrix.
type Rows = Vec<Vec<f32>>;

/// A model that counts, but for what `change` does to its embeddings and to its output layer, both (vocab, hidden):
/// token t is the t-th unit vector, the blocks add nothing to it, and row t + 1 of the output layer is the same vector.
fn counting(dtype: DType, device: &Device, change: &dyn Fn(&mut Rows, &mut Rows)) -> VesperLM {
    let mut config = config(SHAPES[0]);
    config.tie_word_embeddings = false;
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let (mut embed, mut head) = (vec![vec![0.0; d]; vocab], vec![vec![0.0; d]; vocab]);
    for (t, row) in embed.iter_mut().enumerate().take(d) {
        (row[t], head[t + 1][t]) = (1.0, 1.0);
    }
    change(&mut embed, &mut head);
    let varmap = VarMap::new();
    VesperLM::initialize(&config, &varmap, 7, DType::F32, &Device::Cpu).unwrap();
    let mut weights = HashMap::new();
    for (name, var) in varmap.data().lock().unwrap().iter() {
        let weight = match name.as_str() {
            "model.embed_tokens.weight" => Tensor::new(embed.clone(), &Device::Cpu).unwrap(),
            "lm_head.weight" => Tensor::new(head.clone(), &Device::Cpu).unwrap(),
            name if name.contains("o_proj") || name.contains("down_proj") => var.zeros_like().unwrap(),
            _ => var.as_detached_tensor(),
        };
        weights.insert(name.clone(), weight.to_dtype(dtype).unwrap().to_device(device).unwrap());
    }
    VesperLM::new(&config, VarBuilder::from_tensors(weights, dtype, device)).unwrap()
}

/// On the CPU, and on the device in each way.
fn ways(device: &Device) -> Vec<(DType, Device, DecodeStep)> {
    let mut ways = vec![(DType::F32, Device::Cpu, DecodeStep::Fused)];
    for dtype in if brief() { &[DType::F32][..] } else { &[DType::F32, DType::BF16] } {
        for step in [DecodeStep::Fused, DecodeStep::Captured, DecodeStep::Composed] {
            ways.push((*dtype, device.clone(), step));
        }
    }
    ways
}

#[test]
fn greedy_decoding_on_the_device_is_that_of_the_cpu() {
    let Some((_lock, device)) = own_device("greedy_decoding_on_the_device_is_that_of_the_cpu") else {
        return;
    };
    for shape in [SHAPES[0], SHAPES[1], SHAPES[4]] {
        let mut config = config(shape);
        config.tie_word_embeddings = false; // else each token is followed by itself
        let (model, _) = models(&config, DType::F32, &device);
        let varmap = VarMap::new();
        let cpu = VesperLM::initialize(&config, &varmap, 7, DType::F32, &Device::Cpu).unwrap();
        let prompt = tokens(5, 6);
        let n = if brief() { 4 } else { 60 };
        let expected = cpu.session(80).unwrap().greedy(&prompt, n).unwrap();
        for step in [DecodeStep::Fused, DecodeStep::Captured, DecodeStep::Composed] {
            let mut session = session(&model, 80, step);
            assert_eq!(session.greedy(&prompt, n).unwrap(), expected, "{shape:?} {step:?}");
            assert_eq!(session.len(), prompt.len() + n - 1);
            assert_eq!(session.last_hidden().unwrap().dims(), [1, 1, shape.3]);
            // It goes on as if each token had been given.
            let again = session.append(&expected[n - 1..]).unwrap();
            let mut fed = model.session(80).unwrap();
            fed.append(&prompt).unwrap();
            let mut last = Vec::new();
            for id in &expected {
                last = fed.append(&[*id]).unwrap();
            }
            let last: Vec<f64> = last.into_iter().map(f64::from).collect();
            let off = apart(&again, &last);
            assert!(off < 5e-4, "{shape:?} {step:?}: off by {off:e}");
        }
    }
}

#[test]
fn greedy_rows_choose_what_they_choose_alone() {
    let Some((_lock, device)) = own_device("greedy_rows_choose_what_they_choose_alone") else { return };
    let mut config = config(SHAPES[0]);
    config.tie_word_embeddings = false; // else each token is followed by itself
    let (model, _) = models(&config, DType::F32, &device);
    let n = if brief() { 3 } else { 25 };
    for step in [DecodeStep::Fused, DecodeStep::Captured, DecodeStep::Composed] {
        for rows in [2, 5] {
            let mut batch = model.batch_session(rows, 40).unwrap().with_step(step).unwrap();
            // The second row rests, and goes on afterwards.
            let prompts: Vec<Vec<u32>> = (0..rows).map(|row| tokens(1 + 3 * row, row as u32)).collect();
            let ids = |rests: bool| -> Vec<&[u32]> {
                let own = |row: usize| if (row == 1) == rests { &[] } else { &prompts[row][..] };
                (0..rows).map(own).collect()
            };
            let mut chosen = batch.greedy(&ids(true), n).unwrap();
            assert!(chosen[1].is_empty() && batch.is_empty(1) && batch.last_hidden(1).is_none());
            chosen[1] = batch.greedy(&ids(false), n).unwrap().swap_remove(1);
            for (row, prompt) in prompts.iter().enumerate() {
                let mut alone = session(&model, 40, step);
                assert_eq!(chosen[row], alone.greedy(prompt, n).unwrap(), "{step:?}, {rows} rows: row {row}");
                assert_eq!(batch.len(row), prompt.len() + n - 1);
                let apart = (batch.last_hidden(row).unwrap() - alone.last_hidden().unwrap()).unwrap();
                let apart = apart.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(apart < 1e-3, "{step:?}, {rows} rows: row {row} off by {apart:e}");
            }
        }
    }
}

#[test]
fn logits_that_are_no_numbers_after_one_token_are_named() {
    let name = "logits_that_are_no_numbers_after_one_token_are_named";
    let Some((_lock, device)) = own_device(name) else { return };
    // Products with token 5 overflow.
    let cases: [(&str, &dyn Fn(&mut Rows, &mut Rows)); 3] = [
        ("the score of token 250 is inf", &|_, head| head[250][5] = 3e38),
        ("the score of token 250 is NaN", &|embed, head| {
            embed[5][190] = 1.0;
            (head[250][5], head[250][190]) = (3e38, -3e38);
        }),
        ("no token has a score", &|_, head| head.iter_mut().for_each(|row| row[5] = -3e38)),
    ];
    for (what, change) in cases {
        for (dtype, device, step) in ways(&device) {
            // Where the order of a sum is another's, it may end as infinity instead of NaN.
            let what = if step == DecodeStep::Composed { what.trim_end_matches("NaN") } else { what };
            let model = counting(dtype, &device, change);
            let mut session = session(&model, 16, step);
            let error = session.greedy(&[1], 10).unwrap_err().to_string();
            assert!(error.contains(what), "{device:?} {dtype:?} {step:?}: {error}");
            // 1 to 5 were read, and the session goes on.
            assert_eq!((session.len(), session.last_hidden().is_none()), (5, true), "{device:?} {step:?}");
            session.truncate(2);
            assert_eq!(session.greedy(&[10], 6).unwrap(), [11, 12, 13, 14, 15, 16], "{device:?} {step:?}");
            // The first of several rows ends the reading of all.
            for (start, len) in [(20, 5), (3, 3)] {
                let mut batch = model.batch_session(6, 16).unwrap().with_step(step).unwrap();
                let ids: [&[u32]; 6] = [&[start], &[1], &[], &[], &[], &[30]];
                let error = batch.greedy(&ids, 10).unwrap_err().to_string();
                assert!(error.contains(what), "{device:?} {dtype:?} {step:?}: {error}");
                let lens: [usize; 6] = std::array::from_fn(|row| batch.len(row));
                assert_eq!(lens, [len, len, 0, 0, 0, len], "{device:?} {dtype:?} {step:?}");
                assert_eq!(batch.greedy(&[&[], &[], &[40], &[], &[], &[]], 3).unwrap()[2], [41, 42, 43]);
            }
        }
    }
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let Some((_lock, device)) = own_device("weights_that_are_no_numbers_are_named") else { return };
    for (dtype, device, step) in ways(&device) {
        let model = counting(dtype, &device, &|_, head| head[250][0] = f32::NAN);
        let mut session = session(&model, 16, step);
        let error = session.greedy(&[1], 10).unwrap_err().to_string();
        assert!(error.contains("the score of token 250 is NaN"), "{device:?} {dtype:?} {step:?}: {error}");
    }
}

#[test]
fn a_token_with_minus_infinity_is_not_chosen() {
    let Some((_lock, device)) = own_device("a_token_with_minus_infinity_is_not_chosen") else { return };
    // After token 3 one logit alone is a number, and that one is below zero.
    for only in [0usize, 131, 299] {
        for (dtype, device, step) in ways(&device) {
            let model = counting(dtype, &device, &|_, head| {
                head.iter_mut().for_each(|row| row[3] = -3e38);
                head[only][3] = -1.0;
            });
            let mut session = session(&model, 16, step);
            let expected = [2, 3, only as u32];
            assert_eq!(session.greedy(&[1], 3).unwrap(), expected, "{device:?} {dtype:?} {step:?}");
            let mut batch = model.batch_session(6, 16).unwrap().with_step(step).unwrap();
            let chosen = batch.greedy(&[&[1][..]; 6], 3).unwrap();
            assert_eq!(chosen, vec![expected.to_vec(); 6], "{device:?} {dtype:?} {step:?}");
        }
    }
}
