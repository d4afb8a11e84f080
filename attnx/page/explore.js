// The page of one image. A pick is one token or several on one side of a map: {keys: false for queries, at: [indices]}.

const SIDE = 560; // pixels of the longer side of a drawn map
const LINKS = 5;
const { stops, sides, caption } = data;
const state = { stop: data.start, head: 0, picks: [], to: false, pieces: false };
const view = { cmap: 0, alpha: 60, mass: 100, smooth: true, links: false, common: false };
const start = JSON.stringify({ ...state, ...view });
const planes = []; // of all heads of all stops
let tables = []; // colours
let hovered = null; // a pick
let shift = false;
let timer = 0;
let queued = false;

const patches = (side) => (side.grid ? side.grid[0] * side.grid[1] : 0);
const countOf = (side) => side.before.length + patches(side) + side.after.length;
const sideOf = (stop, keys) => sides[keys ? stop.keys : stop.queries];
const planeOf = (stop, head) => planes[stop.first + Math.min(head, stop.heads.length - 1)];

function unpack(buffer) {
  let scales = 0;
  for (const stop of stops) {
    stop.first = planes.length;
    const [rows, columns] = [countOf(sideOf(stop, false)), countOf(sideOf(stop, true))];
    for (let i = 0; i < stop.heads.length; i++, scales += rows + columns) planes.push({ rows, columns, scales });
  }
  let codes = 4 * scales;
  tables = data.cmaps.map((_, i) => new Uint8Array(buffer, codes + i * 768, 768));
  codes += 768 * tables.length;
  for (const plane of planes) {
    plane.rowMax = new Float32Array(buffer, 4 * plane.scales, plane.rows);
    plane.columnMax = new Float32Array(buffer, 4 * (plane.scales + plane.rows), plane.columns);
    plane.codes = new Uint8Array(buffer, codes, plane.rows * plane.columns);
    codes += plane.codes.length;
  }
}

/** The mean row (or column) of the picked queries (or keys): a value for each token of the other side. */
function valuesOf({ rows, columns, rowMax, columnMax, codes }, pick) {
  const found = new Float32Array(pick.keys ? rows : columns);
  for (const at of pick.at) {
    for (let i = 0; i < found.length; i++) {
      const [row, column] = pick.keys ? [i, at] : [at, i];
      const scale = Math.min(rowMax[row], columnMax[column]);
      found[i] += (codes[row * columns + column] / LEVELS) * scale;
    }
  }
  return pick.at.length > 1 ? found.map((value) => value / pick.at.length) : found;
}

/** The part of the values that lies over the picture; null if no token does. */
function mapOf(side, values) {
  if (!side.grid) return null;
  return { ...side, values: values.subarray(side.before.length, side.before.length + patches(side)) };
}

/** The place of a token in shares of the picture: {x, y, width, height}; null if it has none. */
function placeOf(side, at) {
  const patch = at - side.before.length;
  if (!side.grid || patch < 0 || patch >= patches(side)) return null;
  const [height, width] = [1 / side.extent[0], 1 / side.extent[1]];
  const [x, y] = [(patch % side.grid[1]) * width, Math.floor(patch / side.grid[1]) * height];
  return { x, y, width: Math.min(width, 1 - x), height: Math.min(height, 1 - y) };
}

/** The token at a place of the picture, in shares. */
function tokenAt({ before, grid, extent }, x, y) {
  const row = clamp(Math.floor(y * extent[0]), 0, grid[0] - 1);
  return before.length + row * grid[1] + clamp(Math.floor(x * extent[1]), 0, grid[1] - 1);
}

function nameOf(side, at) {
  const patch = at - side.before.length;
  if (patch < 0) return side.before[at];
  if (patch >= patches(side)) return side.after[patch - patches(side)];
  return `patch (${Math.floor(patch / side.grid[1])}, ${patch % side.grid[1]})`;
}

/** The same token on another side: the patch at its place, or the token with its name; -1 if there is none. */
function transferred(from, at, to) {
  if (from === to) return at;
  const place = placeOf(from, at);
  if (place) return to.grid ? tokenAt(to, place.x + place.width / 2, place.y + place.height / 2) : -1;
  const name = nameOf(from, at);
  if (to.before.includes(name)) return to.before.indexOf(name);
  return to.after.includes(name) ? to.before.length + patches(to) + to.after.indexOf(name) : -1;
}

/** A pick of another stop, or of the other side of a map; null if no token is the same. */
function moved(pick, from, to, keys = pick.keys) {
  const [own, other] = [sideOf(from, pick.keys), sideOf(to, keys)];
  const at = pick.at.map((each) => transferred(own, each, other)).filter((each) => each >= 0);
  return at.length ? { keys, at: [...new Set(at)] } : null;
}

function defaultPick(stop) {
  const side = sideOf(stop, state.to);
  if (caption && !state.to) return { keys: false, at: [caption.pieces] };
  const middle = side.grid ? tokenAt(side, 0.5, 0.5) : 0;
  return { keys: state.to, at: [side.before.length ? 0 : middle] };
}

function pickAt(x, y) {
  const stop = stops[state.stop];
  const keys = [state.to !== shift, state.to === shift].find((each) => sideOf(stop, each).grid);
  return keys === undefined ? null : { keys, at: [tokenAt(sideOf(stop, keys), x, y)] };
}

const shownPick = (panel) => state.picks[panel] ?? (panel ? null : (hovered ?? defaultPick(stops[state.stop])));
const same = (a, b) => a && b && a.keys === b.keys && a.at.join() === b.at.join();

/** Pins a pick, unpins it, or compares it with the one that is pinned. */
function pin(pick) {
  if (!pick) return;
  const others = state.picks.filter((each) => !same(each, pick));
  if (others.length < state.picks.length) state.picks = others;
  else state.picks = [...state.picks.slice(0, 1), pick];
  hovered = null;
  update();
}

/** Adds a word to the pinned ones, or takes it away. */
function toggle(index) {
  const at = state.picks[0]?.keys === false ? state.picks[0].at : [];
  const left = at.includes(index) ? at.filter((each) => each !== index) : [...at, index];
  state.picks = left.length ? [{ keys: false, at: left }] : [];
  update();
}

function goTo(stop, head = state.head) {
  const from = stops[state.stop];
  state.stop = clamp(stop, 0, stops.length - 1);
  state.head = clamp(head, 0, Math.max(...stops.map((each) => each.heads.length)) - 1);
  const move = (pick) => pick && moved(pick, from, stops[state.stop]);
  state.picks = state.picks.map(move).filter(Boolean);
  hovered = move(hovered);
  update();
}

function turn(to) {
  const stop = stops[state.stop];
  const move = (pick) => pick && moved(pick, stop, stop, !pick.keys);
  state.to = to;
  state.picks = state.picks.map(move).filter(Boolean);
  hovered = move(hovered);
  update();
}

/** The range of the colours of a map: its own, or that of the same pick in all layers and heads. */
function limitsOf(map, pick) {
  if (!view.common) return rangeOf(map.values);
  const limits = [0, 0];
  for (const stop of stops) {
    const own = moved(pick, stops[state.stop], stop);
    if (!own || !sideOf(stop, !pick.keys).grid) continue;
    stop.heads.forEach((_, head) => {
      const values = valuesOf(planeOf(stop, head), own);
      limits[1] = Math.max(limits[1], rangeOf(mapOf(sideOf(stop, !pick.keys), values).values)[1]);
    });
  }
  return limits;
}

function describe(pick) {
  const side = sideOf(stops[state.stop], pick.keys);
  const names = pick.at.slice(0, 8).map((at) => nameOf(side, at));
  return names.join(" ") + (pick.at.length > 8 ? " …" : "");
}

const svg = (tag, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

function makePanel(figure) {
  const [width, height] = data.size ?? [1, 1];
  const scale = SIDE / Math.max(width, height);
  const size = { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
  const canvas = element("canvas", { ...size, className: "map" });
  const marks = svg("svg", { viewBox: `0 0 ${size.width} ${size.height}`, "aria-hidden": "true" });
  const label = "Picture with its map. Arrow keys move the patch, Enter pins it, Escape unpins it.";
  const box = element(
    "div",
    { className: "picture", tabIndex: 0, role: "application", ariaLabel: label },
    canvas,
    marks,
  );
  box.style.aspectRatio = `${size.width} / ${size.height}`;
  if (data.photo) box.prepend(element("img", { src: `data:image/jpeg;base64,${data.photo}`, alt: "" }));
  const bar = element("canvas", { width: 256, height: 1, className: "bar" });
  const [low, high, text] = ["span", "span", "p"].map((tag) => element(tag));
  figure.append(box, element("figcaption", {}, text, element("div", { className: "row" }, low, bar, high)));
  const share = (event) => {
    const frame = box.getBoundingClientRect();
    return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
  };
  box.onpointermove = (event) => {
    shift = event.shiftKey;
    const [x, y] = share(event);
    if (!state.picks.length) hovered = pickAt(x, y);
    update([x, y]);
  };
  box.onpointerleave = () => {
    hovered = null;
    update();
  };
  box.onclick = (event) => {
    shift = event.shiftKey;
    pin(pickAt(...share(event)));
  };
  box.onkeydown = (event) => onPictureKey(event);
  return { figure, canvas, marks, bar, low, high, text };
}

function drawPanel(panel, pick) {
  panel.figure.hidden = !pick;
  panel.limits = null;
  if (!pick) return;
  const stop = stops[state.stop];
  const [own, other] = [sideOf(stop, pick.keys), sideOf(stop, !pick.keys)];
  const all = valuesOf(planeOf(stop, state.head), pick);
  const map = mapOf(other, all);
  const context = panel.canvas.getContext("2d");
  context.clearRect(0, 0, panel.canvas.width, panel.canvas.height);
  panel.canvas.style.opacity = view.alpha / 100;
  panel.text.textContent = `${describe(pick)}: ${pick.keys ? "who attends to it" : "what it attends to"}`;
  panel.bar.parentElement.hidden = !map;
  Object.assign(panel, { all, other, pick });
  if (map) {
    panel.limits = limitsOf(map, pick);
    paint(panel.canvas, map, panel.limits, tables[view.cmap], view.smooth, massMask(map.values, view.mass / 100));
    const shades = { values: Float32Array.from({ length: 256 }, (_, i) => i), grid: [1, 256], extent: [1, 256] };
    paint(panel.bar, shades, [0, 255], tables[view.cmap], false, null);
    [panel.low.textContent, panel.high.textContent] = panel.limits.map(digits);
  }
  const { width, height } = panel.canvas;
  panel.marks.replaceChildren();
  for (const place of pick.at.map((at) => placeOf(own, at)).filter(Boolean)) {
    const box = { x: place.x * width, y: place.y * height, width: place.width * width, height: place.height * height };
    panel.marks.append(svg("rect", { ...box, class: "outer" }), svg("rect", box));
    if (view.links && map) panel.marks.append(...linksOf(place, map, pick.keys, width, height));
  }
}

/** Arrows along the strongest links of a patch, in the direction in which attention looks. */
function linksOf(place, map, keys, width, height) {
  const order = Array.from(map.values.keys()).sort((a, b) => map.values[b] - map.values[a]);
  const centre = (each) => [(each.x + each.width / 2) * width, (each.y + each.height / 2) * height];
  return order.slice(0, LINKS).map((patch) => {
    const ends = [centre(place), centre(placeOf({ ...map, before: [] }, patch))];
    const [[x1, y1], [x2, y2]] = keys ? ends.reverse() : ends;
    const [dx, dy] = [x2 - x1, y2 - y1];
    const long = Math.hypot(dx, dy) || 1;
    const [ux, uy] = [(dx / long) * 9, (dy / long) * 9];
    const head = `M${x2} ${y2}L${x2 - ux - uy / 2} ${y2 - uy + ux / 2}M${x2} ${y2}L${x2 - ux + uy / 2} ${y2 - uy - ux / 2}`;
    return svg("path", { d: `M${x1} ${y1}L${x2} ${y2}${head}`, class: "link" });
  });
}

function read(point) {
  const panel = panels[0];
  if (!panel.pick) return;
  let text = `${stops[state.stop].name}, ${stops[state.stop].heads[Math.min(state.head, stops[state.stop].heads.length - 1)]}`;
  if (point && panel.other.grid) {
    const at = tokenAt(panel.other, ...point);
    const [from, to] = panel.pick.keys
      ? [nameOf(panel.other, at), describe(panel.pick)]
      : [describe(panel.pick), nameOf(panel.other, at)];
    text += `: ${from} to ${to}: ${digits(panel.all[at])}`;
  }
  $("reading").textContent = text;
}

/** A button for a token, with its value as its colour if it is on the other side of the pick. */
function chip(side, at, keys, limits) {
  const { pick, all } = panels[0];
  const name = nameOf(side, at);
  const one = stops[state.stop].queries === stops[state.stop].keys;
  const own = { keys: one ? state.to : keys, at: [at] };
  const valued = one || pick.keys !== keys;
  const pinned = state.picks.some((each) => each.keys === own.keys && each.at.includes(at));
  const made = element("button", { type: "button", className: "chip", ariaPressed: String(pinned) }, name || "□");
  made.dataset.at = at;
  made.classList.toggle("picked", pick.at.includes(at) && (one || pick.keys === keys));
  if (valued) {
    const colour = colourOf(all[at], limits) * 3;
    const rgb = [...tables[view.cmap].subarray(colour, colour + 3)];
    made.style.backgroundColor = `rgb(${rgb})`;
    const light = rgb.reduce((sum, value, i) => sum + [0.2126, 0.7152, 0.0722][i] * (value / 255) ** 2.2, 0);
    made.style.color = light > 0.18 ? "#000" : "#fff";
    made.title = `${name}: ${digits(all[at])}`;
    if (!caption) made.append(element("small", {}, ` ${digits(all[at])}`));
  }
  made.onpointerenter = (event) => {
    if (caption && event.buttons & 1 && drag !== null) {
      dragged = true;
      const [first, last] = [Math.min(drag, at), Math.max(drag, at)];
      state.picks = [{ keys: false, at: Array.from({ length: last - first + 1 }, (_, i) => first + i) }];
      update();
    } else if (!state.picks.length && !event.buttons) {
      hovered = own;
      update();
    }
  };
  made.onpointerdown = (event) => {
    if (caption) [drag, dragged] = [at, false];
    made.releasePointerCapture?.(event.pointerId);
  };
  made.onfocus = () => {
    if (state.picks.length || !made.matches(":focus-visible")) return;
    hovered = own;
    update();
  };
  made.onclick = () => {
    if (dragged) dragged = false;
    else if (caption) toggle(at);
    else pin(own);
  };
  return made;
}

let drag = null; // the word where a drag began
let dragged = false;

function drawTokens() {
  const stop = stops[state.stop];
  const groups = stop.queries === stop.keys ? [["Tokens", false]] : [["Queries", false], ["Keys", true]]; // prettier-ignore
  const focused = document.activeElement?.dataset?.at;
  const box = caption ? $("caption") : $("tokens");
  box.replaceChildren();
  for (const [title, keys] of groups) {
    const side = sideOf(stop, keys);
    let list = [...Array(side.before.length).keys()];
    list.push(...Array.from(side.after.keys(), (i) => side.before.length + patches(side) + i));
    if (caption) {
      list = list.filter((at) => at < caption.pieces === state.pieces);
    }
    if (!list.length) continue;
    // The colours of tokens beside the picture have the range of the map, or their own without one.
    const limits = panels[0].limits ?? [0, rangeOf(list.map((at) => panels[0].all[at] ?? 0))[1]];
    const chips = list.map((at) => chip(side, at, keys, limits));
    const label = caption ? "" : `${title}: `;
    box.append(element("p", { className: "chips" }, label, ...chips));
  }
  if (caption)
    box.append(element("p", { id: "score" }, caption.score === null ? "" : `Match: ${caption.score.toFixed(2)}`));
  if (focused !== undefined) box.querySelector(`[data-at="${focused}"]`)?.focus({ preventScroll: true });
}

/** A small map as a button that shows its layer and head. */
function thumb(at, head) {
  const stop = stops[at];
  const label = `${stop.name}${stop.heads.length > 1 ? `, ${stop.heads[head]}` : ""}`;
  const canvas = element("canvas", { width: 1, height: 1 });
  const made = element("button", { type: "button", className: "thumb", title: label, ariaLabel: label }, canvas);
  made.onclick = () => goTo(at, head);
  return { made, canvas, at, head };
}

function drawThumb({ made, canvas, at, head }, pick) {
  const [stop, own] = [stops[at], moved(pick, stops[state.stop], stops[at]) ?? defaultPick(stops[at])];
  const map = mapOf(sideOf(stop, !own.keys), valuesOf(planeOf(stop, head), own));
  made.ariaCurrent = String(at === state.stop && head === Math.min(state.head, stop.heads.length - 1));
  if (!map) return;
  [canvas.height, canvas.width] = map.grid;
  paint(canvas, map, view.common ? panels[0].limits : rangeOf(map.values), tables[view.cmap], false, null);
}

let headThumbs = [];
let overviewThumbs = [];

function makeHeads() {
  const stop = stops[state.stop];
  $("headField").hidden = stop.heads.length < 2;
  if ($("head").dataset.of === String(state.stop)) return;
  $("head").dataset.of = state.stop;
  $("head").replaceChildren(...stop.heads.map((name, value) => element("option", { value }, name)));
  headThumbs = stop.heads.length < 2 ? [] : stop.heads.map((_, head) => thumb(state.stop, head));
  $("heads").replaceChildren(...headThumbs.map(({ made }, i) => element("span", {}, made, stop.heads[i])));
}

/** The heads whose maps of the pick are most like the shown one, by the cosine. */
function drawSimilar(pick) {
  $("similar").replaceChildren();
  const stop = stops[state.stop];
  if (stop.heads.length < 2) return;
  const shown = valuesOf(planeOf(stop, state.head), pick);
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const found = [];
  stops.forEach((other, at) => {
    if (other.queries !== stop.queries || other.keys !== stop.keys || other.heads.length < 2) return;
    for (let head = 1; head < other.heads.length; head++) {
      if (at === state.stop && head === state.head) continue;
      const values = valuesOf(planeOf(other, head), pick);
      found.push([dot(shown, values) / Math.sqrt(dot(shown, shown) * dot(values, values) || 1), at, head]);
    }
  });
  found.sort((a, b) => b[0] - a[0]);
  const buttons = found.slice(0, 3).map(([cosine, at, head]) => {
    const text = `${stops[at].name}, ${stops[at].heads[head]} (${cosine.toFixed(2)})`;
    return element("button", { type: "button", onclick: () => goTo(at, head) }, text);
  });
  $("similar").append("Most similar for this token, by cosine: ", ...buttons);
}

const panels = [makePanel($("panel0")), makePanel($("panel1"))];

function draw(point) {
  const stop = stops[state.stop];
  $("stop").value = state.stop;
  $("stop").setAttribute("aria-valuetext", stop.name);
  $("stopName").textContent = `${state.stop + 1} of ${stops.length}: ${stop.name}`;
  makeHeads();
  $("head").value = Math.min(state.head, stop.heads.length - 1);
  for (const name of ["to", "pieces"]) $(name).checked = state[name];
  for (const name of ["smooth", "links", "common"]) $(name).checked = view[name];
  for (const name of ["cmap", "alpha", "mass"]) $(name).value = view[name];
  $("massName").textContent = view.mass < 100 ? `${view.mass} %` : "all";
  panels.forEach((panel, i) => drawPanel(panel, shownPick(i)));
  drawTokens();
  const pick = shownPick(0);
  for (const each of [...headThumbs, ...overviewThumbs]) drawThumb(each, pick);
  drawSimilar(pick);
  read(point);
}

/** Draws once for all changes before the next frame, and writes the state into the address. */
function update(point) {
  update.point = point;
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    draw(update.point);
    save();
  });
}

function save() {
  const initial = JSON.parse(start);
  const changed = Object.entries({ ...state, ...view }).filter(
    ([name, value]) => name !== "picks" && value !== initial[name],
  );
  const values = changed.map(([name, value]) => [name, name === "cmap" ? data.cmaps[value] : Number(value)]);
  state.picks.forEach((pick, i) => values.push([`pick${i}`, (pick.keys ? "k" : "q") + pick.at.join(".")]));
  const hash = `#${new URLSearchParams(values)}`;
  if (hash === (location.hash || "#")) return;
  try {
    history.replaceState(null, "", hash);
  } catch {
    // A frame without an address keeps no state.
  }
}

/** The state that an address holds; what is invalid or out of range is left out. */
function restore() {
  const initial = JSON.parse(start);
  for (const own of [state, view]) for (const name of Object.keys(own)) own[name] = initial[name];
  const values = new URLSearchParams(location.hash.slice(1));
  const most = {
    stop: stops.length - 1,
    head: Math.max(...stops.map((each) => each.heads.length)) - 1,
    alpha: 100,
    mass: 100,
  };
  for (const [name, text] of values) {
    const own = name in state ? state : view;
    const number = Number(text);
    if (name === "cmap") view.cmap = Math.max(0, data.cmaps.indexOf(text));
    else if (name in most && Number.isInteger(number)) own[name] = clamp(number, name === "mass" ? 1 : 0, most[name]);
    else if (typeof own[name] === "boolean") own[name] = text === "1";
  }
  for (const name of ["pick0", "pick1"]) {
    const found = /^([kq])(\d+(?:\.\d+)*)$/.exec(values.get(name) ?? "");
    if (!found) continue;
    const keys = found[1] === "k";
    const at = found[2].split(".").map(Number).filter((each) => each < countOf(sideOf(stops[state.stop], keys))); // prettier-ignore
    if (at.length) state.picks.push({ keys, at });
  }
  update();
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => goTo((state.stop + 1) % stops.length), 700) : 0;
  $("play").ariaPressed = String(on);
  $("play").textContent = on ? "Stop" : "Play";
}

const flip = (name) => {
  view[name] = !view[name];
  update();
};
const shade = (step) => {
  view.alpha = clamp(view.alpha + step, 0, 100);
  update();
};

const KEYS = {
  "[": ["Layer before", () => goTo(state.stop - 1)],
  "]": ["Layer after", () => goTo(state.stop + 1)],
  ",": ["Head before", () => goTo(state.stop, state.head - 1)],
  ".": ["Head after", () => goTo(state.stop, state.head + 1)],
  p: ["Play the layers", () => play(!timer)],
  t: ["Who attends to it", () => turn(!state.to)],
  s: ["Smooth, or a square for each patch", () => flip("smooth")],
  l: ["Strongest links", () => flip("links")],
  r: ["One range for all layers", () => flip("common")],
  m: ["The patches with 60 % of the mass, as in DINO", () => ((view.mass = view.mass < 100 ? 100 : 60), update())],
  c: ["Next colours", () => ((view.cmap = (view.cmap + 1) % tables.length), update())],
  "-": ["Less opaque", () => shade(-10)],
  "+": ["More opaque", () => shade(10)],
  Escape: ["Unpin everything", () => ((state.picks = []), (hovered = null), update())],
};

function onPictureKey(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const pick = hovered ?? shownPick(0);
  if (step) {
    event.preventDefault();
    const side = sideOf(stops[state.stop], pick.keys);
    const place = placeOf(side, pick.at[0]);
    const centre = place ? [place.x + place.width / 2, place.y + place.height / 2] : [0.5, 0.5];
    const [x, y] = place ? [centre[0] + step[0] / side.extent[1], centre[1] + step[1] / side.extent[0]] : centre;
    hovered = pickAt(clamp(x, 0, 1 - 1e-9), clamp(y, 0, 1 - 1e-9));
    if (state.picks.length && hovered) state.picks = [hovered, ...state.picks.slice(1)];
    update();
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    pin(pick);
  }
}

document.onkeydown = (event) => {
  if (event.key === "Shift") shift = true;
  const typing = event.target.matches("select, input[type=range]") && event.key !== "Escape";
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key.length === 1)) return;
  KEYS[event.key]?.[1]();
};
document.onkeyup = (event) => {
  if (event.key === "Shift") shift = false;
};
document.onpointerup = () => (drag = null);

function build() {
  const most = Math.max(...stops.map((each) => each.heads.length));
  $("stop").max = stops.length - 1;
  $("stop").oninput = () => goTo(Number($("stop").value));
  $("play").onclick = () => play(!timer);
  $("head").onchange = () => goTo(state.stop, Number($("head").value));
  $("to").onchange = () => turn($("to").checked);
  $("pieces").onchange = () => ((state.pieces = $("pieces").checked), (state.picks = []), (hovered = null), update());
  for (const name of ["smooth", "links", "common"]) $(name).onchange = () => flip(name);
  for (const name of ["cmap", "alpha", "mass"])
    $(name).oninput = () => ((view[name] = Number($(name).value)), update());
  $("cmap").append(...data.cmaps.map((name, value) => element("option", { value }, name)));
  $("caption").hidden = $("piecesLabel").hidden = $("helpWords").hidden = !caption;
  $("help").hidden = caption !== undefined;
  stops.forEach((stop, at) => {
    if (stop.heads[0] !== "fused") return;
    $("fusions").append(element("button", { type: "button", onclick: () => goTo(at) }, stop.name));
  });
  overviewThumbs = stops.flatMap((stop, at) => stop.heads.map((_, head) => thumb(at, head)));
  stops.forEach((stop, at) => {
    const own = overviewThumbs.filter((each) => each.at === at).map((each) => each.made);
    if (most > 1) $("overview").append(element("div", { className: "thumbs line" }, ...own));
    else $("overview").append(...own);
  });
  for (const [key, [text]] of Object.entries(KEYS)) $("keys").append(element("dt", {}, key), element("dd", {}, text));
  $("notes").append(...data.notes.map((note) => element("li", {}, note)));
}

content().then((buffer) => {
  unpack(buffer);
  build();
  window.onhashchange = restore;
  restore();
  document.documentElement.dataset.ready = "";
});
