//! Several adapters: at once, by row, combined into one, with ranks shared between layers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use common::{largest_difference, move_all, noise, values};
use flylora::{
    AdaLoraAdapter, AdaLoraConfig, Adapter, AdapterKind, Baseline, Combination, Counted, Error,
    FlyLoraConfig, FrozenLinear, LoraAdapter, LoraConfig, LoraEmbedding, MajoritySign, Merge, MultiLinear,
    Over, ParameterReport, Place, RankBudget, RankBudgetConfig, Step, combine, combine_embeddings,
};

fn frozen() -> FrozenLinear {
    FrozenLinear::new(noise(&[12, 20], 0.3, DType::F32, 1), Some(noise(&[12], 0.5, DType::F32, 2))).unwrap()
}

fn adapter(kind: &AdapterKind, name: &str, seed: u64) -> Arc<dyn Adapter> {
    let adapter = kind.build(&frozen(), &Place::alone(name, DType::F32, &Device::Cpu)).unwrap();
    move_all(adapter.parameters().into_iter().map(|(_, var)| var), 0.4, seed);
    adapter
}

fn lora(r: usize) -> AdapterKind {
    AdapterKind::Lora(LoraConfig::default().with_r(r).with_alpha(6.0))
}

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

fn loras(ranks: &[usize]) -> Vec<LoraAdapter> {
    ranks
        .iter()
        .enumerate()
        .map(|(i, r)| {
            let config = LoraConfig::default().with_r(*r).with_alpha(3.0);
            let name = format!("{i}");
            let a = LoraAdapter::seeded(20, 12, &config, &name, DType::F32, &Device::Cpu).unwrap();
            a.b().set(&noise(&[12, *r], 0.6, DType::F32, 50 + i as u64)).unwrap();
            a
        })
        .collect()
}

#[test]
fn cat_and_svd_of_full_rank_are_the_weighted_sum_and_svd_is_the_best_of_its_rank() {
    let adapters = loras(&[3, 2]);
    let weighted = [(&adapters[0], 0.7), (&adapters[1], -1.5)];
    let delta = |a: &LoraAdapter| a.delta_weight().unwrap();
    let want = ((delta(&adapters[0]) * 0.7).unwrap() - (delta(&adapters[1]) * 1.5).unwrap()).unwrap();
    let norm = |t: &Tensor| values(t).iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = |how| {
        let combined = combine(&weighted, how).unwrap();
        (norm(&(delta(&combined) - &want).unwrap()), combined.config().r)
    };
    assert!(matches!(error(Combination::Cat), (e, 5) if e < 1e-5));
    assert!(matches!(error(Combination::Svd { rank: 5 }), (e, 5) if e < 1e-5));
    let (three, r) = error(Combination::Svd { rank: 3 });
    assert!(r == 3 && three > 0.01);
    // No other product of that rank is nearer, an adapter alone among them.
    assert!(three < norm(&(delta(&adapters[0]) * 0.7).unwrap().sub(&want).unwrap()));
    let pruned = Combination::MagnitudePrune { density: 1.0, over: Over::Product { rank: 5 } };
    assert!(error(pruned).0 < 1e-5, "pruning nothing is the weighted sum");
}

#[test]
fn adapters_of_different_dtypes_combine_into_that_of_the_first() {
    let make = |name: &str, dtype| {
        let config = LoraConfig::default().with_r(2).with_alpha(3.0);
        let adapter = LoraAdapter::seeded(20, 12, &config, name, dtype, &Device::Cpu).unwrap();
        adapter.b().set(&noise(&[12, 2], 0.6, dtype, 50)).unwrap();
        adapter
    };
    let over = Over::Product { rank: 4 };
    for (first, second, bound) in [
        (DType::F32, DType::BF16, 1e-5),
        (DType::F64, DType::F32, 1e-5),
        (DType::BF16, DType::F32, 0.02),
        (DType::F16, DType::BF16, 0.02),
    ] {
        let (a, b) = (make("a", first), make("b", second));
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let delta = |t: &LoraAdapter| (wide(t.b()).matmul(&wide(t.a())).unwrap() * t.scale()).unwrap();
        let want = ((delta(&a) * 0.7).unwrap() - (delta(&b) * 0.4).unwrap()).unwrap();
        for how in [
            Combination::Cat,
            Combination::Svd { rank: 4 },
            Combination::MagnitudePrune { density: 1.0, over },
        ] {
            let both = combine(&[(&a, 0.7), (&b, -0.4)], how).unwrap();
            assert_eq!((both.a().dtype(), both.b().dtype()), (first, first), "{how:?}");
            let error = largest_difference(&both.delta_weight().unwrap(), &want);
            assert!(error < bound, "{how:?} of {first:?} and {second:?}: {error}");
        }
        for how in
            [Combination::Linear, Combination::DareLinear { density: 0.5, seed: 1, over: Over::Factors }]
        {
            assert_eq!(combine(&[(&a, 0.7), (&b, -0.4)], how).unwrap().a().dtype(), first);
        }
    }
}

#[test]
fn biases_add_up_in_combinations_that_are_sums_and_are_refused_in_others() {
    let make = |name: &str, seed| {
        let config = LoraConfig::default().with_r(2).with_alpha(3.0).with_bias(true);
        let adapter = LoraAdapter::seeded(20, 12, &config, name, DType::F32, &Device::Cpu).unwrap();
        move_all(adapter.parameters().into_iter().map(|(_, var)| var), 0.5, seed);
        adapter
    };
    let (one, other, plain) = (make("a", 1), make("b", 9), &loras(&[2])[0]);
    let weighted = [(&one, 0.7), (plain, 2.0), (&other, -1.5)];
    let x = noise(&[4, 20], 1.0, DType::F32, 3);
    let mut want = Tensor::zeros((4, 12), DType::F32, &Device::Cpu).unwrap();
    for (adapter, weight) in weighted {
        want = (want + (adapter.delta(&x).unwrap() * weight).unwrap()).unwrap();
    }
    for how in [Combination::Cat, Combination::Svd { rank: 6 }] {
        let both = combine(&weighted, how).unwrap();
        assert!(largest_difference(&both.delta(&x).unwrap(), &want) < 1e-5, "{how:?}");
    }
    let sum = combine(&weighted, Combination::Cat).unwrap().delta_bias().unwrap().unwrap();
    let linear = combine(&weighted, Combination::Linear).unwrap().delta_bias().unwrap().unwrap();
    assert!(largest_difference(&linear, &sum) < 1e-6);
    let how = Combination::MagnitudePrune { density: 0.5, over: Over::Factors };
    assert!(combine(&weighted, how).unwrap_err().to_string().contains("combined by Cat, Svd or Linear"));
    assert!(combine(&[(plain, 1.0)], Combination::Cat).unwrap().bias().is_none());
}

#[test]
fn averaging_factors_is_not_averaging_products() {
    let adapters = loras(&[3, 3]);
    let half = [(&adapters[0], 0.5), (&adapters[1], 0.5)];
    let linear = combine(&half, Combination::Linear).unwrap();
    let sum = combine(&half, Combination::Cat).unwrap();
    assert_eq!(linear.config().r, 3);
    let error = largest_difference(&linear.delta_weight().unwrap(), &sum.delta_weight().unwrap());
    assert!(error > 0.05, "{error}");
    // Of one adapter it is that adapter, also with a negative weight.
    for how in [Combination::Linear, Combination::Cat, Combination::Svd { rank: 3 }] {
        let one = combine(&[(&adapters[0], -2.0)], how).unwrap();
        let want = (adapters[0].delta_weight().unwrap() * -2.0).unwrap();
        assert!(largest_difference(&one.delta_weight().unwrap(), &want) < 1e-5, "{how:?}");
    }
}

/// Factors whose product is the matrix itself.
fn exact(m: &[[f32; 2]; 2]) -> LoraAdapter {
    let b = Tensor::new(m, &Device::Cpu).unwrap();
    let one = Tensor::eye(2, DType::F32, &Device::Cpu).unwrap();
    LoraAdapter::from_factors(&one, &b, &LoraConfig::default().with_alpha(2.0)).unwrap()
}

#[test]
fn ties_and_dare_do_what_their_papers_say() {
    let (p, q) = (exact(&[[4.0, -1.0], [2.0, 0.5]]), exact(&[[-3.0, 2.0], [1.0, 0.2]]));
    let both = [(&p, 1.0), (&q, 1.0)];
    let over = Over::Product { rank: 2 };
    let run = |how| combine(&both, how).unwrap().delta_weight().unwrap().to_vec2::<f32>().unwrap();
    let near = |got: Vec<Vec<f32>>, want: [[f32; 2]; 2]| {
        for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((g - w).abs() < 1e-5, "{got:?} and {want:?}");
        }
    };
    // Half is left of each: 4 and 2 of the first, -3 and 2 of the second.
    near(run(Combination::MagnitudePrune { density: 0.5, over }), [[1.0, 2.0], [2.0, 0.0]]);
    // 4 - 3 is positive, so 4 alone counts.
    let ties = |sign| Combination::Ties { density: 0.5, sign, over };
    near(run(ties(MajoritySign::Total)), [[4.0, 2.0], [2.0, 0.0]]);
    // One against one is a draw, which goes to plus.
    near(run(ties(MajoritySign::Frequency)), [[4.0, 2.0], [2.0, 0.0]]);
    near(run(Combination::Ties { density: 1.0, sign: MajoritySign::Total, over }), [[4.0, 2.0], [1.5, 0.35]]);
    // Dropping nothing is the sum; dropping half doubles what is left, and the seed decides.
    near(run(Combination::DareLinear { density: 1.0, seed: 0, over }), [[1.0, 1.0], [3.0, 0.7]]);
    let dare = |seed| run(Combination::DareLinear { density: 0.5, seed, over });
    assert_eq!(dare(1), dare(1));
    assert!((2..9).any(|seed| dare(seed) != dare(1)));
    let mean: f32 = (0..400).map(|seed| dare(seed)[1][0]).sum::<f32>() / 400.0;
    assert!((mean - 3.0).abs() < 0.4, "as much as before on average: {mean}");
    let big = loras(&[4, 4]);
    let both = [(&big[0], 1.0), (&big[1], 1.0)];
    for over in [Over::Factors, Over::Product { rank: 4 }] {
        let how = Combination::DareTies { density: 0.5, seed: 3, sign: MajoritySign::Total, over };
        assert_eq!(combine(&both, how).unwrap().config().r, 4);
    }
}

#[test]
fn what_cannot_be_combined_is_refused() {
    let adapters = loras(&[3, 2]);
    let both = [(&adapters[0], 1.0), (&adapters[1], 1.0)];
    let message = |adapters: &[(&LoraAdapter, f64)], how| combine(adapters, how).unwrap_err().to_string();
    assert!(message(&[], Combination::Cat).contains("no adapter to combine"));
    assert!(message(&both, Combination::Linear).contains("ranks [3, 2] cannot be added"));
    assert!(message(&both, Combination::Svd { rank: 0 }).contains("rank must be at least 1"));
    assert!(message(&[(&adapters[0], f64::NAN)], Combination::Cat).contains("weight must be finite"));
    let over = Over::Factors;
    assert!(message(&both, Combination::MagnitudePrune { density: 1.5, over }).contains("density"));
    assert!(message(&both, Combination::DareLinear { density: 0.0, seed: 0, over }).contains("density"));
    let other = exact(&[[1.0, 0.0], [0.0, 1.0]]);
    assert!(message(&[(&adapters[0], 1.0), (&other, 1.0)], Combination::Cat).contains("different layers"));
}

#[test]
fn embeddings_combine_and_what_does_not_fit_is_refused() {
    let table = noise(&[9, 6], 1.0, DType::F32, 1);
    let make = |table: &Tensor, r: usize, seed: u64| {
        let place = Place::alone("embed", DType::F32, &Device::Cpu);
        let config = LoraConfig::default().with_r(r).with_alpha(3.0);
        let embedding = LoraEmbedding::new(table.clone(), &config, &place).unwrap();
        move_all(embedding.parameters().into_iter().map(|(_, var)| var), 0.5, seed);
        embedding
    };
    let (one, other) = (make(&table, 3, 60), make(&table, 2, 70));
    let ids = Tensor::new(&[[0u32, 8, 3], [3, 1, 0]], &Device::Cpu).unwrap();
    let rows = |embedding: &LoraEmbedding| embedding.forward(&ids).unwrap();
    let flat = ids.flatten_all().unwrap();
    let plain = table.index_select(&flat, 0).unwrap().reshape((2, 3, 6)).unwrap();
    let change = |embedding: &LoraEmbedding| (rows(embedding) - &plain).unwrap();
    let want = (&plain + (change(&one) * 0.7).unwrap()).unwrap();
    let want = (want - (change(&other) * 1.5).unwrap()).unwrap();
    for how in [Combination::Cat, Combination::Svd { rank: 5 }] {
        let mut both = combine_embeddings(&[(&one, 0.7), (&other, -1.5)], how).unwrap();
        assert_eq!(both.config().r, 5);
        assert!(largest_difference(&rows(&both), &want) < 1e-5, "{how:?}");
        both.merge().unwrap();
        assert!(largest_difference(&rows(&both), &want) < 1e-5, "{how:?}, merged");
        both.unmerge();
        both.set_enabled(false);
        assert_eq!(values(&rows(&both)), values(&plain), "over the same table");
    }
    let message =
        |adapters: &[(&LoraEmbedding, f64)], how| combine_embeddings(adapters, how).unwrap_err().to_string();
    assert!(message(&[], Combination::Cat).contains("no adapter to combine"));
    assert!(message(&[(&one, 1.0), (&other, 1.0)], Combination::Linear).contains("ranks [3, 2] cannot"));
    let longer = make(&noise(&[10, 6], 1.0, DType::F32, 1), 3, 80);
    assert!(message(&[(&one, 1.0), (&longer, 1.0)], Combination::Cat).contains("different layers"));
    let place = Place::alone("embed", DType::F32, &Device::Cpu);
    let dora = LoraEmbedding::dora(table.clone(), &LoraConfig::default(), &place).unwrap();
    assert!(message(&[(&dora, 1.0)], Combination::Cat).contains("DoRA of an embedding cannot be combined"));
    let factors = |a: &[usize], b: &[usize]| {
        let (a, b) = (noise(a, 1.0, DType::F32, 1), noise(b, 1.0, DType::F32, 2));
        LoraEmbedding::from_factors(table.clone(), &a, &b, &LoraConfig::default())
    };
    assert_eq!(factors(&[2, 9], &[6, 2]).unwrap().config().r, 2);
    for (a, b, name) in [([2, 8], [6, 2], "lora_embedding_A"), ([2, 9], [6, 3], "lora_embedding_B")] {
        let error = factors(&a, &b).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}: expected shape")), "{error}");
    }
}

#[test]
fn factors_are_of_one_float_dtype() {
    let factor = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let (table, config) = (noise(&[9, 6], 1.0, DType::F32, 1), LoraConfig::default());
    for (a, b, end) in [
        (DType::F32, DType::F64, "B: expected dtype f32, as the other factor has, got F64"),
        (DType::U32, DType::U32, "A: expected dtype f32, f64, bf16 or f16, got U32"),
    ] {
        let (a, b) = (factor(&[2, 9], a), factor(&[6, 2], b));
        let layer = LoraAdapter::from_factors(&a, &b, &config).unwrap_err().to_string();
        assert_eq!(layer.replace(".weight", ""), format!("lora_{end}"));
        let embedding = LoraEmbedding::from_factors(table.clone(), &a, &b, &config).unwrap_err();
        assert_eq!(embedding.to_string(), format!("lora_embedding_{end}"));
    }
}

/// Two layers, of which one has much more to learn.
#[test]
fn the_budget_ends_at_its_total_within_its_bounds_and_favours_the_layer_that_learns_more() {
    for (min_r, max_r) in [(0, None), (2, Some(5))] {
        let make = |name: &str| {
            let place = Place::alone(name, DType::F32, &Device::Cpu);
            AdaLoraAdapter::new(20, 12, &AdaLoraConfig::default().with_init_r(6), &place).unwrap()
        };
        let (much, little) = (make("much"), make("little"));
        let adapters = [("much", &much), ("little", &little)];
        let config = RankBudgetConfig { target_r: 3, min_r, max_r, ..RankBudgetConfig::default() };
        let mut budget = RankBudget::new(config.with_phases(5, 10)).unwrap();
        let vars: Vec<Var> = adapters.iter().flat_map(|(_, a)| a.parameters()).map(|(_, var)| var).collect();
        let mut adam = AdamW::new(vars, ParamsAdamW { lr: 0.02, ..ParamsAdamW::default() }).unwrap();
        let x = noise(&[64, 20], 1.0, DType::F32, 6);
        let target = x.matmul(&noise(&[20, 12], 0.5, DType::F32, 7)).unwrap();
        let small = x.matmul(&noise(&[20, 12], 0.02, DType::F32, 8)).unwrap();
        let total = 40;
        let mut before = 12;
        for index in 1..=total {
            let error = |a: &AdaLoraAdapter, t: &Tensor| {
                (a.delta(&x).unwrap() - t).unwrap().sqr().unwrap().mean_all().unwrap()
            };
            let loss = (error(&much, &target) + error(&little, &small)).unwrap();
            let penalty = flylora::penalty([&much, &little]).unwrap().unwrap();
            let grads = (loss + (penalty * 0.01).unwrap()).unwrap().backward().unwrap();
            adam.step(&grads).unwrap();
            budget.update(Step { index, total }, &grads, &adapters).unwrap();
            let ranks = much.rank() + little.rank();
            assert!(ranks <= before, "ranks never come back: {before} to {ranks}");
            assert!(index > 5 || ranks == 12, "warm-up");
            assert!(index < 30 || ranks == 6, "step {index}: {ranks}");
            before = ranks;
        }
        assert!(much.rank() > little.rank(), "{} and {}", much.rank(), little.rank());
        assert!(little.rank() >= min_r && much.rank() <= max_r.unwrap_or(6));
        for (_, adapter) in adapters {
            let e = values(adapter.e());
            for (value, kept) in e.iter().zip(adapter.kept()) {
                assert_eq!(*value != 0.0, kept, "what is given up is exactly 0: {e:?}");
            }
            assert_eq!(adapter.active_parameters(), adapter.rank() * (20 + 12 + 1));
        }
    }
    for (config, message) in [
        (RankBudgetConfig::default().with_target_r(0), "target_r must be at least 1"),
        (RankBudgetConfig::default().with_bounds(9, 20), "min_r must be at most target_r"),
        (RankBudgetConfig::default().with_bounds(0, 2), "max_r must be at least target_r"),
        (RankBudgetConfig::default().with_every(0), "every must be at least 1"),
        (RankBudgetConfig { beta1: 1.0, ..RankBudgetConfig::default() }, "beta1 must be between 0 and 1"),
    ] {
        assert!(RankBudget::new(config).unwrap_err().to_string().contains(message));
    }
}

#[test]
fn a_run_that_is_too_short_for_its_phases_is_refused() {
    let place = Place::alone("q", DType::F32, &Device::Cpu);
    let adapter = AdaLoraAdapter::new(20, 12, &AdaLoraConfig::default().with_init_r(6), &place).unwrap();
    let grads = adapter.delta(&noise(&[4, 20], 1.0, DType::F32, 1)).unwrap().sum_all().unwrap();
    let grads = grads.backward().unwrap();
    for (warm_up, final_steps) in [(10, 0), (5, 5), (0, 10), (0, 20)] {
        let config = RankBudgetConfig::default().with_target_r(2).with_phases(warm_up, final_steps);
        let step = Step { index: 1, total: 10 };
        let error = RankBudget::new(config)
            .unwrap()
            .update(step, &grads, &[("q", &adapter)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("warm_up must be less than the") && error.contains("run of 10"), "{error}");
    }
}

#[test]
fn the_audit_names_the_first_variable_that_is_cut_off_and_where() {
    let layers: Vec<_> = ["a", "b"].iter().map(|name| adapter(&lora(2), name, 5)).collect();
    let names = |layers: &[Arc<dyn Adapter>]| -> Vec<(String, Var)> {
        let of = |(i, a): (usize, &Arc<dyn Adapter>)| {
            a.parameters().into_iter().map(|(p, var)| (format!("layers.{i}.{p}"), var)).collect::<Vec<_>>()
        };
        layers.iter().enumerate().flat_map(of).collect()
    };
    let x = noise(&[4, 20], 1.0, DType::F32, 9);
    let first = layers[0].delta(&x).unwrap();
    let wide = Tensor::cat(&[&first, &first.narrow(1, 0, 8).unwrap()], 1).unwrap();
    let run = |middle: &Tensor| layers[1].delta(middle).unwrap().sqr().unwrap().sum_all().unwrap();
    flylora::audit(names(&layers), &run(&wide).backward().unwrap()).unwrap();
    // candle's rms_norm has no backward pass and does not say so.
    let norm = |x: &Tensor| candle_nn::ops::rms_norm(x, &Tensor::ones(20, DType::F32, x.device())?, 1e-5);
    let grads = run(&norm(&wide).unwrap()).backward().unwrap();
    let error = flylora::audit(names(&layers), &grads).unwrap_err();
    let Error::NoGradient { parameter, why } = &error else { panic!("{error}") };
    assert_eq!(parameter, "layers.0.lora_A.weight");
    assert!(why.as_ref().unwrap().starts_with("layers.1.lora_A.weight, which comes after it, has one"));
    // Which op it is, the stages tell.
    let stages: Vec<flylora::Stage<'_>> = vec![
        ("layers.0", Box::new(|x| layers[0].delta(x))),
        ("widen", Box::new(|x| Tensor::cat(&[x, &x.narrow(1, 0, 8)?], 1))),
        ("norm", Box::new(norm)),
        ("layers.1", Box::new(|x| layers[1].delta(x))),
    ];
    let error = flylora::trace(&x, &stages).unwrap_err().to_string();
    assert!(error.starts_with("the input of norm has no gradient"), "{error}");
}

#[test]
fn the_audit_tells_a_layer_that_is_not_used_from_a_loss_that_is_cut_off() {
    let square = FrozenLinear::new(noise(&[20, 20], 0.3, DType::F32, 1), None).unwrap();
    let names = ["a", "b", "c"];
    let layers: Vec<Arc<dyn Adapter>> = names
        .iter()
        .map(|name| lora(2).build(&square, &Place::alone(*name, DType::F32, &Device::Cpu)).unwrap())
        .collect();
    let parameters: Vec<(String, Var)> = names
        .iter()
        .zip(&layers)
        .flat_map(|(name, a)| a.parameters().into_iter().map(move |(p, var)| (format!("{name}.{p}"), var)))
        .collect();
    let x = noise(&[4, 20], 1.0, DType::F32, 9);
    let audited = |used: &[usize], cut: bool| {
        let mut y = x.clone();
        for i in used {
            y = (&y + layers[*i].delta(&y).unwrap()).unwrap();
        }
        let y = if cut {
            y.detach() + Var::zeros(1, DType::F32, &Device::Cpu).unwrap().broadcast_as((4, 20))
        } else {
            Ok(y)
        };
        flylora::audit(parameters.clone(), &y.unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap())
            .map_err(|e| e.to_string())
    };
    // B is 0, so A's gradient is zeros: that is not a missing one.
    assert_eq!(audited(&[0, 1, 2], false), Ok(()));
    for (used, cut, name, why) in [
        (&[1, 2][..], false, "a.lora_A.weight", "b.lora_A.weight, which comes after it, has one"),
        (&[0, 2], false, "b.lora_A.weight", "c.lora_A.weight, which comes after it, has one"),
        (
            &[0, 1],
            false,
            "c.lora_A.weight",
            "those before it have one, and none from there on: the layer is not used",
        ),
        (&[0, 1, 2], true, "a.lora_A.weight", "no parameter has one: the loss is cut off behind all of them"),
    ] {
        let error = audited(used, cut).unwrap_err();
        assert!(error.starts_with(&format!("{name} has no gradient: {why}")), "{error}");
    }
}

#[test]
fn the_report_counts_and_names_what_it_compares_with() {
    let fly = AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(8, 2));
    let adapters = [("q", adapter(&lora(4), "q", 1)), ("v", adapter(&fly, "v", 2))];
    let of =
        |baseline| ParameterReport::new(adapters.iter().map(|(n, a)| (*n, a)), Some(1000), Some(baseline));
    let report = of(Baseline::lora(8));
    assert_eq!((report.trainable, report.active_per_token), (4 * 32 + 8 * 12, 4 * 32 + 2 * 12));
    assert_eq!(report.baseline.as_ref().unwrap().trainable, 2 * 8 * 32);
    assert_eq!(report.fewer_than_baseline(), Some(100.0 * (1.0 - 224.0 / 512.0)));
    assert!((report.percent().unwrap() - 100.0 * 224.0 / 1224.0).abs() < 1e-12);
    let text = report.to_string();
    assert!(
        text.contains("56.2 % fewer than LoRA of rank 8 on the same modules, which trains 512"),
        "{text}"
    );
    assert!(of(Baseline::lora(1)).to_string().contains("more than LoRA of rank 1"));
    assert_eq!(of(Baseline::FullWeights).baseline.unwrap().trainable, 2 * 240);
    let none: [(&str, &LoraAdapter); 0] = [];
    assert_eq!(ParameterReport::new(none, Some(0), None).percent(), None);
    // Embeddings beside layers: of A a token makes use of its own column.
    let table = noise(&[9, 6], 1.0, DType::F32, 1);
    let place = Place::alone("embed", DType::F32, &Device::Cpu);
    let config = LoraConfig::default().with_r(2);
    let embedding = LoraEmbedding::new(table.clone(), &config, &place).unwrap();
    let dora = LoraEmbedding::dora(table, &config, &place).unwrap();
    let q = flylora::AnyLinear::from_parts(frozen(), Arc::clone(&adapters[0].1)).unwrap();
    let all: [(&str, &dyn Counted); 3] = [("q", &q), ("embed", &embedding), ("other", &dora)];
    let report = ParameterReport::new(all, None, Some(Baseline::FullWeights));
    let of = |i: usize| (report.adapters[i].trainable, report.adapters[i].active_per_token);
    assert_eq!((of(1), of(2)), ((2 * (9 + 6), 2 * (1 + 6)), (2 * (9 + 6) + 6, 2 * (1 + 6) + 6)));
    assert_eq!(report.adapters[2].kind, "DoRA");
    assert_eq!(report.trainable, 4 * 32 + 2 * 30 + 6);
    assert_eq!(report.baseline.unwrap().trainable, 240 + 2 * 54);
}
