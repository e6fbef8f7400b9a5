//! A digest of a tokenizer that does not depend on the order in which its parts happen to be stored.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// SHA-256 of the canonical JSON: keys sorted, no white space.
pub(super) fn of(description: &Value) -> [u8; 32] {
    let mut text = Vec::new();
    write(description, &mut text);
    Sha256::digest(&text).into()
}

/// Adds the id that ends each document, which may come from another file.
pub(super) fn with_eos(digest: [u8; 32], eos: Option<u32>) -> [u8; 32] {
    let mut hash = Sha256::new_with_prefix(digest);
    hash.update(eos.map_or(u64::MAX, u64::from).to_le_bytes());
    hash.finalize().into()
}

fn write(value: &Value, text: &mut Vec<u8>) {
    match value {
        // serde_json sorts an object's keys unless some crate of the program asks it not to.
        Value::Object(object) => {
            let mut fields: Vec<_> = object.iter().collect();
            fields.sort_unstable_by_key(|(key, _)| *key);
            text.push(b'{');
            for (index, (key, value)) in fields.into_iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                text.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
                text.push(b':');
                write(value, text);
            }
            text.push(b'}');
        }
        Value::Array(values) => {
            text.push(b'[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                write(value, text);
            }
            text.push(b']');
        }
        leaf => text.extend_from_slice(leaf.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn canonical_json_is_sorted_and_has_no_white_space() {
        let mut text = Vec::new();
        write(&json!({"b": [1, null, {"d": 0.5, "c": "\"\n"}], "a": true}), &mut text);
        assert_eq!(String::from_utf8(text).unwrap(), r#"{"a":true,"b":[1,null,{"c":"\"\n","d":0.5}]}"#);
    }

    #[test]
    fn the_end_of_text_id_counts() {
        assert_ne!(with_eos([0; 32], None), with_eos([0; 32], Some(0)));
        assert_ne!(with_eos([0; 32], Some(1)), with_eos([0; 32], Some(0)));
    }
}
