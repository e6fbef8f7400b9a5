#[cfg(unix)]
use crate::program::interrupted;
use crate::program::{copy, fails, finished, json, number, only, succeeds, text, tiny};

/// Documents that the model of the finished run was not trained on.
fn held_out(dir: &std::path::Path, documents: usize) {
    let words = "the bird and a cat ran under the old house then it was happy on top of a tree";
    let all = text(words, documents + 5);
    // Paragraphs become documents.
    let all: Vec<&str> = all.split("\n\n").take(documents).collect();
    std::fs::write(dir.join("held-out.txt"), all.join("<|endoftext|>")).unwrap();
}

const TINY: [&str; 18] = [
    "--model",
    "run",
    "--data",
    "held-out.txt",
    "--out",
    "judged",
    "--seq",
    "32",
    "--units",
    "4",
    "--epochs",
    "2",
    "--questions",
    "30",
    "--context",
    "8",
    "--seeds",
    "2",
];

#[test]
fn a_head_is_trained_measured_and_kept() {
    let folder = copy(finished());
    let dir = folder.path();
    held_out(dir, 40);
    let args = [&TINY[..], &["--answer", "1", "--lr", "0.01"]].concat();
    let table = succeeds("metacognition", dir, &args);
    assert!(table.contains("--model run/model --head judged/head --prompt"), "{table}");
    let record = json(&dir.join("judged/metacognition.json"));
    assert_eq!(record["documents"], 40);
    assert_eq!((record["model"].as_str(), record["data"].as_str()), (Some("run"), Some("held-out.txt")));
    let seeds = record["seeds"].as_array().unwrap();
    assert_eq!(seeds.len(), 2);
    for seed in seeds {
        let rate = number(&seed["error_rate"]);
        assert!(rate > 0.0 && rate < 1.0, "{rate}");
        let rows = seed["tokens"].as_array().unwrap();
        assert_eq!(rows.len(), 8);
        for row in rows {
            for metric in ["auroc", "ece", "ece_isotonic", "brier", "error_at_half"] {
                assert!((0.0..=1.0).contains(&number(&row[1][metric])), "{row}");
            }
            assert!(table.contains(row[0].as_str().unwrap()), "{table}");
        }
        let sum: f64 = seed["kinds"].as_object().unwrap().values().map(number).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        let policies = seed["policies"].as_array().unwrap();
        assert_eq!(policies.len(), 3 * 8);
        for policy in policies {
            let cost = number(&policy["cost"]);
            assert!((1.0..=2.0).contains(&cost), "{policy}");
        }
    }
    let judged = dir.join("judged");
    let head = judged.join("head");
    assert_eq!(only(&head, "error_head", ".json"), head.join("error_head.json"));
    assert_eq!(json(&head.join("error_head.json"))["base"]["hidden_size"], 160);

    // The head that was kept regulates an answer.
    let ask = ["--model", "run", "--head", "judged/head", "--prompt", "the little", "--answer", "3"];
    let more = ["--satisfied-at", "0", "--abstain-above", "1", "--drafts", "3"];
    let answer = succeeds("metacognition", dir, &[&ask[..], &more].concat());
    for part in ["draft 0, wrong with probability", "draft 2", "Best { draft: ", "9 tokens were generated"] {
        assert!(answer.contains(part), "{answer}");
    }
    let more = ["--satisfied-at", "0", "--abstain-above", "0"];
    let answer = succeeds("metacognition", dir, &[&ask[..], &more].concat());
    assert!(answer.contains("Abstained: no answer"), "{answer}");
    fails("metacognition", dir, &[&ask[..], &["--satisfied-at", "2"]].concat(), &["satisfied_at is 2"]);
    fails("metacognition", dir, &["--head", "judged/head"], &["--prompt"]);
    fails("metacognition", dir, &["--model", "run", "--head", "run", "--prompt", "x"], &["error_head.json"]);
    // A head of another model, and half of a file.
    let other = tiny(&["--out", "other", "--seed", "5"]);
    succeeds("train", dir, &other);
    let wrong = ["--model", "other", "--head", "judged/head", "--prompt", "x"];
    fails("metacognition", dir, &wrong, &["error_head.json", "another model", "fingerprint"]);
    let weights = judged.join("head/error_head.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    fails("metacognition", dir, &ask, &["error_head.safetensors", "truncated"]);

    let printed = succeeds("metacognition", dir, &["--report", "judged/metacognition.json"]);
    assert!(printed.len() > 1000 && table.contains(&printed), "{printed}");

    // The same flags give the same figures.
    let again: Vec<&str> = args.iter().map(|word| if *word == "judged" { "again" } else { *word }).collect();
    succeeds("metacognition", dir, &again);
    let again = json(&dir.join("again/metacognition.json"));
    assert_eq!(again["seeds"], record["seeds"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_head_and_no_folder_where_there_is_none() {
    let folder = copy(finished());
    let dir = folder.path();
    held_out(dir, 40);
    let stopped = |more: &[&str], begun: &str| {
        let flags = TINY.chunks(2).filter(|flag| !more.contains(&flag[0])).flatten();
        let args: Vec<&str> = flags.chain(more).copied().collect();
        let output = interrupted("metacognition", dir, &args, begun);
        assert_eq!((output.code, output.stderr.as_str()), (Some(130), ""));
        output.stdout
    };
    let said = stopped(&["--epochs", "1000000"], "judged");
    assert!(said.ends_with("Stopped before a head was trained: nothing is kept\n"), "{said}");
    assert!(!dir.join("judged").exists());
    stopped(&["--seeds", "1000000", "--answer", "1"], "judged/head/error_head.json");
    assert!(!dir.join("judged/metacognition.json").exists());
    let ask = ["--model", "run", "--head", "judged/head", "--prompt", "the little", "--answer", "3"];
    succeeds("metacognition", dir, &ask);
}

#[test]
fn text_that_was_trained_on_is_left_out() {
    let folder = copy(finished());
    let dir = folder.path();
    // text.txt is one document, and the model's own.
    let trained = std::fs::read_to_string(dir.join("text.txt")).unwrap();
    held_out(dir, 8);
    let more = std::fs::read_to_string(dir.join("held-out.txt")).unwrap();
    std::fs::write(dir.join("mixed.txt"), format!("{trained}<|endoftext|>{more}<|endoftext|>{more}"))
        .unwrap();
    let args = ["--model", "run", "--data", "mixed.txt", "--out", "judged"];
    fails("metacognition", dir, &args, &["mixed.txt", "not trained on: 8", "at least 10"]);
}

#[test]
fn stories_are_asked_for_where_there_are_too_few() {
    let folder = tempfile::tempdir().unwrap();
    let train = ["--steps", "1", "--batch", "1", "--seq", "32", "--vocab-size", "300", "--out", "run"];
    succeeds("train", folder.path(), &train);
    let args = ["--model", "run", "--stories", "1", "--context", "8", "--seq", "32"];
    fails("metacognition", folder.path(), &args, &["held-out embedded stories", ": 1,", "--stories"]);
}

#[test]
fn what_cannot_be_measured_is_said_in_a_line() {
    let folder = copy(finished());
    let dir = folder.path();
    held_out(dir, 40);
    let with = |more: &[&'static str]| [&TINY[..], more].concat();
    let without = |flag: &str, value: &'static str| -> Vec<&'static str> {
        let mut args = TINY.to_vec();
        let at = args.iter().position(|word| *word == flag).unwrap() + 1;
        args[at] = value;
        args
    };
    fails("metacognition", dir, &without("--seeds", "0"), &["--seeds 0"]);
    fails("metacognition", dir, &without("--context", "0"), &["--context 0"]);
    fails("metacognition", dir, &without("--context", "100000"), &["--context 100000", "the model takes"]);
    let most = "18446744073709551615";
    fails(
        "metacognition",
        dir,
        &with(&["--answer", most]),
        &["--answer 18446744073709551615", "the model takes"],
    );
    fails("metacognition", dir, &with(&["--temperature", "0"]), &["--temperature 0", "positive"]);
    fails("metacognition", dir, &with(&["--lr", "nan"]), &["--lr NaN"]);
    fails("metacognition", dir, &["--report", "text.txt"], &["text.txt is damaged"]);
    let other = ["--report", "run/summary.json"];
    fails("metacognition", dir, &other, &["run/summary.json: not a record of metacognition"]);
    // The model knows nothing of the stories.
    let parts = ["run/model: trained on", "text.txt, not on the embedded stories", "--data"];
    fails("metacognition", dir, &["--model", "run"], &parts);
    fails("metacognition", dir, &without("--data", "nowhere.txt"), &["nowhere.txt"]);
    fails("metacognition", dir, &without("--model", "nowhere"), &["nowhere", "no such folder"]);
    let long = without("--context", "400");
    fails("metacognition", dir, &long, &["--context 400", "no document of this part has so many"]);
}
