for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    const key = row => row.cells[head.cellIndex].dataset.sort ?? row.cells[head.cellIndex].textContent;
    const rank = text => text === "" ? 2 : isNaN(text) ? 1 : 0;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (rank(x) !== rank(y)) return rank(x) - rank(y);
      const order = rank(x) === 0 ? x - y : x.localeCompare(y);
      return up ? order : -order;
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
}
