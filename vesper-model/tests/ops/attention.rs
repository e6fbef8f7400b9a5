use candle_core::{DType, Device, Tensor};
use vesper_model::ops::{Heads, Path, Rope, causal_attention};

use crate::common::{
    error, finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

const fn heads(query: usize, kv: usize, dim: usize) -> Heads {
    Heads { query, kv, dim }
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    let shapes = [
        (1, 1, heads(1, 1, 2)),
        (2, 17, heads(5, 5, 6)),
        (1, 64, heads(4, 2, 8)),
        (2, 65, heads(6, 1, 4)),
        (1, 130, heads(2, 2, 10)),
        (1, 1000, heads(5, 1, 2)),
        (0, 5, heads(2, 1, 4)),
        (2, 0, heads(5, 5, 4)),
    ];
    for (b, t, heads) in shapes {
        let rope = Rope::new(heads.dim, t + 3, 1e4, &Device::Cpu).unwrap();
        // Large scores, so that the softmax is far from uniform.
        let qkv = (random(1, &[b, t, heads.packed()]) * 3.0).unwrap();
        parity("attention", std::slice::from_ref(&qkv), |x, fused| {
            causal_attention(&x[0], heads, Some(&rope), path(fused))
        });
        parity("attention without rope", &[qkv], |x, fused| {
            causal_attention(&x[0], heads, None, path(fused))
        });
    }
}

#[test]
fn strided_inputs_are_read_rightly() {
    let heads = heads(2, 1, 4);
    parity("attention strided", &[random(1, &[16, 9, 2])], |x, fused| {
        causal_attention(&x[0].transpose(0, 2)?, heads, None, path(fused))
    });
}

#[test]
fn gradient_equals_finite_differences() {
    let heads = heads(4, 2, 4);
    let rope = Rope::new(4, 70, 1e4, &Device::Cpu).unwrap();
    finite_differences("attention", &[random(1, &[1, 67, heads.packed()])], |x| {
        causal_attention(&x[0], heads, Some(&rope), Path::Fused)
    });
}

#[test]
fn an_output_does_not_depend_on_later_tokens() {
    let heads = heads(2, 2, 4);
    let qkv = random(1, &[1, 80, heads.packed()]);
    let whole = causal_attention(&qkv, heads, None, Path::Fused).unwrap().narrow(1, 0, 70).unwrap();
    let start = causal_attention(&qkv.narrow(1, 0, 70).unwrap(), heads, None, Path::Fused).unwrap();
    assert!(error(&whole, &start) < 1e-12);
}

#[test]
fn extreme_scores_stay_finite() {
    let heads = heads(1, 1, 2);
    let qkv = (random(1, &[1, 20, 6]) * 1e4).unwrap();
    let (y, gradients) =
        value_and_gradients(&[qkv], DType::F32, |x| causal_attention(&x[0], heads, None, Path::Fused));
    for tensor in [&y, &gradients[0]] {
        assert!(tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let qkv = random(1, &[1, 4, 16]);
    assert!(causal_attention(&qkv, heads(2, 2, 4), None, Path::Fused).is_err());
    assert!(causal_attention(&qkv, heads(3, 2, 2), None, Path::Fused).is_err());
    assert!(causal_attention(&qkv, heads(2, 0, 8), None, Path::Fused).is_err());
    let short = Rope::new(4, 3, 1e4, &Device::Cpu).unwrap();
    assert!(causal_attention(&qkv, heads(2, 1, 4), Some(&short), Path::Fused).is_err());
    assert!(Rope::new(5, 3, 1e4, &Device::Cpu).is_err());
}

#[test]
fn heads_that_cannot_be_are_refused() {
    let qkv = random(1, &[1, 4, 16]);
    let most = usize::MAX;
    for (query, kv, dim) in [(most, 1, 4), (1, most, 4), (1 << 63, 1 << 62, 4), (1 << 62, 1, 4), (2, 1, most)]
    {
        let heads = heads(query, kv, dim);
        assert_eq!(heads.packed(), most);
        for path in [Path::Fused, Path::Reference] {
            let error = causal_attention(&qkv, heads, None, path).unwrap_err().to_string();
            assert!(error.contains("does not fit Heads"), "{error}");
        }
    }
    for path in [Path::Fused, Path::Reference] {
        let error = causal_attention(&qkv, heads(0, 2, 4), None, path).unwrap_err().to_string();
        assert!(error.contains("impossible Heads { query: 0"), "{error}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let heads = heads(4, 2, 8);
    same_bits_on_any_number_of_threads(|| {
        let (y, mut gradients) =
            value_and_gradients(&[random(1, &[3, 90, heads.packed()])], DType::F32, |x| {
                causal_attention(&x[0], heads, None, Path::Fused)
            });
        gradients.push(y);
        gradients
    });
}

#[test]
fn rotation_keeps_relative_positions() {
    // The score of two rotated vectors depends on the difference of their positions alone.
    let rope = Rope::new(8, 40, 1e4, &Device::Cpu).unwrap();
    let (q, k) = (random(1, &[1, 1, 8]), random(2, &[1, 1, 8]));
    let score = |i: usize, j: usize| {
        let q = vesper_model::ops::rope(&q, &rope, i).unwrap();
        let k = vesper_model::ops::rope(&k, &rope, j).unwrap();
        (q * k).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    assert!((score(7, 3) - score(30, 26)).abs() < 1e-5);
    assert!((score(7, 3) - score(7, 4)).abs() > 1e-3);
    let plain = (&q * &k).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    assert!((score(5, 5) - plain).abs() < 1e-5);
    assert!(
        Tensor::zeros((1, 41, 8), DType::F64, &Device::Cpu)
            .and_then(|x| vesper_model::ops::rope(&x, &rope, 0))
            .is_err()
    );
}
