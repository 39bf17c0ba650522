"use strict";
// What a page does beyond showing: tables sort, plots say what is under the pointer. Without it all is there to read.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const numberIn = cell => parseFloat(cell.textContent.replace(/[\s,]/g, ""));

  // A button in each head sorts by its column, the second click the other way round, the third as it was.
  for (const table of all("table")) {
    const body = table.tBodies[0], rows = [...body.rows], heads = all("thead th", table);
    if (rows.length < 2 || table.closest(".fixed")) continue;
    heads.forEach((head, column) => {
      const text = head.classList.contains("text"), button = document.createElement("button");
      const [first, second] = text ? ["ascending", "descending"] : ["descending", "ascending"];
      const compare = (a, b) => {
        if (text) return a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", {numeric: true});
        return numberIn(a.cells[column]) - numberIn(b.cells[column]);
      };
      const known = row => text ? row.cells[column].textContent !== "" : !Number.isNaN(numberIn(row.cells[column]));
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = {[first]: second, [second]: null}[head.getAttribute("aria-sort")];
        const way = next === undefined ? first : next;
        heads.forEach(other => other.removeAttribute("aria-sort"));
        if (way) head.setAttribute("aria-sort", way);
        const turn = way === "descending" ? -1 : 1;
        const sorted = rows.filter(known).sort((a, b) => turn * compare(a, b));
        // What is not known comes last, whichever way.
        body.append(...way ? [...sorted, ...rows.filter(row => !known(row))] : rows);
        table.dispatchEvent(new Event("sorted"));
      });
    });
  }

  // A plot: one of its marks is lit, by pointer or arrow keys, and the line below says what it is.
  function plot(figure, lit) {
    const svg = figure.querySelector("svg.plot"), marks = all("[data-mark]", svg), said = figure.querySelector(".say");
    const texts = new Map(marks.map(mark => [mark, mark.querySelector("title").textContent]));
    marks.forEach(mark => mark.querySelector("title").remove()); // or the browser shows it too
    said.textContent = said.dataset.hint;
    let current = null;
    const show = mark => {
      if (mark === current) return;
      current?.classList.remove("on");
      current = mark;
      current?.classList.add("on");
      said.textContent = mark ? texts.get(mark) : said.dataset.hint;
    };
    const light = mark => { show(mark); lit?.(mark ? marks.indexOf(mark) : -1); };
    const at = mark => {
      const box = mark.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };
    const bars = svg.classList.contains("bars");
    const near = event => {
      let best = null, least = Infinity;
      for (const mark of marks) {
        const [x, y] = at(mark), distance = Math.hypot(x - event.clientX, bars ? 0 : y - event.clientY);
        if (distance < least) [best, least] = [mark, distance];
      }
      return best;
    };
    for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, event => light(near(event)));
    svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") light(null); });
    svg.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (event.key === "Escape") return light(null);
      if (!step || !marks.length) return;
      event.preventDefault();
      const line = bars ? [...marks].sort((a, b) => at(a)[0] - at(b)[0]) : marks;
      const place = current ? line.indexOf(current) + step : step > 0 ? 0 : line.length - 1;
      light(line[Math.min(line.length - 1, Math.max(0, place))]);
    });
    for (const entry of all(".legend [data-curve]", figure)) {
      const dim = on => svg.querySelectorAll("[data-curve]").forEach(
        part => part.classList.toggle("dim", on && part.dataset.curve !== entry.dataset.curve));
      entry.addEventListener("pointerenter", () => dim(true));
      entry.addEventListener("pointerleave", () => dim(false));
    }
    return {marks, show};
  }

  // Plots of layers and the table beside them: one layer is lit in all of them, and the bars follow the table's order.
  for (const group of all(".linked")) {
    const table = group.querySelector("table"), rows = table ? [...table.tBodies[0].rows] : [], plots = [];
    const lit = number => {
      rows.forEach((row, i) => row.classList.toggle("on", i === number));
      plots.forEach(one => one.show(one.marks[number] ?? null));
    };
    plots.push(...all("figure.chart", group).map(figure => plot(figure, lit)));
    rows.forEach((row, i) => {
      row.addEventListener("pointerenter", () => lit(i));
      row.addEventListener("pointerleave", () => lit(-1));
    });
    table?.addEventListener("sorted", () => {
      const order = [...table.tBodies[0].rows].map(row => rows.indexOf(row));
      for (const {marks} of plots) {
        order.forEach((number, place) => marks[number].setAttribute("x", 100 * place / order.length + "%"));
      }
    });
  }
  all("figure.chart").filter(figure => !figure.closest(".linked")).forEach(figure => plot(figure));
})();
