// Tables: sortable ones of figures, and those of configurations.

// spec: {columns: [{title, hint, isText}], rows: [{series, name, cells: [{text, value, isBest}]}], note}
function figureTable(spec, names) {
  const body = element("tbody");
  const rows = spec.rows.map((row) => ({ row, node: figureRow(row, spec.columns, names) }));
  body.append(...rows.map(({ node }) => node));
  const headers = spec.columns.map((column, place) => {
    const header = element("th", { scope: "col", class: column.isText ? "text" : null, title: column.hint });
    header.append(element("button", { type: "button", onclick: () => sort(place, header) }, column.title));
    return header;
  });
  const sort = (place, header) => {
    const isDescending = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    rows.sort((one, other) => compared(one.row.cells[place], other.row.cells[place], isDescending));
    body.append(...rows.map(({ node }) => node));
  };
  const first = element("th", { scope: "col", class: "text" }, spec.rowsTitle);
  return element(
    "div",
    { class: "table", tabindex: 0 },
    element("table", {}, element("thead", {}, element("tr", {}, first, headers)), body),
  );
}

function figureRow(row, columns, names) {
  const cells = row.cells.map((cell, place) => {
    const kind = [columns[place].isText ? "text" : "", cell.isBest ? "best" : ""].join(" ").trim();
    return element("td", { class: kind || null, title: cell.hint }, cell.text);
  });
  const name = row.name ?? names[row.series];
  const mark = row.series === null ? null : swatch(row.series);
  return element("tr", {}, element("th", { scope: "row", class: "text" }, mark, name), cells);
}

// Unknown values come last in either order.
function compared(one, other, isDescending) {
  const [a, b] = [one.value ?? null, other.value ?? null];
  if (a === null || b === null) return (a === null) - (b === null);
  const order = a < b ? -1 : Number(a > b);
  return isDescending ? -order : order;
}

// spec: {names, differing: [[key, values]], same: [[key, value]]}
function configTables(spec) {
  const head = (...titles) =>
    element("thead", {}, element("tr", {}, titles.map((title) => element("th", { scope: "col", class: "text" }, title))));
  const row = (key, values) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", class: "text" }, element("code", {}, key)),
      values.map((value) => element("td", { class: "text" }, value === null ? "–" : element("code", {}, value))),
    );
  const table = (id, header, rows) =>
    element("div", { class: "table", id, tabindex: 0 }, element("table", {}, header, element("tbody", {}, rows)));
  const differing = spec.differing.length
    ? table("config-differing", head("key", ...spec.names), spec.differing.map(([key, values]) => row(key, values)))
    : element("p", { class: "muted", id: "config-differing" }, "All keys are equal.");
  const same = table("config-same", head("key", "value"), spec.same.map(([key, value]) => row(key, [value])));
  const title = spec.names.length > 1 ? `${spec.same.length} keys that are equal` : `all ${spec.same.length} keys`;
  return spec.names.length > 1 ? [differing, fold(title, same)] : [fold(title, same)];
}
