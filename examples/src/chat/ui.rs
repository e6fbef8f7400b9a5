//! The terminal: keys in, frames out, and everything as it was before when the program ends.

use std::io::stdout;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, DisableBracketedPaste, EnableBracketedPaste};
use ratatui::crossterm::execute;

use super::app::{App, Do};
use super::engine::Engine;
use super::input::Input;
use super::view::View;
use super::{keys, writer};
use crate::{files, runs};

/// The shortest time between two frames: an answer may come faster than an eye.
const FRAME: Duration = Duration::from_millis(33);
/// How long to wait for a key, while an answer is written and while not.
const BUSY: Duration = Duration::from_millis(10);
const IDLE: Duration = Duration::from_millis(200);
/// Lines of the history of messages that are kept.
const HISTORY: usize = 500;

/// Runs the interface until it is left. The terminal is restored whatever happens, a panic included.
///
/// # Errors
/// A terminal that does not take part; a thread that is gone.
pub fn run(writer: writer::Writer, mut app: App) -> Result<()> {
    let engine = Engine::start(writer)?;
    app.input = Input::with_history(read_history());
    let mut terminal = ratatui::try_init().context("cannot open the terminal")?;
    let _ = execute!(stdout(), EnableBracketedPaste); // not every terminal knows it
    let end = talk(&mut terminal, &engine, &mut app);
    let _ = execute!(stdout(), DisableBracketedPaste);
    ratatui::restore();
    write_history(app.input.history());
    end
}

fn talk(terminal: &mut DefaultTerminal, engine: &Engine, app: &mut App) -> Result<()> {
    let mut view = View::default();
    let mut drawn: Option<Instant> = None;
    let mut changed = true;
    loop {
        while let Some(event) = engine.next()? {
            app.hear(event);
            changed = true;
        }
        if changed && drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
            terminal.draw(|frame| view.draw(frame, app)).context("cannot draw")?;
            drawn = Some(Instant::now());
            changed = false;
        }
        let wait = if app.writing || changed { BUSY } else { IDLE };
        // All keys that wait, before the next frame: what is pasted may come as keys.
        let mut wait = Some(wait);
        while event::poll(wait.take().unwrap_or_default()).context("cannot read the terminal")? {
            changed = true;
            let asked = match event::read().context("cannot read the terminal")? {
                event::Event::Key(key) => keys::press(app, key),
                event::Event::Paste(text) => {
                    app.input.insert(&text);
                    None
                }
                _ => None, // a new size is found by drawing
            };
            match asked {
                Some(Do::Ask(ask)) => engine.ask(ask, app.settings.clone()),
                Some(Do::Stop) => engine.stop(),
                Some(Do::Quit) => return Ok(()),
                None => {}
            }
        }
    }
}

fn history_file() -> PathBuf {
    Path::new(runs::FOLDER).join("chat_history.txt")
}

/// The messages of earlier conversations, if any are kept.
fn read_history() -> Vec<String> {
    let text = std::fs::read_to_string(history_file()).unwrap_or_default();
    text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// A folder that is missing or read-only costs the history alone.
fn write_history(lines: &[String]) {
    let lines = lines.iter().filter(|line| !line.contains('\n'));
    let mut kept: Vec<&str> = lines.rev().take(HISTORY).map(String::as_str).collect();
    kept.reverse();
    if !kept.is_empty() && Path::new(runs::FOLDER).is_dir() {
        let _ = files::write(&history_file(), (kept.join("\n") + "\n").as_bytes());
    }
}
