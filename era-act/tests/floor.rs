//! The entropy floors: they hold, they have gradients, and they keep the order of what they are given.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{noise, tensor, values};
use era_act::floor::{DiscreteFloor, GaussianFloor, Lambert, entropy};

/// Logits of many sizes, the most certain and the most undecided among them.
fn logits(classes: usize, dtype: DType) -> Tensor {
    let rows: Vec<f64> = [0.0, 0.1, 1.0, 5.0, 30.0, 1e3, 1e4]
        .iter()
        .enumerate()
        .flat_map(|(i, scale)| noise(6 * classes, *scale, 1 + i as u64))
        .collect();
    tensor(&rows, dtype).reshape((42, classes)).unwrap()
}

#[test]
fn the_entropy_of_held_logits_is_never_below_the_floor() {
    for classes in [2, 3, 10, 1000] {
        let most = (classes as f64).ln() - 0.06;
        for share in [0.0, 0.3, 0.9, 1.0] {
            let floor = DiscreteFloor::new(classes, share * most).unwrap();
            for (dtype, slack) in [(DType::F64, 1e-9), (DType::F32, 2e-4)] {
                let x = logits(classes, dtype);
                let held = floor.forward(&x).unwrap();
                let least = values(&entropy(&held).unwrap()).into_iter().fold(f64::INFINITY, f64::min);
                assert!(least >= floor.least - slack, "{classes} classes: {least} under {}", floor.least);
                let paper = floor.with_lambert(Lambert::Paper).forward(&x).unwrap();
                let least = values(&entropy(&paper).unwrap()).into_iter().fold(f64::INFINITY, f64::min);
                assert!(
                    least >= floor.least - 0.05,
                    "paper, {classes} classes: {least} under {}",
                    floor.least
                );
            }
        }
    }
}

#[test]
fn held_probabilities_have_the_entropies_that_they_are_made_from() {
    let floor = DiscreteFloor::new(5, 0.7).unwrap();
    let z = floor.forward(&logits(5, DType::F64)).unwrap().to_vec2::<f64>().unwrap();
    for row in z {
        let sum: f64 = row.iter().map(|z| -z * z.exp()).sum();
        assert!((sum - (0.7f64 - 1.0).exp()).abs() < 1e-9, "{sum}");
        assert!(row.iter().all(|z| *z < -1.0), "the lower branch");
    }
}

#[test]
fn the_order_of_the_logits_stays() {
    let floor = DiscreteFloor::new(6, 1.0).unwrap();
    let x = tensor(&[0.3, -1.0, 2.0, 0.5, 1.9, -4.0], DType::F64).unsqueeze(0).unwrap();
    for lambert in [Lambert::Exact, Lambert::Paper] {
        let held = floor.with_lambert(lambert).forward(&x).unwrap().flatten_all().unwrap();
        let order = |t: &[f64]| {
            let mut order: Vec<usize> = (0..6).collect();
            order.sort_by(|a, b| t[*a].total_cmp(&t[*b]));
            order
        };
        assert_eq!(order(&values(&held)), order(&values(&x)));
    }
}

type Loss<'a> = dyn Fn(&Tensor) -> Tensor + 'a;

#[test]
fn gradients_of_the_losses_equal_central_differences() {
    let floor = DiscreteFloor::new(4, 0.5).unwrap();
    let gaussian = GaussianFloor::new(4, -3.0).unwrap();
    let targets = Tensor::new(&[2u32, 0, 3], &Device::Cpu).unwrap();
    let (mean, goal) = (tensor(&noise(12, 1.0, 3), DType::F64), tensor(&noise(12, 1.0, 4), DType::F64));
    let (mean, goal) = (mean.reshape((3, 4)).unwrap(), goal.reshape((3, 4)).unwrap());
    let losses: [(&str, &Loss<'_>); 3] = [
        ("exact", &|x| floor.cross_entropy(x, &targets).unwrap()),
        ("paper", &|x| floor.with_lambert(Lambert::Paper).cross_entropy(x, &targets).unwrap()),
        ("gaussian", &|x| gaussian.nll(&mean, x, &goal).unwrap()),
    ];
    let start = noise(12, 2.0, 5);
    for (name, loss) in losses {
        let at = |v: &[f64]| tensor(v, DType::F64).reshape((3, 4)).unwrap();
        let x = Var::from_tensor(&at(&start)).unwrap();
        let grads = loss(&x).backward().unwrap();
        let got = values(grads.get(&x).unwrap());
        for i in 0..12 {
            let moved = |step: f64| {
                let mut v = start.clone();
                v[i] += step;
                values(&loss(&at(&v)))[0]
            };
            let want = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            assert!((got[i] - want).abs() < 1e-7 * (1.0 + want.abs()), "{name}[{i}]: {} and {want}", got[i]);
        }
        assert!(got.iter().any(|g| g.abs() > 1e-4), "{name}");
    }
}

#[test]
fn gradients_stay_finite_for_the_most_certain_logits() {
    let floor = DiscreteFloor::new(10, 0.8).unwrap();
    let x = Var::from_tensor(&logits(10, DType::F32)).unwrap();
    let grads = floor.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(&x).unwrap()).iter().all(|g| g.is_finite()));
}

#[test]
fn the_sum_of_log_deviations_is_never_below_the_floor_and_each_is_in_its_range() {
    for (dims, least) in [(1, -3.0), (3, -4.0), (17, -40.0), (6, 12.0)] {
        let floor = GaussianFloor::new(dims, least).unwrap();
        let log_sigma = floor.forward(&logits(dims, DType::F64)).unwrap();
        for row in log_sigma.to_vec2::<f64>().unwrap() {
            assert!(row.iter().sum::<f64>() >= least - 1e-9);
            assert!(row.iter().all(|s| (-5.0..=2.0 + 1e-12).contains(s)), "{row:?}");
        }
        let entropies = values(&GaussianFloor::entropy(&log_sigma).unwrap());
        let of_least = least + dims as f64 * 1.418_938_533_204_672_7; // ln(2 pi e) / 2
        assert!(entropies.iter().all(|h| *h >= of_least - 1e-9));
        assert!((GaussianFloor::of_entropy(dims, of_least).unwrap().least - least).abs() < 1e-9);
    }
}

#[test]
fn a_class_that_is_ruled_out_adds_nothing_to_the_entropy() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let out = f64::NEG_INFINITY;
        let masked = tensor(&[0.5, out, -1.0, out, 0.25, out], dtype).reshape((2, 3)).unwrap();
        let masked = Var::from_tensor(&masked).unwrap();
        let h = entropy(&masked).unwrap();
        let p = 1.0 / (1.0 + (-1.5f64).exp());
        let want = -p * p.ln() - (1.0 - p) * (1.0 - p).ln();
        let [two, one] = values(&h)[..] else { panic!() };
        assert!((two - want).abs() < 1e-6 && one == 0.0, "{dtype:?}: {two} and {want}, {one} and 0");
        // Large weights of the entropy too.
        let grads = (h * 100.0).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(values(grads.get(&masked).unwrap()).iter().all(|g| g.is_finite()), "{dtype:?}");
        let floor = DiscreteFloor::new(3, 0.5).unwrap();
        let held = floor.forward(&masked).unwrap();
        assert!(values(&entropy(&held).unwrap()).iter().all(|h| *h > 0.49));
    }
}

#[test]
fn an_empty_batch_gives_an_empty_result() {
    for shape in [vec![0, 4], vec![2, 0, 4]] {
        let x = Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu).unwrap();
        let held = DiscreteFloor::new(4, 0.5).unwrap().forward(&x).unwrap();
        let log_sigma = GaussianFloor::new(4, -1.0).unwrap().forward(&x).unwrap();
        assert_eq!((held.dims(), log_sigma.dims()), (x.dims(), x.dims()));
        let entropies = [entropy(&held).unwrap(), GaussianFloor::entropy(&log_sigma).unwrap()];
        assert!(entropies.iter().all(|h| h.dims() == &shape[..shape.len() - 1]));
    }
}

#[test]
fn the_likelihood_is_that_of_a_gaussian() {
    let floor = GaussianFloor::new(2, 1.0).unwrap();
    let raw = tensor(&[0.4, -0.4], DType::F64).reshape((1, 2)).unwrap();
    let log_sigma = values(&floor.forward(&raw).unwrap());
    let (mean, target) = ([0.5, -1.0], [1.5, 2.0]);
    let want: f64 = (0..2)
        .map(|i| {
            let z: f64 = (target[i] - mean[i]) / log_sigma[i].exp();
            0.5 * z * z + log_sigma[i] + 0.5 * (2.0 * std::f64::consts::PI).ln()
        })
        .sum();
    let row = |v: [f64; 2]| tensor(&v, DType::F64).reshape((1, 2)).unwrap();
    let got = values(&floor.nll(&row(mean), &raw, &row(target)).unwrap())[0];
    assert!((got - want).abs() < 1e-12, "{got} and {want}");
}

#[test]
fn what_is_out_of_range_is_named_and_configurations_come_back() {
    let message = |r: Result<DiscreteFloor, era_act::Error>| r.unwrap_err().to_string();
    assert!(message(DiscreteFloor::new(1, 0.0)).contains("classes must be at least 2"));
    assert!(
        message(DiscreteFloor::new(10, 2.3)).contains("least must be from 0 to ln(classes) - 0.06, got 2.3")
    );
    assert!(message(DiscreteFloor::new(10, -0.1)).contains("least"));
    let message = |r: Result<GaussianFloor, era_act::Error>| r.unwrap_err().to_string();
    assert!(message(GaussianFloor::new(0, 0.0)).contains("dims"));
    assert!(message(GaussianFloor::new(2, 5.0)).contains("least must be at most dims * max_log_sigma"));
    let range = GaussianFloor::new(2, 0.0).unwrap().with_range(3.0, 1.0);
    assert!(message(range).contains("min_log_sigma"));
    let floor = DiscreteFloor::new(10, 0.8).unwrap();
    let error = floor.forward(&logits(9, DType::F32)).unwrap_err().to_string();
    assert!(error.contains("last dimension is 10, got shape [42, 9]"), "{error}");
    let text = serde_json::to_string(&floor).unwrap();
    assert_eq!(serde_json::from_str::<DiscreteFloor>(&text).unwrap(), floor);
    let gaussian: GaussianFloor = serde_json::from_str(r#"{"dims": 3, "least": -4}"#).unwrap();
    assert_eq!(gaussian, GaussianFloor::new(3, -4.0).unwrap());
    assert!(serde_json::from_str::<GaussianFloor>(r#"{"dims": 3, "least": -4, "x": 1}"#).is_err());
}
