"use strict";
// Tables: a click on a column sorts by it, what is typed filters the rows, and more rows are shown when asked for.
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("th")];
  const numeric = heads.map((head) => head.classList.contains("number"));
  const data = box.querySelector('script[type="application/json"]');
  const all = data
    ? JSON.parse(data.textContent)
    : [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
  const step = Number(box.dataset.shown);
  const search = box.querySelector("input");
  const more = box.querySelector(".more");
  let shown = step, sorted = null, down = false;

  const number = (text) => { const value = parseFloat(text); return Number.isNaN(value) ? null : value; };
  const compare = (one, other) => {
    const [a, b] = numeric[sorted] ? [number(one[sorted]), number(other[sorted])] : [one[sorted], other[sorted]];
    if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last
    const order = numeric[sorted] ? a - b : a.localeCompare(b);
    return down ? -order : order;
  };
  const draw = () => {
    const word = search ? search.value.trim().toLowerCase() : "";
    let rows = all;
    if (word) rows = rows.filter((row) => row.some((cell, i) => !numeric[i] && cell.toLowerCase().includes(word)));
    if (sorted !== null) rows = [...rows].sort(compare);
    body.replaceChildren(...rows.slice(0, shown).map((row) => {
      const line = document.createElement("tr");
      row.forEach((text, i) => {
        const cell = line.insertCell();
        if (numeric[i]) cell.className = "number";
        (numeric[i] ? cell : cell.appendChild(document.createElement("span"))).textContent = text;
      });
      return line;
    }));
    if (more) {
      more.hidden = rows.length <= shown;
      more.querySelector("span").textContent = `${Math.min(shown, rows.length)} of ${rows.length} rows`;
    }
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    down = sorted === i ? !down : numeric[i];
    sorted = i;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    draw();
  }));
  if (search) search.addEventListener("input", () => { shown = step; draw(); });
  if (more) more.querySelector("button").addEventListener("click", () => { shown += 10 * step; draw(); });
}
