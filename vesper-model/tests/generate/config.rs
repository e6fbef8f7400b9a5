//! `generation_config.json` and the ranges of its settings.

use proptest::prelude::*;
use vesper_model::ModelError;
use vesper_model::generate::GenerationConfig;

fn parse(json: &str) -> GenerationConfig {
    serde_json::from_str(json).unwrap()
}

#[test]
fn absent_and_null_fields_have_the_meaning_that_hugging_face_gives_them() {
    for json in ["{}", r#"{"temperature": null, "top_k": null, "eos_token_id": null, "do_sample": null}"#] {
        let config = parse(json);
        assert!(config.is_greedy());
        assert_eq!((config.temperature, config.top_k, config.top_p), (1.0, 50, 1.0));
        assert_eq!((config.repetition_penalty, config.bos_token_id), (1.0, None));
        assert!(config.eos_token_id.is_empty());
    }
}

#[test]
fn a_foreign_file_is_read_whatever_else_it_holds() {
    // Llama 3.2's own file.
    let config = parse(
        r#"{"bos_token_id": 128000, "do_sample": true, "eos_token_id": [128001, 128008, 128009],
            "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.45.0.dev0", "pad_token_id": -1}"#,
    );
    assert_eq!(config.bos_token_id, Some(128_000));
    assert_eq!(config.eos_token_id, [128_001, 128_008, 128_009]);
    assert_eq!((config.temperature, config.top_p), (0.6, 0.9));
    // What is not understood is written again as it was.
    let again: serde_json::Value = serde_json::to_value(&config).unwrap();
    assert_eq!(
        (&again["transformers_version"], &again["pad_token_id"]),
        (&"4.45.0.dev0".into(), &(-1).into())
    );
    assert_eq!(serde_json::from_value::<GenerationConfig>(again).unwrap(), config);
}

#[test]
fn a_field_of_a_wrong_type_is_named() {
    for (json, part) in [
        (r#"{"top_k": 5, "temperature": "warm"}"#, "temperature is \"warm\": "),
        (r#"{"top_k": -1}"#, "top_k is -1: "),
        (r#"{"max_new_tokens": 2.5, "pad_token_id": "x"}"#, "max_new_tokens is 2.5: "),
        (r#"{"early_stopping": "soon"}"#, "early_stopping is \"soon\""),
        ("[]", "expected a map"),
    ] {
        let error = serde_json::from_str::<GenerationConfig>(json).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_single_end_is_stored_as_a_number_and_several_as_a_list() {
    let json = |config: &GenerationConfig| serde_json::to_value(config).unwrap();
    let config = GenerationConfig::default();
    assert_eq!(json(&config).get("eos_token_id"), None);
    assert_eq!(json(&config.clone().with_eos([2]))["eos_token_id"], 2);
    assert_eq!(json(&config.with_eos([2, 5]))["eos_token_id"], serde_json::json!([2, 5]));
}

#[test]
fn a_wrong_end_is_refused_with_what_was_expected() {
    let error = serde_json::from_str::<GenerationConfig>(r#"{"eos_token_id": -1}"#).unwrap_err().to_string();
    assert!(error.contains("a token id must be a whole number"), "{error}");
}

#[test]
fn greedy_by_temperature_is_stored_as_not_sampling() {
    // `transformers` fails at a temperature of 0, but never looks at it where it does not sample.
    let config = GenerationConfig::default().with_temperature(0.0);
    assert_eq!(serde_json::to_value(&config).unwrap()["do_sample"], false);
    assert!(config.with_temperature(0.7).do_sample);
}

#[test]
fn stop_strings_are_read_from_one_text_and_from_several() {
    assert_eq!(parse(r#"{"stop_strings": "\n\n"}"#).stop_strings, ["\n\n"]);
    let config = parse(r#"{"stop_strings": ["a", "b"]}"#);
    assert_eq!(config.stop_strings, ["a", "b"]);
    assert_eq!(parse(&serde_json::to_string(&config).unwrap()), config);
    let error = serde_json::from_str::<GenerationConfig>(r#"{"stop_strings": 3}"#).unwrap_err().to_string();
    assert!(error.contains("a text or a list of texts"), "{error}");
}

#[test]
fn a_file_with_a_length_of_the_whole_alone_means_that() {
    let config = parse(r#"{"max_length": 4096}"#);
    assert_eq!((config.max_length, config.max_new_tokens), (Some(4096), 4096));
    // And is written so: beside it Hugging Face would not look at the length of the whole.
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!((&json["max_length"], json.get("max_new_tokens")), (&4096.into(), None));
    assert_eq!(parse(&json.to_string()), config);
    let config = parse(r#"{"max_length": 4096, "max_new_tokens": 10}"#);
    assert_eq!((config.max_length, config.max_new_tokens), (Some(4096), 10));
    assert_eq!(parse(&serde_json::to_string(&config).unwrap()), config);
}

#[test]
fn a_file_with_the_fewest_tokens_alone_leaves_room_for_them() {
    let config = parse(r#"{"min_new_tokens": 300}"#);
    assert_eq!((config.min_new_tokens, config.max_new_tokens), (300, 300));
    config.validate().unwrap();
    assert_eq!(parse(r#"{"min_new_tokens": 3}"#).max_new_tokens, 256);
    let error = parse(r#"{"min_new_tokens": 300, "max_new_tokens": 20}"#).validate().unwrap_err();
    assert!(error.to_string().contains("min_new_tokens is 300"), "{error}");
}

#[test]
fn settings_out_of_range_are_named() {
    let base = GenerationConfig::default;
    let wrong = [
        (base().with_temperature(-0.1), "temperature"),
        (base().with_temperature(f64::NAN), "temperature"),
        (base().with_temperature(f64::INFINITY), "temperature"),
        (base().with_top_p(-0.01), "top_p"),
        (base().with_top_p(1.01), "top_p"),
        (base().with_top_p(f64::NAN), "top_p"),
        (base().with_stop_strings(["x", ""]), "stop_strings"),
        (base().with_repetition_penalty(0.0), "repetition_penalty"),
        (base().with_repetition_penalty(-1.0), "repetition_penalty"),
        (base().with_repetition_penalty(f64::INFINITY), "repetition_penalty"),
    ];
    for (config, name) in wrong {
        match config.validate() {
            Err(ModelError::InvalidGeneration { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let right = [
        base(),
        GenerationConfig::greedy(),
        base().with_temperature(0.0),
        base().with_top_k(0).with_top_p(1.0),
        base().with_top_p(0.0),
    ];
    assert!(right.iter().all(|config| config.validate().is_ok()));
}

proptest! {
    #[test]
    fn what_is_stored_reads_back_equal(
        temperature in 1e-6..1e6f64, top_k in 0usize..1000, top_p in 1e-9..=1.0f64, penalty in 1e-3..1e3f64,
        tokens in 0usize..100_000, seed: u64, bos: Option<u32>, eos in prop::collection::vec(any::<u32>(), 0..4),
        sample: bool,
    ) {
        let config = GenerationConfig {
            do_sample: sample, temperature, top_k, top_p, repetition_penalty: penalty, max_new_tokens: tokens, seed,
            bos_token_id: bos, eos_token_id: eos, ..GenerationConfig::default()
        };
        let json = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(parse(&json), config);
    }
}
