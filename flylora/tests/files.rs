//! Saving and loading, and every way in which a file can be wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{base, noise, values, wake};
use flylora::files::{
    AdapterFile, CONFIG_FILE, PeftConfig, SaveOptions, Stored, WEIGHTS_FILE, save_adapters_with,
};
use flylora::{
    Adapter, AdapterKind, LoraAdapter, LoraConfig, LoraEmbedding, LoraLinear, Place, Scaling, Targets,
    load_adapters, save_adapters,
};
use serde_json::{Value, json};

const Q: &str = "model.layers.0.self_attn.q_proj";
const QB: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
const V: &str = "model.layers.0.self_attn.v_proj";

fn layer(seed: u64, dtype: DType) -> LoraLinear {
    let config = LoraConfig::default().with_r(4).with_alpha(6.0).with_seed(seed);
    let layer = LoraLinear::seeded(base(10, 6, dtype, false), &config, "layer").unwrap();
    wake(layer.adapter(), 40 + seed);
    layer
}

fn state(layers: &[(&str, &LoraLinear)]) -> Vec<Vec<f64>> {
    layers.iter().flat_map(|(_, l)| l.vars()).map(|v| values(&v)).collect()
}

/// Changes one field of a configuration file; `None` removes it.
fn edit(dir: &Path, field: &str, value: Option<Value>) {
    let path = dir.join(CONFIG_FILE);
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let fields = config.as_object_mut().unwrap();
    match value {
        Some(value) => fields.insert(field.into(), value),
        None => fields.remove(field),
    };
    std::fs::write(path, config.to_string()).unwrap();
}

/// Changes the tensors of a weights file.
fn rewrite(dir: &Path, change: impl Fn(&mut HashMap<String, Tensor>)) {
    let path = dir.join(WEIGHTS_FILE);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn adapters_loaded_under_another_seed_give_the_same_bits() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let dir = tempfile::tempdir().unwrap();
        let (q, v) = (layer(1, dtype), layer(2, dtype));
        save_adapters(dir.path().join("new/folder"), &[(Q, &q), (V, &v)]).unwrap();
        let (other_q, other_v) = (layer(3, dtype), layer(4, dtype));
        let x = noise(&[5, 10], 1.0, dtype, 41);
        assert_ne!(values(&q.forward(&x).unwrap()), values(&other_q.forward(&x).unwrap()));
        // In another order: names decide.
        load_adapters(dir.path().join("new/folder"), &[(V, &other_v), (Q, &other_q)]).unwrap();
        assert_eq!(state(&[(Q, &q), (V, &v)]), state(&[(Q, &other_q), (V, &other_v)]));
        assert_eq!(values(&q.forward(&x).unwrap()), values(&other_q.forward(&x).unwrap()));
        assert_eq!(values(&v.forward(&x).unwrap()), values(&other_v.forward(&x).unwrap()));
    }
}

#[test]
fn the_files_have_the_names_and_the_metadata_that_peft_expects() {
    let dir = tempfile::tempdir().unwrap();
    let (q, v) = (layer(1, DType::F32), layer(2, DType::F32));
    save_adapters(dir.path(), &[(V, &v), (Q, &q)]).unwrap();
    let bytes = std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap(), &HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> =
        file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
    shapes.sort();
    let key = |path: &str, name: &str| format!("base_model.model.{path}.{name}.weight");
    let want = [(Q, "lora_A", [4, 10]), (Q, "lora_B", [6, 4]), (V, "lora_A", [4, 10]), (V, "lora_B", [6, 4])];
    assert_eq!(shapes, want.map(|(path, name, shape)| (key(path, name), shape.to_vec())));

    let text = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["r"], 4);
    assert_eq!(config["lora_alpha"], 6);
    assert_eq!(config["target_modules"], json!([V, Q]));
    assert_eq!(config["use_rslora"], false);
    // Nothing but the two files is left behind, and saving again replaces them.
    save_adapters(dir.path(), &[(Q, &q), (V, &v)]).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    assert_eq!(
        std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap(),
        bytes,
        "equal adapters give equal files"
    );
}

#[test]
fn ranks_and_alphas_that_differ_go_into_the_patterns_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let make = |r: usize, alpha: f64, seed: u64| {
        let config = LoraConfig::default()
            .with_r(r)
            .with_alpha(alpha)
            .with_scaling(Scaling::AlphaOverSqrtR)
            .with_seed(seed);
        LoraAdapter::seeded(10, 6, &config, "layer", DType::F32, &Device::Cpu).unwrap()
    };
    let adapters = [make(4, 6.0, 0), make(2, 6.0, 0), make(4, 0.1, 0)];
    save_adapters(dir.path(), &[(Q, &adapters[0]), (V, &adapters[1]), ("lm_head", &adapters[2])]).unwrap();
    let config = PeftConfig::read(dir.path()).unwrap();
    for ((path, r, alpha), adapter) in
        [(Q, 4, 6.0), (V, 2, 6.0), ("lm_head", 4, 0.1)].into_iter().zip(&adapters)
    {
        let lora = config.lora(path);
        assert_eq!((lora.r, lora.alpha, lora.scaling), (r, alpha, Scaling::AlphaOverSqrtR));
        assert_eq!(lora.scale(), adapter.scale());
    }
    let other = [make(4, 6.0, 1), make(2, 6.0, 1), make(4, 0.1, 1)];
    load_adapters(dir.path(), &[(Q, &other[0]), (V, &other[1]), ("lm_head", &other[2])]).unwrap();
    assert_eq!(values(other[1].a()), values(adapters[1].a()));
}

#[test]
fn a_pattern_of_a_path_matches_no_other_path() {
    // An expression matches endings, and its dots match anything.
    for paths in [["a.q", "x.a.q", "b"], ["a.q", "a_q", "b"], ["a_q", "a.q", "x.a.q"], ["b", "a+(q", "a.q"]] {
        let dir = tempfile::tempdir().unwrap();
        let make = |r: usize| {
            let config = LoraConfig::default().with_r(r).with_alpha(r as f64);
            LoraAdapter::seeded(10, 6, &config, "layer", DType::F32, &Device::Cpu).unwrap()
        };
        let adapters = [make(4), make(2), make(3)];
        let named: Vec<(&str, &LoraAdapter)> = paths.into_iter().zip(&adapters).collect();
        save_adapters(dir.path(), &named).unwrap();
        load_adapters(dir.path(), &named).unwrap_or_else(|e| panic!("{paths:?}: {e}"));
    }
}

#[test]
fn a_configuration_made_here_gives_the_ranks_and_alphas_of_one_that_is_read() {
    let lora = LoraConfig::default().with_r(8).with_alpha(16.0);
    let made = PeftConfig::new(AdapterKind::Lora(lora), Targets::names(["q_proj", "v_proj"]))
        .with_rank_pattern([(r"layers\.1\..*", 2), ("v_proj", 4)])
        .unwrap()
        .with_alpha_pattern([("^model.layers.0.self_attn.q_proj", 3.0)])
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers\\.1\\..*": 2, "v_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}}"#;
    std::fs::write(dir.path().join(CONFIG_FILE), text).unwrap();
    let read = PeftConfig::read(dir.path()).unwrap();
    for path in [Q, V, "model.layers.1.self_attn.v_proj", "q_proj", "x.model.layers.0.self_attn.q_proj"] {
        assert_eq!(made.kind(path).unwrap(), read.kind(path).unwrap(), "{path}");
        assert_eq!(made.targets().selects(path), read.targets().selects(path), "{path}");
    }
    let error = made.clone().with_rank_pattern([("(", 2)]).unwrap_err().to_string();
    assert!(error.contains("rank_pattern = \"(\""), "{error}");
    assert!(made.with_rank_pattern([("q_proj", 0)]).unwrap().kind(Q).is_err());
}

#[test]
fn layers_and_embeddings_go_into_one_file() {
    let make = |seed: u64| {
        let place = Place::alone("embed", DType::F32, &Device::Cpu);
        let config = LoraConfig::default().with_r(4).with_alpha(6.0).with_seed(seed);
        let table = noise(&[9, 5], 1.0, DType::F32, 60);
        let embedding = LoraEmbedding::new(table, &config, &place).unwrap();
        embedding.a().set(&noise(&[4, 9], 0.5, DType::F32, 61 + seed)).unwrap();
        (embedding, layer(seed, DType::F32))
    };
    let dir = tempfile::tempdir().unwrap();
    let ((embedding, q), (other, other_q)) = (make(1), make(2));
    let named: [(&str, &dyn Stored); 2] = [("model.embed_tokens", &embedding), (Q, &q)];
    save_adapters(dir.path(), &named).unwrap();
    let named: [(&str, &dyn Stored); 2] = [("model.embed_tokens", &other), (Q, &other_q)];
    load_adapters(dir.path(), &named).unwrap();
    for ((_, got), (_, want)) in other.parameters().iter().zip(embedding.parameters()) {
        assert_eq!(values(got), values(&want));
    }
    assert_eq!(state(&[(Q, &other_q)]), state(&[(Q, &q)]));
    let file = AdapterFile::read(dir.path()).unwrap();
    assert_eq!(file.modules(), ["model.embed_tokens", Q]);
    assert!(file.is_embedding("model.embed_tokens") && !file.is_embedding(Q));
}

#[test]
fn what_could_not_be_loaded_is_not_saved_and_the_old_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let q = layer(1, DType::F32);
    save_adapters(dir.path(), &[(Q, &q)]).unwrap();
    let bytes = std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
    let b = q.adapter().b();
    b.set(&(b.as_detached_tensor() * f64::NAN).unwrap()).unwrap();
    let error = save_adapters(dir.path(), &[(Q, &q)]).unwrap_err().to_string();
    assert!(error.contains(QB) && error.contains("not finite"), "{error}");
    assert_eq!(std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap(), bytes);
}

#[test]
fn whatever_is_wrong_is_named_and_nothing_changes() {
    type Damage = fn(&Path);
    let cases: Vec<(&str, Damage, &[&str])> = vec![
        ("no weights", |d| std::fs::remove_file(d.join(WEIGHTS_FILE)).unwrap(), &[WEIGHTS_FILE]),
        (
            "pickled weights",
            |d| std::fs::rename(d.join(WEIGHTS_FILE), d.join("adapter_model.bin")).unwrap(),
            &["adapter_model.bin: pickled weights are not read", WEIGHTS_FILE],
        ),
        ("no configuration", |d| std::fs::remove_file(d.join(CONFIG_FILE)).unwrap(), &[CONFIG_FILE]),
        (
            "empty weights",
            |d| std::fs::write(d.join(WEIGHTS_FILE), b"").unwrap(),
            &[WEIGHTS_FILE, "not a complete"],
        ),
        (
            "not safetensors",
            |d| std::fs::write(d.join(WEIGHTS_FILE), [b'x'; 99]).unwrap(),
            &["not a complete"],
        ),
        (
            "not JSON",
            |d| std::fs::write(d.join(CONFIG_FILE), "{\"r\": 4").unwrap(),
            &[CONFIG_FILE, "not complete JSON"],
        ),
        (
            "not an object",
            |d| std::fs::write(d.join(CONFIG_FILE), "[]").unwrap(),
            &["expected a JSON object"],
        ),
        (
            "not UTF-8",
            |d| std::fs::write(d.join(CONFIG_FILE), [0xff, 0xfe]).unwrap(),
            &[CONFIG_FILE, "UTF-8"],
        ),
        ("a key is missing", |d| rewrite(d, |t| drop(t.remove(QB))), &[WEIGHTS_FILE, "no tensor named", QB]),
        (
            "keys too many",
            |d| {
                rewrite(d, |t| {
                    let a = t[QB].clone();
                    t.insert("base_model.model.lm_head.lora_A.weight".into(), a.clone());
                    t.insert("base_model.model.lm_head.lora_B.weight".into(), a);
                });
            },
            &[WEIGHTS_FILE, "base_model.model.lm_head.lora_A.weight belongs to none", "and 1 more"],
        ),
        (
            "a weight of the model",
            |d| rewrite(d, |t| drop(t.insert("base_model.model.lm_head.weight".into(), t[QB].clone()))),
            &[WEIGHTS_FILE, "base_model.model.lm_head.weight belongs to none"],
        ),
        (
            "another shape",
            |d| rewrite(d, |t| drop(t.insert(QB.into(), t[QB].t().unwrap().contiguous().unwrap()))),
            &[WEIGHTS_FILE, QB, "expected shape [6, 4], got [4, 6]"],
        ),
        (
            "integers",
            |d| rewrite(d, |t| drop(t.insert(QB.into(), t[QB].to_dtype(DType::U32).unwrap()))),
            &[WEIGHTS_FILE, QB, "got U32"],
        ),
        (
            "NaN",
            |d| rewrite(d, |t| drop(t.insert(QB.into(), (&t[QB] * f64::NAN).unwrap()))),
            &[WEIGHTS_FILE, QB, "not finite"],
        ),
        (
            "infinity",
            |d| rewrite(d, |t| drop(t.insert(QB.into(), (&t[QB] / 0.0).unwrap()))),
            &[WEIGHTS_FILE, QB, "not finite"],
        ),
        ("another rank", |d| edit(d, "r", Some(json!(8))), &[CONFIG_FILE, Q, "r is 8 in the file and 4"]),
        ("no rank", |d| edit(d, "r", None), &["r: expected a whole number from 1 on, got nothing"]),
        ("rank zero", |d| edit(d, "r", Some(json!(0))), &["r: expected a whole number from 1 on, got 0"]),
        (
            "another alpha",
            |d| edit(d, "lora_alpha", Some(json!(12))),
            &[Q, "the scale is 3 in the file and 1.5"],
        ),
        ("alpha in words", |d| edit(d, "lora_alpha", Some(json!("six"))), &["lora_alpha: expected a number"]),
        (
            "a bias of the adapter",
            |d| edit(d, "lora_bias", Some(json!(true))),
            &[Q, "lora_bias is true in the file and false in the adapter"],
        ),
        (
            "a bias beside DoRA",
            |d| {
                edit(d, "use_dora", Some(json!(true)));
                edit(d, "lora_bias", Some(json!(true)));
            },
            &["lora_bias = true is not supported"],
        ),
        (
            "other scaling",
            |d| edit(d, "use_rslora", Some(json!(true))),
            &["the scale is 3 in the file and 1.5"],
        ),
        (
            "no kind",
            |d| edit(d, "peft_type", None),
            &["peft_type: expected \"LORA\" or another name, got nothing"],
        ),
        (
            "another kind",
            |d| edit(d, "peft_type", Some(json!("IA3"))),
            &["peft_type = \"IA3\" is not supported"],
        ),
        (
            "AdaLoRA without its rank",
            |d| edit(d, "peft_type", Some(json!("ADALORA"))),
            &["init_r: expected a whole number from 1 on, got nothing"],
        ),
        (
            "DoRA",
            |d| edit(d, "use_dora", Some(json!(true))),
            &[CONFIG_FILE, Q, "the kind is DoRA in the file and LoRA in the adapter"],
        ),
        (
            "no flag",
            |d| edit(d, "fan_in_fan_out", Some(json!(3))),
            &["fan_in_fan_out: expected true or false"],
        ),
        (
            "saved modules",
            |d| {
                edit(d, "modules_to_save", Some(json!(["lm_head"])));
                rewrite(d, |t| drop(t.insert("base_model.model.lm_head.weight".into(), t[QB].clone())));
            },
            &[WEIGHTS_FILE, "base_model.model.lm_head.weight belongs to none"],
        ),
        (
            "saved modules of no list",
            |d| edit(d, "modules_to_save", Some(json!("lm_head"))),
            &["modules_to_save: expected a list of names, got \"lm_head\""],
        ),
        (
            "alpha of no number",
            |d| edit(d, "alpha_pattern", Some(json!({"q_proj": "x"}))),
            &["alpha_pattern.q_proj: expected a number other than 0"],
        ),
        ("targets", |d| edit(d, "target_modules", Some(json!(3))), &["target_modules: expected a name"]),
        ("bias", |d| edit(d, "bias", Some(json!("some"))), &["bias = \"some\" is not supported"]),
        ("PiSSA", |d| edit(d, "init_lora_weights", Some(json!("pissa"))), &["init_lora_weights = \"pissa\""]),
        (
            "new field",
            |d| edit(d, "use_next_thing", Some(json!(true))),
            &["use_next_thing = true is not supported"],
        ),
        (
            "regex",
            |d| edit(d, "rank_pattern", Some(json!({"q(": 2}))),
            &["rank_pattern = \"q(\"", "regular expr"],
        ),
        (
            "pattern",
            |d| edit(d, "rank_pattern", Some(json!({"q_proj": 2}))),
            &[Q, "r is 2 in the file and 4"],
        ),
    ];
    for (name, damage, parts) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (q, v) = (layer(1, DType::F32), layer(2, DType::F32));
        save_adapters(dir.path(), &[(Q, &q), (V, &v)]).unwrap();
        damage(dir.path());
        let (q, v) = (layer(3, DType::F32), layer(4, DType::F32));
        let layers = [(Q, &q), (V, &v)];
        let before = state(&layers);
        let message = load_adapters(dir.path(), &layers).expect_err(name).to_string();
        for part in parts {
            assert!(message.contains(part), "{name}: {message:?} says nothing of {part:?}");
        }
        assert_eq!(state(&layers), before, "{name}: a failed load changes nothing");
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let q = layer(1, DType::F32);
    save_adapters(dir.path(), &[(Q, &q)]).unwrap();
    let bytes = std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
    let other = layer(3, DType::F32);
    let before = state(&[(Q, &other)]);
    for len in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        std::fs::write(dir.path().join(WEIGHTS_FILE), &bytes[..len]).unwrap();
        let message = load_adapters(dir.path(), &[(Q, &other)]).expect_err("cut off").to_string();
        assert!(message.contains(WEIGHTS_FILE), "{message}");
        assert_eq!(state(&[(Q, &other)]), before);
    }
}

#[test]
fn adapters_that_do_not_go_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (q, v) = (layer(1, DType::F32), layer(2, DType::F32));
    let message =
        |adapters: &[(&str, &LoraLinear)]| save_adapters(dir.path(), adapters).unwrap_err().to_string();
    assert!(message(&[]).contains("there is no adapter"));
    assert!(message(&[(Q, &q), (Q, &v)]).contains(&format!("two adapters have the path {Q}")));
    assert!(message(&[("model..q", &q)]).contains("\"model..q\" is not the path of a module"));
    let rank_stabilised = LoraConfig::default().with_r(4).with_scaling(Scaling::AlphaOverSqrtR);
    let other = LoraLinear::seeded(base(10, 6, DType::F32, false), &rank_stabilised, "layer").unwrap();
    assert!(message(&[(Q, &q), (V, &other)]).contains("one directory holds one kind"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");

    save_adapters(dir.path(), &[(Q, &q)]).unwrap();
    let mut merged = layer(3, DType::F32);
    merged.merge().unwrap();
    let message = load_adapters(dir.path(), &[(Q, &merged)]).unwrap_err().to_string();
    assert_eq!(message, format!("{Q} is merged: unmerge it before loading"));
}

#[test]
fn patterns_are_expressions_and_the_first_of_the_file_counts() {
    let dir = tempfile::tempdir().unwrap();
    save_adapters(dir.path(), &[(Q, &layer(1, DType::F32))]).unwrap();
    // Not in the order of the alphabet.
    let text = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    let text = text
        .replace("\"rank_pattern\": {}", r#""rank_pattern": {"self_attn\\..*": 3, "q_proj": 2, "^up": 5}"#);
    std::fs::write(dir.path().join(CONFIG_FILE), text).unwrap();
    let config = PeftConfig::read(dir.path()).unwrap();
    for (path, r) in
        [(Q, 3), ("q_proj", 2), ("mlp.q_proj", 2), ("mlp.xq_proj", 4), ("up", 5), ("mlp.up", 4), ("k", 4)]
    {
        assert_eq!(config.lora(path).r, r, "{path}");
    }
}

#[test]
fn a_path_that_others_end_with_keeps_its_own_rank() {
    let dir = tempfile::tempdir().unwrap();
    let make = |r: usize| {
        let config = LoraConfig::default().with_r(r);
        LoraAdapter::seeded(10, 6, &config, "layer", DType::F32, &Device::Cpu).unwrap()
    };
    let adapters = [("a", make(4)), ("q_proj", make(2)), ("x.q_proj", make(3)), ("y.q_proj", make(4))];
    let all: Vec<(&str, &LoraAdapter)> = adapters.iter().map(|(path, a)| (*path, a)).collect();
    save_adapters(dir.path(), &all).unwrap();
    let config = PeftConfig::read(dir.path()).unwrap();
    for (path, adapter) in &adapters {
        assert_eq!(config.lora(path).r, adapter.config().r, "{path}");
    }
    load_adapters(dir.path(), &all).unwrap();
}

#[test]
fn the_options_of_a_file_are_written_and_targets_must_select_what_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let q = layer(1, DType::F32);
    let options = SaveOptions {
        base_model: Some("camembert-base".into()),
        task_type: Some("CAUSAL_LM".into()),
        fan_in_fan_out: true,
        targets: Some(Targets::names(["q_proj"]).in_layers([0])),
        ..SaveOptions::default()
    };
    save_adapters_with(dir.path(), &[(Q, &q)], &options).unwrap();
    let text = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["base_model_name_or_path"], "camembert-base");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(config["target_modules"], json!(["q_proj"]));
    assert_eq!(config["layers_to_transform"], json!([0]));
    let config = PeftConfig::read(dir.path()).unwrap();
    assert!(config.fan_in_fan_out() && config.targets().selects(Q));
    let error = save_adapters_with(dir.path(), &[(V, &q)], &options).unwrap_err().to_string();
    assert_eq!(error, format!("the targets given do not select {V}"));
}

#[test]
fn adapters_in_another_float_dtype_are_converted() {
    let dir = tempfile::tempdir().unwrap();
    let config = LoraConfig::default().with_r(4);
    let half = LoraAdapter::seeded(10, 6, &config, "layer", DType::BF16, &Device::Cpu).unwrap();
    wake(&half, 50);
    save_adapters(dir.path(), &[(Q, &half)]).unwrap();
    let wide = LoraAdapter::seeded(10, 6, &config.with_seed(1), "layer", DType::F32, &Device::Cpu).unwrap();
    load_adapters(dir.path(), &[(Q, &wide)]).unwrap();
    assert_eq!(values(wide.a()), values(half.a()));
    assert_eq!(values(wide.b()), values(half.b()));
    assert_eq!(wide.a().dtype(), DType::F32);
}

/// Adapters that PEFT trained and saved.
#[test]
fn adapters_written_by_peft_load_with_their_scale() {
    let Some(data) = std::env::var_os("VESPER_DATA") else {
        println!("skipped: adapters_written_by_peft_load_with_their_scale (VESPER_DATA is not set)");
        return;
    };
    let peft = Path::new(&data).join("peft");
    for (name, r, scale) in
        [("stories260K-lora-qv-r8", 8, None), ("stories260K-lora-all-linear-r4-rslora", 4, Some(8.0 / 2.0))]
    {
        let dir = peft.join(name);
        let config = PeftConfig::read(&dir).unwrap();
        let tensors = candle_core::safetensors::load(dir.join(WEIGHTS_FILE), &Device::Cpu).unwrap();
        let mut paths: Vec<&str> = tensors
            .keys()
            .filter_map(|key| key.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight"))
            .collect();
        paths.sort_unstable();
        assert_eq!(2 * paths.len(), tensors.len());
        let get = |path: &str, which: &str| &tensors[&format!("base_model.model.{path}.lora_{which}.weight")];
        let adapters: Vec<LoraAdapter> = paths
            .iter()
            .map(|path| {
                let (inputs, outputs) = (get(path, "A").dims()[1], get(path, "B").dims()[0]);
                assert!(config.target_modules().iter().any(|t| path.ends_with(t.as_str())), "{path}");
                let lora = config.lora(path);
                assert_eq!(lora.r, r);
                LoraAdapter::seeded(inputs, outputs, &lora, path, DType::F32, &Device::Cpu).unwrap()
            })
            .collect();
        let pairs: Vec<(&str, &LoraAdapter)> = paths.iter().copied().zip(&adapters).collect();
        load_adapters(&dir, &pairs).unwrap();
        for (path, adapter) in pairs {
            assert_eq!(values(adapter.a()), values(get(path, "A")));
            assert_eq!(values(adapter.b()), values(get(path, "B")));
            if let Some(scale) = scale {
                assert_eq!(adapter.scale(), scale);
            }
            let want = (get(path, "B").matmul(get(path, "A")).unwrap() * adapter.scale()).unwrap();
            assert!(common::largest_difference(&adapter.delta_weight().unwrap(), &want) < 1e-5);
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig {
        cases: 200, failure_persistence: None, ..proptest::prelude::ProptestConfig::default()
    })]

    #[test]
    fn damaged_bytes_never_panic_and_an_error_changes_nothing(
        in_config in proptest::bool::ANY,
        damage in proptest::collection::vec((0usize..10_000, 0u8..=255), 1..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        save_adapters(dir.path(), &[(Q, &layer(1, DType::F32))]).unwrap();
        let path = dir.path().join(if in_config { CONFIG_FILE } else { WEIGHTS_FILE });
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, byte) in damage {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        let other = layer(3, DType::F32);
        let before = state(&[(Q, &other)]);
        if load_adapters(dir.path(), &[(Q, &other)]).is_err() {
            proptest::prop_assert_eq!(state(&[(Q, &other)]), before);
        }
    }
}
