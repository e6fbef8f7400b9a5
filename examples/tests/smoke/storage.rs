//! Disks that fill up, files that were damaged, losses that explode: what was good stays good.

use std::path::Path;

use crate::program::{
    command, copy, data, fails, files, finished, folder, json, log, only, output, stops, succeeds, tiny,
};

fn cut(path: &Path, share: f64) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..(bytes.len() as f64 * share) as usize]).unwrap();
}

fn flip(path: &Path, from_end: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let place = bytes.len() - from_end;
    bytes[place] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_token_cache_is_named() {
    type Damage = fn(&Path);
    let damages: [Damage; 5] = [
        |path| cut(path, 0.5),
        |path| cut(path, 0.0),
        |path| flip(path, 1),
        |path| flip(path, 1000),
        |path| std::fs::remove_file(path).unwrap(),
    ];
    for damage in damages {
        let folder = copy(finished());
        let cache = folder.path().join("run/cache").join(only_cache(folder.path()));
        let shard = only(&cache, "", ".shard");
        damage(&shard);
        let name = shard.file_name().unwrap().to_str().unwrap();
        let parts = [name, "damaged", "delete ", " to have it rebuilt"];
        fails("train", folder.path(), &["--resume", "--out", "run"], &parts);
        std::fs::remove_dir_all(&cache).unwrap();
        succeeds("train", folder.path(), &["--resume", "--out", "run"]);
    }
    let folder = copy(finished());
    let cache = folder.path().join("run/cache").join(only_cache(folder.path()));
    cut(&cache.join("manifest.bin"), 0.5);
    fails("train", folder.path(), &["--resume", "--out", "run"], &["manifest.bin", "damaged"]);
}

fn only_cache(folder: &Path) -> String {
    let mut names = files(&folder.join("run/cache"));
    assert_eq!(names.len(), 1, "{names:?}");
    names.remove(0)
}

#[test]
fn a_damaged_checkpoint_is_named() {
    for (start, end) in [
        ("model-", ".safetensors"),
        ("optimizer-", ".safetensors"),
        ("state", ".json"),
        ("tokenizer", ".json"),
    ] {
        let folder = copy(finished());
        let file = only(&folder.path().join("run/checkpoint"), start, end);
        let name = file.file_name().unwrap().to_str().unwrap();
        for share in [0.9, 0.001, 0.0] {
            cut(&file, share);
            fails("train", folder.path(), &["--resume", "--out", "run"], &[name]);
        }
        std::fs::remove_file(&file).unwrap();
        let missing = if start == "state" { "no checkpoint in" } else { name };
        fails("train", folder.path(), &["--resume", "--out", "run"], &[missing]);
    }
}

#[test]
fn a_state_that_does_not_fit_is_named() {
    let folder = copy(finished());
    let file = folder.path().join("run/checkpoint/state.json");
    let good = std::fs::read_to_string(&file).unwrap();
    for (from, to) in [
        ("\"version\": 1", "\"version\": 2"),
        ("\"version\": 1", "\"verse\": 1"),
        ("\"step\": 6", "\"step\": -6"),
        ("\"size\": \"nano\"", "\"size\": 5"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        std::fs::write(&file, bad).unwrap();
        fails("train", folder.path(), &["--resume", "--out", "run"], &["state.json"]);
    }
    // Of a larger preset than the weights.
    std::fs::write(&file, good.replacen("\"nano\"", "\"tiny\"", 1)).unwrap();
    fails("train", folder.path(), &["--resume", "--out", "run"], &["model-6.safetensors", "expected"]);
}

#[test]
fn a_damaged_model_is_named() {
    for name in ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"] {
        let folder = copy(finished());
        let file = folder.path().join("run/model").join(name);
        for share in [0.9, 0.5, 0.001, 0.0] {
            cut(&file, share);
            fails("chat", folder.path(), &["--model", "run", "--prompt", "the"], &[name]);
        }
    }
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused() {
    let test = "a_tokenizer_larger_than_the_model_is_refused";
    let Some(data) = data(test) else { return };
    let camembert = data.join("tokenizers/camembert-base/tokenizer.json");
    let folder = copy(finished());
    let args = ["--out", "new", "--tokenizer", camembert.to_str().unwrap()];
    let parts = ["32005 entries", "vocabulary has 320"];
    fails("train", folder.path(), &tiny(&args), &parts);
    std::fs::copy(&camembert, folder.path().join("run/model/tokenizer.json")).unwrap();
    fails("chat", folder.path(), &["--model", "run", "--prompt", "the"], &parts);
    std::fs::copy(&camembert, folder.path().join("run/checkpoint/tokenizer.json")).unwrap();
    fails("train", folder.path(), &["--resume", "--out", "run"], &["32005 entries"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint() {
    let folder = folder();
    // Weights grow without bound, but not in one step.
    let args =
        tiny(&["--optimizer", "adamw", "--steps", "400", "--lr", "200", "--eval-every", "1", "--out", "run"]);
    let line = stops("train", folder.path(), &args, &["the run stops at step ", "is kept in", "--lr"]);
    let run = folder.path().join("run");
    let good = json(&run.join("checkpoint/state.json"))["step"].as_u64().unwrap();
    assert!(good >= 1);
    assert!(line.contains(&format!("its last checkpoint, of step {good},")), "{line}");
    assert!(!run.join("model").exists(), "a model that diverged is not for others");
    assert_eq!(files(&run.join("checkpoint")).len(), 4);
    assert!(log(&run).len() as u64 >= good);

    // It loads, makes the same steps again, and stops at the same one.
    assert_eq!(fails("train", folder.path(), &["--resume", "--out", "run"], &[]), line);
    // Nothing says that the weights themselves are at fault.
    succeeds("train", folder.path(), &["--resume", "--out", "run", "--steps", &good.to_string()]);
}

#[test]
fn a_model_that_gives_no_number_is_never_a_checkpoint() {
    // Infinite in f32, and AdamW has no trust region. The loss of the next step shows it, or an evaluation in between.
    for (out, interval, problem) in
        [("between", "1", "the run stops at step 1 "), ("next", "100", "the run stops at step 2 ")]
    {
        let folder = folder();
        let args = tiny(&["--optimizer", "adamw", "--lr", "1e40", "--eval-every", interval, "--out", out]);
        stops("train", folder.path(), &args, &[problem, "no checkpoint yet", "lower --lr", "NaN"]);
        assert!(!folder.path().join(out).join("checkpoint").exists());
        assert!(!folder.path().join("runs/last").exists(), "there is nothing to go on with");
    }
}

/// Files that grow over a limit fail as on a full disk, with another error number.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_what_was_there() {
    let folder = copy(finished());
    let run = folder.path().join("run");
    let snapshot = |dir: &str| -> Vec<(String, Vec<u8>)> {
        let dir = run.join(dir);
        files(&dir).into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
    };
    let (checkpoint, model) = (snapshot("checkpoint"), snapshot("model"));
    let limited = |kib: u64, args: &[&str]| {
        let train = command("train", folder.path(), args);
        let mut shell = std::process::Command::new("bash");
        // The signal of the limit ends a program that does not ignore it.
        shell.args(["-c", &format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"")]);
        shell.arg(train.get_program()).args(args).current_dir(folder.path()).env("RUST_BACKTRACE", "1");
        output(shell)
    };
    // Room for the log, not for the weights; for the weights, not for the moments.
    let kib = |file: &str| std::fs::metadata(run.join("checkpoint").join(file)).unwrap().len() / 1024;
    let (weights, moments) = (kib("model-6.safetensors"), kib("optimizer-6.safetensors"));
    assert!(moments > weights + 100, "{weights} KiB of weights, {moments} of moments");
    let between = u64::midpoint(weights, moments);
    for (kib, name) in [(1024, "model-8.safetensors"), (between, "optimizer-8.safetensors")] {
        let output = limited(kib, &["--resume", "--out", "run", "--steps", "8"]);
        crate::program::is_one_error(&output, &[name]);
        assert_eq!(snapshot("checkpoint"), checkpoint);
        assert_eq!(snapshot("model"), model);
        assert_eq!(files(&run).len(), 6, "{:?}", files(&run));
        succeeds("chat", folder.path(), &["--model", "run", "--prompt", "the", "--max-tokens", "1"]);
    }
    // Not even for the token cache.
    let output = limited(1, &tiny(&["--out", "new"]));
    crate::program::is_one_error(&output, &["tokens-"]);
    assert!(!folder.path().join("new").exists());
    // And with room again the run goes on.
    succeeds("train", folder.path(), &["--resume", "--out", "run", "--steps", "8"]);
    assert!(run.join("checkpoint/model-8.safetensors").is_file());
    assert!(!run.join("checkpoint/model-6.safetensors").exists());
}

/// The device that is always full.
#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let folder = finished();
    for (name, args) in [
        ("data", &["plan", "--tokens", "1e9", "--json"][..]),
        ("chat", &["--model", "run", "--prompt", "the", "--max-tokens", "2"]),
    ] {
        let mut program = command(name, folder, args);
        program.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let ended = program.stderr(std::process::Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        let stderr = String::from_utf8(ended.stderr).unwrap();
        let output = crate::program::Output { code: ended.status.code(), stdout: String::new(), stderr };
        crate::program::is_one_error(&output, &["standard output", "No space left"]);
    }
}
