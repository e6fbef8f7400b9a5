use candle_core::{DType, Device, Tensor, Var};
use era_act::{Activation, Era};
use vesper_model::ops::{
    DecoderSettings, DecoderWeights, Heads, Path, Rope, backward, decoder_block, decoder_blocks,
    gated_feed_forward, residual_rms_norm, rms_norm, self_attention,
};

use crate::common::{error, finite_differences, parity, path, random};

const HEADS: Heads = Heads { query: 3, kv: 1, dim: 4 };

fn settings(activation: Activation) -> DecoderSettings {
    DecoderSettings { heads: HEADS, activation, eps: 1e-5 }
}

/// x and the six weights.
fn inputs(b: usize, t: usize, d: usize, ffn: usize) -> Vec<Tensor> {
    vec![
        random(1, &[b, t, d]),
        random(2, &[d]),
        random(3, &[HEADS.packed(), d]),
        random(4, &[d, HEADS.query * HEADS.dim]),
        random(5, &[d]),
        random(6, &[2 * ffn, d]),
        random(7, &[d, ffn]),
    ]
}

fn weights(x: &[Tensor]) -> DecoderWeights {
    DecoderWeights {
        norm_attention: x[1].clone(),
        qkv: x[2].clone(),
        out: x[3].clone(),
        norm_feed_forward: x[4].clone(),
        gate_up: x[5].clone(),
        down: x[6].clone(),
    }
}

#[test]
fn equals_its_reference_at_odd_shapes() {
    for (b, t, d, ffn) in [(1, 1, 1, 1), (2, 17, 7, 9), (1, 65, 12, 33)] {
        let rope = Rope::new(HEADS.dim, t + 2, 1e4, &Device::Cpu).unwrap();
        for activation in [Activation::Era(Era::default()), Activation::GeluTanh] {
            parity("decoder block", &inputs(b, t, d, ffn), |x, fused| {
                decoder_block(&x[0], &weights(x), settings(activation), Some(&rope), path(fused))
            });
        }
    }
}

#[test]
fn gradient_equals_finite_differences() {
    let rope = Rope::new(HEADS.dim, 9, 1e4, &Device::Cpu).unwrap();
    finite_differences("decoder block", &inputs(2, 5, 6, 8), |x| {
        decoder_block(&x[0], &weights(x), settings(Activation::Silu), Some(&rope), Path::Fused)
    });
}

#[test]
fn no_rows_give_an_empty_result() {
    for (b, t) in [(0, 5), (3, 0)] {
        for fused in [true, false] {
            let x = inputs(b, t, 6, 8);
            let y = decoder_block(&x[0], &weights(&x), settings(Activation::Silu), None, path(fused));
            assert_eq!(y.unwrap().dims(), [b, t, 6]);
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    for place in 1..7 {
        let mut x = inputs(1, 3, 6, 8);
        let mut dims = x[place].dims().to_vec();
        dims[0] += 1;
        x[place] = random(9, &dims);
        let result = decoder_block(&x[0], &weights(&x), settings(Activation::Silu), None, Path::Fused);
        assert!(result.is_err(), "weight {place}");
    }
}

#[test]
fn a_stack_is_one_block_after_the_other() {
    let (x, other) = (inputs(2, 5, 6, 8), inputs(2, 5, 6, 3));
    let rope = Rope::new(HEADS.dim, 9, 1e4, &Device::Cpu).unwrap();
    let settings = settings(Activation::Silu);
    let all: Vec<Tensor> = x.iter().chain(&other[1..]).cloned().collect();
    parity("decoder blocks", &all, |x, fused| {
        let blocks = [weights(x), weights(&x[6..])];
        if fused {
            return decoder_blocks(&x[0], &blocks, settings, Some(&rope), Path::Fused);
        }
        let y = decoder_block(&x[0], &blocks[0], settings, Some(&rope), Path::Reference)?;
        decoder_block(&y, &blocks[1], settings, Some(&rope), Path::Reference)
    });
    let none = decoder_blocks(&x[0], &[], settings, None, Path::Fused).unwrap();
    assert_eq!(none.to_vec3::<f64>().unwrap(), x[0].to_vec3::<f64>().unwrap());
    let mut wrong = weights(&x);
    wrong.down = other[6].narrow(0, 0, 5).unwrap();
    let error = decoder_blocks(&x[0], &[weights(&x), wrong], settings, None, Path::Fused).unwrap_err();
    assert!(error.to_string().starts_with("decoder_block: down [5, 3] of block 1"), "{error}");
}

#[test]
fn strides_do_not_matter() {
    let mut x = inputs(2, 5, 6, 8);
    x[0] = x[0].transpose(0, 1).unwrap().contiguous().unwrap();
    for i in [2, 3, 5, 6] {
        x[i] = x[i].t().unwrap().contiguous().unwrap();
    }
    parity("strided decoder block", &x, |x, fused| {
        let mut x = x.to_vec();
        x[0] = x[0].transpose(0, 1)?;
        for i in [2, 3, 5, 6] {
            x[i] = x[i].t()?;
        }
        decoder_block(&x[0], &weights(&x), settings(Activation::Silu), None, path(fused))
    });
}

#[test]
fn any_part_of_a_stack_may_be_frozen_and_weights_may_be_in_f32() {
    let (first, second) = (inputs(2, 5, 6, 8), inputs(2, 5, 6, 3));
    let vars: Vec<Var> = first
        .iter()
        .chain(&second[1..])
        .map(|x| x.to_dtype(if x.rank() == 3 { DType::BF16 } else { DType::F32 }).unwrap())
        .map(|x| Var::from_tensor(&x).unwrap())
        .collect();
    let run = |tracked: &dyn Fn(usize) -> bool| -> Vec<Option<Tensor>> {
        let of = |(i, var): (usize, &Var)| {
            if tracked(i) { var.as_tensor().clone() } else { var.as_detached_tensor() }
        };
        let x: Vec<Tensor> = vars.iter().enumerate().map(of).collect();
        let blocks = [weights(&x), weights(&x[6..])];
        let y = decoder_blocks(&x[0], &blocks, settings(Activation::Silu), None, Path::Fused).unwrap();
        assert_eq!(y.track_op(), (0..vars.len()).any(tracked));
        let loss = y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
        let (theirs, ours) = (loss.backward().unwrap(), backward(&loss).unwrap());
        let gradient = |var: &Var| {
            let gradient = ours.get(var)?;
            assert_eq!(gradient.dtype(), var.dtype());
            assert_eq!(error(gradient, theirs.get(var).unwrap()), 0.0);
            Some(gradient.clone())
        };
        vars.iter().map(gradient).collect()
    };
    let all = run(&|_| true);
    let check = |tracked: &dyn Fn(usize) -> bool| {
        for (i, (gradient, expected)) in run(tracked).iter().zip(&all).enumerate() {
            assert_eq!(gradient.is_some(), tracked(i), "{i}");
            if let (Some(gradient), Some(expected)) = (gradient, expected) {
                assert_eq!(error(gradient, expected), 0.0, "{i}");
            }
        }
    };
    check(&|_| false);
    for place in 0..vars.len() {
        check(&|i| i == place);
        check(&|i| i != place);
    }
}

#[test]
fn a_block_has_the_bits_of_its_operations() {
    let x: Vec<Tensor> = inputs(2, 17, 7, 9).iter().map(|x| x.to_dtype(DType::BF16).unwrap()).collect();
    let rope = Rope::new(HEADS.dim, 17, 1e4, &Device::Cpu).unwrap();
    let DecoderSettings { heads, activation, eps } = settings(Activation::Era(Era::default()));
    let w = weights(&x);
    let block = decoder_block(&x[0], &w, settings(activation), Some(&rope), Path::Fused).unwrap();
    let n = rms_norm(&x[0], &w.norm_attention, eps, Path::Fused).unwrap();
    let attention = self_attention(&n, &w.qkv, &w.out, heads, Some(&rope), Path::Fused).unwrap();
    let (sum, n) = residual_rms_norm(&x[0], &attention, &w.norm_feed_forward, eps, Path::Fused).unwrap();
    let y = (sum + gated_feed_forward(&n, &w.gate_up, &w.down, activation, Path::Fused).unwrap()).unwrap();
    assert_eq!(error(&block, &y), 0.0);
}
