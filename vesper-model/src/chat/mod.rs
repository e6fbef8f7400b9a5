//! Conversations as a model was trained to read them: Hugging Face's chat templates.
//!
//! A [`ChatTemplate`] is a small Jinja program that comes with a model. It turns the [`Message`]s of a
//! [`Conversation`] into the text that the model continues. [`Conversation::prompt`] renders it, forgets the oldest
//! exchanges where the context is too short for all of them, and gives the ids.
//!
//! # Examples
//! ```
//! use vesper_model::chat::{ChatTemplate, Conversation};
//!
//! let template = ChatTemplate::new(
//!     "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>",
//! )?;
//! let mut conversation = Conversation::new().with_system("Be brief.");
//! conversation.push_user("Où est la mer ?");
//! assert_eq!(
//!     template.render(&conversation.messages(), true)?,
//!     "<system>Be brief.\n<user>Où est la mer ?\n<assistant>"
//! );
//! # Ok::<(), vesper_model::ModelError>(())
//! ```
//!
//! # References
//! [Chat templates](https://huggingface.co/docs/transformers/chat_templating) in the documentation of `transformers`.

mod conversation;
mod message;
mod methods;
mod python;
mod source;
mod template;

pub use conversation::{Conversation, Prompt};
pub use message::{Message, Role};
pub use template::ChatTemplate;
