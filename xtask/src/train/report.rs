//! What was measured of each engine, and the comparison.

use std::time::Duration;

use super::options::Options;
use super::session::{Session, median};
use super::{Engine, Model};

/// The losses of an engine that computes in f32 may differ from PyTorch's by this much, at any step.
const LOSS_TOLERANCE: f64 = 1e-3;

/// One engine on one model.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) model: &'static str,
    pub(crate) engine: Engine,
    /// One of each round, as long as the engine is worth repeating.
    pub(crate) sessions: Vec<Session>,
    /// The largest difference of a step's loss from that of the first engine.
    loss_difference: Option<f64>,
}

impl Row {
    pub(crate) fn new(model: &Model, engine: Engine) -> Row {
        Row { model: model.preset, engine, sessions: Vec::new(), loss_difference: None }
    }

    /// Tokens per second, by the median of the rounds; zero if there is none.
    pub(crate) fn rate(&self) -> f64 {
        if self.sessions.is_empty() { 0.0 } else { median(self.sessions.iter().map(Session::tokens_per_s)) }
    }

    pub(crate) fn slowest_session(&self) -> Duration {
        self.sessions.iter().map(|session| session.duration).max().unwrap_or_default()
    }

    /// The losses are not those they should be. bf16 rounds in other places than PyTorch's autocast does.
    pub(crate) fn is_wrong(&self) -> bool {
        // A loss that is not a number differs too.
        let differs = |difference: f64| difference.is_nan() || difference > LOSS_TOLERANCE;
        self.engine == Engine::Moge("f32") && self.loss_difference.is_some_and(differs)
    }
}

/// The fastest engine of one of the programs, if any of it was measured.
pub(crate) fn best(rows: &[Row], ours: bool) -> Option<&Row> {
    let measured = rows.iter().filter(|row| row.engine.is_ours() == ours && !row.sessions.is_empty());
    measured.max_by(|a, b| a.rate().total_cmp(&b.rate()))
}

/// Hold the losses of all engines of a model to those of the first.
pub(crate) fn compare_losses(rows: &mut [Row]) {
    let losses = |row: &Row| -> Vec<f64> {
        row.sessions.first().map_or(Vec::new(), |session| session.steps.iter().map(|step| step.loss).collect())
    };
    let Some((first, others)) = rows.split_first_mut() else { return };
    let expected = losses(first);
    for row in others.iter_mut().filter(|row| !row.sessions.is_empty()) {
        let differences = losses(row).into_iter().zip(&expected).map(|(found, expected)| (found - expected).abs());
        // `f64::max` would pass over what is not a number.
        row.loss_difference = differences.reduce(|a, b| if a.is_nan() || a > b { a } else { b });
    }
}

/// Median over the rounds of our best rate over PyTorch's best in the same round.
fn ratio(rows: &[Row]) -> Option<f64> {
    let (ours, theirs) = (best(rows, true)?, best(rows, false)?);
    let rates = |row: &Row| row.sessions.iter().map(Session::tokens_per_s).collect::<Vec<f64>>();
    Some(median(rates(ours).into_iter().zip(rates(theirs)).map(|(ours, theirs)| ours / theirs)))
}

const TITLES: [&str; 7] = ["model", "engine", "tokens/s", "GFLOP/s", "share of peak", "peak memory", "loss differs by"];

fn cells(row: &Row, peak_flops_per_s: Option<f64>) -> [String; 7] {
    let Some(session) = row.sessions.first() else {
        let none = || "-".to_string();
        return [row.model.to_string(), row.engine.name(), "far slower".to_string(), none(), none(), none(), none()];
    };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
    let flops_per_s = row.rate() * session.flops_per_token();
    [
        row.model.to_string(),
        row.engine.name(),
        format!("{:.0}", row.rate()),
        format!("{:.0}", flops_per_s / 1e9),
        or_dash(peak_flops_per_s.map(|peak| format!("{:.0} %", 100.0 * flops_per_s / peak))),
        or_dash(session.peak_bytes.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9))),
        or_dash(row.loss_difference.map(|difference| format!("{difference:.1e}"))),
    ]
}

/// A table in Markdown that can be read as it is, with the ratio of each model below.
pub(crate) fn table(rows: &[Row]) -> String {
    let of_models = || rows.chunk_by(|a, b| a.model == b.model);
    let mut lines = vec![TITLES.map(str::to_string)];
    for rows in of_models() {
        let peaks: Vec<f64> = rows.iter().flat_map(|row| &row.sessions).filter_map(Session::peak_flops_per_s).collect();
        let peak = (!peaks.is_empty()).then(|| median(peaks));
        lines.extend(rows.iter().map(|row| cells(row, peak)));
    }
    let widths: [usize; 7] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0));
    lines.insert(1, widths.map(|width| "-".repeat(width)));
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text.push('\n');
    for rows in of_models() {
        if let Some(ratio) = ratio(rows) {
            text += &format!("{}: moge trains {ratio:.2} x as fast as PyTorch\n", rows[0].model);
        }
    }
    text
}

/// The table with what it is of, and every measurement.
pub(crate) fn page(rows: &[Row], options: &Options) -> String {
    let Options { num_threads, num_rounds, num_steps, .. } = options;
    let mut page = format!(
        "# Training beside eager PyTorch, in turn on one machine\n\n\
         {num_threads} threads, {num_rounds} rounds of {num_steps} steps, of which the first is not counted. A step is \
         forward, backward, clipping and AdamW. Operations are six for each token and each weight of the matrices that it is \
         multiplied with. The ratio is the median over rounds of the best engines of both programs.\n\n{}\n\
         All rounds, tokens/s:\n\n",
        table(rows)
    );
    for row in rows.iter().filter(|row| !row.sessions.is_empty()) {
        let rates: Vec<String> = row.sessions.iter().map(|session| format!("{:.0}", session.tokens_per_s())).collect();
        page += &format!("- {}, {}: {}\n", row.model, row.engine.name(), rates.join(", "));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::MODELS;
    use crate::train::session::Step;

    /// Sessions of two steps of 100 tokens, of which the second takes so many seconds.
    fn row(engine: Engine, seconds: &[f64], losses: [f64; 2], peak_flops_per_s: Option<f64>) -> Row {
        let session = |&seconds: &f64| Session {
            steps: losses.map(|loss| Step { loss, seconds, tokens: 100.0, flops: 3e11, peak_flops_per_s }).to_vec(),
            duration: Duration::from_secs(7),
            peak_bytes: Some(2_500_000_000),
        };
        Row { sessions: seconds.iter().map(session).collect(), ..Row::new(&MODELS[0], engine) }
    }

    fn rows() -> Vec<Row> {
        let mut rows = vec![
            row(Engine::PyTorch("f32"), &[4.0, 5.0, 10.0], [8.5, 7.5], None),
            row(Engine::Moge("f32"), &[2.0, 2.0, 4.0], [8.5, 7.5003], Some(2e11)),
            row(Engine::PyTorch("bf16"), &[], [0.0; 2], None),
            row(Engine::Moge("bf16"), &[8.0], [8.52, 7.4], Some(2e11)),
        ];
        compare_losses(&mut rows);
        rows
    }

    #[test]
    fn the_ratio_is_the_median_over_rounds_of_the_best_engines() {
        assert_eq!(ratio(&rows()), Some(2.5));
        assert_eq!(ratio(&rows()[..1]), None);
    }

    #[test]
    fn a_loss_that_is_another_one_or_none_is_wrong_where_we_compute_in_f32() {
        let wrong = |engine, losses| {
            let mut rows = [row(Engine::PyTorch("f32"), &[1.0], [8.5, 7.5], None), row(engine, &[1.0], losses, None)];
            compare_losses(&mut rows);
            rows[1].is_wrong()
        };
        assert!(!wrong(Engine::Moge("f32"), [8.5, 7.5009]));
        assert!(wrong(Engine::Moge("f32"), [8.5, 7.4985]));
        assert!(wrong(Engine::Moge("f32"), [f64::NAN, 7.5]));
        assert!(!wrong(Engine::Moge("bf16"), [8.52, 7.4]));
    }

    #[test]
    fn the_table_shows_every_engine_and_the_page_every_round() {
        let expected = "\
| model     | engine                | tokens/s   | GFLOP/s | share of peak | peak memory | loss differs by |
| --------- | --------------------- | ---------- | ------- | ------------- | ----------- | --------------- |
| train-22m | PyTorch f32           | 20         | 60      | 30 %          | 2.50 GB     | -               |
| train-22m | moge f32              | 50         | 150     | 75 %          | 2.50 GB     | 3.0e-4          |
| train-22m | PyTorch bf16 autocast | far slower | -       | -             | -           | -               |
| train-22m | moge bf16             | 12         | 38      | 19 %          | 2.50 GB     | 1.0e-1          |

train-22m: moge trains 2.50 x as fast as PyTorch
";
        assert_eq!(table(&rows()), expected);
        let page = page(&rows(), &Options::parse(&[]).unwrap());
        assert!(page.contains(expected) && page.contains("- train-22m, PyTorch f32: 25, 20, 10\n"), "{page}");
        assert!(!page.contains("bf16 autocast:"), "{page}");
    }
}
