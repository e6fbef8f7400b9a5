//! The session of the last answer, for the next one: a conversation that goes on, or is answered again, is not read again.

use vesper_model::generate::NextLogits;
use vesper_model::{DecodeStep, Result, Session, VesperLM};

/// A session and the tokens that it has read. Of the next prompt only what comes after the same beginning is read.
#[derive(Debug)]
pub struct Memory {
    session: Session,
    read: Vec<u32>,
    /// How many tokens of the next prompt are read already.
    known: usize,
}

impl Memory {
    /// What to read `prompt` with, so that `answer` more tokens have room: the session of the last answer, back
    /// where the prompts part, or a new one where that is too small.
    ///
    /// # Errors
    /// A model that cannot make a session.
    pub fn for_prompt(last: Option<Self>, model: &VesperLM, prompt: &[u32], answer: usize) -> Result<Self> {
        let context = model.config().max_position_embeddings;
        let room = prompt.len().saturating_add(answer).min(context);
        if let Some(mut memory) = last
            && memory.read.len() + memory.session.remaining() >= room
        {
            let same = memory.read.iter().zip(prompt).take_while(|(read, next)| read == next).count();
            // At least one token is read, for what comes after it.
            memory.known = same.min(prompt.len().saturating_sub(1));
            memory.session.truncate(memory.known);
            memory.read.truncate(memory.known);
            return Ok(memory);
        }
        // The memory of a session is taken at once: twice of what is needed now, so that the conversation can go on.
        let capacity = room.saturating_mul(2).min(context);
        // Nothing else works on the device, so that a GPU's step may be a graph.
        let session = model.session(capacity)?.with_step(DecodeStep::Captured)?;
        Ok(Self { session, read: Vec::new(), known: 0 })
    }

    /// How many tokens of the prompt were read before.
    pub fn known(&self) -> usize {
        self.known
    }
}

impl NextLogits for Memory {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let new = ids.get(std::mem::take(&mut self.known)..).unwrap_or_default();
        let logits = self.session.append(new)?;
        self.read.extend(new);
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        self.session.remaining() + self.known
    }

    fn vocab_size(&self) -> usize {
        self.session.vocab_size()
    }
}
