//! Reading the weights: from one file or several, packed on the way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::header::Weights;
use super::layout::{Entry, entries};
use super::{WEIGHTS, WEIGHTS_INDEX, invalid, read_json};
use crate::{Result, VesperConfig};

/// How many names an error message lists.
const LISTED: usize = 5;

/// Reads the weights of the model in `dir`, named and packed as in memory (see the [module](super)).
///
/// They come from `model.safetensors`, or else from the files that `model.safetensors.index.json` lists; in
/// f32, bf16, f16 or f64, each in its own, converted to `dtype` and moved to `device`. Every shape is checked against `config`.
/// A tensor that is already packed in the file is taken as it is. `rotary_emb.inv_freq`, which old files store, is
/// ignored, and so is `lm_head.weight` where the output layer is tied to the embedding.
///
/// # Errors
/// [`ModelError::Io`](crate::ModelError::Io) when a file cannot be read;
/// [`ModelError::InvalidFile`](crate::ModelError::InvalidFile) for a file that is empty, truncated or not safetensors,
/// for a tensor of another shape than the configuration asks for, and for tensors that are missing or that the
/// model does not have; the message names them.
pub fn read_weights(
    dir: impl AsRef<Path>,
    config: &VesperConfig,
    dtype: DType,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    let mut store = Store::open(dir.as_ref())?;
    let mut weights = HashMap::new();
    let mut missing = Vec::new();
    for entry in entries(config) {
        match store.read(&entry)? {
            Ok(tensor) => {
                // Converted before it moves: the device's memory never holds both.
                weights.insert(entry.name, tensor.to_dtype(dtype)?.to_device(device)?);
            }
            Err(names) => missing.extend(names),
        }
        // A configuration may ask for billions of blocks that are not there.
        if missing.len() > LISTED {
            break;
        }
    }
    if !missing.is_empty() {
        return Err(invalid(&store.source, format!("missing: {}", list(&missing))));
    }
    store.refuse_unread(config)?;
    Ok(weights)
}

fn list(names: &[String]) -> String {
    let shown = names.get(..LISTED).unwrap_or(names).join(", ");
    if names.len() > LISTED { shown + " and more" } else { shown }
}

/// The tensors of a directory, wherever they are.
struct Store {
    /// The file to name when a tensor is in none.
    source: std::path::PathBuf,
    files: Vec<Weights>,
    /// Which file each tensor is in.
    places: BTreeMap<String, usize>,
    read: BTreeSet<String>,
}

impl Store {
    fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(WEIGHTS), dir.join(WEIGHTS_INDEX));
        let source = if single.is_file() || !index.is_file() { single } else { index };
        let mut store = Self { source, files: Vec::new(), places: BTreeMap::new(), read: BTreeSet::new() };
        if store.source.ends_with(WEIGHTS) {
            let file = Weights::open(&store.source)?;
            store.add(file)?;
        } else {
            store.open_shards(dir)?;
        }
        Ok(store)
    }

    fn open_shards(&mut self, dir: &Path) -> Result<()> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index: Index = read_json(&self.source)?;
        let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        for shard in shards {
            if !is_file_name(shard) {
                return Err(invalid(
                    &self.source,
                    format!("{shard:?} is not the name of a file in this folder"),
                ));
            }
            let file = Weights::open(&dir.join(shard))?;
            self.add(file)?;
        }
        for (name, shard) in &index.weight_map {
            let place = self.places.get(name).and_then(|&place| self.files.get(place));
            if place.is_none_or(|file| !file.path().ends_with(shard)) {
                return Err(invalid(
                    &dir.join(shard),
                    format!("missing: {name}, which {WEIGHTS_INDEX} lists here"),
                ));
            }
        }
        Ok(())
    }

    fn add(&mut self, file: Weights) -> Result<()> {
        for name in file.names() {
            if let Some(other) = self.places.get(&name).and_then(|&place| self.files.get(place)) {
                let reason = format!("{name} is also in {}", other.path().display());
                return Err(invalid(file.path(), reason));
            }
            self.places.insert(name, self.files.len());
        }
        self.files.push(file);
        Ok(())
    }

    /// The tensor in memory, or the names that are missing for it.
    fn read(&mut self, entry: &Entry) -> Result<Result<Tensor, Vec<String>>> {
        if let Some(whole) = self.tensor(&entry.name, &entry.shape)? {
            return Ok(Ok(whole));
        }
        let (mut parts, mut missing) = (Vec::new(), Vec::new());
        for part in &entry.parts {
            match self.tensor(&part.name, &part.shape)? {
                Some(tensor) => parts.push(tensor),
                None => missing.push(part.name.clone()),
            }
        }
        if !missing.is_empty() {
            return Ok(Err(missing));
        }
        // Of several dtypes, the parts become one that holds the values of all.
        if parts.windows(2).any(|pair| pair[0].dtype() != pair[1].dtype()) {
            let wide = parts.iter().any(|part| part.dtype() == DType::F64);
            let common = if wide { DType::F64 } else { DType::F32 };
            parts = parts.iter().map(|part| part.to_dtype(common)).collect::<candle_core::Result<_>>()?;
        }
        Ok(Ok(Entry::pack(&parts)?))
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(file) = self.places.get(name).and_then(|&place| self.files.get_mut(place)) else {
            return Ok(None);
        };
        self.read.insert(name.to_owned());
        file.read(name, shape)
    }

    fn refuse_unread(&self, config: &VesperConfig) -> Result<()> {
        let unread: Vec<String> = self
            .places
            .keys()
            .filter(|name| !self.read.contains(*name))
            .filter(|name| !name.ends_with("rotary_emb.inv_freq"))
            .filter(|name| !(config.tie_word_embeddings && *name == "lm_head.weight"))
            .cloned()
            .collect();
        if unread.is_empty() {
            return Ok(());
        }
        Err(invalid(&self.source, format!("the model has no {}", list(&unread))))
    }
}

/// Whether the name stays in its folder, on every system.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':'])
}
