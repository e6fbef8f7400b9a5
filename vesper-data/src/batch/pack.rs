//! First-fit packing of documents into rows.

use super::order::{Permutation, Use};
use crate::error::Result;
use crate::tokens::Tokens;

/// The name of the packing that saved states count in. Another algorithm would get another name.
pub const PACKING: &str = "first-fit-4096-1";

/// How many documents are packed together.
pub const BLOCK_DOCUMENTS: usize = 4096;

/// A piece of a document in a row: its inputs are the tokens `start..start + len`, its targets those one further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// The rows of a block of an epoch, in the order in which they are given out.
#[derive(Debug)]
pub(super) struct Block {
    rows: Vec<Vec<Piece>>,
    order: Permutation,
}

impl Block {
    /// Packs block `block` of the documents of `tokens` in the epoch's order.
    pub(super) fn pack(tokens: &Tokens, seq: usize, seed: u64, epoch: u64, block: u64) -> Result<Self> {
        let count = tokens.document_count() as u64;
        let documents = Permutation::new(count, seed, epoch, Use::Documents);
        let start = block.saturating_mul(BLOCK_DOCUMENTS as u64).min(count);
        let end = start.saturating_add(BLOCK_DOCUMENTS as u64).min(count);
        let (mut rows, mut rest) = (Vec::new(), Vec::new());
        for index in start..end {
            let document = tokens.document(documents.at(index) as usize)?;
            // The last token is a target only: what follows it is another document.
            let (mut from, last) = (document.start, document.end.saturating_sub(1));
            while last.saturating_sub(from) >= seq {
                rows.push(vec![Piece { start: from, len: seq }]);
                from += seq;
            }
            if from < last {
                rest.push(Piece { start: from, len: last - from });
            }
        }
        rows.extend(first_fit(&rest, seq));
        let order = Permutation::new(rows.len() as u64, seed, epoch, Use::Rows(block));
        Ok(Self { rows, order })
    }

    /// The number of rows.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The row that is given out as number `index`.
    pub(super) fn row(&self, index: usize) -> &[Piece] {
        self.rows.get(self.order.at(index as u64) as usize).map_or(&[], Vec::as_slice)
    }
}

/// Puts each piece into the first row that has room for it; pieces are shorter than a row.
///
/// The rows' room is the leaves of a tree whose nodes have the most of what is below them: a row is found in as many
/// steps as the tree is high.
fn first_fit(pieces: &[Piece], seq: usize) -> Vec<Vec<Piece>> {
    // As many rows as pieces are enough; those not begun have room for anything.
    let leaves = pieces.len().next_power_of_two();
    let mut room = vec![seq; 2 * leaves];
    let mut rows: Vec<Vec<Piece>> = Vec::new();
    for &piece in pieces {
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if room.get(node).is_none_or(|&room| room < piece.len) {
                node += 1;
            }
        }
        let row = node - leaves;
        if row >= rows.len() {
            rows.resize_with(row + 1, Vec::new);
        }
        if let Some(row) = rows.get_mut(row) {
            row.push(piece);
        }
        if let Some(room) = room.get_mut(node) {
            *room = room.saturating_sub(piece.len);
        }
        while node > 1 {
            node /= 2;
            let most = room.get(2 * node..2 * node + 2).and_then(|below| below.iter().max().copied());
            if let (Some(room), Some(most)) = (room.get_mut(node), most) {
                *room = most;
            }
        }
    }
    rows
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
            prop_assert_eq!(first_fit(&pieces, 16), plainly(&pieces, 16));
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
