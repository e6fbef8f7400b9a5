//! Questions on paragraphs.

use serde_json::{Value, json};
use vesper_data::source::{BrokenRecords, Labels, LossOn, ReadReport, SquadDocuments};
use vesper_data::{Document, ReadSettings, Result, Sources};

use crate::{folder, learned, message, texts};

fn file() -> Value {
    json!({"version": "v2.0", "data": [
        {"title": "Été", "paragraphs": [{"context": "L'été finit en août.", "qas": [
            {"id": "a", "question": "Quand ?", "answers": [
                {"text": "août", "answer_start": 15}, {"text": "en août", "answer_start": 12},
            ]},
            {"id": "b", "question": "Où ?", "answers": [], "is_impossible": true, "plausible_answers": []},
        ]}, {"context": "Vide.", "qas": []}], "note": [1]},
        {"paragraphs": [], "title": "Rien"},
        {"paragraphs": [{"qas": [{"question": "Qui ?", "id": 7, "answers": [{"text": "Moi", "answer_start": 3}]}],
            "context": "ét Moi"}]},
    ], "more": {}})
}

fn read(file: &Value, settings: ReadSettings) -> (Result<Vec<Document>>, ReadReport) {
    let folder = folder(&[("a.json", file.to_string().as_bytes())]);
    let documents = Sources::new([folder.path().join("a.json")]).with_settings(settings).documents().unwrap();
    let report = documents.report();
    (documents.collect(), report)
}

#[test]
fn each_question_is_a_document_that_learns_the_first_answer() {
    let (documents, report) = read(&file(), ReadSettings::default());
    let documents = documents.unwrap();
    assert_eq!(
        texts(&documents),
        [
            "L'été finit en août.\n\nQuestion: Quand ?\n\nAnswer: août",
            "L'été finit en août.\n\nQuestion: Où ?\n\nAnswer: No answer.",
            "ét Moi\n\nQuestion: Qui ?\n\nAnswer: Moi",
        ]
    );
    assert_eq!(documents.iter().map(learned).collect::<Vec<_>>(), [[" août"], [" No answer."], [" Moi"]]);
    assert_eq!((report.questions(), report.impossible(), report.wrong_offsets()), (3, 1, 0));
    assert_eq!((report.documents(), report.skipped(), report.notes()), (3, 0, vec![]));
    assert_eq!(report.bytes(), documents.iter().map(|document| document.text.len() as u64).sum::<u64>());
}

#[test]
fn a_paragraph_with_its_questions_is_running_text() {
    let settings =
        ReadSettings::default().with_squad(SquadDocuments::Paragraphs).with_labels(Labels::french());
    let (documents, report) = read(&file(), settings);
    let documents = documents.unwrap();
    assert_eq!(
        texts(&documents),
        [
            "L'été finit en août.\n\nQuestion : Quand ?\n\nRéponse : août\n\nQuestion : Où ?\n\nRéponse : Sans réponse.",
            "Vide.",
            "ét Moi\n\nQuestion : Qui ?\n\nRéponse : Moi",
        ]
    );
    assert!(documents.iter().all(|document| document.loss.is_none()));
    assert_eq!((report.questions(), report.impossible()), (3, 1));
}

#[test]
fn everything_counts_if_it_is_to() {
    let (documents, _) = read(&file(), ReadSettings::default().with_loss(LossOn::Everything));
    assert!(documents.unwrap().iter().all(|document| document.loss.is_none()));
}

/// A file of one paragraph with these questions.
fn questions(questions: &Value) -> Value {
    json!({"data": [{"paragraphs": [{"context": "Un été à Paris.", "qas": questions}]}]})
}

#[test]
fn an_answer_elsewhere_than_it_is_said_to_be_is_noted_and_used() {
    let answers = json!([{"text": "Paris", "answer_start": 10}, {"text": "à Paris", "answer_start": -1}]);
    let (documents, report) = read(
        &questions(&json!([{"id": "x1", "question": "Où ?", "answers": answers}])),
        ReadSettings::default(),
    );
    assert_eq!(learned(&documents.unwrap()[0]), [" Paris"]);
    assert_eq!((report.questions(), report.wrong_offsets(), report.skipped()), (1, 2, 0));
    let notes = report.notes();
    assert!(
        notes[0].ends_with(
            "a.json, question x1 (line 1): the answer \"Paris\" starts at character 9, not at 10: it is used all the same"
        ),
        "{notes:?}"
    );
    assert!(notes[1].contains("\"à Paris\" starts at character 7, not at -1"), "{notes:?}");
}

#[test]
fn broken_questions_and_paragraphs_are_named_and_the_others_kept() {
    let broken = json!({"data": [{"paragraphs": [
        {"context": "Un été.", "qas": [
            {"id": "q1", "question": "?", "answers": [{"text": "hiver", "answer_start": 0}]},
            {"id": "q2", "question": "?", "answers": []},
            {"id": "q3", "question": 3, "answers": []},
            {"id": "q4", "question": " ", "answers": [{"text": "Un"}]},
            {"question": "?"},
            {"id": "q6", "question": "?", "answers": {"text": "Un"}},
            {"id": "q7", "question": "?", "answers": [{"answer_start": 0}]},
            {"id": "q8", "question": "bon ?", "answers": [{"text": "hiver", "answer_start": 0}, {"text": "été"}]},
        ]},
        {"qas": []}, {"context": 1, "qas": []}, {"context": "a"}, {"context": "a", "qas": 1}, 5,
    ]}]});
    let expected = [
        "question q1 (line 1): the answer \"hiver\" is not in the context",
        "question q2 (line 1): the question has no answer, and is not marked as impossible",
        "question q3 (line 1): \"question\" is a number, expected a string",
        "question q4 (line 1): the question is blank",
        "question without an id (line 1): the field \"answers\" is missing",
        "question q6 (line 1): \"answers\" is an object, expected a list",
        "question q7 (line 1): the field \"text\" is missing (the fields are: \"answer_start\")",
        "record 2 (line 1): the field \"context\" is missing (the fields are: \"qas\")",
        "record 3 (line 1): \"context\" is a number, expected a string",
        "record 4 (line 1): the field \"qas\" is missing (the fields are: \"context\")",
        "record 5 (line 1): \"qas\" is a number, expected a list of questions",
        "record 6 (line 1): expected an object with \"context\", got a number",
    ];
    for squad in [SquadDocuments::Pairs, SquadDocuments::Paragraphs] {
        let settings = ReadSettings::default().with_broken(BrokenRecords::Any).with_squad(squad);
        let (documents, report) = read(&broken, settings);
        assert_eq!(texts(&documents.unwrap()), ["Un été.\n\nQuestion: bon ?\n\nAnswer: été"]);
        assert_eq!((report.skipped(), report.questions()), (12, 1));
        let messages = report.messages();
        let places: Vec<&str> = messages.iter().map(|line| line.split_once("a.json, ").unwrap().1).collect();
        assert_eq!(places, expected);
    }
    let (documents, _) = read(&broken, ReadSettings::default());
    assert!(documents.unwrap_err().to_string().ends_with(expected[0]));
}

#[test]
fn a_file_that_is_cut_short_is_an_error_wherever_that_is() {
    let whole = file().to_string();
    for end in 40..whole.len() {
        if !whole.is_char_boundary(end) {
            continue;
        }
        let folder = folder(&[("a.json", &whole.as_bytes()[..end])]);
        let settings = ReadSettings::default().with_format(vesper_data::source::FormatKind::Squad);
        let documents = Sources::new([folder.path()]).with_settings(settings).documents().unwrap();
        let error = documents.collect::<Result<Vec<Document>>>().unwrap_err().to_string();
        assert!(error.contains("a.json cannot be read as JSON: line 1: "), "{end}: {error}");
    }
    assert!(message("a.json", &whole.as_bytes()[..whole.len() - 20]).starts_with(" cannot be read as JSON"));
}

#[test]
fn questions_of_a_table_have_their_answers_in_two_lists() {
    let lines = [
        json!({"id": "a", "title": "t", "context": "Un été.", "question": "Quand ?",
            "answers": {"text": ["été", "Un"], "answer_start": [3, 1]}}),
        json!({"id": "b", "context": "Un été.", "question": "Qui ?", "answers": {"text": [], "answer_start": []}}),
    ];
    let bytes = format!("{}\n{}\n", lines[0], lines[1]);
    let folder = folder(&[("a.jsonl", bytes.as_bytes())]);
    let documents = Sources::new([folder.path()]).documents().unwrap();
    let report = documents.report();
    let documents: Vec<Document> = documents.map(Result::unwrap).collect();
    assert_eq!(
        texts(&documents),
        ["Un été.\n\nQuestion: Quand ?\n\nAnswer: été", "Un été.\n\nQuestion: Qui ?\n\nAnswer: No answer."]
    );
    assert_eq!(learned(&documents[0]), [" été"]);
    assert_eq!((report.questions(), report.impossible(), report.wrong_offsets()), (2, 1, 1));
    assert!(report.notes()[0].contains("a.jsonl, line 1: the answer \"Un\" starts at character 0, not at 1"));
}
