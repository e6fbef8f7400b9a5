//! Tokenizers: trained, loaded, saved.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};
use vesper_data::{DataError, TextTokenizer};

const STORY: &str = "Once upon a time there was a fox who lived in the old forest near the river. Every day the \
    fox went to the river, and every day the old bear said: \"Good day, little fox!\" The fox liked the bear, \
    and the bear liked the fox; they weren't alone. One day the river was gone. \"Where is the river?\" said \
    the fox. \"I don't know,\" said the bear. They went up the hill, and there they found that the little \
    beavers had built a dam across the river in 1999 and 2000.\n\nIl était une fois un renard qui vivait dans \
    la forêt, près de la rivière. L'été était là, et la rivière n'était plus là.\n";

/// The text in other words, so that there is something to merge.
fn corpus() -> Vec<String> {
    let words: Vec<&str> = STORY.split(' ').collect();
    (1..40)
        .map(|step| words.iter().cycle().step_by(step).take(200).copied().collect::<Vec<_>>().join(" "))
        .collect()
}

fn train(vocab_size: usize) -> TextTokenizer {
    TextTokenizer::train_bpe(corpus().iter().map(Ok), vocab_size).unwrap()
}

/// Loads a tokenizer.json with this content, with an optional tokenizer_config.json beside it.
fn load(json: &Value, config: Option<&str>) -> vesper_data::Result<TextTokenizer> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    if let Some(config) = config {
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    }
    TextTokenizer::from_file(folder.path().join("tokenizer.json"))
}

fn json_of(tokenizer: &TextTokenizer) -> Value {
    serde_json::from_str(&tokenizer.inner().to_string(false).unwrap()).unwrap()
}

#[test]
fn training_twice_gives_the_same_tokenizer() {
    let first = train(400);
    for _ in 0..5 {
        let again = train(400);
        assert_eq!(again.inner().to_string(true).unwrap(), first.inner().to_string(true).unwrap());
        assert_eq!(again.fingerprint(), first.fingerprint());
    }
    assert_ne!(train(399).fingerprint(), first.fingerprint());
}

#[test]
fn training_does_not_depend_on_how_the_text_is_cut_into_documents() {
    // A line break between words is a word of its own, wherever the document ends.
    let lines: Vec<String> = corpus().iter().map(|text| text.replace('\n', " ") + "\n").collect();
    let joined = TextTokenizer::train_bpe([Ok(lines.concat())], 400).unwrap();
    assert_eq!(
        TextTokenizer::train_bpe(lines.iter().map(Ok), 400).unwrap().fingerprint(),
        joined.fingerprint()
    );
}

#[test]
fn the_merges_are_those_of_hugging_faces_trainer() {
    let ours = train(400);
    assert_eq!(ours.vocab_size(), 400);
    let mut theirs = TokenizerBuilder::<_, tokenizers::NormalizerWrapper, _, ByteLevel, ByteLevel>::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(ByteLevel::default()))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .unwrap();
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(400)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .build();
    theirs.train(&mut trainer, corpus().into_iter()).unwrap();
    let theirs: Value = serde_json::from_str(&theirs.to_string(false).unwrap()).unwrap();
    assert_eq!(json_of(&ours)["model"]["vocab"], theirs["model"]["vocab"]);
    assert_eq!(json_of(&ours)["model"]["merges"], theirs["model"]["merges"]);
}

#[test]
fn a_trained_tokenizer_has_the_size_asked_for_or_what_the_text_gives() {
    assert_eq!(train(257).vocab_size(), 257);
    assert_eq!(train(333).vocab_size(), 333);
    let tiny = TextTokenizer::train_bpe([Ok("abab cd")], 5000).unwrap();
    assert_eq!(tiny.vocab_size(), 258); // "ab" is the only pair that occurs twice
    assert_eq!((tiny.bos_id(), tiny.eos_id()), (Some(0), Some(0)));
    assert_eq!(tiny.id_to_token(257).as_deref(), Some("ab"));
}

#[test]
fn training_refuses_a_vocabulary_without_room_for_bytes_and_a_text_without_words() {
    let error = TextTokenizer::train_bpe([Ok("text")], 256).unwrap_err();
    assert!(error.to_string().starts_with("vocab_size is 256: expected at least 257"), "{error}");
    let error = TextTokenizer::train_bpe(Vec::<vesper_data::Result<String>>::new(), 300).unwrap_err();
    assert_eq!(error.to_string(), "the tokenizer failed to train: there is no text");
    assert!(matches!(
        TextTokenizer::train_bpe([Ok("a"), Err(DataError::NoSources)], 300),
        Err(DataError::NoSources)
    ));
}

#[test]
fn the_separator_is_one_token_and_never_learned() {
    let text = "end<|endoftext|>".repeat(50);
    let tokenizer = TextTokenizer::train_bpe([Ok(text.as_str())], 300).unwrap();
    assert_eq!(tokenizer.encode("<|endoftext|>").unwrap(), [0]);
    assert_eq!(tokenizer.vocab_size(), 257 + 2); // "en" or "nd", then "end"
}

#[test]
fn a_very_long_word_does_not_keep_the_trainer_busy() {
    let text = "ab".repeat(1 << 18);
    let tokenizer = TextTokenizer::train_bpe([Ok(text.as_str())], 300).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text);
}

#[test]
fn a_document_ends_with_the_end_of_text() {
    let tokenizer = train(400);
    let mut ids = tokenizer.encode(STORY).unwrap();
    ids.push(0);
    assert_eq!(tokenizer.encode_document(STORY).unwrap().ids, ids);
    let texts = corpus();
    let many: Vec<_> = tokenizer.encode_documents(texts.iter().map(Ok)).map(Result::unwrap).collect();
    assert_eq!(many.len(), texts.len());
    for (text, encoded) in texts.iter().zip(many) {
        assert_eq!(encoded, tokenizer.encode_document(text).unwrap());
    }
}

#[test]
fn documents_before_an_error_are_encoded_and_none_after_it() {
    let tokenizer = train(300);
    let documents = [Ok("a"), Ok("b"), Err(DataError::NoSources), Ok("c")];
    let mut encoded = tokenizer.encode_documents(documents);
    assert_eq!(encoded.next().unwrap().unwrap(), tokenizer.encode_document("a").unwrap());
    assert_eq!(encoded.next().unwrap().unwrap(), tokenizer.encode_document("b").unwrap());
    assert!(matches!(encoded.next(), Some(Err(DataError::NoSources))));
    assert!(encoded.next().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back_from_a_trained_tokenizer(text in "\\PC*|[ a-z\n\r\t'.é🦊]*") {
        prop_assume!(!text.contains("<|endoftext|>"));
        thread_local!(static TOKENIZER: TextTokenizer = train(320));
        let (back, unknown) = TOKENIZER.with(|tokenizer| {
            let encoded = tokenizer.encode_counted(&text).unwrap();
            (tokenizer.decode(&encoded.ids).unwrap(), encoded.unknown)
        });
        prop_assert_eq!(back, text);
        prop_assert_eq!(unknown, 0);
    }
}

#[test]
fn a_saved_tokenizer_is_the_same_when_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let tokenizer = train(400);
    tokenizer.save(&path).unwrap();
    let loaded = TextTokenizer::from_file(&path).unwrap();
    assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
    assert_eq!(loaded.encode(STORY).unwrap(), tokenizer.encode(STORY).unwrap());
    tokenizer.save(&path).unwrap(); // over itself
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(matches!(tokenizer.save(folder.path().join("no/such/t.json")), Err(DataError::Io { .. })));
}

#[test]
fn truncation_padding_and_dropout_are_switched_off() {
    let plain = train(400);
    let mut json = json_of(&plain);
    json["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    json["model"]["dropout"] = json!(0.5);
    let loaded = load(&json, None).unwrap();
    assert_eq!(loaded.encode(STORY).unwrap(), plain.encode(STORY).unwrap());
    assert_eq!(loaded.fingerprint(), plain.fingerprint());
}

#[test]
fn the_fingerprint_does_not_depend_on_how_the_json_is_laid_out() {
    let tokenizer = train(300);
    let value = json_of(&tokenizer);
    let Value::Object(fields) = &value else { panic!() };
    let reversed: Vec<String> = fields.iter().rev().map(|(k, v)| format!("{k:?} :\n {v}")).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    std::fs::write(&path, format!("{{{}}}", reversed.join(",\n"))).unwrap();
    assert_eq!(TextTokenizer::from_file(&path).unwrap().fingerprint(), tokenizer.fingerprint());
}

#[test]
fn what_is_no_tokenizer_is_an_error_that_names_the_file() {
    assert!(matches!(TextTokenizer::from_file("no/such.json"), Err(DataError::Missing { .. })));
    for content in ["", "{}", "[1, 2]", "once upon", r#"{"version": "1.0"}"#] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, content).unwrap();
        let message = TextTokenizer::from_file(&path).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: expected a tokenizer.json, got: "), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let far = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 4_294_967_295_u32}, "unk_token": "a"}});
    let message = load(&far, None).unwrap_err().to_string();
    assert!(message.contains("a token with id 4294967295, expected ids below"), "{message}");
    let message = load(&json_of(&train(257)), Some("[]")).unwrap_err().to_string();
    assert!(message.contains("tokenizer_config.json: expected a JSON object"), "{message}");
}

/// A word-level tokenizer with these tokens.
fn word_level(tokens: &[&str]) -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    json!({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}})
}

#[test]
fn special_tokens_are_found_by_name_or_in_the_configuration() {
    let special = |tokens: &[&str], config: Option<&str>| {
        let tokenizer = load(&word_level(tokens), config).unwrap();
        (tokenizer.bos_id(), tokenizer.eos_id())
    };
    assert_eq!(special(&["<unk>", "a"], None), (None, None));
    assert_eq!(special(&["<s>", "</s>", "<unk>"], None), (Some(0), Some(1)));
    assert_eq!(special(&["[SEP]", "[CLS]", "<unk>"], None), (Some(1), Some(0)));
    assert_eq!(special(&["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], None), (Some(0), Some(1)));
    let config = r#"{"eos_token": {"content": "STOP", "lstrip": false}, "bos_token": "gone"}"#;
    assert_eq!(special(&["<s>", "</s>", "STOP", "<unk>"], Some(config)), (Some(0), Some(2)));
    assert_eq!(special(&["<s>", "</s>"], Some(r#"{"eos_token": null}"#)), (Some(0), Some(1)));
}

#[test]
fn a_folder_keeps_the_end_of_text_that_only_the_configuration_names() {
    let config = r#"{"eos_token": "STOP", "model_max_length": 1024}"#;
    let tokenizer = load(&word_level(&["<unk>", "a", "STOP"]), Some(config)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save_dir(folder.path().join("model")).unwrap();
    let loaded = TextTokenizer::from_file(folder.path().join("model/tokenizer.json")).unwrap();
    assert_eq!(loaded.eos_id(), Some(2));
    assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
    let saved: Value =
        serde_json::from_slice(&read(&folder.path().join("model/tokenizer_config.json"))).unwrap();
    assert_eq!(saved["model_max_length"], 1024);
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn another_end_of_text_is_another_fingerprint() {
    let json = word_level(&["<unk>", "a", "STOP"]);
    let (without, with) = (load(&json, None), load(&json, Some(r#"{"eos_token": "STOP"}"#)));
    assert_ne!(without.unwrap().fingerprint(), with.unwrap().fingerprint());
}

#[test]
fn added_tokens_count_and_must_have_the_ids_of_the_file() {
    let with_id = |id: u32| {
        let mut json = word_level(&["<unk>", "a"]);
        json["added_tokens"] = json!([{"id": id, "content": "<x>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}]);
        load(&json, None)
    };
    let tokenizer = with_id(2).unwrap();
    assert_eq!(tokenizer.vocab_size(), 3);
    assert_eq!(tokenizer.encode("a <x> b").unwrap(), [1, 2, 0]);
    assert_eq!(tokenizer.decode(&[1, 2, 99]).unwrap(), "a");
    // `tokenizers` would give it id 2 here too.
    let message = with_id(9).unwrap_err().to_string();
    assert!(
        message.ends_with("the added token \"<x>\" has id 9, expected 2 (ids without a gap)"),
        "{message}"
    );
}

#[test]
fn unknown_words_are_counted() {
    let tokenizer = load(&word_level(&["<unk>", "a"]), None).unwrap();
    let encoded = tokenizer.encode_counted("a b a c").unwrap();
    assert_eq!((encoded.ids, encoded.unknown), (vec![1, 0, 1, 0], 2));
}

#[test]
fn text_that_a_bpe_would_drop_is_counted() {
    let json = json!({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}});
    let tokenizer = load(&json, None).unwrap();
    let encoded = tokenizer.encode_counted("ab éab xyz b").unwrap();
    assert_eq!((encoded.ids, encoded.unknown), (vec![2, 2, 1], 5)); // the bytes of "é" and "xyz"
    assert_eq!(tokenizer.encode_counted("ab ba\n").unwrap().unknown, 0);
}
