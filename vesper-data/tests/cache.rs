//! The cache gives back what was put in, or says what is wrong.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vesper_data::cache::RebuildReason;
use vesper_data::{CacheKey, CacheStatus, DataError, Encoded, Result, TextTokenizer, TokenCache};

fn key(vocab_size: u64) -> CacheKey {
    CacheKey { content: [7; 32], tokenizer: [8; 32], vocab_size }
}

fn build(path: &Path, vocab_size: u64, documents: &[Vec<u32>]) -> Result<TokenCache> {
    TokenCache::build(path, key(vocab_size), documents.iter().cloned().map(Ok))
}

/// Opens a cache file with these bytes.
fn open_bytes(bytes: &[u8]) -> Result<TokenCache> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    std::fs::write(&path, bytes).unwrap();
    TokenCache::open(&path)
}

fn bytes_of(vocab_size: u64, documents: &[Vec<u32>]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    build(&path, vocab_size, documents).unwrap();
    std::fs::read(path).unwrap()
}

fn documents() -> impl Strategy<Value = (u64, Vec<Vec<u32>>)> {
    prop_oneof![Just(1_u64 << 16), Just(300), Just((1 << 16) + 1), Just(1 << 32)].prop_flat_map(
        |vocab_size| {
            let id = 0..=u32::try_from(vocab_size - 1).unwrap();
            let document = prop::collection::vec(id, 0..40);
            (Just(vocab_size), prop::collection::vec(document, 0..12))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_cache_gives_back_any_documents((vocab_size, documents) in documents(), start: prop::sample::Index, end: prop::sample::Index) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.bin");
        build(&path, vocab_size, &documents).unwrap();
        let cache = TokenCache::open(&path).unwrap();
        let all = documents.concat();
        let tokens = cache.tokens();
        prop_assert_eq!(cache.key(), key(vocab_size));
        prop_assert_eq!(cache.document_count(), documents.len());
        prop_assert_eq!(tokens.to_vec(), &all[..]);
        let (start, end) = (start.index(all.len() + 1), end.index(all.len() + 1));
        prop_assert_eq!(tokens.get(start..end), all.get(start..end).map(<[u32]>::to_vec));
        let ends: Vec<usize> = documents.iter().scan(0, |end, document| { *end += document.len(); Some(*end) }).collect();
        // Empty documents at the very start end where the stream begins: no boundary to cut at.
        let seen: Vec<usize> = tokens.document_ends().collect();
        prop_assert_eq!(seen, ends.into_iter().filter(|&end| end > 0).collect::<Vec<_>>());
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error((vocab_size, documents) in documents(), at: prop::sample::Index) {
        let bytes = bytes_of(vocab_size, &documents);
        let error = open_bytes(&bytes[..at.index(bytes.len())]).unwrap_err();
        let damaged = matches!(error, DataError::CacheDamaged { .. });
        prop_assert!(damaged, "{}", error);
        prop_assert!(error.to_string().contains("tokens.bin is damaged"));
    }

    #[test]
    fn a_byte_changed_anywhere_is_an_error(
        (vocab_size, documents) in documents(),
        at: prop::sample::Index,
        flip in 1..=255_u8,
    ) {
        let mut bytes = bytes_of(vocab_size, &documents);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let error = open_bytes(&bytes).unwrap_err();
        let of_version = matches!(error, DataError::CacheVersion { .. });
        prop_assert!(of_version == (8..12).contains(&at), "byte {}: {}", at, error);
    }

    #[test]
    fn bytes_added_at_the_end_are_an_error((vocab_size, documents) in documents(), extra in 1..100_usize) {
        let mut bytes = bytes_of(vocab_size, &documents);
        bytes.resize(bytes.len() + extra, 0);
        let damaged = matches!(open_bytes(&bytes), Err(DataError::CacheDamaged { .. }));
        prop_assert!(damaged);
    }
}

#[test]
fn every_single_byte_of_a_file_is_guarded() {
    let bytes = bytes_of(300, &[vec![1, 2, 3], vec![299]]);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(open_bytes(&damaged).is_err(), "byte {at}");
        assert!(open_bytes(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn messages_say_what_was_found_and_expected() {
    let message = |bytes: &[u8]| open_bytes(bytes).unwrap_err().to_string();
    let bytes = bytes_of(300, &[vec![1, 2, 3, 4, 5]]);
    assert_eq!(bytes.len(), 256 + 16 + 8);
    let ending = "): delete the file to have it rebuilt";
    for (bytes, expected) in [
        (&b""[..], "it has 0 bytes, expected at least a header of 256"),
        (&bytes[..100], "it has 100 bytes, expected at least a header of 256"),
        (&bytes[..270], "it has 270 bytes, expected 280"),
        (b"Once upon a time", "it starts with \"Once upo\", expected the mark \"VSPTOKEN\" of a token cache"),
    ] {
        let message = message(bytes);
        assert!(message.ends_with(&format!("tokens.bin is damaged ({expected}{ending}")), "{message}");
    }
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert!(message(&newer).contains("is a token cache of version 9, this program reads version 1"));
    let mut header = bytes.clone();
    header[20] ^= 1;
    assert!(message(&header).contains("the checksum of its header does not match"));
    let mut tokens = bytes;
    tokens[258] ^= 1;
    assert!(message(&tokens).contains("the checksum of its tokens does not match"));
}

#[test]
fn ids_outside_the_vocabulary_are_not_written_and_leave_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    let error = build(&path, 300, &[vec![1, 300]]).unwrap_err();
    assert_eq!(error.to_string(), "token id 300 is outside the vocabulary of 300 tokens");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_build_that_fails_keeps_the_file_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    drop(build(&path, 300, &[vec![1, 2]]).unwrap());
    let documents = [Ok(vec![5]), Err(DataError::NoSources)];
    assert!(matches!(TokenCache::build(&path, key(300), documents), Err(DataError::NoSources)));
    assert_eq!(TokenCache::open(&path).unwrap().tokens().to_vec(), [1, 2]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn unknown_tokens_are_counted_over_all_documents() {
    let folder = tempfile::tempdir().unwrap();
    let documents =
        [(vec![1], 2), (vec![], 3)].map(|(ids, unknown)| Ok(Encoded { ids, unknown, loss: None }));
    let cache = TokenCache::build(folder.path().join("tokens.bin"), key(300), documents).unwrap();
    assert_eq!((cache.unknown_tokens(), cache.len(), cache.is_empty()), (5, 1, false));
}

#[test]
fn a_folder_in_the_place_of_the_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert!(TokenCache::open(folder.path()).is_err());
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(build(&file.join("tokens.bin"), 300, &[]), Err(DataError::Io { .. })));
}

struct Project {
    folder: tempfile::TempDir,
    sources: Vec<PathBuf>,
}

impl Project {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sources = vec![folder.path().join("a.txt"), folder.path().join("b.txt")];
        std::fs::write(&sources[0], "one two").unwrap();
        std::fs::write(&sources[1], "three<|endoftext|>four").unwrap();
        Self { folder, sources }
    }

    fn open(&self, tokenizer: &TextTokenizer) -> Result<(TokenCache, CacheStatus)> {
        TokenCache::open_or_build(self.folder.path().join("cache"), &self.sources, tokenizer)
    }

    fn cache_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path().join("cache")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn tokenizer(text: &str) -> TextTokenizer {
    TextTokenizer::train_bpe([Ok(text)], 300).unwrap()
}

#[test]
fn a_cache_is_built_reused_and_rebuilt_when_its_sources_or_tokenizer_change() {
    let project = Project::new();
    let (first, second) = (tokenizer("one one two two"), tokenizer("four four three three"));
    let status = |tokenizer: &TextTokenizer| project.open(tokenizer).unwrap().1;
    assert_eq!(status(&first), CacheStatus::Built);
    assert_eq!(status(&first), CacheStatus::Reused);
    assert_eq!(status(&second), CacheStatus::Rebuilt(RebuildReason::TokenizerChanged));
    assert_eq!(status(&second), CacheStatus::Reused);

    // Same length, and the time of the change does not count.
    std::fs::write(&project.sources[0], "one TWO").unwrap();
    assert_eq!(status(&second), CacheStatus::Rebuilt(RebuildReason::SourcesChanged));
    std::fs::write(&project.sources[0], "one TWO").unwrap();
    let (cache, again) = project.open(&second).unwrap();
    assert_eq!(again, CacheStatus::Reused);
    assert_eq!(cache.document_count(), 3);
    let texts: Vec<String> = cache
        .tokens()
        .to_vec()
        .split(|&id| Some(id) == second.eos_id())
        .map(|ids| second.decode(ids).unwrap())
        .collect();
    assert_eq!(texts, ["one TWO", "three", "four", ""]);
    drop(cache);

    std::fs::write(&project.sources[1], "five").unwrap();
    assert_eq!(status(&first), CacheStatus::Rebuilt(RebuildReason::SourcesAndTokenizerChanged));
    assert_eq!(project.cache_files().len(), 1);
}

#[test]
fn a_damaged_cache_is_reported_and_left_alone_until_it_is_deleted() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    drop(project.open(&tokenizer).unwrap());
    let file = project.cache_files().remove(0);
    let bytes = std::fs::read(&file).unwrap();
    for damaged in [&bytes[..bytes.len() - 1], &bytes[..50], b""] {
        std::fs::write(&file, damaged).unwrap();
        let error = project.open(&tokenizer).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(file.to_str().unwrap()) && message.contains("delete the file"), "{message}");
        assert_eq!(std::fs::read(&file).unwrap(), damaged);
    }
    let mut flipped = bytes;
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&file, flipped).unwrap();
    assert!(matches!(project.open(&tokenizer), Err(DataError::CacheDamaged { .. })));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Built);
}

#[test]
fn an_error_in_a_source_leaves_no_cache() {
    let project = Project::new();
    std::fs::write(&project.sources[1], b"\xFF").unwrap();
    assert!(matches!(project.open(&tokenizer("one")), Err(DataError::InvalidUtf8 { .. })));
    assert!(project.cache_files().is_empty());
}
