use std::sync::{Arc, Barrier};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use vesper_model::ops::{
    CrossEntropy, Path, Philox, checkpoint, dropout, embedding, linear, linear_cross_entropy, rms_norm,
};

use crate::common::{error, parity, random};

fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&random(seed, shape)).unwrap()
}

/// Something with two captured weights, of which one is used twice.
fn part(x: &Tensor, a: &Tensor, w: &Tensor) -> Result<Tensor> {
    let h = linear(&rms_norm(x, w, 1e-5, Path::Fused)?, a, Path::Fused)?;
    x + (h.tanh()? * linear(x, a, Path::Fused)?)?
}

fn gradients(loss: &Tensor, vars: &[&Var]) -> Vec<Tensor> {
    let grads = loss.backward().unwrap();
    vars.iter().map(|var| grads.get(var).unwrap().clone()).collect()
}

#[test]
fn inputs_and_captured_variables_get_the_gradients_of_the_plain_graph() {
    let (x, a, w) = (var(1, &[5, 8]), var(2, &[8, 8]), var(3, &[8]));
    // The weights are used outside of the checkpoints too.
    let run = |checkpointed: bool| {
        let mut h = (x.as_tensor() * 1.5).unwrap();
        for _ in 0..3 {
            let (a, w) = (a.as_tensor().clone(), w.as_tensor().clone());
            h = if checkpointed {
                checkpoint(move |xs| part(&xs[0], &a, &w), &[&h]).unwrap()
            } else {
                part(&h, &a, &w).unwrap()
            };
        }
        let h = h.matmul(a.as_tensor()).unwrap();
        gradients(&h.sqr().unwrap().sum_all().unwrap(), &[&x, &a, &w])
    };
    for (with, without) in run(true).iter().zip(run(false)) {
        assert!(error(with, &without) < 1e-14);
    }
}

#[test]
fn checkpoints_may_be_nested() {
    let (x, a, w) = (var(1, &[5, 8]), var(2, &[8, 8]), var(3, &[8]));
    let run = |checkpointed: bool| {
        let (a1, w1) = (a.as_tensor().clone(), w.as_tensor().clone());
        let twice = move |x: &Tensor| -> Result<Tensor> {
            if !checkpointed {
                return part(&part(x, &a1, &w1)?, &a1, &w1);
            }
            let (a, w) = (a1.clone(), w1.clone());
            let h = checkpoint(move |xs| part(&xs[0], &a, &w), &[x])?;
            let (a, w) = (a1.clone(), w1.clone());
            checkpoint(move |xs| part(&xs[0], &a, &w), &[&h])
        };
        let y = if checkpointed {
            checkpoint(move |xs| twice(&xs[0]), &[x.as_tensor()]).unwrap()
        } else {
            twice(x.as_tensor()).unwrap()
        };
        gradients(&y.sqr().unwrap().sum_all().unwrap(), &[&x, &a, &w])
    };
    for (with, without) in run(true).iter().zip(run(false)) {
        assert!(error(with, &without) < 1e-14);
    }
}

#[test]
fn every_dtype_and_several_inputs() {
    let inputs = [random(1, &[5, 8]), random(2, &[8, 8]), random(3, &[8])];
    parity("checkpoint", &inputs, |x, checkpointed| {
        if checkpointed {
            checkpoint(|xs| part(&xs[0], &xs[1], &xs[2]), &[&x[0], &x[1], &x[2]])
        } else {
            part(&x[0], &x[1], &x[2])
        }
    });
}

#[test]
fn ids_pass_and_unused_inputs_get_zeros() {
    let (table, unused) = (var(1, &[6, 4]), var(2, &[3]));
    let ids = Tensor::new(&[1u32, 5, 1], &Device::Cpu).unwrap();
    let y = checkpoint(
        |xs| embedding(&xs[1], &xs[0], Path::Fused),
        &[&ids, table.as_tensor(), unused.as_tensor()],
    )
    .unwrap();
    let gradients = gradients(&y.sum_all().unwrap(), &[&table, &unused]);
    let rows = gradients[0].sum(1).unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(rows, [0.0, 8.0, 0.0, 0.0, 0.0, 4.0]);
    assert_eq!(gradients[1].to_vec1::<f64>().unwrap(), [0.0; 3]);
}

#[test]
fn an_input_that_is_captured_too_gets_both_parts() {
    let x = var(1, &[7]);
    let captured = x.as_tensor().clone();
    let y = checkpoint(move |xs| &xs[0] * &captured, &[x.as_tensor()]).unwrap();
    let gradient = gradients(&y.sum_all().unwrap(), &[&x]);
    assert!(error(&gradient[0], &(x.as_tensor() * 2.0).unwrap()) < 1e-15);
}

#[test]
fn a_captured_tensor_with_a_graph_hands_its_gradient_on() {
    let (x, w) = (var(1, &[7]), var(2, &[7]));
    let doubled = (w.as_tensor() * 2.0).unwrap();
    let y = checkpoint(move |xs| &xs[0] * &doubled, &[x.as_tensor()]).unwrap();
    let gradients = gradients(&y.sum_all().unwrap(), &[&x, &w]);
    assert!(error(&gradients[0], &(w.as_tensor() * 2.0).unwrap()) < 1e-15);
    assert!(error(&gradients[1], &(x.as_tensor() * 2.0).unwrap()) < 1e-15);
}

#[test]
fn dropout_inside_has_the_same_mask_again() {
    let x = var(1, &[500]);
    let random = Philox { seed: 3, offset: 9 };
    let y = checkpoint(move |xs| dropout(&xs[0], 0.5, random, Path::Fused), &[x.as_tensor()]).unwrap();
    let values = y.to_vec1::<f64>().unwrap();
    let gradient = gradients(&y.sum_all().unwrap(), &[&x])[0].to_vec1::<f64>().unwrap();
    assert!(values.contains(&0.0));
    for (y, dx) in values.iter().zip(gradient) {
        assert_eq!(dx, if *y == 0.0 { 0.0 } else { 2.0 });
    }
}

#[test]
fn views_and_results_that_are_inputs_are_copied_rightly() {
    let x = var(1, &[6, 5]);
    let transposed = checkpoint(|xs| xs[0].t()?.narrow(0, 1, 3), &[x.as_tensor()]).unwrap();
    let same = checkpoint(|xs| Ok(xs[0].clone()), &[x.as_tensor()]).unwrap();
    let expected = x.t().unwrap().narrow(0, 1, 3).unwrap();
    assert_eq!(transposed.to_vec2::<f64>().unwrap(), expected.to_vec2::<f64>().unwrap());
    assert_eq!(same.to_vec2::<f64>().unwrap(), x.to_vec2::<f64>().unwrap());
    let loss = (transposed.sqr().unwrap().sum_all().unwrap() + same.sum_all().unwrap()).unwrap();
    let plain = (expected.sqr().unwrap().sum_all().unwrap() + x.sum_all().unwrap()).unwrap();
    assert!(error(&gradients(&loss, &[&x])[0], &gradients(&plain, &[&x])[0]) < 1e-15);
}

#[test]
fn without_anything_tracked_there_is_no_graph() {
    let x = random(1, &[4]);
    assert!(!checkpoint(|xs| xs[0].sqr(), &[&x]).unwrap().track_op());
    let empty = var(1, &[0, 3]);
    let y = checkpoint(|xs| xs[0].sqr(), &[empty.as_tensor()]).unwrap();
    assert_eq!((y.dims(), y.track_op()), (&[0, 3][..], true));
}

#[test]
fn errors_of_the_closure_come_through() {
    let x = var(1, &[4]);
    let error = checkpoint(|_| candle_core::bail!("no luck"), &[x.as_tensor()]).unwrap_err();
    assert!(error.to_string().contains("no luck"));
    // One that fails the second time, and one that changes its mind about the shape.
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let y = checkpoint(
        move |xs| match calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => Ok(xs[0].clone()),
            _ => xs[0].narrow(0, 0, 2),
        },
        &[x.as_tensor()],
    )
    .unwrap();
    let message = y.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(message.contains("[4]") && message.contains("[2]"), "{message}");
}

/// The identity, as a node of the graph that can be counted while it is in memory.
struct Counted(#[allow(dead_code)] Arc<()>);

impl CustomOp1 for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

#[test]
fn what_the_closure_computes_on_the_way_is_not_kept() {
    const LAYERS: usize = 4;
    const NODES: usize = 10;
    let alive = |checkpointed: bool| {
        let counter = Arc::new(());
        let x = var(1, &[8]);
        let mut h = x.as_tensor().clone();
        for _ in 0..LAYERS {
            let mine = Arc::clone(&counter);
            let layer = move |x: &Tensor| {
                (0..NODES).try_fold(x.clone(), |h, _| h.apply_op1(Counted(Arc::clone(&mine))))
            };
            h = if checkpointed {
                checkpoint(move |xs| layer(&xs[0]), &[&h]).unwrap()
            } else {
                layer(&h).unwrap()
            };
        }
        // Less the test's own and those of the closures.
        let kept = Arc::strong_count(&counter) - 1 - if checkpointed { LAYERS } else { 0 };
        assert_eq!(gradients(&h.sum_all().unwrap(), &[&x])[0].to_vec1::<f64>().unwrap(), [1.0; 8]);
        // The backward leaves nothing behind either.
        assert_eq!(Arc::strong_count(&counter) - 1 - if checkpointed { LAYERS } else { 0 }, kept);
        kept
    };
    assert_eq!(alive(false), LAYERS * NODES);
    assert_eq!(alive(true), 0);
}

#[test]
fn gradients_do_not_hold_on_to_what_was_recomputed() {
    let (counter, x, w) = (Arc::new(()), var(1, &[8]), var(2, &[8]));
    let (mine, weight) = (Arc::clone(&counter), w.as_tensor().clone());
    // The gradients of both are products with tensors of the inner graph.
    let y = checkpoint(
        move |xs| {
            let h = xs[0].apply_op1(Counted(Arc::clone(&mine)))?;
            (&h * &h)? * &weight
        },
        &[x.as_tensor()],
    )
    .unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
    assert_eq!(Arc::strong_count(&counter), 2); // the test's own and the closure's
}

#[test]
fn a_scaled_loss_and_a_second_backward_are_right() {
    let (x, w) = (var(1, &[5, 4]), var(2, &[9, 4]));
    let targets = Tensor::new(&[0u32, 8, 3, 1, 1], &Device::Cpu).unwrap();
    let weight = w.as_tensor().clone();
    let loss = checkpoint(
        move |xs| {
            Ok(linear_cross_entropy(&xs[0], &weight, &xs[1], CrossEntropy::default(), Path::Fused)?.loss)
        },
        &[x.as_tensor(), &targets],
    )
    .unwrap();
    assert_eq!(loss.dtype(), DType::F64);
    let once = gradients(&loss, &[&x, &w]);
    let scaled = gradients(&(&loss * 8.0).unwrap(), &[&x, &w]);
    for (once, scaled) in once.iter().zip(&scaled) {
        assert!(error(&(scaled / 8.0).unwrap(), once) < 1e-14);
    }
}

/// The identity, in whose backward two threads wait for each other.
struct Meet(Arc<Barrier>);

impl CustomOp1 for Meet {
    fn name(&self) -> &'static str {
        "meet"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.0.wait();
        Ok(Some(dy.clone()))
    }
}

#[test]
fn threads_that_walk_back_through_one_graph_get_their_own_gradients() {
    let (x, a, b) = (var(1, &[5, 8]), var(2, &[5, 8]), var(3, &[5, 8]));
    // Both are between two of the gradients that the checkpoint hands over when they meet.
    let met = b.as_tensor().apply_op1(Meet(Arc::new(Barrier::new(2)))).unwrap();
    let inputs = [x.as_tensor(), a.as_tensor(), &met];
    let y = checkpoint(|xs| &xs[0] * (&xs[1] * &xs[2])?, &inputs).unwrap();
    let of = |factor: f64| {
        let loss = (&y * factor).unwrap().sum_all().unwrap();
        gradients(&loss, &[&x, &a, &b])
    };
    let (once, twice) = std::thread::scope(|threads| {
        let other = threads.spawn(|| of(2.0));
        (of(1.0), other.join().unwrap())
    });
    let product = |one: &Var, other: &Var| (one.as_tensor() * other.as_tensor()).unwrap();
    for (i, want) in [product(&a, &b), product(&x, &b), product(&x, &a)].iter().enumerate() {
        assert!(error(&once[i], want) < 1e-14, "{i}");
        assert!(error(&twice[i], &(want * 2.0).unwrap()) < 1e-14, "{i}, twice");
    }
}
