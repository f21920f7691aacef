// Curves as data: what is in view, the nearest point, smoothing.

// Exponential moving average, corrected for its start.
function smoothed(values, weight) {
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    if (!isNumber(value)) return value;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// The line that stands for a curve under a smoothing weight. A shortened curve has the means of its
// parts: its own points are their extremes.
function smoothedLine(curve, weight) {
  const means = curve.mean_x ? { x: curve.mean_x, y: curve.mean_y } : curve;
  return { x: means.x, y: smoothed(means.y, weight) };
}

// Index of the first place that is not below `target`.
function lowerBound(places, target) {
  let [low, high] = [0, places.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < target) low = middle + 1;
    else high = middle;
  }
  return low;
}

function nearestIndex(places, target) {
  const after = lowerBound(places, target);
  if (after === 0) return 0;
  if (after === places.length) return after - 1;
  return target - places[after - 1] <= places[after] - target ? after - 1 : after;
}

// Indices [first, last) of the points in [low, high], with one more on each side, since the line to
// it is in view.
function inView(places, low, high) {
  const first = Math.max(0, lowerBound(places, low) - 1);
  const last = Math.min(places.length, lowerBound(places, high) + 1);
  return [first, last];
}

function extent(lists) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of lists) {
    for (const value of values) {
      if (!isNumber(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

function padded([low, high], isLog) {
  if (isLog) {
    const factor = low === high ? 1.5 : (high / low) ** 0.04;
    return [low / factor, high * factor];
  }
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.04;
  return [low - margin, high + margin];
}

// SVG path through points; one that cannot be drawn interrupts it.
function pathOf(xs, ys, first, last, across, up) {
  const parts = [];
  let isConnected = false;
  for (let index = first; index < last; index++) {
    const value = ys[index];
    if (!isNumber(value) || (up.isLog && value <= 0) || (across.isLog && xs[index] <= 0)) {
      isConnected = false;
      continue;
    }
    const point = `${across.pixel(xs[index]).toFixed(1)} ${up.pixel(value).toFixed(1)}`;
    parts.push((isConnected ? "L" : "M") + point);
    isConnected = true;
  }
  return parts.join("");
}
