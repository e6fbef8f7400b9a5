use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use candle_core::{Device, Tensor};
use tempfile::NamedTempFile;

use super::{CONFIG_FILE, PREFIX, Stored, WEIGHTS_FILE, check_paths, key, peft_config};
use crate::linear::is_finite;
use crate::{Error, Result, Targets};

/// What else a configuration file says.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// The model that the adapters belong to, as a name or a path that `transformers` finds; none by default.
    pub base_model: Option<String>,
    /// What the model is for, in PEFT's words (`CAUSAL_LM`); none by default.
    pub task_type: Option<String>,
    /// Whether the model keeps its weights as (in, out), as GPT-2 does: false by default.
    pub fan_in_fan_out: bool,
    /// Which modules have an adapter; by default the full paths of those that are saved.
    pub targets: Option<Targets>,
    /// Parameters of the model itself that were trained too, in full, by their names in the model (`score.weight`): PEFT's
    /// `modules_to_save`. Give all those of a module. None by default.
    pub saved_parameters: BTreeMap<String, Tensor>,
}

/// Writes adapters, each with the path of its module, as a directory that PEFT reads; the directory is made if needed.
///
/// Each file is written under another name, brought to the disk and then renamed, the weights first: an interrupted
/// save leaves the old files or the new ones, never half of one.
///
/// # Errors
///
/// [`Error::Adapters`] where there is none, two have one path, they are of different kinds, or a value is not finite, which
/// loading would refuse; [`Error::Io`].
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Linear;
/// use flylora::{LoraConfig, LoraLinear, load_adapters, save_adapters};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Linear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None);
/// let layer = LoraLinear::seeded(base.clone(), &LoraConfig::default().with_r(4), "q_proj")?;
/// let dir = tempfile::tempdir()?;
/// save_adapters(dir.path(), &[("layers.0.q_proj", &layer)])?;
///
/// let other = LoraLinear::seeded(base, &LoraConfig::default().with_r(4).with_seed(1), "q_proj")?;
/// load_adapters(dir.path(), &[("layers.0.q_proj", &other)])?;
/// assert_eq!(layer.adapter().a().to_vec2::<f32>()?, other.adapter().a().to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
pub fn save_adapters<S: Stored + ?Sized>(dir: impl AsRef<Path>, adapters: &[(&str, &S)]) -> Result<()> {
    save_adapters_with(dir, adapters, &SaveOptions::default())
}

/// As [`save_adapters`], with what else the configuration says.
///
/// # Errors
///
/// As [`save_adapters`], and [`Error::Adapters`] for a path that the targets of the options do not select, or a saved
/// parameter without a module.
pub fn save_adapters_with<S: Stored + ?Sized>(
    dir: impl AsRef<Path>,
    adapters: &[(&str, &S)],
    options: &SaveOptions,
) -> Result<()> {
    let dir = dir.as_ref();
    check_paths(adapters)?;
    if let Some(targets) = &options.targets
        && let Some((path, _)) = adapters.iter().find(|(path, _)| !targets.selects(path))
    {
        return Err(Error::Adapters { message: format!("the targets given do not select {path}") });
    }
    let kinds: Vec<_> = adapters.iter().map(|(path, s)| (*path, s.kind().as_stored())).collect();
    let config = peft_config::write(&kinds, options)?;
    // Sorted by key, so that equal adapters give equal files.
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (path, adapter) in adapters {
        for (name, value) in adapter.state()? {
            tensors.insert(key(path, &name), value.to_device(&Device::Cpu)?.contiguous()?);
        }
    }
    for (name, value) in &options.saved_parameters {
        tensors.insert(format!("{PREFIX}{name}"), value.to_device(&Device::Cpu)?.contiguous()?);
    }
    for (key, tensor) in &tensors {
        if !is_finite(tensor)? {
            return Err(Error::Adapters { message: format!("{key}: it has values that are not finite") });
        }
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let format = |e: safetensors::SafeTensorError| Error::Format {
        path: dir.join(WEIGHTS_FILE),
        message: e.to_string(),
    };
    let weights = safetensors::serialize(&tensors, Some(metadata)).map_err(format)?;

    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
    let weights = stage(dir, &weights)?;
    let config = stage(dir, config.as_bytes())?;
    put(weights, &dir.join(WEIGHTS_FILE))?;
    put(config, &dir.join(CONFIG_FILE))
}

/// A temporary file in `dir` with the bytes on the disk.
fn stage(dir: &Path, bytes: &[u8]) -> Result<NamedTempFile> {
    let io = |source| Error::Io { path: dir.to_owned(), source };
    let mut file = temporary(dir).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.flush()).and_then(|()| file.as_file().sync_all()).map_err(io)?;
    Ok(file)
}

fn put(file: NamedTempFile, path: &Path) -> Result<()> {
    file.persist(path).map(|_| ()).map_err(|e| Error::Io { path: path.to_owned(), source: e.error })
}

/// A temporary file with the permissions of any new file; `tempfile`'s own are for its owner alone.
fn temporary(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions); // less the umask
    builder.tempfile_in(folder)
}
