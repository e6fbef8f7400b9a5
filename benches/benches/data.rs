//! From text to batches: memory of a build, time of opening, bytes a second into batches.
//!
//! ```text
//! cargo bench -p vesper-benches --bench data -- [build] [read]
//! ```
//!
//! `build` tokenises 2 GiB of text (the embedded stories, 64 MiB of them again and again) and follows the memory that
//! the process has; `read` opens that cache and measures one thread's way from it to batches of 32 rows of 1024
//! tokens. Without a word, both. Rates are of input ids as u32: targets and what else a batch holds come on top. Text
//! and cache are kept in `target/data-bench`, or the folder that `VESPER_BENCH_FOLDER` names.
//!
//! A run writes `benches/record/<machine>/<date>-data.json`, or the file that `VESPER_BENCH_RECORD` names; the other
//! part of a record of the same day is kept. Without `--bench`, which cargo bench passes, everything runs once on a
//! little text and nothing is written.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde_json::{Map, Value, json};
use vesper_benches::record;
use vesper_data::corpus::StoryCorpus;
use vesper_data::source::SEPARATOR;
use vesper_data::{
    BatchSampler, CacheBuilder, PackedSampler, Prefetch, Result, SamplerConfig, Sources, TextTokenizer,
    TokenCache,
};

/// How much is measured.
struct Effort {
    text_bytes: u64,
    stories_bytes: usize,
    batch: usize,
    seq: usize,
    batches: usize,
    opens: usize,
}

const MB: f64 = 1e6;
const GB: f64 = 1e9;

/// A line of `/proc/self/status`, in MB; there is none on other systems than Linux.
fn memory(name: &str) -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024.0 / MB)
}

/// The text and the tokenizer, made where they are not there yet.
fn prepare(folder: &Path, effort: &Effort) -> std::result::Result<(Sources, TextTokenizer), Box<dyn Error>> {
    std::fs::create_dir_all(folder)?;
    let text = folder.join("stories.txt");
    let corpus = StoryCorpus::new(1);
    if std::fs::metadata(&text).map_or(0, |metadata| metadata.len()) < effort.text_bytes {
        let mut stories = Vec::new();
        for story in corpus.take_bytes(effort.stories_bytes) {
            stories.extend_from_slice(story.text.as_bytes());
            stories.extend_from_slice(SEPARATOR.as_bytes());
        }
        let mut out = BufWriter::new(File::create(&text)?);
        let mut written = 0;
        while written < effort.text_bytes {
            out.write_all(&stories)?;
            written += stories.len() as u64;
        }
        out.flush()?;
    }
    let sample = corpus.take_bytes(1 << 20);
    let tokenizer = TextTokenizer::train_bpe(sample.iter().map(|story| Ok(story.text.as_str())), 2560)?;
    Ok((Sources::new([text]), tokenizer))
}

fn build(folder: &Path, effort: &Effort) -> std::result::Result<Value, Box<dyn Error>> {
    let (sources, tokenizer) = prepare(folder, effort)?;
    let dir = folder.join("cache");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    let before = memory("VmRSS");
    let step = (effort.text_bytes / 8).max(1);
    let (mut next, mut samples) = (step, Vec::new());
    let start = Instant::now();
    let builder = CacheBuilder::new().on_progress(|progress| {
        if progress.bytes >= next {
            samples.push(json!({ "text_mb": progress.bytes as f64 / MB, "resident_mb": memory("VmRSS") }));
            next += step;
        }
        ControlFlow::Continue(())
    });
    let (cache, _) = builder.open_or_build(&dir, &sources, &tokenizer)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = memory("VmHWM");
    println!(
        "build: {:.0} MB of text, {} documents, {} tokens in {seconds:.1} s ({:.1} MB/s); peak memory {peak:?} MB",
        cache.text_bytes() as f64 / MB,
        cache.document_count(),
        cache.len(),
        cache.text_bytes() as f64 / MB / seconds,
    );
    Ok(json!({
        "text_mb": cache.text_bytes() as f64 / MB,
        "documents": cache.document_count(),
        "tokens": cache.len(),
        "shards": cache.shards().len(),
        "seconds": seconds,
        "resident_before_mb": before,
        "resident_while_mb": samples,
        "peak_resident_mb": peak,
    }))
}

/// Median seconds of `f`.
fn median<T>(runs: usize, mut f: impl FnMut() -> Result<T>) -> Result<f64> {
    let mut samples = Vec::with_capacity(runs);
    for _ in 0..runs {
        let start = Instant::now();
        let result = f()?;
        samples.push(start.elapsed().as_secs_f64());
        drop(result);
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN))
}

fn read(folder: &Path, effort: &Effort) -> std::result::Result<Value, Box<dyn Error>> {
    let (sources, tokenizer) = prepare(folder, effort)?;
    let dir = folder.join("cache");
    let (cache, _) = TokenCache::open_or_build(&dir, &sources, &tokenizer)?;
    let path = cache.path().to_path_buf();
    let mut bytes = 0;
    for shard in cache.shards() {
        bytes += std::fs::metadata(shard)?.len();
    }
    let open = median(effort.opens, || TokenCache::open(&path))?;
    let check = median(effort.opens, || TokenCache::open_or_build(&dir, &sources, &tokenizer))?;
    cache.verify()?; // so that the pages are there
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let verify = median(3.min(effort.opens), || {
        let cache = TokenCache::open(&path)?;
        one.install(|| cache.verify())
    })?;
    let tokens = cache.tokens();
    let split = median(3.min(effort.opens), || tokens.split_documents(0.05, 1))?;

    let config = SamplerConfig::default().with_batch(effort.batch).with_seq(effort.seq);
    let inputs = (effort.batches * effort.batch * effort.seq * 4) as f64;
    let mut windows = BatchSampler::new(tokens.clone(), config.clone())?;
    let windows_s =
        median(5, || (0..effort.batches).try_for_each(|_| windows.next_batch(&Device::Cpu).map(drop)))?;
    let (train, _) = tokens.split_documents(0.05, 1)?;
    let mut views = BatchSampler::new(train.clone(), config.clone())?;
    let views_s =
        median(5, || (0..effort.batches).try_for_each(|_| views.next_batch(&Device::Cpu).map(drop)))?;
    let mut real = 0;
    let mut pack = |tokens| {
        let mut packed = PackedSampler::new(tokens, config.clone())?;
        median(5, || {
            real = 0;
            for _ in 0..effort.batches {
                real += packed.next_batch(&Device::Cpu)?.tokens;
            }
            Ok(())
        })
    };
    let packed_views_s = pack(train)?;
    let packed_s = pack(tokens.clone())?;
    let filled = real as f64 * 4.0 / inputs;
    let mut ahead = Prefetch::new(BatchSampler::new(tokens, config)?, 4)?;
    let ahead_s =
        median(5, || (0..effort.batches).try_for_each(|_| ahead.next_batch(&Device::Cpu).map(drop)))?;
    // How long a loop that computes in between waits for a batch that is ready.
    let mut waits = Vec::with_capacity(100);
    for _ in 0..100 {
        std::thread::sleep(std::time::Duration::from_millis(2));
        let start = Instant::now();
        ahead.next_batch(&Device::Cpu)?;
        waits.push(start.elapsed().as_secs_f64());
    }
    waits.sort_by(f64::total_cmp);
    let wait = waits.get(waits.len() / 2).copied().unwrap_or(f64::NAN);

    println!(
        "read: open {:.3} ms, with a look at the sources {:.3} ms; verify {:.2} GB/s; split by document {:.1} ms",
        open * 1e3,
        check * 1e3,
        bytes as f64 / verify / GB,
        split * 1e3,
    );
    println!(
        "batches of {} x {}, GB/s of input ids: windows {:.2}, of a view by document {:.2}, packed {:.2} ({:.1} % \
         filled), of a view {:.2}, prefetched {:.2}; {:.1} us for a batch that is ready",
        effort.batch,
        effort.seq,
        inputs / windows_s / GB,
        inputs / views_s / GB,
        inputs / packed_s / GB,
        filled * 100.0,
        inputs / packed_views_s / GB,
        inputs / ahead_s / GB,
        wait * 1e6,
    );
    Ok(json!({
        "cache_mb": bytes as f64 / MB,
        "open_ms": open * 1e3,
        "open_and_look_at_sources_ms": check * 1e3,
        "verify_gb_per_s_one_thread": bytes as f64 / verify / GB,
        "split_by_document_ms": split * 1e3,
        "batch": effort.batch,
        "seq": effort.seq,
        "rates_are_of": "input ids as u32, 4 bytes a token; one thread, warm cache",
        "windows_gb_per_s": inputs / windows_s / GB,
        "windows_of_a_view_by_document_gb_per_s": inputs / views_s / GB,
        "packed_gb_per_s": inputs / packed_s / GB,
        "packed_of_a_view_by_document_gb_per_s": inputs / packed_views_s / GB,
        "packed_filled": filled,
        "prefetched_gb_per_s": inputs / ahead_s / GB,
        "ready_batch_us": wait * 1e6,
    }))
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    if !has("--bench") {
        let folder = std::env::temp_dir().join(format!("vesper-data-bench-{}", std::process::id()));
        let effort =
            Effort { text_bytes: 1 << 18, stories_bytes: 1 << 16, batch: 2, seq: 64, batches: 3, opens: 1 };
        let measured = build(&folder, &effort).and_then(|_| read(&folder, &effort));
        std::fs::remove_dir_all(&folder)?;
        return measured.map(drop);
    }
    let effort = Effort {
        text_bytes: 2 << 30,
        stories_bytes: 64 << 20,
        batch: 32,
        seq: 1024,
        batches: 2000,
        opens: 21,
    };
    let folder = std::env::var_os("VESPER_BENCH_FOLDER").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/data-bench"),
        PathBuf::from,
    );
    let (date, machine) = (record::today(), record::machine());
    let path = record::path("data", &date, &machine);
    let mut record: Map<String, Value> = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => Map::new(),
    };
    record.insert("bench".into(), "data".into());
    record.insert("date".into(), date.into());
    record.insert("machine".into(), machine.into());
    let both = !has("build") && !has("read");
    if both || has("build") {
        record.insert("build".into(), build(&folder, &effort)?);
    }
    if both || has("read") {
        record.insert("read".into(), read(&folder, &effort)?);
    }
    record::write(&path, &record)?;
    Ok(())
}
