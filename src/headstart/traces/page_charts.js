"use strict";
// Charts of a trace, before page.js, which calls drawCharts: x is the timestep, falling from left
// to right. make, data, times, phrases, stop and draw are of page.js.
const W = 520, H = 190, L = 42, R = 12, T = 10, B = 26;
const px = (t) => L + (W - L - R) * (times[0] - t) / ((times[0] - lowest()) || 1);
const lowest = () => Math.min(0, times[times.length - 1]);
const path = (points) => points.filter((p) => p[1] !== null)
  .map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function chart(title, low, high, ticks, form, level = null) {
  const box = make("section", byId("charts"), { class: "chart" });
  make("h2", box, {}, title);
  const svg = make("svg", box, { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `${title}; the numbers are in the table` });
  const py = (v) => T + (H - T - B) * (1 - (v - low) / ((high - low) || 1));
  for (const tick of ticks) {
    make("line", svg, { x1: L, x2: W - R, y1: py(tick), y2: py(tick), stroke: "var(--faint)" });
    make("text", svg, { x: L - 6, y: py(tick) + 4, "text-anchor": "end" }, form(tick));
  }
  if (level !== null) make("line", svg, { x1: L, x2: W - R, y1: py(level), y2: py(level),
    stroke: "var(--grey)", "stroke-dasharray": "6 5" });
  make("text", svg, { x: L, y: H - 6 }, `timestep ${Math.round(times[0])}`);
  make("text", svg, { x: W - R, y: H - 6, "text-anchor": "end" }, "0");
  const cursor = make("line", svg, { y1: T, y2: H - B, stroke: "var(--ink)" });
  cursors.push((position) => {
    const x = px(position >= last ? lowest() : times[position]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  });
  const follow = (event) => {
    if (!event.buttons) return;
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * W / box.width;
    const near = times.map((t, i) => [Math.abs(px(t) - x), i]).sort((a, b) => a[0] - b[0])[0];
    stop();
    draw(x > px(times[last - 1]) + 8 ? last : near[1]);
  };
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointermove", follow);
  return { svg, py, key: make("div", box, { class: "key" }) };
}

function entry(key, hue, text) {
  const item = make("span", key);
  make("b", item).style.background = hue;
  item.append(text);
}

function curves(title, column, low, high, ticks, form) {
  const panel = chart(title, low, high, ticks, form);
  data.plans.forEach((plan, number) => {
    const hue = curveColour(plan, number);
    const clip = (v) => (v === null ? null : panel.py(Math.min(high, Math.max(low, v))));
    const at = (i) => plan.steps.map((s) => [px(s.timestep), clip(s[column][i])]);
    const band = [...at(2), ...at(1).reverse()];
    if (band.every((p) => p[1] !== null)) make("polygon", panel.svg, {
      points: band.map((p) => p.join(",")).join(" "), fill: hue, opacity: .14 });
    make("path", panel.svg, { d: path(at(0)), fill: "none", stroke: hue, "stroke-width": 2.4 });
    at(0).forEach(([x, y]) => y !== null && make("circle", panel.svg,
      { cx: x, cy: y, r: 3, fill: hue }));
    entry(panel.key, hue, plan.name);
  });
}

function timelineChart(plan) {
  const line = plan.timeline, scores = line.courses.flatMap((c) => c.scores)
    .filter((v) => v !== null);
  const low = Math.max(-1, Math.min(0, ...scores)), high = Math.max(line.threshold, ...scores);
  const panel = chart(`${plan.name}: is it there, beyond the prompt without it?`, low, high, [low, line.threshold, high],
    (v) => v.toFixed(1), line.threshold);
  plan.paths = [];
  plan.courses.forEach((seed, number) => seed.forEach((course, phrase) => {
    const hue = PHRASES[phrase % PHRASES.length];
    const points = course.scores.map((v, i) => [px(plan.steps[i].timestep),
      v === null ? null : panel.py(Math.max(low, v))]);
    const curve = make("path", panel.svg, { d: path(points), fill: "none", stroke: hue,
      "stroke-width": 1.8, opacity: .65 });
    plan.paths.push({ path: curve, seed: plan.seeds[number] });
    points.forEach(([x, y]) => y !== null && make("circle", panel.svg,
      { cx: x, cy: y, r: 2.4, fill: hue }));
  }));
  phrases.forEach((phrase, i) => {
    const courses = plan.courses.map((seed) => seed[i]);
    const present = courses.filter((c) => c.appears !== null).length;
    const gone = plan.seeds.filter((_, seed) => courses[seed].abandoned !== null);
    const fate = line.controls[phrase] === null ? "not asked for"
      : `there in ${present} of ${courses.length}`
      + (gone.length ? `, dropped in seed ${gone.slice(0, 8).join(", ")}` : "")
      + (gone.length > 8 ? ` and ${gone.length - 8} more` : "");
    entry(panel.key, PHRASES[i % PHRASES.length], `${phrase}: ${fate}`);
  });
}

function drawCharts() {
  const all = (column) => data.plans.flatMap((plan) => plan.steps.flatMap((s) => s[column]))
    .filter((v) => v !== null);
  const shares = all("share"), spreads = all("spread");
  const floor = Math.max(0, Math.floor(10 * Math.min(.5, ...shares)) / 10);
  if (shares.length) curves("share of final structure, mean over seeds", "share", floor, 1,
    [floor, (1 + floor) / 2, 1], percent);
  if (spreads.length) {
    const high = Math.max(...spreads), form = (v) => v.toFixed(high < .1 ? 3 : 2);
    curves("how far seeds are apart", "spread", 0, high, [0, high / 2, high], form);
  }
  data.plans.filter((plan) => plan.timeline).forEach(timelineChart);
}
