//! One template: a Jinja program that writes a conversation as text.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, Value};
use serde::Serialize;
use tokenizers::Tokenizer;

use super::python::{self, Raised};
use super::{Message, source};
use crate::hf::read_text;
use crate::{ModelError, Result};

/// The name of the only template in its environment.
const NAME: &str = "chat_template";

/// How much a template may do: about this many instructions, and 64 times as many bytes. A long conversation takes some
/// thousand; a template may come from anywhere.
const FUEL: u64 = 2_000_000;

/// A chat template of Hugging Face's kind.
///
/// It is rendered as `transformers` does: `trim_blocks`, `lstrip_blocks`, `break` and `continue`, `raise_exception`,
/// `strftime_now`, `tojson` as Python writes JSON, `{% generation %}` (which only marks text), and Python's methods of
/// strings, lists and dictionaries. The template sees `messages`, `add_generation_prompt`, `tools` and `documents`
/// (none), the special tokens (`bos_token`, ...), and what [`ChatTemplate::with_variable`] adds.
///
/// What a message says goes into the text as it is. If it spells a special token, the tokenizer takes it for one.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    text: String,
    /// Where it comes from, for errors.
    origin: String,
    variables: BTreeMap<String, Value>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .field("variables", &self.variables)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Reads a template from its text. It knows no special tokens yet.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] names the line of a mistake in the syntax. An unknown filter or function is found
    /// when it is used.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::chat::ChatTemplate;
    /// let template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}";
    /// assert_eq!(ChatTemplate::new(template)?.text(), template);
    /// assert!(ChatTemplate::new("{% for m in messages %}").is_err()); // the loop does not end
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn new(text: &str) -> Result<Self> {
        Self::parse(text, "chat template")
    }

    /// Reads a template from a file, as [`ChatTemplate::new`].
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::InvalidFile`] when the file cannot be read; those of [`ChatTemplate::new`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&read_text(path)?, &path.display().to_string())
    }

    /// Reads the template of the model in `dir`, and its special tokens; `None` where it has no template.
    ///
    /// It is in `chat_template.jinja`, else in `tokenizer_config.json` as `chat_template`: a string, or a list of
    /// `{"name", "template"}`, of which the one named `default` is taken.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::InvalidFile`] when a file cannot be read or has something else in that
    /// place; those of [`ChatTemplate::new`].
    ///
    /// # Examples
    /// ```
    /// use vesper_model::chat::ChatTemplate;
    /// let dir = tempfile::tempdir()?;
    /// assert!(ChatTemplate::read(dir.path())?.is_none());
    /// std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}")?;
    /// assert!(ChatTemplate::read(dir.path())?.is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        Self::read_named(dir, source::DEFAULT)
    }

    /// As [`ChatTemplate::read`], but takes another template of a list, such as `tool_use`.
    ///
    /// # Errors
    /// As [`ChatTemplate::read`].
    pub fn read_named(dir: impl AsRef<Path>, name: &str) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let Some((text, origin)) = source::find(dir, name)? else { return Ok(None) };
        Self::parse(&text, &origin)?.with_tokens_of(dir).map(Some)
    }

    pub(super) fn parse(text: &str, origin: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| invalid(origin, &error))?);
        environment.set_fuel(Some(FUEL));
        python::install(&mut environment);
        environment
            .add_template_owned(NAME, source::without_marks(text))
            .map_err(|error| invalid(origin, &error))?;
        Ok(Self { environment, text: text.to_owned(), origin: origin.to_owned(), variables: BTreeMap::new() })
    }

    /// Gives the template a variable, such as `enable_thinking` or `bos_token`.
    pub fn with_variable(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        self.variables.insert(name.into(), Value::from(Serde(value)));
        self
    }

    /// Gives the template the special tokens of the model in `dir`: what `tokenizer_config.json`, else
    /// `special_tokens_map.json`, names as `bos_token`, `eos_token`, `unk_token`, `pad_token` and so on.
    ///
    /// # Errors
    /// [`ModelError::InvalidFile`] names a token that is neither a string nor an object with a `content`.
    pub fn with_tokens_of(mut self, dir: impl AsRef<Path>) -> Result<Self> {
        for (name, token) in source::special_tokens(dir.as_ref())? {
            self = self.with_variable(name, token);
        }
        Ok(self)
    }

    /// The template as it is written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Fails where nothing in the template reads `messages`: then it is no chat template, but some other text, which says
    /// the same whatever is asked.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] names where it is from.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::chat::ChatTemplate;
    /// assert!(ChatTemplate::new("{{ messages[0].content }}")?.check().is_ok());
    /// let error = ChatTemplate::new("Once upon a time")?.check().unwrap_err().to_string();
    /// assert!(error.contains("`messages`"));
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn check(&self) -> Result<()> {
        let template = self.environment.get_template(NAME).map_err(|error| invalid(&self.origin, &error))?;
        if template.undeclared_variables(false).contains("messages") {
            return Ok(());
        }
        Err(ModelError::ChatTemplate {
            template: self.origin.clone(),
            reason: "not a chat template: nothing in it reads `messages`, the conversation".into(),
        })
    }

    /// The special tokens that it was given, by the names that it knows them by: `bos_token` and so on.
    pub fn special_tokens(&self) -> BTreeMap<String, String> {
        let token = |&name: &&str| Some((name.to_owned(), self.variable(name)?.to_owned()));
        source::TOKENS.iter().filter_map(token).collect()
    }

    /// A variable that is text, such as `eos_token`.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name)?.as_str()
    }

    /// The text of a conversation, with or without the beginning of an answer after it.
    ///
    /// # Errors
    /// [`ModelError::ConversationRefused`] has the text with which the template refuses these messages;
    /// [`ModelError::ChatTemplate`] says what is wrong in the template, and in which line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = Value::from(Serde(messages));
        let mut context = self.variables.clone();
        context.insert("messages".into(), messages);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        for none in ["tools", "documents"] {
            context.entry(none.into()).or_insert(().into());
        }
        let template = self.environment.get_template(NAME).map_err(|error| invalid(&self.origin, &error))?;
        template.render(context).map_err(|error| match raised(&error) {
            Some(reason) => ModelError::ConversationRefused { template: self.origin.clone(), reason },
            None => invalid(&self.origin, &error),
        })
    }

    /// The ids of a conversation and the beginning of an answer. The template writes the special tokens; the
    /// tokenizer adds none.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render`]; [`ModelError::Tokenizer`].
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let text = self.render(messages, true)?;
        let encoding =
            tokenizer.encode(text, false).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// The text of `raise_exception`, if that is what went wrong.
fn raised(error: &Error) -> Option<String> {
    let mut cause = Some(error as &dyn std::error::Error);
    while let Some(error) = cause {
        if let Some(Raised(text)) = error.downcast_ref() {
            return Some(text.clone());
        }
        cause = error.source();
    }
    None
}

fn invalid(origin: &str, error: &Error) -> ModelError {
    let place = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    ModelError::ChatTemplate {
        template: format!("{origin}{place}"),
        reason: format!("{}{detail}", error.kind()),
    }
}
