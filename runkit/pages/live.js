"use strict";
// The live page: asks its server for the state of the runs every few seconds, and shows it.
(() => {
  const { made, html } = window.periln.charts;
  const every = 1000 * parseFloat(document.body.dataset.every);
  const charts = {};
  const byId = (id) => document.getElementById(id);

  function span(seconds) {
    if (seconds === null || seconds === undefined) return "";
    if (seconds < 90) return `${Math.round(seconds)} s`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
    if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
    return `${(seconds / 86400).toFixed(1)} days`;
  }

  function cells(run) {
    const skips = Object.entries(run.skips || {});
    const total = skips.reduce((sum, [, n]) => sum + n, 0);
    const bits = run.bits === null || run.bits === undefined ? "" : run.bits < 0 ? "overflow" : run.bits.toFixed(1);
    const quiet = run.quiet > Math.max(60, 20 * (run.seconds || 0)) ? `, no record for ${span(run.quiet)}` : "";
    return [
      run.status + quiet + (run.reason ? `: ${run.reason}` : ""),
      run.steps ? `${run.step} of ${run.steps}` : run.step ? String(run.step) : "",
      run.loss === null || run.loss === undefined ? "" : run.loss.toFixed(3),
      run.skips ? String(total) + (total ? ` (${skips.map(([kind, n]) => `${n} ${kind}`).join(", ")})` : "") : "",
      bits,
      run.seconds ? run.seconds.toPrecision(3) : "",
      span(run.left),
    ];
  }

  function table(runs) {
    const heads = [...byId("runs").tHead.rows[0].cells].map((cell) => cell.textContent.trim());
    byId("runs").tBodies[0].replaceChildren(...runs.map((run) => {
      const name = html("th", { scope: "row" }, run.name);
      if (run.colour) name.style.color = run.colour;
      const row = html("tr", { "data-status": run.status }, name, ...cells(run).map((text, i) => html("td", { "data-label": heads[i + 1] }, text)));
      const progress = run.steps ? Math.round((100 * run.step) / run.steps) : 0;
      row.style.background = `linear-gradient(90deg, #e9f1f7 ${progress}%, transparent ${progress}%)`;
      return row;
    }));
    byId("runs").hidden = !runs.length;
  }

  function summary(state) {
    const counts = {};
    for (const run of state.runs) counts[run.status] = (counts[run.status] || 0) + 1;
    const parts = Object.entries(counts).map(([status, n]) => `${n} ${status}`);
    const left = state.left === null ? "" : ` The running ones take about ${span(state.left)} more.`;
    const behind = state.behind ? ` The headroom of ${state.behind} is still being read.` : "";
    byId("answer").hidden = false;
    byId("answer").textContent = state.runs.length ? `${state.runs.length} runs: ${parts.join(", ")}.${left}${behind}` : "No run has begun here yet; the page shows them as they do.";
    document.title = `${counts.running || 0} running, ${state.name}`;
  }

  function show(state) {
    summary(state);
    table(state.runs);
    for (const [name, plot] of Object.entries(state.plots)) {
      byId(`h-${name}`).hidden = false;
      if (charts[name]) charts[name].renew(plot, state.pool);
      else (charts[name] = made(byId(`figure-${name}`), name, plot, state.pool)).start();
    }
    byId("now").textContent = `as of ${new Date().toLocaleTimeString()}`;
  }

  async function ask() {
    let state = null;
    try {
      const answer = await fetch("/state.json", { cache: "no-store" });
      if (answer.ok) state = await answer.json();
    } catch {
      // the server has gone: said below
    }
    setTimeout(ask, Math.max(every, 1000 * (state ? state.pause : 0)));
    if (state) show(state);
    else byId("now").textContent = `no answer at ${new Date().toLocaleTimeString()}: does periln live still run?`;
  }
  ask();
})();
