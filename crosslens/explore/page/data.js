"use strict";
// The data of the page: unpacked once, then only read.

let data;
let latents = [];

async function unpack() {
  const packed = atob(document.getElementById("payload").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  data = JSON.parse(await new Response(stream).text());
  data.special = new Set(data.special);
  latents = data.id.map((id, index) => {
    const norms = data.norms[index];
    return {
      index, id, norms,
      density: data.count[index] / data.tokens,
      max: data.max[index],
      peak: norms.indexOf(Math.max(...norms)),
    };
  });
}

// An example as spans of text: {text, special, share, isPeak}; share is 0 where the latent is silent.
function spansOf(example) {
  const [place, length, peak, , , , , , pairs] = example;
  const level = new Map();
  for (let i = 0; i < pairs.length; i += 2) level.set(pairs[i], pairs[i + 1]);
  const spans = [];
  for (let offset = 0; offset < length; offset++) {
    const piece = data.text[place + offset];
    const share = (level.get(offset) ?? 0) / 255;
    if (piece >= 0) spans.push({ text: data.pieces[piece], special: data.special.has(piece), share: 0, isPeak: false });
    const last = spans.at(-1);
    last.share = Math.max(last.share, share);
    last.isPeak ||= offset === peak;
  }
  return spans;
}

// Lower-case text a latent is active on, for the search; made when first asked for.
function haystack(latent) {
  latent.haystack ??= data.examples[latent.index]
    .map((example) => spansOf(example).map((span) => (span.share > 0 ? span.text : "\u0000")).join(""))
    .join("\u0000").toLowerCase();
  return latent.haystack;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1);
  const text = value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
  return text;
}

function percent(share) {
  return share >= 1e-4 ? `${number(share * 100)} %` : share.toExponential(0);
}

// Elements. Text goes in as text nodes only, never as HTML.
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Whitespace that must be seen: the glyphs are drawn by CSS, so that copying gives the text itself.
function visible(text, spaces) {
  return text.split(/(\n|\t| )/).filter(Boolean).map((part) => {
    if (part === "\n") return el("span", { class: "glyph break" }, part);
    if (part === "\t") return el("span", { class: "glyph tab" }, part);
    if (part === " " && spaces) return el("span", { class: "glyph space" }, part);
    return part;
  });
}

function token(text, special) {
  if (special) return el("span", { class: "special" }, text);
  return el("bdi", {}, ...visible(text, true));
}
