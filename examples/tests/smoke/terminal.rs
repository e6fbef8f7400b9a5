//! `chat` in a real terminal, which `script` makes and `vt100` reads.

#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::chat::endless;
use crate::program::command;

/// A program and its screen.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    written: Receiver<Vec<u8>>,
    screen: vt100::Parser,
}

impl Terminal {
    /// Starts `chat` with 24 rows of 90 columns; `None` where there is no command `script`.
    fn start(dir: &Path, args: &str, test: &str) -> Option<Self> {
        let chat = command("chat", dir, &[]);
        // `exec`, because some shells take Ctrl-C for themselves too and then hide how the program ended.
        let line = format!("stty rows 24 cols 90; exec '{}' {args}", chat.get_program().display());
        let mut script = Command::new("script");
        script.args(["-qfec", &line, "/dev/null"]).current_dir(dir).env("TERM", "xterm-256color");
        let Ok(mut child) = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            println!("skipped: {test} (there is no command `script`)");
            return None;
        };
        let (keys, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, written) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut bytes) {
                let _ = sender.send(bytes[..n].to_vec());
            }
        });
        let size = |n| std::num::NonZero::new(n).unwrap();
        Some(Self { child, keys, written, screen: vt100::Parser::new(size(24), size(90), 0) })
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).and_then(|()| self.keys.flush()).unwrap();
    }

    /// Waits until the screen is as asked, and gives it.
    fn wait(&mut self, what: &str, ready: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let shown = self.screen.screen().contents();
            if ready(&shown) {
                return shown;
            }
            assert!(Instant::now() < end, "no {what} in\n{shown}");
            match self.written.recv_timeout(Duration::from_millis(100)) {
                Ok(bytes) => self.screen.process(&bytes),
                Err(_) => {
                    assert!(self.child.try_wait().unwrap().is_none(), "it ended without {what}:\n{shown}");
                }
            }
        }
    }

    fn wait_for(&mut self, part: &str) -> String {
        self.wait(part, |shown| shown.contains(part))
    }

    /// Waits for the end, with the terminal as it was.
    fn ends(mut self) -> Option<i32> {
        let code = self.child.wait().unwrap().code();
        while let Ok(bytes) = self.written.recv_timeout(Duration::from_secs(10)) {
            self.screen.process(&bytes);
        }
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor() && !screen.bracketed_paste());
        code
    }
}

#[test]
fn an_answer_is_streamed_stopped_and_written_again() {
    // So long that the key comes before the end, on however fast a machine.
    let folder = endless(&[("config.json", "max_position_embeddings", 100_000)]);
    let args = "--model run --max-tokens 20000";
    let Some(mut chat) =
        Terminal::start(folder.path(), args, "an_answer_is_streamed_stopped_and_written_again")
    else {
        return;
    };
    let shown = chat.wait_for("F1 help");
    assert!(shown.contains("run/model (continues text)") && shown.contains("max-tokens"), "{shown}");
    chat.press("the littlx\u{7f}e");
    chat.wait_for("│the little");
    chat.press("\r");
    chat.wait_for("tokens/s");
    chat.press("\u{3}");
    let first = chat.wait_for("stopped");
    assert!(first.contains("context") && !first.contains("Esc stops"), "{first}");

    chat.press("\u{12}"); // Ctrl-R
    chat.wait_for("Esc stops");
    chat.press("\u{1b}");
    chat.wait_for("stopped");

    // A setting, by the panel and by a command.
    chat.press("\u{1b}OQ\u{1b}[B"); // F2, Down
    chat.press("7\r");
    chat.wait("top-k at 7", |shown| shown.lines().any(|line| line.contains("top-k") && line.contains(" 7 ")));
    chat.press("\t/temperature 0.25\r");
    chat.wait_for("temperature is 0.25");

    chat.press("/save talk.jsonl\r");
    chat.wait_for("saved to talk.jsonl");
    chat.press("/clear\r/load talk.jsonl\r");
    chat.wait_for("loaded talk.jsonl");
    chat.press("\u{4}");
    assert_eq!(chat.ends(), Some(0));
    let saved = std::fs::read_to_string(folder.path().join("talk.jsonl")).unwrap();
    assert!(saved.starts_with("{\"role\":\"user\",\"content\":\"the little\"}\n"), "{saved}");
}

#[test]
fn what_is_wrong_before_the_interface_opens_is_one_line() {
    let folder = endless(&[]);
    let name = "what_is_wrong_before_the_interface_opens_is_one_line";
    let Some(mut chat) = Terminal::start(folder.path(), "--model run --top-p 7", name) else { return };
    chat.wait_for("error: invalid generation setting: top_p is 7");
    assert_eq!(chat.ends(), Some(2));
}

#[test]
fn in_plain_mode_ctrl_c_stops_the_answer_and_not_the_program() {
    let folder = endless(&[("config.json", "max_position_embeddings", 100_000)]);
    let args = "--model run --plain --max-tokens 20000";
    let name = "in_plain_mode_ctrl_c_stops_the_answer_and_not_the_program";
    let Some(mut chat) = Terminal::start(folder.path(), args, name) else { return };
    chat.wait_for("Ctrl-D ends");
    chat.press("the little\n");
    chat.wait("an answer", |shown| shown.len() > 400);
    chat.press("\u{3}");
    chat.wait("the answer stopped", |shown| shown.contains("(stopped)\n>"));
    chat.press("/max-tokens 7\n");
    chat.wait_for("max-tokens is 7");
    chat.press("/quit\n");
    assert_eq!(chat.ends(), Some(0));
}
