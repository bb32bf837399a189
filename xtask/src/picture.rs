//! A bar chart of what share of the machine's limit each engine reaches.
//!
//! Ours is what `moge bench` measured against the ceilings beside it. That of llama.cpp is ours divided by the ratio of
//! the two engines' speeds: it is set against the same limit, the least that our format must read or multiply.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Width of a full bar, in pixels.
const FULL: f64 = 480.0;
const LEFT: f64 = 150.0;
const BAR_HEIGHT: f64 = 16.0;
const GROUP_HEIGHT: f64 = 52.0;
const TOP: f64 = 56.0;

/// One case: its name, the share of the limit, and tokens per second, of ours and of the peer.
#[derive(Debug, PartialEq)]
struct Bars {
    name: String,
    ours: (f64, f64),
    peer: (f64, f64),
}

/// `picture PREFIX PEERS.json BENCH.json OUT.svg`: the cases of `bench peers` whose names begin with `PREFIX` and that
/// `moge bench --format json` measured, too.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [prefix, peers, bench, out] = arguments else {
        bail!("picture takes PREFIX PEERS.json BENCH.json OUT.svg");
    };
    let read = |path: &String| -> Result<Value> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        serde_json::from_str(&text).with_context(|| format!("{path} is not JSON"))
    };
    let bars = bars(prefix, &read(peers)?, &read(bench)?);
    ensure!(!bars.is_empty(), "no case of {peers} begins with {prefix} and is in {bench}");
    fs::write(out, svg(&bars)).with_context(|| format!("cannot write {out}"))
}

fn bars(prefix: &str, peers: &Value, bench: &Value) -> Vec<Bars> {
    let measured = bench["cases"].as_array().map_or(&[][..], Vec::as_slice);
    let share_of = |name: &str| measured.iter().find(|case| key(case) == name)?["share_of_ceiling"].as_f64();
    let rows = peers["cases"].as_array().map_or(&[][..], Vec::as_slice);
    let bars_of = |row: &Value| {
        let name = row["case"].as_str()?.strip_prefix(prefix)?.trim_start_matches('/');
        let (share, ratio) = (share_of(name)?, row["ratio"].as_f64()?);
        let ours = (share, row["moge"]["tokens_per_s"].as_f64()?);
        let peer = (share / ratio, row["llama_cpp"][0]["tokens_per_s"].as_f64()?);
        Some(Bars { name: name.replace('-', " "), ours, peer })
    };
    rows.iter().filter_map(bars_of).collect()
}

/// What `bench peers` calls a case of `moge bench`.
fn key(case: &Value) -> String {
    match case["kind"].as_str() {
        Some("prefill") => format!("prefill-{}", case["tokens"]),
        _ => format!("decode-b{}-c{}", case["batch"], case["context"]),
    }
}

fn svg(bars: &[Bars]) -> String {
    let (width, height) = (LEFT + FULL + 170.0, TOP + GROUP_HEIGHT * bars.len() as f64 + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\" font-weight=\"bold\">Share of the machine's limit</text>\n\
         <text x=\"10\" y=\"41\" fill=\"#555\">prefill: int8 multiply-adds; decode: memory read; \
         llama.cpp: our share divided by the ratio of speeds</text>\n"
    );
    for quarter in 0..=4 {
        let x = LEFT + FULL * f64::from(quarter) / 4.0;
        out += &format!(
            "<line x1=\"{x}\" y1=\"{TOP}\" x2=\"{x}\" y2=\"{}\" stroke=\"#ddd\"/>\n\
             <text x=\"{x}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{} %</text>\n",
            height - 26.0,
            height - 10.0,
            25 * quarter
        );
    }
    for (index, Bars { name, ours, peer }) in bars.iter().enumerate() {
        let y = TOP + GROUP_HEIGHT * index as f64 + 6.0;
        out += &format!("<text x=\"10\" y=\"{}\">{name}</text>\n", y + 22.0);
        for (place, (engine, color, (share, rate))) in
            [("moge", "#1f77b4", ours), ("llama.cpp", "#b0b0b0", peer)].into_iter().enumerate()
        {
            let (y, length) = (y + place as f64 * (BAR_HEIGHT + 2.0), FULL * share.clamp(0.0, 1.0));
            out += &format!(
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{color}\"/>\n\
                 <text x=\"{:.1}\" y=\"{}\">{engine} {:.0} %, {rate:.0} tok/s</text>\n",
                LEFT + length + 6.0,
                y + 13.0,
                100.0 * share
            );
        }
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::{Bars, bars, svg};
    use serde_json::json;

    #[test]
    fn a_case_of_both_reports_gets_two_bars_against_one_limit() {
        let peers = json!({"cases": [
            {"case": "big/w4a8/prefill-512", "ratio": 2.5, "moge": {"tokens_per_s": 170.0}, "llama_cpp": [{"tokens_per_s": 68.0}]},
            {"case": "big/w4a8/decode-b8-c128", "ratio": 2.0, "moge": {"tokens_per_s": 60.0}, "llama_cpp": [{"tokens_per_s": 30.0}]},
            {"case": "big/w4a8/prefill-2048", "ratio": null, "moge": {"tokens_per_s": null}, "llama_cpp": [{"tokens_per_s": 60.0}]},
            {"case": "other/w4a8/prefill-512", "ratio": 9.0, "moge": {"tokens_per_s": 9.0}, "llama_cpp": [{"tokens_per_s": 1.0}]},
        ]});
        let bench = json!({"cases": [
            {"kind": "decode", "tokens": 16, "batch": 8, "context": 128, "share_of_ceiling": 0.5},
            {"kind": "prefill", "tokens": 512, "batch": 1, "context": 0, "share_of_ceiling": 0.6},
        ]});
        let found = bars("big/w4a8", &peers, &bench);
        let expected = [("prefill 512", 0.6, 170.0, 0.24, 68.0), ("decode b8 c128", 0.5, 60.0, 0.25, 30.0)];
        let expected = expected.map(|(name, share, ours, peer_share, peer)| Bars {
            name: name.to_owned(),
            ours: (share, ours),
            peer: (peer_share, peer),
        });
        assert_eq!(found, expected);
        let picture = svg(&found);
        assert!(picture.contains("moge 60 %, 170 tok/s") && picture.contains("llama.cpp 25 %, 30 tok/s"), "{picture}");
    }
}
