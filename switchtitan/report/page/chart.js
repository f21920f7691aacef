// One chart: axes, the lines of all visible runs, a legend-free tooltip.

const MARGIN = { left: 58, right: 12, top: 10, bottom: 26 };
const FEW_POINTS = 40;
const TICK_WIDTH = 76; // pixels per tick of the horizontal axis
let numCharts = 0;

class Chart {
  // spec: {metric, title, unit, across, isLog, isLogAcross, isPercent, isSmoothed, isScatter, floor, curves}
  constructor(spec, names, state) {
    Object.assign(this, { spec, names, state, isLog: spec.isLog, ownZoom: null, heightZoom: null });
    this.isLinked = spec.across === "step";
    this.clip = `clip-${numCharts++}`;
    this.svg = drawn("svg", { "aria-hidden": "true" });
    this.tooltip = element("div", { class: "tooltip", hidden: true });
    this.plot = element(
      "div",
      { class: "plot", tabindex: 0, role: "group", "aria-label": `${spec.title} by ${spec.across}` },
      this.svg,
      this.tooltip,
    );
    this.logButton = element(
      "button",
      { type: "button", "aria-pressed": String(this.isLog), onclick: () => this.toggleLog() },
      "log",
    );
    const wide = element(
      "button",
      { type: "button", "aria-pressed": "false", onclick: () => this.toggleWide(wide) },
      "wide",
    );
    this.node = element(
      "figure",
      { class: "chart", "data-metric": spec.metric },
      element(
        "figcaption",
        {},
        element("h3", {}, spec.title),
        spec.unit ? element("span", { class: "unit" }, spec.unit) : null,
        element("span", { class: "actions" }, this.logButton, wide),
      ),
      this.plot,
    );
    listenToPointer(this);
    state.charts.push(this);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  toggleLog() {
    this.isLog = !this.isLog;
    this.heightZoom = null;
    this.logButton.setAttribute("aria-pressed", String(this.isLog));
    this.draw();
  }

  toggleWide(button) {
    button.setAttribute("aria-pressed", String(this.node.classList.toggle("wide")));
  }

  get zoom() {
    return this.isLinked ? this.state.zoom : this.ownZoom;
  }

  setZoom(zoom, heightZoom) {
    this.heightZoom = heightZoom;
    if (!this.isLinked) this.ownZoom = zoom;
    this.state.setZoom(this.isLinked ? zoom : this.state.zoom);
  }

  forgetZoom() {
    this.ownZoom = null;
    this.heightZoom = null;
  }

  // The visible curves with their places, and the line drawn if smoothing is on.
  lines() {
    const weight = this.spec.isSmoothed ? this.state.smoothing : 0;
    const lines = [];
    for (const [key, curve] of Object.entries(this.spec.curves)) {
      const index = Number(key);
      if (!this.state.isVisible(index)) continue;
      const places = this.isLinked ? this.state.placesOf(curve, index) : curve.x;
      if (!places || places.length === 0) continue;
      const line = { index, places, values: curve.y, deviation: curve.deviation, smooth: null };
      if (weight > 0 && places.length > 2) {
        const { x, y } = smoothedLine(curve, weight);
        const smoothPlaces = this.isLinked ? this.state.placesOf({ x }, index) : x;
        line.smooth = { places: smoothPlaces, values: y };
      }
      lines.push(line);
    }
    return lines;
  }

  draw() {
    const width = this.plot.clientWidth;
    const height = this.plot.clientHeight;
    if (width < 80 || height < 80) return;
    this.drawnLines = this.lines();
    this.across = this.acrossScale(width);
    this.up = this.across && this.upScale(height);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.selection = drawn("rect", { class: "selection" });
    this.cursorLayer = drawn("g", { class: "cursor" });
    this.tooltip.hidden = true;
    if (!this.up) {
      const reason = this.isLog && this.drawnLines.length ? "no values above 0" : "no values";
      const middle = { x: width / 2, y: height / 2, class: "empty" };
      this.svg.replaceChildren(drawn("text", middle, reason));
      return;
    }
    this.svg.replaceChildren(
      drawn("clipPath", { id: this.clip }, drawn("rect", this.area(width, height))),
      this.axes(width, height),
      drawn("g", { "clip-path": `url(#${this.clip})` }, this.drawnLines.map((line) => this.shapes(line))),
      this.selection,
      this.cursorLayer,
    );
    this.drawCursor();
  }

  area(width, height) {
    return {
      x: MARGIN.left,
      y: MARGIN.top,
      width: width - MARGIN.left - MARGIN.right,
      height: height - MARGIN.top - MARGIN.bottom,
    };
  }

  acrossScale(width) {
    const isLog = this.spec.isLogAcross;
    const found = this.zoom ?? extent(this.drawnLines.map((line) => line.places));
    if (!found) return null;
    let [low, high] = found;
    if (this.spec.isScatter && !this.zoom) [low, high] = padded([low, high], isLog);
    if (low === high) [low, high] = [low - 1, high + 1];
    return axisScale(low, high, MARGIN.left, width - MARGIN.right, isLog);
  }

  upScale(height) {
    const range = this.heightZoom ?? this.heightInView();
    if (!range) return null;
    return axisScale(range[0], range[1], height - MARGIN.bottom, MARGIN.top, this.isLog);
  }

  heightInView() {
    const isDrawn = (value) => isNumber(value) && (!this.isLog || value > 0);
    const lists = this.drawnLines.flatMap((line) => {
      const [first, last] = this.spec.isScatter
        ? [0, line.places.length]
        : inView(line.places, this.across.low, this.across.high);
      const values = line.values.slice(first, last);
      if (!line.deviation) return [values];
      const bounds = [-1, 1].map((sign) =>
        values.map((value, index) => value + sign * line.deviation[first + index]),
      );
      return [values, ...bounds];
    });
    const range = extent(lists.map((values) => values.filter(isDrawn)));
    const low = this.spec.floor;
    if (range && isNumber(low) && range[1] > low) range[0] = Math.max(range[0], low);
    return range && padded(range, this.isLog);
  }

  axes(width, height) {
    const bottom = height - MARGIN.bottom;
    const numAcross = Math.max(2, Math.floor((width - MARGIN.left) / TICK_WIDTH));
    const numUp = Math.max(2, Math.floor(height / 38));
    const parts = [];
    for (const { value, step } of this.up.ticks(numUp)) {
      const y = this.up.pixel(value).toFixed(1);
      parts.push(drawn("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      const text = tickText(value, step, this.spec.isPercent);
      parts.push(drawn("text", { class: "tick up", x: MARGIN.left - 8, y, dy: "0.32em" }, text));
    }
    for (const { value, step } of this.across.ticks(numAcross)) {
      const x = this.across.pixel(value);
      if (x > width - MARGIN.right + 1) continue;
      parts.push(drawn("line", { class: "notch", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      const anchor = x > width - 24 ? "end" : "middle";
      const place = { class: "tick across", x, y: height - 7, "text-anchor": anchor };
      parts.push(drawn("text", place, tickText(value, step)));
    }
    parts.push(drawn("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }));
    return drawn("g", {}, parts);
  }

  shapes(line) {
    const { places, values, smooth, deviation } = line;
    const [first, last] = this.spec.isScatter ? [0, places.length] : inView(places, this.across.low, this.across.high);
    const path = (xs, ys, from, to) => pathOf(xs, ys, from, to, this.across, this.up);
    const parts = [];
    if (deviation) parts.push(drawn("path", { class: "band", d: this.bandPath(line, first, last) }));
    parts.push(drawn("path", { class: smooth ? "line raw" : "line", d: path(places, values, first, last) }));
    if (smooth) {
      const [from, to] = inView(smooth.places, this.across.low, this.across.high);
      parts.push(drawn("path", { class: "line", d: path(smooth.places, smooth.values, from, to) }));
    } else if (last - first <= FEW_POINTS) {
      for (let index = first; index < last; index++) {
        const point = this.pixelOf(places[index], values[index]);
        if (point) parts.push(drawn("circle", { class: "point", cx: point[0], cy: point[1], r: 2.6 }));
      }
    }
    return drawn("g", { class: seriesClass(line.index), "data-series": line.index }, parts);
  }

  bandPath({ places, values, deviation }, first, last) {
    const side = (sign) => (value, index) => {
      const bound = value + sign * deviation[index];
      return this.isLog && bound <= 0 ? this.up.low : bound;
    };
    const reversed = (list) => list.slice(first, last).reverse();
    const upper = pathOf(places, values.map(side(1)), first, last, this.across, this.up);
    const lower = pathOf(reversed(places), reversed(values.map(side(-1))), 0, last - first, this.across, this.up);
    return upper && `${upper}${lower.replace("M", "L")}Z`;
  }

  pixelOf(place, value) {
    if (!isNumber(value) || (this.isLog && value <= 0)) return null;
    return [this.across.pixel(place).toFixed(1), this.up.pixel(value).toFixed(1)];
  }

  drawCursor() {
    drawCursorOf(this);
  }
}
