//! Runs the examples, and makes what they read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

/// An example beside the test's own executable, in `target/PROFILE/examples`.
pub(crate) fn command(name: &str, dir: &Path, args: &[&str]) -> Command {
    let test = std::env::current_exe().unwrap(); // target/PROFILE/deps/smoke-HASH
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(program.is_file(), "{} is missing: run cargo build --examples", program.display());
    let mut command = Command::new(program);
    command.args(args).current_dir(dir).env("RUST_BACKTRACE", "1").stdin(Stdio::null());
    command
}

/// What a program left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn output(mut command: Command) -> Output {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Output { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs an example that must succeed, and gives what it printed.
pub(crate) fn succeeds(name: &str, dir: &Path, args: &[&str]) -> String {
    let output = output(command(name, dir, args));
    assert_eq!(output.code, Some(0), "{args:?}: {output:?}");
    output.stdout
}

/// Runs an example that must fail with exit code 2 and one line on stderr that has all of `parts`, and leave no new file.
pub(crate) fn fails(name: &str, dir: &Path, args: &[&str], parts: &[&str]) -> String {
    let before = paths(dir);
    let line = stops(name, dir, args, parts);
    let left: Vec<_> = paths(dir).into_iter().filter(|path| !before.contains(path)).collect();
    assert!(left.is_empty(), "{name} {args:?} left {left:?}");
    line
}

/// As [`fails`], of an example that has begun its work, and keeps what there is of it.
pub(crate) fn stops(name: &str, dir: &Path, args: &[&str], parts: &[&str]) -> String {
    is_one_error(&output(command(name, dir, args)), parts)
}

/// All that is in a folder.
fn paths(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| {
            let within = if path.is_dir() { paths(&path) } else { vec![] };
            std::iter::once(path).chain(within)
        })
        .collect()
}

pub(crate) fn is_one_error(output: &Output, parts: &[&str]) -> String {
    assert_eq!(output.code, Some(2), "{output:?}");
    let line = output.stderr.trim_end();
    assert!(line.starts_with("error: ") && !line.contains('\n'), "not one line: {output:?}");
    for wrong in ["panicked", "RUST_BACKTRACE", ".rs:"] {
        assert!(!line.contains(wrong), "{line}");
    }
    for part in parts {
        assert!(line.contains(part), "no `{part}` in: {line}");
    }
    line.to_owned()
}

/// Flags of a run that takes about a second, on [`text`] in `text.txt`; those in `more` go before.
pub(crate) fn tiny<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let flags = [
        ("--data", "text.txt"),
        ("--vocab-size", "300"),
        ("--steps", "6"),
        ("--batch", "2"),
        ("--seq", "32"),
    ];
    let mut args = more.to_vec();
    for (flag, value) in flags {
        if !more.contains(&flag) {
            args.extend([flag, value]);
        }
    }
    args
}

/// Paragraphs of words in a fixed order.
pub(crate) fn text(words: &str, paragraphs: usize) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut state = 1_u64;
    let mut paragraph = || {
        let mut chosen = (0..60).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            words[(state >> 33) as usize % words.len()]
        });
        let first = chosen.next().unwrap().to_owned();
        chosen.fold(first, |text, word| text + " " + word) + "."
    };
    (0..paragraphs).map(|_| paragraph() + "\n\n").collect()
}

pub(crate) const ENGLISH: &str = "the a little big red blue cat dog bird house tree ran sat saw liked jumped over \
    under on and then it was happy sad old new";

/// A folder with `text.txt`.
pub(crate) fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("text.txt"), text(ENGLISH, 60)).unwrap();
    folder
}

/// A folder with `text.txt` and a finished run of it in `run`; tests that change it take a [`copy`].
pub(crate) fn finished() -> &'static Path {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = folder();
        succeeds("train", folder.path(), &tiny(&["--out", "run", "--eval-every", "3"]));
        folder
    })
    .path()
}

/// Another folder with all files of this one.
pub(crate) fn copy(from: &Path) -> TempDir {
    fn copy_into(from: &Path, to: &Path) {
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = to.join(path.file_name().unwrap());
            if path.is_dir() {
                std::fs::create_dir(&target).unwrap();
                copy_into(&path, &target);
            } else {
                std::fs::copy(&path, &target).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    copy_into(from, folder.path());
    folder
}

/// The only file of a folder whose name begins and ends so.
pub(crate) fn only(folder: &Path, start: &str, end: &str) -> PathBuf {
    let mut found = files(folder).into_iter().filter(|name| name.starts_with(start) && name.ends_with(end));
    let name = found.next().unwrap_or_else(|| panic!("no {start}*{end} in {}", folder.display()));
    assert_eq!(found.next(), None);
    folder.join(name)
}

/// The names in a folder, sorted.
pub(crate) fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The lines of `log.jsonl`.
pub(crate) fn log(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The log without what depends on the clock.
pub(crate) fn losses(run: &Path) -> Vec<Value> {
    let mut lines = log(run);
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("tokens_per_second").unwrap();
    }
    lines
}

pub(crate) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The folder of real data, or `None` after saying that the test is skipped.
pub(crate) fn data(test: &str) -> Option<PathBuf> {
    let data = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("skipped: {test} (VESPER_DATA is not set)");
    }
    data
}

/// Runs an example, with Ctrl-C as soon as there is a file or folder `begun`; `*` is any in a folder.
#[cfg(unix)]
pub(crate) fn interrupted(name: &str, dir: &Path, args: &[&str], begun: &str) -> Output {
    let mut command = command(name, dir, args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = std::time::Instant::now();
    let begun = dir.join(begun);
    let is_there = || match begun.file_name().and_then(|name| name.to_str()) {
        Some("*") => begun.with_file_name("").read_dir().is_ok_and(|mut files| files.next().is_some()),
        _ => begun.exists(),
    };
    while !is_there() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before {} was there", begun.display());
        if started.elapsed().as_secs() > 120 {
            child.kill().unwrap();
            panic!("no {} after two minutes", begun.display());
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Output { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Ctrl-C.
#[cfg(unix)]
pub(crate) fn interrupt(child: &std::process::Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}
