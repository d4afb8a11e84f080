// The maps of the stops and the places of their tokens.
// A pick is one token or several on one side of a map: {keys: false for queries, at: [indices]}.

const { stops, sides, caption } = data;
const planes = []; // of all heads of all stops
let tables = []; // colours

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
  // A bfloat16 is the upper half of a float32.
  const floats = new Float32Array(Uint32Array.from(new Uint16Array(buffer, 0, scales), (bits) => bits << 16).buffer);
  let codes = 2 * scales;
  tables = data.cmaps.map((_, i) => new Uint8Array(buffer, codes + i * 768, 768));
  codes += 768 * tables.length;
  for (const plane of planes) {
    plane.rowScales = floats.subarray(plane.scales, plane.scales + plane.rows);
    plane.columnScales = floats.subarray(plane.scales + plane.rows, plane.scales + plane.rows + plane.columns);
    plane.codes = new Uint8Array(buffer, codes, plane.rows * plane.columns);
    codes += plane.codes.length;
  }
}

/** The mean row (or column) of the picked queries (or keys): a value for each token of the other side. */
function valuesOf({ rows, columns, rowScales, columnScales, codes }, pick) {
  const found = new Float32Array(pick.keys ? rows : columns);
  for (const at of pick.at) {
    for (let i = 0; i < found.length; i++) {
      const [row, column] = pick.keys ? [i, at] : [at, i];
      const scale = Math.min(rowScales[row], columnScales[column]);
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
  const [row, column] = [Math.floor(patch / side.grid[1]), patch % side.grid[1]];
  const { pool } = side;
  return pool > 1 ? `${pool} x ${pool} patches at (${row * pool}, ${column * pool})` : `patch (${row}, ${column})`;
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
