//! `cpu`, `cuda` or `cuda:N`.

use anyhow::{Context, Result, bail};
use candle_core::Device;

/// Opens a device by name.
///
/// # Errors
/// Another name, a program built without CUDA, a number without a GPU.
pub fn open(name: &str) -> Result<Device> {
    let ordinal = match name.split_once(':') {
        None if name == "cpu" => {
            vesper_model::ops::prepare_cpu();
            return Ok(Device::Cpu);
        }
        None if name == "cuda" => 0,
        Some(("cuda", number)) => {
            number.parse().with_context(|| format!("--device {name}: `{number}` is not a number"))?
        }
        _ => bail!("--device {name}: expected cpu, cuda or cuda:N"),
    };
    if !cfg!(feature = "cuda") {
        bail!("--device {name}: this program was built without CUDA; build it with --features cuda");
    }
    vesper_model::ops::cuda_device(ordinal).with_context(|| format!("--device {name}"))
}

#[cfg(test)]
mod tests {
    use super::open;

    #[test]
    fn names_of_devices() {
        assert!(open("cpu").unwrap().is_cpu());
        for wrong in ["gpu", "cpu:0", "cuda:x", "cuda:", ""] {
            assert!(open(wrong).is_err(), "{wrong}");
        }
    }
}
