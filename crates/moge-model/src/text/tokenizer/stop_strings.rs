//! Strings that end a generation, found while the text arrives in parts.

/// Cuts a stream of text before the first stop string.
///
/// Text that may be the start of a stop string is held back. The first stop string depends on the text alone, not on its
/// parts: the one that ends first, and the longest of those that end at one place.
#[derive(Clone, Debug)]
pub struct StopStrings {
    matchers: Vec<Matcher>,
    /// Text that is held back: the longest start of a stop string that the text ends with.
    held: String,
    hit: bool,
}

impl StopStrings {
    /// Watch for these strings; empty ones never match.
    pub fn new(stop: &[String]) -> Self {
        let matchers = stop.iter().filter(|stop| !stop.is_empty()).map(|stop| Matcher::new(stop)).collect();
        Self { matchers, held: String::new(), hit: false }
    }

    /// Take more text; returns the text that is certain. After a stop string it is always empty.
    pub fn push(&mut self, text: &str) -> String {
        if self.hit {
            return String::new();
        }
        let num_held = self.held.len();
        self.held.push_str(text);
        for at in num_held..self.held.len() {
            let byte = self.held.as_bytes()[at];
            for matcher in &mut self.matchers {
                matcher.advance(byte);
            }
            let stop_len = self.matchers.iter().filter(|m| m.is_complete()).map(|m| m.stop.len()).max();
            if let Some(stop_len) = stop_len {
                self.hit = true;
                self.held.truncate(at + 1 - stop_len);
                return std::mem::take(&mut self.held);
            }
        }
        // Stop string and text are both UTF-8, so a match of their bytes begins between characters.
        let num_matched = self.matchers.iter().map(|m| m.num_matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - num_matched);
        std::mem::replace(&mut self.held, held)
    }

    /// True if a stop string was found.
    pub fn hit(&self) -> bool {
        self.hit
    }

    /// End the text; returns the text that was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Knuth, Morris and Pratt's automaton for one stop string.
#[derive(Clone, Debug)]
struct Matcher {
    stop: Vec<u8>,
    /// Failure function: for `i + 1` matched bytes, the number that stays matched if the next byte differs.
    fallback: Vec<usize>,
    /// The longest start of `stop` that the text ends with.
    num_matched: usize,
}

impl Matcher {
    fn new(stop: &str) -> Self {
        let stop = stop.as_bytes().to_vec();
        let mut fallback = vec![0; stop.len()];
        for end in 1..stop.len() {
            let mut num_matched = fallback[end - 1];
            while num_matched > 0 && stop[num_matched] != stop[end] {
                num_matched = fallback[num_matched - 1];
            }
            fallback[end] = num_matched + usize::from(stop[num_matched] == stop[end]);
        }
        Self { stop, fallback, num_matched: 0 }
    }

    /// Take the next byte of a text in which `stop` was not complete yet.
    fn advance(&mut self, byte: u8) {
        while self.num_matched > 0 && self.stop[self.num_matched] != byte {
            self.num_matched = self.fallback[self.num_matched - 1];
        }
        self.num_matched += usize::from(self.stop[self.num_matched] == byte);
    }

    fn is_complete(&self) -> bool {
        self.num_matched == self.stop.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stop_strings(stop: &[&str]) -> StopStrings {
        StopStrings::new(&stop.iter().map(|&s| s.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn text_is_cut_before_a_stop_string_that_crosses_pieces() {
        let mut stop = stop_strings(&["\n\n用户："]);
        let pieces = ["一", "\n", "\n\n用", "户：", "rest"].map(|text| stop.push(text));
        assert_eq!(pieces, ["一", "", "\n", "", ""]);
        assert!(stop.hit());
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn text_held_back_in_vain_is_given_out() {
        let mut stop = stop_strings(&["abcd", "bcx"]);
        assert_eq!([stop.push("zab"), stop.push("c"), stop.push("x!")], ["z", "", "a"]);
        let mut stop = stop_strings(&["abcd"]);
        assert_eq!([stop.push("ab"), stop.push("ab"), stop.finish()], ["", "ab", "ab"]);
        assert!(!stop.hit());
    }

    #[test]
    fn no_stop_strings_hold_nothing_back() {
        let mut stop = stop_strings(&[""]);
        assert_eq!(stop.push("text"), "text");
    }

    /// Where the first stop string begins, by trying every end.
    fn slow_cut(text: &str, stop: &[String]) -> Option<usize> {
        let complete = |end: usize| {
            let longest =
                stop.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes())).max_by_key(|s| s.len());
            longest.map(|stop| end - stop.len())
        };
        (0..=text.len()).find_map(complete)
    }

    proptest! {
        #[test]
        fn any_cutting_of_the_text_gives_the_text_before_the_first_stop_string(
            pieces in prop::collection::vec("[aé文b]{0,3}", 0..12),
            stop in prop::collection::vec("[aé文b]{1,4}", 0..4),
        ) {
            let text = pieces.concat();
            let mut streamed = String::new();
            let mut stop_strings = StopStrings::new(&stop);
            for piece in &pieces {
                streamed += &stop_strings.push(piece);
            }
            streamed += &stop_strings.finish();
            let cut = slow_cut(&text, &stop);
            prop_assert_eq!(stop_strings.hit(), cut.is_some());
            prop_assert_eq!(streamed, &text[..cut.unwrap_or(text.len())]);
        }
    }
}
