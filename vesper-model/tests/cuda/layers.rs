use candle_core::{D, DType, Device, Tensor, Var};
use era_act::{Activation, Era};
use vesper_model::ops::{
    CrossEntropy, DecoderSettings, DecoderWeights, Heads, Path, Philox, Rope, backward, causal_attention,
    decoder_block, embedding, embedding_in, gated_feed_forward, layer_norm, linear, linear_cross_entropy,
    residual_layer_norm, residual_rms_norm, rms_norm, self_attention,
};

use crate::common::{
    HALVES, error, gpu, ids, parity, random, rows, runs, same_bits, to_f64, value_and_gradients,
};

const ACTIVATIONS: [Activation; 8] = [
    Activation::Era(Era::GateEntropy { temperature: 1.0, strength: 0.1 }),
    Activation::Era(Era::GateEntropy { temperature: 0.5, strength: -0.7 }),
    Activation::Era(Era::GeluSoftplus { gamma: 0.1 }),
    Activation::Silu,
    Activation::GeluTanh,
    Activation::Gelu,
    Activation::Relu,
    Activation::ReluSquared,
];

#[test]
fn rms_norm_equals_its_reference() {
    let Some((_lock, device)) = gpu("rms_norm_equals_its_reference") else { return };
    // Rows that fit into registers, rows that do not, rows that do not divide into vectors.
    let shapes =
        [&[1, 1][..], &[3, 17], &[2, 5, 384], &[700, 768], &[33, 1024], &[9, 2048], &[4, 5000], &[3, 4099]];
    for shape in shapes.into_iter().filter(|shape| runs(shape.iter().product())) {
        let inputs = [random(1, shape), random(2, &shape[shape.len() - 1..])];
        parity(&format!("rms_norm {shape:?}"), &device, &inputs, |x, path| {
            rms_norm(&x[0], &x[1], 1e-6, path)
        });
    }
    let inputs = [random(1, &[48, 6]), random(2, &[48])];
    parity("rms_norm strided", &device, &inputs, |x, path| rms_norm(&x[0].t()?, &x[1], 1e-6, path));
    let inputs = [random(1, &[7, 3, 16]), random(2, &[16])];
    parity("rms_norm offset", &device, &inputs, |x, path| {
        rms_norm(&x[0].narrow(0, 1, 5)?, &x[1], 1e-6, path)
    });
    same_bits("rms_norm", &device, &[random(1, &[rows(3000), 768]), random(2, &[768])], |x| {
        rms_norm(&x[0], &x[1], 1e-6, Path::Fused)
    });
}

#[test]
fn embedding_equals_its_reference() {
    let Some((_lock, device)) = gpu("embedding_equals_its_reference") else { return };
    for (vocab, d, n) in [(1, 1, 1), (10, 8, 3000), (300, 40, 5), (70_000, 16, 2500), (32_005, 33, 4000)] {
        if !runs(vocab as usize * d) {
            continue;
        }
        let ids = ids(n, vocab).reshape((1, n)).unwrap();
        parity(
            &format!("embedding {vocab} {d} {n}"),
            &device,
            &[random(1, &[vocab as usize, d])],
            |x, path| embedding(&x[0], &ids.to_device(x[0].device())?, path),
        );
    }
    // Rows in half precision of a table in f32, whose gradient is exact to f32.
    for ((vocab, d, n), dtype) in [(10u32, 8, 3000), (300, 40, 5), (77, 33, 4000)].into_iter().zip([
        DType::BF16,
        DType::F16,
        DType::BF16,
    ]) {
        let table = random(1, &[vocab as usize, d]).to_dtype(DType::F32).unwrap();
        let ids = ids(n, vocab);
        let run = |device: &Device, path| {
            let table = Var::from_tensor(&table.to_device(device).unwrap()).unwrap();
            let rows = embedding_in(table.as_tensor(), &ids.to_device(device).unwrap(), dtype, path).unwrap();
            assert_eq!(rows.dtype(), dtype);
            let loss = rows.sqr().unwrap().sum_all().unwrap();
            let gradient = to_f64(backward(&loss).unwrap().get(&table).unwrap());
            (to_f64(&rows), gradient)
        };
        let ((rows, gradient), (exact, sums)) = (run(&device, Path::Fused), run(&Device::Cpu, Path::Fused));
        assert_eq!(error(&rows, &exact), 0.0, "{vocab} {d} {n} {dtype:?}");
        assert!(error(&gradient, &sums) < 1e-6, "{vocab} {d} {n} {dtype:?}: {}", error(&gradient, &sums));
    }
    // One id everywhere, and every type of id.
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let ids = Tensor::zeros(5000, DType::U32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        parity(&format!("embedding, one id {dtype:?}"), &device, &[random(1, &[3, 24])], |x, path| {
            embedding(&x[0], &ids.to_device(x[0].device())?, path)
        });
    }
    let ids = ids(3000, 17).to_device(&device).unwrap();
    same_bits("embedding", &device, &[random(1, &[17, 768])], |x| embedding(&x[0], &ids, Path::Fused));
}

#[test]
fn a_table_that_is_also_the_head_gets_the_sum_of_candles_pass() {
    let Some((_lock, device)) = gpu("a_table_that_is_also_the_head_gets_the_sum_of_candles_pass") else {
        return;
    };
    // Rows of many places, of one and of none; vectors and single columns.
    for (vocab, d, n) in [(10, 8, 3000), (300, 40, 50), (77, 33, 400)] {
        let ids = ids(n, vocab / 2).to_device(&device).unwrap();
        for (table, rows) in [
            (DType::F32, DType::F32),
            (DType::F32, DType::BF16),
            (DType::F32, DType::F16),
            (DType::BF16, DType::BF16),
            (DType::F16, DType::F16),
        ] {
            let values = random(1, &[vocab as usize, d]).to_dtype(table).unwrap();
            let table = Var::from_tensor(&values.to_device(&device).unwrap()).unwrap();
            let (t, settings) = (table.as_tensor(), CrossEntropy::default());
            let hidden = embedding_in(t, &ids, rows, Path::Fused).unwrap();
            let loss = linear_cross_entropy(&hidden, t, &ids, settings, Path::Fused).unwrap().loss;
            let gradient = |grads: candle_core::backprop::GradStore| to_f64(grads.get(&table).unwrap());
            let (ours, candles) = (gradient(backward(&loss).unwrap()), gradient(loss.backward().unwrap()));
            let what = format!("{vocab} {d} {n} {:?} {rows:?}", table.dtype());
            assert_eq!(error(&ours, &candles), 0.0, "{what}");
            let read = ours.narrow(0, 0, vocab as usize / 2).unwrap().abs().unwrap().sum_all().unwrap();
            assert!(read.to_scalar::<f64>().unwrap() > 0.0, "{what}");
        }
    }
}

#[test]
fn an_id_outside_the_table_gives_nan_and_no_gradient() {
    let Some((_lock, device)) = gpu("an_id_outside_the_table_gives_nan_and_no_gradient") else { return };
    let table = Var::from_tensor(&Tensor::ones((300, 4), DType::F32, &device).unwrap()).unwrap();
    let ids = Tensor::new(&[0u32, 300, 299, u32::MAX, 66_000], &device).unwrap();
    let found = embedding(table.as_tensor(), &ids, Path::Fused).unwrap();
    let firsts = found.narrow(1, 0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(firsts.iter().map(|v| v.is_nan()).collect::<Vec<_>>(), [false, true, false, true, true]);
    let grads = found.sum_all().unwrap().backward().unwrap();
    let gradient = grads.get(&table).unwrap().sum(D::Minus1).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!((gradient[0], gradient[299], gradient.iter().sum::<f32>()), (4.0, 4.0, 8.0));
}

#[test]
fn linear_equals_its_reference() {
    let Some((_lock, device)) = gpu("linear_equals_its_reference") else { return };
    let shapes = [(&[1, 1][..], 1), (&[3, 17], 5), (&[2, 5, 33], 65), (&[1, 1000, 3], 2), (&[3, 4], 32_005)];
    for (shape, out) in shapes.into_iter().filter(|(shape, out)| runs(out * shape.iter().product::<usize>()))
    {
        let inputs = [random(1, shape), random(2, &[out, shape[shape.len() - 1]])];
        parity(&format!("linear {shape:?} {out}"), &device, &inputs, |x, path| linear(&x[0], &x[1], path));
    }
    let inputs = [random(1, &[3, 32]), random(2, &[6, 40])];
    parity("linear, some columns", &device, &inputs, |x, path| {
        linear(&x[0].narrow(1, 5, 16)?, &x[1].narrow(1, 3, 16)?, path)
    });
    let inputs = [random(1, &[16, 3]), random(2, &[16, 6])];
    parity("linear, columns first", &device, &inputs, |x, path| linear(&x[0].t()?, &x[1].t()?, path));
    parity("linear, every other row", &device, &[random(1, &[3, 2, 8]), random(2, &[6, 2, 8])], |x, path| {
        linear(&x[0].narrow(1, 1, 1)?.squeeze(1)?, &x[1].narrow(1, 0, 1)?.squeeze(1)?, path)
    });
    same_bits("linear", &device, &[random(1, &[rows(1000), 64]), random(2, &[130, 64])], |x| {
        linear(&x[0], &x[1], Path::Fused)
    });
}

/// Every operation that a model is made of, on no rows: candle's own operations fail on these.
#[test]
fn nothing_gives_nothing() {
    let Some((_lock, device)) = gpu("nothing_gives_nothing") else { return };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let make = |shape: &[usize]| {
            let n: usize = shape.iter().product();
            // candle cannot make an empty tensor on the device; a part of one can be.
            let mut whole = shape.to_vec();
            if n == 0 {
                whole = shape.iter().map(|&size| size.max(1)).collect();
            }
            let full = Tensor::ones(whole, dtype, &device).unwrap();
            match shape.iter().position(|&size| size == 0) {
                Some(dim) => full.narrow(dim, 0, 0).unwrap(),
                None => full,
            }
        };
        let heads = Heads { query: 2, kv: 1, dim: 8 };
        let (x, flat) = (make(&[0, 5, 16]), make(&[0, 16]));
        let none = Tensor::ones(1, DType::U32, &device).unwrap().narrow(0, 0, 0).unwrap();
        let rope = Rope::new(8, 9, 1e4, &device).unwrap();
        let (qkv, out, gate_up, down) =
            (make(&[heads.packed(), 16]), make(&[16, 16]), make(&[24, 16]), make(&[16, 12]));
        let weights = DecoderWeights {
            norm_attention: make(&[16]),
            qkv: qkv.clone(),
            out: out.clone(),
            norm_feed_forward: make(&[16]),
            gate_up: gate_up.clone(),
            down: down.clone(),
        };
        let settings = DecoderSettings { heads, activation: Activation::Silu, eps: 1e-6 };
        let path = Path::Fused;
        let results = [
            linear(&flat, &make(&[3, 16]), path).unwrap(),
            linear(&x, &make(&[3, 16]), path).unwrap(),
            rms_norm(&x, &make(&[16]), 1e-6, path).unwrap(),
            layer_norm(&x, &make(&[16]), None, 1e-6, path).unwrap(),
            residual_rms_norm(&x, &x, &make(&[16]), 1e-6, path).unwrap().1,
            residual_layer_norm(&x, &x, &make(&[16]), None, 1e-6, path).unwrap().1,
            vesper_model::ops::dropout(&x, 0.5, Philox::default(), path).unwrap(),
            vesper_model::ops::rope(&make(&[0, 2, 3, 8]), &rope, 0).unwrap(),
            causal_attention(&make(&[0, 5, heads.packed()]), heads, Some(&rope), path).unwrap(),
            self_attention(&x, &qkv, &out, heads, Some(&rope), path).unwrap(),
            gated_feed_forward(&x, &gate_up, &down, Activation::Silu, path).unwrap(),
            decoder_block(&x, &weights, settings, Some(&rope), path).unwrap(),
            embedding(&make(&[7, 16]), &none, path).unwrap(),
        ];
        for (i, y) in results.iter().enumerate() {
            assert!(y.elem_count() == 0 && y.dtype() == dtype, "{i}: {y:?}");
        }
        let settings = CrossEntropy::default();
        let loss = linear_cross_entropy(&flat, &make(&[7, 16]), &none, settings, path).unwrap().loss;
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
    }
}

#[test]
fn gated_feed_forward_equals_its_reference() {
    let Some((_lock, device)) = gpu("gated_feed_forward_equals_its_reference") else { return };
    for activation in ACTIVATIONS {
        for (shape, ffn) in [(&[3, 8][..], 5), (&[2, 60, 16], 72)] {
            let d = shape[shape.len() - 1];
            let inputs =
                [(random(1, shape) * 3.0).unwrap(), random(2, &[2 * ffn, d]), random(3, &[d + 1, ffn])];
            let name = format!("feed-forward {activation} {shape:?}");
            parity(&name, &device, &inputs, |x, path| {
                gated_feed_forward(&x[0], &x[1], &x[2], activation, path)
            });
        }
    }
    let inputs = [random(1, &[16, 60, 2]), random(2, &[40, 16]), random(3, &[16, 20])];
    parity("feed-forward strided", &device, &inputs, |x, path| {
        gated_feed_forward(&x[0].transpose(0, 2)?, &x[1], &x[2], Activation::default(), path)
    });
    let inputs = [random(1, &[rows(500), 64]), random(2, &[256, 64]), random(3, &[64, 128])];
    same_bits("feed-forward", &device, &inputs, |x| {
        gated_feed_forward(&x[0], &x[1], &x[2], Activation::default(), Path::Fused)
    });
}

#[test]
fn activations_keep_their_limits() {
    let Some((_lock, device)) = gpu("activations_keep_their_limits") else { return };
    let gates = [-1e4f64, -120.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 120.0, 1e4];
    for activation in ACTIVATIONS {
        // gate = x, up = 1, down = 1: the activation itself, and its slope.
        let run = |dtype, device: &Device, path| {
            let x: Vec<f64> = gates.iter().flat_map(|&g| [g, 1.0]).collect();
            let x = Tensor::from_vec(x, (gates.len(), 2), &Device::Cpu).unwrap();
            let gate_up = Tensor::new(&[[1f64, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
            let down = Tensor::new(&[[1f64]], &Device::Cpu).unwrap();
            let (y, gradients) = value_and_gradients(&[x, gate_up, down], dtype, device, |x| {
                gated_feed_forward(&x[0], &x[1], &x[2], activation, path)
            })
            .unwrap();
            (y, gradients[0].narrow(1, 0, 1).unwrap())
        };
        let exact = run(DType::F64, &Device::Cpu, Path::Reference);
        for (dtype, limit) in [(DType::F32, 2e-6), (DType::BF16, 6e-3)] {
            let got = run(dtype, &device, Path::Fused);
            for (what, got, exact) in [("value", &got.0, &exact.0), ("slope", &got.1, &exact.1)] {
                let list = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                for ((gate, got), exact) in gates.iter().zip(list(got)).zip(list(exact)) {
                    let off = (got - exact).abs() / (1.0 + exact.abs());
                    assert!(off < limit, "{activation} {dtype:?}: {what} at {gate} is {got}, not {exact}");
                }
            }
        }
    }
}

#[test]
fn frozen_weights_get_no_gradient() {
    let Some((_lock, device)) = gpu("frozen_weights_get_no_gradient") else { return };
    for dtype in HALVES {
        let var = |seed, shape: &[usize]| {
            Var::from_tensor(&random(seed, shape).to_dtype(dtype).unwrap().to_device(&device).unwrap())
                .unwrap()
        };
        let (x, w, gate_up, down) = (var(1, &[5, 16]), var(2, &[16]), var(3, &[48, 16]), var(4, &[16, 24]));
        let n = rms_norm(x.as_tensor(), &w.as_tensor().detach(), 1e-6, Path::Fused).unwrap();
        let y = gated_feed_forward(
            &n,
            &gate_up.as_tensor().detach(),
            down.as_tensor(),
            Activation::default(),
            Path::Fused,
        );
        let grads = y.unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&down).is_some());
        assert!(grads.get(&w).is_none() && grads.get(&gate_up).is_none());
    }
}

#[test]
fn no_rows_at_all_are_fine() {
    let Some((_lock, device)) = gpu("no_rows_at_all_are_fine") else { return };
    let some = random(1, &[2, 16]).to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
    let none = some.narrow(0, 0, 0).unwrap();
    let w = some.get(0).unwrap();
    match rms_norm(&none, &w, 1e-6, Path::Fused) {
        Ok(y) => assert_eq!(y.dims(), [0, 16]),
        Err(error) => panic!("rms_norm: {error}"),
    }
    let gate_up = Tensor::ones((8, 16), DType::BF16, &device).unwrap();
    let down = Tensor::ones((16, 4), DType::BF16, &device).unwrap();
    match gated_feed_forward(&none, &gate_up, &down, Activation::default(), Path::Fused) {
        Ok(y) => assert_eq!(y.dims(), [0, 16]),
        Err(error) => panic!("gated_feed_forward: {error}"),
    }
    let ids = Tensor::new(&[0u32], &device).unwrap().narrow(0, 0, 0).unwrap();
    match embedding(&some, &ids, Path::Fused) {
        Ok(y) => assert_eq!(y.dims(), [0, 16]),
        Err(error) => panic!("embedding: {error}"),
    }
}

#[test]
fn f64_runs_as_the_composition() {
    let Some((_lock, device)) = gpu("f64_runs_as_the_composition") else { return };
    let (x, w) = (random(1, &[5, 16]), random(2, &[16]));
    let on = |device: &Device| {
        to_f64(
            &rms_norm(&x.to_device(device).unwrap(), &w.to_device(device).unwrap(), 1e-6, Path::Fused)
                .unwrap(),
        )
    };
    assert!(error(&on(&device), &on(&Device::Cpu)) < 1e-12);
}
