//! The embedded corpus, as its users see it.

use std::collections::{BTreeSet, HashSet};

use vesper_data::corpus::{Language, Languages, Split, Story, StoryCorpus, floor_nats};

const LANGUAGES: [Languages; 2] = [Languages::English, Languages::French];

fn corpus(languages: Languages) -> StoryCorpus {
    StoryCorpus::new(2024).with_languages(languages)
}

/// The words of a text, in small letters, with the letters and hyphens they are made of.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    let ends = |c: char| !c.is_alphabetic() && c != '-';
    text.split(ends).filter(|word| word.chars().any(char::is_alphabetic)).map(str::to_lowercase)
}

#[test]
fn every_story_has_one_derivation_whose_probability_is_its_information() {
    for languages in [Languages::English, Languages::French, Languages::Both] {
        let corpus = corpus(languages);
        for story in corpus.stories().take(250) {
            let found = corpus.derivations(&story.text);
            assert_eq!(found.count, 1, "{}", story.text);
            assert!((found.nats - story.nats).abs() < 1e-9, "{} and {}", found.nats, story.nats);
            assert_eq!(found.matched, story.text.len());
        }
    }
}

#[test]
fn a_spoiled_story_is_not_in_the_language_and_the_place_is_found() {
    let corpus = corpus(Languages::Both);
    for story in corpus.stories().take(40) {
        // A letter that no word has at that place: in the middle, at a character's boundary.
        let middle =
            (story.text.len() / 2..story.text.len()).find(|&i| story.text.is_char_boundary(i)).unwrap();
        let spoiled = format!("{}#{}", &story.text[..middle], &story.text[middle..]);
        let found = corpus.derivations(&spoiled);
        assert_eq!((found.count, found.matched), (0, middle), "{spoiled}");
        assert!(found.nats.is_infinite());
        let cut = &story.text[..middle];
        assert_eq!(corpus.derivations(cut).count, 0, "{cut}");
    }
}

#[test]
fn the_first_stories_of_a_seed_stay_what_they_are() {
    let first = |languages| StoryCorpus::new(0).with_languages(languages).story(0);
    let english = first(Languages::English);
    let french = first(Languages::French);
    assert_eq!(english.text, include_str!("corpus/english.txt").trim_end());
    assert_eq!(french.text, include_str!("corpus/french.txt").trim_end());
    assert_eq!((english.language, french.language), (Language::English, Language::French));
}

#[test]
fn a_story_depends_on_its_seed_and_index_alone() {
    let corpus = corpus(Languages::Both);
    let forward: Vec<Story> = corpus.stories().take(64).collect();
    let backward: Vec<Story> = (0..64).rev().map(|i| corpus.story(i)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    let threads: Vec<_> = (0..64).map(|i| std::thread::spawn(move || corpus.story(i))).collect();
    for (story, thread) in forward.iter().zip(threads) {
        assert_eq!(*story, thread.join().unwrap());
    }
    assert!(corpus.stories().starting_at(60).take(4).eq(forward[60..].iter().cloned()));
    assert_ne!(StoryCorpus::new(1).story(5), StoryCorpus::new(2).story(5));
    assert_eq!(corpus.story(u64::MAX), corpus.story(u64::MAX));
}

#[test]
fn held_out_stories_are_never_training_stories() {
    let corpus = corpus(Languages::Both);
    let train: HashSet<String> = corpus.stories().take(5000).map(|story| story.text).collect();
    assert_eq!(train.len(), 5000);
    let held_out = corpus.with_split(Split::HeldOut).take_stories(1000);
    assert!(held_out.iter().all(|story| !train.contains(&story.text)));
    let floor = |stories: &[Story]| floor_nats(stories) / stories.len() as f64;
    assert!((floor(&held_out) / floor(&corpus.take_stories(1000)) - 1.0).abs() < 0.02);
}

#[test]
fn any_size_works() {
    let corpus = corpus(Languages::Both);
    assert_eq!(corpus.take_stories(0), []);
    assert_eq!(corpus.take_bytes(0), []);
    assert_eq!(corpus.take_bytes(1), corpus.take_stories(1));
    let stories = corpus.take_bytes(1_000_000);
    let bytes: usize = stories.iter().map(|story| story.text.len()).sum();
    let last = stories.last().unwrap().text.len();
    assert!(bytes >= 1_000_000 && bytes - last < 1_000_000);
    assert_eq!(stories, corpus.take_stories(stories.len()));
}

#[test]
fn half_of_the_stories_are_in_each_language() {
    let stories = corpus(Languages::Both).take_stories(4000);
    let french = stories.iter().filter(|story| story.language == Language::French).count();
    assert!((1850..2150).contains(&french), "{french}");
    let only = corpus(Languages::French).take_stories(100);
    assert!(only.iter().all(|story| story.language == Language::French));
}

#[test]
fn the_typography_is_clean() {
    for languages in LANGUAGES {
        for story in corpus(languages).stories().take(10_000) {
            let text = &story.text;
            for wrong in ["  ", " \n", "\n ", "\n\n", " .", " ,", "..", "{", "}", "~", "@", "^", "|", "_"] {
                assert!(!text.contains(wrong), "{wrong:?} in {text}");
            }
            assert!(text.lines().count() <= 4 && text.trim() == text, "{text}");
            for line in text.lines() {
                let first = line.chars().next().unwrap();
                assert!(first.is_uppercase() || first == '"' || first == '«', "{line}");
                assert!(line.ends_with(['.', '!', '?', '"', '»']), "{line}");
            }
            // After a full stop, a capital, also across an opening quotation mark.
            for (at, _) in text.match_indices(". ") {
                let next = text[at + 2..].trim_start_matches(['"', '«', ' ']).chars().next().unwrap();
                assert!(next.is_uppercase() || next == '»', "{text}");
            }
            match story.language {
                Language::English => {
                    assert_eq!(text.matches('"').count() % 2, 0, "{text}");
                    assert!(text.is_ascii(), "{text}");
                }
                Language::French => {
                    assert_eq!(text.matches("« ").count(), text.matches(" »").count(), "{text}");
                    for mark in ['!', '?', ':', '»'] {
                        for (at, _) in text.match_indices(mark) {
                            assert!(text[..at].ends_with(' '), "{mark} in {text}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn english_articles_follow_the_sound() {
    for story in corpus(Languages::English).stories().take(10_000) {
        let words: Vec<String> = words(&story.text).collect();
        for pair in words.windows(2) {
            let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']) || pair[1] == "honest";
            assert!(pair[0] != "a" || !vowel, "{pair:?} in {}", story.text);
            assert!(pair[0] != "an" || vowel, "{pair:?} in {}", story.text);
        }
    }
}

#[test]
fn french_elides_and_contracts() {
    let vowels = ['a', 'à', 'e', 'é', 'ê', 'i', 'î', 'o', 'u', 'œ'];
    let elided = [
        "le", "la", "de", "je", "ne", "se", "te", "me", "que", "du", "au", "ma", "sa", "ta", "beau", "vieux",
    ];
    let feminine = ["petite", "vieille", "grande", "jolie", "belle", "grosse", "gentille"];
    let masculine = ["petit", "vieux", "grand", "joli", "beau", "gros", "gentil"];
    for story in corpus(Languages::French).stories().take(10_000) {
        let lower = story.text.to_lowercase();
        // Words parted by one space: punctuation stays on its word, so that no pair spans a sentence.
        let words: Vec<&str> = lower.split([' ', '\n']).collect();
        for pair in words.windows(2) {
            let before_vowel = pair[1].starts_with(vowels);
            assert!(!(elided.contains(&pair[0]) && before_vowel), "{pair:?} in {}", story.text);
            assert!(!(pair[0] == "de" && ["le", "les"].contains(&pair[1])), "{pair:?} in {}", story.text);
            assert!(!(pair[0] == "à" && ["le", "les"].contains(&pair[1])), "{pair:?} in {}", story.text);
            assert!(!(["un", "le", "mon"].contains(&pair[0]) && feminine.contains(&pair[1])), "{pair:?}");
            assert!(!(["une", "la", "ma"].contains(&pair[0]) && masculine.contains(&pair[1])), "{pair:?}");
            assert!(!(["ils", "elles"].contains(&pair[0]) && pair[1].ends_with("ait")), "{pair:?}");
            assert!(!(["il", "elle"].contains(&pair[0]) && pair[1].ends_with("aient")), "{pair:?}");
        }
        assert!(
            !["l'hibou", "l'hérisson", "d'hibou"].iter().any(|wrong| lower.contains(wrong)),
            "{}",
            story.text
        );
    }
}

#[test]
fn a_heroine_is_never_a_he() {
    let (men, women) =
        (["Tom", "Leo", "Max", "Sam", "Oscar"], ["Mina", "Lucy", "Rose", "Anna", "Lily", "Nora", "Zoe"]);
    let mut checked = [0, 0];
    for story in corpus(Languages::English).stories().take(3000) {
        let words: Vec<&str> = story.text.split(|c: char| !c.is_alphabetic()).collect();
        let has = |list: &[&str]| words.iter().any(|word| list.contains(word));
        // Two heroes are "they"; one is told by a name.
        if has(&["they", "They"]) && has(&["cousins", "friends", "brothers", "sisters"]) {
            continue;
        }
        if has(&women) {
            checked[0] += 1;
            assert!(!has(&["he", "He", "his", "His"]), "{}", story.text);
        } else if has(&men) {
            checked[1] += 1;
            assert!(!has(&["she", "She"]), "{}", story.text);
        }
    }
    assert!(checked.iter().all(|&n| n > 250), "{checked:?}");
}

#[test]
fn une_heroine_reste_une_heroine() {
    let (men, women) =
        (["Paul", "Tom", "Louis", "Jules", "Simon"], ["Mina", "Lina", "Rose", "Clara", "Lucie", "Nora"]);
    let mut checked = [0, 0];
    for story in corpus(Languages::French).stories().take(3000) {
        let words: Vec<&str> = story.text.split(|c: char| !c.is_alphabetic()).collect();
        let has = |list: &[&str]| words.iter().any(|word| list.contains(word));
        if words.windows(2).any(|pair| {
            ["deux", "des"].contains(&pair[0].to_lowercase().as_str())
                && ["frères", "cousins", "voisins", "sœurs", "cousines", "voisines"].contains(&pair[1])
        }) {
            continue;
        }
        // What is said of the hero at the start of a sentence, setting the impersonal aside.
        let mut said = story.text.clone();
        for of_something_else in ["Il était une fois", "Il y ", "« Il est", "« Elle est"] {
            said = said.replace(of_something_else, "");
        }
        if has(&women) {
            checked[0] += 1;
            assert!(
                !said.contains("Il ") && !has(&["nommé", "second", "content", "curieux"]),
                "{}",
                story.text
            );
        } else if has(&men) {
            checked[1] += 1;
            assert!(!said.contains("Elle ") && !has(&["nommée", "contente", "curieuse"]), "{}", story.text);
        }
    }
    assert!(checked.iter().all(|&n| n > 250), "{checked:?}");
}

#[test]
fn what_is_settled_early_is_kept_to_the_end() {
    let mut lost = 0;
    for story in corpus(Languages::English).stories().take(4000) {
        let Some((_, asked)) = story.text.split_once("\"Have you seen my ") else { continue };
        let thing = asked.split('?').next().unwrap();
        lost += 1;
        let before = story.text.split("\"Have you seen").next().unwrap();
        assert!(before.contains(&format!(" {thing}")), "{}", story.text);
    }
    assert!(lost > 100, "{lost}");
}

#[test]
fn the_vocabulary_is_small_and_a_word_carries_most_of_a_nat() {
    for (languages, most) in [(Languages::English, 550), (Languages::French, 720)] {
        let stories = corpus(languages).take_stories(5000);
        let vocabulary: BTreeSet<String> = stories.iter().flat_map(|story| words(&story.text)).collect();
        let words: usize = stories.iter().map(|story| words(&story.text).count()).sum();
        let (per_story, per_word) = (words as f64 / 5000.0, floor_nats(&stories) / words as f64);
        println!(
            "{languages:?}: {} words, {per_story:.1} a story, {per_word:.3} nats a word",
            vocabulary.len()
        );
        assert!((300..most).contains(&vocabulary.len()), "{}", vocabulary.len());
        assert!((90.0..150.0).contains(&per_story), "{per_story}");
        assert!((0.65..1.1).contains(&per_word), "{per_word}");
    }
}
