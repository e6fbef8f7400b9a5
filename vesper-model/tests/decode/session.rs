use candle_core::{DType, Tensor};
use candle_nn::VarMap;
use vesper_model::flylora::{AdapterKind, FlyLoraConfig, Targets};
use vesper_model::generate::NextLogits;
use vesper_model::ops::Path;
use vesper_model::{Session, VesperLM};

use crate::common::{CPU, apart, bits, config, model, tokens, whole};

/// Reads the tokens in pieces of these sizes and compares the logits after each piece.
fn follows(session: &mut Session, exact: &VesperLM, tokens: &[u32], pieces: &[usize], limit: f64) {
    let mut read = session.len();
    for &n in pieces {
        let logits = session.append(&tokens[read..read + n]).unwrap();
        read += n;
        assert_eq!(session.len(), read);
        let off = apart(&logits, &whole(exact, &tokens[..read]));
        assert!(off < limit, "after {read} tokens: off by {off:e}");
    }
}

#[test]
fn tokens_one_by_one_and_in_pieces_give_the_logits_of_the_whole_model() {
    for (kv, dim, tied) in [(6, 16, true), (2, 10, false), (1, 40, true), (3, 128, false)] {
        let mut config = config(kv, dim);
        config.tie_word_embeddings = tied;
        let tokens = tokens(30, 1);
        let exact = model(&config, DType::F64).with_path(Path::Reference);
        for path in [Path::Fused, Path::Reference] {
            let model = model(&config, DType::F32).with_path(path);
            for pieces in [&[1, 1, 1, 1, 1][..], &[12, 1, 1, 7, 1, 2, 1]] {
                let mut session = model.session(30).unwrap();
                follows(&mut session, &exact, &tokens, pieces, 2e-5);
            }
        }
    }
}

#[test]
fn half_precision_is_no_worse_than_the_whole_model_in_it() {
    let config = config(2, 20);
    let tokens = tokens(24, 2);
    for (parameters, compute) in [
        (DType::BF16, DType::BF16),
        (DType::F32, DType::BF16),
        (DType::F16, DType::F16),
        (DType::BF16, DType::F32),
    ] {
        // The exact model of the same, rounded, weights.
        let varmap = VarMap::new();
        let rounded =
            VesperLM::initialize(&config, &varmap, 7, parameters, &CPU).unwrap().with_compute_dtype(compute);
        let wide = VarMap::new();
        let exact = VesperLM::initialize(&config, &wide, 7, DType::F64, &CPU).unwrap();
        for (name, var) in wide.data().lock().unwrap().iter() {
            let value = varmap.data().lock().unwrap()[name].to_dtype(DType::F64).unwrap();
            var.set(&value).unwrap();
        }
        let mut session = rounded.session(24).unwrap();
        if parameters == DType::BF16 && compute == DType::F32 {
            // The whole model does not take it.
            assert!(session.append(&tokens[..5]).is_err() && session.append(&tokens[..1]).is_err());
            continue;
        }
        let mut composed = rounded.clone().with_path(Path::Reference).session(24).unwrap();
        let (mut off, mut other) = (0f64, 0f64);
        for i in 0..tokens.len() {
            let exact = whole(&exact, &tokens[..=i]);
            off = off.max(apart(&session.append(&tokens[i..=i]).unwrap(), &exact));
            other = other.max(apart(&composed.append(&tokens[i..=i]).unwrap(), &exact));
        }
        println!("{parameters:?} {compute:?}: off by {off:.2e}, without fusion {other:.2e}");
        assert!(other > 0.0 && off <= 1.5 * other, "{compute:?}: off by {off:e}, without fusion {other:e}");
    }
}

#[test]
fn a_long_prompt_first_or_after_others_gives_the_logits_of_the_whole_model() {
    let config = config(3, 16);
    let tokens = tokens(390, 3);
    let (exact, model) = (model(&config, DType::F64), model(&config, DType::F32));
    for path in [Path::Fused, Path::Reference] {
        // Pieces of more queries than are worked on at once.
        for pieces in [&[3, 380, 1, 6][..], &[300, 90]] {
            let mut session = model.clone().with_path(path).session(1000).unwrap();
            assert_eq!(session.remaining(), 400);
            follows(&mut session, &exact, &tokens, pieces, 5e-5);
        }
    }
}

#[test]
fn half_precision_reads_prompts_after_others_as_well_as_the_composition() {
    for (kv, dim) in [(6, 16), (2, 10), (1, 40)] {
        let config = config(kv, dim);
        let tokens = tokens(150, 6);
        for dtype in [DType::BF16, DType::F16] {
            let rounded = model(&config, dtype);
            let exact = model(&config, DType::F64);
            let mut off = [0f64; 2];
            for (off, path) in off.iter_mut().zip([Path::Fused, Path::Reference]) {
                let mut session = rounded.clone().with_path(path).session(150).unwrap();
                let mut read = 0;
                for n in [70, 1, 2, 64, 13] {
                    let logits = session.append(&tokens[read..read + n]).unwrap();
                    read += n;
                    *off = off.max(apart(&logits, &whole(&exact, &tokens[..read])));
                }
            }
            let [off, composed] = off;
            println!("{kv} {dim} {dtype:?}: off by {off:.2e}, without fusion {composed:.2e}");
            assert!(composed > 0.0 && off <= 1.5 * composed, "{dtype:?}: {off:e} against {composed:e}");
        }
    }
}

#[test]
fn a_truncated_session_goes_on_as_a_new_one() {
    let model = model(&config(2, 16), DType::F32);
    let (first, second) = (tokens(20, 4), tokens(12, 5));
    let mut session = model.session(40).unwrap();
    session.append(&first[..8]).unwrap();
    for id in &first[8..] {
        session.append(&[*id]).unwrap();
    }
    session.truncate(25);
    assert_eq!(session.len(), 20);
    assert!(session.last_hidden().is_some());
    session.truncate(9);
    assert_eq!((session.len(), session.remaining()), (9, 31));
    assert!(session.last_hidden().is_none());
    let mut fresh = model.session(40).unwrap();
    fresh.append(&first[..8]).unwrap();
    fresh.append(&first[8..9]).unwrap();
    for id in &second {
        let (a, b) = (session.append(&[*id]).unwrap(), fresh.append(&[*id]).unwrap());
        assert_eq!(bits(&a), bits(&b));
    }
    session.truncate(0);
    assert!(session.is_empty());
    let mut fresh = model.session(40).unwrap();
    assert_eq!(bits(&session.append(&second).unwrap()), bits(&fresh.append(&second).unwrap()));
}

#[test]
fn greedy_decoding_takes_the_likeliest_token_each_time() {
    let mut config = config(3, 16);
    config.tie_word_embeddings = false; // else each token is followed by itself
    for dtype in [DType::F32, DType::BF16] {
        let model = model(&config, dtype);
        let prompt = tokens(9, 6);
        let mut session = model.session(40).unwrap();
        let chosen = session.greedy(&prompt, 20).unwrap();
        assert_eq!((chosen.len(), session.len()), (20, 28));
        let mut text = prompt.clone();
        let mut other = model.session(40).unwrap();
        let mut logits = other.append(&prompt).unwrap();
        for id in &chosen {
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(logits.iter().position(|x| *x == best), Some(*id as usize));
            logits = other.append(&[*id]).unwrap();
            text.push(*id);
        }
        assert!(chosen.iter().any(|id| id != &chosen[0]), "{chosen:?}");
        // It goes on from the last token, which it has not read.
        let more = session.greedy(&chosen[19..], 2).unwrap();
        assert_eq!(more[0], other_best(&logits));
        assert_eq!(session.greedy(&[1], 0).unwrap(), [0u32; 0]);
        let message = session.greedy(&[1, 2], 30).unwrap_err().to_string();
        assert!(message.contains("40"), "{message}");
        let message = session.greedy(&[1, 2], usize::MAX).unwrap_err().to_string();
        assert!(message.contains("40"), "{message}");
        assert_eq!(session.len(), 31);
        assert!(session.greedy(&[], 3).is_err());
    }
}

fn other_best(logits: &[f32]) -> u32 {
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best }).unwrap() as u32
}

#[test]
fn the_last_hidden_state_is_what_the_output_layer_scores() {
    let config = config(6, 8);
    for dtype in [DType::F32, DType::BF16] {
        let model = model(&config, dtype);
        let tokens = tokens(6, 7);
        let mut session = model.session(9).unwrap();
        assert!(session.last_hidden().is_none());
        session.append(&tokens[..5]).unwrap();
        session.append(&tokens[5..]).unwrap();
        let hidden = session.last_hidden().unwrap();
        assert_eq!((hidden.dims(), hidden.dtype()), (&[1, 1, 44][..], dtype));
        let ids = Tensor::new(&tokens[..], &CPU).unwrap().unsqueeze(0).unwrap();
        let expected = model.hidden_states(&ids).unwrap().narrow(1, 5, 1).unwrap();
        let numbers =
            |x: &Tensor| x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        let limit = if dtype == DType::F32 { 1e-5 } else { 0.1 };
        for (a, b) in numbers(hidden).iter().zip(numbers(&expected)) {
            assert!((a - b).abs() < limit, "{a} for {b}");
        }
    }
}

#[test]
fn a_session_sees_what_an_optimizer_does_to_the_weights() {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config(2, 16), &varmap, 7, DType::F32, &CPU).unwrap();
    let mut session = model.session(8).unwrap();
    session.append(&[5]).unwrap();
    session.truncate(0);
    for var in varmap.all_vars() {
        var.set(&(var.as_tensor() * 1.25).unwrap()).unwrap();
    }
    let off = apart(&session.append(&[5]).unwrap(), &whole(&model, &[5]));
    assert!(off < 1e-4, "off by {off:e}");
}

#[test]
fn a_model_that_gives_no_numbers_chooses_no_token() {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config(2, 16), &varmap, 7, DType::F32, &CPU).unwrap();
    for var in varmap.all_vars().into_iter().filter(|var| var.rank() == 1) {
        var.set(&(var.as_tensor() * f64::NAN).unwrap()).unwrap();
    }
    for n in [1, 3] {
        let mut session = model.session(8).unwrap();
        session.append(&[4]).unwrap();
        assert!(session.last_hidden().is_some());
        let error = session.greedy(&[5, 6], n).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
        // The hidden state is never that of another token than the last one.
        assert_eq!((session.len(), session.last_hidden().is_none()), (3, true));
    }
}

#[test]
fn a_model_with_adapters_decodes_without_the_fused_step() {
    let mut model = model(&config(2, 16), DType::F32);
    let kind = AdapterKind::FlyLora(FlyLoraConfig::default());
    model.attach(&kind, &Targets::names(["q_proj", "down_proj"])).unwrap();
    let tokens = tokens(12, 8);
    let mut session = model.session(12).unwrap();
    follows(&mut session, &model, &tokens, &[4, 1, 1, 5, 1], 2e-5);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = model(&config(2, 16), DType::F32);
    let mut session = model.session(6).unwrap();
    session.append(&[1, 2, 3]).unwrap();
    for (ids, word) in [(&[1, 2, 3, 4][..], "7 tokens"), (&[500], "500"), (&[], "empty")] {
        let message = session.append(ids).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
        assert_eq!(session.len(), 3);
    }
    let mut fresh = model.session(6).unwrap();
    fresh.append(&[1, 2, 3]).unwrap();
    assert_eq!(bits(&session.append(&[4]).unwrap()), bits(&fresh.append(&[4]).unwrap()));
}
