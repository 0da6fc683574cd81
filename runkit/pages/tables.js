"use strict";
// Tables that sort by a click on a column's head, within each block of rows, and that download as CSV.
(() => {
  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const cellText = (cell) => cell.textContent.replace(/\s+/g, " ").trim();
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  // The number that a cell begins with; null where there is none: those come last in either direction.
  function numberOf(text) {
    const found = /^[-+]?[\d,]*\.?\d+(e[-+]?\d+)?/i.exec(text);
    return found ? parseFloat(found[0].replaceAll(",", "")) : null;
  }

  function order(rows, column, down) {
    const keyed = rows.map((row, at) => {
      const cell = row.cells[column];
      const text = cell ? (cell.dataset.sort ?? cellText(cell)) : "";
      return { row, at, text, number: numberOf(text) };
    });
    const numeric = keyed.some((k) => k.number !== null);
    keyed.sort((a, b) => {
      if (numeric && (a.number === null) !== (b.number === null)) return a.number === null ? 1 : -1;
      const way = numeric && a.number !== null ? a.number - b.number : a.text.localeCompare(b.text);
      return (down ? -way : way) || a.at - b.at;
    });
    return keyed.map((k) => k.row);
  }

  function sortable(table) {
    const heads = [...table.querySelectorAll("thead th")];
    const original = [...table.tBodies].map((body) => [...body.rows]);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      button.title = "sort by this column";
      head.append(button);
      button.addEventListener("click", () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" };
        const state = next[head.getAttribute("aria-sort") || "none"];
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (state !== "none") head.setAttribute("aria-sort", state);
        [...table.tBodies].forEach((body, i) => {
          const names = original[i].filter((row) => row.querySelector("th.block"));
          const rows = original[i].filter((row) => !names.includes(row));
          body.append(...names, ...(state === "none" ? rows : order(rows, column, state === "descending")));
        });
      });
    });
  }

  // On a phone a row is a card without heads (page.css): a list of the columns sorts it there.
  function choosable(table) {
    const heads = [...table.querySelectorAll("thead th")];
    const list = document.createElement("select");
    list.className = "sort-by";
    list.setAttribute("aria-label", "sort by");
    list.append(new Option("as listed", "-1"));
    heads.forEach((head, i) => list.append(new Option(`by ${cellText(head)}, rising`, i), new Option(`by ${cellText(head)}, falling`, -2 - i)));
    list.addEventListener("change", () => {
      const at = +list.value, column = at >= 0 ? at : -2 - at;
      const wanted = at === -1 ? "none" : at >= 0 ? "ascending" : "descending";
      const head = heads[at === -1 ? 0 : column];
      do head.querySelector("button").click();
      while ((head.getAttribute("aria-sort") || "none") !== wanted);
    });
    (table.closest(".scroll") || table).before(list);
  }

  function downloadable(table) {
    const title = table.caption ? cellText(table.caption) : document.title;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "csv";
    button.textContent = "CSV";
    button.title = `download “${title}” as CSV`;
    button.addEventListener("click", () => {
      const heads = [...table.querySelectorAll("thead th")].map(cellText);
      const blocks = table.querySelector("th.block") !== null;
      const lines = [[...(blocks ? ["block"] : []), ...heads]];
      for (const body of table.tBodies) {
        let block = "";
        for (const row of body.rows) {
          const name = row.querySelector("th.block");
          if (name) block = cellText(name);
          else lines.push([...(blocks ? [block] : []), ...[...row.cells].map(cellText)]);
        }
      }
      const file = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") + ".csv";
      save(file, lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n");
    });
    (table.closest(".scroll") || table).after(button);
  }

  for (const table of document.querySelectorAll("table")) {
    if (!table.tHead) continue;
    if (!table.hasAttribute("data-live")) {
      sortable(table);
      choosable(table);
    }
    downloadable(table);
  }

  // A link into a folded part opens it; all parts are printed.
  function unfold() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  unfold();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  window.periln = { save, quoted };
})();
