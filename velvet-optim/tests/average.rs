//! Averages of the weights.

#![allow(clippy::unwrap_used, reason = "a test stops there")]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use velvet_optim::{Averaging, Error, WeightAverage};

const EMA: Averaging = Averaging::Ema { decay: 0.9, start: 0 };

fn var(values: &[f32], dtype: DType) -> Var {
    Var::from_tensor(&Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap()
}

fn set(var: &Var, values: &[f32]) {
    var.set(&Tensor::new(values, &Device::Cpu).unwrap().to_dtype(var.dtype()).unwrap()).unwrap();
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn averages(average: &WeightAverage) -> Vec<(String, DType, Vec<f64>)> {
    average.averages().map(|(name, t)| (name.to_owned(), t.dtype(), values(t))).collect()
}

fn named(dtype: DType) -> Vec<(String, Var)> {
    vec![("b".to_owned(), var(&[1.0, -2.0], dtype)), ("a".to_owned(), var(&[0.5], dtype))]
}

#[test]
fn an_ema_begins_with_the_first_weights_and_follows_its_formula() {
    let w = var(&[1.0, -3.0], DType::F64);
    let mut average = WeightAverage::new(vec![w.clone()], Averaging::Ema { decay: 0.9, start: 2 }).unwrap();
    let mut expected = [0f64; 2];
    for update in 1..=10u8 {
        let new = [f32::from(update), f32::from(update) * -0.5];
        set(&w, &new);
        average.update().unwrap();
        for (expected, new) in expected.iter_mut().zip(new) {
            *expected = if update == 3 { new.into() } else { 0.9 * *expected + 0.1 * f64::from(new) };
        }
        assert_eq!(average.has_begun(), update > 2);
        if update > 2 {
            let (_, dtype, got) = averages(&average).remove(0);
            assert_eq!(dtype, DType::F64);
            assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-14), "{got:?} {expected:?}");
        }
    }
    assert_eq!(average.updates(), 10);
}

#[test]
fn a_tail_average_is_the_mean_of_the_weights_since_its_start() {
    let w = var(&[0.0], DType::F32);
    let mut average = WeightAverage::new(vec![w.clone()], Averaging::Tail { start: 5 }).unwrap();
    for update in 1..=9u8 {
        set(&w, &[f32::from(update)]);
        average.update().unwrap();
    }
    let (_, dtype, got) = averages(&average).remove(0);
    assert_eq!(dtype, DType::F32);
    assert!((got[0] - 7.5).abs() < 1e-6, "{got:?}"); // of 6, 7, 8, 9
}

#[test]
fn averages_of_bf16_and_f16_weights_are_f32() {
    for dtype in [DType::BF16, DType::F16] {
        let w = var(&[1.0], dtype);
        let mut average =
            WeightAverage::new(vec![w.clone()], Averaging::Ema { decay: 0.999, start: 0 }).unwrap();
        average.update().unwrap();
        set(&w, &[2.0]);
        for _ in 0..100 {
            average.update().unwrap();
        }
        let (_, average_dtype, got) = averages(&average).remove(0);
        assert_eq!(average_dtype, DType::F32);
        // In bf16 no update would have moved it: .001 is less than half of its last place at 1.
        assert!((got[0] - (2.0 - 0.999f64.powi(100))).abs() < 1e-5, "{got:?}");
        let swapped = average.swap().unwrap();
        assert_eq!(w.dtype(), dtype);
        assert!((values(&w)[0] - got[0]).abs() < 0.004);
        swapped.restore().unwrap();
        assert_eq!(values(&w), [2.0]);
    }
}

#[test]
fn a_swap_is_seen_through_the_model_and_undone_by_drop_return_and_panic() {
    let w = var(&[1.0], DType::F32);
    let model = w.as_tensor().clone(); // a layer's handle on the same storage
    let mut average = WeightAverage::new(vec![w.clone()], EMA).unwrap();
    average.update().unwrap();
    set(&w, &[5.0]);
    {
        let _swapped = average.swap().unwrap();
        assert_eq!(values(&model), [1.0]);
    }
    assert_eq!(values(&model), [5.0]);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _swapped = average.swap().unwrap();
        assert_eq!(values(&model), [5.0], "an evaluation that fails");
    }));
    assert!(panicked.is_err());
    assert_eq!(values(&model), [5.0]);
    average.update().unwrap();
    let (_, _, got) = averages(&average).remove(0);
    assert!((got[0] - 1.4).abs() < 1e-6);
}

#[test]
fn before_the_average_has_begun_a_swap_keeps_the_weights() {
    let w = var(&[3.0], DType::F32);
    let mut average = WeightAverage::new(vec![w.clone()], Averaging::Tail { start: 10 }).unwrap();
    average.update().unwrap();
    assert!(!average.has_begun());
    let swapped = average.swap().unwrap();
    assert_eq!(values(&w), [3.0]);
    drop(swapped);
    assert_eq!(values(&w), [3.0]);
}

#[test]
fn a_leaked_guard_loses_nothing() {
    let w = var(&[1.0], DType::F32);
    let mut average = WeightAverage::new(vec![w.clone()], EMA).unwrap();
    average.update().unwrap();
    set(&w, &[5.0]);
    std::mem::forget(average.swap().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("average");
    average.save(&path).unwrap();
    let refused = [average.update().err(), average.swap().err(), average.load(&path).err()];
    for error in refused {
        assert!(error.unwrap().to_string().contains("call restore"));
    }
    average.restore().unwrap();
    assert_eq!(values(&w), [5.0]);
    average.update().unwrap();
    std::mem::forget(average.swap().unwrap());
    drop(average);
    assert_eq!(values(&w), [5.0]);
}

#[test]
fn a_run_that_is_saved_and_resumed_has_the_same_average() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("average.safetensors");
    for averaging in [EMA, Averaging::Tail { start: 3 }] {
        let (whole_vars, vars) = (named(DType::F32), named(DType::F32));
        let mut whole = WeightAverage::named(whole_vars.clone(), averaging).unwrap();
        let mut average = WeightAverage::named(vars.clone(), averaging).unwrap();
        for update in 1..=20u8 {
            for vars in [&whole_vars, &vars] {
                set(&vars[0].1, &[f32::from(update) * 0.3, 1.0 / f32::from(update)]);
                set(&vars[1].1, &[f32::from(update).sqrt()]);
            }
            whole.update().unwrap();
            average.update().unwrap();
            if update % 2 == 0 {
                // Before the tail has begun too.
                average.save(&path).unwrap();
                average = WeightAverage::named(vars.iter().rev().cloned(), averaging).unwrap();
                average.load(&path).unwrap();
                assert_eq!(average.updates(), u64::from(update));
            }
        }
        assert_eq!(averages(&average), averages(&whole));
        assert_eq!(average.averages().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
        // Equal averages give equal bytes, and nothing else is left in the folder.
        let again = folder.path().join("again");
        average.save(&path).unwrap();
        whole.save(&again).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
        std::fs::remove_file(&again).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_saved_average_loads_as_weights_and_into_parameters_of_another_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("average.safetensors");
    let mut average = WeightAverage::named(named(DType::F32), EMA).unwrap();
    average.update().unwrap();
    average.save(&path).unwrap();
    let mut map = VarMap::new();
    map.data().lock().unwrap().extend(named(DType::F32).into_iter().map(|(name, var)| {
        set(&var, &vec![9.0; var.elem_count()]);
        (name, var)
    }));
    map.load(&path).unwrap();
    assert_eq!(values(&map.data().lock().unwrap()["b"]), [1.0, -2.0]);
    for (dtype, expected) in [(DType::BF16, DType::F32), (DType::F64, DType::F64)] {
        let mut other = WeightAverage::named(named(dtype), EMA).unwrap();
        other.load(&path).unwrap();
        assert!(averages(&other).iter().all(|(_, dtype, _)| *dtype == expected));
        assert_eq!(averages(&other)[1].2, [1.0, -2.0]);
    }
}

#[test]
fn files_that_do_not_fit_are_refused_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("average.safetensors");
    let mut average = WeightAverage::named(named(DType::F32), EMA).unwrap();
    average.update().unwrap();
    average.save(&path).unwrap();
    let with = |name: &str, shape: usize| {
        let vars = vec![
            (name.to_owned(), Var::zeros(shape, DType::F32, &Device::Cpu).unwrap()),
            ("a".to_owned(), var(&[7.0], DType::F32)),
        ];
        let mut average = WeightAverage::named(vars, EMA).unwrap();
        average.update().unwrap();
        average
    };
    let mut renamed = with("c", 2);
    match renamed.load(&path) {
        Err(Error::StateNames { missing, unexpected, .. }) => {
            assert_eq!((missing, unexpected), (vec!["c".to_owned()], vec!["b".to_owned()]));
        }
        other => panic!("{other:?}"),
    }
    let mut reshaped = with("b", 3);
    match reshaped.load(&path) {
        Err(Error::StateMismatch { key, what, .. }) => assert_eq!((key.as_str(), what), ("b", "shape")),
        other => panic!("{other:?}"),
    }
    assert_eq!(averages(&reshaped)[0].2, [7.0]);
    let mut tail = WeightAverage::named(named(DType::F32), Averaging::Tail { start: 0 }).unwrap();
    let message = tail.load(&path).unwrap_err().to_string();
    assert!(message.contains("average.safetensors") && message.contains("tail, got ema"), "{message}");

    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 7, 8, 60, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(matches!(average.load(&path), Err(Error::StateFormat { .. })), "cut at {cut}");
    }
    // Another safetensors file, and a later format.
    let weights =
        std::collections::HashMap::from([("a", Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap())]);
    candle_core::safetensors::save(&weights, &path).unwrap();
    let message = average.load(&path).unwrap_err().to_string();
    assert!(message.contains("not an average of weights"), "{message}");
    let text = String::from_utf8_lossy(&whole).into_owned();
    let at = text.find(r#"\"format\":1"#).unwrap() + r#"\"format\":"#.len();
    let mut later = whole.clone();
    later[at] = b'2';
    std::fs::write(&path, later).unwrap();
    let message = average.load(&path).unwrap_err().to_string();
    assert!(message.contains("expected format 1, got 2"), "{message}");
    // The header's own length is not changed: 1 update and 1 weight become 0 and 1.
    let text = String::from_utf8_lossy(&whole).into_owned();
    let at = text.find(r#"\"updates\":1"#).unwrap() + r#"\"updates\":"#.len();
    let mut fewer = whole.clone();
    fewer[at] = b'0';
    std::fs::write(&path, fewer).unwrap();
    let message = average.load(&path).unwrap_err().to_string();
    assert!(message.contains("got 1 of 0"), "{message}");
    let missing = average.load(folder.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("none"), "{missing}");
    let unwritable = average.save(folder.path().join("no/folder")).unwrap_err();
    assert!(matches!(unwritable, Error::Io { .. }), "{unwritable}");
    assert_eq!(averages(&average)[1].2, [1.0, -2.0]);
}

#[test]
fn a_decay_out_of_range_and_unknown_fields_are_refused() {
    for decay in [1.0, -0.1, f64::NAN] {
        let refused = WeightAverage::new(vec![], Averaging::Ema { decay, start: 0 });
        assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    }
    let read: Averaging = serde_json::from_str(r#"{"ema": {"decay": 0.99}}"#).unwrap();
    assert_eq!(read, Averaging::Ema { decay: 0.99, start: 0 });
    assert!(serde_json::from_str::<Averaging>(r#"{"ema": {"decay": 0.99, "begin": 1}}"#).is_err());
}
