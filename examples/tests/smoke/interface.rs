//! The interface of `chat` without a terminal: keys go in, and what is drawn is read.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use vesper_examples::chat::app::{App, Do, Focus};
use vesper_examples::chat::engine::Event;
use vesper_examples::chat::keys;
use vesper_examples::chat::transcript::Transcript;
use vesper_examples::chat::view::View;
use vesper_examples::chat::writer::{Ask, Ended, Progress};
use vesper_model::generate::{GenerationConfig, StopReason};

/// The interface and a screen.
struct Screen {
    app: App,
    view: View,
    terminal: Terminal<TestBackend>,
}

impl Screen {
    fn new(answers: bool, width: u16, height: u16) -> Self {
        let app = App::new("model".into(), answers, 200, GenerationConfig::default(), Transcript::default());
        let terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        Self { app, view: View::default(), terminal }
    }

    /// The rows as they are drawn now.
    fn rows(&mut self) -> Vec<String> {
        self.terminal.draw(|frame| self.view.draw(frame, &mut self.app)).unwrap();
        let buffer = self.terminal.backend().buffer();
        let width = usize::from(buffer.area.width);
        let row = |cells: &[ratatui::buffer::Cell]| cells.iter().map(ratatui::buffer::Cell::symbol).collect();
        buffer.content().chunks(width).map(row).collect()
    }

    fn shows(&mut self, part: &str) -> bool {
        self.rows().iter().any(|row| row.contains(part))
    }

    fn key(&mut self, code: KeyCode) -> Option<Do> {
        keys::press(&mut self.app, KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn control(&mut self, c: char) -> Option<Do> {
        keys::press(&mut self.app, KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL))
    }

    fn write(&mut self, text: &str) -> Option<Do> {
        for c in text.chars() {
            assert_eq!(self.key(KeyCode::Char(c)), None);
        }
        self.key(KeyCode::Enter)
    }

    fn hear(&mut self, text: &str, written: usize) {
        let time = Duration::from_millis(100 * (written as u64 - 1));
        self.app.hear(Event::Progress(Progress::Wrote { text: text.into(), written, time }));
    }

    /// A whole answer of one token.
    fn answer(&mut self, text: &str, reason: StopReason) {
        self.app.hear(Event::Progress(Progress::Reading { prompt: 10, known: 0, dropped: 0 }));
        self.hear(text, 1);
        self.app.hear(Event::Ended(Ended { reason, written: 1, time: Duration::ZERO }));
    }
}

#[test]
fn an_answer_streams_under_its_message() {
    let mut screen = Screen::new(true, 90, 16);
    let Some(Do::Ask(Ask::Answer(conversation))) = screen.write("Où est la mer ?") else { panic!() };
    assert_eq!(conversation.messages().len(), 1);
    assert!(screen.app.writing && screen.app.input.is_empty());
    screen.app.hear(Event::Progress(Progress::Reading { prompt: 20, known: 0, dropped: 0 }));
    screen.hear("Là-", 1);
    screen.hear("bas.", 3);
    let rows = screen.rows();
    let at = |part: &str| {
        rows.iter().position(|row| row.contains(part)).unwrap_or_else(|| panic!("{part}: {rows:#?}"))
    };
    assert!(at("You") < at("Où est la mer ?") && at("Où est la mer ?") < at("Model"));
    assert!(at("Model") < at("Là-bas."));
    let status = rows.last().unwrap();
    for part in ["Esc stops", "10.0 tokens/s", "context 23 of 200 (12 %)"] {
        assert!(status.contains(part), "{status}");
    }
    assert_eq!(screen.key(KeyCode::Esc), Some(Do::Stop));
    screen.app.hear(Event::Ended(Ended { reason: StopReason::Cancelled, written: 3, time: Duration::ZERO }));
    assert!(screen.shows("stopped") && !screen.shows("Esc stops"));

    // The next message brings the conversation with it.
    let Some(Do::Ask(Ask::Answer(conversation))) = screen.write("Merci") else { panic!() };
    let contents: Vec<String> = conversation.messages().into_iter().map(|message| message.content).collect();
    assert_eq!(contents, ["Où est la mer ?", "Là-bas.", "Merci"]);
}

#[test]
fn a_model_without_a_template_goes_on_in_the_same_row() {
    let mut screen = Screen::new(false, 80, 12);
    assert_eq!(screen.write("Once upon"), Some(Do::Ask(Ask::Continue("Once upon".into()))));
    screen.answer(" a time", StopReason::MaxTokens);
    assert!(screen.shows("Once upon a time"));
    assert!(screen.shows("continues text"));
    let more = screen.write("/continue");
    assert_eq!(more, Some(Do::Ask(Ask::Continue("Once upon a time".into()))));
    screen.answer(" there", StopReason::MaxTokens);
    assert!(screen.shows("Once upon a time there"));
    // An empty line lets the model begin.
    assert_eq!(screen.write(""), Some(Do::Ask(Ask::Continue(String::new()))));
}

#[test]
fn another_answer_takes_the_place_of_the_last_and_draws_anew() {
    let mut screen = Screen::new(true, 80, 14);
    assert_eq!(screen.control('r'), None);
    assert!(screen.shows("nothing to answer yet"));
    screen.write("Hi");
    screen.answer("first", StopReason::Eos(2));
    let seed = screen.app.settings.seed;
    let Some(Do::Ask(Ask::Answer(conversation))) = screen.control('r') else { panic!() };
    assert_eq!(conversation.messages().len(), 1);
    assert!(!screen.shows("first"));
    screen.answer("second", StopReason::Eos(2));
    assert!(screen.shows("second"));
    assert_eq!(screen.app.settings.seed, seed + 1);
    assert_eq!(screen.app.transcript.turns.len(), 1);
}

#[test]
fn settings_are_shown_and_changed_while_an_answer_is_written() {
    let mut screen = Screen::new(true, 100, 16);
    assert!(screen.rows().iter().any(|row| row.contains("temperature") && row.contains("0.8")));
    screen.write("Hi");
    screen.key(KeyCode::F(2));
    screen.key(KeyCode::Right);
    assert_eq!(screen.app.settings.temperature, 0.85);
    screen.key(KeyCode::Down);
    for c in "12".chars() {
        screen.key(KeyCode::Char(c));
    }
    assert!(screen.rows().iter().any(|row| row.contains("top-k") && row.contains("12_")));
    screen.key(KeyCode::Enter);
    assert_eq!(screen.app.settings.top_k, 12);
    screen.key(KeyCode::Down);
    for c in "-3".chars() {
        screen.key(KeyCode::Char(c));
    }
    screen.key(KeyCode::Enter);
    assert!(screen.shows("top_p is -3, expected"));
    screen.key(KeyCode::Esc);
    assert_eq!(screen.app.focus, Focus::Input);
    assert_eq!(screen.write("/min-p 0.1"), None);
    assert_eq!(screen.app.settings.min_p, 0.1);
    assert!(screen.app.writing);
}

#[test]
fn while_an_answer_is_written_nothing_else_is_asked() {
    let mut screen = Screen::new(true, 90, 14);
    screen.write("Hi");
    for line in ["more", "/clear", "/load x", "/regenerate", "/continue"] {
        screen.app.input.clear();
        assert_eq!(screen.write(line), None);
        assert!(screen.shows("an answer is being written"), "{line}");
        assert_eq!(screen.app.input.text(), line); // it is not lost
    }
    assert_eq!(screen.app.transcript.turns.len(), 1);
    assert_eq!(screen.control('r'), None);
    assert_eq!(screen.control('c'), Some(Do::Stop));
}

#[test]
fn what_fails_is_said_and_the_message_given_back() {
    let mut screen = Screen::new(true, 90, 14);
    screen.write("too long");
    screen.app.hear(Event::Failed("the last message makes a prompt of 300 tokens".into()));
    assert!(screen.shows("the last message makes a prompt of 300 tokens"));
    assert_eq!(screen.app.input.text(), "too long");
    assert!(screen.app.transcript.turns.is_empty() && !screen.app.writing);
    screen.app.input.clear();
    assert_eq!(screen.write("/nothing"), None);
    assert!(screen.shows("no command /nothing"));
}

#[test]
fn ctrl_c_twice_and_ctrl_d_end_the_program() {
    let mut screen = Screen::new(true, 90, 14);
    screen.key(KeyCode::Char('x'));
    assert_eq!(screen.control('d'), None); // deletes what is right of the cursor: nothing
    assert_eq!(screen.control('c'), None);
    assert!(screen.app.input.is_empty());
    assert_eq!(screen.control('c'), None);
    assert!(screen.shows("Ctrl-C again"));
    assert_eq!(screen.control('c'), Some(Do::Quit));
    assert_eq!(screen.control('d'), Some(Do::Quit));
    assert_eq!(screen.write("/quit"), Some(Do::Quit));
}

#[test]
fn a_long_history_scrolls_and_follows_its_end() {
    let mut screen = Screen::new(false, 40, 12);
    for i in 0..30 {
        screen.write(&format!("text {i}"));
        screen.answer(".", StopReason::Eos(2));
    }
    assert!(screen.shows("text 29.") && !screen.shows("text 10."));
    screen.key(KeyCode::PageUp);
    assert!(!screen.shows("text 29."));
    for _ in 0..50 {
        screen.key(KeyCode::PageUp);
    }
    assert!(screen.shows("text 0."));
    screen.key(KeyCode::PageDown);
    assert!(!screen.shows("text 0."));
    screen.write("last");
    assert!(screen.shows("last"));
}

#[test]
fn wide_characters_and_graphemes_keep_their_places() {
    let mut screen = Screen::new(true, 30, 14);
    let family = "👩\u{200d}👩\u{200d}👧";
    screen.app.input.insert(&format!("日本{family}e\u{301}"));
    screen.terminal.draw(|frame| screen.view.draw(frame, &mut screen.app)).unwrap();
    // The border, four columns of two characters, two of the family, one of the letter.
    let cursor = screen.terminal.get_cursor_position().unwrap();
    assert_eq!(cursor.x, 1 + 4 + 2 + 1);
    screen.key(KeyCode::Enter);
    screen.answer(&format!("{}{family}", "語".repeat(20)), StopReason::Eos(2));
    let rows = screen.rows();
    for row in &rows {
        assert!(row.chars().count() <= 30 + 8, "{row}");
    }
    assert!(rows.iter().any(|row| row.contains("e\u{301}")));
    assert!(rows.iter().any(|row| row.contains(family)), "{rows:#?}");
}

#[test]
fn what_a_terminal_would_obey_is_not_drawn() {
    let mut screen = Screen::new(true, 60, 14);
    screen.app.model = "a\u{1b}]0;x\u{7}b".into();
    screen.write("Hi");
    screen.answer("\u{1b}[2Jred\u{7}", StopReason::Eos(2));
    let rows = screen.rows().concat();
    assert!(rows.contains("red") && !rows.chars().any(char::is_control));
}

#[test]
fn every_size_of_a_terminal_will_do() {
    for answers in [false, true] {
        let mut screen = Screen::new(answers, 90, 20);
        screen.write("a message of some words");
        screen.answer("an answer\nof two lines", StopReason::Eos(2));
        screen.app.input.insert("one\ntwo\nthree\nfour\nfive\nsix\nseven\neight");
        for focus in [Focus::Input, Focus::Help, Focus::Settings { at: 6, edit: Some("12345".into()) }] {
            screen.app.focus = focus;
            for (width, height) in [(1, 1), (2, 3), (3, 2), (10, 4), (20, 6), (31, 9), (77, 5), (200, 60)] {
                screen.terminal.backend_mut().resize(width, height);
                screen.terminal.autoresize().unwrap();
                assert_eq!(screen.rows().len(), usize::from(height));
            }
        }
    }
}

#[test]
fn the_help_names_keys_and_commands() {
    let mut screen = Screen::new(true, 100, 30);
    screen.write("/help");
    for part in ["Ctrl-R", "another answer", "/save [FILE]", "/top-p P"] {
        assert!(screen.shows(part), "{part}");
    }
    screen.key(KeyCode::Char('x'));
    assert!(!screen.shows("/save [FILE]"));
    assert!(screen.app.input.is_empty());
}

#[test]
fn earlier_messages_come_back_and_several_lines_are_one_message() {
    let mut screen = Screen::new(true, 80, 14);
    screen.write("first");
    screen.answer("ok", StopReason::Eos(2));
    screen.key(KeyCode::Up);
    assert_eq!(screen.app.input.text(), "first");
    screen.key(KeyCode::Down);
    screen.key(KeyCode::Char('a'));
    assert_eq!(screen.control('j'), None);
    screen.key(KeyCode::Char('b'));
    assert_eq!(screen.app.input.text(), "a\nb");
    assert!(matches!(screen.key(KeyCode::Enter), Some(Do::Ask(_))));
    assert_eq!(screen.app.transcript.turns[1].question, "a\nb");
}
