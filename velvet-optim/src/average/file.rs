//! The average as a safetensors file.
//!
//! ```text
//! metadata["velvet-average"]  a JSON header: format version, the averaging, counts, names of all parameters, sorted
//! NAME                        the average in the parameter's shape, f32 or f64; none before the average has begun
//! ```
//!
//! Tensors have the parameters' own names, so the file can be loaded as weights.

use super::{Averaging, WeightAverage};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

const HEADER_KEY: &str = "velvet-average";
const FORMAT: u64 = 1;
/// The key under which messages name the header.
const HEADER: &str = "header";
/// More updates than any run makes; counting on from there cannot overflow.
const LARGEST_COUNT: u64 = 1 << 53;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u64,
    averaging: Averaging,
    updates: u64,
    count: u64,
    names: Vec<String>,
}

impl WeightAverage {
    /// Writes the average to a safetensors file, under a temporary name in the same folder that is synced and renamed:
    /// a crash or a full disk leaves an older file as it was. Equal averages give equal bytes.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written (the message names the file), or a tensor cannot be read from
    /// its device.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use velvet_optim::{Averaging, WeightAverage};
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("average.safetensors");
    /// let named = || [("w".to_owned(), Var::new(&[1f32, 2.0], &Device::Cpu).unwrap())];
    /// let mut average = WeightAverage::named(named(), Averaging::Tail { start: 0 })?;
    /// average.update()?;
    /// average.save(&path)?;
    /// let mut resumed = WeightAverage::named(named(), Averaging::Tail { start: 0 })?;
    /// resumed.load(&path)?;
    /// assert_eq!(resumed.updates(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_owned(), source };
        let header = Header {
            format: FORMAT,
            averaging: self.averaging,
            updates: self.updates,
            count: self.count,
            names: self.entries.iter().map(|entry| entry.name.clone()).collect(),
        };
        let header = serde_json::to_string(&header)
            .map_err(|error| format_error(&path.display().to_string(), HEADER, error.to_string()))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(permissions); // less the umask, as any new file; tempfile's own are for its owner alone
        let file = builder.prefix(".velvet-").tempfile_in(folder).map_err(io)?;
        // safetensors puts a file of its own in its place, which is for its owner alone.
        let permissions = file.as_file().metadata().map_err(io)?.permissions();
        let file = file.into_temp_path();
        let failure = RefCell::new(None);
        let arrays = self.averages().map(|(name, average)| (name, Array { average, failure: &failure }));
        // One key, because a HashMap of several would give equal averages different bytes.
        let metadata = HashMap::from([(HEADER_KEY.to_owned(), header)]);
        safetensors::serialize_to_file(arrays, Some(metadata), &file).map_err(|error| {
            io(match error {
                safetensors::SafeTensorError::IoError(error) => error,
                other => std::io::Error::other(other.to_string()),
            })
        })?;
        if let Some(error) = failure.take() {
            return Err(Error::Candle(error));
        }
        let written = std::fs::OpenOptions::new().write(true).open(&file).map_err(io)?;
        written.set_permissions(permissions).map_err(io)?;
        written.sync_all().map_err(io)?;
        drop(written);
        file.persist(path).map_err(|error| io(error.error))
    }

    /// Takes over an average that [`WeightAverage::save`] wrote, onto the devices of these variables.
    ///
    /// Names and shapes must be the same and the kind of average too; `decay` and `start` stay those of this
    /// one. Parameters may be of another type than they were: the average is converted.
    ///
    /// # Errors
    /// The file cannot be read, is damaged or not of this format, or is of other parameters or another kind of average;
    /// the message names the file and the key. Or a swap was not undone. The average is then as it was.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.require_trained("load")?;
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let origin = path.display().to_string();
        let mismatch = |key: &str, what, expected: String, got: String| Error::StateMismatch {
            origin: origin.clone(),
            key: key.to_owned(),
            what,
            expected,
            got,
        };
        let (header, tensors) = open(&bytes, &origin)?;
        if header.averaging.kind() != self.averaging.kind() {
            let (expected, got) = (self.averaging.kind().to_owned(), header.averaging.kind().to_owned());
            return Err(mismatch(HEADER, "average of kind", expected, got));
        }
        let ours: BTreeSet<&str> = self.entries.iter().map(|entry| entry.name.as_str()).collect();
        let theirs: BTreeSet<&str> = header.names.iter().map(String::as_str).collect();
        if ours != theirs {
            let names = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| {
                a.difference(b).map(|&name| name.to_owned()).collect::<Vec<_>>()
            };
            let (missing, unexpected) = (names(&ours, &theirs), names(&theirs, &ours));
            return Err(Error::StateNames { origin, missing, unexpected });
        }
        if header.count > header.updates || header.updates > LARGEST_COUNT {
            let problem = format!(
                "expected at most as many weights as updates, and these up to 2^53, got {} of {}",
                header.count, header.updates
            );
            return Err(format_error(&origin, HEADER, problem));
        }
        // Before the average has begun there is none of any parameter; after it there is one of each.
        let has_begun = header.count > 0;
        let expected = if has_begun { self.entries.len() } else { 0 };
        if tensors.len() != expected {
            let problem = format!(
                "expected {expected} tensors in an average of {}, got {}",
                header.count,
                tensors.len()
            );
            return Err(format_error(&origin, HEADER, problem));
        }
        let mut averages = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            if !has_begun {
                averages.push(None);
                continue;
            }
            let view = tensors
                .tensor(&entry.name)
                .map_err(|_| format_error(&origin, &entry.name, "the tensor is missing".to_owned()))?;
            if view.shape() != entry.var.dims() {
                let (expected, got) = (format!("{:?}", entry.var.dims()), format!("{:?}", view.shape()));
                return Err(mismatch(&entry.name, "shape", expected, got));
            }
            let tensor = match view.dtype() {
                Dtype::F32 => {
                    let values: Vec<f32> =
                        view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                    Tensor::from_vec(values, view.shape(), &Device::Cpu)?
                }
                Dtype::F64 => {
                    let values: Vec<f64> =
                        view.data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
                    Tensor::from_vec(values, view.shape(), &Device::Cpu)?
                }
                other => {
                    return Err(mismatch(&entry.name, "type", "F32 or F64".to_owned(), format!("{other:?}")));
                }
            };
            averages.push(Some(tensor.to_dtype(entry.dtype())?.to_device(entry.var.device())?));
        }
        // Everything is read and checked before anything is replaced.
        for (entry, average) in self.entries.iter_mut().zip(averages) {
            entry.average = average;
        }
        self.updates = header.updates;
        self.count = header.count;
        Ok(())
    }
}

/// An average as safetensors wants to see it. Data is fetched when it is written, so that one array at a time is copied
/// from a device; the trait has no way to report a failure, which is kept aside.
struct Array<'a> {
    average: &'a Tensor,
    failure: &'a RefCell<Option<candle_core::Error>>,
}

impl Array<'_> {
    fn bytes(&self) -> candle_core::Result<Vec<u8>> {
        let values = self.average.flatten_all()?;
        Ok(match self.average.dtype() {
            DType::F64 => values.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
            _ => values.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        })
    }
}

impl View for Array<'_> {
    fn dtype(&self) -> Dtype {
        if self.average.dtype() == DType::F64 { Dtype::F64 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        self.average.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.bytes().unwrap_or_else(|error| {
            *self.failure.borrow_mut() = Some(error);
            Vec::new()
        }))
    }

    fn data_len(&self) -> usize {
        self.average.elem_count() * self.average.dtype().size_in_bytes()
    }
}

fn format_error(origin: &str, key: &str, problem: String) -> Error {
    Error::StateFormat { origin: origin.to_owned(), key: key.to_owned(), problem }
}

fn open<'a>(bytes: &'a [u8], origin: &str) -> Result<(Header, SafeTensors<'a>)> {
    let broken = |problem: String| format_error(origin, HEADER, problem);
    let whole = |error| broken(format!("not a whole safetensors file ({error})"));
    let tensors = SafeTensors::deserialize(bytes).map_err(whole)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(whole)?;
    let text =
        metadata.metadata().as_ref().and_then(|metadata| metadata.get(HEADER_KEY)).ok_or_else(|| {
            broken(format!("not an average of weights: the metadata has no `{HEADER_KEY}`"))
        })?;
    // The version first: a later format may have another header.
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| broken(error.to_string()))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(FORMAT) => {}
        Some(other) => {
            return Err(Error::StateMismatch {
                origin: origin.to_owned(),
                key: HEADER.to_owned(),
                what: "format",
                expected: FORMAT.to_string(),
                got: other.to_string(),
            });
        }
        None => return Err(broken("no format version".to_owned())),
    }
    let header = serde_json::from_value(value).map_err(|error| broken(error.to_string()))?;
    Ok((header, tensors))
}
