//! What a model does to decode several sequences at once.

use crate::Result;

/// A model that remembers several sequences of unequal length, one a row.
///
/// [`super::NextLogits`] is the same for one sequence.
pub trait BatchLogits {
    /// How many sequences.
    fn rows(&self) -> usize;

    /// Adds `ids[i]` to what row `i` remembers and scores every token of the vocabulary as the next one.
    ///
    /// Returns for each row the logits after its last id, `(vocab,)`; for a row that gets no ids, which stays as it
    /// is, an empty list. `ids` has as many lists as there are rows, none longer than [`BatchLogits::remaining`].
    ///
    /// # Errors
    /// Whatever the model's computation fails with. No row has changed then.
    fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>>;

    /// Row `i` goes on from what row `from[i]` remembers, as beam search needs it.
    ///
    /// # Errors
    /// Another number of rows, or a row that is not there.
    fn reorder(&mut self, from: &[usize]) -> Result<()>;

    /// How many more tokens a row can remember.
    fn remaining(&self, row: usize) -> usize;

    /// Rows of the embedding: every id given to [`BatchLogits::append`] is less than this.
    fn vocab_size(&self) -> usize;
}
