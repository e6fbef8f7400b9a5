//! What `apply_chat_template` gives: golden/templates.py.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;
use vesper_model::ModelError;
use vesper_model::chat::{ChatTemplate, Message};

#[derive(Deserialize)]
pub(crate) struct Golden {
    tokenizer: Value,
    variables: BTreeMap<String, Value>,
    pub(crate) broken: BTreeMap<String, String>,
    conversations: BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    template: String,
    conversation: String,
    add_generation_prompt: bool,
    variables: BTreeMap<String, Value>,
    text: Option<String>,
    ids: Option<Vec<u32>>,
    raised: Option<String>,
    broken: Option<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat/golden")
}

pub(crate) fn golden() -> Golden {
    serde_json::from_str(&std::fs::read_to_string(folder().join("templates.json")).unwrap()).unwrap()
}

/// A template in the style of a well-known model, with the tokens of [`tokenizer`].
pub(crate) fn template(name: &str) -> ChatTemplate {
    ChatTemplate::from_file(folder().join("templates").join(name))
        .unwrap()
        .with_variable("bos_token", "<s>")
        .with_variable("eos_token", "</s>")
}

/// Bytes and some special tokens; encodes with a `<s>` before the text unless it is told not to.
pub(crate) fn tokenizer() -> Tokenizer {
    golden().tokenizer.to_string().parse().unwrap()
}

#[test]
fn conversations_are_written_as_transformers_writes_them() {
    let golden = golden();
    let tokenizer = tokenizer();
    let mut counts = (0, 0, 0);
    for case in &golden.cases {
        if case.broken.is_some() {
            continue;
        }
        let mut template = template(&case.template);
        for (name, value) in golden.variables.iter().chain(&case.variables) {
            template = template.with_variable(name, value);
        }
        let messages = &golden.conversations[&case.conversation];
        let about = format!("{}, {}, {}", case.template, case.conversation, case.add_generation_prompt);
        match (template.render(messages, case.add_generation_prompt), &case.text) {
            (Ok(text), Some(expected)) => {
                assert_eq!(&text, expected, "{about}");
                counts.0 += 1;
            }
            (Err(ModelError::ConversationRefused { reason, .. }), None) => {
                assert_eq!(Some(&reason), case.raised.as_ref(), "{about}");
                counts.1 += 1;
            }
            (got, _) => panic!("{about}: {got:?}, expected {case:?}"),
        }
        if let (Some(ids), true) = (&case.ids, case.add_generation_prompt) {
            assert_eq!(&template.encode(messages, &tokenizer).unwrap(), ids, "{about}");
            counts.2 += 1;
        }
    }
    // Nothing was left out.
    assert!(counts.0 > 200 && counts.1 > 30 && counts.2 > 20, "{counts:?}");
}

#[test]
fn what_transformers_cannot_render_is_an_error_that_names_the_line() {
    let golden = golden();
    let messages = &golden.conversations["one"];
    for (name, line, part) in [
        ("unclosed.jinja", 3, "syntax error"),
        ("unfinished.jinja", 3, "syntax error"),
        ("filter.jinja", 2, "shout"),
        ("function.jinja", 3, "shout"),
        ("attribute.jinja", 1, "undefined"),
        ("method.jinja", 2, "shout"),
        ("addition.jinja", 1, "invalid operation"),
    ] {
        assert!(golden.cases.iter().any(|case| case.template == name && case.broken.is_some()));
        let error = ChatTemplate::new(&golden.broken[name])
            .and_then(|template| template.render(messages, true))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(&format!("chat template, line {line}: ")), "{name}: {error}");
        assert!(error.contains(part) && !error.contains('\n'), "{name}: {error}");
    }
    assert_eq!(golden.broken.len(), 7);
}
