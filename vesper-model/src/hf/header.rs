//! A safetensors file whose header is checked and whose tensors are read one at a time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};

use super::{invalid, io};
use crate::Result;

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// An open safetensors file.
#[derive(Debug)]
pub(crate) struct Weights {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Offset of the first tensor's bytes.
    data: u64,
}

impl Weights {
    /// Opens the file and checks that its header describes its length exactly.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(io(path))?;
        let length = file.metadata().map_err(io(path))?.len();
        if length == 0 {
            return Err(invalid(path, "the file is empty, expected safetensors"));
        }
        let mut size = [0; 8];
        if length < 8 {
            return Err(invalid(
                path,
                format!("truncated: {length} bytes, expected the header's length in 8"),
            ));
        }
        file.read_exact(&mut size).map_err(io(path))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER {
            return Err(invalid(
                path,
                format!("not safetensors: the header's length is {size}, expected at most {MAX_HEADER}"),
            ));
        }
        let data = 8 + size;
        if data > length {
            return Err(invalid(path, format!("truncated: {length} bytes, expected a header of {size}")));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(io(path))?;
        // Checks shapes against offsets and that the tensors lie one after the other, without overflow.
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| invalid(path, format!("invalid safetensors header: {error}")))?;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
        let expected = data.saturating_add(end);
        if length < expected {
            return Err(invalid(path, format!("truncated: {length} bytes, expected {expected}")));
        }
        if length > expected {
            return Err(invalid(
                path,
                format!("{length} bytes, expected {expected}: data after the last tensor"),
            ));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names in the file, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort_unstable();
        names
    }

    /// Reads one tensor to the CPU in the file's dtype. `None` where there is no such name.
    pub(crate) fn read(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(TensorInfo { dtype, shape: got, data_offsets: (start, end) }) =
            self.metadata.info(name).cloned()
        else {
            return Ok(None);
        };
        if got != shape {
            return Err(invalid(&self.path, format!("{name} has shape {got:?}, expected {shape:?}")));
        }
        let dtype = DType::try_from(dtype)
            .ok()
            .filter(|dtype| matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F64));
        let Some(dtype) = dtype else {
            let dtype = self.metadata.info(name).map(|info| info.dtype.to_string()).unwrap_or_default();
            return Err(invalid(
                &self.path,
                format!("{name} has dtype {dtype}, expected F32, BF16, F16 or F64"),
            ));
        };
        let mut bytes = vec![0; end - start];
        self.file.seek(SeekFrom::Start(self.data + start as u64)).map_err(io(&self.path))?;
        self.file.read_exact(&mut bytes).map_err(io(&self.path))?;
        Ok(Some(Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?))
    }
}
