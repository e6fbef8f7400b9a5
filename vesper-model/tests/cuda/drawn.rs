//! Cases drawn from seeds: sizes, strides, offsets, heads and settings that nobody chose. A failure names its case;
//! `VESPER_CUDA_CASES` says how many each operation gets.

use candle_core::{D, DType, Device, Result, Tensor};
use era_act::{Activation, Era};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vesper_model::ops::{
    CrossEntropy, DecoderSettings, Heads, Path, Philox, Rope, causal_attention, decoder_block, dropout,
    embedding, gated_feed_forward, layer_norm, linear, linear_cross_entropy, residual_layer_norm,
    residual_rms_norm, rms_norm, rope, self_attention,
};

use crate::common::{brief, gpu, off, random};
use crate::decoder::weights;

/// How a tensor lies in the one that it is a part of.
#[derive(Clone, Copy, Debug)]
enum View {
    Whole,
    /// Rows that do not start at the start of the memory.
    Rows,
    /// Some columns of a wider one, from an odd one on.
    Columns,
    /// First and last dimension exchanged.
    Turned,
    /// One row for all.
    Repeated,
}

struct Draw {
    random: ChaCha8Rng,
    /// What was off.
    wrong: Vec<String>,
}

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }

    /// A size up to `most`, often one at the edge of a block.
    fn size(&mut self, most: usize) -> usize {
        const EDGES: [usize; 14] = [1, 2, 3, 8, 16, 17, 31, 33, 64, 65, 96, 127, 128, 257];
        let size = if self.below(2) == 0 { EDGES[self.below(EDGES.len())] } else { 1 + self.below(most) };
        size.min(most)
    }

    fn yes(&mut self) -> bool {
        self.below(2) == 0
    }

    fn heads(&mut self, odd: bool) -> Heads {
        let (kv, group) = (1 + self.below(3), 1 + self.below(4));
        let dim = match self.below(4) {
            0 => 64,
            1 => 128,
            _ => 2 * self.size(64) - usize::from(odd && self.yes()),
        };
        Heads { query: kv * group, kv, dim }
    }

    fn activation(&mut self) -> Activation {
        match self.below(6) {
            0 => Activation::Era(Era::GateEntropy { temperature: 0.7, strength: 0.3 }),
            1 => Activation::Era(Era::GeluSoftplus { gamma: 0.2 }),
            2 => Activation::Silu,
            3 => Activation::Gelu,
            4 => Activation::GeluTanh,
            _ => Activation::default(),
        }
    }
}

/// The tensors of a case: what they are parts of, and how.
#[derive(Default)]
struct Inputs {
    whole: Vec<Tensor>,
    views: Vec<View>,
}

impl Inputs {
    fn scaled(&mut self, draw: &mut Draw, shape: &[usize], scale: f64) {
        let mut whole = shape.to_vec();
        let (first, last) = (0, shape.len() - 1);
        let view = match draw.below(8) {
            0..=2 => View::Whole,
            3 => View::Rows,
            4 => View::Columns,
            5 if shape.len() > 1 => View::Repeated,
            _ if shape.len() > 1 => View::Turned,
            _ => View::Whole,
        };
        match view {
            View::Whole => {}
            View::Rows => whole[first] += 3,
            View::Columns => whole[last] += 4,
            View::Turned => whole.swap(first, last),
            View::Repeated => whole[first] = 1,
        }
        let seed = self.whole.len() as u64 + 1;
        self.whole.push((random(seed, &whole) * scale).unwrap());
        self.views.push(view);
    }

    /// The parts, of these whole tensors.
    fn parts(&self, whole: &[Tensor], shapes: &[Vec<usize>]) -> Result<Vec<Tensor>> {
        let part = |((x, view), shape): ((&Tensor, &View), &Vec<usize>)| match view {
            View::Whole => Ok(x.clone()),
            View::Rows => x.narrow(0, 2, shape[0]),
            View::Columns => x.narrow(D::Minus1, 1, shape[shape.len() - 1]),
            View::Turned => x.transpose(0, shape.len() - 1),
            View::Repeated => x.broadcast_as(shape.as_slice()),
        };
        whole.iter().zip(&self.views).zip(shapes).map(part).collect()
    }
}

/// Compares `f` with its reference on parts of such shapes.
fn compare(
    name: &str,
    device: &Device,
    draw: &mut Draw,
    shapes: &[Vec<usize>],
    scales: &[f64],
    f: impl Fn(&[Tensor], Path) -> Result<Tensor>,
) {
    let mut inputs = Inputs::default();
    for (shape, &scale) in shapes.iter().zip(scales.iter().chain(std::iter::repeat(&1.0))) {
        inputs.scaled(draw, shape, scale);
    }
    let name = format!("{name} {shapes:?} {:?}", inputs.views);
    draw.wrong.extend(off(&name, device, &inputs.whole, 4.0, |x, path| f(&inputs.parts(x, shapes)?, path)));
}

/// Runs `case` on each drawn case.
fn drawn(test: &str, case: impl Fn(&Device, &mut Draw, &str)) {
    let Some((_lock, device)) = gpu(test) else { return };
    let wanted = std::env::var("VESPER_CUDA_CASES").ok().and_then(|n| n.parse().ok());
    let cases = wanted.unwrap_or(if brief() { 2 } else { 10 });
    let of_test = test.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let mut wrong = Vec::new();
    for seed in 0..cases {
        let mut draw = Draw { random: ChaCha8Rng::seed_from_u64(of_test ^ seed), wrong: Vec::new() };
        case(&device, &mut draw, &format!("{test}, case {seed}:"));
        wrong.extend(draw.wrong);
    }
    assert!(brief() || wrong.is_empty(), "{}", wrong.join("\n"));
}

fn both((sum, y): (Tensor, Tensor)) -> Result<Tensor> {
    (sum * 0.5)? + y
}

#[test]
fn norms_of_drawn_shapes() {
    drawn("norms_of_drawn_shapes", |device, draw, name| {
        let d = if draw.below(4) == 0 { 300 + draw.below(5000) } else { draw.size(300) };
        let shape = vec![1 + draw.below(3), draw.size(20), d];
        let shapes = [shape.clone(), shape, vec![d], vec![d]];
        compare(&format!("{name} rms"), device, draw, &[shapes[0].clone(), vec![d]], &[], |x, path| {
            rms_norm(&x[0], &x[1], 1e-1, path)
        });
        compare(&format!("{name} layer"), device, draw, &shapes[1..], &[], |x, path| {
            layer_norm(&x[0], &x[1], Some(&x[2]), 1e-1, path)
        });
        compare(&format!("{name} residual rms"), device, draw, &shapes[..3], &[], |x, path| {
            both(residual_rms_norm(&x[0], &x[1], &x[2], 1e-1, path)?)
        });
        compare(&format!("{name} residual layer"), device, draw, &shapes, &[], |x, path| {
            both(residual_layer_norm(&x[0], &x[1], &x[2], Some(&x[3]), 1e-1, path)?)
        });
    });
}

#[test]
fn products_of_drawn_shapes() {
    drawn("products_of_drawn_shapes", |device, draw, name| {
        let (b, t, d, out) = (1 + draw.below(3), draw.size(70), draw.size(150), draw.size(150));
        let shapes = [vec![b, t, d], vec![out, d]];
        compare(&format!("{name} linear"), device, draw, &shapes, &[], |x, path| linear(&x[0], &x[1], path));
        let activation = draw.activation();
        let shapes = [vec![b, t, d], vec![2 * out, d], vec![d, out]];
        let name = format!("{name} feed-forward {activation:?}");
        compare(&name, device, draw, &shapes, &[], |x, path| {
            gated_feed_forward(&x[0], &x[1], &x[2], activation, path)
        });
    });
}

#[test]
fn attention_of_drawn_shapes() {
    drawn("attention_of_drawn_shapes", |device, draw, name| {
        let rotary = draw.below(3) > 0;
        let heads = draw.heads(!rotary);
        let (b, t) = (1 + draw.below(3), draw.size(300));
        let name = format!("{name} {heads:?} rotary {rotary}");
        compare(&name, device, draw, &[vec![b, t, heads.packed()]], &[3.0], |x, path| {
            let rope = if rotary { Some(Rope::new(heads.dim, t + 5, 1e4, x[0].device())?) } else { None };
            causal_attention(&x[0], heads, rope.as_ref(), path)
        });
    });
}

#[test]
fn self_attention_of_drawn_shapes() {
    drawn("self_attention_of_drawn_shapes", |device, draw, name| {
        let rotary = draw.yes();
        let heads = draw.heads(!rotary);
        let (b, t, d) = (1 + draw.below(2), draw.size(90), draw.size(70));
        let shapes = [vec![b, t, d], vec![heads.packed(), d], vec![d, heads.query * heads.dim]];
        let name = format!("{name} {heads:?} rotary {rotary}");
        compare(&name, device, draw, &shapes, &[1.0, 0.5], |x, path| {
            let rope = if rotary { Some(Rope::new(heads.dim, t, 1e4, x[0].device())?) } else { None };
            self_attention(&x[0], &x[1], &x[2], heads, rope.as_ref(), path)
        });
    });
}

#[test]
fn blocks_of_drawn_shapes() {
    drawn("blocks_of_drawn_shapes", |device, draw, name| {
        let rotary = draw.yes();
        let heads = draw.heads(!rotary);
        let (b, t, d, ffn) = (1 + draw.below(3), draw.size(70), draw.size(70), draw.size(90));
        let shapes = [
            vec![b, t, d],
            vec![d],
            vec![heads.packed(), d],
            vec![d, heads.query * heads.dim],
            vec![d],
            vec![2 * ffn, d],
            vec![d, ffn],
        ];
        let scale = |n: usize| (3.0 / n as f64).sqrt();
        let scales = [1.0, 1.0, scale(d), scale(heads.query * heads.dim), 1.0, scale(d), scale(ffn)];
        let settings = DecoderSettings { heads, activation: draw.activation(), eps: 1e-2 };
        let name = format!("{name} {settings:?} rotary {rotary}");
        compare(&name, device, draw, &shapes, &scales, |x, path| {
            let rope = if rotary { Some(Rope::new(heads.dim, t, 1e4, x[0].device())?) } else { None };
            decoder_block(&x[0], &weights(x), settings, rope.as_ref(), path)
        });
    });
}

#[test]
fn losses_of_drawn_shapes() {
    drawn("losses_of_drawn_shapes", |device, draw, name| {
        let (n, vocab, d) = (draw.size(80), draw.size(700), draw.size(60));
        let mut settings = CrossEntropy::default();
        if draw.yes() {
            settings = settings.with_ignore_index(draw.below(vocab) as u32);
        }
        if draw.yes() {
            settings = settings.with_z_loss(0.01);
        }
        if draw.yes() {
            settings = settings.with_label_smoothing(0.2);
        }
        let ids: Vec<u32> = (0..n).map(|_| draw.below(vocab) as u32).collect();
        let dtype = if draw.yes() { DType::U32 } else { DType::I64 };
        let targets = Tensor::new(ids, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        compare(
            &format!("{name} {settings:?}"),
            device,
            draw,
            &[vec![n, d], vec![vocab, d]],
            &[],
            |x, path| {
                let targets = targets.to_device(x[0].device())?;
                Ok(linear_cross_entropy(&x[0], &x[1], &targets, settings, path)?.loss)
            },
        );
    });
}

#[test]
fn rows_of_drawn_shapes() {
    drawn("rows_of_drawn_shapes", |device, draw, name| {
        let (vocab, d, n) = (draw.size(300), draw.size(100), draw.size(300));
        let ids: Vec<u32> = (0..n).map(|_| draw.below(vocab) as u32).collect();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        compare(&format!("{name} embedding {n}"), device, draw, &[vec![vocab, d]], &[], |x, path| {
            embedding(&x[0], &ids.to_device(x[0].device())?, path)
        });
        let shape = vec![1 + draw.below(3), draw.size(40), draw.size(130)];
        let random = Philox { seed: draw.below(1 << 40) as u64, offset: draw.below(1 << 40) as u64 };
        compare(&format!("{name} dropout"), device, draw, &[shape], &[], |x, path| {
            dropout(&x[0], 0.3, random, path)
        });
        let (t, dim, offset) = (draw.size(40), 2 * draw.size(50), draw.below(9));
        let shape = vec![1 + draw.below(2), 1 + draw.below(3), t, dim];
        compare(&format!("{name} rope from {offset}"), device, draw, &[shape], &[], |x, _| {
            rope(&x[0], &Rope::new(dim, offset + t, 1e4, x[0].device())?, offset)
        });
    });
}
