//! The prediction of errors token by token.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Device;
use velvet_optim::{Velvet, VelvetConfig};
use vesper_data::{EvalBatches, Tokens};
use vesper_model::VesperLM;
use vesper_model::metacognition::metrics::{auroc, brier, error_at_coverage, expected_calibration_error};
use vesper_model::metacognition::{
    BaseModel, Calibration, ErrorHead, ErrorKind, ErrorScore, Features, HeadConfig, HeadTraining, Measure,
    Method, Predictions,
};

use super::record::Quality;

/// How heads are trained.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Hidden units of those that have any.
    pub units: usize,
    /// Epochs, batch and seed.
    pub head: HeadTraining,
    /// Learning rate of AdamW.
    pub lr: f64,
}

/// The model's predictions on a text, in windows of `seq` tokens.
///
/// # Errors
/// Fewer tokens than a window, a model that computes NaN.
pub fn predictions(
    model: &VesperLM,
    tokens: Tokens,
    seq: usize,
    config: &HeadConfig,
    device: &Device,
) -> Result<Predictions> {
    let mut predictions = Predictions::new(config)?;
    for batch in EvalBatches::new(tokens, 8, seq, device)? {
        let batch = batch?;
        predictions.add(model, &batch.inputs, &batch.targets)?;
    }
    Ok(predictions)
}

/// The model's mean loss on a text, nats a token.
///
/// # Errors
/// Fewer tokens than a window.
pub fn loss(model: &VesperLM, tokens: Tokens, seq: usize, device: &Device) -> Result<f64> {
    let model = model.detach();
    let (mut sum, mut count) = (0.0, 0.0);
    for batch in EvalBatches::new(tokens, 8, seq, device)? {
        let batch = batch?;
        let n = batch.counted as f64; // the last batch may be smaller
        sum += n * f64::from(model.loss(&batch.inputs, &batch.targets)?.loss.to_scalar::<f32>()?);
        count += n;
    }
    Ok(sum / count)
}

/// The heads that are compared; the last is the one that is used further.
pub fn heads(units: usize) -> Vec<(String, HeadConfig)> {
    let linear = |features| HeadConfig::default().with_features(features).with_units(0);
    let all = [
        ("head: statistics", linear(Features::Statistics).with_units(units)),
        ("head: hidden state, linear", linear(Features::Hidden)),
        ("head: hidden state", linear(Features::Hidden).with_units(units)),
        ("head: both, linear", linear(Features::Both)),
        (HEAD, linear(Features::Both).with_units(units)),
    ];
    all.into_iter().map(|(name, config)| (name.to_owned(), config)).collect()
}

/// The head that sees everything.
pub const HEAD: &str = "head: both";

/// The name of a measure.
pub fn name(measure: Measure) -> &'static str {
    match measure {
        Measure::Probability => super::record::BASELINE,
        Measure::Entropy => "entropy",
        Measure::Margin => "margin",
    }
}

/// Trains a head on the model's predictions, and calibrates it on others.
///
/// # Errors
/// Predictions that cannot be used.
pub fn train(
    base: &BaseModel,
    config: &HeadConfig,
    training: &Training,
    on: &Predictions,
    calibration: &Predictions,
) -> Result<ErrorHead> {
    let head = ErrorHead::new(base, config, on, training.head.seed)?;
    let settings = VelvetConfig { lr: training.lr, ..VelvetConfig::default() }; // AdamW, decay .01
    let mut optimizer = Velvet::named(head.parameters(), settings)?;
    training.head.run(&head, on, &mut optimizer)?;
    Ok(head.calibrate(Method::Platt, calibration)?)
}

/// What a score is worth: calibrated on one part, measured on another.
///
/// # Errors
/// A part in which all predictions are right, or wrong.
pub fn quality(score: &dyn ErrorScore, calibration: &Predictions, test: &Predictions) -> Result<Quality> {
    let (fit, measured) = (score.scores(calibration)?, score.scores(test)?);
    quality_of((&fit, &calibration.wrong()), (&measured, &test.wrong()))
}

/// The same for scores that are there already.
///
/// # Errors
/// As [`quality`].
pub fn quality_of(calibration: (&[f64], &[bool]), test: (&[f64], &[bool])) -> Result<Quality> {
    let apply = |method| -> Result<Vec<f64>> {
        let fit = Calibration::fit(method, calibration.0, calibration.1)?;
        Ok(test.0.iter().map(|score| fit.apply(*score)).collect())
    };
    let (platt, isotonic) = (apply(Method::Platt)?, apply(Method::Isotonic)?);
    Ok(Quality {
        auroc: auroc(test.0, test.1)?,
        ece: expected_calibration_error(&platt, test.1)?,
        ece_isotonic: expected_calibration_error(&isotonic, test.1)?,
        brier: brier(&platt, test.1)?,
        error_at_half: error_at_coverage(test.0, test.1, 0.5)?,
    })
}

/// By the name of a kind.
type ByKind<T> = BTreeMap<String, T>;

/// Shares of the kinds, and how well the head tells each from all others.
///
/// # Errors
/// Those of the head.
pub fn kinds(head: &ErrorHead, test: &Predictions) -> Result<(ByKind<f64>, ByKind<Option<f64>>)> {
    let assessed = head.assess_all(test)?;
    let (mut shares, mut found) = (ByKind::new(), ByKind::new());
    for (i, kind) in ErrorKind::ALL.into_iter().enumerate() {
        let name = serde_json::to_value(kind)?.as_str().context("a name")?.to_owned();
        let is: Vec<bool> = test.kinds().iter().map(|other| *other == kind).collect();
        let p: Vec<f64> = assessed.iter().filter_map(|a| a.kinds.get(i).copied()).collect();
        shares.insert(name.clone(), is.iter().filter(|is| **is).count() as f64 / is.len().max(1) as f64);
        found.insert(name, auroc(&p, &is).ok());
    }
    Ok((shares, found))
}
