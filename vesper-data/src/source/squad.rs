//! Questions on paragraphs: SQuAD 1.1, SQuAD 2, and the data sets in their layout, such as FQuAD and PIAF.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::field::kind;
use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::json_stream::JsonStream;
use super::layout::{Rendered, Turn, render};
use super::settings::too_long;
use super::{Document, FieldPath, LossOn, SquadDocuments, field, record as records};
use crate::error::{DataError, Place, Result};

/// `{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": [...]}]}]}]}`.
///
/// It is read paragraph by paragraph. Of several answers to a question the first counts. An answer's offset is in
/// characters; where the answer is elsewhere in the context it is used all the same, and noted; where it is nowhere
/// in it the next answer counts, and the question is a broken record if there is none.
pub(super) struct Squad;

impl Format for Squad {
    fn name(&self) -> &'static str {
        "squad"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["json"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let path = input.path().clone();
        let stream = JsonStream::new(input, context.settings.max_record());
        let mut reader = Paragraphs {
            stream,
            source: Source { context: context.clone(), path },
            state: State::Start,
            pairs: None,
            ready: VecDeque::new(),
            number: 0,
        };
        Ok(Box::new(std::iter::from_fn(move || reader.next_document().transpose())))
    }
}

#[derive(Clone, Copy)]
enum State {
    Start,
    /// Within the list of articles.
    Articles,
    /// Within an article.
    Article,
    /// Within an article's list of paragraphs.
    Paragraphs,
    Done,
}

/// A paragraph, and those of its questions that are still to be read.
struct Paragraph {
    context: String,
    questions: std::vec::IntoIter<Value>,
    line: u64,
}

struct Paragraphs {
    stream: JsonStream,
    source: Source,
    state: State,
    /// The paragraph whose questions are given one by one.
    pairs: Option<Paragraph>,
    /// What is given before anything more is read.
    ready: VecDeque<Result<Document>>,
    /// The number of the paragraph that was read last, from 1.
    number: u64,
}

impl Paragraphs {
    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return ready.map(Some);
            }
            if let Some(paragraph) = &mut self.pairs {
                match paragraph.questions.next() {
                    Some(question) => {
                        let rendered = self.source.pair(&paragraph.context, &question, paragraph.line)?;
                        return Ok(Some(self.source.document(rendered, paragraph.line)));
                    }
                    None => self.pairs = None,
                }
                continue;
            }
            self.state = match self.state {
                State::Start => self.go_to("data")?,
                State::Articles if self.stream.next_element()? => {
                    self.stream.enter(b'{')?;
                    State::Article
                }
                State::Articles => {
                    self.stream.finish()?;
                    State::Done
                }
                State::Article => self.next_field()?,
                State::Paragraphs if self.stream.next_element()? => {
                    self.paragraph()?;
                    State::Paragraphs
                }
                State::Paragraphs => State::Article,
                State::Done => return Ok(None),
            };
        }
    }

    /// Goes into the list of the document's field `name`.
    fn go_to(&mut self, name: &str) -> Result<State> {
        self.stream.enter(b'{')?;
        let mut others = Vec::new();
        while let Some(key) = self.stream.next_key()? {
            if key == name {
                self.stream.enter(b'[')?;
                return Ok(State::Articles);
            }
            self.stream.skip_value()?;
            others.push(key);
            others.truncate(9);
        }
        Err(self.stream.failed(field::no_field(name, "", others.iter().map(String::as_str))))
    }

    /// Goes into the list of the article's paragraphs, or out of the article.
    fn next_field(&mut self) -> Result<State> {
        while let Some(key) = self.stream.next_key()? {
            if key == "paragraphs" {
                self.stream.enter(b'[')?;
                return Ok(State::Paragraphs);
            }
            self.stream.skip_value()?;
        }
        Ok(State::Articles)
    }

    /// Reads a paragraph.
    fn paragraph(&mut self) -> Result<()> {
        let raw = self.stream.value()?;
        self.number += 1;
        let line = raw.line;
        let limit = self.source.context.settings.max_record();
        let paragraph = raw
            .bytes
            .ok_or_else(|| too_long("paragraph", limit))
            .and_then(|bytes| records::parse(&bytes, Some(line)))
            .and_then(|value| paragraph(value, line));
        let paragraph = match paragraph {
            Ok(paragraph) => paragraph,
            Err(problem) => {
                let place = Place::Record { number: self.number, line };
                self.ready.push_back(Err(self.source.broken(place, problem)));
                return Ok(());
            }
        };
        match self.source.context.settings.squad {
            SquadDocuments::Pairs => self.pairs = Some(paragraph),
            SquadDocuments::Paragraphs => {
                let rendered = self.source.whole(paragraph, &mut self.ready);
                if !rendered.text.trim().is_empty() {
                    self.ready.push_back(Ok(self.source.document(rendered, line)));
                }
            }
        }
        Ok(())
    }
}

fn paragraph(value: Value, line: u64) -> Result<Paragraph, String> {
    let context = FieldPath::from("context").text(&value)?;
    let Value::Object(mut fields) = value else {
        return Err(format!("the paragraph is {}, expected an object", kind(&value)));
    };
    match fields.remove("qas") {
        Some(Value::Array(questions)) => Ok(Paragraph { context, questions: questions.into_iter(), line }),
        Some(other) => Err(format!("\"qas\" is {}, expected a list of questions", kind(&other))),
        None => Err(field::no_field("qas", "", fields.keys().map(String::as_str))),
    }
}

/// Where questions come from.
struct Source {
    context: Context,
    path: Arc<Path>,
}

impl Source {
    fn broken(&self, place: Place, problem: String) -> DataError {
        DataError::Record { path: self.path.to_path_buf(), place, problem }
    }

    fn document(&self, rendered: Rendered, line: u64) -> Document {
        Document { text: rendered.text, path: self.path.clone(), line, loss: rendered.loss }
    }

    /// The question and the answer of `value`, and the turns they make.
    fn turns(&self, text: &str, value: &Value, line: u64) -> Result<[Turn<'_>; 2]> {
        let place = || Place::Question { id: id(value), line };
        let question = Question::of(value).map_err(|problem| self.broken(place(), problem))?;
        question
            .turns(text, &self.context, &self.path, place)
            .map_err(|problem| self.broken(place(), problem))
    }

    /// A paragraph with one of its questions.
    fn pair(&self, text: &str, question: &Value, line: u64) -> Result<Rendered> {
        let turns = self.turns(text, question, line)?;
        let context = Turn { label: "", text: text.into(), answer: false };
        Ok(render([context].into_iter().chain(turns), self.context.settings.loss))
    }

    /// A paragraph with all of its questions but for the broken ones, which go to `broken`.
    fn whole(&self, paragraph: Paragraph, broken: &mut VecDeque<Result<Document>>) -> Rendered {
        let Paragraph { context, questions, line } = paragraph;
        let mut turns = vec![Turn { label: "", text: Cow::from(&context), answer: false }];
        for question in questions {
            match self.turns(&context, &question, line) {
                Ok(both) => turns.extend(both),
                Err(error) => broken.push_back(Err(error)),
            }
        }
        render(turns, LossOn::Everything)
    }
}

/// The id of a question, as text.
fn id(question: &Value) -> String {
    match question.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(id @ Value::Number(_)) => id.to_string(),
        _ => "without an id".to_owned(),
    }
}

struct Question {
    text: String,
    /// The answers, and the character of the context at which each is said to start.
    answers: Vec<(String, Option<i64>)>,
    impossible: bool,
}

impl Question {
    /// A question of a SQuAD file.
    fn of(value: &Value) -> Result<Self, String> {
        let text = FieldPath::from("question").text(value)?;
        let impossible = value.get("is_impossible").and_then(Value::as_bool).unwrap_or(false);
        let mut answers = Vec::new();
        match value.get("answers") {
            Some(Value::Array(list)) => {
                for answer in list {
                    let text = FieldPath::from("text").text(answer)?;
                    answers.push((text, answer.get("answer_start").and_then(Value::as_i64)));
                }
            }
            Some(other) => return Err(format!("\"answers\" is {}, expected a list", kind(other))),
            None if impossible => {}
            None => return Err("the field \"answers\" is missing".to_owned()),
        }
        Ok(Self { text, answers, impossible })
    }

    /// A question of a table, with the answers as two lists: `{"text": [...], "answer_start": [...]}`.
    fn of_row(row: &Value) -> Result<Self, String> {
        let Some(texts) =
            row.get("answers").and_then(|answers| answers.get("text")).and_then(Value::as_array)
        else {
            return Self::of(row);
        };
        let starts =
            row.get("answers").and_then(|answers| answers.get("answer_start")).and_then(Value::as_array);
        let start = |at: usize| starts.and_then(|starts| starts.get(at)).and_then(Value::as_i64);
        let mut answers = Vec::new();
        for (at, text) in texts.iter().enumerate() {
            let Value::String(text) = text else {
                return Err(format!("\"answers.text.{at}\" is {}, expected a string", kind(text)));
            };
            answers.push((text.clone(), start(at)));
        }
        // A table says by having no answer that there is none.
        let impossible = row.get("is_impossible").and_then(Value::as_bool).unwrap_or(answers.is_empty());
        Ok(Self { text: FieldPath::from("question").text(row)?, answers, impossible })
    }

    /// The question and its answer.
    fn turns<'a>(
        self,
        text: &str,
        context: &'a Context,
        path: &Path,
        place: impl Fn() -> Place,
    ) -> Result<[Turn<'a>; 2], String> {
        if self.text.trim().is_empty() {
            return Err("the question is blank".to_owned());
        }
        let labels = &context.settings.labels;
        let answer: Cow<'_, str> = if self.impossible {
            labels.no_answer.as_str().into()
        } else {
            let answer = self.answer(text, |answer, found, said| {
                context.report.wrong_offset(|| {
                    let (path, place) = (path.display(), place());
                    format!(
                        "{path}, {place}: the answer {answer:?} starts at character {found}, not at {said}: it is \
                         used all the same"
                    )
                });
            });
            answer?.to_owned().into()
        };
        context.report.question(self.impossible);
        Ok([
            Turn { label: &labels.question, text: self.text.into(), answer: false },
            Turn { label: &labels.answer, text: answer, answer: true },
        ])
    }

    /// The first answer that is in `text`; those that are elsewhere than they are said to be go to `wrong`.
    fn answer(&self, text: &str, wrong: impl Fn(&str, usize, i64)) -> Result<&str, String> {
        let mut first = None;
        for (answer, start) in self.answers.iter().filter(|(answer, _)| !answer.trim().is_empty()) {
            let at = start.is_none_or(|start| {
                let start = usize::try_from(start).ok();
                let offset = start.and_then(|start| text.char_indices().map(|(at, _)| at).nth(start));
                offset.and_then(|at| text.get(at..)).is_some_and(|rest| rest.starts_with(answer))
            });
            let found = text.find(answer);
            if let (false, Some(found), Some(start)) = (at, found, start) {
                let before = text.get(..found).unwrap_or_default();
                wrong(answer, before.chars().count(), *start);
            }
            if found.is_some() {
                first.get_or_insert(answer.as_str());
            }
        }
        first.ok_or_else(|| match self.answers.first() {
            None => "the question has no answer, and is not marked as impossible".to_owned(),
            Some((answer, _)) => format!("the answer {answer:?} is not in the context"),
        })
    }
}

/// A row of a table with `context`, `question` and `answers`.
pub(super) fn record(
    row: &Value,
    context: &Context,
    path: &Path,
    place: &impl Fn() -> Place,
) -> Result<Rendered, String> {
    let text = FieldPath::from("context").text(row)?;
    let question = Question::of_row(row)?;
    let turns = question.turns(&text, context, path, place)?;
    let before = Turn { label: "", text: text.into(), answer: false };
    Ok(render([before].into_iter().chain(turns), context.settings.loss))
}
