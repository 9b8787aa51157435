// What a trace's page does; follows page_charts.js in one script.
const data = JSON.parse(document.getElementById("data").textContent);
const CURVES = ["c2", "c3", "c4", "c5", "c6"].map((c) => `var(--${c})`);
const PHRASES = ["c2", "c3", "c4", "c6", "c5"].map((c) => `var(--${c})`);
const byId = (id) => document.getElementById(id);
const colour = (model) => ({ base: "var(--base)", distilled: "var(--distilled)" })[model]
  || "var(--other)";
const curveColour = (plan, number) => (["base", "distilled"].includes(plan.name)
  ? colour(plan.name) : CURVES[number % CURVES.length]);
const SVG = ["svg", "path", "line", "text", "circle", "polygon"];

function make(kind, parent, attributes = {}, text = null) {
  const space = SVG.includes(kind) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const node = document.createElementNS(space, kind);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const percent = (share) => (share === null ? "" : `${Math.round(100 * share)} %`);
const times = [...new Set(data.plans.flatMap((plan) => plan.steps.map((s) => s.timestep)))]
  .sort((a, b) => b - a);
const last = times.length;            // one position after the last step: the finished images
const rowAt = (plan, position) => {
  if (position >= last) return plan.steps.length - 1;
  let row = -1;
  plan.steps.forEach((s, i) => { if (s.timestep >= times[position]) row = i; });
  return row;
};
const sourceAt = (plan, position, number) => {
  const row = rowAt(plan, position);
  if (position >= last) return plan.final[number];
  return row < 0 ? null : plan.images[row][number];
};
const isJoint = (plan, i) => i > 0 && plan.steps[i - 1].model !== plan.steps[i].model;
const isAnew = (plan, i) => plan.from_step !== null && plan.steps[i].step >= plan.from_step
  && (i === 0 || plan.steps[i - 1].step < plan.from_step);
const phrases = [...new Set(data.plans.filter((plan) => plan.timeline)
  .flatMap((plan) => plan.timeline.courses.map((c) => c.phrase)))];
data.plans.forEach((plan) => {
  plan.courses = plan.seeds.map((_, number) => (plan.timeline
    ? plan.timeline.courses.slice(number * phrases.length, (number + 1) * phrases.length) : []));
});

byId("prompt").textContent = `“${data.prompt}”`;
byId("footer").textContent = data.footer;
byId("at").max = last;
const cursors = [];                    // of the charts: functions of the position
let against = "", filmed = null, peeking = false;
drawCharts();

// ---- what a picture is compared with, in place
const choose = (value, text) => make("option", byId("against"), { value }, text);
choose("", "nothing");
choose("before", "the step before");
choose("last", "the last step");
data.plans.forEach((plan, i) => choose(`${i}`, data.plans.length > 1 ? plan.name : ""));
if (data.plans.length < 2) byId("against").lastChild.remove();

function compared(plan, position, number) {
  const row = rowAt(plan, position);
  if (row < 0) return null;
  if (against === "before") return row ? plan.images[row - 1][number] : null;
  if (against === "last") return plan.images[plan.steps.length - 1][number];
  const other = data.plans[Number(against)];
  let at = other.seeds.indexOf(plan.seeds[number]);
  if (at < 0 && other.seeds.length === plan.seeds.length) at = number;  // a change of seeds
  if (at < 0 && other.seeds.length === 1) at = 0;
  return at < 0 ? null : sourceAt(other, position, at);
}

const changes = data.plans.some((plan) => plan.from_step !== null);
const views = data.plans.map((plan) => {
  const root = make("section", byId("plans"), { class: "plan", "aria-label": plan.name });
  const across = Math.max(1, Math.min(plan.seeds.length, Math.round(Math.sqrt(plan.seeds.length))));
  root.style.setProperty("--across", across);
  const factor = across * data.plans.length <= 6 ? 3 : 2;  // whole multiples keep pixels crisp
  const size = data.pixels <= 96 ? data.pixels * factor : Math.min(data.pixels, 224);
  root.style.setProperty("--size", `${size}px`);
  root.style.setProperty("--wide", `${Math.max(across * (size + 10) - 10, 220)}px`);
  const [name, ...change] = plan.name.split(" · ");
  make("h2", root, {}, name);
  if (changes) make("p", root, { class: change.length ? "change" : "state" },
    change.join(" · ") || "unchanged");
  const state = make("p", root, { class: "state" });
  const legs = make("div", root, { class: "legs", "aria-hidden": "true" });
  const marks = plan.steps.map((step, i) => {
    const mark = make("span", legs);
    mark.style.background = colour(step.model);
    mark.title = `step ${step.step}, ${step.model}${isAnew(plan, i) ? ", changed from here" : ""}`;
    mark.classList.toggle("joint", isJoint(plan, i));
    mark.classList.toggle("anew", isAnew(plan, i));
    mark.addEventListener("click", () => { stop(); draw(times.indexOf(step.timestep)); });
    return mark;
  });
  const grid = make("div", root, { class: data.pixels <= 96 ? "pictures crisp" : "pictures" });
  const figures = plan.seeds.map((seed, number) => {
    const figure = make("figure", grid);
    const frame = make("button", figure, { class: "frame", type: "button", "aria-pressed": "false" });
    const image = make("img", frame, { alt: "", decoding: "sync" });
    const over = make("img", frame, { alt: "", decoding: "sync" });
    const none = make("span", frame, { class: "none" });
    const bar = make("i", make("div", figure, { class: "bar" }));
    const caption = make("figcaption", figure), line = make("div", caption);
    make("span", line, {}, `seed ${seed}`);
    const share = make("span", line);
    const scores = plan.courses[number].map((course, i) => {
      const row = make("div", caption), name = make("span", row, { class: "phrase" });
      make("span", name, {}, "● ").style.color = PHRASES[i % PHRASES.length];
      name.append(course.phrase);
      return { name, course, value: make("span", row) };
    });
    frame.addEventListener("click", () => film(filmed === seed ? null : seed));
    return { figure, frame, image, over, none, bar, seed, number, share, scores };
  });
  return { plan, root, state, marks, figures };
});

function drawFigure(view, plan, position, caption) {
  const row = rowAt(plan, position), source = sourceAt(plan, position, view.number);
  const alone = against === "" || data.plans[Number(against)] === plan;  // what others differ from
  const other = source && !alone && compared(plan, position, view.number);
  view.image.hidden = !source || (!alone && !other);
  view.over.hidden = !other;
  view.frame.classList.toggle("differs", Boolean(other));
  view.none.textContent = row < 0 ? "not begun" : !source ? "no picture"
    : !alone && !other ? "nothing to compare" : "";
  if (source) view.image.src = source;
  if (other) view.over.src = other;
  view.image.alt = `${plan.name}, seed ${view.seed}, ${caption}`;
  const share = row < 0 ? null : plan.share_by_seed[row][view.number];
  view.share.textContent = percent(share);
  view.bar.style.width = `${100 * Math.min(1, Math.max(0, share || 0))}%`;
  for (const { name, course, value } of view.scores) {
    const score = row < 0 ? null : course.scores[row];
    const gone = course.abandoned !== null && row >= 0 && plan.steps[row].step >= course.abandoned;
    value.textContent = score === null ? "" : score.toFixed(2);
    value.classList.toggle("there", score !== null && score > plan.timeline.threshold);
    name.classList.toggle("gone", gone);
    name.title = gone ? `${course.phrase}: gone at step ${course.abandoned}` : course.phrase;
  }
}

function draw(position) {
  byId("at").value = position;
  const moment = peeking ? last : position;
  const caption = moment >= last ? "finished images" : `timestep ${Math.round(times[moment])}`;
  byId("level").textContent = caption;
  byId("at").setAttribute("aria-valuetext", caption);
  for (const { plan, state, marks, figures } of views) {
    const row = rowAt(plan, moment), step = plan.steps[row];
    state.textContent = row < 0 ? "not begun"
      : `step ${step.step} · sigma ${levelText(step.sigma)} · ${step.model}`;
    state.style.color = row < 0 ? "var(--grey)" : colour(step.model);
    marks.forEach((mark, i) => mark.classList.toggle("done", i <= row));
    figures.forEach((figure) => drawFigure(figure, plan, moment, caption));
  }
  cursors.forEach((move) => move(moment));
  drawNumbers(moment);
  drawReels(moment);
  const hash = filmed === null ? `#${position}` : `#${position},${filmed}`;
  try { history.replaceState(null, "", hash); } catch { /* a sandboxed frame has no history */ }
}

// ---- the numbers at this noise level
// A flow's first level, 2^24, stands for pure noise.
function levelText(sigma) {
  return sigma >= 1e6 ? "noise" : sigma.toPrecision(3);
}
const HEADS = ["plan", "step", "model", "timestep", "sigma", "guidance", "A = sigma²",
  "distance to go", "share of final", "seeds apart", ...phrases.map((phrase) => `${phrase}?`), ...(changes ? ["image moved by"] : [])];

function interval(cell, [value, low, high], form) {
  cell.textContent = value === null ? "" : form(value);
  if (low !== null) make("small", cell, {}, ` [${form(low)}, ${form(high)}]`);
}

function drawNumbers(position) {
  const table = byId("numbers");
  table.replaceChildren();
  make("caption", table, {}, "at this noise level; means over seeds, 95 % intervals");
  const head = make("tr", make("thead", table));
  HEADS.forEach((text) => make("th", head, { scope: "col" }, text));
  const body = make("tbody", table);
  views.filter((view) => !view.root.hidden).forEach(({ plan }) => {
    const line = make("tr", body), row = rowAt(plan, position), step = plan.steps[row];
    make("th", line, { scope: "row" }, plan.name);
    if (row < 0) { make("td", line, {}, "not begun"); return; }
    [step.step, step.model, step.timestep.toFixed(0), levelText(step.sigma), step.guidance,
      step.amplification.toPrecision(3)].forEach((text) => make("td", line, {}, text));
    interval(make("td", line), step.distance, (v) => v.toFixed(3));
    interval(make("td", line), step.share, percent);
    interval(make("td", line), step.spread, (v) => v.toFixed(3));
    phrases.forEach((_, i) => {
      const scores = plan.courses.map((seed) => seed[i].scores[row]).filter((v) => v !== null);
      const present = scores.filter((v) => v > plan.timeline.threshold).length;
      make("td", line, {}, `${present} of ${scores.length}`);
    });
    if (plan.moved !== null) interval(make("td", line), plan.moved, (v) => v.toFixed(3));
  });
}

// ---- the whole course of one seed
const reels = [];

function film(seed) {
  filmed = seed;
  views.flatMap((view) => view.figures).forEach((figure) => {
    figure.frame.setAttribute("aria-pressed", String(figure.seed === seed));
  });
  byId("film").hidden = seed === null;
  byId("filmed").textContent = `seed ${seed}, every step`;
  phrases.forEach((phrase, i) => {
    make("small", byId("filmed"), {}, ` ● ${phrase}`).style.color = PHRASES[i % PHRASES.length];
  });
  byId("reels").replaceChildren();
  reels.length = 0;
  data.plans.forEach((plan) => {
    const number = plan.seeds.indexOf(seed);
    if (number < 0) return;
    make("h3", byId("reels"), {}, plan.name);
    const reel = make("div", byId("reels"), {
      class: data.pixels <= 96 ? "reel crisp" : "reel", role: "group", "aria-label": plan.name,
    });
    const stills = plan.steps.map((step, i) => {
      const button = make("button", reel, { type: "button" });
      button.classList.toggle("joint", isJoint(plan, i));
      button.classList.toggle("anew", isAnew(plan, i));
      const source = plan.images[i][number], alt = `${plan.name}, step ${step.step}`;
      if (source) make("img", button, { class: "still", src: source, alt });
      else make("span", button, { class: "still" }, "no picture");
      const text = make("span", button, {}, `${step.step} · ${percent(plan.share_by_seed[i][number])}`);
      text.style.color = colour(step.model);
      plan.courses[number].forEach((course, k) => {
        const score = course.scores[i];
        if (score === null) return;
        const line = make("div", button, { title: course.phrase }, score.toFixed(2));
        line.style.color = PHRASES[k % PHRASES.length];
        if (score > plan.timeline.threshold) line.style.fontWeight = "600";
      });
      button.addEventListener("click", () => { stop(); draw(times.indexOf(step.timestep)); });
      return button;
    });
    reels.push({ plan, stills });
  });
  views.forEach(({ plan }) => plan.paths && plan.paths.forEach((curve) => {
    curve.path.setAttribute("opacity", seed === null ? .65 : curve.seed === seed ? 1 : .15);
  }));
  draw(Number(byId("at").value));
}

function drawReels(position) {
  reels.forEach(({ plan, stills }) => {
    const row = rowAt(plan, position);
    stills.forEach((still, i) => still.classList.toggle("now", i === row));
    if (row >= 0) stills[row].parentNode.scrollLeft = stills[row].offsetLeft
      - stills[row].parentNode.offsetLeft - 200;
  });
}
byId("close").addEventListener("click", () => film(null));

// ---- which plans and seeds are shown
function toggles(holder, names, apply) {
  if (names.length < 2) { holder.hidden = true; return; }
  names.forEach((name, number) => {
    const label = make("label", holder), box = make("input", label, { type: "checkbox" });
    box.checked = true;
    label.append(` ${name}`);
    box.addEventListener("change", () => apply(number, box.checked));
  });
}
toggles(byId("shown"), data.plans.map((plan) => plan.name), (number, on) => {
  views[number].root.hidden = !on;
  draw(position());
});
const seeds = [...new Set(data.plans.flatMap((plan) => plan.seeds))];
toggles(byId("seeds"), seeds.length > 16 ? [] : seeds, (number, on) => {
  views.flatMap((view) => view.figures).filter((figure) => figure.seed === seeds[number])
    .forEach(({ figure }) => { figure.hidden = !on; });
});
byId("against").addEventListener("change", () => {
  against = byId("against").value;
  draw(position());
});

// ---- moving through it
let timer = null;
const position = () => Number(byId("at").value);
function stop() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "play";
  byId("play").setAttribute("aria-pressed", "false");
  byId("level").setAttribute("aria-live", "polite");
}
function play() {
  if (timer) { stop(); return; }
  byId("play").textContent = "pause";
  byId("play").setAttribute("aria-pressed", "true");
  byId("level").setAttribute("aria-live", "off");
  draw(position() >= last ? 0 : position());
  timer = setInterval(() => (position() >= last ? stop() : draw(position() + 1)), 240);
}
function peek(on) {
  if (peeking !== on) { peeking = on; draw(position()); }
}
byId("play").addEventListener("click", play);
byId("at").addEventListener("input", () => { stop(); draw(position()); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const moves = { ArrowLeft: position() - 1, ArrowRight: position() + 1, Home: 0, End: last };
  if (event.key in moves) {
    stop();
    draw(Math.min(last, Math.max(0, moves[event.key])));
    event.preventDefault();
  } else if (event.key === " " && !event.target.closest("button, input[type=checkbox]")) {
    play();
    event.preventDefault();
  } else if (event.key === "f") {
    peek(true);
  } else if (event.key === "Escape" && filmed !== null) {
    film(null);
  }
});
document.addEventListener("keyup", (event) => { if (event.key === "f") peek(false); });
window.addEventListener("blur", () => peek(false));
function follow() {
  const [step, seed] = location.hash.slice(1).split(",");
  byId("at").value = Math.min(last, Math.max(0, Number(step) || 0));
  film(seeds.includes(seed) ? seed : null);
}
window.addEventListener("hashchange", follow);
follow();
