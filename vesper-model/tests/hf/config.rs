//! `config.json`, ours and Llama's.

use serde_json::{Value, json};
use vesper_model::VesperConfig;
use vesper_model::candle_core::DType;
use vesper_model::hf::{Extras, read_config, read_generation_config, save};
use vesper_model::ops::RopeScaling;

use super::{small, weights};

fn read(text: &str) -> Result<VesperConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    read_config(dir.path()).map_err(|error| error.to_string())
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
    })
}

fn with(mut config: Value, fields: Value) -> String {
    let Value::Object(fields) = fields else { unreachable!("tests give objects") };
    config.as_object_mut().unwrap().extend(fields);
    config.to_string()
}

fn error(text: &str) -> String {
    let error = read(text).unwrap_err();
    assert!(
        error.contains("config.json: ") && !error.contains('\n'),
        "one line that names the file: {error}"
    );
    error
}

#[test]
fn absent_fields_of_a_llama_have_the_defaults_of_transformers() {
    let config = read(&llama().to_string()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim, config.max_position_embeddings), (8, 8, 2048));
    assert_eq!((config.rms_norm_eps, config.rope_theta, config.initializer_range), (1e-6, 1e4, 0.02));
    assert_eq!((config.bos_token_id, config.eos_token_id), (Some(1), Some(2)));
    assert!(!config.tie_word_embeddings);
    assert_eq!(config.hidden_act.to_string(), "silu");
    assert_eq!(config.model_type, "vesper");
}

#[test]
fn fields_of_a_llama_are_taken() {
    let config = read(&with(
        llama(),
        json!({"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
            "tie_word_embeddings": true, "hidden_act": "gelu_pytorch_tanh", "bos_token_id": null,
            "eos_token_id": [7, 9], "max_position_embeddings": 99, "initializer_range": 0.01}),
    ))
    .unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim, config.max_position_embeddings), (2, 16, 99));
    assert_eq!((config.rms_norm_eps, config.rope_theta, config.initializer_range), (1e-5, 5e5, 0.01));
    assert_eq!((config.bos_token_id, config.eos_token_id), (None, Some(7)));
    assert!(config.tie_word_embeddings);
    assert_eq!(config.hidden_act.to_string(), "gelu_tanh");
}

#[test]
fn the_rotary_base_is_found_where_newer_versions_write_it() {
    let rope = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}});
    assert_eq!(read(&with(llama(), rope)).unwrap().rope_theta, 2e4);
}

#[test]
fn scaled_rotary_angles_are_read_in_every_spelling() {
    let linear = Some(RopeScaling::Linear { factor: 2.0 });
    for rope in [
        json!({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        json!({"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 2}}),
        json!({"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}),
        json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}}),
        json!({"rope_scaling": null, "rope_parameters": {"type": "linear", "rope_theta": 2e4, "factor": 2.0}}),
        json!({"rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}}),
    ] {
        let config = read(&with(llama(), rope.clone())).unwrap();
        assert_eq!((config.rope_theta, config.rope_scaling), (2e4, linear), "{rope}");
    }
    for rope in [json!({}), json!({"type": "default"}), json!({"rope_type": "default", "factor": 1.0})] {
        assert_eq!(read(&with(llama(), json!({"rope_scaling": rope}))).unwrap().rope_scaling, None);
    }
}

#[test]
fn the_scaling_of_llama_3_is_read_and_written() {
    let llama3 = |original| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: original,
    };
    let mut rope =
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    // As `transformers`: what is not said is the model's whole context, and the model's own word counts most.
    let without = with(llama(), json!({"rope_scaling": rope}));
    assert_eq!(read(&without).unwrap().rope_scaling, Some(llama3(2048)));
    rope["original_max_position_embeddings"] = 512.into();
    let fields = json!({"rope_scaling": rope});
    assert_eq!(read(&with(llama(), fields.clone())).unwrap().rope_scaling, Some(llama3(512)));
    let mut outside = fields.clone();
    outside["original_max_position_embeddings"] = 256.into();
    assert_eq!(read(&with(llama(), outside)).unwrap().rope_scaling, Some(llama3(256)));

    let scaled = VesperConfig { rope_scaling: Some(llama3(512)), ..small() };
    for config in [scaled.clone(), scaled.with_activation("silu".parse().unwrap())] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &config, &weights(&config, DType::F32), &Extras::default()).unwrap();
        assert_eq!(read_config(dir.path()).unwrap(), config);
        let text = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["rope_scaling"], rope);
    }
}

#[test]
fn rotary_scaling_that_cannot_be_read_is_named() {
    for (rope, part) in [
        (json!({"rope_scaling": "linear"}), r#"rope_scaling is "linear": expected an object"#),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": "2"}}), r#"rope_scaling.factor is "2""#),
        (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "rope_scaling.factor is 0.5"),
        (json!({"rope_scaling": {"type": 3}}), "rope_scaling.type is 3"),
        (
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            r#"rope_scaling.rope_type is "yarn": expected default, linear or llama3"#,
        ),
        (
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}),
            "rope_parameters.low_freq_factor",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}),
            "rope_parameters beside it says otherwise",
        ),
    ] {
        let error = error(&with(llama(), rope));
        assert!(error.contains(part), "{error}");
    }
    let mut ours = serde_json::to_value(small()).unwrap();
    ours["rope_scaling"] = json!({"rope_type": "yarn", "factor": 2.0});
    let error = error(&ours.to_string());
    assert!(error.contains("unknown variant `yarn`"), "{error}");
}

#[test]
fn fields_that_only_inform_are_ignored() {
    let fields = json!({"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": true,
        "pretraining_tp": 4, "attention_dropout": 0.1, "rope_scaling": null, "attention_bias": false,
        "mlp_bias": false, "_name_or_path": "x", "pad_token_id": -1, "sliding_window": null});
    assert_eq!(read(&with(llama(), fields)), read(&llama().to_string()));
}

#[test]
fn whatever_changes_the_mathematics_is_refused_by_name() {
    let refused = [
        json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        json!({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}),
        json!({"rope_scaling": {"factor": 2.0}}),
        json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        json!({"partial_rotary_factor": 0.25}),
        json!({"attention_bias": true}),
        json!({"mlp_bias": true}),
        json!({"quantization_config": {"quant_method": "gptq"}}),
        json!({"sliding_window": 128}),
        json!({"hidden_act": "quick_gelu"}),
        json!({"architectures": ["LlamaForSequenceClassification"]}),
    ];
    for fields in refused {
        let name = fields.as_object().unwrap().keys().next().unwrap().clone();
        let error = error(&with(llama(), fields));
        assert!(error.contains(&name), "{name}: {error}");
    }
}

#[test]
fn a_mistral_window_matters_only_when_it_is_shorter_than_the_context() {
    let mistral = |fields| {
        let base = json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"]});
        with(serde_json::from_str(&with(llama(), base)).unwrap(), fields)
    };
    // `transformers` reads 4096 where the field is absent.
    assert!(error(&mistral(json!({}))).contains("sliding_window is 4096"));
    assert!(read(&mistral(json!({"max_position_embeddings": 4096}))).is_ok());
    assert!(read(&mistral(json!({"sliding_window": null}))).is_ok());
    assert!(
        error(&mistral(json!({"sliding_window": 1024, "max_position_embeddings": 2048}))).contains("1024")
    );
}

#[test]
fn wrong_files_give_one_clear_line() {
    for (text, part) in [
        ("", "EOF"),
        ("[1]", "invalid type"),
        ("{\"model_type\": \"llama\"", "line 1"),
        ("{}", "no model_type"),
        (r#"{"model_type": "qwen2"}"#, r#"model_type is "qwen2""#),
        (r#"{"model_type": 3}"#, "model_type is 3"),
        (r#"{"model_type": "llama"}"#, "vocab_size is missing"),
    ] {
        let error = error(text);
        assert!(error.contains(part), "{text}: {error}");
    }
    assert!(error(&with(llama(), json!({"hidden_size": "big"}))).contains("hidden_size"));
    assert!(error(&with(llama(), json!({"hidden_size": -64}))).contains("hidden_size"));
    assert!(error(&with(llama(), json!({"hidden_size": 65}))).contains("hidden_size is 65"));
    assert!(error(&with(llama(), json!({"num_attention_heads": 0}))).contains("num_attention_heads"));
    assert!(error(&with(llama(), json!({"rms_norm_eps": -1.0}))).contains("rms_norm_eps"));
    assert!(error(&with(llama(), json!({"num_key_value_heads": 3}))).contains("num_key_value_heads"));
    let missing = read_config(tempfile::tempdir().unwrap().path()).unwrap_err().to_string();
    assert!(missing.contains("config.json"), "{missing}");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), b"{\"a\": \"\xff\"}").unwrap();
    let not_text = read_config(dir.path()).unwrap_err().to_string();
    assert!(not_text.contains("invalid byte at offset 7"), "{not_text}");
}

#[test]
fn our_own_file_is_read_strictly() {
    let text = serde_json::to_string(&small()).unwrap();
    assert_eq!(read(&text).unwrap(), small());
    let unknown = with(serde_json::from_str(&text).unwrap(), json!({"hidden_sise": 3}));
    assert!(error(&unknown).contains("unknown field `hidden_sise`"));
    let invalid = with(serde_json::from_str(&text).unwrap(), json!({"head_dim": 3}));
    assert!(error(&invalid).contains("head_dim is 3"));
}

#[test]
fn a_field_of_a_wrong_type_is_named_in_ours_and_in_a_llama() {
    let numbers = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "initializer_range",
    ];
    let others = ["hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "architectures"];
    let ours = serde_json::to_value(VesperConfig { bos_token_id: None, ..small() }).unwrap();
    for field in numbers.iter().chain(&others) {
        for value in [json!("five"), json!([true]), json!({"a": 1}), json!(-1.5)] {
            // These take any positive number, and are judged as a whole.
            if value == json!(-1.5) && ["rms_norm_eps", "rope_theta", "initializer_range"].contains(field) {
                continue;
            }
            for config in [ours.clone(), llama()] {
                let error = error(&with(config, json!({*field: value})));
                assert!(error.contains(&format!("config.json: {field} is {value}: ")), "{field}: {error}");
            }
        }
    }
    let mut short = ours;
    short.as_object_mut().unwrap().remove("hidden_size");
    assert!(error(&short.to_string()).contains("missing field `hidden_size`"));
}

#[test]
fn the_tokens_of_generation_come_from_either_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    write("config.json", json!({"bos_token_id": 1, "eos_token_id": [2, 3], "anything": []}));
    let config = read_generation_config(dir.path()).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_id.as_slice()), (Some(1), &[2, 3][..]));
    assert!(!config.is_greedy());

    write("generation_config.json", json!({"eos_token_id": 5, "temperature": 0.5, "do_sample": true}));
    let config = read_generation_config(dir.path()).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_id.as_slice()), (Some(1), &[5][..]));
    assert_eq!(config.temperature, 0.5);

    write("generation_config.json", json!({"top_p": 3.0}));
    let error = read_generation_config(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: top_p is 3"), "{error}");
    write("generation_config.json", json!({"top_k": -4}));
    let error = read_generation_config(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: ") && error.contains("-4"), "{error}");
}
