use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use candle_core::{DType, Device};
use candle_nn::VarMap;
use flylora::{AdapterKind, LoraConfig, Targets};
use tempfile::TempDir;
use vesper_model::{VesperConfig, VesperLM};

use crate::program::{
    Output, command, copy, data, fails, files, finished, is_one_error, json, output, stops, succeeds,
};

fn answer(args: &[&str]) -> String {
    succeeds("chat", finished(), &[&["--model", "run", "--prompt", "the little"], args].concat())
}

#[test]
fn a_prompt_is_continued_the_same_way_for_the_same_seed() {
    let one = answer(&["--seed", "1", "--max-tokens", "40"]);
    assert!(one.starts_with("the little") && one.len() > "the little\n".len(), "{one}");
    assert_eq!(one, answer(&["--seed", "1", "--max-tokens", "40"]));
    assert_ne!(one, answer(&["--seed", "2", "--max-tokens", "40"]));
    let greedy = answer(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(greedy, answer(&["--temperature", "0", "--seed", "2"]));
    assert_eq!(greedy, answer(&["--top-k", "1"]));
    assert_ne!(greedy, answer(&["--temperature", "0", "--repetition-penalty", "5"]));
}

#[test]
fn the_folder_of_the_model_itself_will_do() {
    let args = ["--prompt", "the little", "--seed", "3", "--model"];
    let of = |folder: &str| succeeds("chat", finished(), &[&args[..], &[folder]].concat());
    assert_eq!(of("run"), of("run/model"));
}

#[test]
fn no_more_than_max_tokens_are_written() {
    assert_eq!(answer(&["--max-tokens", "0"]), "the little\n");
    let vocabulary = json(&finished().join("run/model/tokenizer.json"))["model"]["vocab"].clone();
    let longest = vocabulary.as_object().unwrap().keys().map(|token| token.chars().count()).max().unwrap();
    for n in [1, 3] {
        let written = answer(&["--max-tokens", &n.to_string(), "--seed", "4"]);
        let new = written.trim_end_matches('\n').chars().count() - "the little".len();
        assert!(new <= n * longest, "{written}");
    }
}

/// What the program makes of its standard input.
fn lines(dir: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut command = command("chat", dir, &[&["--model", "run"], args].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input); // it may end before it has read all of it
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Output { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn without_a_prompt_each_line_is_answered_until_the_input_ends() {
    let input = "the little\n/max-tokens 0\nthe second\n/help\n//slash\n/system x\n\n";
    let output = lines(finished(), &["--max-tokens", "3"], input.as_bytes());
    assert_eq!(output.code, Some(0), "{output:?}");
    // What is no answer is said elsewhere.
    assert!(output.stdout.starts_with("the little"), "{output:?}");
    assert!(output.stdout.ends_with("\nthe second\n/slash\n\n"), "{output:?}");
    assert_eq!(output.stdout.lines().count(), 4, "{output:?}");
    assert!(output.stderr.starts_with("max-tokens is 0\n/temperature X"), "{output:?}");
    let system = "this model continues text: no system prompt is read\n";
    assert!(output.stderr.ends_with(system), "{output:?}");
    let flag = lines(finished(), &["--max-tokens", "0", "--system", "x"], b"a\n");
    assert_eq!((flag.code, flag.stdout.as_str()), (Some(0), "a\n"));
    assert!(flag.stderr.contains("--system: ") && flag.stderr.ends_with(system), "{flag:?}");
    // A model's folder is not where a program leaves its own files.
    assert!(files(&finished().join("run/model")).iter().all(|name| !name.contains("history")));
    let quit = lines(finished(), &["--max-tokens", "0"], b"a\n/quit\nb\n");
    assert_eq!((quit.code, quit.stdout.as_str()), (Some(0), "a\n"));
}

#[test]
fn in_a_pipe_the_first_mistake_ends_the_program() {
    let limit = context();
    let long = format!("a\n{}\n", "1 2 3 ".repeat(limit as usize));
    for (input, parts) in [
        (&b"a\n/temperature -1\nb\n"[..], &["temperature is -1, expected"][..]),
        (b"/nothing\n", &["no command /nothing", "/help"]),
        (b"/load\n", &["/load needs the name of a file"]),
        (b"/load none.jsonl\n", &["cannot read none.jsonl"]),
        (b"/save\n", &["nothing to save"]),
        (b"/regenerate\n", &["nothing to answer"]),
        (b"a\nUn caf\xe9\n", &["standard input, line 2: invalid UTF-8 at byte 7"]),
        (long.as_bytes(), &["the prompt has", "at most"]),
    ] {
        is_one_error(&lines(finished(), &["--max-tokens", "0"], input), parts);
    }
}

#[test]
fn a_conversation_is_saved_and_loaded_again() {
    let folder = copy(finished());
    let dir = folder.path();
    let input = b"the little\n/save talk.jsonl\n/save talk.md\nthe big\n/save talk.jsonl\n/save\n";
    let first = lines(dir, &["--max-tokens", "4"], input);
    assert_eq!(first.code, Some(2), "{first:?}"); // talk.jsonl is not the file that was saved last
    assert!(first.stderr.contains("talk.jsonl exists already"), "{first:?}");
    let saved = std::fs::read_to_string(dir.join("talk.jsonl")).unwrap();
    assert!(
        saved.starts_with("{\"role\":\"user\",\"content\":\"the little\"}\n{\"role\":\"assistant\""),
        "{saved}"
    );
    assert!(
        std::fs::read_to_string(dir.join("talk.md"))
            .unwrap()
            .starts_with("## User\n\nthe little\n\n## Assistant")
    );
    // The text goes on from where it was.
    let args = ["--temperature", "0", "--max-tokens", "4"];
    let more = lines(dir, &args, b"/load talk.jsonl\n/continue\n/save\n");
    assert_eq!(more.code, Some(0), "{more:?}");
    assert!(more.stdout.starts_with("the little") && more.stderr == "saved to talk.jsonl\n", "{more:?}");
    let longer = std::fs::read_to_string(dir.join("talk.jsonl")).unwrap();
    assert!(longer.len() > saved.len() && longer.lines().count() == 2, "{longer}");
}

/// A run whose model has this chat template, and its special tokens in it.
fn with_template(template: &str) -> TempDir {
    let folder = endless(&[]);
    std::fs::write(folder.path().join("run/model/chat_template.jinja"), template).unwrap();
    folder
}

const TEMPLATE: &str = "{% if messages[0].role == 'system' %}{{ messages[0].content ~ '. ' }}{% endif %}\
    {% for message in messages if message.role != 'system' %}{{ message.content ~ ' ' }}{% endfor %}";

#[test]
fn a_model_with_a_template_answers_what_the_template_asks() {
    let folder = with_template(TEMPLATE);
    let dir = folder.path();
    let drawn = ["--temperature", "1", "--max-tokens", "12"];
    let answer = |args: &[&str]| succeeds("chat", dir, &[&["--model", "run"], &drawn[..], args].concat());
    let one = answer(&["--prompt", "the little"]);
    assert!(!one.trim().is_empty() && !one.starts_with("the little"), "{one}");
    // The system prompt is part of what is asked.
    let system = answer(&["--prompt", "the little", "--system", "happy"]);
    assert_eq!(system, answer(&["--prompt", "happy. the little"]));
    // The second answer knows the first, and has a seed of its own.
    let turns = lines(dir, &drawn, b"the little\na big\n");
    let both = format!("the little {} a big", one.strip_suffix('\n').unwrap());
    assert_eq!(turns.stdout, format!("{one}{}", answer(&["--prompt", &both, "--seed", "1"])));
    // Another answer to the same message.
    let again = lines(dir, &drawn, b"the little\n/regenerate\n");
    assert_eq!(again.stdout, format!("{one}{}", answer(&["--prompt", "the little", "--seed", "1"])));
    // A template of one's own in place of the model's.
    std::fs::write(dir.join("mine.jinja"), "happy. {{ messages[0].content }} ").unwrap();
    assert_eq!(system, answer(&["--prompt", "the little", "--template", "mine.jinja"]));
}

#[test]
fn a_conversation_longer_than_the_context_forgets_its_beginning() {
    let folder = with_template(TEMPLATE);
    let many = "the little big red cat\n".repeat(context() as usize / 8);
    let output = lines(folder.path(), &["--max-tokens", "8"], many.as_bytes());
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stdout.lines().count() as u64 >= context() / 8, "{output:?}");
    assert!(output.stderr.contains("the oldest messages have no place"), "{output:?}");
    let long = "1 2 3 ".repeat(context() as usize);
    let args = ["--model", "run", "--prompt", &long];
    fails("chat", folder.path(), &args, &["the last message makes a prompt of", "reads at most"]);
}

#[test]
fn templates_that_are_wrong() {
    for (template, parts) in [
        ("a\n{% if %}", &["chat_template.jinja, line 2: syntax error"][..]),
        ("a\n\n{{ messages | shout }}", &["chat_template.jinja, line 3", "shout"]),
        (
            "{{ raise_exception('Jamais « moi » !') }}",
            &["run/model/chat_template.jinja refuses this conversation: Jamais « moi » !"],
        ),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            &["line 1", "fuel"],
        ),
    ] {
        let folder = with_template(template);
        fails("chat", folder.path(), &["--model", "run", "--prompt", "the"], parts);
    }
    let folder =
        with_template("{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}");
    let args = ["--model", "run", "--prompt", "the", "--system", "x"];
    fails("chat", folder.path(), &args, &["refuses this conversation: No system"]);

    // A text that is no template at all, whatever it says of itself.
    let text = ["--model", "run", "--prompt", "the", "--template", "text.txt"];
    fails("chat", finished(), &text, &["text.txt: not a chat template", "`messages`"]);

    let folder = copy(finished());
    let settings = folder.path().join("run/model/tokenizer_config.json");
    let mut config = json(&settings);
    config["chat_template"] = 5.into();
    std::fs::write(&settings, config.to_string()).unwrap();
    let args = ["--model", "run", "--prompt", "the"];
    fails("chat", folder.path(), &args, &["tokenizer_config.json: chat_template is 5, expected"]);
    std::fs::remove_file(folder.path().join("run/model/tokenizer.json")).unwrap();
    fails(
        "chat",
        folder.path(),
        &["--model", "run", "--prompt", "the", "--template", "none.jinja"],
        &["tokenizer.json"],
    );
    fails(
        "chat",
        finished(),
        &["--model", "run", "--prompt", "the", "--template", "none.jinja"],
        &["none.jinja"],
    );
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let folder = copy(finished());
    let config = VesperConfig::preset("tiny").unwrap().with_vocab(64);
    let mut other = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu).unwrap();
    let kind = AdapterKind::Lora(LoraConfig::default());
    other.attach(&kind, &Targets::names(["q_proj"])).unwrap();
    other.save_adapters(folder.path().join("adapter")).unwrap();
    let args = ["--model", "run", "--prompt", "the", "--adapter", "adapter"];
    let parts = ["adapter: adapters of another model", "no projection named model.layers.4.self_attn.q_proj"];
    fails("chat", folder.path(), &args, &parts);
    fails("chat", folder.path(), &["--model", "run", "--prompt", "the", "--adapter", "none"], &["none"]);
}

#[test]
fn weights_that_are_no_numbers_are_those_of_a_model_that_is_named() {
    let folder = copy(finished());
    let file = folder.path().join("run/model/model.safetensors");
    let mut weights = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let norm = weights.get_mut("model.norm.weight").unwrap();
    *norm = (norm.zeros_like().unwrap() * f64::NAN).unwrap();
    candle_core::safetensors::save(&weights, &file).unwrap();
    let parts = ["run/model: cannot choose the next token", "NaN"];
    stops("chat", folder.path(), &["--model", "run", "--prompt", "the"], &parts);
}

#[test]
fn without_a_model_it_says_how_to_train_one() {
    let folder = tempfile::tempdir().unwrap();
    fails("chat", folder.path(), &["--prompt", "x"], &["cargo run --release --example train"]);
    fails("chat", folder.path(), &["--model", "none"], &["none: no such folder", "--example train"]);
    fails("chat", folder.path(), &["--model", "."], &["config.json"]);
}

#[test]
fn the_last_trained_run_is_taken_and_named() {
    let output = output(command("chat", finished(), &["--prompt", "the", "--max-tokens", "1"]));
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stderr.contains("last trained model") && output.stderr.contains("run"), "{output:?}");
    assert!(output.stdout.starts_with("the"), "{output:?}");
}

#[test]
fn settings_out_of_range_are_one_line() {
    for (args, parts) in [
        (&["--temperature", "-1"][..], &["temperature is -1"][..]),
        (&["--temperature", "nan"], &["temperature is NaN"]),
        (&["--top-p", "-0.5"], &["top_p is -0.5"]),
        (&["--top-p", "1.5"], &["top_p is 1.5"]),
        (&["--repetition-penalty", "0"], &["repetition_penalty is 0"]),
        (&["--min-p", "-0.5"], &["min_p is -0.5"]),
        (&["--device", "cuda:x"], &["--device cuda:x"]),
    ] {
        let args = [&["--model", "run", "--prompt", "the"], args].concat();
        fails("chat", finished(), &args, parts);
    }
    if !cfg!(feature = "cuda") {
        let args = ["--model", "run", "--prompt", "the", "--device", "cuda"];
        fails("chat", finished(), &args, &["--device cuda", "--features cuda"]);
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let limit = context();
    let prompt = "1 2 3 ".repeat(limit as usize);
    let line = fails("chat", finished(), &["--model", "run", "--prompt", &prompt], &["the prompt has"]);
    assert!(line.contains(&format!("at most {limit}, of which")), "{line}");
}

/// The most tokens that the model of [`finished`] reads.
fn context() -> u64 {
    json(&finished().join("run/model/config.json"))["max_position_embeddings"].as_u64().unwrap()
}

/// A finished run whose model does not end a text by itself, with other settings too.
pub(crate) fn endless(settings: &[(&str, &str, u64)]) -> TempDir {
    let folder = copy(finished());
    let no_token = ("generation_config.json", "eos_token_id", 1_000_000);
    for &(file, key, value) in settings.iter().chain([&no_token]) {
        let file = folder.path().join("run/model").join(file);
        let mut settings = json(&file);
        settings[key] = value.into();
        std::fs::write(&file, settings.to_string()).unwrap();
    }
    folder
}

#[test]
fn a_text_that_fills_the_context_ends() {
    let folder = endless(&[]);
    let limit = context();
    let args = ["--model", "run", "--prompt", "the", "--max-tokens", "18446744073709551615"];
    let output = output(command("chat", folder.path(), &args));
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(output.stderr.contains(&format!("reads at most {limit} tokens")), "{}", output.stderr);
}

#[test]
fn a_llama_of_others_writes_its_story() {
    let Some(data) = data("a_llama_of_others_writes_its_story") else { return };
    let model = data.join("models/stories260K");
    let args = ["--model", model.to_str().unwrap(), "--temperature", "0", "--max-tokens", "40"];
    let folder = tempfile::tempdir().unwrap();
    let story = succeeds("chat", folder.path(), &[&args[..], &["--prompt", ""]].concat());
    assert!(
        story.starts_with("Once upon a time, there was a little girl named Lily. She loved to play"),
        "{story}"
    );
    let story = succeeds(
        "chat",
        folder.path(),
        &[&args[..], &["--prompt", "Once upon a time, there was a"]].concat(),
    );
    assert!(story.starts_with("Once upon a time, there was a little girl named Lily. She loved"), "{story}");
}

#[test]
fn a_reader_that_goes_away_ends_the_answer() {
    let mut command = command("chat", finished(), &["--model", "run", "--prompt", "the"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_model_that_is_meant_to_be_greedy_draws_when_asked_to() {
    let folder = copy(finished());
    let file = folder.path().join("run/model/generation_config.json");
    let mut settings = json(&file);
    settings["do_sample"] = false.into();
    std::fs::write(&file, settings.to_string()).unwrap();
    let answer = |args: &[&str]| {
        succeeds("chat", folder.path(), &[&["--model", "run", "--prompt", "the little"], args].concat())
    };
    let greedy = answer(&["--seed", "1"]);
    assert_eq!(greedy, answer(&["--seed", "2"]));
    for flag in [["--temperature", "1"], ["--top-k", "20"], ["--top-p", "0.9"]] {
        assert_ne!(greedy, answer(&flag), "{flag:?}");
    }
}
