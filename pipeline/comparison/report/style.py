"""The CSS of the report: light, dark and print, from 320 pixels."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --surface: #fff; --ink: #17202c; --muted: #5b6675; --line: #e1e5ea;
  --distilled: #c8501a; --baseline: #2b66c9; --teacher: #17202c; --other: #b3261e;
  --gain: #14713d; --loss: #b3261e;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --surface: #181f29; --ink: #e8ecf2; --muted: #9aa7b8; --line: #2c3644;
    --distilled: #ff8f57; --baseline: #77a9ff; --teacher: #e8ecf2; --other: #ff7b72;
    --gain: #5fd38d; --loss: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.2rem 1rem 4rem; max-width: 74rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--sans);
  overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.muted, figcaption, .note { color: var(--muted); font-size: .88rem; }
.note { margin: .1rem 0 .9rem; }
.card {
  background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; min-width: 0;
}
.summary { padding: 1.2rem 1.3rem; margin-top: 1.2rem; }
.summary p:first-child { font-size: 1.12rem; font-weight: 600; }
.summary p { margin: 0 0 .6rem; max-width: 54rem; }
.summary p:last-child { margin: 0; color: var(--muted); font-size: .9rem; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.grid.wide { grid-template-columns:
  repeat(auto-fill, minmax(min(100%, max(20rem, 34%)), 1fr)); }  /* two columns at most */
figure { margin: 0; }
.card > svg { display: block; width: 100%; max-width: 30rem; height: auto; margin: 0 auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 .8rem; font-size: .88rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
.legend i { width: .7rem; height: .7rem; border-radius: 50%; background: currentColor; }
.legend .distilled { color: var(--distilled); } .legend .baseline { color: var(--baseline); }
.legend .teacher { color: var(--teacher); }
.legend b { font-weight: 400; color: var(--ink); }

svg text { font: 12px var(--sans);
  fill: var(--muted); font-variant-numeric: tabular-nums; }
svg text.label { fill: var(--ink); }
svg text.halo { paint-order: stroke; stroke: var(--surface); stroke-width: 4px;
  stroke-linejoin: round; }
svg text.cell { fill: var(--ink); font-size: 11px; }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--muted); stroke-width: 1.2; }
svg .diagonal { stroke: var(--muted); stroke-dasharray: 3 4; }
svg .front { fill: none; stroke: var(--muted); stroke-width: 1.4; stroke-dasharray: 5 4; }
svg circle.distilled, svg rect.distilled { fill: var(--distilled); }
svg circle.baseline, svg rect.baseline { fill: var(--baseline); }
svg circle.teacher { fill: var(--teacher); }
svg circle { stroke: var(--surface); stroke-width: 1; }
svg circle.see-through { fill-opacity: .75; }
svg .gap { stroke-width: 1.5; stroke-opacity: .35; }
svg .whisker { stroke-width: 2; stroke-opacity: .55; stroke-linecap: round; }
svg line.distilled, svg polyline.distilled { stroke: var(--distilled); }
svg line.baseline, svg polyline.baseline { stroke: var(--baseline); }
svg line.teacher, svg polyline.teacher { stroke: var(--teacher); }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .same { fill: var(--muted); } svg .other { fill: var(--other); }

table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); font-size: .8rem;
  vertical-align: bottom; }
td { text-align: right; }
th, td { padding: .42rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
th:first-child { min-width: 7.5rem; }
tbody tr:last-child td { border-bottom: 0; }
td small { color: var(--muted); font-size: .8rem; }
.verdict { font-weight: 600; }
.verdict.gain, .verdict.better { color: var(--gain); }
.verdict.loss, .verdict.worse { color: var(--loss); }
.verdict.not-significant { color: var(--muted); }
.dense { font-size: .84rem; }
@media (min-width: 62.01rem) {
  .dense th:not(:first-child), .dense td:not(:first-child) { padding: .36rem .4rem; }
}
@media (max-width: 62rem) {
  table, tbody, tr, td { display: block; }
  thead { display: none; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  tbody tr:first-child { padding-top: 0; }
  tbody tr:last-child { border-bottom: 0; padding-bottom: 0; }
  tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  column-gap: 2rem; }
  td, td:first-child, td:last-child {
    display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0;
    white-space: normal; text-align: right;
  }
  td:first-child { grid-column: 1 / -1; font-size: 1rem; }
  td > span { overflow-wrap: anywhere; }
  .dense tr { grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); column-gap: 1.4rem; }
  .dense td:nth-child(2) { grid-column: 1 / -1; }
  td:not(:first-child)::before { content: attr(data-label); color: var(--muted); text-align: left; }
}
.strip { display: grid; gap: .9rem .7rem;
  grid-template-columns: repeat(auto-fill, minmax(6.1rem, 1fr)); }
.strip img { display: block; width: 4.5rem; height: 4.5rem; object-fit: contain; border-radius: 6px;
  border: 1px solid var(--line); background: #8883; image-rendering: pixelated; }
.strip img.smooth { image-rendering: auto; }
.strip figcaption { line-height: 1.35; font-size: .8rem; margin-top: .3rem; }
.strip figcaption b { color: var(--ink); font-weight: 600; }
.strip .wrong { color: var(--loss); } .strip .correct { color: var(--gain); }
.stack > * + * { margin-top: 1rem; } .grid + .stack { margin-top: 1rem; }
details { margin-top: 1rem; } summary { cursor: pointer; }
pre { margin: .6rem 0 0; font: .8rem/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; columns: 22rem; column-gap: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0;
  font-size: .88rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
@media print {
  :root { --page: #fff; --surface: #fff; --ink: #000; --muted: #444; --line: #ccc;
    --distilled: #c8501a; --baseline: #2b66c9; --teacher: #000; --other: #b3261e;
    --gain: #14713d; --loss: #b3261e; }
  body { font-size: 10pt; padding: 0; max-width: none; }
  .card { break-inside: avoid; border-radius: 0; box-shadow: none; }
  .card.long { break-inside: auto; } .strip figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
