// Builds the page from its contents.

function toolbar(contents, state) {
  const names = contents.series.map((series) => series.name);
  const chips = names.map((name, index) => {
    const chip = element(
      "button",
      { type: "button", class: "chip", "aria-pressed": "true", title: contents.series[index].folder },
      swatch(index),
      element("span", {}, name),
    );
    chip.addEventListener("click", (event) => {
      if (event.shiftKey) state.showOnly(index, names.length);
      else state.toggle(index);
      chips.forEach((other, place) => other.setAttribute("aria-pressed", String(state.isVisible(place))));
    });
    return chip;
  });
  const reset = element("button", { type: "button", id: "reset", disabled: true }, "Reset zoom");
  reset.addEventListener("click", () => state.resetZoom());
  state.onZoom = (isZoomed) => {
    reset.disabled = !isZoomed;
  };
  return element(
    "div",
    { class: "toolbar" },
    element("div", { class: "chips", role: "group", "aria-label": "runs" }, chips),
    element("div", { class: "controls" }, smoothingSlider(state), acrossChoice(state), reset),
  );
}

function smoothingSlider(state) {
  const shown = element("output", {}, "0");
  const slider = element("input", { type: "range", id: "smoothing", min: 0, max: 0.99, step: 0.01, value: 0 });
  slider.addEventListener("input", () => {
    state.smoothing = Number(slider.value);
    shown.textContent = slider.value;
    state.redraw();
  });
  return element("label", {}, "Smoothing", slider, shown);
}

function acrossChoice(state) {
  if (!state.tokensPerStep.length || state.tokensPerStep.some((factor) => !factor)) return null;
  const options = ["step", "tokens"].map((name) => element("option", { value: name }, name));
  const choice = element("select", { id: "across" }, options);
  choice.addEventListener("change", () => state.setAcross(choice.value));
  return element("label", {}, "Axis", choice);
}

function themeButton() {
  const themes = ["auto", "light", "dark"];
  const button = element("button", { type: "button", id: "theme" }, "Theme: auto");
  button.addEventListener("click", () => {
    const current = document.documentElement.dataset.theme ?? "auto";
    const next = themes[(themes.indexOf(current) + 1) % themes.length];
    document.documentElement.dataset.theme = next;
    button.textContent = `Theme: ${next}`;
  });
  return button;
}

function sectionOf(spec, names, state) {
  const parts = [];
  if (spec.note) parts.push(element("p", { class: "muted" }, spec.note));
  for (const table of spec.tables ?? []) parts.push(figureTable(table, names));
  for (const intervals of spec.intervals ?? []) parts.push(intervalRows(intervals, names));
  if (spec.hasToolbar) parts.push(state.toolbar);
  if (spec.charts?.length) {
    const charts = spec.charts.map((chart) => new Chart(chart, names, state).node);
    parts.push(element("div", { class: "charts" }, charts));
  }
  for (const bars of spec.bars ?? []) parts.push(barRows(bars, names));
  for (const table of spec.folded ?? []) parts.push(fold(table.title, figureTable(table, names)));
  if (spec.text) parts.push(element("pre", {}, spec.text));
  if (spec.config) parts.push(...configTables(spec.config));
  const content = parts.filter((part) => part !== null);
  if (spec.isFolded) return element("section", { id: spec.id }, fold(spec.title, ...content));
  return element("section", { id: spec.id }, element("h2", {}, spec.title), ...content);
}

function notesOf(contents) {
  if (!contents.notes.length) return null;
  const items = contents.notes.map((note) => element("li", {}, note));
  return element("aside", { id: "notes" }, element("h2", {}, "What is missing"), element("ul", {}, items));
}

function build() {
  const contents = JSON.parse(document.getElementById("contents").textContent);
  const names = contents.series.map((series) => series.name);
  const state = new State(contents.series.map((series) => series.tokensPerStep));
  state.toolbar = toolbar(contents, state);
  document.getElementById("report").append(
    element(
      "header",
      {},
      element("div", {}, element("h1", {}, contents.title), element("p", { class: "muted" }, contents.subtitle)),
      themeButton(),
    ),
    ...[notesOf(contents)].filter((part) => part !== null),
    ...contents.sections.map((section) => sectionOf(section, names, state)),
    element("footer", { class: "muted" }, contents.footer),
  );
}

build();
