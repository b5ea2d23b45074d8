// Large tables lie in the page as compressed columns. Here they become rows: the same elements that the template writes for a
// small table, made when a table is opened, when a link leads to a row, and one at a time for a tooltip.
(() => {
  "use strict";
  const tables = new Map();  // a table's id: its columns, and the rows that were made of them so far
  const places = new Map();  // a row's id: its table's id, and its number

  function made(name, number) {
    const held = tables.get(name);
    if (held.rows[number]) return held.rows[number];
    const { data, table } = held;
    const row = document.createElement("tr");
    row.id = data.keys[number];
    if (data.severities && data.severities[number]) row.className = data.severities[number];
    data.columns.forEach((column, at) => {
      const cell = document.createElement("td");
      const sort = column.sort && column.sort[number], note = column.note && column.note[number];
      const spread = column.spread && column.spread[number];
      const set = table.tHead.rows[0].cells[at].className;
      if (set) cell.className = set;
      if (sort !== null) cell.dataset.v = sort;
      if (note) {
        const absent = document.createElement("abbr"), mark = document.createElement("sup");
        absent.title = data.reasons[note];
        absent.textContent = column.text[number];
        mark.textContent = note;
        cell.append(absent, mark);
      } else {
        cell.append(column.text[number]);
        if (spread) {
          const small = document.createElement("small");
          small.textContent = spread;
          cell.append(small);
        }
      }
      row.append(cell);
    });
    held.rows[number] = row;
    return row;
  }

  function open(name) {
    const held = tables.get(name);
    if (held.opened) return;
    held.opened = true;
    const rows = document.createDocumentFragment();
    held.data.keys.forEach((_, number) => rows.append(made(name, number)));
    held.table.tBodies[0].append(rows);
  }

  async function unpacked(source) {
    const table = document.getElementById(source.dataset.rows);
    try {
      const bytes = Uint8Array.from(atob(source.textContent.trim()), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const data = JSON.parse(await new Response(stream).text());
      tables.set(table.id, { data, table, rows: [], opened: false });
      data.keys.forEach((key, number) => places.set(key, [table.id, number]));
      const folded = table.closest("details");
      folded.addEventListener("toggle", () => { if (folded.open) open(table.id); });
      if (folded.open) open(table.id);
    } catch (error) {
      table.createCaption().textContent = `These rows need a newer browser (${error.message}); the record has their figures.`;
    }
  }

  window.packedTables = {
    // Kept once everything is unpacked; nothing is drawn before.
    ready: Promise.all([...document.querySelectorAll("script[data-rows]")].map(unpacked)),
    // The row of this id, in the page or not yet; undefined where no large table has it.
    row: (id) => places.has(id) ? made(...places.get(id)) : undefined,
    // The table that a row belongs to, wherever the row is.
    tableOf: (row) => row.closest("table") || tables.get(places.get(row.id)[0]).table,
    // Put the row of this id into the page, with all others of its table.
    show: (id) => { if (places.has(id)) open(places.get(id)[0]); },
  };
})();
