//! The comparison as a table for people, as Markdown and as JSON.

use serde_json::{Value, json};

use super::cases::Case;
use super::measure::{OURS, Rates};

/// What was found of one case.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    case: String,
    /// Rates of every configuration of llama.cpp, the best one first: those that were worth repeating, by median.
    peers: Vec<(String, Vec<f64>)>,
    ours: Vec<f64>,
}

impl Row {
    /// The measurements of `case`, if there are any of llama.cpp.
    pub(crate) fn of(case: &Case, rates: &Rates) -> Option<Row> {
        let rates_of = |engine: &str| rates.get(&(case.name(), engine.to_string())).cloned().unwrap_or_default();
        let mut peers: Vec<(String, Vec<f64>)> = case
            .peer_configs()
            .iter()
            .map(|config| (config.name(), rates_of(&config.name())))
            .filter(|(_, rates)| !rates.is_empty())
            .collect();
        peers.sort_by(|(_, a), (_, b)| b.len().cmp(&a.len()).then(median(b).total_cmp(&median(a))));
        (!peers.is_empty()).then(|| Row { case: case.name(), peers, ours: rates_of(OURS) })
    }

    /// Median over the repetitions of our rate over that of llama.cpp's best configuration beside it.
    fn ratio(&self) -> Option<f64> {
        let pairs: Vec<f64> = self.ours.iter().zip(&self.peers[0].1).map(|(ours, peer)| ours / peer).collect();
        (!pairs.is_empty()).then(|| median(&pairs))
    }
}

/// The middle value; of an even number, the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (low + high) / 2.0
}

const TITLES: [&str; 5] = ["case", "llama.cpp's best", "its tokens/s", "moge tokens/s", "ratio"];

fn cells(row: &Row) -> [String; 5] {
    let (config, rates) = &row.peers[0];
    let ours = if row.ours.is_empty() { "-".to_string() } else { format!("{:.2}", median(&row.ours)) };
    let ratio = row.ratio().map_or("-".to_string(), |ratio| format!("{ratio:.2}"));
    [row.case.clone(), config.clone(), format!("{:.2}", median(rates)), ours, ratio]
}

/// Medians, in columns; then, of every configuration of llama.cpp, what it measured.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut lines: Vec<[String; 5]> = vec![TITLES.map(str::to_string)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    lines
        .iter()
        .map(|line| {
            let [a, b, c, d, e] = widths;
            let [case, config, theirs, ours, ratio] = line;
            format!("{case:a$}  {config:b$}  {theirs:>c$}  {ours:>d$}  {ratio:>e$}\n")
        })
        .collect()
}

/// The same for a page, with every measurement.
pub(crate) fn to_markdown(rows: &[Row], about: &Value) -> String {
    let mut page = String::from("# moge and llama.cpp, in turn on one machine\n\n");
    if let Some(facts) = about.as_object() {
        facts.iter().for_each(|(name, fact)| {
            page += &format!("- {name}: {}\n", fact.as_str().map_or(fact.to_string(), str::to_string))
        });
    }
    page += &format!("\n| {} |\n|---|---|---|---|---|\n", TITLES.join(" | "));
    rows.iter().for_each(|row| page += &format!("| {} |\n", cells(row).join(" | ")));
    page += "\nMedians; the ratio is the median of the ratios of neighbouring measurements. All measurements, tokens/s:\n\n";
    for row in rows {
        let ours = [("moge".to_string(), row.ours.clone())];
        for (engine, rates) in row.peers.iter().chain(&ours).filter(|(_, rates)| !rates.is_empty()) {
            let rates: Vec<String> = rates.iter().map(|rate| format!("{rate:.2}")).collect();
            page += &format!("- {}, {engine}: {}\n", row.case, rates.join(", "));
        }
    }
    page
}

/// The same for programs.
pub(crate) fn to_json(rows: &[Row], about: &Value) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let peers: Vec<Value> = row
                .peers
                .iter()
                .map(|(config, rates)| json!({ "config": config, "tokens_per_s": median(rates), "all": rates }))
                .collect();
            let ours = (!row.ours.is_empty()).then(|| median(&row.ours));
            json!({
                "case": row.case,
                "llama_cpp": peers,
                "moge": { "tokens_per_s": ours, "all": row.ours },
                "ratio": row.ratio(),
            })
        })
        .collect();
    json!({ "about": about, "cases": rows })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Row, median, table, to_json, to_markdown};
    use crate::peers::cases::all_cases;
    use crate::peers::measure::{OURS, Rates};

    /// Two configurations of llama.cpp, of which the second is better, and ours twice; a case that only llama.cpp ran.
    fn rows() -> Vec<Row> {
        let [first, second] = [all_cases()[0], all_cases()[1]];
        let mut rates = Rates::new();
        let mut put =
            |case: String, engine: &str, found: &[f64]| rates.insert((case, engine.to_string()), found.to_vec());
        put(first.name(), "Q4_0", &[90.0]);
        put(first.name(), "Q4_K_M, not repacked", &[110.0, 130.0, 121.0]);
        put(first.name(), OURS, &[440.0, 390.0, 484.0]);
        put(second.name(), "Q4_0", &[20.0]);
        let rows: Vec<Row> = all_cases().iter().filter_map(|case| Row::of(case, &rates)).collect();
        assert_eq!(rows.len(), 2);
        rows
    }

    #[test]
    fn the_ratio_is_the_median_of_neighbours_against_the_best_configuration() {
        // 440 / 110, 390 / 130 and 484 / 121; the ratio of the medians would be 3.64.
        assert_eq!(rows()[0].ratio(), Some(4.0));
        assert_eq!(rows()[1].ratio(), None);
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
    }

    #[test]
    fn the_table_has_a_line_per_case_and_aligned_columns() {
        let expected = "\
case                               llama.cpp's best      its tokens/s  moge tokens/s  ratio
pangu-pro-moe-4l/w4a8/prefill-512  Q4_K_M, not repacked        121.00         440.00   4.00
";
        assert_eq!(table(&rows()[..1]), expected);
        assert!(table(&rows()).ends_with("20.00              -      -\n"));
    }

    #[test]
    fn reports_say_what_was_measured_and_how() {
        let about = json!({ "threads": 3, "llama.cpp": "from x" });
        let page = to_markdown(&rows(), &about);
        assert!(page.contains("- threads: 3\n- llama.cpp: from x\n"), "{page}");
        assert!(page.contains("| pangu-pro-moe-4l/w4a8/prefill-512 | Q4_K_M, not repacked | 121.00 | 440.00 | 4.00 |"));
        assert!(page.contains("prefill-512, Q4_K_M, not repacked: 110.00, 130.00, 121.00\n"), "{page}");
        let report = to_json(&rows(), &about);
        assert_eq!(report["about"], about);
        assert_eq!(report["cases"][0]["llama_cpp"][0]["tokens_per_s"], 121.0);
        assert_eq!(report["cases"][0]["moge"]["all"], json!([440.0, 390.0, 484.0]));
        assert_eq!(report["cases"][1]["moge"]["tokens_per_s"], json!(null));
    }
}
