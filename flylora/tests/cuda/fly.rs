use candle_core::{DType, Device, Tensor};
use flylora::{
    Adapter, AdapterKind, AnyLinear, FlyLoraAdapter, FlyLoraConfig, FrozenLinear, Place, Routing, Step,
};

use crate::common::noise;
use crate::{all, allowed, compare, gpu, host, rows};

fn layer(config: &FlyLoraConfig, inputs: usize, outputs: usize, dtype: DType, device: &Device) -> AnyLinear {
    let base = FrozenLinear::new(
        noise(&[outputs, inputs], 0.3, dtype, 1).to_device(device).unwrap(),
        Some(noise(&[outputs], 0.5, dtype, 2).to_device(device).unwrap()),
    );
    let own = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let kind = AdapterKind::FlyLora(config.clone());
    let layer = AnyLinear::build(base.unwrap(), &kind, &Place::alone("layer", own, device)).unwrap();
    let (_, b) = layer.parameters().remove(0);
    b.set(&noise(b.dims(), 0.5, own, 4).to_device(device).unwrap()).unwrap();
    layer
}

/// Rows of `x` without those whose choice hangs on a rounding: where the k-th and the next score are close. In bf16 the
/// kernels keep 16 bits of A.
fn decided(x: &Tensor, config: &FlyLoraConfig) -> Tensor {
    let (_, inputs) = x.dims2().unwrap();
    let place = Place::alone("layer", DType::F64, &Device::Cpu);
    let a =
        FlyLoraAdapter::new(inputs, 1, config, &place).unwrap().a().unwrap().to_dtype(DType::F64).unwrap();
    let y = host(x).matmul(&a.t().unwrap()).unwrap();
    let y = if config.routing == Routing::Magnitude { y.abs().unwrap() } else { y };
    let close = if x.dtype() == DType::BF16 { 4e-5 } else { 1e-5 };
    let clear: Vec<u32> = (0u32..)
        .zip(y.to_vec2::<f64>().unwrap())
        .filter(|(_, scores)| {
            let mut sorted = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            config.k == config.r || sorted[config.k - 1] - sorted[config.k] > close
        })
        .map(|(row, _)| row)
        .collect();
    assert!(clear.len() * 10 + 20 > x.dim(0).unwrap() * 9, "few rows hang on a rounding");
    x.index_select(&Tensor::new(clear, &Device::Cpu).unwrap(), 0).unwrap()
}

#[test]
fn the_layer_equals_itself_in_f64_on_the_cpu_in_value_and_all_gradients() {
    let name = "the_layer_equals_itself_in_f64_on_the_cpu_in_value_and_all_gradients";
    let Some((_lock, device)) = gpu(name) else { return };
    let plain = FlyLoraConfig::default();
    let configs = [
        plain.clone(),
        plain.clone().with_routing(Routing::Signed),
        plain.clone().with_ranks(5, 2).with_density(1.0),
        plain.clone().with_ranks(33, 8).with_density(0.1),
        plain.clone().with_ranks(64, 16),
        plain.clone().with_ranks(8, 8),
        plain.with_ranks(12, 1).with_density(0.001),
    ];
    for config in configs {
        // Some that the kernel with the frozen product takes, in one block of columns and in several.
        let sizes = [
            (1, 64, 72),
            (3, 67, 129),
            (rows(300), 768, 130),
            (rows(1000), 131, 65),
            (rows(4099), 260, 320),
            (rows(333), 64, 72),
            (rows(1031), 768, 520),
        ];
        for (rows, inputs, outputs) in sizes {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                // A distance between scores is only one where x is the same number in every dtype.
                let x = decided(&noise(&[rows + 3, inputs], 1.0, dtype, 3), &config);
                let there = layer(&config, inputs, outputs, DType::F64, &Device::Cpu);
                let rounded = |t: &Tensor| host(&host(t).to_dtype(dtype).unwrap());
                let base = there.base();
                let base = FrozenLinear::new(
                    rounded(&noise(base.weight().unwrap().dims(), 0.3, dtype, 1)),
                    base.bias().map(|b| rounded(&noise(b.dims(), 0.5, dtype, 2))),
                );
                let there = AnyLinear::from_parts(base.unwrap(), there.adapter().clone()).unwrap();
                let b = &there.parameters()[0].1;
                b.set(&host(&noise(b.dims(), 0.5, DType::F32, 4))).unwrap();
                let want = all(&there, &host(&x), |x| there.forward(x));
                let here = layer(&config, inputs, outputs, dtype, &device);
                let got = all(&here, &x, |x| here.forward(x));
                let what = format!(
                    "FlyLoRA {} of {}, density {}, {:?}, {rows} rows of {inputs} to {outputs} in {dtype:?}",
                    config.k, config.r, config.density, config.routing
                );
                compare(&what, &got, &want, allowed(dtype));
                // Alone, without its layer.
                let want = all(&there, &host(&x), |x| there.adapter().delta(x));
                let got = all(&here, &x, |x| here.adapter().delta(x));
                compare(&format!("{what}, alone"), &got, &want, allowed(dtype));
            }
        }
    }
}

#[test]
fn counts_move_the_balance_as_on_the_cpu_and_layouts_do_not_change_the_bits() {
    let Some((_lock, device)) =
        gpu("counts_move_the_balance_as_on_the_cpu_and_layouts_do_not_change_the_bits")
    else {
        return;
    };
    let config = FlyLoraConfig::default().with_balance_rate(0.01);
    let adapter = |device: &Device| {
        let place = Place::alone("layer", DType::F32, device);
        let adapter = FlyLoraAdapter::new(96, 40, &config, &place).unwrap();
        adapter.b().set(&noise(&[40, 32], 0.5, DType::F32, 4).to_device(device).unwrap()).unwrap();
        adapter
    };
    let (here, there) = (adapter(&device), adapter(&Device::Cpu));
    let x = decided(&noise(&[rows(500), 96], 1.0, DType::F32, 8), &config);
    let on = x.to_device(&device).unwrap();
    for index in 1..=3 {
        let (y, _) = (here.delta(&on).unwrap(), there.delta(&x).unwrap());
        let grads = y.sum_all().unwrap().backward().unwrap();
        here.after_step(Step { index, total: 9 }, &grads).unwrap();
        there.after_step(Step { index, total: 9 }, &grads).unwrap();
        if index == 1 {
            assert_eq!(here.balance().unwrap(), there.balance().unwrap());
        }
        assert!(here.balance().unwrap().iter().any(|d| *d != 0.0));
    }
    let bits = |t: &Tensor| host(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let turned = on.t().unwrap().contiguous().unwrap().t().unwrap();
    assert_eq!(bits(&here.delta(&on).unwrap()), bits(&here.delta(&turned).unwrap()));
    assert_eq!(bits(&here.delta(&on).unwrap()), bits(&here.delta(&on).unwrap()));
    let shifted = on.flatten_all().unwrap().narrow(0, 1, 96 * 100).unwrap().reshape((100, 96)).unwrap();
    let copied = shifted.to_device(&Device::Cpu).unwrap().to_device(&device).unwrap();
    assert_eq!(bits(&here.delta(&shifted).unwrap()), bits(&here.delta(&copied).unwrap()));
    let none = on.narrow(0, 0, 0).unwrap();
    assert_eq!(here.delta(&none).unwrap().dims(), [0, 40]);
}
