// Draws the charts, shows a table row as a chart's tooltip, sorts tables, switches the block of the head panel.
// Everything is put into the page as text, never as markup. Without this script the page still reads as tables.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const rowOf = (id) => byId(id) || packedTables.row(id);
  const tip = byId("tip");

  function listed(row) {
    const heads = packedTables.tableOf(row).tHead.rows[0].cells;
    const list = document.createElement("dl");
    for (const cell of row.cells) {
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = heads[cell.cellIndex].dataset.title;
      const small = cell.querySelector("small");
      const absent = cell.querySelector("abbr");
      value.textContent = absent ? absent.textContent : cell.firstChild ? cell.firstChild.textContent : "";
      if (small || absent) {
        const note = document.createElement("small");
        note.textContent = small ? small.textContent : absent.title;
        value.append(note);
      }
      list.append(term, value);
    }
    return list;
  }

  // Vega calls this with the mark's tooltip value: ids of table rows, or a line of text; nothing where it ends.
  function showTip(handler, event, item, value) {
    if (!value) {
      tip.hidden = true;
      return;
    }
    const rows = value.split(" ").map(rowOf);
    if (rows.every(Boolean)) tip.replaceChildren(...rows.map(listed));
    else tip.textContent = value;
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = event.clientX + 14 + width > innerWidth - 8 ? event.clientX - 14 - width : event.clientX + 14;
    const top = event.clientY + 14 + height > innerHeight - 8 ? event.clientY - 14 - height : event.clientY + 14;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  }

  function sortable(table) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.v;
        const rows = [...table.tBodies[0].rows].sort((one, two) => {
          const a = key(one), b = key(two);
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // absent ones last
          const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
          return descending ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  const round = (value) => Number(value.toPrecision(3));

  function blockData(block) {
    const overlap = block.overlap.flatMap((line, h) =>
      line.map((thousandths, g) => ({
        g, h, value: thousandths / 1000, tip: `heads ${h} and ${g}: overlap ${thousandths / 1000}`,
      })));
    const energy = block.energy.map((share, head) => share
      ? { head, value: share[0], low: share[1], high: share[2],
          tip: `head ${head}: ${round(share[0])} (${round(share[1])} … ${round(share[2])})` }
      : { head, value: null, low: null, high: null, tip: `head ${head}: not measured` });
    return { overlap, energy };
  }

  async function draw() {
    await packedTables.ready;
    for (const table of document.querySelectorAll("table[data-sortable]")) {
      for (const head of table.tHead.rows[0].cells) head.dataset.title = head.firstChild.textContent;
      sortable(table);
    }
    const blocks = byId("chosen-blocks") ? JSON.parse(byId("chosen-blocks").textContent) : [];
    const choice = byId("block-choice");
    const switched = [];
    for (const source of document.querySelectorAll("script[data-chart]")) {
      const place = byId(source.dataset.chart);
      try {
        const result = await vegaEmbed(place, JSON.parse(source.textContent), {
          ast: true, actions: false, renderer: "svg", tooltip: showTip, defaultStyle: false,
        });
        if (place.id === "overlap" || place.id === "energy") switched.push([place.id, result.view]);
      } catch (error) {
        const message = document.createElement("p");
        message.className = "failed";
        message.textContent = `This chart could not be drawn (${error.message}); the tables have its figures.`;
        place.replaceChildren(message);
      }
    }
    async function show() {
      const data = blockData(blocks[choice.selectedIndex]);
      for (const [name, view] of switched) {
        await view.data(name, data[name]).runAsync();
      }
    }
    if (choice && switched.length) {
      choice.closest("p").hidden = blocks.length < 2;
      choice.addEventListener("change", show);
      await show();
    }
    document.documentElement.dataset.drawn = "true";
  }

  // A link to a row inside a folded table opens it first.
  function unfold() {
    const id = decodeURIComponent(location.hash.slice(1));
    packedTables.show(id);
    const row = id && byId(id);
    const folded = row && row.closest("details");
    if (folded) {
      folded.open = true;
      row.scrollIntoView({ block: "center" });
    }
  }
  addEventListener("hashchange", unfold);
  draw().then(unfold);
})();
