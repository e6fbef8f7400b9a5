#[cfg(unix)]
use crate::program::interrupted;
use crate::program::{copy, data, fails, finished, folder, json, succeeds};

#[test]
fn methods_are_compared_saved_and_talked_with() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = ["--model", "run", "--data", "text.txt", "--steps", "4", "--batch", "2", "--seq", "32"];
    let more = ["--rank", "2", "--lr", "0.01", "0.001", "--out", "tuned"];
    let table = succeeds("finetune", dir, &[&args[..], &more[..]].concat());
    let result = json(&dir.join("tuned/finetune.json"));
    let rows = result["methods"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    assert!(table.contains("16 trainings of 4 steps follow; --method and --lr name fewer"), "{table}");
    let of = |name: &str| rows.iter().find(|row| row["method"] == name).unwrap();
    for row in rows {
        let name = row["method"].as_str().unwrap();
        assert!(table.contains(name), "{table}");
        assert!(
            row["held_out_loss"].as_f64().unwrap() < result["base_loss"].as_f64().unwrap() + 0.01,
            "{row}"
        );
        assert_eq!(row["tried"].as_array().unwrap().len(), 2);
        // Of two learning rates the best is the highest or the lowest.
        let side = if row["lr"] == 0.01 { "highest" } else { "lowest" };
        let said = |side: &str| {
            let mut lines =
                table.lines().filter_map(|line| line.strip_prefix(&format!("Best at the {side} ")));
            lines.any(|line| line.split([' ', ',']).any(|word| word == name))
        };
        let other = if side == "lowest" { "highest" } else { "lowest" };
        assert!(said(side) && !said(other), "{name}, {side}: {table}");
        assert!(row["peak_bytes"].as_u64().unwrap() > 0);
        if name != "full" {
            assert!(row["trainable"].as_u64() < of("full")["trainable"].as_u64());
            let adapter = format!("tuned/{name}/adapter");
            let chat =
                ["--model", "run", "--adapter", &adapter, "--prompt", "the little", "--max-tokens", "5"];
            let answer = succeeds("chat", dir, &chat);
            assert!(answer.starts_with("the little"), "{answer}");
        }
        let merged = dir.join("tuned").join(name).join("model/config.json");
        assert_eq!(merged.is_file(), name != "flylora", "{name}");
    }
    assert_eq!(of("flylora")["merge"], "unsupported");
    let chat = ["--model", "tuned/lora/model", "--prompt", "the little", "--max-tokens", "5"];
    assert!(succeeds("chat", dir, &chat).starts_with("the little"));
}

#[test]
fn adapters_train_over_a_quantised_model() {
    let folder = copy(finished());
    let dir = folder.path();
    let quantize =
        ["--model", "run", "--type", "q8_0", "--seq", "32", "--tokens", "64", "--out", "small.gguf"];
    succeeds("quantize", dir, &quantize);
    let args = ["--model", "small.gguf", "--data", "text.txt", "--steps", "4", "--batch", "2", "--seq", "32"];
    let more = ["--rank", "2", "--lr", "0.001", "--out", "tuned"];
    let table = succeeds("finetune", dir, &[&args[..], &more[..]].concat());
    let result = json(&dir.join("tuned/finetune.json"));
    let rows = result["methods"].as_array().unwrap();
    // All but the training of all weights, which are blocks.
    assert_eq!(rows.len(), 7, "{table}");
    for row in rows {
        let name = row["method"].as_str().unwrap();
        let base = result["base_loss"].as_f64().unwrap();
        assert!(row["held_out_loss"].as_f64().unwrap() < base + 0.01, "{row}");
        let adapter = format!("tuned/{name}/adapter");
        let chat =
            ["--model", "small.gguf", "--adapter", &adapter, "--prompt", "the little", "--max-tokens", "5"];
        assert!(succeeds("chat", dir, &chat).starts_with("the little"));
    }
    let chat = ["--model", "tuned/lora/model", "--prompt", "the little", "--max-tokens", "5"];
    assert!(succeeds("chat", dir, &chat).starts_with("the little"));
    let full = [&args[..], &["--method", "full", "--out", "never"]].concat();
    fails("finetune", dir, &full, &["--method full", "small.gguf"]);
    assert!(!dir.join("never").exists());
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_has_ended_and_no_folder_where_nothing_has() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = ["--model", "run", "--data", "text.txt", "--batch", "2", "--seq", "32", "--lr", "0.001"];
    let stopped = |more: &[&str], begun: &str| {
        let output = interrupted("finetune", dir, &[&args[..], more].concat(), begun);
        assert_eq!(output.code, Some(130), "{output:?}");
        output.stdout
    };
    let said = stopped(&["--method", "lora", "--steps", "100000", "--out", "none"], "none/cache/*");
    assert!(said.ends_with("Stopped before a training had ended: nothing is kept\n"), "{said}");
    assert!(!dir.join("none").exists());
    stopped(
        &["--method", "lora", "rslora", "dora", "full", "--steps", "60", "--out", "some"],
        "some/finetune.json",
    );
    fails("finetune", dir, &[&args[..], &["--out", "some"]].concat(), &["--out some", "finetune.json"]);
    let result = json(&dir.join("some/finetune.json"));
    let ended = result["methods"].as_array().unwrap().len();
    assert!((1..4).contains(&ended), "{ended}");
    let chat = ["--model", "run", "--adapter", "some/lora/adapter", "--prompt", "the", "--max-tokens", "2"];
    succeeds("chat", dir, &chat);
}

#[test]
fn dropout_changes_the_run_and_is_in_the_adapters_file() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = [
        "--model", "run", "--data", "text.txt", "--steps", "3", "--batch", "2", "--seq", "32", "--rank", "2",
    ];
    let more = ["--lr", "0.01", "--method", "lora", "dora", "adalora", "masked", "--dropout"];
    let loss = |rate: &str, out: &str| {
        succeeds("finetune", dir, &[&args[..], &more[..], &[rate, "--out", out]].concat());
        let result = json(&dir.join(out).join("finetune.json"));
        let rows = result["methods"].as_array().unwrap().clone();
        let rate: f64 = rate.parse().unwrap();
        for row in &rows {
            let adapter = dir.join(out).join(row["method"].as_str().unwrap()).join("adapter");
            assert_eq!(
                json(&adapter.join("adapter_config.json"))["lora_dropout"].as_f64(),
                Some(rate),
                "{row}"
            );
        }
        rows.iter().map(|row| row["held_out_loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (with, again, without) = (loss("0.5", "with"), loss("0.5", "again"), loss("0", "without"));
    assert_eq!(with, again);
    for (with, without) in with.iter().zip(&without) {
        assert!(with != without && (with - without).abs() < 0.2, "{with} {without}");
    }
}

#[test]
fn a_learning_rate_at_which_training_diverges_loses() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = [
        "--model", "run", "--data", "text.txt", "--steps", "4", "--batch", "2", "--seq", "32", "--method",
        "lora",
    ];
    let table =
        succeeds("finetune", dir, &[&args[..], &["--lr", "1e38", "0.001", "--out", "tuned"]].concat());
    let result = json(&dir.join("tuned/finetune.json"));
    let row = &result["methods"][0];
    assert_eq!(row["lr"], 0.001, "{table}");
    assert!(row["tried"][0][1].is_null() && row["tried"][1][1].is_number(), "{row}");
    let alone = [&args[..], &["--lr", "1e38", "--out", "never"]].concat();
    fails("finetune", dir, &alone, &["no method", "nothing is kept"]);
    assert!(!dir.join("never").exists());
}

#[test]
fn what_cannot_be_tuned_is_said_in_a_line() {
    let dir = finished();
    let args = ["--model", "run", "--data", "text.txt", "--out", "never"];
    let with = |more: &[&'static str]| [&args[..], more].concat();
    fails("finetune", dir, &with(&["--lr", "0"]), &["--lr 0", "positive"]);
    fails("finetune", dir, &with(&["--dropout", "1"]), &["--dropout 1", "share"]);
    fails("finetune", dir, &with(&["--seq", "100000"]), &["--seq 100000", "at most"]);
    fails("finetune", dir, &["--model", "nowhere", "--data", "text.txt"], &["nowhere"]);
    let folder = copy(dir);
    let wrong = ["--model", "run", "--adapter", "run", "--prompt", "x"];
    fails("chat", folder.path(), &wrong, &["adapter_config.json"]);
}

#[test]
fn ranks_and_targets_that_do_not_fit_are_refused_before_any_work() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = ["--model", "run", "--data", "text.txt", "--steps", "1"];
    for (more, parts) in [
        (&["--rank", "100000"][..], &["--rank 100000", "model.layers.", "a rank of 160 at most"][..]),
        (&["--rank", "18446744073709551615"], &["--rank 18446744073709551615"]),
        (&["--rank", "0"], &["--rank 0", "at least 1"]),
        (&["--targets", "q_proj", "nonsense"], &["--targets nonsense", "none of the model's projections"]),
        (&["--seq", "100000"], &["--seq 100000"]),
        (&["--batch", "0"], &["--batch 0"]),
        (&["--dropout", "1"], &["--dropout 1"]),
    ] {
        fails("finetune", dir, &[&args[..], more].concat(), parts);
        fails("finetune", dir, &[&args[..], more, &["--out", "a/b"]].concat(), parts);
    }
    // What is wrong with text is known when there are tokens of it.
    std::fs::write(dir.join("short.txt"), "A word.").unwrap();
    let args = ["--model", "run", "--data", "short.txt", "--seq", "32", "--out", "a/b"];
    fails("finetune", dir, &args, &["--seq 32", "longer than the data"]);
}

#[test]
fn a_rank_above_that_of_a_narrow_matrix_is_no_start_for_pissa() {
    let name = "a_rank_above_that_of_a_narrow_matrix_is_no_start_for_pissa";
    let Some(data) = data(name) else { return };
    let model = data.join("models/stories260K");
    let folder = folder();
    let args = ["--model", model.to_str().unwrap(), "--data", "text.txt", "--rank", "40", "--method", "lora"];
    let args = [&args[..], &["pissa"]].concat();
    fails("finetune", folder.path(), &args, &["--rank 40", "PiSSA", "_proj has 32"]);
}
