//! First-fit packing of documents into rows.

use super::order::{Permutation, Use};
use crate::error::Result;
use crate::tokens::Tokens;

/// The name of the packing that saved states count in. Another algorithm would get another name.
pub const PACKING: &str = "first-fit-4096-1";

/// How many documents are packed together.
pub const BLOCK_DOCUMENTS: usize = 4096;

/// A piece of a document in a row: its inputs are the tokens `start..start + len`, its targets those one further.
/// Where it starts is counted in what the tokens are a view of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// Rows of pieces, one behind the other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rows {
    pieces: Vec<Piece>,
    /// Where in `pieces` each row ends.
    ends: Vec<usize>,
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn row(&self, index: usize) -> &[Piece] {
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(index).and_then(|&end| self.pieces.get(start..end)).unwrap_or_default()
    }

    /// The pieces of all rows.
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(super) fn push(&mut self, row: &[Piece]) {
        self.pieces.extend_from_slice(row);
        self.ends.push(self.pieces.len());
    }
}

/// The rows of a block of an epoch, in the order in which they are given out.
#[derive(Debug)]
pub(super) struct Block {
    rows: Rows,
    order: Permutation,
}

impl Block {
    /// Packs block `block` of the documents of `tokens` in the epoch's order.
    pub(super) fn pack(tokens: &Tokens, seq: usize, seed: u64, epoch: u64, block: u64) -> Result<Self> {
        let count = tokens.document_count() as u64;
        let documents = Permutation::new(count, seed, epoch, Use::Documents);
        let start = block.saturating_mul(BLOCK_DOCUMENTS as u64).min(count);
        let end = start.saturating_add(BLOCK_DOCUMENTS as u64).min(count);
        let (mut rows, mut rest) = (Rows::default(), Vec::with_capacity((end - start) as usize));
        for index in start..end {
            let document = tokens.stored_document(documents.at(index) as usize)?;
            // The last token is a target only: what follows it is another document.
            let (mut from, last) = (document.start, document.end.saturating_sub(1));
            while last.saturating_sub(from) >= seq {
                rows.push(&[Piece { start: from, len: seq }]);
                from += seq;
            }
            if from < last {
                rest.push(Piece { start: from, len: last - from });
            }
        }
        first_fit(&rest, seq, &mut rows);
        let order = Permutation::new(rows.len() as u64, seed, epoch, Use::Rows(block));
        Ok(Self { rows, order })
    }

    /// The number of rows.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The row that is given out as number `index`.
    pub(super) fn row(&self, index: usize) -> &[Piece] {
        self.rows.row(self.order.at(index as u64) as usize)
    }
}

/// Puts each piece into the first row that has room for it, and these rows behind `rows`; pieces are shorter than a
/// row.
///
/// The rows' room is the leaves of a tree whose nodes have the most of what is below them: a row is found in as many
/// steps as the tree is high.
fn first_fit(pieces: &[Piece], seq: usize, rows: &mut Rows) {
    // Two rows next to each other hold more than one row could, so these are enough; those not begun have room for
    // anything.
    let total: usize = pieces.iter().map(|piece| piece.len).sum();
    let leaves = pieces.len().min(2 * (total / seq) + 2).next_power_of_two();
    let mut room = vec![seq; 2 * leaves];
    // The row of each piece, and how many pieces each row has.
    let mut row_of = Vec::with_capacity(pieces.len());
    let mut counts: Vec<usize> = Vec::new();
    for piece in pieces {
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if room.get(node).is_none_or(|&room| room < piece.len) {
                node += 1;
            }
        }
        let row = node - leaves;
        row_of.push(row);
        if row >= counts.len() {
            counts.resize(row + 1, 0);
        }
        if let Some(count) = counts.get_mut(row) {
            *count += 1;
        }
        if let Some(room) = room.get_mut(node) {
            *room = room.saturating_sub(piece.len);
        }
        while node > 1 {
            node /= 2;
            let most = room.get(2 * node..2 * node + 2).and_then(|below| below.iter().max().copied());
            match (room.get_mut(node), most) {
                (Some(room), Some(most)) if *room != most => *room = most,
                // What is above is as it was.
                _ => break,
            }
        }
    }
    // The pieces of each row next to each other, in their order.
    let mut end = rows.pieces.len();
    let mut next = Vec::with_capacity(counts.len());
    for count in counts {
        next.push(end);
        end += count;
        rows.ends.push(end);
    }
    rows.pieces.resize(end, Piece { start: 0, len: 0 });
    for (piece, row) in pieces.iter().zip(row_of) {
        let Some(place) = next.get_mut(row) else { continue };
        if let Some(slot) = rows.pieces.get_mut(*place) {
            *slot = *piece;
        }
        *place += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plainly(pieces: &[Piece], seq: usize) -> Vec<Vec<Piece>> {
        let mut rows: Vec<Vec<Piece>> = Vec::new();
        for &piece in pieces {
            let used = |row: &Vec<Piece>| row.iter().map(|piece| piece.len).sum::<usize>();
            match rows.iter_mut().find(|row| used(row) + piece.len <= seq) {
                Some(row) => row.push(piece),
                None => rows.push(vec![piece]),
            }
        }
        rows
    }

    proptest! {
        #[test]
        fn each_piece_is_in_the_first_row_that_had_room(lengths in prop::collection::vec(1..16_usize, 0..80)) {
            let pieces: Vec<Piece> = lengths.iter().enumerate().map(|(start, &len)| Piece { start, len }).collect();
            let mut rows = Rows::default();
            rows.push(&pieces[..pieces.len().min(2)]);
            first_fit(&pieces, 16, &mut rows);
            let found: Vec<&[Piece]> = (1..rows.len()).map(|row| rows.row(row)).collect();
            prop_assert_eq!(found, plainly(&pieces, 16));
            prop_assert_eq!(rows.row(0), &pieces[..pieces.len().min(2)]);
            prop_assert!(rows.row(rows.len()).is_empty());
        }
    }

    #[test]
    fn a_block_has_each_pair_of_neighbours_in_a_document_once() {
        let lengths = [0, 1, 2, 9, 10, 11, 35, 4];
        let documents = lengths.iter().map(|&len| Ok(vec![1; len]));
        let tokens = Tokens::from_documents(documents).unwrap();
        let block = Block::pack(&tokens, 10, 1, 0, 0).unwrap();
        let mut pairs: Vec<usize> = (0..block.len())
            .flat_map(|row| block.row(row).to_vec())
            .flat_map(|piece| piece.start..piece.start + piece.len)
            .collect();
        pairs.sort_unstable();
        let ends: Vec<usize> = tokens.documents().map(|document| document.unwrap().end).collect();
        assert_eq!(pairs, (0..72).filter(|position| !ends.contains(&(position + 1))).collect::<Vec<_>>());
        assert_eq!(Block::pack(&tokens, 10, 1, 0, 1).unwrap().len(), 0);
        assert_eq!(Block::pack(&tokens, 10, 1, 0, u64::MAX).unwrap().len(), 0);
    }
}
