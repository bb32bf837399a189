//! Loads of experts as coloured cells. What counts is an expert's share of its expert group's rows: each expert group has
//! the same number of them by construction.

use std::fmt::{self, Display, Formatter};

use moge_model::MoeConfig;

use super::history::{History, LoadBin};
use super::scale::short;

/// Side of a cell, the gap between expert groups, room for numbers at the left and below.
const CELL: usize = 12;
const GAP: usize = 4;
const LEFT: usize = 52;
const BELOW: usize = 34;

/// Each layer's experts in a row.
pub(super) struct LayersMap<'a> {
    pub(super) bin: &'a LoadBin,
    pub(super) moe: &'a MoeConfig,
}

/// One layer's experts, each in a row, over the steps.
pub(super) struct TimeMap<'a> {
    pub(super) history: &'a History,
    pub(super) layer: usize,
    pub(super) moe: &'a MoeConfig,
}

impl Display for LayersMap<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let num_layers = self.bin.load.len();
        let width = LEFT + place(self.moe, self.moe.num_experts) + GAP;
        let height = num_layers * CELL + BELOW;
        writeln!(f, "<svg class=\"map\" viewBox=\"0 0 {width} {height}\" style=\"width:{width}px\" role=\"img\">")?;
        for expert in (0..self.moe.num_experts).step_by(self.moe.experts_per_group()) {
            let (x, width) = (LEFT + place(self.moe, expert), self.moe.experts_per_group() * CELL - 1);
            let (y, height) = (num_layers * CELL + 13, num_layers * CELL - 1);
            writeln!(f, "<rect class=\"even\" x=\"{x}\" width=\"{width}\" height=\"{height}\"/>")?;
            writeln!(f, "<text x=\"{x}\" y=\"{y}\">{expert}</text>")?;
        }
        for (layer, load) in self.bin.load.iter().enumerate() {
            let y = layer * CELL;
            if layer.is_multiple_of(num_layers.div_ceil(16)) {
                writeln!(f, "<text class=\"y\" x=\"{}\" y=\"{}\">{layer}</text>", LEFT - 6, y + CELL - 2)?;
            }
            for (expert, ratio) in ratios(load, self.moe).into_iter().enumerate() {
                let hint = format!("layer {layer}, expert {expert}");
                draw_cell(f, [LEFT + place(self.moe, expert), y], CELL, ratio, &hint)?;
            }
        }
        let middle = (LEFT + width) / 2;
        writeln!(f, "<text class=\"x\" x=\"{middle}\" y=\"{}\">expert, by expert group</text>", height - 6)?;
        let turned = format!("translate(12 {}) rotate(-90)", num_layers * CELL / 2);
        writeln!(f, "<text class=\"x\" transform=\"{turned}\">layer</text></svg>")
    }
}

impl Display for TimeMap<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let bins = &self.history.bins;
        let num_experts = self.moe.num_experts;
        let cell_width = (600 / bins.len().max(1)).clamp(6, 24);
        let width = LEFT + bins.len() * cell_width + 40;
        let height = place(self.moe, num_experts) + BELOW;
        writeln!(f, "<svg class=\"map\" viewBox=\"0 0 {width} {height}\" style=\"width:{width}px\" role=\"img\">")?;
        for expert in (0..num_experts).step_by(self.moe.experts_per_group()) {
            let (y, height) = (place(self.moe, expert), self.moe.experts_per_group() * CELL - 1);
            let cells = bins.len() * cell_width - 1;
            writeln!(f, "<rect class=\"even\" x=\"{LEFT}\" y=\"{y}\" width=\"{cells}\" height=\"{height}\"/>")?;
            writeln!(f, "<text class=\"y\" x=\"{}\" y=\"{}\">{expert}</text>", LEFT - 6, y + CELL - 2)?;
        }
        for (column, bin) in bins.iter().enumerate() {
            let x = LEFT + column * cell_width;
            for (expert, ratio) in ratios(&bin.load[self.layer], self.moe).into_iter().enumerate() {
                let hint = format!("steps {} to {}, expert {expert}", bin.first_step, bin.last_step);
                draw_cell(f, [x, place(self.moe, expert)], cell_width, ratio, &hint)?;
            }
            if column.is_multiple_of(bins.len().div_ceil(8)) {
                let y = place(self.moe, num_experts) + 11;
                writeln!(f, "<text x=\"{x}\" y=\"{y}\">{}</text>", short(bin.first_step as f64))?;
            }
        }
        let middle = (LEFT + width) / 2;
        writeln!(f, "<text class=\"x\" x=\"{middle}\" y=\"{}\">step</text>", height - 6)?;
        let turned = format!("translate(12 {}) rotate(-90)", height / 2);
        writeln!(f, "<text class=\"x\" transform=\"{turned}\">expert</text></svg>")
    }
}

/// Each expert's share of its expert group's rows by the share that it would have if all had the same.
fn ratios(load: &[u64], moe: &MoeConfig) -> Vec<f64> {
    let group_ratios = |group: &[u64]| -> Vec<f64> {
        let mean = group.iter().map(|&load| load as f64).sum::<f64>() / group.len() as f64;
        group.iter().map(|&load| if mean > 0.0 { load as f64 / mean } else { 1.0 }).collect()
    };
    load.chunks(moe.experts_per_group()).flat_map(group_ratios).collect()
}

/// Where an expert's cell begins.
fn place(moe: &MoeConfig, expert: usize) -> usize {
    expert * CELL + expert / moe.experts_per_group() * GAP
}

/// Red has more than its share, blue less; the grey below shows where it is about even. Twice and half are full colour.
fn draw_cell(f: &mut Formatter<'_>, [x, y]: [usize; 2], width: usize, ratio: f64, hint: &str) -> fmt::Result {
    let class = if ratio > 1.0 { "more" } else { "less" };
    let opacity = ratio.log2().abs().min(1.0);
    let (width, height) = (width - 1, CELL - 1);
    write!(f, "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" ")?;
    writeln!(f, "opacity=\"{opacity:.2}\"><title>{hint}: {ratio:.2}</title></rect>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_that_of_the_expert_group() {
        let moe = MoeConfig {
            num_experts: 6,
            router: moge_model::Router::GroupedSoftmax { num_expert_groups: 2, top_k_per_group: 1 },
            router_scale: true,
            expert_intermediate_size: 5,
            shared_intermediate_size: None,
        };
        assert_eq!(ratios(&[2, 3, 1, 0, 0, 90], &moe), [1.0, 1.5, 0.5, 0.0, 0.0, 3.0]);
        assert_eq!(ratios(&[0; 6], &moe), [1.0; 6]);
        assert_eq!([0, 2, 3, 6].map(|expert| place(&moe, expert)), [0, 24, 40, 80]);
    }
}
