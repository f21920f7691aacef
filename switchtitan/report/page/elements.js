// Elements of the page. Text is always set as text, never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function seriesClass(index) {
  // Eight colours; those after them are dashed.
  return `series colour-${index % 8}${index >= 8 ? " dashed" : ""}`;
}

function swatch(index) {
  return drawn(
    "svg",
    { class: `swatch ${seriesClass(index)}`, viewBox: "0 0 18 10", "aria-hidden": "true" },
    drawn("line", { x1: 1, x2: 17, y1: 5, y2: 5 }),
  );
}

function fold(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}
