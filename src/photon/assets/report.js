// Values under the pointer. The charts are drawn without this script; it only reads their data-chart attributes.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MOST_ROWS = 10;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);

  // Text goes in as text, never as markup.
  const add = (parent, tag, style, text) => {
    const node = document.createElement(tag);
    node.className = style;
    node.textContent = text;
    parent.append(node);
    return node;
  };

  const show = (svg, chart, index, pointer) => {
    const x = chart.x[index];
    chart.hair.setAttribute("x1", x);
    chart.hair.setAttribute("x2", x);
    chart.hair.style.display = "inline";
    let rows = chart.series.filter((s) => s.values[index] !== null);
    rows.sort((a, b) => Number(b.values[index]) - Number(a.values[index]));
    // Of a crowd only the highest and the lowest are told.
    const crowd = rows.filter((s) => s.style.startsWith("crowd"));
    const hidden = new Set(crowd.length > MOST_ROWS ? crowd.slice(MOST_ROWS / 2, -MOST_ROWS / 2) : []);
    rows = rows.filter((s) => !hidden.has(s));
    tip.replaceChildren();
    add(tip, "p", "", chart.labels[index]);
    for (const series of rows) {
      const row = add(tip, "div", "row", "");
      add(row, "i", `swatch ${series.style}`, "");
      add(row, "span", "", series.name);
      add(row, "b", "", series.values[index]);
    }
    if (hidden.size) add(tip, "div", "more", `${hidden.size} more between them`);
    const box = svg.getBoundingClientRect();
    const at = box.left + (x / svg.viewBox.baseVal.width) * box.width;
    const left = at + tip.offsetWidth + 24 > innerWidth ? at - tip.offsetWidth - 12 : at + 12;
    tip.style.left = `${Math.max(6, left) + scrollX}px`;
    tip.style.top = `${(pointer ?? box.top + 20) + scrollY}px`;
    tip.style.visibility = "visible";
  };

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const { height } = svg.viewBox.baseVal;
    chart.hair = document.createElementNS(SVG, "line");
    chart.hair.setAttribute("class", "hair");
    chart.hair.setAttribute("y1", 14);
    chart.hair.setAttribute("y2", height - 34);
    svg.append(chart.hair);
    let index = chart.x.length - 1;
    const hide = () => {
      tip.style.visibility = "hidden";
      chart.hair.style.display = "none";
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      chart.x.forEach((at, i) => {
        if (Math.abs(at - x) < Math.abs(chart.x[index] - x)) index = i;
      });
      show(svg, chart, index, event.clientY + 12);
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      index = Math.min(chart.x.length - 1, Math.max(0, index + step));
      show(svg, chart, index);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
  }
})();
