use candle_core::DType;

/// What can be wrong with a configuration or an input.
///
/// Functions that return [`candle_core::Result`] carry it inside [`candle_core::Error`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter of an activation is not in its range.
    #[error("{activation}: {parameter} must be {expected}, got {got}")]
    Parameter {
        /// The variant, as it is written in a configuration file.
        activation: &'static str,
        /// The field.
        parameter: &'static str,
        /// The range, in words.
        expected: &'static str,
        /// The value.
        got: f64,
    },
    /// The tensor's dtype is not one that activations are defined for.
    #[error("expected a tensor of dtype f32, f64, bf16 or f16, got {got:?}")]
    DType {
        /// The tensor's dtype.
        got: DType,
    },
    /// The packed input of a gated activation cannot be halved.
    #[error("expected a packed [gate | up] input whose last dimension is even, got shape {got:?}")]
    GatedShape {
        /// The tensor's shape.
        got: Vec<usize>,
    },
    /// The last dimension of an input is not that of its entropy floor.
    #[error("expected an input whose last dimension is {expected}, got shape {got:?}")]
    Classes {
        /// The number of classes or dimensions.
        expected: usize,
        /// The tensor's shape.
        got: Vec<usize>,
    },
    /// An activation of candle-nn has no counterpart here.
    #[error("candle-nn's {got} is not one of era-act's activations")]
    Candle {
        /// The activation.
        got: String,
    },
    /// A tensor's layout points outside its storage.
    #[error("the layout {got} points outside its storage of {len} elements")]
    Layout {
        /// The layout.
        got: String,
        /// The length of the storage.
        len: usize,
    },
    /// A name is not that of an activation.
    #[error("unknown activation {got:?}, expected one of {expected}")]
    Name {
        /// The name.
        got: String,
        /// The names that there are.
        expected: &'static str,
    },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}
