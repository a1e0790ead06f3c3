// Small line plots, drawn as SVG.

const SVG = "http://www.w3.org/2000/svg";
const MOST = 120;

function element(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A plot of one figure over time, and where there is one of what it was expected to be. */
export class Plot {
  /** `show` makes a text of a value; `note` says what a point is. */
  constructor(parent, name, title, show, note, top = null) {
    this.points = [];
    this.count = 0;
    this.show = show;
    this.top = top;
    const card = document.createElement("div");
    card.className = "plot";
    card.dataset.figure = name;
    const head = document.createElement("h2");
    this.value = document.createElement("span");
    this.value.className = "value";
    head.append(title, this.value);
    this.svg = element("svg", { role: "img" });
    const below = document.createElement("p");
    below.className = "note";
    below.textContent = note;
    card.append(head, this.svg, below);
    parent.append(card);
    this.title = title;
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** Add a point; null is "not known", and no point. */
  add(value, expected = null) {
    if (value == null) return;
    this.points.push({ value, expected });
    this.count += 1;
    if (this.points.length > MOST) this.points.shift();
  }

  /** Draw, with the value that is said to be the present one. */
  draw(now = this.now) {
    this.now = now;
    this.value.textContent = now == null ? "–" : this.show(now);
    const { clientWidth: width, clientHeight: height } = this.svg;
    this.svg.dataset.points = this.count;
    this.svg.setAttribute("aria-label", `${this.title}: ${this.value.textContent}, ${this.points.length} points`);
    if (!width) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const most = this.top ?? (Math.max(0, ...this.points.flatMap((p) => [p.value, p.expected ?? 0])) * 1.1 || 1);
    const step = Math.min(12, (width - 6) / Math.max(1, this.points.length - 1));
    const x = (i) => width - 4 - (this.points.length - 1 - i) * step;
    const y = (value) => height - 3 - (value / most) * (height - 8);
    const place = (i, value) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`;
    const drawn = [
      element("line", { class: "grid", x1: 0, x2: width, y1: y(0), y2: y(0) }),
      element("line", { class: "grid", x1: 0, x2: width, y1: y(most / 2), y2: y(most / 2) }),
    ];
    if (this.points.length) {
      const label = element("text", { x: 2, y: y(most / 2) - 3 });
      label.textContent = this.show(most / 2);
      drawn.push(label);
    }
    const expected = this.points.map((p, i) => (p.expected == null ? null : place(i, p.expected))).filter(Boolean);
    if (expected.length > 1) drawn.push(element("polyline", { class: "expected", points: expected.join(" ") }));
    drawn.push(element("polyline", { class: "measured", points: this.points.map((p, i) => place(i, p.value)).join(" ") }));
    const dots = this.points.length <= 30 ? this.points.map((p, i) => [p, i]) : [];
    for (const [p, i] of dots) {
      drawn.push(element("circle", { class: "dots", cx: x(i).toFixed(1), cy: y(p.value).toFixed(1), r: 2.2 }));
    }
    this.svg.replaceChildren(...drawn);
  }
}
