//! Where ids are: in memory, or in a cache.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::loss::push_ignored;
use crate::cache::TokenCache;
use crate::error::{DataError, Result};

/// All ids of a data set, of which [`super::Tokens`] are views. Positions are those of the whole.
#[derive(Debug)]
pub(super) enum Storage {
    Memory(Memory),
    Cache(TokenCache),
}

/// Ids in memory, two bytes wide as long as all of them fit.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) ids: Ids,
    pub(super) document_ends: Vec<usize>,
    ignored: Vec<(u64, u64)>,
}

#[derive(Debug)]
pub(super) enum Ids {
    U16(Vec<u16>),
    U32(Vec<u32>),
}

impl Default for Ids {
    fn default() -> Self {
        Self::U16(Vec::new())
    }
}

impl Ids {
    fn len(&self) -> usize {
        match self {
            Self::U16(ids) => ids.len(),
            Self::U32(ids) => ids.len(),
        }
    }
}

impl Memory {
    pub(super) fn one_document(ids: Ids) -> Self {
        Self { document_ends: vec![ids.len()], ids, ignored: Vec::new() }
    }

    pub(super) fn push(&mut self, document: &[u32], loss: Option<&[Range<usize>]>) {
        push_ignored(&mut self.ignored, self.ids.len() as u64, document.len() as u64, loss);
        if let Ids::U16(narrow) = &self.ids
            && document.iter().any(|&id| u16::try_from(id).is_err())
        {
            self.ids = Ids::U32(narrow.iter().map(|&id| u32::from(id)).collect());
        }
        match &mut self.ids {
            Ids::U16(ids) => ids.extend(document.iter().map(|&id| id as u16)),
            Ids::U32(ids) => ids.extend_from_slice(document),
        }
        self.document_ends.push(self.ids.len());
    }

    fn read(&self, start: usize, out: &mut [u32]) -> Option<()> {
        let range = start..start.checked_add(out.len())?;
        match &self.ids {
            Ids::U16(ids) => {
                out.iter_mut().zip(ids.get(range)?).for_each(|(out, &id)| *out = u32::from(id));
            }
            Ids::U32(ids) => out.copy_from_slice(ids.get(range)?),
        }
        Some(())
    }
}

impl Storage {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(memory) => memory.ids.len(),
            Self::Cache(cache) => cache.len(),
        }
    }

    /// Writes ids `start..start + out.len()`, which must exist, into `out`.
    pub(super) fn read(&self, start: usize, out: &mut [u32]) -> Result<()> {
        match self {
            Self::Memory(memory) => memory.read(start, out).ok_or_else(|| DataError::Range {
                start: start as u64,
                end: start.saturating_add(out.len()) as u64,
                len: self.len() as u64,
            }),
            Self::Cache(cache) => cache.read_into(start, out),
        }
    }

    pub(super) fn document_count(&self) -> usize {
        match self {
            Self::Memory(memory) => memory.document_ends.len(),
            Self::Cache(cache) => cache.document_count(),
        }
    }

    /// Where document `index`, which must exist, is.
    pub(super) fn document(&self, index: usize) -> Result<Range<usize>> {
        match self {
            Self::Memory(memory) => {
                let ends = &memory.document_ends;
                let start = index.checked_sub(1).and_then(|before| ends.get(before)).copied().unwrap_or(0);
                ends.get(index).map(|&end| start..end).ok_or(DataError::Range {
                    start: index as u64,
                    end: index as u64 + 1,
                    len: ends.len() as u64,
                })
            }
            Self::Cache(cache) => cache.document(index),
        }
    }

    /// The first document whose end is past `position`.
    pub(super) fn document_after(&self, position: usize) -> Result<usize> {
        match self {
            Self::Memory(memory) => Ok(memory.document_ends.partition_point(|&end| end <= position)),
            Self::Cache(cache) => cache.document_after(position),
        }
    }

    /// The [`document_hash`] of document `index`, which must exist.
    pub(super) fn document_hash(&self, index: usize) -> Result<u64> {
        match self {
            Self::Memory(memory) => {
                let range = self.document(index)?;
                let mut ids = vec![0; range.len()];
                memory.read(range.start, &mut ids);
                Ok(document_hash(&ids))
            }
            Self::Cache(cache) => cache.document_hash(index),
        }
    }

    pub(super) fn has_ignored(&self) -> bool {
        match self {
            Self::Memory(memory) => !memory.ignored.is_empty(),
            Self::Cache(cache) => cache.has_ignored(),
        }
    }

    /// Hands the parts of `range` that the loss leaves out to `f`.
    pub(super) fn ignored(&self, range: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
        match self {
            Self::Memory(memory) => {
                let first = memory.ignored.partition_point(|&(_, end)| end <= range.start as u64);
                for &(start, end) in memory.ignored.get(first..).unwrap_or_default() {
                    if start >= range.end as u64 {
                        break;
                    }
                    f(range.start.max(start as usize)..range.end.min(end as usize));
                }
                Ok(())
            }
            Self::Cache(cache) => cache.ignored(range, f),
        }
    }
}

/// A document's hash: the first eight bytes, little-endian, of the SHA-256 of its ids as little-endian u32.
pub(crate) fn document_hash(ids: &[u32]) -> u64 {
    let mut digest = Sha256::new();
    let mut bytes = [0; 1024];
    for ids in ids.chunks(bytes.len() / 4) {
        let (slots, _) = bytes.as_chunks_mut::<4>();
        slots.iter_mut().zip(ids).for_each(|(slot, id)| *slot = id.to_le_bytes());
        digest.update(bytes.get(..ids.len() * 4).unwrap_or_default());
    }
    let digest: [u8; 32] = digest.finalize().into();
    u64::from_le_bytes(*digest.first_chunk().unwrap_or(&[0; 8]))
}
