// What the page can do more with a script: sort tables, copy them as CSV, move along a path of
// images. It builds elements and text, never HTML, and reads nothing but the page.
(() => {
  "use strict";

  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  // The text of a cell without buttons that were added, and without what a chart says.
  const textOf = (cell) => {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll(".sort, svg, [hidden]").forEach((part) => part.remove());
    return copy.textContent.replace(/\s+/g, " ").trim();
  };

  // A number as the page writes it; NaN for other text.
  const numberOf = (text) =>
    parseFloat(text.replace(/\u2212/g, "-").replace(/(\d),(?=\d{3})/g, "$1"));

  const keyOf = (cell) => cell.dataset.sort ?? textOf(cell);

  const compare = (a, b) => {
    const [x, y] = [numberOf(a), numberOf(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y) && x !== y) return x - y;
    return a.localeCompare(b, "en", { numeric: true });
  };

  const missing = (text) => text === "" || text === "\u2013";

  // Each cell of some rows with the column in which it begins.
  const placed = (rows) => {
    const taken = [], found = [];
    [...rows].forEach((row, y) => {
      let x = 0;
      [...row.cells].forEach((cell) => {
        while (taken[y]?.[x]) x += 1;
        found.push({ cell, x, y });
        for (let down = y; down < y + cell.rowSpan; down += 1) {
          taken[down] ??= [];
          for (let right = x; right < x + cell.colSpan; right += 1) taken[down][right] = true;
        }
        x += cell.colSpan;
      });
    });
    return found;
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = placed(table.tHead.rows).filter(({ cell }) => cell.colSpan === 1);
    heads.forEach(({ cell: head, x: column }) => {
      const button = make("button", { type: "button", className: "sort", title: "Sort" });
      button.setAttribute("aria-label", `Sort by ${textOf(head)}`);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === null ? "descending" : now === "descending" ? "ascending" : null;
        heads.forEach(({ cell }) => cell.removeAttribute("aria-sort"));
        if (next) head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const key = (row) => (row.cells[column] ? keyOf(row.cells[column]) : "");
        const rows = [...original];
        if (next) {
          rows.sort((one, two) => {
            const [a, b] = [key(one), key(two)];
            // What is missing stays below, whichever way.
            return missing(a) - missing(b) || sign * compare(a, b);
          });
        }
        body.append(...rows);
      });
    });
  };

  // Rows of equal length: a cell that spans columns is repeated, heads above each other are joined.
  const gridOf = (table) => {
    const grid = [...table.rows].map(() => []);
    placed(table.rows).forEach(({ cell, x, y }) => {
      const text = textOf(cell);
      for (let right = x; right < x + cell.colSpan; right += 1) {
        for (let down = y; down < y + cell.rowSpan; down += 1) grid[down][right] = "";
        grid[y][right] = text;
      }
    });
    const heads = table.tHead ? table.tHead.rows.length : 0;
    if (heads > 1) {
      const joined = grid[0].map((_, x) =>
        grid.slice(0, heads).map((row) => row[x]).filter(Boolean).join(" "));
      grid.splice(0, heads, joined);
    }
    return grid;
  };

  const csvOf = (table) => {
    const cell = (text) => {
      // A spreadsheet would run what begins like a formula; a negative number is none.
      const number = /^-?[\d.,]+(e[-+]?\d+)?$/.test(text);
      const safe = !number && /^[=+@\t\r-]/.test(text) ? `'${text}` : text;
      return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    return gridOf(table).map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  };

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // No such permission on a page from a file, in some browsers.
      const area = make("textarea", { value: text, readOnly: true });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  };

  const copyable = (table) => {
    const button = make("button", { type: "button", className: "copy" }, "Copy as CSV");
    const caption = table.caption ? `: ${textOf(table.caption)}` : "";
    button.setAttribute("aria-label", `Copy as CSV${caption}`);
    const said = make("span", { className: "said" });
    said.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      said.textContent = (await copy(csvOf(table))) ? "Copied" : "The browser does not allow it";
      setTimeout(() => { said.textContent = ""; }, 2500);
    });
    (table.closest(".scroll") ?? table).after(make("p", { className: "tools" }, button, " ", said));
  };

  // One image of a path at a time, with a slider; all of them without it, and on paper.
  const slide = (path) => {
    const frames = [...path.querySelectorAll("figure")];
    const slider = make("input", {
      type: "range", min: "0", max: String(frames.length - 1), step: "1", value: path.dataset.start,
    });
    slider.setAttribute("aria-label", path.dataset.label);
    const show = () => {
      frames.forEach((frame, place) => { frame.hidden = place !== Number(slider.value); });
      slider.setAttribute("aria-valuetext", textOf(frames[slider.value].querySelector("figcaption")));
    };
    slider.addEventListener("input", show);
    path.classList.add("live");
    path.append(slider);
    show();
  };

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("table").forEach(copyable);
  document.querySelectorAll(".path").forEach(slide);

  // On paper everything that is folded is open.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
})();
