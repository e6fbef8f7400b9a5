//! Groups, masks, sparse rows, frozen parameters, and changes in mid-run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops there")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{all_bits, bits, config, named, record_warnings, scalar, store, tensor, train, values, var};
use velvet_optim::{
    BackendChoice, CautiousUpdate, Error, HalfParameters, Lion, Orthogonal, ParamGroup, RowMoment, Rule, Sgd,
    SparseRows, StateFormat, Training, TrustRegion, Velvet, VelvetConfig, WeightDecayOn,
};

fn vars(names: &[(&str, &[usize])]) -> Vec<(String, Var)> {
    names
        .iter()
        .enumerate()
        .map(|(i, (name, shape))| ((*name).to_owned(), var(i as u64, shape, DType::F32)))
        .collect()
}

const MODEL: [(&str, &[usize]); 5] = [
    ("model.embed_tokens.weight", &[32, 8]),
    ("model.layers.0.mlp.down.weight", &[8, 16]),
    ("model.layers.0.norm.weight", &[8]),
    ("model.layers.0.qkv.weight", &[24, 8]),
    ("lm_head.weight", &[32, 8]),
];

#[test]
fn hidden_matrices_get_their_rule_and_the_rest_the_other() {
    let rule = Rule::Orthogonal(Orthogonal::default());
    let opt = Velvet::named(vars(&MODEL), config().with_hidden_matrices(rule)).unwrap();
    for (name, got, _) in opt.rules() {
        let expected = if name.contains("qkv") || name.contains("mlp") { rule } else { Rule::AdamW };
        assert_eq!(got, expected, "{name}");
    }
    // Without names the shape tells: 32 x 4 is as long as a vocabulary.
    let unnamed = vec![var(1, &[32, 4], DType::F32), var(2, &[8, 16], DType::F32), var(3, &[8], DType::F32)];
    let opt = Velvet::from_vars(unnamed, config().with_hidden_matrices(rule)).unwrap();
    assert_eq!(opt.rules().map(|(_, rule, _)| rule).collect::<Vec<_>>(), [Rule::AdamW, rule, Rule::AdamW]);
}

#[test]
fn the_first_group_that_matches_counts() {
    let sgd = Rule::Sgd(Sgd::default());
    let config =
        config().with_group(ParamGroup { rule: Some(sgd), ..ParamGroup::of(["*.qkv.*"]) }).with_group(
            ParamGroup { rule: Some(Rule::Lion(Lion::default())), ..ParamGroup::of(["model.layers.*"]) },
        );
    let opt = Velvet::named(vars(&MODEL), config).unwrap();
    let rules: Vec<_> = opt.rules().map(|(name, rule, _)| (name, rule)).collect();
    assert_eq!(rules[0], ("lm_head.weight", Rule::AdamW));
    assert_eq!(rules[2].1, Rule::Lion(Lion::default()));
    assert_eq!(rules[4], ("model.layers.0.qkv.weight", sgd));
    assert!(opt.state().unwrap().contains_key("model.layers.0.qkv.weight.momentum_buffer"));
}

#[test]
fn a_groups_learning_rate_and_decay_are_those_of_an_optimizer_of_its_own() {
    let run = |config: VelvetConfig| {
        let vars = named(&[&[5, 3]], DType::F32);
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        train(&mut opt, &vars, 1, 3);
        bits(&vars[0].1)
    };
    let group = ParamGroup { lr_scale: 0.25, weight_decay: Some(0.3), ..ParamGroup::of(["w?"]) };
    let base = VelvetConfig { weight_decay: 0.1, ..config().with_lr(0.04) };
    let alone = VelvetConfig { weight_decay: 0.3, ..config().with_lr(0.01) };
    assert_eq!(run(base.clone().with_group(group)), run(alone));
    // A group that decays does so whatever its shape; others follow the configuration.
    let vectors = VelvetConfig { decay_on: WeightDecayOn::Matrices, ..base };
    let decayed = |group: ParamGroup| {
        let x = Var::new(&[1f32], &Device::Cpu).unwrap();
        let config = vectors.clone().with_group(group);
        let mut opt = Velvet::named(vec![("x".into(), x.clone())], config).unwrap();
        opt.try_step(&store([(&x, Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap())])).unwrap();
        scalar(&x.squeeze(0).unwrap()).unwrap()
    };
    assert_eq!(decayed(ParamGroup::of(["x"])), 1.0);
    let with = decayed(ParamGroup { weight_decay: Some(0.5), ..ParamGroup::of(["x"]) });
    assert!((with - (1.0 - 0.04 * 0.5)).abs() < 1e-7);
}

#[test]
fn groups_that_fit_nothing_are_errors() {
    let unused = config().with_group(ParamGroup::of(["nothing.*"]));
    let error = Velvet::named(vars(&MODEL), unused).unwrap_err();
    assert!(matches!(&error, Error::UnusedGroup { names } if names == &["nothing.*"]), "{error}");
    let broken = config().with_group(ParamGroup::of(["model.[a"]));
    assert!(matches!(Velvet::named(vars(&MODEL), broken), Err(Error::Pattern { .. })));
    let orthogonal = Some(Rule::Orthogonal(Orthogonal::default()));
    let vector = config().with_group(ParamGroup { rule: orthogonal, ..ParamGroup::of(["*norm*"]) });
    let error = Velvet::named(vars(&MODEL), vector).unwrap_err();
    assert!(matches!(&error, Error::Unfit { name, .. } if name.contains("norm")), "{error}");
    let sparse =
        config().with_group(ParamGroup { sparse_rows: Some(SparseRows::Skip), ..ParamGroup::of(["*norm*"]) });
    let error = Velvet::named(vars(&MODEL), sparse).unwrap_err();
    assert!(error.to_string().contains("SparseRows::Skip needs a matrix (its shape is [8])"), "{error}");
    let both =
        ParamGroup { rule: orthogonal, sparse_rows: Some(SparseRows::Skip), ..ParamGroup::of(["*.qkv.*"]) };
    let error = Velvet::named(vars(&MODEL), config().with_group(both)).unwrap_err().to_string();
    assert!(error.contains("mixes rows") && !error.contains("needs a matrix"), "{error}");
    let nothing = config().with_group(ParamGroup::of::<&str>([]));
    let error = Velvet::named(vars(&MODEL), nothing).unwrap_err().to_string();
    assert_eq!(error, "VelvetConfig.groups: a group has no patterns, so no parameter matches it");
}

#[test]
fn a_rule_need_not_fit_what_is_frozen() {
    let rule = Rule::Orthogonal(Orthogonal::default());
    let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["*norm*"]) };
    let mut opt = Velvet::named(vars(&MODEL), config().with_rule(rule).with_group(frozen)).unwrap();
    let thawed = opt.set_config(config().with_rule(rule)).unwrap_err().to_string();
    assert!(thawed.contains("norm") && thawed.contains("needs a matrix"), "{thawed}");
}

#[test]
fn frozen_parameters_need_no_gradient_and_keep_everything() {
    let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w0"]) };
    let vars = named(&[&[5], &[3, 2]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config().with_group(frozen.clone())).unwrap();
    let warnings = record_warnings(&mut opt);
    let before = bits(&vars[0].1);
    assert!(opt.state().unwrap().keys().all(|key| key.starts_with("w1")));
    let grads = || store([(&vars[1].1, tensor(3, &[3, 2], DType::F32))]);
    opt.try_step(&grads()).unwrap();
    assert!(warnings.lock().unwrap().is_empty());
    // A NaN in a frozen parameter's gradient is nobody's business.
    let mut with_nan = grads();
    with_nan.insert(&vars[0].1, Tensor::full(f32::NAN, 5, &Device::Cpu).unwrap());
    opt.try_step(&with_nan).unwrap();
    assert_eq!(bits(&vars[0].1), before);

    // Thawed in mid-run, and its state is saved and loaded from then on.
    let bytes = opt.to_bytes().unwrap();
    opt.set_config(config()).unwrap();
    train(&mut opt, &vars, 3, 2);
    assert_ne!(bits(&vars[0].1), before);
    assert!(opt.state().unwrap().contains_key("w0.exp_avg"));
    // A state that was saved while it was frozen has nothing for it.
    opt.load_bytes(&bytes).unwrap();
    assert_eq!(scalar(&opt.state().unwrap()["w0.exp_avg"].abs().unwrap().sum_all().unwrap()).unwrap(), 0.0);
    let thawed = opt.to_bytes().unwrap();
    let mut frozen_again = Velvet::named(vars, config().with_group(frozen)).unwrap();
    frozen_again.load_bytes(&thawed).unwrap();
}

#[test]
fn a_rule_can_change_in_mid_run() {
    let vars = named(&[&[5, 4]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config()).unwrap();
    train(&mut opt, &vars, 1, 2);
    let moments = all_bits(&opt);
    opt.set_config(config().with_lr(0.5)).unwrap();
    assert_eq!(all_bits(&opt), moments); // another learning rate: the state stays
    opt.set_config(config().with_rule(Rule::Lion(Lion::default()))).unwrap();
    assert_eq!(opt.state().unwrap().len(), 1);
    train(&mut opt, &vars, 3, 1);
    assert_eq!(opt.stats().unwrap().step, 3);
}

#[test]
fn a_rule_can_change_while_a_parameter_is_frozen() {
    let orthogonal = |row_moment| Rule::Orthogonal(Orthogonal { row_moment, ..Orthogonal::default() });
    let rows = orthogonal(RowMoment::Average { decay: 0.95 });
    let rules = [
        Rule::AdamW,
        Rule::Lion(Lion::default()),
        Rule::Sgd(Sgd::default()),
        rows,
        orthogonal(RowMoment::Off),
    ];
    let frozen = |rule| {
        let group = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w0"]) };
        config().with_rule(rule).with_group(group)
    };
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        for (from, to) in rules.iter().flat_map(|from| rules.iter().map(move |to| (*from, *to))) {
            let case = format!("{backend:?}, {from:?} to {to:?}");
            let vars = named(&[&[5, 4], &[3, 2]], DType::F32);
            let mut opt =
                Velvet::named(vars.clone(), config().with_rule(from).with_backend(backend)).unwrap();
            train(&mut opt, &vars, 1, 2);
            let kept = opt.state().unwrap();
            opt.set_config(frozen(to)).unwrap();
            train(&mut opt, &vars, 3, 1);
            // What the optimizer saves meanwhile is what it has.
            let bytes = opt.to_bytes().unwrap();
            let mut other = Velvet::named(vars.clone(), frozen(to).with_backend(backend)).unwrap();
            other.load_bytes(&bytes).unwrap();
            assert!(other.to_bytes().unwrap() == bytes, "{case}");
            opt.set_config(config().with_rule(to)).unwrap();
            let same = from == to;
            for (name, now) in opt.state().unwrap().iter().filter(|(name, _)| name.starts_with("w0")) {
                let values = values(now);
                assert!(if same { bits(now) == bits(&kept[name]) } else { values.iter().all(|x| *x == 0.0) });
            }
            // From here on w0 trains as one that begins now.
            if !same {
                let fresh = vec![("w0".to_owned(), Var::from_tensor(&vars[0].1.copy().unwrap()).unwrap())];
                let mut beside =
                    Velvet::named(fresh.clone(), config().with_rule(to).with_backend(backend)).unwrap();
                let before = bits(&vars[0].1);
                train(&mut opt, &vars, 4, 2);
                train(&mut beside, &fresh, 4, 2);
                assert!(bits(&vars[0].1) != before && bits(&vars[0].1) == bits(&fresh[0].1), "{case}");
            }
        }
    }
}

/// A gradient with zeros in some rows.
fn rows(seed: u64, shape: [usize; 2], empty: &[usize]) -> Tensor {
    let mut values = common::noise(seed, shape[0] * shape[1]);
    for &row in empty {
        values[row * shape[1]..(row + 1) * shape[1]].fill(0.0);
    }
    Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap()
}

#[test]
fn rows_without_a_gradient_keep_weights_and_moments() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        for rule in [Rule::AdamW, Rule::Sgd(Sgd::default()), Rule::Lion(Lion::default())] {
            // More than one chunk, and chunks that would cut rows.
            for (shape, empty) in [([5, 3], [1, 4]), ([700, 300], [3, 699]), ([3, 70_000], [0, 2])] {
                let p = var(1, &shape, DType::F32);
                let config = VelvetConfig { sparse_rows: SparseRows::Skip, rule, backend, ..config() };
                let mut opt = Velvet::named(vec![("w".into(), p.clone())], config).unwrap();
                opt.try_step(&store([(&p, rows(2, shape, &[]))])).unwrap();
                let row = |t: &Tensor, i: usize| bits(&t.get(i).unwrap());
                let (weights, state) = (p.as_tensor().copy().unwrap(), opt.state().unwrap());
                opt.try_step(&store([(&p, rows(3, shape, &empty))])).unwrap();
                for i in 0..shape[0].min(8) {
                    let kept = row(&weights, i) == row(&p, i);
                    assert_eq!(kept, empty.contains(&i), "{backend:?} {rule:?} {shape:?} row {i}");
                    for (name, before) in &state {
                        let kept = row(before, i) == row(&opt.state().unwrap()[name], i);
                        assert_eq!(kept, empty.contains(&i), "{name} row {i}");
                    }
                }
                assert_eq!(row(&weights, empty[1]), row(&p, empty[1]));
            }
        }
    }
}

#[test]
fn rows_can_be_left_out_from_the_middle_of_a_run_on() {
    let vars = named(&[&[70, 65]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config().with_state_format(StateFormat::Blockwise8)).unwrap();
    train(&mut opt, &vars, 1, 2);
    opt.set_config(VelvetConfig { sparse_rows: SparseRows::Skip, ..config() }).unwrap();
    let before = bits(&vars[0].1.get(3).unwrap());
    opt.try_step(&store([(&vars[0].1, rows(3, [70, 65], &[3]))])).unwrap();
    assert_eq!(before, bits(&vars[0].1.get(3).unwrap()));
}

#[test]
fn rows_that_are_updated_again_are_kept_in_the_format_that_was_chosen() {
    let config =
        |sparse_rows| VelvetConfig { sparse_rows, ..config().with_state_format(StateFormat::Blockwise8) };
    let vars = named(&[&[70, 65]], DType::F32);
    let mut opt = Velvet::named(vars.clone(), config(SparseRows::Skip)).unwrap();
    train(&mut opt, &vars, 1, 2);
    assert_eq!(opt.state_bytes(), 2 * 4 * 70 * 65);
    opt.set_config(config(SparseRows::Off)).unwrap();
    assert!(opt.state_bytes() < 2 * 70 * 65 + 400, "{}", opt.state_bytes());
    // So that a run that is resumed here goes on with the same bits.
    let bytes = opt.to_bytes().unwrap();
    let copy = vec![("w0".to_owned(), Var::from_tensor(&vars[0].1.copy().unwrap()).unwrap())];
    let mut resumed = Velvet::named(copy.clone(), config(SparseRows::Off)).unwrap();
    resumed.load_bytes(&bytes).unwrap();
    assert!(resumed.to_bytes().unwrap() == bytes);
    train(&mut opt, &vars, 3, 3);
    train(&mut resumed, &copy, 3, 3);
    assert!(all_bits(&opt) == all_bits(&resumed));
}

#[test]
fn sparse_rows_have_the_same_bits_on_both_back_ends() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for half in [HalfParameters::Nearest, HalfParameters::Master] {
            let run = |backend| {
                let p = var(1, &[700, 130], dtype);
                let config = VelvetConfig {
                    sparse_rows: SparseRows::Skip,
                    backend,
                    half_parameters: half,
                    ..config()
                };
                let mut opt = Velvet::named(vec![("w".into(), p.clone())], config).unwrap();
                for step in 0..3 {
                    let grad = rows(step, [700, 130], &[1, 5, 600]).to_dtype(dtype).unwrap();
                    opt.try_step(&store([(&p, grad)])).unwrap();
                }
                all_bits(&opt)
            };
            assert!(run(BackendChoice::Auto) == run(BackendChoice::Plain), "{dtype:?} {half:?}");
        }
    }
}

#[test]
fn a_cautious_update_counts_only_the_rows_that_move() {
    for backend in [BackendChoice::Auto, BackendChoice::Plain] {
        let cautious = VelvetConfig {
            cautious_update: CautiousUpdate::Aligned,
            sparse_rows: SparseRows::Skip,
            backend,
            ..config()
        };
        // One row of 1000 has gradients: it moves as if it were alone.
        let whole = var(1, &[1000, 8], DType::F32);
        let row = Var::from_tensor(&whole.get(3).unwrap().reshape((1, 8)).unwrap()).unwrap();
        let optimizer = |var: &Var| Velvet::named(vec![("w".into(), var.clone())], cautious.clone()).unwrap();
        let (mut of_whole, mut of_row) = (optimizer(&whole), optimizer(&row));
        for step in 0..4 {
            let grad = tensor(step, &[1, 8], DType::F32);
            let mut values = vec![0f32; 8000];
            values[24..32].copy_from_slice(&grad.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let all = Tensor::from_vec(values, (1000, 8), &Device::Cpu).unwrap();
            of_whole.try_step(&store([(&whole, all)])).unwrap();
            of_row.try_step(&store([(&row, grad)])).unwrap();
            assert_eq!(bits(&whole.get(3).unwrap()), bits(&row), "{backend:?} {step}");
        }
        // A step in which no row moves.
        let before = bits(&whole);
        of_whole.try_step(&store([(&whole, whole.zeros_like().unwrap())])).unwrap();
        assert_eq!(bits(&whole), before);
    }
}

#[test]
fn masked_elements_stay_exactly_zero_under_every_rule_and_the_others_train() {
    let rules = [
        Rule::AdamW,
        Rule::Sgd(Sgd::default()),
        Rule::Lion(Lion::default()),
        Rule::Orthogonal(Orthogonal::default()),
    ];
    for rule in rules {
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            for format in [StateFormat::Full, StateFormat::Blockwise8] {
                let vars = vec![("w".to_owned(), var(1, &[70, 65], dtype))];
                let half = HalfParameters::Master;
                let config = VelvetConfig { rule, state_format: format, half_parameters: half, ..config() };
                let mut opt = Velvet::named(vars.clone(), config).unwrap();
                train(&mut opt, &vars, 1, 2);
                let kept: Vec<u8> = (0..70 * 65).map(|i| u8::from(i % 3 == 0)).collect();
                let mask = Tensor::from_vec(kept.clone(), (70, 65), &Device::Cpu).unwrap();
                opt.set_mask("w", Some(&mask)).unwrap();
                let first = values(&vars[0].1);
                train(&mut opt, &vars, 3, 3);
                let last = values(&vars[0].1);
                for ((&kept, first), last) in kept.iter().zip(first).zip(last) {
                    if kept == 0 {
                        assert_eq!((first, last), (0.0, 0.0), "{rule:?} {dtype:?} {format:?}");
                    } else {
                        assert!(last.is_finite());
                    }
                }
                opt.set_mask("w", None).unwrap();
                train(&mut opt, &vars, 6, 2);
                assert!(values(&vars[0].1).iter().filter(|&&x| x == 0.0).count() < 70);
            }
        }
    }
    let mut opt = Velvet::named(vars(&[("w", &[3])]), config()).unwrap();
    let mask = Tensor::ones(2, DType::U8, &Device::Cpu).unwrap();
    let error = opt.set_mask("w", Some(&mask)).unwrap_err();
    assert_eq!(error.to_string(), "`w`: expected a mask of shape [3], got [2]");
    assert!(matches!(opt.set_mask("x", None), Err(Error::UnknownParameter { .. })));
}

#[test]
fn a_gradient_that_is_no_number_under_a_mask_is_nobodys_business() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let vars = named(&[&[3]], dtype);
        let mut opt = Velvet::named(vars.clone(), config().with_lr(0.1)).unwrap();
        let mask = Tensor::new(&[1u8, 0, 0], &Device::Cpu).unwrap();
        opt.set_mask("w0", Some(&mask)).unwrap();
        let before = values(&vars[0].1);
        let grad = Tensor::new(&[0.5f32, f32::NAN, f32::INFINITY], &Device::Cpu).unwrap();
        opt.try_step(&store([(&vars[0].1, grad.to_dtype(dtype).unwrap())])).unwrap();
        assert_eq!(opt.stats().unwrap().grad_norm, Some(0.5));
        let after = values(&vars[0].1);
        assert_ne!(after[0], before[0]);
        assert_eq!(after[1..], [0.0, 0.0], "{dtype:?}");
    }
}

#[test]
fn a_weight_of_zero_with_a_gradient_trains() {
    for rule in [Rule::AdamW, Rule::Sgd(Sgd::default()), Rule::Lion(Lion::default())] {
        let p = Var::zeros((4, 4), DType::F32, &Device::Cpu).unwrap();
        let config = VelvetConfig { rule, trust_region: TrustRegion::relative(), ..config() };
        let mut opt = Velvet::named(vec![("lora_B".into(), p.clone())], config).unwrap();
        opt.try_step(&store([(&p, Tensor::ones((4, 4), DType::F32, &Device::Cpu).unwrap())])).unwrap();
        assert!(values(&p).iter().all(|&x| x < 0.0), "{rule:?}");
    }
}
