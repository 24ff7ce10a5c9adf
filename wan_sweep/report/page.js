"use strict";

// Sorts a table by the column whose head is clicked; cells without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const compare = (one, other) => {
        if (key(one) === "" || key(other) === "") return (key(one) === "") - (key(other) === "");
        if (head.dataset.kind === "number") {
          const [low, high] = [Number(key(one)), Number(key(other))];
          return sign * (low === high ? 0 : low - high);
        }
        return sign * key(one).localeCompare(key(other), "en", { numeric: true });
      };
      const body = table.tBodies[0];
      body.append(...Array.from(body.rows).sort(compare));
    });
  });
}

// A link to a job opens its section.
const openTarget = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", openTarget);
openTarget();
