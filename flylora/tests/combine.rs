//! Adapters combined into one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{largest_difference, move_all, noise, values};
use flylora::{
    Adapter, Combination, LoraAdapter, LoraConfig, LoraEmbedding, MajoritySign, Over, Place, combine,
    combine_embeddings,
};

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
