//! The commands of the book and the READMEs: the flags that they give are flags of the programs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::program::succeeds;

/// The pages of the book and the READMEs.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let pages = std::fs::read_dir(root.join("docs/src")).unwrap().map(|entry| entry.unwrap().path());
    let crates = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path().join("README.md"));
    pages.chain(crates).chain([root.join("README.md")]).filter(|file| file.is_file()).collect()
}

#[test]
fn commands_of_the_documents_give_flags_that_the_programs_have() {
    let dir = tempfile::tempdir().unwrap();
    let mut help: BTreeMap<Vec<String>, BTreeSet<String>> = BTreeMap::new();
    let mut count = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for line in text.lines() {
            let Some((_, command)) = line.split_once("--example ") else { continue };
            let Some((name, arguments)) = command.split_once(" -- ") else { continue };
            let arguments = arguments.split(['`', '|', '>']).next().unwrap_or_default();
            let words: Vec<&str> = arguments.split_whitespace().collect();
            let mut program = vec![name.to_owned()];
            if name == "data" {
                program.extend(words.first().filter(|word| **word != "...").map(|word| (*word).to_owned()));
            }
            let flags = help.entry(program.clone()).or_insert_with(|| {
                let mut arguments: Vec<&str> = program.iter().skip(1).map(String::as_str).collect();
                arguments.push("--help");
                let text = succeeds(name, dir.path(), &arguments);
                let words = text.split(|c: char| c.is_whitespace() || "`,[]".contains(c));
                words.filter(|word| word.starts_with("--")).map(str::to_owned).collect()
            });
            for flag in words.iter().filter(|word| word.starts_with("--")) {
                assert!(flags.contains(*flag), "{}: {program:?} has no {flag}", document.display());
                count += 1;
            }
        }
    }
    assert!(count > 40 && help.len() > 8, "{count} flags of {:?}", help.keys());
}
