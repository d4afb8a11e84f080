// The page of one image: its state, and what is drawn of it.

const SIDE = 560; // pixels of the longer side of a drawn map
const LINKS = 5;
const state = { stop: data.start, head: 0, picks: [], to: false, pieces: false };
const view = { cmap: 0, alpha: 60, mass: 100, smooth: true, links: false, common: false };
const initial = { ...state, ...view };
let hovered = null; // a pick
let shift = false;
let queued = false;
let pointer = null; // the place under the pointer, in shares of the picture
const drag = { from: null, moved: false }; // over words

const stopNow = () => stops[state.stop];
const headNow = () => Math.min(state.head, stopNow().heads.length - 1);
const same = (a, b) => a !== null && b !== null && a.keys === b.keys && a.at.join() === b.at.join();

function defaultPick(stop) {
  if (caption && !state.to) return { keys: false, at: [caption.pieces] };
  const side = sideOf(stop, state.to);
  return { keys: state.to, at: [side.before.length || !side.grid ? 0 : tokenAt(side, 0.5, 0.5)] };
}

/** The pick of a panel: what is pinned; in the first one else what is under the pointer. */
const shownPick = (panel) => state.picks[panel] ?? (panel ? null : (hovered ?? defaultPick(stopNow())));

function pickAt(x, y) {
  const keys = [state.to !== shift, state.to === shift].find((each) => sideOf(stopNow(), each).grid);
  return keys === undefined ? null : { keys, at: [tokenAt(sideOf(stopNow(), keys), x, y)] };
}

function hover(pick) {
  if (state.picks.length || (hovered && pick && same(hovered, pick))) return;
  hovered = pick;
  update();
}

/** Pins a pick, unpins it, or compares it with the one that is pinned. */
function pin(pick) {
  if (!pick) return;
  const others = state.picks.filter((each) => !same(each, pick));
  state.picks = others.length < state.picks.length ? others : [...state.picks.slice(0, 1), pick];
  hovered = null;
  update();
}

/** Pins words as one pick. */
function pinWords(at) {
  state.picks = at.length ? [{ keys: false, at }] : [];
  hovered = null;
  update();
}

function toggleWord(at) {
  const pinned = state.picks[0]?.keys === false ? state.picks[0].at : [];
  pinWords(pinned.includes(at) ? pinned.filter((each) => each !== at) : [...pinned, at]);
}

/** Applies a move to all picks; those without a place are dropped. */
function movePicks(move) {
  state.picks = state.picks.map(move).filter(Boolean);
  hovered = hovered && move(hovered);
  update();
}

function goTo(stop, head = state.head) {
  const from = stopNow();
  state.stop = clamp(stop, 0, stops.length - 1);
  state.head = clamp(head, 0, most() - 1);
  movePicks((pick) => moved(pick, from, stopNow()));
}

function turn(to) {
  state.to = to;
  movePicks((pick) => moved(pick, stopNow(), stopNow(), !pick.keys));
}

/** The range of the colours of a map: its own, or from 0 to the largest value of the pick in all layers and heads. */
function limitsOf(map, pick) {
  if (!view.common) return rangeOf(map.values);
  let high = 0;
  for (const stop of stops) {
    const [own, other] = [moved(pick, stopNow(), stop), sideOf(stop, !pick.keys)];
    for (let head = 0; own && other.grid && head < stop.heads.length; head++) {
      high = Math.max(high, rangeOf(mapOf(other, valuesOf(planeOf(stop, head), own)).values)[1]);
    }
  }
  return [0, high];
}

function describe(pick) {
  const names = pick.at.slice(0, 8).map((at) => nameOf(sideOf(stopNow(), pick.keys), at));
  return names.join(" ") + (pick.at.length > 8 ? " …" : "");
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function makePanel(figure) {
  const [rows, columns] = sides.find((side) => side.grid)?.grid ?? [1, 1];
  const [width, height] = data.size ?? [columns, rows];
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
    pointer = share(event);
    hover(pickAt(...pointer));
    update();
  };
  box.onpointerleave = () => {
    pointer = null;
    hover(null);
    update();
  };
  box.onclick = (event) => {
    shift = event.shiftKey;
    pin(pickAt(...share(event)));
  };
  box.onkeydown = onPictureKey;
  return { figure, canvas, marks, bar, low, high, text };
}

function drawPanel(panel, pick) {
  panel.figure.hidden = !pick;
  if (!pick) return;
  const [own, other] = [sideOf(stopNow(), pick.keys), sideOf(stopNow(), !pick.keys)];
  const values = valuesOf(planeOf(stopNow(), state.head), pick);
  const map = mapOf(other, values);
  const limits = map && limitsOf(map, pick);
  Object.assign(panel, { values, other, pick, limits });
  const { width, height } = panel.canvas;
  panel.canvas.getContext("2d").clearRect(0, 0, width, height);
  panel.canvas.style.opacity = view.alpha / 100;
  panel.text.textContent = `${describe(pick)}: ${pick.keys ? "who attends to it" : "what it attends to"}`;
  panel.bar.parentElement.hidden = !map;
  if (map) {
    paint(panel.canvas, map, limits, tables[view.cmap], view.smooth, massMask(map.values, view.mass / 100));
    const shades = { values: [...Array(256).keys()], grid: [1, 256], extent: [1, 256] };
    paint(panel.bar, shades, [0, 255], tables[view.cmap], false, null);
    [panel.low.textContent, panel.high.textContent] = limits.map((value) => digits(value, 3));
  }
  panel.marks.replaceChildren();
  for (const { x, y, ...size } of pick.at.map((at) => placeOf(own, at)).filter(Boolean)) {
    const box = { x: x * width, y: y * height, width: size.width * width, height: size.height * height };
    panel.marks.append(svg("rect", { ...box, class: "outer" }), svg("rect", box));
    if (view.links && map) panel.marks.append(...linksOf({ x, y, ...size }, map, pick.keys, width, height));
  }
}

/** Arrows along the strongest links of a patch, in the direction in which attention looks. */
function linksOf(place, map, keys, width, height) {
  const order = Array.from(map.values.keys()).sort((a, b) => map.values[b] - map.values[a]);
  const centre = (each) => [(each.x + each.width / 2) * width, (each.y + each.height / 2) * height];
  return order.slice(0, LINKS).map((patch) => {
    const ends = [centre(place), centre(placeOf({ ...map, before: [] }, patch))];
    const [[x1, y1], [x2, y2]] = keys ? ends.reverse() : ends;
    const long = Math.hypot(x2 - x1, y2 - y1) || 1;
    const [dx, dy] = [((x2 - x1) / long) * 9, ((y2 - y1) / long) * 9];
    const tip = (side) => `M${x2} ${y2}l${-dx + (side * dy) / 2} ${-dy - (side * dx) / 2}`;
    return svg("path", { d: `M${x1} ${y1}L${x2} ${y2}${tip(1)}${tip(-1)}`, class: "link" });
  });
}

/** The value under the pointer, in words. */
function drawReading() {
  const { other, pick, values } = panels[0];
  const where = `${stopNow().name}, ${stopNow().heads[headNow()]}`;
  if (!pointer || !other.grid) {
    $("reading").textContent = where;
    return;
  }
  const at = tokenAt(other, ...pointer);
  const [from, to] = [describe(pick), nameOf(other, at)];
  $("reading").textContent =
    `${where}: ${pick.keys ? `${to} to ${from}` : `${from} to ${to}`}: ${digits(values[at], 5)}`;
}

const panels = [makePanel($("panel0")), makePanel($("panel1"))];

function draw() {
  panels.forEach((panel, i) => drawPanel(panel, shownPick(i)));
  makeChips();
  drawChips();
  makeHeads();
  for (const thumb of [...headThumbs, ...allThumbs]) drawThumb(thumb, panels[0].pick);
  drawSimilar(panels[0].pick);
  drawReading();
}

/** Draws once for all changes before the next frame, and writes the state into the controls and the address. */
function update() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    draw();
    drawControls();
    saveState();
  });
}
