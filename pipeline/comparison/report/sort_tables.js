// Sort a table by the column whose title is pressed; pressed again, in reverse. Without scripts the
// page is complete, in the report's order.
"use strict";
const FACTORS = { k: 1e3, M: 1e6, G: 1e9, ms: 1e-3, min: 60, h: 3600 };
const byText = new Intl.Collator("en", { numeric: true }).compare;

// 1230000 of "1.23 M", 98.3 of "98.3%", 0.8 of "1.25 x slower (1.2 to 1.3)"; NaN of other text.
function numberOf(text) {
  const plain = text.replace(/,/g, "").replace(/\u2212/g, "-");
  const parts = /^(?:p ([<=]) )?([+-]?\d+(?:\.\d+)?)(?:%| (\S+)(.*))?$/.exec(plain);
  if (!parts) return /^as (fast|many)/.test(plain) ? 1 : NaN;
  const [, sign, digits, unit = "", rest = ""] = parts;
  const value = Number(digits) * (FACTORS[unit.replace(/B$/, "")] ?? 1);
  if (sign === "<") return value / 2;
  return /^ (slower|fewer|smaller)/.test(rest) ? 1 / value : value;
}

// The text of a cell, without what stands beside it in small type.
const textOf = (row, column) => row.cells[column].firstElementChild.firstChild.textContent.trim();

function sort(table, column) {
  const title = table.tHead.rows[0].cells[column];
  const order = title.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const rows = [...table.tBodies[0].rows].map((row) => {
    const text = textOf(row, column);
    return { row, text, absent: text === "-" || text === "", number: numberOf(text) };
  });
  const numeric = column > 0 && rows.every((row) => row.absent || !Number.isNaN(row.number));
  const sign = order === "ascending" ? 1 : -1;
  rows.sort((a, b) =>
    a.absent || b.absent
      ? a.absent - b.absent // last in both orders
      : sign * (numeric ? a.number - b.number : byText(a.text, b.text)));
  table.tBodies[0].append(...rows.map(({ row }) => row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", order);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const title of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    button.addEventListener("click", () => sort(table, title.cellIndex));
    title.append(button);
  }
}
document.documentElement.classList.add("scripts");
