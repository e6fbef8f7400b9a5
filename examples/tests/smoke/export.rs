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
fn what_cannot_be_exported_is_said_in_a_line() {
    let dir = finished();
    fails("export", dir, &["--model", "run"], &["--python"]);
    fails("export", dir, &["--model", "nowhere", "--python"], &["nowhere", "config.json"]);
    fails("export", dir, &["--model", "run", "--python", "--dtype", "bf16"], &["--to"]);
    fails("export", dir, &["--model", "run", "--to", "x", "--adapter", "run"], &["adapter_config.json"]);
    fails("export", dir, &["--model", "run", "--to", "x", "--dtype", "int8"], &["int8", "bf16"]);
    assert!(!dir.join("x").exists());
}
