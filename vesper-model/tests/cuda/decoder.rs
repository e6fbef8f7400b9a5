//! A whole block as one operation.

use candle_core::{DType, Tensor, Var};
use era_act::{Activation, Era};
use vesper_model::ops::{
    DecoderSettings, DecoderWeights, Heads, Path, Rope, backward, decoder_block, decoder_blocks,
};

use crate::common::{brief, error, gpu, parity, random, rows, same_bits, to_f64};

fn settings(heads: Heads, activation: Activation) -> DecoderSettings {
    DecoderSettings { heads, activation, eps: 1e-5 }
}

/// x and the six weights, which keep values near 1.
fn inputs((b, t, d, ffn): (usize, usize, usize, usize), heads: Heads) -> Vec<Tensor> {
    let scaled = |seed, shape: &[usize]| (random(seed, shape) * (3.0 / shape[1] as f64).sqrt()).unwrap();
    vec![
        random(1, &[b, t, d]),
        random(2, &[d]),
        scaled(3, &[heads.packed(), d]),
        scaled(4, &[d, heads.query * heads.dim]),
        random(5, &[d]),
        scaled(6, &[2 * ffn, d]),
        scaled(7, &[d, ffn]),
    ]
}

pub(crate) fn weights(x: &[Tensor]) -> DecoderWeights {
    DecoderWeights {
        norm_attention: x[1].clone(),
        qkv: x[2].clone(),
        out: x[3].clone(),
        norm_feed_forward: x[4].clone(),
        gate_up: x[5].clone(),
        down: x[6].clone(),
    }
}

const CASES: [((usize, usize, usize, usize), Heads); 4] = [
    ((2, 33, 48, 40), Heads { query: 3, kv: 1, dim: 64 }),
    ((1, 150, 64, 24), Heads { query: 2, kv: 2, dim: 128 }),
    ((2, 10, 33, 7), Heads { query: 2, kv: 2, dim: 6 }),
    ((1, 1, 8, 8), Heads { query: 1, kv: 1, dim: 8 }),
];

#[test]
fn decoder_block_equals_its_reference() {
    let Some((_lock, device)) = gpu("decoder_block_equals_its_reference") else { return };
    for (shape, heads) in CASES {
        let activations = [Activation::Era(Era::default()), Activation::GeluTanh];
        for activation in activations.into_iter().take(if brief() { 1 } else { 2 }) {
            let name = format!("decoder_block {shape:?} {heads:?} {activation:?}");
            parity(&name, &device, &inputs(shape, heads), |x, path| {
                let rope = Rope::new(heads.dim, shape.1, 1e4, x[0].device())?;
                decoder_block(&x[0], &weights(x), settings(heads, activation), Some(&rope), path)
            });
        }
    }
    let (shape, heads) = CASES[0];
    let strided = inputs(shape, heads);
    parity("decoder_block strided", &device, &strided, |x, path| {
        let mut x = x.to_vec();
        x[0] = x[0].transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
        x[2] = x[2].t()?.contiguous()?.t()?;
        decoder_block(&x[0], &weights(&x), settings(heads, Activation::Silu), None, path)
    });
    same_bits("decoder_block", &device, &inputs((3, rows(200), 64, 96), heads), |x| {
        decoder_block(&x[0], &weights(x), settings(heads, Activation::Silu), None, Path::Fused)
    });
}

#[test]
fn any_part_of_a_block_may_be_frozen_and_weights_may_be_in_f32() {
    let name = "any_part_of_a_block_may_be_frozen_and_weights_may_be_in_f32";
    let Some((_lock, device)) = gpu(name) else { return };
    let (shape, heads) = CASES[0];
    let values = inputs(shape, heads);
    let run = |tracked: &dyn Fn(usize) -> bool| -> Vec<Option<Tensor>> {
        let vars: Vec<Var> = values
            .iter()
            .enumerate()
            .map(|(i, x)| {
                let dtype = if i == 0 { DType::BF16 } else { DType::F32 };
                Var::from_tensor(&x.to_dtype(dtype).unwrap().to_device(&device).unwrap()).unwrap()
            })
            .collect();
        let x: Vec<Tensor> = vars
            .iter()
            .enumerate()
            .map(|(i, var)| if tracked(i) { var.as_tensor().clone() } else { var.as_detached_tensor() })
            .collect();
        let y = decoder_block(&x[0], &weights(&x), settings(heads, Activation::Silu), None, Path::Fused);
        let y = y.unwrap();
        assert_eq!(y.track_op(), (0..7).any(tracked));
        if !y.track_op() {
            return vec![None; 7];
        }
        let grads = y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        vars.iter()
            .map(|var| {
                let gradient = grads.get(var)?;
                assert_eq!(gradient.dtype(), var.dtype());
                Some(to_f64(gradient))
            })
            .collect()
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
    for place in if brief() { 2..3 } else { 0..7 } {
        check(&|i| i == place);
        check(&|i| i != place);
    }
}

#[test]
fn a_stack_of_blocks_is_one_block_after_the_other() {
    let Some((_lock, device)) = gpu("a_stack_of_blocks_is_one_block_after_the_other") else { return };
    let (shape, heads) = CASES[0];
    let settings = settings(heads, Activation::Era(Era::default()));
    let rope = Rope::new(heads.dim, shape.1, 1e4, &device).unwrap();
    let dtypes = [DType::BF16, DType::F16, DType::F32];
    for dtype in dtypes.into_iter().take(if brief() { 1 } else { 3 }) {
        // x, then the weights of three blocks, in f32 beside x in half precision.
        let vars: Vec<Var> = std::iter::once(inputs(shape, heads)[0].to_dtype(dtype).unwrap())
            .chain((0..3).flat_map(|_| inputs(shape, heads).split_off(1)))
            .map(|x| if x.rank() == 3 { x } else { x.to_dtype(DType::F32).unwrap() })
            .map(|x| Var::from_tensor(&x.to_device(&device).unwrap()).unwrap())
            .collect();
        // Everything trains; the first block does not; nothing but one weight in the middle does.
        let choices: [&dyn Fn(usize) -> bool; 4] = [&|_| true, &|i| i > 6, &|i| i == 9, &|i| i == 0];
        for tracked in choices.into_iter().take(if brief() { 2 } else { 4 }) {
            let x: Vec<Tensor> = vars
                .iter()
                .enumerate()
                .map(|(i, var)| if tracked(i) { var.as_tensor().clone() } else { var.as_detached_tensor() })
                .collect();
            let blocks: Vec<DecoderWeights> = (0..3).map(|i| weights(&x[6 * i..6 * i + 7])).collect();
            let run = |y: Tensor| {
                let loss = y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
                let grads = backward(&loss).unwrap();
                let all: Vec<Option<Tensor>> = vars.iter().map(|var| grads.get(var).map(to_f64)).collect();
                (to_f64(&y), all)
            };
            let stack = decoder_blocks(&x[0], &blocks, settings, Some(&rope), Path::Fused).unwrap();
            let chain = blocks.iter().fold(x[0].clone(), |x, block| {
                decoder_block(&x, block, settings, Some(&rope), Path::Fused).unwrap()
            });
            let ((y, stack), (wanted, chain)) = (run(stack), run(chain));
            assert_eq!(error(&y, &wanted), 0.0, "{dtype:?}");
            for (i, (a, b)) in stack.iter().zip(&chain).enumerate() {
                assert_eq!((a.is_some(), b.is_some()), (tracked(i), tracked(i)), "{dtype:?} {i}");
                if let (Some(a), Some(b)) = (a, b) {
                    assert_eq!(error(a, b), 0.0, "{dtype:?} {i}");
                }
            }
        }
    }
}

#[test]
fn weights_in_f32_give_the_bits_of_their_rounded_values() {
    let name = "weights_in_f32_give_the_bits_of_their_rounded_values";
    let Some((_lock, device)) = gpu(name) else { return };
    // 12 blocks have more weights than a launch casts; 33 x 7 elements fill no vectors.
    let ((shape, heads), count) = (CASES[2], if brief() { 2 } else { 12 });
    let values = inputs(shape, heads);
    for dtype in [DType::BF16, DType::F16] {
        let x = values[0].to_dtype(dtype).unwrap().to_device(&device).unwrap();
        let stack = |rounded: bool, first_tracked: usize| -> (Vec<u64>, Vec<Tensor>) {
            let mut vars = Vec::new();
            let blocks: Vec<DecoderWeights> = (0..count)
                .map(|i| {
                    let mut own = vec![x.clone()];
                    for value in &values[1..] {
                        let wide = (value * (1.0 + 0.01 * i as f64)).unwrap().to_dtype(DType::F32).unwrap();
                        let wide = if rounded { wide.to_dtype(dtype).unwrap() } else { wide };
                        let var = Var::from_tensor(&wide.to_device(&device).unwrap()).unwrap();
                        let tracked = i >= first_tracked;
                        own.push(if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() });
                        if tracked {
                            vars.push(var);
                        }
                    }
                    weights(&own)
                })
                .collect();
            let y = decoder_blocks(&x, &blocks, settings(heads, Activation::Silu), None, Path::Fused);
            let y = y.unwrap();
            let bits = to_f64(&y).flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let bits = bits.into_iter().map(f64::to_bits).collect();
            if !y.track_op() {
                return (bits, Vec::new());
            }
            let grads = backward(&y.to_dtype(DType::F32).unwrap().sum_all().unwrap()).unwrap();
            (bits, vars.iter().map(|var| to_f64(grads.get(var).unwrap())).collect())
        };
        for first_tracked in [0, count / 3, count] {
            let ((wide, gradients), (rounded, expected)) =
                (stack(false, first_tracked), stack(true, first_tracked));
            assert!(wide == rounded, "{dtype:?}, a gradient from block {first_tracked} on");
            assert_eq!(gradients.len(), 6 * (count - first_tracked));
            for (gradient, expected) in gradients.iter().zip(&expected) {
                let off = error(gradient, expected);
                assert!(off < 1e-2, "{dtype:?}, a gradient from block {first_tracked} on: off by {off:e}");
            }
        }
    }
}
