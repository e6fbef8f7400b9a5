//! Ranks that are shared between layers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use common::{noise, values};
use flylora::{AdaLoraAdapter, AdaLoraConfig, Adapter, Place, RankBudget, RankBudgetConfig, Step};

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
