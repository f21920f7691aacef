// The pointer on a chart: hover shows the nearest step, a drag zooms, a double click resets.

const SMALLEST_DRAG = 6; // pixels
const TALL_DRAG = 30; // a drag of this height also zooms the vertical axis

function listenToPointer(chart) {
  const { plot, state } = chart;
  let start = null;
  const within = (event) => {
    const box = plot.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !chart.up) return;
    start = within(event);
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    if (!chart.up) return;
    const here = within(event);
    if (start) drawSelection(chart, start, here);
    state.setCursor(chart, clampedPlace(chart, here[0]));
  });
  plot.addEventListener("pointerup", (event) => {
    if (start && chart.up) zoomTo(chart, start, within(event));
    start = null;
  });
  const leave = () => {
    start = null;
    if (chart.selection) chart.selection.removeAttribute("width");
    state.setCursor(chart, null);
  };
  plot.addEventListener("pointercancel", leave);
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("dblclick", () => state.resetZoom());
  plot.addEventListener("keydown", (event) => moveByKey(chart, event));
  plot.addEventListener("blur", leave);
}

function clampedPlace(chart, pixel) {
  const { across } = chart;
  return Math.min(across.high, Math.max(across.low, across.value(pixel)));
}

function moveByKey(chart, event) {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") chart.state.resetZoom();
  if (!move || !chart.up) return;
  event.preventDefault();
  const places = chart.drawnLines[0].places;
  const { cursor } = chart.state;
  const from = cursor ? nearestIndex(places, cursor.place) + move : 0;
  chart.state.setCursor(chart, places[Math.min(places.length - 1, Math.max(0, from))]);
}

function dragged(chart, [x1, y1], [x2, y2]) {
  const area = chart.area(chart.plot.clientWidth, chart.plot.clientHeight);
  const clamp = (value, low, size) => Math.min(low + size, Math.max(low, value));
  const xs = [x1, x2].map((x) => clamp(x, area.x, area.width)).sort((a, b) => a - b);
  const isTall = Math.abs(y2 - y1) >= TALL_DRAG;
  const ys = isTall
    ? [y1, y2].map((y) => clamp(y, area.y, area.height)).sort((a, b) => a - b)
    : [area.y, area.y + area.height];
  return { xs, ys, isTall };
}

function drawSelection(chart, start, here) {
  const { xs, ys } = dragged(chart, start, here);
  const size = { x: xs[0], width: xs[1] - xs[0], y: ys[0], height: ys[1] - ys[0] };
  for (const [name, value] of Object.entries(size)) chart.selection.setAttribute(name, value);
}

function zoomTo(chart, start, here) {
  const { xs, ys, isTall } = dragged(chart, start, here);
  chart.selection.removeAttribute("width");
  if (xs[1] - xs[0] < SMALLEST_DRAG) return;
  const height = isTall ? [chart.up.value(ys[1]), chart.up.value(ys[0])] : null;
  chart.setZoom(xs.map((x) => chart.across.value(x)), height);
}

// The step that is nearest to the cursor among the points of all visible runs, and their values.
function valuesAt(chart, place) {
  let nearest = null;
  for (const { places } of chart.drawnLines) {
    const found = places[nearestIndex(places, place)];
    if (nearest === null || Math.abs(found - place) < Math.abs(nearest - place)) nearest = found;
  }
  const rows = chart.drawnLines.map((line) => {
    const index = nearestIndex(line.places, nearest);
    const isOutside = nearest < line.places[0] || nearest > line.places.at(-1);
    const own = { line, place: line.places[index], value: isOutside ? null : line.values[index] };
    own.deviation = line.deviation && !isOutside ? line.deviation[index] : null;
    if (line.smooth && !isOutside) {
      own.smooth = line.smooth.values[nearestIndex(line.smooth.places, nearest)];
    }
    return own;
  });
  return { nearest, rows };
}

function drawCursorOf(chart) {
  const { cursor } = chart.state;
  if (!chart.up || !chart.cursorLayer) return;
  const isShown = cursor && (cursor.chart === chart || (chart.isLinked && cursor.chart.isLinked));
  if (!isShown || cursor.place < chart.across.low || cursor.place > chart.across.high) {
    chart.cursorLayer.replaceChildren();
    chart.tooltip.hidden = true;
    return;
  }
  const { nearest, rows } = valuesAt(chart, cursor.place);
  const x = chart.across.pixel(nearest);
  const [top, bottom] = [MARGIN.top, chart.plot.clientHeight - MARGIN.bottom];
  const dots = rows.map(({ line, place, value, smooth }) => {
    const point = value === null ? null : chart.pixelOf(place, smooth ?? value);
    const isHidden = !point || place < chart.across.low || place > chart.across.high;
    return isHidden
      ? null
      : drawn("circle", { class: `dot ${seriesClass(line.index)}`, cx: point[0], cy: point[1], r: 4 });
  });
  chart.cursorLayer.replaceChildren(
    drawn("line", { x1: x, x2: x, y1: top, y2: bottom }),
    ...dots.filter((dot) => dot !== null),
  );
  chart.tooltip.hidden = cursor.chart !== chart;
  if (cursor.chart === chart) fillTooltip(chart, nearest, rows, x);
}

function fillTooltip(chart, nearest, rows, x) {
  const { spec, state, names, tooltip, plot } = chart;
  const unit = chart.isLinked ? state.across : spec.across;
  const heading = `${unit} ${unit === "tokens" ? tickText(nearest, nearest / 1e3) : valueText(nearest)}`;
  const lines = rows.map(({ line, place, value, deviation, smooth }) => {
    const text = value === null ? "–" : valueText(smooth ?? value, spec.isPercent);
    const notes = [];
    if (smooth !== undefined && value !== null) notes.push(`raw ${valueText(value, spec.isPercent)}`);
    if (isNumber(deviation)) notes.push(`± ${valueText(deviation, spec.isPercent)}`);
    if (value !== null && place !== nearest) notes.push(`at ${valueText(Math.round(place))}`);
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, swatch(line.index), names[line.index]),
      element("td", {}, text),
      element("td", { class: "muted" }, notes.join(", ")),
    );
  });
  tooltip.replaceChildren(element("p", {}, heading), element("table", {}, element("tbody", {}, lines)));
  const width = tooltip.offsetWidth;
  const left = x + 14 + width <= plot.clientWidth ? x + 14 : x - 14 - width;
  tooltip.style.left = `${Math.max(-8, Math.min(left, plot.clientWidth - width + 8))}px`;
  tooltip.style.top = `${MARGIN.top}px`;
}
