//! Real files, from the folder that the environment variable VESPER_DATA names: the texts are those that Python reads.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use serde_json::Value;
use sha2::{Digest, Sha256};
use vesper_data::source::{ReadReport, SquadDocuments, TextDocuments};
use vesper_data::{Document, ReadSettings, Result, Sources, TextTokenizer, TokenCache};

use crate::hex;

/// The folder of the test data; without test data, says that `test` is skipped.
fn data(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    folder
}

/// Reads sources, and compares what they give with what golden/sources.py wrote under `name`.
fn compare(name: &str, sources: &Sources) -> (Vec<Document>, ReadReport) {
    let golden: Value = serde_json::from_str(include_str!("../golden/sources.json")).unwrap();
    let documents = sources.documents().unwrap();
    let report = documents.report();
    let documents: Vec<Document> = documents.map(Result::unwrap).collect();
    let mut digest = Sha256::new();
    for document in &documents {
        digest.update((document.text.len() as u64).to_le_bytes());
        digest.update(&document.text);
        // Where all of it counts, the generator writes a range that no text has.
        let all = || vec![(u64::MAX, 0)];
        let ranges = |loss: &Vec<Range<usize>>| loss.iter().map(|r| (r.start as u64, r.end as u64)).collect();
        for (start, end) in document.loss.as_ref().map_or_else(all, ranges) {
            digest.update(start.to_le_bytes());
            digest.update(end.to_le_bytes());
        }
    }
    assert_eq!(documents.len(), golden[name]["documents"].as_u64().unwrap() as usize, "{name}");
    assert_eq!(hex(&digest.finalize()), golden[name]["sha256"], "{name}");
    (documents, report)
}

#[test]
fn texts_of_real_files_are_those_that_python_reads() {
    let Some(folder) = data("texts_of_real_files_are_those_that_python_reads") else { return };
    let stories = |split: &str| format!("parquet/tinystories-v2-gpt4/data/{split}-00000-of-00001.parquet");
    for (name, count) in [
        ("french/novels".to_owned(), 68),
        ("tinystories/tinystories-v1-train-first2316.txt".to_owned(), 2316),
        ("instruct/c4_demo.jsonl".to_owned(), 300),
        ("instruct/instruction-data-rasbt.json".to_owned(), 1100),
        ("instruct/v1_sft_demo.jsonl".to_owned(), 500),
        ("french/dialogue".to_owned(), 57),
        (stories("train"), 1577),
        (stories("validation"), 150),
    ] {
        let (documents, report) = compare(&name, &Sources::new([folder.join(&name)]));
        assert_eq!(documents.len(), count, "{name}");
        assert_eq!((report.documents(), report.skipped()), (count as u64, 0), "{name}");
    }
    let lines = ReadSettings::default().with_text_documents(TextDocuments::Lines);
    let articles = Sources::new([folder.join("instruct/wiki_demo.txt")]).with_settings(lines);
    assert_eq!(compare("instruct/wiki_demo.txt", &articles).0.len(), 30);
}

#[test]
fn questions_of_real_files_are_those_that_python_reads() {
    let Some(folder) = data("questions_of_real_files_are_those_that_python_reads") else { return };
    for (name, questions, impossible, wrong) in [
        ("squad/dev-v1.1.json", 10_570, 0, 0),
        ("squad/dev-v2.0-cs224n-half.json", 6_078, 3_168, 0),
        ("squad/piaf-v1.1.json", 7_569, 0, 1),
        ("squad/piaf-ml-small.json", 51, 0, 0),
    ] {
        let sources = Sources::new([folder.join(name)]);
        let (documents, report) = compare(name, &sources);
        assert_eq!(documents.len(), questions);
        let paragraphs = ReadSettings::default().with_squad(SquadDocuments::Paragraphs);
        let (_, second) = compare(&format!("{name} as paragraphs"), &sources.with_settings(paragraphs));
        for report in [report, second] {
            let counts = (report.questions(), report.impossible(), report.wrong_offsets(), report.skipped());
            assert_eq!(counts, (questions as u64, impossible, wrong, 0), "{name}");
            if wrong > 0 {
                let note = report.notes().concat();
                assert!(
                    note.contains("piaf-v1.1.json, question p140295202893328 (line 1): the answer "),
                    "{note}"
                );
                assert!(
                    note.ends_with("starts at character 89, not at 90: it is used all the same"),
                    "{note}"
                );
            }
        }
    }
}

/// A compressed file gives the documents of the file, whatever its format.
#[test]
fn compressed_copies_of_real_files_give_the_same_documents() {
    let Some(folder) = data("compressed_copies_of_real_files_give_the_same_documents") else { return };
    let copies = tempfile::tempdir().unwrap();
    for name in
        ["instruct/c4_demo.jsonl", "squad/piaf-v1.1.json", "french/dialogue/rhapsodie.claire-like.txt"]
    {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        let read = |path: PathBuf| -> Vec<String> {
            Sources::new([path]).documents().unwrap().map(|document| document.unwrap().text).collect()
        };
        let expected = read(folder.join(name));
        let copy = |extension| copies.path().join(format!("{}.{extension}", name.replace('/', "-")));
        let gz = copy("gz");
        let mut encoder =
            flate2::write::GzEncoder::new(std::fs::File::create(&gz).unwrap(), flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        encoder.finish().unwrap();
        assert!(read(gz) == expected, "{name}");
        let zst = copy("zst");
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        std::fs::write(&zst, ruzstd::encoding::compress_to_vec(&bytes[..], level)).unwrap();
        assert!(read(zst) == expected, "{name}");
    }
}

/// What a program that takes paths does: a tokenizer of the texts, and a cache of their tokens.
#[test]
fn a_table_and_questions_become_a_cache_of_tokens() {
    let Some(folder) = data("a_table_and_questions_become_a_cache_of_tokens") else { return };
    for name in
        ["parquet/tinystories-v2-gpt4/data/validation-00000-of-00001.parquet", "squad/piaf-ml-small.json"]
    {
        let paths = [folder.join(name)];
        let sources = Sources::new(&paths);
        let tokenizer = TextTokenizer::train_bpe(sources.documents().unwrap(), 400).unwrap();
        let cache = tempfile::tempdir().unwrap();
        let (cache, _) = TokenCache::open_or_build(cache.path(), &sources, &tokenizer).unwrap();
        assert_eq!(cache.document_count() as u64, sources.documents().unwrap().count() as u64, "{name}");
        let first = sources.documents().unwrap().next().unwrap().unwrap().text;
        let tokens = cache.tokens().to_vec().unwrap();
        let decoded = tokenizer.decode(&tokens[..tokens.len().min(4000)]).unwrap();
        assert!(decoded.starts_with(&first), "{name}");
    }
}
