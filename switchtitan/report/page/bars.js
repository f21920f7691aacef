// Horizontal bars with parts, and means with their deviations and intervals.

// spec: {title, max, legend: [name] or null, rows: [{series, text, parts: [{value, colour, name}]}]}
function barRows(spec, names) {
  const rows = spec.rows.map((row) => {
    const parts = row.parts.map((part) => {
      const bar = element("span", { class: `part ${seriesClass(part.colour)}`, title: part.name });
      bar.style.width = `${(100 * part.value) / spec.max}%`;
      return bar;
    });
    return [
      element("span", { class: "name" }, swatch(row.series), names[row.series]),
      element("span", { class: "track" }, parts),
      element("span", { class: "value" }, row.text),
    ];
  });
  const legend = (spec.legend ?? []).map((name, colour) =>
    element("span", { class: "key" }, element("i", { class: seriesClass(colour) }), name),
  );
  return element(
    "div",
    { class: "bars" },
    element("h3", {}, spec.title),
    legend.length ? element("p", { class: "keys" }, legend) : null,
    element("div", { class: "rows" }, rows.flat()),
  );
}

// spec: {title, note, zero, rows: [{series, text, mean, deviation, low, high, points}]}
function intervalRows(spec, names) {
  const known = spec.rows.filter((row) => isNumber(row.mean));
  const numbers = known.flatMap((row) => [
    row.mean - (row.deviation ?? 0), row.mean + (row.deviation ?? 0), row.low, row.high, ...row.points,
  ]);
  const range = extent([numbers.filter(isNumber).concat(spec.zero ? [0] : [])]);
  if (!range) return null;
  const scale = axisScale(...padded(range, false), 0, 100, false);
  const rows = known.map((row) => [
    element("span", { class: "name" }, swatch(row.series), names[row.series]),
    intervalTrack(row, scale, spec.zero),
    element("span", { class: "value" }, row.text),
  ]);
  const ticks = scale.ticks(4).map(({ value, step }) => {
    const tick = element("span", { class: "tick" }, tickText(value, step));
    tick.style.left = `${scale.pixel(value)}%`;
    return tick;
  });
  const footer = [element("span"), element("span", { class: "ticks" }, ticks), element("span")];
  return element(
    "div",
    { class: "bars intervals" },
    element("h3", {}, spec.title),
    element("div", { class: "rows" }, rows.flat(), footer),
    element("p", { class: "muted" }, spec.note),
  );
}

function intervalTrack(row, scale, hasZero) {
  const placed = (kind, from, to) => {
    const node = element("span", { class: kind });
    node.style.left = `${scale.pixel(from)}%`;
    if (to !== undefined) node.style.width = `${scale.pixel(to) - scale.pixel(from)}%`;
    return node;
  };
  const { mean, deviation, low, high } = row;
  return element(
    "span",
    { class: `track ${seriesClass(row.series)}` },
    hasZero ? placed("zero", 0) : null,
    isNumber(low) && isNumber(high) ? placed("interval", low, high) : null,
    isNumber(deviation) ? placed("deviation", mean - deviation, mean + deviation) : null,
    row.points.filter(isNumber).map((point) => placed("seed", point)),
    placed("mean", mean),
  );
}
