use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use candle_nn::VarMap;
use vesper_model::flylora::{AdapterKind, LoraConfig, Targets};
use vesper_model::hf::Extras;
use vesper_model::metacognition::{Aggregate, AnswerCalibration, ErrorHead, HeadConfig, Method, fingerprint};
use vesper_model::{ModelError, VesperLM};

use crate::model;

fn saved(dir: &Path) -> ErrorHead {
    let lm = model::of_seed(0);
    let config = HeadConfig::default().with_units(4);
    let fit = model::predictions(&lm, &config, 20..24);
    let head = model::trained(&lm, &config, 0).0.calibrate(Method::Isotonic, &fit).unwrap();
    let answers: Vec<Vec<f64>> = (0..20).map(|i| vec![f64::from(i) / 20.0; 2]).collect();
    let wrong: Vec<bool> = (0..20).map(|i| i % 3 == 0).collect();
    let answer = AnswerCalibration::fit(Aggregate::Mean, Method::Platt, &answers, &wrong).unwrap();
    let head = head.with_answer(answer);
    head.save(dir).unwrap();
    head
}

fn refused(dir: &Path, parts: &[&str]) {
    let message = ErrorHead::load(dir, &Device::Cpu).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "no `{part}` in: {message}");
    }
}

#[test]
fn a_head_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("new/folder");
    let head = saved(&dir);
    let loaded = ErrorHead::load_for(&dir, &model::of_seed(0)).unwrap();
    let test = model::predictions(&model::of_seed(0), head.config(), 40..42);
    assert_eq!(loaded.assess_all(&test).unwrap(), head.assess_all(&test).unwrap());
    assert_eq!((loaded.calibration(), loaded.answer()), (head.calibration(), head.answer()));
    assert_eq!((loaded.base(), loaded.config()), (head.base(), head.config()));

    // Saved again it is the same bytes, and nothing else is left.
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    let before = (read("error_head.json"), read("error_head.safetensors"));
    loaded.save(&dir).unwrap();
    assert_eq!((read("error_head.json"), read("error_head.safetensors")), before);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn a_head_for_another_model_is_refused_by_what_is_another() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    let refused = |lm: &VesperLM, what: &str| {
        let error = ErrorHead::load_for(dir.path(), lm).unwrap_err();
        assert!(matches!(error, ModelError::OtherModel { .. }), "{error:?}");
        let message = error.to_string();
        assert!(message.contains("error_head.json") && message.contains(what), "{message}");
    };
    let build = |config| VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu).unwrap();
    let mut wider = model::config();
    wider.hidden_size = 40;
    refused(&build(wider), "hidden_size is 40, expected 32");
    refused(&build(model::config().with_vocab(128)), "vocab_size is 128, expected 64");
    refused(&model::of_seed(1), "the fingerprint");
    let mut other_eps = model::config();
    other_eps.rms_norm_eps = 1e-5;
    refused(&build(other_eps), "the fingerprint");
    let mut adapted = model::of_seed(0);
    adapted.attach(&AdapterKind::Lora(LoraConfig::default()), &Targets::names(["q_proj"])).unwrap();
    refused(&adapted, "the fingerprint");
}

#[test]
fn the_fingerprint_is_that_of_the_checkpoint_in_any_dtype() {
    let dir = tempfile::tempdir().unwrap();
    let lm = model::of_seed(0);
    vesper_model::hf::save(dir.path(), lm.config(), &lm.weights(), &Extras::default()).unwrap();
    let of = |dtype| fingerprint(&VesperLM::load(dir.path(), dtype, &Device::Cpu).unwrap()).unwrap();
    assert_eq!(of(DType::F32), fingerprint(&lm).unwrap());
    assert_eq!(of(DType::F32), of(DType::BF16));
    assert_eq!(of(DType::F32).len(), 64);
}

#[test]
fn damaged_files_are_named_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    refused(dir, &["error_head.json"]); // missing
    saved(dir);
    let (config, weights) = (dir.join("error_head.json"), dir.join("error_head.safetensors"));
    let (json, bytes) = (fs::read_to_string(&config).unwrap(), fs::read(&weights).unwrap());

    for length in [0, 4, 20, bytes.len() - 1] {
        fs::write(&weights, &bytes[..length]).unwrap();
        refused(dir, &["error_head.safetensors"]);
    }
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&weights, &other).unwrap();
    refused(dir, &["error_head.safetensors", "SHA-256"]);
    fs::remove_file(&weights).unwrap();
    refused(dir, &["error_head.safetensors"]);
    fs::write(&weights, &bytes).unwrap();

    for (from, to, part) in [
        ("\"version\": 1", "\"version\": 2", "version 2, expected 1"),
        ("vesper-error-head", "other", "format is other"),
        ("\"units\": 4", "\"units\": 5", "hidden.weight has shape [4, 37], expected [5, 37]"),
        ("\"units\": 4", "\"units\": 0", "unexpected tensor hidden"),
        ("\"units\": 4", "\"units\": 99999999", "units is 99999999"),
        ("\"units\": 4", "\"unit\": 4", "unknown field `unit`"),
        ("\"hidden_size\": 32", "\"hidden_size\": 0", "base.hidden_size is 0"),
        ("\"features\": \"both\"", "\"features\": \"hidden\"", "features.shift has shape"),
        ("\"near\": 5", "\"near\": 0", "near is 0"),
        ("\"slope\": ", "\"slope\": 1e999, \"x\": ", "error_head.json"),
        ("\"values\": [", "\"values\": [7.0,", "calibration: isotonic knots"),
    ] {
        assert!(json.contains(from), "{from}");
        fs::write(&config, json.replace(from, to)).unwrap();
        refused(dir, &[part]);
    }
    for text in ["", "{", "[]", "{}", "nonsense"] {
        fs::write(&config, text).unwrap();
        refused(dir, &["error_head.json"]);
    }
    // The model's own files are no head.
    fs::write(&config, serde_json::to_string(&model::config()).unwrap()).unwrap();
    refused(dir, &["not an error head"]);
}
