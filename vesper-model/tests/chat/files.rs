//! Where a model keeps its template, and what can be wrong there.

use std::path::Path;

use serde_json::{Value, json};
use vesper_model::chat::{ChatTemplate, Message, Role};

fn write(dir: &Path, name: &str, content: &Value) {
    std::fs::write(dir.join(name), content.to_string()).unwrap();
}

fn render(template: Option<ChatTemplate>) -> String {
    template.unwrap().render(&[Message::new(Role::User, "x")], true).unwrap()
}

fn error(dir: &Path) -> String {
    let error = ChatTemplate::read(dir).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_file_of_its_own_comes_before_the_tokenizers_settings() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    assert!(ChatTemplate::read(dir).unwrap().is_none());
    write(dir, "tokenizer_config.json", &json!({"model_max_length": 5}));
    assert!(ChatTemplate::read(dir).unwrap().is_none());
    write(dir, "tokenizer_config.json", &json!({"chat_template": null}));
    assert!(ChatTemplate::read(dir).unwrap().is_none());
    write(
        dir,
        "tokenizer_config.json",
        &json!({"chat_template": "settings {{ bos_token }}", "bos_token": "<s>"}),
    );
    assert_eq!(render(ChatTemplate::read(dir).unwrap()), "settings <s>");
    std::fs::write(dir.join("chat_template.jinja"), "file {{ bos_token }}\n").unwrap();
    assert_eq!(render(ChatTemplate::read(dir).unwrap()), "file <s>");
}

#[test]
fn one_of_several_templates_is_taken_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let list = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]);
    write(dir, "tokenizer_config.json", &json!({"chat_template": list}));
    assert_eq!(render(ChatTemplate::read(dir).unwrap()), "plain");
    assert_eq!(render(ChatTemplate::read_named(dir, "tool_use").unwrap()), "tools");
    let missing = ChatTemplate::read_named(dir, "rag").unwrap_err().to_string();
    assert!(missing.contains("no template named `rag`; there are: tool_use, default"), "{missing}");
    write(dir, "tokenizer_config.json", &json!({"chat_template": [{"name": "rag", "template": "r"}]}));
    assert!(error(dir).contains("no template named `default`; there are: rag"));
}

#[test]
fn special_tokens_are_read_as_text_or_with_their_description() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}";
    let config = json!({
        "chat_template": text,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": false},
        "eos_token": "</s>",
        "pad_token": null,
    });
    write(dir, "tokenizer_config.json", &config);
    write(dir, "special_tokens_map.json", &json!({"eos_token": "other", "unk_token": {"content": "<unk>"}}));
    assert_eq!(render(ChatTemplate::read(dir).unwrap()), "<s>|</s>|<unk>|");
}

#[test]
fn wrong_files_are_named_with_the_key_and_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (wrong, got) in [
        (json!(5), "chat_template is 5"),
        (json!(true), "chat_template is true"),
        (json!({"default": "x"}), "chat_template is an object"),
        (json!(["x"]), "chat_template is a string"),
        (json!([{"name": "default"}]), "chat_template is an object"),
    ] {
        write(dir, "tokenizer_config.json", &json!({"chat_template": wrong}));
        let error = error(dir);
        for part in ["tokenizer_config.json", got, "expected a string or a list of {\"name\", \"template\"}"]
        {
            assert!(error.contains(part), "no `{part}` in {error}");
        }
    }
    write(dir, "tokenizer_config.json", &json!({"chat_template": "x", "eos_token": 2}));
    assert!(error(dir).contains("eos_token is 2, expected a string or an object with a `content`"));
    write(dir, "tokenizer_config.json", &json!({"chat_template": "x", "eos_token": {"content": 1}}));
    assert!(error(dir).contains("eos_token is an object, expected"));
    write(dir, "tokenizer_config.json", &json!([1]));
    assert!(error(dir).contains("tokenizer_config.json"));

    write(dir, "tokenizer_config.json", &json!({"chat_template": "a\n{% if %}"}));
    let syntax = error(dir);
    assert!(syntax.contains("tokenizer_config.json, chat_template, line 2: syntax error"), "{syntax}");
    std::fs::write(dir.join("chat_template.jinja"), b"a\xff").unwrap();
    assert!(error(dir).contains("chat_template.jinja: not UTF-8 text: invalid byte at offset 1"));
    std::fs::write(dir.join("chat_template.jinja"), "{% endfor %}").unwrap();
    assert!(error(dir).contains("chat_template.jinja, line 1: syntax error"));
}
