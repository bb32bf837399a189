//! Ownership of KV blocks, and the prefix cache: reuse of blocks by sequences that begin with the same tokens.
//!
//! A full block whose keys and values are computed can be found by its tokens and all tokens before it: a sequence that
//! begins with the same tokens holds the same block. Blocks are compared by their tokens, not by a hash alone, so one
//! sequence never reads what belongs to another text. A block without holders keeps its contents until it
//! is allocated again; the block released first is reused first.

use std::collections::{BTreeMap, HashMap};

use moge_model::{BLOCK_SIZE, BlockId, TokenId};

/// Names a text that ends with a full block: its tokens and all before them. The default is the empty text. Never used
/// for another text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct PrefixId(u64);

/// Contents of a full block: the key of the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Contents {
    before: PrefixId,
    tokens: [TokenId; BLOCK_SIZE],
}

/// Location of cached contents.
#[derive(Clone, Copy, Debug)]
struct Cached {
    block: BlockId,
    prefix: PrefixId,
}

#[derive(Debug, Default)]
struct Block {
    num_holders: usize,
    /// Its key in `cached`, if it is there.
    contents: Option<Contents>,
    /// Its key in `reusable`, if it is there.
    released: u64,
}

/// All blocks: each is held, or reusable, or empty.
#[derive(Debug)]
pub(crate) struct BlockManager {
    blocks: Vec<Block>,
    /// Free blocks without contents. The last one is allocated next.
    empty: Vec<BlockId>,
    /// Free blocks with contents, in order of their release.
    reusable: BTreeMap<u64, BlockId>,
    cached: HashMap<Contents, Cached>,
    num_releases: u64,
    last_prefix: PrefixId,
}

impl BlockManager {
    /// Own the blocks `0..num_blocks`, all free.
    ///
    /// # Panics
    /// If a block id would not fit in 32 bits.
    pub(crate) fn new(num_blocks: usize) -> BlockManager {
        let end = u32::try_from(num_blocks).expect("block ids have 32 bits");
        BlockManager {
            blocks: (0..end).map(|_| Block::default()).collect(),
            empty: (0..end).rev().map(BlockId).collect(),
            reusable: BTreeMap::new(),
            cached: HashMap::new(),
            num_releases: 0,
            last_prefix: PrefixId::default(),
        }
    }

    /// Blocks without holders.
    pub(crate) fn num_free_blocks(&self) -> usize {
        self.empty.len() + self.reusable.len()
    }

    /// Take `n` free blocks, or none at all if fewer are free. Their contents are lost.
    pub(crate) fn allocate(&mut self, n: usize) -> Option<Vec<BlockId>> {
        (n <= self.num_free_blocks()).then(|| (0..n).filter_map(|_| self.allocate_one()).collect())
    }

    fn allocate_one(&mut self) -> Option<BlockId> {
        let block = self.empty.pop().or_else(|| {
            let (_, block) = self.reusable.pop_first()?;
            if let Some(contents) = self.blocks[block.0 as usize].contents.take() {
                self.cached.remove(&contents);
            }
            Some(block)
        })?;
        self.blocks[block.0 as usize].num_holders = 1;
        Some(block)
    }

    /// Hold the blocks of as many full blocks of `tokens`, from the first on, as there are with these contents. Also
    /// says which text they end.
    pub(crate) fn hold_prefix(&mut self, tokens: &[TokenId]) -> (Vec<BlockId>, PrefixId) {
        let mut held = Vec::new();
        let mut before = PrefixId::default();
        for &tokens in tokens.as_chunks().0 {
            let Some(&Cached { block, prefix }) = self.cached.get(&Contents { before, tokens }) else { break };
            let state = &mut self.blocks[block.0 as usize];
            if state.num_holders == 0 {
                self.reusable.remove(&state.released);
            }
            state.num_holders += 1;
            held.push(block);
            before = prefix;
        }
        (held, before)
    }

    /// Enter `block`, which is held and contains the keys and values of `tokens` after the text `before`, into the prefix
    /// cache. Returns the text up to its end. A block with the same contents that is already there stays.
    pub(crate) fn publish(&mut self, block: BlockId, before: PrefixId, tokens: [TokenId; BLOCK_SIZE]) -> PrefixId {
        let contents = Contents { before, tokens };
        if let Some(cached) = self.cached.get(&contents) {
            return cached.prefix;
        }
        self.last_prefix.0 += 1;
        let prefix = self.last_prefix;
        self.blocks[block.0 as usize].contents = Some(contents.clone());
        self.cached.insert(contents, Cached { block, prefix });
        prefix
    }

    /// Empty the prefix cache. Blocks that are held stay held.
    pub(crate) fn clear_cache(&mut self) {
        self.cached.clear();
        self.blocks.iter_mut().for_each(|block| block.contents = None);
        self.empty.extend(std::mem::take(&mut self.reusable).into_values());
    }

    /// Release the blocks of a sequence. Later blocks are reused first: they are less likely to be needed again, and cannot
    /// be found without the blocks before them.
    pub(crate) fn free(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            let state = &mut self.blocks[block.0 as usize];
            state.num_holders -= 1;
            if state.num_holders > 0 {
                continue;
            }
            if state.contents.is_none() {
                self.empty.push(block);
            } else {
                self.num_releases += 1;
                state.released = self.num_releases;
                self.reusable.insert(state.released, block);
            }
        }
    }

    /// Check that every block is empty, or reusable, or held as often as it is in `block_tables`; and that contents are
    /// found where they are.
    ///
    /// # Panics
    /// If something does not hold.
    pub(crate) fn check_integrity<'a>(&'a self, block_tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut num_holders = vec![0; self.blocks.len()];
        for block in block_tables.flatten() {
            num_holders[block.0 as usize] += 1;
        }
        let mut is_free = vec![false; self.blocks.len()];
        for block in self.empty.iter().chain(self.reusable.values()) {
            assert!(!is_free[block.0 as usize], "block {} is free twice", block.0);
            is_free[block.0 as usize] = true;
        }
        for (index, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.num_holders, num_holders[index], "holders of block {index}");
            assert_eq!(is_free[index], block.num_holders == 0, "block {index} is lost, or held and free");
            if let Some(contents) = &block.contents {
                assert_eq!(self.cached[contents].block.0 as usize, index, "contents of block {index}");
            }
        }
        assert!(self.empty.iter().all(|block| self.blocks[block.0 as usize].contents.is_none()));
        assert!(self.reusable.iter().all(|(released, block)| self.blocks[block.0 as usize].released == *released));
        assert_eq!(self.cached.len(), self.blocks.iter().filter(|block| block.contents.is_some()).count());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A text of `num_blocks` full blocks.
    fn text(first: u32, num_blocks: usize) -> Vec<TokenId> {
        (0..(num_blocks * BLOCK_SIZE) as u32).map(|i| TokenId(first + i % 7)).collect()
    }

    fn publish_all(manager: &mut BlockManager, blocks: &[BlockId], tokens: &[TokenId]) {
        let mut before = PrefixId::default();
        for (&block, &tokens) in blocks.iter().zip(tokens.as_chunks().0) {
            before = manager.publish(block, before, tokens);
        }
    }

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

    #[test]
    fn a_prefix_is_found_while_it_is_held_and_after_until_its_place_is_needed() {
        let mut manager = BlockManager::new(5);
        let (one, other) = (text(1, 3), text(2, 1));
        let blocks = manager.allocate(3).unwrap();
        publish_all(&mut manager, &blocks, &one);
        let (shared, _) = manager.hold_prefix(&[&one[..2 * BLOCK_SIZE], &other].concat());
        assert_eq!(shared, blocks[..2], "the third block differs");
        assert_eq!(manager.hold_prefix(&one[1..]).0, [], "other tokens");
        assert_eq!(manager.hold_prefix(&one[..BLOCK_SIZE - 1]).0, [], "no full block");
        manager.free(blocks.clone());
        assert_eq!(manager.num_free_blocks(), 3);
        manager.free(shared);
        manager.check_integrity(std::iter::empty());
        assert_eq!(manager.num_free_blocks(), 5);
        // Two are empty; the third to go is the end of the text.
        let three = manager.allocate(3).unwrap();
        assert_eq!(manager.hold_prefix(&one).0, blocks[..2]);
        assert_eq!(manager.allocate(1), None);
        manager.free(blocks[..2].to_vec());
        manager.allocate(2).unwrap();
        assert_eq!(manager.hold_prefix(&one).0, []);
        manager.free(three);
    }

    #[test]
    fn a_cleared_cache_finds_nothing_and_holders_keep_their_blocks() {
        let mut manager = BlockManager::new(5);
        let (one, other) = (text(1, 2), text(2, 2));
        let [held, released] = [&one, &other].map(|text| {
            let blocks = manager.allocate(2).unwrap();
            publish_all(&mut manager, &blocks, text);
            blocks
        });
        manager.free(released);
        manager.clear_cache();
        manager.check_integrity([&*held].into_iter());
        assert_eq!((manager.hold_prefix(&one).0, manager.hold_prefix(&other).0), (vec![], vec![]));
        assert_eq!(manager.num_free_blocks(), 3);
        assert_eq!(manager.allocate(4), None, "two are held");
        manager.free(held);
        manager.check_integrity(std::iter::empty());
        assert_eq!(manager.num_free_blocks(), 5);
    }

    #[test]
    fn the_same_tokens_after_another_text_are_other_contents() {
        let mut manager = BlockManager::new(4);
        let (one, two) = (text(1, 2), text(2, 2));
        let blocks = manager.allocate(2).unwrap();
        publish_all(&mut manager, &blocks, &one);
        let mixed = [&two[..BLOCK_SIZE], &one[BLOCK_SIZE..]].concat();
        assert_eq!(manager.hold_prefix(&mixed).0, []);
        let others = manager.allocate(2).unwrap();
        publish_all(&mut manager, &others, &mixed);
        assert_eq!(manager.hold_prefix(&mixed).0, others);
        assert_eq!(manager.hold_prefix(&one).0, blocks);
        // A second block with contents that are there already is not the one that is found.
        manager.free(others.clone());
        manager.free(others);
        let again = manager.allocate(2).unwrap();
        publish_all(&mut manager, &again, &one);
        assert_eq!(manager.hold_prefix(&one).0, blocks);
    }

    proptest! {
        #[test]
        fn no_history_of_calls_leaks_or_doubles_a_block(
            num_blocks in 0usize..40,
            calls in prop::collection::vec((0..13, 0usize..12, 0u32..4), 0..80),
        ) {
            let mut manager = BlockManager::new(num_blocks);
            let mut tables: Vec<Vec<BlockId>> = Vec::new();
            for (call, n, first) in calls {
                let text = text(first, n);
                match call {
                    12 => {
                        manager.clear_cache();
                        prop_assert_eq!(&manager.hold_prefix(&text).0, &[]);
                    }
                    0..4 => {
                        let num_free = manager.num_free_blocks();
                        let blocks = manager.allocate(n);
                        prop_assert_eq!(blocks.is_some(), n <= num_free);
                        if let Some(blocks) = &blocks {
                            publish_all(&mut manager, blocks, &text);
                        }
                        tables.extend(blocks);
                    }
                    4..8 => tables.push(manager.hold_prefix(&text).0),
                    _ if tables.is_empty() => {}
                    _ => manager.free(tables.swap_remove(n % tables.len())),
                }
                manager.check_integrity(tables.iter().map(Vec::as_slice));
            }
            tables.into_iter().for_each(|table| manager.free(table));
            prop_assert_eq!(manager.num_free_blocks(), num_blocks);
        }
    }
}
