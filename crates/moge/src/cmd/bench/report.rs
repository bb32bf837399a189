//! What was measured, as JSON and as a table.

use std::fmt;
use std::time::Duration;

use moge_model::{Operator, Profile};
use serde::Serialize;

use super::case::Case;
use super::roofline::{Ceiling, CeilingReport};
use crate::output::plain;

/// Everything: the JSON object. Shown, it is what stands above the rows of the cases.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    /// How the weights are stored.
    pub(crate) weights: String,
    pub(crate) activations: String,
    pub(crate) kv: String,
    pub(crate) isa: &'static str,
    pub(crate) threads: usize,
    /// As they were before the cases.
    pub(crate) ceilings: CeilingReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) start: Option<StartReport>,
    pub(crate) cases: Vec<CaseReport>,
}

/// How long it took until the first token of a prompt of `tokens`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct StartReport {
    tokens: usize,
    load_ms: f64,
    prefill_ms: f64,
    first_token_ms: f64,
}

impl StartReport {
    pub(crate) fn new(tokens: usize, load: Duration, prefill: Duration) -> StartReport {
        let [load_ms, prefill_ms] = [load, prefill].map(|time| time.as_secs_f64() * 1e3);
        StartReport { tokens, load_ms, prefill_ms, first_token_ms: load_ms + prefill_ms }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { model, weights, activations, kv, isa, threads, ceilings, .. } = self;
        writeln!(f, "model     {}, weights {weights}, activations {activations}, KV cache {kv}", plain(model))?;
        writeln!(f, "machine   {isa}, {threads} threads")?;
        writeln!(f, "ceilings  {ceilings}")?;
        if let Some(StartReport { tokens, load_ms, prefill_ms, first_token_ms }) = self.start {
            let parts = format!("{load_ms:.0} ms loading, {prefill_ms:.0} ms for {tokens} tokens");
            writeln!(f, "start     {first_token_ms:.0} ms to the first token: {parts}")?;
        }
        write!(f, "\n{TABLE_HEAD}")
    }
}

/// One run of a case, with the ceiling around it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Repetition {
    /// Time of the steps.
    pub(crate) seconds: f64,
    /// Operations, or bytes read, as the ceiling has it.
    pub(crate) work: f64,
    /// Operations or bytes per second that the machine reached just before and just after.
    pub(crate) ceiling: f64,
    /// Summed over routed layers and steps.
    pub(crate) experts_hit: usize,
    /// Routed layers, counted in each step.
    pub(crate) routed_layers: usize,
}

/// The repetitions of a case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct CaseReport {
    #[serde(skip)]
    case: Case,
    kind: &'static str,
    tokens: usize,
    batch: usize,
    context: usize,
    repetitions: usize,
    /// Median over the repetitions, as all rates.
    tokens_per_s: f64,
    tokens_per_s_min: f64,
    tokens_per_s_max: f64,
    #[serde(flatten)]
    rate: Rate,
    ceiling: Ceiling,
    /// Median of the ratios of each repetition to the ceiling around it.
    share_of_ceiling: f64,
    /// Mean over routed layers and steps; null for a dense model.
    experts_hit: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Vec<OperatorTime>>,
}

/// Work per second beside what the machine can do, in billions.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
enum Rate {
    Operations { gop_s: f64, ceiling_gop_s: f64 },
    Bytes { gb_s: f64, ceiling_gb_s: f64 },
}

/// Where the time of a step goes.
#[derive(Clone, Copy, Debug, Serialize)]
struct OperatorTime {
    operator: &'static str,
    ms_per_step: f64,
    share: f64,
}

impl OperatorTime {
    /// The operators of a network, from the profile of `num_steps` steps.
    fn list(profile: &Profile, num_steps: usize) -> Vec<OperatorTime> {
        let total = profile.total().as_secs_f64();
        let times = Operator::ALL.iter().map(|&operator| (operator, profile.time(operator).as_secs_f64()));
        let times = times.filter(|(_, seconds)| *seconds > 0.0).map(|(operator, seconds)| OperatorTime {
            operator: operator.name(),
            ms_per_step: seconds * 1e3 / num_steps as f64,
            share: seconds / total,
        });
        times.collect()
    }
}

impl CaseReport {
    /// Sum up `repetitions`, of which there is at least one.
    pub(crate) fn new(
        case: Case,
        ceiling: Ceiling,
        repetitions: &[Repetition],
        profile: Option<&Profile>,
    ) -> CaseReport {
        let sorted = |value: &dyn Fn(&Repetition) -> f64| {
            let mut values: Vec<f64> = repetitions.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let num_tokens = (case.tokens() * case.batch()) as f64;
        let tokens_per_s = sorted(&|repetition| num_tokens / repetition.seconds);
        let rate = median(&sorted(&|repetition| repetition.work / repetition.seconds)) / 1e9;
        let best = median(&sorted(&|repetition| repetition.ceiling)) / 1e9;
        let sum = |count: &dyn Fn(&Repetition) -> usize| repetitions.iter().map(count).sum::<usize>();
        let (experts_hit, routed_layers) = (sum(&|r| r.experts_hit), sum(&|r| r.routed_layers));
        CaseReport {
            case,
            kind: case.kind(),
            tokens: case.tokens(),
            batch: case.batch(),
            context: case.context(),
            repetitions: repetitions.len(),
            tokens_per_s: median(&tokens_per_s),
            tokens_per_s_min: tokens_per_s[0],
            tokens_per_s_max: tokens_per_s[tokens_per_s.len() - 1],
            rate: match ceiling {
                Ceiling::Memory => Rate::Bytes { gb_s: rate, ceiling_gb_s: best },
                Ceiling::Int8 | Ceiling::Bf16 => Rate::Operations { gop_s: rate, ceiling_gop_s: best },
            },
            ceiling,
            share_of_ceiling: median(&sorted(&|r| r.work / r.seconds / r.ceiling)),
            experts_hit: (routed_layers > 0).then(|| experts_hit as f64 / routed_layers as f64),
            profile: profile.map(|profile| OperatorTime::list(profile, case.num_steps() * repetitions.len())),
        }
    }
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

/// The names of the table's columns.
const TABLE_HEAD: &str = "case                             tokens/s       min       max           rate      ceiling         share  experts hit";

/// A row of the table, and lines for the profile below it.
impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CaseReport { tokens_per_s, tokens_per_s_min, tokens_per_s_max, ceiling, .. } = self;
        write!(f, "{:30} {tokens_per_s:10.2}{tokens_per_s_min:10.2}{tokens_per_s_max:10.2}", self.case.to_string())?;
        let (rate, best, unit) = match self.rate {
            Rate::Operations { gop_s, ceiling_gop_s } => (gop_s, ceiling_gop_s, "GOP/s"),
            Rate::Bytes { gb_s, ceiling_gb_s } => (gb_s, ceiling_gb_s, "GB/s"),
        };
        let share = 100.0 * self.share_of_ceiling;
        write!(f, "{rate:9.1} {unit:5} {best:8.1} {:7}{share:6.0} %", ceiling.to_string())?;
        if let Some(experts_hit) = self.experts_hit {
            write!(f, "{experts_hit:13.1}")?;
        }
        for OperatorTime { operator, ms_per_step, share } in self.profile.iter().flatten() {
            write!(f, "\n  {operator:28} {ms_per_step:10.3} ms a step {:6.1} %", 100.0 * share)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_holds_medians_and_the_median_of_paired_ratios() {
        let case = Case::Decode { steps: 3, batch: 2, context: 7 };
        // 6 tokens in 1, 2 and 4 seconds; 0.5, 0.2 and 0.25 of the ceiling.
        let repetition =
            |seconds, ceiling| Repetition { seconds, work: 8e9, ceiling, experts_hit: 27, routed_layers: 6 };
        let repetitions = [repetition(1.0, 16e9), repetition(2.0, 20e9), repetition(4.0, 8e9)];
        let report = CaseReport::new(case, Ceiling::Memory, &repetitions, None);
        let expected = serde_json::json!({
            "kind": "decode", "tokens": 3, "batch": 2, "context": 7, "repetitions": 3,
            "tokens_per_s": 3.0, "tokens_per_s_min": 1.5, "tokens_per_s_max": 6.0,
            "gb_s": 4.0, "ceiling_gb_s": 16.0, "ceiling": "memory", "share_of_ceiling": 0.25, "experts_hit": 4.5,
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
        let row = report.to_string();
        let [head, row] = [TABLE_HEAD, &row].map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        assert_eq!(head, "case tokens/s min max rate ceiling share experts hit");
        assert_eq!(row, "decode batch 2, context 7 3.00 1.50 6.00 4.0 GB/s 16.0 memory 25 % 4.5");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
