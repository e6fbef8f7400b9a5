//! Where a model keeps its template and its special tokens.

use std::path::Path;

use serde_json::{Map, Value};

use crate::hf::{TOKENIZER_CONFIG, invalid, read_json, read_text};
use crate::{ModelError, Result};

/// The template in a file of its own.
const TEMPLATE: &str = "chat_template.jinja";
/// Where older models keep their special tokens.
const TOKENS_MAP: &str = "special_tokens_map.json";
/// The template of a list that is meant where none is named.
pub(super) const DEFAULT: &str = "default";

/// The names of special tokens.
pub(super) const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The text of a model's template, and where it stands.
pub(super) fn find(dir: &Path, name: &str) -> Result<Option<(String, String)>> {
    let path = dir.join(TEMPLATE);
    if name == DEFAULT
        && let Some(text) = optional(read_text(&path))?
    {
        return Ok(Some((text, path.display().to_string())));
    }
    let path = dir.join(TOKENIZER_CONFIG);
    let Some(config) = optional(read_json::<Map<String, Value>>(&path))? else { return Ok(None) };
    let origin = format!("{}, chat_template", path.display());
    let wrong = |got: &Value| {
        invalid(
            &path,
            format!(
                "chat_template is {}, expected a string or a list of {{\"name\", \"template\"}}",
                brief(got)
            ),
        )
    };
    match config.get("chat_template") {
        Some(Value::String(text)) if name == DEFAULT => Ok(Some((text.clone(), origin))),
        None | Some(Value::Null | Value::String(_)) => Ok(None),
        Some(Value::Array(list)) => {
            let mut names = Vec::new();
            for entry in list {
                match (entry.get("name"), entry.get("template")) {
                    (Some(Value::String(found)), Some(Value::String(text))) => {
                        if found == name {
                            return Ok(Some((text.clone(), format!("{origin} `{name}`"))));
                        }
                        names.push(found.as_str());
                    }
                    _ => return Err(wrong(entry)),
                }
            }
            let names = names.join(", ");
            Err(invalid(&path, format!("chat_template has no template named `{name}`; there are: {names}")))
        }
        Some(other) => Err(wrong(other)),
    }
}

/// The special tokens by the names that templates know them by.
pub(super) fn special_tokens(dir: &Path) -> Result<Vec<(&'static str, String)>> {
    let mut found: Vec<(&'static str, String)> = Vec::new();
    for file in [TOKENIZER_CONFIG, TOKENS_MAP] {
        let path = dir.join(file);
        let Some(config) = optional(read_json::<Map<String, Value>>(&path))? else { continue };
        for name in TOKENS {
            if found.iter().any(|(known, _)| *known == name) {
                continue;
            }
            // A token may be described with how it is matched.
            let text = match config.get(name) {
                None | Some(Value::Null) => continue,
                Some(Value::Object(token)) => token.get("content"),
                plain => plain,
            };
            let Some(Value::String(text)) = text else {
                let got = config.get(name).map(brief).unwrap_or_default();
                let expected = "expected a string or an object with a `content`";
                return Err(invalid(&path, format!("{name} is {got}, {expected}")));
            };
            found.push((name, text.clone()));
        }
    }
    Ok(found)
}

/// A file that need not be there.
fn optional<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Err(ModelError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// A value as an error shows it: what is long is named by its kind.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(_) => "a string".into(),
        short => short.to_string(),
    }
}

/// The template with each `{% generation %}` block as an `if` that is always taken: `transformers` marks with it what
/// the model writes, which nothing asks for here.
pub(super) fn without_marks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = tag.split_at(end);
        let keyword = inside.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match keyword {
            "generation" => out.push_str(&inside.replacen(keyword, "if true", 1)),
            "endgeneration" => out.push_str(&inside.replacen(keyword, "endif", 1)),
            _ => out.push_str(inside),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::without_marks;

    #[test]
    fn marks_of_generation_become_blocks_that_are_always_taken() {
        for (text, without) in [
            ("a{% generation %}b{% endgeneration %}c", "a{% if true %}b{% endif %}c"),
            ("{%- generation -%}\n{{ x }}{%-endgeneration-%}", "{%- if true -%}\n{{ x }}{%-endif-%}"),
            ("{% if generation %}{% endif %}", "{% if generation %}{% endif %}"),
            ("{% generation", "{% generation"),
            ("", ""),
        ] {
            assert_eq!(without_marks(text), without);
        }
    }
}
