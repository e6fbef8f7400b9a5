//! The one error type of the crate.

use std::borrow::Cow;
use std::path::PathBuf;

/// What can go wrong in an optimizer; every message names the place and what was expected there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of [`VelvetConfig`](crate::VelvetConfig), of a schedule, an average or an accumulator is out of its
    /// range.
    #[error("the setting `{field}`: expected {expected}, got {got}")]
    Config {
        /// The field, with its path inside an enum variant.
        field: Cow<'static, str>,
        /// The range that is allowed.
        expected: &'static str,
        /// The value that was given.
        got: f64,
    },
    /// A pattern of a [`ParamGroup`](crate::ParamGroup) cannot be read.
    #[error("VelvetConfig.groups: the pattern `{pattern}`: {problem}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No parameter matches a group, which is most likely misspelt.
    #[error("VelvetConfig.groups: {}", unused(.names))]
    UnusedGroup {
        /// The group's patterns.
        names: Vec<String>,
    },
    /// A setting does not fit a parameter, which has this shape.
    #[error("`{name}`: {problem} (its shape is {shape:?})")]
    Unfit {
        /// The parameter.
        name: String,
        /// What does not fit, and why.
        problem: &'static str,
        /// The parameter's shape.
        shape: Vec<usize>,
    },
    /// No parameter has this name.
    #[error("there is no parameter `{name}`")]
    UnknownParameter {
        /// The name that was given.
        name: String,
    },
    /// Two parameters have the same name.
    #[error("two parameters are named `{name}`")]
    DuplicateName {
        /// The name they share.
        name: String,
    },
    /// One variable was given under two names, so it would be updated twice a step.
    #[error("`{second}` is the same variable as `{first}`: give a shared parameter once")]
    DuplicateVariable {
        /// The name it was first given under.
        first: String,
        /// The other name.
        second: String,
    },
    /// A parameter's element type has no update (only f32, f64, bf16 and f16 have).
    #[error("`{name}`: expected a parameter of f32, f64, bf16 or f16, got {dtype}")]
    UnsupportedDType {
        /// The parameter.
        name: String,
        /// Its element type.
        dtype: String,
    },
    /// A parameter or gradient cannot be used for an update, and why.
    #[error("`{name}`: expected a gradient with {what} {expected}, got {got}")]
    Gradient {
        /// The parameter.
        name: String,
        /// The property that is wrong: its shape, its device or its element type.
        what: &'static str,
        /// The parameter's value of that property.
        expected: String,
        /// The gradient's value.
        got: String,
    },
    /// A mask has another shape than its parameter.
    #[error("`{name}`: expected a mask of shape {expected:?}, got {got:?}")]
    Mask {
        /// The parameter.
        name: String,
        /// Its shape.
        expected: Vec<usize>,
        /// The mask's.
        got: Vec<usize>,
    },
    /// Parameters received no gradient, and
    /// [`MissingGradients::Error`](crate::MissingGradients::Error) is set.
    #[error("step {step}: no gradient for {}", names.join(", "))]
    MissingGradients {
        /// The step that was not taken (the first is 1).
        step: u64,
        /// All parameters without a gradient.
        names: Vec<String>,
    },
    /// A gradient holds NaN or infinity, and [`NonFinite::Error`](crate::NonFinite::Error) is set.
    #[error("step {step}: the gradient norm is {norm}; NaN or infinity in the gradient of {}", names.join(", "))]
    NonFiniteGradients {
        /// The step that was not taken (the first is 1).
        step: u64,
        /// The global gradient norm.
        norm: f64,
        /// All parameters whose gradient is not finite.
        names: Vec<String>,
    },
    /// The learning rate is not a finite number of at least zero.
    #[error("step {step}: expected a finite learning rate of at least 0, got {lr}")]
    LearningRate {
        /// The step that was not taken (the first is 1).
        step: u64,
        /// The learning rate.
        lr: f64,
    },
    /// The loss given to [`Velvet::observe`](crate::Velvet::observe) is not one number.
    #[error("expected a loss of one floating-point number, got shape {shape:?} of {dtype}")]
    Loss {
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: String,
    },
    /// A state file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A state is damaged, or is not one of this crate's.
    #[error("{origin}: `{key}`: {problem}")]
    StateFormat {
        /// The file, or `state bytes`.
        origin: String,
        /// The part that is wrong: a tensor's key, or `header`.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A state belongs to other parameters.
    #[error("{origin}: `{key}`: expected {what} {expected}, got {got}")]
    StateMismatch {
        /// The file, or `state bytes`.
        origin: String,
        /// The tensor or parameter.
        key: String,
        /// The property that differs.
        what: &'static str,
        /// The optimizer's value.
        expected: String,
        /// The state's value.
        got: String,
    },
    /// A state names other parameters than the optimizer.
    #[error("{origin}: the state lacks {}, and has {} that the optimizer lacks", list(.missing), list(.unexpected))]
    StateNames {
        /// The file, or `state bytes`.
        origin: String,
        /// Parameters of the optimizer that the state does not have.
        missing: Vec<String>,
        /// Parameters of the state that the optimizer does not have.
        unexpected: Vec<String>,
    },
    /// An error of candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            // Not `wrap`: it adds a backtrace to what should be one line.
            other => Self::Wrapped(Box::new(other)),
        }
    }
}

impl Error {
    /// A field of something that is itself a field: `place`, then its own path.
    pub(crate) fn within(self, place: &str) -> Self {
        match self {
            Self::Config { field, expected, got } => {
                Self::Config { field: format!("{place}.{field}").into(), expected, got }
            }
            other => other,
        }
    }
}

fn unused(names: &[String]) -> String {
    match names {
        [] => "a group has no patterns, so no parameter matches it".to_owned(),
        names => format!("no parameter matches {}", list(names)),
    }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 4;
    match names {
        [] => "none".to_owned(),
        [first @ .., _] if first.len() < SHOWN => names.join(", "),
        _ => format!("{} and {} more", names[..SHOWN].join(", "), names.len() - SHOWN),
    }
}
