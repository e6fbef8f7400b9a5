use std::collections::BTreeSet;
use std::path::Path;

use crate::program::{ENGLISH, data, files, finished, folder, json, log, number, only, succeeds, text, tiny};

/// The first and the last loss of the training.
fn first_and_last(run: &Path) -> (f64, f64) {
    let log = log(run);
    (number(&log[0]["loss"]), number(&log[log.len() - 1]["loss"]))
}

fn falls(run: &Path) {
    let (first, last) = first_and_last(run);
    assert!(last < first, "from {first} to {last}");
}

/// The number before " parameters" in what a run prints.
fn printed_parameters(stdout: &str) -> u64 {
    let words: Vec<&str> = stdout.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "parameters").unwrap();
    words[at - 1].parse().unwrap()
}

/// The elements of all tensors of a safetensors file, and the metadata's format.
fn elements(path: &Path) -> (u64, String) {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let count = tensors.tensors().iter().map(|(_, t)| t.shape().iter().product::<usize>() as u64).sum();
    (count, metadata.metadata().as_ref().unwrap()["format"].clone())
}

#[test]
fn a_run_writes_what_it_promises() {
    let folder = folder();
    let stdout = succeeds("train", folder.path(), &tiny(&["--out", "run", "--eval-every", "4"]));
    let run = folder.path().join("run");
    assert_eq!(files(&run), ["cache", "checkpoint", "log.jsonl", "loss.svg", "model", "summary.json"]);

    let log = log(&run);
    assert_eq!(log.len(), 6);
    for (i, line) in log.iter().enumerate() {
        let step = i + 1;
        let mut fields =
            BTreeSet::from(["step", "loss", "perplexity", "lr", "beta1", "grad_norm", "tokens_per_second"]);
        if step == 4 || step == 6 {
            fields.insert("eval_loss");
        }
        let object = line.as_object().unwrap();
        assert_eq!(object.keys().map(String::as_str).collect::<BTreeSet<_>>(), fields, "step {step}");
        assert_eq!(line["step"], step);
        assert_eq!(number(&line["loss"]).exp(), number(&line["perplexity"]));
        assert!(object.values().all(|value| number(value) > 0.0), "{line}");
    }

    let summary = json(&run.join("summary.json"));
    let fields = [
        "eval_loss",
        "final_loss",
        "floor",
        "parameters",
        "seconds",
        "size",
        "tokens",
        "tokens_per_second",
        "unigram_entropy",
    ];
    let mut names: Vec<&String> = summary.as_object().unwrap().keys().collect();
    names.sort();
    assert_eq!(names, fields);
    assert_eq!(summary["size"], "nano");
    assert_eq!(summary["tokens"], 6 * 2 * 32);
    assert_eq!(summary["final_loss"], log[5]["loss"]);
    assert_eq!(summary["eval_loss"], log[5]["eval_loss"]);
    assert!(summary["floor"].is_null());
    // 27 words and a few letters: about ln 27, and much less than the ln 300 of a uniform guess.
    let entropy = number(&summary["unigram_entropy"]);
    assert!((3.0..4.5).contains(&entropy), "{entropy}");
    let speed = number(&summary["tokens"]) / number(&summary["seconds"]);
    assert!((speed / number(&summary["tokens_per_second"]) - 1.0).abs() < 1e-9);

    let svg = std::fs::read_to_string(run.join("loss.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("held-out loss") && svg.contains("unigram entropy") && !svg.contains("NaN"));

    let checkpoint = run.join("checkpoint");
    assert_eq!(
        files(&checkpoint),
        ["model-6.safetensors", "optimizer-6.safetensors", "state.json", "tokenizer.json"]
    );

    let model = run.join("model");
    for name in ["config.json", "generation_config.json", "tokenizer.json"] {
        assert!(json(&model.join(name)).is_object(), "{name}");
    }
    assert_eq!(json(&model.join("config.json"))["vocab_size"], 320); // 300, padded
    let (count, format) = elements(&model.join("model.safetensors"));
    assert_eq!(format, "pt");
    assert_eq!(count, printed_parameters(&stdout));
    assert_eq!(summary["parameters"], count);
    assert!(stdout.contains("unigram entropy"), "{stdout}");
}

#[test]
fn the_embedded_stories_have_a_floor() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--steps", "4", "--batch", "2", "--seq", "64", "--eval-every", "4"];
    let stdout = succeeds("train", folder.path(), &args);
    // Without --out, the run has a folder of its own and is remembered.
    assert_eq!(files(&folder.path().join("runs")), ["last", "nano-1"]);
    let run = folder.path().join("runs").join("nano-1");
    falls(&run);
    let summary = json(&run.join("summary.json"));
    let (floor, entropy) = (number(&summary["floor"]), number(&summary["unigram_entropy"]));
    assert!(0.0 < floor && floor < entropy && entropy < number(&summary["eval_loss"]), "{summary}");
    assert!(stdout.contains(&format!("floor {floor:.3}")), "{stdout}");
    assert!(std::fs::read_to_string(run.join("loss.svg")).unwrap().contains("floor"));
}

#[test]
fn a_run_depends_on_its_seed_alone() {
    let folder = folder();
    let model = |out: &str, seed: &str, threads: &str| {
        let mut command =
            crate::program::command("train", folder.path(), &tiny(&["--out", out, "--seed", seed]));
        command.env("RAYON_NUM_THREADS", threads);
        assert_eq!(crate::program::output(command).code, Some(0));
        std::fs::read(folder.path().join(out).join("model/model.safetensors")).unwrap()
    };
    let one = model("a", "7", "1");
    assert!(one == model("b", "7", "3"), "the number of threads changed the model");
    assert!(one != model("c", "8", "1"), "the seed did not change the model");
}

#[test]
fn both_optimizers_and_number_types_learn() {
    let folder = folder();
    for (out, more) in [
        ("adamw", &["--optimizer", "adamw"][..]),
        ("bf16", &["--dtype", "bf16"]),
        ("both", &["--optimizer", "adamw", "--dtype", "bf16"]),
    ] {
        succeeds("train", folder.path(), &[&tiny(&["--out", out])[..], more].concat());
        falls(&folder.path().join(out));
    }
    // Nothing of AdamW follows the loss, which is another one in bf16.
    let of = |run: &str, field: &str| -> Vec<f64> {
        log(&folder.path().join(run)).iter().map(|line| number(&line[field])).collect()
    };
    assert_ne!(of("adamw", "loss"), of("both", "loss"));
    assert_eq!(of("adamw", "lr"), of("both", "lr"));
    assert!(of("adamw", "beta1").iter().all(|&beta| beta == 0.9));
    assert_ne!(of("bf16", "beta1"), of("adamw", "beta1"));
}

#[test]
fn folders_of_text_and_jsonl_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("data/inner");
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::write(folder.path().join("data/one.txt"), text(ENGLISH, 20)).unwrap();
    let lines: String = text("un deux trois quatre cinq", 20)
        .split("\n\n")
        .filter(|text| !text.is_empty())
        .map(|text| serde_json::json!({ "text": text }).to_string() + "\n")
        .collect();
    std::fs::write(inner.join("two.jsonl"), lines).unwrap();
    let args = ["--data", "data", "--vocab-size", "300", "--steps", "6", "--batch", "2", "--seq", "32"];
    succeeds("train", folder.path(), &[&args[..], &["--out", "run"]].concat());
    let run = folder.path().join("run");
    falls(&run);
    let vocabulary = json(&run.join("model/tokenizer.json"))["model"]["vocab"].to_string();
    // Merges of letters that are neighbours in one of the two alone.
    for pair in ["th", "qu"] {
        assert!(vocabulary.contains(pair), "{pair}");
    }
}

#[test]
fn french_text_is_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let words = "le la les un une été où déjà cœur garçon fenêtre naïf à l'école s'écria-t-elle Noël œuvre";
    std::fs::write(folder.path().join("text.txt"), text(words, 60)).unwrap();
    succeeds("train", folder.path(), &tiny(&["--out", "run", "--steps", "12"]));
    falls(&folder.path().join("run"));
    let out =
        succeeds("chat", folder.path(), &["--model", "run", "--prompt", "où déjà", "--max-tokens", "5"]);
    assert!(out.starts_with("où déjà"), "{out}");
}

#[test]
fn a_real_tokenizer_is_used_as_it_is() {
    let Some(data) = data("a_real_tokenizer_is_used_as_it_is") else { return };
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = data.join("tokenizers/camembert-base/tokenizer.json");
    let text = std::fs::read_to_string(data.join("french/novels/FRA00401_Allais.txt")).unwrap();
    std::fs::write(folder.path().join("text.txt"), text.chars().take(40_000).collect::<String>()).unwrap();
    // AdamW warms up by steps, so that four of them are enough to see the loss fall.
    let args = ["--data", "text.txt", "--steps", "4", "--batch", "2", "--seq", "32", "--out", "run"];
    let more = ["--optimizer", "adamw", "--tokenizer", tokenizer.to_str().unwrap()];
    succeeds("train", folder.path(), &[&args[..], &more].concat());
    let run = folder.path().join("run");
    falls(&run);
    let entries = json(&run.join("model/config.json"))["vocab_size"].as_u64().unwrap();
    assert_eq!(entries, 32_005_u64.next_multiple_of(64));
    let answer =
        succeeds("chat", folder.path(), &["--model", "run", "--prompt", "Il était", "--max-tokens", "4"]);
    assert!(answer.starts_with("Il était"), "{answer}");
}

#[test]
fn a_run_has_one_token_cache_and_no_temporary_files() {
    let run = finished().join("run");
    let cache = only(&run.join("cache"), "tokens-", "");
    assert_eq!(files(&run.join("cache")).len(), 1);
    only(&cache, "", ".shard");
    assert_eq!(files(&cache).len(), 3, "a manifest, a shard and the lock: {:?}", files(&cache));
    assert_eq!(files(&run).len(), 6);
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_run() {
    let folder = folder();
    let mut command = crate::program::command("train", folder.path(), &tiny(&["--out", "run"]));
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(folder.path().join("run/model/config.json").is_file());
}
