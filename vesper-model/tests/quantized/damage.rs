//! Damaged and wrong files: one line that names the file and the key, never a panic, never a large piece of memory.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use era_act::Activation;
use proptest::prelude::*;
use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, save};

use super::largest::largest;
use super::{config, model};

/// Far more than any test here needs, far less than what a wrong count asks for.
const MOST: usize = 256 << 20;

fn good(dir: &Path, activation: Activation) -> (PathBuf, Vec<u8>) {
    let path = dir.join("model.gguf");
    let mut config = config(32, true, activation);
    config.num_hidden_layers = 1;
    let (small, _) = model(&config).quantized(&Policy::new(BlockType::Q8_0)).unwrap();
    save(&path, &small, &GgufExtras::default()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

/// Reads all that is in a file.
fn read(path: &Path) -> Result<(), String> {
    let all = || {
        let gguf = Gguf::open(path)?;
        gguf.generation_config()?;
        gguf.chat_template()?;
        gguf.special_tokens()?;
        if gguf.tokenizer_json()?.is_some() {
            gguf.tokenizer()?;
        }
        gguf.model(DType::F32, &Device::Cpu)
    };
    all().map(|_| ()).map_err(|error| error.to_string())
}

fn check(error: &str) {
    assert!(error.contains("model.gguf: ") && !error.contains('\n'), "{error}");
}

/// Replaces the one place where `from` stands.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert_eq!(places.len(), 1, "{from:?}");
    let at = places[0];
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// The error of a file with these bytes.
fn error(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = read(&path).unwrap_err();
    check(&error);
    error
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn a_file_cut_short_anywhere_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = good(dir.path(), Activation::default());
    read(&path).unwrap();
    // What fills the last tensor up to the alignment holds nothing, so the file may end in it.
    let end = Gguf::open(&path).unwrap().tensors().map(|(.., n)| n.next_multiple_of(32)).sum::<usize>();
    let last = bytes.len() - end + end.saturating_sub(31);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for length in (0..last).rev() {
        file.set_len(length as u64).unwrap();
        let error = Gguf::open(&path).unwrap_err().to_string();
        check(&error);
        assert!(error.contains("truncated") || error.contains("empty"), "{length}: {error}");
    }
    assert!(largest() < MOST, "{}", largest());
}

#[test]
fn changed_bytes_are_an_error_or_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = good(dir.path(), Activation::Silu);
    let data = bytes.len()
        - Gguf::open(&path).unwrap().tensors().map(|(.., n)| n.next_multiple_of(32)).sum::<usize>();
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut put = |at: usize, byte: u8| {
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[byte]).unwrap();
    };
    for (at, &byte) in bytes.iter().enumerate().take(data) {
        for mask in [0xff, 1 << (at % 8)] {
            put(at, byte ^ mask);
            if let Err(error) = read(&path) {
                check(&error);
            }
        }
        put(at, byte);
    }
    read(&path).unwrap();
    assert!(largest() < MOST, "{}", largest());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn many_changed_bytes_are_an_error_or_another_model(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut bytes) = good(dir.path(), Activation::default());
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = read(&path) {
            check(&error);
        }
        prop_assert!(largest() < MOST);
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), version in 2u32..4) {
        error(&bytes);
        error(&[b"GGUF", &version.to_le_bytes()[..], &bytes].concat());
    }
}

#[test]
fn what_is_no_gguf_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    assert!(read(&path).unwrap_err().contains("model.gguf"));
    std::fs::create_dir(&path).unwrap();
    check(&read(&path).unwrap_err());
    assert!(error(b"").contains("empty"));
    assert!(error(b"GGML, or some other text").contains("begins with \"GGML\", expected \"GGUF\""));
    assert!(error(b"\x80\x02}q\x00").contains(r#"begins with "\x80\x02}q""#));
    let version = |v: u32| [b"GGUF", &v.to_le_bytes()[..], &[0; 40]].concat();
    assert!(error(&version(1)).contains("version 1, expected 2 or 3"));
    assert!(error(&version(3u32.swap_bytes())).contains("big-endian"));
    assert!(error(&version(3)).contains("no key general.architecture"));
}

#[test]
fn huge_counts_meet_the_end_of_the_file() {
    let head = |tensors: u64, keys: u64, rest: &[u8]| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), rest].concat()
    };
    assert!(error(&head(u64::MAX, 0, &[0; 64])).contains("truncated"));
    assert!(error(&head(0, u64::MAX, &[0; 64])).contains("truncated"));
    assert!(error(&head(0, 1, &[u64::MAX.to_le_bytes(), [0; 8]].concat())).contains("key 0"));
    // A text, and an array, of as much as there can be.
    for rest in [
        [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat(),
        [&9u32.to_le_bytes()[..], &4u32.to_le_bytes(), &(u64::MAX / 2).to_le_bytes()].concat(),
        [&9u32.to_le_bytes()[..], &8u32.to_le_bytes(), &(u64::MAX / 2).to_le_bytes()].concat(),
    ] {
        let message = error(&head(0, 1, &[text("key"), rest].concat()));
        assert!(message.contains("truncated") && message.contains("key"), "{message}");
    }
    // Arrays in arrays in arrays.
    let nested: Vec<u8> =
        (0..40).flat_map(|_| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat()).collect();
    let message = error(&head(0, 1, &[text("key"), 9u32.to_le_bytes().to_vec(), nested].concat()));
    assert!(message.contains("deep"), "{message}");
    assert!(largest() < MOST, "{}", largest());
}

#[test]
fn wrong_metadata_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = good(dir.path(), Activation::default());
    for (from, to, expected) in [
        // A key that other keys hide behind.
        (text("general.architecture"), text("general.architecturf"), "no key general.architecture"),
        (text("vesper.config"), text("vesper.confih"), "no key vesper.config"),
        // The type of a value.
        (
            [text("general.alignment"), 4u32.to_le_bytes().to_vec()].concat(),
            [text("general.alignment"), 6u32.to_le_bytes().to_vec()].concat(),
            "general.alignment is a number, expected an integer",
        ),
        (
            [text("general.alignment"), 4u32.to_le_bytes().to_vec()].concat(),
            [text("general.alignment"), 77u32.to_le_bytes().to_vec()].concat(),
            "general.alignment is of type 77",
        ),
        (
            [text("general.alignment"), vec![4, 0, 0, 0, 32]].concat(),
            [text("general.alignment"), vec![4, 0, 0, 0, 0]].concat(),
            "general.alignment is 0, expected a power of two",
        ),
        (text("general.file_type"), text("general.alignment"), "general.alignment is there twice"),
        (b"\"head_dim\":8".to_vec(), b"\"head_dim\":x".to_vec(), "vesper.config: "),
        (b"\"head_dim\":8".to_vec(), b"\"head_dim\":7".to_vec(), "head_dim is 7, expected an even number"),
        (b"\"head_dim\":8".to_vec(), b"\"head_din\":8".to_vec(), "head_din"),
        (b"\"head_dim\":8".to_vec(), b"\"head_dim\":6".to_vec(), "has shape"),
        (
            b"\"max_position_embeddings\":64,\"rms_norm_eps\":1e-6".to_vec(),
            b"\"max_position_embeddings\":2000000,\"rms_norm_eps\":1".to_vec(),
            "max_position_embeddings is 2000000, expected from 1 to 2^20",
        ),
        (
            b"\"num_hidden_layers\":1".to_vec(),
            b"\"num_hidden_layers\":2".to_vec(),
            "no tensor blk.1.attn_norm.weight",
        ),
        (b"\"temperature\":0.8".to_vec(), b"\"temperature\":-.8".to_vec(), "vesper.generation_config"),
    ] {
        let mut changed = replace(&bytes, &from, &to);
        if to.len() != from.len() {
            // The text became longer: its length, and the tensors' place.
            let config = text_at(&bytes, "vesper.config");
            let length = u64::from_le_bytes(changed[config..config + 8].try_into().unwrap());
            let longer = length + to.len() as u64 - from.len() as u64;
            changed[config..config + 8].copy_from_slice(&longer.to_le_bytes());
        }
        let message = error(&changed);
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
}

/// Where the length of the text of a key stands.
fn text_at(bytes: &[u8], key: &str) -> usize {
    let key = text(key);
    (0..bytes.len()).find(|&i| bytes[i..].starts_with(&key)).unwrap() + key.len() + 4
}

#[test]
fn wrong_tensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = good(dir.path(), Activation::default());
    let name = text("blk.0.ffn_down.weight");
    let at = (0..bytes.len()).find(|&i| bytes[i..].starts_with(&name)).unwrap() + name.len();
    let put = |offset: usize, value: &[u8]| {
        let mut changed = bytes.clone();
        changed[at + offset..at + offset + value.len()].copy_from_slice(value);
        error(&changed)
    };
    // After the name: dimensions (4), sizes (8 and 8), type (4), offset (8).
    for (offset, value, expected) in [
        (0, 0u64.to_le_bytes()[..4].to_vec(), "has 0 dimensions"),
        (0, 5u64.to_le_bytes()[..4].to_vec(), "has 5 dimensions"),
        (0, u64::MAX.to_le_bytes()[..4].to_vec(), "has 4294967295 dimensions"),
        (4, 0u64.to_le_bytes().to_vec(), "expected sizes from 1"),
        (4, u64::MAX.to_le_bytes().to_vec(), "expected sizes from 1"),
        (4, 33u64.to_le_bytes().to_vec(), "f16"),
        (12, 16u64.to_le_bytes().to_vec(), "has shape [16, 48], expected [32, 48]"),
        (12, (1u64 << 30).to_le_bytes().to_vec(), "truncated"),
        (20, 99u64.to_le_bytes()[..4].to_vec(), "is of type 99, expected 0 (f32)"),
        (20, 8u64.to_le_bytes()[..4].to_vec(), "rows of 48 in q8_0, expected a multiple of its blocks of 32"),
        (24, 1u64.to_le_bytes().to_vec(), "expected a multiple of 32"),
        (24, (1u64 << 40).to_le_bytes().to_vec(), "truncated"),
        (24, u64::MAX.to_le_bytes().to_vec(), "truncated"),
        (24, 0u64.to_le_bytes().to_vec(), "lie over each other"),
    ] {
        let message = put(offset, &value);
        let named = message.contains("blk.0.ffn_down.weight");
        assert!(named && (message.contains(expected) || expected == "f16"), "{message}\nexpected {expected}");
    }
    // Missing, extra, twice.
    let other = text("blk.0.ffn_dowm.weight");
    assert!(error(&replace(&bytes, &name, &other)).contains("no tensor blk.0.ffn_down.weight"));
    let twice = replace(&bytes, &text("blk.0.ffn_norm.weight"), &text("blk.0.ffn_nor.weight\0"));
    assert!(error(&twice).contains("no tensor blk.0.ffn_norm.weight"));
    let mut more = bytes.clone();
    let count = u64::from_le_bytes(more[8..16].try_into().unwrap());
    more[8..16].copy_from_slice(&(count - 1).to_le_bytes());
    assert!(error(&more).contains("no tensor"), "the last tensor is not listed any more");
}

#[test]
fn a_tensor_that_the_model_does_not_have_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut config = config(32, false, Activation::Silu);
    config.num_hidden_layers = 1;
    save(&path, &model(&config), &GgufExtras::default()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let from = b"\"tie_word_embeddings\":false";
    let to = b"\"tie_word_embeddings\":true ";
    let message = error(&replace(&bytes, from, to));
    assert!(message.contains("the model has no output.weight"), "{message}");
    let other = replace(&bytes, &text("llama"), &text("gpt2x"));
    let message = error(&other);
    assert!(message.contains("general.architecture is gpt2x, expected vesper or llama"), "{message}");
}
