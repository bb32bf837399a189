//! A line chart as SVG.

use std::fmt::{self, Display, Formatter};

use super::history::PhaseSpan;
use super::html::escape;
use super::scale::{Division, Scale, short};

/// Most points that a line is drawn with; more are drawn as their mean, least and greatest.
const MAX_POINTS: usize = 500;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 250.0;
// The part of the picture inside the axes.
const LEFT: f64 = 58.0;
const TOP: f64 = 22.0;
const RIGHT: f64 = WIDTH - 22.0;
const BOTTOM: f64 = HEIGHT - 38.0;
/// From here on the name of a phase stands before its line.
const LATE: f64 = LEFT + 0.8 * (RIGHT - LEFT);

/// Lines over steps.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    /// Unit of the numbers, as it stands beside the title.
    pub(super) unit: &'a str,
    pub(super) division: Division,
    pub(super) lines: &'a [Line],
    pub(super) phases: &'a [PhaseSpan],
}

/// Numbers over steps.
pub(super) struct Line {
    pub(super) label: &'static str,
    /// `[step, value]`, in the order of the steps.
    pub(super) points: Vec<[f64; 2]>,
}

/// Points that are drawn as one.
struct Bin {
    step: f64,
    mean: f64,
    min: f64,
    max: f64,
}

impl Line {
    fn bins(&self) -> Vec<Bin> {
        let bin = |points: &[[f64; 2]]| Bin {
            step: points[points.len() / 2][0],
            mean: points.iter().map(|point| point[1]).sum::<f64>() / points.len() as f64,
            min: points.iter().map(|point| point[1]).fold(f64::INFINITY, f64::min),
            max: points.iter().map(|point| point[1]).fold(f64::NEG_INFINITY, f64::max),
        };
        self.points.chunks(self.points.len().div_ceil(MAX_POINTS).max(1)).map(bin).collect()
    }

    /// What the line ends with, and between what it moves.
    fn summary(&self) -> String {
        let values = || self.points.iter().map(|point| point[1]);
        let (min, max) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let last = values().next_back().unwrap_or_default();
        format!("{} now, {} to {}", short(last), short(min), short(max))
    }
}

impl Display for Chart<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let values = self.lines.iter().flat_map(|line| &line.points).map(|point| point[1]);
        let y = Scale::of(values, self.division);
        let x = Scale::of(self.lines.iter().flat_map(|line| &line.points).map(|point| point[0]), Division::Linear);
        let title = escape(self.title);
        writeln!(f, "<figure><figcaption><b>{title}</b><span>{}</span>", escape(self.unit))?;
        for (index, line) in self.lines.iter().enumerate() {
            let label = if self.lines.len() > 1 { format!("{}: ", line.label) } else { String::new() };
            writeln!(f, "<span class=\"key c{index}\">{}{}</span>", escape(&label), line.summary())?;
        }
        writeln!(f, "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">")?;
        self.draw_axes(f, x, y)?;
        for (index, line) in self.lines.iter().enumerate() {
            draw_line(f, index, &line.bins(), [x, y])?;
        }
        writeln!(f, "</svg></figure>")
    }
}

impl Chart<'_> {
    fn draw_axes(&self, f: &mut Formatter<'_>, x: Scale, y: Scale) -> fmt::Result {
        for value in y.ticks(5) {
            let at = y_of(y, value);
            writeln!(f, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/>")?;
            writeln!(f, "<text class=\"y\" x=\"{}\" y=\"{:.1}\">{}</text>", LEFT - 6.0, at + 4.0, short(value))?;
        }
        for value in x.ticks(7).into_iter().filter(|value| value.fract() == 0.0) {
            let (at, below) = (x_of(x, value), BOTTOM + 15.0);
            writeln!(f, "<text class=\"x\" x=\"{at:.1}\" y=\"{below}\">{}</text>", short(value))?;
        }
        for phase in self.phases {
            let at = x_of(x, phase.first_step as f64).max(LEFT);
            writeln!(f, "<path class=\"phase\" d=\"M{at:.1} {TOP}V{BOTTOM}\"/>")?;
            let name = escape(&phase.name);
            // The name of a short phase at the end stands before its line, or it would leave the picture.
            let (class, x) = if at > LATE { ("y", at - 3.0) } else { ("phase", at + 3.0) };
            writeln!(f, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{}\">{name}</text>", TOP - 5.0)?;
        }
        writeln!(f, "<path class=\"axis\" d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\"/>")?;
        writeln!(f, "<text class=\"x\" x=\"{}\" y=\"{}\">step</text>", (LEFT + RIGHT) / 2.0, HEIGHT - 4.0)
    }
}

/// The mean as a line, and a band from the least to the greatest where points were put together.
fn draw_line(f: &mut Formatter<'_>, index: usize, bins: &[Bin], [x, y]: [Scale; 2]) -> fmt::Result {
    if bins.iter().any(|bin| bin.min < bin.max) {
        write!(f, "<path class=\"band c{index}\" d=\"")?;
        let there = bins.iter().map(|bin| (bin.step, bin.max));
        let back = bins.iter().rev().map(|bin| (bin.step, bin.min));
        for (place, (step, value)) in there.chain(back).enumerate() {
            write!(f, "{}{:.1} {:.1}", if place == 0 { 'M' } else { 'L' }, x_of(x, step), y_of(y, value))?;
        }
        writeln!(f, "Z\"/>")?;
    }
    write!(f, "<path class=\"line c{index}\" d=\"")?;
    for (place, bin) in bins.iter().enumerate() {
        write!(f, "{}{:.1} {:.1}", if place == 0 { 'M' } else { 'L' }, x_of(x, bin.step), y_of(y, bin.mean))?;
    }
    // A line of no length is a dot: one step alone shows, too.
    writeln!(f, "{}\"/>", if bins.len() == 1 { "h0" } else { "" })
}

fn x_of(scale: Scale, value: f64) -> f64 {
    LEFT + (RIGHT - LEFT) * scale.place(value)
}

fn y_of(scale: Scale, value: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * scale.place(value)
}
