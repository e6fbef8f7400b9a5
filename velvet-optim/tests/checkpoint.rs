//! The state file: nothing is lost, nothing damaged is taken.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, config, named, record_warnings, store, tensor, train, var};
use proptest::prelude::*;
use std::path::Path;
use velvet_optim::{
    Averaging, BackendChoice, Error, GradClip, Lion, NonFinite, Optimizer, ParamGroup, Rule, StateFormat,
    Training, Velvet, VelvetConfig, WeightAverage,
};

const SHAPES: [&[usize]; 5] = [&[7, 13], &[1], &[0], &[], &[65_539]];

fn copy(vars: &[(String, Var)]) -> Vec<(String, Var)> {
    vars.iter()
        .map(|(name, var)| (name.clone(), Var::from_tensor(&var.copy().unwrap().detach()).unwrap()))
        .collect()
}

fn adaptive() -> VelvetConfig {
    VelvetConfig::language_model(8192).with_clip(GradClip::GlobalNorm(1.0))
}

#[test]
fn twenty_steps_saved_loaded_and_twenty_more_equal_forty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let config = adaptive().with_backend(backend);
            let whole = named(&SHAPES, dtype);
            let mut opt = Velvet::named(whole.clone(), config.clone()).unwrap();
            train(&mut opt, &whole, 1, 40);

            let first = named(&SHAPES, dtype);
            let mut saved = Velvet::named(first.clone(), config.clone()).unwrap();
            train(&mut saved, &first, 1, 20);
            saved.set_learning_rate(saved.learning_rate());
            saved.save(&path).unwrap();
            let second = copy(&first);
            let mut resumed = Velvet::named(second.clone(), config.with_lr(123.0)).unwrap();
            resumed.load(&path).unwrap();
            assert_eq!(resumed.stats().unwrap(), saved.stats().unwrap());
            assert_eq!(all_bits(&resumed), all_bits(&saved));
            train(&mut resumed, &second, 21, 20);
            assert_eq!(resumed.stats().unwrap(), opt.stats().unwrap());
            assert!(all_bits(&resumed) == all_bits(&opt), "{backend:?} {dtype:?}");
        }
    }
}

#[test]
fn a_state_moves_between_back_ends_and_parameter_types() {
    let vars = named(&SHAPES, DType::F32);
    let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
    train(&mut opt, &vars, 1, 3);
    let bytes = opt.to_bytes().unwrap();
    let plain = adaptive().with_backend(BackendChoice::Plain);
    let mut other = Velvet::named(named(&SHAPES, DType::BF16), plain).unwrap();
    other.load_bytes(&bytes).unwrap();
    for (name, tensor) in opt.state().unwrap() {
        assert_eq!(common::bits(&other.state().unwrap()[&name]), common::bits(&tensor));
    }
}

#[test]
fn masks_are_saved_and_a_resumed_run_keeps_them() {
    let mask = |cut: usize| {
        let kept: Vec<u8> = (0..7 * 13).map(|i| u8::from(i % cut != 0)).collect();
        Tensor::from_vec(kept, (7, 13), &Device::Cpu).unwrap()
    };
    for dtype in [DType::F32, DType::BF16] {
        let shapes: [&[usize]; 2] = [&[7, 13], &[5]];
        let whole = named(&shapes, dtype);
        let mut opt = Velvet::named(whole.clone(), adaptive()).unwrap();
        let name = whole[0].0.as_str();
        opt.set_mask(name, Some(&mask(3))).unwrap();
        train(&mut opt, &whole, 1, 3);
        let bytes = opt.to_bytes().unwrap();

        let rest = copy(&whole);
        let mut resumed = Velvet::named(rest.clone(), adaptive()).unwrap();
        resumed.set_mask(name, Some(&mask(2))).unwrap(); // the saved one takes its place
        for ((_, var), (_, saved)) in rest.iter().zip(&whole) {
            var.set(saved.as_tensor()).unwrap();
        }
        resumed.load_bytes(&bytes).unwrap();
        assert_eq!(all_bits(&resumed), all_bits(&opt));
        train(&mut opt, &whole, 4, 3);
        train(&mut resumed, &rest, 4, 3);
        assert_eq!(all_bits(&resumed), all_bits(&opt));
        let values = common::bits(&rest[0].1);
        assert!(values.iter().enumerate().all(|(i, &x)| (x == 0) == (i % 3 == 0)), "{values:?}");

        let others: [&[usize]; 2] = [&[13, 7], &[5]];
        let mut other = Velvet::named(named(&others, dtype), adaptive()).unwrap();
        assert!(other.load_bytes(&bytes).is_err());
    }
}

#[test]
fn a_mask_that_the_saved_run_did_not_have_is_applied_to_what_is_loaded() {
    for format in [StateFormat::Full, StateFormat::Blockwise8] {
        let shapes: [&[usize]; 1] = [&[70, 65]];
        let config = config().with_state_format(format);
        let saved = named(&shapes, DType::F32);
        let mut opt = Velvet::named(saved.clone(), config.clone()).unwrap();
        train(&mut opt, &saved, 1, 3);
        let bytes = opt.to_bytes().unwrap();

        let vars = named(&shapes, DType::F32);
        let mut masked = Velvet::named(vars.clone(), config).unwrap();
        let kept: Vec<u8> = (0..70 * 65).map(|i| u8::from(i % 3 != 0)).collect();
        let mask = Tensor::from_vec(kept, (70, 65), &Device::Cpu).unwrap();
        masked.set_mask("w0", Some(&mask)).unwrap();
        vars[0].1.set(saved[0].1.as_tensor()).unwrap(); // weights of a run without a mask
        masked.load_bytes(&bytes).unwrap();
        train(&mut masked, &vars, 4, 2);
        let values = common::bits(&vars[0].1);
        assert!(values.iter().enumerate().all(|(i, &x)| (x == 0) == (i % 3 == 0)), "{format:?}");
    }
}

#[test]
fn a_parameter_that_is_frozen_at_the_resume_goes_on_with_its_moments_when_it_is_thawed() {
    let frozen = |config: VelvetConfig| {
        config.with_group(ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w0"]) })
    };
    for dtype in [DType::F32, DType::BF16] {
        let whole = named(&SHAPES, dtype);
        let mut opt = Velvet::named(whole.clone(), adaptive()).unwrap();
        train(&mut opt, &whole, 1, 3);
        opt.set_config(frozen(adaptive())).unwrap();
        train(&mut opt, &whole, 4, 2);
        let bytes = opt.to_bytes().unwrap();

        let rest = copy(&whole);
        let mut resumed = Velvet::named(rest.clone(), frozen(adaptive())).unwrap();
        resumed.load_bytes(&bytes).unwrap();
        assert_eq!(resumed.to_bytes().unwrap(), bytes);
        for (opt, vars) in [(&mut opt, &whole), (&mut resumed, &rest)] {
            opt.set_config(adaptive()).unwrap();
            train(opt, vars, 6, 2);
        }
        assert_eq!(all_bits(&resumed), all_bits(&opt));

        // Under another rule there is nothing to keep, and a frozen parameter is no reason to refuse.
        let lion = config().with_hidden_matrices(Rule::Lion(Lion::default()));
        let group = ParamGroup { rule: Some(Rule::Lion(Lion::default())), ..ParamGroup::of(["w0"]) };
        let other = ParamGroup { training: Training::Frozen, ..group };
        let mut other = Velvet::named(copy(&whole), VelvetConfig { groups: vec![other], ..lion }).unwrap();
        other.load_bytes(&bytes).unwrap();
        assert!(!other.state().unwrap().keys().any(|key| key.starts_with("w0")));
    }
}

#[test]
fn equal_states_give_equal_bytes() {
    let make = || {
        let vars = named(&SHAPES, DType::F32);
        let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
        train(&mut opt, &vars, 1, 2);
        opt.to_bytes().unwrap()
    };
    assert_eq!(make(), make());
}

#[test]
fn a_file_has_the_bytes_of_to_bytes_and_replaces_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    std::fs::write(&path, "an older file").unwrap();
    let opt = Velvet::named(named(&SHAPES, DType::F32), config()).unwrap();
    opt.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), opt.to_bytes().unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn parameters_with_missing_gradients_resume_with_their_own_correction() {
    let run = |resume: bool| {
        let mut vars = named(&[&[3], &[4]], DType::F32);
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        record_warnings(&mut opt);
        for step in 0..6 {
            if resume && step == 3 {
                let bytes = opt.to_bytes().unwrap();
                vars = copy(&vars);
                opt = Velvet::named(vars.clone(), config()).unwrap();
                opt.load_bytes(&bytes).unwrap();
                record_warnings(&mut opt);
            }
            let grads = vars.iter().take(if step % 2 == 0 { 1 } else { 2 });
            opt.try_step(&store(grads.map(|(_, v)| (v, tensor(step, v.dims(), DType::F32))))).unwrap();
        }
        all_bits(&opt)
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn unnamed_parameters_in_another_order_get_their_own_state_back() {
    let vars: Vec<Var> = (1..7).map(|i| var(i, &[3, 4], DType::F32)).collect();
    let grads = |vars: &[&Var], step: u64| {
        store(
            vars.iter()
                .zip(0..)
                .map(|(v, i)| (*v, tensor(step * 10 + i, &[3, 4], DType::F32)))
                .collect::<Vec<_>>(),
        )
    };
    let in_order: Vec<&Var> = vars.iter().collect();
    let mut opt = Velvet::new(vars.clone(), config()).unwrap();
    opt.try_step(&grads(&in_order, 1)).unwrap();
    let bytes = opt.to_bytes().unwrap();

    let again: Vec<Var> =
        vars.iter().map(|v| Var::from_tensor(&v.copy().unwrap().detach()).unwrap()).collect();
    let shuffled: Vec<Var> = [4, 2, 0, 5, 1, 3].iter().map(|&i| again[i].clone()).collect();
    let mut resumed = Velvet::new(shuffled, config()).unwrap();
    let warnings = record_warnings(&mut resumed);
    resumed.load_bytes(&bytes).unwrap();
    assert!(warnings.lock().unwrap().is_empty());
    opt.try_step(&grads(&in_order, 2)).unwrap();
    resumed.try_step(&grads(&again.iter().collect::<Vec<_>>(), 2)).unwrap();
    for (a, b) in vars.iter().zip(&again) {
        assert_eq!(common::bits(a), common::bits(b));
    }
}

#[test]
fn unnamed_parameters_with_other_values_go_by_position_with_a_warning() {
    let vars = vec![var(1, &[3], DType::F32), var(2, &[3], DType::F32)];
    let mut opt = Velvet::new(vars.clone(), config()).unwrap();
    opt.try_step(&store(vars.iter().map(|v| (v, v.ones_like().unwrap())))).unwrap();
    let mut other = Velvet::new(vec![var(8, &[3], DType::F32), var(9, &[3], DType::F32)], config()).unwrap();
    let warnings = record_warnings(&mut other);
    other.load_bytes(&opt.to_bytes().unwrap()).unwrap();
    assert!(warnings.lock().unwrap()[0].contains("by position"));
    let (ours, theirs) = (other.state().unwrap(), opt.state().unwrap());
    for (name, tensor) in &theirs {
        assert_eq!(common::bits(&ours[name]), common::bits(tensor));
    }
    let mut wrong = Velvet::new(vec![var(8, &[3], DType::F32), var(9, &[4], DType::F32)], config()).unwrap();
    record_warnings(&mut wrong);
    let error = wrong.load_bytes(&opt.to_bytes().unwrap()).unwrap_err().to_string();
    assert_eq!(error, "state bytes: `param.00001`: expected shape [4], got [3]");
}

#[test]
fn unnamed_parameters_of_equal_values_are_refused_only_where_it_matters() {
    let ones = || Var::ones(3, DType::F32, &Device::Cpu).unwrap();
    let other = || var(1, &[3], DType::F32);
    // Equal values and equal (empty) states: any assignment is right.
    let fresh = Velvet::new(vec![ones(), ones(), other()], config()).unwrap().to_bytes().unwrap();
    let mut reordered = Velvet::new(vec![other(), ones(), ones()], config()).unwrap();
    reordered.load_bytes(&fresh).unwrap();
    // Equal values after steps on unequal gradients: the states differ.
    let vars = vec![ones(), ones(), other()];
    let mut opt = Velvet::new(vars.clone(), config().with_lr(0.0)).unwrap();
    opt.try_step(&store(vars.iter().zip(0..).map(|(v, i)| (v, tensor(i, &[3], DType::F32))))).unwrap();
    let bytes = opt.to_bytes().unwrap();
    let before = all_bits(&reordered);
    let error = reordered.load_bytes(&bytes).unwrap_err().to_string();
    assert!(error.contains("from_varmap"), "{error}");
    assert_eq!(all_bits(&reordered), before);
    // In the same order there is no question.
    Velvet::new(vec![ones(), ones(), other()], config()).unwrap().load_bytes(&bytes).unwrap();
    // Equal values and moments, but one has a mask.
    let zeros = || Var::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let mut masked = Velvet::new(vec![zeros(), zeros(), other()], config()).unwrap();
    masked.set_mask("param.00000", Some(&Tensor::new(&[1u8, 0, 1], &Device::Cpu).unwrap())).unwrap();
    let bytes = masked.to_bytes().unwrap();
    let mut reordered = Velvet::new(vec![other(), zeros(), zeros()], config()).unwrap();
    assert!(reordered.load_bytes(&bytes).unwrap_err().to_string().contains("from_varmap"));
}

/// Loads `bytes`, expects an error, and that nothing changed.
fn refused(opt: &mut Velvet, bytes: &[u8]) -> String {
    let (before, stats, lr) = (all_bits(opt), opt.stats().unwrap(), opt.learning_rate());
    let error = opt.load_bytes(bytes).unwrap_err().to_string();
    assert_eq!((all_bits(opt), opt.stats().unwrap(), opt.learning_rate()), (before, stats, lr));
    error
}

#[test]
fn other_parameters_are_refused_by_name() {
    let bytes = Velvet::named(named(&[&[3], &[4]], DType::F32), config()).unwrap().to_bytes().unwrap();
    let lion = config().with_rule(Rule::Lion(Lion::default()));
    let rename = |names: [&str; 2], shapes: [&[usize]; 2], dtype| {
        let vars = names.iter().zip(shapes).map(|(n, s)| ((*n).to_owned(), var(1, s, dtype))).collect();
        Velvet::named(vars, config()).unwrap()
    };
    let error = refused(&mut rename(["w0", "x"], [&[3], &[4]], DType::F32), &bytes);
    assert_eq!(error, "state bytes: the state lacks x, and has w1 that the optimizer lacks");
    let error = refused(&mut rename(["w0", "w1"], [&[3], &[2, 2]], DType::F32), &bytes);
    assert_eq!(error, "state bytes: `w1`: expected shape [2, 2], got [4]");
    let error = refused(&mut Velvet::named(named(&[&[3], &[4]], DType::F32), lion).unwrap(), &bytes);
    assert_eq!(error, "state bytes: `w0`: expected update rule lion, got adamw");
    let mut unnamed =
        Velvet::new(vec![var(1, &[3], DType::F32), var(2, &[4], DType::F32)], config()).unwrap();
    let error = refused(&mut unnamed, &bytes);
    assert_eq!(error, "state bytes: `header`: expected parameters by position, got with names");
    let error = refused(&mut rename(["w0", "w1"], [&[3], &[4]], DType::F32), &unnamed.to_bytes().unwrap());
    assert_eq!(error, "state bytes: `header`: expected parameters with names, got by position");
    let error = refused(&mut Velvet::new(vec![], config()).unwrap(), &unnamed.to_bytes().unwrap());
    assert_eq!(error, "state bytes: `header`: expected number of parameters 0, got 2");
}

#[test]
fn files_that_are_not_a_state_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut opt = Velvet::named(named(&[&[3]], DType::F32), config()).unwrap();
    let mut error_of = |name: &str, bytes: Option<&[u8]>| {
        let path = folder.path().join(name);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).unwrap();
        }
        let error = opt.load(&path).unwrap_err().to_string();
        assert!(error.starts_with(&*path.display().to_string()), "{error}");
        error
    };
    error_of("absent", None);
    for (name, bytes) in [("empty", &b""[..]), ("text", b"hello, this is a letter and no tensor")] {
        assert!(error_of(name, Some(bytes)).contains("not a whole safetensors file"));
    }
    let whole = Velvet::named(named(&[&[3]], DType::F32), config()).unwrap().to_bytes().unwrap();
    assert!(error_of("cut", Some(&whole[..whole.len() - 1])).contains("not a whole safetensors file"));
    let foreign = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let path = folder.path().join("foreign");
    candle_core::safetensors::save(&[("w", foreign)].into(), &path).unwrap();
    assert!(error_of("foreign", None).contains("no `velvet-optim`"));
    // Same length, so that the rest of the file stays whole.
    let text = String::from_utf8_lossy(&whole).into_owned();
    assert!(text.contains(r#"\"format\":2,"#));
    let at = text.find(r#"\"format\":2,"#).unwrap() + r#"\"format\":"#.len();
    let mut newer = whole.clone();
    newer[at] = b'3';
    assert!(error_of("newer", Some(&newer)).contains("`header`: expected format 2, got 3"));
}

/// The bytes of a state with another header; `edit` gets its text.
fn with_header(bytes: &[u8], edit: impl Fn(&str) -> String) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut outer: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let header = &mut outer["__metadata__"]["velvet-optim"];
    let edited = edit(header.as_str().unwrap());
    assert_ne!(header.as_str().unwrap(), edited);
    *header = edited.into();
    let mut text = outer.to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[8 + len..]].concat()
}

/// The bytes of a state with another first element of a tensor.
fn with_element(bytes: &[u8], key: &str, element: &[u8]) -> Vec<u8> {
    let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let at = tensors.tensor(key).unwrap().data().as_ptr().addr() - bytes.as_ptr().addr();
    let mut bytes = bytes.to_vec();
    bytes[at..at + element.len()].copy_from_slice(element);
    bytes
}

#[test]
fn an_array_that_no_parameter_has_is_refused_by_its_key() {
    let vars = named(&[&[3, 4], &[70, 65]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config().with_state_format(StateFormat::Blockwise8)).unwrap();
    opt.set_mask("w0", Some(&Tensor::ones((3, 4), DType::U8, &Device::Cpu).unwrap())).unwrap();
    train(&mut opt, &vars, 1, 2);
    let bytes = opt.to_bytes().unwrap();
    opt.load_bytes(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let data = [0u8; 12];
    for key in ["w2.exp_avg", "w0.momentum_buffer", "w0.exp_avg.codes.more", "w2.mask", "notes"] {
        let whole = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<_> = whole.tensors();
        let extra = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![3], &data).unwrap();
        tensors.push((key.to_owned(), extra));
        let more = safetensors::serialize(tensors, header.metadata().clone()).unwrap();
        let error = refused(&mut opt, &more);
        assert_eq!(error, format!("state bytes: `{key}`: no parameter of the state has this array"));
    }
}

#[test]
fn values_that_no_run_writes_are_refused_by_key() {
    let vars = named(&[&[3, 4], &[5]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
    train(&mut opt, &vars, 1, 2);
    let bytes = opt.to_bytes().unwrap();
    let largest = |text: &str, key: &str, now: u64| {
        text.replace(&format!(r#""{key}":{now}"#), &format!(r#""{key}":{}"#, u64::MAX))
    };
    for (edited, expected) in [
        (
            with_header(&bytes, |text| text.replace(r#""name":"w1""#, r#""name":"w0""#)),
            "`header`: it has two parameters of one name",
        ),
        (with_header(&bytes, |text| largest(text, "step", 2)), "`step`: expected a number up to 2^53"),
        (with_header(&bytes, |text| largest(text, "skipped", 0)), "`skipped`: expected a number up to 2^53"),
        (
            with_header(&bytes, |text| largest(text, "ignored_losses", 0)),
            "`ignored_losses`: expected a number up to 2^53",
        ),
        (
            with_element(&bytes, "w1.exp_avg_sq", &(-1f32).to_le_bytes()),
            "`w1.exp_avg_sq`: expected numbers of at least 0",
        ),
        (
            with_element(&bytes, "w0.row_sq", &(-1f32).to_le_bytes()),
            "`w0.row_sq`: expected numbers of at least 0",
        ),
        (
            with_element(&bytes, "beta_products", &f64::NAN.to_le_bytes()),
            "`beta_products`: expected numbers in [0, 1]",
        ),
    ] {
        let error = refused(&mut opt, &edited);
        assert!(error.contains(expected), "{error}");
    }
    // A mask is 0 or not 0.
    opt.set_mask("w1", Some(&Tensor::ones(5, DType::U8, &Device::Cpu).unwrap())).unwrap();
    let marked = with_element(&opt.to_bytes().unwrap(), "w1.mask", &[255]);
    let run = |bytes: &[u8]| {
        let vars = copy(&vars);
        let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
        opt.load_bytes(bytes).unwrap();
        train(&mut opt, &vars, 3, 1);
        all_bits(&opt)
    };
    assert_eq!(run(&marked), run(&bytes));
}

#[test]
fn saving_into_a_folder_that_is_not_there_names_the_file() {
    let opt = Velvet::named(named(&[&[3]], DType::F32), config()).unwrap();
    let path = Path::new("no-such-folder").join("state");
    match opt.save(&path) {
        Err(Error::Io { path: named, .. }) => assert_eq!(named, path),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_learning_rate_that_could_not_be_loaded_is_not_saved_and_the_old_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut opt = Velvet::named(named(&[&[3]], DType::F32), config()).unwrap();
    opt.save(&path).unwrap();
    let old = std::fs::read(&path).unwrap();
    for lr in [f64::NAN, f64::INFINITY, -1.0] {
        opt.set_learning_rate(lr);
        assert!(matches!(opt.save(&path), Err(Error::LearningRate { step: 1, .. })));
        assert!(matches!(opt.to_bytes(), Err(Error::LearningRate { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), old);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    opt.set_learning_rate(0.5);
    opt.save(&path).unwrap();
    opt.load(&path).unwrap();
}

#[test]
fn skips_and_ignored_losses_are_kept() {
    let vars = named(&[&[3]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config().with_non_finite(NonFinite::Skip)).unwrap();
    opt.observe_value(f64::NAN);
    opt.try_step(&store([(&vars[0].1, Tensor::new(&[f32::NAN; 3], &Device::Cpu).unwrap())])).unwrap();
    let mut other = Velvet::named(copy(&vars), config()).unwrap();
    other.load_bytes(&opt.to_bytes().unwrap()).unwrap();
    assert_eq!((other.stats().unwrap().skipped, other.stats().unwrap().ignored_losses), (1, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn damaged_bytes_never_panic_and_never_half_load(
        cut in prop::option::of(0usize..4000),
        flips in prop::collection::vec((0usize..4000, 1u8..=255), 0..4),
    ) {
        let vars = named(&[&[3, 5], &[4]], DType::F32);
        let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
        train(&mut opt, &vars, 1, 1);
        let mut bytes = opt.to_bytes().unwrap();
        let whole = bytes.clone();
        for (at, mask) in flips {
            let len = bytes.len();
            bytes[at % len] ^= mask;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut % bytes.len());
        }
        let mut target = Velvet::named(copy(&vars), adaptive()).unwrap();
        let before = (all_bits(&target), target.stats().unwrap());
        if target.load_bytes(&bytes).is_err() {
            prop_assert!(bytes != whole);
            prop_assert_eq!((all_bits(&target), target.stats().unwrap()), before);
        }
    }
}

#[cfg(unix)]
#[test]
fn a_state_file_has_the_permissions_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    let (state, average, other) =
        (folder.path().join("state"), folder.path().join("average"), folder.path().join("other"));
    std::fs::write(&other, "text").unwrap();
    Velvet::named(named(&[&[3]], DType::F32), config()).unwrap().save(&state).unwrap();
    assert_eq!(mode(&state), mode(&other));
    let variables = named(&[&[3]], DType::F32).into_iter().map(|(_, var)| var).collect();
    WeightAverage::new(variables, Averaging::Tail { start: 0 }).unwrap().save(&average).unwrap();
    assert_eq!(mode(&average), mode(&other));
}
