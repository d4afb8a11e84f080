"use strict";
// What both pages need: their data, small helpers, and the drawing of a map.

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_{|";
const LEVELS = 131;

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** An element with properties and children. Text is set as text, never as markup. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A number with some digits. */
function digits(value, count) {
  if (value === 0) return "0";
  return Math.abs(value) < 1e-3 ? value.toExponential(count - 1) : value.toPrecision(count);
}

/** The bytes of the page, unpacked: five characters for four bytes, then deflate. */
async function content() {
  const text = $("content").textContent;
  const digit = new Uint8Array(128);
  [...DIGITS].forEach((character, value) => (digit[character.charCodeAt(0)] = value));
  const bytes = new DataView(new ArrayBuffer((text.length / 5) * 4));
  for (let from = 0, to = 0; from < text.length; from += 5, to += 4) {
    let word = 0;
    for (let i = 0; i < 5; i++) word = word * 85 + digit[text.charCodeAt(from + i)];
    bytes.setUint32(to, word);
  }
  const packed = new Blob([new Uint8Array(bytes.buffer, 0, data.bytes)]);
  return new Response(packed.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

/** The smallest and the largest value; [0, 0] if there is none. */
function rangeOf(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

/** 1 for the largest patches that together hold a share of the map's mass, as attnx.mass_mask; null for all. */
function massMask(values, share) {
  if (share >= 1) return null;
  const order = Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
  const total = values.reduce((sum, value) => sum + value, 0);
  const inside = new Uint8Array(values.length);
  let running = 0;
  for (const at of order) {
    running += values[at] / total;
    if (running > 1 - share) inside[at] = 1;
  }
  return inside;
}

/** The index of a colour: as matplotlib, and 0 for a constant map. */
const colourOf = (value, [low, high]) =>
  high > low ? clamp(Math.floor(((value - low) / (high - low)) * 256), 0, 255) : 0;

/**
 * Draws a map over the whole of a canvas, as attnx.resize reads it at the centre of each pixel.
 * map: {values, grid: [rows, columns], extent: size of the picture in patches}; inside: a mask of patches, or null.
 */
function paint(canvas, { values, grid, extent }, range, table, smooth, inside) {
  const { width, height } = canvas;
  const [rows, columns] = grid;
  const image = new ImageData(width, height);
  const pixels = image.data;
  const place = (pixel, size, patches, count) => {
    const centre = ((pixel + 0.5) / size) * patches;
    const nearest = Math.min(Math.floor(centre), count - 1);
    const at = clamp(centre - 0.5, 0, count - 1);
    const first = Math.floor(at);
    return { nearest, first, second: Math.min(first + 1, count - 1), share: at - first };
  };
  const across = Array.from({ length: width }, (_, x) => place(x, width, extent[1], columns));
  for (let y = 0, to = 0; y < height; y++) {
    const down = place(y, height, extent[0], rows);
    const [up, low] = [down.first * columns, down.second * columns];
    for (let x = 0; x < width; x++, to += 4) {
      const { nearest, first, second, share } = across[x];
      const cell = down.nearest * columns + nearest;
      if (inside && !inside[cell]) continue;
      let value = values[cell];
      if (smooth) {
        const above = values[up + first] * (1 - share) + values[up + second] * share;
        const below = values[low + first] * (1 - share) + values[low + second] * share;
        value = above * (1 - down.share) + below * down.share;
      }
      const colour = colourOf(value, range) * 3;
      pixels[to] = table[colour];
      pixels[to + 1] = table[colour + 1];
      pixels[to + 2] = table[colour + 2];
      pixels[to + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
