//! A conversation, and as much of it as a model's context holds.

use tokenizers::Tokenizer;

use super::{ChatTemplate, Message, Role};
use crate::{ModelError, Result};

/// The messages of a conversation so far, with or without a system prompt before them.
///
/// # Examples
/// ```
/// use vesper_model::chat::Conversation;
///
/// let mut conversation = Conversation::new();
/// conversation.push_user("Hello");
/// conversation.push_assistant("Good evening.");
/// assert_eq!(conversation.messages().len(), 2);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Conversation {
    system: Option<String>,
    messages: Vec<Message>,
}

/// What a model is given so that it answers: [`Conversation::prompt`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens of the rendered conversation.
    pub ids: Vec<u32>,
    /// How many of the oldest messages were left out, because the context holds no more.
    pub dropped: usize,
}

impl Conversation {
    /// A conversation in which nothing was said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the system prompt. It is never forgotten; not every template has a place for it.
    pub fn with_system(mut self, prompt: impl Into<String>) -> Self {
        self.system = Some(prompt.into());
        self
    }

    /// The system prompt.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Adds a message. One of the system before all others is the system prompt, if there is none yet.
    pub fn push(&mut self, message: Message) {
        if message.role == Role::System && self.messages.is_empty() && self.system.is_none() {
            self.system = Some(message.content);
        } else {
            self.messages.push(message);
        }
    }

    /// Adds what the user says.
    pub fn push_user(&mut self, content: impl Into<String>) {
        self.push(Message::new(Role::User, content));
    }

    /// Adds what the model answered.
    pub fn push_assistant(&mut self, content: impl Into<String>) {
        self.push(Message::new(Role::Assistant, content));
    }

    /// All messages, the system prompt first: what a template renders.
    pub fn messages(&self) -> Vec<Message> {
        self.from(0)
    }

    /// The system prompt and the messages from the one numbered `start` on.
    fn from(&self, start: usize) -> Vec<Message> {
        let system = self.system.iter().map(|prompt| Message::new(Role::System, prompt.as_str()));
        system.chain(self.messages.iter().skip(start).cloned()).collect()
    }

    /// The ids with which the model is asked for the next answer, no more than leave room in a `context` of that
    /// many tokens for an `answer` of that many.
    ///
    /// Where the whole conversation does not fit, the oldest exchanges (a message of the user and what follows it)
    /// are left out, no more than have to be. The system prompt and the last message of the user stay: where only
    /// they are left, the answer may get less room than asked for, but at least one token. The template writes the
    /// special tokens; the tokenizer adds none.
    ///
    /// # Errors
    /// [`ModelError::MessageTooLong`] when the last exchange and the system prompt alone are too long; the errors of
    /// [`ChatTemplate::render`]; [`ModelError::Tokenizer`].
    pub fn prompt(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        context: usize,
        answer: usize,
    ) -> Result<Prompt> {
        let starts = self.starts();
        let ids = |nth: usize| -> Result<Vec<u32>> {
            template.encode(&self.from(starts.get(nth).copied().unwrap_or_default()), tokenizer)
        };
        let fits = |ids: &[u32]| ids.len().saturating_add(answer) <= context;

        let mut best = (0, ids(0)?);
        if !fits(&best.1) {
            // The first start from which it fits; a later one makes a shorter prompt. The last is taken at any rate.
            let (mut low, mut high) = (1, starts.len() - 1);
            while low < high {
                let middle = usize::midpoint(low, high);
                if fits(&ids(middle)?) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            best = (high, ids(high)?);
        }
        let (nth, ids) = best;
        if !fits(&ids) && ids.len() >= context {
            return Err(ModelError::MessageTooLong { got: ids.len(), limit: context.saturating_sub(1) });
        }
        Ok(Prompt { ids, dropped: starts.get(nth).copied().unwrap_or_default() })
    }

    /// Where the conversation may begin: at its beginning, or at any message of the user. Never empty.
    fn starts(&self) -> Vec<usize> {
        let users = self.messages.iter().enumerate().filter(|(_, message)| message.role == Role::User);
        let later = users.map(|(i, _)| i).filter(|&i| i > 0);
        std::iter::once(0).chain(later).collect()
    }
}
