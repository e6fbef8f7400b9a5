//! VesperLM in Python: the same logits in PyTorch, from the folder that is written here.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use vesper_model::VesperLM;
use vesper_model::candle_core::{DType, Device};
use vesper_model::generate::{GenerationConfig, Generator};
use vesper_model::hf::{Extras, read_config, read_weights, save, write_python};

use super::llamas::{assert_close, logits};
use super::{adapted, assert_equal, names, small, weights};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf/golden").join(name)
}

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<u32>,
    /// The positions that there are logits of.
    rows: Vec<usize>,
    models: Vec<Model>,
}

#[derive(serde::Deserialize)]
struct Model {
    config: Value,
    logits: Vec<Vec<f64>>,
}

/// `golden/vespers.py` wrote the file.
fn models() -> Golden {
    serde_json::from_str(&std::fs::read_to_string(golden("vespers.json")).unwrap()).unwrap()
}

/// The golden weights under a configuration. They have an output layer, which a model without one ignores.
fn folder(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(golden("vespers.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn load(dir: &Path) -> VesperLM {
    VesperLM::load(dir, DType::F32, &Device::Cpu).unwrap()
}

fn json_of(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn logits_are_those_of_the_model_in_python() {
    let golden = models();
    for model in golden.models {
        let got = logits(&load(folder(&model.config).path()), &golden.ids);
        for (&row, expected) in golden.rows.iter().zip(&model.logits) {
            assert_close(&format!("{}, {row}", model.config["hidden_act"]), &got[row], expected, 1e-5);
        }
    }
}

#[test]
fn python_is_written_beside_the_weights_and_the_model_stays_the_same() {
    let (config, weights) = (small(), weights(&small(), DType::BF16));
    let (saved, later) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(saved.path(), &config, &weights, &Extras { python: true, ..Extras::default() }).unwrap();
    save(later.path(), &config, &weights, &Extras::default()).unwrap();
    assert!(write_python(later.path()).unwrap());
    assert!(write_python(later.path()).unwrap(), "twice does no harm");
    for dir in [saved.path(), later.path()] {
        assert_eq!(
            names(dir),
            [
                "config.json",
                "configuration_vesper.py",
                "generation_config.json",
                "model.safetensors",
                "modeling_vesper.py"
            ]
        );
        let auto_map = &json_of(dir)["auto_map"];
        assert_eq!(auto_map["AutoModelForCausalLM"], "modeling_vesper.VesperForCausalLM");
        assert_eq!(auto_map["AutoConfig"], "configuration_vesper.VesperConfig");
        assert_eq!(read_config(dir).unwrap(), config);
        assert_equal(&read_weights(dir, &config, DType::BF16, &Device::Cpu).unwrap(), &weights);
    }
    assert_eq!(json_of(saved.path()), json_of(later.path()));
    let mut wrong = json_of(later.path());
    wrong["hidden_sise"] = 3.into();
    std::fs::write(later.path().join("config.json"), wrong.to_string()).unwrap();
    let error = read_config(later.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: hidden_sise is 3: unknown field"), "{error}");
}

#[test]
fn a_llama_needs_no_python() {
    let silu = small().with_activation("silu".parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &silu, &weights(&silu, DType::F32), &Extras { python: true, ..Extras::default() })
        .unwrap();
    assert!(!write_python(dir.path()).unwrap());
    assert_eq!(names(dir.path()), ["config.json", "generation_config.json", "model.safetensors"]);
    assert_eq!(json_of(dir.path()).get("auto_map"), None);
}

#[test]
fn adapters_are_to_be_merged_first() {
    let config = adapted();
    let (root, weights) = (tempfile::tempdir().unwrap(), weights(&config, DType::F32));
    let dir = root.path().join("model");
    let error = save(&dir, &config, &weights, &Extras { python: true, ..Extras::default() }).unwrap_err();
    assert!(error.to_string().contains("config.json: adapter: "), "{error}");
    assert!(names(root.path()).is_empty());
    save(&dir, &config, &weights, &Extras::default()).unwrap();
    let before = names(&dir);
    let error = write_python(&dir).unwrap_err().to_string();
    assert!(error.contains("config.json: adapter: "), "{error}");
    assert_eq!(names(&dir), before);
    let error = write_python(root.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: "), "{error}");
}

#[test]
fn what_transformers_saves_loads() {
    let ours = &models().models[2].config;
    let mut theirs = ours.clone();
    for (field, value) in [
        ("transformers_version", json!("5.24.0")),
        ("auto_map", json!({"AutoConfig": "configuration_vesper.VesperConfig"})),
        ("attention_bias", json!(false)),
        ("dtype", json!("bfloat16")),
        ("use_cache", json!(true)),
        ("pad_token_id", Value::Null),
    ] {
        theirs[field] = value;
    }
    let mut rope = theirs.as_object_mut().unwrap().remove("rope_scaling").unwrap();
    rope["rope_theta"] = theirs.as_object_mut().unwrap().remove("rope_theta").unwrap();
    theirs["rope_parameters"] = rope;
    let read = |config: &Value| read_config(folder(config).path());
    assert_eq!(read(&theirs).unwrap(), read(ours).unwrap());
    theirs["attention_bias"] = true.into();
    let error = read(&theirs).unwrap_err().to_string();
    assert!(error.contains("attention_bias is true"), "{error}");
}

/// The interpreter that `VESPER_PYTHON` names, with torch and transformers; `None` after saying that the test is skipped.
fn python(test: &str) -> Option<PathBuf> {
    let python = std::env::var_os("VESPER_PYTHON").map(PathBuf::from);
    if python.is_none() {
        println!("skipped: {test} (VESPER_PYTHON is not set)");
    }
    python
}

#[derive(serde::Deserialize)]
struct InPython {
    logits: Vec<Vec<f64>>,
    bf16: Vec<Vec<f64>>,
    cached: Vec<u32>,
    uncached: Vec<u32>,
    padded: Vec<u32>,
}

/// `|a - b| / |b|` in the Euclidean norm.
fn relative_error(a: &[Vec<f32>], b: &[Vec<f64>]) -> f64 {
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let difference: f64 = pairs().map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    (difference / pairs().map(|(_, b)| b * b).sum::<f64>()).sqrt()
}

#[test]
fn transformers_loads_generates_and_saves() {
    let Some(python) = python("transformers_loads_generates_and_saves") else { return };
    let golden = models();
    // Both forms of ERA, both kinds of scaling, and a model that needs none of our classes.
    for model in [0, 2, 3, 7].map(|i| &golden.models[i]) {
        let what = model.config["hidden_act"].to_string();
        let source = folder(&model.config);
        let config = read_config(source.path()).unwrap();
        let weights = read_weights(source.path(), &config, DType::BF16, &Device::Cpu).unwrap();
        let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        save(dir.path(), &config, &weights, &Extras { python: true, ..Extras::default() }).unwrap();

        let output = Command::new(&python)
            .arg(self::golden("vesper_in_python.py"))
            .args([dir.path(), copy.path()])
            .args(golden.ids.iter().map(u32::to_string))
            .env("CUDA_VISIBLE_DEVICES", "")
            .output()
            .unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        let theirs: InPython = serde_json::from_slice(&output.stdout).unwrap();

        let ours = load(dir.path());
        let rows = logits(&ours, &golden.ids);
        for (row, expected) in rows.iter().zip(&theirs.logits) {
            assert_close(&what, row, expected, 1e-5);
        }
        let off = relative_error(&rows, &theirs.bf16);
        assert!(off < 0.03, "{what} in bf16: off by {off}");
        let settings = GenerationConfig::greedy().with_max_new_tokens(8);
        let continued = |prompt: &[u32]| -> Vec<u32> {
            let mut session = ours.session(64).unwrap();
            let mut generator = Generator::new(&mut session, prompt, &settings).unwrap();
            generator.ids().map(Result::unwrap).collect()
        };
        assert_eq!(theirs.cached[golden.ids.len()..], continued(&golden.ids), "{what}");
        assert_eq!(theirs.uncached, theirs.cached, "{what}");
        assert_eq!(theirs.padded, continued(&golden.ids[golden.ids.len() - 3..]), "{what}");

        // And back: what it saved is the model that it read, in f32.
        assert_eq!(read_config(copy.path()).unwrap(), config, "{what}");
        assert_eq!(logits(&load(copy.path()), &golden.ids), rows, "{what}");
    }
}
