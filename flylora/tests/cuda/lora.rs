use candle_core::{DType, Device, Tensor};
use flylora::{
    AdaLoraConfig, Adapter, AdapterKind, AnyLinear, FrozenLinear, LoraConfig, LoraInit, MaskSelection,
    MaskedLoraAdapter, MaskedLoraConfig, Place, Step,
};

use crate::common::noise;
use crate::{all, allowed, brief, compare, gpu, host, rows, runs};

/// A layer with all its parameters away from where they start; weight and x of `dtype`, parameters of `own`.
fn layer(
    kind: &AdapterKind,
    (inputs, outputs): (usize, usize),
    (dtype, own): (DType, DType),
    bias: bool,
    device: &Device,
) -> AnyLinear {
    layer_by(kind, (inputs, outputs), (dtype, own), bias, false, device)
}

/// The same, of a weight that lies by columns where `turned`.
pub(crate) fn layer_by(
    kind: &AdapterKind,
    (inputs, outputs): (usize, usize),
    (dtype, own): (DType, DType),
    bias: bool,
    turned: bool,
    device: &Device,
) -> AnyLinear {
    // Made in one dtype on the CPU, so that every device gets the same start.
    let weight = noise(&[outputs, inputs], 0.3, dtype, 1);
    let bias = bias.then(|| noise(&[outputs], 0.5, dtype, 2));
    let there = |t: &Tensor, dtype: DType| t.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let here = FrozenLinear::new(weight.to_dtype(DType::F32).unwrap(), None).unwrap();
    let start = kind.build(&here, &Place::alone("layer", DType::F32, &Device::Cpu)).unwrap();
    let kept = if device.is_cpu() { DType::F64 } else { dtype };
    let (weight, bias) = (there(&weight, kept), bias.map(|b| there(&b, kept)));
    let base = if turned {
        FrozenLinear::conv1d(weight.t().unwrap().contiguous().unwrap(), bias).unwrap()
    } else {
        FrozenLinear::new(weight, bias).unwrap()
    };
    let own = if device.is_cpu() { DType::F64 } else { own };
    let layer = AnyLinear::build(base, kind, &Place::alone("layer", own, device)).unwrap();
    for (i, ((_, var), (_, start))) in layer.parameters().into_iter().zip(start.parameters()).enumerate() {
        let moved = (start.as_tensor() + noise(start.dims(), 0.2, DType::F32, 10 + i as u64)).unwrap();
        var.set(&there(&moved, own)).unwrap();
    }
    layer
}

fn kinds() -> Vec<AdapterKind> {
    let lora = |r| LoraConfig::default().with_r(r).with_alpha(12.0);
    vec![
        AdapterKind::Lora(lora(8)),
        AdapterKind::Lora(lora(1)),
        AdapterKind::Lora(lora(13)),
        AdapterKind::Lora(lora(30)),
        AdapterKind::Lora(lora(64)),
        AdapterKind::Dora(lora(6)),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(10)),
    ]
}

fn masked() -> Vec<AdapterKind> {
    let kind = |selection| {
        let lora = LoraConfig::default().with_r(4).with_alpha(6.0);
        AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora).with_selection(selection))
    };
    vec![
        kind(MaskSelection::StraightThrough),
        kind(MaskSelection::Magnitude { every: 2 }),
        kind(MaskSelection::MagnitudeGradient { every: 1, fraction: 0.5 }),
    ]
}

#[test]
fn every_kind_equals_itself_in_f64_on_the_cpu_in_value_and_all_gradients() {
    let name = "every_kind_equals_itself_in_f64_on_the_cpu_in_value_and_all_gradients";
    let Some((_lock, device)) = gpu(name) else { return };
    // Few rows and many, widths that are and are not multiples of a vector, more than one block of each.
    let sizes = [
        (1, 64, 72),
        (5, 67, 129),
        (300, 96, 130),
        (1000, 131, 64),
        (4099, 768, 320),
        (700, 65, 1283),
        (2001, 100, 68),
        (777, 1536, 768),
    ];
    // The update of the masked kind is of the weight's size: on few entries no rounding changes which are the largest.
    let small = &sizes[..4];
    let all_kinds = kinds().into_iter().map(|kind| (kind, &sizes[..]));
    for (kind, sizes) in all_kinds.chain(masked().into_iter().map(|kind| (kind, small))) {
        for &(most, inputs, outputs) in sizes {
            let rows = rows(most);
            if !runs(rows * inputs * outputs) {
                continue;
            }
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let bias = rows % 2 == 1;
                let x = noise(&[rows, inputs], 1.0, dtype, 3);
                let size = (inputs, outputs);
                let there = layer(&kind, size, (dtype, DType::F32), bias, &Device::Cpu);
                let want = all(&there, &host(&x), |x| there.forward(x));
                let here = layer(&kind, size, (dtype, DType::F32), bias, &device);
                let got = all(&here, &x, |x| here.forward(x));
                let r = there.parameters()[0].1.dims()[0];
                let what = format!("{kind} {r}, {rows} rows of {inputs} to {outputs} in {dtype:?}");
                // DoRA scales a rounded result, and the masked kind has a weight of its own in a half type.
                let slack = match kind {
                    AdapterKind::Dora(_) | AdapterKind::MaskedLora(_) => 3.0,
                    _ => 1.0,
                };
                compare(&what, &got, &want, slack * allowed(dtype));
            }
        }
    }
}

#[test]
fn widths_ranks_and_the_order_of_the_weight_change_no_value() {
    let Some((_lock, device)) = gpu("widths_ranks_and_the_order_of_the_weight_change_no_value") else {
        return;
    };
    // Below and above the rows that the fused product takes, blocks that are full and not, one block of columns and many.
    let sizes = [
        (1, 768, 40, 8),
        (17, 40, 768, 1),
        (64, 1000, 40, 8),
        (65, 72, 2056, 3),
        (130, 768, 768, 64),
        (257, 4096, 768, 16),
        (1000, 768, 1000, 5),
        (1000, 40, 4096, 32),
        (1001, 512, 1024, 40),
    ];
    for (most, inputs, outputs, r) in sizes {
        let rows = rows(most);
        if !runs(rows * inputs * outputs) {
            continue;
        }
        let kind = AdapterKind::Lora(LoraConfig::default().with_r(r).with_alpha(12.0));
        for (dtype, turned) in
            [DType::F32, DType::BF16, DType::F16].into_iter().flat_map(|d| [(d, false), (d, true)])
        {
            // A sanitizer finds hazards inside of cuBLAS's own kernels for few rows of f16.
            if brief() && rows < 64 && dtype == DType::F16 {
                continue;
            }
            let x = noise(&[rows, inputs], 1.0, dtype, 3);
            let make = |device| {
                layer_by(&kind, (inputs, outputs), (dtype, DType::F32), rows % 2 == 1, turned, device)
            };
            let (there, here) = (make(&Device::Cpu), make(&device));
            let want = all(&there, &host(&x), |x| there.forward(x));
            let got = all(&here, &x, |x| here.forward(x));
            let what =
                format!("LoRA {r}, {rows} rows of {inputs} to {outputs} in {dtype:?}, turned {turned}");
            compare(&what, &got, &want, allowed(dtype));
            for ((name, once), (_, twice)) in got.iter().zip(all(&here, &x, |x| here.forward(x))) {
                let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                assert!(bits(once) == bits(&twice), "{what}: {name} has other bits the second time");
            }
        }
    }
}

#[test]
fn rows_from_any_place_and_a_single_output_are_taken() {
    let Some((_lock, device)) = gpu("rows_from_any_place_and_a_single_output_are_taken") else { return };
    let lora = || LoraConfig::default().with_r(3).with_alpha(6.0);
    let masked = MaskedLoraConfig::default().with_lora(lora());
    for kind in [AdapterKind::Lora(lora()), AdapterKind::Dora(lora()), AdapterKind::MaskedLora(masked)] {
        for (rows, inputs, outputs) in [(1, 67, 1), (1, 67, 65), (70, 67, 1), (70, 67, 65), (70, 72, 1)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                // Contiguous, and from no multiple of 16 bytes on where the width is odd.
                let x = noise(&[rows + 1, inputs], 1.0, dtype, 3);
                let there = layer(&kind, (inputs, outputs), (dtype, DType::F32), true, &Device::Cpu);
                let here = layer(&kind, (inputs, outputs), (dtype, DType::F32), true, &device);
                let want = all(&there, &host(&x), |x| there.forward(&x.narrow(0, 1, rows)?));
                let got = all(&here, &x, |x| here.forward(&x.narrow(0, 1, rows)?));
                let what = format!("{kind}, {rows} rows of {inputs} to {outputs} in {dtype:?}");
                compare(&what, &got, &want, 3.0 * allowed(dtype));
            }
        }
    }
}

#[test]
fn other_starts_kinds_and_dtypes_of_parameters_go_their_old_way() {
    let Some((_lock, device)) = gpu("other_starts_kinds_and_dtypes_of_parameters_go_their_old_way") else {
        return;
    };
    let pissa = LoraConfig::default().with_r(4).with_init(LoraInit::Pissa { iterations: None });
    let wide = AdapterKind::Lora(LoraConfig::default().with_r(70));
    for (kind, own, dtype) in [
        (AdapterKind::Lora(pissa), DType::F32, DType::F32),
        (wide, DType::F32, DType::F32),
        (AdapterKind::Lora(LoraConfig::default()), DType::BF16, DType::BF16),
        (AdapterKind::Lora(LoraConfig::default()), DType::F64, DType::F64),
    ] {
        for rows in [3, rows(500)] {
            let x = noise(&[rows, 80], 1.0, dtype, 3);
            let there = layer(&kind, (80, 96), (dtype, own), true, &Device::Cpu);
            let want = all(&there, &host(&x), |x| there.forward(x));
            let here = layer(&kind, (80, 96), (dtype, own), true, &device);
            let got = all(&here, &x, |x| here.forward(x));
            // Its own parameters in bf16 are rounded to it.
            let allowed = if own == DType::BF16 { 1e-2 } else { 1e-5 };
            compare(&format!("{kind} in {own:?}, {rows} rows"), &got, &want, allowed);
        }
    }
}

#[test]
fn the_change_alone_and_with_dropout_equals_itself_in_f64_on_the_cpu() {
    let Some((_lock, device)) = gpu("the_change_alone_and_with_dropout_equals_itself_in_f64_on_the_cpu")
    else {
        return;
    };
    let lora = || LoraConfig::default().with_r(6).with_alpha(9.0).with_dropout(0.3);
    for kind in [
        AdapterKind::Lora(lora()),
        AdapterKind::Dora(lora()),
        AdapterKind::AdaLora(AdaLoraConfig::default().with_dropout(0.3)),
        AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora())),
    ] {
        for (rows, inputs, outputs) in [(3, 67, 65), (rows(400), 96, 72)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = noise(&[rows, inputs], 1.0, dtype, 3);
                let there = layer(&kind, (inputs, outputs), (dtype, DType::F32), true, &Device::Cpu);
                let here = layer(&kind, (inputs, outputs), (dtype, DType::F32), true, &device);
                for pass in [None, Some(12)] {
                    there.set_training(pass);
                    here.set_training(pass);
                    let what = format!("{kind}, pass {pass:?}, {rows} rows of {inputs} in {dtype:?}");
                    let want = all(&there, &host(&x), |x| there.adapter().delta(x));
                    let got = all(&here, &x, |x| here.adapter().delta(x));
                    compare(&format!("{what}, alone"), &got, &want, 3.0 * allowed(dtype));
                    let want = all(&there, &host(&x), |x| there.forward(x));
                    let got = all(&here, &x, |x| here.forward(x));
                    compare(&what, &got, &want, 3.0 * allowed(dtype));
                }
            }
        }
    }
}

#[test]
fn masks_are_those_of_the_cpu_to_the_bit_ties_and_all() {
    let Some((_lock, device)) = gpu("masks_are_those_of_the_cpu_to_the_bit_ties_and_all") else { return };
    // Factors of small whole numbers: products are exact, and most of them equal many others.
    let whole = |shape: &[usize], seed| (noise(shape, 1.6, DType::F32, seed)).round().unwrap();
    for (inputs, outputs) in [(40, 24), (333, 257), (768, 512)] {
        if brief() && inputs > 400 {
            continue;
        }
        for kind in masked() {
            let AdapterKind::MaskedLora(config) = &kind else { continue };
            let make = |device: &Device| {
                let place = Place::alone("layer", DType::F32, device);
                let adapter = MaskedLoraAdapter::new(inputs, outputs, config, &place).unwrap();
                let lora = adapter.lora();
                lora.a().set(&whole(lora.a().dims(), 1).to_device(device).unwrap()).unwrap();
                lora.b().set(&whole(lora.b().dims(), 2).to_device(device).unwrap()).unwrap();
                adapter
            };
            let (here, there) = (make(&device), make(&Device::Cpu));
            let bits = |a: &MaskedLoraAdapter| {
                let mask = a.mask().unwrap().to_device(&Device::Cpu).unwrap();
                mask.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for index in 1..=3 {
                let (one, other) = (bits(&here), bits(&there));
                let kept = inputs * outputs - (0.75 * (inputs * outputs) as f64).round() as usize;
                assert_eq!(one.iter().sum::<f32>(), kept as f32);
                let off = one.iter().zip(&other).filter(|(a, b)| a != b).count();
                assert_eq!(off, 0, "{:?} of {outputs} x {inputs}, step {index}", config.selection);
                for adapter in [&here, &there] {
                    let x = whole(&[9, inputs], 3).to_device(adapter.lora().a().device()).unwrap();
                    let grads = adapter.delta(&x).unwrap().sum_all().unwrap().backward().unwrap();
                    adapter.after_step(Step { index, total: 9 }, &grads).unwrap();
                }
            }
        }
    }
}

#[test]
fn layouts_and_runs_do_not_change_the_bits_and_no_rows_give_no_rows() {
    let Some((_lock, device)) = gpu("layouts_and_runs_do_not_change_the_bits_and_no_rows_give_no_rows")
    else {
        return;
    };
    for dtype in [DType::F32, DType::BF16] {
        let kinds = [
            AdapterKind::Lora(LoraConfig::default()),
            AdapterKind::Lora(LoraConfig::default().with_r(20)),
            AdapterKind::Dora(LoraConfig::default()),
            AdapterKind::MaskedLora(MaskedLoraConfig::default()),
        ];
        for kind in kinds {
            let here = layer(&kind, (96, 64), (dtype, DType::F32), false, &device);
            for batch in [4, 40] {
                let x = noise(&[96, batch, 12], 1.0, dtype, 5);
                let turned = |x: &Tensor| here.forward(&x.permute((1, 2, 0))?);
                let got = all(&here, &x, turned);
                let plain = x.permute((1, 2, 0)).unwrap().contiguous().unwrap();
                let want = all(&here, &plain, |x| here.forward(x));
                let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                for ((name, got), (_, want)) in got.iter().zip(&want) {
                    let want = if name == "dx" { want.permute((2, 0, 1)).unwrap() } else { want.clone() };
                    assert_eq!(bits(got), bits(&want), "{name}, {dtype:?}, {batch}");
                }
                for ((name, once), (_, twice)) in got.iter().zip(all(&here, &x, turned)) {
                    assert_eq!(bits(once), bits(&twice), "{name}, {dtype:?}, {batch}");
                }
            }
            let none = Tensor::zeros((1, 96), dtype, &device).unwrap().narrow(0, 0, 0).unwrap();
            assert_eq!(here.forward(&none).unwrap().dims(), [0, 64]);
            assert_eq!(here.base().forward(&none).unwrap().dims(), [0, 64]);
        }
    }
}
