//! The order of documents: a permutation of each epoch that needs no memory.

/// Rounds of the Feistel network. Four make one that statistics can hardly tell from a random permutation.
const NUM_ROUNDS: u64 = 4;

/// Least bits of a half. Networks of fewer are few, so that some orders of few documents would never come.
const MIN_HALF_BITS: u32 = 6;

/// The document that stands at `index` in the order of an epoch, of `num_documents`. Each stands at exactly one index.
///
/// # Panics
/// If `index` is not below `num_documents`.
pub(super) fn document_at(index: u64, num_documents: u64, key: u64) -> u64 {
    assert!(index < num_documents, "document {index} of {num_documents}");
    // A Feistel network permutes the numbers of an even number of bits. Walking on from what lies beyond the documents ends
    // among them, as the walk comes back to where it began; where there are many documents it takes less than four steps on
    // average.
    let num_bits = u64::BITS - (num_documents - 1).leading_zeros();
    let half_bits = num_bits.div_ceil(2).max(MIN_HALF_BITS);
    let mask = (1 << half_bits) - 1;
    let mut place = index;
    loop {
        let (mut left, mut right) = (place >> half_bits, place & mask);
        for round in 0..NUM_ROUNDS {
            (left, right) = (right, left ^ (mix(right ^ mix(key ^ round)) & mask));
        }
        place = left << half_bits | right;
        if place < num_documents {
            return place;
        }
    }
}

/// The key of an epoch of a source.
pub(super) fn epoch_key(seed: u64, source: &str, epoch: u64) -> u64 {
    mix(mix(seed ^ u64::from(crc32fast::hash(source.as_bytes())) << 32) ^ epoch)
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on every bit.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(num_documents: u64, key: u64) -> Vec<u64> {
        (0..num_documents).map(|index| document_at(index, num_documents, key)).collect()
    }

    #[test]
    fn every_document_comes_exactly_once_in_an_epoch() {
        for num_documents in (1..70).chain([255, 256, 257, 1000, 4097]) {
            let mut documents = order(num_documents, 11 * num_documents);
            documents.sort_unstable();
            assert!(documents.into_iter().eq(0..num_documents), "{num_documents}");
        }
    }

    #[test]
    fn the_order_depends_on_seed_source_and_epoch() {
        let first = order(100, epoch_key(1, "web", 0));
        for other in [epoch_key(2, "web", 0), epoch_key(1, "code", 0), epoch_key(1, "web", 1)] {
            let order = order(100, other);
            let num_same = first.iter().zip(&order).filter(|(a, b)| a == b).count();
            // One is expected; more than 7 has a probability of 1e-5.
            assert!(num_same <= 7, "{num_same} of 100 documents at the same place");
        }
    }

    #[test]
    fn every_document_is_as_likely_at_every_place() {
        let num_documents = 5;
        let mut counts = [[0u32; 5]; 5];
        for epoch in 0..5000 {
            for (index, document) in order(num_documents, epoch_key(3, "web", epoch)).into_iter().enumerate() {
                counts[index][document as usize] += 1;
            }
        }
        // 1000 are expected, with a standard deviation of 28.
        assert!(counts.as_flattened().iter().all(|count| (860..1140).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_largest_number_of_documents_has_an_order() {
        assert_ne!(document_at(0, u64::MAX, 5), document_at(1, u64::MAX, 5));
    }
}
