// The page of a job's maps. A row is an index into the job; the maps and thumbnails of 64 rows come from a script.

const CELL = 166; // pixels of a cell and its gap: two of them on a phone
const LINE = 196; // pixels of a line of cells
const CACHED = 96; // chunks in memory
const TALLEST = 8e6; // browsers limit the height of an element
const BINS = 48;

const initial = { query: "", sort: "row", down: false, kind: "", low: 0, high: 100, cmap: 0, alpha: 60 };
const view = { ...initial };
const columns = {}; // numbers and texts of all rows
const chunks = new Map(); // name: rows, or null while it loads
const cells = new Map(); // place in the list: element
let tables = [];
let list = []; // rows that are shown, in order
let searchable = null;
let opened = -1; // place in the list
let word = 0; // of the enlarged picture; 0: the mean
let queued = false;

// The addresses of chunks are names from the page's own data, below the folder of the page.
const policy = window.trustedTypes?.createPolicy("attnx", { createScriptURL: (name) => `chunks/${name}` });
const addressOf = (name) => policy?.createScriptURL(name) ?? `chunks/${name}`;

function unpack(buffer) {
  const rows = data.rows;
  ["entropy", "peak", "score"].forEach((name, i) => (columns[name] = new Float32Array(buffer, 4 * rows * i, rows)));
  columns.kind = new Uint16Array(buffer, 12 * rows, rows);
  columns.level = new Uint8Array(buffer, 14 * rows, rows);
  tables = data.cmaps.map((_, i) => new Uint8Array(buffer, 15 * rows + 768 * i, 768));
  const texts = new Uint8Array(buffer, 15 * rows + 768 * tables.length);
  Object.assign(columns, JSON.parse(new TextDecoder().decode(texts)));
}

/** The index of the chunk of a row. */
function chunkOf(row) {
  let [low, high] = [0, data.chunks.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (data.chunks[middle][1] <= row) low = middle;
    else high = middle - 1;
  }
  return data.chunks[low];
}

/** The maps and the thumbnail of a row; null while they load, {missing: true} if there are none. */
function contentOf(row) {
  const [name, first] = chunkOf(row);
  if (!chunks.has(name)) load(name);
  const rows = chunks.get(name);
  if (rows) {
    // The newest is the last that is dropped.
    chunks.delete(name);
    chunks.set(name, rows);
  }
  return rows && (rows[row - first] ?? { missing: true });
}

function load(name) {
  chunks.set(name, null);
  const script = document.createElement("script");
  script.src = addressOf(name);
  const done = (rows) => () => {
    if (!chunks.get(name)) chunks.set(name, rows);
    script.remove();
    for (const old of chunks.keys()) {
      if (chunks.size <= CACHED) break;
      if (chunks.get(old)) chunks.delete(old);
    }
    render();
  };
  script.onload = done([]);
  script.onerror = done([]);
  document.head.append(script);
}

/** Called by the script of a chunk. */
window.attnxChunk = (name, rows) => chunks.set(name, rows);

/** A map of a row: that of all heads, layers and words for 0, or of a word. */
function mapOf(content, index) {
  const [height, width] = content.grid;
  content.bytes ??= Uint8Array.from(atob(content.maps), (character) => character.charCodeAt(0));
  const codes = content.bytes.subarray(index * height * width, (index + 1) * height * width);
  const values = Float32Array.from(codes, (code) => (code / 255) * content.max[index]);
  return { values, grid: content.grid, extent: content.grid };
}

/** The picture of a row with its map in a box of `side` pixels. */
function fill(box, content, side, index, smooth) {
  box.replaceChildren();
  const show = (width, height, ...children) => {
    const scale = side / Math.max(width, height);
    box.style.width = `${width * scale}px`;
    box.style.height = `${height * scale}px`;
    box.append(...children);
  };
  if (!content?.grid) {
    show(1, 1);
    return;
  }
  const map = mapOf(content, index);
  const canvas = element("canvas", { className: "map" });
  const draw = (width, height) => {
    const scale = smooth / Math.max(width, height);
    [canvas.width, canvas.height] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    paint(canvas, map, rangeOf(map.values), tables[view.cmap], true, null);
  };
  if (!content.photo) {
    draw(content.grid[1], content.grid[0]);
    show(content.grid[1], content.grid[0], canvas);
    return;
  }
  canvas.style.opacity = view.alpha / 100;
  const image = element("img", { alt: "", src: `data:image/jpeg;base64,${content.photo}` });
  box.image = image;
  image.onload = () => {
    // The box may have got another picture while this one was decoded.
    if (box.image !== image) return;
    draw(image.naturalWidth, image.naturalHeight);
    show(image.naturalWidth, image.naturalHeight, image, canvas);
  };
}

const numbersOf = (row) =>
  ["entropy", "peak", "score"]
    .filter((name) => !Number.isNaN(columns[name][row]))
    .map((name) => `${name} ${digits(columns[name][row], 3)}`)
    .join(", ");

function makeCell(place) {
  const row = list[place];
  const box = element("span", { className: "picture" });
  const title = [columns.key[row], columns.text?.[row], columns.error[row] ?? numbersOf(row)]
    .filter(Boolean)
    .join("\n");
  const label = element("span", { className: "key" }, columns.key[row]);
  const cell = element("button", { type: "button", className: "cell", title }, box, label);
  cell.onclick = () => open(place);
  cell.waiting = !columns.kind[row];
  cell.box = box;
  if (columns.kind[row]) box.append(data.kinds[columns.kind[row] - 1]);
  return cell;
}

/** Puts the visible cells in place, and fills those whose chunk has come. */
function render() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    const scroller = $("scroller");
    const across = Math.max(1, Math.floor(scroller.clientWidth / CELL));
    const total = Math.ceil(list.length / across) * LINE;
    const height = Math.min(total, TALLEST);
    $("space").style.height = `${height}px`;
    // Of a very long list, a pixel of scrolling stands for several.
    const most = Math.max(1, height - scroller.clientHeight);
    const top = (scroller.scrollTop / most) * Math.max(0, total - scroller.clientHeight);
    const first = Math.max(0, Math.floor(top / LINE) - 1) * across;
    const last = Math.min(list.length, (Math.ceil((top + scroller.clientHeight) / LINE) + 1) * across);
    for (const [place, cell] of cells) {
      if (place >= first && place < last) continue;
      cell.remove();
      cells.delete(place);
    }
    for (let place = first; place < last; place++) {
      if (!cells.has(place)) {
        cells.set(place, makeCell(place));
        $("space").append(cells.get(place));
      }
      const cell = cells.get(place);
      const [x, y] = [(place % across) * CELL, Math.floor(place / across) * LINE - top + scroller.scrollTop];
      cell.style.transform = `translate(${x}px, ${y}px)`;
      const content = cell.waiting ? contentOf(list[place]) : null;
      if (!content) continue;
      cell.waiting = false;
      if (content.missing) cell.box.append("not made yet: run the command again");
      else fill(cell.box, content, CELL - 18, 0, 96);
    }
    if (opened >= 0) enlarge();
  });
}

/** Makes all cells anew. */
function redraw() {
  for (const cell of cells.values()) cell.remove();
  cells.clear();
  render();
}

/** Rows that match the search and the filters, sorted. */
function select() {
  const needle = view.query.toLowerCase();
  if (needle) searchable ??= columns.key.map((key, row) => `${key}\n${columns.text?.[row] ?? ""}`.toLowerCase());
  const [from, to] = limits();
  const all = view.low === 0 && view.high === 100;
  const [group, number] = [view.kind[0], Number(view.kind.slice(1))];
  const fits = (row) => {
    if (needle && !searchable[row].includes(needle)) return false;
    if (group === "e" && (number ? columns.kind[row] !== number : !columns.kind[row])) return false;
    if (group === "l" && columns.level[row] !== number) return false;
    return all || (columns.entropy[row] >= from && columns.entropy[row] <= to);
  };
  list = Array.from({ length: data.rows }, (_, row) => row).filter(fits);
  const values = columns[view.sort];
  if (view.sort === "key") {
    const order = new Intl.Collator("en", { numeric: true }).compare;
    list.sort((a, b) => order(values[a], values[b]) || a - b);
  } else if (values) {
    // Rows without a number come last in both directions.
    const empty = view.down ? -Infinity : Infinity;
    const of = (row) => (Number.isNaN(values[row]) ? empty : values[row]);
    list.sort((a, b) => (of(a) === of(b) ? a - b : of(a) < of(b) ? -1 : 1));
  }
  if (view.down) list.reverse();
  $("count").textContent = `${list.length.toLocaleString("en")} of ${data.rows.toLocaleString("en")} rows`;
  $("scroller").scrollTop = 0;
  drawHistogram();
  redraw();
}

const limits = () => {
  const [low, high] = columns.span;
  return [low + ((high - low) * view.low) / 100, low + ((high - low) * view.high) / 100];
};

/** The number of rows by entropy. Lines mark the four levels: quarters of the rows. */
function drawHistogram() {
  const canvas = $("histogram");
  const context = canvas.getContext("2d");
  const [low, high] = columns.span;
  const [from, to] = limits();
  const counts = new Array(BINS).fill(0);
  for (const value of columns.entropy) {
    if (!Number.isNaN(value)) counts[clamp(Math.floor(((value - low) / (high - low || 1)) * BINS), 0, BINS - 1)]++;
  }
  context.clearRect(0, 0, canvas.width, canvas.height);
  const [wide, most] = [canvas.width / BINS, Math.max(1, ...counts)];
  const style = getComputedStyle(document.body);
  counts.forEach((count, i) => {
    const value = low + ((i + 0.5) / BINS) * (high - low);
    context.globalAlpha = value >= from && value <= to ? 0.8 : 0.25;
    context.fillStyle = style.getPropertyValue("color");
    context.fillRect(i * wide, canvas.height * (1 - count / most), wide - 1, canvas.height * (count / most));
  });
  context.globalAlpha = 1;
  context.fillStyle = "#d93025";
  for (const edge of columns.edges)
    context.fillRect(((edge - low) / (high - low || 1)) * canvas.width, 0, 2, canvas.height);
  $("range").textContent = `${digits(from, 3)} to ${digits(to, 3)} nats`;
}

function open(place) {
  if (place < 0 || place >= list.length) return;
  [opened, word] = [place, 0];
  enlarge();
  if (!$("large").open) $("large").showModal();
}

function enlarge() {
  const row = list[opened];
  const content = columns.kind[row] ? {} : (contentOf(row) ?? {});
  $("largeKey").textContent = columns.key[row];
  $("largeText").textContent = columns.text?.[row] ?? "";
  $("largeNumbers").textContent =
    columns.error[row] ?? `${numbersOf(row)}, level ${columns.level[row] + 1} of ${data.levels}`;
  const side = Math.min(560, window.innerWidth - 64, window.innerHeight - 280);
  const shown = `${row} ${word} ${Boolean(content.grid)} ${view.cmap} ${view.alpha}`;
  if ($("large").dataset.shown === shown) return;
  $("large").dataset.shown = shown;
  fill($("largePicture"), content, Math.max(side, 160), word, 480);
  const focused = document.activeElement?.dataset?.word;
  const chips = (content.words ?? []).map((text, i) => {
    const chip = element("button", { type: "button", className: "chip", ariaPressed: String(word === i + 1) }, text);
    chip.dataset.word = i;
    chip.onclick = () => {
      word = word === i + 1 ? 0 : i + 1;
      enlarge();
    };
    return chip;
  });
  $("largeWords").replaceChildren(...chips);
  if (focused !== undefined) chips[focused]?.focus();
}

function build() {
  const finite = columns.entropy.filter((value) => !Number.isNaN(value)).sort();
  columns.span = finite.length ? [finite[0], finite[finite.length - 1]] : [0, 1];
  columns.edges = [1, 2, 3]
    .map((i) => finite[Math.round((finite.length * i) / data.levels)])
    .filter((each) => each >= 0);
  $("about").textContent = `${data.about}.${data.rows < data.of ? ` The first ${data.rows} of ${data.of} rows.` : ""}`;
  const option = (value, text) => element("option", { value }, text);
  const levels = Array.from({ length: data.levels }, (_, i) => option(`l${i}`, `level ${i + 1} of the entropies`));
  const kinds = data.kinds.map((kind, i) => option(`e${i + 1}`, `error: ${kind}`));
  $("kind").append(option("", "all rows"), ...levels, ...(kinds.length ? [option("e0", "all errors"), ...kinds] : []));
  $("cmap").append(...data.cmaps.map((name, i) => option(i, name)));
  for (const name of ["query", "sort", "kind", "low", "high", "cmap", "alpha", "down"]) {
    const input = $(name);
    const field = name === "down" ? "checked" : "value";
    input[field] = view[name];
    input.oninput = () => {
      view[name] = typeof initial[name] === "number" ? Number(input.value) : input[field];
      if (name === "cmap") drawMean();
      if (name === "cmap" || name === "alpha") redraw();
      else select();
    };
  }
  $("tools").onsubmit = () => false;
  $("scroller").onscroll = render;
  window.onresize = redraw;
  $("before").onclick = () => open(opened - 1);
  $("after").onclick = () => open(opened + 1);
  $("close").onclick = () => $("large").close();
  $("large").onclose = () => (opened = -1);
  $("large").onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) open(opened + step);
  };
  if (columns.score.every(Number.isNaN)) $("sort").lastElementChild.remove();
  $("meanBox").hidden = !data.mean;
  drawMean();
}

function drawMean() {
  if (!data.mean) return;
  [$("mean").height, $("mean").width] = data.mean.grid;
  paint($("mean"), { ...data.mean, extent: data.mean.grid }, rangeOf(data.mean.values), tables[view.cmap], false, null);
}

content().then((buffer) => {
  unpack(buffer);
  build();
  select();
  document.documentElement.dataset.ready = "";
});
