//! A model that is asked the same over and over.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::Tensor;
use vesper_model::generate::NextLogits;
use vesper_model::metacognition::Introspective;
use vesper_model::{ModelError, Result, Session, VesperLM};

/// Numbers that are remembered at most: a gigabyte.
const LIMIT: usize = 1 << 28;

/// Logits and hidden state.
type Said = (Vec<f32>, Tensor);

/// What a model said to each beginning of a text. Policies that are compared read the same prompts, and often go on in the same
/// way: each beginning is computed once.
#[derive(Debug)]
pub struct Remembered<'a> {
    model: &'a VesperLM,
    said: RefCell<HashMap<Vec<u32>, Said>>,
}

impl<'a> Remembered<'a> {
    /// Nothing yet.
    pub fn new(model: &'a VesperLM) -> Self {
        Self { model, said: RefCell::new(HashMap::new()) }
    }

    /// Like [`VesperLM::session`].
    pub fn session(&self, capacity: usize) -> RememberedSession<'_, 'a> {
        let capacity = capacity.min(self.model.config().max_position_embeddings);
        RememberedSession { memory: self, capacity, ids: Vec::new(), real: None, hidden: None }
    }
}

/// A session that computes what nobody asked before.
#[derive(Debug)]
pub struct RememberedSession<'m, 'a> {
    memory: &'m Remembered<'a>,
    capacity: usize,
    ids: Vec<u32>,
    /// The session that computes, and how many of the ids it has read.
    real: Option<(Session, usize)>,
    hidden: Option<Tensor>,
}

impl NextLogits for RememberedSession<'_, '_> {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.len() > self.remaining() {
            return Err(ModelError::SequenceTooLong {
                got: self.ids.len() + ids.len(),
                limit: self.capacity,
            });
        }
        self.ids.extend(ids);
        if let Some((logits, hidden)) = self.memory.said.borrow().get(&self.ids) {
            self.hidden = Some(hidden.clone());
            return Ok(logits.clone());
        }
        let (mut real, read) = match self.real.take() {
            Some(real) => real,
            None => (self.memory.model.session(self.capacity)?, 0),
        };
        let logits = real.append(self.ids.get(read..).unwrap_or_default())?;
        self.hidden = real.last_hidden().cloned();
        self.real = Some((real, self.ids.len()));
        let mut said = self.memory.said.borrow_mut();
        if let Some(hidden) = &self.hidden
            && (said.len() + 1).saturating_mul(logits.len()) <= LIMIT
        {
            said.insert(self.ids.clone(), (logits.clone(), hidden.clone()));
        }
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        self.capacity - self.ids.len()
    }

    fn vocab_size(&self) -> usize {
        self.memory.model.config().vocab_size
    }
}

impl Introspective for RememberedSession<'_, '_> {
    fn hidden_state(&self) -> Option<&Tensor> {
        self.hidden.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::VarMap;
    use vesper_model::VesperConfig;

    use super::*;

    #[test]
    fn what_is_remembered_is_what_the_model_says() {
        let config = VesperConfig::preset("nano").unwrap().with_vocab(64);
        let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu).unwrap();
        let memory = Remembered::new(&model);
        for last in [4, 5, 4] {
            let (mut asked, mut real) = (memory.session(8), model.session(8).unwrap());
            for ids in [&[1, 2, 3][..], &[last], &[6]] {
                let (a, b) = (asked.append(ids).unwrap(), real.append(ids).unwrap());
                let largest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap();
                assert!(largest < 1e-4, "{largest}");
                assert_eq!(asked.remaining(), real.remaining());
                assert!(asked.hidden_state().is_some());
            }
            assert!(asked.append(&[1; 9]).is_err());
        }
        assert_eq!(memory.said.borrow().len(), 5, "three beginnings of one text, two more of the other");
    }
}
