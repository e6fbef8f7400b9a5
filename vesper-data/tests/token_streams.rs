//! Real text gives the tokens that the Python package `tokenizers` gives: `golden/token_streams.json`, made by
//! `golden/token_streams.py`.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vesper_data::tokenizer::{Algorithm, TokenLayout, TrainConfig};
use vesper_data::{Documents, TextTokenizer};

/// The folder of real data; without it, says that `test` is skipped.
fn data(test: &str) -> Option<PathBuf> {
    let data = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    data
}

fn paths(source: &Path, files: usize) -> Vec<PathBuf> {
    if !source.is_dir() {
        return vec![source.to_path_buf()];
    }
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(source).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all.truncate(files);
    all
}

/// The documents of a file, by the script's names of its readers.
fn texts(kind: &str, path: &Path) -> Vec<String> {
    let read = || std::fs::read_to_string(path).unwrap();
    match kind {
        "text" | "jsonl" | "documents" => {
            Documents::open(&[path.to_path_buf()]).unwrap().map(|d| d.unwrap().text).collect()
        }
        "conversations" => {
            read().split("\n\n").filter(|part| !part.trim().is_empty()).map(str::to_owned).collect()
        }
        "contexts" => {
            let json: Value = serde_json::from_str(&read()).unwrap();
            let articles = json["data"].as_array().unwrap().iter();
            let paragraphs = articles.flat_map(|article| article["paragraphs"].as_array().unwrap());
            paragraphs.map(|paragraph| paragraph["context"].as_str().unwrap().to_owned()).collect()
        }
        other => panic!("no reader {other}"),
    }
}

fn streams_of(tokenizer: &str) {
    let Some(data) = data(tokenizer) else { return };
    let rows: Vec<Value> = serde_json::from_str(include_str!("golden/token_streams.json")).unwrap();
    let loaded = TextTokenizer::from_file(data.join(tokenizer).join("tokenizer.json")).unwrap();
    let rows: Vec<&Value> = rows.iter().filter(|row| row["tokenizer"] == tokenizer).collect();
    assert!(rows.len() >= 3);
    for row in rows {
        let string = |key: &str| row[key].as_str().unwrap();
        let files = usize::try_from(row["files"].as_u64().unwrap()).unwrap();
        let documents = paths(&data.join(string("source")), files)
            .into_iter()
            .flat_map(|path| texts(string("kind"), &path))
            .map(Ok);
        let (mut digest, mut count, mut tokens) = (Sha256::new(), 0, 0);
        for encoded in loaded.encode_documents(documents) {
            let ids = encoded.unwrap().ids;
            for id in &ids {
                digest.update(id.to_le_bytes());
            }
            count += 1;
            tokens += ids.len();
        }
        let hex = digest.finalize().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        assert_eq!(
            (count, tokens),
            (row["documents"].as_u64().unwrap(), usize::try_from(row["tokens"].as_u64().unwrap()).unwrap()),
            "{row}"
        );
        assert_eq!(hex, string("sha256"), "{row}");
    }
}

#[test]
fn camemberts_streams_are_those_of_python() {
    streams_of("tokenizers/camembert-base");
}

#[test]
fn gpt2s_streams_are_those_of_python() {
    streams_of("tokenizers/gpt2");
}

#[test]
fn llamas_streams_are_those_of_python() {
    streams_of("models/stories260K");
}

/// Whether two JSON values are equal, numbers but for the last digits, in which logarithms differ between systems.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| alike(a, b)))
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 1e-9 * a.abs()
        }
        _ => a == b,
    }
}

/// `golden/trained.json` has tokenizers that were trained here, with ids that the script has checked in Python. Where
/// `VESPER_TRAINED` names a folder, it is written there, for the script to check it again.
#[test]
fn trained_tokenizers_are_those_that_python_read_and_agreed_with() {
    let text =
        "Le chat noir, l'été, dort ; le chien, lui, ne dort pas. Où est l’oiseau ? Il est là-bas. ".repeat(9);
    let cases = ["Le chat dort.", "l'été  là-bas\n ?", "un 🦊 <mask> </s>", "", "ﬁn… de l’oiseau"];
    let mut rows = Vec::new();
    for (algorithm, layout) in [
        (Algorithm::Unigram, TokenLayout::Camembert),
        (Algorithm::Unigram, TokenLayout::EndOfText),
        (Algorithm::Bpe, TokenLayout::Camembert),
        (Algorithm::Bpe, TokenLayout::EndOfText),
    ] {
        let config =
            TrainConfig::default().with_algorithm(algorithm).with_layout(layout).with_vocab_size(300);
        let tokenizer = TextTokenizer::train([Ok(&text)], &config, |_| {}).unwrap();
        let cases: Vec<Value> = cases
            .iter()
            .map(|text| {
                let ids = tokenizer.encode(text).unwrap();
                serde_json::json!({
                    "text": text,
                    "with_special_tokens": tokenizer.encode_with_special_tokens(text).unwrap(),
                    "decoded": tokenizer.decode(&ids).unwrap(),
                    "ids": ids,
                })
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path().join("t.json")).unwrap();
        let saved: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("t.json")).unwrap()).unwrap();
        rows.push(serde_json::json!({"tokenizer": saved, "cases": cases}));
    }
    let rows = Value::from(rows);
    if let Some(folder) = std::env::var_os("VESPER_TRAINED") {
        std::fs::write(PathBuf::from(folder).join("trained.json"), rows.to_string() + "\n").unwrap();
    }
    let golden: Value = serde_json::from_str(include_str!("golden/trained.json")).unwrap();
    assert!(alike(&rows, &golden), "{rows}");
}
