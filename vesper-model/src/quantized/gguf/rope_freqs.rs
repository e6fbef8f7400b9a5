//! The tensor that says what each rotary frequency is divided by, in files of Llama 3.1 and later.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::iter::once;

use super::architecture::decimal;
use super::header::Header;
use super::{invalid, keys};
use crate::hf::io;
use crate::ops::RopeScaling;
use crate::quantized::BlockType;
use crate::{Result, VesperConfig};

/// Its name.
pub(super) const NAME: &str = "rope_freqs.weight";

/// How far a factor may be from the formula's, relative to it. Other programs round otherwise; the next possible
/// original context is a factor of two away.
const TOLERANCE: f32 = 1e-4;

/// The scaling of the model in a file: what the configuration says, which the tensor must agree with, or in a file
/// without one (`own` is false) what the tensor says.
pub(super) fn scaling(header: &Header, config: &VesperConfig, own: bool) -> Result<Option<RopeScaling>> {
    let Some(factors) = read(header, config.head_dim / 2)? else { return Ok(config.rope_scaling) };
    let (known, expected) = if own {
        (vec![config.rope_scaling], format!("the factors of rope_scaling in {}", keys::CONFIG))
    } else {
        let formula = "the factors of llama3 (low_freq_factor 1, high_freq_factor 4, an original context of a power of two)";
        (llama3(&factors), formula.into())
    };
    known.into_iter().find(|&scaling| fits(&factors, config, scaling)).ok_or_else(|| {
        let bound = |(least, most): (f32, f32), &factor: &f32| (least.min(factor), most.max(factor));
        let (least, most) = factors.iter().fold((f32::INFINITY, 0.0), bound);
        header.wrong(NAME, &format!("from {least} to {most}"), &expected)
    })
}

/// The factors, in the order of the frequencies from fast to slow.
fn read(header: &Header, pairs: usize) -> Result<Option<Vec<f32>>> {
    let Some(info) = header.tensors.get(NAME) else { return Ok(None) };
    let path = &header.path;
    if info.block != BlockType::F32 {
        return Err(invalid(path, format!("{NAME} is in {}, expected f32", info.block)));
    }
    if info.shape != [pairs] {
        return Err(invalid(path, format!("{NAME} has shape {:?}, expected [{pairs}]", info.shape)));
    }
    let mut bytes = vec![0; info.bytes];
    let mut file = File::open(path).map_err(io(path))?;
    file.seek(SeekFrom::Start(info.start)).map_err(io(path))?;
    file.read_exact(&mut bytes).map_err(io(path))?;
    let factors: Vec<f32> =
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
    if let Some((i, factor)) = factors.iter().enumerate().find(|(_, f)| !(f.is_finite() && **f > 0.0)) {
        return Err(header.wrong(&format!("{NAME}[{i}]"), &factor.to_string(), "a positive number"));
    }
    Ok(Some(factors))
}

/// What files of other programs may mean: nothing, or Llama 3's formula. They do not say its parameters: in Meta's models
/// low_freq_factor is 1, high_freq_factor 4, and the original context 8192; the slowest frequencies show the factor.
fn llama3(factors: &[f32]) -> Vec<Option<RopeScaling>> {
    let factor = decimal(factors.iter().copied().fold(1.0, f32::max).into());
    let originals = once(8192).chain((0..=20).map(|power| 1 << power));
    let scaling = |original_max_position_embeddings| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings,
    };
    once(None).chain(originals.map(scaling).map(Some)).collect()
}

fn fits(factors: &[f32], config: &VesperConfig, scaling: Option<RopeScaling>) -> bool {
    let expected = match scaling {
        Some(scaling) => scaling.factors(config.head_dim, config.rope_theta),
        None => vec![1.0; factors.len()],
    };
    factors.iter().zip(&expected).all(|(factor, expected)| (factor - expected).abs() <= TOLERANCE * expected)
}
