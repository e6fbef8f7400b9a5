use vesper_model::quantized::Gguf;

use crate::program::{copy, fails, finished, json, only, succeeds};

#[test]
fn a_run_is_quantised_measured_and_written() {
    let folder = copy(finished());
    let dir = folder.path();
    let args = ["--model", "run", "--type", "q8_0", "q4_k", "--seq", "32", "--tokens", "256"];
    let more = ["--tensor", "v_proj=q6_k", "--head", "q8_0", "--record", "records"];
    let said = succeeds("quantize", dir, &[&args[..], &more[..]].concat());
    // 160 and 448 columns do not divide into blocks of 256.
    for part in
        ["run/model-q8_0.gguf", "rows of 160 do not divide into blocks of 256", "perplexity", "q5_0", "f32"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    let machine = only(&dir.join("records"), "", "");
    let record = json(&only(&machine, "", "-quantize.json"));
    let types = record["types"].as_array().unwrap();
    assert_eq!(types.len(), 2);
    let before = &record["before"];
    for row in types {
        let bytes = row["bytes"].as_u64().unwrap();
        assert!(3 * bytes < before["bytes"].as_u64().unwrap(), "{row}");
        let perplexity = |row: &serde_json::Value, key: &str| row["measured"][key].as_f64().unwrap();
        for key in ["perplexity", "perplexity_token_by_token"] {
            let change = perplexity(row, key) / perplexity(before, key) - 1.0;
            let most = if row["name"] == "q8_0" { 0.01 } else { 0.02 };
            assert!(change.abs() < most, "{key} {change} of {}", row["name"]);
        }
        assert!(row["measured"]["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
        let file = dir.join(format!("run/model-{}.gguf", row["name"].as_str().unwrap()));
        let size = std::fs::metadata(&file).unwrap().len();
        assert!(size > bytes && size < bytes + (1 << 20), "{size} {bytes}");
        let chat = ["--model", file.to_str().unwrap(), "--prompt", "the little", "--max-tokens", "20"];
        let text = succeeds("chat", dir, &chat);
        assert!(text.starts_with("the little") && text.len() > "the little\n".len(), "{text}");
    }

    std::fs::write(dir.join("run/model/chat_template.jinja"), "{{ messages }}").unwrap();
    let out = [
        "--model",
        "run/model",
        "--data",
        "text.txt",
        "--seq",
        "32",
        "--tokens",
        "64",
        "--out",
        "small.gguf",
    ];
    succeeds("quantize", dir, &out);
    let gguf = Gguf::open(dir.join("small.gguf")).unwrap();
    assert_eq!(gguf.chat_template().unwrap(), Some("{{ messages }}"));
    assert!(gguf.tokenizer().is_ok() && gguf.generation_config().is_ok());
    // Its own file.
    fails("quantize", dir, &["--model", "small.gguf"], &["small.gguf", "quantised already"]);
    let bytes = std::fs::read(dir.join("small.gguf")).unwrap();
    std::fs::write(dir.join("cut.gguf"), &bytes[..bytes.len() / 2]).unwrap();
    fails("quantize", dir, &["--model", "cut.gguf"], &["cut.gguf", "truncated"]);
}

#[test]
fn what_cannot_be_quantised_is_said_in_a_line() {
    let dir = finished();
    let with = |more: &[&'static str]| [&["--model", "run", "--out", "never.gguf"][..], more].concat();
    fails("quantize", dir, &with(&["--type", "q9_9"]), &["q9_9", "--type", "q4_k"]);
    fails("quantize", dir, &with(&["--type", "q8_0", "q4_0"]), &["--out names one file"]);
    fails("quantize", dir, &with(&["--tensor", "v_proj"]), &["v_proj", "PATTERN=TYPE"]);
    fails("quantize", dir, &with(&["--tensor", "w_proj=q8_0", "--seq", "32"]), &["w_proj", "fits none"]);
    fails("quantize", dir, &with(&["--seq", "0"]), &["--seq 0"]);
    fails("quantize", dir, &with(&["--seq", "100000"]), &["--seq 100000", "at most"]);
    fails("quantize", dir, &["--model", "run", "--out", "none/x.gguf"], &["--out", "no folder none"]);
    fails("quantize", dir, &["--model", "run", "--out", "run"], &["--out run", "a folder"]);
    fails("quantize", dir, &with(&["--record", "text.txt"]), &["--record text.txt", "a file"]);
    fails("quantize", dir, &with(&["--data", "missing.txt"]), &["missing.txt"]);
    fails("quantize", dir, &["--model", "missing.gguf"], &["missing.gguf"]);
    fails("quantize", dir, &["--model", "nowhere"], &["nowhere"]);
}
