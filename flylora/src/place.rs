use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use crate::Error;

/// Where the variables of an adapter live: in a `VarMap`, or on their own.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use flylora::Place;
///
/// let variables = VarMap::new();
/// let in_a_map = Place::from(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu).pp("q_proj"));
/// let alone = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// assert_eq!(in_a_map.name(), alone.name());
/// ```
#[derive(Clone)]
pub struct Place<'a> {
    vb: Option<VarBuilder<'a>>,
    name: String,
    dtype: DType,
    device: Device,
}

impl<'a> From<VarBuilder<'a>> for Place<'a> {
    /// Variables of the builder's map, under its prefix, in its dtype; those that are there already are taken.
    fn from(vb: VarBuilder<'a>) -> Self {
        Self { name: vb.prefix(), dtype: vb.dtype(), device: vb.device().clone(), vb: Some(vb) }
    }
}

impl Place<'static> {
    /// Variables outside of any map; `name` is part of the seed of what is drawn.
    pub fn alone(name: impl Into<String>, dtype: DType, device: &Device) -> Self {
        Self { vb: None, name: name.into(), dtype, device: device.clone() }
    }
}

impl Place<'_> {
    /// The name that is part of the seed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The dtype of the variables.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of the variables.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// That variables of this dtype can be trained.
    pub(crate) fn check_dtype(&self) -> crate::Result<()> {
        match self.dtype {
            DType::F32 | DType::F64 | DType::BF16 | DType::F16 => Ok(()),
            got => {
                Err(Error::DType { name: "adapter".into(), expected: "f32, f64, bf16 or f16".into(), got })
            }
        }
    }

    /// The variable of that name; `init` gives its first value where the place does not have it yet.
    pub(crate) fn var<S: Into<Shape>>(
        &self,
        shape: S,
        name: &str,
        init: impl FnOnce() -> crate::Result<Tensor>,
    ) -> crate::Result<Var> {
        let shape = shape.into();
        let fresh = |init: Result<Tensor>| init?.to_device(&self.device)?.to_dtype(self.dtype);
        match &self.vb {
            None => Ok(Var::from_tensor(&fresh(init().map_err(Into::into))?)?),
            Some(vb) => {
                let there = vb.contains_tensor(name);
                let var = Var::from_tensor(&vb.get_with_hints(shape, name, Init::Const(0.0))?)?;
                if !there {
                    var.set(&fresh(init().map_err(Into::into))?)?;
                }
                Ok(var)
            }
        }
    }

    /// A variable that starts at one value.
    pub(crate) fn constant<S: Into<Shape>>(&self, shape: S, name: &str, value: f64) -> crate::Result<Var> {
        let shape = shape.into();
        self.var(shape.clone(), name, || Ok(Tensor::full(value as f32, shape, &self.device)?))
    }
}
