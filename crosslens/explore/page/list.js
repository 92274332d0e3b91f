// The list of latents: sorted, searched, one of them current.

const list = { shown: [], key: "max", down: true, rows: new Map() };

function drawList() {
  const query = document.getElementById("search").value.toLowerCase();
  const exact = /^\d+$/.test(query) ? Number(query) : null;
  list.shown = latents.filter((latent) => !query || latent.id === exact || haystack(latent).includes(query));
  const sign = list.down ? -1 : 1;
  list.shown.sort((a, b) => sign * (a[list.key] - b[list.key]) || a.id - b.id);
  if (query) list.shown.sort((a, b) => rank(b, query, exact) - rank(a, query, exact));
  document.querySelector("#latents tbody").replaceChildren(...list.shown.map(rowOf));
  document.getElementById("latents").setAttribute("aria-rowcount", list.shown.length + 1);
  document.getElementById("count").textContent =
    query ? `${list.shown.length} of ${latents.length}` : `${latents.length} latents`;
}

// What was looked for by number, then by the tokens a latent is most active on, then the others.
function rank(latent, query, exact) {
  if (latent.id === exact) return 2;
  return Number(data.label[latent.index].some((piece) => data.pieces[piece].toLowerCase().includes(query)));
}

function rowOf(latent) {
  const known = list.rows.get(latent.id);
  if (known) return known;
  const label = data.label[latent.index].map((piece) => token(data.pieces[piece], data.special.has(piece)));
  const row = el("tr", { "data-latent": latent.id },
    el("td", {}, el("a", { href: `#latent=${latent.id}` }, String(latent.id))),
    el("td", { class: "text" }, ...label),
    el("td", {}, percent(latent.density)),
    el("td", {}, number(latent.max)),
    el("td", {}, stripOf(latent)));
  row.addEventListener("click", () => { location.hash = `latent=${latent.id}`; });
  list.rows.set(latent.id, row);
  return row;
}

// Decoder norm per site as small bars.
function stripOf(latent) {
  const width = 60, height = 14, step = width / latent.norms.length;
  const top = latent.norms[latent.peak] || 1;
  const bars = latent.norms.map((norm, site) => {
    const high = (height - 1) * norm / top;
    return `M${(site * step).toFixed(1)},${height}v${-high.toFixed(1)}h${Math.max(1, step - 1).toFixed(1)}v${high.toFixed(1)}z`;
  });
  return svg("svg", { class: "strip", width, height, role: "img", "aria-label": `peaks at ${data.sites[latent.peak]}` },
    svg("title", {}, `peaks at ${data.sites[latent.peak]}`), svg("path", { d: bars.join("") }));
}

function sortBy(key) {
  list.down = key === list.key ? !list.down : key === "density" || key === "max";
  list.key = key;
  for (const head of document.querySelectorAll("#latents th")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.key === key) head.setAttribute("aria-sort", list.down ? "descending" : "ascending");
  }
  drawList();
}

function markCurrent(id) {
  document.querySelector("#latents tr[aria-current]")?.removeAttribute("aria-current");
  const row = list.rows.get(id);
  if (!row) return;
  row.setAttribute("aria-current", "true");
  row.scrollIntoView({ block: "nearest" });
}

// The latent `by` places after the current one, as the list stands.
function neighbour(id, by) {
  const at = list.shown.findIndex((latent) => latent.id === id);
  const next = at < 0 ? 0 : Math.min(Math.max(at + by, 0), list.shown.length - 1);
  return list.shown[next]?.id;
}
