use candle_core::{DType, Device, Tensor, Var};
use vesper_model::ops::{Heads, Path, Rope, causal_attention, self_attention};

use crate::common::{HALVES, gpu, parity, random, rows, runs, same_bits};

const fn heads(query: usize, kv: usize, dim: usize) -> Heads {
    Heads { query, kv, dim }
}

#[test]
fn attention_equals_its_reference() {
    let Some((_lock, device)) = gpu("attention_equals_its_reference") else { return };
    let shapes = [
        (1, 1, heads(1, 1, 64)),
        (2, 17, heads(5, 5, 64)),
        (3, 64, heads(2, 2, 64)),
        (1, 65, heads(4, 2, 64)),
        (2, 130, heads(6, 1, 64)),
        (1, 1000, heads(2, 1, 64)),
        (2, 17, heads(1, 1, 128)),
        (1, 257, heads(4, 2, 128)),
        (1, 100, heads(3, 3, 40)),
        (2, 70, heads(4, 2, 8)),
        (1, 200, heads(2, 2, 96)),
        (1, 75, heads(2, 1, 6)),
        // More pairs of tiles than a device has multiprocessors: of queries, and with heads of 64 of keys too.
        (40, 300, heads(4, 2, 64)),
        (20, 260, heads(8, 4, 128)),
        // The same, of so little that a sanitizer can follow.
        (300, 17, heads(1, 1, 8)),
        (150, 4, heads(1, 1, 72)),
        // No kernel: blocks of candle's operations.
        (1, 30, heads(2, 1, 130)),
        (2, 50, heads(2, 1, 256)),
    ];
    for (b, t, heads) in shapes {
        if !runs(b * t * heads.packed()) {
            continue;
        }
        // Large scores, so that the softmax is far from uniform.
        let qkv = (random(1, &[b, t, heads.packed()]) * 3.0).unwrap();
        for rotary in [true, false] {
            let name = format!("attention b{b} t{t} {heads:?} rotary {rotary}");
            parity(&name, &device, std::slice::from_ref(&qkv), |x, path| {
                let rope = Rope::new(heads.dim, t + 3, 1e4, x[0].device())?;
                causal_attention(&x[0], heads, rotary.then_some(&rope), path)
            });
        }
    }
}

#[test]
fn strided_projections_are_read_rightly() {
    let Some((_lock, device)) = gpu("strided_projections_are_read_rightly") else { return };
    let heads = heads(2, 1, 64);
    parity("attention strided", &device, &[random(1, &[256, 9, 2])], |x, path| {
        causal_attention(&x[0].transpose(0, 2)?, heads, None, path)
    });
    // A part of a larger batch, which does not start at the start of its memory.
    parity("attention offset", &device, &[random(1, &[4, 9, 256])], |x, path| {
        causal_attention(&x[0].narrow(0, 1, 2)?, heads, None, path)
    });
}

#[test]
fn self_attention_equals_its_reference() {
    let Some((_lock, device)) = gpu("self_attention_equals_its_reference") else { return };
    for (b, t, d, heads) in
        [(2, 33, 48, heads(3, 1, 64)), (1, 150, 64, heads(2, 2, 128)), (2, 10, 32, heads(2, 2, 6))]
    {
        let inputs = [
            random(1, &[b, t, d]),
            (random(2, &[heads.packed(), d]) * 0.5).unwrap(),
            random(3, &[d + 8, heads.query * heads.dim]),
        ];
        parity(&format!("self_attention b{b} t{t} {heads:?}"), &device, &inputs, |x, path| {
            let rope = Rope::new(heads.dim, t, 1e4, x[0].device())?;
            self_attention(&x[0], &x[1], &x[2], heads, Some(&rope), path)
        });
    }
}

#[test]
fn attention_gives_the_same_bits_each_time() {
    let Some((_lock, device)) = gpu("attention_gives_the_same_bits_each_time") else { return };
    for dim in [64, 128] {
        let heads = heads(4, 2, dim);
        let rope = Rope::new(dim, 500, 1e4, &device).unwrap();
        same_bits("attention", &device, &[random(1, &[3, rows(500), heads.packed()])], |x| {
            causal_attention(&x[0], heads, Some(&rope), Path::Fused)
        });
    }
}

#[test]
fn an_output_does_not_depend_on_later_tokens() {
    let Some((_lock, device)) = gpu("an_output_does_not_depend_on_later_tokens") else { return };
    let heads = heads(2, 2, 64);
    let qkv = random(1, &[1, 200, heads.packed()]).to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
    let list = |x: &Tensor| {
        let y = causal_attention(x, heads, None, Path::Fused).unwrap().narrow(1, 0, 70).unwrap();
        y.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(list(&qkv), list(&qkv.narrow(1, 0, 70).unwrap()));
}

#[test]
fn extreme_scores_stay_finite() {
    let Some((_lock, device)) = gpu("extreme_scores_stay_finite") else { return };
    let heads = heads(1, 1, 64);
    let qkv = (random(1, &[1, 200, heads.packed()]) * 300.0).unwrap();
    for dtype in HALVES {
        let (y, gradients) =
            crate::common::value_and_gradients(std::slice::from_ref(&qkv), dtype, &device, |x| {
                causal_attention(&x[0], heads, None, Path::Fused)
            })
            .unwrap();
        for tensor in [&y, &gradients[0]] {
            assert!(tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap().iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn frozen_projections_get_no_gradient() {
    let Some((_lock, device)) = gpu("frozen_projections_get_no_gradient") else { return };
    let heads = heads(1, 1, 64);
    let var = |seed, shape: &[usize]| {
        let x = random(seed, shape).to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
        Var::from_tensor(&x).unwrap()
    };
    let (x, qkv, out) = (var(1, &[1, 9, 16]), var(2, &[192, 16]), var(3, &[16, 64]));
    let y =
        self_attention(x.as_tensor(), &qkv.as_tensor().detach(), out.as_tensor(), heads, None, Path::Fused);
    let grads = y.unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&out).is_some() && grads.get(&qkv).is_none());
}

#[test]
fn no_sequences_at_all_are_fine() {
    let Some((_lock, device)) = gpu("no_sequences_at_all_are_fine") else { return };
    let heads = heads(2, 1, 64);
    let some = Tensor::ones((2, 9, heads.packed()), DType::BF16, &device).unwrap();
    let y = causal_attention(&some.narrow(0, 0, 0).unwrap(), heads, None, Path::Fused).unwrap();
    assert_eq!(y.dims(), [0, 9, 128]);
    assert!(causal_attention(&some, Heads { query: 3, ..heads }, None, Path::Fused).is_err());
    let short = Rope::new(64, 3, 1e4, &Device::Cpu).unwrap();
    assert!(causal_attention(&some, heads, Some(&short), Path::Fused).is_err());
}
