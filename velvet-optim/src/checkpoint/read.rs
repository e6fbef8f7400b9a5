//! Reading the state. No byte of a file is trusted.

use super::header::{Bits, Entry, Header, Naming as SavedNaming};
use super::{FORMAT, HEADER_KEY, MASK, PRODUCTS_KEY, SIZES_KEY};
use crate::adaptive::Adaptive;
use crate::backend;
use crate::error::{Error, Result};
use crate::parameter::{self, Naming, Parameter, UpdateSize};
use crate::quantised::{self, Blockwise};
use crate::rule::SlotKind;
use crate::state::{self, Data, MASTER, Slot, Values};
use crate::stats::Stats;
use crate::velvet::Velvet;
use candle_core::{DType, Device, Tensor, Var};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

/// The key under which messages name the header.
const HEADER: &str = "header";
/// More steps than any run takes; counting on from there cannot overflow.
const LARGEST_COUNT: u64 = 1 << 53;

impl Velvet {
    /// Takes over a state that [`Velvet::save`] wrote: from then on every step gives the bits it would have given
    /// without the interruption, on the same configuration.
    ///
    /// Restore the parameters first. The base learning rate comes from the file; the rest of the configuration
    /// does not. An adaptive part that the saved run did not use starts anew. Parameters may be of another type or on
    /// another device than those of the saved run, and their state may be kept in another format: values are then
    /// converted. A parameter that was frozen in the saved run from its start starts with an empty state; one that
    /// was trained there and is frozen here keeps the saved state for when it is thawed. A master copy that the saved
    /// run did not have is made from the parameter as it is now. A saved mask takes the place of the parameter's own;
    /// a mask that was set here and not in the saved run stays, and is applied to weights and loaded state.
    ///
    /// Named parameters must have the saved names and shapes. Parameters without names (made by
    /// [`new`](candle_nn::Optimizer::new)) may be in another order than they were, as those of
    /// `VarMap::all_vars` are in every process: where the fingerprints of the saved parameters' values are
    /// those of the parameters now, in any order, each gets its own state back (but stochastic rounding goes by
    /// position, so that in another order it draws other numbers). Where they are not, the parameters were not
    /// restored or are another model's: they are taken by position, shapes are checked, and there is a warning.
    ///
    /// # Errors
    /// The file cannot be read, is damaged or not of this format, or belongs to other parameters; the message names
    /// the file and the key. The optimizer is then as it was.
    ///
    /// # Examples
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use velvet_optim::{Velvet, VelvetConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let w = |size| Var::zeros(size, DType::F32, &Device::Cpu);
    /// let file = tempfile::NamedTempFile::new()?;
    /// Velvet::named(vec![("w".into(), w(4)?)], VelvetConfig::default())?.save(file.path())?;
    ///
    /// let mut same = Velvet::named(vec![("w".into(), w(4)?)], VelvetConfig::default())?;
    /// same.load(file.path())?;
    /// let mut other = Velvet::named(vec![("w".into(), w(5)?)], VelvetConfig::default())?;
    /// assert!(other.load(file.path()).is_err()); // w has another shape
    /// # Ok(())
    /// # }
    /// ```
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        self.load_from(&bytes, &path.display().to_string())
    }

    /// Takes over a state from the bytes of [`Velvet::to_bytes`] or of a file.
    ///
    /// # Errors
    /// As [`Velvet::load`].
    pub fn load_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.load_from(bytes, "state bytes")
    }

    fn load_from(&mut self, bytes: &[u8], origin: &str) -> Result<()> {
        let reader = Reader { origin };
        let (header, tensors) = reader.open(bytes)?;
        let order = self.match_parameters(&reader, &header, &tensors)?;
        reader.check_keys(&header, &tensors)?;
        // Everything is read and checked before anything is replaced.
        let products = reader.products(&tensors, header.parameters.len())?;
        let sizes = reader.sizes(&tensors, header.parameters.len())?;
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for (parameter, &row) in self.parameters.iter().zip(&order) {
            let entry =
                header.parameters.get(row).ok_or_else(|| reader.format(HEADER, "too few parameters"))?;
            let products = *products.get(row).ok_or_else(|| reader.format(PRODUCTS_KEY, "too few rows"))?;
            let size = *sizes.get(row).ok_or_else(|| reader.format(SIZES_KEY, "too few rows"))?;
            let mask = match reader.mask(&tensors, entry, parameter)? {
                Some(kept) => Some(kept),
                None => parameter.mask.as_ref().map(|mask| mask.ne(0.0)).transpose()?,
            };
            // One that is frozen here and was trained in the saved run may be thawed later.
            let made = if parameter.slots.is_empty() && has_state_for(entry, parameter) {
                Some(backend::empty_state(&parameter.var, &parameter.plan, &self.config)?)
            } else {
                None
            };
            let slots = made.as_deref().unwrap_or(&parameter.slots);
            let data = reader.slots(&tensors, entry, slots, &parameter.var)?;
            loaded.push((made, data, products, size, mask));
        }
        let average = |bits: Option<Bits>| bits.map(f64::from);
        let lr = reader.finite("lr", header.lr)?;
        let step = reader.count("step", header.step)?;
        let skipped = reader.count("skipped", header.skipped)?;
        let ignored_losses = reader.count("ignored_losses", header.ignored_losses)?;
        let averages = &header.averages;
        self.adaptive = Adaptive::new(
            &self.config,
            [
                average(averages.entropy_lr),
                average(averages.perplexity_momentum),
                average(averages.brake),
                average(averages.polyak_loss),
                average(averages.polyak_rate),
            ],
        );
        self.config.lr = lr;
        self.stats = Stats {
            step,
            grad_norm: average(header.last.grad_norm),
            clip_scale: header.last.clip_scale.into(),
            lr: header.last.lr.into(),
            beta1: header.last.beta1.into(),
            progress: average(header.last.progress),
            update_ratio: average(header.last.update_ratio),
            skipped,
            ignored_losses,
        };
        self.missing.clear();
        for (parameter, (made, data, products, size, mask)) in self.parameters.iter_mut().zip(loaded) {
            if let Some(slots) = made {
                parameter.slots = slots;
            }
            for (slot, data) in parameter.slots.iter_mut().zip(data) {
                slot.data = data;
            }
            parameter.beta_products = products;
            parameter.size = size;
            if let Some(kept) = mask {
                parameter.set_mask(&kept)?;
            }
        }
        self.settle()
    }

    /// For each parameter its row in the header.
    fn match_parameters(
        &self,
        reader: &Reader<'_>,
        header: &Header,
        tensors: &SafeTensors<'_>,
    ) -> Result<Vec<usize>> {
        let order = match (self.naming, header.naming) {
            (Naming::Named, SavedNaming::Named) => self.match_names(reader, header),
            (Naming::Positional, SavedNaming::Positional) => self.match_values(reader, header, tensors),
            (Naming::Named, SavedNaming::Positional) => {
                Err(reader.mismatch(HEADER, "parameters", "with names", "by position"))
            }
            (Naming::Positional, SavedNaming::Named) => {
                Err(reader.mismatch(HEADER, "parameters", "by position", "with names"))
            }
        }?;
        for (parameter, entry) in
            self.parameters.iter().zip(order.iter().filter_map(|&row| header.parameters.get(row)))
        {
            if parameter.var.dims() != entry.shape {
                let (expected, got) = (format!("{:?}", parameter.var.dims()), format!("{:?}", entry.shape));
                return Err(reader.mismatch(&parameter.name, "shape", &expected, &got));
            }
            let rule = parameter.plan.rule.name();
            if entry.rule != rule && !entry.slots.is_empty() && !parameter.slots.is_empty() {
                return Err(reader.mismatch(&parameter.name, "update rule", rule, &entry.rule));
            }
        }
        Ok(order)
    }

    fn match_names(&self, reader: &Reader<'_>, header: &Header) -> Result<Vec<usize>> {
        let ours: BTreeSet<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
        let rows: HashMap<&str, usize> =
            header.parameters.iter().enumerate().map(|(i, entry)| (entry.name.as_str(), i)).collect();
        if rows.len() < header.parameters.len() {
            return Err(reader.format(HEADER, "it has two parameters of one name"));
        }
        let theirs: BTreeSet<&str> = rows.keys().copied().collect();
        if ours != theirs {
            let names = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| {
                a.difference(b).map(|&name| name.to_owned()).collect::<Vec<_>>()
            };
            return Err(Error::StateNames {
                origin: reader.origin.to_owned(),
                missing: names(&ours, &theirs),
                unexpected: names(&theirs, &ours),
            });
        }
        Ok(self.parameters.iter().filter_map(|p| rows.get(p.name.as_str()).copied()).collect())
    }

    /// Parameters without names: by the values they had when the state was saved.
    fn match_values(
        &self,
        reader: &Reader<'_>,
        header: &Header,
        tensors: &SafeTensors<'_>,
    ) -> Result<Vec<usize>> {
        let (count, saved) = (self.parameters.len(), header.parameters.len());
        if count != saved {
            return Err(reader.mismatch(
                HEADER,
                "number of parameters",
                &count.to_string(),
                &saved.to_string(),
            ));
        }
        let by_position: Vec<usize> = (0..count).collect();
        let ours = self
            .parameters
            .iter()
            .map(|parameter| parameter::fingerprint(&parameter.var).map(Bits))
            .collect::<Result<Vec<_>>>()?;
        if ours.iter().zip(&header.parameters).all(|(&ours, entry)| entry.fingerprint == Some(ours)) {
            return Ok(by_position);
        }
        let mut rows: HashMap<u64, Vec<usize>> = HashMap::new();
        for (i, entry) in header.parameters.iter().enumerate() {
            if let Some(bits) = entry.fingerprint {
                rows.entry(bits.0).or_default().push(i);
            }
        }
        let mut left = rows.clone();
        let order: Vec<usize> =
            ours.iter().filter_map(|bits| left.get_mut(&bits.0).and_then(Vec::pop)).collect();
        if order.len() == count {
            for rows in rows.values() {
                // Parameters of equal values are told apart by nothing, which matters where their states differ.
                if rows.windows(2).any(|pair| !reader.same_state(tensors, header, pair)) {
                    return Err(reader.format(
                        HEADER,
                        "parameters without names have equal values but not equal states, and the order has changed: \
                         use Velvet::from_varmap or Velvet::named",
                    ));
                }
            }
            return Ok(order);
        }
        (self.warn)(&format!(
            "{}: the parameters' values are not those of the saved run, so its state is taken by position: \
             restore the parameters before the optimizer, or use names",
            reader.origin
        ));
        Ok(by_position)
    }
}

/// Where a state comes from, for messages, and how its parts are read.
struct Reader<'a> {
    origin: &'a str,
}

impl Reader<'_> {
    fn format(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::StateFormat {
            origin: self.origin.to_owned(),
            key: key.to_owned(),
            problem: problem.to_string(),
        }
    }

    fn mismatch(&self, key: &str, what: &'static str, expected: &str, got: &str) -> Error {
        Error::StateMismatch {
            origin: self.origin.to_owned(),
            key: key.to_owned(),
            what,
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }

    fn open<'b>(&self, bytes: &'b [u8]) -> Result<(Header, SafeTensors<'b>)> {
        let broken = |error: safetensors::SafeTensorError| {
            self.format(HEADER, format_args!("not a whole safetensors file ({error})"))
        };
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let text =
            metadata.metadata().as_ref().and_then(|metadata| metadata.get(HEADER_KEY)).ok_or_else(|| {
                self.format(HEADER, "not an optimizer state: the metadata has no `velvet-optim`")
            })?;
        // The version first: a later format may have another header.
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| self.format(HEADER, error))?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(self.mismatch(HEADER, "format", &FORMAT.to_string(), &other.to_string()));
            }
            None => return Err(self.format(HEADER, "no format version")),
        }
        let header = serde_json::from_value(value).map_err(|error| self.format(HEADER, error))?;
        Ok((header, tensors))
    }

    /// The step and the counters, which go on counting.
    fn count(&self, key: &str, value: u64) -> Result<u64> {
        if value <= LARGEST_COUNT {
            Ok(value)
        } else {
            Err(self.format(key, format_args!("expected a number up to 2^53, got {value}")))
        }
    }

    fn finite(&self, key: &str, bits: Bits) -> Result<f64> {
        let value = f64::from(bits);
        if value.is_finite() && value >= 0.0 {
            Ok(value)
        } else {
            Err(self.format(key, format_args!("expected a finite number >= 0, got {value}")))
        }
    }

    fn bytes<'b>(
        &self,
        tensors: &SafeTensors<'b>,
        key: &str,
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<&'b [u8]> {
        let view = tensors.tensor(key).map_err(|_| self.format(key, "the tensor is missing"))?;
        if view.dtype() != dtype {
            let (expected, got) = (format!("{dtype:?}"), format!("{:?}", view.dtype()));
            return Err(self.mismatch(key, "type", &expected, &got));
        }
        if view.shape() != shape {
            let (expected, got) = (format!("{shape:?}"), format!("{:?}", view.shape()));
            return Err(self.mismatch(key, "shape", &expected, &got));
        }
        Ok(view.data())
    }

    /// That every array belongs to a parameter of the header.
    fn check_keys(&self, header: &Header, tensors: &SafeTensors<'_>) -> Result<()> {
        let mut known = HashSet::from([PRODUCTS_KEY.to_owned(), SIZES_KEY.to_owned()]);
        for entry in &header.parameters {
            known.extend(entry.slots.iter().flat_map(|slot| keys(entry, slot)));
            known.insert(format!("{}.{MASK}", entry.name));
        }
        let mut names = tensors.names();
        names.sort_unstable();
        match names.into_iter().find(|name| !known.contains(*name)) {
            None => Ok(()),
            Some(key) => Err(self.format(key, "no parameter of the state has this array")),
        }
    }

    /// Whether two rows of the header have the same state, bit for bit.
    fn same_state(&self, tensors: &SafeTensors<'_>, header: &Header, rows: &[usize]) -> bool {
        let state = |row: usize| {
            let entry = header.parameters.get(row)?;
            let array = |key: String| tensors.tensor(&key).ok().map(|view| view.data());
            let slots: Vec<_> = entry.slots.iter().flat_map(|slot| keys(entry, slot)).map(array).collect();
            let mask = array(format!("{}.{MASK}", entry.name));
            let count = header.parameters.len();
            let products = self.products(tensors, count).ok()?.get(row)?.map(f64::to_bits);
            let size = *self.sizes(tensors, count).ok()?.get(row)?;
            // Bits: a ratio may be NaN, which equals nothing.
            let size = size.map(|size| [size.change, size.weight, size.ratio].map(f64::to_bits));
            Some((slots, mask, products, size))
        };
        rows.iter().map(|&row| state(row)).collect::<Vec<_>>().windows(2).all(|pair| pair[0] == pair[1])
    }

    /// The products of betas, one row a parameter of the header.
    fn products(&self, tensors: &SafeTensors<'_>, count: usize) -> Result<Vec<[f64; 2]>> {
        let bytes = self.bytes(tensors, PRODUCTS_KEY, &[count, 2], Dtype::F64)?;
        let values: Vec<f64> = bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
        let rows = values.as_chunks().0.to_vec();
        // 1 before the first update, less than 1 after it; anything else divides by zero or worse.
        if rows.len() == count && values.iter().all(|x| (0.0..=1.0).contains(x)) {
            Ok(rows)
        } else {
            Err(self.format(PRODUCTS_KEY, "expected numbers in [0, 1]"))
        }
    }

    /// What was measured of the last update, one row a parameter of the header.
    fn sizes(&self, tensors: &SafeTensors<'_>, count: usize) -> Result<Vec<Option<UpdateSize>>> {
        let bytes = self.bytes(tensors, SIZES_KEY, &[count, 3], Dtype::F64)?;
        let values = state::f64_from(bytes);
        let (rows, _) = values.as_chunks::<3>();
        Ok(rows
            .iter()
            .map(|&[change, weight, ratio]| {
                // NaN where nothing was measured; anything negative or infinite is no root mean square.
                let sound = [change, weight].iter().all(|x| x.is_finite() && *x >= 0.0);
                sound.then_some(UpdateSize { change, weight, ratio })
            })
            .collect())
    }

    /// The mask of a parameter, on its device, where it was saved with one.
    fn mask(
        &self,
        tensors: &SafeTensors<'_>,
        entry: &Entry,
        parameter: &Parameter,
    ) -> Result<Option<Tensor>> {
        let key = format!("{}.{MASK}", entry.name);
        if tensors.tensor(&key).is_err() {
            return Ok(None);
        }
        let bytes = self.bytes(tensors, &key, &entry.shape, Dtype::U8)?;
        Ok(Some(Tensor::from_slice(bytes, entry.shape.as_slice(), parameter.var.device())?.ne(0.0)?))
    }

    /// The state arrays of a parameter, in the order and formats of `slots`.
    fn slots(
        &self,
        tensors: &SafeTensors<'_>,
        entry: &Entry,
        slots: &[Slot],
        var: &Var,
    ) -> Result<Vec<Data>> {
        let slot = |slot: &Slot| {
            let name = slot.spec.name;
            if entry.slots.iter().any(|saved| saved == name) {
                let values = self.values(tensors, &format!("{}.{name}", entry.name), slot)?;
                return slot.data_of(&values);
            }
            if name == MASTER {
                let values = var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
                return slot.data_of(&Values::F32(values.flatten_all()?.to_vec1()?));
            }
            if entry.slots.is_empty() {
                return slot.data_of(&Values::F32(vec![0.0; slot.spec.shape.iter().product()]));
            }
            Err(self.format(HEADER, format_args!("`{}` has no state array `{name}`", entry.name)))
        };
        slots.iter().map(slot).collect()
    }

    /// One state array, in whichever format it was saved.
    fn values(&self, tensors: &SafeTensors<'_>, key: &str, slot: &Slot) -> Result<Values> {
        let (shape, len) = (slot.spec.shape.as_slice(), slot.spec.shape.iter().product::<usize>());
        let (codes, scales) = (format!("{key}.codes"), format!("{key}.scales"));
        if slot.spec.kind != SlotKind::Other && tensors.tensor(&codes).is_ok() {
            let blocks = len.div_ceil(quantised::BLOCK);
            let scales_bytes = self.bytes(tensors, &scales, &[blocks], Dtype::F32)?;
            let codes_bytes = self.bytes(tensors, &codes, &[len], Dtype::U8)?;
            let signed = slot.spec.kind == SlotKind::Signed;
            return match Blockwise::from_parts(codes_bytes.to_vec(), state::f32_from(scales_bytes), signed) {
                Some(x) => Ok(Values::Blockwise(x)),
                None => Err(self.format(&scales, "expected scales of at least 0")),
            };
        }
        let values = match tensors.tensor(key).map(|view| view.dtype()) {
            Ok(Dtype::F64) => Values::F64(state::f64_from(self.bytes(tensors, key, shape, Dtype::F64)?)),
            _ => Values::F32(state::f32_from(self.bytes(tensors, key, shape, Dtype::F32)?)),
        };
        // No run writes an average of squares below zero, and its root is what an update divides by.
        let is_of_squares = slot.spec.kind != SlotKind::Signed && slot.spec.name != MASTER;
        if is_of_squares && values.has_negative() {
            return Err(self.format(key, "expected numbers of at least 0"));
        }
        Ok(values)
    }
}

/// The keys that a state array may have, whole or in blocks.
fn keys(entry: &Entry, slot: &str) -> [String; 3] {
    ["", ".codes", ".scales"].map(|part| format!("{}.{slot}{part}", entry.name))
}

/// Whether the saved run has what the parameter's rule needs; a master copy can be made.
fn has_state_for(entry: &Entry, parameter: &Parameter) -> bool {
    let specs = parameter.plan.rule.slots(parameter.var.dims());
    entry.rule == parameter.plan.rule.name()
        && specs.iter().all(|spec| entry.slots.iter().any(|saved| saved == spec.name))
}
