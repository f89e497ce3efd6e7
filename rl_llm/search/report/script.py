"""Style and script of the chart of the front, kept as text so that the page is one file."""

CSS = """
p.answer { font-size: 19px; line-height: 1.4; margin: 14px 0 0; max-width: 60em; overflow-wrap: anywhere; }
.axes { display: flex; flex-wrap: wrap; gap: 8px 18px; padding: 4px 6px 0; font-size: 13px; color: var(--soft); }
.axes select { font: inherit; color: var(--ink); padding: 2px 6px; border: 1px solid var(--line); border-radius: 5px;
  background: var(--paper); max-width: 16em; }
figure.wide #front-plot { height: 460px; }
td.point { min-width: 150px; overflow-wrap: anywhere; } td.why { min-width: 220px; overflow-wrap: anywhere; }
table.dense th, table.dense td { padding: 4px 12px; font-size: 13px; }
"""

DRAW_FRONT = """
const front = JSON.parse(document.getElementById("front").textContent);
const KINDS = {
  trial: {name: "trials", color: "#6f9fd0", symbol: "circle", size: 8},
  finalist: {name: "finalists, on fresh seeds", color: "#0b62a4", symbol: "star", size: 14},
  control: {name: "controls", color: "#d1600a", symbol: "diamond", size: 11},
  soup: {name: "soups of single rewards", color: "#2a8a57", symbol: "square", size: 9},
};
function drawFront() {
  const [i, j] = ["x", "y"].map(axis => Number(document.getElementById("front-" + axis).value));
  const pair = front.pairs[i < j ? `${i},${j}` : `${j},${i}`];
  const ends = (points, axis, bound) => points.map(p => Math.abs(p.at[axis][bound] - p.at[axis][0]));
  const bars = (points, axis) => ({type: "data", array: ends(points, axis, 2), arrayminus: ends(points, axis, 1),
    width: 0, thickness: 1, color: "rgba(90,105,125,0.35)"});
  const data = [];
  if (front.forecast) {
    const at = front.forecast.at, whole = at.map((p, k) => k).filter(k => at[k][i] !== null && at[k][j] !== null);
    const line = ((front.forecast.fronts[i < j ? `${i},${j}` : `${j},${i}`]) || []).slice()
      .sort((a, b) => at[a][i] - at[b][i]);
    const grey = "rgba(122,133,148,0.45)";
    const place = list => ({x: list.map(k => at[k][i]), y: list.map(k => at[k][j]),
      text: list.map(k => "forecast<br>" + front.forecast.text[k]), hovertemplate: "%{text}<extra></extra>"});
    data.push({...place(whole), name: "forecast", mode: "markers", marker: {color: grey, size: 4}});
    data.push({...place(line), name: "forecast front", mode: "lines", line: {color: grey, width: 6}});
  }
  const shown = front.points.filter(p => p.at[i] && p.at[j]);
  if (pair) {
    const best = pair.front.map(k => front.points[k]).sort((a, b) => a.at[i][0] - b.at[i][0]);
    data.push({x: best.map(p => p.at[i][0]), y: best.map(p => p.at[j][0]), name: "front", mode: "lines",
      hoverinfo: "skip", line: {color: "#0b62a4", width: 1.5, dash: "dot"}});
  }
  for (const [kind, style] of Object.entries(KINDS)) {
    const points = shown.filter(p => p.kind === kind);
    if (!points.length) continue;
    const named = kind === "control" || kind === "finalist";
    data.push({x: points.map(p => p.at[i][0]), y: points.map(p => p.at[j][0]), name: style.name,
      mode: named ? "markers+text" : "markers", text: points.map(p => p.label), textposition: "top center",
      textfont: {size: 11, color: "#5b6675"}, customdata: points.map(p => p.text),
      hovertemplate: "%{customdata}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
      error_x: bars(points, i), error_y: bars(points, j),
      marker: {color: style.color, symbol: style.symbol, size: style.size, line: {width: 1, color: "#fff"}}});
  }
  if (front.base[i] && front.base[j])
    data.push({x: [front.base[i][0]], y: [front.base[j][0]], name: "base policy", mode: "markers",
      hovertemplate: "base policy<br>%{x:.3g}, %{y:.3g}<extra></extra>",
      marker: {symbol: "x", size: 10, color: "#1c2430"}});
  const title = k => ({...base.xaxis, zeroline: false, automargin: true, title: {text: front.axes[k].label}});
  Plotly.react("front-plot", data, {...base, hovermode: "closest", xaxis: title(i), yaxis: title(j),
    legend: {x: 1.01, y: 1, font: {size: 11}}}, {responsive: true, displayModeBar: false});
  document.getElementById("front-volume").textContent = pair ? pair.hypervolume : "-";
}
if (front) {
  for (const axis of ["x", "y"]) {
    const select = document.getElementById("front-" + axis);
    front.axes.forEach((one, k) => select.add(new Option(one.name, k, false, k === front[axis])));
    select.addEventListener("change", drawFront);
  }
  drawFront();
}
"""
