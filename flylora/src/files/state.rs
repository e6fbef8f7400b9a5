use std::collections::BTreeSet;

use candle_core::{DType, Tensor};

use super::AdapterFile;
use crate::{Error, Result};

/// The tensors of one module in an [`AdapterFile`], read by an adapter and checked on the way.
pub struct StateSource<'a> {
    file: &'a AdapterFile,
    module: String,
    used: &'a mut BTreeSet<String>,
}

impl<'a> StateSource<'a> {
    pub(crate) fn new(file: &'a AdapterFile, module: &str, used: &'a mut BTreeSet<String>) -> Self {
        Self { file, module: module.to_owned(), used }
    }

    /// The tensor of that name, in the shape, dtype and device of `like`; another float dtype is converted.
    ///
    /// # Errors
    ///
    /// [`Error::MissingKey`], [`Error::FileShape`], and [`Error::Format`] for one that is not of floats.
    pub fn like(&mut self, name: &str, like: &Tensor) -> Result<Tensor> {
        let tensor = self.get(name, like.dims())?;
        if !tensor.dtype().is_float() {
            return Err(
                self.wrong(name, &format!("expected dtype F32, F64, BF16 or F16, got {:?}", tensor.dtype()))
            );
        }
        Ok(tensor.to_device(like.device())?.to_dtype(like.dtype())?)
    }

    /// The tensor of that name, of exactly this shape and dtype, on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::MissingKey`], [`Error::FileShape`], and [`Error::Format`] for another dtype.
    pub fn raw(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.get(name, shape)?;
        if tensor.dtype() != dtype {
            return Err(self.wrong(name, &format!("expected dtype {dtype:?}, got {:?}", tensor.dtype())));
        }
        Ok(tensor)
    }

    /// That there is a tensor of that name and shape.
    pub(crate) fn check(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        self.get(name, shape).map(|_| ())
    }

    /// The error that a tensor is not what it should be.
    pub fn wrong(&self, name: &str, message: &str) -> Error {
        let key = super::key(&self.module, name);
        Error::Format { path: self.file.weights_path(), message: format!("{key}: {message}") }
    }

    fn get(&mut self, name: &str, expected: &[usize]) -> Result<Tensor> {
        let key = super::key(&self.module, name);
        let path = self.file.weights_path();
        let Some(tensor) = self.file.tensor(&key) else {
            return Err(Error::MissingKey { path, key });
        };
        if tensor.dims() != expected {
            let (expected, got) = (expected.to_vec(), tensor.dims().to_vec());
            return Err(Error::FileShape { path, key, expected, got });
        }
        self.used.insert(key);
        Ok(tensor.clone())
    }
}
