"""Style sheet and script of the report, kept as text so that the page is one file."""

CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --paper: #fff; --wash: #f5f7fa; --accent: #0b62a4; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p.note, figcaption span, caption { color: var(--soft); font-size: 13px; }
p.note { margin: 0 0 10px; } ul.note { margin: 0 0 14px; padding-left: 20px; }
.status { display: inline-block; border-radius: 999px; padding: 2px 12px; color: #fff; background: var(--soft);
  font-size: 14px; vertical-align: 4px; margin-left: 8px; }
.status.finished { background: #2a7d46; } .status.stopped_early { background: #2b6f8f; }
.status.interrupted { background: #a8690b; } .status.failed { background: #b3261e; }
.reason { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 10px 20px; margin: 18px 0 0; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; overflow-wrap: anywhere; }
.card, figure { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; } tr:last-child td { border-bottom: 0; }
td.value { white-space: nowrap; } td small { color: var(--soft); }
td.apart { font-weight: 600; } td.apart small { font-weight: 400; }
td.message { white-space: pre-line; overflow-wrap: anywhere; min-width: 260px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 10px 4px; min-width: 0; }
figcaption { padding: 0 6px; font-weight: 600; }
figcaption span { display: block; font-weight: 400; line-height: 1.35; }
.plot { height: 240px; } figure.wide { grid-column: 1 / -1; } figure.wide .plot { height: 320px; }
.sample { margin-bottom: 14px; padding: 14px 16px; }
.sample pre { margin: 4px 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; }
.sample .prompt { max-height: 220px; overflow-y: auto; color: var(--soft); }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px; }
.side { border-left: 3px solid var(--line); padding-left: 12px; min-width: 0; }
.side.after { border-color: var(--accent); }
.side b { font-size: 13px; color: var(--soft); }
.chip { display: inline-block; background: var(--wash); border: 1px solid var(--line); border-radius: 4px;
  padding: 0 7px; margin: 0 4px 4px 0; font-size: 12px; font-variant-numeric: tabular-nums; }
details pre { overflow-x: auto; padding: 14px 16px; margin: 0; font: 12.5px/1.45 ui-monospace, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; padding: 10px 16px; font-weight: 600; }
"""

DRAW = """
const base = {
  margin: {l: 52, r: 12, t: 8, b: 34}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: {size: 12, color: "#1c2430"}, hovermode: "x unified",
  legend: {orientation: "h", x: 0, y: -0.16, yanchor: "top", font: {size: 11}},
  xaxis: {gridcolor: "#e8ecf1", zeroline: false, title: {text: "step", standoff: 4}},
  yaxis: {gridcolor: "#e8ecf1", zerolinecolor: "#c3cad4", automargin: true},
};
for (const chart of JSON.parse(document.getElementById("charts").textContent)) {
  const layout = {...base, ...chart.layout};
  for (const axis of ["xaxis", "yaxis"]) layout[axis] = {...base[axis], ...(chart.layout[axis] || {})};
  Plotly.newPlot(chart.id, chart.data, layout, {responsive: true, displayModeBar: false});
}
"""
