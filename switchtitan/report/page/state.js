// What all charts share: hidden runs, smoothing, the quantity of the horizontal axis, zoom, cursor.

class State {
  constructor(tokensPerStep) {
    this.tokensPerStep = tokensPerStep;
    this.hidden = new Set();
    this.smoothing = 0;
    this.across = "step";
    this.zoom = null; // [low, high] in units of the horizontal axis
    this.cursor = null; // {chart, place}
    this.charts = [];
    this.onZoom = () => {};
    this.isDue = false;
  }

  // Places of a curve, in units of the horizontal axis; null if they are not known.
  placesOf(curve, index) {
    if (this.across === "step") return curve.x;
    const factor = this.tokensPerStep[index];
    return factor ? curve.x.map((step) => step * factor) : null;
  }

  isVisible(index) {
    return !this.hidden.has(index);
  }

  toggle(index) {
    if (!this.hidden.delete(index)) this.hidden.add(index);
    this.redraw();
  }

  // Shows one run alone; all of them if it already is.
  showOnly(index, count) {
    const others = [...Array(count).keys()].filter((other) => other !== index);
    const isAlone = this.isVisible(index) && others.every((other) => this.hidden.has(other));
    this.hidden = new Set(isAlone ? [] : others);
    this.redraw();
  }

  setZoom(zoom) {
    this.zoom = zoom;
    this.redraw();
  }

  setAcross(across) {
    this.across = across;
    this.zoom = null;
    this.redraw();
  }

  isZoomed() {
    return this.zoom !== null || this.charts.some((chart) => chart.ownZoom || chart.heightZoom);
  }

  resetZoom() {
    for (const chart of this.charts) chart.forgetZoom();
    this.setZoom(null);
  }

  // Draws once per frame, however many changes there are.
  redraw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.cursor = null;
      for (const chart of this.charts) chart.draw();
      this.onZoom(this.isZoomed());
    });
  }

  setCursor(chart, place) {
    this.cursor = place === null ? null : { chart, place };
    for (const other of this.charts) {
      if (other === chart || (other.isLinked && chart.isLinked)) other.drawCursor();
    }
  }
}
