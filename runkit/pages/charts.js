"use strict";
// Charts in inline SVG, from the numbers that the page carries in <script id="plots">: see eval/figures/plots.py.
// Where a figure has numbers, its chart takes the picture's place; the button "Picture" brings the picture back.
(() => {
  const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3"];
  const MARGIN = { left: 58, right: 12, top: 26, bottom: 40 };

  function svg(name, attributes = {}, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  }

  function html(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
      else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  }

  function shown(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "not recorded";
    if (!Number.isFinite(value)) return value > 0 ? "infinite" : "overflow";
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(parseFloat(value.toPrecision(5)));
  }

  // --- axes ------------------------------------------------------------------------------------------------

  function ticksOf(low, high, log, count) {
    if (log) {
      const found = [];
      const decades = Math.log10(high / low);
      const parts = decades < 2.3 ? [1, 2, 5] : [1];
      const every = Math.max(1, Math.ceil(decades / count));
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
        if (parts.length === 1 && e % every) continue;
        for (const part of parts) if (part * 10 ** e >= low && part * 10 ** e <= high) found.push(part * 10 ** e);
      }
      if (found.length > 1) return found;
    }
    const raw = (high - low) / count;
    const base = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * base).find((s) => s >= raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
    return found;
  }

  function scaleOf(values, log, from, to, pad) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (Number.isFinite(v) && (!log || v > 0)) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) [low, high] = log ? [1, 10] : [0, 1];
    const f = log ? Math.log : (v) => v;
    const g = log ? Math.exp : (v) => v;
    let [a, b] = [f(low), f(high)];
    if (b - a < (log ? 0.1 : 1e-9 + 1e-6 * Math.abs(a))) { const w = log ? 0.6 : Math.max(0.05 * Math.abs(a), 0.05); a -= w; b += w; }
    const room = pad * (b - a);
    a -= room; b += room;
    const place = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
    return Object.assign(place, { low: g(a), high: g(b), log, invert: (p) => g(a + ((p - from) / (to - from)) * (b - a)) });
  }

  function axes(group, box, x, y, panel, plot) {
    const text = { "font-size": 12, fill: "#1a1a1a" };
    for (const v of ticksOf(y.low, y.high, y.log, Math.max(3, (box.h / 45) | 0))) {
      group.append(svg("line", { x1: box.x, x2: box.x + box.w, y1: y(v), y2: y(v), stroke: "#dddddd" }));
      group.append(svg("text", { ...text, x: box.x - 6, y: y(v) + 4, "text-anchor": "end" }, shown(v)));
    }
    const at = plot.ticks && plot.ticks.length < 9 ? plot.ticks : ticksOf(x.low, x.high, x.log, Math.max(4, (box.w / 90) | 0));
    for (const v of at) {
      group.append(svg("line", { x1: x(v), x2: x(v), y1: box.y, y2: box.y + box.h, stroke: "#eeeeee" }));
      group.append(svg("text", { ...text, x: x(v), y: box.y + box.h + 16, "text-anchor": "middle" }, shown(v)));
    }
    group.append(svg("path", { d: `M${box.x},${box.y}V${box.y + box.h}H${box.x + box.w}`, fill: "none", stroke: "#555" }));
    group.append(svg("text", { ...text, x: box.x + box.w / 2, y: box.y + box.h + 33, "text-anchor": "middle" }, plot.x));
    group.append(svg("text", { ...text, x: box.x - MARGIN.left + 4, y: box.y - 10, "font-weight": 600 }, [panel.title, panel.y].filter(Boolean).join(": ")));
  }

  // --- what all charts have --------------------------------------------------------------------------------

  class Chart {
    constructor(figure, name, plot, pool) {
      Object.assign(this, { figure, name, plot, pool, off: new Set() });
      this.picture = figure.querySelector(".scroll");
      this.controls = html("div", { class: "controls" });
      this.canvas = html("div", { class: "canvas" });
      this.tip = html("div", { class: "tip", role: "status", hidden: true });
      this.holder = html("div", { class: "chart" }, this.controls, this.canvas, this.tip);
    }

    start() {
      this.take();
      this.control();
      if (this.picture) {
        this.picture.before(this.holder);
        this.picture.hidden = true;
      } else this.figure.prepend(this.holder);
      this.draw();
      let width = this.canvas.clientWidth;
      new ResizeObserver(() => {
        if (this.canvas.clientWidth && this.canvas.clientWidth !== width) { width = this.canvas.clientWidth; this.draw(); }
      }).observe(this.canvas);
    }

    // The controls, and what every chart offers.
    control() {
      this.controls.replaceChildren();
      this.build();
      this.controls.append(html("button", { type: "button", class: "csv", title: "download what is shown as CSV", on: { click: () => this.download() } }, "CSV"));
      if (this.picture) this.controls.append(html("button", { type: "button", class: "swap", on: { click: (e) => this.swap(e.target) } }, "Picture"));
      this.known = this.choices();
    }

    // What can be switched on and off; the controls are made anew where it changes.
    choices() {
      return JSON.stringify([...new Set(this.items.flatMap((item) => Object.entries(item.k).map(String)))].sort());
    }

    // New numbers of a page that is alive: what was chosen stays.
    renew(plot, pool) {
      Object.assign(this, { plot, pool });
      this.take();
      if (this.choices() !== this.known) this.control();
      this.draw();
    }

    swap(button) {
      this.picture.hidden = !this.picture.hidden;
      this.canvas.hidden = !this.picture.hidden;
      button.textContent = this.picture.hidden ? "Picture" : "Chart";
      if (this.picture.hidden) this.draw();
    }

    // A group of checkboxes, one for each value of a key; nothing where there is one value.
    toggles(key, title, items, swatch = () => "") {
      const values = [...new Map(items.map((item) => [String(item.k[key]), item])).entries()].filter(([v]) => v !== "undefined");
      if (values.length < 2) return;
      const boxes = values.map(([value, item]) => {
        const box = html("input", { type: "checkbox", checked: !this.off.has(`${key}:${value}`), "data-key": key, "data-value": value });
        box.addEventListener("change", () => {
          this.off[box.checked ? "delete" : "add"](`${key}:${value}`);
          this.draw();
        });
        const mark = html("span", { class: "swatch" });
        mark.innerHTML = swatch(item);
        return html("label", {}, box, mark, item.k[`${key}_name`] || value);
      });
      this.controls.append(html("fieldset", { class: "toggle" }, html("legend", {}, title), ...boxes));
    }

    on(item) {
      return Object.entries(item.k).every(([key, value]) => !this.off.has(`${key}:${value}`));
    }

    say(event, text, x, y) {
      this.tip.hidden = !text;
      if (!text) return;
      this.tip.textContent = text;
      const width = this.holder.clientWidth;
      this.tip.style.left = `${Math.max(0, Math.min(x + 12, width - this.tip.offsetWidth))}px`;
      this.tip.style.top = `${this.canvas.offsetTop + Math.max(0, y - this.tip.offsetHeight - 10)}px`;
    }

    download() {
      const { save, quoted } = window.periln;
      save(`figure-${this.name}.csv`, this.rows().map((row) => row.map((c) => quoted(String(c ?? ""))).join(",")).join("\n") + "\n");
    }
  }

  const lineSwatch = (colour, dash, width = 3) =>
    `<svg width="26" height="10" aria-hidden="true"><line x1="1" x2="25" y1="5" y2="5" stroke="${colour}" stroke-width="${width}" stroke-dasharray="${dash}"/></svg>`;
  const described = (k) =>
    [k.series, k.rate && `rate ${k.rate}`, k.size, k.layer && `layer ${k.layer}`, k.seed && `seed ${k.seed}`].filter(Boolean).join(", ");

  // --- lines -----------------------------------------------------------------------------------------------

  class Lines extends Chart {
    take() {
      const { plot } = this;
      this.items = this.lines = plot.lines.map((line) => ({ ...line, x: this.pool[line.x], y: this.pool[line.y] }));
      this.rates = [...new Set(this.lines.map((line) => String(line.k.rate)))];
      this.steps = [...new Set(this.lines.map((line) => line.t).filter((t) => t !== undefined))].sort((a, b) => a - b);
      this.step ??= this.steps.at(-1);
      this.log ??= plot.panels.map((panel) => panel.log);
      this.smooth ??= 0;
    }

    build() {
      const { plot } = this;
      this.toggles("series", "placement", this.lines, (l) => lineSwatch(l.c, ""));
      this.toggles("rate", "learning rate", this.lines, (l) => (plot.marks ? "" : lineSwatch("#444444", this.dash(l), 2)));
      this.toggles("size", "size", this.lines);
      this.toggles("seed", "seed", this.lines);
      this.toggles("layer", "layer", this.lines, (l) => lineSwatch(l.c, ""));
      const axis = html("select", { "aria-label": "y axis" }, html("option", { value: "" }, "as drawn"), html("option", { value: "linear" }, "linear"), html("option", { value: "log" }, "log"));
      axis.addEventListener("change", () => {
        this.log = plot.panels.map((panel) => (axis.value ? axis.value === "log" : panel.log));
        this.draw();
      });
      this.controls.append(html("label", { class: "axis" }, "y axis ", axis));
      if (this.steps.length > 1) this.slider();
      if (plot.steps) this.ranges();
    }

    slider() {
      const label = html("output", {}, `step ${this.step}`);
      const range = html("input", { type: "range", min: 0, max: this.steps.length - 1, value: this.steps.length - 1, "aria-label": "recorded step" });
      range.addEventListener("input", () => {
        this.step = this.steps[+range.value];
        label.textContent = `step ${this.step}`;
        this.draw();
      });
      this.controls.append(html("label", { class: "step" }, "recorded step ", range, label));
    }

    ranges() {
      const last = Math.max(...this.lines.map((line) => line.x.at(-1) ?? 0));
      const smooth = html("input", { type: "range", min: 0, max: 98, value: 100 * this.smooth, "aria-label": "smoothing" });
      smooth.addEventListener("input", () => { this.smooth = smooth.value / 100; this.draw(); });
      const ends = [this.from ?? 0, this.to ?? (this.picture ? last : "")].map((value, i) => html("input", { type: "number", min: 0, value, placeholder: "last", "aria-label": i ? "last step" : "first step" }));
      ends.forEach((box) => box.addEventListener("change", () => {
        const [from, to] = ends.map((end, i) => (end.value === "" ? [0, Infinity][i] : +end.value));
        this.from = Math.min(from, to);
        this.to = Math.max(from, to);
        this.draw();
      }));
      this.controls.append(html("label", { class: "smooth" }, "smoothing ", smooth), html("label", { class: "from" }, "steps ", ends[0], " to ", ends[1]));
    }

    dash(line) {
      return line.d || DASHES[Math.max(0, this.rates.indexOf(String(line.k.rate))) % DASHES.length];
    }

    // The points of a line as it is shown: within the range of steps, smoothed.
    points(line) {
      const out = [];
      let mean = 0, weight = 0;
      line.x.forEach((x, i) => {
        const y = line.y[i];
        if (y === null) return;
        mean = this.smooth * mean + (1 - this.smooth) * y;
        weight = this.smooth * weight + (1 - this.smooth);
        if ((this.from ?? -Infinity) <= x && x <= (this.to ?? Infinity)) out.push([x, mean / weight]);
      });
      return out;
    }

    visible() {
      let found = this.lines.filter((line) => this.on(line));
      if (this.steps.length > 1) {
        const newest = new Map();
        for (const line of found) {
          const key = `${line.p}|${line.run}|${line.k.layer}`;
          if (line.t <= this.step && !(newest.get(key)?.t > line.t)) newest.set(key, line);
        }
        found = [...newest.values()];
      }
      return found.map((line) => ({ ...line, points: this.points(line) }));
    }

    // Lines of the same placement, rate and size in one panel: their seeds, and the mean of those that did not diverge.
    groups(lines) {
      const by = new Map();
      for (const line of lines) {
        const { seed, ...rest } = line.k;
        const key = JSON.stringify(rest);
        if (!by.has(key)) by.set(key, []);
        by.get(key).push(line);
      }
      return [...by.values()].map((seeds) => {
        const alive = seeds.filter((line) => !line.lost);
        const sums = new Map();
        for (const line of alive) for (const [x, y] of line.points) sums.set(x, [...(sums.get(x) || []), y]);
        const combine = this.plot.combine === "max" ? (v) => Math.max(...v) : (v) => v.reduce((a, b) => a + b, 0) / v.length;
        const mean = [...sums.entries()].filter(([, v]) => v.length === alive.length).sort((a, b) => a[0] - b[0]).map(([x, v]) => [x, combine(v)]);
        return { seeds, alive, mean };
      });
    }

    draw() {
      const { plot } = this;
      const width = Math.max(280, this.canvas.clientWidth);
      const lines = this.visible();
      const columns = width >= 620 ? Math.min(plot.panels.length, width >= 900 ? 3 : 2) : 1;
      const w = width / columns, h = columns > 1 || plot.panels.length > 1 ? 270 : 300;
      const rows = Math.ceil(plot.panels.length / columns);
      const root = svg("svg", { width, height: rows * h, viewBox: `0 0 ${width} ${rows * h}`, role: "img", "aria-label": "chart; CSV has its numbers" });
      this.hits = [];
      plot.panels.forEach((panel, p) => {
        const box = { x: (p % columns) * w + MARGIN.left, y: Math.floor(p / columns) * h + MARGIN.top, w: w - MARGIN.left - MARGIN.right, h: h - MARGIN.top - MARGIN.bottom };
        this.panel(root, box, panel, p, lines.filter((line) => line.p === p));
      });
      const dot = svg("circle", { r: 4, fill: "none", stroke: "#000", "stroke-width": 1.5, visibility: "hidden" });
      root.append(dot);
      const hover = (event) => this.hover(event, root, dot);
      root.addEventListener("pointermove", hover);
      root.addEventListener("pointerdown", hover);
      root.addEventListener("pointerleave", () => { this.say(null, ""); dot.setAttribute("visibility", "hidden"); });
      this.canvas.replaceChildren(root);
    }

    panel(root, box, panel, p, lines) {
      const { plot } = this, log = this.log[p];
      const groups = this.groups(lines);
      const x = scaleOf(lines.flatMap((l) => l.points.map((pt) => pt[0])), plot.x_log, box.x, box.x + box.w, plot.x_log ? 0.06 : 0);
      const calm = lines.filter((line) => !line.lost).flatMap((l) => l.points.map((pt) => pt[1]));
      let values = calm.length && !log ? calm.concat(lines.filter((l) => l.lost).flatMap((l) => l.points.map((pt) => Math.min(pt[1], 1.5 * Math.max(...calm))))) : lines.flatMap((l) => l.points.map((pt) => pt[1]));
      if (plot.limit) values = values.concat(plot.limit.y);
      const y = scaleOf(values, log, box.y + box.h, box.y, 0.06);
      axes(root, box, x, y, panel, plot);
      const id = `clip-${this.name}-${p}`;
      const clip = svg("clipPath", { id });
      clip.append(svg("rect", { x: box.x, y: box.y - 4, width: box.w + 4, height: box.h + 4 }));
      const area = svg("g", { "clip-path": `url(#${id})` });
      root.append(clip, area);
      if (plot.limit) {
        area.append(svg("line", { x1: box.x, x2: box.x + box.w, y1: y(plot.limit.y), y2: y(plot.limit.y), stroke: "#000", "stroke-dasharray": "6 4" }));
        area.append(svg("text", { x: box.x + 4, y: y(plot.limit.y) - 4, "font-size": 11 }, plot.limit.name));
      }
      const draw = (points, line, style, name) => {
        const kept = points.filter(([, v]) => Number.isFinite(v) && (!log || v > 0));
        const d = kept.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
        area.append(svg("path", { d, fill: "none", stroke: line.c, "stroke-linejoin": "round", ...style }));
        if (kept.length === 1 || plot.marks) for (const [a, b] of kept) area.append(svg("circle", { cx: x(a), cy: y(b), r: 3, fill: line.c }));
        for (const [a, b] of kept) this.hits.push({ px: x(a), py: y(b), text: `${name}\n${plot.x.split(" (")[0]} ${shown(a)}: ${shown(b)}`, box });
      };
      for (const { seeds, alive, mean } of groups) {
        for (const line of seeds) {
          const style = line.lost ? { "stroke-width": 1.4, "stroke-dasharray": "1 3" } : { "stroke-width": alive.length > 1 ? 1 : 2.2, "stroke-opacity": alive.length > 1 ? 0.5 : 1, "stroke-dasharray": this.dash(line) };
          draw(line.points, line, style, described(line.k) + (line.lost ? " (diverged)" : ""));
          if (line.lost && line.points.length) {
            const [a, b] = line.points.at(-1);
            area.append(svg("text", { x: x(a), y: Math.max(y(b), box.y + 6) + 5, "text-anchor": "middle", "font-size": 16, "font-weight": 700, fill: line.c }, "×"));
          }
          for (const [at, name] of line.m || []) {
            const near = line.points.find((pt) => pt[0] >= at);
            const py = near ? Math.max(y(near[1]), box.y + 8) : box.y + 8;
            area.append(svg("text", { x: x(at), y: py + 4, "text-anchor": "middle", "font-size": 12, fill: line.c }, name.startsWith("spike") ? "▼" : "✕"));
            this.hits.push({ px: x(at), py, text: `${described(line.k)}\nstep ${at}: ${name}`, box });
          }
        }
        if (alive.length > 1) {
          const { seed, ...rest } = alive[0].k;
          draw(mean, alive[0], { "stroke-width": 2.4, "stroke-dasharray": this.dash(alive[0]) }, `${described(rest)}, ${this.plot.combine === "max" ? "largest" : "mean"} of ${alive.length} seeds`);
        }
      }
      if (!lines.length) root.append(svg("text", { x: box.x + box.w / 2, y: box.y + box.h / 2, "text-anchor": "middle", "font-size": 12, fill: "#555" }, "nothing is chosen"));
    }

    hover(event, root, dot) {
      const frame = root.getBoundingClientRect();
      const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
      let best = null, least = 40 ** 2;
      for (const hit of this.hits) {
        if (hit.px < hit.box.x - 1 || hit.py < hit.box.y - 8) continue;
        const far = (hit.px - x) ** 2 + (hit.py - y) ** 2;
        if (far < least) [best, least] = [hit, far];
      }
      dot.setAttribute("visibility", best ? "visible" : "hidden");
      if (best) { dot.setAttribute("cx", best.px); dot.setAttribute("cy", best.py); }
      this.say(event, best ? best.text : "", best ? best.px : 0, best ? best.py : 0);
    }

    rows() {
      const head = ["run", "placement", "learning_rate", "size", "seed", "layer", "recorded_step", "quantity", this.plot.x, "value"];
      return [head, ...this.visible().flatMap((l) => l.points.map(([x, y]) => [l.run, l.k.series, l.k.rate, l.k.size, l.k.seed, l.k.layer, l.t, [this.plot.panels[l.p].title, this.plot.panels[l.p].y].filter(Boolean).join(": "), x, y]))];
    }
  }

  window.periln.charts = { Chart, Lines, svg, html, shown, scaleOf, ticksOf, axes, lineSwatch, MARGIN };
})();
