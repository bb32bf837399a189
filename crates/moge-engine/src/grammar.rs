//! Grammars: which tokens may come next in an answer.
//!
//! A grammar is text in the Lark dialect of `llguidance`, whose rules may hold regular expressions, JSON schemas
//! (`%json {..}`) and special tokens (`<think>`, `<[45974]>`). Rules for text match bytes, and no special token is text.
//! Grammars come from untrusted clients, so their cost is bounded.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{CancellationHandle, Matcher, ParserFactory};
use moge_model::{TokenId, Tokenizer};
use thiserror::Error;

/// Longest grammar. What costs most time takes the square of its length, what costs most stack 2 kB for each byte.
pub const MAX_GRAMMAR_BYTES: usize = 128 << 10;

/// Longest time that a grammar may take to compile, waiting for others included. Nearly all take milliseconds.
const MAX_COMPILE_TIME: Duration = Duration::from_secs(2);

/// Grammars that may compile at the same time, among them those that took too long and are not over yet.
const MAX_COMPILING: usize = 4;

/// Stack of a thread that compiles, enough for the deepest recursion that fits in a grammar: rules that name others, and
/// schemas that refer to others, are compiled by recursion. Nearly all touch a few pages of it.
const STACK_BYTES: usize = 256 << 20;

/// Longer tokens are never sampled under a grammar. The trie of all tokens can be 1024 bytes deep, and what is as long
/// is a run of spaces.
const MAX_TOKEN_BYTES: usize = 1000;

/// Vocabularies below this have room for one more token in the trie's 24-bit ids.
const MAX_TOKENS: u32 = 0xff_ffff - 1;

/// Error of compiling a grammar.
#[derive(Debug, Error)]
pub enum GrammarError {
    /// The vocabulary is beyond what a grammar can look through.
    #[error("vocabulary: {problem}")]
    Vocabulary {
        /// Description of the problem.
        problem: String,
    },
    /// The text is too long.
    #[error("grammar: {num_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are allowed")]
    TooLong {
        /// Its length.
        num_bytes: usize,
    },
    /// The text is not a valid grammar, uses an unsupported feature, or is too large.
    #[error("grammar: {problem}")]
    Invalid {
        /// Description of the problem.
        problem: String,
    },
    /// Compilation took too long.
    #[error("grammar: it takes longer than {} s to compile", MAX_COMPILE_TIME.as_secs())]
    TooSlow,
    /// Other compilations used all of its time. It may be tried again.
    #[error("grammar: {MAX_COMPILING} others are being compiled, no more are allowed at a time")]
    Busy,
    /// The compiler's thread could not be started.
    #[error("grammar: there is no thread to compile it on: {source}")]
    Thread {
        /// The I/O error.
        source: std::io::Error,
    },
}

/// Makes grammars for one vocabulary. Made once, and shared by all threads that take requests.
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    samplable: Arc<[u32]>,
    vocab_size: usize,
    slots: Arc<Slots>,
}

impl GrammarCompiler {
    /// Look through the tokens of `tokenizer` below `vocab_size`, the entries of the model's vocabulary, which may be
    /// more or fewer. `eos_token_ids` end an answer and are no part of it; there may be none. Takes about a second and,
    /// for 150 000 tokens, 55 MB.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] if there are too many tokens.
    pub fn new(
        tokenizer: &Arc<Tokenizer>,
        vocab_size: usize,
        eos_token_ids: &[TokenId],
    ) -> Result<GrammarCompiler, GrammarError> {
        // The library's end of an answer is an id of its own after all others, as there may be no such token, or several.
        let problem = || GrammarError::Vocabulary { problem: format!("{vocab_size} tokens are too many") };
        let end = u32::try_from(vocab_size).ok().filter(|&end| end < MAX_TOKENS).ok_or_else(problem)?;
        let mut words: Vec<Vec<u8>> = (0..end).map(|id| word(tokenizer, TokenId(id))).collect();
        let mut samplable = vec![0; vocab_size.div_ceil(32)];
        for id in (0..end).filter(|&id| !words[id as usize].is_empty() && !eos_token_ids.contains(&TokenId(id))) {
            samplable[id as usize / 32] |= 1 << (id % 32);
        }
        words.push(Vec::new());
        let factory = without_panic(|| {
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
            // Cutting a text into tokens is left to the model: a grammar allows every way that spells it.
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&env).map(|mut factory| {
                factory.quiet();
                *factory.limits_mut() = limits();
                Arc::new(factory)
            })
        });
        let factory = factory.map_err(|problem| GrammarError::Vocabulary { problem })?;
        Ok(GrammarCompiler { factory, samplable: samplable.into(), vocab_size, slots: Arc::new(Slots::default()) })
    }

    /// Compile a grammar. The caller's thread waits for up to two seconds.
    ///
    /// # Errors
    /// [`GrammarError`] if the text is not a valid grammar, or exceeds a limit.
    pub fn compile(&self, lark: &str) -> Result<Grammar, GrammarError> {
        if lark.len() > MAX_GRAMMAR_BYTES {
            return Err(GrammarError::TooLong { num_bytes: lark.len() });
        }
        let start = Instant::now();
        let slot = Slots::take(&self.slots).ok_or(GrammarError::Busy)?;
        let (factory, lark) = (self.factory.clone(), lark.to_owned());
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
        let work = move || {
            let parser = without_panic(|| factory.create_parser(TopLevelGrammar::from_lark(lark)));
            drop(slot);
            // The receiver is gone if the compilation took too long.
            let _ = sender.send(parser.map(|parser| Box::new(Matcher::new(Ok(parser)).into_cancellable())));
        };
        thread.spawn(work).map_err(|source| GrammarError::Thread { source })?;
        match receiver.recv_timeout(MAX_COMPILE_TIME.saturating_sub(start.elapsed())) {
            Ok(Ok(matcher)) => {
                let (samplable, vocab_size) = (self.samplable.clone(), self.vocab_size);
                Ok(Grammar { matcher, unseen: Vec::new(), samplable, vocab_size })
            }
            Ok(Err(problem)) => Err(GrammarError::Invalid { problem }),
            Err(RecvTimeoutError::Timeout) => Err(GrammarError::TooSlow),
            Err(RecvTimeoutError::Disconnected) => Err(GrammarError::Invalid { problem: "the compiler failed".into() }),
        }
    }
}

/// A grammar and how far an answer has come in it. Each request has its own; a clone shares nothing with the original.
pub struct Grammar {
    matcher: Box<Matcher>,
    /// Tokens of the answer that the matcher has not seen yet.
    unseen: Vec<TokenId>,
    /// A bit for each id that has a token which is part of an answer.
    samplable: Arc<[u32]>,
    vocab_size: usize,
}

impl Clone for Grammar {
    fn clone(&self) -> Grammar {
        let matcher = Box::new(self.matcher.deep_clone());
        Grammar { matcher, unseen: self.unseen.clone(), samplable: self.samplable.clone(), vocab_size: self.vocab_size }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

/// The grammar cannot continue: it became too complex, took too long, or no token matches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GrammarFailed;

/// The allowed next tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenMask {
    /// A bit for each token that goes on with the answer.
    pub(crate) words: Vec<u32>,
    /// True if the answer may end here.
    pub(crate) may_end: bool,
}

impl TokenMask {
    fn allows(&self, token: TokenId) -> bool {
        self.words.get(token.0 as usize / 32).is_some_and(|word| word >> (token.0 % 32) & 1 == 1)
    }
}

/// The allowed next tokens, or the grammar's failure.
pub(crate) type MaskResult = Result<TokenMask, GrammarFailed>;

impl Grammar {
    /// Entries of the vocabulary that it was made for.
    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Advance by a token of the last mask; takes effect with the next mask.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.unseen.push(token);
    }

    /// Masks of the next token and of the token after each token of `draft`, up to the first draft token that is not
    /// allowed or after which the grammar fails. The grammar's own position does not change.
    pub(crate) fn next_masks(&mut self, draft: &[TokenId]) -> Vec<MaskResult> {
        let mut masks = vec![self.next_mask()];
        if draft.is_empty() || masks[0].is_err() {
            return masks;
        }
        // The original advances, as the caller can cancel only it; the copy replaces it afterwards.
        let here = Box::new(self.matcher.deep_clone());
        for &token in draft {
            if !matches!(masks.last(), Some(Ok(mask)) if mask.allows(token)) {
                break;
            }
            self.push(token);
            match self.next_mask() {
                Ok(mask) => masks.push(Ok(mask)),
                Err(GrammarFailed) => break,
            }
        }
        self.matcher = here;
        self.unseen.clear();
        masks
    }

    /// Mask of the next token. Takes about a millisecond for most grammars, and much longer for some.
    pub(crate) fn next_mask(&mut self) -> MaskResult {
        for token in self.unseen.drain(..) {
            self.matcher.consume_token(token.0).map_err(|_| GrammarFailed)?;
        }
        match self.matcher.stop_reason() {
            StopReason::NotStopped => {}
            reason if reason.is_ok() => return Ok(TokenMask { words: vec![0; self.samplable.len()], may_end: true }),
            _ => return Err(GrammarFailed),
        }
        let may_end = self.matcher.is_accepting().map_err(|_| GrammarFailed)?;
        let mask = self.matcher.compute_mask().map_err(|_| GrammarFailed)?;
        let words = mask.as_slice().iter().zip(&*self.samplable).map(|(mask, samplable)| mask & samplable);
        Ok(TokenMask { words: words.collect(), may_end })
    }

    /// Handle that makes a mask computed by another thread fail soon.
    pub(crate) fn cancellation(&self) -> Option<CancellationHandle> {
        self.matcher.cancellation_handle()
    }
}

/// Counts the grammars that compile.
#[derive(Default)]
struct Slots {
    num_taken: Mutex<usize>,
    given_back: Condvar,
}

/// The right to compile a grammar, given back when dropped.
struct Slot(Arc<Slots>);

impl Slots {
    /// Wait for a slot, `None` if none comes in time.
    fn take(slots: &Arc<Slots>) -> Option<Slot> {
        let num_taken = slots.num_taken.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = slots.given_back.wait_timeout_while(num_taken, MAX_COMPILE_TIME, |num| *num >= MAX_COMPILING);
        let (mut num_taken, wait) = wait.unwrap_or_else(PoisonError::into_inner);
        if wait.timed_out() {
            return None;
        }
        *num_taken += 1;
        Some(Slot(slots.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.num_taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.given_back.notify_one();
    }
}

fn limits() -> ParserLimits {
    ParserLimits {
        // Each takes 1 or 2 kB.
        max_lexer_states: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// A token as the grammar sees it: its bytes, or for a special token its name after a byte that occurs in no text. Empty
/// for an id without a token.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    let word = if tokenizer.is_special(id) {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], tokenizer.piece(id).as_bytes()].concat()
    } else {
        tokenizer.token_bytes(id)
    };
    // No text holds the marker, so a token that begins with it and has no name is of no use.
    let is_nameless = word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) && !tokenizer.is_special(id);
    if is_nameless || word.len() > MAX_TOKEN_BYTES { Vec::new() } else { word }
}

/// Call the library, which meets some of what it did not expect with a panic.
fn without_panic<T, E: fmt::Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    // Nothing of what the call borrows is looked at after a panic.
    match catch_unwind(AssertUnwindSafe(call)) {
        // The library catches some panics itself, and tells them with all it can say about where they were.
        Ok(Err(error)) => Err(error.to_string().split("\n<backtrace>").next().unwrap_or_default().to_owned()),
        Ok(Ok(value)) => Ok(value),
        Err(_) => Err("the llguidance library panicked".into()),
    }
}

#[cfg(test)]
mod tests;
