//! What was said so far, in memory and in files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vesper_model::chat::{Conversation, Message, Role};

use crate::{files, runs};

/// A message and its answer; for a model that continues, the beginning of a text and the rest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Turn {
    /// What the user wrote.
    pub question: String,
    /// What the model wrote, so far.
    pub answer: String,
}

/// All turns, and the file that they were saved to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transcript {
    /// The system prompt.
    pub system: Option<String>,
    /// The turns, the oldest first.
    pub turns: Vec<Turn>,
    /// The file that may be written again.
    file: Option<PathBuf>,
}

impl Transcript {
    /// Nothing was said yet.
    pub fn new(system: Option<String>) -> Self {
        Self { system, ..Self::default() }
    }

    /// What a model is asked: every turn before the last, and the question of the last.
    pub fn conversation(&self) -> Conversation {
        let mut conversation = Conversation::new();
        if let Some(system) = &self.system {
            conversation = conversation.with_system(system);
        }
        let last = self.turns.len().saturating_sub(1);
        for (i, turn) in self.turns.iter().enumerate() {
            conversation.push_user(&turn.question);
            if i < last {
                conversation.push_assistant(&turn.answer);
            }
        }
        conversation
    }

    /// The text of the last turn, for a model that continues text to go on with.
    ///
    /// # Errors
    /// A model that answers, or nothing to go on with.
    pub fn text_to_continue(&self, answers: bool) -> Result<String> {
        match self.turns.last() {
            _ if answers => {
                bail!("this model answers, and does not go on with a text; /regenerate answers again")
            }
            None => bail!("there is no text to go on with yet"),
            Some(turn) => Ok(format!("{}{}", turn.question, turn.answer)),
        }
    }

    /// Forgets the turns. The system prompt stays.
    pub fn clear(&mut self) {
        *self = Self::new(self.system.take());
    }

    /// Writes the conversation to a file: Markdown where its name ends in `.md`, else a message a line as JSON. Without
    /// a name, to the file that it was saved to, else to a new one among the runs. A file that is not of this
    /// conversation is not overwritten.
    ///
    /// # Errors
    /// Nothing to save, a file that exists or cannot be written: names it.
    pub fn save(&mut self, path: Option<PathBuf>) -> Result<PathBuf> {
        if self.turns.is_empty() {
            bail!("there is nothing to save yet");
        }
        let path = match path.or_else(|| self.file.clone()) {
            Some(path) => path,
            None => new_file()?,
        };
        if path.exists() && self.file.as_ref() != Some(&path) {
            bail!("{} exists already: choose another name", path.display());
        }
        let text = if is_markdown(&path) { self.markdown() } else { self.json_lines()? };
        files::write(&path, text.as_bytes())?;
        self.file = Some(path.clone());
        Ok(path)
    }

    /// Reads what [`Transcript::save`] wrote as JSON Lines.
    ///
    /// # Errors
    /// A file that cannot be read, or a line that is no message or not in its turn: names the file and the line.
    pub fn load(path: &Path) -> Result<Self> {
        if is_markdown(path) {
            bail!("{}: Markdown is written to be read by people; load a file of JSON Lines", path.display());
        }
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let text =
            String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
        let mut transcript = Self { file: Some(path.into()), ..Self::default() };
        // Whether the last turn waits for its answer.
        let mut open = false;
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("{}, line {}", path.display(), i + 1);
            let message: Message = serde_json::from_str(line).with_context(place)?;
            match (message.role, transcript.turns.last_mut()) {
                (Role::System, None) if transcript.system.is_none() => {
                    transcript.system = Some(message.content);
                }
                (Role::User, _) if !open => {
                    transcript.turns.push(Turn { question: message.content, answer: String::new() });
                    open = true;
                }
                (Role::Assistant, Some(turn)) if open => {
                    turn.answer = message.content;
                    open = false;
                }
                (role, _) => {
                    let expected = if open { "assistant" } else { "user" };
                    bail!("{}: a message of the {role}, expected the {expected}'s", place());
                }
            }
        }
        if transcript.turns.is_empty() {
            bail!("{}: no conversation in it", path.display());
        }
        Ok(transcript)
    }

    fn json_lines(&self) -> Result<String> {
        let mut text = String::new();
        let mut line = |role: Role, content: &str| -> Result<()> {
            text += &serde_json::to_string(&Message::new(role, content))?;
            text.push('\n');
            Ok(())
        };
        if let Some(system) = &self.system {
            line(Role::System, system)?;
        }
        for turn in &self.turns {
            line(Role::User, &turn.question)?;
            line(Role::Assistant, &turn.answer)?;
        }
        Ok(text)
    }

    fn markdown(&self) -> String {
        let mut parts = Vec::new();
        if let Some(system) = &self.system {
            parts.push(format!("## System\n\n{}\n", system.trim()));
        }
        for turn in &self.turns {
            parts.push(format!("## User\n\n{}\n", turn.question.trim()));
            parts.push(format!("## Assistant\n\n{}\n", turn.answer.trim()));
        }
        parts.join("\n")
    }
}

fn is_markdown(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("md"))
}

/// The first of `runs/chat-1.jsonl`, `runs/chat-2.jsonl`, ... that does not exist.
fn new_file() -> Result<PathBuf> {
    let folder = Path::new(runs::FOLDER);
    files::create_dir(folder)?;
    let mut n = 1;
    loop {
        let path = folder.join(format!("chat-{n}.jsonl"));
        if !path.exists() {
            return Ok(path);
        }
        n += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(question: &str, answer: &str) -> Turn {
        Turn { question: question.into(), answer: answer.into() }
    }

    fn talk() -> Transcript {
        let mut talk = Transcript::new(Some("Sois bref.".into()));
        talk.turns = vec![turn("L’été ?\n", "Là-bas « 🙂 »\n\nFin"), turn("", "\"x\"")];
        talk
    }

    #[test]
    fn a_saved_conversation_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.jsonl");
        let mut talk = talk();
        assert_eq!(talk.save(Some(path.clone())).unwrap(), path);
        assert_eq!(Transcript::load(&path).unwrap(), talk);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
        // Again, to the same file; nothing else is left beside it.
        talk.turns.push(turn("more", "and more"));
        talk.save(None).unwrap();
        assert_eq!(Transcript::load(&path).unwrap(), talk);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_of_others_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.md");
        std::fs::write(&path, "mine").unwrap();
        let error = talk().save(Some(path.clone())).unwrap_err().to_string();
        assert!(error.contains("notes.md exists already"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
        assert!(Transcript::default().save(None).unwrap_err().to_string().contains("nothing to save"));
        let missing = folder.path().join("none/talk.jsonl");
        assert!(talk().save(Some(missing)).unwrap_err().to_string().contains("cannot write"));
    }

    #[test]
    fn markdown_is_for_people() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.md");
        talk().save(Some(path.clone())).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("## System\n\nSois bref.\n\n## User\n\nL’été ?\n\n## Assistant\n\nLà-bas"));
        assert!(Transcript::load(&path).unwrap_err().to_string().contains("JSON Lines"));
    }

    #[test]
    fn what_is_no_conversation_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.jsonl");
        let user = r#"{"role":"user","content":"a"}"#;
        let assistant = r#"{"role":"assistant","content":"b"}"#;
        let system = r#"{"role":"system","content":"c"}"#;
        for (lines, part) in [
            (vec![user, "nonsense"], "talk.jsonl, line 2"),
            (vec![user, "", user], "line 3: a message of the user, expected the assistant's"),
            (vec![assistant], "line 1: a message of the assistant, expected the user's"),
            (vec![user, assistant, system], "line 3: a message of the system, expected the user's"),
            (vec![system, system], "line 2"),
            (vec![r#"{"role":"user"}"#], "line 1"),
            (vec![r#"{"role":"user","content":5}"#], "line 1"),
            (vec![], "no conversation"),
        ] {
            std::fs::write(&path, lines.join("\n")).unwrap();
            let error = format!("{:#}", Transcript::load(&path).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert!(format!("{:#}", Transcript::load(&path).unwrap_err()).contains("not UTF-8"));
    }

    #[test]
    fn the_last_question_is_asked_without_its_answer() {
        let conversation = talk().conversation();
        let messages = conversation.messages();
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
    }
}
