//! Tokenizers trained on one's own text.
// The helpers of tests may panic as the tests themselves do.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use serde_json::{Value, json};
use vesper_data::corpus::StoryCorpus;
use vesper_data::tokenizer::{Algorithm, TokenLayout, TrainConfig, TrainProgress};
use vesper_data::{DataError, Documents, TextTokenizer};

const STORY: &str = "Il était une fois un renard qui vivait dans la forêt, près de la rivière. L'été, il allait à la \
    rivière ; l'hiver, il dormait. « Où est la rivière ? » disait l'ours. « Je ne sais pas », disait le renard. Ils \
    montèrent sur la colline, et là ils virent que les castors avaient construit un barrage en 1999, puis en 2000.\n";

/// The text in other words, so that there is something to find.
fn corpus() -> Vec<String> {
    let words: Vec<&str> = STORY.split(' ').collect();
    (1..40)
        .map(|step| words.iter().cycle().step_by(step).take(200).copied().collect::<Vec<_>>().join(" "))
        .collect()
}

fn unigram(vocab_size: usize) -> TextTokenizer {
    TextTokenizer::train_unigram(corpus().iter().map(Ok), vocab_size).unwrap()
}

fn json_of(tokenizer: &TextTokenizer) -> Value {
    serde_json::from_str(&tokenizer.inner().to_string(false).unwrap()).unwrap()
}

#[test]
fn training_twice_gives_the_same_unigram_with_any_number_of_threads() {
    let first = unigram(200);
    for threads in [1, 2, 5, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let again = pool.install(|| unigram(200));
        assert_eq!(json_of(&again), json_of(&first), "{threads} threads");
        assert_eq!(again.fingerprint(), first.fingerprint());
    }
    assert_ne!(unigram(90).fingerprint(), first.fingerprint());
}

#[test]
fn the_special_tokens_are_where_camembert_has_them() {
    for algorithm in [Algorithm::Unigram, Algorithm::Bpe] {
        let config = TrainConfig::default()
            .with_algorithm(algorithm)
            .with_layout(TokenLayout::Camembert)
            .with_vocab_size(320);
        let tokenizer = TextTokenizer::train(corpus().iter().map(Ok), &config, |_| {}).unwrap();
        let names = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"];
        for (id, name) in (0..).zip(names) {
            assert_eq!(tokenizer.id_to_token(id).as_deref(), Some(name));
        }
        let last = u32::try_from(tokenizer.vocab_size()).unwrap() - 1;
        assert_eq!(tokenizer.token_to_id("<mask>"), Some(last));
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(5), Some(6)));
        let inner = tokenizer.encode("le renard").unwrap();
        assert_eq!(
            tokenizer.encode_with_special_tokens("le renard").unwrap(),
            [&[5], &inner[..], &[6]].concat()
        );
        assert_eq!(tokenizer.encode_document("le renard").unwrap().ids, [&inner[..], &[6]].concat());
        // A mask takes the space before it.
        let masked = tokenizer.encode("le <mask>").unwrap();
        assert_eq!(masked, [tokenizer.encode("le").unwrap(), vec![last]].concat());
    }
}

#[test]
fn the_layout_is_that_of_the_real_file() {
    let Some(data) = std::env::var_os("VESPER_DATA").map(PathBuf::from) else {
        println!("skipped: the_layout_is_that_of_the_real_file (VESPER_DATA is not set)");
        return;
    };
    let real = TextTokenizer::from_file(data.join("tokenizers/camembert-base/tokenizer.json")).unwrap();
    let (mut real, mut ours) = (json_of(&real), json_of(&unigram(200)));
    let first = |json: &Value| json["model"]["vocab"].as_array().unwrap()[..7].to_vec();
    assert_eq!(first(&ours), first(&real));
    for json in [&mut real, &mut ours] {
        // The ids of <mask> are those of the last token, which both have in the same place.
        let vocab = json["model"]["vocab"].as_array().unwrap();
        let last = vocab.len() - 1;
        assert_eq!(vocab[last], json!(["<mask>", 0.0]));
        let mask = json["added_tokens"].as_array_mut().unwrap().last_mut().unwrap();
        assert_eq!(mask["id"], last);
        mask["id"] = Value::Null;
        json["model"]["vocab"] = Value::Null;
        // The same rules in other words: see the next test.
        json["normalizer"] = Value::Null;
    }
    assert_eq!(ours, real);
}

/// CamemBERT's normalizer is a table of SentencePiece; the one of a trained Unigram is made of rules.
#[test]
fn french_text_is_normalised_as_camembert_does_it() {
    use tokenizers::{NormalizedString, Normalizer};
    let test = "french_text_is_normalised_as_camembert_does_it";
    let Some(data) = std::env::var_os("VESPER_DATA").map(PathBuf::from) else {
        println!("skipped: {test} (VESPER_DATA is not set)");
        return;
    };
    let real = TextTokenizer::from_file(data.join("tokenizers/camembert-base/tokenizer.json")).unwrap();
    let ours = unigram(200);
    for name in [
        "french/debian/debian-faq-fr.txt",
        "french/dialogue/rhapsodie.claire-like.txt",
        "squad/piaf-ml-small.json",
    ] {
        for line in std::fs::read_to_string(data.join(name)).unwrap().lines().filter(|line| !line.is_empty())
        {
            let normalized = |tokenizer: &TextTokenizer| {
                let mut text = NormalizedString::from(line);
                tokenizer.inner().get_normalizer().unwrap().normalize(&mut text).unwrap();
                text.get().to_owned()
            };
            assert_eq!(normalized(&ours), normalized(&real), "{name}");
        }
    }
}

#[test]
fn a_trained_unigram_has_at_most_the_size_asked_for() {
    let stories: Vec<String> =
        StoryCorpus::new(0).take_bytes(1 << 16).into_iter().map(|story| story.text).collect();
    let train = |vocab_size| TextTokenizer::train_unigram(stories.iter().map(Ok), vocab_size).unwrap();
    let (small, large) = (train(200), train(400));
    assert_eq!((small.vocab_size(), large.vocab_size()), (200, 400));
    // There is not more in the text.
    assert!((400..20_000).contains(&train(20_000).vocab_size()));
    let tokens = |tokenizer: &TextTokenizer| tokenizer.encode(&stories.join(" ")).unwrap().len();
    assert!(tokens(&large) < tokens(&small), "with more tokens a text has fewer");
}

#[test]
fn a_saved_unigram_is_the_same_when_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let tokenizer = unigram(200);
    tokenizer.save(&path).unwrap();
    let loaded = TextTokenizer::from_file(&path).unwrap();
    assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
    assert_eq!(loaded.encode(STORY).unwrap(), tokenizer.encode(STORY).unwrap());
    assert_eq!(tokenizer.decode(&tokenizer.encode(STORY).unwrap()).unwrap(), STORY.replace('\n', " "));
}

#[test]
fn characters_that_are_too_rare_or_never_seen_are_unknown() {
    let text = format!("{}\u{3b1}", "ab ba ".repeat(500));
    let train = |coverage| {
        let config = TrainConfig::default()
            .with_algorithm(Algorithm::Unigram)
            .with_vocab_size(30)
            .with_character_coverage(coverage);
        TextTokenizer::train([Ok(&text)], &config, |_| {}).unwrap()
    };
    let unknown = |tokenizer: &TextTokenizer, text: &str| tokenizer.encode_counted(text).unwrap().unknown;
    assert_eq!(unknown(&train(1.0), "ab \u{3b1}"), 0);
    assert_eq!(unknown(&train(0.999), "ab \u{3b1}"), 1);
    assert_eq!(unknown(&train(1.0), "ab \u{3b2}"), 1);
    assert_eq!(train(1.0).token_to_id("<unk>"), Some(1));
}

#[test]
fn settings_out_of_range_and_text_without_words_are_refused() {
    let message = |documents: &[&str], config: &TrainConfig| {
        TextTokenizer::train(documents.iter().map(Ok), config, |_| {}).unwrap_err().to_string()
    };
    let base = TrainConfig::default().with_algorithm(Algorithm::Unigram);
    let small = message(&["abcdefghij"], &base.clone().with_vocab_size(9));
    assert!(small.contains("has 11 different characters, expected fewer than 7"), "{small}");
    assert!(message(&["ab"], &base.clone().with_vocab_size(3)).starts_with("vocab_size is 3: expected room"));
    assert!(
        message(&["ab"], &base.clone().with_character_coverage(0.5)).starts_with("character_coverage is 0.5")
    );
    assert!(
        message(&["ab"], &base.clone().with_character_coverage(f64::NAN)).starts_with("character_coverage")
    );
    assert!(message(&["ab"], &base.clone().with_vocab_size(1 << 24)).contains("less than 2^24"));
    let bpe = TrainConfig::default().with_layout(TokenLayout::Camembert).with_vocab_size(263);
    assert!(message(&["ab"], &bpe).contains("at least 264"));
    assert_eq!(message(&[], &base), "the tokenizer failed to train: there is no text");
    assert!(matches!(
        TextTokenizer::train([Ok("a"), Err(DataError::NoSources)], &base, |_| {}),
        Err(DataError::NoSources)
    ));
    assert!(serde_json::from_str::<TrainConfig>(r#"{"vocab": 5}"#).is_err());
    let read: TrainConfig =
        serde_json::from_str(r#"{"algorithm": "unigram", "layout": "camembert"}"#).unwrap();
    assert_eq!(read, base.with_layout(TokenLayout::Camembert));
}

#[test]
fn text_that_spells_special_tokens_teaches_none_of_them() {
    let text = "<s> <mask> </s>x <pad> ".repeat(50);
    for algorithm in [Algorithm::Bpe, Algorithm::Unigram] {
        let config = TrainConfig::default()
            .with_algorithm(algorithm)
            .with_layout(TokenLayout::Camembert)
            .with_vocab_size(400);
        let tokenizer = TextTokenizer::train([Ok(&text)], &config, |_| {}).unwrap();
        let last = u32::try_from(tokenizer.vocab_size()).unwrap() - 1;
        assert_eq!(tokenizer.token_to_id("<mask>"), Some(last));
        let names: Vec<String> = (0..=last).map(|id| tokenizer.id_to_token(id).unwrap()).collect();
        assert!(["<s>", "<mask>", "</s>"].iter().all(|name| names.iter().filter(|n| n == name).count() == 1));
        assert_eq!(tokenizer.encode("<s>").unwrap(), [5]);
    }
}

#[test]
fn progress_is_told_from_the_first_document_to_the_last_token() {
    let mut seen = Vec::new();
    let config = TrainConfig::default().with_vocab_size(600);
    TextTokenizer::train(corpus().iter().map(Ok), &config, |progress| seen.push(progress)).unwrap();
    let bytes: usize = corpus().iter().map(String::len).sum();
    assert_eq!(seen[0], TrainProgress::Counting { documents: 39, bytes: bytes as u64 });
    assert_eq!(seen[1..], [TrainProgress::Merging { tokens: 257, vocab_size: 600 }]);
    let mut weighed = false;
    let config = config.with_algorithm(Algorithm::Unigram);
    TextTokenizer::train(corpus().iter().map(Ok), &config, |progress| {
        weighed |= matches!(progress, TrainProgress::Weighing { words } if words > 40);
    })
    .unwrap();
    assert!(weighed);
}

#[test]
fn an_observer_sees_every_document_once() {
    let [documents, bytes, tokens] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
    let counters = [&documents, &bytes, &tokens].map(Arc::clone);
    let tokenizer =
        TextTokenizer::train_bpe(corpus().iter().map(Ok), 300).unwrap().with_observer(move |more| {
            for (counter, more) in counters.iter().zip([more.documents, more.bytes, more.tokens]) {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        });
    let texts = corpus();
    let ids: usize =
        tokenizer.encode_documents(texts.iter().map(Ok)).map(|encoded| encoded.unwrap().ids.len()).sum();
    let sum: usize = texts.iter().map(String::len).sum();
    let seen = [documents, bytes, tokens].map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(seen, [texts.len() as u64, sum as u64, ids as u64]);
}

#[test]
fn a_truncation_of_128_in_the_file_cuts_no_document() {
    let Some(data) = std::env::var_os("VESPER_DATA").map(PathBuf::from) else {
        println!("skipped: a_truncation_of_128_in_the_file_cuts_no_document (VESPER_DATA is not set)");
        return;
    };
    let path = data.join("tokenizers/camembert-base/tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // As the files of sentence-embedding models have it.
    json["truncation"] =
        json!({"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"});
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let cut = TextTokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    let whole = TextTokenizer::from_file(path).unwrap();
    let dialogue = data.join("french/dialogue/rhapsodie.claire-like.txt");
    let text = Documents::open(&[dialogue]).unwrap().next().unwrap().unwrap().text;
    let ids = cut.encode_document(&text).unwrap().ids;
    assert!(ids.len() > 128);
    assert_eq!(ids, whole.encode_document(&text).unwrap().ids);
    assert_eq!(cut.encode("a").unwrap().len(), 1);
    assert_eq!(cut.encode_with_special_tokens(&text).unwrap().len(), ids.len() + 1);
    assert_eq!(cut.fingerprint(), whole.fingerprint());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back_from_a_bpe_with_camemberts_layout(text in "\\PC*|[ a-z\n\r\t'.é🦊]*") {
        thread_local!(static TOKENIZER: TextTokenizer = {
            let config = TrainConfig::default().with_layout(TokenLayout::Camembert).with_vocab_size(320);
            TextTokenizer::train(corpus().iter().map(Ok), &config, |_| {}).unwrap()
        });
        prop_assume!(!text.contains('<'));
        let back = TOKENIZER.with(|tokenizer| tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap());
        prop_assert_eq!(back, text);
    }
}
