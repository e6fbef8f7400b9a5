//! Text to ids: `TextTokenizer::encode_documents` against `tokenizers`' own `encode_batch` (and `encode_batch_fast`, which
//! leaves offsets out) on the same documents and threads, in one run.
//!
//! ```text
//! VESPER_DATA=folder cargo bench -p vesper-benches --bench tokenizer
//! ```
//!
//! Needs the folder of real data; a whole run writes `benches/record/<machine>/<date>-tokenizer.json`. With `-- --test`
//! everything runs once, on the embedded stories and tokenizers trained on them, and nothing is written.
#![allow(missing_docs, reason = "criterion's macros write undocumented functions")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use serde::Serialize;
use vesper_benches::record::{machine, path, today, write};
use vesper_data::corpus::StoryCorpus;
use vesper_data::{Documents, TextTokenizer};

/// A tokenizer, its documents, and what they are called.
struct Case {
    name: String,
    tokenizer: TextTokenizer,
    texts: Vec<String>,
}

const WAYS: [&str; 3] = ["vesper-data", "encode_batch", "encode_batch_fast"];

/// Median seconds, by case and way.
type Medians = BTreeMap<(String, &'static str), f64>;

fn real(data: &Path) -> Result<Vec<Case>, Box<dyn Error>> {
    // tokenizer, source, how many of its documents
    let cases = [
        ("tokenizers/camembert-base", "french/novels", 8),
        ("tokenizers/camembert-base", "instruct/wiki_demo.txt", 30),
        ("tokenizers/gpt2", "tinystories/tinystories-v1-train-first2316.txt", 2316),
        ("tokenizers/gpt2", "french/novels", 8),
        ("models/stories260K", "tinystories/tinystories-v1-train-first2316.txt", 2316),
        ("models/stories260K", "french/novels", 2),
    ];
    let mut all = Vec::new();
    for (tokenizer, source, documents) in cases {
        let texts = Documents::open(&[data.join(source)])?
            .take(documents)
            .map(|document| document.map(|document| document.text))
            .collect::<Result<_, _>>()?;
        all.push(Case {
            name: format!("{tokenizer}, {source}"),
            tokenizer: TextTokenizer::from_file(data.join(tokenizer).join("tokenizer.json"))?,
            texts,
        });
    }
    Ok(all)
}

fn embedded() -> Result<Vec<Case>, Box<dyn Error>> {
    let texts: Vec<String> =
        StoryCorpus::new(0).take_bytes(1 << 14).into_iter().map(|story| story.text).collect();
    let bpe = TextTokenizer::train_bpe(texts.iter().map(Ok), 400)?;
    let unigram = TextTokenizer::train_unigram(texts.iter().map(Ok), 400)?;
    Ok([("BPE", bpe), ("Unigram", unigram)]
        .map(|(name, tokenizer)| Case { name: name.to_owned(), tokenizer, texts: texts.clone() })
        .into())
}

/// The number of ids that a way gives, the end of each document aside.
fn encode(case: &Case, way: &str) -> Result<usize, Box<dyn Error + Send + Sync>> {
    let texts: Vec<&str> = case.texts.iter().map(String::as_str).collect();
    let ids = match way {
        "vesper-data" => {
            let mut ids = 0;
            for encoded in case.tokenizer.encode_documents(texts.into_iter().map(Ok)) {
                ids += encoded?.ids.len() - usize::from(case.tokenizer.eos_id().is_some());
            }
            return Ok(ids);
        }
        "encode_batch" => case.tokenizer.inner().encode_batch(texts, false)?,
        _ => case.tokenizer.inner().encode_batch_fast(texts, false)?,
    };
    Ok(ids.iter().map(tokenizers::Encoding::len).sum())
}

fn measure(criterion: &mut Criterion, case: &Case, medians: &mut Medians) -> Result<(), Box<dyn Error>> {
    let bytes: usize = case.texts.iter().map(String::len).sum();
    let mut group = criterion.benchmark_group(&case.name);
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(4)).throughput(Throughput::Bytes(bytes as u64));
    let expected = encode(case, "encode_batch").map_err(|error| error.to_string())?;
    for way in WAYS {
        let mut samples = Vec::new();
        let mut failure = None;
        group.bench_function(BenchmarkId::from_parameter(way), |b| {
            b.iter_custom(|n| {
                let start = Instant::now();
                for _ in 0..n {
                    match encode(case, way) {
                        Ok(ids) if ids == expected => {}
                        Ok(ids) => failure = Some(format!("{way} gives {ids} ids, encode_batch {expected}")),
                        Err(error) => failure = Some(error.to_string()),
                    }
                }
                let elapsed = start.elapsed();
                samples.push(elapsed.as_secs_f64() / n as f64);
                elapsed
            });
        });
        if let Some(failure) = failure {
            return Err(format!("{}: {failure}", case.name).into());
        }
        samples.sort_by(f64::total_cmp);
        medians.extend(samples.get(samples.len() / 2).map(|&median| ((case.name.clone(), way), median)));
    }
    group.finish();
    Ok(())
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    threads: usize,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    documents: usize,
    bytes: usize,
    mb_per_s: f64,
    encode_batch_mb_per_s: f64,
    encode_batch_fast_mb_per_s: f64,
    times_encode_batch: f64,
    times_encode_batch_fast: f64,
}

/// The row of a case; `None` where a filter left something out.
fn row(case: &Case, medians: &Medians) -> Option<Row> {
    let bytes: usize = case.texts.iter().map(String::len).sum();
    let seconds = |way| medians.get(&(case.name.clone(), way)).copied();
    let (ours, batch, fast) = (seconds(WAYS[0])?, seconds(WAYS[1])?, seconds(WAYS[2])?);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    Some(Row {
        name: case.name.clone(),
        documents: case.texts.len(),
        bytes,
        mb_per_s: rate(ours),
        encode_batch_mb_per_s: rate(batch),
        encode_batch_fast_mb_per_s: rate(fast),
        times_encode_batch: batch / ours,
        times_encode_batch_fast: fast / ours,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    // As criterion decides it: `cargo test` gives no `--bench`.
    let smoke = !has("--bench") || has("--test") || has("--list");
    let data = std::env::var_os("VESPER_DATA").map(PathBuf::from);
    let cases = match &data {
        _ if smoke => embedded()?,
        Some(data) => real(data)?,
        None => return Err("VESPER_DATA is not set: expected the folder of real data".into()),
    };
    let mut criterion = Criterion::default().configure_from_args();
    let mut medians = Medians::new();
    for case in &cases {
        measure(&mut criterion, case, &mut medians)?;
    }
    criterion.final_summary();
    let rows: Option<Vec<Row>> = cases.iter().map(|case| row(case, &medians)).collect();
    let Some(rows) = rows.filter(|_| !smoke) else { return Ok(()) };
    let record = Record {
        bench: "tokenizer",
        date: today(),
        machine: machine(),
        threads: rayon::current_num_threads(),
        rows,
    };
    println!("\n{} threads", record.threads);
    for row in &record.rows {
        println!(
            "{:<72} {:6.2} MB/s, {:5.2} x encode_batch, {:5.2} x encode_batch_fast",
            row.name, row.mb_per_s, row.times_encode_batch, row.times_encode_batch_fast
        );
    }
    write(&path("tokenizer", &record.date, &record.machine), &record)?;
    Ok(())
}
