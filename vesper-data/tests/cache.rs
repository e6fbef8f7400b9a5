//! The cache gives back what was put in, or says what is wrong.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vesper_data::{CacheBuilder, CacheKey, DataError, Encoded, Result, TokenCache};

fn key(vocab_size: u64) -> CacheKey {
    CacheKey { content: [7; 32], tokenizer: [8; 32], vocab_size }
}

type Loss = Option<Vec<Range<usize>>>;

/// Documents with or without ranges that the loss is taken over.
type Documents = Vec<(Vec<u32>, Loss)>;

fn plain(documents: &[Vec<u32>]) -> Documents {
    documents.iter().map(|ids| (ids.clone(), None)).collect()
}

fn encoded(documents: &Documents) -> impl Iterator<Item = Result<Encoded>> + '_ {
    documents.iter().map(|(ids, loss)| Ok(Encoded { ids: ids.clone(), unknown: 1, loss: loss.clone() }))
}

fn build(path: &Path, vocab_size: u64, shard_tokens: u64, documents: &Documents) -> Result<TokenCache> {
    CacheBuilder::new().with_shard_tokens(shard_tokens).build(path, key(vocab_size), encoded(documents))
}

/// All files of a cache.
fn files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension != "lock"))
        .collect();
    files.sort();
    files
}

/// Everything that a cache holds: ids, documents, ranges without loss.
type Content = (Vec<u32>, Vec<Range<usize>>, Vec<Range<usize>>);

fn read(path: &Path) -> Result<Content> {
    let tokens = TokenCache::open(path)?.tokens();
    let documents = tokens.documents().collect::<Result<_>>()?;
    let mut ignored = Vec::new();
    tokens.for_each_ignored(0..tokens.len(), |range| ignored.push(range))?;
    Ok((tokens.to_vec()?, documents, ignored))
}

/// What should be read.
fn expected(documents: &Documents) -> Content {
    let mut ids: Vec<u32> = Vec::new();
    let (mut ranges, mut ignored) = (Vec::new(), Vec::new());
    for (document, loss) in documents {
        let start = ids.len();
        ids.extend(document);
        ranges.push(start..ids.len());
        if let Some(loss) = loss {
            let counts = |position: usize| loss.iter().any(|range| range.contains(&(position - start)));
            ignored.extend((start..ids.len()).filter(|&position| !counts(position)));
        }
    }
    // One range a position, to be compared with ranges of any length.
    (ids, ranges, ignored.into_iter().map(|position| position..position + 1).collect())
}

fn positions(ranges: &[Range<usize>]) -> Vec<usize> {
    ranges.iter().cloned().flatten().collect()
}

fn documents() -> impl Strategy<Value = (u64, u64, Documents)> {
    let vocab = prop_oneof![Just(1_u64 << 16), Just(300), Just((1 << 16) + 1), Just(1 << 32)];
    (vocab, 1..60_u64).prop_flat_map(|(vocab_size, shard_tokens)| {
        let id = 0..=u32::try_from(vocab_size - 1).unwrap();
        let ids = prop::collection::vec(id, 0..40);
        let loss = prop::option::of((0..20_usize, 0..10_usize, 0..5_usize).prop_map(|(start, len, gap)| {
            let end = start + len;
            vec![start..end, end + gap..end + gap + len]
        }));
        let documents = prop::collection::vec((ids, loss), 0..12);
        (Just(vocab_size), Just(shard_tokens), documents)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_cache_gives_back_any_documents(
        (vocab_size, shard_tokens, documents) in documents(),
        start: prop::sample::Index,
        end: prop::sample::Index,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let cache = build(folder.path(), vocab_size, shard_tokens, &documents).unwrap();
        let (all, ranges, ignored) = expected(&documents);
        prop_assert_eq!(cache.key(), key(vocab_size));
        prop_assert_eq!(cache.document_count(), documents.len());
        prop_assert_eq!(cache.unknown_tokens(), documents.len() as u64);
        prop_assert_eq!(cache.has_ignored(), !ignored.is_empty());
        let (start, end) = (start.index(all.len() + 1), end.index(all.len() + 1));
        let part = cache.tokens().get(start..end);
        prop_assert_eq!(part.ok(), all.get(start..end).map(<[u32]>::to_vec));
        let mut within = Vec::new();
        if start <= end {
            cache.tokens().for_each_ignored(start..end, |range| within.push(range)).unwrap();
            let expected: Vec<usize> =
                positions(&ignored).into_iter().filter(|position| (start..end).contains(position)).collect();
            prop_assert_eq!(positions(&within), expected);
        }
        let read = read(folder.path()).unwrap();
        prop_assert_eq!(read.0, all);
        prop_assert_eq!(read.1, ranges);
        prop_assert_eq!(positions(&read.2), positions(&ignored));
        cache.verify().unwrap();

        // No shard but one of a single document is longer than asked for.
        for shard in cache.shards() {
            let bytes = std::fs::metadata(shard).unwrap().len();
            let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
            prop_assert!(bytes <= 256 + (shard_tokens.max(40) * width).next_multiple_of(8) + 16 * 12 + 16 * 36);
        }
    }

    /// Whatever is done to a file: the cache reads as it was, or says that it does not.
    #[test]
    fn a_changed_file_is_an_error_or_reads_the_same(
        (vocab_size, shard_tokens, documents) in documents(),
        which: prop::sample::Index,
        at: prop::sample::Index,
        flip in 1..=255_u8,
        change in 0..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        drop(build(folder.path(), vocab_size, shard_tokens, &documents).unwrap());
        let good = read(folder.path()).unwrap();
        let files = files(folder.path());
        let file = &files[which.index(files.len())];
        let mut bytes = std::fs::read(file).unwrap();
        let at = at.index(bytes.len());
        match change {
            0 => bytes[at] ^= flip,
            1 => bytes.truncate(at),
            2 => bytes.resize(bytes.len() + usize::from(flip), 0),
            // Bytes that moved.
            _ => bytes.rotate_left(1 + at),
        }
        let same = bytes == std::fs::read(file).unwrap();
        std::fs::write(file, bytes).unwrap();
        match read(folder.path()) {
            Ok(read) => prop_assert!(same && read == good),
            Err(DataError::CacheDamaged { path, .. } | DataError::CacheVersion { path, .. }) => prop_assert_eq!(&path, file),
            Err(other) => prop_assert!(false, "{}", other),
        }
        let verified = TokenCache::open(folder.path()).and_then(|cache| cache.verify());
        prop_assert_eq!(verified.is_ok(), same);
    }
}

fn sample() -> (tempfile::TempDir, Documents) {
    let folder = tempfile::tempdir().unwrap();
    let documents = vec![
        (vec![1, 2, 3], None),
        (vec![299, 5, 6, 7], Some(vec![2..3, 3..4])),
        (vec![8; 5], None),
        (vec![9], Some(vec![])),
    ];
    drop(build(folder.path(), 300, 8, &documents).unwrap());
    (folder, documents)
}

#[test]
fn every_single_byte_of_every_file_is_guarded() {
    let (folder, documents) = sample();
    let good = expected(&documents);
    assert_eq!(read(folder.path()).unwrap().0, good.0);
    assert_eq!(files(folder.path()).len(), 3, "a manifest and two shards");
    for file in files(folder.path()) {
        let bytes = std::fs::read(&file).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            for damaged in [&damaged, &bytes[..at]] {
                std::fs::write(&file, damaged).unwrap();
                let error = read(folder.path()).unwrap_err().to_string();
                assert!(error.contains(file.to_str().unwrap()), "byte {at} of {}: {error}", file.display());
            }
        }
        std::fs::write(&file, bytes).unwrap();
    }
    assert_eq!(read(folder.path()).unwrap().0, good.0);
}

type Change = fn(&mut Vec<u8>);

/// The message without the folder's own path.
fn message(folder: &Path, error: &DataError) -> String {
    error.to_string().replace(folder.to_str().unwrap(), "CACHE").replace('\\', "/")
}

#[test]
fn messages_name_the_file_and_say_what_was_found_and_expected() {
    let (folder, _) = sample();
    let folder = folder.path();
    let all = files(folder);
    let shard = all[1].file_name().unwrap().to_str().unwrap().to_owned();
    assert!(shard.ends_with("-00001.shard"), "{all:?}");
    let cases: [(usize, Change, &str); 8] = [
        (
            2,
            |bytes| bytes.clear(),
            "manifest.bin is damaged (it has 0 bytes, expected at least a header of 256)",
        ),
        (
            2,
            |bytes| *bytes = b"Once upon a time".to_vec(),
            "manifest.bin is damaged (it starts with \"Once upo\", expected the mark \"VSPTOKEN\" of a token cache)",
        ),
        (
            2,
            |bytes| bytes[8] = 9,
            "manifest.bin is of a token cache of version 9, this program reads version 3",
        ),
        (
            2,
            |bytes| bytes[30] ^= 1,
            "manifest.bin is damaged (the checksum of its header does not match: expected ",
        ),
        (
            2,
            |bytes| bytes[300] ^= 1,
            "manifest.bin is damaged (the checksum of its tables does not match: expected ",
        ),
        (1, |bytes| bytes.truncate(290), "SHARD is damaged (it has 290 bytes, expected 320)"),
        (
            1,
            |bytes| bytes[257] ^= 1,
            "SHARD is damaged (shard 1: the checksum of its ids does not match: expected ",
        ),
        (
            1,
            |bytes| bytes[275] ^= 1,
            "SHARD is damaged (shard 1: the checksum of its index does not match: expected ",
        ),
    ];
    for (file, change, expected) in cases {
        let good = std::fs::read(&all[file]).unwrap();
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&all[file], bytes).unwrap();
        let error = TokenCache::open(folder).and_then(|cache| cache.verify()).unwrap_err();
        let message = message(folder, &error);
        let expected = expected.replace("SHARD", &shard);
        assert!(message.starts_with(&format!("CACHE/{expected}")), "{message}");
        assert!(message.ends_with("delete CACHE to have it rebuilt"), "{message}");
        std::fs::write(&all[file], good).unwrap();
    }
    std::fs::remove_file(&all[1]).unwrap();
    let error = TokenCache::open(folder).unwrap_err();
    assert_eq!(
        message(folder, &error),
        format!("CACHE/{shard} is damaged (shard 1 of 2 is missing): delete CACHE to have it rebuilt")
    );
    std::fs::rename(&all[0], &all[1]).unwrap();
    assert!(TokenCache::open(folder).is_err());
    std::fs::copy(&all[1], &all[0]).unwrap();
    let error = TokenCache::open(folder).unwrap_err();
    assert!(
        message(folder, &error).contains("shard 0: it is not the one that the manifest names"),
        "{error}"
    );
}

#[test]
fn opening_reads_headers_and_a_damaged_shard_is_noticed_when_it_is_used() {
    let (folder, _) = sample();
    let shard = &files(folder.path())[1];
    let mut bytes = std::fs::read(shard).unwrap();
    bytes[256] ^= 1;
    std::fs::write(shard, bytes).unwrap();
    let cache = TokenCache::open(folder.path()).unwrap();
    let tokens = cache.tokens();
    // The other shard is good, and so is the index of this one.
    assert_eq!(tokens.get(0..7).unwrap(), [1, 2, 3, 299, 5, 6, 7]);
    assert_eq!(tokens.document(2).unwrap(), 7..12);
    for _ in 0..2 {
        assert!(matches!(tokens.get(6..8), Err(DataError::CacheDamaged { path, .. }) if path == *shard));
    }
    assert!(tokens.to_vec().is_err() && tokens.unigram_entropy().is_err() && tokens.max_id().is_err());
    assert!(cache.verify().is_err());
}

/// A file that was made wrong on purpose, with right checksums.
fn resealed(bytes: &mut [u8], digests: &[(usize, Range<usize>)]) {
    use sha2::{Digest, Sha256};
    for (at, range) in digests {
        let digest = Sha256::digest(&bytes[range.clone()]);
        bytes[*at..at + 32].copy_from_slice(&digest);
    }
}

#[test]
fn ids_and_indices_that_do_not_fit_are_noticed_behind_right_checksums() {
    // Shard 0 of seven ids: 256..270, padding to 272, two documents to 304, one range to 320.
    let cases: [(Change, &str); 6] = [
        (|bytes| bytes[257] = 0xFF, "it holds id 65281, expected ids below 300"),
        (|bytes| bytes[272] = 8, "document 0 ends at token 8, expected 0 to 7"),
        (|bytes| bytes[288] = 2, "document 1 ends at token 2, expected 3 to 7"),
        (|bytes| bytes[288] = 6, "its documents end at 6 of 7 tokens"),
        (|bytes| bytes[312] = 3, "range 0 without loss is 3..3, expected a part of 0..7"),
        (
            |bytes| bytes[312..320].fill(0xFF),
            "range 0 without loss is 3..18446744073709551615, expected a part of 0..7",
        ),
    ];
    for (change, expected) in cases {
        let (folder, _) = sample();
        let all = files(folder.path());
        let mut bytes = std::fs::read(&all[0]).unwrap();
        assert_eq!(bytes.len(), 320);
        change(&mut bytes);
        resealed(&mut bytes, &[(112, 256..272), (144, 272..320), (224, 0..224)]);
        std::fs::write(&all[0], &bytes).unwrap();
        // The manifest has the digest of the header.
        let mut manifest = std::fs::read(&all[2]).unwrap();
        let digest: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(&bytes[..256]).into();
        manifest[256 + 32..256 + 64].copy_from_slice(&digest);
        let end = manifest.len() - 32;
        resealed(&mut manifest, &[(end, 0..end)]);
        std::fs::write(&all[2], manifest).unwrap();

        let cache = TokenCache::open(folder.path()).unwrap();
        let message = cache.verify().unwrap_err().to_string();
        assert!(message.contains(&format!("(shard 0: {expected})")), "{message}");
        assert!(read(folder.path()).is_err());
    }
}

#[test]
fn ids_outside_the_vocabulary_are_not_written_and_leave_no_cache() {
    let folder = tempfile::tempdir().unwrap();
    let error = build(folder.path(), 300, 64, &plain(&[vec![1, 300]])).unwrap_err();
    assert_eq!(error.to_string(), "token id 300 is outside the vocabulary of 300 tokens");
    assert!(files(folder.path()).is_empty());
    assert!(matches!(TokenCache::open(folder.path()), Err(DataError::Missing { .. })));
}

#[test]
fn a_build_that_fails_keeps_the_cache_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    drop(build(folder.path(), 300, 64, &plain(&[vec![1, 2]])).unwrap());
    let other = CacheKey { content: [9; 32], ..key(300) };
    let documents = [Ok(vec![5]), Err(DataError::NoSources)];
    assert!(matches!(TokenCache::build(folder.path(), other, documents), Err(DataError::NoSources)));
    assert_eq!(read(folder.path()).unwrap().0, [1, 2]);
    assert_eq!(files(folder.path()).len(), 2);
    // And one that succeeds leaves nothing of it.
    TokenCache::build(folder.path(), other, [Ok(vec![5])]).unwrap();
    assert_eq!(read(folder.path()).unwrap().0, [5]);
    assert_eq!(files(folder.path()).len(), 2);
}

#[test]
fn other_files_in_the_folder_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["notes.shard", "0-00000.shard", "text.txt"] {
        std::fs::write(folder.path().join(name), "mine").unwrap();
    }
    std::fs::write(folder.path().join("0123456789abcdef-00000.shard"), "of another build").unwrap();
    std::fs::write(folder.path().join(".vesper-killed"), "of a build that was killed").unwrap();
    drop(build(folder.path(), 300, 64, &plain(&[vec![1, 2]])).unwrap());
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 3 + 2 + 1, "three of the user, a manifest, a shard and the lock");
}

#[test]
fn a_cache_of_the_first_version_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    let old = [b"VSPTOKEN".as_slice(), &1_u32.to_le_bytes(), &[0; 400]].concat();
    std::fs::write(&path, old).unwrap();
    let message = message(folder.path(), &TokenCache::open(&path).unwrap_err());
    assert_eq!(
        message,
        "CACHE/tokens.bin is of a token cache of version 1, this program reads version 3: \
         delete CACHE/tokens.bin to have it rebuilt"
    );
    std::fs::write(&path, "text").unwrap();
    let error = TokenCache::open(&path).unwrap_err();
    assert!(matches!(error, DataError::Unreadable { .. }));
    // It may be anything: no one is told to delete it.
    assert!(error.to_string().contains("cannot be read as a token cache: it has 4 bytes"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert!(TokenCache::open(folder.path()).is_err());
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(build(&file.join("tokens"), 300, 64, &plain(&[])), Err(DataError::Io { .. })));
    let none = CacheBuilder::new().with_shard_tokens(0).build(folder.path(), key(300), [Ok(vec![1])]);
    assert!(matches!(none, Err(DataError::Config { name: "shard_tokens", .. })));
}

#[test]
fn a_cache_without_documents_is_empty() {
    let folder = tempfile::tempdir().unwrap();
    let cache = build(folder.path(), 300, 64, &plain(&[])).unwrap();
    assert!(cache.is_empty() && cache.shards().len() == 0);
    assert_eq!(read(folder.path()).unwrap(), (vec![], vec![], vec![]));
    let only_empty = tempfile::tempdir().unwrap();
    drop(build(only_empty.path(), 300, 64, &plain(&[vec![], vec![]])).unwrap());
    assert_eq!(read(only_empty.path()).unwrap(), (vec![], vec![0..0, 0..0], vec![]));
}

/// The digests are those of `golden/cache_format.py`, which writes the files from the format's description and knows
/// nothing of this crate.
#[test]
fn the_bytes_are_those_of_the_description() {
    let narrow: Vec<(Vec<u32>, Loss, u64)> = vec![
        (vec![1, 2, 3], None, 2),
        (vec![299, 5, 6, 7], Some(vec![2..3, 3..4]), 4),
        (vec![], Some(vec![]), 0),
        (vec![8; 5], Some(vec![]), 0),
    ];
    let wide: Vec<(Vec<u32>, Loss, u64)> =
        vec![(vec![69_999, 1], None, 0), (vec![2, 3, 4], Some(vec![0..1, 1..3]), 0)];
    for (vocab_size, documents, expected) in [(300, narrow, GOLDEN_NARROW), (70_000, wide, GOLDEN_WIDE)] {
        let folder = tempfile::tempdir().unwrap();
        let key = CacheKey { content: [1; 32], tokenizer: [2; 32], vocab_size };
        let documents = documents.into_iter().map(|(ids, loss, unknown)| Ok(Encoded { ids, unknown, loss }));
        drop(TokenCache::build(folder.path(), key, documents).unwrap());
        let digests = files(folder.path()).into_iter().rev().map(|file| {
            use sha2::{Digest, Sha256};
            let digest = Sha256::digest(std::fs::read(file).unwrap());
            digest.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
        });
        assert_eq!(digests.collect::<Vec<_>>(), expected);
    }
}

const GOLDEN_NARROW: [&str; 2] = [
    "b19e56323fb1e6b4e6139b907131525114a7597db633fbd8561b75038439ab56",
    "8faabedadab869d2c197a06b75964753ab14ab1b7521444fd7b4ff525c8ee90a",
];
const GOLDEN_WIDE: [&str; 2] = [
    "12b8c8a8fc838d3637329a18898856724b87af0262ddd8c5679336e2446fa3bb",
    "4f3d9c17983bee5a769b593693d7e42a67af12ef2254d74a6b8f6890222227bb",
];
