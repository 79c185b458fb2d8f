// What a page can do beyond its links and forms: everything here is a convenience, nothing depends on it.
"use strict";

const root = document.documentElement;

for (const button of document.querySelectorAll("[data-theme-switch]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch {}
  });
}

for (const block of document.querySelectorAll("[data-copyable]")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet small";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.append(button);
}

// The map: wheel or buttons zoom about a point, dragging moves.
for (const map of document.querySelectorAll("[data-map]")) {
  const svg = map.querySelector("svg");
  const whole = { x: 0, y: 0, w: 1000, h: 580 };
  let view = { ...whole }, dragged = null;
  const show = () => {
    svg.classList.toggle("zoomed", view.w < whole.w);
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
    const scale = view.w / whole.w;
    for (const circle of svg.querySelectorAll("circle")) {
      circle.dataset.r ??= circle.getAttribute("r");
      circle.setAttribute("r", circle.dataset.r * Math.sqrt(scale));
    }
  };
  const zoom = (factor, fx = 0.5, fy = 0.5) => {
    const w = Math.min(whole.w, Math.max(60, view.w * factor)), h = w * whole.h / whole.w;
    view = { x: view.x + (view.w - w) * fx, y: view.y + (view.h - h) * fy, w, h };
    if (w === whole.w) view = { ...whole };
    show();
  };
  const controls = map.querySelector(".controls");
  controls.hidden = false;
  controls.addEventListener("click", (event) => {
    const what = event.target.dataset.zoom;
    if (what === "all") { view = { ...whole }; show(); } else if (what) zoom(what === "in" ? 0.6 : 1 / 0.6);
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && view.w === whole.w && event.deltaY > 0) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  // On a phone the whole map is wider than the screen: a finger moves it by itself, until it is zoomed.
  const scrolls = (event) => event.pointerType === "touch" && view.w === whole.w;
  svg.addEventListener("pointerdown", (event) => { if (scrolls(event)) { dragged = null; return; } dragged = { x: event.clientX, y: event.clientY, moved: false }; });
  svg.addEventListener("pointermove", (event) => {
    if (!dragged || !event.buttons) return;
    const scale = view.w / svg.getBoundingClientRect().width;
    const dx = event.clientX - dragged.x, dy = event.clientY - dragged.y;
    if (Math.abs(dx) + Math.abs(dy) < 3 && !dragged.moved) return;
    view.x -= dx * scale;
    view.y -= dy * scale;
    dragged = { x: event.clientX, y: event.clientY, moved: true };
    show();
  });
  svg.addEventListener("click", (event) => { if (dragged?.moved) event.preventDefault(); dragged = null; }, true);
  svg.addEventListener("dragstart", (event) => event.preventDefault());
}

// A live run: words about tasks and the log are put in as they come; claims and figures are the server's to draw.
const live = document.getElementById("live-run");
if (live && ["queued", "running"].includes(live.dataset.state) && window.EventSource) {
  const source = new EventSource(`${live.dataset.run}/events?after=${live.dataset.after}`);
  let fetching = false, again = false;
  const redraw = async () => {
    if (fetching) { again = true; return; }
    fetching = true;
    try {
      const answer = await fetch(live.dataset.run, { headers: { "HX-Request": "true" } });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live-run");
        live.dataset.state = fresh.dataset.state;
        live.replaceChildren(...fresh.childNodes);
      }
    } finally {
      fetching = false;
      if (again) { again = false; redraw(); }
    }
  };
  source.addEventListener("progress", (event) => {
    const task = JSON.parse(event.data), tasks = live.querySelector("[data-run-tasks]");
    let line = tasks.querySelector(`[data-task="${Number(task.task)}"]`);
    if (task.ended) { line?.remove(); return; }
    if (!line) {
      line = document.createElement("div");
      line.dataset.task = task.task;
      line.append(document.createElement("span"));
      if (task.total) line.append(Object.assign(document.createElement("progress"), { max: task.total, ariaLabel: task.description }));
      tasks.append(line);
    }
    const done = task.total ? `: ${task.done} of ${task.total}` : task.done ? `: ${task.done}` : "";
    line.querySelector("span").textContent = task.description + done + (task.numbers ? `, ${task.numbers}` : "");
    const bar = line.querySelector("progress");
    if (bar) bar.value = task.done;
  });
  source.addEventListener("log", (event) => {
    const log = live.querySelector("[data-run-log]");
    if (!log) { redraw(); return; }
    log.append(`${JSON.parse(event.data).line}\n`);
    log.scrollTop = log.scrollHeight;
  });
  for (const kind of ["claim", "figure", "state"]) source.addEventListener(kind, redraw);
  source.addEventListener("end", () => { source.close(); redraw(); });
}
