//! The names of activations, in text and in configurations.

use std::fmt;
use std::str::FromStr;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::{Activation, Era, Error};

/// The names that [`FromStr`] reads; the variants of [`Era`] come with their default parameters.
const NAMES: [(&str, Activation); 7] = [
    ("era", Activation::Era(Era::GateEntropy { temperature: 1.0, strength: 0.1 })),
    ("era_gelu_softplus", Activation::Era(Era::GeluSoftplus { gamma: 0.1 })),
    ("silu", Activation::Silu),
    ("gelu_tanh", Activation::GeluTanh),
    ("gelu", Activation::Gelu),
    ("relu", Activation::Relu),
    ("relu_squared", Activation::ReluSquared),
];

impl FromStr for Activation {
    type Err = Error;

    /// Reads `era`, `era_gelu_softplus`, `silu`, `gelu_tanh`, `gelu`, `relu` or `relu_squared`, and the other names
    /// that Hugging Face configurations use for them: `swish`, `gelu_new`, `gelu_pytorch_tanh`, `relu2`.
    fn from_str(name: &str) -> Result<Self, Error> {
        let canonical = match name {
            "swish" => "silu",
            "gelu_new" | "gelu_pytorch_tanh" => "gelu_tanh",
            "relu2" => "relu_squared",
            other => other,
        };
        NAMES.iter().find(|(n, _)| *n == canonical).map(|(_, activation)| *activation).ok_or_else(|| {
            Error::Name {
                got: name.to_owned(),
                expected: "era, era_gelu_softplus, silu, gelu_tanh, gelu, relu, relu_squared",
            }
        })
    }
}

impl fmt::Display for Activation {
    /// The name without parameters, or with them where an [`Era`] has other than the default ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = NAMES.iter().find(|(_, activation)| activation == self) {
            return f.write_str(name);
        }
        match self {
            Self::Era(Era::GateEntropy { temperature, strength }) => {
                write!(f, "era(temperature={temperature}, strength={strength})")
            }
            Self::Era(Era::GeluSoftplus { gamma }) => write!(f, "era_gelu_softplus(gamma={gamma})"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl<'de> Deserialize<'de> for Activation {
    /// Reads a name, as [`FromStr`] does, or an [`Era`] with its parameters: `{"era": {"gate_entropy": {"strength": 0.3}}}`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NameOrParameters)
    }
}

struct NameOrParameters;

/// An activation that has parameters, as it is serialised.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum WithParameters {
    Era(Era),
}

impl<'de> Visitor<'de> for NameOrParameters {
    type Value = Activation;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of an activation, or an era with its parameters")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Activation, E> {
        name.parse().map_err(E::custom)
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Activation, M::Error> {
        let WithParameters::Era(era) = WithParameters::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Activation::Era(era))
    }
}
