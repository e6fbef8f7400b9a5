//! A head on disk.

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::fingerprint::hexadecimal;
use super::head::{Layer, sizes};
use super::predictions::all_finite;
use super::{AnswerCalibration, BaseModel, Calibration, ErrorHead, HeadConfig};
use crate::hf::{header, invalid, io, read_json, write};
use crate::{ModelError, Result, VesperLM};

const CONFIG: &str = "error_head.json";
const WEIGHTS: &str = "error_head.safetensors";
const FORMAT: &str = "vesper-error-head";
const VERSION: u32 = 1;

/// `error_head.json`
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: String,
    version: u32,
    base: BaseModel,
    head: HeadConfig,
    calibration: Calibration,
    answer: AnswerCalibration,
    /// Of the other file: an interruption between the two renames is noticed.
    weights_sha256: String,
}

/// What any version says of itself.
#[derive(Deserialize)]
struct Header {
    format: Option<String>,
    version: Option<u32>,
}

impl ErrorHead {
    /// Writes `error_head.json` and `error_head.safetensors` into a folder, such as that of the model: each first under
    /// another name, then renamed. The first has the SHA-256 of the second, so that half of a head is never taken for one.
    ///
    /// # Errors
    /// [`ModelError::Io`] names the file that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(io(dir))?;
        let staging = tempfile::Builder::new().prefix(".saving-").tempdir_in(dir).map_err(io(dir))?;
        let (config, weights) = (staging.path().join(CONFIG), staging.path().join(WEIGHTS));
        write::weights(&weights, self.tensors())?;
        let stored = Stored {
            format: FORMAT.into(),
            version: VERSION,
            base: self.base.clone(),
            head: self.config,
            calibration: self.calibration.clone(),
            answer: self.answer.clone(),
            weights_sha256: digest(&weights)?,
        };
        let json = serde_json::to_string_pretty(&stored)
            .map_err(|error| invalid(&dir.join(CONFIG), error.to_string()))?;
        write::text(&config, &(json + "\n"))?;
        for (from, name) in [(weights, WEIGHTS), (config, CONFIG)] {
            let to = dir.join(name);
            fs::rename(from, &to).map_err(io(&to))?;
        }
        Ok(())
    }

    /// Reads a head and checks that it is for this model.
    ///
    /// # Errors
    /// As [`ErrorHead::load`] and [`ErrorHead::check`].
    pub fn load_for(dir: impl AsRef<Path>, model: &VesperLM) -> Result<Self> {
        let dir = dir.as_ref();
        let head = Self::load(dir, model.device())?;
        head.check(model).map_err(|error| match error {
            ModelError::OtherModel { what, got, expected, .. } => {
                ModelError::OtherModel { head: dir.join(CONFIG).display().to_string(), what, got, expected }
            }
            other => other,
        })?;
        Ok(head)
    }

    /// Reads a head, whichever model it is for.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::InvalidFile`]: which file is missing, truncated, of another version, or has what
    /// wrong.
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let (config, weights) = (dir.as_ref().join(CONFIG), dir.as_ref().join(WEIGHTS));
        let stored = read(&config)?;
        let mut file = header::Weights::open(&weights)?;
        if digest(&weights)? != stored.weights_sha256 {
            let reason = format!("not the weights that {CONFIG} beside it describes (another SHA-256)");
            return Err(invalid(&weights, reason));
        }
        let features = stored.head.features.size(stored.base.hidden_size);
        let sizes = sizes(&stored.head, &stored.base);
        let mut known = vec!["features.shift".to_owned(), "features.scale".to_owned()];
        known.extend(sizes.iter().flat_map(|(name, ..)| [format!("{name}.weight"), format!("{name}.bias")]));
        if let Some(name) = file.names().into_iter().find(|name| !known.contains(name)) {
            return Err(invalid(&weights, format!("an unexpected tensor {name}")));
        }
        let mut tensor = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let Some(tensor) = file.read(name, shape)? else {
                return Err(invalid(&weights, format!("no tensor {name}")));
            };
            let tensor = tensor.to_dtype(candle_core::DType::F32)?.to_device(device)?;
            if !all_finite(&tensor)? {
                return Err(invalid(&weights, format!("{name} has a value that is NaN or infinite")));
            }
            Ok(tensor)
        };
        let shift = tensor("features.shift", &[1, features])?;
        let scale = tensor("features.scale", &[1, features])?;
        let layers = sizes
            .into_iter()
            .map(|(name, input, output)| {
                let weight = tensor(&format!("{name}.weight"), &[output, input])?;
                let bias = tensor(&format!("{name}.bias"), &[output])?;
                Ok(Layer { name, weight: Var::from_tensor(&weight)?, bias: Var::from_tensor(&bias)? })
            })
            .collect::<Result<_>>()?;
        let Stored { base, head, calibration, answer, .. } = stored;
        Ok(Self { config: head, base, shift, scale, layers, calibration, answer })
    }

    /// Checks that the head was trained for this model: the hidden size, the vocabulary and the
    /// [`fingerprint`](super::fingerprint).
    ///
    /// # Errors
    /// [`ModelError::OtherModel`] says which of them is another.
    pub fn check(&self, model: &VesperLM) -> Result<()> {
        let config = model.config();
        let other = |what: &'static str, expected: String, got: String| {
            Err(ModelError::OtherModel { head: "the error head".into(), what, got, expected })
        };
        // The cheap ones first: the fingerprint reads every weight.
        for (what, own, models) in [
            ("hidden_size", self.base.hidden_size, config.hidden_size),
            ("vocab_size", self.base.vocab_size, config.vocab_size),
        ] {
            if own != models {
                return other(what, own.to_string(), models.to_string());
            }
        }
        let fingerprint = super::fingerprint(model)?;
        if fingerprint != self.base.fingerprint {
            return other("the fingerprint", self.base.fingerprint.clone(), fingerprint);
        }
        Ok(())
    }

    fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![
            ("features.shift".into(), self.shift.clone()),
            ("features.scale".into(), self.scale.clone()),
        ];
        tensors.extend(self.parameters().into_iter().map(|(name, var)| (name, var.as_detached_tensor())));
        tensors
    }
}

fn read(path: &Path) -> Result<Stored> {
    let header: Header = read_json(path)?;
    if header.format.as_deref() != Some(FORMAT) {
        let got = header.format.unwrap_or_else(|| "none".into());
        return Err(invalid(path, format!("not an error head: format is {got}, expected {FORMAT}")));
    }
    if header.version != Some(VERSION) {
        let got = header.version.map_or_else(|| "none".into(), |version| version.to_string());
        return Err(invalid(path, format!("an error head of version {got}, expected {VERSION}")));
    }
    let stored: Stored = read_json(path)?;
    stored.head.validate().map_err(|error| invalid(path, error.to_string()))?;
    if !(1..=1 << 20).contains(&stored.base.hidden_size) {
        let reason = format!("base.hidden_size is {}, expected 1 to 2^20", stored.base.hidden_size);
        return Err(invalid(path, reason));
    }
    for (field, calibration) in
        [("calibration", &stored.calibration), ("answer.calibration", &stored.answer.calibration)]
    {
        if let Some(problem) = calibration.problem() {
            return Err(invalid(path, format!("{field}: {problem}")));
        }
    }
    Ok(stored)
}

fn digest(path: &Path) -> Result<String> {
    Ok(hexadecimal(&Sha256::digest(fs::read(path).map_err(io(path))?)))
}
