//! Who owns which block of the KV cache.

use moge_model::BlockId;

/// The free list. A block is either in it or in exactly one sequence's block table.
#[derive(Debug)]
pub(crate) struct BlockManager {
    num_blocks: usize,
    /// The next block to hand out is the last one.
    free: Vec<BlockId>,
}

impl BlockManager {
    /// Own the blocks `0..num_blocks`, all free.
    ///
    /// # Panics
    /// If a block id would not fit in 32 bits.
    pub(crate) fn new(num_blocks: usize) -> BlockManager {
        let end = u32::try_from(num_blocks).expect("block ids have 32 bits");
        BlockManager { num_blocks, free: (0..end).rev().map(BlockId).collect() }
    }

    /// Blocks that nobody holds.
    pub(crate) fn num_free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Take `n` free blocks, or none at all if fewer are free.
    pub(crate) fn allocate(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let first = self.free.len().checked_sub(n)?;
        Some(self.free.drain(first..).rev().collect())
    }

    /// Give blocks back. The first of them is the first to be handed out again.
    pub(crate) fn free(&mut self, blocks: Vec<BlockId>) {
        self.free.extend(blocks.into_iter().rev());
    }

    /// Check that every block is either free or in exactly one of `block_tables`.
    ///
    /// # Panics
    /// If a block is lost, unknown or held twice.
    pub(crate) fn check_integrity<'a>(&'a self, block_tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut held = vec![false; self.num_blocks];
        for &BlockId(block) in block_tables.flatten().chain(&self.free) {
            let held = held.get_mut(block as usize).unwrap_or_else(|| panic!("block {block} does not exist"));
            assert!(!*held, "block {block} is held twice");
            *held = true;
        }
        let lost = held.iter().position(|held| !held);
        assert!(lost.is_none(), "block {lost:?} is lost");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn allocation_is_all_or_nothing() {
        let mut manager = BlockManager::new(5);
        let three = manager.allocate(3).unwrap();
        assert_eq!(three, [BlockId(0), BlockId(1), BlockId(2)]);
        assert_eq!(manager.allocate(3), None);
        assert_eq!(manager.num_free_blocks(), 2);
        assert_eq!(manager.allocate(2), Some(vec![BlockId(3), BlockId(4)]));
        assert_eq!(manager.allocate(0), Some(vec![]));
        manager.free(three.clone());
        assert_eq!(manager.allocate(3), Some(three));
    }

    proptest! {
        #[test]
        fn no_history_of_calls_leaks_or_doubles_a_block(
            num_blocks in 0usize..40,
            calls in prop::collection::vec((any::<bool>(), 0usize..12), 0..80),
        ) {
            let mut manager = BlockManager::new(num_blocks);
            let mut tables: Vec<Vec<BlockId>> = Vec::new();
            for (allocates, n) in calls {
                if allocates {
                    let num_free = manager.num_free_blocks();
                    let blocks = manager.allocate(n);
                    prop_assert_eq!(blocks.is_some(), n <= num_free);
                    tables.extend(blocks);
                } else if !tables.is_empty() {
                    manager.free(tables.swap_remove(n % tables.len()));
                }
                manager.check_integrity(tables.iter().map(Vec::as_slice));
            }
            tables.into_iter().for_each(|table| manager.free(table));
            prop_assert_eq!(manager.num_free_blocks(), num_blocks);
        }
    }
}
