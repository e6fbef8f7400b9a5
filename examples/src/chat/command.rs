//! What is not for the model: lines that begin with a slash.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::settings::Setting;

/// The commands, for those who ask.
pub const HELP: &str = "\
/temperature X  /top-k K  /top-p P  /min-p P  /repetition-penalty X  /max-tokens N  /seed N
/regenerate  another answer to the last message     /continue  go on with the last text
/save [FILE]  JSON Lines, or Markdown for .md       /load FILE  a conversation of JSON Lines
/system [TEXT]  the system prompt                   /clear  forget the conversation
/help  /quit    A message that begins with a slash is written with two.";

/// Why a system prompt changes nothing, where the model has no chat template.
pub const NO_SYSTEM: &str = "this model continues text: no system prompt is read";

/// One command.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Changes a setting.
    Set(Setting, String),
    /// Answers the last message again.
    Regenerate,
    /// Goes on with the last text.
    Continue,
    /// Forgets the conversation.
    Clear,
    /// Writes the conversation to a file.
    Save(Option<PathBuf>),
    /// Goes on with the conversation of a file.
    Load(PathBuf),
    /// Another system prompt, or none.
    System(Option<String>),
    /// Shows [`HELP`].
    Help,
    /// Ends the program.
    Quit,
}

/// A line as it is meant.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    /// For the model.
    Text(String),
    /// For the program.
    Command(Command),
}

/// Reads a line.
///
/// # Errors
/// A command that there is not, or one without what it needs.
pub fn parse(line: &str) -> Result<Line> {
    let Some(command) = line.strip_prefix('/') else { return Ok(Line::Text(line.to_owned())) };
    if command.starts_with('/') {
        return Ok(Line::Text(command.to_owned()));
    }
    let (name, value) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let value = value.trim();
    let given = || (!value.is_empty()).then_some(value);
    if let Some(setting) = Setting::ALL.into_iter().find(|setting| setting.name() == name) {
        return Ok(Line::Command(Command::Set(setting, value.to_owned())));
    }
    Ok(Line::Command(match name {
        "regenerate" | "r" => Command::Regenerate,
        "continue" | "c" => Command::Continue,
        "clear" => Command::Clear,
        "save" => Command::Save(given().map(PathBuf::from)),
        "load" => match given() {
            Some(file) => Command::Load(file.into()),
            None => bail!("/load needs the name of a file"),
        },
        "system" => Command::System(given().map(str::to_owned)),
        "help" | "h" | "?" => Command::Help,
        "quit" | "exit" | "q" => Command::Quit,
        _ => bail!("there is no command /{name}; /help lists them"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_text_or_commands() {
        let command = |line: &str| match parse(line).unwrap() {
            Line::Command(command) => command,
            text @ Line::Text(_) => panic!("{text:?}"),
        };
        assert_eq!(parse(" hello ").unwrap(), Line::Text(" hello ".into()));
        assert_eq!(parse("//etc").unwrap(), Line::Text("/etc".into()));
        assert_eq!(command("/top-p  0.5 "), Command::Set(Setting::TopP, "0.5".into()));
        assert_eq!(command("/save my talk.md"), Command::Save(Some("my talk.md".into())));
        assert_eq!(command("/save"), Command::Save(None));
        assert_eq!(command("/system"), Command::System(None));
        assert_eq!(command("/q"), Command::Quit);
        for wrong in ["/nothing", "/load", "/", "/Quit"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_help_names_every_setting() {
        for setting in Setting::ALL {
            assert!(HELP.contains(&format!("/{}", setting.name())));
        }
    }
}
