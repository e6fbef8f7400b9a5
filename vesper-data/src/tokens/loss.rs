//! Which tokens the loss leaves out.

use std::ops::Range;

/// A target that counts neither in the loss nor in the gradient: `vesper-model`'s `CrossEntropy::ignore_index` is this
/// by default.
///
/// It is how a batch says which tokens are no targets: the answers' loss only, the padding of packed rows. No
/// vocabulary has a token with this id.
pub const IGNORE: u32 = u32::MAX;

/// Appends what `loss` leaves out of a document of `len` tokens that begins at `start`. Ranges that touch become one.
pub(crate) fn push_ignored(
    ignored: &mut Vec<(u64, u64)>,
    start: u64,
    len: u64,
    loss: Option<&[Range<usize>]>,
) {
    let Some(loss) = loss else { return };
    let mut push = |from: u64, to: u64| {
        if from >= to {
            return;
        }
        match ignored.last_mut() {
            Some((_, end)) if *end == start + from => *end = start + to,
            _ => ignored.push((start + from, start + to)),
        }
    };
    let mut last = 0;
    for range in loss {
        // Whatever the ranges are, what is pushed is in order and within the document.
        let start = last.max((range.start as u64).min(len));
        push(last, start);
        last = start.max((range.end as u64).min(len));
    }
    push(last, len);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ignored(documents: &[(u64, Option<Vec<Range<usize>>>)]) -> Vec<(u64, u64)> {
        let (mut ignored, mut start) = (Vec::new(), 0);
        for (len, loss) in documents {
            push_ignored(&mut ignored, start, *len, loss.as_deref());
            start += len;
        }
        ignored
    }

    #[test]
    fn what_is_no_target_is_left_out() {
        let one = |start, end| Some(vec![Range { start, end }]);
        assert_eq!(ignored(&[(5, None), (5, one(0, 5)), (0, one(0, 0))]), []);
        assert_eq!(ignored(&[(5, None), (5, one(2, 4)), (4, one(1, 4))]), [(5, 7), (9, 11)]);
        assert_eq!(ignored(&[(3, Some(Vec::new())), (2, Some(vec![0..1, 1..2]))]), [(0, 3)]);
    }

    proptest! {
        #[test]
        fn any_ranges_give_ranges_in_order_and_within_the_documents(
            documents in prop::collection::vec((0..20_u64, prop::option::of(prop::collection::vec((0..30_usize, 0..30_usize).prop_map(|(start, end)| start..end), 0..5))), 0..8),
        ) {
            let total: u64 = documents.iter().map(|(len, _)| len).sum();
            let mut last = 0;
            for (index, (start, end)) in ignored(&documents).into_iter().enumerate() {
                prop_assert!((index == 0 || start > last) && start < end && end <= total);
                last = end;
            }
        }
    }
}
