//! Quoted numbers against the records that they come from.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vesper_examples::metacognition::record::Record;

use super::{documents, read, root};

/// A file of `benches/record/`.
fn record(name: &str) -> Value {
    serde_json::from_str(&read(&root().join("benches/record").join(name))).unwrap()
}

fn rows<'a>(record: &'a Value, key: &str) -> &'a [Value] {
    record[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"))
}

/// As the book writes it: without a zero before the point.
fn short(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    text.strip_prefix("0.").map_or(text.clone(), |digits| format!(".{digits}"))
}

/// The records that a text names by their whole path, such as `benches/record/nvidia-h100/2026-11-27-model.json`.
fn named_records(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| c.is_whitespace() || "`()[],;:".contains(c));
    let records = words.filter(|word| word.starts_with("benches/record/") && !word.contains('<'));
    records.filter(|word| Path::new(word).extension().is_some_and(|of| of == "json")).collect()
}

/// Asserts that a row of a table of `document` has these cells, one after the other.
fn has_row(document: &str, cells: &[String]) {
    let text = read(&root().join(document));
    let found = text.lines().filter(|line| line.starts_with('|')).any(|line| {
        let row: Vec<&str> = line.split('|').map(str::trim).collect();
        row.windows(cells.len()).any(|window| window == cells)
    });
    assert!(found, "{document}: no row with {cells:?}");
}

#[test]
fn records_that_are_named_are_there_and_the_readmes_name_the_newest() {
    let mut count = 0;
    for document in documents() {
        let text = read(&document);
        for name in named_records(&text) {
            let file = root().join(name);
            assert!(file.is_file(), "{}: {name}", document.display());
            count += 1;
            if document.ends_with("README.md") {
                let newer = newer(&file);
                assert!(newer.is_none(), "{}: {name}, and there is {newer:?}", document.display());
            }
        }
    }
    assert!(count > 20, "{count}");
}

/// A record of the same machine and bench with a later date.
fn newer(file: &Path) -> Option<PathBuf> {
    let (date, bench) = file.file_name()?.to_str()?.split_at("2026-11-27".len());
    let others = std::fs::read_dir(file.parent()?).unwrap().map(|entry| entry.unwrap().path());
    let mut later = others.filter(|other| {
        let name = other.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.split_at_checked(date.len()).is_some_and(|(day, of)| day > date && of == bench)
    });
    later.next()
}

#[test]
fn quoted_measurements_are_those_of_their_record() {
    let mut count = 0;
    for document in [root().join("README.md"), root().join("docs/src/results.md")] {
        let text = read(&document);
        for record in named_records(&text).into_iter().filter(|name| name.ends_with("-optimizer.json")) {
            let json: Value = serde_json::from_str(&read(&root().join(record))).unwrap();
            // The front page has the first rows and the last, the page of results all of them.
            let front = [
                "velvet",
                "velvet, clip 1.0",
                "velvet, unchecked",
                "velvet, bf16 parameters",
                "velvet, orthogonal",
                "candle AdamW",
            ];
            let all = !document.ends_with("README.md");
            for row in json["rows"].as_array().unwrap() {
                if !all && !front.contains(&row["name"].as_str().unwrap()) {
                    continue;
                }
                for key in ["milliseconds", "times_faster_than_candle_adamw"] {
                    let value = row[key].as_f64().unwrap();
                    let number = if value == 1.0 { "1".into() } else { format!("{value:.1}") };
                    let message = format!("{}: {} {key} {number}", document.display(), row["name"]);
                    assert!(text.contains(&number), "{message} of {record} is not quoted");
                }
                count += 1;
            }
        }
    }
    assert!(count > 0, "no record is quoted");
}

#[test]
fn the_front_page_quotes_the_step_with_orthogonalised_matrices() {
    let named = |record: &Value, name: &str| {
        rows(record, "rows").iter().find(|row| row["name"] == name).cloned().unwrap()
    };
    let cpu = named(&record("amd-epyc-2-cores/2026-11-27-optimizer.json"), "velvet, orthogonal");
    let gpu = record("nvidia-h200/2026-11-28-optimizer-cuda.json");
    let gpu = named(&gpu, "velvet orthogonal hidden, clip");
    let cells = [
        format!("{:.2}", number(&gpu, "alone_milliseconds")),
        format!("{:.1}", number(&cpu, "milliseconds")),
        format!("{:.1}", number(&cpu, "times_faster_than_candle_adamw")),
    ];
    has_row("README.md", &cells);
}

#[test]
fn quoted_areas_of_metacognition_are_those_of_their_records() {
    let text = read(&root().join("docs/src/metacognition.md"));
    let mut count = 0;
    for name in ["tinystories", "stories"] {
        let file = format!("benches/record/amd-epyc-2-cores/2026-11-25-metacognition-{name}.json");
        let record: Record = serde_json::from_str(&read(&root().join(file))).unwrap();
        // The tables that the example prints have a leading zero, the book's have none.
        let tables = record.tables().replace("0.", ".");
        for row in tables.lines().filter(|line| line.contains("head: ") || line.starts_with("| entropy |")) {
            let area = row.split('|').nth(2).and_then(|cell| cell.split_once(" ±"));
            let Some(area) = area.map(|(mean, _)| mean.trim()).filter(|mean| mean.len() == 5) else {
                continue;
            };
            assert!(text.contains(area), "{name}: {area} is not quoted, of {row}");
            count += 1;
        }
    }
    assert!(count >= 2 * (6 + 2), "{count}");
}

#[test]
fn quoted_adapters_and_activations_on_a_gpu_are_those_of_their_record() {
    let record = record("nvidia-h200/2026-11-28-adapters-cuda.json");
    let mut count = 0;
    for f32 in rows(&record, "costs").iter().filter(|row| row["dtype"] == "F32") {
        let other = |row: &&Value| row["dtype"] == "BF16" && row["kind"] == f32["kind"];
        let bf16 = rows(&record, "costs").iter().find(other).unwrap();
        let percent = |row| match number(row, "percent_more") {
            many if many >= 100.0 => format!("{many:.0} %"),
            few => format!("{few:.1} %"),
        };
        let time = |row| short(number(row, "adapted_ms"), 3);
        let cells = [time(f32), percent(f32), time(bf16), percent(bf16)];
        for document in ["docs/src/results.md", "flylora/README.md"] {
            has_row(document, &cells);
            count += 1;
        }
    }
    for row in rows(&record, "products") {
        let keys = [
            "routed_ms",
            "dense_ms",
            "forward_ms",
            "dense_forward_ms",
            "forward_and_backward_ms",
            "dense_forward_and_backward_ms",
        ];
        let cells = keys.map(|key| short(number(row, key), 3));
        for document in ["docs/src/results.md", "flylora/README.md"] {
            has_row(document, &cells);
            count += 1;
        }
    }
    for pass in ["forward", "backward", "gated", "gated backward"] {
        let shares = rows(&record, "passes").iter().filter(|row| row["pass"] == pass);
        let mut shares: Vec<f64> = shares.map(|row| number(row, "share_of_copy")).collect();
        shares.sort_by(f64::total_cmp);
        let (least, most) = (short(shares[0], 3), short(shares[shares.len() - 1], 3));
        has_row("era-act/README.md", &[format!("{least} to {most}")]);
        has_row("docs/src/results.md", &[least, most]);
        count += 2;
    }
    assert!(count > 40, "{count}");
}

#[test]
fn quoted_products_of_adapters_on_a_cpu_are_those_of_their_record() {
    let record = record("amd-epyc-2-cores/2026-11-26-adapters.json");
    for row in rows(&record, "products") {
        let of = |key, digits: usize| format!("{:.digits$}", number(row, key));
        let forward = [of("sparse_forward_ms", 2), of("dense_forward_ms", 2)];
        let both = [of("sparse_forward_and_backward_ms", 1), of("dense_forward_and_backward_ms", 1)];
        has_row("flylora/README.md", &[forward, both].concat());
    }
    let text = read(&root().join("flylora/README.md"));
    for row in rows(&record, "costs") {
        let time = format!("{:.1}", number(row, "adapted_ms"));
        let percent = format!("{:.0} %", number(row, "percent_more"));
        assert!(
            text.contains(&time) && text.contains(&percent),
            "{row}: {time} and {percent} are not quoted"
        );
    }
}

#[test]
fn quoted_training_on_a_cpu_is_that_of_its_record() {
    let record = record("amd-epyc-2-cores/2026-11-27-model-cpu.json");
    let training = rows(&record, "training");
    assert_eq!(training.len(), 4);
    for row in training {
        let (preset, f32) = (row["preset"].as_str().unwrap(), row["compute"] == "F32");
        let speed = format!("{:.0}", number(row, "tokens_per_s"));
        // "torch train small cpu f32 eager B4 T128 params 22.9M step 526.97 ms 972 tok/s", and the same with settings.
        let dtype = if f32 { " f32 " } else { " bf16 " };
        let peers = rows(&record, "peers").iter().filter_map(Value::as_str);
        let peers = peers.filter(|peer| peer.contains(preset) && peer.contains(dtype));
        let peers = peers.map(|peer| {
            let words: Vec<&str> = peer.split_whitespace().collect();
            words[words.iter().position(|word| *word == "tok/s").unwrap() - 1].to_owned()
        });
        let [plain, kept]: [String; 2] = peers.collect::<Vec<_>>().try_into().unwrap();
        let step = format!("{:.0}", number(row, "step_ms"));
        has_row("docs/src/results.md", &[speed.clone(), step, plain.clone(), kept.clone()]);
        has_row("vesper-model/README.md", &[speed.clone(), plain.clone(), kept.clone()]);
        has_row("docs/src/ops.md", &[speed.clone(), plain.clone()]);
        let front = read(&root().join("README.md"));
        let front = front.lines().find(|line| line.starts_with(&format!("| CPU, `{preset}`"))).unwrap();
        assert!(
            front.contains(&speed) && front.contains(&plain),
            "{front}: {speed} and {plain} are not quoted"
        );
    }
}

#[test]
fn quoted_training_on_a_gpu_is_that_of_its_record() {
    let record = record("nvidia-h200/2026-11-28-model.json");
    let other = self::record("nvidia-h100-80gb-hbm3/2026-11-28-model.json");
    let long = |record: &Value| -> Vec<(bool, Value)> {
        let of_this = record["machine"] == "nvidia-h200";
        let long = rows(record, "training").iter().filter(|row| row["t"] == 1024);
        long.map(|row| (of_this, row.clone())).collect()
    };
    let mut count = 0;
    for (front, row) in &[long(&record), long(&other)].concat() {
        let tokens = number(row, "tokens_per_s");
        let speed =
            if tokens > 1e6 { format!("{:.2} M", tokens / 1e6) } else { format!("{:.0} k", tokens / 1e3) };
        let one = |key| format!("{:.1}", number(row, key));
        let gib = |key| format!("{:.2}", number(row, key));
        let memory = format!("{}, {} GiB", gib("memory_gib"), gib("captured_memory_gib"));
        let cells = [speed.clone(), one("step_ms"), one("captured_step_ms"), memory];
        has_row("docs/src/results.md", &cells);
        if *front {
            has_row("README.md", &[format!("{speed}, {} GiB", one("memory_gib"))]);
        }
        count += 1;
    }
    assert_eq!(count, 6);
    let text = read(&root().join("docs/src/results.md"));
    let copy = format!("{:.2} TB/s in that run", number(&record, "copy_tb_per_s"));
    let product = format!("{:.0} TFLOP/s", number(&record, "product_tflop_per_s"));
    assert!(text.contains(&copy) && text.contains(&product), "{copy} and {product} are not quoted");
}

#[test]
fn quoted_decoding_on_a_cpu_is_that_of_its_record() {
    let mut count = 0;
    for record in [
        "amd-epyc-2-cores/2026-11-27-decode.json",
        "amd-epyc-zen-4-2-cores/2026-11-27-decode.json",
        "amd-epyc-zen-3-2-cores/2026-11-28-decode.json",
    ] {
        let record = self::record(record);
        let speed = |row: &Value| format!("{:.0}", number(&row["decode"], "tokens_per_s"));
        for one in rows(&record, "decoding").iter().filter(|row| row["batch"] == 1) {
            let other = |row: &&Value| {
                row["batch"] == 8 && row["preset"] == one["preset"] && row["compute"] == one["compute"]
            };
            let eight = rows(&record, "decoding").iter().find(other).unwrap();
            let weights = match one["compute"].as_str().unwrap() {
                plain @ ("F32" | "BF16") => plain.to_lowercase(),
                blocks => blocks.to_uppercase(),
            };
            let preset = one["preset"].as_str().unwrap().to_owned();
            has_row("docs/src/results.md", &[preset, weights, speed(one), speed(eight)]);
            count += 1;
        }
    }
    assert_eq!(count, 18 + 12 + 12);
}

#[test]
fn quoted_decoding_on_a_gpu_is_that_of_its_record() {
    let record = record("nvidia-h200/2026-11-28-decode.json");
    let speed = |compute: &Value, batch: usize, step: &str| {
        let found = rows(&record, "decoding")
            .iter()
            .find(|row| row["compute"] == *compute && row["batch"] == batch && row["step"] == step);
        format!("{:.0}", number(&found.unwrap()["decode"], "tokens_per_s"))
    };
    let all: BTreeSet<&str> =
        rows(&record, "decoding").iter().map(|row| row["compute"].as_str().unwrap()).collect();
    for compute in &all {
        let weights = match *compute {
            plain @ ("F32" | "BF16") => plain.to_lowercase(),
            blocks => blocks.to_uppercase(),
        };
        let own = Value::from(*compute);
        let [one, eight, one_composed, eight_composed] =
            [(1, "fused"), (8, "fused"), (1, "composed"), (8, "composed")]
                .map(|(batch, step)| speed(&own, batch, step));
        let cells = [format!("Vesper, {weights}"), one, eight, one_composed, eight_composed];
        has_row("docs/src/results.md", &cells);
    }
    assert_eq!(all.len(), 5);
}

#[test]
fn quoted_perplexities_of_quantised_weights_are_those_of_their_record() {
    let record = record("intel-r-xeon-r-processor-16-cores/2026-11-27-quantize.json");
    let perplexity = |of: &Value, key: &str| number(&of["measured"], key);
    let before = perplexity(&record["before"], "perplexity");
    for of in rows(&record, "types") {
        let own = perplexity(of, "perplexity");
        let change = format!("{:.2} %", (own / before - 1.0) * 100.0);
        let cells = [
            format!("{own:.2}"),
            if change == "-0.00 %" { "0.00 %".into() } else { change },
            format!("{:.2}", perplexity(of, "perplexity_token_by_token")),
        ];
        has_row("docs/src/quantisation.md", &cells);
    }
    assert_eq!(rows(&record, "types").len(), 7);
}

/// The mean of some numbers, and their sample deviation.
fn spread(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (values.len() - 1) as f64).sqrt())
}

/// Numbers from the smallest to the largest, or the one that they all are.
fn range(values: &[f64], write: impl Fn(f64) -> String) -> String {
    let least = write(values.iter().copied().fold(f64::INFINITY, f64::min));
    let most = write(values.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    if least == most { most } else { format!("{least} to {most}") }
}

/// A count with a space before each three digits.
fn spaced(count: f64) -> String {
    let digits = format!("{count:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[test]
fn quoted_comparisons_of_adapters_are_those_of_their_records() {
    let names = [
        ("lora", "LoRA"),
        ("rslora", "rank-stabilised LoRA"),
        ("pissa", "PiSSA"),
        ("dora", "DoRA"),
        ("adalora", "AdaLoRA"),
        ("flylora", "FlyLoRA"),
        ("masked", "masked FlyLoRA"),
        ("full", "all weights"),
    ];
    let text = read(&root().join("docs/src/adapters.md"));
    let recorded = |bench: &str| {
        ["", "-seed-1", "-seed-2"]
            .map(|seed| record(&format!("amd-epyc-2-cores/2026-11-27-{bench}{seed}.json")))
    };
    let of = |seeds: &[Value; 3], method: &str, key: &str| {
        seeds.each_ref().map(|seed| {
            number(rows(seed, "methods").iter().find(|row| row["method"] == method).unwrap(), key)
        })
    };
    for bench in ["finetune", "finetune-nano"] {
        let seeds = recorded(bench);
        let before = format!("{:.3}", number(&seeds[0], "base_loss"));
        has_row("docs/src/adapters.md", &["none".into(), before]);
        for (method, name) in names {
            let of = |key| of(&seeds, method, key);
            let (loss, deviation) = spread(&of("held_out_loss"));
            let [trainable, ..] = of("trainable");
            let bytes = of("peak_bytes").into_iter().fold(0.0, f64::max);
            let cells = [
                name.into(),
                format!("{loss:.3} ± {}", short(deviation, 3)),
                range(&of("lr"), |rate| short(rate, 3).trim_end_matches('0').into()),
                spaced(trainable),
                range(&of("active_per_token"), spaced),
                format!("{:.1}", bytes / f64::from(1 << 20)),
                range(&of("seconds"), |seconds| format!("{seconds:.1}")),
            ];
            has_row("docs/src/adapters.md", &cells);
        }
    }
    // The next higher learning rate, for those that want the highest of the table.
    let higher = recorded("finetune-nano-higher");
    for (method, name) in [("adalora", "AdaLoRA"), ("flylora", "FlyLoRA")] {
        let losses = range(&of(&higher, method, "held_out_loss"), |loss| format!("{loss:.3}"));
        assert!(text.contains(&format!("{name} {losses}")), "{name} {losses} is not quoted");
        assert_eq!(of(&higher, method, "lr"), [0.1; 3]);
    }
    let higher = record("amd-epyc-2-cores/2026-11-27-finetune-higher.json");
    let [ada, fly] = ["adalora", "flylora"].map(|method| {
        let row = rows(&higher, "methods").iter().find(|row| row["method"] == method).unwrap();
        let of = rows(row, "tried").iter().find(|tried| tried[0] == 0.1).unwrap();
        format!("{:.3}", of[1].as_f64().unwrap())
    });
    assert!(text.contains(&format!("{ada} and {fly}")), "{ada} and {fly} are not quoted");
}
