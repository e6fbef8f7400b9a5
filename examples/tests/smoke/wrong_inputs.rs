//! Each gives one line and exit code 2, with `RUST_BACKTRACE=1` as well.

use crate::program::{command, fails, folder, output, tiny};

#[test]
fn data_that_cannot_be_read() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("empty.txt"), "").unwrap();
    std::fs::write(dir.join("blank.txt"), " \n\t\n\u{a0}\n").unwrap();
    std::fs::write(dir.join("latin1.txt"), b"One line.\nUn caf\xe9.\n").unwrap();
    std::fs::write(dir.join("bad.jsonl"), "{\"text\": \"good\"}\n{\"text\": 5}\n").unwrap();
    std::fs::write(dir.join("cut.jsonl"), "{\"text\": \"good\"}\n\n{\"text\": \"go").unwrap();
    std::fs::create_dir(dir.join("nothing")).unwrap();
    std::fs::create_dir(dir.join("images")).unwrap();
    std::fs::write(dir.join("images/a.png"), [0x89, b'P', b'N', b'G']).unwrap();
    for (data, parts) in [
        ("missing.txt", &["missing.txt does not exist"][..]),
        ("empty.txt", &["empty.txt", "no text"]),
        ("blank.txt", &["blank.txt", "no text"]),
        ("nothing", &["nothing", "no readable file"]),
        ("images", &["images", "no readable file"]),
        ("latin1.txt", &["latin1.txt, line 2", "invalid UTF-8 at byte 16"]),
        ("bad.jsonl", &["bad.jsonl, line 2"]),
        ("cut.jsonl", &["cut.jsonl, line 3"]),
    ] {
        fails("train", dir, &["--data", data, "--out", "run"], parts);
        // With its own tokenizer a run reads the data another way.
        fails(
            "train",
            dir,
            &["--data", "text.txt", data, "--out", "run"],
            if data == "empty.txt" || data == "blank.txt" { continue } else { parts },
        );
    }
}

#[test]
fn tokenizers_that_cannot_be_read() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("empty.json"), "").unwrap();
    std::fs::write(dir.join("other.json"), "{\"a\": 1}").unwrap();
    for file in ["missing.json", "empty.json", "other.json", "text.txt"] {
        fails("train", dir, &["--data", "text.txt", "--tokenizer", file, "--out", "run"], &[file]);
    }
}

#[test]
fn flags_out_of_range() {
    let folder = folder();
    for (args, parts) in [
        (&["--seq", "0"][..], &["--seq 0"][..]),
        (&["--batch", "0"], &["--batch 0"]),
        (&["--steps", "0"], &["--steps 0"]),
        (&["--eval-every", "0"], &["--eval-every 0"]),
        (&["--lr", "0"], &["--lr 0"]),
        (&["--lr", "-1"], &["--lr -1"]),
        (&["--lr", "-1e-3"], &["--lr -0.001"]),
        (&["--lr", "nan"], &["--lr NaN"]),
        (&["--batch", "100000000"], &["--batch 100000000 x --seq 256", "2^32"]),
        (&["--vocab-size", "0"], &["vocab"]),
        (&["--vocab-size", "10"], &["vocab"]),
        (&["--seq", "100000"], &["--seq 100000", "longer than the data", "text.txt"]),
        (&["--size", "huge"], &["huge", "nano, tiny, small, medium, large"]),
        (&["--device", "tpu"], &["--device tpu", "cpu, cuda or cuda:N"]),
        (&["--device", "cuda:first"], &["--device cuda:first", "not a number"]),
    ] {
        let mut all = vec!["--data", "text.txt", "--out", "run"];
        all.extend(args);
        fails("train", folder.path(), &all, parts);
    }
    if !cfg!(feature = "cuda") {
        fails("train", folder.path(), &tiny(&["--device", "cuda"]), &["--device cuda", "--features cuda"]);
    }
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn flags_that_there_are_not() {
    let folder = folder();
    for (args, parts) in [
        (&["--optimizer", "sgd"][..], &["'sgd'", "--optimizer", "velvet, adamw"][..]),
        (&["--dtype", "f8"], &["'f8'", "--dtype", "f32, bf16"]),
        (&["--steps", "many"], &["'many'", "--steps"]),
        (&["--steps", "-1"], &["'-1'", "--steps"]),
        (&["--steps"], &["--steps", "value"]),
        (&["--nothing"], &["'--nothing'"]),
        (&["--stpes"], &["unexpected argument '--stpes' found; a similar argument exists: '--steps'"]),
    ] {
        let line = fails("train", folder.path(), args, parts);
        assert!(!line.contains("Usage") && !line.contains("--help"), "{line}");
    }
}

#[test]
fn a_run_that_cannot_be_written() {
    let folder = folder();
    // A file where a folder must be.
    let out = folder.path().join("text.txt").join("run");
    let line = fails("train", folder.path(), &tiny(&["--out", out.to_str().unwrap()]), &["text.txt"]);
    assert!(line.contains("cannot create the folder"), "{line}");
    fails("train", folder.path(), &tiny(&["--out", "text.txt"]), &["text.txt"]);
}

#[test]
fn help_is_for_people() {
    let folder = folder();
    for (name, flags) in [
        (
            "train",
            &[
                "--size",
                "--data",
                "--tokenizer",
                "--steps",
                "--batch",
                "--seq",
                "--lr",
                "--optimizer",
                "--seed",
                "--device",
                "--dtype",
                "--out",
                "--resume",
                "--eval-every",
            ][..],
        ),
        (
            "chat",
            &[
                "--model",
                "--prompt",
                "--temperature",
                "--top-k",
                "--top-p",
                "--min-p",
                "--repetition-penalty",
                "--max-tokens",
                "--seed",
                "--system",
                "--template",
                "--adapter",
                "--plain",
            ],
        ),
        ("benchmark", &["--size", "--data", "--steps", "--lrs", "--seeds", "--out"]),
        ("data", &["build", "inspect", "stats", "sample", "plan", "clean"]),
    ] {
        let output = output(command(name, folder.path(), &["--help"]));
        assert_eq!(output.code, Some(0));
        for flag in flags {
            assert!(output.stdout.contains(flag), "{name} {flag}");
        }
    }
}

#[test]
fn help_begins_with_what_the_program_does() {
    let folder = folder();
    for (name, what) in [
        ("train", "Train a VesperLM"),
        ("chat", "Chat with a trained model"),
        ("finetune", "Fine-tune a trained model"),
        ("quantize", "Write a trained model as a GGUF file"),
        ("export", "Write a model for others"),
        ("benchmark", "Compare candle's AdamW with Velvet"),
        ("metacognition", "Train a head that foresees a model's errors"),
        ("data", "Look at text as a model will see it"),
    ] {
        let output = output(command(name, folder.path(), &["--help"]));
        assert!(output.stdout.starts_with(what), "{name}: {}", output.stdout);
    }
}
