// Draws each figure in the colours of the page, again when those change, and another when another N is chosen.
"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const config = { responsive: true, displaylogo: false, displayModeBar: touch.matches ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]] };

function template() {
  const style = getComputedStyle(document.documentElement);
  const [paper, ink, faint, line] = ["paper", "ink", "faint", "line"].map((name) => style.getPropertyValue(`--${name}`).trim());
  const axis = {
    gridcolor: line, linecolor: faint, zerolinecolor: faint, tickfont: { color: faint }, automargin: true,
    title: { standoff: 12, font: { size: 13 } },
  };
  return {
    layout: {
      paper_bgcolor: paper, plot_bgcolor: paper, xaxis: axis, yaxis: axis,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink },
      hoverlabel: { bgcolor: paper, bordercolor: faint, font: { color: ink } },
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom" },
      margin: { l: 8, r: 12, t: 16, b: 8 },
      dragmode: touch.matches ? false : "zoom",
    },
  };
}

function draw(plot) {
  const chosen = document.querySelector(`input[name="${plot.id}"]:checked`);
  const choices = figures[plot.id];
  const { data, layout } = choices[chosen ? chosen.value : Object.keys(choices)[0]];
  Plotly.react(plot, data, { ...layout, template: template() }, config);
}

const plots = [...document.querySelectorAll(".plot")];
plots.forEach(draw);
dark.addEventListener("change", () => plots.forEach(draw));
document.addEventListener("change", ({ target }) => {
  if (target.type === "radio") draw(document.getElementById(target.name));
});
