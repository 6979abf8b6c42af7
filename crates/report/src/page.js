"use strict";
// Sorts a table by the head that is pressed, and filters the long one. The page is complete without.
for (const table of document.querySelectorAll("table:not(.heat)")) {
  const bodies = [...table.tBodies];
  const lines = (body) => [...body.rows].filter((r) => !r.classList.contains("group"));
  if (!bodies.some((b) => lines(b).length > 2)) continue;
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.classList.contains("missing") ? null : cell.textContent;
  };
  const sort = (i) => {
    const down = heads[i].getAttribute("aria-sort") === "ascending";
    for (const h of heads) h.setAttribute("aria-sort", "none");
    heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => {
      const [x, y] = [value(a, i), value(b, i)];
      // What was not measured stays last either way.
      if (x === null || y === null) return (x === null) - (y === null);
      const way = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en");
      return down ? -way : way;
    };
    for (const body of bodies) {
      for (const row of lines(body).sort(order)) {
        row.classList.remove("opens");
        body.append(row);
      }
    }
  };
  heads.forEach((head, i) => {
    head.tabIndex = 0;
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", () => sort(i));
    head.addEventListener("keydown", (e) => {
      if (e.key === "Enter" || e.key === " ") {
        e.preventDefault();
        sort(i);
      }
    });
  });
}
const all = document.querySelector("#records table");
if (all) {
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter: words, all must occur";
  input.setAttribute("aria-label", "Filter records");
  const texts = new Map([...all.tBodies[0].rows].map((r) => [r, [...r.cells].map((c) => c.textContent).join(" ").toLowerCase()]));
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [row, text] of texts) row.hidden = !words.every((w) => text.includes(w));
  });
  all.closest(".wide").before(input);
}
