// One latent: figures, profile, histogram, logits, examples.

function drawLatent(latent) {
  const page = document.getElementById("latent");
  page.replaceChildren(
    titleOf(latent),
    el("div", { class: "panels" }, profileOf(latent), histogramOf(latent), ...logitsOf(latent), ...partnersOf(latent)),
    ...examplesOf(latent));
  const label = data.label[latent.index].map((piece) => data.pieces[piece].trim()).join(", ");
  document.getElementById("said").textContent = `Latent ${latent.id}, active on ${label}`;
}

function titleOf(latent) {
  const { index } = latent;
  const facts = [
    ["density", `${percent(latent.density)} (${data.count[index].toLocaleString("en")} tokens)`],
    ["max", number(latent.max)], ["mean when active", number(data.mean[index])],
    ["peak site", data.sites[latent.peak]], ...diffOf(index),
  ];
  return el("div", { class: "title" },
    el("h2", {}, `Latent ${latent.id}`),
    el("dl", { class: "stats" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("a", { href: "#" }, "← overview"));
}

function profileOf(latent) {
  const top = latent.norms[latent.peak] || 1;
  const bars = latent.norms.flatMap((norm, site) => {
    const fill = el("i");
    fill.style.width = `${(100 * norm / top).toFixed(1)}%`;
    return [el("span", {}, data.sites[site]), el("span", { class: "bar", "aria-hidden": "true" }, fill),
      el("span", { class: "value" }, number(norm))];
  });
  return el("section", {}, el("h3", {}, "Decoder norm"), el("div", { class: latent.norms.length > 10 ? "profile many" : "profile" }, ...bars));
}

function histogramOf(latent) {
  const [first, ...counts] = data.histogram[latent.index];
  const { lowest, perOctave } = data.bins;
  const edge = (bin) => 2 ** (lowest + bin / perOctave);
  const width = 200, height = 84, step = width / Math.max(counts.length, 12), most = Math.max(...counts);
  const bars = counts.map((count, i) => {
    const share = Math.min(1, edge(first + i + 0.5) / latent.max);
    const bar = svg("rect", { class: "on-bar", x: i * step, width: Math.max(1, step - 1),
      y: height - height * count / most, height: height * count / most },
      svg("title", {}, `${number(edge(first + i))} to ${number(edge(first + i + 1))}: ${count} tokens`));
    bar.style.fill = `color-mix(in srgb, var(--hot) ${Math.round(20 + 80 * share)}%, var(--bg))`;
    bar.style.stroke = "var(--hot)";
    return bar;
  });
  const last = first + counts.length;
  const summary = `Activations from ${number(edge(first))} to ${number(latent.max)} on ${data.count[latent.index]} tokens, in quarter octaves.`;
  return el("section", {}, el("h3", {}, "Activations, log scale"),
    svg("svg", { viewBox: `-1 -4 ${width + 2} ${height + 20}`, role: "img", "aria-label": summary },
      ...bars,
      svg("text", { x: 0, y: height + 13 }, number(edge(first))),
      svg("text", { x: step * counts.length, y: height + 13, "text-anchor": "end" }, number(edge(last)))));
}

function logitsOf(latent) {
  const tables = [["Promotes", data.top[latent.index]], ["Suppresses", data.bottom[latent.index]]];
  if (!tables[0][1].length) return [];
  return tables.map(([name, rows]) => el("section", {},
    el("h3", { title: `logits of its decoder at ${data.logitSite}, alone, through the final norm and the head; against the mean over the vocabulary` },
      `${name}, ${data.logitSite}`),
    el("table", { class: "logits" }, el("tbody", {}, ...rows.map(([piece, value]) => el("tr", {},
      el("td", {}, token(data.pieces[piece], data.special.has(piece))), el("td", {}, number(value))))))));
}

function examplesOf(latent) {
  return [...bySection(data.examples[latent.index])].flatMap(([section, examples]) => [
    headOf(latent, section),
    el("ul", { class: "examples" }, ...examples.map((example) => lineOf(example))),
  ]);
}

function bySection(examples) {
  const found = new Map();
  for (const example of examples) found.set(example[3], [...(found.get(example[3]) ?? []), example]);
  return found;
}

function headOf(latent, section) {
  if (section === 0) {
    return el("h3", { class: "section" }, el("b", {}, "Strongest"), "activation on each token, click a line to unfold it",
      el("span", { class: "legend" }, "0", el("i", { "aria-hidden": "true" }), number(latent.max)));
  }
  const [low, high] = data.bounds[latent.index][section - 1];
  const share = `${Math.round(100 / data.intervals)} % of its active tokens`;
  return el("h3", { class: "section" }, el("b", {}, `${number(low)} to ${number(high)}`), share);
}

function lineOf(example) {
  const [, , , , value, repeats, row, document_] = example;
  const spans = spansOf(example);
  const at = spans.findIndex((span) => span.isPeak);
  const where = `${data.documents[document_] ?? ""} · block ${Math.floor(row / data.block)}, position ${row % data.block}`;
  const line = el("div", { class: "line-of-text", dir: "auto", role: "button", tabindex: "0", "aria-expanded": "false", title: where },
    el("span", { class: "before" }, el("span", {}, ...drawn(spans.slice(0, at)))),
    el("span", { class: "after" }, ...drawn(spans.slice(at))));
  const toggle = () => line.setAttribute("aria-expanded", String(line.getAttribute("aria-expanded") !== "true"));
  line.addEventListener("click", () => { if (getSelection().isCollapsed) toggle(); });
  line.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
  });
  return el("li", { class: "example" },
    el("span", { class: "soft" }, number(value)), line,
    el("span", { class: "soft", title: repeats > 1 ? `${repeats} times with the same tokens around it` : "" }, repeats > 1 ? `×${repeats}` : ""),
    el("span", { class: "where soft" }, where));
}

// Spans as nodes; silent neighbours are one text.
function drawn(spans) {
  const nodes = [];
  for (const span of spans) {
    if (span.special) nodes.push(marked(el("span", { class: "special" }, span.text), span));
    else if (span.share > 0 || span.isPeak) nodes.push(marked(el("span", {}, ...visible(span.text, true)), span));
    else nodes.push(...visible(span.text, span.text.trim() === ""));
  }
  return nodes;
}

function marked(node, span) {
  if (span.share > 0) {
    node.classList.add("on");
    node.style.setProperty("--share", Math.max(0.05, span.share).toFixed(3));
    node.title = `${Math.round(100 * span.share)} % of the maximum`;
  }
  if (span.isPeak) node.classList.add("peak");
  return node;
}
