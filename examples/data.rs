//! Looks at text as a model will see it: builds token caches, prints what is in them, counts, draws samples, and says
//! which model suits the text.
//!
//!     cargo run --release --example data -- stats my-folder --tokenizer tokenizer.json

use std::process::ExitCode;

use anyhow::Result;
use vesper_examples::dataset::flags::{Command, Flags, Inspect};
use vesper_examples::dataset::plan::Plan;
use vesper_examples::dataset::stats::Stats;
use vesper_examples::dataset::{access, clean, sample};
use vesper_examples::{note, printable, say};

fn main() -> ExitCode {
    vesper_examples::run(|| data(vesper_examples::flags::<Flags>()?.command))
}

fn data(command: Command) -> Result<ExitCode> {
    match command {
        Command::Build(text) => {
            let opened = access::open(&text)?;
            let (documents, tokens) = (opened.cache.document_count(), opened.cache.len());
            say!("{}: {}", opened.cache.path().display(), opened.status);
            let skipped = match opened.cache.skipped_records() {
                0 => String::new(),
                skipped => format!(", broken records passed over: {skipped}"),
            };
            say!("{documents} documents, {tokens} tokens{skipped}, {:.1} s", opened.seconds);
            if opened.cache.unknown_tokens() > 0 {
                note!("warning: the tokenizer does not know {} of the tokens", opened.cache.unknown_tokens());
            }
        }
        Command::Inspect(inspect) => describe(&inspect)?,
        Command::Stats(flags) => {
            let stats = Stats::of(&flags)?;
            if let Some(path) = &flags.svg {
                stats.draw(path)?;
            }
            if flags.json {
                say!("{}", serde_json::to_string_pretty(&stats)?);
            } else {
                stats.print();
            }
        }
        Command::Sample(flags) => {
            for sample in sample::draw(&flags)? {
                say!("[document {}, tokens {} to {}]", sample.document, sample.start, sample.end);
                say!("{}\n", printable(&sample.text));
            }
        }
        Command::Plan(flags) => {
            let plan = Plan::of(&flags)?;
            if flags.json {
                say!("{}", serde_json::to_string_pretty(&plan)?);
            } else {
                plan.print();
            }
        }
        Command::Clean(flags) => {
            let cleaned = clean::write(&flags)?;
            say!(
                "{}: {} documents, {} of them changed",
                flags.out.display(),
                cleaned.documents,
                cleaned.changed
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(inspect: &Inspect) -> Result<()> {
    let mut caches = Vec::new();
    for path in &inspect.caches {
        caches.extend(access::caches(path)?);
    }
    for path in &caches {
        let lines = access::describe(path)?;
        if inspect.json {
            let object: serde_json::Map<String, serde_json::Value> =
                lines.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            say!("{}", serde_json::to_string(&object)?);
        } else {
            for (name, value) in lines {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                say!("{:<22} {value}", name.replace('_', " "));
            }
        }
    }
    Ok(())
}
