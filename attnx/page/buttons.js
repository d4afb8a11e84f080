// The buttons of the page of one image: tokens without a place in the picture, and small maps of layers and heads.

/** A button for a token that is a word, or has no place in the picture. */
function makeChip(side, at, keys, both) {
  const made = element("button", { type: "button", className: "chip" }, nameOf(side, at) || "□", element("small"));
  made.dataset.at = at;
  const own = () => ({ keys: both ? state.to : keys, at: [at] });
  made.onpointerenter = (event) => {
    if (caption && drag.from !== null && event.buttons & 1) {
      drag.moved = true;
      const first = Math.min(drag.from, at);
      pinWords(Array.from({ length: Math.abs(drag.from - at) + 1 }, (_, i) => first + i));
    } else if (!event.buttons) hover(own());
  };
  made.onpointerdown = (event) => {
    Object.assign(drag, { from: at, moved: false });
    if (made.hasPointerCapture(event.pointerId)) made.releasePointerCapture(event.pointerId);
  };
  made.onfocus = () => made.matches(":focus-visible") && hover(own());
  made.onclick = () => {
    if (drag.moved) drag.moved = false;
    else if (caption) toggleWord(at);
    else pin(own());
  };
  return { made, side, at, keys, both };
}

function drawChip({ made, side, at, keys, both }, limits) {
  const { pick, values } = panels[0];
  const valued = both || pick.keys !== keys;
  made.ariaPressed = String(state.picks.some((each) => (both || each.keys === keys) && each.at.includes(at)));
  made.classList.toggle("picked", pick.at.includes(at) && (both || pick.keys === keys));
  made.title = valued ? `${nameOf(side, at)}: ${digits(values[at], 5)}` : nameOf(side, at);
  made.lastChild.textContent = valued && !caption ? ` ${digits(values[at], 3)}` : "";
  const start = 3 * (valued ? colourOf(values[at], limits) : 0);
  const rgb = [...tables[view.cmap].subarray(start, start + 3)];
  const light = rgb.reduce((sum, value, i) => sum + [0.2126, 0.7152, 0.0722][i] * (value / 255) ** 2.2, 0);
  made.style.backgroundColor = valued ? `rgb(${rgb})` : "";
  made.style.color = valued ? (light > 0.18 ? "#000" : "#fff") : "";
}

let chips = [];

/** Makes the buttons of a stop's tokens, once as long as they stay the same. */
function makeChips() {
  const [{ queries, keys }, box] = [stopNow(), caption ? $("caption") : $("tokens")];
  const of = `${queries} ${keys} ${state.pieces}`;
  if (box.dataset.of === of) return;
  box.dataset.of = of;
  box.replaceChildren();
  chips = [];
  for (const isKeys of queries === keys ? [false] : [false, true]) {
    const side = sideOf(stopNow(), isKeys);
    const after = Array.from(side.after.keys(), (i) => side.before.length + patches(side) + i);
    const list = [...side.before.keys(), ...after].filter((at) => !caption || at < caption.pieces === state.pieces);
    const made = list.map((at) => makeChip(side, at, isKeys, queries === keys));
    const title = caption ? "" : queries === keys ? "Tokens: " : isKeys ? "Keys: " : "Queries: ";
    if (made.length) box.append(element("p", { className: "chips" }, title, ...made.map((chip) => chip.made)));
    chips.push(...made);
  }
  if (caption && caption.score !== null) box.append(element("p", {}, `Match: ${caption.score.toFixed(2)}`));
}

function drawChips() {
  const { limits, values, pick } = panels[0];
  // Without a map over the picture, the range is that of the tokens.
  const valued = chips.filter((chip) => chip.both || pick.keys !== chip.keys).map((chip) => values[chip.at]);
  for (const chip of chips) drawChip(chip, limits ?? [0, rangeOf(valued)[1]]);
}

/** A small map as a button that shows its layer and head. */
function makeThumb(at, head) {
  const label = `${stops[at].name}, ${stops[at].heads[head]}`;
  const canvas = element("canvas", { width: 1, height: 1 });
  if (data.size) canvas.style.aspectRatio = data.size.join(" / ");
  const made = element("button", { type: "button", className: "thumb", title: label, ariaLabel: label }, canvas);
  made.onclick = () => goTo(at, head);
  return { made, canvas, at, head };
}

function drawThumb({ made, canvas, at, head }, pick) {
  const own = moved(pick, stopNow(), stops[at]) ?? defaultPick(stops[at]);
  const map = mapOf(sideOf(stops[at], !own.keys), valuesOf(planeOf(stops[at], head), own));
  made.ariaCurrent = String(at === state.stop && head === headNow());
  if (!map) return;
  [canvas.height, canvas.width] = map.grid;
  const limits = view.common ? panels[0].limits : null;
  paint(canvas, map, limits ?? rangeOf(map.values), tables[view.cmap], false, null);
}

let headThumbs = [];
const allThumbs = [];

/** The heads of the stop as larger maps. */
function makeHeads() {
  const { heads } = stopNow();
  $("headField").hidden = heads.length < 2;
  if ($("heads").dataset.of === String(state.stop)) return;
  $("heads").dataset.of = state.stop;
  headThumbs = heads.length < 2 ? [] : heads.map((_, head) => makeThumb(state.stop, head));
  $("heads").replaceChildren(...headThumbs.map(({ made }, i) => element("span", {}, made, heads[i])));
}

/** The heads whose maps of the pick are most like the shown one, by the cosine. */
function drawSimilar(pick) {
  const stop = stopNow();
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const shown = panels[0].values;
  const alike = (other) => other.heads.length > 1 && other.queries === stop.queries && other.keys === stop.keys;
  const others = stop.heads.length > 1 ? allThumbs.filter(({ at, head }) => head && alike(stops[at])) : [];
  const found = others.map(({ at, head }) => {
    const values = valuesOf(planeOf(stops[at], head), pick);
    return { at, head, cosine: dot(shown, values) / Math.sqrt(dot(shown, shown) * dot(values, values) || 1) };
  });
  const best = found.filter(({ at, head }) => at !== state.stop || head !== headNow());
  best.sort((a, b) => b.cosine - a.cosine);
  const buttons = best.slice(0, 3).map(({ at, head, cosine }) => {
    const text = `${stops[at].name}, ${stops[at].heads[head]} (${cosine.toFixed(2)})`;
    return element("button", { type: "button", onclick: () => goTo(at, head) }, text);
  });
  $("similar").replaceChildren("Most similar for this token, by cosine: ", ...buttons);
}
