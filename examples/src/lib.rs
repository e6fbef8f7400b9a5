//! The plumbing of the examples: settings, checkpoints, logs, charts. What a reader came for, the model, the optimizer
//! and the training loop, stands in the examples themselves.

pub mod chart;
pub mod chat;
pub mod checkpoint;
pub mod data;
pub mod dataset;
pub mod device;
pub mod evaluate;
pub mod export;
pub mod files;
pub mod finetune;
pub mod interrupt;
pub mod log;
pub mod metacognition;
pub mod model;
pub mod output;
pub mod progress;
pub mod quantize;
pub mod runs;
pub mod settings;
pub mod summary;

use std::ffi::OsString;
use std::process::ExitCode;

/// Like `println!`, but a closed pipe (`train | head`) does not end the program; a full disk is an error at its end.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        $crate::output::keep(writeln!(std::io::stdout(), $($arg)*));
    }};
}

/// Like `eprintln!`, but a closed pipe does not end the program.
#[macro_export]
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}

/// What a model wrote, without the control characters that a terminal would obey.
pub fn printable(text: &str) -> String {
    let shown =
        |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { char::REPLACEMENT_CHARACTER } else { c };
    text.chars().map(shown).collect()
}

/// Keeps candle's own threads for elementwise operations from spinning beside those of the fused operations, which
/// takes time from them on few cores. A setting of one's own is respected.
///
/// To be called first thing in `main`, before there are threads.
pub fn leave_the_threads_to_the_fused_operations() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: called before any other thread is started, so none can read the environment meanwhile.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}

/// What an example that failed exits with.
pub const FAILED: u8 = 2;

/// What an example that was stopped by Ctrl-C exits with, as a shell would report it.
pub const INTERRUPTED: u8 = 130;

/// Runs an example: an error becomes one line on stderr and exit code 2.
pub fn run(example: impl FnOnce() -> anyhow::Result<ExitCode>) -> ExitCode {
    match example().and_then(|code| output::check().map(|()| code)) {
        Ok(code) => code,
        Err(error) => {
            note!("error: {}", one_line(&error));
            ExitCode::from(FAILED)
        }
    }
}

/// The flags of the command line. `--help` and `--version` are answered at once.
///
/// # Errors
/// Names the flag that is wrong and what it can be, in one line.
pub fn flags<F: clap::Parser>() -> anyhow::Result<F> {
    F::try_parse_from(joined(std::env::args_os())).map_err(|error| {
        // A program that was given nothing where it needs something shows its help.
        let helps = error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        if helps || !error.use_stderr() {
            error.exit();
        }
        let text = error.render().to_string();
        // The usage and the hint at --help are left out.
        let text = text.split("\n\nUsage:").next().unwrap_or_default();
        let text = text.split("\n\nFor more information").next().unwrap_or_default();
        // Hints stand in a paragraph of their own.
        let text = text.trim_start_matches("error: ").replace("\n\n  tip: ", "; ");
        anyhow::anyhow!("{}", text.replace("\n  tip: ", "; "))
    })
}

/// The words of a command line, with each value that begins like a negative number joined to its flag (`--steps -1` is
/// `--steps=-1`): what is wrong with it is then said of the flag, not of an argument `-1`.
fn joined(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = Vec::new();
    for word in words {
        let negative = matches!(word.as_encoded_bytes(), [b'-', b'0'..=b'9' | b'.', ..]);
        let flag = |word: &OsString| {
            let word = word.as_encoded_bytes();
            word.len() > 2 && word.starts_with(b"--") && !word.contains(&b'=')
        };
        match all.last_mut() {
            Some(last) if negative && flag(last) => {
                last.push("=");
                last.push(word);
            }
            _ => all.push(word),
        }
    }
    all
}

/// An error and its causes in one line, each cause once.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        // candle prints a backtrace under its message where RUST_BACKTRACE is set.
        let text = cause.to_string();
        let text = text.split("\n   0: ").next().unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    #[test]
    fn control_characters_are_not_printed() {
        assert_eq!(super::printable("é\tb\n\u{1b}[2J\u{8}"), "é\tb\n\u{fffd}[2J\u{fffd}");
    }

    #[test]
    fn a_negative_value_belongs_to_its_flag() {
        let joined = |words: &[&str]| super::joined(words.iter().map(Into::into));
        assert_eq!(joined(&["p", "--lr", "-1e-3", "--steps", "-1"]), ["p", "--lr=-1e-3", "--steps=-1"]);
        for same in [
            &["p", "--lr", "1e-3", "-1"][..],
            &["p", "--lr=1", "-1"],
            &["p", "--", "-1"],
            &["p", "--a", "-b"],
        ] {
            assert_eq!(joined(same), same);
        }
    }

    #[test]
    fn errors_are_one_line_with_each_cause_once() {
        let cause = std::io::Error::other("no\nspace\n   0: backtrace");
        let error = Err::<(), _>(cause).context("run.json").unwrap_err();
        assert_eq!(super::one_line(&error), "run.json: no space");
    }
}
