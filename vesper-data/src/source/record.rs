//! From a record of named fields, of whichever format, to a document.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::field::{kind, no_field};
use super::format::Context;
use super::layout::{Rendered, Turn, render};
use super::{Document, FieldPath, Fields, Labels, squad};
use crate::error::{Place, one_line};

/// Which fields of a record make its text.
pub(super) enum Layout {
    Text(FieldPath),
    Chat(FieldPath),
    Instruction { instruction: FieldPath, input: Option<FieldPath>, output: FieldPath },
    Question,
}

impl Layout {
    /// That of the settings; `has` tells which fields the record has.
    pub(super) fn of(fields: &Fields, has: impl Fn(&str) -> bool) -> Self {
        match fields {
            Fields::Text(path) => Self::Text(path.clone()),
            Fields::Chat(path) => Self::Chat(path.clone()),
            Fields::Instruction { instruction, input, output } => Self::Instruction {
                instruction: instruction.clone(),
                input: input.clone(),
                output: output.clone(),
            },
            Fields::Auto => {
                let all = |names: &[&str]| names.iter().all(|name| has(name));
                if has("text") {
                    Self::Text("text".into())
                } else if let Some(name) = ["messages", "conversations"].into_iter().find(|name| has(name)) {
                    Self::Chat(name.into())
                } else if all(&["instruction", "output"]) {
                    Self::Instruction {
                        instruction: "instruction".into(),
                        input: Some("input".into()),
                        output: "output".into(),
                    }
                } else if all(&["context", "question", "answers"]) {
                    Self::Question
                } else {
                    // What is missing most likely.
                    Self::Text("text".into())
                }
            }
        }
    }

    /// The paths that are read; of those that are not there, the optional ones come last, behind the number of others.
    pub(super) fn paths(&self) -> (Vec<FieldPath>, usize) {
        let paths = match self {
            Self::Text(path) | Self::Chat(path) => vec![path.clone()],
            Self::Instruction { instruction, input, output } => {
                [instruction, output].into_iter().chain(input).cloned().collect()
            }
            Self::Question => {
                ["context", "question", "answers", "id", "is_impossible"].map(FieldPath::from).to_vec()
            }
        };
        let needed = match self {
            Self::Text(_) | Self::Chat(_) => 1,
            Self::Instruction { .. } => 2,
            Self::Question => 3,
        };
        (paths, needed)
    }
}

/// The JSON value that `bytes` are; `line` is the line of the file on which they start, if they can have several.
pub(super) fn parse(bytes: &[u8], line: Option<u64>) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|error| {
        let column = error.column();
        // Without serde's own "at line 1 column n": the line it means is not the file's.
        let message = one_line(&error);
        let message = message.rsplit_once(" at line ").map_or("", |(message, _)| message);
        match line {
            Some(line) if error.line() > 1 => {
                let line = line + error.line() as u64 - 1;
                format!("invalid JSON at line {line}, column {column}: {message}")
            }
            _ => format!("invalid JSON at column {column}: {message}"),
        }
    })
}

/// The document of a record; `None` if it is blank, or what is wrong with it.
pub(super) fn document(
    record: &Value,
    context: &Context,
    path: &Arc<Path>,
    place: impl Fn() -> Place,
) -> Result<Option<Document>, String> {
    let Value::Object(fields) = record else {
        return Err(format!("expected an object like {{\"text\": \"...\"}}, got {}", kind(record)));
    };
    let settings = &context.settings;
    let labels = &settings.labels;
    let rendered = match Layout::of(&settings.fields, |name| fields.contains_key(name)) {
        Layout::Text(path) => Rendered { text: path.text(record)?, loss: None },
        Layout::Chat(path) => render(messages(path.get(record)?, path.as_str(), labels)?, settings.loss),
        Layout::Instruction { instruction, input, output } => {
            let mut request = instruction.text(record)?;
            // An input may be missing or null, as it may be blank.
            if let Some(input) = input
                && input.get(record).is_ok_and(|value| !value.is_null())
            {
                let input = input.text(record)?;
                if !input.trim().is_empty() {
                    request = format!("{request}\n\n{input}");
                }
            }
            let answer = output.text(record)?;
            if answer.trim().is_empty() {
                return Err(format!("{:?} is blank", output.as_str()));
            }
            let turns = [
                Turn { label: &labels.user, text: request.into(), answer: false },
                Turn { label: &labels.assistant, text: answer.into(), answer: true },
            ];
            render(turns, settings.loss)
        }
        Layout::Question => squad::record(record, context, path, &place)?,
    };
    let line = match place() {
        Place::Line(line) | Place::Row(line) | Place::Record { line, .. } | Place::Question { line, .. } => {
            line
        }
    };
    let Rendered { text, loss } = rendered;
    if text.len() > settings.max_record() {
        return Err(super::settings::too_long("document", settings.max_record()));
    }
    let blank = text.trim().is_empty();
    Ok((!blank).then(|| Document { text, path: path.clone(), line, loss }))
}

/// The turns of a conversation.
fn messages<'a>(value: &'a Value, name: &str, labels: &'a Labels) -> Result<Vec<Turn<'a>>, String> {
    let Value::Array(messages) = value else {
        return Err(format!("{name:?} is {}, expected a list of messages", kind(value)));
    };
    let mut turns = Vec::new();
    let mut answers = 0;
    for (at, message) in messages.iter().enumerate() {
        let place = format!("{name}.{at}");
        let Value::Object(fields) = message else {
            return Err(format!(
                "{place:?} is {}, expected an object with \"role\" and \"content\"",
                kind(message)
            ));
        };
        let field = |names: [&'static str; 2]| {
            names.into_iter().find_map(|name| Some((name, fields.get(name)?))).ok_or_else(|| {
                let within = format!(" of {place:?}");
                no_field(&format!("{place}.{}", names[0]), &within, fields.keys().map(String::as_str))
            })
        };
        let (role_name, role) = field(["role", "from"])?;
        let Some(role) = role.as_str() else {
            return Err(format!("\"{place}.{role_name}\" is {}, expected a string", kind(role)));
        };
        let (content_name, content) = field(["content", "value"])?;
        let (label, assistant) = match role {
            "system" | "developer" => (&labels.system, false),
            "user" | "human" | "prompter" => (&labels.user, false),
            "assistant" | "gpt" | "bot" | "chatgpt" | "model" => (&labels.assistant, true),
            "tool" | "function" | "observation" | "ipython" => (&labels.tool, false),
            other => {
                return Err(format!(
                    "\"{place}.{role_name}\" is {other:?}, expected system, user, assistant or tool"
                ));
            }
        };
        // Data sets mark with it the answers that are not to be learned.
        let weight = ["loss_weight", "weight"].into_iter().find_map(|name| fields.get(name)?.as_f64());
        let answer = assistant && weight != Some(0.0);
        let text = contents(content, &format!("{place}.{content_name}"))?;
        answers += usize::from(assistant && !text.trim().is_empty());
        turns.push(Turn { label, text, answer });
    }
    if answers == 0 {
        return Err(format!("{name:?} has no turn of an assistant"));
    }
    Ok(turns)
}

/// The text of a message: a string, or a list of blocks of text, which are joined with line breaks.
fn contents<'a>(value: &'a Value, place: &str) -> Result<Cow<'a, str>, String> {
    match value {
        Value::String(text) => Ok(text.into()),
        // What calls a tool, instead of saying something.
        Value::Null => Ok("".into()),
        Value::Array(blocks) => {
            let texts = blocks.iter().enumerate().map(|(at, block)| {
                let text = ["text", "value"].into_iter().find_map(|name| block.get(name)?.as_str());
                text.or_else(|| block.as_str()).ok_or_else(|| {
                    let kind = match block.get("type").and_then(Value::as_str) {
                        Some(name) => format!("of the type {name:?}"),
                        None => kind(block).to_owned(),
                    };
                    format!("\"{place}.{at}\" is {kind}, expected a text")
                })
            });
            let texts = texts.collect::<Result<Vec<&str>, String>>()?;
            Ok(match texts[..] {
                [text] => text.into(),
                _ => texts.join("\n").into(),
            })
        }
        other => Err(format!("{place:?} is {}, expected a string or a list of texts", kind(other))),
    }
}
