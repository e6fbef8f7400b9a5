//! Every kind of adapter, tested as PEFT tests its own: one table, one suite.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
use common::{assert_slopes, largest_difference, move_all, noise, values};
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, AnyLinear, FlyLoraConfig, FrozenLinear, LoraConfig, LoraEmbedding,
    LoraInit, MaskSelection, MaskedLoraConfig, Merge, Place, Routing, Scaling, Step, load_adapters,
    save_adapters,
};

const IN: usize = 20;
const OUT: usize = 12;

fn lora() -> LoraConfig {
    LoraConfig::default().with_r(4).with_alpha(6.0)
}

/// One row a kind, and more where a setting changes the path.
fn kinds() -> Vec<AdapterKind> {
    let fly = FlyLoraConfig::default().with_ranks(8, 3).with_alpha(16.0);
    let masked = MaskedLoraConfig::default().with_lora(lora());
    vec![
        AdapterKind::Lora(lora()),
        AdapterKind::Lora(lora().with_bias(true)),
        AdapterKind::Lora(lora().with_scaling(Scaling::AlphaOverSqrtR).with_init(LoraInit::Gaussian)),
        AdapterKind::Lora(lora().with_init(LoraInit::Orthogonal)),
        AdapterKind::Lora(lora().with_init(LoraInit::Pissa { iterations: None })),
        AdapterKind::Lora(lora().with_init(LoraInit::Pissa { iterations: Some(4) })),
        AdapterKind::Dora(lora()),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(4)),
        AdapterKind::FlyLora(fly.clone()),
        AdapterKind::FlyLora(fly.clone().with_routing(Routing::Signed).with_density(0.6)),
        AdapterKind::FlyLora(fly.with_ranks(8, 8)),
        AdapterKind::MaskedLora(masked.clone()),
        AdapterKind::MaskedLora(masked.clone().with_selection(MaskSelection::Magnitude { every: 2 })),
        AdapterKind::MaskedLora(
            masked.with_selection(MaskSelection::MagnitudeGradient { every: 1, fraction: 0.3 }),
        ),
    ]
}

fn frozen(dtype: DType) -> FrozenLinear {
    FrozenLinear::new(noise(&[OUT, IN], 0.3, dtype, 1), Some(noise(&[OUT], 0.5, dtype, 2))).unwrap()
}

fn build(kind: &AdapterKind, name: &str, base: DType, dtype: DType) -> AnyLinear {
    AnyLinear::build(frozen(base), kind, &Place::alone(name, dtype, &Device::Cpu)).unwrap()
}

fn wake(layer: &AnyLinear, seed: u64) {
    move_all(layer.vars(), 0.3, seed);
}

fn x(dtype: DType) -> Tensor {
    noise(&[3, 5, IN], 1.0, dtype, 9)
}

#[test]
fn a_new_adapter_adds_nothing() {
    for kind in kinds() {
        for (base, dtype, bound) in
            [(DType::F32, DType::F32, 1e-6), (DType::BF16, DType::F32, 0.02), (DType::F64, DType::F64, 1e-6)]
        {
            let layer = build(&kind, "layer", base, dtype);
            let (got, want) = (layer.forward(&x(base)).unwrap(), layer.base().forward(&x(base)).unwrap());
            let exact = !matches!(&kind, AdapterKind::Lora(c) if c.init == LoraInit::Orthogonal);
            if exact {
                assert_eq!(values(&got), values(&want), "{kind:?} in {base:?}");
            } else {
                assert!(largest_difference(&got, &want) <= bound, "{kind:?} in {base:?}");
            }
            wake(&layer, 20);
            assert!(largest_difference(&layer.forward(&x(base)).unwrap(), &want) > 0.05, "{kind:?} awake");
        }
    }
}

#[test]
fn the_output_has_the_shape_and_dtype_of_the_base_for_any_input() {
    for kind in kinds() {
        for (base, dtype) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::BF16)]
        {
            let layer = build(&kind, "layer", base, dtype);
            wake(&layer, 21);
            for shape in [vec![IN], vec![7, IN], vec![2, 3, 4, IN], vec![0, IN]] {
                let y = layer.forward(&noise(&shape, 1.0, base, 3)).unwrap();
                let mut want = shape.clone();
                *want.last_mut().unwrap() = OUT;
                assert_eq!((y.dims(), y.dtype()), (want.as_slice(), base), "{kind:?}");
                assert!(values(&y).iter().all(|v| v.is_finite()));
            }
            let error = layer.forward(&noise(&[2, IN + 1], 1.0, base, 3)).unwrap_err().to_string();
            assert!(error.contains("expected shape [2, 20], got [2, 21]"), "{error}");
        }
    }
}

#[test]
fn gradients_equal_central_differences() {
    for kind in kinds() {
        // The straight-through gradient is not one: it is checked below.
        let through =
            matches!(&kind, AdapterKind::MaskedLora(c) if c.selection == MaskSelection::StraightThrough);
        if through {
            continue;
        }
        let layer = build(&kind, "layer", DType::F64, DType::F64);
        wake(&layer, 22);
        let input = Var::from_tensor(&noise(&[4, IN], 1.0, DType::F64, 23)).unwrap();
        let weights = noise(&[4, OUT], 1.0, DType::F64, 24);
        let loss = || (layer.forward(&input).unwrap().sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
        let grads = loss().backward().unwrap();
        let mut all = layer.parameters();
        all.push(("x".into(), input.clone()));
        for (name, var) in all {
            // |V| counts as a constant: the paper's gradient of the factors is not that of the loss.
            if matches!(kind, AdapterKind::Dora(_)) && name.contains("lora_A") | name.contains("lora_B") {
                continue;
            }
            assert_slopes(&format!("{kind:?}: {name}"), grads.get(&var), &var, loss, 1e-6);
        }
    }
}

/// `|a - b| / |b|`
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let (a, b) = (values(a), values(b));
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

// A sum in bf16 stops growing at 256 of its terms.
#[test]
fn gradients_over_many_rows_are_those_of_f32_in_half_precision_too() {
    let rows = noise(&[3000, IN], 1.0, DType::BF16, 9).abs().unwrap();
    for kind in kinds() {
        let layers = [DType::BF16, DType::F32].map(|dtype| build(&kind, "layer", dtype, dtype));
        let gradients = |layer: &AnyLinear| {
            move_all(layer.vars(), 0.3, 5);
            let y = layer.forward(&rows.to_dtype(layer.base().dtype()).unwrap()).unwrap();
            y.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap()
        };
        let [got, want] = layers.each_ref().map(gradients);
        let [half, whole] = layers.map(|layer| layer.parameters());
        for ((name, one), (_, other)) in half.iter().zip(&whole) {
            let off = relative(got.get(one).unwrap(), want.get(other).unwrap());
            assert!(off < 0.02, "{kind} {name}: off by {off}");
        }
    }
}

#[test]
fn gradients_of_an_id_that_comes_often_are_those_of_f32_in_half_precision_too() {
    let ids: Vec<u32> = (0..3000).map(|i| i / 1000).collect();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap();
    for dora in [false, true] {
        let [got, want] = [DType::BF16, DType::F32].map(|dtype| {
            let (table, place) = (noise(&[9, 6], 1.0, dtype, 1), Place::alone("embed", dtype, &Device::Cpu));
            let make = if dora { LoraEmbedding::dora } else { LoraEmbedding::new };
            let embedding = make(table, &lora(), &place).unwrap();
            move_all(embedding.parameters().into_iter().map(|(_, var)| var), 0.3, 5);
            let y = embedding.forward(&ids).unwrap().to_dtype(DType::F32).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            embedding
                .parameters()
                .into_iter()
                .map(|(name, var)| (name, grads.get(&var).unwrap().clone()))
                .collect::<Vec<_>>()
        });
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let off = relative(got, want);
            assert!(off < 0.02, "{name}: off by {off}");
        }
    }
}

#[test]
fn every_trainable_has_a_gradient_and_the_base_has_none() {
    for kind in kinds() {
        let weight = Var::from_tensor(&noise(&[OUT, IN], 0.3, DType::F32, 1)).unwrap();
        let base = FrozenLinear::new(weight.as_tensor().clone(), None).unwrap();
        let layer = AnyLinear::build(base, &kind, &Place::alone("l", DType::F32, &Device::Cpu)).unwrap();
        wake(&layer, 25);
        let input = Var::from_tensor(&x(DType::F32)).unwrap();
        let grads = layer.forward(&input).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        flylora::audit(layer.parameters(), &grads).unwrap();
        for (name, var) in layer.parameters() {
            assert!(values(grads.get(&var).unwrap()).iter().any(|v| *v != 0.0), "{kind:?}: {name}");
        }
        assert!(grads.get(&weight).is_none() && grads.get(&input).is_some());
    }
}

/// A short training run, with all that each kind does between its steps. Returns the first and the last loss.
fn train(layer: &AnyLinear, steps: u64) -> (f64, f64) {
    let target = noise(&[15, OUT], 1.0, DType::F32, 30);
    let input = x(DType::F32).flatten_to(1).unwrap();
    let mut sgd = SGD::new(layer.vars(), 0.3).unwrap();
    let error = || layer.forward(&input).unwrap().sub(&target).unwrap().sqr().unwrap().mean_all().unwrap();
    let first = values(&error())[0];
    for index in 1..=steps {
        let mut loss = error();
        if let Some(penalty) = layer.adapter().penalty().unwrap() {
            loss = (loss + (penalty * 0.01).unwrap()).unwrap();
        }
        let grads = loss.backward().unwrap();
        sgd.step(&grads).unwrap();
        layer.adapter().after_step(Step { index, total: steps }, &grads).unwrap();
    }
    (first, values(&error())[0])
}

#[test]
fn training_lowers_the_loss_and_moves_the_adapter_alone() {
    for kind in kinds() {
        let layer = build(&kind, "layer", DType::F32, DType::F32);
        if !matches!(kind, AdapterKind::Lora(_) | AdapterKind::Dora(_)) {
            wake(&layer, 26); // AdaLoRA starts slowly
        }
        let before: Vec<_> = layer.vars().iter().map(|v| values(v)).collect();
        let weight = values(&layer.base().weight().unwrap());
        let (first, last) = train(&layer, 20);
        assert!(last < 0.98 * first, "{kind:?}: {first} to {last}");
        for (before, var) in before.iter().zip(layer.vars()) {
            assert_ne!(before, &values(&var), "{kind:?}");
        }
        assert_eq!(weight, values(&layer.base().weight().unwrap()));
    }
}

#[test]
fn merging_keeps_the_outputs_and_unmerging_gives_the_same_bits_or_nothing_is_merged() {
    for kind in kinds() {
        for (base, dtype, bound) in
            [(DType::F32, DType::F32, 2e-5), (DType::F64, DType::F64, 1e-12), (DType::BF16, DType::F32, 0.12)]
        {
            let mut layer = build(&kind, "layer", base, dtype);
            wake(&layer, 27);
            let weight = values(&layer.base().weight().unwrap());
            let before = layer.forward(&x(base)).unwrap();
            let routed = matches!(&kind, AdapterKind::FlyLora(c) if c.k < c.r);
            let merge = layer.merge().unwrap();
            assert_eq!(merge, if routed { Merge::Unsupported } else { Merge::Exact }, "{kind:?}");
            assert_eq!(layer.is_merged(), !routed);
            assert!(largest_difference(&layer.forward(&x(base)).unwrap(), &before) < bound, "{kind:?}");
            layer.set_enabled(false);
            let plain = layer.base().forward(&x(base)).unwrap();
            assert_eq!(values(&layer.forward(&x(base)).unwrap()), values(&plain), "off, {kind:?}");
            layer.set_enabled(true);
            layer.unmerge();
            assert_eq!(values(&layer.forward(&x(base)).unwrap()), values(&before));
            assert_eq!(values(&layer.base().weight().unwrap()), weight);
            if routed {
                let error = layer.into_merged().unwrap_err().to_string();
                assert!(error.contains("no weight does the same as FlyLoRA"), "{error}");
            } else {
                let plain = layer.into_merged().unwrap();
                let y = candle_nn::Module::forward(&plain, &x(base)).unwrap();
                assert!(largest_difference(&y, &before) < bound);
            }
        }
    }
}

#[test]
fn saving_and_loading_under_another_seed_and_name_gives_the_same_outputs() {
    for kind in kinds() {
        let dir = tempfile::tempdir().unwrap();
        let layer = build(&kind, "layer", DType::F32, DType::F32);
        wake(&layer, 28);
        train(&layer, 4);
        save_adapters(dir.path(), &[("model.q_proj", &layer)]).unwrap();
        let other = build(&reseeded(&kind), "another", DType::F32, DType::F32);
        wake(&other, 29);
        let y = layer.forward(&x(DType::F32)).unwrap();
        assert!(largest_difference(&y, &other.forward(&x(DType::F32)).unwrap()) > 0.01, "{kind:?}");
        load_adapters(dir.path(), &[("model.q_proj", &other)]).unwrap();
        assert_eq!(values(&y), values(&other.forward(&x(DType::F32)).unwrap()), "{kind:?}");
        // Made from the file alone.
        let file = flylora::files::AdapterFile::read(dir.path()).unwrap();
        assert_eq!(file.modules(), ["model.q_proj"]);
        let adapter = file.adapter("model.q_proj", layer.base(), DType::F32).unwrap();
        let third = AnyLinear::from_parts(layer.base().clone(), adapter).unwrap();
        assert!(largest_difference(&y, &third.forward(&x(DType::F32)).unwrap()) < 1e-5, "{kind:?}");
        // Into another kind it does not go.
        for different in kinds() {
            if std::mem::discriminant(&different) == std::mem::discriminant(&kind) {
                continue;
            }
            let wrong = build(&different, "layer", DType::F32, DType::F32);
            let error = load_adapters(dir.path(), &[("model.q_proj", &wrong)]).unwrap_err().to_string();
            assert!(error.contains("the kind is"), "{kind} into {different}: {error}");
        }
    }
}

fn reseeded(kind: &AdapterKind) -> AdapterKind {
    match kind.clone() {
        AdapterKind::Lora(c) => AdapterKind::Lora(c.with_seed(9)),
        AdapterKind::Dora(c) => AdapterKind::Dora(c.with_seed(9)),
        AdapterKind::AdaLora(c) => AdapterKind::AdaLora(c.with_seed(9)),
        AdapterKind::FlyLora(c) => AdapterKind::FlyLora(c.with_seed(9)),
        AdapterKind::MaskedLora(c) => {
            let lora = c.lora.clone().with_seed(9);
            AdapterKind::MaskedLora(c.with_lora(lora))
        }
        other => panic!("{other:?} has no row here"),
    }
}

#[test]
fn one_seed_and_name_give_one_adapter_and_variables_are_found_in_their_map() {
    for kind in kinds() {
        let state = |name: &str, kind: &AdapterKind| {
            let layer = build(kind, name, DType::F32, DType::F32);
            let all = Adapter::state(layer.adapter()).unwrap();
            all.iter().map(|(_, t)| values(t)).collect::<Vec<_>>()
        };
        assert_eq!(state("a", &kind), state("a", &kind));
        // PiSSA's exact start is that of the weight, whatever the seed.
        if !matches!(&kind, AdapterKind::Lora(c) if matches!(c.init, LoraInit::Pissa { .. })) {
            assert_ne!(state("a", &kind), state("b", &kind), "{kind:?}");
            assert_ne!(state("a", &kind), state("a", &reseeded(&kind)), "{kind:?}");
        }
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        let first = AnyLinear::build(frozen(DType::F32), &kind, &Place::from(vb.pp("a"))).unwrap();
        wake(&first, 31);
        let again = AnyLinear::build(frozen(DType::F32), &kind, &Place::from(vb.pp("a"))).unwrap();
        let names: Vec<String> =
            first.parameters().into_iter().map(|(name, _)| format!("a.{name}")).collect();
        let mut held: Vec<String> = map.data().lock().unwrap().keys().cloned().collect();
        held.sort();
        assert_eq!(held, names, "{kind:?}");
        for (a, b) in first.vars().iter().zip(again.vars()) {
            assert_eq!(a.id(), b.id());
        }
        let (y, z) = (first.forward(&x(DType::F32)).unwrap(), again.forward(&x(DType::F32)).unwrap());
        assert_eq!(values(&y), values(&z), "{kind:?}");
    }
}

#[test]
fn configurations_come_back_from_json_and_what_is_out_of_range_is_named() {
    for kind in kinds() {
        let text = serde_json::to_string(&kind).unwrap();
        assert_eq!(serde_json::from_str::<AdapterKind>(&text).unwrap(), kind, "{text}");
    }
    let fly = FlyLoraConfig::default();
    let masked = MaskedLoraConfig::default();
    let cases = [
        (AdapterKind::Lora(lora().with_r(3).with_init(LoraInit::Orthogonal)), "r must be even"),
        (AdapterKind::Dora(lora().with_init(LoraInit::Orthogonal)), "init must be kaiming_uniform"),
        (AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(0)), "init_r must be at least 1"),
        (AdapterKind::AdaLora(AdaLoraConfig::default().with_alpha(-1.0)), "alpha must be finite and over 0"),
        (AdapterKind::AdaLora(AdaLoraConfig::default().with_orthogonality(-1.0)), "orthogonality must be"),
        (AdapterKind::FlyLora(fly.clone().with_ranks(8, 9)), "k must be from 1 to r = 8, got 9"),
        (AdapterKind::FlyLora(fly.clone().with_density(0.0)), "density must be over 0"),
        (AdapterKind::FlyLora(fly.with_balance_rate(f64::NAN)), "balance_rate must be 0 or more"),
        (AdapterKind::MaskedLora(masked.clone().with_lora(lora()).with_sparsity(1.0)), "sparsity must be"),
        (
            AdapterKind::MaskedLora(
                masked.with_lora(lora()).with_selection(MaskSelection::Magnitude { every: 0 }),
            ),
            "every must be at least 1",
        ),
    ];
    for (kind, message) in cases {
        let place = Place::alone("layer", DType::F32, &Device::Cpu);
        let error = kind.build(&frozen(DType::F32), &place).unwrap_err().to_string();
        assert!(error.contains(message), "{kind:?}: {error}");
    }
    let integers = Place::alone("layer", DType::U32, &Device::Cpu);
    for kind in kinds() {
        assert!(kind.build(&frozen(DType::F32), &integers).unwrap_err().to_string().contains("got U32"));
    }
}

#[test]
fn a_quantised_base_trains_and_says_that_merging_is_approximate() {
    use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
    for kind in kinds() {
        // Blocks of 32.
        let weight = noise(&[OUT, 32], 0.3, DType::F32, 1);
        let blocks = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
        let base = FrozenLinear::quantized(QMatMul::from_qtensor(blocks).unwrap(), None).unwrap();
        let place = Place::alone("layer", DType::F32, &Device::Cpu);
        let mut layer = AnyLinear::build(base, &kind, &place).unwrap();
        let input = Var::from_tensor(&noise(&[6, 32], 1.0, DType::F32, 32)).unwrap();
        wake(&layer, 33);
        let grads = layer.forward(&input).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        flylora::audit(layer.parameters(), &grads).unwrap();
        assert_eq!(grads.get(&input).unwrap().dims(), [6, 32]);
        let y = layer.forward(&input).unwrap();
        assert_eq!(layer.merge().unwrap(), Merge::Unsupported);
        match layer.merge_for(&input).unwrap() {
            Merge::Approximate { relative_error } => {
                let routed = matches!(&kind, AdapterKind::FlyLora(c) if c.k < c.r);
                assert!(
                    relative_error > 0.0 && relative_error < if routed { 0.9 } else { 0.05 },
                    "{relative_error}"
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(layer.base().quantized_weight().is_some() && layer.is_merged());
        layer.unmerge();
        assert_eq!(values(&layer.forward(&input).unwrap()), values(&y));
    }
}

#[test]
fn an_adapter_is_shared_by_its_clones() {
    for kind in kinds() {
        let adapter: Arc<dyn Adapter> =
            kind.build(&frozen(DType::F32), &Place::alone("l", DType::F32, &Device::Cpu)).unwrap();
        let one = AnyLinear::from_parts(frozen(DType::F32), Arc::clone(&adapter)).unwrap();
        let two = AnyLinear::from_parts(frozen(DType::F32), adapter).unwrap();
        wake(&one, 34);
        train(&one, 2);
        let (y, z) = (one.forward(&x(DType::F32)).unwrap(), two.forward(&x(DType::F32)).unwrap());
        assert_eq!(values(&y), values(&z), "{kind:?}");
    }
}

#[test]
fn ranks_of_one_and_above_the_size_of_the_layer_work_in_every_kind() {
    let kinds = |r: usize| {
        let lora = LoraConfig::default().with_r(r).with_alpha(3.0);
        let masked = MaskedLoraConfig::default()
            .with_lora(lora.clone())
            .with_selection(MaskSelection::Magnitude { every: 2 });
        vec![
            AdapterKind::Lora(lora.clone()),
            AdapterKind::Dora(lora),
            AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(r)),
            AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(r, 1)),
            AdapterKind::FlyLora(FlyLoraConfig::default().with_ranks(r, r)),
            AdapterKind::MaskedLora(masked),
        ]
    };
    for ((inputs, outputs), r) in [((1, 1), 1), ((1, 5), 4), ((5, 1), 4), ((8, 3), 11), ((3, 8), 1)] {
        for kind in kinds(r) {
            let base = FrozenLinear::new(
                noise(&[outputs, inputs], 0.3, DType::F64, 1),
                Some(noise(&[outputs], 0.5, DType::F64, 2)),
            )
            .unwrap();
            let place = Place::alone("layer", DType::F64, &Device::Cpu);
            let mut layer = AnyLinear::build(base, &kind, &place).unwrap();
            wake(&layer, 40);
            // Few rows and many, which go different ways.
            for rows in [2, 50] {
                let what = format!("{kind:?} ({outputs}, {inputs}), {rows} rows");
                let x = Var::from_tensor(&noise(&[rows, inputs], 1.0, DType::F64, 41)).unwrap();
                let y = layer.forward(&x).unwrap();
                let apart = (layer.base().forward(&x).unwrap() + layer.adapter().delta(&x).unwrap()).unwrap();
                assert!(largest_difference(&y, &apart) < 1e-12, "{what}");
                let gradients = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let (whole, parts) = (gradients(&y), gradients(&apart));
                for var in layer.vars().iter().chain([&x]) {
                    let (a, b) = (whole.get(var).unwrap(), parts.get(var).unwrap());
                    assert!(largest_difference(a, b) < 1e-9, "{what}");
                }
            }
            let x = noise(&[4, inputs], 1.0, DType::F64, 42);
            let y = layer.forward(&x).unwrap();
            if layer.merge().unwrap() == Merge::Exact {
                assert!(largest_difference(&layer.forward(&x).unwrap(), &y) < 1e-12, "{kind:?}");
            }
        }
    }
}
