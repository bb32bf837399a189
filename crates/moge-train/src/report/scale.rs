//! Numbers to places on an axis, and the numbers that are written beside it.

/// How an axis is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Division {
    /// Equal steps, from the least number on.
    Linear,
    /// Equal steps, from 0 on.
    FromZero,
    /// Equal factors; linear all the same if a number is not positive.
    Logarithmic,
}

/// The range of an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    min: f64,
    max: f64,
    division: Division,
}

impl Scale {
    /// A scale that has all `values`, which are finite, and is longer than nothing.
    pub(super) fn of(values: impl Iterator<Item = f64> + Clone, division: Division) -> Scale {
        let min = values.clone().fold(f64::INFINITY, f64::min);
        let max = values.fold(f64::NEG_INFINITY, f64::max);
        let division = if min > 0.0 || division == Division::FromZero { division } else { Division::Linear };
        let min = if division == Division::FromZero { min.min(0.0) } else { min };
        if min < max {
            return Scale { min, max, division };
        }
        if division == Division::FromZero && max == 0.0 {
            return Scale { min, max: 1.0, division };
        }
        let middle = if min.is_finite() { min } else { 0.0 };
        let margin = if middle == 0.0 { 1.0 } else { middle.abs() / 2.0 };
        Scale { min: middle - margin, max: middle + margin, division: Division::Linear }
    }

    /// The place of `value`: 0 is the beginning of the axis, 1 its end.
    pub(super) fn place(self, value: f64) -> f64 {
        match self.division {
            Division::Linear | Division::FromZero => (value - self.min) / (self.max - self.min),
            Division::Logarithmic => (value / self.min).ln() / (self.max / self.min).ln(),
        }
    }

    /// Round numbers on the axis, about `num_wanted` of them.
    pub(super) fn ticks(self, num_wanted: usize) -> Vec<f64> {
        if self.division == Division::Logarithmic && self.max / self.min > 10.0 {
            return self.decades(num_wanted);
        }
        let rough = (self.max - self.min) / num_wanted as f64;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
        let step = factor * power;
        // An end of the axis that is a round number must not be missed by a rounding error.
        const SLACK: f64 = 1e-9;
        let first = (self.min / step - SLACK).ceil() as i64;
        let last = (self.max / step + SLACK).floor() as i64;
        (first..=last).map(|index| index as f64 * step).collect()
    }

    fn decades(self, num_wanted: usize) -> Vec<f64> {
        let (first, last) = (self.min.log10().ceil() as i32, self.max.log10().floor() as i32);
        let every = ((last - first) as usize / num_wanted + 1).max(1);
        (first..=last).step_by(every).map(|power| 10f64.powi(power)).collect()
    }
}

/// A time in the unit that suits it.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.1} s"),
        ..7200.0 => format!("{:.1} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// A number as people read it: four digits, with k, M, G, T for thousands and so on.
pub(super) fn short(value: f64) -> String {
    const SUFFIXES: [(f64, &str); 4] = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let size = value.abs();
    if size != 0.0 && size < 1e-3 {
        let text = format!("{value:.2e}");
        return text.replace(".00e", "e").replace("0e", "e");
    }
    // From 10 000 on: years and steps are read best as they are.
    let suffix = SUFFIXES.into_iter().find(|(unit, _)| size >= *unit && size >= 1e4);
    let (value, suffix) = suffix.map_or((value, ""), |(unit, suffix)| (value / unit, suffix));
    let num_digits_before = if size == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let num_decimals = (3 - num_digits_before).max(0) as usize;
    let text = format!("{value:.num_decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_have_their_unit() {
        let cases = [
            (0.0, "0"),
            (-2.5, "-2.5"),
            (7.123456, "7.123"),
            (0.0144567, "0.01446"),
            (312.06, "312.1"),
            (9999.0, "9999"),
            (12_000.0, "12k"),
            (111e9, "111G"),
            (1_234_567.0, "1.235M"),
            (3e-4, "3e-4"),
            (3.25e-5, "3.25e-5"),
            (2.5e-7, "2.5e-7"),
        ];
        for (value, expected) in cases {
            assert_eq!(short(value), expected);
        }
    }

    #[test]
    fn a_time_has_the_unit_that_suits_it() {
        assert_eq!([7.25, 150.0, 9000.0].map(duration), ["7.2 s", "2.5 min", "2.5 h"]);
    }

    #[test]
    fn ticks_are_round_and_on_the_axis() {
        let scale = Scale::of([0.13, 7.9].into_iter(), Division::Linear);
        assert_eq!(scale.ticks(4), [2.0, 4.0, 6.0]);
        assert_eq!(Scale::of([0.13, 7.9].into_iter(), Division::FromZero).ticks(4), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(Scale::of([0.0, 3e-4].into_iter(), Division::Linear).ticks(4).len(), 4);
        let scale = Scale::of([0.02, 700.0].into_iter(), Division::Logarithmic);
        assert_eq!(scale.ticks(5), [0.1, 1.0, 10.0, 100.0]);
        assert!((scale.place(3.7417) - 0.5).abs() < 1e-3);
        assert_eq!(Scale::of([0.0, 1.0].into_iter(), Division::Logarithmic).place(0.25), 0.25);
    }

    #[test]
    fn one_number_and_none_have_a_scale_too() {
        for values in [&[3.0][..], &[0.0], &[-2.0, -2.0], &[]] {
            let scale = Scale::of(values.iter().copied(), Division::Logarithmic);
            assert!(scale.ticks(4).len() >= 2, "{scale:?}");
            assert!(values.iter().all(|&value| scale.place(value) == 0.5), "{scale:?}");
            assert!(Scale::of(values.iter().copied(), Division::FromZero).ticks(4).len() >= 2, "{values:?}");
        }
    }
}
