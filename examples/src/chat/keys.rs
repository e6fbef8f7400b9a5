//! What the keys do.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::app::{App, Do, Focus};
use super::settings::Setting;

/// The keys, for those who ask.
pub const HELP: &str = "\
Enter  send            Alt-Enter, Ctrl-J  a new line     Up, Down  earlier messages
Esc, Ctrl-C  stop      PageUp, PageDown  scroll          Ctrl-R  another answer
F2, Tab  settings      Ctrl-S  save                      Ctrl-D  quit
Ctrl-A, Ctrl-E  start, end    Alt-B, Alt-F  by words     Ctrl-W, Ctrl-U, Ctrl-K  delete
In the settings: Up, Down choose; Left, Right change; digits and Enter set a value.";

/// Takes a key.
pub fn press(app: &mut App, key: KeyEvent) -> Option<Do> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match (key.code, control) {
        (KeyCode::Char('c'), true) => return cancel(app),
        (KeyCode::Char('d'), true) if app.input.is_empty() => return Some(Do::Quit),
        (KeyCode::Char('r'), true) => return app.regenerate(),
        (KeyCode::Char('s'), true) => app.save(None),
        (KeyCode::F(1), _) => {
            app.focus = if app.focus == Focus::Help { Focus::Input } else { Focus::Help };
        }
        (KeyCode::F(2) | KeyCode::Tab, _) => {
            app.focus = match app.focus {
                Focus::Settings { .. } => Focus::Input,
                _ => Focus::Settings { at: 0, edit: None },
            };
        }
        (KeyCode::PageUp, _) => app.scroll += app.page.saturating_sub(1).max(1),
        (KeyCode::PageDown, _) => app.scroll = app.scroll.saturating_sub(app.page.saturating_sub(1).max(1)),
        _ => {
            return match app.focus.clone() {
                Focus::Input => write(app, key),
                Focus::Settings { at, edit } => {
                    choose(app, key, at, edit);
                    None
                }
                Focus::Help => {
                    app.focus = Focus::Input;
                    None
                }
            };
        }
    }
    None
}

/// Ctrl-C: stops an answer, else throws away what is written, else ends the program at the second time.
fn cancel(app: &mut App) -> Option<Do> {
    const AGAIN: &str = "Ctrl-C again, or Ctrl-D, ends the program";
    if app.writing {
        return Some(Do::Stop);
    }
    if !app.input.is_empty() {
        app.input.clear();
    } else if app.notice.as_ref().is_some_and(|notice| notice.text == AGAIN) {
        return Some(Do::Quit);
    } else {
        app.say(AGAIN);
    }
    None
}

fn write(app: &mut App, key: KeyEvent) -> Option<Do> {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    let by_words = control || alt;
    let input = &mut app.input;
    match key.code {
        KeyCode::Esc if app.writing => return Some(Do::Stop),
        KeyCode::Esc => app.notice = None,
        KeyCode::Enter if alt || key.modifiers.contains(KeyModifiers::SHIFT) => input.insert("\n"),
        KeyCode::Char('j') if control => input.insert("\n"),
        KeyCode::Enter => return app.submit(),
        KeyCode::Char('a') if control => input.home(),
        KeyCode::Char('e') if control => input.end(),
        KeyCode::Char('w') if control => input.delete_word(),
        KeyCode::Char('u') if control => input.delete_to_start(),
        KeyCode::Char('k') if control => input.delete_to_end(),
        KeyCode::Char('d') if control => input.delete(),
        KeyCode::Char('h') if control => input.backspace(),
        KeyCode::Char('b') if alt => input.word_left(),
        KeyCode::Char('f') if alt => input.word_right(),
        // AltGr is both, on some terminals: a letter like any other.
        KeyCode::Char(c) if control == alt => input.insert(c.encode_utf8(&mut [0; 4])),
        KeyCode::Backspace if by_words => input.delete_word(),
        KeyCode::Backspace => input.backspace(),
        KeyCode::Delete => input.delete(),
        KeyCode::Left if by_words => input.word_left(),
        KeyCode::Right if by_words => input.word_right(),
        KeyCode::Left => input.left(),
        KeyCode::Right => input.right(),
        KeyCode::Home => input.home(),
        KeyCode::End => input.end(),
        KeyCode::Up if by_words => app.scroll += 1,
        KeyCode::Down if by_words => app.scroll = app.scroll.saturating_sub(1),
        KeyCode::Up => input.older(),
        KeyCode::Down => input.newer(),
        _ => {}
    }
    None
}

/// Moves among the settings and changes them. They are those of the next answer.
fn choose(app: &mut App, key: KeyEvent, mut at: usize, mut edit: Option<String>) {
    let setting = Setting::ALL.get(at).copied().unwrap_or(Setting::Temperature);
    app.notice = None;
    match (key.code, &mut edit) {
        (KeyCode::Char(c @ ('0'..='9' | '.' | '-')), Some(text)) => text.push(c),
        (KeyCode::Char(c @ ('0'..='9' | '.' | '-')), None) => edit = Some(c.to_string()),
        (KeyCode::Backspace, Some(text)) => drop(text.pop()),
        (KeyCode::Enter, Some(text)) => {
            if let Err(error) = setting.set(&mut app.settings, text) {
                app.complain(&error);
            }
            edit = None;
        }
        (KeyCode::Esc, Some(_)) => edit = None,
        (KeyCode::Esc | KeyCode::Enter, None) => {
            app.focus = Focus::Input;
            return;
        }
        (KeyCode::Up, _) => {
            at = at.checked_sub(1).unwrap_or(Setting::ALL.len() - 1);
            edit = None;
        }
        (KeyCode::Down, _) => {
            at = (at + 1) % Setting::ALL.len();
            edit = None;
        }
        (KeyCode::Left | KeyCode::Char('h'), None) => setting.step(&mut app.settings, false),
        (KeyCode::Right | KeyCode::Char('l'), None) => setting.step(&mut app.settings, true),
        _ => {}
    }
    app.focus = Focus::Settings { at, edit };
}
