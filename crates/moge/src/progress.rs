//! Progress bars, hidden where standard error is no terminal.

use std::borrow::Cow;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that counts bytes and shows rate and time left.
pub(crate) fn bytes(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .expect("the template is right");
    ProgressBar::no_length().with_style(style).with_message(what)
}

/// A bar that counts `num_items` things and shows the time left.
pub(crate) fn items(what: impl Into<Cow<'static, str>>, num_items: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}").expect("the template is right");
    ProgressBar::new(num_items as u64).with_style(style).with_message(what)
}

/// Set a bar's place and end.
pub(crate) fn set(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}
