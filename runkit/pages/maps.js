"use strict";
// Heat maps over layer and step, the dots of the first figure, and the start of all charts of a page.
(() => {
  const { Chart, Lines, svg, html, shown, scaleOf, ticksOf, lineSwatch } = window.periln.charts;
  const CIVIDIS = ["#00204c", "#00336f", "#39486b", "#575d6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46"];
  const OVERFLOW = "#d55e00", GREY = "#eeeeee";

  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

  function colour(share, palette = CIVIDIS) {
    const at = Math.max(0, Math.min(1, share)) * (palette.length - 1);
    const [a, b] = [Math.floor(at), Math.ceil(at)].map((i) => [1, 3, 5].map((c) => parseInt(palette[i].slice(c, c + 2), 16)));
    return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * (at - Math.floor(at)))).join(",")})`;
  }

  class Heat extends Chart {
    take() {
      this.items = this.maps = this.plot.maps.map((map) => ({ ...map, x: this.pool[map.x], y: this.pool[map.y] }));
    }

    build() {
      this.toggles("series", "placement", this.maps, (m) => lineSwatch(m.c, ""));
      this.toggles("rate", "learning rate", this.maps);
      this.toggles("size", "size", this.maps);
      this.toggles("seed", "seed", this.maps);
      const { most, name } = this.plot;
      const stops = CIVIDIS.map((c, i) => `${c} ${(100 * i) / (CIVIDIS.length - 1)}%`).join(",");
      const bar = html("span", { class: "bar" });
      bar.style.background = `linear-gradient(90deg,${stops})`;
      const key = (c, text) => { const box = html("span", { class: "key" }); box.style.background = c; return [box, text]; };
      this.controls.append(html("span", { class: "scale" }, `${name}: 0 `, bar, ` ${most} or more `, ...key(OVERFLOW, "overflow "), ...key(GREY, "not recorded")));
    }

    // Maps of one placement, rate and size as one: of every cell the least over the seeds that are shown.
    merged() {
      const by = new Map();
      for (const map of this.maps.filter((m) => this.on(m))) {
        const { seed, ...rest } = map.k;
        const key = JSON.stringify(rest);
        if (!by.has(key)) by.set(key, { k: rest, c: map.c, seeds: [], lost: 0, cells: new Map(), x: new Set(), y: new Set() });
        const all = by.get(key);
        all.seeds.push(seed);
        all.lost += map.lost ? 1 : 0;
        map.x.forEach((x, i) => map.y.forEach((y, j) => {
          const value = map.v[j][i];
          all.x.add(x);
          all.y.add(y);
          if (value === null) return;
          const old = all.cells.get(`${x}|${y}`);
          if (old === undefined || value < old) all.cells.set(`${x}|${y}`, value);
        }));
      }
      const sorted = (set) => [...set].sort((a, b) => a - b);
      return [...by.values()].map((all) => ({ ...all, x: sorted(all.x), y: sorted(all.y) }));
    }

    draw() {
      const width = Math.max(280, this.canvas.clientWidth);
      const maps = this.merged();
      const columns = Math.max(1, Math.min(maps.length, Math.floor(width / 270), 4));
      const w = width / columns, h = 235;
      const height = Math.max(60, Math.ceil(maps.length / columns) * h);
      const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "heat maps; CSV has their numbers" });
      const steps = maps.flatMap((m) => m.x);
      const [first, last] = [Math.min(...steps), Math.max(...steps)];
      maps.forEach((map, i) => this.one(root, map, { x: (i % columns) * w + 40, y: Math.floor(i / columns) * h + 38, w: w - 52, h: h - 80 }, first, last));
      if (!maps.length) root.append(svg("text", { x: 10, y: 30, "font-size": 12 }, "nothing is chosen"));
      root.addEventListener("pointerleave", () => this.say(null, ""));
      this.canvas.replaceChildren(root);
    }

    one(root, map, box, first, last) {
      const x = scaleOf([first, last], false, box.x, box.x + box.w, 0);
      const edges = (v) => (v.length === 1 ? [v[0] - 0.5, v[0] + 0.5] : [v[0], ...v.slice(1).map((b, i) => (v[i] + b) / 2), v.at(-1)]);
      const xs = edges(map.x), ys = edges(map.y);
      const y = scaleOf([ys[0], ys.at(-1)], false, box.y + box.h, box.y, 0);
      root.append(svg("rect", { x: box.x, y: box.y, width: box.w, height: box.h, fill: GREY }));
      const values = [...map.cells.values()];
      const least = Math.min(...values);
      const title = [map.k.series, map.k.rate && `rate ${map.k.rate}`, map.k.size].filter(Boolean).join(", ");
      const ended = map.lost ? ` (${map.lost} of ${map.seeds.length} diverged)` : "";
      root.append(svg("text", { x: box.x, y: box.y - 22, "font-size": 12, "font-weight": 600 }, title));
      root.append(svg("text", { x: box.x, y: box.y - 7, "font-size": 12 }, (least < 0 ? "overflow" : `least ${least.toFixed(1)} bits`) + ended));
      map.x.forEach((step, i) => map.y.forEach((depth, j) => {
        const bits = map.cells.get(`${step}|${depth}`);
        if (bits === undefined) return;
        const [a, b] = [Math.max(box.x, Math.min(x(xs[i]), box.x + box.w)), Math.max(box.x, Math.min(x(xs[i + 1]), box.x + box.w))];
        const cell = svg("rect", { x: a, y: y(ys[j + 1]), width: Math.max(1, b - a) + 0.4, height: Math.max(0.5, y(ys[j]) - y(ys[j + 1])) + 0.4, fill: bits < 0 ? OVERFLOW : colour(bits / this.plot.most) });
        const part = depth === 0 ? "the embedding" : depth % 1 ? `layer ${depth + 0.5}, attention` : `layer ${depth}, MLP`;
        const text = `${title}\nstep ${step}, ${part}: ${bits < 0 ? "overflow" : `${bits.toFixed(1)} bits`}`;
        const hover = () => this.say(null, text, (a + b) / 2, y(ys[j + 1]));
        cell.addEventListener("pointermove", hover);
        cell.addEventListener("pointerdown", hover);
        root.append(cell);
      }));
      const label = { "font-size": 11, fill: "#1a1a1a" };
      for (const v of ticksOf(first, last, false, 4)) root.append(svg("text", { ...label, x: x(v), y: box.y + box.h + 14, "text-anchor": "middle" }, shown(v)));
      for (const v of ticksOf(ys[0], ys.at(-1), false, 5).filter((v) => v % 1 === 0)) root.append(svg("text", { ...label, x: box.x - 5, y: y(v) + 4, "text-anchor": "end" }, shown(v)));
      root.append(svg("text", { ...label, x: box.x + box.w / 2, y: box.y + box.h + 28, "text-anchor": "middle" }, "step"));
      root.append(svg("text", { ...label, x: box.x - 26, y: box.y + box.h / 2, "text-anchor": "middle", transform: `rotate(-90 ${box.x - 26} ${box.y + box.h / 2})` }, "layer"));
    }

    rows() {
      const head = ["placement", "learning_rate", "size", "seeds", "step", "layer", this.plot.name];
      return [head, ...this.merged().flatMap((m) => m.x.flatMap((x) => m.y.map((y) => [m.k.series, m.k.rate, m.k.size, m.seeds.join(" "), x, y, m.cells.get(`${x}|${y}`)])))];
    }
  }

  // The distance between any two layers: a line for neighbours above, and a map a placement; the mean of the seeds shown.
  class Pairs extends Heat {
    build() {
      this.toggles("series", "placement", this.maps, (m) => lineSwatch(m.c, m.d));
      this.toggles("rate", "learning rate", this.maps);
      this.toggles("size", "size", this.maps);
      this.toggles("seed", "seed", this.maps);
      const { most, name } = this.plot;
      const bar = html("span", { class: "bar" });
      bar.style.background = `linear-gradient(90deg,${VIRIDIS.map((c, i) => `${c} ${(100 * i) / (VIRIDIS.length - 1)}%`).join(",")})`;
      const key = html("span", { class: "key" });
      key.style.background = GREY;
      this.controls.append(html("span", { class: "scale" }, `${name}: 0 `, bar, ` ${shown(most)} `, key, "not measured"));
    }

    merged() {
      const by = new Map();
      for (const map of this.maps.filter((m) => this.on(m))) {
        const { seed, ...rest } = map.k;
        const key = JSON.stringify(rest);
        if (!by.has(key)) by.set(key, { k: rest, c: map.c, d: map.d, seeds: [], x: map.x, y: map.y, sums: new Map() });
        const all = by.get(key);
        all.seeds.push(seed);
        map.x.forEach((x, i) => map.y.forEach((y, j) => {
          const value = map.v[j][i];
          if (value === null) return;
          const [sum, count] = all.sums.get(`${x}|${y}`) || [0, 0];
          all.sums.set(`${x}|${y}`, [sum + value, count + 1]);
        }));
      }
      const mean = (all) => new Map([...all.sums].map(([at, [sum, count]]) => [at, sum / count]));
      return [...by.values()].map((all) => ({ ...all, cells: mean(all) }));
    }

    title(map) {
      return [map.k.series, map.k.rate && `rate ${map.k.rate}`, map.k.size].filter(Boolean).join(", ");
    }

    draw() {
      const width = Math.max(280, this.canvas.clientWidth), maps = this.merged(), top = 200;
      const columns = Math.max(1, Math.min(maps.length, Math.floor(width / 270), 4));
      const w = width / columns, h = Math.min(w, 330) + 20;
      const height = top + Math.max(60, Math.ceil(maps.length / columns) * h);
      const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "distances between layers; CSV has their numbers" });
      this.neighbours(root, maps, { x: 52, y: 26, w: width - 70, h: top - 76 });
      maps.forEach((map, i) => this.pairs(root, map, { x: (i % columns) * w + 48, y: top + Math.floor(i / columns) * h + 24, w: Math.min(w, 330) - 60, h: Math.min(w, 330) - 60 }));
      if (!maps.length) root.append(svg("text", { x: 10, y: 30, "font-size": 12 }, "nothing is chosen"));
      root.addEventListener("pointerleave", () => this.say(null, ""));
      this.canvas.replaceChildren(root);
    }

    pointed(mark, text, x, y) {
      for (const event of ["pointermove", "pointerdown"]) mark.addEventListener(event, () => this.say(null, text, x, y));
    }

    // A frame with its labels; returns the two scales.
    axes(root, box, xs, ys, names) {
      const x = scaleOf(xs, false, box.x, box.x + box.w, 0), y = scaleOf(ys, false, box.y + box.h, box.y, 0);
      const label = { "font-size": 11, fill: "#1a1a1a" };
      for (const v of ticksOf(x.low, x.high, false, 6).filter((v) => v % 1 === 0)) root.append(svg("text", { ...label, x: x(v), y: box.y + box.h + 14, "text-anchor": "middle" }, shown(v)));
      for (const v of ticksOf(y.low, y.high, false, 5)) root.append(svg("text", { ...label, x: box.x - 5, y: y(v) + 4, "text-anchor": "end" }, shown(v)));
      root.append(svg("text", { ...label, x: box.x + box.w / 2, y: box.y + box.h + 28, "text-anchor": "middle" }, names[0]));
      root.append(svg("text", { ...label, x: box.x - 34, y: box.y + box.h / 2, "text-anchor": "middle", transform: `rotate(-90 ${box.x - 34} ${box.y + box.h / 2})` }, names[1]));
      return [x, y];
    }

    neighbours(root, maps, box) {
      const lines = maps.map((map) => map.x.filter((at) => map.cells.has(`${at}|${at - 1}`)).map((at) => [at, map.cells.get(`${at}|${at - 1}`)]));
      const points = lines.flat();
      if (!points.length) return;
      root.append(svg("text", { x: box.x, y: box.y - 10, "font-size": 13, "font-weight": 600 }, "before and after a layer"));
      const [x, y] = this.axes(root, box, points.map((p) => p[0]), [0, ...points.map((p) => p[1])], ["layer", "distance / pi"]);
      root.append(svg("path", { d: `M${box.x},${box.y}v${box.h}h${box.w}`, stroke: "#555", fill: "none" }));
      lines.forEach((line, i) => {
        const map = maps[i];
        root.append(svg("path", { d: `M${line.map((p) => `${x(p[0])},${y(p[1])}`).join("L")}`, stroke: map.c, "stroke-dasharray": map.d, "stroke-width": 2, fill: "none", "stroke-linejoin": "round" }));
        for (const [at, value] of line) {
          const dot = svg("circle", { cx: x(at), cy: y(value), r: 4.5, fill: map.c });
          this.pointed(dot, `${this.title(map)}\nlayer ${at}: ${shown(value)} pi`, x(at), y(value));
          root.append(dot);
        }
      });
    }

    pairs(root, map, box) {
      const edges = (v) => [v[0] - 0.5, v.at(-1) + 0.5];
      root.append(svg("text", { x: box.x, y: box.y - 8, "font-size": 12, "font-weight": 600 }, this.title(map)));
      root.append(svg("rect", { x: box.x, y: box.y, width: box.w, height: box.h, fill: GREY }));
      const [x, y] = this.axes(root, box, edges(map.x), edges(map.y), ["layer", "layer"]);
      for (const [at, value] of map.cells) {
        const [a, b] = at.split("|").map(Number);
        const cell = svg("rect", { x: x(a - 0.5), y: y(b + 0.5), width: x(1) - x(0) + 0.4, height: y(0) - y(1) + 0.4, fill: colour(value / this.plot.most, VIRIDIS) });
        const name = (layer) => (layer ? `layer ${layer}` : "the embedding");
        this.pointed(cell, `${this.title(map)}\nafter ${name(Math.min(a, b))} and after ${name(Math.max(a, b))}: ${shown(value)} pi`, x(a), y(b + 0.5));
        root.append(cell);
      }
    }

    rows() {
      const head = ["placement", "learning_rate", "size", "seeds", "layer", "other_layer", this.plot.name];
      return [head, ...this.merged().flatMap((m) => [...m.cells].map(([at, value]) => [m.k.series, m.k.rate, m.k.size, m.seeds.join(" "), ...at.split("|"), value]).filter((row) => Number(row[4]) <= Number(row[5])))];
    }
  }

  // A row a placement: dots of loss and headroom, and how many runs finished at each rate.
  class Dots extends Chart {
    take() {
      this.items = this.plot.runs;
      if (this.rate === undefined) this.rate = this.plot.rate;
    }

    build() {
      const { plot } = this;
      if (plot.rates.length > 1) {
        const choices = plot.rates.map((rate) => {
          const box = html("input", { type: "radio", name: `rate-${this.name}`, value: rate, checked: rate === this.rate });
          box.addEventListener("change", () => { this.rate = rate; this.draw(); });
          return html("label", {}, box, String(rate));
        });
        this.controls.append(html("fieldset", { class: "toggle" }, html("legend", {}, "learning rate"), ...choices));
      }
      this.toggles("seed", "seed", plot.runs);
      if (plot.own) this.controls.append(html("span", { class: "scale" }, "each placement at its own best rate until one is chosen"));
    }

    chosen() {
      const { plot } = this;
      return plot.runs.filter((run) => this.on(run) && (this.rate === null ? run.compared : run.k.rate === this.rate));
    }

    draw() {
      const { plot } = this, width = Math.max(280, this.canvas.clientWidth);
      const wide = width >= 620, row = plot.rows.length > 6 ? 30 : 44;
      const names = wide ? Math.min(170, 10 + 7.6 * Math.max(...plot.rows.map((r) => r.name.length))) : 0;
      const h = 34 + plot.rows.length * (row + (wide ? 0 : 14)) + 40;
      const shares = wide ? [0.37, 0.37, 0.26] : [1, 1, 1];
      const height = wide ? h : 3 * h;
      const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "dots; CSV has their numbers" });
      let left = names;
      shares.forEach((share, p) => {
        const w = wide ? (width - names) * share : width;
        const box = { x: (wide ? left : 0) + 14, y: (wide ? 0 : p * h) + 30, w: w - 28, row: row + (wide ? 0 : 14) };
        box.h = box.row * plot.rows.length;
        if (p < 2) this.dots(root, box, plot.panels[p], wide && p === 0, !wide);
        else this.table(root, box, !wide);
        left += w;
      });
      root.addEventListener("pointerleave", () => this.say(null, ""));
      this.canvas.replaceChildren(root);
    }

    names(root, box, outside, inside) {
      this.plot.rows.forEach((row, i) => {
        if (outside) root.append(svg("text", { x: box.x - 14, y: box.y + (i + 0.5) * box.row + 4, "text-anchor": "end", "font-size": 13, "font-weight": 700, fill: row.c }, row.name));
        if (inside) root.append(svg("text", { x: box.x, y: box.y + i * box.row + 13, "font-size": 12, "font-weight": 700, fill: row.c }, row.name));
      });
    }

    dots(root, box, panel, outside, inside) {
      const runs = this.chosen().filter((run) => run[panel.key] !== null && (panel.key !== "loss" || !run.lost));
      const finite = runs.map((run) => run[panel.key]).filter((v) => v > -1e9);
      const mean = finite.reduce((a, b) => a + b, 0) / (finite.length || 1);
      const spread = Math.max(...finite) - Math.min(...finite);
      const floor = spread < 0.02 * Math.abs(mean) ? [mean * 0.99, mean * 1.01] : [];
      const x = scaleOf(finite.concat(floor), false, box.x, box.x + box.w, 0.12);
      root.append(svg("text", { x: box.x, y: box.y - 12, "font-size": 13, "font-weight": 600 }, panel.title + (this.rate === null ? "" : `, rate ${this.rate}`)));
      if (finite.length) for (const v of ticksOf(x.low, x.high, false, 5)) {
        root.append(svg("line", { x1: x(v), x2: x(v), y1: box.y, y2: box.y + box.h, stroke: "#dddddd" }));
        root.append(svg("text", { x: x(v), y: box.y + box.h + 15, "font-size": 12, "text-anchor": "middle" }, shown(v)));
      }
      root.append(svg("path", { d: `M${box.x},${box.y + box.h}h${box.w}`, stroke: "#555" }));
      root.append(svg("text", { x: box.x + box.w / 2, y: box.y + box.h + 32, "font-size": 12, "text-anchor": "middle" }, panel.x));
      this.names(root, box, outside, inside);
      this.plot.rows.forEach((row, i) => {
        const y = box.y + (i + 0.5) * box.row + (inside ? 7 : 0);
        const of = runs.filter((run) => run.k.series === row.series);
        const calm = of.filter((run) => run[panel.key] > -1e9);
        const alive = calm.filter((run) => !run.lost).map((run) => run[panel.key]);
        if (alive.length > 1) {
          const m = alive.reduce((a, b) => a + b, 0) / alive.length;
          root.append(svg("line", { x1: x(m), x2: x(m), y1: y - 12, y2: y + 12, stroke: row.c, "stroke-width": 2.5 }));
        }
        if (calm.length < of.length) root.append(svg("text", { x: box.x + 4, y: y + 4, "font-size": 12, fill: row.c }, "overflow"));
        else if (!of.length) root.append(svg("text", { x: box.x + 4, y: y + 4, "font-size": 12, fill: "#555" }, panel.key === "loss" ? "none finished" : "not recorded"));
        for (const run of calm) {
          const at = x(run[panel.key]);
          const dot = run.lost ? svg("text", { x: at, y: y + 6, "text-anchor": "middle", "font-size": 18, "font-weight": 700, fill: row.c }, "×") : svg("circle", { cx: at, cy: y, r: 6, fill: row.c, "fill-opacity": 0.75, stroke: "#fff" });
          const text = `${row.name}, rate ${run.k.rate}, seed ${run.k.seed}${run.lost ? " (diverged)" : ""}\n${panel.title}: ${shown(run[panel.key])} ${panel.unit}`;
          for (const event of ["pointermove", "pointerdown"]) dot.addEventListener(event, () => this.say(null, text, at, y));
          dot.setAttribute("tabindex", "0");
          dot.setAttribute("aria-label", text);
          dot.addEventListener("focus", () => this.say(null, text, at, y));
          dot.addEventListener("blur", () => this.say(null, ""));
          root.append(dot);
        }
      });
    }

    table(root, box, inside) {
      const { plot } = this, w = box.w / plot.rates.length;
      root.append(svg("text", { x: box.x, y: box.y - 12, "font-size": 13, "font-weight": 600 }, "finished of started"));
      this.names(root, box, false, inside);
      plot.rows.forEach((row, i) => plot.rates.forEach((rate, j) => {
        const of = plot.runs.filter((run) => this.on(run) && run.k.series === row.series && run.k.rate === rate);
        if (!of.length) return;
        const done = of.filter((run) => run.status === "completed").length;
        const lost = of.filter((run) => run.lost).length;
        const fill = done + lost < of.length ? "#eeeeee" : !lost ? "#d3e8dc" : done ? "#fbe9c6" : "#f3cfc1";
        const y = box.y + i * box.row + (inside ? 18 : 3), tall = box.row - (inside ? 20 : 6);
        root.append(svg("rect", { x: box.x + j * w + 1, y, width: w - 2, height: tall, fill }));
        root.append(svg("text", { x: box.x + (j + 0.5) * w, y: y + tall / 2 + 4, "text-anchor": "middle", "font-size": w < 34 ? 10 : 12 }, `${done}/${of.length}`));
      }));
      const every = Math.ceil(plot.rates.length / Math.max(1, Math.floor(box.w / 46)));
      plot.rates.forEach((rate, j) => {
        if (j % every === 0) root.append(svg("text", { x: box.x + (j + 0.5) * w, y: box.y + box.h + 15, "font-size": 12, "text-anchor": "middle" }, String(rate)));
      });
      root.append(svg("text", { x: box.x + box.w / 2, y: box.y + box.h + 32, "font-size": 12, "text-anchor": "middle" }, "learning rate"));
    }

    rows() {
      const { panels, runs } = this.plot;
      return [["run", "placement", "learning_rate", "seed", "status", ...panels.map((p) => p.title)], ...runs.filter((r) => this.on(r)).map((r) => [r.run, r.k.series, r.k.rate, r.k.seed, r.status, ...panels.map((p) => (r[p.key] < -1e9 ? "overflow" : r[p.key]))])];
    }
  }

  // --- the start of a page's charts: each is built when it is first seen --------------------------------------
  const kinds = { lines: Lines, map: Heat, pairs: Pairs, dots: Dots };
  const made = (figure, name, plot, pool) => new kinds[plot.kind](figure, name, plot, pool);
  window.periln.charts.made = made;
  const carried = document.getElementById("plots");
  if (!carried) return;
  const { pool, plots } = JSON.parse(carried.textContent);
  function start(figure) {
    const name = figure.id.replace("figure-", "");
    const chart = made(figure, name, plots[name], pool);
    try {
      chart.start();
    } catch (error) {
      chart.holder.remove(); // the picture stays
      chart.picture.hidden = false;
      throw error;
    }
  }
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); start(entry.target); }
  }, { rootMargin: "200px" });
  for (const figure of document.querySelectorAll("figure.drawn")) {
    if (!plots[figure.id.replace("figure-", "")]) continue;
    if (figure.id === "figure-overview") start(figure);
    else seen.observe(figure);
  }
})();
