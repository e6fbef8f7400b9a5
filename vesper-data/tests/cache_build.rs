//! A cache is built once, goes on after an interruption, and is made anew when what it was made from changes.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use vesper_data::cache::{BuildPhase, RebuildReason};
use vesper_data::source::BrokenRecords;
use vesper_data::{
    BuildProgress, CacheBuilder, CacheKey, CacheStatus, DataError, Encoded, ReadReport, ReadSettings, Result,
    Sources, TextTokenizer, TokenCache,
};

struct Project {
    folder: tempfile::TempDir,
    files: Vec<PathBuf>,
}

impl Project {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = vec![folder.path().join("a.txt"), folder.path().join("b.txt")];
        let project = Self { folder, files };
        project.write(0, "one two");
        project.write(1, "three<|endoftext|>four");
        project
    }

    /// A file that is old enough for its time to vouch for it.
    fn write(&self, file: usize, text: impl AsRef<[u8]>) {
        std::fs::write(&self.files[file], text).unwrap();
        self.touch(file, 1000);
    }

    fn touch(&self, file: usize, seconds_ago: u64) {
        let time = SystemTime::now() - Duration::from_secs(seconds_ago);
        std::fs::File::options().append(true).open(&self.files[file]).unwrap().set_modified(time).unwrap();
    }

    fn sources(&self) -> Sources {
        Sources::new(self.files.clone())
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn open(&self, tokenizer: &TextTokenizer) -> Result<(TokenCache, CacheStatus)> {
        TokenCache::open_or_build(self.dir(), &self.sources(), tokenizer)
    }

    /// The only cache.
    fn cache(&self) -> PathBuf {
        let mut caches: Vec<PathBuf> =
            std::fs::read_dir(self.dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(caches.len(), 1);
        caches.remove(0)
    }
}

/// The files of a cache with their bytes, without the lock.
fn contents(cache: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .filter(|(name, _)| name != "build.lock")
        .collect()
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

    // Same length, another time; then the same bytes with another time.
    std::fs::write(&project.files[0], "one TWO").unwrap();
    let changed = status(&second);
    assert_eq!(changed, CacheStatus::Rebuilt(RebuildReason::SourcesChanged(Some(project.files[0].clone()))));
    let named = format!("rebuilt, since the data changed ({})", project.files[0].display());
    assert_eq!(changed.to_string(), named);
    std::fs::write(&project.files[0], "one TWO").unwrap();
    let (cache, again) = project.open(&second).unwrap();
    assert_eq!(again, CacheStatus::Reused);
    assert_eq!((cache.document_count(), cache.text_bytes()), (3, 16));
    let texts: Vec<String> = cache
        .tokens()
        .to_vec()
        .unwrap()
        .split(|&id| Some(id) == second.eos_id())
        .map(|ids| second.decode(ids).unwrap())
        .collect();
    assert_eq!(texts, ["one TWO", "three", "four", ""]);
    drop(cache);

    project.write(1, "five");
    let file = Some(project.files[1].clone());
    assert_eq!(status(&first), CacheStatus::Rebuilt(RebuildReason::SourcesAndTokenizerChanged(file)));
    assert_eq!(contents(&project.cache()).len(), 2, "a manifest and a shard");
}

#[test]
fn a_file_that_was_just_written_is_read_again_until_its_time_is_of_use() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    // A change right after the build may leave length and time as they were.
    let now = SystemTime::now();
    let set = |text: &str| {
        std::fs::write(&project.files[0], text).unwrap();
        std::fs::File::options().append(true).open(&project.files[0]).unwrap().set_modified(now).unwrap();
    };
    set("one two");
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Built);
    set("two one");
    let file = Some(project.files[0].clone());
    assert_eq!(
        project.open(&tokenizer).unwrap().1,
        CacheStatus::Rebuilt(RebuildReason::SourcesChanged(file))
    );
    // Read once more, then known by its time.
    project.touch(0, 500);
    let before = contents(&project.cache());
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Reused);
    let after = contents(&project.cache());
    assert_ne!(before["manifest.bin"], after["manifest.bin"]);
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Reused);
    assert_eq!(contents(&project.cache()), after);
}

/// What is not noticed, as the documentation says: it also shows that the sources' bytes are not read.
#[test]
fn a_change_that_keeps_length_and_time_is_not_seen() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    project.open(&tokenizer).unwrap();
    let time = std::fs::metadata(&project.files[0]).unwrap().modified().unwrap();
    std::fs::write(&project.files[0], "two one").unwrap();
    std::fs::File::options().append(true).open(&project.files[0]).unwrap().set_modified(time).unwrap();
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Reused);
}

#[test]
fn a_source_that_is_renamed_counts_as_the_same_and_one_that_is_added_does_not() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    let folder = project.folder.path().join("texts");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("a.txt"), "one").unwrap();
    let status = || TokenCache::open_or_build(project.dir(), &Sources::new([&folder]), &tokenizer).unwrap().1;
    assert_eq!(status(), CacheStatus::Built);
    std::fs::rename(folder.join("a.txt"), folder.join("b.txt")).unwrap();
    assert_eq!(status(), CacheStatus::Reused);
    std::fs::write(folder.join("c.txt"), "two").unwrap();
    let of = |name| CacheStatus::Rebuilt(RebuildReason::SourcesChanged(Some(folder.join(name))));
    assert_eq!(status(), of("c.txt")); // new
    std::fs::remove_file(folder.join("b.txt")).unwrap();
    assert_eq!(status(), of("b.txt")); // gone
}

#[test]
fn a_damaged_cache_is_reported_and_left_alone_until_it_is_deleted() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    drop(project.open(&tokenizer).unwrap());
    let cache = project.cache();
    for (name, bytes) in contents(&cache) {
        let file = cache.join(&name);
        for damaged in [&bytes[..bytes.len() - 1], &bytes[..50], b""] {
            std::fs::write(&file, damaged).unwrap();
            let message = project.open(&tokenizer).unwrap_err().to_string();
            assert!(message.contains(file.to_str().unwrap()), "{message}");
            assert!(message.contains(&format!("delete {} to have it rebuilt", cache.display())), "{message}");
            assert_eq!(std::fs::read(&file).unwrap(), damaged);
        }
        std::fs::write(&file, bytes).unwrap();
    }
    std::fs::remove_dir_all(&cache).unwrap();
    assert_eq!(project.open(&tokenizer).unwrap().1, CacheStatus::Built);
}

#[test]
fn an_error_in_a_source_leaves_no_cache() {
    let project = Project::new();
    project.write(1, b"\xFF");
    assert!(matches!(project.open(&tokenizer("one")), Err(DataError::InvalidUtf8 { .. })));
    assert!(contents(&project.cache()).is_empty());
}

#[test]
fn a_source_that_changes_while_it_is_tokenised_is_named_and_leaves_no_cache() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    let builder = CacheBuilder::new().with_shard_tokens(4).on_progress(|progress| {
        if progress.documents == 1 {
            project.write(1, "three<|endoftext|>FOUR");
            project.touch(1, 50);
        }
        ControlFlow::Continue(())
    });
    let error = builder.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap_err();
    assert!(error.to_string().contains("b.txt changed while it was read"), "{error}");
    assert!(!project.cache().join("manifest.bin").exists());
}

/// Documents of a few files.
fn many(project: &Project) {
    let text = |start: usize| {
        let documents: Vec<String> =
            (start..start + 40).map(|n| format!("document {n} has its words")).collect();
        documents.join("<|endoftext|>")
    };
    project.write(0, text(0));
    project.write(1, text(40));
}

fn stop_after(documents: u64) -> impl FnMut(&BuildProgress) -> ControlFlow<()> {
    move |progress| {
        if progress.phase == BuildPhase::Tokenizing && progress.documents > documents {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

fn builder<'a>() -> CacheBuilder<'a> {
    CacheBuilder::new().with_shard_tokens(100)
}

#[test]
fn an_interrupted_build_goes_on_and_ends_like_one_that_was_not() {
    let project = Project::new();
    many(&project);
    let tokenizer = tokenizer("document has its words document has its words");
    let whole = project.folder.path().join("whole");
    let (cache, _) = builder().open_or_build(&whole, &project.sources(), &tokenizer).unwrap();
    assert!(cache.shards().len() > 5);
    let name = cache.path().file_name().unwrap().to_owned();

    let mut kept = 0;
    for stop in [20, 21, 55, 79] {
        let stopped = builder().on_progress(stop_after(stop));
        let error = stopped.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap_err();
        assert!(
            matches!(error, DataError::Interrupted { documents, .. } if documents == stop + 1),
            "{error}"
        );
        assert!(
            error.to_string().contains("it goes on after the last of its shards that are finished"),
            "{error}"
        );
        let files = contents(&project.cache());
        assert!(!files.contains_key("manifest.bin") && files.len() >= kept, "{:?}", files.keys());
        assert!(files.keys().all(|name| name.contains(".shard")), "no temporary file: {:?}", files.keys());
        kept = files.len();
    }
    let mut tokenized = Vec::new();
    let mut phases = Vec::new();
    let last = builder().on_progress(|progress| {
        if progress.phase == BuildPhase::Tokenizing {
            tokenized.push(progress.documents);
        }
        phases.push(progress.phase);
        ControlFlow::Continue(())
    });
    let (cache, status) = last.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap();
    assert_eq!(status, CacheStatus::Continued);
    assert!(tokenized.len() < 10 && tokenized.last() == Some(&80), "{tokenized:?}");
    phases.dedup();
    assert_eq!(phases, [BuildPhase::Verifying, BuildPhase::Skipping, BuildPhase::Tokenizing]);
    assert_eq!(contents(cache.path()), contents(&whole.join(name)));
}

#[test]
fn a_part_that_is_damaged_is_built_again_and_one_of_something_else_is_not_used() {
    let project = Project::new();
    many(&project);
    let (first, second) = (tokenizer("document has its words"), tokenizer("words its has document words"));
    let whole = project.folder.path().join("whole");
    builder().open_or_build(&whole, &project.sources(), &first).unwrap();
    let interrupt = |tokenizer: &TextTokenizer| {
        let stopped = builder().on_progress(stop_after(60));
        assert!(stopped.open_or_build(project.dir(), &project.sources(), tokenizer).is_err());
    };
    interrupt(&first);
    // A flipped bit in the third shard: the first two are kept.
    let shards: Vec<String> = contents(&project.cache()).into_keys().collect();
    let file = project.cache().join(&shards[2]);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[260] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    let mut begun = None;
    let last = builder().on_progress(|progress| {
        if progress.phase == BuildPhase::Tokenizing {
            begun.get_or_insert(progress.documents);
        }
        ControlFlow::Continue(())
    });
    let (cache, status) = last.open_or_build(project.dir(), &project.sources(), &first).unwrap();
    assert_eq!(status, CacheStatus::Continued);
    assert!(begun.is_some_and(|document| (3..60).contains(&document)), "{begun:?}");
    assert_eq!(contents(cache.path()), contents(&whole.join(cache.path().file_name().unwrap())));
    drop(cache);

    // Parts of another tokenizer, of other text and of shards of another size are not gone on with.
    std::fs::remove_dir_all(project.dir()).unwrap();
    interrupt(&first);
    let (cache, status) = builder().open_or_build(project.dir(), &project.sources(), &second).unwrap();
    assert_eq!((status, cache.document_count()), (CacheStatus::Built, 80));
    let shards = cache.shards().len();
    assert_eq!(contents(cache.path()).len(), shards + 1, "nothing is left of the other part");
    drop(cache);
    std::fs::remove_dir_all(project.dir()).unwrap();
    interrupt(&first);
    project.write(1, "other text");
    let (_, status) = builder().open_or_build(project.dir(), &project.sources(), &first).unwrap();
    assert_eq!(status, CacheStatus::Built);
    std::fs::remove_dir_all(project.dir()).unwrap();
    many(&project);
    interrupt(&first);
    let (_, status) = project.open(&first).unwrap();
    assert_eq!(status, CacheStatus::Built);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_build_of_ids_stopped_anywhere_ends_like_one_that_was_not(
        lengths in prop::collection::vec(0..30_usize, 1..40),
        stops in prop::collection::vec(0..40_usize, 0..4),
        shard_tokens in 1..100_u64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        let key = CacheKey { content: [1; 32], tokenizer: [2; 32], vocab_size: 50 };
        let documents = || lengths.iter().enumerate().map(|(n, &len)| {
            let loss = (n % 3 == 0).then(|| vec![len / 2..len, len..len]);
            Ok(Encoded { ids: vec![n as u32; len], unknown: n as u64, loss })
        });
        let builder = || CacheBuilder::new().with_shard_tokens(shard_tokens);
        builder().build(&whole, key, documents()).unwrap();
        for stop in stops {
            // An error, as a source or a disk gives it.
            let failing = documents().take(stop).chain([Err(DataError::NoSources)]);
            let failed = builder().build(&parts, key, failing);
            let expected = matches!(failed, Err(DataError::NoSources | DataError::SourceChanged { .. }));
            prop_assert!(expected, "{:?}", failed.map(|_| ()));
        }
        builder().build(&parts, key, documents()).unwrap();
        prop_assert_eq!(contents(&parts), contents(&whole));
    }
}

#[test]
fn documents_that_are_gone_when_a_build_goes_on_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let key = CacheKey { content: [1; 32], tokenizer: [2; 32], vocab_size: 50 };
    let builder = || CacheBuilder::new().with_shard_tokens(2);
    let three = [Ok(vec![1, 2]), Ok(vec![3, 4]), Ok(vec![5]), Err(DataError::NoSources)];
    assert!(builder().build(folder.path(), key, three).is_err());
    let one = [Ok(vec![1, 2])];
    assert!(matches!(builder().build(folder.path(), key, one), Err(DataError::SourceChanged { .. })));
}

#[test]
fn progress_counts_documents_tokens_and_bytes() {
    let project = Project::new();
    let tokenizer = tokenizer("one one");
    let mut seen = Vec::new();
    let builder = CacheBuilder::new().on_progress(|progress| {
        seen.push(*progress);
        ControlFlow::Continue(())
    });
    let (cache, _) = builder.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.documents, last.tokens, last.bytes), (3, cache.len() as u64, 16));
    assert_eq!(last.source_bytes, 29);
    assert!(seen.is_sorted_by_key(|progress| (progress.documents, progress.tokens)));
    // A cache that is there is opened without a word.
    let builder = CacheBuilder::new().on_progress(|_| ControlFlow::Break(()));
    assert!(builder.open_or_build(project.dir(), &project.sources(), &tokenizer).is_ok());
}

/// Runs a test of this file in a process of its own, with `VESPER_CHILD` set to `what`.
fn child(test: &str, what: &Path) -> std::process::Child {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("VESPER_CHILD", what)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

fn texts(folder: &Path) -> Sources {
    Sources::new([folder.join("a.txt"), folder.join("b.txt")])
}

/// Waits for a file that another process makes, as long as `alive` says that it may come.
fn wait_for(path: &Path, mut alive: impl FnMut() -> bool) {
    while !path.exists() {
        assert!(alive(), "{} will not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn lives(child: &mut std::process::Child) -> bool {
    child.try_wait().unwrap().is_none()
}

/// Not a test by itself: the process that builds until it is told to go on, or is killed.
#[test]
fn child_that_builds_and_waits() {
    let Some(folder) = std::env::var_os("VESPER_CHILD").map(PathBuf::from) else { return };
    let stop = builder().on_progress(|progress| {
        if progress.phase == BuildPhase::Tokenizing && progress.documents == 50 {
            std::fs::write(folder.join("ready"), "").unwrap();
            // Until the other process goes on, or takes its folder away.
            wait_for(&folder.join("go"), || folder.exists());
        }
        ControlFlow::Continue(())
    });
    let tokenizer = tokenizer("document has its words");
    let (_, status) = stop.open_or_build(folder.join("cache"), &texts(&folder), &tokenizer).unwrap();
    std::fs::write(folder.join("done"), status.to_string()).unwrap();
}

#[test]
fn a_second_process_waits_for_the_first_and_uses_its_cache() {
    let project = Project::new();
    many(&project);
    let folder = project.folder.path();
    let mut first = child("child_that_builds_and_waits", folder);
    wait_for(&folder.join("ready"), || lives(&mut first));
    let tokenizer = tokenizer("document has its words");
    // It can give up, and it can wait.
    let impatient = builder().on_progress(|progress| {
        assert_eq!(progress.phase, BuildPhase::Waiting);
        ControlFlow::Break(())
    });
    let gave_up = impatient.open_or_build(project.dir(), &project.sources(), &tokenizer);
    assert!(matches!(gave_up, Err(DataError::Interrupted { documents: 0, .. })));
    let mut phases = Vec::new();
    let patient = builder().on_progress(|progress| {
        phases.push(progress.phase);
        std::fs::write(folder.join("go"), "").unwrap();
        ControlFlow::Continue(())
    });
    let (cache, status) = patient.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap();
    assert_eq!(status, CacheStatus::Reused);
    phases.dedup();
    assert_eq!(phases, [BuildPhase::Waiting]);
    assert!(first.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(folder.join("done")).unwrap(), "built");
    cache.verify().unwrap();
    assert_eq!(cache.document_count(), 80);
}

#[test]
fn a_process_that_was_killed_leaves_a_part_that_the_next_goes_on_with() {
    let project = Project::new();
    many(&project);
    let folder = project.folder.path();
    let mut killed = child("child_that_builds_and_waits", folder);
    wait_for(&folder.join("ready"), || lives(&mut killed));
    killed.kill().unwrap(); // SIGKILL on Unix: no destructor runs
    killed.wait().unwrap();
    let left = contents(&project.cache());
    assert!(left.keys().any(|name| name.starts_with(".vesper-")), "{:?}", left.keys());
    // Its lock is gone with it; its shards are used and its temporary file is removed.
    let tokenizer = tokenizer("document has its words");
    let go_on = builder().on_progress(|progress| {
        assert_ne!(progress.phase, BuildPhase::Waiting);
        ControlFlow::Continue(())
    });
    let (cache, status) = go_on.open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap();
    assert_eq!(status, CacheStatus::Continued);
    let whole = folder.join("whole");
    let (other, _) = builder().open_or_build(&whole, &project.sources(), &tokenizer).unwrap();
    assert_eq!(contents(cache.path()), contents(other.path()));
}

#[test]
fn threads_that_build_the_same_cache_at_once_all_get_it() {
    let project = Project::new();
    many(&project);
    let tokenizer = tokenizer("document has its words");
    let opened: Vec<(Vec<u32>, CacheStatus)> = std::thread::scope(|scope| {
        let open = || {
            let (cache, status) =
                builder().open_or_build(project.dir(), &project.sources(), &tokenizer).unwrap();
            (cache.tokens().to_vec().unwrap(), status)
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(opened.iter().all(|(tokens, _)| *tokens == opened[0].0));
    assert_eq!(opened.iter().filter(|(_, status)| *status == CacheStatus::Built).count(), 1);
    assert_eq!(opened.iter().filter(|(_, status)| *status == CacheStatus::Reused).count(), 5);
}

#[test]
fn what_was_counted_while_the_text_was_read_is_in_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let squad = r#"{"data": [{"paragraphs": [{"context": "L'été finit.", "qas": [
        {"id": "1", "question": "Quoi ?", "answers": [{"text": "L'été", "answer_start": 3}]},
        {"id": "2", "question": "Qui ?", "answers": [], "is_impossible": true}]}]}]}"#;
    std::fs::write(path("a.json"), squad).unwrap();
    std::fs::write(path("b.jsonl"), "{\"text\": \"été\"}\nnonsense\n{\"text\": \"fin\"}\n").unwrap();
    let settings = ReadSettings::default().with_broken(BrokenRecords::AtMost(5));
    let sources = Sources::new([path("a.json"), path("b.jsonl")]).with_settings(settings);
    let texts: Vec<String> = sources.documents().unwrap().map(|document| document.unwrap().text).collect();
    let tokenizer = TextTokenizer::train_bpe(texts.iter().map(Ok), 300).unwrap();
    let report = ReadReport::default();
    let open = |stop: bool| {
        let mut left = if stop { 2 } else { u64::MAX };
        let builder =
            CacheBuilder::new().with_shard_tokens(1).with_report(report.clone()).on_progress(|_| {
                left -= 1;
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        builder.open_or_build(path("cache"), &sources, &tokenizer)
    };
    // A build that goes on counts everything once, whatever the report had counted before.
    assert!(matches!(open(true), Err(DataError::Interrupted { .. })));
    let (built, _) = open(false).unwrap();
    let read = report.documents();
    let (reused, status) = open(false).unwrap();
    assert_eq!((status, report.documents()), (CacheStatus::Reused, read));
    for cache in [built, reused] {
        let counts = cache.text_counts();
        assert_eq!(cache.document_count(), texts.len());
        assert_eq!(counts.bytes, texts.iter().map(|text| text.len() as u64).sum::<u64>());
        assert_eq!(counts.characters, texts.iter().map(|text| text.chars().count() as u64).sum::<u64>());
        assert_eq!((counts.questions, counts.impossible, counts.wrong_offsets), (2, 1, 1));
        assert_eq!((counts.skipped, cache.skipped_records(), cache.text_bytes()), (1, 1, counts.bytes));
    }
    assert!(report.messages()[0].ends_with("b.jsonl, line 2: invalid JSON at column 2: expected ident"));
}
