use candle_core::{DType, Device, Result, Tensor, Var};
use vesper_model::ops::CapturedStep;

#[test]
fn without_a_gpu_the_step_simply_runs() {
    let total = Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let mut step = CapturedStep::new((total, 0), |(total, runs): &mut (Var, usize), x: &[Tensor]| {
        *runs += 1;
        total.set(&(total.as_tensor() + x[0].sum(0)?)?)?;
        total.sum_all()
    });
    for (rows, expected) in [(1, 2.0), (1, 4.0), (3, 10.0), (1, 12.0), (1, 14.0)] {
        let x = Tensor::ones((rows, 2), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(step.run(&[&x]).unwrap().to_scalar::<f32>().unwrap(), expected);
    }
    assert!(!step.is_recorded());
    assert_eq!(step.state().1, 5);
    step.state_mut().1 = 0;
    step.reset();
    assert_eq!(step.into_state().1, 0);
}

#[test]
fn no_inputs_and_errors_of_the_step_are_errors() {
    let mut step = CapturedStep::new((), |(), x: &[Tensor]| -> Result<Tensor> { x[0].reshape(7) });
    assert!(step.run(&[]).unwrap_err().to_string().contains("at least one input"));
    let x = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    assert!(step.run(&[&x]).is_err());
}
