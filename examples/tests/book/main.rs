//! The book and the READMEs against the code and the records: links, commands, snippets and quoted numbers.
#![allow(clippy::unwrap_used, reason = "a test stops there")]

mod measurements;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use vesper_examples::settings::Flags;
use vesper_model::VesperConfig;

const CRATES: [&str; 5] = ["velvet-optim", "era-act", "flylora", "vesper-data", "vesper-model"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn read(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.replace("\r\n", "\n")
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> =
        fs::read_dir(root().join("docs/src")).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.sort();
    assert!(pages.len() > 5, "{pages:?}");
    pages
}

/// The book, the README of the project and those of the crates.
fn documents() -> Vec<PathBuf> {
    let mut all = pages();
    all.push(root().join("README.md"));
    all.extend(CRATES.map(|name| root().join(name).join("README.md")));
    all
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block: Option<(bool, String)> = None;
    for line in text.lines() {
        if let Some(info) = line.trim_start().strip_prefix("```") {
            match block.take() {
                None => block = Some((info == language, String::new())),
                Some((true, code)) => found.push(code),
                Some(_) => {}
            }
        } else if let Some((_, code)) = &mut block {
            code.push_str(line);
            code.push('\n');
        }
    }
    found
}

/// The text outside of fenced blocks.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// The targets of the links of a page, as they are written.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let targets = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    targets.map(|(target, _)| target.to_owned()).collect()
}

/// The anchors of a page's headings, as mdBook and GitHub make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let title = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn the_summary_lists_every_page_once() {
    let summary = root().join("docs/src/SUMMARY.md");
    let mut listed = links(&read(&summary));
    listed.sort();
    let names = pages().into_iter().map(|page| page.file_name().unwrap().to_string_lossy().into_owned());
    let expected: Vec<String> = names.filter(|name| name != "SUMMARY.md").collect();
    assert_eq!(listed, expected);
}

#[test]
fn links_lead_somewhere() {
    for document in documents() {
        let text = read(&document);
        for link in links(&text) {
            if link.starts_with("https://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { document.clone() } else { document.with_file_name(file) };
            assert!(target.exists(), "{}: {link}", document.display());
            if document.starts_with(root().join("docs")) {
                assert!(!file.contains(".."), "{}: {link} leaves the book", document.display());
            }
            if !anchor.is_empty() {
                assert!(anchors(&read(&target)).contains(anchor), "{}: {link}", document.display());
            }
        }
    }
}

#[test]
fn commands_name_examples_and_flags_that_exist() {
    let mut checked = BTreeSet::new();
    for document in documents() {
        for block in blocks(&read(&document), "sh") {
            for command in block.lines().filter(|line| line.contains("--example")) {
                let words: Vec<&str> = command.split_whitespace().collect();
                let name = words[words.iter().position(|word| *word == "--example").unwrap() + 1];
                let source = root().join("examples").join(name).with_extension("rs");
                assert!(source.is_file(), "{}: {command}", document.display());
                if name == "train" {
                    let flags =
                        words.iter().position(|word| *word == "--").map_or(&[][..], |at| &words[at + 1..]);
                    let parsed = Flags::try_parse_from(std::iter::once(&"train").chain(flags));
                    assert!(parsed.is_ok(), "{}: {command}: {parsed:?}", document.display());
                }
                checked.insert(name.to_owned());
            }
        }
    }
    assert!(checked.contains("train") && checked.contains("chat"), "{checked:?}");
}

#[test]
fn the_table_of_sizes_has_the_presets_and_the_default_settings() {
    let text = read(&root().join("docs/src/training.md"));
    for name in VesperConfig::PRESETS {
        let config = VesperConfig::preset(name).unwrap();
        let settings = Flags::try_parse_from(["train", "--size", name]).unwrap().settings().unwrap();
        let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).unwrap_or_default();
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let millions = format!("{:.1} M", config.num_parameters() as f64 / 1e6).replace(".0 M", " M");
        let expected = [
            config.num_hidden_layers.to_string(),
            config.hidden_size.to_string(),
            format!("{millions} at {}", config.vocab_size),
            format!("{} × {} × {}", settings.steps, settings.batch, settings.seq),
        ];
        assert_eq!(cells.get(2..6), Some(&expected.each_ref().map(String::as_str)[..]), "{name}");
    }
}

/// Lines without their indentation and the marks of a doc comment, whose examples are compiled too; empty ones and those that
/// a doctest hides are left out.
fn significant(text: &str) -> Vec<&str> {
    let lines = text.lines().map(|line| {
        let line = line.trim();
        line.strip_prefix("///").or_else(|| line.strip_prefix("//!")).unwrap_or(line).trim()
    });
    lines.filter(|line| !line.is_empty() && !line.starts_with("# ")).collect()
}

fn sources(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(read(&path));
        }
    }
}

#[test]
fn snippets_of_the_book_stand_in_code_that_is_compiled() {
    let mut code = vec![read(&root().join("examples/train.rs"))];
    for name in CRATES {
        code.extend(blocks(&read(&root().join(name).join("README.md")), "rust"));
        sources(&root().join(name).join("src"), &mut code);
    }
    let code: Vec<Vec<&str>> = code.iter().map(|text| significant(text)).collect();
    let mut count = 0;
    for page in pages() {
        for snippet in blocks(&read(&page), "rust") {
            let lines = significant(&snippet);
            let found = code.iter().any(|text| text.windows(lines.len()).any(|window| window == lines));
            assert!(found, "{}: in no README and no source:\n{snippet}", page.display());
            count += 1;
        }
    }
    assert!(count > 5, "{count}");
}
