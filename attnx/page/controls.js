// The controls of the page of one image, its keys, and its state in the address.

let timer = 0;

/** The largest number of heads. */
const most = () => Math.max(...stops.map((stop) => stop.heads.length));

function drawControls() {
  $("stop").value = state.stop;
  $("stop").setAttribute("aria-valuetext", stopNow().name);
  $("stopName").textContent = `${state.stop + 1} of ${stops.length}: ${stopNow().name}`;
  for (const name of ["to", "pieces", "smooth", "links", "common"]) $(name).checked = state[name] ?? view[name];
  for (const name of ["cmap", "alpha", "mass"]) $(name).value = view[name];
  $("massName").textContent = view.mass < 100 ? `${view.mass} %` : "all";
}

function saveState() {
  const values = Object.entries({ ...state, ...view })
    .filter(([name, value]) => name !== "picks" && value !== initial[name])
    .map(([name, value]) => [name, name === "cmap" ? data.cmaps[value] : Number(value)]);
  state.picks.forEach((pick, i) => values.push([`pick${i}`, (pick.keys ? "k" : "q") + pick.at.join(".")]));
  const hash = `#${new URLSearchParams(values)}`;
  try {
    if (hash !== (location.hash || "#")) history.replaceState(null, "", hash);
  } catch {
    // The page is in a frame without an address of its own.
  }
}

/** The state of an address; what is invalid is left out. */
function restoreState() {
  for (const own of [state, view]) for (const name of Object.keys(own)) own[name] = initial[name];
  state.picks = [];
  const values = new URLSearchParams(location.hash.slice(1));
  const ranges = { stop: [0, stops.length - 1], head: [0, most() - 1], alpha: [0, 100], mass: [1, 100] };
  for (const [name, text] of values) {
    const own = name in state ? state : view;
    if (name === "cmap") view.cmap = Math.max(0, data.cmaps.indexOf(text));
    else if (Object.hasOwn(ranges, name) && /^\d+$/.test(text)) own[name] = clamp(Number(text), ...ranges[name]);
    else if (typeof initial[name] === "boolean") own[name] = text === "1";
  }
  for (const name of ["pick0", "pick1"]) {
    const found = /^([kq])(\d+(?:\.\d+)*)$/.exec(values.get(name) ?? "");
    const count = found && countOf(sideOf(stopNow(), found[1] === "k"));
    const at = found ? found[2].split(".").map(Number).filter((each) => each < count) : []; // prettier-ignore
    if (at.length) state.picks.push({ keys: found[1] === "k", at });
  }
  update();
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => goTo((state.stop + 1) % stops.length), 700) : 0;
  $("play").ariaPressed = String(on);
  $("play").textContent = on ? "Stop" : "Play";
}

/** Sets some values and draws. */
function set(own, values) {
  Object.assign(own, values);
  update();
}

function unpin() {
  hovered = null;
  set(state, { picks: [] });
}

/** Shows the tokens of the tokenizer in place of the words. */
function showPieces(on) {
  unpin();
  set(state, { pieces: on });
}

const KEYS = {
  "[": ["Layer before", () => goTo(state.stop - 1)],
  "]": ["Layer after", () => goTo(state.stop + 1)],
  ",": ["Head before", () => goTo(state.stop, headNow() - 1)],
  ".": ["Head after", () => goTo(state.stop, headNow() + 1)],
  p: ["Play the layers", () => play(!timer)],
  t: ["Who attends to it", () => turn(!state.to)],
  s: ["Smooth, or a square for each patch", () => set(view, { smooth: !view.smooth })],
  l: ["Strongest links", () => set(view, { links: !view.links })],
  r: ["One range for all layers", () => set(view, { common: !view.common })],
  m: ["Patches with 60 % of the mass, as in DINO", () => set(view, { mass: view.mass < 100 ? 100 : 60 })],
  c: ["Next colours", () => set(view, { cmap: (view.cmap + 1) % tables.length })],
  "-": ["Less opaque", () => set(view, { alpha: Math.max(0, view.alpha - 10) })],
  "+": ["More opaque", () => set(view, { alpha: Math.min(100, view.alpha + 10) })],
  Escape: ["Unpin everything", unpin],
  ...(caption && { w: ["Words, or their pieces", () => showPieces(!state.pieces)] }),
};

/** Arrow keys move the patch, Enter and the space bar pin it. */
function onPictureKey(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const pick = shownPick(0);
  if (event.key in steps) {
    const side = sideOf(stopNow(), pick.keys);
    const place = placeOf(side, pick.at[0]);
    const along = (start, size, step, patchesAcross) => clamp(start + size / 2 + step / patchesAcross, 0, 1 - 1e-9);
    const [x, y] = steps[event.key];
    const next = place
      ? pickAt(along(place.x, place.width, x, side.extent[1]), along(place.y, place.height, y, side.extent[0]))
      : pickAt(0.5, 0.5);
    pointer = null;
    if (next && state.picks.length) state.picks[0] = next;
    else hovered = next;
    update();
  } else if (event.key === "Enter" || event.key === " ") pin(pick);
  else return;
  event.preventDefault();
}

/** Shift turns the map of the patch under the pointer. */
function press(down) {
  shift = down;
  if (pointer) hover(pickAt(...pointer));
}

document.onkeydown = (event) => {
  if (event.key === "Shift") press(true);
  // Letters choose an option of a list.
  if (event.ctrlKey || event.metaKey || event.altKey || (event.target.matches("select") && event.key !== "Escape"))
    return;
  if (Object.hasOwn(KEYS, event.key)) KEYS[event.key][1]();
};
document.onkeyup = (event) => {
  if (event.key === "Shift") press(false);
};
document.onpointerup = () => {
  drag.from = null;
};

function makeControls() {
  $("stop").max = stops.length - 1;
  $("stop").oninput = () => goTo(Number($("stop").value));
  $("play").onclick = () => play(!timer);
  $("to").onchange = () => turn($("to").checked);
  $("pieces").onchange = () => showPieces($("pieces").checked);
  for (const name of ["smooth", "links", "common"]) $(name).onchange = () => set(view, { [name]: $(name).checked });
  for (const name of ["cmap", "alpha", "mass"]) $(name).oninput = () => set(view, { [name]: Number($(name).value) });
  $("cmap").append(...data.cmaps.map((name, value) => element("option", { value }, name)));
  $("caption").hidden = $("piecesLabel").hidden = $("helpWords").hidden = !caption;
  $("help").hidden = Boolean(caption);
  for (const [at, { heads }] of stops.entries()) {
    const own = heads.map((_, head) => makeThumb(at, head));
    allThumbs.push(...own);
    const line = own.map((thumb) => thumb.made);
    $("overview").append(...(most() > 1 ? [element("div", { className: "line" }, ...line)] : line));
  }
  for (const [key, [text]] of Object.entries(KEYS)) $("keys").append(element("dt", {}, key), element("dd", {}, text));
  $("notes").append(...data.notes.map((note) => element("li", {}, note)));
}

content().then((buffer) => {
  unpack(buffer);
  makeControls();
  window.onhashchange = restoreState;
  restoreState();
  document.documentElement.dataset.ready = "";
});
