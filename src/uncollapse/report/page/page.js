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

  // What of a table is out of sight, in words below it, and a shade at the edge where it goes on.
  function framed(frame) {
    const scroll = frame.querySelector(".scroll");
    const table = scroll.querySelector("table");
    const edges = ["right", "below"].map((side) => {
      const edge = document.createElement("div");
      edge.className = `edge ${side}`;
      frame.append(edge);
      return edge;
    });
    const words = document.createElement("p");
    words.className = "more";
    frame.after(words);
    const heads = [...table.tHead.rows[0].cells];
    const rows = table.tBodies[0].rows;

    // The first of some places along the table that lies beyond `limit`.
    function beyond(amount, place, limit) {
      let low = 0, high = amount;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (place(middle) > limit) high = middle;
        else low = middle + 1;
      }
      return low;
    }
    function tell() {
      if (!scroll.clientHeight) return; // folded
      const ahead = heads[0].offsetHeight;
      const right = scroll.scrollLeft + scroll.clientWidth + 1, below = scroll.scrollTop + scroll.clientHeight + 1;
      const columns = heads.filter((head) => head.offsetLeft + head.offsetWidth > right);
      const first = beyond(rows.length, (i) => rows[i].offsetTop + rows[i].offsetHeight, scroll.scrollTop + ahead + 1);
      const last = beyond(rows.length, (i) => rows[i].offsetTop + rows[i].offsetHeight, below);
      const said = [];
      if (last < rows.length || first > 0) {
        said.push(`Rows ${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${rows.length.toLocaleString("en")}: scroll for the others.`);
      }
      if (columns.length) {
        const names = columns.map((head) => head.dataset.title);
        said.push(`To the right: ${names.join(", ")}.`);
      }
      words.textContent = said.join(" ");
      words.hidden = !said.length;
      edges[0].hidden = !columns.length;
      edges[1].hidden = last >= rows.length;
    }
    scroll.addEventListener("scroll", tell, { passive: true });
    new ResizeObserver(tell).observe(scroll);
    tell();
  }

  // On paper everything unfolds but the longest tables; afterwards the page is as the reader left it.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not(.long):not([open])")];
    for (const each of unfolded) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of unfolded) each.open = false;
    unfolded = [];
  });

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
    document.querySelectorAll(".frame").forEach(framed);
    const blocks = byId("chosen-blocks") ? JSON.parse(byId("chosen-blocks").textContent) : [];
    const choice = byId("block-choice");
    const switched = [];
    for (const source of document.querySelectorAll("script[data-chart]")) {
      const place = byId(source.dataset.chart);
      try {
        const result = await vegaEmbed(place, JSON.parse(source.textContent), {
          ast: true, actions: false, renderer: "svg", tooltip: showTip, defaultStyle: false,
        });
        // A click on a mark that has a row in a table goes to that row.
        result.view.addEventListener("click", (event, item) => {
          const key = item && item.datum && typeof item.datum.row === "string" && item.datum.row.split(" ")[0];
          if (!key) return;
          if (location.hash === `#${key}`) unfold();
          else location.hash = key;
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
    for (const aimed of document.querySelectorAll("tr.aimed")) aimed.classList.remove("aimed");
    if (id && byId(id)) byId(id).classList.add("aimed"); // a row that was unpacked only now is no :target
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
