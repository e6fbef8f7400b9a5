//! Several adapters at once and by row.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use common::{adapter, frozen, largest_difference, lora, move_all, noise, values};
use flylora::{Adapter, AdapterKind, FlyLoraConfig, FrozenLinear, LoraConfig, Merge, MultiLinear, Place};

fn three() -> MultiLinear {
    let mut layer = MultiLinear::new(frozen());
    layer.insert("a", adapter(&lora(4), "a", 10)).unwrap();
    layer.insert("b", adapter(&AdapterKind::Dora(LoraConfig::default().with_r(2)), "b", 20)).unwrap();
    let fly = FlyLoraConfig::default().with_ranks(8, 3);
    layer.insert("c", adapter(&AdapterKind::FlyLora(fly), "c", 30)).unwrap();
    layer
}

#[test]
fn active_adapters_add_up_by_their_weights_and_off_means_the_base() {
    let mut layer = three();
    let x = noise(&[4, 3, 20], 1.0, DType::F32, 3);
    let base = layer.base().forward(&x).unwrap();
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&base), "none is active at first");
    layer.activate(&[("a", 1.0), ("b", -0.5), ("c", 2.0)]).unwrap();
    let delta = |name: &str| layer.adapter(name).unwrap().delta(&x).unwrap();
    let want = (&base + delta("a")).unwrap();
    let want = (want - (delta("b") * 0.5).unwrap()).unwrap();
    let want = (want + (delta("c") * 2.0).unwrap()).unwrap();
    assert!(largest_difference(&layer.forward(&x).unwrap(), &want) < 1e-5);
    layer.set_enabled(false);
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&base));
    layer.set_enabled(true);
    // Hot swap: the new one is active at once.
    let new = adapter(&lora(4), "a", 40);
    let old = layer.insert("a", Arc::clone(&new)).unwrap().unwrap();
    let change = (new.delta(&x).unwrap() - old.delta(&x).unwrap()).unwrap();
    assert!(largest_difference(&layer.forward(&x).unwrap(), &(want + change).unwrap()) < 1e-5);
    layer.remove("b").unwrap();
    assert_eq!(layer.active(), [("a".to_owned(), 1.0), ("c".to_owned(), 2.0)]);
    assert_eq!(layer.names().collect::<Vec<_>>(), ["a", "c"]);
    let names: Vec<String> = layer.parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["a.lora_A.weight", "a.lora_B.weight", "c.lora_B.weight"]);
}

#[test]
fn each_row_of_a_batch_gets_its_own_adapter_as_if_it_were_alone() {
    let layer = three();
    let x = Var::from_tensor(&noise(&[6, 3, 20], 1.0, DType::F32, 4)).unwrap();
    let rows = [Some("c"), None, Some("a"), Some("b"), Some("a"), Some("c")];
    let y = layer.forward_rows(&x, &rows).unwrap();
    for (i, name) in rows.iter().enumerate() {
        let mut alone = layer.clone();
        alone.activate(&name.map(|name| (name, 1.0)).into_iter().collect::<Vec<_>>()).unwrap();
        let want = alone.forward(&x.get(i).unwrap()).unwrap();
        assert!(largest_difference(&y.get(i).unwrap(), &want) < 1e-5, "row {i}");
    }
    // Every adapter in use is trained by its rows.
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    flylora::audit(layer.parameters(), &grads).unwrap();
    assert!(grads.get(&x).is_some());
    let all = layer.forward_rows(&x, &[Some("a"); 6]).unwrap();
    let mut one = layer.clone();
    one.activate(&[("a", 1.0)]).unwrap();
    assert!(largest_difference(&all, &one.forward(&x).unwrap()) < 1e-6);
    let error = layer.forward_rows(&x, &[None; 5]).unwrap_err().to_string();
    assert!(error.contains("5 adapters are named for a batch of shape [6, 3, 20]"), "{error}");
    let error = layer.forward_rows(&x, &[Some("z"); 6]).unwrap_err().to_string();
    assert!(error.contains("there is no adapter named \"z\", only [\"a\", \"b\", \"c\"]"), "{error}");
}

#[test]
fn merging_several_is_exact_where_each_is_and_holds_the_layer_still() {
    let mut layer = three();
    let x = noise(&[4, 20], 1.0, DType::F32, 5);
    layer.activate(&[("a", 0.7), ("b", 1.0)]).unwrap();
    let y = layer.forward(&x).unwrap();
    assert_eq!(layer.merge().unwrap(), Merge::Exact);
    assert!(largest_difference(&layer.forward(&x).unwrap(), &y) < 1e-5);
    for error in [
        layer.activate(&[]).unwrap_err(),
        layer.insert("d", adapter(&lora(2), "d", 1)).unwrap_err(),
        layer.remove("a").unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "the layer is merged: unmerge it first");
    }
    layer.unmerge();
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&y));
    layer.activate(&[("a", 1.0), ("c", 1.0)]).unwrap();
    assert_eq!(layer.merge().unwrap(), Merge::Unsupported);
    assert!(!layer.is_merged());
    for (active, message) in [
        (vec![("a", 1.0), ("a", 2.0)], "a is named twice"),
        (vec![("a", f64::NAN)], "weight must be finite, got NaN"),
        (vec![("z", 1.0)], "there is no adapter named \"z\""),
    ] {
        assert!(layer.activate(&active).unwrap_err().to_string().contains(message));
        assert_eq!(layer.active().len(), 2, "the active ones stay");
    }
    let small = FrozenLinear::new(noise(&[3, 3], 1.0, DType::F32, 1), None).unwrap();
    let wrong = lora(2).build(&small, &Place::alone("w", DType::F32, &Device::Cpu)).unwrap();
    assert!(
        layer.insert("w", wrong).unwrap_err().to_string().contains("expected shape [12, 20], got [3, 3]")
    );
}

#[test]
fn one_of_several_is_merged_alone_and_becomes_a_plain_layer() {
    let mut layer = three();
    let x = noise(&[4, 20], 1.0, DType::F32, 5);
    for name in ["a", "b"] {
        layer.activate(&[(name, 1.0)]).unwrap();
        let want = layer.base().forward(&x).unwrap();
        let want = (want + layer.adapter(name).unwrap().delta(&x).unwrap()).unwrap();
        assert_eq!(layer.merge().unwrap(), Merge::Exact);
        assert!(largest_difference(&layer.forward(&x).unwrap(), &want) < 1e-5, "{name}");
        let plain = layer.clone().into_merged().unwrap();
        let y = candle_nn::Module::forward(&plain, &x).unwrap();
        assert_eq!(values(&y), values(&layer.forward(&x).unwrap()));
        layer.unmerge();
    }
    layer.activate(&[("a", 1.0), ("c", 1.0)]).unwrap();
    let error = layer.into_merged().unwrap_err().to_string();
    assert_eq!(error, "no weight does the same as a and c here: see merge_for");
}

#[test]
fn merging_for_a_sample_says_how_far_all_together_are_off_it_and_unmerging_gives_the_same_bits() {
    let mut layer = three();
    let x = noise(&[40, 2, 20], 1.0, DType::F32, 6);
    layer.activate(&[("a", 0.7), ("b", -1.0)]).unwrap();
    assert_eq!(layer.merge_for(&x).unwrap(), Merge::Exact);
    layer.unmerge();
    layer.activate(&[("a", 0.7), ("c", 2.0)]).unwrap();
    let (y, base) = (layer.forward(&x).unwrap(), layer.base().forward(&x).unwrap());
    let error = layer.merge_for(&noise(&[4, 19], 1.0, DType::F32, 6)).unwrap_err().to_string();
    assert!(error.contains("expected shape [4, 20], got [4, 19]") && !layer.is_merged(), "{error}");
    let error = layer.merge_for(&x.narrow(0, 0, 0).unwrap()).unwrap_err().to_string();
    assert!(error == "a sample without rows measures nothing" && !layer.is_merged(), "{error}");
    let Merge::Approximate { relative_error } = layer.merge_for(&x).unwrap() else { panic!() };
    let norm = |t: Tensor| values(&t).iter().map(|v| v * v).sum::<f64>().sqrt();
    let off = norm((layer.forward(&x).unwrap() - &y).unwrap()) / norm((&y - base).unwrap());
    assert!((relative_error - off).abs() < 1e-4 && off > 0.01 && off < 0.9, "{relative_error}, {off}");
    assert!(layer.activate(&[("a", 1.0)]).is_err(), "held still");
    // What is merged is the sum of what each is nearest to.
    let nearest = |name: &str| layer.adapter(name).unwrap().delta_weight_for(&x.flatten_to(1).unwrap());
    let want = (layer.base().weight().unwrap() + (nearest("a").unwrap() * 0.7).unwrap()).unwrap();
    let want = (want + (nearest("c").unwrap() * 2.0).unwrap()).unwrap();
    assert!(largest_difference(layer.clone().into_merged().unwrap().weight(), &want) < 1e-5);
    layer.unmerge();
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&y));
}

#[test]
fn several_over_a_quantised_base_merge_approximately() {
    use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
    let blocks = QTensor::quantize(&noise(&[12, 32], 0.3, DType::F32, 1), GgmlDType::Q8_0).unwrap();
    let base = FrozenLinear::quantized(QMatMul::from_qtensor(blocks).unwrap(), None).unwrap();
    let mut layer = MultiLinear::new(base);
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        let place = Place::alone(name, DType::F32, &Device::Cpu);
        let adapter = lora(4).build(layer.base(), &place).unwrap();
        move_all(adapter.parameters().into_iter().map(|(_, var)| var), 0.4, 10 * i as u64);
        layer.insert(name, adapter).unwrap();
    }
    layer.activate(&[("a", 1.0), ("b", 0.5)]).unwrap();
    let x = noise(&[6, 32], 1.0, DType::F32, 8);
    let y = layer.forward(&x).unwrap();
    assert_eq!(layer.merge().unwrap(), Merge::Unsupported);
    let Merge::Approximate { relative_error } = layer.merge_for(&x).unwrap() else { panic!() };
    assert!(relative_error > 0.0 && relative_error < 0.05, "{relative_error}");
    layer.unmerge();
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&y));
}
