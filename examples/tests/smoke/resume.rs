use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::program::{
    command, copy, fails, files, finished, folder, json, losses, output, stops, succeeds, tiny,
};
#[cfg(unix)]
use crate::program::{interrupt, interrupted};

/// Starts a run and waits until its log has `lines` lines.
fn start(dir: &Path, args: &[&str], out: &str, lines: usize) -> Child {
    let mut child = command("train", dir, args).stdout(std::process::Stdio::null()).spawn().unwrap();
    let path = dir.join(out).join("log.jsonl");
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.lines().count() >= lines {
            return child;
        }
        assert!(child.try_wait().unwrap().is_none(), "the run ended before line {lines}");
        assert!(started.elapsed() < Duration::from_secs(120), "no line {lines} after two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The runs must have the same losses and models, bit for bit.
fn same(dir: &Path, a: &str, b: &str) {
    let (losses_a, losses_b) = (losses(&dir.join(a)), losses(&dir.join(b)));
    assert_eq!(losses_a.len(), losses_b.len());
    for (a, b) in losses_a.iter().zip(&losses_b) {
        // Numbers are written with as many digits as it takes to read the same bits.
        assert_eq!(a.to_string(), b.to_string());
    }
    let model = |run: &str| std::fs::read(dir.join(run).join("model/model.safetensors")).unwrap();
    assert!(model(a) == model(b), "the models differ");
    assert_eq!(files(&dir.join(a).join("checkpoint")), files(&dir.join(b).join("checkpoint")));
    assert_eq!(files(&dir.join(a)), files(&dir.join(b)));
}

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_been() {
    let folder = folder();
    for optimizer in ["velvet", "adamw"] {
        let whole = format!("{optimizer}-whole");
        let parts = format!("{optimizer}-parts");
        let args =
            |out| tiny(&["--optimizer", optimizer, "--steps", "40", "--eval-every", "6", "--out", out]);
        succeeds("train", folder.path(), &args(&whole));
        for lines in [8, 15] {
            let args = if lines == 8 { args(&parts) } else { vec!["--resume", "--out", &parts] };
            let mut child = start(folder.path(), &args, &parts, lines);
            child.kill().unwrap(); // SIGKILL on Unix
            child.wait().unwrap();
        }
        let mut command = command("train", folder.path(), &["--resume", "--out", &parts]);
        command.env("RAYON_NUM_THREADS", "1"); // the number of threads changes no bit
        assert_eq!(output(command).code, Some(0));
        same(folder.path(), &whole, &parts);
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_a_run_that_can_go_on() {
    let folder = folder();
    let args = |out| tiny(&["--dtype", "bf16", "--steps", "40", "--eval-every", "15", "--out", out]);
    succeeds("train", folder.path(), &args("whole"));
    let mut child = start(folder.path(), &args("parts"), "parts", 4);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    // What has no model yet says how it gets one.
    let chat =
        |args: &[&str]| fails("chat", folder.path(), args, &["parts has no model yet", "--resume --out"]);
    chat(&["--model", "parts", "--prompt", "x"]);
    chat(&["--prompt", "x"]);
    // Without --out the last run goes on.
    let mut child = start(folder.path(), &["--resume"], "parts", 12);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    succeeds("train", folder.path(), &["--resume"]);
    same(folder.path(), "whole", "parts");
}

#[cfg(unix)]
#[test]
fn ctrl_c_before_the_first_step_leaves_no_run() {
    let folder = tempfile::tempdir().unwrap();
    // Tens of megabytes of stories take seconds to make tokens of.
    let output = interrupted("train", folder.path(), &["--steps", "100000"], "runs/nano-1");
    assert_eq!((output.code, output.stderr.as_str()), (Some(130), ""));
    assert_eq!(output.stdout, "Stopped before a step was made\n");
    assert!(!folder.path().join("runs").exists());
}

#[cfg(unix)]
#[test]
fn a_run_on_the_embedded_stories_goes_on_where_ctrl_c_stopped_it() {
    let folder = tempfile::tempdir().unwrap();
    let args = |out| ["--steps", "24", "--batch", "1", "--seq", "32", "--eval-every", "50", "--out", out];
    succeeds("train", folder.path(), &args("whole"));
    let mut child = start(folder.path(), &args("parts"), "parts", 3);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    fails("train", folder.path(), &["--resume", "--steps", "30"], &["--steps 24", "30"]);
    succeeds("train", folder.path(), &["--resume"]);
    same(folder.path(), "whole", "parts");
}

#[test]
fn a_finished_run_can_be_finished_again_or_made_longer() {
    let folder = copy(finished());
    let before = losses(&folder.path().join("run"));
    succeeds("train", folder.path(), &["--resume", "--out", "run"]);
    assert_eq!(losses(&folder.path().join("run")), before);
    succeeds("train", folder.path(), &["--resume", "--out", "run", "--steps", "8"]);
    let after = losses(&folder.path().join("run"));
    assert_eq!(after.len(), 8);
    assert_eq!(after[..6], before);
    fails("train", folder.path(), &["--resume", "--out", "run", "--steps", "7"], &["8 steps", "--steps 7"]);
}

#[test]
fn what_a_run_has_lost_is_said_and_what_it_cannot_have_is_refused() {
    let folder = copy(finished());
    let run = folder.path().join("run");
    std::fs::remove_file(run.join("log.jsonl")).unwrap();
    let said = succeeds("train", folder.path(), &["--resume", "--out", "run"]);
    assert!(said.contains("The held-out loss is not known") && !said.contains("NaN"), "{said}");
    assert!(json(&run.join("summary.json"))["eval_loss"].is_null());

    let file = run.join("checkpoint/state.json");
    let mut state = json(&file);
    state["seconds"] = (-1).into();
    std::fs::write(&file, state.to_string()).unwrap();
    let parts = ["run/checkpoint/state.json: seconds is -1, expected at least 0"];
    fails("train", folder.path(), &["--resume", "--out", "run"], &parts);
}

#[test]
fn a_run_goes_on_from_another_folder() {
    let folder = copy(finished());
    let elsewhere = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    // The text has moved with the copy, but the run still names the original.
    succeeds("train", elsewhere.path(), &["--resume", "--out", run.to_str().unwrap(), "--steps", "7"]);
}

#[test]
fn only_a_run_that_is_there_goes_on() {
    let folder = folder();
    fails("train", folder.path(), &["--resume"], &["--resume", "no run yet", "--out"]);
    fails("train", folder.path(), &["--resume", "--out", "none"], &["no checkpoint in", "none"]);
}

#[test]
fn a_run_goes_on_with_its_own_settings_only() {
    for (flag, value) in [
        ("--lr", "0.5"),
        ("--batch", "3"),
        ("--seq", "16"),
        ("--seed", "9"),
        ("--size", "tiny"),
        ("--optimizer", "adamw"),
        ("--dtype", "bf16"),
        ("--data", "other.txt"),
        ("--tokenizer", "other.json"),
        ("--vocab-size", "400"),
    ] {
        fails("train", finished(), &["--resume", "--out", "run", flag, value], &["--resume", flag]);
    }
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten() {
    fails("train", finished(), &tiny(&["--out", "run"]), &["run holds a run already", "--resume", "--out"]);
}

#[test]
fn changed_data_is_noticed() {
    let folder = folder();
    succeeds("train", folder.path(), &tiny(&["--out", "run"]));
    let path = folder.path().join("text.txt");
    let text = std::fs::read_to_string(&path).unwrap();
    // One word, with as many tokens.
    let place = text.rfind(" old ").unwrap();
    let changed = format!("{} new {}", &text[..place], &text[place + 5..]);
    for changed in [changed, text.clone() + "more"] {
        std::fs::write(&path, changed).unwrap();
        let args = ["--resume", "--out", "run", "--steps", "8"];
        stops("train", folder.path(), &args, &["text.txt changed since the run began"]);
    }
    std::fs::write(&path, &text).unwrap();
    succeeds("train", folder.path(), &["--resume", "--out", "run", "--steps", "8"]);
    std::fs::remove_file(&path).unwrap();
    fails(
        "train",
        folder.path(),
        &["--resume", "--out", "run", "--steps", "9"],
        &["text.txt does not exist"],
    );
}
