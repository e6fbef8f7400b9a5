//! The fused decoding step on CUDA against the exact model, against itself as a graph, and against the CPU.

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use era_act::{Activation, Era};
use std::collections::HashMap;
use vesper_model::generate::{BatchLogits, NextLogits};
use vesper_model::ops::Path;
use vesper_model::{BatchSession, DecodeStep, Session, VesperConfig, VesperLM};

use crate::common::{brief, gpu, own_device};

/// heads, kv, dim, hidden, ffn: the presets' proportions; grouped queries; one more group than the attention takes at
/// once; sizes that 16 bytes do not divide.
pub(crate) const SHAPES: [(usize, usize, usize, usize, usize); 6] = [
    (3, 3, 64, 192, 256),
    (6, 2, 128, 96, 136),
    (5, 1, 64, 72, 2056),
    (7, 7, 40, 280, 440),
    (3, 1, 6, 22, 37),
    (4, 2, 80, 1000, 320),
];

pub(crate) fn config((heads, kv, dim, hidden, ffn): (usize, usize, usize, usize, usize)) -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(300).with_kv_heads(kv);
    config.num_hidden_layers = 2;
    config.hidden_size = hidden;
    config.num_attention_heads = heads;
    config.head_dim = dim;
    config.intermediate_size = ffn;
    config.max_position_embeddings = 1024;
    config.initializer_range = 1.5 / (hidden as f64).sqrt(); // logits that differ
    config
}

pub(crate) fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i + 1000 * seed).wrapping_mul(2_654_435_761) % 293).collect()
}

/// The model in `dtype` on the device, and the exact one of the same, rounded, weights on the CPU.
pub(crate) fn models(config: &VesperConfig, dtype: DType, device: &Device) -> (VesperLM, VesperLM) {
    let varmap = VarMap::new();
    VesperLM::initialize(config, &varmap, 7, DType::F32, &Device::Cpu).unwrap();
    let (mut own, mut exact) = (HashMap::new(), HashMap::new());
    for (name, var) in varmap.data().lock().unwrap().iter() {
        let rounded = var.as_tensor().detach().to_dtype(dtype).unwrap();
        exact.insert(name.clone(), rounded.to_dtype(DType::F64).unwrap());
        own.insert(name.clone(), rounded.to_device(device).unwrap());
    }
    let build = |weights, dtype, device: &Device| {
        VesperLM::new(config, VarBuilder::from_tensors(weights, dtype, device)).unwrap()
    };
    (build(own, dtype, device), build(exact, DType::F64, &Device::Cpu))
}

pub(crate) fn session(model: &VesperLM, capacity: usize, step: DecodeStep) -> Session {
    let session = model.session(capacity).unwrap().with_step(step).unwrap();
    assert_eq!(session.is_fused(), step != DecodeStep::Composed, "{:?}", model.config());
    session
}

/// Logits after each token from the `from`th on, (n, vocab).
fn whole(model: &VesperLM, tokens: &[u32], from: usize) -> Vec<Vec<f64>> {
    let ids = Tensor::new(tokens, model.device()).unwrap().unsqueeze(0).unwrap();
    let logits = model.forward(&ids).unwrap().squeeze(0).unwrap().to_dtype(DType::F64).unwrap();
    logits.narrow(0, from, tokens.len() - from).unwrap().to_vec2().unwrap()
}

/// The largest difference; infinite where something is NaN.
pub(crate) fn apart(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |most: f64, (a, b)| {
        let off = (f64::from(*a) - b).abs();
        if off.is_nan() { f64::INFINITY } else { most.max(off) }
    })
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// In f32 within rounding; in bf16 and f16 no worse than the composed session, whose activations are rounded.
fn limit(dtype: DType, composed: f64) -> f64 {
    if dtype == DType::F32 { 2e-4 } else { 1.2 * composed }
}

#[test]
fn single_tokens_give_the_logits_of_the_exact_model() {
    let name = "single_tokens_give_the_logits_of_the_exact_model";
    let Some((_lock, device)) = gpu(name) else { return };
    let shapes = if brief() { &SHAPES[1..2] } else { &SHAPES[..] };
    let mut wrong = Vec::new();
    for shape in shapes {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (model, exact) = models(&config(*shape), dtype, &device);
            let tokens = tokens(if brief() { 4 } else { 24 }, 1);
            let exact = whole(&exact, &tokens, 0);
            // From the first token on by the step alone, and after a prompt.
            for prompt in [0, 3] {
                let mut off = [0f64; 2];
                for (off, step) in off.iter_mut().zip([DecodeStep::Fused, DecodeStep::Composed]) {
                    let mut session = session(&model, 32, step);
                    if prompt > 0 {
                        session.append(&tokens[..prompt]).unwrap();
                    }
                    for i in prompt..tokens.len() {
                        let here = apart(&session.append(&tokens[i..=i]).unwrap(), &exact[i]);
                        if here > 1.0 {
                            println!("{shape:?} {dtype:?} {step:?} token {i}: off by {here:.2e}");
                        }
                        *off = off.max(here);
                    }
                }
                let [off, composed] = off;
                println!("{shape:?} {dtype:?} prompt {prompt}: off by {off:.2e}, composed {composed:.2e}");
                if off > limit(dtype, composed) {
                    wrong.push(format!(
                        "{shape:?} {dtype:?} prompt {prompt}: off by {off:e}, composed {composed:e}"
                    ));
                }
            }
        }
    }
    assert!(brief() || wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn caches_of_any_length_are_attended_to() {
    let Some((_lock, device)) = gpu("caches_of_any_length_are_attended_to") else { return };
    let lengths: &[usize] = if brief() {
        &[1, 65]
    } else {
        &[1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 511, 640, 999, 1023]
    };
    let mut wrong = Vec::new();
    for shape in if brief() { vec![SHAPES[0]] } else { vec![SHAPES[0], SHAPES[2], SHAPES[4]] } {
        for dtype in [DType::F32, DType::BF16] {
            let (model, exact) = models(&config(shape), dtype, &device);
            let tokens = tokens(1024, 2);
            let exact = whole(&exact, &tokens[..=lengths[lengths.len() - 1]], 0);
            for &length in lengths {
                let mut off = [0f64; 2];
                let steps = [DecodeStep::Fused, DecodeStep::Composed];
                for (off, step) in off.iter_mut().zip(&steps[..if brief() { 1 } else { 2 }]) {
                    let mut session = session(&model, 1024, *step);
                    session.append(&tokens[..length]).unwrap();
                    *off = apart(&session.append(&tokens[length..=length]).unwrap(), &exact[length]);
                }
                let [off, composed] = off;
                println!("{shape:?} {dtype:?} after {length}: off by {off:.2e}, composed {composed:.2e}");
                // One position alone may be rounded to the composed one's luck.
                if off > limit(dtype, 2.0 * composed.max(0.02)) {
                    wrong.push(format!(
                        "{shape:?} {dtype:?} after {length}: off by {off:e}, composed {composed:e}"
                    ));
                }
            }
        }
    }
    assert!(brief() || wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn prompts_in_pieces_give_the_logits_of_the_exact_model() {
    let Some((_lock, device)) = gpu("prompts_in_pieces_give_the_logits_of_the_exact_model") else { return };
    // Before a piece there is nothing, less than a tile, or several tiles; a piece fills tiles and parts of tiles.
    let pieces: &[usize] = if brief() { &[3, 2, 6] } else { &[2, 61, 3, 64, 1, 130, 200, 17, 2] };
    let mut wrong = Vec::new();
    for &shape in if brief() { &SHAPES[..1] } else { &SHAPES[..] } {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (model, exact) = models(&config(shape), dtype, &device);
            let tokens = tokens(pieces.iter().sum(), 7);
            let exact = whole(&exact, &tokens, 0);
            let mut off = [0f64; 2];
            let paths: &[Path] = if brief() { &[Path::Fused] } else { &[Path::Fused, Path::Reference] };
            for (off, path) in off.iter_mut().zip(paths) {
                // The row between two others, which stay as they are.
                let mut batch = model.clone().with_path(*path).batch_session(3, 500).unwrap();
                batch.append(&[&[5, 6], &[], &[7, 8]]).unwrap();
                let mut read = 0;
                for &n in pieces {
                    let logits = batch.append(&[&[], &tokens[read..read + n], &[]]).unwrap();
                    read += n;
                    *off = off.max(apart(&logits[1], &exact[read - 1]));
                }
                let mut alone = model.clone().with_path(*path).session(500).unwrap();
                for (row, first) in [(0, [5, 6]), (2, [7, 8])] {
                    alone.truncate(0);
                    alone.append(&first).unwrap();
                    let expected = alone.append(&[9]).unwrap();
                    let ids: [&[u32]; 3] = std::array::from_fn(|i| if i == row { &[9][..] } else { &[] });
                    assert_eq!(
                        bits(&batch.append(&ids).unwrap()[row]),
                        bits(&expected),
                        "{shape:?} {dtype:?}"
                    );
                }
            }
            let [off, composed] = off;
            println!("{shape:?} {dtype:?}: off by {off:.2e}, composed {composed:.2e}");
            if off > limit(dtype, composed) {
                wrong.push(format!("{shape:?} {dtype:?}: off by {off:e}, composed {composed:e}"));
            }
        }
    }
    assert!(brief() || wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_activation_is_that_of_era_act() {
    let Some((_lock, device)) = gpu("every_activation_is_that_of_era_act") else { return };
    let all = [
        Activation::default(),
        Activation::Era(Era::GateEntropy { temperature: 0.5, strength: 0.7 }),
        Activation::Era(Era::gelu_softplus()),
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::Relu,
        Activation::ReluSquared,
    ];
    for activation in all {
        let config = config(SHAPES[0]).with_activation(activation);
        let (model, exact) = models(&config, DType::F32, &device);
        let tokens = tokens(6, 3);
        let exact = whole(&exact, &tokens, 0);
        let mut session = session(&model, 8, DecodeStep::Fused);
        for (id, exact) in tokens.iter().zip(&exact) {
            let off = apart(&session.append(&[*id]).unwrap(), exact);
            assert!(off < 5e-4, "{activation:?}: off by {off:e}");
        }
    }
}

#[test]
fn rows_of_unequal_length_give_the_logits_that_they_give_alone() {
    let name = "rows_of_unequal_length_give_the_logits_that_they_give_alone";
    let Some((_lock, device)) = gpu(name) else { return };
    for shape in [SHAPES[0], SHAPES[1], SHAPES[4]] {
        for (dtype, limit) in [(DType::F32, 2e-4), (DType::BF16, 0.25)] {
            let (model, _) = models(&config(shape), dtype, &device);
            for &rows in if brief() { &[2usize][..] } else { &[1, 2, 3, 5, 9][..] } {
                let capacity = 40;
                let mut batch =
                    model.batch_session(rows, capacity).unwrap().with_step(DecodeStep::Fused).unwrap();
                assert!(batch.is_fused());
                let mut alone: Vec<Session> =
                    (0..rows).map(|_| session(&model, capacity, DecodeStep::Fused)).collect();
                for round in 0..8usize {
                    // Prompts; then a token each, but for a row that rests; the last row is full in the end.
                    let ids: Vec<Vec<u32>> = (0..rows)
                        .map(|row| match round {
                            0 => tokens(if row + 1 == rows { capacity - 4 } else { 1 + 4 * row }, row as u32),
                            _ if (row + 1 == rows && round > 4) || (round + row) % 5 == 0 => Vec::new(),
                            _ => tokens(1, (100 + 10 * round + row) as u32),
                        })
                        .collect();
                    let lists: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
                    let logits = batch.append(&lists).unwrap();
                    for row in 0..rows {
                        if ids[row].is_empty() {
                            assert!(logits[row].is_empty());
                            continue;
                        }
                        let expected = alone[row].append(&ids[row]).unwrap();
                        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                        let off = apart(&logits[row], &expected);
                        assert!(
                            off < limit,
                            "{shape:?} {dtype:?} {rows} rows, row {row}, round {round}: off by {off:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_replayed_graph_gives_the_bits_of_the_launches() {
    let Some((_lock, device)) = own_device("a_replayed_graph_gives_the_bits_of_the_launches") else { return };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (model, _) = models(&config(SHAPES[0]), dtype, &device);
        let text = tokens(30, 5);
        let [mut launched, mut replayed] =
            [DecodeStep::Fused, DecodeStep::Captured].map(|step| session(&model, 64, step));
        for session in [&mut launched, &mut replayed] {
            session.append(&text[..9]).unwrap();
        }
        for (i, id) in text[9..].iter().enumerate() {
            let (a, b) = (launched.append(&[*id]).unwrap(), replayed.append(&[*id]).unwrap());
            assert_eq!(bits(&a), bits(&b), "{dtype:?} token {i}");
        }
        // Another prompt between replays.
        for session in [&mut launched, &mut replayed] {
            session.truncate(4);
            session.append(&text[..7]).unwrap();
        }
        let [a, b] = [launched.append(&[3]).unwrap(), replayed.append(&[3]).unwrap()];
        assert_eq!(bits(&a), bits(&b), "{dtype:?} after truncation");
    }
    // Several rows.
    let (model, _) = models(&config(SHAPES[1]), DType::BF16, &device);
    let [mut launched, mut replayed] = [DecodeStep::Fused, DecodeStep::Captured]
        .map(|step| model.batch_session(3, 16).unwrap().with_step(step).unwrap());
    for round in 0..6u32 {
        let ids = [[round], [round + 50], [round + 100]];
        let lists: Vec<&[u32]> = ids.iter().map(<[u32; 1]>::as_slice).collect();
        let (a, b) = (launched.append(&lists).unwrap(), replayed.append(&lists).unwrap());
        for row in 0..3 {
            assert_eq!(bits(&a[row]), bits(&b[row]), "row {row} round {round}");
        }
        if round == 3 {
            launched.reorder(&[2, 0, 0]).unwrap();
            replayed.reorder(&[2, 0, 0]).unwrap();
        }
    }
}

#[test]
fn a_truncated_session_goes_on_as_a_new_one() {
    let Some((_lock, device)) = gpu("a_truncated_session_goes_on_as_a_new_one") else { return };
    for dtype in [DType::F32, DType::BF16] {
        let (model, _) = models(&config(SHAPES[0]), dtype, &device);
        let (first, second) = (tokens(20, 7), tokens(6, 8));
        let mut session = session(&model, 40, DecodeStep::Fused);
        session.append(&first[..8]).unwrap();
        for id in &first[8..] {
            session.append(&[*id]).unwrap();
        }
        session.truncate(9);
        let mut fresh = model.session(40).unwrap().with_step(DecodeStep::Fused).unwrap();
        fresh.append(&first[..8]).unwrap();
        fresh.append(&first[8..9]).unwrap();
        for id in &second {
            let (a, b) = (session.append(&[*id]).unwrap(), fresh.append(&[*id]).unwrap());
            assert_eq!(bits(&a), bits(&b), "{dtype:?}");
        }
    }
}

#[test]
fn the_hidden_state_is_what_the_output_layer_scores() {
    let Some((_lock, device)) = gpu("the_hidden_state_is_what_the_output_layer_scores") else { return };
    let (model, _) = models(&config(SHAPES[0]), DType::F32, &device);
    let text = tokens(9, 9);
    let mut session = session(&model, 12, DecodeStep::Fused);
    session.append(&text[..8]).unwrap();
    session.append(&text[8..]).unwrap();
    let ids = Tensor::new(&text[..], &device).unwrap().unsqueeze(0).unwrap();
    let expected = model.hidden_states(&ids).unwrap().narrow(1, 8, 1).unwrap();
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f64> = numbers(&expected).into_iter().map(f64::from).collect();
    let off = apart(&numbers(session.last_hidden().unwrap()), &expected);
    assert!(off < 2e-4, "off by {off:e}");
}

#[test]
fn a_narrower_model_leaves_a_wider_one_its_shared_memory() {
    let name = "a_narrower_model_leaves_a_wider_one_its_shared_memory";
    let Some((_lock, device)) = own_device(name) else { return };
    // Eight vectors of 1664 take more than the 48 KiB that a kernel has without asking, eight of 640 take less.
    let own = [(13, 1, 128, 1664, 1664), (5, 1, 128, 640, 640)].map(|shape| {
        let mut config = config(shape);
        (config.num_hidden_layers, config.tie_word_embeddings) = (1, false);
        models(&config, DType::F32, &device)
    });
    let texts: Vec<Vec<u32>> = (0..8).map(|row| tokens(4, row)).collect();
    let exact = own.each_ref().map(|(_, exact)| texts.iter().map(|text| whole(exact, text, 0)).collect());
    let exact: [Vec<Vec<Vec<f64>>>; 2] = exact;
    for step in [DecodeStep::Fused, DecodeStep::Captured] {
        let sessions = |which: usize| own[which].0.batch_session(8, 16).unwrap().with_step(step).unwrap();
        let read = |which: usize, session: &mut BatchSession, i: usize| {
            let ids: Vec<&[u32]> = texts.iter().map(|text| &text[i..=i]).collect();
            for (row, logits) in session.append(&ids).unwrap().iter().enumerate() {
                let off = apart(logits, &exact[which][row][i]);
                assert!(off < 2e-4, "{step:?}, model {which}, row {row}, token {i}: off by {off:e}");
            }
        };
        let mut wide = sessions(0);
        assert!(wide.is_fused());
        read(0, &mut wide, 0);
        let mut narrow = sessions(1);
        assert!(narrow.is_fused());
        for i in 0..3 {
            read(1, &mut narrow, i);
            read(0, &mut wide, i + 1);
        }
    }
}
