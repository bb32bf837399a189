//! `report.html`: a training's `metrics.jsonl` as one page of pictures that needs no network and no scripts.

mod chart;
mod heat_map;
mod history;
mod html;
mod scale;

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use moge_model::{MoeConfig, write_file};
use thiserror::Error;

use crate::metrics::{MetricsError, StepMetrics, read_metrics};
use chart::{Chart, Line};
use heat_map::{LayersMap, TimeMap};
use history::{History, PhaseSpan};
use html::{STYLE, escape};
use scale::{Division, duration, short};

/// What a report needs beside the metrics.
#[derive(Clone, Debug)]
pub struct Report {
    /// `metrics.jsonl` of the training.
    pub metrics: PathBuf,
    /// What the page is called.
    pub title: String,
    /// The shape of routed layers, if the network has any.
    pub moe: Option<MoeConfig>,
    /// Devices that the imbalance score is computed for; by default one for each expert group.
    pub num_devices: Option<usize>,
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The metrics cannot be read, or the report not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Experts cannot be spread evenly over the devices.
    #[error("{found} devices: they must be a divisor of the {num_experts} experts")]
    Devices {
        /// The devices asked for.
        found: usize,
        /// Routed experts of a layer.
        num_experts: usize,
    },
}

impl Report {
    /// Read the metrics and write the page to `path`, whole or not at all.
    ///
    /// # Errors
    /// If the metrics cannot be read, the number of devices does not divide that of the experts, or the file system
    /// refuses.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        let num_devices = self.num_devices()?;
        let mut history = History::default();
        read_metrics(&self.metrics, |step| history.add(step, self.moe.as_ref(), num_devices))?;
        let page = Page { title: &self.title, history: &history, moe: self.moe.as_ref(), num_devices };
        write_file(path, page.to_string().as_bytes()).map_err(MetricsError::from)?;
        Ok(())
    }

    /// The number of devices, checked; 1 where there are no routed experts.
    ///
    /// # Errors
    /// If it does not divide the number of experts.
    pub fn num_devices(&self) -> Result<usize, ReportError> {
        let Some(moe) = &self.moe else { return Ok(1) };
        let found = self.num_devices.unwrap_or(moe.num_expert_groups());
        // 0 divides nothing; `is_multiple_of` says so.
        if !moe.num_experts.is_multiple_of(found) {
            return Err(ReportError::Devices { found, num_experts: moe.num_experts });
        }
        Ok(found)
    }
}

struct Page<'a> {
    title: &'a str,
    history: &'a History,
    moe: Option<&'a MoeConfig>,
    num_devices: usize,
}

impl Display for Page<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let title = escape(self.title);
        writeln!(f, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>")?;
        writeln!(f, "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">")?;
        writeln!(f, "<style>{STYLE}</style></head><body>\n<h1>{title}</h1>")?;
        if self.history.steps.is_empty() {
            return writeln!(f, "<p>No step is done yet.</p></body></html>");
        }
        self.phases(f)?;
        writeln!(f, "<h2>Training</h2><div class=\"charts\">")?;
        self.charts(f)?;
        writeln!(f, "</div>")?;
        if let Some(moe) = self.moe {
            self.experts(f, moe)?;
        }
        writeln!(f, "</body></html>")
    }
}

impl Page<'_> {
    /// A table with a row for each phase.
    fn phases(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "<table><tr><th>phase</th><th>steps</th><th>tokens</th><th>time</th><th>tokens/s</th>")?;
        writeln!(f, "<th>first loss</th><th>last loss</th></tr>")?;
        let steps = &self.history.steps;
        for PhaseSpan { name, range, .. } in &self.history.phases {
            let before = range.start.checked_sub(1).map_or(0, |index| steps[index].tokens);
            let (first, last) = (&steps[range.start], &steps[range.end - 1]);
            let tokens = last.tokens.saturating_sub(before) as f64;
            let seconds: f64 = steps[range.clone()].iter().map(|step| step.seconds).sum();
            let rate = if seconds > 0.0 { tokens / seconds } else { 0.0 };
            let num_steps = short(range.len() as f64);
            let [tokens, rate, first, last] = [tokens, rate, first.loss, last.loss].map(short);
            let cells = [escape(name), num_steps, tokens, duration(seconds), rate, first, last];
            writeln!(f, "<tr>{}</tr>", cells.map(|cell| format!("<td>{cell}</td>")).concat())?;
        }
        writeln!(f, "</table>")
    }

    fn charts(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let loss = [self.line("loss", |step| step.loss)];
        self.chart(f, ["Loss", "nats per token"], Division::Linear, &loss)?;
        let rate = [self.line("learning rate", |step| step.learning_rate)];
        self.chart(f, ["Learning rate", "per step"], Division::FromZero, &rate)?;
        let norm = [self.line("gradient norm", |step| step.grad_norm)];
        self.chart(f, ["Gradient norm before clipping", "norm, logarithmic"], Division::Logarithmic, &norm)?;
        let speed = [self.line("tokens/s", |step| step.tokens_per_s)];
        self.chart(f, ["Speed", "tokens/s"], Division::FromZero, &speed)?;
        let share = [self.line("share", |step| 100.0 * step.peak_share)];
        self.chart(f, ["Share of the machine's measured peak", "%"], Division::FromZero, &share)?;
        let losses = [self.line("auxiliary", |step| step.aux_loss), self.line("z", |step| step.z_loss)];
        if losses.iter().flat_map(|line| &line.points).any(|point| point[1] != 0.0) {
            self.chart(f, ["Routing losses, coefficients included", "loss"], Division::FromZero, &losses)?;
        }
        Ok(())
    }

    /// The load of experts and how even it is.
    fn experts(&self, f: &mut Formatter<'_>, moe: &MoeConfig) -> fmt::Result {
        let Some(end) = self.history.end() else { return Ok(()) };
        writeln!(f, "<h2>Balance between {} devices</h2><div class=\"charts\">", self.num_devices)?;
        let points = self.history.steps.iter().zip(&self.history.imbalance);
        let points = points.map(|(step, &score)| [step.step as f64, score]).collect();
        let unit = "expert computations per token";
        self.chart(
            f,
            ["Imbalance score, mean of the layers", unit],
            Division::FromZero,
            &[Line { label: "", points }],
        )?;
        writeln!(f, "</div><p>The expert computations of the busiest device less those of the idlest one, by the ")?;
        writeln!(f, "tokens of the step; each device holds {} experts.", moe.num_experts / self.num_devices)?;
        writeln!(f, "It is 0 by construction where devices hold whole expert groups.</p>")?;
        writeln!(f, "<h2>Load of each expert inside its expert group</h2>")?;
        let (num_groups, size, taken) = (moe.num_expert_groups(), moe.experts_per_group(), moe.top_k_per_group());
        writeln!(f, "<p>{num_groups} expert groups of {size} experts, of which a token takes {taken}. ")?;
        writeln!(f, "Grey is an even share of the expert group's rows.</p>")?;
        let key = "<span class=\"key more\">twice and more</span><span class=\"key less\">half and less</span>";
        writeln!(f, "<figure><figcaption><b>Steps {} to {}</b>{key}</figcaption>", end.first_step, end.last_step)?;
        writeln!(f, "{}</figure>", LayersMap { bin: &end, moe })?;
        // A shallow, a middle and a deep layer, as in arXiv 2505.21411 §5.4; fewer where they are the same.
        let last = end.load.len() - 1;
        let mut layers = vec![0, last / 2, last];
        layers.dedup();
        for layer in layers {
            let map = TimeMap { history: self.history, layer, moe };
            writeln!(f, "<figure><figcaption><b>Layer {layer} over time</b>{key}</figcaption>{map}</figure>")?;
        }
        Ok(())
    }

    fn line(&self, label: &'static str, value: impl Fn(&StepMetrics) -> f64) -> Line {
        Line { label, points: self.history.steps.iter().map(|step| [step.step as f64, value(step)]).collect() }
    }

    fn chart(
        &self,
        f: &mut Formatter<'_>,
        [title, unit]: [&str; 2],
        division: Division,
        lines: &[Line],
    ) -> fmt::Result {
        Chart { title, unit, division, lines, phases: &self.history.phases }.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::metrics::MetricsLog;
    use crate::metrics::tests::metrics;

    const MOE: MoeConfig = MoeConfig {
        num_experts: 3,
        router: moge_model::Router::GroupedSoftmax { num_expert_groups: 1, top_k_per_group: 2 },
        router_scale: true,
        expert_intermediate_size: 5,
        shared_intermediate_size: None,
    };

    /// The page for `num_steps` steps; the last one is `change`d.
    fn page(num_steps: u64, moe: Option<MoeConfig>, change: impl Fn(&mut StepMetrics)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for step in 1..=num_steps {
            let mut metrics = metrics(step);
            if moe.is_none() {
                metrics.expert_load.clear();
            }
            if step == num_steps {
                change(&mut metrics);
            }
            log.append(&metrics).unwrap();
        }
        let report = Report { metrics: path, title: "runs/<first>".to_string(), moe, num_devices: None };
        let out = dir.path().join("report.html");
        report.write(&out).unwrap();
        fs::read_to_string(out).unwrap()
    }

    /// Every element that begins ends, in the right order.
    #[track_caller]
    fn assert_well_formed(page: &str) {
        let mut open = Vec::new();
        for (start, _) in page.match_indices('<').filter(|(start, _)| !page[*start..].starts_with("<!")) {
            let tag = &page[start + 1..start + page[start..].find('>').unwrap()];
            let name = tag.split_whitespace().next().unwrap().trim_end_matches('/');
            match tag.strip_prefix('/') {
                Some(closed) => assert_eq!(open.pop(), Some(closed), "before {}", &page[start..][..40]),
                None if tag.ends_with('/') || name == "meta" => {}
                None => open.push(name),
            }
        }
        assert_eq!(open, [""; 0]);
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_shows_all_that_was_measured() {
        let page = page(1200, Some(MOE), |_| ());
        assert_well_formed(&page);
        for outside in ["http:", "https:", "src=", "href=", "<script", "url(", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        let shown = ["runs/&lt;first&gt;", "annealing", "Learning rate", "tokens/s", "Routing losses", "measured peak"];
        for text in shown.into_iter().chain(["Gradient norm", "Imbalance score", "Layer 1 over time"]) {
            assert!(page.contains(text), "{text}");
        }
        for number in ["NaN", "inf"] {
            assert!(!page.contains(number), "{number}");
        }
        assert!(page.len() < 200_000, "{} bytes", page.len());
    }

    #[test]
    fn one_step_none_and_a_dense_network_have_a_page() {
        for (num_steps, moe) in [(0, Some(MOE)), (1, Some(MOE)), (1, None), (7, None)] {
            let page = page(num_steps, moe, |_| ());
            assert_well_formed(&page);
            assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
            assert_eq!(page.contains("over time"), moe.is_some() && num_steps > 0);
        }
    }

    #[test]
    fn names_from_outside_are_text() {
        let page = page(3, Some(MOE), |step| step.phase = "<b>\"&".to_string());
        assert_well_formed(&page);
        assert!(page.contains("&lt;b&gt;&quot;&amp;"));
    }

    #[test]
    fn devices_must_divide_the_experts() {
        let report = |num_devices| Report {
            metrics: PathBuf::from("absent"),
            title: String::new(),
            moe: Some(MOE),
            num_devices,
        };
        assert_eq!(report(None).num_devices().unwrap(), 1);
        assert_eq!(report(Some(3)).num_devices().unwrap(), 3);
        for wrong in [0, 2, 6] {
            let error = report(Some(wrong)).num_devices().unwrap_err().to_string();
            assert_eq!(error, format!("{wrong} devices: they must be a divisor of the 3 experts"));
        }
    }
}
