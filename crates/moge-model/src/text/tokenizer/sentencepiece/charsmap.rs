//! `precompiled_charsmap`: replacement rules of the normaliser.
//!
//! Layout, all little endian: the number of bytes of a trie (u32), the trie, and the replacement strings, each ended by
//! a zero byte. The trie is a double array of u32 units:
//!
//! | bits of a unit | meaning |
//! |---|---|
//! | 0-7, 31 | the byte that leads here; bit 31 marks a value, which no byte leads to |
//! | 8 | a rule ends here: the unit at this one's children base, byte 0, is its value |
//! | 9 | the offset counts in steps of 256 |
//! | 10-30 | offset: the children base is this unit's index xor the offset, a child's index is the base xor its byte |
//!
//! A value's bits 0-30 say where its replacement begins. The file comes from outside, so the whole trie is walked once
//! when it is read; lookups then find nothing that has not been checked.

use super::error::Problem;

const FIELD: &str = "normalizer_spec.precompiled_charsmap";

/// No character has a longer replacement; Unicode's longest compatibility form is 33 bytes. Bounds what a hostile file
/// can make of a short text.
const MAX_REPLACEMENT_BYTES: usize = 1024;

/// Replacement rules, checked.
#[derive(Debug)]
pub(super) struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

/// State of a unit in the depth-first walk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    Unseen,
    Open,
    Done,
}

impl Charsmap {
    pub(super) fn new(bytes: &[u8]) -> Result<Charsmap, Problem> {
        let Some((header, rest)) = bytes.split_first_chunk::<4>() else {
            return Err(Problem::new(FIELD, format!("{} bytes", bytes.len()), "at least the four of a length"));
        };
        let trie_len = u32::from_le_bytes(*header) as usize;
        let Some((trie, replacements)) = rest.split_at_checked(trie_len) else {
            let allowed = format!("at most the {} bytes left", rest.len());
            return Err(Problem::new(FIELD, format!("a trie of {trie_len} bytes"), &allowed));
        };
        let (units, []) = trie.as_chunks::<4>() else {
            return Err(Problem::new(FIELD, format!("a trie of {trie_len} bytes"), "a multiple of four"));
        };
        let replacements = str::from_utf8(replacements)
            .map_err(|error| Problem::new(FIELD, format!("replacements: {error}"), "UTF-8"))?;
        let units = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let map = Charsmap { units, replacements: replacements.to_owned() };
        map.check()?;
        Ok(map)
    }

    /// The longest rule that `text` begins with: how many bytes it replaces, and by what.
    pub(super) fn longest_prefix(&self, text: &str) -> Option<(usize, &str)> {
        let mut longest = None;
        let mut base = self.children_base(0)?;
        for (depth, byte) in text.bytes().enumerate() {
            let Some(unit) = self.child(base, byte) else { break };
            let Some(next_base) = self.children_base(unit) else { break };
            base = next_base;
            if let Some(value) = self.value(unit, base)
                && text.is_char_boundary(depth + 1)
            {
                longest = Some((depth + 1, value));
            }
        }
        longest.and_then(|(len, value)| Some((len, self.replacement(value)?)))
    }

    /// Walk the whole trie: it must have no cycle, which would make lookups long, and its values must be replacements.
    /// Units may be shared: the library's builder merges equal branches.
    fn check(&self) -> Result<(), Problem> {
        let broken = |found: String| Problem::new(FIELD, found, "a trie whose values are replacements");
        let mut states = vec![Visit::Unseen; self.units.len()];
        let mut stack = vec![(Visit::Open, 0)];
        while let Some((visit, unit)) = stack.pop() {
            let state = states.get_mut(unit).ok_or_else(|| broken("an empty trie".to_owned()))?;
            if visit == Visit::Done || *state == Visit::Done {
                *state = Visit::Done;
                continue;
            }
            if *state == Visit::Open {
                return Err(broken(format!("a cycle through unit {unit}")));
            }
            *state = Visit::Open;
            stack.push((Visit::Done, unit));
            let Some(base) = self.children_base(unit) else {
                return Err(broken(format!("unit {unit} without children")));
            };
            if let Some(value) = self.value(unit, base)
                && self.replacement(value).is_none()
            {
                return Err(broken(format!("value {value} with {} bytes of replacements", self.replacements.len())));
            }
            let children = (0..=u8::MAX).filter_map(|byte| self.child(base, byte));
            stack.extend(children.map(|child| (Visit::Open, child)));
        }
        Ok(())
    }

    /// The base of a unit's children.
    fn children_base(&self, unit: usize) -> Option<usize> {
        let bits = *self.units.get(unit)?;
        let offset = (bits >> 10) << ((bits >> 9 & 1) * 8);
        Some(unit ^ offset as usize)
    }

    fn child(&self, base: usize, byte: u8) -> Option<usize> {
        let index = base ^ usize::from(byte);
        let label = self.units.get(index)? & (1 << 31 | 0xff);
        (label == u32::from(byte)).then_some(index)
    }

    fn value(&self, unit: usize, base: usize) -> Option<usize> {
        let ends = self.units.get(unit)? >> 8 & 1 == 1;
        // A missing value has no replacement, so `check` refuses it.
        ends.then(|| self.units.get(base).map_or(usize::MAX, |value| (value & 0x7fff_ffff) as usize))
    }

    fn replacement(&self, value: usize) -> Option<&str> {
        let tail = self.replacements.get(value..)?;
        let end = tail.bytes().take(MAX_REPLACEMENT_BYTES + 1).position(|byte| byte == 0)?;
        tail.get(..end)
    }
}

#[cfg(test)]
mod tests {
    use super::Charsmap;

    /// Rules with one key of one byte, whose unit leads to `base`; the value there is `value`.
    fn one_rule(key: u8, base: u32, value: u32) -> Vec<u8> {
        const FREE: u32 = 1 << 31; // Looks like a value, so no byte leads to it.
        const ROOT_BASE: u32 = 1;
        let mut units = [FREE; 256];
        units[0] = ROOT_BASE << 10;
        let unit = ROOT_BASE ^ u32::from(key);
        units[2] = 1 << 31 | value;
        units[unit as usize] = (unit ^ base) << 10 | 1 << 8 | u32::from(key);
        let mut bytes = (4 * units.len() as u32).to_le_bytes().to_vec();
        bytes.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        bytes.extend(b"one\0two\0");
        bytes
    }

    #[test]
    fn a_rule_replaces_its_key() {
        let map = Charsmap::new(&one_rule(b'a', 2, 4)).unwrap();
        assert_eq!(map.longest_prefix("ab"), Some((1, "two")));
        assert_eq!(map.longest_prefix("ba"), None);
        assert_eq!(map.longest_prefix(""), None);
    }

    #[test]
    fn a_rule_for_half_a_character_never_applies() {
        let map = Charsmap::new(&one_rule(0xe4, 2, 4)).unwrap();
        assert_eq!(map.longest_prefix("\u{4f60}"), None);
    }

    #[test]
    fn broken_rules_are_refused_by_name() {
        let valid = one_rule(b'a', 2, 4);
        let huge = [&u32::MAX.to_le_bytes()[..], &valid[4..]].concat();
        let odd = [&1023_u32.to_le_bytes()[..], &valid[4..]].concat();
        let endless = [&valid[..], &[b'x'; 2000], &[0]].concat();
        let trie = "a trie whose values are replacements";
        let cases = [
            (vec![1, 2, 3], "3 bytes", "at least the four of a length"),
            (huge, "a trie of 4294967295 bytes", "at most the 1032 bytes left"),
            (odd, "a trie of 1023 bytes", "a multiple of four"),
            (vec![0; 4], "an empty trie", trie),
            (one_rule(b'a', 1, 4), "a cycle through unit 96", trie),
            (one_rule(b'a', 2, 8), "value 8 with 8 bytes of replacements", trie),
            (one_rule(b'a', 300, 4), "value 18446744073709551615 with 8 bytes of replacements", trie),
            (
                [valid.as_slice(), &[0xff]].concat(),
                "replacements: invalid utf-8 sequence of 1 bytes from index 8",
                "UTF-8",
            ),
        ];
        for (bytes, value, allowed) in cases {
            let problem = Charsmap::new(&bytes).unwrap_err();
            assert_eq!((problem.value.as_str(), problem.allowed.as_str()), (value, allowed));
        }
        assert!(Charsmap::new(&endless).is_ok(), "only the replacements that rules use count");
    }
}
