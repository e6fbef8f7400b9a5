#[cfg(unix)]
use crate::program::interrupted;
use crate::program::{fails, files, folder, json, number, succeeds};

#[test]
fn both_optimizers_are_compared() {
    let folder = folder();
    let args = [
        "--data",
        "text.txt",
        "--steps",
        "3",
        "--batch",
        "2",
        "--seq",
        "32",
        "--lrs",
        "1e-3,4e-3",
        "--seeds",
        "1",
        "--out",
        "result",
    ];
    let stdout = succeeds("benchmark", folder.path(), &args);
    for part in ["AdamW (candle)", "Velvet", "lr 0.001", "lr 0.004", "optimizer step", "orthogonalises"] {
        assert!(stdout.contains(part), "no `{part}` in {stdout}");
    }
    let result = folder.path().join("result");
    assert_eq!(files(&result), ["benchmark.json", "benchmark.svg", "cache"]);
    let report = json(&result.join("benchmark.json"));
    let outcomes = report["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 4);
    for name in ["adamw", "velvet"] {
        let mine: Vec<_> = outcomes.iter().filter(|o| o["optimizer"] == name).collect();
        assert_eq!(mine.len(), 2, "{name}");
        for outcome in mine {
            assert!(number(&outcome["eval_loss"]) > 0.0 && number(&outcome["optimizer_seconds"]) > 0.0);
        }
    }
    let svg = std::fs::read_to_string(result.join("benchmark.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("AdamW") && svg.contains("Velvet"));
    // Results are not replaced.
    fails("benchmark", folder.path(), &args, &["--out result", "benchmark.json"]);
}

#[test]
fn a_run_that_diverges_loses() {
    let folder = folder();
    let args = [
        "--data",
        "text.txt",
        "--steps",
        "12",
        "--batch",
        "1",
        "--seq",
        "16",
        "--lrs",
        "1e-3,1e20",
        "--seeds",
        "1",
        "--out",
        "result",
    ];
    let stdout = succeeds("benchmark", folder.path(), &args);
    // Velvet's trust region holds at any rate, so that only AdamW's run is sure to diverge.
    assert!(stdout.contains("NaN") && stdout.contains("AdamW (candle): best at lr 0.001"), "{stdout}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_comparison_with_a_line_and_no_folder() {
    let folder = folder();
    let args = ["--data", "text.txt", "--steps", "1000000", "--batch", "1", "--seq", "16", "--lrs", "1e-3"];
    let output = interrupted("benchmark", folder.path(), &args, "runs/benchmark-1/cache/*");
    assert_eq!((output.code, output.stderr.as_str()), (Some(130), ""));
    assert!(
        output.stdout.ends_with("Stopped before the comparison had ended: nothing is kept\n"),
        "{output:?}"
    );
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn wrong_flags_are_one_line() {
    let folder = folder();
    for (args, parts) in [
        (&["--size", "huge"][..], &["huge", "nano, tiny, small, medium, large"][..]),
        (&["--lrs", "0"], &["--lrs 0"]),
        (&["--lrs", "-1e-3"], &["--lrs -0.001"]),
        (&["--batch", "18446744073709551615"], &["--batch 18446744073709551615", "2^32"]),
        (&["--seeds", "0"], &["--seeds"]),
        (&["--steps", "0"], &["--steps 0"]),
        (&["--device", "gpu"], &["--device gpu"]),
        (&["--data", "missing.txt"], &["missing.txt"]),
    ] {
        fails("benchmark", folder.path(), args, parts);
    }
}
