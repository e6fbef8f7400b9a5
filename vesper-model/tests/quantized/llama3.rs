//! Llamas with scaled rotary positions: `golden/llama3.py` makes the files, `../hf/golden/llamas.py` their weights and the
//! logits of `transformers`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use era_act::Activation;
use vesper_model::hf::{self, Extras};
use vesper_model::ops::RopeScaling;
use vesper_model::quantized::{Gguf, GgufExtras, save};
use vesper_model::{VesperConfig, VesperLM};

use super::{config, ids, model, values};

const NAME: &str = "rope_freqs.weight";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantized/golden").join(name)
}

fn llama3(factor: f64, original_max_position_embeddings: usize) -> RopeScaling {
    RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings,
    }
}

/// The architecture of a file, and the factors in it.
fn stored(path: &Path) -> (String, Option<Vec<f32>>) {
    let mut file = std::fs::File::open(path).unwrap();
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    let architecture = content.metadata["general.architecture"].to_string().unwrap().clone();
    let factors = content.tensor_infos.contains_key(NAME).then(|| {
        let factors = content.tensor(&mut file, NAME, &Device::Cpu).unwrap();
        factors.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
    });
    (architecture, factors)
}

#[test]
fn a_file_with_factors_is_the_model_of_the_hugging_face_directory() {
    #[derive(serde::Deserialize)]
    struct Golden {
        ids: Vec<u32>,
        rows: Vec<usize>,
        logits: Vec<Vec<f32>>,
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf/golden/llamas/wide_heads_llama3");
    let Golden { ids, rows, logits } =
        serde_json::from_str(&std::fs::read_to_string(folder.join("logits.json")).unwrap()).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();

    let path = golden("llama3.gguf");
    let gguf = Gguf::open(&path).unwrap();
    let scaling = Some(llama3(4.0, 16));
    assert_eq!(gguf.config().rope_scaling, scaling);
    let model = gguf.model(DType::F32, &Device::Cpu).unwrap();
    let got = model.forward(&ids).unwrap();
    for (&row, want) in rows.iter().zip(&logits) {
        let got = got.get(0).unwrap().get(row).unwrap().to_vec1::<f32>().unwrap();
        let most = got.iter().zip(want).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap();
        assert!(got.len() == want.len() && most < 3e-5, "{row}: {most}");
    }
    let config = hf::read_config(&folder).unwrap();
    let of_folder = |config: &VesperConfig| {
        let weights = hf::read_weights(&folder, config, DType::F32, &Device::Cpu).unwrap();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        values(&VesperLM::new(config, vb).unwrap().forward(&ids).unwrap())
    };
    assert_eq!(values(&got), of_folder(&config));
    assert_ne!(values(&got), of_folder(&VesperConfig { rope_scaling: None, ..config.clone() }));

    // Written by this crate, other programs find the factors again; in a directory it is the formula.
    let dir = tempfile::tempdir().unwrap();
    let again = dir.path().join("again.gguf");
    save(&again, &model, &GgufExtras::default()).unwrap();
    let (architecture, factors) = stored(&again);
    assert_eq!(architecture, "llama");
    let theirs = stored(&path).1.unwrap();
    let factors = factors.unwrap();
    assert_eq!(factors.len(), theirs.len());
    assert!(factors.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-6 * b), "{factors:?} {theirs:?}");
    let loaded = Gguf::open(&again).unwrap();
    assert_eq!(loaded.config().rope_scaling, scaling);
    assert_eq!(values(&loaded.model(DType::F32, &Device::Cpu).unwrap().forward(&ids).unwrap()), values(&got));
    hf::save(dir.path().join("folder"), loaded.config(), &model.weights(), &Extras::default()).unwrap();
    assert_eq!(hf::read_config(dir.path().join("folder")).unwrap().rope_scaling, scaling);
}

#[test]
fn the_factors_of_metas_models_are_recognised() {
    for (file, head_dim, factor) in [("llama3.1.gguf", 128, 8.0), ("llama3.2.gguf", 64, 32.0)] {
        let gguf = Gguf::open(golden(file)).unwrap();
        assert_eq!((gguf.config().head_dim, gguf.config().rope_theta), (head_dim, 5e5));
        assert_eq!(gguf.config().rope_scaling, Some(llama3(factor, 8192)), "{file}");
    }
}

/// The error of a file, the bytes of its tensor of factors replaced from byte `at` on.
fn error(file: &Path, at: impl Fn(&[u8]) -> usize, to: &[u8]) -> String {
    let mut bytes = std::fs::read(file).unwrap();
    let at = at(&bytes);
    bytes[at..at + to.len()].copy_from_slice(to);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = Gguf::open(&path).unwrap_err().to_string();
    assert!(error.contains(&format!("model.gguf: {NAME}")) && !error.contains('\n'), "{error}");
    error
}

/// Where its number of dimensions stands.
fn dimensions(bytes: &[u8]) -> usize {
    (0..bytes.len()).find(|&i| bytes[i..].starts_with(NAME.as_bytes())).unwrap() + NAME.len()
}

#[test]
fn factors_that_are_none_are_refused_by_name() {
    let file = golden("llama3.gguf");
    // The slowest four of the five frequencies are divided by 4.
    let second = |bytes: &[u8]| {
        let fours = 4f32.to_le_bytes().repeat(4);
        (0..bytes.len()).find(|&i| bytes[i..].starts_with(&fours)).unwrap()
    };
    for (factor, text) in [
        (f32::NAN, "[1] is NaN, expected a positive number"),
        (f32::INFINITY, "[1] is inf, expected a positive number"),
        (0.0, "[1] is 0, expected a positive number"),
        (-4.0, "[1] is -4, expected a positive number"),
        (2.5, " is from 1.5707964 to 4, expected the factors of llama3 (low_freq_factor 1"),
        (5.0, " is from 1.5707964 to 5, expected the factors of llama3 (low_freq_factor 1"),
    ] {
        let message = error(&file, second, &factor.to_le_bytes());
        assert!(message.contains(&format!("{NAME}{text}")), "{message}");
    }
    let message = error(&file, |bytes| dimensions(bytes) + 4, &4u64.to_le_bytes());
    assert!(message.contains("has shape [4], expected [5]"), "{message}");
    let message = error(&file, |bytes| dimensions(bytes) + 12, &1u32.to_le_bytes());
    assert!(message.contains("is in f16, expected f32"), "{message}");
}

#[test]
fn factors_must_agree_with_the_configuration_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.gguf");
    let config = VesperConfig { rope_scaling: Some(llama3(4.0, 32)), ..config(64, true, Activation::Silu) };
    save(&path, &model(&config), &GgufExtras::default()).unwrap();
    assert_eq!(stored(&path).0, "llama");
    let at = |bytes: &[u8]| {
        let last = [4f32.to_le_bytes(), 4f32.to_le_bytes()].concat();
        (0..bytes.len()).find(|&i| bytes[i..].starts_with(&last)).unwrap() + 4
    };
    let message = error(&path, at, &3f32.to_le_bytes());
    assert!(message.contains("expected the factors of rope_scaling in vesper.config"), "{message}");
}

#[test]
fn scaled_models_that_other_programs_do_not_know_are_written_without_factors() {
    let scalings =
        [(Activation::default(), llama3(4.0, 32)), (Activation::Silu, RopeScaling::Linear { factor: 2.0 })];
    for (activation, scaling) in scalings {
        let config = VesperConfig { rope_scaling: Some(scaling), ..config(32, true, activation) };
        let model = model(&config);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        save(&path, &model, &GgufExtras::default()).unwrap();
        assert_eq!(stored(&path), ("vesper".into(), None));
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.config(), &config);
        let logits = |model: &VesperLM| values(&model.forward(&ids(1, 40)).unwrap());
        assert_eq!(logits(&gguf.model(DType::F32, &Device::Cpu).unwrap()), logits(&model));
    }
}
