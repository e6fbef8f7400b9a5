//! FlyLoRA of the paper: the sparse kernels, routing, balance and approximate merging.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{largest_difference, noise, values};
use flylora::{
    Adapter, AdapterKind, AdapterLinear, AnyLinear, FlyLoraAdapter, FlyLoraConfig, FrozenLinear, Merge,
    Place, Routing, Step,
};

fn adapter(inputs: usize, outputs: usize, config: &FlyLoraConfig, dtype: DType) -> FlyLoraAdapter {
    let place = Place::alone("layer", dtype, &Device::Cpu);
    let adapter = FlyLoraAdapter::new(inputs, outputs, config, &place).unwrap();
    adapter.b().set(&noise(&[outputs, config.r], 0.5, dtype, 1)).unwrap();
    adapter
}

#[test]
fn the_sparse_products_equal_the_dense_ones_forward_and_backward_at_every_size() {
    // About the block of 16 rows, the bound of 4 where rows are not turned, and chunks of 64 outputs.
    let sizes = [(1, 40, 30), (3, 33, 64), (4, 100, 65), (16, 64, 1), (17, 48, 200), (50, 7, 130), (0, 9, 9)];
    for routing in [Routing::Magnitude, Routing::Signed] {
        for (m, inputs, outputs) in sizes {
            for (dtype, bound) in [(DType::F32, 2e-5), (DType::F64, 1e-12)] {
                let config = FlyLoraConfig::default().with_ranks(12, 5).with_routing(routing);
                let adapter = adapter(inputs, outputs, &config, dtype);
                let x = Var::from_tensor(&noise(&[m, inputs], 1.0, dtype, 2)).unwrap();
                let seed = noise(&[m, outputs], 1.0, dtype, 3);
                let run = |y: Tensor| {
                    let grads = (&y * &seed).unwrap().sum_all().unwrap().backward().unwrap();
                    (y, grads.get(&x).unwrap().clone(), grads.get(adapter.b()).unwrap().clone())
                };
                let (y, dx, db) = run(adapter.delta(&x).unwrap());
                let (want_y, want_dx, want_db) = run(adapter.delta_dense(&x).unwrap());
                let what = format!("{m} rows of {inputs} to {outputs} in {dtype:?}, {routing:?}");
                assert!(largest_difference(&y, &want_y) < bound, "{what}");
                assert!(largest_difference(&dx, &want_dx) < bound, "dx, {what}");
                assert!(largest_difference(&db, &want_db) < bound * 10.0, "db, {what}");
                assert!(m == 0 || values(&y).iter().any(|v| *v != 0.0), "{what}");
            }
        }
    }
}

#[test]
fn each_row_makes_use_of_its_k_largest_ranks() {
    for routing in [Routing::Magnitude, Routing::Signed] {
        let config = FlyLoraConfig::default().with_ranks(8, 3).with_routing(routing);
        let adapter = adapter(30, 20, &config, DType::F64);
        let a = adapter.a().unwrap().to_dtype(DType::F64).unwrap();
        assert_eq!(values(&a).iter().filter(|v| **v != 0.0).count(), 8 * 8, "round(0.25 * 30) in each row");
        let x = noise(&[5, 30], 1.0, DType::F64, 4);
        let y = x.matmul(&a.t().unwrap()).unwrap().to_vec2::<f64>().unwrap();
        let b = adapter.b().to_vec2::<f64>().unwrap();
        let got = adapter.delta(&x).unwrap().to_vec2::<f64>().unwrap();
        for (row, y) in y.iter().enumerate() {
            let mut order: Vec<usize> = (0..8).collect();
            let score = |i: usize| if routing == Routing::Magnitude { y[i].abs() } else { y[i] };
            order.sort_by(|i, j| score(*j).total_cmp(&score(*i)));
            for (o, got) in got[row].iter().enumerate() {
                let want: f64 = order[..3].iter().map(|i| 64.0 / 8.0 * b[o][*i] * y[*i]).sum();
                assert!((got - want).abs() < 1e-12, "{routing:?}: {got} and {want}");
            }
        }
    }
}

#[test]
fn exactly_k_ranks_are_used_also_where_half_types_make_values_equal() {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let adapter = adapter(64, 48, &FlyLoraConfig::default(), dtype);
        let used = adapter.used(&noise(&[500, 64], 1.0, dtype, 1)).unwrap();
        let counts = values(&used.ne(0.0).unwrap().to_dtype(DType::F32).unwrap().sum(1).unwrap());
        assert!(counts.iter().all(|n| *n == 8.0), "{dtype:?}");
    }
}

#[test]
fn the_bias_goes_towards_the_ranks_that_are_used_less_and_only_between_training_steps() {
    let config = FlyLoraConfig::default().with_ranks(8, 2).with_balance_rate(0.01);
    let adapter = adapter(30, 20, &config, DType::F32);
    let x = noise(&[200, 30], 1.0, DType::F32, 5);
    let y = adapter.delta(&x).unwrap();
    adapter.delta(&x).unwrap(); // evaluating more often changes nothing
    assert_eq!(adapter.balance().unwrap(), [0.0; 8]);
    let grads = y.sum_all().unwrap().backward().unwrap();
    let spread = |adapter: &FlyLoraAdapter| {
        let a = adapter.a().unwrap();
        let y = x.matmul(&a.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        let d = adapter.balance().unwrap();
        let mut counts = [0f64; 8];
        for y in y {
            let mut order: Vec<usize> = (0..8).collect();
            order.sort_by(|i, j| (y[*j].abs() + d[*j]).total_cmp(&(y[*i].abs() + d[*i])));
            order[..2].iter().for_each(|i| counts[*i] += 1.0);
        }
        (counts, counts.iter().map(|c| (c - 50.0) * (c - 50.0)).sum::<f64>())
    };
    let (counts, first) = spread(&adapter);
    adapter.after_step(Step { index: 1, total: 9 }, &grads).unwrap();
    for (d, count) in adapter.balance().unwrap().iter().zip(counts) {
        let want = if count == 50.0 { 0.0 } else { 0.01 * (50.0 - count).signum() };
        assert!((f64::from(*d) - want).abs() < 1e-8, "{count}: {d}");
    }
    for index in 2..=9 {
        adapter.delta(&x).unwrap();
        adapter.after_step(Step { index, total: 9 }, &grads).unwrap();
    }
    assert!(spread(&adapter).1 < 0.5 * first, "{first} to {}", spread(&adapter).1);
    // Without a forward pass since, there is nothing to go by.
    let before = adapter.balance().unwrap();
    adapter.after_step(Step { index: 9, total: 9 }, &grads).unwrap();
    assert_eq!(before, adapter.balance().unwrap());
}

#[test]
fn merging_for_a_sample_measures_its_error_and_beats_the_plain_product() {
    let base = FrozenLinear::new(noise(&[40, 64], 0.2, DType::F32, 6), None).unwrap();
    let adapter = adapter(64, 40, &FlyLoraConfig::default(), DType::F32);
    let sample = noise(&[256, 64], 1.0, DType::F32, 7);
    let delta = adapter.delta(&sample).unwrap();
    let norm = |t: &Tensor| values(t).iter().map(|v| v * v).sum::<f64>().sqrt();
    let error_of = |w: &Tensor| {
        let y = sample.matmul(&w.t().unwrap()).unwrap();
        norm(&(y - &delta).unwrap()) / norm(&delta)
    };
    let plain = error_of(&adapter.delta_weight().unwrap());
    let fitted = error_of(&adapter.delta_weight_for(&sample).unwrap());
    assert!(fitted < 0.95 * plain, "{fitted} and {plain}");
    let mut layer = AdapterLinear::from_parts(base, adapter).unwrap();
    assert_eq!(layer.merge().unwrap(), Merge::Unsupported);
    let Merge::Approximate { relative_error } = layer.merge_for(&sample).unwrap() else { panic!() };
    assert!((relative_error - fitted).abs() < 1e-4, "{relative_error} and {fitted}");
    assert!(relative_error > 0.2, "routing is no constant weight: {relative_error}");
    let plain = layer.into_merged().unwrap();
    assert_eq!(plain.weight().dims(), [40, 64]);
}

#[test]
fn what_is_fitted_to_many_rows_in_half_precision_is_what_f32_fits() {
    let config = FlyLoraConfig::default();
    for dtype in [DType::BF16, DType::F16] {
        let (half, whole) = (adapter(64, 40, &config, dtype), adapter(64, 40, &config, DType::F32));
        whole.b().set(&half.b().to_dtype(DType::F32).unwrap()).unwrap();
        // Of a size whose squares f16 has not got.
        for scale in [1.0, 1e-3] {
            let sample = noise(&[4000, 64], scale, DType::F32, 7);
            let [got, want] = [&half, &whole].map(|a| values(&a.delta_weight_for(&sample).unwrap()));
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let off = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
            assert!(off < 0.02, "{dtype:?}, {scale}: off by {off}");
        }
    }
}

#[test]
fn files_hold_a_seed_and_places_and_a_place_that_the_seed_does_not_give_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter(30, 20, &FlyLoraConfig::default(), DType::F32);
    flylora::save_adapters(dir.path(), &[("q", &adapter)]).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let mut names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    names.sort_unstable();
    let want = ["fly_A.indices", "fly_A.seed", "fly_balance", "lora_B.weight"];
    assert_eq!(names, want.map(|name| format!("base_model.model.q.{name}")));
    let key = "base_model.model.q.fly_A.indices";
    let mut indices = tensors[key].to_vec2::<u32>().unwrap();
    indices[3][0] ^= 1;
    tensors.insert(key.into(), Tensor::new(indices, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let error = flylora::load_adapters(dir.path(), &[("q", &adapter)]).unwrap_err().to_string();
    assert!(error.contains("fly_A.indices: they are not those that the seed gives"), "{error}");
}

#[test]
fn a_rank_that_the_file_does_not_hold_is_refused_before_anything_is_made_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter(30, 20, &FlyLoraConfig::default(), DType::F32);
    flylora::save_adapters(dir.path(), &[("q", &adapter)]).unwrap();
    let path = dir.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"r\": 32", "\"r\": 4000000000000");
    std::fs::write(&path, text).unwrap();
    let base = FrozenLinear::new(noise(&[20, 30], 0.2, DType::F32, 6), None).unwrap();
    let file = flylora::files::AdapterFile::read(dir.path()).unwrap();
    let error = file.adapter("q", &base, DType::F32).unwrap_err().to_string();
    assert!(error.contains("lora_B.weight: expected shape [20, 4000000000000], got [20, 32]"), "{error}");
}

#[test]
fn the_layer_is_its_base_and_the_change_in_value_gradients_and_counts() {
    for dtype in [DType::F32, DType::F64] {
        let config = FlyLoraConfig::default().with_ranks(12, 3).with_density(0.3).with_balance_rate(0.5);
        let base = FrozenLinear::try_from(&common::base(37, 70, dtype, true)).unwrap();
        let kind = AdapterKind::FlyLora(config);
        let make = || {
            let layer =
                AnyLinear::build(base.clone(), &kind, &Place::alone("layer", dtype, &Device::Cpu)).unwrap();
            layer.vars()[0].set(&noise(&[70, 12], 0.5, dtype, 9)).unwrap();
            layer
        };
        let (one, two) = (make(), make());
        let x = Var::from_tensor(&noise(&[5, 37, 9], 1.0, dtype, 10)).unwrap();
        let weights = noise(&[5, 9, 70], 1.0, dtype, 11);
        for index in 1..=3 {
            let turned = x.transpose(1, 2).unwrap(); // (5, 9, 37)
            let (y, parts) = (
                one.forward(&turned).unwrap(),
                (base.forward(&turned).unwrap() + two.adapter().delta(&turned).unwrap()).unwrap(),
            );
            let close = |a: &Tensor, b: &Tensor| {
                let allowed = if dtype == DType::F32 { 2e-5 } else { 1e-12 };
                for (a, b) in values(a).into_iter().zip(values(b)) {
                    assert!((a - b).abs() < allowed * (1.0 + b.abs()), "{a} and {b}");
                }
            };
            close(&y, &parts);
            let grads = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let (whole, apart) = (grads(&y), grads(&parts));
            close(whole.get(&x).unwrap(), apart.get(&x).unwrap());
            close(whole.get(&one.vars()[0]).unwrap(), apart.get(&two.vars()[0]).unwrap());
            one.adapter().after_step(Step { index, total: 9 }, &whole).unwrap();
            two.adapter().after_step(Step { index, total: 9 }, &apart).unwrap();
        }
    }
}
