//! Mixtures of sources.

use std::collections::HashMap;

use proptest::prelude::*;
use vesper_data::source::{BrokenRecords, WhenOut};
use vesper_data::{DataError, Document, Mixture, ReadSettings, Result, Sources};

use crate::folder;

/// Lines with a number and `bytes` bytes of text each.
fn lines(name: char, count: usize, bytes: usize) -> String {
    let line = |number| format!("{{\"text\": \"{name}{number:0>width$}\"}}\n", width = bytes - 1);
    (0..count).map(line).collect()
}

/// A folder with sources a (1000 documents of 100 bytes), b (500 of 1000) and c (100 of 20 000).
fn sources() -> (tempfile::TempDir, [Sources; 3]) {
    let files = [lines('a', 1000, 100), lines('b', 500, 1000), lines('c', 100, 20_000)];
    let folder = folder(&[
        ("a.jsonl", files[0].as_bytes()),
        ("b.jsonl", files[1].as_bytes()),
        ("c.jsonl", files[2].as_bytes()),
    ]);
    let sources = ["a.jsonl", "b.jsonl", "c.jsonl"].map(|name| Sources::new([folder.path().join(name)]));
    (folder, sources)
}

fn read(mixture: Mixture) -> Vec<Document> {
    Sources::from(mixture).documents().unwrap().map(Result::unwrap).collect()
}

/// The number of documents, and of bytes, of each source.
fn totals(documents: &[Document]) -> HashMap<char, (usize, usize)> {
    let mut totals = HashMap::new();
    for document in documents {
        let total = totals.entry(document.text.chars().next().unwrap()).or_insert((0, 0));
        total.0 += 1;
        total.1 += document.text.len();
    }
    totals
}

#[test]
fn each_source_gives_its_share_of_the_text_and_its_documents_in_order() {
    let (_folder, [a, b, c]) = sources();
    let documents = read(Mixture::new([(a, 1.0), (b, 2.0), (c, 7.0)]).with_seed(3));
    let totals = totals(&documents);
    let all: usize = totals.values().map(|(_, bytes)| bytes).sum();
    for (name, share) in [('a', 0.1), ('b', 0.2), ('c', 0.7)] {
        // Each within a document and the delay of 16 KiB of what it should have given.
        let found = totals[&name].1 as f64;
        assert!((found - share * all as f64).abs() < 40_000.0, "{name}: {found} of {all}");
        let own: Vec<&str> = documents
            .iter()
            .map(|document| document.text.as_str())
            .filter(|text| text.starts_with(name))
            .collect();
        assert!(own.is_sorted() && own[0].ends_with('0'));
    }
}

#[test]
fn the_same_seed_gives_the_same_order_and_another_one_another() {
    let (_folder, [a, b, _]) = sources();
    let order = |seed| read(Mixture::new([(a.clone(), 1.0), (b.clone(), 1.0)]).with_seed(seed));
    assert_eq!(order(1), order(1));
    assert_ne!(order(1), order(2));
}

#[test]
fn a_mixture_stops_goes_on_or_repeats_when_a_source_runs_out() {
    let (_folder, [a, b, c]) = sources();
    let read = |when_out| {
        let parts = [(a.clone(), 5.0), (b.clone(), 1.0), (c.clone(), 1.0)];
        totals(&read(Mixture::new(parts).with_when_out(when_out)))
    };
    let stop = read(WhenOut::Stop);
    assert_eq!(stop[&'a'].0, 1000);
    assert!(stop[&'b'].0 < 100 && stop[&'c'].0 < 10);
    let go_on = read(WhenOut::GoOn);
    assert_eq!([go_on[&'a'].0, go_on[&'b'].0, go_on[&'c'].0], [1000, 500, 100]);
    let repeat = read(WhenOut::Repeat);
    // c is the one that lasts longest: 2 MB, and five times as much of a.
    assert_eq!(repeat[&'c'].0, 100);
    assert!(repeat[&'a'].0 > 80_000 && repeat[&'b'].0 > 1500, "{repeat:?}");
}

#[test]
fn a_mixture_is_a_source_like_any_other() {
    let (folder, [a, b, c]) = sources();
    let mixture = |weight: f64, seed| {
        let inner = Mixture::new([(a.clone(), weight), (b.clone(), 1.0)]).with_seed(seed);
        Sources::from(Mixture::new([(Sources::from(inner), 1.0), (c.clone(), 1.0)]))
    };
    let sources = mixture(1.0, 0);
    let files = ["a.jsonl", "b.jsonl", "c.jsonl"].map(|name| folder.path().join(name));
    assert_eq!(sources.paths(), files);
    assert_eq!(sources.files().unwrap(), files);
    let documents = sources.documents().unwrap();
    let report = documents.report();
    let count = documents.map(Result::unwrap).count() as u64;
    assert_eq!(report.documents(), count);
    let digest = sources.settings_digest().unwrap();
    assert_eq!(digest, mixture(1.0, 0).settings_digest().unwrap());
    assert_ne!(digest, mixture(2.0, 0).settings_digest().unwrap());
    assert_ne!(digest, mixture(1.0, 1).settings_digest().unwrap());
    assert_ne!(digest, Sources::new(files).settings_digest().unwrap());
}

#[test]
fn faults_of_a_part_are_faults_of_the_mixture() {
    let lines = format!("{}nonsense\n", lines('a', 1, 10_000));
    let folder = folder(&[("a.jsonl", lines.as_bytes()), ("b.txt", b"b"), ("c.txt", b" ")]);
    let part = |name: &str| Sources::new([folder.path().join(name)]);
    let read = |mixture: Mixture| {
        let documents = Sources::from(mixture).documents()?;
        let report = documents.report();
        Ok::<_, DataError>((documents.collect::<Result<Vec<_>>>()?.len(), report.skipped()))
    };
    let both = |a: Sources| Mixture::new([(a, 1.0), (part("b.txt"), 1.0)]);
    assert!(matches!(
        read(both(part("a.jsonl")).with_when_out(WhenOut::GoOn)),
        Err(DataError::Record { .. })
    ));
    assert!(matches!(read(both(part("c.txt")).with_when_out(WhenOut::GoOn)), Err(DataError::NoText { .. })));
    assert!(matches!(read(both(part("d.txt"))), Err(DataError::Missing { .. })));
    // A record that is broken each time is counted once.
    let tolerant =
        part("a.jsonl").with_settings(ReadSettings::default().with_broken(BrokenRecords::AtMost(1)));
    let mixture = Mixture::new([(tolerant, 1.0), (Sources::new([folder.path().join("b.txt")]), 0.01)]);
    let (count, skipped) = read(mixture.with_when_out(WhenOut::Repeat).with_seed(1)).unwrap();
    assert!(count > 2 && skipped == 1, "{count} {skipped}");

    assert!(matches!(read(Mixture::new([])), Err(DataError::NoSources)));
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = read(Mixture::new([(part("b.txt"), weight)])).unwrap_err().to_string();
        assert_eq!(error, format!("the weight of a source is {weight}: expected a number above 0"));
        assert!(Sources::from(Mixture::new([(part("b.txt"), weight)])).settings_digest().is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_document_comes_once_if_the_others_go_on(
        sizes in proptest::collection::vec((1_usize..40, 5_usize..9000, 0.1_f64..10.0), 1..4),
        seed in any::<u64>(),
    ) {
        let files: Vec<(String, String)> = sizes
            .iter()
            .enumerate()
            .map(|(at, (count, bytes, _))| (format!("{at}.jsonl"), lines(char::from(b'a' + at as u8), *count, *bytes)))
            .collect();
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
        let folder = folder(&files);
        let parts = sizes.iter().zip(&files).map(|((_, _, weight), (name, _))| (Sources::new([folder.path().join(name)]), *weight));
        let documents = read(Mixture::new(parts).with_seed(seed).with_when_out(WhenOut::GoOn));
        let mut texts: Vec<String> = documents.into_iter().map(|document| document.text).collect();
        prop_assert_eq!(texts.len(), sizes.iter().map(|(count, _, _)| count).sum::<usize>());
        texts.sort_unstable();
        texts.dedup();
        prop_assert_eq!(texts.len(), sizes.iter().map(|(count, _, _)| count).sum::<usize>());
    }
}
