//! The program `data`.

use serde_json::Value;

use crate::program::{command, data, fails, files, folder, number, only, output, succeeds};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn stats_are_one_object() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("more.jsonl"), "{\"text\": \"été\"}\n{\"text\": \"the cat\"}\n").unwrap();
    let args = ["stats", "text.txt", "more.jsonl", "--vocab-size", "300", "--json", "--svg", "lengths.svg"];
    let stats = json(&succeeds("data", dir, &args));
    let bytes = std::fs::metadata(dir.join("text.txt")).unwrap().len() + 5 + 7;
    assert_eq!((&stats["documents"], &stats["records_skipped"]), (&3.into(), &0.into()));
    assert_eq!((&stats["bytes"], &stats["characters"]), (&bytes.into(), &(bytes - 2).into()));
    assert_eq!((&stats["questions"], &stats["vocab_size"]), (&Value::Null, &300.into()));
    let tokens = number(&stats["tokens"]);
    assert!((number(&stats["tokens_per_byte"]) - tokens / bytes as f64).abs() < 1e-12);
    assert!((3.0..5.7).contains(&number(&stats["unigram_entropy"])), "{stats}");
    let counted: f64 =
        stats["histogram"].as_array().unwrap().iter().map(|bin| number(&bin["documents"])).sum();
    assert_eq!(counted, 3.0);
    assert_eq!(stats["frequent"].as_array().unwrap().len(), 20);
    assert!(std::fs::read_to_string(dir.join("lengths.svg")).unwrap().starts_with("<svg"));

    // For people the same, and the cache is used again.
    let text =
        succeeds("data", dir, &["stats", "text.txt", "more.jsonl", "--vocab-size", "300", "--top", "1"]);
    assert!(text.contains(&format!("tokens                 {tokens}")), "{text}");
    assert_eq!(files(&dir.join("data-cache")).len(), 1);
}

#[test]
fn a_cache_is_built_once_and_says_what_it_is() {
    let folder = folder();
    let dir = folder.path();
    let args = ["build", "--data", "text.txt", "--train-tokenizer", "unigram", "--vocab-size", "60"];
    let first = succeeds("data", dir, &[&args[..], &["--save-tokenizer", "t.json", "--cache", "c"]].concat());
    assert!(first.contains(": built") && first.contains("1 documents, "), "{first}");
    // With the tokenizer that was kept.
    let second = succeeds("data", dir, &["build", "text.txt", "--tokenizer", "t.json", "--cache", "c"]);
    assert!(second.contains(": reused"), "{second}");

    let cache = only(&dir.join("c"), "tokens-", "");
    let cache = cache.to_str().unwrap();
    let lines = succeeds("data", dir, &["inspect", cache]);
    assert!(
        lines.contains("documents              1\n") && lines.contains("token bytes            2\n"),
        "{lines}"
    );
    let object = json(&succeeds("data", dir, &["inspect", "--json", cache]));
    assert_eq!((&object["documents"], &object["token_bytes"]), (&1.into(), &2.into()));
    assert!((30.0..=60.0).contains(&number(&object["vocab_size"])), "{object}");
    fails("data", dir, &["inspect", "text.txt"], &["text.txt", "token cache"]);
}

#[test]
fn broken_records_are_named_when_a_cache_is_built_and_when_it_is_reused() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("a.jsonl"), "{\"text\": \"one\"}\nnonsense\n{\"text\": \"two\"}\n").unwrap();
    let args = ["build", "a.jsonl", "text.txt", "--vocab-size", "300", "--cache", "c"];
    let stats = [&["stats"], &args[1..], &["--json"]].concat();
    for (args, status) in
        [(&args[..], ": built"), (&args[..], ": reused"), (&stats[..], "\"records_skipped\": 1")]
    {
        let output = output(command("data", dir, args));
        assert!(output.code == Some(0) && output.stdout.contains(status), "{output:?}");
        assert_eq!(output.stderr, "skipped: a.jsonl, line 2: invalid JSON at column 2: expected ident\n");
        let passed_over = output.stdout.contains("broken records passed over: 1");
        assert_eq!(passed_over, args[0] == "build", "{output:?}");
    }
    // The folder of caches stands for what is in it.
    let object = json(&succeeds("data", dir, &["inspect", "c", "--json"]));
    assert_eq!((&object["documents"], &object["records_skipped"]), (&3.into(), &1.into()));
    fails("data", dir, &["inspect", "."], &["holds no token cache"]);
    fails("data", dir, &["inspect", "none"], &["none does not exist"]);
    fails("data", dir, &["build", "a.jsonl", "--broken", "-1"], &["'-1'", "a number, or any"]);
    fails(
        "data",
        dir,
        &["stats", "a.jsonl", "--vocab-size", "300", "--text-field", "body"],
        &[
            "holds no text: its 3 records are broken, the first: a.jsonl, line 1: the field \"body\" is missing",
        ],
    );
    // Nothing is printed where the drawing fails.
    let output =
        output(command("data", dir, &["stats", "text.txt", "--vocab-size", "300", "--svg", "no/a.svg"]));
    assert_eq!((output.code, output.stdout.as_str()), (Some(2), ""), "{output:?}");
}

#[test]
fn text_is_read_by_lines_and_questions_get_french_words() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("lines.txt"), "un deux trois\n\nquatre cinq six\n").unwrap();
    let line = ["stats", "lines.txt", "--vocab-size", "270", "--text-documents", "lines", "--json"];
    assert_eq!(json(&succeeds("data", dir, &line))["documents"], 2);
    let squad = r#"{"data": [{"paragraphs": [{"context": "Il dort.", "qas": [
        {"id": "1", "question": "Que fait-il ?", "answers": [{"text": "dort", "answer_start": 3}]}]}]}]}"#;
    std::fs::write(dir.join("q.json"), squad).unwrap();
    let draw =
        ["sample", "q.json", "--vocab-size", "290", "--labels", "french", "--count", "9", "--length", "99"];
    assert!(succeeds("data", dir, &draw).contains("Réponse : dort"));
    assert!(succeeds("data", dir, &["--help"]).starts_with("Look at text as a model will see it"));
}

#[test]
fn samples_depend_on_the_seed_alone() {
    let folder = folder();
    let draw = |seed| {
        let args =
            ["sample", "text.txt", "--vocab-size", "300", "--count", "2", "--length", "9", "--seed", seed];
        succeeds("data", folder.path(), &args)
    };
    let first = draw("1");
    assert_eq!(draw("1"), first);
    assert_ne!(draw("2"), first);
    assert_eq!(first.matches("[document 0, tokens ").count(), 2);
    let text = std::fs::read_to_string(folder.path().join("text.txt")).unwrap();
    let samples = first.split("[document").skip(1).map(|sample| sample.split_once("]\n").unwrap().1);
    for sample in samples {
        assert!(text.contains(sample.strip_suffix("\n\n").unwrap()), "{sample:?}");
    }
}

#[test]
fn a_plan_names_the_preset_or_says_why_there_is_none() {
    let folder = folder();
    let dir = folder.path();
    let plan = |args: &[&str]| json(&succeeds("data", dir, &[&["plan", "--json"], args].concat()));
    let fits = plan(&["--tokens", "460e6", "--speed", "1000"]);
    assert_eq!((&fits["preset"], &fits["refused"]), (&"small".into(), &Value::Null));
    assert_eq!(number(&fits["best_parameters"]), 23e6);
    let small = &fits["presets"][2];
    assert_eq!(small["parameters"], 22_934_400);
    assert!((number(&small["epochs"]) - 20.0 * 22_934_400.0 / 460e6).abs() < 1e-9);
    assert!((number(&small["hours"]) - 20.0 * 22_934.4 / 3600.0).abs() < 1e-6);

    let nothing = plan(&["text.txt", "--vocab-size", "300"]);
    assert_eq!(nothing["preset"], Value::Null);
    assert!(nothing["refused"].as_str().unwrap().contains("times as many"), "{nothing}");
    // The vocabulary that is asked for; else that of the size, of a text that has so many different strings.
    let vocabularies = |plan: &Value| -> Vec<u64> {
        let rows = plan["presets"].as_array().unwrap().iter();
        rows.map(|row| row["vocab_size"].as_u64().unwrap()).collect()
    };
    assert_eq!(vocabularies(&nothing), [320; 5]);
    assert_eq!(vocabularies(&fits), [2560, 8192, 32_064, 32_064, 32_064]);
    let words = (0_u32..12_000).map(|i| format!("{:x}", i.wrapping_mul(2_654_435_761)));
    let words = words.collect::<Vec<_>>().join(" ");
    std::fs::write(dir.join("many.txt"), [&words[..]; 2].join(" ")).unwrap();
    let open = plan(&["many.txt"]);
    let own = open["vocab_size"].as_u64().unwrap();
    assert!((8192..32_000).contains(&own), "{own}");
    assert_eq!(vocabularies(&open)[..2], vocabularies(&fits)[..2]);
    assert_eq!(vocabularies(&open)[4], own.next_multiple_of(64));
    for (flag, number) in
        [("--tokens", "1e308"), ("--flops", "1e99"), ("--speed", "2e12"), ("--ratio", "1e9")]
    {
        let wrong = format!("{flag}={number}");
        fails("data", dir, &["plan", &wrong], &[&format!("{flag} {number}: expected at most")]);
    }
    let operations = plan(&["--flops", "1e16", "--law", "epoch"]);
    assert!(number(&operations["best_parameters"]) > 1e6 && operations["tokens"].is_null());
    let text = succeeds("data", dir, &["plan", "--tokens", "460e6"]);
    assert!(text.contains("<- suits best") && text.contains("nano"), "{text}");
    fails("data", dir, &["plan"], &["--tokens N", "--flops C"]);
    fails("data", dir, &["plan", "--tokens", "-5"], &["--tokens -5", "positive number"]);
    fails("data", dir, &["plan", "--flops", "0"], &["--flops 0", "positive number"]);
    fails("data", dir, &["plan", "--tokens", "1e9", "--speed", "0"], &["--speed 0", "positive number"]);
}

#[test]
fn french_text_is_cleaned_by_rules() {
    let folder = folder();
    let dir = folder.path();
    std::fs::write(dir.join("fr.txt"), "[Anne:] L’e\u{301}té\u{202f}!\n[Paul:] «\u{a0}Oui\u{a0}»\n").unwrap();
    std::fs::write(dir.join("an.txt"), "l'an").unwrap();
    let args = ["clean", "fr.txt", "an.txt", "--out", "a.jsonl", "--renumber-speakers"];
    let printed = succeeds("data", dir, &args);
    assert_eq!(printed, "a.jsonl: 2 documents, 1 of them changed\n");
    let lines = std::fs::read_to_string(dir.join("a.jsonl")).unwrap();
    let texts: Vec<Value> = lines.lines().map(|line| json(line)["text"].clone()).collect();
    assert_eq!(texts, ["[speaker001:] L'été !\n[speaker002:] « Oui »", "l'an"]);
    succeeds(
        "data",
        dir,
        &["clean", "fr.txt", "an.txt", "--out", "b.jsonl", "--apostrophes", "curly", "--spaces", "no-break"],
    );
    let lines = std::fs::read_to_string(dir.join("b.jsonl")).unwrap();
    assert!(lines.contains("L’été\u{202f}!") && lines.contains("l’an"), "{lines}");

    std::fs::write(dir.join("c.jsonl"), "{\"corps\": \"L’an\"}\n{}\n").unwrap();
    let output =
        output(command("data", dir, &["clean", "c.jsonl", "--out", "d.jsonl", "--text-field", "corps"]));
    assert_eq!(output.stdout, "d.jsonl: 1 documents, 1 of them changed\n");
    assert!(
        output.stderr.starts_with("skipped: c.jsonl, line 2: the field \"corps\" is missing"),
        "{output:?}"
    );
    assert_eq!(std::fs::read_to_string(dir.join("d.jsonl")).unwrap(), "{\"text\":\"L'an\"}\n");
    std::fs::remove_file(dir.join("c.jsonl")).unwrap();

    std::fs::write(dir.join("bad.txt"), b"a\xff").unwrap();
    fails("data", dir, &["clean", "bad.txt", "--out", "c.jsonl"], &["bad.txt, line 1", "UTF-8"]);
    fails("data", dir, &["clean", "fr.txt", "--out", "no/c.jsonl"], &["no/c.jsonl"]);
    // The file that is read, by another name for it, and one of a folder.
    let french = std::fs::read(dir.join("fr.txt")).unwrap();
    fails("data", dir, &["clean", "fr.txt", "--out", "./fr.txt"], &["--out ./fr.txt", "would replace"]);
    std::fs::create_dir(dir.join("texts")).unwrap();
    std::fs::write(dir.join("texts/a.txt"), "l'an").unwrap();
    succeeds("data", dir, &["clean", "texts", "--out", "texts/b.jsonl"]);
    fails("data", dir, &["clean", "texts", "--out", "texts/b.jsonl"], &["--out texts/b.jsonl"]);
    assert_eq!(std::fs::read(dir.join("fr.txt")).unwrap(), french);
    assert!(!files(dir).iter().any(|name| name.starts_with("c.jsonl")));
}

#[test]
fn wrong_input_is_one_line() {
    let folder = folder();
    let dir = folder.path();
    fails("data", dir, &["stats", "text.txt", "--top", "many"], &["'many'", "--top"]);
    fails("finetune", dir, &["--steps", "many"], &["'many'", "--steps"]);
    for command in ["build", "stats", "sample"] {
        fails("data", dir, &[command, "missing.txt"], &["missing.txt does not exist"]);
        fails("data", dir, &[command], &["no data was named"]);
        fails(
            "data",
            dir,
            &[command, "text.txt", "--tokenizer", "text.txt"],
            &["text.txt", "tokenizer.json"],
        );
        fails("data", dir, &[command, "text.txt", "--vocab-size", "10"], &["--vocab-size is 10", "257"]);
        let both = [command, "text.txt", "--tokenizer", "t.json", "--vocab-size", "300"];
        fails("data", dir, &both, &["--tokenizer", "--vocab-size"]);
    }
    fails("data", dir, &["sample", "text.txt", "--length", "0"], &["--length 0"]);
    fails("data", dir, &["sample", "text.txt", "--count", "0"], &["--count 0"]);
    fails("data", dir, &["stats", "text.txt", "--top", "-1"], &["'-1'", "--top"]);
    let unigram = ["build", "text.txt", "--train-tokenizer", "unigram", "--vocab-size", "12"];
    fails("data", dir, &unigram, &["different characters", "expected fewer than 4"]);
    for args in [&["stats", "text.txt", "--nothing"][..], &["guess"], &[]] {
        let output = output(command("data", dir, args));
        assert_eq!(output.code, Some(2), "{output:?}");
        assert!(!output.stderr.contains("panicked"), "{output:?}");
    }
}

#[test]
fn real_text_has_the_counts_of_its_source() {
    let Some(data) = data("real_text_has_the_counts_of_its_source") else { return };
    let folder = folder();
    let stories = data.join("tinystories/tinystories-v1-train-first2316.txt");
    let tokenizer = data.join("models/stories260K/tokenizer.json");
    let args = ["stats", stories.to_str().unwrap(), "--tokenizer", tokenizer.to_str().unwrap(), "--json"];
    let stats = json(&succeeds("data", folder.path(), &args));
    assert_eq!((&stats["documents"], &stats["vocab_size"]), (&2316.into(), &512.into()));
    assert_eq!(stats["frequent"][0]["token"], ".");
}
