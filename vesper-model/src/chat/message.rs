//! What was said, and by whom.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who says a message. In JSON and in a template it is a string.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Role {
    /// Says how to answer, before the conversation begins.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// Any other, such as `tool`; what becomes of it is up to the template.
    Other(String),
}

impl Role {
    /// The name that templates know it by.
    pub fn as_str(&self) -> &str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Other(name) => name,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<&str> for Role {
    fn from(name: &str) -> Self {
        match name {
            "system" => Self::System,
            "user" => Self::User,
            "assistant" => Self::Assistant,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl From<String> for Role {
    fn from(name: String) -> Self {
        Self::from(name.as_str())
    }
}

impl From<Role> for String {
    fn from(role: Role) -> Self {
        match role {
            Role::Other(name) => name,
            known => known.as_str().to_owned(),
        }
    }
}

/// One message of a conversation, in JSON `{"role": "user", "content": "..."}`.
///
/// # Examples
/// ```
/// use vesper_model::chat::{Message, Role};
///
/// let message: Message = serde_json::from_str(r#"{"role": "user", "content": "Bonjour !"}"#)?;
/// assert_eq!(message, Message::new(Role::User, "Bonjour !"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}
