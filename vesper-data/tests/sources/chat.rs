//! Instructions and conversations.

use vesper_data::source::{Fields, Labels, LossOn};
use vesper_data::{Document, ReadSettings};

use crate::{learned, message, read_with};

fn one(line: &str, settings: ReadSettings) -> Document {
    let mut documents = read_with("a.jsonl", line.as_bytes(), settings).unwrap();
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

#[test]
fn an_instruction_is_a_question_and_its_output_the_answer_that_is_learned() {
    let line = r#"{"instruction": "Corrige.", "input": "jaime", "output": "j'aime"}"#;
    let document = one(line, ReadSettings::default());
    assert_eq!(document.text, "User: Corrige.\n\njaime\n\nAssistant: j'aime");
    assert_eq!(learned(&document), [" j'aime"]);
    for input in [r#""input": " ", "#, r#""input": null, "#, ""] {
        let line = format!("{{\"instruction\": \"Dis oui.\", {input}\"output\": \"Oui.\"}}");
        assert_eq!(one(&line, ReadSettings::default()).text, "User: Dis oui.\n\nAssistant: Oui.");
    }
    let settings = ReadSettings::default().with_loss(LossOn::Everything).with_labels(Labels::french());
    let document = one(line, settings);
    assert_eq!(document.text, "Utilisateur : Corrige.\n\njaime\n\nAssistant : j'aime");
    assert_eq!(document.loss, None);
}

#[test]
fn instructions_of_other_names_are_set() {
    let fields =
        Fields::Instruction { instruction: "q".into(), input: Some("ctx.0".into()), output: "a.text".into() };
    let line = r#"{"q": "Qui ?", "ctx": ["Lui.", "x"], "a": {"text": "Moi."}}"#;
    let document = one(line, ReadSettings::default().with_fields(fields));
    assert_eq!(document.text, "User: Qui ?\n\nLui.\n\nAssistant: Moi.");
}

#[test]
fn a_conversation_is_its_turns_and_those_of_the_assistant_are_learned() {
    let line = r#"{"messages": [
        {"role": "system", "content": "Sois bref."}, {"role": "user", "content": "Bonjour !"},
        {"role": "assistant", "content": "Salut."}, {"role": "user", "content": "Ça va ?"},
        {"role": "assistant", "content": null, "tool_calls": []}, {"role": "tool", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "Oui."}, {"type": "text", "value": "Et toi ?"}]}
    ]}"#
    .replace('\n', " ");
    let document = one(&line, ReadSettings::default());
    assert_eq!(
        document.text,
        "System: Sois bref.\n\nUser: Bonjour !\n\nAssistant: Salut.\n\nUser: Ça va ?\n\nTool: 42\n\n\
         Assistant: Oui.\nEt toi ?"
    );
    assert_eq!(learned(&document), [" Salut.\n\n", " Oui.\nEt toi ?"]);
}

#[test]
fn sharegpt_conversations_and_lists_at_other_paths_are_read() {
    let turns = r#"[{"from": "human", "value": "Oui ?"}, {"from": "gpt", "value": "Non."}]"#;
    for (line, settings) in [
        (format!("{{\"conversations\": {turns}}}"), ReadSettings::default()),
        (format!("{{\"x\": {{\"y\": {turns}}}}}"), ReadSettings::default().with_chat("x.y")),
    ] {
        let document = one(&line, settings);
        assert_eq!(document.text, "User: Oui ?\n\nAssistant: Non.");
        assert_eq!(learned(&document), [" Non."]);
    }
}

#[test]
fn an_answer_of_weight_zero_is_not_learned() {
    let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "loss_weight": 1.0}]}"#;
    assert_eq!(learned(&one(line, ReadSettings::default())), [" d"]);
}

#[test]
fn a_text_is_taken_before_a_conversation() {
    let line = r#"{"text": "t", "messages": [], "instruction": "i", "output": "o"}"#;
    let document = one(line, ReadSettings::default());
    assert_eq!((document.text.as_str(), document.loss), ("t", None));
}

#[test]
fn what_is_wrong_with_a_conversation_is_named() {
    for (line, expected) in [
        (r#"{"messages": "a"}"#, "\"messages\" is a string, expected a list of messages"),
        (r#"{"messages": []}"#, "\"messages\" has no turn of an assistant"),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}"#,
            "\"messages\" has no turn of an assistant",
        ),
        (
            r#"{"messages": ["a"]}"#,
            "\"messages.0\" is a string, expected an object with \"role\" and \"content\"",
        ),
        (
            r#"{"messages": [{"content": "a"}]}"#,
            "the field \"messages.0.role\" is missing (the fields of \"messages.0\" are: \"content\")",
        ),
        (
            r#"{"messages": [{"role": "user"}]}"#,
            "the field \"messages.0.content\" is missing (the fields of \"messages.0\" are: \"role\")",
        ),
        (
            r#"{"messages": [{"role": "narrator", "content": "a"}]}"#,
            "\"messages.0.role\" is \"narrator\", expected system, user, assistant or tool",
        ),
        (
            r#"{"messages": [{"from": 1, "value": "a"}]}"#,
            "\"messages.0.from\" is a number, expected a string",
        ),
        (
            r#"{"messages": [{"role": "user", "content": 1}]}"#,
            "\"messages.0.content\" is a number, expected a string or a list of texts",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}"#,
            "\"messages.0.content.0\" is of the type \"image\", expected a text",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [1]}]}"#,
            "\"messages.0.content.0\" is a number, expected a text",
        ),
        (r#"{"instruction": "a", "output": " "}"#, "\"output\" is blank"),
        (r#"{"instruction": 1, "output": "a"}"#, "\"instruction\" is a number, expected a string"),
        (r#"{"instruction": "a", "input": 1, "output": "a"}"#, "\"input\" is a number, expected a string"),
        (r#"{"instruction": "a"}"#, "the field \"text\" is missing (the fields are: \"instruction\")"),
    ] {
        assert_eq!(message("a.jsonl", line.as_bytes()), format!(", line 1: {expected}"), "{line}");
    }
}
