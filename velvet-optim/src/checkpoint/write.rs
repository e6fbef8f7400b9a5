//! Writing the state.

use super::header::{self, Averages, Entry, Header, Last};
use super::{FORMAT, HEADER_KEY, MASK, PRODUCTS_KEY, SIZES_KEY};
use crate::error::{Error, Result};
use crate::parameter::{self, Naming};
use crate::resident::Snapshot;
use crate::state::{self, Data, Slot};
use crate::velvet::Velvet;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

impl Velvet {
    /// Writes the state to a safetensors file: moments, products of betas, counters, averages of the loss and the
    /// base learning rate, but neither the parameters nor the rest of the configuration.
    ///
    /// The file is written under a temporary name in the same folder, synced and renamed: a crash or a full disk
    /// leaves an older file as it was. Equal states give equal bytes.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written; the message names the file. Or the learning rate is not a finite
    /// number of at least 0, which loading would refuse.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use velvet_optim::{Optimizer, Velvet, VelvetConfig};
    /// let folder = tempfile::tempdir()?;
    /// let x = Var::new(&[1f32, 2.0], &Device::Cpu)?;
    /// let mut opt = Velvet::named(vec![("x".to_owned(), x.clone())], VelvetConfig::default())?;
    /// opt.backward_step(&x.sqr()?.sum_all()?)?;
    /// opt.save(folder.path().join("optimizer.safetensors"))?;
    ///
    /// let mut resumed = Velvet::named(vec![("x".to_owned(), x)], VelvetConfig::default())?;
    /// resumed.load(folder.path().join("optimizer.safetensors"))?;
    /// assert_eq!(resumed.stats()?, opt.stats()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.to_owned(), source };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let file = temporary(folder).map_err(io)?;
        // safetensors puts a file of its own in its place, which is for its owner alone.
        let permissions = file.as_file().metadata().map_err(io)?.permissions();
        let file = file.into_temp_path();
        let (failure, snapshot) = (RefCell::new(None), self.snapshot()?);
        safetensors::serialize_to_file(
            self.entries(&failure, &snapshot),
            Some(self.metadata(&snapshot)?),
            &file,
        )
        .map_err(|error| io(into_io(error)))?;
        if let Some(error) = failure.take() {
            return Err(Error::Candle(error));
        }
        let written = std::fs::OpenOptions::new().write(true).open(&file).map_err(io)?;
        written.set_permissions(permissions).map_err(io)?;
        written.sync_all().map_err(io)?;
        drop(written);
        file.persist(path).map_err(|error| io(error.error))
    }

    /// The state as the bytes that [`Velvet::save`] writes.
    ///
    /// # Errors
    /// A tensor cannot be read from its device, or the learning rate is not a finite number of at least 0.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (failure, snapshot) = (RefCell::new(None), self.snapshot()?);
        let bytes =
            safetensors::serialize(self.entries(&failure, &snapshot), Some(self.metadata(&snapshot)?))
                .map_err(|error| Error::StateFormat {
                    origin: "state bytes".to_owned(),
                    key: "header".to_owned(),
                    problem: error.to_string(),
                })?;
        match failure.take() {
            Some(error) => Err(Error::Candle(error)),
            None => Ok(bytes),
        }
    }

    fn entries<'a>(&'a self, failure: &'a Failure, snapshot: &Snapshot) -> Vec<(String, Array<'a>)> {
        let mut entries = Vec::new();
        for parameter in &self.parameters {
            for slot in &parameter.slots {
                let name = format!("{}.{}", parameter.name, slot.spec.name);
                let whole = |dtype| Array {
                    dtype,
                    shape: slot.spec.shape.clone(),
                    source: Source::Slot(slot),
                    failure,
                };
                match &slot.data {
                    Data::F64(_) => entries.push((name, whole(Dtype::F64))),
                    Data::Tensor(t) if t.dtype() == DType::F64 => entries.push((name, whole(Dtype::F64))),
                    Data::F32(_) | Data::Tensor(_) => entries.push((name, whole(Dtype::F32))),
                    Data::Blockwise(x) => {
                        let codes = (x.codes().len(), Source::Bytes(Cow::Borrowed(x.codes())));
                        let scales = (x.scales().len(), Source::Bytes(state::f32_bytes(x.scales())));
                        entries.extend(blocks(&name, codes, scales, failure));
                    }
                    Data::TensorBlocks(x) => {
                        let codes = (x.codes.elem_count(), Source::Tensor(&x.codes));
                        let scales = (x.scales.elem_count(), Source::Tensor(&x.scales));
                        entries.extend(blocks(&name, codes, scales, failure));
                    }
                }
            }
            if let Some(mask) = &parameter.mask {
                let (dtype, shape, source) = (Dtype::U8, mask.dims().to_vec(), Source::Mask(mask));
                entries.push((format!("{}.{MASK}", parameter.name), Array { dtype, shape, source, failure }));
            }
        }
        let mut table = |key: &str, columns: usize, values: Vec<f64>| {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let (shape, source) = (vec![self.parameters.len(), columns], Source::Bytes(Cow::Owned(bytes)));
            entries.push((key.to_owned(), Array { dtype: Dtype::F64, shape, source, failure }));
        };
        table(PRODUCTS_KEY, 2, snapshot.products.as_flattened().to_vec());
        let sizes = snapshot.sizes.iter().flat_map(|size| match size {
            Some(size) => [size.change, size.weight, size.ratio],
            None => [f64::NAN; 3],
        });
        table(SIZES_KEY, 3, sizes.collect());
        entries
    }

    fn metadata(&self, snapshot: &Snapshot) -> Result<HashMap<String, String>> {
        let lr = self.config.lr;
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(Error::LearningRate { step: snapshot.stats.step + 1, lr }); // loading would refuse it
        }
        let parameters = self
            .parameters
            .iter()
            .map(|parameter| {
                Ok(Entry {
                    name: parameter.name.clone(),
                    shape: parameter.var.dims().to_vec(),
                    dtype: parameter.var.dtype().as_str().to_owned(),
                    rule: parameter.plan.rule.name().to_owned(),
                    slots: parameter.slots.iter().map(|slot| slot.spec.name.to_owned()).collect(),
                    fingerprint: match self.naming {
                        Naming::Named => None,
                        Naming::Positional => Some(header::Bits(parameter::fingerprint(&parameter.var)?)),
                    },
                })
            })
            .collect::<Result<_>>()?;
        let [entropy_lr, perplexity_momentum, brake, polyak_loss, polyak_rate] =
            snapshot.averages.map(|average| average.map(header::Bits::from));
        let stats = snapshot.stats;
        let header = Header {
            format: FORMAT,
            step: stats.step,
            skipped: stats.skipped,
            ignored_losses: stats.ignored_losses,
            lr: self.config.lr.into(),
            averages: Averages { entropy_lr, perplexity_momentum, brake, polyak_loss, polyak_rate },
            last: Last {
                grad_norm: stats.grad_norm.map(Into::into),
                clip_scale: stats.clip_scale.into(),
                lr: stats.lr.into(),
                beta1: stats.beta1.into(),
                progress: stats.progress.map(Into::into),
                update_ratio: stats.update_ratio.map(Into::into),
            },
            naming: match self.naming {
                Naming::Named => header::Naming::Named,
                Naming::Positional => header::Naming::Positional,
            },
            parameters,
        };
        let text = serde_json::to_string(&header).map_err(|error| Error::StateFormat {
            origin: "state".to_owned(),
            key: "header".to_owned(),
            problem: error.to_string(),
        })?;
        // One key, because a HashMap of several would give equal states different bytes.
        Ok(HashMap::from([(HEADER_KEY.to_owned(), text)]))
    }
}

type Failure = RefCell<Option<candle_core::Error>>;

enum Source<'a> {
    Slot(&'a Slot),
    /// u8 or f32, on any device.
    Tensor(&'a Tensor),
    Mask(&'a Tensor),
    Bytes(Cow<'a, [u8]>),
}

/// An array in full precision as little-endian bytes, copied only where it must be.
fn bytes(slot: &Slot) -> candle_core::Result<Cow<'_, [u8]>> {
    Ok(match &slot.data {
        Data::F32(x) => state::f32_bytes(x),
        Data::F64(x) => state::f64_bytes(x),
        Data::Blockwise(_) | Data::TensorBlocks(_) => Cow::Borrowed(&[]), // written as two arrays
        Data::Tensor(t) => tensor_bytes(t)?,
    })
}

fn tensor_bytes(tensor: &Tensor) -> candle_core::Result<Cow<'static, [u8]>> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(Cow::Owned(match flat.dtype() {
        DType::U8 => flat.to_vec1()?,
        DType::F64 => state::f64_bytes(&flat.to_vec1()?).into_owned(),
        _ => state::f32_bytes(&flat.to_vec1()?).into_owned(),
    }))
}

/// The two arrays of a state array in blocks of 8 bits: how many codes and scales there are, and where.
fn blocks<'a>(
    name: &str,
    codes: (usize, Source<'a>),
    scales: (usize, Source<'a>),
    failure: &'a Failure,
) -> [(String, Array<'a>); 2] {
    let array = |part: &str, dtype, (len, source)| {
        (format!("{name}.{part}"), Array { dtype, shape: vec![len], source, failure })
    };
    [array("codes", Dtype::U8, codes), array("scales", Dtype::F32, scales)]
}

/// A mask as one byte an element, 0 or 1.
fn mask_bytes(mask: &Tensor) -> candle_core::Result<Cow<'static, [u8]>> {
    Ok(Cow::Owned(mask.ne(0.0)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?))
}

/// An array as safetensors wants to see it. Data is fetched when it is written, so that one array at a time is
/// copied from a device; the trait has no way to report a failure, which is kept aside.
struct Array<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    source: Source<'a>,
    failure: &'a Failure,
}

impl View for Array<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let fetched = match &self.source {
            Source::Bytes(bytes) => return Cow::Borrowed(bytes),
            Source::Slot(slot) => bytes(slot),
            Source::Tensor(tensor) => tensor_bytes(tensor),
            Source::Mask(mask) => mask_bytes(mask),
        };
        fetched.unwrap_or_else(|error| {
            *self.failure.borrow_mut() = Some(error);
            Cow::Borrowed(&[])
        })
    }

    fn data_len(&self) -> usize {
        match &self.source {
            Source::Bytes(bytes) => bytes.len(),
            Source::Slot(slot) => slot.bytes_held(),
            Source::Tensor(tensor) => tensor.elem_count() * Tensor::dtype(tensor).size_in_bytes(),
            Source::Mask(mask) => mask.elem_count(),
        }
    }
}

fn into_io(error: safetensors::SafeTensorError) -> std::io::Error {
    match error {
        safetensors::SafeTensorError::IoError(error) => error,
        other => std::io::Error::other(other.to_string()),
    }
}

/// A temporary file with the permissions of any new file; `tempfile`'s own are for its owner alone.
fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions); // less the umask
    builder.prefix(".velvet-").tempfile_in(folder)
}
