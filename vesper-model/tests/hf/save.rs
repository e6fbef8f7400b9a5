//! Saving refuses what does not fit before it writes, and leaves an older model good when it fails.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use vesper_model::candle_core::{DType, Device, Tensor};
use vesper_model::generate::GenerationConfig;
use vesper_model::hf::{Extras, check_tokenizer, read_config, read_tokenizer, read_weights, save};
use vesper_model::{ModelError, VesperConfig};

use super::{assert_equal, names, small, weights};

/// A tokenizer with `size` entries, the last of which is a special token with the id `last`.
fn tokenizer(size: u32, last: u32) -> String {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (0..size - 1).map(|id| (format!("t{id}"), id.into())).collect();
    vocab.insert("<end>".into(), last.into());
    serde_json::json!({
        "added_tokens": [{"id": last, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    })
    .to_string()
}

/// Every file below a folder with its bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let content = if path.is_dir() { vec![] } else { std::fs::read(&path).unwrap() };
        files.insert(name, content);
    }
    files
}

#[test]
fn a_new_directory_appears_with_its_parents_and_nothing_beside_it() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("runs/a/model");
    let json = tokenizer(20, 19);
    let extras = Extras { tokenizer_json: Some(&json), ..Extras::default() };
    save(&dir, &small(), &weights(&small(), DType::F32), &extras).unwrap();
    assert_eq!(
        names(&dir),
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(names(dir.parent().unwrap()), ["model"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), mode(dir.parent().unwrap()), "as readable as any folder");
    }
}

#[test]
fn a_directory_that_is_there_is_updated_and_keeps_other_files() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("README.md"), "mine").unwrap();
    let first = small();
    save(dir.path(), &first, &weights(&first, DType::F32), &Extras::default()).unwrap();
    let second = VesperConfig { num_hidden_layers: 1, ..small() }.with_activation("silu".parse().unwrap());
    for _ in 0..2 {
        let new = weights(&second, DType::BF16);
        save(dir.path(), &second, &new, &Extras::default()).unwrap();
        assert_eq!(read_config(dir.path()).unwrap(), second);
        assert_equal(&read_weights(dir.path(), &second, DType::BF16, &Device::Cpu).unwrap(), &new);
        assert_eq!(
            names(dir.path()),
            ["README.md", "config.json", "generation_config.json", "model.safetensors"],
            "and no temporary file"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let config = small();
    let good = weights(&config, DType::F32);
    let attempt = |config: &VesperConfig, weights: &HashMap<String, Tensor>, extras: &Extras<'_>| {
        let error = save(&dir, config, weights, extras).unwrap_err();
        assert!(names(root.path()).is_empty(), "{error}");
        error.to_string()
    };

    let mut short = good.clone();
    short.remove("model.layers.1.mlp.gate_up_proj.weight");
    let error = attempt(&config, &short, &Extras::default());
    assert!(error.contains("the weights have no model.layers.1.mlp.gate_up_proj.weight"), "{error}");

    let mut long = good.clone();
    long.insert("lm_head.weight".into(), good["model.embed_tokens.weight"].clone());
    let error = attempt(&config, &long, &Extras::default());
    assert!(error.contains("the model has no lm_head.weight"), "{error}");

    let mut wrong = good.clone();
    wrong.insert("model.norm.weight".into(), Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
    let error = attempt(&config, &wrong, &Extras::default());
    assert!(error.contains("model.norm.weight has shape [4], expected [16]"), "{error}");

    let error = attempt(&VesperConfig { head_dim: 3, ..config.clone() }, &good, &Extras::default());
    assert!(error.contains("head_dim is 3"), "{error}");

    let extras = Extras { generation: GenerationConfig::default().with_top_p(2.0), ..Extras::default() };
    assert!(attempt(&config, &good, &extras).contains("top_p is 2"));

    let extras = Extras { tokenizer_json: Some("{"), ..Extras::default() };
    assert!(attempt(&config, &good, &extras).contains("tokenizer.json: "));

    let json = tokenizer(25, 24);
    let extras = Extras { tokenizer_json: Some(&json), ..Extras::default() };
    assert!(attempt(&config, &good, &extras).contains("25 entries but the model's vocabulary has 24"));
}

#[test]
fn weights_that_cannot_be_written_leave_the_older_model_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let old = small();
    save(dir.path(), &old, &weights(&old, DType::F32), &Extras::default()).unwrap();
    let before = files(dir.path());

    // Only floats can be stored, which is found while the temporary file is being written.
    let mut ids = weights(&old, DType::F32);
    ids.insert("model.norm.weight".into(), Tensor::zeros(16, DType::I64, &Device::Cpu).unwrap());
    let error = save(dir.path(), &old, &ids, &Extras::default()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: model.norm.weight has dtype I64"), "{error}");
    assert_eq!(files(dir.path()), before);
}

#[test]
fn weights_that_cannot_be_replaced_leave_the_older_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let old = small();
    save(dir.path(), &old, &weights(&old, DType::F32), &Extras::default()).unwrap();
    // Nothing can be renamed over a folder that holds something.
    let blocked = dir.path().join("model.safetensors");
    std::fs::remove_file(&blocked).unwrap();
    std::fs::create_dir(&blocked).unwrap();
    std::fs::write(blocked.join("x"), "x").unwrap();
    let before = files(dir.path());

    let new = VesperConfig { rope_theta: 5e5, ..small() };
    let error = save(dir.path(), &new, &weights(&new, DType::F32), &Extras::default()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { path, .. } if path.ends_with("model.safetensors")), "{error}");
    assert_eq!(files(dir.path()), before);
    assert_eq!(read_config(dir.path()).unwrap(), old);
}

#[test]
fn a_target_that_is_a_file_is_an_error_that_names_it() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    std::fs::write(&target, "mine").unwrap();
    let error = save(&target, &small(), &weights(&small(), DType::F32), &Extras::default()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { path, .. } if *path == target), "{error}");
    assert_eq!(names(root.path()), ["model"]);
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "mine");
}

#[test]
fn the_tokenizer_is_kept_as_it_is_and_described() {
    let dir = tempfile::tempdir().unwrap();
    let json = tokenizer(20, 23);
    let extras = Extras { tokenizer_json: Some(&json), ..Extras::default() };
    let config = VesperConfig { eos_token_id: Some(23), bos_token_id: Some(22), ..small() };
    save(dir.path(), &config, &weights(&config, DType::F32), &extras).unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), json);
    let about = std::fs::read_to_string(dir.path().join("tokenizer_config.json")).unwrap();
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    assert_eq!(about["eos_token"], "<end>");
    assert_eq!(about.get("bos_token"), None, "the tokenizer has no entry 22");
    assert_eq!(about["model_max_length"], 32);
    assert_eq!(read_tokenizer(dir.path(), &config).unwrap().token_to_id("<end>"), Some(23));
}

#[test]
fn a_tokenizer_that_is_read_neither_cuts_nor_fills_up() {
    let mut json: serde_json::Value = serde_json::from_str(&tokenizer(20, 19)).unwrap();
    json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
    json["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "t0"});
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let read = read_tokenizer(dir.path(), &small()).unwrap();
    assert_eq!(read.encode("t3 t1 t4 t1 t5", false).unwrap().get_ids(), [3, 1, 4, 1, 5]);
    // The file itself does both.
    let raw: tokenizers::Tokenizer = json.to_string().parse().unwrap();
    assert_eq!(raw.encode("t3 t1 t4 t1 t5", false).unwrap().get_ids(), [3, 1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_tokenizer_fits_when_its_highest_id_does() {
    let parse = |size, last| tokenizer(size, last).parse::<tokenizers::Tokenizer>().unwrap();
    let config = small();
    assert!(check_tokenizer(&parse(24, 23), &config).is_ok());
    // Few entries, but one with a high id.
    let error = check_tokenizer(&parse(5, 24), &config).unwrap_err();
    assert!(matches!(error, ModelError::TokenizerTooLarge { tokenizer: 25, model: 24 }), "{error}");
}
