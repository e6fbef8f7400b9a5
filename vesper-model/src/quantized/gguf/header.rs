//! What a GGUF file says before its weights: metadata, and the place, type and shape of each tensor. All of it is checked
//! against the length of the file before anything is allocated by it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::reader::{Reader, Value};
use super::{ALIGNMENT, MAGIC, invalid, keys};
use crate::quantized::BlockType;
use crate::{ModelError, Result};

/// The most dimensions of a tensor.
const DIMENSIONS: u32 = 4;

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    /// Rows before columns: the other way around than in the file.
    pub(super) shape: Vec<usize>,
    pub(super) block: BlockType,
    /// Of its first byte, in the file.
    pub(super) start: u64,
    pub(super) bytes: usize,
}

/// A file's metadata and the places of its tensors.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) path: PathBuf,
    metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Info>,
}

impl Header {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut reader = Reader::open(path)?;
        if reader.len() == 0 {
            return Err(reader.invalid("the file is empty, expected GGUF"));
        }
        let magic = reader.magic()?;
        if &magic != MAGIC {
            let (found, expected) = (magic.escape_ascii(), MAGIC.escape_ascii());
            return Err(reader
                .invalid(format!("not GGUF: the file begins with \"{found}\", expected \"{expected}\"")));
        }
        let version = reader.u32("the version")?;
        if !(version == 2 || version == 3) {
            let hint = if version.swap_bytes() <= 3 { " (it is big-endian)" } else { "" };
            return Err(reader.invalid(format!("GGUF version {version}{hint}, expected 2 or 3")));
        }
        let tensors = reader.u64("the number of tensors")?;
        let pairs = reader.u64("the number of keys")?;
        // A key takes at least its length, a byte, its type and a byte; a tensor its length, a byte, the number of
        // dimensions, one of them, its type and its offset.
        let least =
            pairs.saturating_mul(8 + 1 + 4 + 1).saturating_add(tensors.saturating_mul(8 + 1 + 4 + 8 + 4 + 8));
        if least > reader.remaining() {
            return Err(reader.invalid(format!(
                "truncated: {} bytes, but {pairs} keys and {tensors} tensors take at least {least} more",
                reader.len()
            )));
        }

        let mut metadata = BTreeMap::new();
        for index in 0..pairs {
            let key = reader.name(&format!("the name of key {index}"))?;
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(reader.invalid(format!("{key} is there twice")));
            }
        }
        let mut header = Self { path: path.into(), metadata, tensors: BTreeMap::new() };
        let alignment = header.alignment()?;
        let mut places = BTreeMap::new();
        for index in 0..tensors {
            let name = reader.name(&format!("the name of tensor {index}"))?;
            let place = place(&mut reader, &name)?;
            if places.insert(name.clone(), place).is_some() {
                return Err(reader.invalid(format!("{name} is there twice")));
            }
        }
        let data = reader.at().next_multiple_of(alignment);
        for (name, (shape, block, bytes, offset)) in places {
            let range = data.checked_add(offset).and_then(|start| Some((start, start.checked_add(bytes)?)));
            let Some((start, _)) = range.filter(|&(_, end)| end <= reader.len()) else {
                return Err(reader.invalid(format!(
                    "truncated: {} bytes, but {name} is {bytes} bytes long at offset {offset} after byte {data}",
                    reader.len()
                )));
            };
            if offset % alignment != 0 {
                return Err(
                    reader.invalid(format!("{name} has offset {offset}, expected a multiple of {alignment}"))
                );
            }
            header.tensors.insert(name, Info { shape, block, start, bytes: bytes as usize });
        }
        header.check_overlaps()?;
        Ok(header)
    }

    fn alignment(&self) -> Result<u64> {
        let alignment = self.unsigned(keys::ALIGNMENT)?.unwrap_or(ALIGNMENT);
        if !(alignment.is_power_of_two() && alignment <= 1 << 20) {
            return Err(self.wrong(keys::ALIGNMENT, &alignment.to_string(), "a power of two up to 2^20"));
        }
        Ok(alignment)
    }

    fn check_overlaps(&self) -> Result<()> {
        let mut by_place: Vec<(&String, &Info)> = self.tensors.iter().collect();
        by_place.sort_by_key(|(_, info)| info.start);
        for pair in by_place.windows(2) {
            if let [(a, first), (b, second)] = pair
                && first.start + first.bytes as u64 > second.start
            {
                return Err(invalid(&self.path, format!("{a} and {b} lie over each other")));
            }
        }
        Ok(())
    }

    /// A value that is not what it must be.
    pub(super) fn wrong(&self, key: &str, got: &str, expected: &str) -> ModelError {
        invalid(&self.path, format!("{key} is {got}, expected {expected}"))
    }

    /// The error of a key that must be there.
    pub(super) fn missing(&self, key: &str) -> ModelError {
        invalid(&self.path, format!("no key {key}"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other.kind(), "a text")),
        }
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(&Value::Signed(value)) => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.wrong(key, &value.to_string(), "zero or more")),
            },
            Some(other) => Err(self.wrong(key, other.kind(), "an integer")),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong(key, other.kind(), "a number with a point")),
        }
    }
}

/// Shape, type, length in bytes and offset of a tensor.
type Place = (Vec<usize>, BlockType, u64, u64);

fn place(reader: &mut Reader, name: &str) -> Result<Place> {
    let dimensions = reader.u32(name)?;
    if dimensions == 0 || dimensions > DIMENSIONS {
        return Err(reader.invalid(format!("{name} has {dimensions} dimensions, expected 1 to {DIMENSIONS}")));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        shape.push(reader.u64(name)?);
    }
    shape.reverse();
    let id = reader.u32(name)?;
    let offset = reader.u64(name)?;
    let Some(block) = BlockType::of_id(id) else {
        let known = BlockType::ALL.map(|t| format!("{} ({t})", t.id())).join(", ");
        return Err(reader.invalid(format!("{name} is of type {id}, expected {known}")));
    };
    // Below the square root of what a u64 counts, so that no later product of two sizes can overflow.
    let sizes: Option<Vec<usize>> = shape
        .iter()
        .map(|&size| usize::try_from(size).ok().filter(|&size| size > 0 && size < 1 << 31))
        .collect();
    let elements = shape.iter().try_fold(1u64, |n, &size| n.checked_mul(size)).filter(|&n| n < 1 << 60);
    let (Some(sizes), Some(elements)) = (sizes, elements) else {
        return Err(reader.invalid(format!("{name} has shape {shape:?}, expected sizes from 1 to 2^31")));
    };
    let (columns, size) = (sizes.last().copied().unwrap_or(1), block.block_size());
    if !columns.is_multiple_of(size) {
        return Err(reader.invalid(format!(
            "{name} has rows of {columns} in {block}, expected a multiple of its blocks of {size}"
        )));
    }
    let bytes = elements / size as u64 * block.bytes(size) as u64;
    if usize::try_from(bytes).is_err() {
        return Err(
            reader.invalid(format!("{name} is {bytes} bytes long, more than this machine can address"))
        );
    }
    Ok((sizes, block, bytes, offset))
}
