//! What the adapted layer computes, and merging.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use common::{awake, base, largest_difference, noise, values, wake};
use flylora::{
    Adapter, AdapterKind, FrozenLinear, LoraAdapter, LoraConfig, LoraEmbedding, LoraInit, LoraLinear,
    MaskedLoraConfig, Merge, Place, Scaling,
};

const DTYPES: [(DType, f64); 4] =
    [(DType::F32, 1e-5), (DType::F64, 1e-13), (DType::BF16, 0.03), (DType::F16, 4e-3)];

#[test]
fn more_outputs_than_can_be_counted_are_refused_with_an_adapter_and_without() {
    let base = Linear::new(noise(&[1 << 16, 1], 1.0, DType::F32, 1), None);
    let mut layer = LoraLinear::seeded(base, &LoraConfig::default().with_r(1), "layer").unwrap();
    // Rows that take no memory.
    let x = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap().broadcast_as((1 << 17, 1)).unwrap();
    for enabled in [true, false] {
        layer.set_enabled(enabled);
        let error = layer.forward(&x).unwrap_err().to_string();
        assert!(error.contains("more than the 4294967295 elements"), "{error}");
    }
}

#[test]
fn a_new_adapter_leaves_the_base_output_as_it_is_to_the_bit() {
    for (dtype, _) in DTYPES {
        for bias in [false, true] {
            let linear = base(10, 6, dtype, bias);
            let layer =
                LoraLinear::seeded(linear.clone(), &LoraConfig::default().with_r(3), "layer").unwrap();
            let x = noise(&[4, 10], 1.0, dtype, 4);
            assert_eq!(
                values(&layer.forward(&x).unwrap()),
                values(&linear.forward(&x).unwrap()),
                "{dtype:?}"
            );
            assert!(values(layer.adapter().b()).iter().all(|v| *v == 0.0));
            assert!(values(layer.adapter().a()).iter().all(|v| *v != 0.0));
        }
    }
}

#[test]
fn the_output_is_the_base_plus_the_scaled_product() {
    for (dtype, tolerance) in DTYPES {
        for bias in [false, true] {
            let layer = awake(10, 6, dtype, bias);
            let x = noise(&[2, 3, 10], 1.0, dtype, 5);
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let flat = wide(&x).reshape((6, 10)).unwrap();
            let (a, b) = (wide(layer.adapter().a()), wide(layer.adapter().b()));
            let mut want = flat.matmul(&wide(&layer.base().weight().unwrap()).t().unwrap()).unwrap();
            if let Some(bias) = layer.base().bias() {
                want = want.broadcast_add(&wide(bias)).unwrap();
            }
            let delta = flat.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
            let want = (want + (delta * (6.0 / 4.0)).unwrap()).unwrap().reshape((2, 3, 6)).unwrap();
            let got = layer.forward(&x).unwrap();
            assert_eq!(got.dtype(), dtype);
            assert!(largest_difference(&got, &want) < tolerance, "{dtype:?}, bias: {bias}");
            let without = layer.base().forward(&x).unwrap();
            assert!(largest_difference(&got, &without) > 0.1, "the adapter has an effect");
        }
    }
}

#[test]
fn inputs_of_any_rank_and_strides_are_taken() {
    let layer = awake(10, 6, DType::F32, true);
    let x = noise(&[2, 3, 4, 10], 1.0, DType::F32, 6);
    let want = layer.forward(&x).unwrap();
    assert_eq!(want.dims(), [2, 3, 4, 6]);
    let one =
        x.narrow(0, 1, 1).unwrap().narrow(1, 2, 1).unwrap().narrow(2, 3, 1).unwrap().flatten_all().unwrap();
    let got = layer.forward(&one).unwrap();
    assert_eq!(got.dims(), [6]);
    assert!(largest_difference(&got, &want.flatten_to(2).unwrap().get(23).unwrap()) < 1e-6);
    let turned = layer.forward(&x.transpose(0, 2).unwrap()).unwrap();
    assert!(largest_difference(&turned, &want.transpose(0, 2).unwrap()) < 1e-6);
    let narrowed = layer.forward(&x.narrow(2, 1, 2).unwrap()).unwrap();
    assert!(largest_difference(&narrowed, &want.narrow(2, 1, 2).unwrap()) < 1e-6);
    let none = Tensor::zeros((0, 10), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(layer.forward(&none).unwrap().dims(), [0, 6]);
}

#[test]
fn a_frozen_layer_equals_the_layer_of_candle_nn() {
    for (dtype, _) in DTYPES {
        for bias in [false, true] {
            let linear = base(33, 17, dtype, bias);
            let frozen = FrozenLinear::new(linear.weight().clone(), linear.bias().cloned()).unwrap();
            let x = noise(&[5, 33], 1.0, dtype, 7);
            assert_eq!(values(&frozen.forward(&x).unwrap()), values(&linear.forward(&x).unwrap()));
            // A weight stored the other way around.
            let turned = linear.weight().t().unwrap().contiguous().unwrap().t().unwrap();
            let frozen = FrozenLinear::new(turned, linear.bias().cloned()).unwrap();
            let tolerance = if dtype == DType::F64 { 1e-14 } else { 1e-2 };
            assert!(
                largest_difference(&frozen.forward(&x).unwrap(), &linear.forward(&x).unwrap()) < tolerance
            );
        }
    }
}

#[test]
fn the_bias_of_an_adapter_is_scaled_and_merges_into_that_of_the_layer_which_gets_one_if_it_has_none() {
    let config = LoraConfig::default().with_r(4).with_alpha(6.0).with_bias(true);
    for bias in [false, true] {
        let mut layer = LoraLinear::seeded(base(24, 16, DType::F64, bias), &config, "layer").unwrap();
        let names: Vec<String> = layer.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["lora_A.weight", "lora_B.bias", "lora_B.weight"]);
        wake(layer.adapter(), 3);
        let own = noise(&[16], 0.7, DType::F64, 4);
        layer.adapter().bias().unwrap().set(&own).unwrap();
        // Few rows and many, which go different ways.
        for rows in [2, 50] {
            let x = noise(&[rows, 24], 1.0, DType::F64, 8);
            let (a, b) = (layer.adapter().a().t().unwrap(), layer.adapter().b().t().unwrap());
            let change = x.matmul(&a).unwrap().matmul(&b).unwrap().broadcast_add(&own).unwrap();
            let want = (layer.base().forward(&x).unwrap() + (change * 1.5).unwrap()).unwrap();
            assert!(largest_difference(&layer.forward(&x).unwrap(), &want) < 1e-12);
            assert_eq!(layer.merge().unwrap(), Merge::Exact);
            assert!(largest_difference(&layer.forward(&x).unwrap(), &want) < 1e-12, "merged, {bias}");
            layer.unmerge();
            assert_eq!(layer.base().bias().is_some(), bias);
        }
        let merged = layer.into_merged().unwrap();
        let mut want = (own * 1.5).unwrap();
        if let Some(bias) = base(24, 16, DType::F64, bias).bias() {
            want = (want + bias).unwrap();
        }
        assert!(largest_difference(merged.bias().unwrap(), &want) < 1e-15);
    }
}

#[test]
fn the_gradient_of_a_bias_is_the_sum_of_all_rows_in_half_precision_too() {
    let config = LoraConfig::default().with_r(2).with_alpha(2.0).with_bias(true);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let adapter = LoraAdapter::seeded(8, 6, &config, "layer", dtype, &Device::Cpu).unwrap();
        adapter.bias().unwrap().set(&noise(&[6], 1.0, dtype, 1)).unwrap();
        for rows in [3, 1000] {
            let x = noise(&[2, rows, 8], 1.0, dtype, 2);
            let y = adapter.delta(&x).unwrap().to_dtype(DType::F32).unwrap();
            // B is 0: what there is is the bias.
            let want =
                adapter.bias().unwrap().to_dtype(DType::F32).unwrap().broadcast_as((2, rows, 6)).unwrap();
            assert_eq!(values(&y), values(&want));
            let grads = y.sum_all().unwrap().backward().unwrap();
            let got = values(grads.get(adapter.bias().unwrap()).unwrap());
            assert_eq!(got, [2.0 * rows as f64; 6], "{dtype:?}");
        }
        let none = Tensor::zeros((0, 8), dtype, &Device::Cpu).unwrap();
        assert_eq!(adapter.delta(&none).unwrap().dims(), [0, 6]);
    }
}

#[test]
fn kinds_that_have_no_bias_refuse_one() {
    let config = LoraConfig::default().with_bias(true);
    let frozen = FrozenLinear::try_from(&base(24, 16, DType::F32, true)).unwrap();
    let place = Place::alone("layer", DType::F32, &Device::Cpu);
    let masked = MaskedLoraConfig::default().with_lora(config.clone());
    for (kind, what) in
        [(AdapterKind::Dora(config.clone()), "DoRA"), (AdapterKind::MaskedLora(masked), "a masked adapter")]
    {
        let want = format!("bias must be false for {what}, got true");
        assert_eq!(kind.validate().unwrap_err().to_string(), want);
        assert_eq!(kind.build(&frozen, &place).unwrap_err().to_string(), want);
    }
    let error = LoraEmbedding::new(noise(&[9, 6], 1.0, DType::F32, 1), &config, &place).unwrap_err();
    assert_eq!(error.to_string(), "bias must be false for an embedding, got true");
}

#[test]
fn merged_unmerged_and_plain_outputs_are_the_same() {
    for (dtype, tolerance) in
        [(DType::F32, 1e-5), (DType::F64, 1e-13), (DType::BF16, 0.06), (DType::F16, 8e-3)]
    {
        for bias in [false, true] {
            let mut layer = awake(24, 16, dtype, bias);
            let x = noise(&[7, 24], 1.0, dtype, 8);
            let before = layer.forward(&x).unwrap();
            let weight = values(&layer.base().weight().unwrap());

            assert_eq!(layer.merge().unwrap(), Merge::Exact);
            assert!(layer.is_merged());
            let merged = layer.forward(&x).unwrap();
            assert!(largest_difference(&merged, &before) < tolerance, "{dtype:?}");
            assert_eq!(layer.merge().unwrap(), Merge::Exact);
            assert_eq!(values(&layer.forward(&x).unwrap()), values(&merged), "merging twice adds nothing");

            layer.unmerge();
            assert!(!layer.is_merged());
            assert_eq!(values(&layer.base().weight().unwrap()), weight);
            assert_eq!(values(&layer.forward(&x).unwrap()), values(&before));

            let plain: Linear = layer.into_merged().unwrap();
            assert_eq!(plain.weight().dtype(), dtype);
            assert_eq!(values(&plain.forward(&x).unwrap()), values(&merged));
        }
    }
}

#[test]
fn the_merged_weight_is_one_product_rounded_once() {
    let mut layer = awake(24, 16, DType::BF16, false);
    let adapter = layer.adapter().clone();
    let delta = adapter.b().matmul(&(adapter.a().as_tensor() * adapter.scale()).unwrap()).unwrap();
    let want = (layer.base().weight().unwrap().to_dtype(DType::F32).unwrap() + &delta)
        .unwrap()
        .to_dtype(DType::BF16)
        .unwrap();
    assert_eq!(values(&adapter.delta_weight().unwrap()), values(&delta));
    layer.merge().unwrap();
    assert_eq!(values(layer.into_merged().unwrap().weight()), values(&want));
}

#[test]
fn rank_stabilised_scaling_divides_by_the_root() {
    let config = LoraConfig::default().with_r(16).with_alpha(8.0);
    assert_eq!(config.scale(), 0.5);
    assert_eq!(config.with_scaling(Scaling::AlphaOverSqrtR).scale(), 2.0);
}

#[test]
fn an_adapter_on_its_own_serves_a_slice_of_a_packed_projection() {
    // The packed rows are [q | k | v]; only q is adapted.
    let packed = FrozenLinear::new(noise(&[18, 10], 0.3, DType::F32, 9), None).unwrap();
    let adapter =
        LoraAdapter::seeded(10, 6, &LoraConfig::default().with_r(2), "q", DType::F32, &Device::Cpu).unwrap();
    wake(&adapter, 10);
    let x = noise(&[4, 10], 1.0, DType::F32, 11);
    let all = packed.forward(&x).unwrap();
    let q = (all.narrow(1, 0, 6).unwrap() + adapter.forward(&x).unwrap()).unwrap();
    let own = FrozenLinear::new(packed.weight().unwrap().narrow(0, 0, 6).unwrap(), None).unwrap();
    let layer = LoraLinear::from_parts(own, adapter).unwrap();
    assert!(largest_difference(&layer.forward(&x).unwrap(), &q) < 1e-6);
}

#[test]
fn variables_lie_in_the_var_map_under_the_prefix_and_are_found_again() {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let config = LoraConfig::default().with_r(3);
    let first =
        LoraLinear::new(base(10, 6, DType::F32, false), &config, vb.pp("layers.0").pp("q_proj")).unwrap();
    let second =
        LoraLinear::new(base(10, 6, DType::F32, false), &config, vb.pp("layers.1").pp("q_proj")).unwrap();
    let mut names: Vec<String> = variables.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    let want = ["layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"];
    assert_eq!(names[..2], want);
    assert_eq!(names.len(), 4);
    assert_ne!(values(first.adapter().a()), values(second.adapter().a()), "layers differ");

    // The variables are the map's own, and a second layer under the prefix shares them.
    wake(first.adapter(), 12);
    let held = variables.data().lock().unwrap()[want[1]].clone();
    assert_eq!(values(&held), values(first.adapter().b()));
    let again = LoraLinear::new(base(10, 6, DType::F32, false), &config, vb.pp("layers.0.q_proj")).unwrap();
    assert_eq!(values(again.adapter().a()), values(first.adapter().a()));
    assert_eq!(values(again.adapter().b()), values(first.adapter().b()));
    assert_eq!(again.vars()[0].id(), first.vars()[0].id());
}

#[test]
fn one_seed_gives_one_adapter_whatever_the_order_of_the_layers() {
    let build = |order: [&str; 2], seed: u64| {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let config = LoraConfig::default().with_r(3).with_seed(seed);
        for name in order {
            LoraAdapter::new(10, 6, &config, vb.pp(name)).unwrap();
        }
        let data = variables.data().lock().unwrap();
        (values(&data["q.lora_A.weight"]), values(&data["v.lora_A.weight"]))
    };
    assert_eq!(build(["q", "v"], 5), build(["v", "q"], 5));
    assert_ne!(build(["q", "v"], 5), build(["q", "v"], 6));
}

#[test]
fn a_sum_that_the_dtype_of_the_base_cannot_hold_is_not_merged() {
    let mut layer = awake(10, 6, DType::F16, false);
    let b = layer.adapter().b();
    b.set(&(b.as_detached_tensor() * 1e6).unwrap()).unwrap();
    let error = layer.merge().unwrap_err().to_string();
    assert_eq!(error, "the merged layer has values that are not finite in F16");
    assert!(!layer.is_merged());
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    let config = LoraConfig::default();
    let make = |config: &LoraConfig| LoraLinear::seeded(base(10, 6, DType::F32, false), config, "layer");
    let message = |config: &LoraConfig| make(config).unwrap_err().to_string();
    assert_eq!(message(&config.clone().with_r(0)), "r must be at least 1, got 0");
    let pissa = config.clone().with_r(7).with_init(LoraInit::Pissa { iterations: None });
    assert_eq!(message(&pissa), "r must be at most min(in, out) = min(10, 6) for PiSSA, got 7");
    assert_eq!(
        message(&config.clone().with_r(2).with_alpha(f64::NAN)),
        "alpha must be finite and not 0, got NaN"
    );
    assert!(make(&config.clone().with_r(2).with_alpha(f64::INFINITY)).is_err());

    let vector = noise(&[6], 1.0, DType::F32, 13);
    let weight = noise(&[6, 10], 1.0, DType::F32, 14);
    let frozen =
        |w: &Tensor, b: Option<&Tensor>| FrozenLinear::new(w.clone(), b.cloned()).unwrap_err().to_string();
    assert!(frozen(&vector, None).contains("must be a matrix (out, in) that is not empty, got shape [6]"));
    assert!(frozen(&weight, Some(&noise(&[5], 1.0, DType::F32, 15))).contains("expected shape [6], got [5]"));
    assert!(frozen(&weight, Some(&noise(&[6], 1.0, DType::F64, 15))).contains("expected dtype F32"));
    assert!(frozen(&weight.to_dtype(DType::U32).unwrap(), None).contains("got U32"));

    let layer = make(&config.with_r(2)).unwrap();
    let wrong = |x: &Tensor| layer.forward(x).unwrap_err().to_string();
    assert!(
        wrong(&noise(&[4, 9], 1.0, DType::F32, 16)).contains("input: expected shape [4, 10], got [4, 9]")
    );
    assert!(
        wrong(&noise(&[4, 10], 1.0, DType::F64, 16))
            .contains("input: expected dtype F32, that of the frozen")
    );
    let other = FrozenLinear::new(noise(&[6, 12], 1.0, DType::F32, 17), None).unwrap();
    let error = LoraLinear::from_parts(other, layer.adapter().clone()).unwrap_err().to_string();
    assert_eq!(error, "adapter (out, in): expected shape [6, 12], got [6, 10]");
}

#[test]
fn configurations_read_back_as_they_were_written_and_unknown_fields_are_refused() {
    let config =
        LoraConfig::default().with_r(5).with_alpha(2.5).with_seed(9).with_scaling(Scaling::AlphaOverSqrtR);
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config);
    assert_eq!(serde_json::from_str::<LoraConfig>("{}").unwrap(), LoraConfig::default());
    assert!(serde_json::from_str::<LoraConfig>(r#"{"rank": 4}"#).unwrap_err().to_string().contains("rank"));
}
