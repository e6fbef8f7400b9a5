//! Writing files so that they are on the disk before anyone depends on them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};

use super::{invalid, io};
use crate::Result;

/// Writes a text file and waits until it is on the disk.
pub(crate) fn text(path: &Path, text: &str) -> Result<()> {
    let mut file = File::create(path).map_err(io(path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io(path))
}

/// Writes tensors as safetensors and waits until they are on the disk.
///
/// The bytes depend on the tensors alone: they are ordered by element size, so that all are aligned, then by name.
/// One tensor at a time is copied to the CPU.
pub(crate) fn weights(path: &Path, mut tensors: Vec<(String, Tensor)>) -> Result<()> {
    tensors.sort_by(|(a, x), (b, y)| {
        y.dtype().size_in_bytes().cmp(&x.dtype().size_in_bytes()).then_with(|| a.cmp(b))
    });
    let mut end = 0;
    let infos = tensors
        .iter()
        .map(|(name, tensor)| {
            let start = end;
            end += tensor.elem_count() * tensor.dtype().size_in_bytes();
            let info = TensorInfo {
                dtype: tensor.dtype().into(),
                shape: tensor.dims().to_vec(),
                data_offsets: (start, end),
            };
            (name.clone(), info)
        })
        .collect();
    // `transformers` refuses a file that does not say what wrote it.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|error| invalid(path, error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| invalid(path, error.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = BufWriter::new(File::create(path).map_err(io(path))?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io(path))?;
    file.write_all(&header).map_err(io(path))?;
    for (name, tensor) in &tensors {
        let bytes = little_endian(path, name, tensor)?;
        file.write_all(&bytes).map_err(io(path))?;
    }
    file.flush().map_err(io(path))?;
    file.get_ref().sync_all().map_err(io(path))
}

fn little_endian(path: &Path, name: &str, tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        other => {
            return Err(invalid(path, format!("{name} has dtype {other:?}, expected F32, BF16, F16 or F64")));
        }
    })
}
