use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use crate::program::{command, copy, data, fails, files, finished, json, output, succeeds};

fn answer(args: &[&str]) -> String {
    succeeds("chat", finished(), &[&["--model", "run", "--prompt", "the little"], args].concat())
}

#[test]
fn a_prompt_is_continued_the_same_way_for_the_same_seed() {
    let one = answer(&["--seed", "1", "--max-tokens", "40"]);
    assert!(one.starts_with("the little") && one.len() > "the little\n".len(), "{one}");
    assert_eq!(one, answer(&["--seed", "1", "--max-tokens", "40"]));
    assert_ne!(one, answer(&["--seed", "2", "--max-tokens", "40"]));
    let greedy = answer(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(greedy, answer(&["--temperature", "0", "--seed", "2"]));
    assert_eq!(greedy, answer(&["--top-k", "1"]));
    assert_ne!(greedy, answer(&["--temperature", "0", "--repetition-penalty", "5"]));
}

#[test]
fn the_folder_of_the_model_itself_will_do() {
    let args = ["--prompt", "the little", "--seed", "3", "--model"];
    let of = |folder: &str| succeeds("chat", finished(), &[&args[..], &[folder]].concat());
    assert_eq!(of("run"), of("run/model"));
}

#[test]
fn no_more_than_max_tokens_are_written() {
    assert_eq!(answer(&["--max-tokens", "0"]), "the little\n");
    let vocabulary = json(&finished().join("run/model/tokenizer.json"))["model"]["vocab"].clone();
    let longest = vocabulary.as_object().unwrap().keys().map(|token| token.chars().count()).max().unwrap();
    for n in [1, 3] {
        let written = answer(&["--max-tokens", &n.to_string(), "--seed", "4"]);
        let new = written.trim_end_matches('\n').chars().count() - "the little".len();
        assert!(new <= n * longest, "{written}");
    }
}

#[test]
fn without_a_prompt_each_line_is_answered_until_the_input_ends() {
    let mut command = command("chat", finished(), &["--model", "run", "--max-tokens", "3"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = "the little\n/max-tokens 0\nthe second\n/temperature -1\n/nothing\n\n";
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    assert!(stdout.contains("/help"), "{stdout}");
    assert!(stdout.contains("the little"), "{stdout}");
    assert!(stdout.contains("max-tokens is 0") && stdout.contains("the second\n"), "{stdout}");
    assert!(stdout.contains("temperature is -1, expected"), "{stdout}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    // A model's folder is not where a program leaves its own files.
    assert!(files(&finished().join("run/model")).iter().all(|name| !name.contains("history")));
}

#[test]
fn without_a_model_it_says_how_to_train_one() {
    let folder = tempfile::tempdir().unwrap();
    fails("chat", folder.path(), &["--prompt", "x"], &["cargo run --release --example train"]);
    fails("chat", folder.path(), &["--model", "none"], &["none: no such folder", "--example train"]);
    fails("chat", folder.path(), &["--model", "."], &["config.json"]);
}

#[test]
fn the_last_trained_run_is_taken_and_named() {
    let output = output(command("chat", finished(), &["--prompt", "the", "--max-tokens", "1"]));
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stderr.contains("last trained model") && output.stderr.contains("run"), "{output:?}");
    assert!(output.stdout.starts_with("the"), "{output:?}");
}

#[test]
fn settings_out_of_range_are_one_line() {
    for (args, parts) in [
        (&["--temperature", "-1"][..], &["temperature is -1"][..]),
        (&["--temperature", "nan"], &["temperature is NaN"]),
        (&["--top-p", "0"], &["top_p is 0"]),
        (&["--top-p", "1.5"], &["top_p is 1.5"]),
        (&["--repetition-penalty", "0"], &["repetition_penalty is 0"]),
        (&["--device", "cuda:x"], &["--device cuda:x"]),
    ] {
        let args = [&["--model", "run", "--prompt", "the"], args].concat();
        fails("chat", finished(), &args, parts);
    }
    if !cfg!(feature = "cuda") {
        let args = ["--model", "run", "--prompt", "the", "--device", "cuda"];
        fails("chat", finished(), &args, &["--device cuda", "--features cuda"]);
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let limit = json(&finished().join("run/model/config.json"))["max_position_embeddings"].as_u64().unwrap();
    let prompt = "1 2 3 ".repeat(limit as usize);
    let line = fails("chat", finished(), &["--model", "run", "--prompt", &prompt], &["the prompt has"]);
    assert!(line.contains(&format!("at most {}", limit - 1)), "{line}");
}

/// A finished run whose model does not end a text by itself, with other settings too.
fn endless(settings: &[(&str, &str, u64)]) -> tempfile::TempDir {
    let folder = copy(finished());
    let no_token = ("generation_config.json", "eos_token_id", 1_000_000);
    for &(file, key, value) in settings.iter().chain([&no_token]) {
        let file = folder.path().join("run/model").join(file);
        let mut settings = json(&file);
        settings[key] = value.into();
        std::fs::write(&file, settings.to_string()).unwrap();
    }
    folder
}

#[test]
fn a_text_that_fills_the_context_ends() {
    let folder = endless(&[]);
    let limit = json(&finished().join("run/model/config.json"))["max_position_embeddings"].as_u64().unwrap();
    let args = ["--model", "run", "--prompt", "the", "--max-tokens", "18446744073709551615"];
    let output = output(command("chat", folder.path(), &args));
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stderr.contains(&format!("reads at most {limit} tokens")), "{}", output.stderr);
}

#[test]
fn a_llama_of_others_writes_its_story() {
    let Some(data) = data("a_llama_of_others_writes_its_story") else { return };
    let model = data.join("models/stories260K");
    let args = ["--model", model.to_str().unwrap(), "--temperature", "0", "--max-tokens", "40"];
    let folder = tempfile::tempdir().unwrap();
    let story = succeeds("chat", folder.path(), &[&args[..], &["--prompt", ""]].concat());
    assert!(
        story.starts_with("Once upon a time, there was a little girl named Lily. She loved to play"),
        "{story}"
    );
    let story = succeeds(
        "chat",
        folder.path(),
        &[&args[..], &["--prompt", "Once upon a time, there was a"]].concat(),
    );
    assert!(story.starts_with("Once upon a time, there was a little girl named Lily. She loved"), "{story}");
}

#[test]
fn a_reader_that_goes_away_ends_the_answer() {
    let mut command = command("chat", finished(), &["--model", "run", "--prompt", "the"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_model_that_is_meant_to_be_greedy_draws_when_asked_to() {
    let folder = copy(finished());
    let file = folder.path().join("run/model/generation_config.json");
    let mut settings = json(&file);
    settings["do_sample"] = false.into();
    std::fs::write(&file, settings.to_string()).unwrap();
    let answer = |args: &[&str]| {
        succeeds("chat", folder.path(), &[&["--model", "run", "--prompt", "the little"], args].concat())
    };
    let greedy = answer(&["--seed", "1"]);
    assert_eq!(greedy, answer(&["--seed", "2"]));
    for flag in [["--temperature", "1"], ["--top-k", "20"], ["--top-p", "0.9"]] {
        assert_ne!(greedy, answer(&flag), "{flag:?}");
    }
}

/// `script` gives the program a terminal, which the line editor and Ctrl-C need.
#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    // So long that the signal comes before the end, on however fast a machine.
    let folder = endless(&[("config.json", "max_position_embeddings", 100_000)]);
    let chat = command("chat", folder.path(), &[]);
    // `exec`, because some shells take Ctrl-C for themselves too and then hide how the program ended.
    let line = format!("exec '{}' --model run --max-tokens 100000", chat.get_program().display());
    let mut script = std::process::Command::new("script");
    script.args(["-qfec", &line, "/dev/null"]).current_dir(folder.path()).env("TERM", "xterm");
    let Ok(mut child) = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
        println!("skipped: ctrl_c_stops_the_answer_and_not_the_program (there is no command `script`)");
        return;
    };
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (sender, shown) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = stdout.read(&mut bytes) {
            let _ = sender.send(String::from_utf8_lossy(&bytes[..n]).into_owned());
        }
    });
    let wait_for = |part: &str| {
        let mut text = String::new();
        while !text.contains(part) {
            text += &shown
                .recv_timeout(Duration::from_secs(60))
                .unwrap_or_else(|_| panic!("no {part} in {text}"));
        }
        text
    };
    let mut write = |bytes: &[u8]| stdin.write_all(bytes).and_then(|()| stdin.flush()).unwrap();
    let prompt = "\u{1b}[K> ";
    wait_for(prompt);
    for _ in 0..2 {
        write(b"the little\r");
        wait_for("\nthe little");
        write(&[3]);
        assert!(wait_for(prompt).contains("(stopped)"));
    }
    write(b"/temperature 0.5\r");
    wait_for("temperature is 0.5");
    write(b"/quit\r");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
