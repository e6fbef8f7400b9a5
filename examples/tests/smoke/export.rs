use std::collections::HashMap;

use candle_core::{DType, Device};
use flylora::{AdapterKind, FlyLoraConfig, Targets};
use vesper_model::VesperLM;

use crate::program::{copy, fails, finished, json, succeeds};

#[test]
fn python_is_written_beside_the_weights() {
    let folder = copy(finished());
    let said = succeeds("export", folder.path(), &["--model", "run", "--python"]);
    assert!(said.contains("trust_remote_code=True"), "{said}");
    let model = folder.path().join("run/model");
    assert!(model.join("configuration_vesper.py").is_file() && model.join("modeling_vesper.py").is_file());
    assert_eq!(
        json(&model.join("config.json"))["auto_map"]["AutoConfig"],
        "configuration_vesper.VesperConfig"
    );
    let chat = ["--model", "run", "--prompt", "the little", "--max-tokens", "5"];
    assert_eq!(succeeds("chat", folder.path(), &chat), succeeds("chat", finished(), &chat));
}

#[test]
fn a_copy_has_the_dtype_asked_for_and_writes_on() {
    let folder = copy(finished());
    let args = ["--model", "run", "--to", "small", "--dtype", "bf16"];
    let said = succeeds("export", folder.path(), &args);
    assert!(said.contains("parameters in BF16") && !said.contains("Python"), "{said}");
    let size = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().len();
    let (whole, half) = (size("run/model/model.safetensors"), size("small/model.safetensors"));
    assert!(half < whole * 6 / 10, "{half} of {whole} bytes");
    assert!(!folder.path().join("small/modeling_vesper.py").exists());
    let chat = ["--model", "small", "--prompt", "the little", "--max-tokens", "5"];
    assert!(succeeds("chat", folder.path(), &chat).starts_with("the little"));
    fails("export", folder.path(), &args, &["--to small", "already"]);
}

#[test]
fn a_copy_keeps_the_chat_template_and_a_file_becomes_a_folder() {
    let folder = copy(finished());
    let dir = folder.path();
    let settings = dir.join("run/model/tokenizer_config.json");
    let mut about = json(&settings);
    about["chat_template"] = serde_json::json!([
        {"name": "tool_use", "template": "{{ messages }}"},
        {"name": "default", "template": "{{ messages[0].content }} {{ eos_token }}"},
    ]);
    about["eos_token"] = "the".into();
    std::fs::write(&settings, about.to_string()).unwrap();
    let quantize = ["--model", "run", "--type", "f16", "--seq", "32", "--tokens", "64", "--out", "f16.gguf"];
    succeeds("quantize", dir, &quantize);
    succeeds("export", dir, &["--model", "run", "--to", "copy"]);
    assert_eq!(json(&dir.join("copy/tokenizer_config.json")), about);
    succeeds("export", dir, &["--model", "f16.gguf", "--to", "unpacked"]);
    let template = std::fs::read_to_string(dir.join("unpacked/chat_template.jinja")).unwrap();
    assert_eq!(template, "{{ messages[0].content }} {{ eos_token }}");
    assert_eq!(json(&dir.join("unpacked/tokenizer_config.json"))["eos_token"], "the");
    let answer = |model: &str| {
        let args = ["--model", model, "--prompt", "the little", "--max-tokens", "8", "--temperature", "0"];
        succeeds("chat", dir, &args)
    };
    assert_eq!(answer("copy"), answer("run"));
    assert_eq!(answer("f16.gguf"), answer("unpacked"));
    fails("export", dir, &["--model", "f16.gguf", "--python"], &["f16.gguf", "--to"]);
}

#[test]
fn what_cannot_be_exported_is_said_in_a_line() {
    let dir = finished();
    fails("export", dir, &["--model", "run"], &["--to DIR", "--python"]);
    fails(
        "export",
        dir,
        &["--model", "nowhere", "--python"],
        &["nowhere: no such folder", "--example train"],
    );
    fails("export", dir, &["--model", "no.gguf", "--to", "x"], &["no.gguf: no such file"]);
    fails("export", dir, &["--model", "run", "--python", "--dtype", "bf16"], &["--to"]);
    fails("export", dir, &["--model", "run", "--to", "x", "--adapter", "run"], &["adapter_config.json"]);
    fails("export", dir, &["--model", "run", "--to", "x", "--dtype", "int8"], &["int8", "bf16"]);
    assert!(!dir.join("x").exists());

    // A model that does not load is none in Python either.
    let folder = copy(dir);
    let file = folder.path().join("run/model/model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let norm = "model.norm.weight";
    let fewer: HashMap<_, _> = tensors.into_iter().filter(|(name, _)| name != norm).collect();
    candle_core::safetensors::save(&fewer, &file).unwrap();
    fails("export", folder.path(), &["--model", "run", "--python"], &["model.safetensors", norm]);

    // No weights do what these do.
    let mut model = VesperLM::load(dir.join("run/model"), DType::F32, &Device::Cpu).unwrap();
    let kind = AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(16, 4));
    model.attach(&kind, &Targets::names(["q_proj"])).unwrap();
    model.save_adapters(folder.path().join("fly")).unwrap();
    let args = ["--model", "run", "--adapter", "fly", "--to", "x"];
    std::fs::copy(dir.join("run/model/model.safetensors"), &file).unwrap();
    fails("export", folder.path(), &args, &["fly: adapters that choose by their input", "cannot be merged"]);
}
