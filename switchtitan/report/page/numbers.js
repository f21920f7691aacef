// Numbers as text, and the ticks of axes.

const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function valueText(value, percent = false) {
  if (!isNumber(value)) return String(value);
  if (percent) return `${trimmed((100 * value).toPrecision(4))} %`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(3);
  if (size >= 1e5) return Math.round(value).toLocaleString("en-US");
  return trimmed(value.toPrecision(5));
}

function trimmed(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

// A tick's text needs as many digits as the step between ticks has.
function tickText(value, step, percent = false) {
  if (percent) return `${tickText(100 * value, 100 * step)} %`;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e4) {
    const [unit, suffix] = UNITS.find(([unit]) => size >= unit);
    return trimmed((value / unit).toFixed(decimals(step / unit))) + suffix;
  }
  if (size < 1e-3) return value.toExponential(Math.max(0, digitsBetween(size, step)));
  return value.toFixed(decimals(step));
}

function decimals(step) {
  return Math.min(8, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

function digitsBetween(size, step) {
  return Math.floor(Math.log10(size)) - Math.floor(Math.log10(step) + 1e-9);
}

function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) {
    ticks.push(index * step);
  }
  return ticks.map((value) => ({ value, step }));
}

function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  if (last - first <= 1 && high / low < 4) return linearTicks(low, high, count);
  const stride = Math.max(1, Math.ceil((last - first) / (count + 1)));
  const factors = Math.log10(high / low) <= 2.3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += stride) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) ticks.push({ value, step: value });
    }
  }
  return ticks.length >= 2 ? ticks : linearTicks(low, high, count);
}

// A map from [low, high] to pixels, and back.
function axisScale(low, high, from, to, isLog) {
  const convert = isLog ? Math.log10 : (value) => value;
  const revert = isLog ? (value) => 10 ** value : (value) => value;
  const [start, end] = [convert(low), convert(high)];
  const factor = (to - from) / (end - start);
  return {
    low, high, isLog,
    pixel: (value) => from + (convert(value) - start) * factor,
    value: (pixel) => revert(start + (pixel - from) / factor),
    ticks: (count) => (isLog ? logTicks : linearTicks)(low, high, count),
  };
}
