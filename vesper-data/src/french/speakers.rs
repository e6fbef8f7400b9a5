//! The speakers of dialogues as the Claire data sets have them: `[speaker001:] Bonjour.`

use std::borrow::Cow;
use std::collections::HashMap;

/// The name in a tag `[name:]` at the start of a line, and the rest of the line.
fn tag(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix('[')?.split_once(":]")?;
    // A bracket in between: it was another kind of remark.
    (!name.trim().is_empty() && !name.contains(['[', ']'])).then_some((name, rest))
}

/// The names of the speakers, each once, in the order in which they first speak.
///
/// # Examples
///
/// ```
/// let text = "[Anne:] Bonjour.\n[Paul:] Salut [rire] !\n[Anne:] Ça va ?";
/// assert_eq!(vesper_data::french::speakers(text), ["Anne", "Paul"]);
/// ```
pub fn speakers(conversation: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for (name, _) in conversation.lines().filter_map(tag) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The conversation with its speakers called `speaker001`, `speaker002`, ... in the order in which they first speak.
///
/// This hides names, and gives the tags of all conversations the same few tokens: in the Claire data sets a
/// conversation may begin with `[speaker014:]`. To be used on one conversation at a time. Doing it twice gives the same
/// as doing it once.
///
/// # Examples
///
/// ```
/// use vesper_data::french::renumber_speakers;
///
/// let text = "[Anne:] Bonjour.\n[Paul:] Salut !\n[Anne:] Ça va ?";
/// let renumbered = "[speaker001:] Bonjour.\n[speaker002:] Salut !\n[speaker001:] Ça va ?";
/// assert_eq!(renumber_speakers(text), renumbered);
/// assert_eq!(renumber_speakers(renumbered), renumbered);
/// ```
pub fn renumber_speakers(conversation: &str) -> Cow<'_, str> {
    let names: HashMap<&str, String> = speakers(conversation)
        .into_iter()
        .zip(1_u32..)
        .map(|(name, number)| (name, format!("speaker{number:03}")))
        .collect();
    if names.iter().all(|(old, new)| old == new) {
        return Cow::Borrowed(conversation);
    }
    let mut text = String::with_capacity(conversation.len());
    for line in conversation.split_inclusive('\n') {
        match tag(line).and_then(|(name, rest)| Some((names.get(name)?, rest))) {
            Some((name, rest)) => {
                text.push('[');
                text += name;
                text += ":]";
                text += rest;
            }
            None => text += line,
        }
    }
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_tags_at_the_start_of_a_line_count() {
        let text = "[Anne:] dit [Paul:] non\nsans nom\n[rire]\n[a [b:] x\n[ :] y\n[speaker007:] z\n";
        assert_eq!(speakers(text), ["Anne", "speaker007"]);
        assert_eq!(
            renumber_speakers(text),
            "[speaker001:] dit [Paul:] non\nsans nom\n[rire]\n[a [b:] x\n[ :] y\n[speaker002:] z\n"
        );
    }

    #[test]
    fn numbers_that_swap_places_stay_apart() {
        let text = "[speaker002:] a\n[speaker001:] b\n[speaker002:] c";
        assert_eq!(renumber_speakers(text), "[speaker001:] a\n[speaker002:] b\n[speaker001:] c");
    }

    proptest! {
        #[test]
        fn renumbering_twice_is_renumbering_once(text in "(\\[(a|b|speaker00[1-3]):\\]|\\[|:\\]|[a \n])*") {
            let once = renumber_speakers(&text).into_owned();
            prop_assert_eq!(renumber_speakers(&once), once.as_str());
        }
    }
}
