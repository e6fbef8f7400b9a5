use candle_core::{DType, Device, Result, Tensor, Var};
use era_act::{Era, LearnedEra};

use crate::common::{noise, tensor};
use crate::{DTYPES, Report, gpu, host, inputs, most, off};

fn forms() -> Vec<Era> {
    vec![
        Era::default(),
        Era::GateEntropy { temperature: 2.5, strength: -0.4 },
        Era::GateEntropy { temperature: 0.125, strength: 0.0 },
        Era::gelu_softplus(),
        Era::GeluSoftplus { gamma: -0.7 },
    ]
}

/// The value, the gradient of x and those of the parameters.
fn run(
    learned: &LearnedEra,
    x: &Tensor,
    dy: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let x = Var::from_tensor(&x.to_device(dy.device()).unwrap()).unwrap();
    let y = f(&x).unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |t: &Tensor| host(grads.get(t).expect("every parameter has a gradient"))[0];
    (host(&y), host(grads.get(&x).unwrap()), learned.parameters().iter().map(|(_, t)| of(t)).collect())
}

#[test]
fn learned_values_and_all_gradients_equal_the_composition_in_f64() {
    let name = "learned_values_and_all_gradients_equal_the_composition_in_f64";
    let Some((_lock, device)) = gpu(name) else { return };
    let mut report = Report::new();
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    for era in forms() {
        let here = LearnedEra::alone(era, &device).unwrap();
        let there = LearnedEra::alone(era, &Device::Cpu).unwrap();
        for dtype in DTYPES {
            let mut worst = [0f64; 3];
            let mut compare =
                |got: (Vec<f64>, Vec<f64>, Vec<f64>), want: (Vec<f64>, Vec<f64>, Vec<f64>), size: f64| {
                    worst[0] = worst[0].max(off(&got.0, &want.0, dtype, 10.0));
                    worst[1] = worst[1].max(off(&got.1, &want.1, dtype, 40.0));
                    // Sums: of terms in f32, of which many cancel.
                    worst[2] = worst[2].max(off(&got.2, &want.2, DType::F32, 10.0 * size));
                };
            for n in [1, 17, 1000, 4099, most(70_001)] {
                let (_, dy) = inputs(n, dtype);
                let x = tensor(&noise(n, 9.0, 5), dtype);
                let got = run(&here, &x, &dy.to_device(&device).unwrap(), |x| here.forward(x));
                let want = run(&there, &wide(&x), &wide(&dy), |x| there.composed(x));
                compare(got, want, n as f64);
            }
            for (rows, width) in [(1, 1), (3, 7), (5, 1027), (40, 512), (most(3000 * 24) / 24, 24)] {
                let x = tensor(&noise(rows * 2 * width, 5.0, 4), dtype).reshape((rows, 2 * width)).unwrap();
                let dy = tensor(&noise(rows * width, 1.0, 5), dtype).reshape((rows, width)).unwrap();
                let got = run(&here, &x, &dy.to_device(&device).unwrap(), |x| here.gated(x));
                let halves =
                    |x: &Tensor| there.composed(&x.narrow(1, 0, width)?)? * x.narrow(1, width, width)?;
                let want = run(&there, &wide(&x), &wide(&dy), halves);
                compare(got, want, 10.0 * (rows * width) as f64);
            }
            for (what, off) in ["value", "gradient", "gradients of parameters"].into_iter().zip(worst) {
                report.add(&format!("learned {era:?} {dtype:?} {what}"), off);
            }
        }
    }
    report.end();
}

#[test]
fn learned_gradients_have_the_same_bits_in_every_run_and_the_values_are_those_of_the_fixed_form() {
    let name = "learned_gradients_have_the_same_bits_in_every_run_and_the_values_are_those_of_the_fixed_form";
    let Some((_lock, device)) = gpu(name) else { return };
    for era in forms() {
        let learned = LearnedEra::alone(era, &device).unwrap();
        let now = learned.era().unwrap();
        for dtype in DTYPES {
            let n = most(300_001);
            let x = tensor(&noise(n, 6.0, 6), dtype);
            let dy = tensor(&noise(n, 1.0, 7), dtype).to_device(&device).unwrap();
            let once = run(&learned, &x, &dy, |x| learned.forward(x));
            assert_eq!(once, run(&learned, &x, &dy, |x| learned.forward(x)), "{era:?} {dtype:?}");
            let fixed = now.forward(&x.to_device(&device).unwrap()).unwrap();
            // The temperature is not to the bit what it is as an f64.
            assert!(off(&once.0, &host(&fixed), dtype, 1.0) < 2.0, "{era:?} {dtype:?}");
        }
        let empty = Tensor::zeros((1, 8), DType::F32, &device).unwrap().narrow(0, 0, 0).unwrap();
        assert_eq!(learned.gated(&empty).unwrap().dims(), [0, 4]);
        assert_eq!(learned.forward(&empty).unwrap().dims(), [0, 8]);
    }
}
