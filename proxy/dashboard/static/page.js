// What the page does beyond forms and links. Without it everything is still there, in tables and plain forms.

/** Replace the parts of the page that have changed, but not the one that somebody is in. */
function swap(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const part of fresh.querySelectorAll("[data-part]")) {
    const old = document.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
    if (old && !old.contains(document.activeElement) && old.innerHTML !== part.innerHTML) {
      old.replaceChildren(...document.adoptNode(part).childNodes);
    }
  }
  markAll();
}

/** Keep the page up to date while it is seen. */
function follow(url) {
  let source = null;
  const update = () => {
    if (document.hidden) {
      source?.close();
      source = null;
    } else if (!source) {
      source = new EventSource(url);
      source.onmessage = (event) => swap(event.data);
    }
  };
  document.addEventListener("visibilitychange", update);
  update();
}

/** Let arrow keys move between the marks of a picture, of which one is in the order of tabs; say what each means. */
function markAll() {
  for (const svg of document.querySelectorAll("svg[data-marks]:not([data-ready])")) {
    svg.dataset.ready = "";
    const readout = document.getElementById(svg.dataset.marks);
    const say = (mark) => {
      if (readout) readout.textContent = mark.querySelector("title").textContent;
    };
    svg.addEventListener("mouseover", (event) => {
      const mark = event.target.closest(".mark");
      if (mark) say(mark);
    });
    svg.addEventListener("focusin", (event) => {
      const mark = event.target.closest(".mark");
      if (mark) say(mark);
    });
    svg.addEventListener("keydown", (event) => {
      const mark = event.target.closest(".mark");
      const columns = Number(svg.dataset.columns || 0);
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (!mark || !step) return;
      const marks = [...svg.querySelectorAll(".mark")];
      const next = marks[marks.indexOf(mark) + step];
      event.preventDefault();
      if (!next) return;
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  }
}

/** Let the slider show what its λ is expected to do. Its steps are the points that are drawn. */
function slide(slider) {
  const lambdas = slider.dataset.lambdas.split(" ");
  const field = document.getElementById(slider.dataset.field);
  slider.closest("[hidden]")?.removeAttribute("hidden");
  let latest = 0;
  slider.addEventListener("input", async () => {
    const lambda = lambdas[slider.valueAsNumber];
    const asked = ++latest;
    field.value = lambda;
    slider.setAttribute("aria-valuetext", `λ = ${lambda}`);
    const answer = await fetch(`${slider.dataset.url}?lambda=${encodeURIComponent(lambda)}`);
    if (!answer.ok || asked !== latest) return;
    const html = await answer.text();
    if (asked === latest) swap(html);
  });
}

markAll();
for (const part of document.querySelectorAll("[data-events]")) follow(part.dataset.events);
for (const slider of document.querySelectorAll("input[data-lambdas]")) slide(slider);
