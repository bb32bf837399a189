//! The page around the pictures.

/// A text that may stand in HTML, also between quotation marks.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Colours of light and dark pages; nothing comes from elsewhere.
pub(super) const STYLE: &str = "
:root { color-scheme: light dark; --back: #fff; --card: #f7f8fa; --text: #1c2330; --dim: #667085; --grid: #e3e6ec;
  --c0: #2f6fdd; --c1: #d9822b; --c2: #2a9d6f; --more: #d6453d; --less: #2f6fdd; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1a1e27; --text: #e6e9ef; --dim: #98a1b3;
  --grid: #2c3240; --c0: #6ea0f5; --c1: #eda45c; --c2: #55c596; --more: #f0716a; --less: #6ea0f5; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto;
  max-width: 1400px; padding: 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; }
p { color: var(--dim); margin: .3rem 0; max-width: 80ch; }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap; } td, th { padding: .2rem .9rem .2rem 0; text-align: right;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--grid); }
td:first-child, th:first-child { text-align: left; } th { color: var(--dim); font-weight: 500; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: .9rem; }
figure { background: var(--card); border-radius: 8px; margin: 0 0 .9rem; padding: .8rem; overflow-x: auto; }
.charts figure { margin: 0; } .charts svg { max-width: 46rem; overflow: visible; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; } figcaption span { color: var(--dim); }
.key::before { content: \"\"; display: inline-block; width: .8rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle; background: currentColor; }
.key.c0::before { background: var(--c0); } .key.c1::before { background: var(--c1); }
.key.c2::before { background: var(--c2); }
.key.more::before { background: var(--more); } .key.less::before { background: var(--less); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--dim); }
text.x { text-anchor: middle; } text.y { text-anchor: end; }
path { fill: none; } .grid { stroke: var(--grid); } .axis { stroke: var(--dim); }
path.phase { stroke: var(--dim); stroke-dasharray: 3 3; }
.line { stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; } .band { opacity: .22; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.band.c0 { fill: var(--c0); } .band.c1 { fill: var(--c1); } .band.c2 { fill: var(--c2); }
.even { fill: var(--grid); } .more { fill: var(--more); } .less { fill: var(--less); }
/* A chart shrinks with the screen; its numbers must stay readable. */
@media (max-width: 36rem) { .charts svg text { font-size: 17px; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
";
