//! A set of strings that finds the longest member that a text begins with.

/// Strings in sorted order, so that those with a common prefix are adjacent.
#[derive(Debug, Default)]
pub(super) struct PrefixSet(Vec<String>);

impl PrefixSet {
    /// The strings must not be empty.
    pub(super) fn new(mut strings: Vec<String>) -> PrefixSet {
        strings.sort_unstable();
        PrefixSet(strings)
    }

    /// Length in bytes of the longest member that `text` begins with.
    pub(super) fn longest_prefix(&self, text: &str) -> Option<usize> {
        let mut longest = None;
        // The members whose first `depth` bytes are those of the text.
        let mut same = self.0.as_slice();
        for (depth, &byte) in text.as_bytes().iter().enumerate() {
            // A member that ends here sorts before the longer ones; it has no byte at `depth`.
            let at_depth = |member: &String| member.as_bytes().get(depth).copied();
            let begin = same.partition_point(|member| at_depth(member) < Some(byte));
            let end = same.partition_point(|member| at_depth(member) <= Some(byte));
            same = &same[begin..end];
            match same.first() {
                None => break,
                Some(member) if member.len() == depth + 1 => longest = Some(depth + 1),
                Some(_) => {}
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::PrefixSet;

    #[test]
    fn the_longest_of_several_members_is_found() {
        let set = PrefixSet::new(["ab", "a", "abcd", "b", "好的"].map(str::to_owned).to_vec());
        let cases = [
            ("", None),
            ("a", Some(1)),
            ("abc", Some(2)),
            ("abcde", Some(4)),
            ("cab", None),
            ("好", None),
            ("好的!", Some(6)),
        ];
        for (text, expected) in cases {
            assert_eq!(set.longest_prefix(text), expected, "{text:?}");
        }
        assert_eq!(PrefixSet::default().longest_prefix("a"), None);
    }
}
