//! The pieces of a stream, put together, are the text of all ids.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokenizers::Tokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use vesper_model::generate::{SpecialTokens, TokenStream};

/// The folder of real data, or `None` after saying that the test is skipped.
fn data(test: &str) -> Option<PathBuf> {
    let data = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    data
}

fn open(path: &Path) -> Tokenizer {
    Tokenizer::from_file(path).unwrap()
}

/// A byte-level BPE trained on text with characters of one to four bytes.
fn byte_level() -> Tokenizer {
    const TEXT: &str = "the cat sat on the mat; le chat noir s'assit près de la fenêtre, où l'été — 3 € — 猫が座った 🐈🐈‍⬛ 🇫🇷";
    let trainer = BpeTrainer::builder()
        .vocab_size(320)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default()));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.train(&mut TrainerWrapper::from(trainer), [TEXT; 4].into_iter()).unwrap();
    tokenizer
}

/// Sentencepiece's way: a space that begins a word, bytes for what has no token.
fn byte_fallback() -> Tokenizer {
    let bytes = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), byte + 3));
    let words = ["▁", "▁the", "▁cat", "s", "é", "▁▁", "\u{fffd}", "", "<0xAB", "x>"];
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        bytes.map(|(token, id): (String, u32)| (token, id.into())).collect();
    for (token, id) in words.iter().zip(259u32..) {
        vocab.insert((*token).into(), id.into());
    }
    for (token, id) in [("<unk>", 0u32), ("<s>", 1), ("</s>", 2)] {
        vocab.insert(token.into(), id.into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let json = serde_json::json!({
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
    });
    json.to_string().parse().unwrap()
}

fn stream(tokenizer: &Tokenizer, special: SpecialTokens, context: &[u32], ids: &[u32]) -> Vec<String> {
    let mut stream = TokenStream::new(tokenizer).with_special_tokens(special).with_context(context).unwrap();
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.flush().unwrap());
    pieces
}

fn decode(tokenizer: &Tokenizer, special: SpecialTokens, ids: &[u32]) -> String {
    tokenizer.decode(ids, special == SpecialTokens::Skip).unwrap()
}

/// Whether the ids end in a replacement character that the text has itself.
fn spells_replacement(tokenizer: &Tokenizer, special: SpecialTokens, ids: &[u32]) -> bool {
    let token = |&id: &u32| tokenizer.id_to_token(id).map(|token| (id, token));
    let mut tokens: Vec<(u32, String)> = ids.iter().filter_map(token).collect();
    tokens.retain(|(_, token)| {
        special == SpecialTokens::Keep || !tokenizer.get_added_vocabulary().is_special_token(token)
    });
    let tail: String = tokens.iter().rev().take(3).rev().map(|(_, token)| token.as_str()).collect();
    ["\u{fffd}", "ï¿½", "<0xEF><0xBF><0xBD>"].iter().any(|spelling| tail.ends_with(spelling))
}

/// Random ids, with and without a context, special tokens left out and kept.
fn assert_pieces_equal_the_whole(tokenizer: &Tokenizer, cases: u32) {
    let top = tokenizer.get_vocab(true).into_values().max().unwrap() + 3;
    // Low ids are the bytes and special tokens of every tokenizer here: half of the draws.
    let id = prop_oneof![0..top, 0..top.min(300)];
    let ids = prop::collection::vec(id, 0..60);
    let config = Config { failure_persistence: None, ..Config::with_cases(cases) };
    let rng = proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng)
        .run(&(ids, 0usize..20, any::<bool>()), |(ids, split, keep)| {
            let special = if keep { SpecialTokens::Keep } else { SpecialTokens::Skip };
            let whole = decode(tokenizer, special, &ids);
            let pieces = stream(tokenizer, special, &[], &ids);
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty()));
            prop_assert_eq!(pieces.concat(), whole.clone());

            // The context's own text is not given again, save for what it leaves open.
            let (context, rest) = ids.split_at(split.min(ids.len()));
            let before = decode(tokenizer, special, context);
            let before = if spells_replacement(tokenizer, special, context) {
                before.as_str()
            } else {
                before.trim_end_matches(char::REPLACEMENT_CHARACTER)
            };
            let shared: usize = before
                .chars()
                .zip(whole.chars())
                .take_while(|(a, b)| a == b)
                .map(|(a, _)| a.len_utf8())
                .sum();
            prop_assert_eq!(stream(tokenizer, special, context, rest).concat(), &whole[shared..]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn pieces_of_a_trained_byte_level_bpe_equal_the_whole() {
    assert_pieces_equal_the_whole(&byte_level(), 300);
}

#[test]
fn pieces_with_byte_fallback_equal_the_whole() {
    assert_pieces_equal_the_whole(&byte_fallback(), 500);
}

#[test]
fn pieces_of_real_tokenizers_equal_the_whole() {
    let Some(data) = data("pieces_of_real_tokenizers_equal_the_whole") else { return };
    for file in ["tokenizers/gpt2", "tokenizers/camembert-base", "models/stories260K"] {
        assert_pieces_equal_the_whole(&open(&data.join(file).join("tokenizer.json")), 150);
    }
}

#[test]
fn text_goes_through_real_tokenizers_in_complete_pieces() {
    let Some(data) = data("text_goes_through_real_tokenizers_in_complete_pieces") else { return };
    let text = "Once upon a time — l'été — 3 € 猫 🐈‍⬛ the end";
    for file in ["tokenizers/gpt2", "models/stories260K"] {
        let tokenizer = open(&data.join(file).join("tokenizer.json"));
        let ids = tokenizer.encode(text, false).unwrap();
        let pieces = stream(&tokenizer, SpecialTokens::Skip, &[], ids.get_ids());
        assert_eq!(pieces.concat(), text, "{file}");
        assert!(pieces.len() > 15, "{file}: {pieces:?}");
        assert!(
            !pieces.iter().any(|piece| piece.contains(char::REPLACEMENT_CHARACTER)),
            "{file}: {pieces:?}"
        );
    }
}

#[test]
fn a_character_comes_when_its_last_byte_does() {
    let tokenizer = byte_level();
    let mut stream = TokenStream::new(&tokenizer);
    let ids: Vec<u32> =
        ["Ã", "©", "ð", "Ł", "Ĳ", "Ī"].map(|token| tokenizer.token_to_id(token).unwrap()).to_vec();
    let pieces: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let expected = [None, Some("é"), None, None, None];
    assert_eq!(pieces[..5], expected.map(|piece| piece.map(String::from)));
    assert_eq!(pieces[5].as_ref().map(|piece| piece.chars().count()), Some(1));
}

#[test]
fn bytes_that_become_no_character_are_replaced_at_the_end() {
    let tokenizer = byte_level();
    let mut stream = TokenStream::new(&tokenizer);
    assert_eq!(stream.push(tokenizer.token_to_id("Ã").unwrap()).unwrap(), None);
    assert_eq!(stream.flush().unwrap().as_deref(), Some("\u{fffd}"));
    assert_eq!(stream.flush().unwrap(), None);
}

#[test]
fn a_run_of_bytes_waits_for_its_end() {
    // One invalid byte turns the whole run into replacement characters, so nothing of it can be shown before.
    let tokenizer = byte_fallback();
    let byte = |byte: u32| byte + 3;
    let the = tokenizer.token_to_id("▁the").unwrap();
    let mut stream = TokenStream::new(&tokenizer);
    assert_eq!(stream.push(byte(0x61)).unwrap(), None);
    assert_eq!(stream.push(byte(0xFF)).unwrap(), None);
    assert_eq!(stream.push(the).unwrap().as_deref(), Some("\u{fffd}\u{fffd} the"));
    assert_eq!(stream.push(byte(0x0A)).unwrap(), None);
    assert_eq!(stream.push(the).unwrap().as_deref(), Some("\n the"));
}

#[test]
fn a_continuation_keeps_the_space_of_its_first_word() {
    let tokenizer = byte_fallback();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let skip = SpecialTokens::Skip;
    assert_eq!(stream(&tokenizer, skip, &[1], &[id("▁cat"), id("s")]), ["cat", "s"]);
    assert_eq!(stream(&tokenizer, skip, &[1, id("▁the")], &[id("▁cat"), id("s")]), [" cat", "s"]);
}

#[test]
fn a_replacement_character_of_the_context_itself_is_not_given_again() {
    for tokenizer in [byte_level(), byte_fallback()] {
        let encode = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        for context in ["s\u{fffd}", "\u{fffd}\u{fffd}", "s\u{fffd}s"] {
            let context = encode(context);
            assert_eq!(stream(&tokenizer, SpecialTokens::Skip, &context, &encode("s")).concat().trim(), "s");
            assert!(stream(&tokenizer, SpecialTokens::Skip, &context, &[]).is_empty());
        }
        // One that is cut is completed.
        let (cut, euro) = (encode("€"), encode("s€"));
        let (cut, rest) = cut.split_at(cut.len() - 1);
        assert_eq!(stream(&tokenizer, SpecialTokens::Skip, cut, rest).concat(), "€");
        assert_eq!(stream(&tokenizer, SpecialTokens::Skip, &euro, &encode("s")).concat().trim(), "s");
    }
    let byte = |byte: u32| byte + 3;
    let spelled = [0xEF, 0xBF, 0xBD].map(byte);
    let tokenizer = byte_fallback();
    assert!(stream(&tokenizer, SpecialTokens::Skip, &spelled, &[]).is_empty());
}

#[test]
fn special_tokens_are_left_out_or_kept() {
    let tokenizer = byte_fallback();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let ids = [1, id("▁cat"), 2];
    assert_eq!(stream(&tokenizer, SpecialTokens::Skip, &[], &ids).concat(), "cat");
    assert_eq!(stream(&tokenizer, SpecialTokens::Keep, &[], &ids).concat(), "<s> cat</s>");
}

#[test]
fn unknown_ids_have_no_text() {
    let tokenizer = byte_fallback();
    assert!(stream(&tokenizer, SpecialTokens::Keep, &[9_000_000], &[u32::MAX, 70_000]).is_empty());
}

#[test]
fn a_stream_begins_again_after_a_flush() {
    let tokenizer = byte_fallback();
    let the = tokenizer.token_to_id("▁the").unwrap();
    let mut stream = TokenStream::new(&tokenizer);
    for _ in 0..2 {
        assert_eq!(stream.push(the).unwrap().as_deref(), Some("the"));
        assert_eq!(stream.flush().unwrap(), None);
    }
}
