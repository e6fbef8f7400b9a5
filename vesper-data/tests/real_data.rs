//! Real tokenizers and texts, from the folder that the environment variable VESPER_DATA names.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

use std::path::PathBuf;

use vesper_data::{CacheStatus, Document, Documents, Sources, TextTokenizer, TokenCache};

/// The path of a file of the test data; without test data, says that `test` is skipped.
fn data(test: &str, path: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("VESPER_DATA") else {
        println!("skipped: {test} (VESPER_DATA is not set)");
        return None;
    };
    Some(PathBuf::from(folder).join(path))
}

#[test]
fn camembert_gives_the_published_ids() {
    let Some(path) = data("camembert_gives_the_published_ids", "tokenizers/camembert-base/tokenizer.json")
    else {
        return;
    };
    let tokenizer = TextTokenizer::from_file(path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 32005);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(5), Some(6)));
    let ids = tokenizer.encode("J'aime le camembert !").unwrap();
    assert_eq!(ids, [121, 11, 660, 16, 730, 25543, 110, 83]);
    let around = tokenizer.encode_with_special_tokens("J'aime le camembert !").unwrap();
    assert_eq!(around, [5, 121, 11, 660, 16, 730, 25543, 110, 83, 6]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "J'aime le camembert !");
    assert_eq!(tokenizer.encode_counted("un 🦊 et un 猫").unwrap().unknown, 2);
}

#[test]
fn gpt2_gives_the_published_ids_and_every_text_back() {
    let Some(path) =
        data("gpt2_gives_the_published_ids_and_every_text_back", "tokenizers/gpt2/tokenizer.json")
    else {
        return;
    };
    let tokenizer = TextTokenizer::from_file(path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 50257);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(50256), Some(50256)));
    assert_eq!(tokenizer.encode("Hello world").unwrap(), [15496, 995]);
    for text in ["Hello world", " l'été\r\n\n\t 🦊\u{0}", ""] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    }
}

#[test]
fn stories260k_gives_the_ids_of_its_reference() {
    let test = "stories260k_gives_the_ids_of_its_reference";
    let Some(folder) = data(test, "models/stories260K") else { return };
    let tokenizer = TextTokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id()), (512, Some(1), Some(2)));
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    };
    let greedy = read("reference_greedy.json");
    let ids: Vec<u32> = serde_json::from_value(greedy["greedy_ids"].clone()).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), greedy["greedy_text"].as_str().unwrap());
    let reference = read("reference_transformers.json");
    let ids: Vec<u32> = serde_json::from_value(reference["prompt_ids"].clone()).unwrap();
    let prompt = tokenizer.decode(&ids).unwrap();
    assert_eq!(tokenizer.encode(&prompt).unwrap(), ids[1..], "{prompt}");
    // Characters without a token become bytes.
    assert_eq!(tokenizer.encode_counted("é🦊").unwrap().unknown, 0);
    assert_eq!(tokenizer.decode(&tokenizer.encode("é🦊").unwrap()).unwrap(), "é🦊");
}

#[test]
fn a_fingerprint_is_the_same_each_time_a_tokenizer_is_loaded() {
    for path in ["tokenizers/camembert-base", "tokenizers/gpt2", "models/stories260K"] {
        let test = "a_fingerprint_is_the_same_each_time_a_tokenizer_is_loaded";
        let Some(folder) = data(test, path) else { return };
        let load = || TextTokenizer::from_file(folder.join("tokenizer.json")).unwrap();
        let first = load();
        assert_eq!(load().fingerprint(), first.fingerprint());
        let copy = tempfile::tempdir().unwrap();
        first.save_dir(copy.path()).unwrap();
        let saved = TextTokenizer::from_file(copy.path().join("tokenizer.json")).unwrap();
        assert_eq!(saved.fingerprint(), first.fingerprint(), "{path}");
    }
}

/// A whole book, in pieces and at once, gives the same ids.
#[test]
fn a_book_encoded_in_pieces_has_the_ids_of_the_whole() {
    let test = "a_book_encoded_in_pieces_has_the_ids_of_the_whole";
    for (tokenizer, text) in [
        ("tokenizers/camembert-base/tokenizer.json", "french/debian/debian-faq-fr.txt"),
        ("tokenizers/camembert-base/tokenizer.json", "french/dialogue/rhapsodie.claire-like.txt"),
        ("tokenizers/gpt2/tokenizer.json", "english/tinyshakespeare.txt"),
        ("tokenizers/gpt2/tokenizer.json", "french/debian/debian-faq-fr.txt"),
        ("models/stories260K/tokenizer.json", "french/debian/debian-faq-fr.txt"),
    ] {
        let (Some(tokenizer), Some(path)) = (data(test, tokenizer), data(test, text)) else { return };
        let tokenizer = TextTokenizer::from_file(tokenizer).unwrap();
        let book = Documents::open(&[path]).unwrap().next().unwrap().unwrap();
        let pieces = tokenizer.encode_documents([Ok(&book)]).next().unwrap().unwrap();
        let whole = tokenizer.encode_document(&book.text).unwrap();
        assert!(pieces == whole, "{text}: {} and {} ids", pieces.ids.len(), whole.ids.len());
    }
}

/// The text that counts in the loss, as its tokens have it.
#[test]
fn an_answer_of_piaf_is_what_its_tokens_say() {
    let test = "an_answer_of_piaf_is_what_its_tokens_say";
    let Some(path) = data(test, "squad/piaf-ml-small.json") else { return };
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let articles = json["data"].as_array().unwrap().iter();
    let paragraphs: Vec<_> = articles.flat_map(|article| article["paragraphs"].as_array().unwrap()).collect();
    for file in ["tokenizers/camembert-base", "tokenizers/gpt2", "models/stories260K"] {
        let Some(file) = data(test, file) else { return };
        let tokenizer = TextTokenizer::from_file(file.join("tokenizer.json")).unwrap();
        let mut questions = 0;
        for paragraph in &paragraphs {
            for question in paragraph["qas"].as_array().unwrap() {
                let answer = question["answers"][0]["text"].as_str().unwrap();
                let before =
                    format!("{}\n{}\n", paragraph["context"].as_str().unwrap(), question["question"]);
                let text = format!("{before}{answer}");
                let loss = Some(vec![before.len()..text.len()]);
                let document = Document { text, path: file.as_path().into(), line: 1, loss };
                let encoded = tokenizer.encode_document(&document).unwrap();
                let [range] = &encoded.loss.unwrap()[..] else { panic!("{answer:?}") };
                assert_eq!(range.end, encoded.ids.len());
                assert_eq!(encoded.ids.last().copied(), tokenizer.eos_id());
                // Normalisation and lost characters aside, the same words.
                let letters =
                    |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
                let decoded = tokenizer.decode(&encoded.ids[range.clone()]).unwrap();
                assert_eq!(letters(&decoded), letters(answer));
                questions += 1;
            }
        }
        assert_eq!(questions, 51);
    }
}

#[test]
fn real_jsonl_and_separated_stories_are_read() {
    let test = "real_jsonl_and_separated_stories_are_read";
    let count = |path: &str, expected: usize| {
        let Some(path) = data(test, path) else { return };
        let documents: Vec<Document> = Documents::open(&[path]).unwrap().map(Result::unwrap).collect();
        assert_eq!(documents.len(), expected);
    };
    count("instruct/c4_demo.jsonl", 300);
    count("tinystories/tinystories-v1-train-first2316.txt", 2316);
    count("french/debian", 3);
}

#[test]
fn a_cache_of_real_stories_is_built_and_reused() {
    let test = "a_cache_of_real_stories_is_built_and_reused";
    let Some(source) = data(test, "french/debian/debian-faq-fr.txt") else { return };
    let sources = Sources::new([source]);
    let tokenizer = TextTokenizer::train_bpe(sources.documents().unwrap(), 1024).unwrap();
    assert_eq!(tokenizer.vocab_size(), 1024);
    let folder = tempfile::tempdir().unwrap();
    let (cache, status) = TokenCache::open_or_build(folder.path(), &sources, &tokenizer).unwrap();
    assert_eq!((status, cache.document_count()), (CacheStatus::Built, 1));
    let (cache, status) = TokenCache::open_or_build(folder.path(), &sources, &tokenizer).unwrap();
    assert_eq!(status, CacheStatus::Reused);
    let tokens = cache.tokens();
    let text = sources.documents().unwrap().next().unwrap().unwrap().text;
    assert_eq!(tokenizer.decode(&tokens.to_vec().unwrap()).unwrap(), text);
    let entropy = tokens.unigram_entropy().unwrap();
    assert!((4.0..6.93).contains(&entropy), "{entropy}");
}
